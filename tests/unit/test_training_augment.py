from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fourdh_batch.config import AugmentConfig
from fourdh_batch.geometry import axis_angle_to_rotmat, crop_square
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.training.augment import (
    FLIPPED_JOINTS,
    FLIPPED_KEYPOINTS,
    UNCHANGED,
    Changes,
    draw_changes,
    flip_keypoints,
    flip_pose,
    make_example,
)
from fourdh_batch.training.examples import Person
from fourdh_batch.types import F64, KEYPOINT_NAMES
from fourdh_batch.video.crops import crop_batch

WIDTH, HEIGHT = 320, 240
FOCAL_PX = 400.0
TRANSLATION_M = np.array([0.1, -0.05, 3.5])


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(scope="module")
def person(body: SmplBody) -> Person:
    """A person of the open body under a pinhole camera, seen by noise."""
    random = np.random.default_rng(3)
    pose = (0.3 * random.standard_normal((24, 3))).astype(np.float32)
    pose[0] = (np.pi - 0.2, 0.1, 0.3)
    rotations = axis_angle_to_rotmat(pose).astype(np.float32)
    betas = random.standard_normal(10).astype(np.float32)
    with torch.no_grad():
        posed = body.keypoints_3d(
            torch.from_numpy(rotations[None, :1]),
            torch.from_numpy(rotations[None, 1:]),
            torch.from_numpy(betas[None]),
        )[0].numpy()
    moved = posed + TRANSLATION_M
    pixels = FOCAL_PX * moved[:, :2] / moved[:, 2:] + (WIDTH / 2, HEIGHT / 2)
    low, high = pixels.min(axis=0), pixels.max(axis=0)
    center, size = crop_square(np.concatenate((low, high)))
    ones = np.ones((44, 1))
    return Person(
        image=random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
        box_center_px=center,
        box_size_px=float(size),
        longer_side_px=float((high - low).max()),
        keypoints_2d=np.hstack((pixels, ones)).astype(np.float32),
        keypoints_3d=np.hstack((posed, ones)).astype(np.float32),
        global_orient=rotations[:1],
        body_pose=rotations[1:],
        betas=betas,
        has_pose=1.0,
        has_betas=1.0,
    )


def projected(person: Person, changes: Changes, keypoints_3d: F64) -> F64:
    """Where augmented keypoints in space must appear: by a camera that looks at the crop.

    The box moves off the optical axis, so first the axis is turned: with the crop's centre as
    principal point the same points are seen under the translation (x, y, z) that puts the crop's
    centre at x = y = 0 in the picture plane.
    """
    size = person.box_size_px * changes.scale
    center = person.box_center_px + person.box_size_px * np.array(changes.translation)
    offset = (center - (WIDTH / 2, HEIGHT / 2)) / FOCAL_PX
    translation = TRANSLATION_M.copy()
    shear = -offset  # (x - z * offset) / z = x / z - offset
    if changes.is_flipped:
        # x -> last - x: the axis of the mirrored picture is at last - W / 2
        center = np.array([WIDTH - 1 - center[0], center[1]])
        shear = shear * (-1, 1)
        translation[0] *= -1
    angle = np.deg2rad(-changes.rotation_deg)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    position = keypoints_3d[:, :2] + turn @ translation[:2]
    depth = keypoints_3d[:, 2] + translation[2]
    result: F64 = FOCAL_PX * (position / depth[:, None] + turn @ shear) / size
    return result


@pytest.mark.parametrize(
    "changes",
    [
        UNCHANGED,
        Changes(scale=1.3, rotation_deg=50.0, translation=(0.02, -0.01)),
        Changes(scale=0.7, is_flipped=True, translation=(0.01, 0.02)),
        Changes(scale=0.9, rotation_deg=-33.0, is_flipped=True, translation=(-0.02, 0.0)),
    ],
)
def test_augmented_keypoints_in_space_project_onto_those_in_the_crop(
    person: Person, changes: Changes
) -> None:
    example = make_example(person, changes)
    expected = projected(person, changes, example.keypoints_3d[:, :3].astype(np.float64))
    np.testing.assert_allclose(example.keypoints_2d[:, :2], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("changes", [UNCHANGED, Changes(rotation_deg=70.0)])
def test_the_body_of_the_parameters_is_the_one_of_the_keypoints(
    person: Person, body: SmplBody, changes: Changes
) -> None:
    example = make_example(person, changes)
    with torch.no_grad():
        posed = body.keypoints_3d(
            *(
                torch.from_numpy(array[None])
                for array in (example.global_orient, example.body_pose, example.betas)
            )
        )[0].numpy()
    pelvis = [39]
    truth = example.keypoints_3d[:, :3]
    np.testing.assert_allclose(posed - posed[pelvis], truth - truth[pelvis], rtol=0, atol=2e-6)


def test_an_unchanged_crop_is_the_one_of_the_main_job(person: Person) -> None:
    example = make_example(person)
    crop = crop_batch(
        torch.from_numpy(person.image[None]),
        torch.zeros(1, dtype=torch.int64),
        torch.from_numpy(person.box_center_px[None]),
        torch.tensor([person.box_size_px]),
    )
    np.testing.assert_allclose(example.crop, crop[0].numpy(), rtol=0, atol=1e-6)


def test_a_mirrored_picture_shows_what_its_keypoints_say(person: Person) -> None:
    image = np.zeros_like(person.image)
    nose = np.rint(person.keypoints_2d[0, :2]).astype(int)
    image[nose[1], nose[0]] = 255
    bright = dataclasses.replace(person, image=image)
    for changes in (Changes(is_flipped=True), Changes(is_flipped=True, rotation_deg=40.0)):
        example = make_example(bright, changes)
        row, column = np.unravel_index(example.crop[0].argmax(), example.crop[0].shape)
        expected = (example.keypoints_2d[0, :2] + 0.5) * 256
        assert np.abs(np.array([column, row]) - expected).max() < 256 / person.box_size_px + 1


def test_flipping_twice_changes_nothing(person: Person) -> None:
    twice = flip_keypoints(flip_keypoints(person.keypoints_2d, WIDTH - 1), WIDTH - 1)
    np.testing.assert_allclose(twice, person.keypoints_2d, rtol=0, atol=2e-5)
    flipped = flip_pose(*flip_pose(person.global_orient, person.body_pose))
    np.testing.assert_array_equal(flipped[0], person.global_orient)
    np.testing.assert_array_equal(flipped[1], person.body_pose)


def test_flipping_swaps_names_of_left_and_right() -> None:
    swapped = {"Right": "Left", "Left": "Right", " R": " L", " L": " R"}
    for index, name in enumerate(KEYPOINT_NAMES):
        other = name
        for side, opposite in swapped.items():
            if name.startswith(side) or (f"OP{side}" in name and name[4].isupper()):
                other = name.replace(side, opposite, 1)
                break
        assert KEYPOINT_NAMES[FLIPPED_KEYPOINTS[index]] == other
    assert sorted(FLIPPED_JOINTS) == list(range(23))


def test_rotation_turns_the_root_about_the_viewing_axis(person: Person) -> None:
    example = make_example(person, Changes(rotation_deg=90.0))
    turn = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]], dtype=np.float32)
    np.testing.assert_allclose(
        example.global_orient[0], turn @ person.global_orient[0], rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(example.body_pose, person.body_pose)


def test_drawn_changes_are_bounded_and_have_the_published_shares() -> None:
    config = AugmentConfig()
    drawn = [draw_changes(np.random.default_rng(i), config) for i in range(4000)]
    scales = np.array([c.scale for c in drawn])
    rotations = np.array([c.rotation_deg for c in drawn])
    assert scales.min() == pytest.approx(0.7)
    assert scales.max() == pytest.approx(1.3)
    assert np.abs(rotations).max() == pytest.approx(60.0)
    assert np.abs([c.translation for c in drawn]).max() == pytest.approx(0.02)
    colors = np.array([c.color for c in drawn])
    assert 0.8 <= colors.min() < 0.81
    assert 1.19 < colors.max() <= 1.2
    # Standard error of a share among 4000: at most 0.008.
    assert np.mean(rotations != 0) == pytest.approx(0.6, abs=0.03)
    assert np.mean([c.is_flipped for c in drawn]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([c.extreme_crop is not None for c in drawn]) == pytest.approx(0.1, abs=0.02)
    nothing = AugmentConfig(0, 0, 0, 0, 0, 0, 0)
    assert draw_changes(np.random.default_rng(0), nothing) == UNCHANGED


def test_an_extreme_crop_needs_a_person_seen_whole_or_from_the_waist_up(person: Person) -> None:
    head = make_example(person, Changes(extreme_crop=0.35))
    assert float(head.relative_size) < 0.5
    few = person.keypoints_2d.copy()
    few[:, 2] = 0
    few[[10, 13], 2] = 1  # two knees
    knees = dataclasses.replace(person, keypoints_2d=few)
    np.testing.assert_array_equal(
        make_example(knees, Changes(extreme_crop=0.35)).crop, make_example(knees).crop
    )

"""Pose vectors, and boxes that are carried along."""

from __future__ import annotations

import numpy as np
import pytest

from fourdh_batch.geometry import axis_angle_to_rotmat, phalp_camera
from fourdh_batch.tracking.location import MAX_BOX_PX, locate, moved_box
from fourdh_batch.tracking.pose import is_sound, pose_vectors, split_pose_vectors
from fourdh_batch.types import F32, People


def some_people(m: int = 4) -> People:
    rng = np.random.default_rng(0)
    rotation = axis_angle_to_rotmat(rng.normal(size=(m, 24, 3))).astype(np.float32)
    return People(
        global_orient=rotation[:, :1],
        body_pose=rotation[:, 1:],
        betas=rng.normal(size=(m, 10)).astype(np.float32),
        pred_cam=np.tile(np.float32([0.8, 0.1, -0.2]), (m, 1)),
        box_center_px=rng.uniform(100, 300, (m, 2)).astype(np.float32),
        box_size_px=rng.uniform(100, 200, m).astype(np.float32),
        keypoints_3d_m=np.zeros((m, 44, 3), np.float32),
    )


def camera_of_people(people: People) -> F32:
    return phalp_camera(people.pred_cam, people.box_center_px, people.box_size_px, (640, 360))


def test_pose_vectors_hold_rotations_shape_and_camera() -> None:
    people = some_people()
    camera = camera_of_people(people)
    pose = pose_vectors(people, camera)
    assert pose.shape == (4, 229)
    assert pose.dtype == np.float32
    assert np.array_equal(pose[:, :9], people.global_orient.reshape(4, 9))
    assert np.array_equal(pose[:, 226:], camera / np.float32([1, 1, 200]))
    assert is_sound(pose).all()
    global_orient, body_pose, betas, back = split_pose_vectors(pose)
    assert np.array_equal(global_orient, people.global_orient)
    assert np.array_equal(body_pose, people.body_pose)
    assert np.array_equal(betas, people.betas)
    assert back == pytest.approx(camera, rel=1e-6)
    assert pose_vectors(people.take(slice(0, 0)), camera[:0]).shape == (0, 229)
    with pytest.raises(ValueError, match=r"expected \(M, 229\), got \(4, 226\)"):
        split_pose_vectors(pose[:, :226])


def test_one_broken_vector_is_told_from_sound_ones() -> None:
    people = some_people(6)
    pose = pose_vectors(people, camera_of_people(people))
    pose[0, 100] = np.nan
    pose[1, 216] = np.inf
    pose[2, -1] = 0
    pose[3, 27:36] = 0
    pose[4, [9, 12, 15]] *= -1  # a mirror
    assert is_sound(pose).tolist() == [False] * 5 + [True]
    assert is_sound(pose[:0]).shape == (0,)


def test_a_box_moves_and_shrinks_with_its_person() -> None:
    box = np.float32([[300, 100, 340, 200], [300, 100, 340, 200]])
    seen = np.float32([[0, 0, 20], [0, 0, 20]])
    expected = np.float32([[0, 0, 40], [1, 0, 20]])
    moved = moved_box(box, locate(seen), locate(expected), (640, 360))
    # twice as far: half as large, about the image centre, where the model origin stands
    assert moved[0] == pytest.approx([310, 140, 330, 190])
    # a metre to the right: 5000 / 256 * 640 / 20 px
    assert moved[1] == pytest.approx([925, 100, 965, 200])
    absurd = moved_box(box, np.array([[0.5, 0.5, 30]] * 2), np.array([[9, 9, -30]] * 2), (640, 360))
    assert np.isfinite(absurd).all()
    assert np.abs(absurd).max() == MAX_BOX_PX

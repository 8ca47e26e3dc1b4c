from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from fourdh_batch.config import AugmentConfig
from fourdh_batch.errors import CheckpointError, TrainingError
from fourdh_batch.geometry import axis_angle_to_rotmat
from fourdh_batch.training.augment import make_example
from fourdh_batch.training.data import CYCLE, MixedExamples
from fourdh_batch.training.examples import Person, collate
from fourdh_batch.training.pose_histogram import NUM_BINS, THRESHOLDS, PoseHistogram
from fourdh_batch.training.real_poses import load_real_poses
from fourdh_batch.training.tars import TarPeople, tar_uris


class Numbered:
    """A source whose people carry their number in a keypoint."""

    def __init__(self, name: int) -> None:
        self.name = name

    def person(self, number: int) -> Person:
        keypoints = np.ones((44, 3), dtype=np.float32)
        keypoints[0, :2] = self.name, number
        return Person(
            image=np.full((8, 8, 3), number % 256, dtype=np.uint8),
            box_center_px=np.array([4, 4], dtype=np.float32),
            box_size_px=8.0,
            longer_side_px=8.0,
            keypoints_2d=keypoints,
            keypoints_3d=np.ones((44, 4), dtype=np.float32),
            global_orient=np.eye(3, dtype=np.float32)[None],
            body_pose=np.repeat(np.eye(3, dtype=np.float32)[None], 23, axis=0),
            betas=np.zeros(10, dtype=np.float32),
            has_pose=1.0,
            has_betas=float(self.name),
        )


class TestMixture:
    def test_every_source_has_its_share_and_counts_without_gaps(self) -> None:
        mixed = MixedExamples([Numbered(0), Numbered(1)], [0.3, 0.1], seed=1, augment=None)
        places = [mixed.place(n) for n in range(2 * CYCLE)]
        for source, share in ((0, 750), (1, 250)):
            numbers = [number for name, number in places if name == source]
            assert numbers == list(range(2 * share))
        runs = [name for name, _ in places[:CYCLE]]
        assert runs != sorted(runs)

    def test_an_example_follows_from_its_number_alone(self) -> None:
        def make(seed: int = 1) -> MixedExamples:
            sources = [Numbered(0), Numbered(1)]
            return MixedExamples(sources, [1, 2], seed=seed, augment=AugmentConfig())

        forwards = make()
        in_order = [forwards[n] for n in range(20)]
        backwards = make()
        for n in reversed(range(20)):
            for a, b in zip(in_order[n], backwards[n], strict=True):
                np.testing.assert_array_equal(a, b)
        other = make(seed=2)
        assert any((in_order[n].crop != other[n].crop).any() for n in range(20))

    def test_a_tiny_share_is_not_lost(self) -> None:
        mixed = MixedExamples([Numbered(0), Numbered(1)], [1, 1e-6], seed=0, augment=None)
        assert sum(mixed.place(n)[0] for n in range(CYCLE)) == 1

    def test_flags_of_each_person_reach_the_batch(self) -> None:
        mixed = MixedExamples([Numbered(0), Numbered(1)], [1, 1], seed=0, augment=None)
        batch = collate([mixed[n] for n in range(6)])
        assert batch.has_betas.tolist() == [mixed.place(n)[0] for n in range(6)]
        assert batch.crop.shape == (6, 3, 256, 256)


def record(value: float = 0.1, **changes: Any) -> dict[str, Any]:
    """A person as the published tars hold one."""
    keypoints_2d = np.full((44, 3), 30 + value)
    keypoints_2d[:, 2] = 0.9
    person = {
        "keypoints_2d": keypoints_2d,
        "keypoints_3d": np.ones((44, 4)),
        "center": np.array([30.0, 25.0]),
        "scale": np.array([20.0, 40.0]) / 200,
        "body_pose": np.full(72, value, dtype=np.float32),
        "betas": np.full(10, value),
        "has_body_pose": np.array(1.0),
        "has_betas": np.array(1.0),
        "extra_info": {
            "detection_npz_idx": 0,
            "fitting_loss": np.array({"reprojection_loss": np.float32(100.0)}),
        },
    }
    return {**person, **changes}


def write_tar(path: Path, samples: dict[str, list[dict[str, Any]]], *, image: bytes = b"") -> None:
    picture = np.full((50, 60, 3), (10, 20, 200), dtype=np.uint8)
    image = image or cv2.imencode(".png", picture)[1].tobytes()
    with tarfile.open(path, "w") as tar:
        for key, people in samples.items():
            for name, data in ((f"{key}.jpg", image), (f"{key}.data.pyd", pickle.dumps(people))):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


class TestTars:
    def test_a_person_comes_out_as_it_was_written(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "000000.tar", {"coco/12": [record(0.25)]})
        person = TarPeople(str(tmp_path), seed=0).person(7)
        assert person.image.shape == (50, 60, 3)
        assert person.image[0, 0].tolist() == [200, 20, 10]
        assert person.box_center_px.tolist() == [30, 25]
        assert person.box_size_px == pytest.approx(40)
        assert person.longer_side_px == pytest.approx(40)
        assert person.keypoints_2d[3].tolist() == pytest.approx([30.25, 30.25, 0.9])
        expected = axis_angle_to_rotmat(np.full((24, 3), 0.25, dtype=np.float32))
        np.testing.assert_allclose(person.global_orient, expected[:1], atol=1e-6)
        np.testing.assert_allclose(person.body_pose, expected[1:], atol=1e-6)
        assert (person.has_pose, person.has_betas) == (1, 1)

    def test_every_person_of_every_picture_comes_once_a_round(self, tmp_path: Path) -> None:
        people = {f"k{i}": [record(i / 10), record(i / 10 + 0.05)] for i in range(5)}
        write_tar(tmp_path / "a.tar", people)
        source = TarPeople(str(tmp_path / "a.tar"), seed=0)
        # One lane: numbers that differ by the number of lanes.
        seen = [round(float(source.person(8 * n).betas[0]), 3) for n in range(10)]
        assert sorted(seen) == [round(0.05 * n, 3) for n in range(10)]
        assert seen != sorted(seen)

    def test_the_published_filters(self, tmp_path: Path) -> None:
        unsure, few = record()["keypoints_2d"], record()["keypoints_2d"]
        unsure[:39, 2] = 0.29
        few[4:, 2] = 0.1
        lossy = {"fitting_loss": np.array({"reprojection_loss": 31_000.0})}
        write_tar(
            tmp_path / "a.tar",
            {
                "few": [record(1, keypoints_2d=few)],
                "lossy": [record(1, extra_info=lossy)],
                "kept": [
                    record(0.5, keypoints_2d=unsure),
                    record(0.6, betas=np.full(10, 3.1)),
                    record(0.7, has_body_pose=np.array(0.0), extra_info={}),
                ],
            },
        )
        source = TarPeople(str(tmp_path / "a.tar"), seed=0)
        people = {
            round(float(p.global_orient[0, 2, 1]), 3): p for p in map(source.person, range(64))
        }
        assert len(people) == 3
        by_size = sorted(people.values(), key=lambda p: p.has_pose)
        assert [p.has_pose for p in by_size] == [0, 0, 1]
        assert [p.has_betas for p in by_size] == [1, 1, 1]
        assert [float(p.betas[0]) for p in by_size] == [0, 0, 0.5]
        assert (by_size[2].keypoints_2d[:, 2] > 0).sum() == 5

    def test_numbers_that_are_not_finite_are_unknown(self, tmp_path: Path) -> None:
        nan = np.nan
        picture, space, origin = (record()[n] for n in ("keypoints_2d", *["keypoints_3d"] * 2))
        picture[0], picture[1] = (nan, nan, 0), (30, 30, nan)
        space[3], origin[39, 0] = (nan, nan, nan, 0), nan  # the pelvis of the others
        people = {
            "picture": record(keypoints_2d=picture),
            "space": record(keypoints_3d=space),
            "origin": record(keypoints_3d=origin),
            "shape": record(betas=np.full(10, nan)),
            "no pose": record(body_pose=np.full(72, nan), has_body_pose=np.array(0.0)),
            "pose": record(body_pose=np.full(72, nan)),
            "flag": record(has_body_pose=np.array(nan)),
            "other flag": record(has_betas=nan),
            "yes": record(has_betas=np.array([1.0]), has_body_pose=True),
        }
        known = {}
        for name, person in people.items():
            write_tar(tmp_path / f"{name}.tar", {"k": [person]})
            known[name] = TarPeople(str(tmp_path / f"{name}.tar"), seed=0).person(0)
            for field in make_example(known[name]):
                assert np.isfinite(field).all(), name
        assert (known["picture"].keypoints_2d[:, 2] > 0).sum() == 42
        assert (known["space"].keypoints_3d[:, 3] > 0).sum() == 43
        assert not known["origin"].keypoints_3d.any()
        assert [p.has_pose for p in known.values()] == [1, 1, 1, 0, 0, 0, 0, 0, 1]

    def test_a_person_out_of_reach_is_left_out_and_a_strange_record_named(
        self, tmp_path: Path
    ) -> None:
        write_tar(tmp_path / "a.tar", {"k": [record(center=np.array([1e30, 1e30]))]})
        with pytest.raises(TrainingError, match="nobody passes"):
            TarPeople(str(tmp_path / "a.tar"), seed=0).person(0)
        write_tar(tmp_path / "b.tar", {"k": [record(extra_info=[1])]})
        with pytest.raises(TrainingError, match=r"b\.tar: not in the training layout"):
            TarPeople(str(tmp_path / "b.tar"), seed=0).person(0)

    def test_a_picture_that_cannot_be_decoded_is_passed_over(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_tar(tmp_path / "a.tar", {"k": [record()]}, image=b"no picture")
        with pytest.raises(TrainingError, match="cannot be decoded"):
            TarPeople(str(tmp_path / "a.tar"), seed=0).person(0)
        assert "cannot be decoded" in caplog.text

    def test_a_pickle_of_code_is_refused(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, data in (("k.jpg", b"1"), ("k.data.pyd", pickle.dumps([Path]))):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        with pytest.raises(TrainingError, match=r"a\.tar: not in the training layout"):
            TarPeople(str(tmp_path / "a.tar"), seed=0).person(0)

    def test_names_with_a_counting_part(self) -> None:
        assert tar_uris("s3://b/x/{000009..000011}.tar") == [
            f"s3://b/x/{name}.tar" for name in ("000009", "000010", "000011")
        ]


def test_improbable_poses_are_told_from_probable_ones() -> None:
    counts = np.zeros((21, NUM_BINS, NUM_BINS, NUM_BINS))
    middle = NUM_BINS // 2
    counts[:, middle, middle, middle] = 1  # everybody at rest
    histogram = PoseHistogram(counts)
    rest = np.full(69, 0.01, dtype=np.float32)
    assert histogram.allows(rest)
    turned = rest.copy()
    turned[3 * 3] = 2 * np.pi + 0.01  # the same rotation
    assert histogram.allows(turned)
    turned[3 * 3] = 1.5
    assert not histogram.allows(turned)
    hand = rest.copy()
    hand[-1] = 1.5
    assert histogram.allows(hand)
    assert len(THRESHOLDS) == 21


def test_real_poses_come_once_a_round_in_another_order(tmp_path: Path) -> None:
    path = tmp_path / "mocap.npz"
    pose = np.zeros((7, 72))
    pose[:, 3] = 0.1 * np.arange(7)
    np.savez(path, body_pose=pose, betas=np.arange(70.0).reshape(7, 10))
    real = load_real_poses(str(path), seed=0)
    rounds = [[int(real[n][1][0]) // 10 for n in range(7 * r, 7 * r + 7)] for r in range(3)]
    assert all(sorted(row) == list(range(7)) for row in rounds)
    assert rounds[0] != rounds[1]
    row = rounds[0][0]
    expected = axis_angle_to_rotmat(np.array([0.1 * row, 0, 0], dtype=np.float32))
    np.testing.assert_allclose(real[0][0][0], expected, atol=1e-6)
    np.savez(path, body_pose=pose, betas=np.full((7, 10), np.nan))
    with pytest.raises(CheckpointError, match="expected finite bodies"):
        load_real_poses(str(path), seed=0)
    np.savez(path, body_pose=pose[:, :69], betas=np.zeros((7, 10)))
    with pytest.raises(CheckpointError, match=r"expected body_pose \(N, 72\)"):
        load_real_poses(str(path), seed=0)

"""Smoothing of rows that were read."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fourdh_batch.geometry import axis_angle_to_rotmat
from fourdh_batch.tables.reader import smpl_arrays
from fourdh_batch.tables.smoothing import _gaussian_mean, smooth_tracks
from fourdh_batch.types import F32


def rows(axis_angle: np.ndarray, **columns: Any) -> pd.DataFrame:
    """A track at 25 Hz whose 24 joints all have the given rotations (N, 3)."""
    n = len(axis_angle)
    rng = np.random.default_rng(1)
    rotation = axis_angle_to_rotmat(axis_angle).astype(np.float32).reshape(n, 9)
    cam = np.float32([1, 0.5, 20]) * np.exp(rng.normal(0, 0.01, (n, 1))).astype(np.float32)
    lists = {
        "global_orient": rotation,
        "body_pose": np.tile(rotation, (1, 23)),
        "betas": rng.normal(size=(n, 10)).astype(np.float32),
        "cam_t_m": cam.astype(np.float32),
        "keypoints_3d_m": np.zeros((n, 132), np.float32),
        "keypoints_2d_px": np.zeros((n, 88), np.float32),
        "principal_point_px": np.tile(np.float32([320, 180]), (n, 1)),
    }
    frame = pd.DataFrame(
        {
            "dataset": "d",
            "video_id": "v",
            "track_id": 1,
            "shot_id": 0,
            "state": "detected",
            "pts_s": np.arange(n) / 25,
            "focal_px": np.float32(12_500),
            **columns,
        },
        index=np.arange(n) * 3,
    )
    for name, values in lists.items():
        frame[name] = pd.Series(list(values), index=frame.index)
    return frame


def angle_from(rotmat: np.ndarray, axis_angle: tuple[float, ...]) -> np.ndarray:
    """Angles in radians between rotations and one given."""
    there = axis_angle_to_rotmat(np.array(axis_angle))
    trace = np.einsum("...ij,ij->...", rotmat, there)
    return np.arccos(np.clip((trace - 1) / 2, -1, 1))


def test_a_trembling_rotation_loses_its_noise_and_stays_a_rotation() -> None:
    rng = np.random.default_rng(0)
    still = (2.0, -1.5, 1.0)
    noisy = rows(np.array(still) + rng.normal(0, 0.1, (200, 3)))
    before, after = smpl_arrays(noisy), smpl_arrays(smooth_tracks(noisy, sigma_s=0.2))
    for name in ("global_orient", "body_pose"):
        rotmat = after[name].astype(np.float64)
        assert rotmat @ np.swapaxes(rotmat, -1, -2) == pytest.approx(
            np.broadcast_to(np.eye(3), rotmat.shape), abs=1e-6
        )
        assert np.linalg.det(rotmat) == pytest.approx(1, abs=1e-6)
        noise = angle_from(after[name], still).mean() / angle_from(before[name], still).mean()
        # of independent noise sqrt(1 / (2 sqrt(pi) 5)) is left in the middle of a track
        assert noise < 0.3
    depth = np.log([before["cam_t_m"][:, 2], after["cam_t_m"][:, 2]])
    assert depth[1].std() < 0.3 * depth[0].std()


def test_steady_motion_is_kept_away_from_the_ends() -> None:
    turning = rows(np.arange(100)[:, None] * [0, 0.02, 0])
    smooth = smooth_tracks(turning)
    a, b = (smpl_arrays(frame)["global_orient"][10:-10] for frame in (turning, smooth))
    assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize(
    "apart",
    [
        {"shot_id": np.repeat([0, 1], 10)},
        {"track_id": np.repeat([1, 2], 10)},
        {"video_id": np.repeat(["v", "w"], 10)},
        {"pts_s": np.concatenate([np.arange(10), np.arange(40, 50)]) / 25},
    ],
)
def test_nothing_is_averaged_across_cuts_tracks_and_gaps(apart: dict[str, Any]) -> None:
    poses = np.repeat([[0.0, 0, 0], [0, 2, 0]], 10, axis=0)
    smooth = smpl_arrays(smooth_tracks(rows(poses, **apart), sigma_s=1.0))["global_orient"]
    assert smooth == pytest.approx(smpl_arrays(rows(poses))["global_orient"], abs=1e-6)
    joined = smpl_arrays(smooth_tracks(rows(poses), sigma_s=1.0))["global_orient"]
    assert angle_from(joined[9, 0], (0.0, 0.0, 0.0)) > 0.5


def test_single_rows_stay_as_they_are() -> None:
    single = rows(np.array([[1.0, 2, 3], [3, 2, 1]]), track_id=[1, 2])
    smooth = smooth_tracks(single)
    for name in ("global_orient", "body_pose", "betas", "cam_t_m"):
        assert all(map(np.array_equal, smooth[name], single[name]))
    untouched = ["track_id", "pts_s", "shot_id", "state"]
    assert smooth[untouched].equals(single[untouched])
    still = smooth_tracks(rows(np.random.default_rng(0).normal(size=(9, 3))), sigma_s=0)
    assert all(
        map(
            np.array_equal,
            still["global_orient"],
            rows(np.random.default_rng(0).normal(size=(9, 3)))["global_orient"],
        )
    )


def test_shape_becomes_the_median_of_what_was_seen() -> None:
    frame = rows(np.zeros((6, 3)), state=["detected"] * 5 + ["predicted"])
    betas = smpl_arrays(smooth_tracks(frame))["betas"]
    assert (betas == np.median(smpl_arrays(frame)["betas"][:5], axis=0)).all()


def test_order_and_index_of_the_rows_do_not_matter() -> None:
    frame = rows(np.random.default_rng(0).normal(0, 0.2, (40, 3)), track_id=[1, 2] * 20)
    shuffled = frame.sample(frac=1, random_state=0)
    smooth = smooth_tracks(frame)
    again = smooth_tracks(shuffled)
    assert again.index.equals(shuffled.index)
    for name in ("global_orient", "cam_t_m", "betas"):
        assert all(map(np.array_equal, again.loc[frame.index, name], smooth[name]))


def test_keypoints_follow_the_body_or_are_left_out() -> None:
    def body(global_orient: F32, body_pose: F32, betas: F32) -> F32:
        assert len(global_orient) <= 512
        return np.repeat(global_orient[:, 0, :, 0][:, None], 44, axis=1)

    frame = rows(np.random.default_rng(0).normal(0, 0.2, (600, 3)))
    without = smooth_tracks(frame)
    assert set(frame.columns) - set(without.columns) == {"keypoints_2d_px", "keypoints_3d_m"}
    smooth = smooth_tracks(frame, keypoints=body)
    assert list(smooth.columns) == list(frame.columns)
    arrays = smpl_arrays(smooth)
    assert np.array_equal(arrays["keypoints_3d_m"][:, 7], arrays["global_orient"][:, 0, :, 0])
    point = arrays["keypoints_3d_m"][:, 0] + arrays["cam_t_m"]
    expected = point[:, :2] / point[:, 2:] * 12_500 + [320, 180]
    assert arrays["keypoints_2d_px"][:, 0] == pytest.approx(expected, rel=1e-4)
    assert all(map(np.array_equal, frame["keypoints_3d_m"], np.zeros((600, 132))))  # not touched


def test_weights_sum_to_one_and_fall_off_with_time() -> None:
    time_s = np.array([0, 0.1, 0.2, 0.3, 5.0])
    mean, has_neighbours = _gaussian_mean(np.ones((5, 1)), time_s, np.zeros(5, np.int64), 0.1)
    assert mean == pytest.approx(np.ones((5, 1)))
    assert has_neighbours.tolist() == [True] * 4 + [False]
    mean, _ = _gaussian_mean(np.eye(5), time_s, np.zeros(5, np.int64), 0.1)
    assert mean.sum(1) == pytest.approx(np.ones(5))
    assert mean[0, :4] / mean[0, 0] == pytest.approx(np.exp(-0.5 * np.arange(4) ** 2))


def test_mistakes_are_named() -> None:
    frame = rows(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"missing columns \['betas', 'state'\]"):
        smooth_tracks(frame.drop(columns=["betas", "state"]))
    with pytest.raises(ValueError, match=r"expected times of 0 or more, got -1 and 0\.5"):
        smooth_tracks(frame, sigma_s=-1)
    frame.at[0, "cam_t_m"] = np.float32([0, 0, -1])
    with pytest.raises(ValueError, match=r"v, track 1: cam_t_m: expected depths above 0, got -1"):
        smooth_tracks(frame)
    assert smooth_tracks(frame.iloc[:0]).empty


@pytest.mark.parametrize("name", ["global_orient", "body_pose", "betas", "cam_t_m"])
def test_numbers_that_are_not_finite_are_named(name: str) -> None:
    frame = rows(np.zeros((5, 3)), frame_index=np.arange(40, 45))
    frame.at[9, name] = frame.at[9, name].copy()
    frame.at[9, name][1] = np.nan
    expected = rf"video v, track 1, frame 43: {name}: expected finite numbers, got nan"
    with pytest.raises(ValueError, match=expected):
        smooth_tracks(frame)


def test_times_that_cannot_be_meant_are_named() -> None:
    times = np.array([0, 0.1, np.nan, 0.2])
    with pytest.raises(ValueError, match=r"track 1: pts_s: expected a finite time, got nan"):
        smooth_tracks(rows(np.zeros((4, 3)), pts_s=times))
    frame = rows(np.zeros((4, 3)), pts_s=[0.2, 0.1, 0.2, 0.3], frame_index=[7, 6, 8, 9])
    expected = r"video v, track 1, frame 8: pts_s: expected one row of a track at a time, got 0\.2"
    with pytest.raises(ValueError, match=expected):
        smooth_tracks(frame)
    smooth_tracks(frame.assign(track_id=[1, 1, 2, 2]))  # two people may


def test_rows_close_in_time_do_not_take_long() -> None:
    rng = np.random.default_rng(0)
    dense = rows(rng.normal(0, 0.1, (3_000, 3)), pts_s=np.arange(3_000) * 1e-7)
    started = time.process_time()
    smooth = smpl_arrays(smooth_tracks(dense))["global_orient"]
    assert time.process_time() - started < 10  # pair by pair it was half a minute
    assert np.ptp(smooth, axis=0).max() < 1e-4


def test_blocks_of_rows_do_not_show() -> None:
    rng = np.random.default_rng(0)
    time_s = np.cumsum(rng.uniform(0.01, 0.1, 300))
    run = np.repeat([0, 1, 2], [1, 200, 99])
    values = rng.normal(size=(300, 3))
    mean, has_neighbours = _gaussian_mean(values, time_s, run, 0.1)
    distance = np.abs(time_s[:, None] - time_s)
    weight = np.exp(-0.5 * (distance / 0.1) ** 2) * (distance <= 0.3) * (run[:, None] == run)
    assert mean == pytest.approx(weight @ values / weight.sum(1, keepdims=True))
    assert has_neighbours.tolist() == [False] + [True] * 299

"""Smooth motion for showing and for animation: optional, on rows that were read, never stored.

The published method smooths nothing (docs/PHALP.md, section 13.2), and neither do the tables. Each
frame is reconstructed by itself, so people tremble; for a film that is averaged away here.

Dimension letters: `N` rows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fourdh_batch.geometry import project_full_image
from fourdh_batch.tables.reader import smpl_arrays
from fourdh_batch.types import F32, F64, I64, NUM_BODY_JOINTS, Bool

CUTOFF_SIGMAS = 3.0  # farther rows weigh less than 1.2 % of the nearest
ROWS_AT_ONCE = 512  # for the body model
ROWS_PER_MEAN = 64  # whose neighbours are averaged in one product
TRACK = ["dataset", "video_id", "track_id"]
Keypoints = Callable[[F32, F32, F32], F32]
"""(global_orient, body_pose, betas) of N people -> (N, 44, 3) metres in the model frame."""


def smooth_tracks(
    tracks: pd.DataFrame,
    *,
    sigma_s: float = 0.06,
    max_gap_s: float = 0.5,
    keypoints: Keypoints | None = None,
) -> pd.DataFrame:
    """Smooth the motion of every track over time.

    Within a track's run through one shot, without gaps longer than `max_gap_s`, every row becomes
    an average of its neighbours with Gaussian weights of their time: rotations their chordal mean
    (the rotation nearest to the mean matrix), `cam_t_m` the mean of x, y and log z. `betas`
    become the track's median over all its detected rows, as a body keeps its shape. Predicted rows
    count as much as detected ones. Nothing else changes; `pred_cam` and the boxes stay as
    measured and no longer fit `cam_t_m` exactly.

    Args:
        tracks: rows of `tracks` as read, of any videos, in any order, with at least `dataset`,
            `video_id`, `track_id`, `shot_id`, `pts_s`, `state`, `global_orient`, `body_pose`,
            `betas` and `cam_t_m`.
        sigma_s: standard deviation of the weights in seconds; 0 leaves motion as it is. Rows more
            than three of them away do not count.
        max_gap_s: a longer time without a row starts a new run.
        keypoints: the body model, for new `keypoints_3d_m` and `keypoints_2d_px` (which also need
            `focal_px` and `principal_point_px`); without it both columns are left out, as they
            would be those of the trembling body.

    Returns:
        A new frame with the rows and the index of `tracks`.

    Raises:
        ValueError: a column is missing, a setting is out of range, or a row cannot be meant:
            numbers that are not finite, a depth of 0 or less, a time that its track has twice.
            Names video, track and frame of the first such row.
    """
    needed = {*TRACK, "shot_id", "pts_s", "state", "global_orient", "body_pose", "betas", "cam_t_m"}
    if keypoints is not None:
        needed |= {"focal_px", "principal_point_px"}
    if missing := sorted(needed - set(tracks.columns)):
        raise ValueError(f"tracks: missing columns {missing}")
    if not (sigma_s >= 0 and max_gap_s >= 0):
        raise ValueError(f"expected times of 0 or more, got {sigma_s} and {max_gap_s}")
    smooth = tracks.drop(columns=["keypoints_2d_px", "keypoints_3d_m"], errors="ignore").copy()
    if tracks.empty:
        return smooth
    arrays = smpl_arrays(tracks)
    pts_s = tracks["pts_s"].to_numpy(np.float64)
    cam_t_m = arrays["cam_t_m"].astype(np.float64)
    _refuse(tracks, ~np.isfinite(pts_s), "pts_s: expected a finite time", pts_s)
    for name in ("global_orient", "body_pose", "betas", "cam_t_m"):
        flat = arrays[name].reshape(len(tracks), -1)
        bad = ~np.isfinite(flat)
        first = flat[np.arange(len(tracks)), bad.argmax(1)]
        _refuse(tracks, bad.any(1), f"{name}: expected finite numbers", first)
    depth = cam_t_m[:, 2]
    _refuse(tracks, depth <= 0, "cam_t_m: expected depths above 0", depth)

    track: I64 = np.asarray(tracks.groupby(TRACK, sort=False, dropna=False).ngroup(), np.int64)
    shot = tracks["shot_id"].to_numpy()
    order = np.lexsort((pts_s, shot, track))
    is_new = (np.diff(track[order]) != 0) | (np.diff(shot[order]) != 0)
    is_again = np.zeros(len(tracks), dtype=np.bool_)
    is_again[order[1:]] = ~is_new & (np.diff(pts_s[order]) == 0)
    _refuse(tracks, is_again, "pts_s: expected one row of a track at a time", pts_s)
    is_new |= np.diff(pts_s[order]) > max_gap_s
    run = np.concatenate([[0], np.cumsum(is_new)])

    rotation = np.concatenate([arrays["global_orient"], arrays["body_pose"]], 1)
    place = np.concatenate([cam_t_m[:, :2], np.log(cam_t_m[:, 2:])], 1)
    values = np.concatenate([rotation.reshape(len(tracks), -1), place], 1, dtype=np.float64)
    mean, has_neighbours = _gaussian_mean(values[order], pts_s[order], run, sigma_s)
    rows = order[has_neighbours]
    mean = mean[has_neighbours]
    rotation[rows] = _nearest_rotation(mean[:, :-3].reshape(-1, 1 + NUM_BODY_JOINTS, 3, 3))
    cam_t_m[rows] = np.concatenate([mean[:, -3:-1], np.exp(mean[:, -1:])], 1)

    is_detected = (tracks["state"] == "detected").to_numpy()
    betas = _median_of_tracks(arrays["betas"], track, is_detected)
    body = {
        "global_orient": np.ascontiguousarray(rotation[:, :1]),
        "body_pose": np.ascontiguousarray(rotation[:, 1:]),
        "betas": betas,
    }
    columns = {**body, "cam_t_m": cam_t_m.astype(np.float32)}
    if keypoints is not None:
        points = np.concatenate(
            [
                keypoints(*(values[start : start + ROWS_AT_ONCE] for values in body.values()))
                for start in range(0, len(tracks), ROWS_AT_ONCE)
            ]
        )
        columns["keypoints_3d_m"] = points
        columns["keypoints_2d_px"] = project_full_image(
            points,
            columns["cam_t_m"],
            tracks["focal_px"].to_numpy(np.float64),
            arrays["principal_point_px"],
        )
    for name, array in columns.items():
        smooth[name] = pd.Series(list(array.reshape(len(tracks), -1)), index=tracks.index)
    return smooth[[name for name in tracks.columns if name in smooth]]


def _gaussian_mean(values: F64, time_s: F64, run: I64, sigma_s: float) -> tuple[F64, Bool]:
    """Weighted means of neighbours in time.

    Args:
        values: (N, C), ordered by run, then time.
        time_s: (N,) seconds.
        run: (N,) non-decreasing; rows of different runs are strangers.
        sigma_s: of the weights.

    Returns:
        (N, C), and (N,) whether a row has any neighbour.
    """
    mean, has_neighbours = values.copy(), np.zeros(len(values), dtype=np.bool_)
    if sigma_s == 0:
        return mean, has_neighbours
    cutoff_s = CUTOFF_SIGMAS * sigma_s
    edges = [0, *(np.flatnonzero(np.diff(run)) + 1).tolist(), len(run)]
    for first, stop in pairwise(edges):
        for start in range(first, stop, ROWS_PER_MEAN):
            rows = slice(start, min(start + ROWS_PER_MEAN, stop))
            reach = (time_s[rows][0] - cutoff_s, time_s[rows][-1] + cutoff_s)
            low, high = first + np.searchsorted(time_s[first:stop], reach)
            near = slice(max(first, low - 1), high + 1 if high < stop else stop)
            distance = np.abs(time_s[rows, None] - time_s[near])
            is_near = distance <= cutoff_s
            weight = np.where(is_near, np.exp(-0.5 * np.square(distance / sigma_s)), 0)
            mean[rows] = weight @ values[near] / weight.sum(1, keepdims=True)
            has_neighbours[rows] = is_near.sum(1) > 1
    return mean, has_neighbours


def _refuse(tracks: pd.DataFrame, is_bad: Bool, expected: str, got: NDArray[Any]) -> None:
    """Raises: ValueError: there is a bad row; names the first."""
    if not is_bad.any():
        return
    row = int(np.argmax(is_bad))
    names = {"video_id": "video", "track_id": "track", "frame_index": "frame"}
    where = ", ".join(
        f"{name} {tracks[column].iloc[row]}" for column, name in names.items() if column in tracks
    )
    raise ValueError(f"{where}: {expected}, got {got[row]}")


def _nearest_rotation(matrix: F64) -> F32:
    """(..., 3, 3) rotations nearest to matrices in the Frobenius norm."""
    u, _, vt = np.linalg.svd(matrix)
    u[..., :, 2] *= np.linalg.det(u @ vt)[..., None]  # no mirror images
    rotation: F32 = (u @ vt).astype(np.float32)
    return rotation


def _median_of_tracks(betas: F32, track: I64, is_detected: Bool) -> F32:
    """(N, 10) per track the median of its detected rows; of all, where none was detected."""
    frame = pd.DataFrame(betas)
    known = frame.where(pd.Series(is_detected), np.nan)
    median = (
        known.groupby(track).transform("median").fillna(frame.groupby(track).transform("median"))
    )
    return median.to_numpy(np.float32)

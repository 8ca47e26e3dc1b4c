"""Smooth motion for showing and for animation: optional, on rows that were read, never stored.

The published method smooths nothing (docs/PHALP.md, section 13.2), and neither do the tables. Each
frame is reconstructed by itself, so people tremble; for a film that is averaged away here.

Dimension letters: `N` rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from fourdh_batch.geometry import project_full_image
from fourdh_batch.tables.reader import smpl_arrays
from fourdh_batch.types import F32, F64, I64, NUM_BODY_JOINTS, Bool

CUTOFF_SIGMAS = 3.0  # farther rows weigh less than 1.2 % of the nearest
ROWS_AT_ONCE = 512  # for the body model
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
        ValueError: a column is missing, or a setting or a depth is out of range.
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
    if not (cam_t_m[:, 2] > 0).all():
        raise ValueError("cam_t_m: expected depths above 0")

    track: I64 = np.asarray(tracks.groupby(TRACK, sort=False, dropna=False).ngroup(), np.int64)
    shot = tracks["shot_id"].to_numpy()
    order = np.lexsort((pts_s, shot, track))
    is_new = (np.diff(track[order]) != 0) | (np.diff(shot[order]) != 0)
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
    total, weight = values.copy(), np.ones(len(values))
    has_neighbours = np.zeros(len(values), dtype=np.bool_)
    for apart in range(1, len(values)):
        distance = time_s[apart:] - time_s[:-apart]
        first = np.flatnonzero(
            (run[apart:] == run[:-apart]) & (distance <= CUTOFF_SIGMAS * sigma_s)
        )
        if sigma_s == 0 or not len(first):
            break
        second = first + apart
        w = np.exp(-0.5 * np.square(distance[first] / sigma_s))
        total[first] += w[:, None] * values[second]
        total[second] += w[:, None] * values[first]
        weight[first] += w
        weight[second] += w
        has_neighbours[first] = has_neighbours[second] = True
    return total / weight[:, None], has_neighbours


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

"""Errors of bodies: MPJPE, PA-MPJPE, PVE, acceleration error, PCK.

Dimension letters: `N` people, `T` frames of one person, `K` keypoints, `V` vertices, `P` points of
any kind. Everything is computed in float64; lengths come in metres and errors leave in mm.

Sources: the evaluation of HMR 2.0 (MPJPE, PA-MPJPE, PCK); Kanazawa et al., Learning 3D Human
Dynamics from Video (acceleration error); Gower and Dijksterhuis, Procrustes Problems (similarity).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.types import F64, I64

Floats = NDArray[np.floating[Any]]

# Of the 44 keypoints: ankles, knees, hips, wrists, elbows, shoulders and neck of LSP, and the head
# of Human3.6M. What the published evaluation takes on 3DPW and Human3.6M.
EVALUATION_KEYPOINTS = (*range(25, 38), 43)
PELVIS_KEYPOINT = 39  # Pelvis (MPII)
PCK_THRESHOLDS = (0.05, 0.1)
PCK_MIN_CONFIDENCE = 0.5  # a keypoint counts where its confidence is strictly greater
MM = 1000.0


# --- in space ----------------------------------------------------------------------------------


def mpjpe_mm(
    predicted_m: Floats,
    truth_m: Floats,
    *,
    keypoints: Sequence[int] = EVALUATION_KEYPOINTS,
    pelvis: int = PELVIS_KEYPOINT,
) -> F64:
    """Mean distance of keypoints after both pelvises are put on each other.

    Args:
        predicted_m, truth_m: (N, K, 3) metres, in axes of the same orientation.
        keypoints: those that count.
        pelvis: the keypoint that is subtracted, on each side its own.

    Returns:
        (N,) mm.
    """
    predicted, truth = _pair(predicted_m, truth_m)
    predicted = predicted - predicted[:, [pelvis]]
    truth = truth - truth[:, [pelvis]]
    chosen = list(keypoints)
    return _mean_distance_mm(predicted[:, chosen], truth[:, chosen])


def pa_mpjpe_mm(
    predicted_m: Floats, truth_m: Floats, *, keypoints: Sequence[int] = EVALUATION_KEYPOINTS
) -> F64:
    """Mean distance of keypoints after the best rotation, translation and scale.

    Args:
        predicted_m, truth_m: (N, K, 3) metres.
        keypoints: those that are aligned and count.

    Returns:
        (N,) mm.
    """
    predicted, truth = _pair(predicted_m, truth_m)
    chosen = list(keypoints)
    predicted, truth = predicted[:, chosen], truth[:, chosen]
    return _mean_distance_mm(align_similarity(predicted, truth), truth)


def pve_mm(
    predicted_vertices_m: Floats,
    truth_vertices_m: Floats,
    predicted_pelvis_m: Floats,
    truth_pelvis_m: Floats,
) -> F64:
    """Mean distance of corresponding vertices after both pelvises are put on each other.

    Args:
        predicted_vertices_m, truth_vertices_m: (N, V, 3) metres, of one topology.
        predicted_pelvis_m, truth_pelvis_m: (N, 3) metres, each in the frame of its vertices.

    Returns:
        (N,) mm.
    """
    predicted, truth = _pair(predicted_vertices_m, truth_vertices_m)
    return _mean_distance_mm(
        predicted - np.asarray(predicted_pelvis_m, np.float64)[:, None],
        truth - np.asarray(truth_pelvis_m, np.float64)[:, None],
    )


def align_similarity(points: Floats, target: Floats) -> F64:
    """Points after the rotation, scale and translation that bring them closest to the target.

    No reflection: a mirrored body stays mirrored. Where all points of a person coincide there is
    nothing to turn or scale, and they come to lie on the target's mean.

    Args:
        points, target: (N, P, 3).

    Returns:
        (N, P, 3).
    """
    source, goal = _pair(points, target)
    source_mean = source.mean(axis=1, keepdims=True)
    goal_mean = goal.mean(axis=1, keepdims=True)
    source, goal = source - source_mean, goal - goal_mean
    u, singular, vt = np.linalg.svd(np.swapaxes(source, 1, 2) @ goal)  # (N, 3, 3)
    sign = np.ones_like(singular)
    sign[:, 2] = np.where(np.linalg.det(u @ vt) < 0, -1.0, 1.0)
    rotation = (u * sign[:, None]) @ vt  # of row vectors: source @ rotation
    spread = np.square(source).sum(axis=(1, 2))
    scale = np.zeros_like(spread)
    np.divide((singular * sign).sum(axis=1), spread, out=scale, where=spread > 0)
    aligned: F64 = scale[:, None, None] * (source @ rotation) + goal_mean
    return aligned


# --- over time ---------------------------------------------------------------------------------


def acceleration_error_mm(
    predicted_m: Floats, truth_m: Floats, frame_index: I64 | None = None
) -> F64:
    """How much second differences over frames differ: mm per frame squared.

    The unit depends on the frame rate, as published: say the rate beside the number. Subtract the
    pelvises first where only the body's own motion is meant.

    Args:
        predicted_m, truth_m: (T, K, 3) metres, one person in the order of time.
        frame_index: (T,) increasing; a gap belongs to no triple of frames. None: no gap.

    Returns:
        (T - 2,) mean over the keypoints at the middle frames 1 to T - 2; NaN across a gap.
    """
    predicted, truth = _pair(predicted_m, truth_m)
    if len(predicted) < 3:
        return np.zeros(0)
    second = np.diff(predicted - truth, n=2, axis=0)
    error: F64 = np.linalg.norm(second, axis=-1).mean(axis=-1) * MM
    if frame_index is not None:
        error[frame_index[2:] - frame_index[:-2] != 2] = np.nan
    return error


# --- in the picture ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Pck:
    """Shares of keypoints within a distance.

    Attributes:
        thresholds: (S,) fractions of the person's size.
        per_keypoint: (S, K) in [0, 1]; NaN for a keypoint that never counted.
        mean: (S,) over the keypoints that ever counted; NaN where none did. Every such keypoint
            weighs the same, however often it was seen.
        num_keypoints: of these.
    """

    thresholds: tuple[float, ...]
    per_keypoint: F64
    mean: F64
    num_keypoints: int


def pck_distances(
    predicted_px: Floats, truth_px: Floats, confidence: Floats, longer_side_px: Floats
) -> F64:
    """Distances in the picture as fractions of each person's size.

    Args:
        predicted_px, truth_px: (N, K, 2), of one scale, be it pixels of the frame or of a crop.
        confidence: (N, K) of the truth; see `PCK_MIN_CONFIDENCE`.
        longer_side_px: (N,) of the person's box before it grows to the aspect of the crop.

    Returns:
        (N, K); NaN where the keypoint does not count, infinite where it is not predicted (NaN).
    """
    predicted, truth = _pair(predicted_px, truth_px)
    side = np.asarray(longer_side_px, np.float64)
    if not (side > 0).all():
        raise ValueError(f"expected boxes larger than 0 px, got {side.min()}")
    distance: F64 = np.linalg.norm(predicted - truth, axis=-1) / side[:, None]
    distance[~np.isfinite(distance)] = np.inf
    distance[~(np.asarray(confidence) > PCK_MIN_CONFIDENCE)] = np.nan
    return distance


def pck(distances: F64, thresholds: Sequence[float] = PCK_THRESHOLDS) -> Pck:
    """Shares of distances strictly below each threshold.

    Args:
        distances: (N, K) of `pck_distances`, of a whole data set.
        thresholds: S fractions.
    """
    counts = ~np.isnan(distances)
    num = counts.sum(axis=0)  # (K,)
    per_keypoint = np.full((len(thresholds), distances.shape[1]), np.nan)
    for row, threshold in zip(per_keypoint, thresholds, strict=True):
        np.divide((counts & (distances < threshold)).sum(axis=0), num, out=row, where=num > 0)
    seen = num > 0
    mean = per_keypoint[:, seen].mean(axis=1) if seen.any() else np.full(len(thresholds), np.nan)
    return Pck(tuple(thresholds), per_keypoint, mean, int(seen.sum()))


def keypoint_error(predicted_crop: Floats, truth_crop: Floats, confidence: Floats) -> F64:
    """Mean of confidence times squared distance over all keypoints; `kpl2` of HMR 2.0.

    Args:
        predicted_crop, truth_crop: (N, K, 2) crop widths.
        confidence: (N, K).

    Returns:
        (N,) crop widths squared.
    """
    predicted, truth = _pair(predicted_crop, truth_crop)
    error: F64 = (np.square(predicted - truth).sum(axis=-1) * confidence).mean(axis=-1)
    return error


def _pair(predicted: Floats, truth: Floats) -> tuple[F64, F64]:
    """Both as float64, of one shape."""
    if predicted.shape != truth.shape or predicted.ndim != 3:
        raise ValueError(
            f"expected two arrays of one shape (N, K, 2 or 3), got {predicted.shape} and "
            f"{truth.shape}"
        )
    return predicted.astype(np.float64), truth.astype(np.float64)


def _mean_distance_mm(a: F64, b: F64) -> F64:
    distance: F64 = np.linalg.norm(a - b, axis=-1).mean(axis=-1) * MM
    return distance

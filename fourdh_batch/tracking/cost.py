"""How badly a detection fits what is expected of a track.

Dimension letters: `K` tracks, `M` detections.
Source: docs/PHALP.md, section 8 (EQ_019), with distances taken directly instead of
in expanded form (section 15, Q10).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from fourdh_batch.geometry import box_iou
from fourdh_batch.tracking.location import PredictedLocation
from fourdh_batch.types import F32, F64

NUM_POSE_COMPARED = 226  # matrices and betas of a pose vector; the camera behind them is left out
MAX_POSE_DISTANCE = 1.5
TEXTURE_WEIGHT = 4.0536
POSE_WEIGHT = 1.3070
POSITION_WIDTH = 0.3792
DEPTH_WIDTH = 4.1658
MIN_SPREAD = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class CostTerms:
    """The terms of the cost without texture, rows are tracks.

    Attributes:
        pose: (K, M) squared distance of the pose vectors, not yet cut at `MAX_POSE_DISTANCE`.
        position: (K, M) distance in the picture, in sides of the square-padded frame.
        position_spread: (K,) uncertainty of the predicted position.
        depth: (K, M) absolute log ratio of the depths.
        depth_spread: (K,) uncertainty of the predicted depth.
    """

    pose: F64
    position: F64
    position_spread: F64
    depth: F64
    depth_spread: F64


def cost_terms(
    predicted: PredictedLocation, predicted_pose: F32, location: F64, pose: F32
) -> CostTerms:
    """Compare every track with every detection.

    Args:
        predicted: locations of K tracks.
        predicted_pose: (K, 229) pose vectors of the tracks.
        location: (M, 3) x, y, n of the detections.
        pose: (M, 229) pose vectors of the detections.
    """
    return CostTerms(
        pose=cdist(
            predicted_pose[:, :NUM_POSE_COMPARED], pose[:, :NUM_POSE_COMPARED], "sqeuclidean"
        ),
        position=cdist(predicted.location[:, :2], location[:, :2]),
        position_spread=np.hypot(predicted.spread[:, 0], predicted.spread[:, 1]),
        depth=np.abs(predicted.location[:, None, 2] - location[None, :, 2]),
        depth_spread=np.abs(predicted.spread[:, 2]),
    )


def cost_without_texture(terms: CostTerms) -> F64:
    """(K, M) cost of pairs whose textures agree perfectly: a lower bound of their cost.

    At least 1; infinite where a pair is out of any reach, NaN where a term is NaN.
    """
    position = terms.position / (MIN_SPREAD + np.tanh(terms.position_spread))[:, None]
    depth = terms.depth / (MIN_SPREAD + np.tanh(terms.depth_spread))[:, None]
    with np.errstate(over="ignore"):
        return (1 + POSE_WEIGHT * np.minimum(terms.pose, MAX_POSE_DISTANCE)) * np.exp(
            position / POSITION_WIDTH + depth / DEPTH_WIDTH
        )


def texture_factor(distance: F64) -> F64:
    """Factor of the cost for texture distances, which are 0 or more."""
    return 1 + TEXTURE_WEIGHT * distance


def box_factor(expected_xyxy_px: F32, found_xyxy_px: F32, weight: float) -> F64:
    """(K, M) factor of the cost for boxes that overlap: exp(-weight IoU). Ours.

    Args:
        expected_xyxy_px: (K, 4) boxes in which the tracks were last seen, carried along where they
            were missed since.
        found_xyxy_px: (M, 4) boxes of the detections.
        weight: 0 or more.

    Returns:
        1 where boxes do not touch, exp(-weight) where they are the same.
    """
    iou = box_iou(expected_xyxy_px.astype(np.float64), found_xyxy_px.astype(np.float64))
    factor: F64 = np.exp(-weight * iou)
    return factor

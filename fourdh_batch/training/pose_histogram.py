"""Which joint rotations people really have: the filter of improbable poses.

A histogram of AMASS over the axis-angle vectors of 21 joints, 100 x 100 x 100 bins of -pi to pi
each; a pose passes when every joint lies where the smoothed density exceeds a threshold.

Source: data filter of the published training code of HMR 2.0, thresholds included.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from fourdh_batch.errors import CheckpointError
from fourdh_batch.types import F32, F64

NUM_BINS = 100
SIGMA_BINS = 2.0
# Joints 1 to 21 of SMPL.
THRESHOLDS = (
    *(5e-5, 5e-5, 2e-3, 5e-6, 5e-6, 0.01, 5e-6, 5e-6, 0.025, 0.0, 0.0),
    *(2e-4, 4.5e-4, 4.5e-4, 5e-4, 2e-4, 2e-4, 4e-5, 4e-5, 1e-3, 1e-3),
)
NUM_JOINTS = len(THRESHOLDS)


class PoseHistogram:
    """Densities of joint rotations.

    Args:
        counts: (21, n, n, n) of axis-angle vectors.
    """

    def __init__(self, counts: F64) -> None:
        num_bins = counts.shape[1]
        density = counts / counts.sum() / (2 * np.pi / num_bins) ** 3
        # Smoothed over the joints' axis too, as published.
        self._density = gaussian_filter(density, sigma=SIGMA_BINS, mode="constant")

    def allows(self, pose: F32) -> bool:
        """Whether a pose is plausible.

        Args:
            pose: (69,) axis-angle vectors of 23 joints; the hands do not count.
        """
        vectors = _shortest(pose.reshape(-1, 3)[:NUM_JOINTS].astype(np.float64))
        num_bins = self._density.shape[1]
        place = ((vectors + np.pi) / (2 * np.pi) * (num_bins - 1e-6)).astype(np.int64)
        place = place.clip(0, num_bins - 1)
        density = self._density[(np.arange(NUM_JOINTS), *place.T)].copy()
        density[((vectors < -np.pi) | (vectors >= np.pi)).any(axis=1)] = 0
        return bool((density > np.array(THRESHOLDS)).all())


def load_pose_histogram(path: str | Path) -> PoseHistogram:
    """The histogram of a file.

    Raises:
        CheckpointError: it is no plain (21, 100, 100, 100) array.
        OSError: it cannot be read.
    """
    try:
        counts = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: expected an .npy array, got {error}") from error
    expected = (NUM_JOINTS, NUM_BINS, NUM_BINS, NUM_BINS)
    if counts.shape != expected or not (counts >= 0).all() or not counts.any():
        raise CheckpointError(f"{path}: expected counts of shape {expected}, got {counts.shape}")
    return PoseHistogram(counts.astype(np.float64))


def _shortest(vectors: F64) -> F64:
    """Axis-angle vectors of the same rotations with angles of at most pi."""
    angle = np.linalg.norm(vectors, axis=1, keepdims=True)
    turns = np.maximum(np.ceil((angle - np.pi - 1e-6) / (2 * np.pi)), 0)
    axis = vectors / np.maximum(angle, 1e-8)
    shortest: F64 = axis * (angle - 2 * np.pi * turns)
    return shortest

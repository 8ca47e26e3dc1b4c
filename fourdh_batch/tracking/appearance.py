"""How alike a track and a detection look, told by small vectors that were stored with detections.

Nothing here needs a network: `models.appearance.AppearanceProjection` makes the vectors.

Dimension letters: `M` detections, `K` tracks, `P` pairs, `D` numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.types import F32, F64, I64, FrameDetections

DISTANCE_SCALE = 100.0
MIXING_GAIN = 0.1  # alpha of section 7


class CompactMemory:
    """The tracker's `TextureTerm` over compact vectors: one running mean per track.

    Detections carry their vectors in `FrameDetections.appearance`: (M, D) float16 or float32, NaN
    where nothing is known of a detection's looks. A track that was never seen and a detection
    without looks are at distance 0 of all others, as in section 15 (Q7).

    It differs from the published term, which keeps the map itself: mixing acts on vectors, and a
    vector stands for all that is seen of a person, not for what a pair shares.

    Args:
        alpha: gain of the mixing; a match moves the mean by `alpha * score ** 2` of the way.

    Source: docs/PHALP.md, sections 4 (scale of the distance) and 7 (mixing).
    """

    def __init__(self, *, alpha: float = MIXING_GAIN) -> None:
        self.alpha = alpha
        self.reset()

    def reset(self) -> None:
        """Forget all tracks."""
        self._mean: dict[int, F32] = {}

    def distances(self, frame: FrameDetections, track_id: I64, detection_row: I64) -> F64:
        """(P,) distances of the pairs (track_id[i], detection_row[i]): 100 times the square.

        Raises:
            ValueError: the frame carries no vectors, or a track was never seen.
        """
        vectors = _vectors(frame)
        unseen = sorted(set(track_id.tolist()) - set(self._mean))
        if unseen:
            raise ValueError(f"frame {frame.frame_index}: no vector of the tracks {unseen}")
        if not len(track_id):
            return np.zeros(0)
        mean = np.array([self._mean[track] for track in track_id.tolist()], dtype=np.float64)
        if mean.shape[1] != vectors.shape[1]:
            raise ValueError(
                f"frame {frame.frame_index}: expected vectors of {mean.shape[1]} numbers, "
                f"got {vectors.shape[1]}"
            )
        squared = np.square(mean - vectors[detection_row]).sum(axis=1)
        distance: F64 = DISTANCE_SCALE * np.where(np.isnan(squared), 0.0, squared)
        return distance

    def bounds(self, frame: FrameDetections, track_id: I64, detection_row: I64) -> F64:
        """The distances themselves: they cost next to nothing."""
        return self.distances(frame, track_id, detection_row)

    def observe(self, frame: FrameDetections, track_id: I64, live_track_id: I64) -> None:
        """Move the means of the tracks that were seen.

        Args:
            frame: the frame.
            track_id: (M,) track of each detection, old or new; -1 for a refused detection.
            live_track_id: tracks that are still followed; all others are forgotten.

        Raises:
            ValueError: the frame carries no vectors.
        """
        vectors = _vectors(frame)
        live = set(live_track_id.tolist())
        self._mean = {track: mean for track, mean in self._mean.items() if track in live}
        for row, track in enumerate(track_id.tolist()):
            if track not in live:
                continue
            seen, mean = vectors[row], self._mean.get(track)
            if mean is None or np.isnan(mean).any():
                self._mean[track] = seen.copy()
            elif not np.isnan(seen).any():
                gain = np.float32(self.alpha * float(frame.score[row]) ** 2)
                self._mean[track] = mean + gain * (seen - mean)

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything remembered: ``track_id`` (K,) int64 and ``mean`` (K, D) float32."""
        means = list(self._mean.values())
        return {
            "track_id": np.array(list(self._mean), dtype=np.int64),
            "mean": np.array(means, dtype=np.float32).reshape(len(means), -1 if means else 0),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: an array is missing, one too many, or of another length.
        """
        expected = {"track_id", "mean"}
        if set(state) != expected:
            raise ValueError(f"looks: expected {sorted(expected)}, got {sorted(state)}")
        track_id, mean = state["track_id"], state["mean"].astype(np.float32)
        if mean.ndim != 2 or len(mean) != len(track_id):
            raise ValueError(f"looks: expected {len(track_id)} vectors, got {mean.shape}")
        self._mean = dict(zip(track_id.tolist(), mean, strict=True))


def _vectors(frame: FrameDetections) -> F32:
    """(M, D) vectors of a frame's detections."""
    vectors = frame.appearance
    if vectors is None:
        if not len(frame.people):
            return np.zeros((0, 0), np.float32)
        raise ValueError(
            f"frame {frame.frame_index}: expected the looks of {len(frame.people)} people, got none"
        )
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise ValueError(
            f"frame {frame.frame_index}: expected vectors (M, D) of float, "
            f"got {vectors.shape} of {vectors.dtype}"
        )
    is_known = np.isfinite(vectors).all(axis=1, keepdims=True)
    return np.where(is_known, vectors, np.nan).astype(np.float32)

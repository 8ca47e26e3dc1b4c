"""Whole tracks completed frame by frame, against the published code, which has them in memory.

Recorded on the third sequence: people hidden for 8 to 50 frames, through several windows each.

Tolerance: 1e-4 absolute (section 16); 1e-6 is reached.

Source: docs/PHALP.md, sections 13.2 and 16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pose_predictor import make_predictor

from fourdh_batch.models.predictor import PosePredictor
from fourdh_batch.tracking.completion import PoseCompletion
from fourdh_batch.tracking.pose import split_pose_vectors
from fourdh_batch.types import F32
from tests.conftest import DATA

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def predictor() -> PosePredictor:
    return make_predictor("small")


def completed(predictor: PosePredictor, pose: F32, is_seen: np.ndarray) -> dict[int, F32]:
    """The missed frames of a track of consecutive frames."""
    completion, track_id = PoseCompletion(predictor), np.array([1])
    parts = []
    for t, seen in enumerate(is_seen):
        if seen:
            completion.see(t, track_id, pose[t : t + 1])
        else:
            completion.miss(t, track_id)
        parts += completion.settle(t, track_id)
    parts += completion.finish()
    return {
        t: vector
        for part in parts
        for t, vector in zip(part.frame_index.tolist(), part.pose, strict=True)
    }


@pytest.mark.parametrize("track", [3, 4])
def test_missed_frames_equal_those_of_the_reference(predictor: PosePredictor, track: int) -> None:
    with np.load(DATA / "tracking" / "postprocess.npz") as z:
        pose, is_seen, expected = (
            z[f"track{track}_{name}"] for name in ("pose_shape", "has_detection", "smoothed_pose")
        )
    told = completed(predictor, pose, is_seen > 0)
    missed = np.flatnonzero(is_seen == 0)
    assert sorted(told) == missed.tolist()
    assert len(missed) > 30
    assert np.stack([told[t] for t in missed]) == pytest.approx(expected[missed], abs=TOLERANCE)


@pytest.mark.shared
def test_entries_of_the_published_result_are_the_completed_ones(
    predictor: PosePredictor, shared: Path
) -> None:
    """Bodies and cameras as the reference writes them into its result, all tracks."""
    z: Any = np.load(shared / "parity" / "phalp" / "postprocess.npz")
    told: dict[tuple[int, int], F32] = {}
    for track in range(1, 6):
        first = int(z[f"track{track}_fid"][0])
        is_seen = z[f"track{track}_has_detection"] > 0
        track_told = completed(predictor, z[f"track{track}_pose_shape"], is_seen)
        told |= {(first + t, track): vector for t, vector in track_told.items()}
    keys = list(zip(z["ghost_frame"].tolist(), z["ghost_tid"].tolist(), strict=True))
    assert sorted(told) == sorted(keys)
    vectors = np.stack([told[key] for key in keys])
    camera = split_pose_vectors(vectors)[-1]
    assert vectors[:, :226] == pytest.approx(z["ghost_smpl"], abs=TOLERANCE)
    assert camera == pytest.approx(z["ghost_camera"], abs=TOLERANCE * 200)
    # entries after a track's last detection are left alone by both (section 15, Q18)
    left = set(zip(z["left_frame"].tolist(), z["left_tid"].tolist(), strict=True))
    assert len(left) == 50
    assert not left & set(told)

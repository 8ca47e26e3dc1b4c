"""Whole sequences recorded from the reference tracker: 60, 80 and 130 frames.

The reference also used its learned pose predictor and its texture encoder. Their recorded answers
are handed in through the tracker's two seams; location, cost, gate, assignment, life cycle,
numbering and back-fill are the tracker's own. With our own predictor and encoder the sequences run
in `test_tracking_whole.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from fourdh_batch.tracking.assign import gated
from fourdh_batch.tracking.cost import cost_terms, cost_without_texture, texture_factor
from fourdh_batch.tracking.location import camera_of, locate
from fourdh_batch.tracking.tracker import PhalpTracker, TrackedFrame
from fourdh_batch.types import F32, F64, I64, FrameDetections
from tests.tracking_scenes import load, recorded_frames

SEQUENCES = ["seqA", "seqB", "seqC"]


class RecordedPoses:
    """Answers as the reference's pose predictor did; knows a track by its newest detection."""

    def __init__(self, z: dict[str, np.ndarray]) -> None:
        self.z = z
        self.detection = {row.tobytes(): i for i, row in enumerate(z["in_pose"])}
        assert len(self.detection) == len(z["in_pose"])

    def __call__(self, pose: F32, frame_index: I64, slot: I64) -> F32:
        z, predicted = self.z, pose[:, -1].copy()
        for i, target in enumerate(frame_index[:, 0] + slot):
            newest = pose[i, -1, :226].astype(np.float16)
            track_id = z["det_track_id"][self.detection[newest.tobytes()]]
            start, stop = z["trk_ptr"][target - 1 : target + 1]
            (row,) = start + np.flatnonzero(z["trk_id"][start:stop] == track_id)
            if z["trk_pose_row"][row] >= 0:
                predicted[i, :226] = z["trk_pose"][z["trk_pose_row"][row]]
        return predicted


class RecordedTextures:
    """Answers as the reference's texture distances did."""

    def __init__(self, z: dict[str, np.ndarray]) -> None:
        self.z = z
        self.ends = np.cumsum(z["cost_shape"].prod(1))
        self.seen: list[int] = []

    def matrix(self, name: str, frame_index: int) -> F64:
        shape, end = self.z["cost_shape"][frame_index], self.ends[frame_index]
        return self.z[name][end - shape.prod() : end].reshape(shape)

    def distances(self, frame: FrameDetections, track_id: I64, detection_row: I64) -> F64:
        start, stop = self.z["row_id_ptr"][frame.frame_index : frame.frame_index + 2]
        rows = self.z["row_id"][start:stop]
        assert np.isin(track_id, rows).all()
        row = np.searchsorted(rows, track_id)
        return self.matrix("texture", frame.frame_index)[row, detection_row]

    def bounds(self, frame: FrameDetections, track_id: I64, detection_row: I64) -> F64:
        return self.distances(frame, track_id, detection_row)

    def observe(self, frame: FrameDetections, track_id: I64, live_track_id: I64) -> None:
        self.seen.extend(track_id)

    def reset(self) -> None:
        self.seen.clear()

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        pass


def recorded_tracker(z: dict[str, np.ndarray]) -> PhalpTracker:
    return PhalpTracker(pose_predictor=RecordedPoses(z), texture=RecordedTextures(z))


@pytest.mark.parametrize("name", SEQUENCES)
def test_ids_states_counters_and_locations_equal_the_reference(name: str) -> None:
    z = load(name)
    tracker = recorded_tracker(z)
    for t, frame in enumerate(recorded_frames(z)):
        tracked = tracker.update(frame)
        detections = slice(*z["in_frame_ptr"][t : t + 2])
        assert np.array_equal(tracked.detection_track_id, z["det_track_id"][detections]), t
        rows, state = slice(*z["trk_ptr"][t : t + 2]), tracker.state()
        assert np.array_equal(state["track_id"], z["trk_id"][rows])
        assert np.array_equal(state["hits"], z["trk_hits"][rows])
        assert np.array_equal(np.where(state["hits"] >= 5, 2, 1), z["trk_state"][rows])
        assert np.array_equal(t - state["frame_index"][:, -1], z["trk_tsu"][rows])
        assert np.array_equal(t - state["first_frame"] + 1, z["trk_age"][rows])

        expected, got = z["trk_loca"][rows], tracker.predict(t + 1).location
        camera = camera_of(got.location) / expected[:, 4:5]  # tx and ty in depths
        spread = np.concatenate([got.spread[:, :2], np.exp(got.spread[:, 2:])], 1)
        for ours, theirs in (
            (got.location[:, :2], expected[:, :2]),
            (camera, expected[:, 2:5] / expected[:, 4:5]),
            (spread, expected[:, 5:]),
        ):
            # relative: section 16; absolute: cameras enter as float32 crop cameras, good to 1e-7
            # of a picture side, and coordinates pass through 0
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", SEQUENCES)
def test_costs_equal_the_recorded_ones(name: str) -> None:
    z = load(name)
    tracker, textures = recorded_tracker(z), RecordedTextures(z)
    for t, frame in enumerate(recorded_frames(z)):
        rows = slice(*z["in_frame_ptr"][t : t + 2])
        expected, prediction = textures.matrix("cost", t), tracker.predict(t)
        terms = cost_terms(
            prediction.location,
            prediction.pose,
            locate(z["in_camera"][rows]),
            z["in_pose"][rows].astype(np.float32),
        )
        cost = cost_without_texture(terms) * texture_factor(textures.matrix("texture", t))
        assert cost.shape == expected.shape
        # Section 16: the reference's own rounding is worth up to 1e-2 (section 15, Q10).
        assert gated(cost, 100.0) == pytest.approx(gated(expected, 100.0), rel=1e-2)
        tracker.update(frame)


def reference_lists(z: dict[str, np.ndarray]) -> list[list[tuple[int, int, int]]]:
    """Per frame (track, frames since seen, detection of the sequence) in the reference's order."""
    columns = zip(z["out_tid"], z["out_tracked_time"], z["out_det_row"], strict=True)
    rows = [(int(a), int(b), int(c)) for a, b, c in columns]
    return [rows[a:b] for a, b in zip(z["out_ptr"][:-1], z["out_ptr"][1:], strict=True)]


def lists_of(frames: list[TrackedFrame], first_row: np.ndarray) -> list[list[tuple[int, ...]]]:
    """The same of what the tracker gave: rows of a frame, then what was filled in later."""
    lists: list[list[tuple[int, ...]]] = []
    shown: dict[int, int] = {}
    for tracked in frames:
        rows: list[tuple[int, ...]] = []
        for track, row, unseen in zip(
            tracked.track_id, tracked.detection_row, tracked.frames_since_seen, strict=True
        ):
            if row >= 0:
                shown[track] = int(first_row[tracked.frame_index] + row)
            assert (row >= 0) == (unseen == 0)
            rows.append((int(track), int(unseen), shown[track]))
        lists.append(rows)
        past = tracked.backfill
        for track, frame, row in zip(
            past.track_id, past.frame_index, past.detection_row, strict=True
        ):
            lists[frame].append((int(track), 0, int(first_row[frame] + row)))
    return lists


@pytest.mark.parametrize("name", SEQUENCES)
def test_output_lists_equal_the_reference_in_its_order(name: str) -> None:
    z = load(name)
    tracker = recorded_tracker(z)
    got = lists_of([tracker.update(frame) for frame in recorded_frames(z)], z["in_frame_ptr"])
    assert got == reference_lists(z)
    seen = [[track for track, unseen, _ in rows if unseen == 0] for rows in got]
    assert np.concatenate(seen).tolist() == z["outd_tracked_ids"].tolist()
    assert np.cumsum([0, *map(len, seen)]).tolist() == z["outd_ptr"].tolist()


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_texture_term_is_told_every_decision(name: str) -> None:
    z = load(name)
    texture = RecordedTextures(z)
    tracker = PhalpTracker(pose_predictor=RecordedPoses(z), texture=texture)
    for frame in recorded_frames(z):
        tracker.update(frame)
    assert texture.seen == z["det_track_id"].tolist()


def predecessors(track_id: I64) -> list[int]:
    """The detection before each one in its track, -1 for the first: IDs without their numbers."""
    newest: dict[int, int] = {}
    before = []
    for i, track in enumerate(track_id.tolist()):
        before.append(newest.get(track, -1))
        newest[track] = i
    return before


@pytest.mark.parametrize(("name", "most_different"), [("seqA", 0), ("seqB", 3), ("seqC", 0)])
def test_place_and_last_pose_alone_link_nearly_all_detections_alike(
    name: str, most_different: int
) -> None:
    """Without anything handed in; 409 detections of seqB hold a cut and spurious boxes."""
    z = load(name)
    tracker = PhalpTracker()
    ids = [tracker.update(frame).detection_track_id for frame in recorded_frames(z)]
    got, expected = predecessors(np.concatenate(ids)), predecessors(z["det_track_id"])
    different = sum(a != b for a, b in zip(got, expected, strict=True))
    assert different <= most_different

"""What holds for the tracker on any scene: people who walk, hide, come and go, and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdh_batch.geometry import box_iou
from fourdh_batch.tracking.assign import Assignment, assign
from fourdh_batch.tracking.cost import cost_terms, cost_without_texture, texture_factor
from fourdh_batch.tracking.location import camera_of
from fourdh_batch.tracking.track import DetectionRefs
from fourdh_batch.tracking.tracker import (
    PhalpTracker,
    Prediction,
    TrackedFrame,
    TrackerSettings,
    update_together,
)
from fourdh_batch.types import F32, F64, I64, FrameDetections
from tests.tracking_scenes import frame_of_boxes


@dataclass(frozen=True)
class Scene:
    num_people: int
    num_frames: int
    miss: float
    spurious: float
    lost: float
    cut: float
    broken: float
    seed: int

    def frames(self) -> list[FrameDetections]:
        rng = np.random.default_rng(self.seed)
        n = self.num_people
        place, size = rng.uniform([0, 0], [1280, 720], (n, 2)), rng.uniform(80, 400, n)
        speed = rng.normal(0, 6, (n, 2))
        pose = rng.normal(0, 1, (n, 226))
        made, index = [], 0
        for _ in range(self.num_frames):
            index += 1 + int(rng.integers(1, 70) if rng.random() < self.lost else 0)
            is_cut = bool(rng.random() < self.cut)
            if is_cut:
                place = rng.uniform([0, 0], [1280, 720], (n, 2))
            place = place + speed + rng.normal(0, 1, (n, 2))
            seen = rng.random(n) >= self.miss
            extra = rng.binomial(3, self.spurious)
            xy = np.concatenate([place[seen], rng.uniform([0, 0], [1280, 720], (extra, 2))])
            height = np.concatenate([size[seen], rng.uniform(80, 400, extra)])[:, None]
            bodies = np.concatenate([pose[seen], rng.normal(0, 1, (extra, 226))])
            bodies += rng.normal(0, 0.02, bodies.shape)
            half = height * [0.2, 0.5]
            order = rng.permutation(len(xy))
            frame = frame_of_boxes(
                index,
                np.concatenate([xy - half, xy + half], 1)[order],
                pose=bodies[order].astype(np.float32),
                is_shot_start=is_cut,
            )
            frame.people.pred_cam[rng.random(len(xy)) < self.broken, 0] = np.nan
            made.append(frame)
        return made


chance = st.sampled_from([0.0, 0.05, 0.3])
scenes = st.builds(
    Scene,
    num_people=st.integers(0, 7),
    num_frames=st.integers(1, 40),
    miss=chance,
    spurious=chance,
    lost=st.sampled_from([0.0, 0.05]),
    cut=st.sampled_from([0.0, 0.05]),
    broken=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**32 - 1),
)

rules = st.sampled_from(
    [
        TrackerSettings(compat=True),
        *(TrackerSettings(box_weight=w) for w in (0.0, 2.0, 20.0)),
        *(TrackerSettings(box_weight=w, log_cost=True) for w in (0.0, 2.0)),
    ]
)


def permuted(frame: FrameDetections, order: np.ndarray) -> FrameDetections:
    return replace(
        frame,
        bbox_xyxy_px=frame.bbox_xyxy_px[order],
        score=frame.score[order],
        people=frame.people.take(order),
    )


def assert_equal(a: TrackedFrame, b: TrackedFrame) -> None:
    for name in TrackedFrame.__slots__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, DetectionRefs):
            for part in DetectionRefs.__slots__:
                assert np.array_equal(getattr(x, part), getattr(y, part)), (name, part)
        else:
            assert np.array_equal(x, y), name


@settings(max_examples=40, deadline=None)
@given(scene=scenes, wanted=rules, seed=st.integers(0, 2**32 - 1))
def test_the_order_of_detections_changes_no_association(
    scene: Scene, wanted: TrackerSettings, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a, b = PhalpTracker(wanted), PhalpTracker(wanted)
    same: dict[int, int] = {-1: -1}
    for frame in scene.frames():
        order = rng.permutation(len(frame.people))
        ids = a.update(frame).detection_track_id[order]
        other = b.update(permuted(frame, order)).detection_track_id
        for track, twin in zip(ids.tolist(), other.tolist(), strict=True):
            assert same.setdefault(track, twin) == twin
    assert len(set(same.values())) == len(same)


@settings(max_examples=40, deadline=None)
@given(scene=scenes, wanted=rules)
def test_every_detection_is_accounted_for_exactly_once(
    scene: Scene, wanted: TrackerSettings
) -> None:
    tracker = PhalpTracker(wanted)
    told: list[tuple[int, int]] = []
    given_rows: list[tuple[int, int]] = []
    owner: dict[tuple[int, int], int] = {}
    newest_id = 0

    def tell(refs: DetectionRefs) -> None:
        for track, frame, row in zip(
            refs.track_id, refs.frame_index, refs.detection_row, strict=True
        ):
            told.append((int(frame), int(row)))
            assert owner[told[-1]] == track

    for frame in scene.frames():
        tracked, now = tracker.update(frame), frame.frame_index
        ids = tracked.detection_track_id
        valid = ids[ids != -1]
        assert len(set(valid.tolist())) == len(valid)
        born = valid[valid > newest_id]
        assert sorted(born) == list(range(newest_id + 1, newest_id + 1 + len(born)))
        if not wanted.compat:
            assert sorted(born) == born.tolist()
        newest_id += len(born)
        assert (np.diff(tracked.track_id) > 0).all()
        given_rows += [(now, row) for row in range(len(ids))]
        owner |= {(now, row): int(track) for row, track in enumerate(ids)}
        told += [(now, int(row)) for row in tracked.invalid_row]

        seen = tracked.detection_row >= 0
        told += [(now, int(row)) for row in tracked.detection_row[seen]]
        assert np.array_equal(ids[tracked.detection_row[seen]], tracked.track_id[seen])
        assert np.array_equal(seen, tracked.frames_since_seen == 0)
        assert (tracked.frames_since_seen <= 50).all()
        assert (tracked.hits >= 5).all()
        assert (tracked.age >= tracked.hits + tracked.frames_since_seen).all()
        for name in ("bbox_xyxy_px", "camera", "global_orient", "body_pose", "betas"):
            assert np.isfinite(getattr(tracked, name)).all()
        tell(tracked.backfill)
        tell(tracked.discarded)
    tell(tracker.finish())
    assert sorted(told) == given_rows


@settings(max_examples=40, deadline=None)
@given(scene=scenes, cut=st.floats(0, 1), wanted=rules)
def test_a_saved_tracker_goes_on_as_if_nothing_had_happened(
    scene: Scene, cut: float, wanted: TrackerSettings
) -> None:
    def new_tracker() -> PhalpTracker:
        return PhalpTracker(wanted, pose_predictor=drifting)

    frames = scene.frames()
    where = round(cut * len(frames))
    tracker = new_tracker()
    for frame in frames[:where]:
        tracker.update(frame)
    saved = tracker.state()
    undisturbed = [tracker.update(frame) for frame in frames[where:]]
    tail = tracker.finish()
    for _ in range(2):  # neither going on nor being restored may touch what was saved
        resumed = new_tracker()
        resumed.restore(saved)
        for frame, expected in zip(frames[where:], undisturbed, strict=True):
            assert_equal(resumed.update(frame), expected)
        assert np.array_equal(resumed.finish().detection_row, tail.detection_row)


@settings(max_examples=40, deadline=None)
@given(scene=scenes)
def test_a_ghost_shows_what_was_expected_of_its_track(scene: Scene) -> None:
    tracker = PhalpTracker()
    for frame in scene.frames():
        expected = tracker.predict(frame.frame_index)
        tracked = tracker.update(frame)
        is_ghost = tracked.detection_row == -1
        row = np.searchsorted(expected.track_id, tracked.track_id[is_ghost])
        assert np.array_equal(expected.track_id[row], tracked.track_id[is_ghost])
        camera = camera_of(expected.location.location[row]).astype(np.float32)
        assert np.array_equal(camera, tracked.camera[is_ghost])
        assert np.array_equal(expected.pose[row, 216:226], tracked.betas[is_ghost])


wild = st.one_of(
    st.floats(width=32),
    st.floats(-1e6, 1e6, width=32),
    st.sampled_from([0.0, 1e-38, 1e6, -1e6]),
)


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.lists(st.tuples(*[wild] * 10), max_size=3), min_size=1, max_size=9),
    repeat=st.integers(1, 8),
    lost=st.integers(0, 60),
)
def test_no_input_raises_or_gives_a_number_that_is_none(
    numbers: list[list[tuple[float, ...]]], repeat: int, lost: int
) -> None:
    tracker, index = PhalpTracker(TrackerSettings(n_init=2)), 0
    for people in numbers:
        values = np.array(people, np.float32).reshape(-1, 10)
        frame = frame_of_boxes(
            0,
            np.tile(np.float32([10, 10, 90, 300]), (len(values), 1)),
            image_size_wh=(641, 480),
        )
        frame.people.pred_cam[:] = values[:, :3]
        frame.people.box_center_px[:] = values[:, 3:5]
        frame.people.box_size_px[:] = values[:, 5]
        frame.bbox_xyxy_px[:] = values[:, 6:]
        for _ in range(repeat):
            index += 1
            tracked = tracker.update(replace(frame, frame_index=index))
            for name in ("bbox_xyxy_px", "camera", "betas"):
                assert np.isfinite(getattr(tracked, name)).all()
        index += lost


class Noise:
    """Looks that are as good as random, but the same whenever they are asked for."""

    def __init__(self, scale: float, slack: float = 1.0) -> None:
        self.scale = scale
        self.slack = slack  # of its bounds
        self.num_asked = 0
        self.asked: set[tuple[int, int, int]] = set()

    def distances(self, frame: FrameDetections, track_id: I64, detection_row: I64) -> F64:
        self.num_asked += len(track_id)
        pairs = list(zip(track_id.tolist(), detection_row.tolist(), strict=True))
        keys = {(frame.frame_index, *pair) for pair in pairs}
        assert not keys & self.asked, "a pair was asked for twice"
        self.asked |= keys
        return self.scale * np.array(
            [np.random.default_rng((frame.frame_index, *pair)).random() for pair in pairs]
        )

    def bounds(self, frame: FrameDetections, track_id: I64, detection_row: I64) -> F64:
        pairs = zip(track_id.tolist(), detection_row.tolist(), strict=True)
        truth = [np.random.default_rng((frame.frame_index, *pair)).random() for pair in pairs]
        return self.slack * self.scale * np.array(truth)

    def observe(self, frame: FrameDetections, track_id: I64, live_track_id: I64) -> None:
        self.asked.clear()

    def reset(self) -> None:
        self.asked.clear()

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        pass


class Eager(PhalpTracker):
    """Compares the looks of every pair that is not refused anyway, before it assigns anything.

    Boxes are compared one by one, and it keeps its own account of them.
    """

    def __init__(self, settings: TrackerSettings, texture: Noise) -> None:
        super().__init__(settings, texture=texture)
        self.seen: dict[int, tuple[int, F32]] = {}  # by track, in the present shot: when, and where

    def update(self, frame: FrameDetections) -> TrackedFrame:
        tracked = super().update(frame)
        for track_id, bbox in zip(tracked.detection_track_id, frame.bbox_xyxy_px, strict=True):
            self.seen[int(track_id)] = frame.frame_index, bbox
        return tracked

    def _associate(
        self,
        frame: FrameDetections,
        prediction: Prediction,
        expected_bbox: F32,
        row: I64,
        location: F64,
        pose: F32,
    ) -> Assignment:
        terms = cost_terms(prediction.location, prediction.pose, location, pose)
        cost = cost_without_texture(terms)
        track, detection = np.nonzero(cost <= self.settings.gate)
        assert self._texture is not None
        looks = self._texture.distances(frame, prediction.track_id[track], row[detection])
        cost[track, detection] *= texture_factor(looks)
        cost[cost > self.settings.gate] = np.inf
        if frame.is_shot_start:
            self.seen.clear()
        for i, track_id in enumerate(prediction.track_id.tolist()):
            if track_id in self.seen:
                when, last = self.seen[track_id]
                told = last if when == frame.frame_index - 1 else expected_bbox[i]
                iou = box_iou(told[None].astype(float), frame.bbox_xyxy_px[row].astype(float))[0]
                cost[i] *= np.exp(-self.settings.box_weight * iou)
        if self.settings.log_cost:
            return assign(np.log(cost), np.log(self.settings.gate))
        return assign(cost, self.settings.gate, solver_order=self.settings.compat)


@settings(max_examples=60, deadline=None)
@given(
    scene=scenes,
    wanted=rules,
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    gate=st.sampled_from([3.0, 100.0]),
    slack=st.sampled_from([1.0, 16.0]),
)
def test_comparing_looks_only_where_it_matters_changes_nothing(
    scene: Scene, wanted: TrackerSettings, scale: float, gate: float, slack: float
) -> None:
    wanted = replace(wanted, gate=gate)
    lazy, eager = Noise(scale, slack), Noise(scale)
    a, b = PhalpTracker(wanted, texture=lazy), Eager(wanted, eager)
    for frame in scene.frames():
        assert_equal(a.update(frame), b.update(frame))
    assert lazy.num_asked <= eager.num_asked


def drifting(pose: F32, frame_index: I64, slot: I64) -> F32:
    """A pose predictor that depends on everything it is told."""
    predicted: F32 = pose[:, -1] + 0.01 * pose.mean(1) * slot[:, None].astype(np.float32)
    return predicted


@settings(max_examples=25, deadline=None)
@given(several=st.lists(scenes, min_size=1, max_size=4), wanted=rules)
def test_videos_stepped_together_are_tracked_as_each_by_itself(
    several: list[Scene], wanted: TrackerSettings
) -> None:
    def tracker() -> PhalpTracker:
        return PhalpTracker(wanted, pose_predictor=drifting)

    videos = [scene.frames() for scene in several]
    together = [tracker() for _ in videos]
    alone = [tracker() for _ in videos]
    for step in range(max(map(len, videos))):
        running = [i for i, frames in enumerate(videos) if step < len(frames)]
        frames = [videos[i][step] for i in running]
        got = update_together([together[i] for i in running], frames)
        for i, frame, tracked in zip(running, frames, got, strict=True):
            assert_equal(tracked, alone[i].update(frame))

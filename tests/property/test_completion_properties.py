"""Missed frames are completed online as they would be with the whole track at hand."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdh_batch.tracking.completion import MAX_SLOTS, CompletedPoses, PoseCompletion
from fourdh_batch.tracking.track import NUM_POSE
from fourdh_batch.types import F32, I64, Bool

Frames = dict[int, F32 | None]  # of one track: pose where seen, None where missed; lost ones absent


class Blend:
    """Tells the average of all poses, the nearer the heavier; keeps what it was asked."""

    def __init__(self, frame_length: int = 125) -> None:
        self.frame_length = frame_length
        self.asked: list[tuple[list[int], list[int]]] = []  # seen and wanted slots

    def complete(self, pose: F32, is_seen: Bool, wanted: I64) -> F32:
        assert len(pose) <= MAX_SLOTS
        assert not pose[~is_seen].any()
        slots = np.flatnonzero(is_seen)
        self.asked.append((slots.tolist(), wanted.tolist()))
        weight = 1 / (1 + np.abs(wanted[:, None] - slots))
        weight /= weight.sum(1, keepdims=True)
        return np.stack([(w[:, None] * pose[slots]).sum(0) for w in weight]).astype(np.float32)


def pose_at(track: int, frame: int) -> F32:
    return np.random.default_rng([track, frame]).normal(size=NUM_POSE).astype(np.float32)


def offline(completer: Blend, frames: Frames) -> dict[int, F32]:
    """Section 13.2 on a whole track; no window may be without a detection in reach."""
    seen = [f for f, pose in frames.items() if pose is not None]
    first, length = seen[0], seen[-1] + 1 - seen[0]
    poses = np.zeros((length, NUM_POSE), np.float32)
    is_seen = np.zeros(length, dtype=np.bool_)
    for f in seen:
        poses[f - first], is_seen[f - first] = frames[f], True
    told = {}
    for start in range(0, length, 32):
        low, high = max(0, start - 32), min(length, start + 64)
        missed = [
            t for t in range(start, min(length, start + 32)) if frames.get(first + t, 0) is None
        ]
        if missed:
            answer = completer.complete(poses[low:high], is_seen[low:high], np.array(missed) - low)
            told |= {first + t: pose for t, pose in zip(missed, answer, strict=True)}
    return told


def online(
    completion: PoseCompletion, tracks: dict[int, Frames], *, max_age: int
) -> tuple[dict[int, dict[int, F32]], int]:
    """What the completion tells, and the most poses that it kept per live track."""
    told: dict[int, dict[int, F32]] = defaultdict(dict)
    last_seen: dict[int, int] = {}
    most = 0.0
    for frame in sorted({frame for frames in tracks.values() for frame in frames}):
        here = {k: frames[frame] for k, frames in tracks.items() if frame in frames}
        seen = [k for k, pose in here.items() if pose is not None]
        last_seen |= dict.fromkeys(seen, frame)
        live = [k for k, last in last_seen.items() if frame - last <= max_age]
        missed = [k for k in here if k in live and k not in seen]
        poses = np.array([here[k] for k in seen], np.float32).reshape(-1, NUM_POSE)
        completion.see(frame, np.array(seen, np.int64), poses)
        completion.miss(frame, np.array(missed, np.int64))
        for done in completion.settle(frame, np.array(live, np.int64)):
            assert not set(told[done.track_id]) & set(done.frame_index.tolist())
            told[done.track_id] |= dict(zip(done.frame_index.tolist(), done.pose, strict=True))
        if live:
            most = max(most, len(completion.state()["pose"]) / len(live))
    for done in completion.finish():
        told[done.track_id] |= dict(zip(done.frame_index.tolist(), done.pose, strict=True))
    return told, int(most)


def scene(seed: int, num_frames: int, max_gap: int) -> dict[int, Frames]:
    """Three tracks that come and go; some frames are lost for all."""
    rng = np.random.default_rng(seed)
    lost = set(np.flatnonzero(rng.random(num_frames) < 0.05).tolist())
    tracks: dict[int, Frames] = {}
    for track in range(1, 4):
        t, frames = int(rng.integers(0, 20)), {}
        while t < num_frames:
            for _ in range(int(rng.integers(1, 30))):
                frames[t] = pose_at(track, t)
                t += 1
            for _ in range(int(rng.integers(0, max_gap + 1))):
                frames[t] = None
                t += 1
        tracks[track] = {f: p for f, p in frames.items() if f < num_frames and f not in lost}
        while tracks[track] and next(iter(tracks[track].values())) is None:  # its first was lost
            del tracks[track][next(iter(tracks[track]))]
    return {track: frames for track, frames in tracks.items() if frames}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num_frames=st.integers(1, 300), max_gap=st.integers(0, 45))
def test_online_equals_offline(seed: int, num_frames: int, max_gap: int) -> None:
    tracks = scene(seed, num_frames, max_gap)
    completer = Blend()
    told, most = online(PoseCompletion(completer), tracks, max_age=60)
    for track, frames in tracks.items():
        expected = offline(Blend(), frames)
        assert told[track].keys() == expected.keys()
        assert all(np.array_equal(told[track][f], pose) for f, pose in expected.items())
    # a window waits for the 32 frames behind it, or for its gap
    assert most <= 32 + 32 + 32 + 60 + 2


def test_memory_does_not_grow_with_the_video() -> None:
    tracks: dict[int, Frames] = {1: {t: pose_at(1, t) if t % 7 else None for t in range(1, 2000)}}
    completer = Blend()
    _, most = online(PoseCompletion(completer), tracks, max_age=50)
    assert most <= 32 + 32 + 32 + 1
    assert len(completer.asked) == len({(t - 1) // 32 for t in range(7, 2000, 7)})  # one a window


def test_a_window_without_a_detection_in_reach_is_told_from_its_neighbours() -> None:
    """Extension: the gap is 300 frames long, of which the middle was lost."""
    frames: Frames = {t: pose_at(1, t) for t in range(5)}
    frames |= dict.fromkeys([*range(5, 140), *range(290, 305)])
    frames[305] = pose_at(1, 305)
    completer = Blend()
    told, _ = online(PoseCompletion(completer), {1: frames}, max_age=400)
    assert set(told[1]) == {f for f, pose in frames.items() if pose is None}
    assert all(np.isfinite(pose).all() for pose in told[1].values())
    asked = completer.asked
    assert asked[0][0] == [0, 1, 2, 3, 4]  # windows at 0 and 32 know the start
    assert asked[1][0] == [0, 1, 2, 3, 4]
    # those at 64, 96 and 128 nothing, and nothing is done for the lost frames behind them
    assert [(seen, len(wanted)) for seen, wanted in asked[2:-1]] == [
        ([0, 95], 32),
        ([0, 95], 32),
        ([0, 95], 12),
    ]
    assert asked[-1][0] == [305 - 256]  # the one at 288 knows the end


def test_a_jump_over_a_million_frames_costs_nothing() -> None:
    frames: Frames = {0: pose_at(1, 0), 1: None, 2: pose_at(1, 2), 5_000_000: None}
    frames |= {5_000_001: None, 5_000_002: pose_at(1, 9)}
    completer = Blend()
    told, most = online(PoseCompletion(completer), {1: frames}, max_age=10**7)
    assert set(told[1]) == {1, 5_000_000, 5_000_001}
    assert len(completer.asked) == 2
    assert most <= 3


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), turn=st.integers(1, 9))
def test_a_saved_state_goes_on_the_same(seed: int, turn: int) -> None:
    tracks = scene(seed, 150, 40)

    class Restarted(PoseCompletion):
        """Forgets everything and is told again, every few frames."""

        calls = 0

        def settle(self, frame_index: int, live_track_id: I64) -> list[CompletedPoses]:
            self.calls += 1
            if self.calls % turn == 0:
                state = {name: array.copy() for name, array in self.state().items()}
                assert all(array.dtype != object for array in state.values())
                super().settle(frame_index, np.zeros(0, np.int64))
                assert not len(self.state()["track_id"])
                self.restore(state)
            return super().settle(frame_index, live_track_id)

    told, _ = online(Restarted(Blend()), tracks, max_age=60)
    whole, _ = online(PoseCompletion(Blend()), tracks, max_age=60)
    assert told.keys() == whole.keys()
    for track, poses in whole.items():
        assert told[track].keys() == poses.keys()
        assert all(np.array_equal(told[track][f], pose) for f, pose in poses.items())


def test_a_short_pose_predictor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected more than 96 slots .* got frame_length 96"):
        PoseCompletion(Blend(96))


def test_an_answer_of_the_wrong_shape_is_named() -> None:
    class Short(Blend):
        def complete(self, pose: F32, is_seen: Bool, wanted: I64) -> F32:
            return super().complete(pose, is_seen, wanted)[:, :226]

    frames: Frames = {0: pose_at(1, 0), 1: None, 2: pose_at(1, 2)}
    with pytest.raises(ValueError, match=r"expected \(1, 229\), got \(1, 226\)"):
        online(PoseCompletion(Short()), {1: frames}, max_age=9)

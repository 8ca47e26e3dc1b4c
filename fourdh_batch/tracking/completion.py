"""Amodal completion: the poses of a track's missed frames, from the detections around them.

A track is cut into windows of 32 frames, counted from its first detection. The missed frames of a
window are told by the pose predictor from the detections between 32 frames before the window and
32 frames after it, all windows by themselves. Hence a window can be completed as soon as the 32
frames after it have gone by, and nothing older has to be remembered: the result is that of the
reference, which works through whole tracks when the video has ended.

Only gaps between two detections are completed. Extension: a window without any detection in
reach (tracks of a large `max_age`, or lost frames) is told from the last detection before and
the first one after it, placed at its two ends; the reference would ask for a pose out of nothing.

Dimension letters: `K` tracks, `T` slots of a window's context, `n` frames.
Source: docs/PHALP.md, section 13 (13.2).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fourdh_batch.tracking.track import NUM_POSE
from fourdh_batch.types import F32, I64, Bool

WINDOW = 32  # frames that are completed at once
MARGIN = 32  # frames of context before and after them
MAX_SLOTS = MARGIN + WINDOW + MARGIN
_FRAME_LISTS = ("seen", "missed", "wanted")


class PoseCompleter(Protocol):
    """Tells missing poses of one stretch of a track."""

    @property
    def frame_length(self) -> int:
        """Slots that the network has; more than `MAX_SLOTS` are needed."""

    def complete(self, pose: F32, is_seen: Bool, wanted: I64) -> F32:
        """Complete one stretch, placed from slot 0.

        Args:
            pose: (T, 229) pose vectors; zero where not seen.
            is_seen: (T,) slots that hold a detection; at least one.
            wanted: (n,) slots to tell.

        Returns:
            (n, 229) pose vectors.
        """


@dataclass(frozen=True, slots=True, eq=False)
class CompletedPoses:
    """Poses of missed frames of one track, in one window.

    Attributes:
        track_id: the track.
        frame_index: (n,) the frames, ascending.
        pose: (n, 229) their pose vectors, as the completer told them.
    """

    track_id: int
    frame_index: I64
    pose: F32


@dataclass(slots=True, eq=False)
class _Track:
    """What of a track may still be needed; lists in the order of time.

    Attributes:
        first_frame: of its first detection: where its windows are counted from.
        seen, pose: frames and pose vectors of its detections.
        missed: frames since the last detection in which it was not seen.
        wanted: missed frames between two detections, not completed yet.
    """

    first_frame: int
    seen: list[int] = field(default_factory=list)
    pose: list[F32] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)

    def window_of(self, frame_index: int) -> int:
        """First frame of the window that holds a frame."""
        return frame_index - (frame_index - self.first_frame) % WINDOW

    def forget(self, now: int) -> None:
        """Drop detections that no open window and no later one can reach."""
        oldest = min([*self.wanted[:1], *self.missed[:1], now + 1])
        reach = self.window_of(oldest) - MARGIN
        # One more, for windows without a detection in reach.
        num = bisect_left(self.seen, reach) - 1
        if num > 0:
            del self.seen[:num], self.pose[:num]


class PoseCompletion:
    """Completes the tracks of one video, frame by frame, in bounded memory.

    Per frame: `see` and `miss`, then `settle`. What a call of the completer is asked depends on
    the track and the window alone, so results do not depend on how the video is cut up.

    Args:
        completer: the pose predictor.

    Raises:
        ValueError: the pose predictor is too short for a window and its context.
    """

    def __init__(self, completer: PoseCompleter) -> None:
        if completer.frame_length <= MAX_SLOTS:
            raise ValueError(
                f"pose predictor: expected more than {MAX_SLOTS} slots to complete missed frames, "
                f"got frame_length {completer.frame_length}"
            )
        self._completer = completer
        self._tracks: dict[int, _Track] = {}

    def see(self, frame_index: int, track_id: I64, pose: F32) -> None:
        """Tracks were seen, each after all that was said of it before.

        Args:
            frame_index: the frame.
            track_id: (K,) tracks.
            pose: (K, 229) their pose vectors.
        """
        for row, number in enumerate(track_id.tolist()):
            track = self._tracks.get(number)
            if track is None:
                track = self._tracks[number] = _Track(frame_index)
            track.seen.append(frame_index)
            track.pose.append(pose[row].copy())
            track.wanted += track.missed
            track.missed.clear()

    def miss(self, frame_index: int, track_id: I64) -> None:
        """Tracks (K,) that were seen before were not seen in this frame, of which a pose is wanted.

        Frames of which nothing is said cost nothing.
        """
        for number in track_id.tolist():
            self._tracks[number].missed.append(frame_index)

    def settle(self, frame_index: int, live_track_id: I64) -> list[CompletedPoses]:
        """All has been said of a frame: what is known now.

        Args:
            frame_index: the frame; all later ones have higher numbers.
            live_track_id: tracks that may be seen again; the others are ended and forgotten.
        """
        live = set(live_track_id.tolist())
        ready: list[CompletedPoses] = []
        for number in [k for k in self._tracks if k not in live]:
            ready += self._complete(number, None)
            del self._tracks[number]
        for number, track in self._tracks.items():
            if track.wanted:
                ready += self._complete(number, frame_index)
            track.forget(frame_index)
        return ready

    def finish(self) -> list[CompletedPoses]:
        """The video has ended: all that is left."""
        return self.settle(0, np.zeros(0, np.int64))

    def _complete(self, number: int, now: int | None) -> Iterator[CompletedPoses]:
        """Windows of a track that are ready at frame `now`; all of an ended track (None)."""
        track = self._tracks[number]
        while track.wanted:
            start = track.window_of(track.wanted[0])
            stop = start + WINDOW
            if now is not None:
                future_is_known = now >= stop + MARGIN - 1
                gap_is_open = bool(track.missed) and track.missed[0] < stop
                if not future_is_known or gap_is_open:
                    return
            num = bisect_left(track.wanted, stop)
            frames = np.array(track.wanted[:num], np.int64)
            del track.wanted[:num]
            yield CompletedPoses(number, frames, self._tell(track, start, frames))

    def _tell(self, track: _Track, start: int, frames: I64) -> F32:
        """(n, 229) poses of missed frames of the window that begins at `start`."""
        first_slot = max(track.first_frame, start - MARGIN)
        last_slot = start + WINDOW + MARGIN - 1
        low, high = bisect_left(track.seen, first_slot), bisect_left(track.seen, last_slot + 1)
        slots = np.array(track.seen[low:high], np.int64) - first_slot
        rows = list(range(low, high))
        if not rows:
            rows, slots = [low - 1, low], np.array([0, last_slot - first_slot])
        pose = np.zeros((last_slot + 1 - first_slot, NUM_POSE), np.float32)
        pose[slots] = [track.pose[row] for row in rows]
        is_seen = np.zeros(len(pose), dtype=np.bool_)
        is_seen[slots] = True
        told = self._completer.complete(pose, is_seen, frames - first_slot)
        if told.shape != (len(frames), NUM_POSE):
            raise ValueError(
                f"pose predictor: expected {(len(frames), NUM_POSE)}, got {told.shape}"
            )
        return told

    def state(self) -> dict[str, Any]:
        """Everything remembered, as plain arrays; the lists of all tracks one after the other."""
        tracks = list(self._tracks.values())
        poses = [pose for track in tracks for pose in track.pose]
        return {
            "track_id": np.array(list(self._tracks), np.int64),
            "first_frame": np.array([track.first_frame for track in tracks], np.int64),
            "pose": np.array(poses, np.float32).reshape(-1, NUM_POSE),
            **{
                name: np.array([f for t in tracks for f in getattr(t, name)], np.int64)
                for name in _FRAME_LISTS
            },
            **{
                f"num_{name}": np.array([len(getattr(t, name)) for t in tracks], np.int64)
                for name in _FRAME_LISTS
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        lists = {
            name: [
                part.tolist()
                for part in np.split(state[name], np.cumsum(state[f"num_{name}"])[:-1])
            ]
            for name in _FRAME_LISTS
        }
        poses = np.split(state["pose"], np.cumsum(state["num_seen"])[:-1])
        self._tracks = {
            number: _Track(
                first_frame,
                pose=[row.copy() for row in poses[k]],
                **{name: lists[name][k] for name in _FRAME_LISTS},
            )
            for k, (number, first_frame) in enumerate(
                zip(state["track_id"].tolist(), state["first_frame"].tolist(), strict=True)
            )
        }

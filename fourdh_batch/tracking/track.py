"""The live tracks of a video as a structure of arrays, and what may happen to them.

Tracks are rows, in the order in which they were born. Time is the frame index: how long a track
has lived and how long it has not been seen follow from the frames it remembers.

Dimension letters: `K` tracks, `M` detections, `P` remembered detections, oldest first. A track
with fewer than `P` detections remembers its first one several times.
Source: docs/PHALP.md, sections 10 and 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.tracking.location import HISTORY_LENGTH
from fourdh_batch.types import F32, F64, I64

NUM_POSE = 229  # 24 rotation matrices, 10 betas, (tx, ty, tz / 200) (section 2.5)


@dataclass(frozen=True, slots=True, eq=False)
class DetectionRefs:
    """Detections named by where they stand in the input, with the track they belonged to.

    Attributes:
        track_id: (R,) track.
        frame_index: (R,) frame of the detection.
        detection_row: (R,) row of the detection in that frame's input.
    """

    track_id: I64
    frame_index: I64
    detection_row: I64

    def __len__(self) -> int:
        return len(self.track_id)

    @classmethod
    def join(cls, refs: Sequence[DetectionRefs]) -> DetectionRefs:
        """Several lists, one after the other."""
        return cls(
            *(np.concatenate([getattr(ref, field.name) for ref in refs]) for field in fields(cls))
        )


@dataclass(slots=True, eq=False)
class Tracks:
    """Live tracks.

    Attributes:
        track_id: (K,) ascending.
        hits: (K,) detections so far.
        first_frame: (K,) frame of the first detection.
        frame_index: (K, P) frames of the remembered detections.
        detection_row: (K, P) rows of the remembered detections in their frames.
        location: (K, P, 3) x, y, n (see `location.py`).
        pose: (K, P, 229) pose vectors.
        bbox_xyxy_px: (K, 4) last seen box.
    """

    track_id: I64
    hits: I64
    first_frame: I64
    frame_index: I64
    detection_row: I64
    location: F64
    pose: F32
    bbox_xyxy_px: F32

    def __len__(self) -> int:
        return len(self.track_id)

    @classmethod
    def born(
        cls,
        track_id: I64,
        frame_index: int,
        detection_row: I64,
        location: F64,
        pose: F32,
        bbox_xyxy_px: F32,
    ) -> Tracks:
        """New tracks of one detection each, which fills their whole memory."""
        k = len(track_id)
        return cls(
            track_id=track_id,
            hits=np.ones(k, np.int64),
            first_frame=np.full(k, frame_index, np.int64),
            frame_index=np.full((k, HISTORY_LENGTH), frame_index, np.int64),
            detection_row=np.repeat(detection_row[:, None], HISTORY_LENGTH, 1),
            location=np.repeat(location[:, None], HISTORY_LENGTH, 1),
            pose=np.repeat(pose[:, None], HISTORY_LENGTH, 1),
            bbox_xyxy_px=bbox_xyxy_px,
        )

    @classmethod
    def none(cls) -> Tracks:
        """No tracks at all."""
        empty = np.zeros(0, np.int64)
        return cls.born(
            empty,
            0,
            empty,
            np.zeros((0, 3)),
            np.zeros((0, NUM_POSE), np.float32),
            np.zeros((0, 4), np.float32),
        )

    @property
    def last_seen(self) -> I64:
        """(K,) frame of the newest detection."""
        last: I64 = self.frame_index[:, -1]
        return last

    def take(self, rows: NDArray[Any]) -> Tracks:
        """The tracks at these rows."""
        return Tracks(*(getattr(self, field.name)[rows] for field in fields(self)))

    def followed_by(self, other: Tracks) -> Tracks:
        """These tracks, then the others."""
        return Tracks(
            *(
                np.concatenate([getattr(self, field.name), getattr(other, field.name)])
                for field in fields(self)
            )
        )

    def observe(
        self,
        rows: I64,
        frame_index: int,
        detection_row: I64,
        location: F64,
        pose: F32,
        bbox_xyxy_px: F32,
        *,
        is_shot_start: bool,
    ) -> None:
        """The tracks at `rows` were seen.

        At the start of a shot the new location replaces all remembered ones, so that motion is
        learnt afresh; times and poses stay.
        """
        _push(self.frame_index, rows, np.full(len(rows), frame_index))
        _push(self.detection_row, rows, detection_row)
        _push(self.pose, rows, pose)
        if is_shot_start:
            self.location[rows] = location[:, None]
        else:
            _push(self.location, rows, location)
        self.hits[rows] += 1
        self.bbox_xyxy_px[rows] = bbox_xyxy_px

    def past_detections(self, rows: NDArray[Any], *, newest: int = 0) -> DetectionRefs:
        """Detections of the tracks at `rows`, track by track, newest first.

        Only complete while a track has at most `HISTORY_LENGTH` detections.

        Args:
            rows: tracks.
            newest: how many of the newest detections to leave out.
        """
        back = np.arange(HISTORY_LENGTH)
        wanted = (back >= newest) & (back < self.hits[rows][:, None])  # (R, P), newest first
        return DetectionRefs(
            track_id=np.repeat(self.track_id[rows], wanted.sum(1)),
            frame_index=self.frame_index[rows, ::-1][wanted],
            detection_row=self.detection_row[rows, ::-1][wanted],
        )


def _push(history: NDArray[Any], rows: I64, newest: NDArray[Any]) -> None:
    """Forget the oldest entry of some rows of a (K, P, ...) history and append the newest."""
    history[rows, :-1] = history[rows, 1:]
    history[rows, -1] = newest

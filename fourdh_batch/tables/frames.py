"""The decoded frames of a video, also those without anybody in them, as a short list of runs.

`detections` has no row where nothing was detected, yet a tracker must know that somebody looked
there: a young track ends, and a person out of sight may get a predicted row. The column
`frame_runs` of `videos` says which frames were decoded, when they are shown, to which shot they
belong and how large they are. Frames that it skips were lost.

Dimension letters: `F` frames.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from fourdh_batch.types import F64, I64, Bool

TIME_TOLERANCE_S = 1e-6  # far below a tick; the frames of `detections` have their exact time there


@dataclass(frozen=True, slots=True, eq=False)
class FrameList:
    """Frames in order.

    Attributes:
        frame_index: (F,) ascending; lost frames are missing.
        pts_s: (F,) seconds, to a microsecond.
        shot_id: (F,) shots.
        image_size_wh: (F, 2) pixels.
    """

    frame_index: I64
    pts_s: F64
    shot_id: I64
    image_size_wh: I64

    @property
    def is_shot_start(self) -> Bool:
        """(F,) whether a cut lies directly before the frame; the video's first frame has none."""
        start: Bool = np.diff(self.shot_id, prepend=self.shot_id[:1]) != 0
        return start


class FrameRuns:
    """Collects frames into runs of even time steps within a shot.

    Memory grows with the number of runs: a few for constant frame rates, up to one per frame for
    the worst variable ones.
    """

    def __init__(self) -> None:
        self._runs: list[list[float]] = []  # first frame, frames, first time, step, shot, size

    def add(
        self, frame_index: int, pts_s: float, shot_id: int, image_size_wh: tuple[int, int]
    ) -> None:
        """The next frame."""
        if self._runs:
            run = self._runs[-1]
            first, num, start_s, step_s, shot = run[:5]
            if (
                frame_index == first + num
                and shot_id == shot
                and run[5:] == list(image_size_wh)
                and (num == 1 or abs(start_s + num * step_s - pts_s) <= TIME_TOLERANCE_S)
            ):
                run[1] += 1
                if num == 1:
                    run[3] = pts_s - start_s
                return
        self._runs.append([frame_index, 1, pts_s, 0.0, shot_id, *image_size_wh])

    def to_json(self) -> str:
        """For the column `frame_runs`: a list of [first_frame_index, num_frames, first_pts_s,
        step_s, shot_id, width, height]."""
        return json.dumps(self._runs)

    @classmethod
    def from_json(cls, text: str) -> FrameRuns:
        """Inverse of `to_json`."""
        runs = cls()
        runs._runs = json.loads(text)
        return runs

    def frames(self) -> FrameList:
        """All frames."""
        runs = np.array(self._runs, dtype=np.float64).reshape(-1, 7)
        num = runs[:, 1].astype(np.int64)
        whole = runs[:, [0, 4, 5, 6]].astype(np.int64).repeat(num, axis=0)
        place = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
        start_s, step_s = runs[:, 2].repeat(num), runs[:, 3].repeat(num)
        return FrameList(
            frame_index=whole[:, 0] + place,
            pts_s=start_s + place * step_s,
            shot_id=whole[:, 1],
            image_size_wh=whole[:, 2:],
        )

"""Shot boundaries: a content score per frame, and the rule that turns the scores into cuts.

The rule is PySceneDetect's AdaptiveDetector with its defaults (version 0.7.2, BSD-3-Clause): a
frame is the first of a new shot where its change against the frame before is at least
`ADAPTIVE_THRESHOLD` times the mean change of its four neighbours, at least `MIN_CONTENT_VALUE`
in itself, and at least `MIN_SHOT_FRAMES` after the last cut. Scores need only the frame before,
so they are made while decoding; the rule needs two frames of look-ahead and all scores of the
video in order. Running the rule on pieces of a video gives other cuts than running it once:
pieces hand on scores, and one `ShotRule` reads them all.

Two readings of our own, where the original has none:

- After lost frames the score compares with the last frame that was handed out, and the
  neighbours are the frames handed out; `MIN_SHOT_FRAMES` counts frame indices.
- Where the picture size changes, the earlier small picture is resized to the new small size.

The original counts `min_scene_len` by time and average rate where frame times vary; this one
counts frames. For a constant frame rate both are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from cv2.typing import MatLike

from fourdh_batch.types import F64, I64, U8

SMALL_SIDE_PX = 256  # the longer side is scaled down to this before comparing
ADAPTIVE_THRESHOLD = 3.0  # change against the mean of the neighbours
MIN_CONTENT_VALUE = 15.0  # mean change of hue, saturation and value in 8-bit steps
LOOK_AHEAD_FRAMES = 2  # neighbours on either side
MIN_SHOT_FRAMES = 15

_ZERO = 0.00001  # a mean change below this counts as none
_MAX_RATIO = 255.0


class ContentScore:
    """Change of content from frame to frame: mean absolute HSV difference of small pictures."""

    def __init__(self) -> None:
        self._previous: MatLike | None = None

    def push(self, rgb: U8) -> float:
        """Score of the next frame.

        Args:
            rgb: (H, W, 3) uint8.
        Returns:
            Mean over pixels and over hue, saturation, value of the absolute difference against
            the frame before, in 8-bit steps (OpenCV's HSV, hue 0 to 179, not wrapped round);
            NaN for the first frame.
        """
        height, width = rgb.shape[:2]
        scale = max(height, width) / SMALL_SIDE_PX
        if scale > 1:
            size = max(1, round(width / scale)), max(1, round(height / scale))
            small = cv2.resize(rgb, size, interpolation=cv2.INTER_LINEAR)
        else:
            size, small = (width, height), rgb
        hsv = cv2.cvtColor(small, cv2.COLOR_RGB2HSV)
        previous, self._previous = self._previous, hsv
        if previous is None:
            return float("nan")
        if previous.shape != hsv.shape:
            previous = cv2.resize(previous, size, interpolation=cv2.INTER_LINEAR)
        num_pixels = float(size[0] * size[1])
        hue, saturation, value, _ = cv2.sumElems(cv2.absdiff(hsv, previous))
        return (hue / num_pixels + saturation / num_pixels + value / num_pixels) / 3.0


class ShotRule:
    """The adaptive rule over a stream of scores.

    Attributes:
        decided_until: frames with a smaller index will not become cuts any more.
    """

    def __init__(self) -> None:
        self._window: deque[tuple[int, float]] = deque(maxlen=2 * LOOK_AHEAD_FRAMES + 1)
        self._last_cut: int | None = None
        self.decided_until = 0

    def push(self, frame_index: I64, scores: F64) -> list[int]:
        """Take the scores of the next frames.

        Args:
            frame_index: (T,) increasing over all calls; gaps are lost frames.
            scores: (T,) from `ContentScore`; NaN counts as no change.
        Returns:
            Indices of frames now known to begin a shot; may lie `LOOK_AHEAD_FRAMES` frames
            before the first of this call. The first frame of the video is not among them.
        Raises:
            ValueError: frame indices that do not increase.
        """
        cuts: list[int] = []
        for index, score in zip(frame_index.tolist(), scores.tolist(), strict=True):
            if self._window and index <= self._window[-1][0]:
                raise ValueError(f"frame {index} after frame {self._window[-1][0]}")
            if self._last_cut is None:
                self._last_cut = index
            self._window.append((index, 0.0 if np.isnan(score) else score))
            if len(self._window) < 2 * LOOK_AHEAD_FRAMES + 1:
                continue
            target, change = self._window[LOOK_AHEAD_FRAMES]
            self.decided_until = target + 1
            if self._stands_out(change) and target - self._last_cut >= MIN_SHOT_FRAMES:
                self._last_cut = target
                cuts.append(target)
        return cuts

    def finish(self) -> list[int]:
        """No more frames come.

        Returns:
            Cuts among the frames still waiting for their look-ahead: none, because the rule
            never cuts in the last `LOOK_AHEAD_FRAMES` frames.
        """
        if self._window:
            self.decided_until = self._window[-1][0] + 1
        return []

    def state(self) -> dict[str, Any]:
        """What is remembered, as plain lists and numbers."""
        return {
            "window": [list(item) for item in self._window],
            "last_cut": self._last_cut,
            "decided_until": self.decided_until,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._window.clear()
        self._window.extend((int(index), float(score)) for index, score in state["window"])
        self._last_cut = state["last_cut"]
        self.decided_until = state["decided_until"]

    def _stands_out(self, change: float) -> bool:
        neighbours = [s for i, (_, s) in enumerate(self._window) if i != LOOK_AHEAD_FRAMES]
        mean = sum(neighbours) / (2.0 * LOOK_AHEAD_FRAMES)
        if abs(mean) < _ZERO:
            ratio = _MAX_RATIO if change >= MIN_CONTENT_VALUE else 0.0
        else:
            ratio = min(change / mean, _MAX_RATIO)
        return ratio >= ADAPTIVE_THRESHOLD and change >= MIN_CONTENT_VALUE


def shot_starts(frame_index: I64, scores: F64) -> I64:
    """The rule on the scores of a whole video.

    Args:
        frame_index: (T,) increasing.
        scores: (T,).
    Returns:
        (S,) indices of frames that begin a shot, without the first frame of the video.
    """
    rule = ShotRule()
    return np.array(rule.push(frame_index, scores) + rule.finish(), np.int64)

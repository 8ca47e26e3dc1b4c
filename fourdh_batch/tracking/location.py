"""Where people will be: one ridge regression per track and coordinate, in closed form.

A *location* is (x, y, n): the model origin in the square-padded frame ([0, 1] inside it) and the
natural logarithm of its depth in the virtual 256-pixel camera. It carries exactly what the
camera (tx, ty, tz) does, in the coordinates in which PHALP' regresses and compares.

Dimension letters: `K` tracks, `M` detections, `P` remembered detections of a track.
Source: docs/PHALP.md, sections 2.4 and 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.geometry import FOCAL_PER_SIDE
from fourdh_batch.types import F32, F64, I64

HISTORY_LENGTH = 7  # detections remembered per track (section 1, track_history)
RIDGE_PENALTY = np.array([1.2, 2.0, 5.0])  # of x, y, n (section 6)
STUDENT_T = 2.5705818356363146  # 97.5 % quantile for HISTORY_LENGTH - 2 degrees of freedom
MAX_HORIZON = 49  # frames from the last detection beyond which nothing is extrapolated (section 6)
# The camera formula of section 2.3 ends at a depth of 2 f / 1e-9 = e^29.9.
MAX_LOG_DEPTH = 30.0
MAX_BOX_PX = 1e6  # no picture comes near it


@dataclass(frozen=True, slots=True, eq=False)
class PredictedLocation:
    """Where K tracks are expected, and how sure that is.

    Attributes:
        location: (K, 3) x, y, n.
        spread: (K, 3) uncertainty of x, y and n as the cost reads them: for a regression, half
            the 95 % prediction interval of x and y divided by m, and of n minus log(m), with
            m = 8 - number of distinct times; for a track with a single detection its camera
            (tx, ty, log tz), which makes its first association lenient (section 15, Q9).
    """

    location: F64
    spread: F64

    def take(self, rows: NDArray[Any]) -> PredictedLocation:
        """The predictions at these rows."""
        return PredictedLocation(self.location[rows], self.spread[rows])


def locate(camera: F32 | F64) -> F64:
    """(..., 3) locations of cameras (tx, ty, tz) with positive tz in the virtual 256 camera."""
    camera = camera.astype(np.float64)
    depth = camera[..., 2:]
    return np.concatenate([camera[..., :2] / depth * FOCAL_PER_SIDE + 0.5, np.log(depth)], -1)


def camera_of(location: F64) -> F64:
    """(..., 3) cameras (tx, ty, tz) of locations; inverse of `locate`."""
    depth = np.exp(location[..., 2:])
    return np.concatenate([(location[..., :2] - 0.5) * depth / FOCAL_PER_SIDE, depth], -1)


def copied_location(location: F64) -> PredictedLocation:
    """What is expected of tracks with a single detection at (K, 3) `location`: the same again."""
    spread = camera_of(location)
    spread[:, 2] = location[:, 2]
    return PredictedLocation(location, spread)


def predict_location(history: F64, frame_index: I64, target_frame: int | I64) -> PredictedLocation:
    """Extrapolate K tracks to a later frame.

    Every coordinate is regressed on time by itself, with an intercept that is not penalised.
    Where all times of a history are equal nothing can be said about the spread; the reference
    gets NaN there, here the interval is zero.

    Args:
        history: (K, HISTORY_LENGTH, 3) locations, oldest first.
        frame_index: (K, HISTORY_LENGTH) their frames, non-decreasing.
        target_frame: frame to predict, a number or (K,); not before the newest of the history.
    """
    last = frame_index[:, -1]
    # Relative to the last detection, so that long videos lose no digits.
    time = (frame_index - last[:, None]).astype(np.float64)  # (K, P)
    horizon = np.minimum(np.asarray(target_frame) - last, MAX_HORIZON)  # (K,)
    mean_time = time.mean(1, keepdims=True)
    centred = time - mean_time
    variation = np.square(centred).sum(1)[:, None]  # (K, 1)
    ahead = horizon[:, None] - mean_time

    mean = history.mean(1)
    deviation = history - mean[:, None]
    slope = (centred[:, :, None] * deviation).sum(1) / (variation + RIDGE_PENALTY)  # (K, 3)
    residual = deviation - slope[:, None] * centred[:, :, None]

    error = np.sqrt(np.square(residual).sum(1) / (HISTORY_LENGTH - 2))
    leverage = np.square(ahead) / np.where(variation > 0, variation, np.inf)
    interval = STUDENT_T * error * np.sqrt(1 + 1 / HISTORY_LENGTH + leverage)
    repeats = 1.0 + (np.diff(frame_index, axis=1) == 0).sum(1)

    location = mean + slope * ahead
    location[:, 2] = np.clip(location[:, 2], -MAX_LOG_DEPTH, MAX_LOG_DEPTH)
    spread = interval
    spread[:, :2] /= repeats[:, None]
    spread[:, 2] -= np.log(repeats)
    return PredictedLocation(location, spread)


def moved_box(bbox_xyxy_px: F32, seen: F64, expected: F64, image_size_wh: tuple[int, int]) -> F32:
    """Boxes carried along as their people move in front of the camera.

    Args:
        bbox_xyxy_px: (G, 4) pixels of the full frame, of people who were at `seen`.
        seen, expected: (G, 3) locations before and after.
        image_size_wh: of the frame.

    Returns:
        (G, 4) pixels: moved with the model origin and scaled by the change of depth; bounded, so
        that an absurd location gives no infinity.
    """
    width, height = image_size_wh
    side = max(width, height)
    margin = np.array([(side - width) // 2, (side - height) // 2])
    origin = np.tile(seen[:, :2] * side - margin, 2)
    target = np.tile(expected[:, :2] * side - margin, 2)
    scale = np.exp(seen[:, 2:] - expected[:, 2:])
    moved: F64 = np.clip(target + (bbox_xyxy_px - origin) * scale, -MAX_BOX_PX, MAX_BOX_PX)
    return moved.astype(np.float32)

from __future__ import annotations

import numpy as np
import pytest

from fourdh_batch.tracking.location import (
    HISTORY_LENGTH,
    MAX_LOG_DEPTH,
    camera_of,
    copied_location,
    locate,
    predict_location,
)

FRAMES = np.arange(HISTORY_LENGTH)[None]


def walk(step: tuple[float, float, float]) -> np.ndarray:
    """(1, P, 3) locations at constant speed."""
    return np.array([0.3, 0.5, 4.0]) + np.array(step) * FRAMES[..., None]


def test_location_and_camera_are_inverse() -> None:
    camera = np.float32([[0.0, 0.0, 40.0], [-12.5, 3.0, 120.0], [1e-3, -900.0, 1e4]])
    assert locate(camera)[0] == pytest.approx([0.5, 0.5, np.log(40)])
    assert camera_of(locate(camera)) == pytest.approx(camera, rel=1e-6, abs=1e-6)


def test_constant_speed_is_followed_with_the_slope_that_ridge_allows() -> None:
    got = predict_location(walk((0.01, -0.02, 0.03)), FRAMES, 10)
    variation = 28.0  # sum of (t - 3)^2 over seven frames
    for axis, (start, step, penalty) in enumerate(
        [(0.3, 0.01, 1.2), (0.5, -0.02, 2.0), (4.0, 0.03, 5.0)]
    ):
        slope = step * variation / (variation + penalty)
        assert got.location[0, axis] == pytest.approx(start + 3 * step + slope * 7)


def test_someone_who_stands_still_is_expected_at_the_same_place_without_doubt() -> None:
    got = predict_location(walk((0, 0, 0)), FRAMES, 30)
    assert got.location == pytest.approx(np.array([[0.3, 0.5, 4.0]]))
    assert got.spread == pytest.approx(np.zeros((1, 3)), abs=1e-12)


def test_nothing_is_extrapolated_beyond_49_frames() -> None:
    history = walk((0.01, 0.01, 0.01))
    history[0, 2] += 0.05
    at_limit = predict_location(history, FRAMES, 6 + 49)
    later = predict_location(history, FRAMES, 6 + 80)
    before = predict_location(history, FRAMES, 6 + 48)
    assert np.array_equal(at_limit.location, later.location)
    assert np.array_equal(at_limit.spread, later.spread)
    assert before.location[0, 0] < at_limit.location[0, 0]
    assert before.spread[0, 0] < at_limit.spread[0, 0]


def test_prediction_does_not_depend_on_when_a_video_began() -> None:
    history = walk((0.01, -0.02, 0.03))
    history[0, 3] += 0.01
    early = predict_location(history, FRAMES, 9)
    late = predict_location(history, FRAMES + 2**53 // 4, 9 + 2**53 // 4)
    assert np.array_equal(early.location, late.location)
    assert np.array_equal(early.spread, late.spread)


def test_a_runaway_depth_stays_a_number() -> None:
    got = predict_location(walk((0.0, 0.0, 5.0)), FRAMES, 60)
    assert got.location[0, 2] == MAX_LOG_DEPTH
    assert np.isfinite(camera_of(got.location)).all()


def test_a_single_detection_is_expected_again_with_its_camera_as_doubt() -> None:
    camera = np.float32([[-2.0, 1.0, 100.0]])
    got = copied_location(locate(camera))
    assert np.array_equal(got.location, locate(camera))
    assert got.spread == pytest.approx(np.array([[-2.0, 1.0, np.log(100)]]))

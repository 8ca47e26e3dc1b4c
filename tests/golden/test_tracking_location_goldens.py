"""Closed-form location prediction against fourteen histories put through the reference."""

from __future__ import annotations

import numpy as np
import pytest

from fourdh_batch.tracking.location import camera_of, predict_location
from fourdh_batch.types import F64
from tests.tracking_scenes import load

# columns of the recorded vectors: x, y, then camera, uncertainty, marker
X, Y, CAMERA, DEPTH, UNCERTAINTY = 0, 1, slice(2, 5), 4, slice(5, 8)


def as_location(loca: F64) -> F64:
    loca = loca.astype(np.float64)
    return np.stack([loca[..., X], loca[..., Y], np.log(loca[..., DEPTH])], -1)


def test_predictions_equal_the_reference() -> None:
    z = load("location_predictor")
    target = z["history_time"][:, -1] + z["time_since_update"] + 1
    got = predict_location(as_location(z["history_loca"]), z["history_time"], target)
    expected = z["predicted_loca"]
    assert got.location[:, :2] == pytest.approx(expected[:, :2], rel=1e-5)
    assert camera_of(got.location) == pytest.approx(expected[:, CAMERA], rel=1e-5, abs=1e-6)
    spread = np.concatenate([got.spread[:, :2], np.exp(got.spread[:, 2:])], 1)
    is_known = ~np.isnan(expected[:, UNCERTAINTY]).any(1)
    assert is_known.sum() == 13
    # one history repeats one location: its interval is 0 but for rounding
    assert spread[is_known] == pytest.approx(expected[is_known, UNCERTAINTY], rel=1e-5, abs=1e-8)


def test_q6_a_history_at_one_time_gives_no_nan() -> None:
    z = load("location_predictor")
    (case,) = np.flatnonzero(np.isnan(z["predicted_loca"]).any(1))
    assert "all times equal" in z["note"][case]
    history = as_location(z["history_loca"][[case]])
    got = predict_location(history, z["history_time"][[case]], 7)
    assert np.isfinite(got.location).all()
    assert np.isfinite(got.spread).all()

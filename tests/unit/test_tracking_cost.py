from __future__ import annotations

import numpy as np
import pytest

from fourdh_batch.tracking.cost import (
    MAX_POSE_DISTANCE,
    NUM_POSE_COMPARED,
    box_factor,
    cost_terms,
    cost_without_texture,
    texture_factor,
)
from fourdh_batch.tracking.location import PredictedLocation

POSE = np.random.default_rng(0).normal(size=(1, 229)).astype(np.float32)


def expected_at(x: float, y: float, log_depth: float, spread: float = 0.01) -> PredictedLocation:
    return PredictedLocation(np.array([[x, y, log_depth]]), np.full((1, 3), spread))


def cost(predicted: PredictedLocation, location: list[float], pose: np.ndarray = POSE) -> float:
    terms = cost_terms(predicted, POSE, np.array([location]), pose.astype(np.float32))
    return float(cost_without_texture(terms)[0, 0])


def test_the_expected_place_and_pose_cost_one() -> None:
    assert cost(expected_at(0.4, 0.5, 4.0), [0.4, 0.5, 4.0]) == 1.0


def test_a_known_pair_costs_what_the_formula_says() -> None:
    pose = POSE.copy()
    pose[0, :2] += np.float32([0.3, 0.4])
    got = cost(expected_at(0.4, 0.5, 4.0, 0.2), [0.43, 0.46, 4.1], pose)
    c1 = np.hypot(0.2, 0.2)
    by_hand = (
        (1 + 1.3070 * 0.25)
        * np.exp(0.05 / (0.1 + np.tanh(c1)) / 0.3792)
        * np.exp(0.1 / (0.1 + np.tanh(0.2)) / 4.1658)
    )
    assert got == pytest.approx(by_hand, rel=1e-6)
    assert texture_factor(np.array([0.5])) == pytest.approx(np.array([3.0268]))


def test_a_strange_pose_costs_at_most_so_much_and_the_camera_in_it_nothing() -> None:
    far, camera_only = POSE + 10, POSE.copy()
    camera_only[0, NUM_POSE_COMPARED:] += 100
    place = [0.4, 0.5, 4.0]
    assert cost(expected_at(*place), place, far) == pytest.approx(1 + 1.3070 * MAX_POSE_DISTANCE)
    assert cost(expected_at(*place), place, camera_only) == 1.0


def test_doubt_makes_distance_cheaper() -> None:
    sure, unsure = expected_at(0.4, 0.5, 4.0, 0.0), expected_at(0.4, 0.5, 4.0, 1.0)
    assert cost(unsure, [0.5, 0.5, 4.5]) < cost(sure, [0.5, 0.5, 4.5])


def test_q10_near_distances_keep_their_digits() -> None:
    terms = cost_terms(
        expected_at(0.512345, 0.498765, 4.0), POSE, np.array([[0.512346, 0.498765, 4.0]]), POSE
    )
    assert terms.position[0, 0] == pytest.approx(1e-6, rel=1e-8)
    assert terms.pose[0, 0] == 0.0


def test_out_of_reach_is_infinite_and_unknown_is_nan() -> None:
    assert cost(expected_at(50.0, 0.5, 4.0, 0.0), [0.5, 0.5, 4.0]) == np.inf
    assert np.isnan(cost(expected_at(np.nan, 0.5, 4.0), [0.5, 0.5, 4.0]))


def test_boxes_that_overlap_cost_less() -> None:
    last = np.float32([[0, 0, 10, 20], [100, 0, 110, 20]])
    found = np.float32([[0, 0, 10, 20], [0, 0, 10, 10]])
    expected = np.exp([[-2, -1], [0, 0]])
    np.testing.assert_allclose(box_factor(last, found, 2.0), expected, rtol=1e-12)
    assert (box_factor(last, found, 0.0) == 1).all()
    assert box_factor(last[:0], found, 2.0).shape == (0, 2)

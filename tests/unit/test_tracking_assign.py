from __future__ import annotations

import numpy as np
import pytest

from fourdh_batch.tracking.assign import GATED_EXCESS, assign

GATE = 100.0


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (4, 0)])
@pytest.mark.parametrize("solver_order", [False, True])
def test_one_empty_side_gives_no_match(shape: tuple[int, int], solver_order: bool) -> None:
    got = assign(np.ones(shape), GATE, solver_order=solver_order)
    assert len(got.track) == len(got.detection) == 0
    assert got.unmatched_detection.tolist() == list(range(shape[1]))


def test_the_cheapest_whole_wins_over_the_cheapest_pair() -> None:
    got = assign(np.array([[1.0, 2.0], [2.0, 50.0]]), GATE)
    assert got.track.tolist() == [0, 1]
    assert got.detection.tolist() == [1, 0]


def test_the_gate_itself_is_allowed_and_nothing_above() -> None:
    got = assign(np.array([[100.0, 500.0], [500.0, 100.1]]), GATE)
    assert (got.track.tolist(), got.detection.tolist()) == ([0], [0])
    assert got.unmatched_detection.tolist() == [1]


def test_q6_nan_and_infinity_are_never_matches() -> None:
    got = assign(np.array([[np.nan, 3.0], [np.inf, np.nan]]), GATE)
    assert (got.track.tolist(), got.detection.tolist()) == ([0], [1])
    assert got.unmatched_detection.tolist() == [0]


def test_what_a_refused_pair_costs_may_drown_in_the_gate() -> None:
    gate = 1e13
    assert gate + GATED_EXCESS == gate
    got = assign(np.array([[np.nan, 2 * gate], [np.inf, gate]]), gate)
    assert (got.track.tolist(), got.detection.tolist()) == ([1], [1])
    assert got.unmatched_detection.tolist() == [0]


def test_q28_left_over_detections_come_in_their_own_order_unless_compatible() -> None:
    # Two tracks that fit nothing, four detections: the solver pairs some columns all the same.
    cost = np.full((2, 4), 1e3)
    assert assign(cost, GATE).unmatched_detection.tolist() == [0, 1, 2, 3]
    compatible = assign(cost, GATE, solver_order=True).unmatched_detection.tolist()
    assert compatible == [2, 3, 0, 1]

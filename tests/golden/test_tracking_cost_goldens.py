"""Cost terms and totals against matrices recorded from the reference."""

from __future__ import annotations

import numpy as np
import pytest

from fourdh_batch.tracking.assign import GATED_EXCESS, gated
from fourdh_batch.tracking.cost import (
    CostTerms,
    cost_terms,
    cost_without_texture,
    texture_factor,
)
from fourdh_batch.tracking.location import PredictedLocation
from fourdh_batch.types import F32, F64
from tests.tracking_scenes import load


def terms_of(loca_t: F32, pose_t: F32, loca_d: F32, pose_d: F32) -> CostTerms:
    """Recorded vectors: x, y, camera, uncertainty, marker."""
    with np.errstate(invalid="ignore", divide="ignore"):  # broken on purpose in the edge cases
        log_t, log_d = np.log(loca_t[:, 4].astype(float)), np.log(loca_d[:, 4].astype(float))
        log_spread = np.log(loca_t[:, 7].astype(float))
    location_t = np.column_stack([loca_t[:, :2], log_t])
    spread = np.column_stack([loca_t[:, 5:7], log_spread])
    location_d = np.column_stack([loca_d[:, :2], log_d])
    return cost_terms(PredictedLocation(location_t, spread), pose_t, location_d, pose_d)


@pytest.mark.parametrize("case", ["f0", "f1", "f2", "f3"])
def test_terms_and_total_equal_the_reference(case: str) -> None:
    z = {k.removeprefix(f"{case}_"): v for k, v in load("cost_matrices").items() if case in k}
    terms = terms_of(z["track_loca"], z["track_pose"], z["det_loca"], z["det_pose"])
    shape = z["P0"].shape
    assert terms.pose == pytest.approx(z["P0"], abs=1e-4)
    # the reference's expanded float32 form of numbers near 0.5 is worth about 3e-4 (Q10)
    assert terms.position == pytest.approx(z["L0"], abs=4e-4)
    assert np.broadcast_to(terms.position_spread[:, None], shape) == pytest.approx(
        z["LC"], rel=1e-5
    )
    assert terms.depth == pytest.approx(z["N0"], rel=1e-4, abs=1e-6)
    assert np.broadcast_to(terms.depth_spread[:, None], shape) == pytest.approx(z["NC"], rel=1e-4)
    total = cost_without_texture(terms) * texture_factor(z["A0"])
    assert total == pytest.approx(z["EQ_019"], rel=1e-2)


def edge_cost() -> tuple[F64, F64]:
    z = load("cost_matrices")
    names = ("edge_track_loca", "edge_track_pose", "edge_det_loca", "edge_det_pose")
    return cost_without_texture(terms_of(*(z[name] for name in names))), z["edge_cost_no_texture"]


def test_edge_costs_equal_the_reference_up_to_its_zeros_for_nan() -> None:
    got, expected = edge_cost()
    # Behind the camera on both sides: the reference's ratio of depths is positive, our depths
    # have no logarithm. Either way the pair is refused.
    assert expected[2, 2] > 100
    assert np.isnan(got[2, 2])
    got[2, 2] = expected[2, 2]
    as_reference = np.nan_to_num(got, nan=0.0, posinf=np.finfo(float).max)
    assert as_reference == pytest.approx(expected, rel=1e-2)


def test_q6_a_pair_without_a_cost_is_refused_not_preferred() -> None:
    got, expected = edge_cost()
    is_perfect_by_accident = expected == 0
    assert is_perfect_by_accident.sum() == 8
    assert (gated(got, 100.0)[is_perfect_by_accident] == 100.0 + GATED_EXCESS).all()

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourdh_batch.evaluate.pose import (
    EVALUATION_KEYPOINTS,
    acceleration_error_mm,
    align_similarity,
    mpjpe_mm,
    pa_mpjpe_mm,
    pck,
    pck_distances,
    pve_mm,
)
from fourdh_batch.geometry import axis_angle_to_rotmat


def people(num: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, 44, 3))


def test_moving_a_body_costs_nothing_and_moving_one_keypoint_costs_its_share() -> None:
    truth = people()
    assert mpjpe_mm(truth + np.array([0.5, -2, 30]), truth) == pytest.approx([0] * 4, abs=1e-9)
    moved = truth.copy()
    moved[:, 25, 0] += 0.14  # one of fourteen, by 140 mm
    moved[:, 38] += 9  # does not count
    assert mpjpe_mm(moved, truth) == pytest.approx([10] * 4)


def test_a_wrong_pelvis_counts_in_every_keypoint() -> None:
    truth = people()
    moved = truth.copy()
    moved[:, 39, 2] += 0.02
    assert mpjpe_mm(moved, truth) == pytest.approx([20] * 4)
    assert pa_mpjpe_mm(moved, truth) == pytest.approx([0] * 4, abs=1e-9)


@given(
    seed=st.integers(0, 2**16),
    turn=st.tuples(*[st.floats(-3, 3)] * 3),
    scale=st.floats(0.05, 20),
    shift=st.tuples(*[st.floats(-50, 50)] * 3),
)
def test_alignment_undoes_every_similarity(
    seed: int, turn: tuple[float, ...], scale: float, shift: tuple[float, ...]
) -> None:
    truth = people(2, seed)
    moved = scale * truth @ axis_angle_to_rotmat(np.array(turn)).T + np.array(shift)
    assert pa_mpjpe_mm(moved, truth) == pytest.approx([0, 0], abs=1e-6)
    error = pa_mpjpe_mm(people(2, seed + 1), truth)
    moved = scale * people(2, seed + 1) @ axis_angle_to_rotmat(np.array(turn)).T + np.array(shift)
    assert pa_mpjpe_mm(moved, truth) == pytest.approx(error, rel=1e-6)


def test_alignment_never_mirrors() -> None:
    truth = people()
    mirrored = truth * [-1, 1, 1]
    assert (pa_mpjpe_mm(mirrored, truth) > 100).all()


def test_alignment_is_the_best_one() -> None:
    points, target = people(1, 1), people(1, 2)
    best = np.square(align_similarity(points, target) - target).sum()
    rng = np.random.default_rng(3)
    for _ in range(200):
        turn = axis_angle_to_rotmat(rng.normal(size=3) * 2)
        moved = rng.uniform(0, 2) * points @ turn.T + rng.normal(size=3)
        assert np.square(moved - target).sum() > best


def test_points_that_coincide_or_lie_on_a_line_are_aligned_without_a_warning() -> None:
    target = people(3)
    points = np.zeros_like(target)  # all in one place
    points[1, :, 0] = np.arange(44)  # on a line
    points[2, :, :2] = people(1, 9)[0, :, :2]  # in a plane
    aligned = align_similarity(points, target)
    assert np.isfinite(aligned).all()
    np.testing.assert_allclose(aligned[0], np.broadcast_to(target[0].mean(axis=0), (44, 3)))
    assert (pa_mpjpe_mm(np.zeros_like(target), np.zeros_like(target)) == 0).all()


def test_vertices_are_compared_from_pelvis_to_pelvis() -> None:
    vertices = np.random.default_rng(0).normal(size=(2, 100, 3))
    pelvis = vertices[:, 0]
    assert pve_mm(vertices + 3, vertices, pelvis + 3, pelvis) == pytest.approx([0, 0], abs=1e-9)
    moved = vertices.copy()
    moved[:, 50:, 1] -= 0.004
    assert pve_mm(moved, vertices, pelvis, pelvis) == pytest.approx([2, 2])


def test_acceleration_counts_second_differences_and_stops_at_gaps() -> None:
    truth = np.zeros((6, 2, 3))
    steady = truth + np.arange(6)[:, None, None] * 0.1
    assert acceleration_error_mm(steady, truth) == pytest.approx([0] * 4, abs=1e-9)
    jump = truth.copy()
    jump[2, :, 0] = 0.001
    assert acceleration_error_mm(jump, truth) == pytest.approx([1, 2, 1, 0])
    frames = np.array([0, 1, 2, 3, 7, 8])
    error = acceleration_error_mm(jump, truth, frames)
    assert error[:2] == pytest.approx([1, 2])
    assert np.isnan(error[2:]).all()
    assert len(acceleration_error_mm(truth[:2], truth[:2])) == 0


def test_pck_counts_strictly_smaller_distances_of_confident_keypoints() -> None:
    truth = np.zeros((2, 3, 2))
    predicted = truth.copy()
    predicted[0, :, 0] = [5, 9.9, 10]
    predicted[1, :, 1] = [30, 4, 0]
    confidence = np.array([[1, 1, 1], [1, 0.6, 0.5]])  # the last one does not count
    result = pck(pck_distances(predicted, truth, confidence, np.array([100, 200])))
    np.testing.assert_allclose(result.per_keypoint, [[0, 0.5, 0], [0.5, 1, 0]])
    np.testing.assert_allclose(result.mean, [1 / 6, 0.5])
    assert result.num_keypoints == 3


def test_a_keypoint_that_is_not_predicted_is_a_miss() -> None:
    truth = np.zeros((2, 2, 2))
    predicted = truth.copy()
    predicted[0, 0], predicted[1, 1, 0] = np.nan, np.inf
    confidence = np.array([[1, 1], [1, 0]])
    result = pck(pck_distances(predicted, truth, confidence, np.array([100, 100])))
    np.testing.assert_array_equal(result.per_keypoint, [[0.5, 1], [0.5, 1]])


def test_pck_without_a_single_keypoint_is_nan() -> None:
    nothing = pck(pck_distances(*[np.zeros((1, 2, 2))] * 2, np.zeros((1, 2)), np.ones(1)))
    assert np.isnan(nothing.mean).all()
    assert nothing.num_keypoints == 0
    with pytest.raises(ValueError, match="larger than 0 px"):
        pck_distances(*[np.zeros((1, 2, 2))] * 2, np.zeros((1, 2)), np.zeros(1))


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        mpjpe_mm(people(2), people(3))
    assert len(EVALUATION_KEYPOINTS) == 14

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fourdh_batch.geometry import (
    axis_angle_to_rotmat,
    crop_square,
    cxcywh_to_xyxy,
    expand_to_aspect,
    rot6d_to_rotmat,
    rotmat_to_axis_angle,
    xywh_to_xyxy,
    xyxy_to_cxcywh,
    xyxy_to_xywh,
)


def vectors(length: int, limit: float) -> Any:
    return arrays(np.float64, length, elements=st.floats(-limit, limit))


@st.composite
def boxes(draw: st.DrawFn) -> np.ndarray:
    """A box of a float32 detector, in quarter pixels so that sums of its numbers are exact."""
    x, y = (draw(st.integers(-2000, 8000)) / 4 for _ in range(2))
    w, h = (draw(st.integers(1, 8000)) / 4 for _ in range(2))
    return np.array([x, y, x + w, y + h], np.float32)


@given(vectors(6, 10))
def test_six_numbers_give_a_rotation(rot6d: np.ndarray) -> None:
    first, second = rot6d[:3], rot6d[3:]
    assume(np.linalg.norm(first) > 1e-3)
    assume(np.linalg.norm(np.cross(first, second)) > 1e-3 * np.linalg.norm(first))
    rotmat = rot6d_to_rotmat(torch.from_numpy(rot6d)).numpy()
    np.testing.assert_allclose(rotmat.T @ rotmat, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(rotmat), 1, atol=1e-9)


@given(vectors(3, 10))
def test_axis_angle_gives_a_rotation_that_gives_it_back(axis_angle: np.ndarray) -> None:
    rotmat = axis_angle_to_rotmat(axis_angle)
    np.testing.assert_allclose(rotmat.T @ rotmat, np.eye(3), atol=1e-9)
    found = rotmat_to_axis_angle(rotmat)
    assert np.linalg.norm(found) <= np.pi + 1e-9
    np.testing.assert_allclose(axis_angle_to_rotmat(found), rotmat, atol=1e-7)


@given(boxes())
def test_box_formats_round_trip(bbox_xyxy: np.ndarray) -> None:
    np.testing.assert_array_equal(cxcywh_to_xyxy(xyxy_to_cxcywh(bbox_xyxy)), bbox_xyxy)
    np.testing.assert_array_equal(xywh_to_xyxy(xyxy_to_xywh(bbox_xyxy)), bbox_xyxy)


@given(boxes())
def test_grown_box_has_the_aspect_and_holds_the_box(bbox_xyxy: np.ndarray) -> None:
    grown = expand_to_aspect(bbox_xyxy).astype(np.float64)
    width, height = grown[2:] - grown[:2]
    slack = 1e-6 * np.abs(grown).max()
    assert abs(width / 192 - height / 256) < slack
    assert (grown[:2] <= bbox_xyxy[:2] + slack).all()
    assert (grown[2:] >= bbox_xyxy[2:] - slack).all()
    center, size = crop_square(bbox_xyxy)
    np.testing.assert_allclose(center, (grown[:2] + grown[2:]) / 2, atol=slack)
    np.testing.assert_allclose(size, height, rtol=1e-6, atol=slack)

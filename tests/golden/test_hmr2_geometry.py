"""Rotations and cameras against the published code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fourdh_batch.geometry import (
    axis_angle_to_rotmat,
    crop_camera_translation,
    full_image_camera,
    full_image_focal,
    phalp_camera,
    project_to_canvas,
    project_to_crop,
    rot6d_to_rotmat,
)
from tests.conftest import DATA


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(DATA / "hmr2" / "geometry.npz")


def test_rot6d_to_rotmat_equals_the_published_one(golden: Any) -> None:
    got = rot6d_to_rotmat(torch.from_numpy(golden["rot6d_in"]))
    np.testing.assert_allclose(got.numpy(), golden["rot6d_out"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_axis_angle_to_rotmat_equals_the_published_one(golden: Any, dtype: Any) -> None:
    got = axis_angle_to_rotmat(golden["aa_in"].astype(dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, golden["aa_out"], rtol=0, atol=1e-6)


def test_crop_camera_equals_the_published_one(golden: Any) -> None:
    translation = crop_camera_translation(torch.from_numpy(golden["pred_cam"]))
    np.testing.assert_allclose(translation.numpy(), golden["crop_cam_t"], rtol=3e-7)
    projected = project_to_crop(torch.from_numpy(golden["joints44"]), translation)
    np.testing.assert_allclose(projected.numpy(), golden["crop_kp2d"], rtol=0, atol=1e-6)


def test_full_image_camera_equals_the_published_one_frame_by_frame(golden: Any) -> None:
    square = golden["pred_cam"], golden["box_center"], golden["box_size"]
    sizes = golden["img_size_wh"]
    np.testing.assert_array_equal(full_image_focal(sizes), golden["scaled_focal"])
    np.testing.assert_allclose(full_image_camera(*square, sizes), golden["full_cam_t"], rtol=3e-7)


def test_tracker_camera_equals_the_published_one(golden: Any) -> None:
    square = golden["pred_cam"], golden["box_center"], golden["box_size"]
    camera = phalp_camera(*square, golden["img_size_wh"])
    np.testing.assert_allclose(camera, golden["phalp_cam_t"], rtol=5e-7)
    with_origin = np.pad(golden["joints44"], ((0, 0), (0, 1), (0, 0)))
    np.testing.assert_allclose(
        project_to_canvas(with_origin, camera), golden["phalp_kp2d_canvas01"], rtol=0, atol=1e-6
    )

from __future__ import annotations

import numpy as np
import pytest
import torch

from fourdh_batch.geometry import (
    axis_angle_to_rotmat,
    crop_square,
    crop_to_image,
    expand_to_aspect,
    full_image_camera,
    full_image_focal,
    phalp_camera,
    project_full_image,
    project_to_canvas,
    rot6d_to_rotmat,
    rotmat_to_axis_angle,
    xyxy_to_cxcywh,
    xyxy_to_xywh,
)


def test_six_numbers_are_first_column_then_second() -> None:
    rotmat = rot6d_to_rotmat(torch.tensor([0.0, 2.0, 0.0, -3.0, 0.0, 0.0]))
    np.testing.assert_array_equal(rotmat, [[0, -1, 0], [1, 0, 0], [0, 0, 1]])


def test_three_rotations_at_once_are_no_special_case() -> None:
    # A cross product that guesses its axis takes the batch for it when there are three.
    rot6d = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    together = rot6d_to_rotmat(rot6d)
    np.testing.assert_array_equal(together, torch.stack([rot6d_to_rotmat(r) for r in rot6d]))


def test_zero_vector_is_the_identity_and_back() -> None:
    np.testing.assert_array_equal(axis_angle_to_rotmat(np.zeros(3)), np.eye(3))
    np.testing.assert_array_equal(rotmat_to_axis_angle(np.eye(3)), np.zeros(3))


@pytest.mark.parametrize("axis", np.eye(3))
def test_half_turns_keep_their_axis(axis: np.ndarray) -> None:
    found = rotmat_to_axis_angle(axis_angle_to_rotmat(np.pi * axis))
    np.testing.assert_allclose(np.abs(found), np.pi * axis, atol=1e-7)


def test_quarter_turn_about_z_takes_x_to_y() -> None:
    rotmat = axis_angle_to_rotmat([0, 0, np.pi / 2])
    np.testing.assert_allclose(rotmat @ [1, 0, 0], [0, 1, 0], atol=1e-7)


def test_box_formats() -> None:
    box = np.array([10.0, 20.0, 40.0, 80.0])
    np.testing.assert_array_equal(xyxy_to_cxcywh(box), [25, 50, 30, 60])
    np.testing.assert_array_equal(xyxy_to_xywh(box), [10, 20, 30, 60])


def test_boxes_grow_on_their_short_side_and_the_crop_is_the_long_one() -> None:
    wide, tall = [0, 0, 192, 100], [0, 0, 100, 512]
    np.testing.assert_array_equal(
        expand_to_aspect([wide, tall]), [[0, -78, 192, 178], [-142, 0, 242, 512]]
    )
    center, size = crop_square([wide, tall])
    np.testing.assert_array_equal(center, [[96, 50], [50, 256]])
    np.testing.assert_array_equal(size, [256, 512])
    assert center.dtype == size.dtype == np.float32


def test_no_boxes_are_no_special_case() -> None:
    center, size = crop_square(np.zeros((0, 4), np.float32))
    assert (center.shape, size.shape) == ((0, 2), (0,))
    camera = full_image_camera(np.zeros((0, 3), np.float32), center, size, (640, 480))
    assert camera.shape == (0, 3)


def test_all_cameras_put_the_model_origin_on_the_same_pixel() -> None:
    pred_cam = np.array([[0.9, 0.1, -0.2], [0.5, -0.3, 0.4]], np.float32)
    center, size = crop_square([[100, 50, 220, 400], [300, 20, 420, 220]])
    width, height = 640, 480
    # In the crop, s * (tx, ty) / 2 of its side away from its centre.
    in_crop = (pred_cam[:, :1] * pred_cam[:, 1:] / 2)[:, None]
    expected = crop_to_image(in_crop, center, size)[:, 0]
    origin = np.zeros((2, 1, 3), np.float32)

    camera = full_image_camera(pred_cam, center, size, (width, height))
    middle = (width / 2, height / 2)
    pixel = project_full_image(origin, camera, full_image_focal((width, height)), middle)
    np.testing.assert_allclose(pixel[:, 0], expected, atol=1e-3)

    canvas = project_to_canvas(origin, phalp_camera(pred_cam, center, size, (width, height)))
    padding = np.array([0, (width - height) // 2])
    np.testing.assert_allclose(canvas[:, 0] * width - padding, expected, atol=1e-3)


def test_frames_of_different_size_in_one_batch_keep_their_own_camera() -> None:
    pred_cam = np.array([[0.9, 0.1, -0.2]] * 2, np.float32)
    center, size = crop_square([[100, 50, 220, 400]] * 2)
    sizes = np.array([[640, 480], [1920, 1080]])
    both = full_image_camera(pred_cam, center, size, sizes)
    alone = [full_image_camera(pred_cam[:1], center[:1], size[:1], wh)[0] for wh in sizes]
    np.testing.assert_array_equal(both, alone)

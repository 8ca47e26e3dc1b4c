from __future__ import annotations

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch

from fourdh_batch.video.crops import MEAN_RGB, STD_RGB, crop_affine, crop_batch, crop_masks

TARGET = np.array([[128, 128], [128, 256], [256, 128]], np.float32)


def opencv_affine(center: np.ndarray, size: np.float32) -> np.ndarray:
    half = size * np.float32(0.5)
    steps = np.array([[0, 0], [0, half], [half, 0]], np.float32)
    return cv2.getAffineTransform(center + steps, TARGET)


def opencv_crop(image: np.ndarray, center: np.ndarray, size: np.float32) -> np.ndarray:
    return cv2.warpAffine(
        image,
        opencv_affine(center, size),
        (256, 256),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=0,
    )


def normalised(rgb: np.ndarray) -> np.ndarray:
    chw = np.moveaxis(rgb.astype(np.float64), -1, -3)
    return ((chw - MEAN_RGB[:, None, None]) / STD_RGB[:, None, None]).astype(np.float32)


def squares(num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Squares inside, beyond and larger than a frame of 160 x 120, half of them with centres and
    sides at which sampling positions fall on ties of the rounding."""
    center = rng.uniform(-40, 200, (num, 2)).astype(np.float32)
    size = rng.uniform(10, 700, num).astype(np.float32)
    center[::2] = np.round(center[::2] * 2048) / 2048
    size[::2] = 2.0 ** rng.integers(4, 10, len(size[::2]))
    return center, size


def test_affine_equals_opencv_bit_for_bit() -> None:
    center, size = squares(200, np.random.default_rng(0))
    found = crop_affine(torch.from_numpy(center), torch.from_numpy(size))
    for i in range(len(size)):
        forward = opencv_affine(center[i], size[i])
        np.testing.assert_array_equal(
            found[i], cv2.invertAffineTransform(forward), err_msg=f"{center[i]} {size[i]}"
        )


def test_crops_of_many_frames_equal_opencv_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (3, 120, 160, 3), dtype=np.uint8)
    center, size = squares(24, rng)
    row = rng.integers(0, 3, 24)
    found = crop_batch(*(torch.from_numpy(a) for a in (frames, row, center, size)))
    assert found.shape == (24, 3, 256, 256)
    assert found.dtype == torch.float32
    for i in range(24):
        expected = normalised(opencv_crop(frames[row[i]], center[i], size[i]))
        np.testing.assert_array_equal(found[i], expected, err_msg=f"{center[i]} {size[i]}")


def test_a_crop_does_not_depend_on_its_companions() -> None:
    rng = np.random.default_rng(2)
    frames = torch.from_numpy(rng.integers(0, 256, (2, 50, 40, 3), dtype=np.uint8))
    center, size = (torch.from_numpy(a) for a in squares(5, rng))
    row = torch.tensor([0, 1, 1, 0, 1])
    together = crop_batch(frames, row, center, size)
    for i in range(5):
        one = slice(i, i + 1)
        np.testing.assert_array_equal(
            crop_batch(frames, row[one], center[one], size[one])[0], together[i]
        )


def test_outside_the_frame_is_black_before_the_normalisation() -> None:
    frames = torch.full((1, 20, 20, 3), 255, dtype=torch.uint8)
    found = crop_batch(
        frames, torch.tensor([0]), torch.tensor([[500.0, 500.0]]), torch.tensor([40.0])
    )
    np.testing.assert_allclose(found[0, :, 0, 0], [-2.1179, -2.0357, -1.8044], atol=1e-4)
    assert (found == found[:, :, :1, :1]).all()


def test_places_far_beyond_any_frame_are_black_too() -> None:
    frames = torch.full((1, 20, 20, 3), 255, dtype=torch.uint8)
    far = torch.tensor([[1e7, -1e7]])
    found = crop_batch(frames, torch.tensor([0]), far, torch.tensor([40.0]))
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :, :1, :1], found.shape))


def test_demo_blur_equals_a_blur_of_the_whole_picture() -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    # Below the limit of 563.2 px, above it beyond two borders, above it inside of the picture.
    center = np.array([[200, 150], [30, 260], [390, 10]], np.float32)
    size = np.array([560, 900, 1500], np.float32)
    found = crop_batch(
        torch.from_numpy(image[None]),
        torch.zeros(3, dtype=torch.int64),
        torch.from_numpy(center),
        torch.from_numpy(size),
        antialias=True,
    )
    np.testing.assert_array_equal(found[0], normalised(opencv_crop(image, center[0], size[0])))
    for i in (1, 2):
        sigma = (size[i] / 512 - 1) / 2
        blurred = scipy.ndimage.gaussian_filter(
            image.astype(np.float64), (sigma, sigma, 0), mode="nearest"
        )
        expected = normalised(opencv_crop(blurred, center[i], size[i]))
        np.testing.assert_allclose(found[i], expected, rtol=0, atol=3e-7)


def test_blur_of_a_region_inside_a_large_picture_equals_a_blur_of_all_of_it() -> None:
    rng = np.random.default_rng(4)
    image = rng.integers(0, 256, (900, 900, 3), dtype=np.uint8)
    center, size = np.array([[450, 450]], np.float32), np.array([600], np.float32)
    found = crop_batch(
        torch.from_numpy(image[None]),
        torch.zeros(1, dtype=torch.int64),
        torch.from_numpy(center),
        torch.from_numpy(size),
        antialias=True,
    )
    sigma = (size[0] / 512 - 1) / 2
    blurred = scipy.ndimage.gaussian_filter(
        image.astype(np.float64), (sigma, sigma, 0), mode="nearest"
    )
    expected = normalised(opencv_crop(blurred, center[0], size[0]))
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=3e-7)


def test_mask_crops_equal_opencv_bit_for_bit() -> None:
    rng = np.random.default_rng(5)
    masks = (rng.random((2, 120, 160)) < 0.5).astype(np.uint8) * np.uint8(255)
    center, size = squares(6, rng)
    row = np.array([0, 1, 0, 1, 1, 0])
    found = crop_masks(*(torch.from_numpy(a) for a in (masks, row, center, size)))
    for i in range(6):
        np.testing.assert_array_equal(found[i], opencv_crop(masks[row[i]], center[i], size[i]))


def test_no_crops() -> None:
    frames = torch.zeros(0, 20, 20, 3, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    assert crop_batch(frames, none, torch.zeros(0, 2), torch.zeros(0)).shape == (0, 3, 256, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": torch.zeros(2, 8, 8, 3)}, "expected uint8 pictures with 3 channels"),
        ({"frames": torch.zeros(2, 8, 8, 4, dtype=torch.uint8)}, "expected uint8 pictures"),
        ({"frame_row": torch.tensor([2])}, "expected 0 to 1, got 2"),
        ({"frame_row": torch.tensor([-1])}, "expected 0 to 1, got -1"),
        ({"center": torch.zeros(2, 2)}, r"center \(1, 2\)"),
        ({"center": torch.tensor([[float("nan"), 0.0]])}, "finite"),
        ({"size": torch.tensor([0.0])}, "larger than the spacing"),
        ({"center": torch.tensor([[1e9, 0.0]])}, "larger than the spacing"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "frames": torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        "frame_row": torch.tensor([0]),
        "center": torch.zeros(1, 2),
        "size": torch.ones(1),
    }
    with pytest.raises(ValueError, match=message):
        crop_batch(**(arguments | change))

"""Crops against those of the published data set (OpenCV 4.14, scikit-image)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourdh_batch.geometry import crop_square, expand_to_aspect
from fourdh_batch.video.crops import MEAN_RGB, STD_RGB, crop_affine, crop_batch, crop_masks
from tests.conftest import DATA


def crop(image_bgr: np.ndarray, center: np.ndarray, size: np.ndarray, **how: bool) -> np.ndarray:
    frame = torch.from_numpy(np.ascontiguousarray(image_bgr[None, ..., ::-1]))
    row = torch.zeros(1, dtype=torch.int64)
    square = torch.from_numpy(center)[None], torch.from_numpy(np.atleast_1d(size))
    return crop_batch(frame, row, *square, **how)[0].numpy()


def check_case(case: Any, image_bgr: np.ndarray) -> None:
    center, size = crop_square(case["box_xyxy"])
    np.testing.assert_array_equal(center, case["box_center"])
    np.testing.assert_array_equal(size, case["box_size"])
    plain = case.get("crop_noblur", case["crop"])
    np.testing.assert_array_equal(crop(image_bgr, center, size), plain)
    # The blur is summed in another order; everything else is the same to the last bit.
    blurred = crop(image_bgr, center, size, antialias=True)
    np.testing.assert_allclose(blurred, case["crop"], rtol=0, atol=3e-7)


def test_crop_of_noise_equals_the_published_one() -> None:
    case = dict(np.load(DATA / "hmr2" / "crop_noise.npz"))
    check_case(case, case["image_bgr"])


@pytest.mark.shared
@pytest.mark.parametrize("number", range(6))
def test_crops_equal_the_published_ones(shared: Path, number: int) -> None:
    golden = np.load(shared / "parity" / "hmr2" / "golden_preprocess.npz")
    prefix = f"case{number}_"
    case = {k.removeprefix(prefix): golden[k] for k in golden.files if k.startswith(prefix)}
    check_case(case, golden[f"image_{case['image']}"])


def test_affine_is_the_inverse_of_the_published_one() -> None:
    case = np.load(DATA / "hmr2" / "crop_noise.npz")
    center = torch.from_numpy(case["box_center"])[None]
    inverse = crop_affine(center, torch.from_numpy(np.atleast_1d(case["box_size"])))[0]
    product = np.vstack([case["affine"], [0, 0, 1]]) @ np.vstack([inverse, [0, 0, 1]])
    np.testing.assert_allclose(product, np.eye(3), atol=1e-12)


@pytest.mark.shared
def test_crops_and_masks_equal_those_of_the_published_tracker(shared: Path) -> None:
    golden = np.load(shared / "parity" / "phalp" / "features.npz")
    boxes, num = golden["boxes_xyxy"], int(golden["n_selected"])
    np.testing.assert_array_equal(expand_to_aspect(boxes), golden["padded_xyxy"])
    center, size = (torch.from_numpy(part[:num]) for part in crop_square(boxes))
    frame = torch.from_numpy(np.ascontiguousarray(golden["image_bgr"][None, ..., ::-1]))
    rows = torch.zeros(num, dtype=torch.int64)
    crops = crop_batch(frame, rows, center, size).numpy()
    pixels = np.rint(crops * STD_RGB[:, None, None] + MEAN_RGB[:, None, None])
    # The tracker forms its squares by another order of float32 sums, which moves a few
    # sampling positions by 1/32 px.
    difference = np.abs(pixels - golden["crop_rgb_uint8"])
    assert np.mean(difference <= 1) >= 0.995
    width = golden["image_bgr"].shape[1]
    masks = np.unpackbits(golden["seg_masks"][:num], axis=-1)[..., :width] * np.uint8(255)
    mask_crops = crop_masks(torch.from_numpy(masks), torch.arange(num), center, size).numpy()
    assert np.mean(np.abs(mask_crops - golden["crop_mask"]) <= 8) >= 0.995

"""Run-length masks against strings that pycocotools 2.0.11 wrote, and their refusals."""

from __future__ import annotations

import numpy as np
import pytest

from fourdh_batch.masks import box_mask, decode_rle, encode_rle, run_lengths
from fourdh_batch.types import Bool, RleMask


def ellipse() -> Bool:
    y, x = np.mgrid[:48, :64]
    return np.asarray(((y - 20) / 15) ** 2 + ((x - 40) / 9) ** 2 < 1)


def rectangle() -> Bool:
    mask = np.zeros((6, 5), dtype=np.bool_)
    mask[1:4, 1:3] = True
    return mask


def full_hd_corners() -> Bool:
    mask = np.zeros((1080, 1920), dtype=np.bool_)
    mask[0, 0] = True
    mask[500:, 1900:] = True
    return mask


# pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
PYCOCOTOOLS = {
    "empty": (np.zeros((3, 4), dtype=np.bool_), b"<"),
    "full": (np.ones((3, 4), dtype=np.bool_), b"0<"),
    "rectangle": (rectangle(), b"7330;"),
    "chessboard": (np.indices((5, 7)).sum(axis=0) % 2 == 1, b"111" + b"0" * 32),
    "ellipse": (ellipse(), b"^`1=P16K4M2N2N2O000000000001N2N2N3L5JUf0"),
    "full_hd": (full_hd_corners(), b"01c\\dn1Sb0QS\\QN" + b"0" * 37),
}


@pytest.mark.parametrize("name", PYCOCOTOOLS)
def test_strings_equal_those_of_pycocotools(name: str) -> None:
    mask, counts = PYCOCOTOOLS[name]
    assert encode_rle(mask[None]) == [RleMask(size_hw=mask.shape, counts=counts)]
    np.testing.assert_array_equal(decode_rle(RleMask(mask.shape, counts)), mask)


def test_masks_of_one_call_do_not_mix() -> None:
    masks = np.stack([np.zeros((6, 5), np.bool_), rectangle(), ~rectangle(), rectangle()])
    rles = encode_rle(masks)
    assert [rle.counts for rle in rles] == [encode_rle(mask[None])[0].counts for mask in masks]
    assert rles[1].counts == b"7330;"


def test_no_masks_and_masks_without_pixels() -> None:
    assert encode_rle(np.zeros((0, 4, 4), dtype=np.bool_)) == []
    (rle,) = encode_rle(np.zeros((1, 0, 4), dtype=np.bool_))
    assert decode_rle(rle).shape == (0, 4)


def test_runs_are_counted_down_the_columns_starting_with_zeros() -> None:
    (rle,) = encode_rle(rectangle()[None])
    assert run_lengths(rle).tolist() == [7, 3, 3, 3, 14]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (b"", "characters"),
        (b"7330;\xff", "characters"),
        (b"7330 ", "characters"),
        (b"733P", "cut off"),
        (b"7330", "sum"),
        (b"7330<", "sum"),
        (b"7330;ON", "smallest"),
        (b"PPPPPPPP0", "at most 7"),
    ],
)
def test_a_damaged_string_is_refused(counts: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_rle(RleMask((6, 5), counts))


def test_masks_that_are_not_bool_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected bool \(N, H, W\), got uint8"):
        encode_rle(np.zeros((1, 4, 4), dtype=np.uint8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got bool \(4, 4\)"):
        encode_rle(np.zeros((4, 4), dtype=np.bool_))


def test_a_box_covers_its_area_and_is_cut_at_the_frame() -> None:
    boxes = np.array([[1, 2, 4, 7], [-5, -5, 2, 3], [8, 8, 8, 9]], dtype=np.float32)
    masks = box_mask(boxes, (10, 9))
    assert masks.shape == (3, 10, 9)
    assert masks.sum(axis=(1, 2)).tolist() == [15, 6, 0]
    assert masks[0, 2:7, 1:4].all()
    np.testing.assert_array_equal(box_mask(boxes[0], (10, 9)), masks[0])

"""Binary masks of whole frames as COCO run lengths.

Run lengths go down the columns and the first one counts zeros. COCO's compressed string writes
each number (from the fourth on: its difference to the one two places before) in groups of five
bits, least significant first, bit 5 set while more groups follow, plus 48 to be printable; the
highest bit of the last group is the sign. Bit-equal to `pycocotools.mask.encode`.

Dimension letters: `N` masks, `H`, `W` frame size.
"""

from __future__ import annotations

import numpy as np

from fourdh_batch.types import F32, I64, Bool, RleMask

GROUP_BITS = 5
MORE_GROUPS = 0x20
SIGN_BIT = 0x10
ASCII_OFFSET = 48
MAX_GROUPS = 7  # 35 bits; COCO's numbers are 32-bit


def encode_rle(masks: Bool) -> list[RleMask]:
    """Compress masks.

    Args:
        masks: (N, H, W) bool.

    Raises:
        ValueError: not three dimensions, or not bool.
    """
    if masks.ndim != 3 or masks.dtype != np.bool_:
        raise ValueError(f"masks: expected bool (N, H, W), got {masks.dtype} {masks.shape}")
    n, height, width = masks.shape
    pixels = height * width
    flat = masks.transpose(0, 2, 1).reshape(n, pixels)  # down the columns
    changes = np.empty((n, pixels), dtype=np.bool_)
    changes[:, :1] = flat[:, :1]  # the first run counts zeros, so a leading one is a change
    np.not_equal(flat[:, 1:], flat[:, :-1], out=changes[:, 1:])
    mask_row, starts = np.divmod(np.flatnonzero(changes), max(pixels, 1))

    # Positions 0, changes..., H * W of every mask one after another; runs are their differences.
    num_runs = np.bincount(mask_row, minlength=n) + 1
    first = np.cumsum(num_runs) - num_runs  # of each mask among all runs
    ends = np.full(int(num_runs.sum()), pixels, dtype=np.int64)
    is_last = np.zeros(len(ends), dtype=np.bool_)
    is_last[first + num_runs - 1] = True
    ends[~is_last] = starts
    runs = np.diff(ends, prepend=0)
    runs[first] = ends[first]

    index_in_mask = np.arange(len(runs)) - np.repeat(first, num_runs)
    numbers = runs.copy()
    later = np.flatnonzero(index_in_mask > 2)
    numbers[later] -= runs[later - 2]
    text, groups = _to_text(numbers)
    bounds = np.concatenate([[0], np.cumsum(groups)])
    begin, end = bounds[first], bounds[first + num_runs]
    return [
        RleMask(size_hw=(height, width), counts=text[b:e])
        for b, e in zip(begin.tolist(), end.tolist(), strict=True)
    ]


def decode_rle(mask: RleMask) -> Bool:
    """The (H, W) mask behind a run-length string.

    Raises:
        ValueError: see `run_lengths`.
    """
    height, width = mask.size_hw
    runs = run_lengths(mask)
    values = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def run_lengths(mask: RleMask) -> I64:
    """Lengths of the runs, zeros first, summing to H * W.

    Raises:
        ValueError: the string is cut off, has characters that COCO never writes, or its runs do
            not add up to the size.
    """
    height, width = mask.size_hw
    runs = _numbers(mask.counts)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if np.any(runs < 0) or int(runs.sum()) != height * width:
        raise ValueError(
            f"run lengths: expected non-negative with sum {height} * {width} = {height * width}, "
            f"got sum {int(runs.sum())}, smallest {int(runs.min(initial=0))}"
        )
    return runs


def box_mask(bbox_xyxy_px: F32, size_hw: tuple[int, int]) -> Bool:
    """Masks that are set inside boxes: what stands for a mask where a detector gives none.

    A pixel is inside where its centre `c` fulfils `left <= c < right`, so that a box with integer
    corners covers exactly its area.

    Args:
        bbox_xyxy_px: (..., 4) corners in the full frame; may reach beyond it.
        size_hw: (H, W) of the frame.

    Returns:
        (..., H, W) bool.
    """
    height, width = size_hw
    box = np.asarray(bbox_xyxy_px)[..., None]
    x, y = np.arange(width), np.arange(height)
    in_x = (box[..., 0, :] <= x) & (x < box[..., 2, :])
    in_y = (box[..., 1, :] <= y) & (y < box[..., 3, :])
    return np.asarray(in_y[..., :, None] & in_x[..., None, :])


def _to_text(numbers: I64) -> tuple[bytes, I64]:
    """COCO's characters of signed numbers, and how many each number takes."""
    group_index = np.arange(MAX_GROUPS)
    rest = numbers[:, None] >> (GROUP_BITS * group_index)  # (K, 7) what is left before each group
    # The group after which only copies of the sign follow is the last one.
    is_final = (rest >= -SIGN_BIT) & (rest < SIGN_BIT)
    groups = np.argmax(is_final, axis=1) + 1
    used = group_index < groups[:, None]
    more = group_index < groups[:, None] - 1
    codes = (rest & (MORE_GROUPS - 1)) + MORE_GROUPS * more + ASCII_OFFSET
    return codes[used].astype(np.uint8).tobytes(), groups


def _numbers(text: bytes) -> I64:
    """The signed numbers behind COCO's characters."""
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - ASCII_OFFSET
    if len(codes) == 0 or codes.min() < 0 or codes.max() >= 2 * MORE_GROUPS:
        raise ValueError(f"run-length string: expected characters '0' to 'o', got {text[:40]!r}")
    is_last = (codes & MORE_GROUPS) == 0
    if not is_last[-1]:
        raise ValueError(f"run-length string is cut off: ends with {text[-10:]!r}")
    last = np.flatnonzero(is_last)
    first = np.concatenate([[0], last[:-1] + 1])
    groups = last - first + 1
    if groups.max() > MAX_GROUPS:
        raise ValueError(
            f"run-length string: expected at most {MAX_GROUPS} characters per number, "
            f"got {groups.max()}"
        )
    index = np.arange(len(codes)) - np.repeat(first, groups)
    parts = (codes & (MORE_GROUPS - 1)) << (GROUP_BITS * index)
    numbers = np.add.reduceat(parts, first)
    negative = (codes[last] & SIGN_BIT) != 0
    return numbers - np.where(negative, np.int64(1) << (GROUP_BITS * groups), 0)

"""Encoding is lossless, and every string has one mask and one string back."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fourdh_batch.masks import decode_rle, encode_rle, run_lengths
from fourdh_batch.types import RleMask


@given(
    size=st.tuples(st.integers(0, 4), st.integers(1, 40), st.integers(1, 40)),
    fill=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_what_is_encoded_is_decoded(size: tuple[int, int, int], fill: float, seed: int) -> None:
    masks = np.random.default_rng(seed).random(size) < fill
    rles = encode_rle(masks)
    assert len(rles) == len(masks)
    for mask, rle in zip(masks, rles, strict=True):
        np.testing.assert_array_equal(decode_rle(rle), mask)
        assert run_lengths(rle)[1::2].sum() == mask.sum()


@given(
    runs=st.lists(st.integers(1, 3_000), min_size=1, max_size=30),
    leading=st.booleans(),
    height=st.integers(1, 50),
)
def test_long_runs_survive(runs: list[int], leading: bool, height: int) -> None:
    """Runs of any length, placed on a picture that is as wide as it must be."""
    flat = np.repeat(np.arange(len(runs)) % 2 == int(leading), runs)
    width = -(-len(flat) // height)
    flat = np.pad(flat, (0, width * height - len(flat)))
    mask = flat.reshape(width, height).T
    (rle,) = encode_rle(mask[None])
    np.testing.assert_array_equal(decode_rle(rle), mask)


@given(st.binary(max_size=40))
def test_any_bytes_decode_to_the_right_size_or_are_refused(counts: bytes) -> None:
    rle = RleMask((7, 5), counts)
    try:
        mask = decode_rle(rle)
    except ValueError:
        return
    assert mask.shape == (7, 5)
    np.testing.assert_array_equal(decode_rle(encode_rle(mask[None])[0]), mask)

"""Texture maps for tests: recorded ones of 16 x 16 cells, and random ones like those of people."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.types import F32, U8, Bool

SIDE = 256
CELL = 16


def uv_maps(rgb_q: NDArray[np.int8], mask: Bool) -> F32:
    """(B, 4, 256, 256) uv vectors of (B, 3, 16, 16) RGB in 1/256 and (B, 16, 16) masks."""
    rgb = rgb_q.astype(np.float32) / 256 * mask[:, None]
    cells = np.concatenate([rgb, np.where(mask, 1, -1)[:, None]], 1, dtype=np.float32)
    return cells.repeat(CELL, axis=2).repeat(CELL, axis=3)


def random_maps(num: int, seed: int, *, share: float = 0.35) -> U8:
    """(B, 4, 256, 256) uint8 maps of people in clothes of a few colours, partly seen."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(20, 236, (num, 3, 8, 8)).repeat(32, axis=2).repeat(32, axis=3)
    noise = rng.normal(0, 12, (num, 3, SIDE, SIDE))
    mask = rng.random((num, CELL, CELL)) < share
    mask = mask.repeat(CELL, axis=1).repeat(CELL, axis=2)
    mask &= rng.random((num, SIDE, SIDE)) < 0.95  # speckle, as the sampler makes it
    rgb = np.clip(colour + noise, 0, 255).astype(np.uint8) * mask[:, None]
    return np.concatenate([rgb, mask[:, None].astype(np.uint8) * 255], axis=1)

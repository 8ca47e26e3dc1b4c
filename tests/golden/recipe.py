"""Pseudo-random weights that anyone can make again from a seed, a name and a shape.

The golden numbers of HMR 2.0 were computed with the published code and these weights. Every
tensor has its own generator, seeded by the CRC-32 of its name, and is uniform in bounds that
follow from its name and shape.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Not random: the mean that the read-outs are added to.
MEANS = {
    "smpl_head.init_body_pose": "mean_pose",
    "smpl_head.init_betas": "mean_shape",
    "smpl_head.init_cam": "mean_cam",
}
# Multiplied by 2^-7 for the epsilon probe: activations so small that a wrong epsilon shows.
PROBE_FACTOR = 2.0**-7
PROBE_KEYS = (
    "backbone.patch_embed.proj.weight",
    "backbone.patch_embed.proj.bias",
    "backbone.pos_embed",
    "smpl_head.transformer.to_token_embedding.weight",
    "smpl_head.transformer.to_token_embedding.bias",
    "smpl_head.transformer.pos_embedding",
)


def bounds(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    tail = ".".join(key.split(".")[-2:])
    if key.endswith(("pos_embed", "pos_embedding")):
        return -0.5, 0.5
    if len(shape) >= 2:
        gains = {"decpose.weight": 0.3, "decshape.weight": 0.3, "deccam.weight": 0.05}
        gain = {**gains, "to_q.weight": 2.0}.get(tail, 1.0)
        limit = gain * np.sqrt(3 / np.prod(shape[1:]))
        return -limit, limit
    if "norm" in tail.split(".")[0] and tail.endswith(".weight"):
        return 0.8, 1.2
    limit = 0.05 if tail == "deccam.bias" else 0.1
    return -limit, limit


def fill(seed: int, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}:{key}".encode())))
    low, high = bounds(key, shape)
    uniform = generator.random(int(np.prod(shape)))
    return (low + (high - low) * uniform).astype(np.float32).reshape(shape)


def weights(
    shapes: Mapping[str, Iterable[int]], means: Mapping[str, NDArray[np.float32]], *, seed: int = 0
) -> dict[str, Tensor]:
    """All tensors of these names and shapes.

    Args:
        means: `mean_pose` (144,), `mean_shape` (10,), `mean_cam` (3,).
    """
    return {
        key: torch.from_numpy(
            means[MEANS[key]][None] if key in MEANS else fill(seed, key, tuple(shape))
        )
        for key, shape in shapes.items()
    }


def probed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the epsilon probe."""
    return {k: w * PROBE_FACTOR if k in PROBE_KEYS else w for k, w in weights.items()}


def digest(weights: Mapping[str, Tensor]) -> int:
    """CRC-32 over all tensors in the order of their names, the means left out."""
    crc = 0
    for key in sorted(weights):
        if key not in MEANS:
            crc = zlib.crc32(weights[key].numpy().tobytes(), crc)
    return crc

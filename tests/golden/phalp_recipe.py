"""Pseudo-random weights of the tracker's networks, made again from a seed, a name and a shape.

The golden numbers of PHALP' were computed with these weights, by the published code. As in
`recipe.py` every tensor has its own generator, seeded by the CRC-32 of its name; the bounds differ
on purpose: they put pose and texture distances where the cost of the tracker is sensitive.

Source: docs/PHALP.md, section 16.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_JOINTS = 24
IDENTITY_ROT6D = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

# The two sizes of the goldens; what is not said here is the same in both.
SMALL = {"width": 128, "depth": 2, "num_heads": 4, "head_dim": 32, "mlp_dim": 256}
WIDE = {"width": 256, "depth": 6, "num_heads": 8, "head_dim": 64, "mlp_dim": 512}
MID_DIM, FRAME_LENGTH, CONV_STRIDE, CONV_PAD, NUM_ACTIONS = 229, 125, 5, 1, 60
SMALL_SEED, WIDE_SEED = 1, 2
SMALL_DIGEST, WIDE_DIGEST = 3687408311, 3469816977  # over the texture encoder, too

GAINS = {"decpose.weight": 0.045, "decshape.weight": 0.03, "deccam.weight": 0.05} | {
    f"{name}.weight": 2.0 for name in ("conv1x", "conv2", "conv3", "conv4", "conv5", "conv5_1")
}
BIAS_LIMITS = {"deccam.bias": 0.05, "decpose.bias": 0.01, "decshape.bias": 0.01}

# The convolutions of the texture encoder: output and input channels.
ENCODER_CHANNELS = {
    "conv1x": (16, 4),
    "conv2": (64, 16),
    "conv3": (128, 64),
    "conv4": (256, 128),
    "conv5": (256, 256),
    "conv5_1": (16, 256),
}
TEXTURE_ENCODER_SHAPES: dict[str, tuple[int, ...]] = {
    f"encoding_head.{name}.{part}": shape
    for name, (out, into) in ENCODER_CHANNELS.items()
    for part, shape in {"weight": (out, into, 3, 3), "bias": (out,)}.items()
}


def bounds(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    tail = ".".join(key.split(".")[-2:])
    if key.endswith(("init_betas", "init_cam")):
        return -0.5, 0.5
    if key in ("mask_token", "class_token") or key.startswith("pos_embedding"):
        return -0.5, 0.5
    if len(shape) >= 2:
        limit = GAINS.get(tail, 1.0) * np.sqrt(3 / np.prod(shape[1:]))
        return -limit, limit
    if "norm" in tail.split(".")[0] and tail.endswith(".weight"):
        return 0.8, 1.2
    limit = BIAS_LIMITS.get(tail, 0.1)
    return -limit, limit


def fill(seed: int, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}:{key}".encode())))
    uniform = generator.random(int(np.prod(shape)))
    if key.endswith("init_body_pose"):
        mean = np.array(IDENTITY_ROT6D * NUM_JOINTS)
        low, high = mean - 0.3, mean + 0.3
        return (low + (high - low) * uniform).astype(np.float32).reshape(shape)
    low, high = bounds(key, shape)
    return (low + (high - low) * uniform).astype(np.float32).reshape(shape)


def weights(shapes: Mapping[str, Iterable[int]], seed: int) -> dict[str, Tensor]:
    """All tensors of these names and shapes."""
    return {key: torch.from_numpy(fill(seed, key, tuple(shape))) for key, shape in shapes.items()}


def digest(weights: Mapping[str, Tensor]) -> int:
    """CRC-32 over all tensors in the order of their names."""
    crc = 0
    for key in sorted(weights):
        crc = zlib.crc32(weights[key].numpy().tobytes(), crc)
    return crc

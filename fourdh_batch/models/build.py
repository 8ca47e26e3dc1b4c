"""Every size of HMR 2.0, and the way of its weights from a file into the network."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fourdh_batch.errors import CheckpointError
from fourdh_batch.models.checkpoint import (
    fitting_tensors,
    read_lightning_state_dict,
    read_safetensors,
    read_safetensors_metadata,
    tensors_digest,
    write_safetensors,
)
from fourdh_batch.models.hmr2 import Hmr2
from fourdh_batch.models.minis import HMR2, shipped
from fourdh_batch.models.smpl_head import SmplHead
from fourdh_batch.models.vit import ViT
from fourdh_batch.types import F32, NUM_BODY_JOINTS

logger = logging.getLogger(__name__)

ORIGINS = ("official", "imported", "trained", "untrained")
PARTS = ("backbone.", "smpl_head.")  # of a published checkpoint; the rest is for training only


@dataclass(frozen=True, slots=True)
class Hmr2Size:
    """Widths and depths of one size.

    Attributes:
        vit_depth, vit_dim, vit_heads: the backbone.
        head_depth, head_dim, head_heads, head_head_dim, head_mlp_dim: the decoder.
        shrink: the backbone sees crops so many times smaller.
        stem: see `vit.ViT`.
    """

    vit_depth: int
    vit_dim: int
    vit_heads: int
    head_depth: int
    head_dim: int
    head_heads: int
    head_head_dim: int
    head_mlp_dim: int
    shrink: int = 1
    stem: tuple[tuple[int, int], ...] = ()


MINI_STEM = ((24, 2), (48, 2), (96, 1), (128, 2), (128, 1), (192, 2), (192, 1))
HMR2_SIZES = {
    # The published model: 670 M parameters, 251 GFLOP per crop.
    "vit_h": Hmr2Size(32, 1280, 16, 6, 1024, 8, 64, 1024),
    # For CPUs: sees crops as 128 x 96.
    "mini": Hmr2Size(4, 192, 4, 2, 256, 4, 32, 256, shrink=2, stem=MINI_STEM),
    # 0.3 M parameters: for tests.
    "tiny": Hmr2Size(2, 64, 4, 2, 96, 2, 24, 80),
}

# The mean of untrained weights: a body in rest pose, turned by pi about x so that it stands
# upright in camera axes (y down), at a scale at which 1.75 m fill 79 % of the crop's height.
UPRIGHT_ROT6D = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
IDENTITY_ROT6D = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
UPRIGHT_CAM = (0.9, 0.0, 0.0)
UNTRAINED_READOUT_GAIN = 0.01  # of decpose, decshape, deccam: every answer is near the mean


def build_hmr2(
    size: str,
    body: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    origin: str,
    device: str | torch.device = "auto",
    precision: str = "auto",
    compile_blocks: bool = False,
    source: str = "weights",
    expected_digest: str | None = None,
) -> Hmr2:
    """The network of one size with these weights, in evaluation mode.

    Args:
        size: key of `HMR2_SIZES`.
        body: see `Hmr2`; moved to the device.
        weights: `backbone.*` and `smpl_head.*` of exactly this size; other names are ignored.
        origin: one of `ORIGINS`.
        device: ``auto`` is the GPU where there is one.
        precision, compile_blocks: see `Hmr2`.
        source: what error messages call the weights.
        expected_digest: what the weights' digest must be.

    Raises:
        CheckpointError: a name is missing or too many, a shape or the digest differs.
        ValueError: there is no such size, origin or precision.
    """
    if origin not in ORIGINS:
        raise ValueError(f"origin: expected one of {ORIGINS}, got {origin!r}")
    fitting = _fitting_weights(weights, size, source)
    digest = _digest(fitting, expected_digest, source)
    with torch.device("meta"):
        backbone, head = _parts(_size(size))
    model = Hmr2(
        backbone,
        head,
        body,
        size_name=size,
        weights_origin=origin,
        weights_digest=digest,
        precision=precision,
        compile_blocks=compile_blocks,
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for prefix, part in zip(PARTS, (backbone, head), strict=True):
        part.load_state_dict(
            {
                name.removeprefix(prefix): tensor.to(device, copy=True)
                for name, tensor in fitting.items()
                if name.startswith(prefix)
            },
            assign=True,
        )
    return model.to(device).eval()


def load_hmr2(
    checkpoint: str | Path,
    body: nn.Module,
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
    size: str | None = None,
    compile_blocks: bool = False,
) -> Hmr2:
    """HMR 2.0 from a file.

    Args:
        checkpoint: a published PyTorch-Lightning ``.ckpt``, or ``.safetensors`` of
            `convert_official_checkpoint` or `save_hmr2`; the word ``mini`` for the small model
            that comes with the package.
        body, device, precision, compile_blocks: see `build_hmr2`.
        size: key of `HMR2_SIZES`; None: the one that fits best.

    Returns:
        The model; its `weights_origin` is what the file says, ``imported`` where it says nothing.

    Raises:
        CheckpointError: the file is missing, damaged, refers to code, or does not fit the size;
            the message lists what was expected and what came.
    """
    weights, metadata = _read(shipped(checkpoint, HMR2))
    if size is None:
        size = metadata.get("size") or _closest_size(weights)
    model = build_hmr2(
        size,
        body,
        weights,
        origin=metadata.get("origin", "imported"),
        device=device,
        precision=precision,
        compile_blocks=compile_blocks,
        source=str(checkpoint),
        expected_digest=metadata.get("digest"),
    )
    logger.info(
        "%s: %s weights, size %s, digest %s, %s on %s",
        checkpoint,
        model.weights_origin,
        size,
        model.weights_digest[:16],
        model.active_precision,
        device,
    )
    return model


def save_hmr2(model: Hmr2, path: str | Path, *, origin: str = "trained") -> None:
    """Write the weights of a model as safetensors, without the body."""
    weights = {name: t for name, t in model.state_dict().items() if name.startswith(PARTS)}
    _write(path, weights, model.size_name, origin)


def convert_official_checkpoint(
    src: str | Path, dst: str | Path, *, origin: str = "official"
) -> str:
    """Turn a published checkpoint into safetensors, once, so that no pickle is read again.

    Args:
        src: the PyTorch-Lightning ``.ckpt``.
        dst: the ``.safetensors`` to write.
        origin: ``official`` for the file of the authors, else ``imported``; nothing in the file
            tells them apart.

    Returns:
        The digest of the weights.

    Raises:
        CheckpointError: as `load_hmr2`.
    """
    weights = read_lightning_state_dict(src)
    size = _closest_size(weights)
    return _write(dst, _fitting_weights(weights, size, str(src)), size, origin)


def weights_origin(path: str | Path) -> str:
    """Where the weights of a file come from, as the model will say; reads the header only.

    Raises:
        CheckpointError: as `load_hmr2`.
    """
    path = shipped(path, HMR2)
    if path.suffix != ".safetensors":
        return "imported"
    return read_safetensors_metadata(path).get("origin", "imported")


def check_checkpoint(path: str | Path) -> str:
    """One line about a file of weights that fits: size, origin, tensors, parameters, digest.

    Raises:
        CheckpointError: as `load_hmr2`.
    """
    weights, metadata = _read(shipped(path, HMR2))
    size = metadata.get("size") or _closest_size(weights)
    fitting = _fitting_weights(weights, size, str(path))
    digest = _digest(fitting, metadata.get("digest"), str(path))
    num_parameters = sum(tensor.numel() for tensor in fitting.values())
    return (
        f"{path}: HMR 2.0 size {size}, {metadata.get('origin', 'imported')} weights, "
        f"{len(fitting)} tensors, {num_parameters:,} numbers, digest {digest}"
    )


def untrained_hmr2(
    size: str,
    body: nn.Module,
    seed: int = 0,
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
) -> Hmr2:
    """A model with seeded random weights that answers with nearly the same standing body.

    Its `weights_origin` is ``untrained``. The weights depend on the seed, the names and the
    shapes only, on any machine.

    Args:
        size: key of `HMR2_SIZES`.
        body, device, precision: see `build_hmr2`.
        seed: of the weights.
    """
    weights = {
        name: torch.from_numpy(_untrained(seed, name, tuple(shape)))
        for name, shape in expected_shapes(size).items()
    }
    return build_hmr2(size, body, weights, origin="untrained", device=device, precision=precision)


@cache
def expected_shapes(size: str) -> dict[str, torch.Size]:
    """Names and shapes of all weights of one size: 503 for the published one."""
    with torch.device("meta"):
        parts = _parts(_size(size))
    return {
        prefix + name: tensor.shape
        for prefix, part in zip(PARTS, parts, strict=True)
        for name, tensor in part.state_dict().items()
    }


def _size(name: str) -> Hmr2Size:
    if name not in HMR2_SIZES:
        raise ValueError(f"size: expected one of {list(HMR2_SIZES)}, got {name!r}")
    return HMR2_SIZES[name]


def _parts(size: Hmr2Size) -> tuple[ViT, SmplHead]:
    backbone = ViT(
        depth=size.vit_depth,
        dim=size.vit_dim,
        num_heads=size.vit_heads,
        shrink=size.shrink,
        stem=size.stem,
    )
    head = SmplHead(
        dim=size.head_dim,
        depth=size.head_depth,
        num_heads=size.head_heads,
        head_dim=size.head_head_dim,
        mlp_dim=size.head_mlp_dim,
        context_dim=size.vit_dim,
    )
    return backbone, head


def _closest_size(weights: Mapping[str, Tensor]) -> str:
    """The size of which most tensors are there with the right shape."""

    def num_fitting(size: str) -> int:
        shapes = expected_shapes(size)
        return sum(name in weights and weights[name].shape == s for name, s in shapes.items())

    return max(HMR2_SIZES, key=num_fitting)


def _fitting_weights(weights: Mapping[str, Tensor], size: str, source: str) -> dict[str, Tensor]:
    """The weights of both parts as float32, after an exact comparison of names and shapes."""
    _size(size)
    expected = expected_shapes(size)
    found = {name: tensor for name, tensor in weights.items() if name.startswith(PARTS)}
    what = f"HMR 2.0 size {size!r}"
    return fitting_tensors(found, expected, what=what, source=source)


def _digest(weights: Mapping[str, Tensor], expected: str | None, source: str) -> str:
    digest = tensors_digest(weights)
    if expected not in (None, digest):
        raise CheckpointError(
            f"{source}: expected weights of digest {expected}, got {digest}; "
            "the file is damaged, make or fetch it again"
        )
    return digest


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix != ".safetensors":
        return read_lightning_state_dict(path), {}
    weights, metadata = read_safetensors(path)
    if metadata.get("size", "mini") not in HMR2_SIZES or metadata.get("origin", "") not in (
        "",
        *ORIGINS,
    ):
        raise CheckpointError(
            f"{path}: expected a size of {list(HMR2_SIZES)} and an origin of {ORIGINS}, "
            f"got {metadata}; written by a newer version?"
        )
    return weights, metadata


def _write(path: str | Path, weights: dict[str, Tensor], size: str, origin: str) -> str:
    if origin not in ORIGINS:
        raise ValueError(f"origin: expected one of {ORIGINS}, got {origin!r}")
    digest = tensors_digest(weights)
    write_safetensors(path, weights, {"size": size, "origin": origin, "digest": digest})
    return digest


def _untrained(seed: int, name: str, shape: tuple[int, ...]) -> F32:
    """Weights by name: residual branches of unit gain, norms of one, read-outs near zero."""
    if name == "smpl_head.init_body_pose":
        return np.array([[*UPRIGHT_ROT6D, *(IDENTITY_ROT6D * NUM_BODY_JOINTS)]], dtype=np.float32)
    if name == "smpl_head.init_cam":
        return np.array([UPRIGHT_CAM], dtype=np.float32)
    if name == "smpl_head.init_betas" or name.endswith(".bias"):
        return np.zeros(shape, dtype=np.float32)
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}:{name}".encode())))
    limit = np.sqrt(3 / np.prod(shape[1:]))
    if name.split(".")[-2] in ("decpose", "decshape", "deccam"):
        limit *= UNTRAINED_READOUT_GAIN
    elif "pos_embed" in name:
        limit = 0.5
    uniform = generator.random(int(np.prod(shape)))
    values: F32 = (limit * (2 * uniform - 1)).astype(np.float32).reshape(shape)
    return values

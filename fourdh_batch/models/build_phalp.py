"""The pose predictor of PHALP': its sizes, and the way of its weights from files into the network.

Two forms: three published files (a PyTorch-Lightning checkpoint, a YAML tree, and mean and
standard deviation as ``.npy``), and one safetensors file, which is ours and holds all three.

Source: docs/PHALP.md, sections 5.1 and 14.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.lib import format as npy_format
from torch import Tensor

from fourdh_batch.errors import CheckpointError
from fourdh_batch.models.build import IDENTITY_ROT6D, ORIGINS
from fourdh_batch.models.checkpoint import (
    MAX_LISTED,
    fitting_tensors,
    read_lightning_state_dict,
    read_safetensors,
    tensors_digest,
    write_safetensors,
)
from fourdh_batch.models.minis import PREDICTOR, shipped
from fourdh_batch.models.predictor import (
    NUM_POSE_VECTOR,
    PosePredictor,
    PoseTransformer,
    PredictorSize,
)
from fourdh_batch.models.unpickle import load_restricted_pickle
from fourdh_batch.types import F32, F64, NUM_BODY_JOINTS

logger = logging.getLogger(__name__)

FORMAT = "pose_predictor 1"  # of our safetensors
WHAT = "a pose predictor"  # in error messages
PREFIX = "encoder."  # of the network in a published checkpoint; the rest is for training only
MASK_TYPE = "zero"  # empty slots become the mask token; nothing else is built here
MAX_MEAN_STD_BYTES = 2**20

# In the checkpoint and never read: a first transformer without a successor, tables of positions
# that learned ones replaced, a token that is dropped again, and read-outs for actions.
UNUSED = re.compile(r"transformer\..+|pos_embedding|pe|class_token|action_head_\w+\..+")

# What tensor shapes do not tell, and its place under `configs` in the published YAML.
YAML_PLACES = {
    "num_heads": ("transformer", "heads"),
    "head_dim": ("transformer", "dim_head"),
    "conv_stride": ("transformer", "conv", "stride"),
    "conv_pad": ("transformer", "conv", "pad"),
}
# What they do tell, too.
YAML_REPEATS = {
    "dim": ("in_feat",),
    "depth": ("transformer", "depth"),
    "mlp_dim": ("transformer", "mlp_dim"),
    "frame_length": ("frame_length",),
}

UNTRAINED_SIZE = PredictorSize(dim=128, depth=2, num_heads=4, head_dim=32, mlp_dim=256)
# Bounds of untrained weights, so that predictions lie within the reach of the tracker's gate.
UNTRAINED_GAIN = {"decpose.weight": 0.045, "decshape.weight": 0.03, "deccam.weight": 0.05}
UNTRAINED_LIMIT = {"decpose.bias": 0.01, "decshape.bias": 0.01, "deccam.bias": 0.05}
UNTRAINED_POSE_SPREAD = 0.3


def load_pose_predictor(path: str | Path, *, device: str | torch.device = "cpu") -> PosePredictor:
    """The pose predictor of a file.

    Args:
        path: ``.safetensors`` of `import_pose_predictor` or `save_pose_predictor`, or the
            published ``.pth``. A file of the same name with the ending ``.yaml`` must lie beside
            that, and ``mean_std.npy`` beside it or in the folder ``3D`` beside its folder, which
            is where the published code keeps it. The word `mini`: see `minis`.
        device: where it runs.

    Returns:
        The predictor; its `weights_origin` is what the file says, ``imported`` where it says
        nothing.

    Raises:
        CheckpointError: a file is missing, damaged, refers to code, or the parts do not fit each
            other; the message lists what was expected and what came.
    """
    path = shipped(path, PREDICTOR)
    if path.suffix == ".safetensors":
        size, tensors, metadata = _read_ours(path)
    else:
        size, tensors = _read_published(path, path.with_suffix(".yaml"), _mean_std_of(path))
        metadata = {}
    predictor = _build(size, tensors, origin=metadata.get("origin", "imported"), device=device)
    if metadata.get("digest", predictor.weights_digest) != predictor.weights_digest:
        raise CheckpointError(
            f"{path}: expected weights of digest {metadata['digest']}, got "
            f"{predictor.weights_digest}; the file is damaged, make or fetch it again"
        )
    logger.info(
        "%s: %s pose predictor, %s, digest %s, on %s",
        path,
        predictor.weights_origin,
        size,
        predictor.weights_digest[:16],
        device,
    )
    return predictor


def import_pose_predictor(
    checkpoint: str | Path,
    dst: str | Path,
    *,
    config: str | Path | None = None,
    mean_std: str | Path | None = None,
    origin: str = "official",
) -> str:
    """Turn the three published files into one safetensors file, so that no pickle is read again.

    Args:
        checkpoint: ``pose_predictor.pth``.
        dst: the ``.safetensors`` to write.
        config: ``pose_predictor.yaml``; None: where `load_pose_predictor` looks.
        mean_std: ``mean_std.npy``; None: where `load_pose_predictor` looks.
        origin: ``official`` for the files of the authors, else ``imported``.

    Returns:
        The digest of the weights.

    Raises:
        CheckpointError: as `load_pose_predictor`.
    """
    checkpoint = Path(checkpoint)
    size, tensors = _read_published(
        checkpoint,
        Path(config or checkpoint.with_suffix(".yaml")),
        Path(mean_std or _mean_std_of(checkpoint)),
    )
    return _write(dst, size, tensors, origin)


def save_pose_predictor(
    predictor: PosePredictor, path: str | Path, *, origin: str | None = None
) -> str:
    """Write a predictor as safetensors; gives back its digest.

    Args:
        predictor: what to write.
        path: the ``.safetensors``.
        origin: one of `build.ORIGINS`; None: as the predictor says.
    """
    tensors = {
        **predictor.network.state_dict(),
        "mean": predictor.mean,
        "std": predictor.std,
    }
    return _write(path, predictor.network.size, tensors, origin or predictor.weights_origin)


def untrained_pose_predictor(
    seed: int = 0,
    *,
    size: PredictorSize = UNTRAINED_SIZE,
    device: str | torch.device = "cpu",
) -> PosePredictor:
    """A predictor with seeded random weights, whose poses mean nothing.

    Its `weights_origin` is ``untrained``. The weights depend on the seed, the names and the
    shapes only, on any machine.
    """
    tensors = {
        name: torch.from_numpy(_untrained(seed, name, tuple(shape)))
        for name, shape in expected_shapes(size).items()
    }
    tensors |= {"mean": torch.zeros(NUM_POSE_VECTOR), "std": torch.ones(NUM_POSE_VECTOR)}
    return _build(size, tensors, origin="untrained", device=device)


def expected_shapes(size: PredictorSize) -> dict[str, torch.Size]:
    """Names and shapes of all weights of one size, without mean and standard deviation."""
    with torch.device("meta"):
        network = PoseTransformer(size)
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _build(
    size: PredictorSize, tensors: Mapping[str, Tensor], *, origin: str, device: str | torch.device
) -> PosePredictor:
    with torch.device("meta"):
        network = PoseTransformer(size)
    weights = {
        name: tensor.to(device, copy=True)
        for name, tensor in tensors.items()
        if name not in ("mean", "std")
    }
    network.load_state_dict(weights, assign=True)
    return PosePredictor(
        network,
        tensors["mean"],
        tensors["std"],
        device=device,
        weights_origin=origin,
        weights_digest=_digest(size, tensors),
    )


def _digest(size: PredictorSize, tensors: Mapping[str, Tensor]) -> str:
    """Of all tensors and of what their shapes do not tell."""
    told = {f"size.{name}": torch.tensor(getattr(size, name)) for name in YAML_PLACES}
    return tensors_digest({**tensors, **told})


def _write(
    path: str | Path, size: PredictorSize, tensors: Mapping[str, Tensor], origin: str
) -> str:
    if origin not in ORIGINS:
        raise ValueError(f"origin: expected one of {ORIGINS}, got {origin!r}")
    digest = _digest(size, tensors)
    metadata = {name: str(getattr(size, name)) for name in YAML_PLACES}
    metadata |= {"format": FORMAT, "mask_type": MASK_TYPE, "origin": origin, "digest": digest}
    write_safetensors(path, tensors, metadata)
    return digest


def _checked(metadata: Mapping[str, str], path: Path) -> Mapping[str, str]:
    """Metadata of one of our files."""
    is_ours = (
        metadata.get("format") == FORMAT
        and metadata.get("mask_type") == MASK_TYPE
        and metadata.get("origin") in ORIGINS
        and "digest" in metadata
        and all(metadata.get(name, "").isdecimal() for name in YAML_PLACES)
    )
    if not is_ours:
        raise CheckpointError(
            f"{path}: expected format {FORMAT!r} with {', '.join(YAML_PLACES)}, mask_type "
            f"{MASK_TYPE!r}, a digest and an origin of {ORIGINS}, got {dict(metadata)}; "
            "another network, or written by a newer version?"
        )
    return metadata


def _read_ours(path: Path) -> tuple[PredictorSize, dict[str, Tensor], Mapping[str, str]]:
    tensors, metadata = read_safetensors(path)
    told = {name: int(_checked(metadata, path)[name]) for name in YAML_PLACES}
    size = _size(tensors, told, str(path))
    shapes: dict[str, tuple[int, ...]] = {
        **expected_shapes(size),
        "mean": (NUM_POSE_VECTOR,),
        "std": (NUM_POSE_VECTOR,),
    }
    return size, fitting_tensors(tensors, shapes, what=WHAT, source=str(path)), metadata


def _read_published(
    checkpoint: Path, config: Path, mean_std: Path
) -> tuple[PredictorSize, dict[str, Tensor]]:
    state = read_lightning_state_dict(checkpoint)
    # One prefix, once: `pose_shape_encoder.` holds the same letters (section 15, Q3).
    weights = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(PREFIX)
    }
    told, repeated = _read_yaml(config)
    size = _size(weights, told, str(checkpoint))
    for name, value in repeated.items():
        if value != getattr(size, name):
            raise CheckpointError(
                f"{config}: expected configs.{'.'.join(YAML_REPEATS[name])} = "
                f"{getattr(size, name)} as in {checkpoint}, got {value}"
            )
    used = {name: t for name, t in weights.items() if not UNUSED.fullmatch(name)}
    source = f"{checkpoint}: below {PREFIX!r}"
    fitting = fitting_tensors(used, expected_shapes(size), what=WHAT, source=source)
    mean, std = _read_mean_std(mean_std)
    return size, {**fitting, "mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}


def _size(weights: Mapping[str, Tensor], told: Mapping[str, int], source: str) -> PredictorSize:
    """Sizes from tensor shapes, and what those do not tell.

    Args:
        weights: of the network.
        told: the names of `YAML_PLACES`.
        source: what error messages call the weights.
    """

    def axis(name: str, axis: int, num_axes: int) -> int:
        if name not in weights or weights[name].ndim != num_axes:
            got = tuple(weights[name].shape) if name in weights else "no such tensor"
            raise CheckpointError(f"{source}: {name}: expected {num_axes} axes, got {got}")
        return weights[name].shape[axis]

    first = "transformer1.layers.0"
    num_inner = axis(f"{first}.0.fn.to_qkv.weight", 0, 2) / 3
    kernel = axis("conv_en.weight", 2, 3)
    if told["num_heads"] * told["head_dim"] != num_inner:
        raise CheckpointError(
            f"{source}: expected heads x head width = {num_inner:g}, "
            f"got {told['num_heads']} x {told['head_dim']}"
        )
    if told["conv_stride"] + 2 * told["conv_pad"] != kernel:
        raise CheckpointError(
            f"{source}: expected stride + 2 pad = {kernel}, "
            f"got {told['conv_stride']} + 2 x {told['conv_pad']}"
        )
    layers = {name.split(".")[2] for name in weights if name.startswith("transformer1.layers.")}
    try:
        return PredictorSize(
            dim=axis("mask_token", 0, 1),
            depth=len(layers),
            mlp_dim=axis(f"{first}.1.fn.net.0.weight", 0, 2),
            mid_dim=axis("pose_shape_encoder.0.weight", 0, 2),
            smpl_dim=axis("smpl_head.0.fc1.weight", 0, 2),
            frame_length=axis("pos_embedding_learned1", 1, 3),
            **told,
        )
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source}: {error}") from error


def _read_yaml(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """What tensor shapes do not tell, and what of the rest the file repeats.

    Nothing is filled in: a wrong number of heads fits every tensor and spoils every prediction.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected plain YAML, got {error}") from error

    def find(place: tuple[str, ...]) -> object:
        node: object = tree
        for key in ("configs", *place):
            node = node.get(key) if isinstance(node, dict) else None
        return node

    told: dict[str, int] = {}
    for name, place in YAML_PLACES.items():
        value = find(place)
        if type(value) is not int:  # a bool is no count
            raise CheckpointError(
                f"{path}: configs.{'.'.join(place)}: expected a whole number, "
                f"got {'nothing' if value is None else repr(value)[:80]}"
            )
        told[name] = value
    mask_type = find(("mask_type_test",))
    if mask_type != MASK_TYPE:
        raise CheckpointError(
            f"{path}: configs.mask_type_test: expected {MASK_TYPE!r}, "
            f"got {'nothing' if mask_type is None else repr(mask_type)[:80]}"
        )
    found = {name: find(place) for name, place in YAML_REPEATS.items()}
    return told, {name: value for name, value in found.items() if type(value) is int}


def _mean_std_of(checkpoint: Path) -> Path:
    beside = checkpoint.with_name("mean_std.npy")
    published = checkpoint.parent.parent / "3D" / "mean_std.npy"
    return published if published.is_file() and not beside.is_file() else beside


def _read_mean_std(path: Path) -> tuple[F32, F32]:
    """(229,) mean and standard deviation; where the file has fewer numbers, 0 and 1."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size > MAX_MEAN_STD_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_MEAN_STD_BYTES} bytes, got more")
    try:
        rows = _read_npy(path)
    except CheckpointError:
        raise
    except (OSError, EOFError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: expected an .npy of two rows, got {error}") from error
    sizes = [row.shape for row in rows]
    if len(rows) != 2 or sizes[0] != sizes[1] or not 1 <= rows[0].size <= NUM_POSE_VECTOR:
        raise CheckpointError(
            f"{path}: expected mean and standard deviation of up to {NUM_POSE_VECTOR} numbers, "
            f"got shapes {sizes[:MAX_LISTED]}"
        )
    mean, std = np.zeros(NUM_POSE_VECTOR), np.ones(NUM_POSE_VECTOR)
    for values, row in zip((mean, std), rows, strict=True):
        values[: row.size] = row.ravel()
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
        raise CheckpointError(f"{path}: expected finite numbers and deviations of 0 or more")
    return mean.astype(np.float32), std.astype(np.float32)


def _read_npy(path: Path) -> list[F64]:
    """The rows of an ``.npy``; one of objects is a pickle and read as one."""
    with path.open("rb") as file:
        version = npy_format.read_magic(file)
        read_header = {
            (1, 0): npy_format.read_array_header_1_0,
            (2, 0): npy_format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"format version {version}")
        _shape, _is_fortran, dtype = read_header(file)
        if dtype.hasobject:
            content = load_restricted_pickle(file)
        else:
            file.seek(0)
            content = npy_format.read_array(file, allow_pickle=False)
    if not isinstance(content, (np.ndarray, list, tuple)):
        raise ValueError(f"a pickled {type(content).__name__}")
    return [np.asarray(row, dtype=np.float64) for row in content]


def _untrained(seed: int, name: str, shape: tuple[int, ...]) -> F32:
    """Uniform weights by name: residual branches of unit gain, read-outs near a person at rest."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}:{name}".encode())))
    uniform = generator.random(int(np.prod(shape)))
    middle: F64 | float = 0.0
    tail = ".".join(name.split(".")[-2:])
    if name.endswith("init_body_pose"):
        middle = np.array(IDENTITY_ROT6D * (1 + NUM_BODY_JOINTS))
        limit = UNTRAINED_POSE_SPREAD
    elif name == "mask_token" or name.startswith("pos_embedding") or ".init_" in name:
        limit = 0.5
    elif len(shape) >= 2:
        limit = UNTRAINED_GAIN.get(tail, 1.0) * float(np.sqrt(3 / np.prod(shape[1:])))
    elif tail == "norm.weight":
        middle, limit = 1.0, 0.2
    else:
        limit = UNTRAINED_LIMIT.get(tail, 0.1)
    low, high = middle - limit, middle + limit
    values: F32 = (low + (high - low) * uniform).astype(np.float32).reshape(shape)
    return values

"""Reading and writing files of weights. Nothing in a file gets to run.

Two forms: the published PyTorch-Lightning checkpoints, which are pickles with configuration
objects beside the tensors, and safetensors with a few words of metadata, which is ours.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fourdh_batch.errors import CheckpointError
from fourdh_batch.models.unpickle import UnpicklingError

# Classes that training frameworks leave in their checkpoints. They are read as inert stand-ins
# and then dropped; any other name that PyTorch does not know as safe refuses the file.
_CONFIG_CLASS = re.compile(
    r"(omegaconf|yacs|typing|pathlib|pytorch_lightning|lightning|lightning_fabric)\.(\w+\.)*[A-Z]\w*"
    r"|collections\.(defaultdict|OrderedDict)|argparse\.Namespace"
    r"|builtins\.(bool|bytes|dict|float|frozenset|int|list|object|set|str|tuple)"
)


MAX_LISTED = 8  # names per kind of problem in an error message

# What damaged or hostile bytes make PyTorch raise.
_DAMAGED = (
    UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class _Inert:
    """Stands for a class of a checkpoint: swallows whatever it is built from."""

    def __new__(cls, *_args: object, **_kwargs: object) -> _Inert:
        return object.__new__(cls)

    def __setstate__(self, _state: object) -> None:
        """Keep nothing."""


def read_checkpoint(path: str | Path) -> Mapping[object, object]:
    """Everything in a file of `torch.save`, mapped from the file; objects are inert stand-ins.

    Args:
        path: a file written by PyTorch 1.6 or newer.

    Raises:
        CheckpointError: the file is missing or damaged, holds no dictionary, or refers to anything
            but tensors and configuration classes.
    """
    path = _existing(path)
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    refused = sorted(name for name in unknown if not _CONFIG_CLASS.fullmatch(name))
    if refused:
        raise CheckpointError(
            f"{path}: expected tensors and configuration classes, got a reference to "
            f"{', '.join(refused)}; refused, because reading it could run code"
        )
    try:
        with torch.serialization.safe_globals([_stand_in(name) for name in unknown]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


def read_lightning_state_dict(path: str | Path, *, entry: str = "state_dict") -> dict[str, Tensor]:
    """The ``state_dict`` of a PyTorch-Lightning checkpoint, mapped from the file.

    Args:
        path: a file written by `torch.save` in PyTorch 1.6 or newer.
        entry: where the tensors are in it; other programs have other names for it.

    Returns:
        All tensors under their full names.

    Raises:
        CheckpointError: the file is missing, damaged or no such checkpoint, or refers to anything
            but tensors and configuration classes.
    """
    content = read_checkpoint(path)
    state = content.get(entry)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path}: expected an entry {entry!r}, got {list(content)[:MAX_LISTED]}"
        )
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise CheckpointError(
                f"{path}: {entry}: expected tensors, got {name!r}: {type(tensor).__name__}"
            )
    return dict(state)


def fitting_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    what: str,
    source: str,
) -> dict[str, Tensor]:
    """The tensors as float32, after an exact comparison of names and shapes.

    Args:
        tensors: what came.
        expected: name to shape.
        what: what the expected tensors are those of, for error messages.
        source: what error messages call the tensors that came.

    Raises:
        CheckpointError: lists the names that are missing, too many, or of another shape or type.
    """
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "other shape": [
            f"{name} (expected {tuple(shape)}, got {tuple(tensors[name].shape)})"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "other type": [
            f"{name} (expected floating point, got {tensor.dtype})"
            for name, tensor in tensors.items()
            if not tensor.is_floating_point()
        ],
    }
    if any(problems.values()):
        lines = [
            f"{kind}: {', '.join(names[:MAX_LISTED])}"
            + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")
            for kind, names in problems.items()
            if names
        ]
        raise CheckpointError(
            f"{source}: expected the {len(expected)} tensors of {what}, "
            f"got {len(tensors)}; " + "; ".join(lines)
        )
    return {name: tensors[name].float() for name in expected}


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = _existing(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected safetensors, got {error}") from error


def read_safetensors_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a safetensors file, without its tensors.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = _existing(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected safetensors, got {error}") from error


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write beside the target, then rename: the file is there in full or not at all."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(contiguous, aside, metadata=dict(metadata))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, 64 hex digits, of names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stand_in(full_name: str) -> type[_Inert]:
    """A class that answers to this name."""
    module, _, name = full_name.rpartition(".")
    return type(name, (_Inert,), {"__module__": module})


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected a checkpoint written by torch.save, got {type(error).__name__}: {error}"
    )


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return path

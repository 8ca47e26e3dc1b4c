"""State of a training between two steps, in a folder or on an object store.

    checkpoints/step-00001000/weights.safetensors   all trained modules
                              optimizers.pt         moments; tensors and numbers only
    checkpoints/latest.json                         written last: which of them counts

A checkpoint holds no random state and no place in the data: both follow from seed and step.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fourdh_batch.errors import CheckpointError
from fourdh_batch.models.checkpoint import (
    fitting_tensors,
    read_checkpoint,
    read_safetensors,
    write_safetensors,
)
from fourdh_batch.storage import Store

FOLDER = "checkpoints"
LATEST = f"{FOLDER}/latest.json"
WEIGHTS, OPTIMIZERS = "weights.safetensors", "optimizers.pt"


def save_checkpoint(
    store: Store,
    step: int,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    settings: Mapping[str, Any],
    metadata: Mapping[str, str],
    keep: int,
    since_log: tuple[int, Mapping[str, float]] = (0, {}),
    is_evaluated: bool = True,
) -> None:
    """Publish a checkpoint, then delete the oldest beyond `keep`.

    Args:
        store: of the output.
        step: updates done.
        modules: by the prefix of their tensors.
        optimizers: by name.
        settings: nested, by which a later run is compared with this one.
        metadata: of the safetensors file.
        keep: checkpoints that stay.
        since_log: see `figures_since_log`.
        is_evaluated: see `is_evaluated`.
    """
    prefix = _prefix(step)
    with tempfile.TemporaryDirectory() as folder:
        weights, moments = Path(folder) / WEIGHTS, Path(folder) / OPTIMIZERS
        write_safetensors(weights, all_tensors(modules), metadata)
        torch.save(
            {name: optimizer.state_dict() for name, optimizer in optimizers.items()}, moments
        )
        store.put_file(weights, f"{prefix}/{WEIGHTS}")
        store.put_file(moments, f"{prefix}/{OPTIMIZERS}")
    record = {
        "step": step,
        "settings": settings,
        "since_log": [since_log[0], dict(since_log[1])],
        "is_evaluated": is_evaluated,
    }
    store.write_bytes(LATEST, json.dumps(record, indent=1).encode())
    stored = {key.split("/")[1] for key, _ in store.list(FOLDER) if key != LATEST}
    older = sorted(name for name in stored if name < prefix.split("/")[1])
    for name in older[: max(len(older) - (keep - 1), 0)]:
        store.delete_tree(f"{FOLDER}/{name}")


def latest_checkpoint(store: Store) -> tuple[int, dict[str, Any]] | None:
    """Step and settings of the checkpoint that counts; None where there is none.

    Raises:
        CheckpointError: the record is damaged.
    """
    try:
        content = store.read_bytes(LATEST)
    except FileNotFoundError:
        return None
    try:
        record = json.loads(content)
        return int(record["step"]), dict(record["settings"])
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{store.uri(LATEST)}: damaged record: {error}") from error


def figures_since_log(store: Store) -> tuple[int, dict[str, float]]:
    """Steps between the last entry of the logs and the checkpoint that counts, and the sums of
    their figures, of which the next entry is a mean.

    Raises:
        CheckpointError: the record is damaged.
    """
    try:
        num_steps, sums = json.loads(store.read_bytes(LATEST)).get("since_log", (0, {}))
        return int(num_steps), {str(name): float(value) for name, value in sums.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{store.uri(LATEST)}: damaged record: {error}") from error


def is_evaluated(store: Store) -> bool:
    """Whether the figures that are due after the checkpoint that counts were written."""
    return bool(json.loads(store.read_bytes(LATEST)).get("is_evaluated", True))


def mark_evaluated(store: Store) -> None:
    """Note that they were."""
    record = json.loads(store.read_bytes(LATEST))
    store.write_bytes(LATEST, json.dumps({**record, "is_evaluated": True}, indent=1).encode())


def load_checkpoint(
    store: Store,
    step: int,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
) -> None:
    """Fill modules and optimisers.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit.
    """
    prefix = _prefix(step)
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name in (WEIGHTS, OPTIMIZERS):
            paths[name] = Path(folder) / name
            try:
                source = store.open_read(f"{prefix}/{name}")
            except FileNotFoundError as error:
                raise CheckpointError(f"{store.uri(prefix)}/{name}: no such file") from error
            with source, paths[name].open("wb") as target:
                shutil.copyfileobj(source, target)
        tensors, _ = read_safetensors(paths[WEIGHTS])
        expected = {name: tensor.shape for name, tensor in all_tensors(modules).items()}
        fitting = fitting_tensors(
            tensors, expected, what="this training", source=store.uri(f"{prefix}/{WEIGHTS}")
        )
        for name, module in modules.items():
            module.load_state_dict(
                {
                    key.removeprefix(f"{name}."): tensor
                    for key, tensor in fitting.items()
                    if key.startswith(f"{name}.")
                },
                strict=False,  # names were compared above
            )
        states = read_checkpoint(paths[OPTIMIZERS])
        if set(states) != set(optimizers):
            raise CheckpointError(
                f"{store.uri(prefix)}/{OPTIMIZERS}: expected optimisers {sorted(optimizers)}, "
                f"got {sorted(map(str, states))}"
            )
        for name, optimizer in optimizers.items():
            try:
                optimizer.load_state_dict(states[name])  # type: ignore[arg-type]
            except (ValueError, TypeError, LookupError) as error:
                raise CheckpointError(
                    f"{store.uri(prefix)}/{OPTIMIZERS}: {name} does not fit: {error}"
                ) from error


def all_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of several modules, each name behind that of its module; whole numbers, such as
    the count of batches of a batch norm, have no part in the curve and are left out."""
    return {
        f"{prefix}.{name}": tensor
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point()
    }


def _prefix(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}"

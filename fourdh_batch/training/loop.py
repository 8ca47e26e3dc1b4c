"""One training loop for every network: steps, learning rate, logs, evaluation, checkpoints, resume.

Everything random follows from (seed, step): which examples a step sees, how they are changed, and
which branches are dropped. So a training that was killed goes on from its last checkpoint and gives
the same curve, to the last bit on a CPU; nothing but weights and moments is kept.

The same function runs in one process and in each of Ray Train's (`training/distributed.py`): where
`torch.distributed` is initialised, gradients are averaged over the processes.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from fourdh_batch.config import LoopConfig, leaves
from fourdh_batch.errors import ConfigError, TrainingError
from fourdh_batch.storage import Store
from fourdh_batch.training.checkpoint import (
    figures_since_log,
    is_evaluated,
    latest_checkpoint,
    load_checkpoint,
    mark_evaluated,
    save_checkpoint,
)
from fourdh_batch.training.curve import Curve

logger = logging.getLogger(__name__)

RECORD = "training.json"
PREFETCHED_BATCHES = 4  # of each data worker
# Settings that a continued training may change: they do not touch the curve.
FREE_SETTINGS = {
    *("output", "held_out", "held_out_examples", "log.format"),
    *("loop.log_every", "loop.evaluate_every", "loop.checkpoint_every", "loop.keep_checkpoints"),
    *("loop.device", "loop.cpu_threads", "loop.data_workers", "loop.address", "loop.max_failures"),
}


class Examples(Protocol):
    """Numbered examples; each follows from its number alone, in any process."""

    def __getitem__(self, number: int) -> Any:
        """The example of any number from 0 on."""


class Task(Protocol):
    """What is trained.

    Attributes:
        modules: everything with weights, by the prefix of their names in a checkpoint.
        optimizers: by name.
        examples: to train on.
        held_out: to evaluate on, by name; of each the numbers below `num_held_out`.
        weights_name: file name of the result, or of the folder of files that it is.
        metadata: of the weights in checkpoints.
    """

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    examples: Examples
    held_out: Mapping[str, Examples]
    num_held_out: int
    weights_name: str
    metadata: Mapping[str, str]
    collate: Callable[[Sequence[Any]], Any]

    def distribute(self) -> None:
        """Average gradients over the processes of `torch.distributed` from now on."""

    def step(self, batch: Any) -> dict[str, Tensor]:
        """One update of every optimiser; figures by name.

        Raises:
            TrainingError: a loss or the norm of its gradient is not finite; what has it was not
                updated.
        """

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Figures of one held-out set by name."""

    def save(self, path: Path) -> str:
        """Write the weights, a file or a folder, as the other jobs read them; their digest."""


def train(
    task: Task, config: LoopConfig, output: str, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Train, or go on with what an interrupted run left in the output.

    Args:
        task: with its first weights.
        config: of the loop.
        output: folder or prefix.
        settings: all settings, nested; of a training that goes on they must be the same, except
            `FREE_SETTINGS`, and the number of steps where it does not shape the learning rate.

    Returns:
        Figures of the held-out examples after the last step.

    Raises:
        ConfigError: the output holds a training with other settings, or TensorBoard is missing.
        CheckpointError: the checkpoint is damaged.
        TrainingError: a loss or the norm of a gradient is not finite.
    """
    store = Store(output)
    rank, world = _rank_and_world()
    with cpu_threads(config):
        start = _resume(task, config, store, settings)
        if world > 1:
            task.distribute()
        batches = _batches(task, config, range(start, config.steps), rank, world)
        if rank == 0:
            with Curve(output, first_step=start + 1) as curve:
                keeper = _Keeper(task, config, store, curve, settings)
                if start:
                    keeper.go_on(start)
                figures = _run(task, config, start, batches, keeper)
                _publish(task, config, store, settings, figures)
            return figures
        return _run(task, config, start, batches, None)


@contextmanager
def cpu_threads(config: LoopConfig) -> Iterator[None]:
    """PyTorch with the threads asked for; last bits depend on them, of first weights, too."""
    before = torch.get_num_threads()
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Keeper:
    """What one process does for all: logs, evaluation, checkpoints."""

    def __init__(
        self,
        task: Task,
        config: LoopConfig,
        store: Store,
        curve: Curve,
        settings: Mapping[str, Any],
    ) -> None:
        self._task = task
        self._config = config
        self._store = store
        self._curve = curve
        self._settings = settings
        self._sums: dict[str, float] = {}
        self._num_steps = 0  # of the sums
        self._num_timed = 0  # of these in this process
        self._since = time.monotonic()
        self.figures: dict[str, float] = {}

    def go_on(self, done: int) -> None:
        """Take up the mean of the figures where an interrupted run left it, and the evaluation in
        which it was interrupted."""
        self._num_steps, self._sums = figures_since_log(self._store)
        if not is_evaluated(self._store):
            self._evaluate_kept(done)

    def after(self, done: int, figures: Mapping[str, Tensor], rate: float) -> None:
        """What is due after so many steps."""
        config, is_last = self._config, done == self._config.steps
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._num_steps += 1
        self._num_timed += 1
        if done % config.log_every == 0 or is_last:
            self._log(done, rate)
        is_kept = done % config.checkpoint_every == 0 or is_last
        is_due = done % config.evaluate_every == 0 or is_last
        if is_kept:  # before an evaluation, which may fail
            self._curve.publish()  # who goes on from here does not write these steps again
            save_checkpoint(
                self._store,
                done,
                modules=self._task.modules,
                optimizers=self._task.optimizers,
                settings=self._settings,
                metadata=self._task.metadata,
                keep=config.keep_checkpoints,
                since_log=(self._num_steps, self._sums),
                is_evaluated=not is_due,
            )
        if is_due and is_kept:
            self._evaluate_kept(done)
        elif is_due:
            self.evaluate(done)

    def _evaluate_kept(self, done: int) -> None:
        """`evaluate`, after the steps of the checkpoint that counts."""
        self.evaluate(done)
        self._curve.publish()
        mark_evaluated(self._store)

    def evaluate(self, done: int) -> None:
        """Figures of every held-out set; of several, behind its name."""
        began = time.monotonic()
        modes = {name: module.training for name, module in self._task.modules.items()}
        for module in self._task.modules.values():
            module.eval()
        numbers = range(0, self._task.num_held_out, self._config.batch_size)
        last = self._task.num_held_out
        chosen = [list(range(n, min(n + self._config.batch_size, last))) for n in numbers]
        self.figures = {}
        for name, examples in self._task.held_out.items():
            loaded = _loader(examples, self._task.collate, chosen, self._config)
            with torch.inference_mode():
                figures = self._task.evaluate(loaded)
            prefix = f"{name}/" if len(self._task.held_out) > 1 else ""
            self.figures |= {f"{prefix}{what}": value for what, value in figures.items()}
        for name, module in self._task.modules.items():
            module.train(modes[name])
        self._curve.write(done, {f"held_out/{name}": v for name, v in self.figures.items()})
        logger.info("step %d of %d, held out: %s", done, self._config.steps, _told(self.figures))
        self._since += time.monotonic() - began  # what training is timed from

    def _log(self, done: int, rate: float) -> None:
        seconds = time.monotonic() - self._since
        mean = {f"train/{name}": total / self._num_steps for name, total in self._sums.items()}
        speed = self._num_timed * self._config.batch_size * self._config.workers / seconds
        mean |= {"train/learning_rate": rate, "train/examples_per_s": speed}
        self._curve.write(done, mean)
        logger.info(
            "step %d of %d: loss %.4g, %.4g examples/s",
            *(done, self._config.steps, mean["train/loss"], speed),
        )
        self._sums, self._num_steps, self._num_timed = {}, 0, 0
        self._since = time.monotonic()


def learning_rate(config: LoopConfig, step: int) -> float:
    """Of a step, 0-based: rises linearly, then stays, or falls as half a cosine."""
    rise = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    if config.decay == "constant":
        return config.learning_rate * rise
    rest = max(config.steps - config.warmup_steps, 1)
    share = min(max(step - config.warmup_steps, 0) / rest, 1.0)
    return config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * share))


def seed_of(*numbers: int) -> int:
    """One well-mixed seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def require_finite(loss: Tensor) -> None:
    """Raises: TrainingError: the loss is not finite."""
    if not torch.isfinite(loss):
        value = float(loss.detach())
        raise TrainingError(f"expected a finite loss, got {value}; is the learning rate too high?")


def update(
    optimizer: Optimizer, loss: Tensor, parameters: Iterable[nn.Parameter], clip_norm: float
) -> Tensor:
    """One update; gives back the norm of the gradient before it was shortened.

    Raises:
        TrainingError: the loss or the norm is not finite; nothing was updated.
    """
    require_finite(loss)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
    if not torch.isfinite(norm):
        raise TrainingError(
            f"expected a gradient of finite norm, got {float(norm)} under a loss of "
            f"{float(loss.detach()):.4g}; is the learning rate too high?"
        )
    optimizer.step()
    return norm


def _run(
    task: Task, config: LoopConfig, start: int, batches: Iterator[Any], keeper: _Keeper | None
) -> dict[str, float]:
    rank, _ = _rank_and_world()
    for module in task.modules.values():
        module.train()
    for step in range(start, config.steps):
        batch = next(batches)
        torch.manual_seed(seed_of(config.seed, step, rank))
        rate = learning_rate(config, step)
        for optimizer in task.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
        try:
            figures = task.step(batch)
        except TrainingError as error:
            raise TrainingError(f"step {step + 1}: {error}") from error
        if keeper:
            keeper.after(step + 1, figures, rate)
    if keeper and not keeper.figures:  # a training that was finished before
        keeper.evaluate(config.steps)
    return keeper.figures if keeper else {}


def _resume(task: Task, config: LoopConfig, store: Store, settings: Mapping[str, Any]) -> int:
    """Steps done before; their weights and moments are in the task then."""
    found = latest_checkpoint(store)
    if found is None:
        return 0
    done, before = found
    was, now = dict(leaves(before)), dict(leaves(json.loads(json.dumps(settings))))
    free = FREE_SETTINGS | ({"loop.steps"} if config.decay == "constant" else set())
    different = [
        f"{name}: {was.get(name)!r} before, {now.get(name)!r} now"
        for name in sorted(was.keys() | now.keys())
        if name not in free and was.get(name) != now.get(name)
    ]
    if different:
        raise ConfigError(
            f"{store.root}: holds a training with other settings; take another output, or the "
            "same settings:\n  " + "\n  ".join(different)
        )
    if done > config.steps:
        raise ConfigError(f"{store.root}: {done} steps are done, expected at most {config.steps}")
    load_checkpoint(store, done, modules=task.modules, optimizers=task.optimizers)
    logger.info("%s: going on after step %d of %d", store.root, done, config.steps)
    return done


def _publish(
    task: Task,
    config: LoopConfig,
    store: Store,
    settings: Mapping[str, Any],
    figures: Mapping[str, float],
) -> None:
    """The weights, then the record of how they came about; figures of nobody are null there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / task.weights_name
        digest = task.save(path)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            store.put_file(file, file.relative_to(folder).as_posix())
    record = {
        "weights": task.weights_name,
        "digest": digest,
        "steps": config.steps,
        "held_out": {
            name: value if math.isfinite(value) else None for name, value in figures.items()
        },
        "torch": torch.__version__,
        "settings": settings,
    }
    store.write_bytes(RECORD, json.dumps(record, indent=1, allow_nan=False).encode())


class _Numbers:
    """Numbers of the examples of each step, for one process."""

    def __init__(self, steps: range, size: int, rank: int, world: int) -> None:
        self._steps = steps
        self._size = size
        self._rank = rank
        self._world = world

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            first = (step * self._world + self._rank) * self._size
            yield list(range(first, first + self._size))


class _Numbered(Dataset[Any]):
    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __getitem__(self, number: int) -> Any:
        return self._examples[number]


def _batches(task: Task, config: LoopConfig, steps: range, rank: int, world: int) -> Iterator[Any]:
    """This process's part of every step's examples."""
    numbers = _Numbers(steps, config.batch_size, rank, world)
    return iter(_loader(task.examples, task.collate, numbers, config))


def _loader(
    examples: Examples,
    collate: Callable[[Sequence[Any]], Any],
    numbers: Iterable[list[int]],
    config: LoopConfig,
) -> Iterable[Any]:
    workers = config.data_workers
    return DataLoader(
        _Numbered(examples),
        batch_sampler=numbers,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        pin_memory=torch.cuda.is_available() and config.device != "cpu",
    )


def _rank_and_world() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _told(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())

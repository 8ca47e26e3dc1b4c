"""The same training loop in one process, or in many by Ray Train; the only door to Ray Train.

Ray brings the processes up, joins them in a process group and starts them again when some are lost;
what is trained, and from where it goes on, is the loop's and the output's affair alone. Nothing is
reported through Ray.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fourdh_batch import logs
from fourdh_batch.config import LoopConfig
from fourdh_batch.errors import ConfigError, TrainingError
from fourdh_batch.training.loop import Task, cpu_threads, train

Build = Callable[[str | torch.device], Task]
NAME = "fourdh-training"


def train_everywhere(
    build: Build,
    loop: LoopConfig,
    output: str,
    settings: Mapping[str, Any],
    *,
    log_format: str = logs.TEXT,
) -> None:
    """Train until done; the output holds weights, record and logs then.

    Args:
        build: makes the task on a device; sent to other processes where `loop.workers` > 1.
        loop, output, settings: see `loop.train`. With workers on several machines the output has
            to be one that all of them reach.
        log_format: of the workers.

    Raises:
        ConfigError: `loop.device` is a GPU that is not there.
        TrainingError: workers were lost too often, or failed.
        Others: as `loop.train` and `build`.
    """
    if loop.workers == 1:
        _require_gpu(loop, torch.cuda.device_count(), 1)
        _build_and_train(build, loop.device, loop, output, settings)
        return
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    is_local = loop.address == "local" or (
        loop.address == "auto" and "RAY_ADDRESS" not in os.environ
    )
    has_ray = ray.is_initialized()
    if not has_ray:
        quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
        if is_local:
            cores = max(os.cpu_count() or 1, loop.workers * (1 + loop.data_workers) + 1)
            ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        else:
            ray.init(address=None if loop.address == "auto" else loop.address, **quiet)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            wants_gpu = loop.device != "cpu"
            num_gpus = float(ray.cluster_resources().get("GPU", 0))
            _require_gpu(loop, num_gpus, loop.workers)
            trainer = TorchTrainer(
                _in_worker,
                train_loop_config={
                    "build": build,
                    "loop": loop,
                    "output": output,
                    "settings": dict(settings),
                    "log_format": log_format,
                },
                scaling_config=ScalingConfig(
                    num_workers=loop.workers,
                    use_gpu=wants_gpu and num_gpus >= loop.workers,
                    resources_per_worker={"CPU": 1 + loop.data_workers},
                ),
                run_config=RunConfig(
                    name=NAME,
                    storage_path=scratch,
                    failure_config=FailureConfig(max_failures=loop.max_failures),
                ),
            )
            try:
                trainer.fit()
            except Exception as error:
                raise TrainingError(f"{output}: training failed: {error}") from error
    finally:
        if not has_ray:
            ray.shutdown()


def _in_worker(context: dict[str, Any]) -> None:
    """What each of Ray Train's processes runs."""
    from ray.train.torch import get_device

    logs.set_up(context["log_format"])
    loop: LoopConfig = context["loop"]
    device = loop.device if loop.device == "cpu" else get_device()
    _build_and_train(context["build"], device, loop, context["output"], context["settings"])


def _build_and_train(
    build: Build,
    device: str | torch.device,
    loop: LoopConfig,
    output: str,
    settings: Mapping[str, Any],
) -> None:
    with cpu_threads(loop):
        task = build(device)
    train(task, loop, output, settings)


def _require_gpu(loop: LoopConfig, num_gpus: float, num_wanted: int) -> None:
    """Raises: ConfigError: `loop.device` names a GPU, and there are too few."""
    name, _, index = loop.device.partition(":")
    num_wanted = max(num_wanted, int(index or 0) + 1)
    if name == "cuda" and num_gpus < num_wanted:
        raise ConfigError(
            f"loop.device: expected {num_wanted} CUDA GPU{'s' * (num_wanted > 1)} for "
            f"{loop.device!r}, got {num_gpus:g}; auto takes the CPU where there is none"
        )

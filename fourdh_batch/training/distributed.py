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
from fourdh_batch.errors import TrainingError
from fourdh_batch.training.loop import Task, train

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
        TrainingError: workers were lost too often, or failed.
        Others: as `loop.train` and `build`.
    """
    if loop.workers == 1:
        train(build(loop.device), loop, output, settings)
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
    train(context["build"](device), loop, context["output"], context["settings"])

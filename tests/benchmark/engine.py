"""What Ray costs: the job against the same work in one process with a decoder beside it.

Marginal wall time per video, (time of many - time of few) / difference, so that starting up, which
is given apart, does not count.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from fourdh_batch.cluster.run import run_job
from fourdh_batch.config import JobConfig, load_config
from fourdh_batch.pipeline.engine import build_engine, model_card
from fourdh_batch.pipeline.plan import plan_shards, read_corpus
from fourdh_batch.pipeline.shard import process_shard
from fourdh_batch.storage import Store
from tests.benchmark.decode import NUM_FRAMES, clip
from tests.benchmark.memory import boxes

FEW, MANY, ROUNDS = 1, 5, 3


def one_process(config: JobConfig) -> None:
    """Decoder in a child process, one chunk ahead; models, tracker and writer here."""
    engine, card, store = build_engine(config), model_card(config), Store(config.output)
    for shard in plan_shards(
        store, "d", read_corpus(config.input), videos_per_shard=200, mb_per_shard=512
    ):
        process_shard(shard, engine, store, config, card)


def on_ray(config: JobConfig) -> None:
    assert run_job(config).exit_code == 0


def run() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = clip(folder)
        boxes(folder / "boxes.parquet", [f"{k}.mp4" for k in range(MANY)], NUM_FRAMES)
        settings = {}
        for count in (FEW, MANY):
            (folder / f"in{count}").mkdir()
            for k in range(count):
                shutil.copy(source, folder / f"in{count}" / f"{k}.mp4")
            settings[count] = [
                f"input={folder / f'in{count}'}",
                f"output={folder / 'out'}",
                "hmr.weights=mini",
                "hmr.device=cpu",
                "detector.name=boxes",
                f"detector.path={folder / 'boxes.parquet'}",
            ]
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        marginal: dict[str, list[float]] = {"ray": [], "one": []}
        first: list[float] = []
        for _ in range(ROUNDS):
            for which, work in (("ray", on_ray), ("one", one_process)):
                took = {}
                for count in (FEW, MANY):
                    shutil.rmtree(folder / "out", ignore_errors=True)
                    start = time.perf_counter()
                    work(load_config(None, settings[count]))
                    took[count] = time.perf_counter() - start
                marginal[which].append((took[MANY] - took[FEW]) / (MANY - FEW))
                if which == "ray":
                    first.append(took[FEW] / marginal["ray"][-1])
        ray.shutdown()
        ratios = [a / b for a, b in zip(marginal["ray"], marginal["one"], strict=True)]
        return [
            {
                "what": "job on Ray / one process with decode ahead, marginal wall time per video",
                "value": statistics.median(ratios),
                "unit": "x",
                "spread": (min(ratios), max(ratios)),
            },
            {
                "what": "first video on Ray, model actors starting / marginal video",
                "value": statistics.median(first),
                "unit": "x",
                "spread": (min(first), max(first)),
            },
        ]

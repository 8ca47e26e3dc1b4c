"""What a thousand GPUs would ask of the driver and of the object store, from what is measured here.

Counted: requests to the store, on a real run of one shard in one process. Timed: the driver's own
processor time for one more unit. The rest is arithmetic, on stated rates: what a GPU does is an
assumption until one was measured.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ray

from fourdh_batch.cluster.decoding import Journal
from fourdh_batch.cluster.model_actor import REPORT_S
from fourdh_batch.config import ClusterConfig, load_config
from fourdh_batch.pipeline.corpus import read_corpus
from fourdh_batch.pipeline.engine import build_engine, model_card
from fourdh_batch.pipeline.plan import Shard
from fourdh_batch.pipeline.shard import process_shard
from fourdh_batch.storage import Store
from tests.benchmark.scheduling import driver_seconds_per_unit
from tests.media import BoxCorpus

NUM_GPUS = 1000
FRAMES_PER_S = 600.0  # of one GPU: three people a frame at 60 % of an H200's 3,150 crops/s
PUTS_PER_S, GETS_PER_S = 3500, 5500  # of one S3 prefix; it divides busy ones by itself
GPU_HOUR = 2.5  # stated price of an H100 on the spot market, in USD
PUT_PRICE, GET_PRICE = 5e-6, 4e-7  # USD per request, S3 standard
PUTS, GETS = {"write", "list"}, {"read", "look up", "open"}


@dataclass(frozen=True, slots=True)
class Corpus:
    """A kind of corpus.

    Attributes:
        frames: of a video.
        videos_per_unit, videos_per_shard: as the plan makes them.
        checkpoint_frames: as set.
    """

    name: str
    frames: int
    videos_per_unit: int
    videos_per_shard: int
    checkpoint_frames: int


def requests(num_videos: int, num_frames: int, checkpoint_frames: int) -> Counter[str]:
    """Requests to the store for one shard, by verb."""
    calls: Counter[str] = Counter()
    call = Store._call

    def counted(self: Store, verb: str, key: str, work: Callable[[], Any]) -> Any:
        calls[verb] += 1
        return call(self, verb, key, work)

    with tempfile.TemporaryDirectory() as name:
        corpus = BoxCorpus(Path(name) / "in")
        for k in range(num_videos):
            corpus.add(f"{k}.mp4", num_frames=num_frames, seed=k)
        words = corpus.settings(Path(name) / "out")
        config = load_config(None, [*words, f"cluster.checkpoint_frames={checkpoint_frames}"])
        videos = read_corpus(config.input)
        card, engine, store = model_card(config), build_engine(config), Store(config.output)
        with mock.patch.object(Store, "_call", counted):
            process_shard(Shard("s", "d", tuple(videos)), engine, store, config, card)
    return calls


def split(calls: Counter[str]) -> tuple[int, int]:
    """Requests priced as PUT, and as GET."""
    puts = sum(n for verb, n in calls.items() if verb in PUTS)
    return puts, sum(n for verb, n in calls.items() if verb in GETS)


@ray.remote(num_cpus=0)
class _Units:
    """Holds units that do not end."""

    async def hold(self) -> None:
        await asyncio.sleep(3600)


def control_plane(num_units: int) -> tuple[float, float]:
    """Reports that the journal takes a second, and seconds of one look at so many units."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        journal = Journal.remote()
        ray.get(journal.snapshot.remote())
        started = time.perf_counter()
        for k in range(5000):
            journal.report.remote(
                f"0001-00001-0123abcd/video-{k % num_units}#{k % num_units}", 1, k
            )
        ray.get(journal.snapshot.remote())
        reports_per_s = 5000 / (time.perf_counter() - started)
        holders = [_Units.options(max_concurrency=1000).remote() for _ in range(2)]
        refs = [holders[k % 2].hold.remote() for k in range(num_units)]
        ray.wait(refs, timeout=1)
        started = time.perf_counter()
        for _ in range(20):
            _, rest = ray.wait(refs, timeout=0)
            ray.wait(rest, num_returns=len(rest), timeout=0)
        return reports_per_s, (time.perf_counter() - started) / 20
    finally:
        ray.shutdown()


def run() -> list[dict[str, Any]]:
    figures: list[dict[str, Any]] = []

    def say(what: str, value: float, unit: str) -> None:
        figures.append({"what": what, "value": value, "unit": unit})

    # A shard costs so much once, and so much more for every state that is saved.
    once = split(requests(1, 100, 1000))
    saving = split(requests(1, 340, 32))
    num_saved = 340 // 32
    per_save = [(b - a) / num_saved for a, b in zip(once, saving, strict=True)]
    more = split(requests(4, 100, 1000))
    per_video = [(b - a) / 3 for a, b in zip(once, more, strict=True)]
    say("requests of a shard with one video: PUT and LIST", once[0], "")
    say("requests of a shard with one video: GET and HEAD", once[1], "")
    say("more per saved state: PUT", per_save[0], "")
    say("more per saved state: GET", per_save[1], "")
    say("more per further video of a unit: PUT and GET", sum(per_video), "")

    with tempfile.TemporaryDirectory() as name:
        unit_s = driver_seconds_per_unit(Path(name))
    say("driver, processor time per unit", 1000 * unit_s, "ms")

    reports_per_s, look_s = control_plane(2 * NUM_GPUS)
    say("journal: reports a second that it takes", reports_per_s, "1/s")
    say("journal: reports a second that it gets", 2 * NUM_GPUS / REPORT_S, "1/s")
    say(f"driver: a look at {2 * NUM_GPUS} running units", 1000 * look_s, "ms")

    default = ClusterConfig().checkpoint_frames
    for corpus in (
        Corpus("ten-second clips", 250, 32, 200, default),
        Corpus("one-hour videos", 90_000, 1, 1, default),
        Corpus("one-hour videos, state every 8,192 frames", 90_000, 1, 1, 8192),
    ):
        frames_per_s = NUM_GPUS * FRAMES_PER_S
        units = frames_per_s / corpus.frames / corpus.videos_per_unit
        shards = frames_per_s / corpus.frames / corpus.videos_per_shard
        saves = frames_per_s / corpus.checkpoint_frames
        puts = shards * once[0] + saves * per_save[0]
        gets = shards * once[1] + saves * per_save[1]
        hours = frames_per_s / 25  # hours of video per hour
        say(f"{corpus.name}: units a second", units, "1/s")
        say(f"{corpus.name}: driver busy", 100 * units * unit_s, "%")
        say(f"{corpus.name}: PUT a second, of {PUTS_PER_S} a prefix", puts, "1/s")
        say(f"{corpus.name}: GET a second, of {GETS_PER_S} a prefix", gets, "1/s")
        requests_cost = 3600 * (puts * PUT_PRICE + gets * GET_PRICE) / hours
        gpu_cost = NUM_GPUS * GPU_HOUR / hours
        say(f"{corpus.name}: 1,000 hours of video, GPUs", 1000 * gpu_cost, "USD")
        say(f"{corpus.name}: 1,000 hours of video, requests", 1000 * requests_cost, "USD")
    return figures

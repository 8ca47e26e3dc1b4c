"""The sequential processes of a job: tracking, and publishing a shard. No torch until needed."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from fourdh_batch.cluster.decoding import Unit
from fourdh_batch.cluster.metrics import begin_process
from fourdh_batch.config import JobConfig
from fourdh_batch.errors import ConfigError, VideoError
from fourdh_batch.logs import about
from fourdh_batch.pipeline.following import TrackerModels
from fourdh_batch.pipeline.job import run_key
from fourdh_batch.pipeline.plan import Shard
from fourdh_batch.pipeline.records import ChunkResult, ModelCard
from fourdh_batch.pipeline.shard import ShardReport, UnitTracking, VideoOutcome, publish
from fourdh_batch.storage import Store, redact_uri
from fourdh_batch.tables.manifest import CommitRecord
from fourdh_batch.types import DecodeSummary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A video cannot be read now, through no fault of its own: nothing is kept of it."""


Event = ChunkResult | DecodeSummary | VideoError | Dropped


@dataclass(slots=True)
class _Running:
    unit: Unit
    tracking: UnitTracking
    num_ended: int = 0
    broken: Exception | None = None


class TrackerWorker:
    """Tracks a few units at once, the videos of each in order, and spools their finished rows."""

    def __init__(self, config: JobConfig, card: ModelCard, run: str = "") -> None:
        self._metrics = begin_process(config)
        self._config = config
        self._card = card
        self._store = Store(config.output)
        with about(run=run):
            self._models = TrackerModels(config)
        self._running: dict[str, _Running] = {}

    def begin(self, unit: Unit) -> int:
        """Take a unit on, its first video from its saved state where there is one.

        Returns:
            The frame of the first video that is wanted first.
        """
        check_output(self._store, unit.run)
        with self._busy(unit, video=unit.videos[0].video_id):
            tracking = UnitTracking(
                unit.shard,
                unit.videos,
                self._config,
                self._card,
                self._models,
                self._store,
                saved=unit.saved,
                save_each=unit.alone,
            )
        self._running[unit.key] = _Running(unit, tracking)
        return tracking.next_frame

    def work(self, unit: str, events: Sequence[Event]) -> None:
        """What comes next of a unit: chunks of its current video, and how that ended.

        Raises:
            Whatever the rows or the store raised; then again at every call for this unit.
        """
        running = self._running[unit]
        if running.broken is not None:
            raise running.broken
        try:
            for event in events:
                video = running.unit.videos[running.num_ended].video_id
                with self._busy(running.unit, video=video):
                    if isinstance(event, ChunkResult):
                        running.tracking.add(event)
                        continue
                    running.num_ended += 1
                    if isinstance(event, Dropped):
                        running.tracking.drop()
                    else:
                        running.tracking.end(event)
        except Exception as error:
            running.broken = error
            raise

    def close(self, unit: str) -> list[VideoOutcome]:
        """Nothing more comes of a unit; what is finished of it is saved.

        Returns:
            The outcomes of its finished videos.
        """
        running = self._running.pop(unit, None)
        if running is None:
            return []
        with self._busy(running.unit):
            return running.tracking.close()

    @contextmanager
    def _busy(self, unit: Unit, video: str = "") -> Iterator[None]:
        with about(**unit.log_fields, video=video), self._metrics.timed("tracker_busy_seconds"):
            yield


def check_output(store: Store, run: str) -> None:
    """What is written here must lie where the driver looks for it.

    Raises:
        ConfigError: it does not: a folder of that name on this node is another one.
    """
    if run and not store.exists(run_key(run)):
        raise ConfigError(
            f"output {redact_uri(store.root)}: expected the record of the run there, as the "
            f"driver has written it, got none on {socket.gethostname()}; give a folder that all "
            "nodes share, or object storage"
        )


def publish_shard(
    config: JobConfig,
    card: ModelCard,
    shard: Shard,
    outcomes: Sequence[VideoOutcome],
    earlier: CommitRecord | None,
    run: str,
) -> ShardReport:
    """Merge the rows of a shard into its objects and commit it."""
    begin_process(config)
    store = Store(config.output)
    check_output(store, run)
    with about(run=run, shard=shard.shard_id):
        return publish(store, config, card, shard, outcomes, earlier)


TrackerActor: Any = ray.remote(max_restarts=0, max_task_retries=0)(TrackerWorker)
publish_shard_task: Any = ray.remote(max_retries=0)(publish_shard)

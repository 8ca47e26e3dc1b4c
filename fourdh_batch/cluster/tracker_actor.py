"""The sequential processes of a job: tracking, and publishing a shard. No torch until needed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from fourdh_batch.cluster.decoding import Unit
from fourdh_batch.config import JobConfig
from fourdh_batch.errors import VideoError
from fourdh_batch.pipeline.following import TrackerModels
from fourdh_batch.pipeline.plan import Shard
from fourdh_batch.pipeline.records import ChunkResult, ModelCard
from fourdh_batch.pipeline.shard import ShardReport, UnitTracking, VideoOutcome, publish
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import CommitRecord
from fourdh_batch.types import DecodeSummary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A video cannot be read now, through no fault of its own: nothing is kept of it."""


Event = ChunkResult | DecodeSummary | VideoError | Dropped


@dataclass(slots=True)
class _Running:
    tracking: UnitTracking
    broken: Exception | None = None


class TrackerWorker:
    """Tracks a few units at once, the videos of each in order, and spools their finished rows."""

    def __init__(self, config: JobConfig, card: ModelCard) -> None:
        self._config = config
        self._card = card
        self._store = Store(config.output)
        self._models = TrackerModels(config)
        self._running: dict[str, _Running] = {}

    def begin(self, unit: Unit) -> int:
        """Take a unit on, its first video from its saved state where there is one.

        Returns:
            The frame of the first video that is wanted first.
        """
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
        self._running[unit.key] = _Running(tracking)
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
                if isinstance(event, ChunkResult):
                    running.tracking.add(event)
                elif isinstance(event, Dropped):
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
        return [] if running is None else running.tracking.close()


def publish_shard(
    config: JobConfig,
    card: ModelCard,
    shard: Shard,
    outcomes: Sequence[VideoOutcome],
    earlier: CommitRecord | None,
) -> ShardReport:
    """Merge the rows of a shard into its objects and commit it."""
    return publish(Store(config.output), config, card, shard, outcomes, earlier)


TrackerActor: Any = ray.remote(max_restarts=0, max_task_retries=0)(TrackerWorker)
publish_shard_task: Any = ray.remote(max_retries=0)(publish_shard)

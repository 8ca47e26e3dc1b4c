"""The sequential processes of a job: tracking, and publishing a shard. No torch until needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from fourdh_batch.config import JobConfig
from fourdh_batch.errors import VideoError
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.records import ChunkResult, ModelCard
from fourdh_batch.pipeline.shard import (
    ShardReport,
    VideoOutcome,
    VideoTracking,
    keypoints_of,
    publish,
)
from fourdh_batch.storage import Store
from fourdh_batch.tables.writer import VideoSpool
from fourdh_batch.types import DecodeSummary


class TrackerWorker:
    """Tracks a few videos, each in frame order, and spools their finished rows."""

    def __init__(self, config: JobConfig, card: ModelCard) -> None:
        self._config = config
        self._card = card
        self._store = Store(config.output)
        self._keypoints = keypoints_of(config)
        self._running: dict[str, VideoTracking] = {}

    def begin(self, unit: str, shard: Shard, video: Video) -> None:
        """Start afresh with a video; what an earlier attempt left is thrown away."""
        spool = VideoSpool(self._store, shard.shard_id, video.video_id)
        spool.discard()
        self._running[unit] = VideoTracking(
            video,
            shard_id=shard.shard_id,
            dataset=shard.dataset,
            config=self._config,
            card=self._card,
            spool=spool,
            keypoints=self._keypoints,
        )

    def add(self, unit: str, result: ChunkResult) -> None:
        """The next chunk of a video."""
        self._running[unit].add(result)

    def finish(self, unit: str, summary: DecodeSummary) -> VideoOutcome:
        """No more chunks: settle the last rows and close the spool."""
        return self._running.pop(unit).finish(summary)

    def fail(self, unit: str, error: VideoError) -> VideoOutcome:
        """No more chunks, because of this error; rows from before it are kept."""
        return self._running.pop(unit).fail(error)

    def drop(self, unit: str) -> None:
        """Forget a unit that died elsewhere."""
        self._running.pop(unit, None)


def publish_shard(
    config: JobConfig, card: ModelCard, shard: Shard, outcomes: Sequence[VideoOutcome]
) -> ShardReport:
    """Merge the spools of a shard into its objects and commit it."""
    return publish(Store(config.output), config, card, shard, outcomes)


TrackerActor: Any = ray.remote(max_restarts=0, max_task_retries=0)(TrackerWorker)
publish_shard_task: Any = ray.remote(max_retries=0)(publish_shard)

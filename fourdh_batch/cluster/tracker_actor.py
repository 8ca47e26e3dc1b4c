"""The sequential processes of a job: tracking, and publishing a shard. No torch until needed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from fourdh_batch.config import JobConfig
from fourdh_batch.errors import VideoError
from fourdh_batch.pipeline.following import TrackerModels
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.records import ChunkResult, ModelCard
from fourdh_batch.pipeline.shard import (
    ShardReport,
    VideoOutcome,
    VideoTracking,
    begin_video,
    publish,
    video_fingerprint,
)
from fourdh_batch.storage import Store
from fourdh_batch.tables.writer import VideoSpool
from fourdh_batch.types import DecodeSummary

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    tracking: VideoTracking
    spool: VideoSpool
    fingerprint: str
    saved_at: int  # first frame that the saved state lacks


class TrackerWorker:
    """Tracks a few videos, each in frame order, and spools their finished rows.

    Every few hundred frames the state of a long video is saved behind its rows, so that another
    process can go on from there.
    """

    def __init__(self, config: JobConfig, card: ModelCard) -> None:
        self._config = config
        self._card = card
        self._store = Store(config.output)
        self._models = TrackerModels(config)
        self._running: dict[str, _Running] = {}

    def begin(self, unit: str, shard: Shard, video: Video) -> int:
        """Go on with a video where an earlier attempt saved its state, or start afresh.

        Returns:
            The frame that is wanted first.
        """
        spool = VideoSpool(self._store, shard.shard_id, video.video_id)
        tracking = begin_video(video, shard, spool, self._config, self._card, self._models)
        fingerprint = video_fingerprint(video, self._card)
        self._running[unit] = _Running(tracking, spool, fingerprint, tracking.next_frame)
        return tracking.next_frame

    def add(self, unit: str, result: ChunkResult) -> None:
        """The next chunk of a video."""
        running = self._running[unit]
        tracking = running.tracking
        tracking.add(result)
        num_frames = tracking.next_frame - running.saved_at
        if num_frames >= self._config.cluster.checkpoint_frames and tracking.can_resume:
            num_bytes = running.spool.save(tracking.state(), running.fingerprint)
            running.saved_at = tracking.next_frame
            logger.debug("unit %s: saved at %d, %d bytes", unit, running.saved_at, num_bytes)

    def finish(self, unit: str, summary: DecodeSummary) -> VideoOutcome:
        """No more chunks: settle the last rows and close the spool."""
        return self._running.pop(unit).tracking.finish(summary)

    def fail(self, unit: str, error: VideoError) -> VideoOutcome:
        """No more chunks, because of this error; rows from before it are kept."""
        return self._running.pop(unit).tracking.fail(error)

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

"""The light processes of a job: decoders and the journal. No model library is imported here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import ray

from fourdh_batch.config import VideoConfig
from fourdh_batch.errors import VideoError
from fourdh_batch.pipeline.plan import Video
from fourdh_batch.pipeline.reading import read_chunks
from fourdh_batch.types import DecodeSummary, FrameChunk


class DecoderStarted:
    """The first item of every decoder: from here on it must show progress."""


def decode_chunks(
    video: Video, config: VideoConfig, start: int = 0
) -> Iterator[DecoderStarted | FrameChunk | DecodeSummary | VideoError]:
    """Chunks of one video from frame `start` on, then how it ended.

    A typed error is handed out, not raised.
    """
    yield DecoderStarted()
    try:
        yield from read_chunks(video, config, start=start)
    except VideoError as error:
        yield error


class JournalKeeper:
    """What is running and how far it is, as its processes last said."""

    def __init__(self) -> None:
        self._units: dict[str, tuple[int, float]] = {}

    def report(self, unit: str, num_frames: int) -> None:
        """Called when the decoder of a unit starts (0 frames) and after every chunk."""
        self._units[unit] = (num_frames, time.monotonic())

    def forget(self, unit: str) -> None:
        """Called by the scheduler when a unit has ended."""
        self._units.pop(unit, None)

    def snapshot(self) -> dict[str, tuple[int, float]]:
        """Per running unit: frames done, and seconds since it last moved."""
        now = time.monotonic()
        return {unit: (frames, now - at) for unit, (frames, at) in self._units.items()}


decode_video: Any = ray.remote(num_returns="streaming", max_retries=0)(decode_chunks)
Journal: Any = ray.remote(num_cpus=0)(JournalKeeper)

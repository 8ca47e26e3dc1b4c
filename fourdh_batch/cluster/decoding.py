"""The light processes of a job: decoders and the journal. No model library is imported here."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from fourdh_batch.cluster.metrics import begin_process
from fourdh_batch.config import JobConfig, VideoConfig
from fourdh_batch.errors import StorageError, VideoError, WorkerDiedError
from fourdh_batch.logs import about
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.reading import read_chunks
from fourdh_batch.types import DecodeSummary, FrameChunk

_MIB = 1 << 20
_DATA_SIZE = re.compile(r"^VmData:\s+(\d+) kB", re.MULTILINE)  # of proc(5)


@dataclass(frozen=True, slots=True)
class Unit:
    """Videos of a shard that one model process works through: one long one, or many short ones.

    Attributes:
        key: names the attempt.
        shard: with the videos of the unit alone.
        saved: spool that holds the state of the first video, "" where none does.
        alone: nothing else runs beside it, and every step is waited for: somebody among them is
            suspected of killing processes.
        run: that it belongs to.
    """

    key: str
    shard: Shard
    saved: str = ""
    alone: bool = False
    run: str = ""

    @property
    def videos(self) -> tuple[Video, ...]:
        return self.shard.videos

    @property
    def log_fields(self) -> dict[str, str]:
        return {"run": self.run, "shard": self.shard.shard_id, "unit": self.key}


@dataclass(frozen=True, slots=True)
class Opening:
    """The decoder begins with a video of its unit; from here on it must show progress."""

    number: int


Decoded = FrameChunk | DecodeSummary | VideoError | StorageError


def decode_unit(
    videos: Sequence[Video], config: VideoConfig, *, start: int = 0, gather: bool = True
) -> Iterator[Opening | list[tuple[int, Decoded]]]:
    """Chunks of the videos of a unit, one video after another, and how each ended.

    Typed errors are handed out, not raised: the next video follows.

    Args:
        videos: of the unit.
        config: how they are read.
        start: frame of the first video that is wanted first.
        gather: hand out chunks of short videos together, up to the size of one full chunk.
    Yields:
        `Opening` before each video; lists of (number of the video, what came of it).
    """
    batch: list[tuple[int, Decoded]] = []
    num_frames = num_bytes = 0
    for number, video in enumerate(videos):
        yield Opening(number)
        try:
            with about(video=video.video_id):
                for item in read_chunks(video, config, start=start if number == 0 else 0):
                    batch.append((number, item))
                    if isinstance(item, FrameChunk):
                        num_frames += item.num_frames
                        num_bytes += item.rgb.nbytes
                    is_full = num_frames >= config.chunk_frames
                    if is_full or num_bytes >= config.max_chunk_mb * _MIB or not gather:
                        yield batch
                        batch, num_frames, num_bytes = [], 0, 0
        except (VideoError, StorageError) as error:
            batch.append((number, error))
        except MemoryError:
            batch.append((number, _out_of_memory(video, config)))
        if batch and not gather:
            yield batch
            batch = []
    if batch:
        yield batch


def decode_unit_limited(
    videos: Sequence[Video], config: VideoConfig, *, start: int = 0, gather: bool = True
) -> Iterator[Opening | list[tuple[int, Decoded]]]:
    """`decode_unit` in a process whose memory may grow by `video.decoder_memory_mb`, no more.

    Memory shared with other processes, such as Ray's object store, does not count.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if config.decoder_memory_mb:
        size_kib = int(_DATA_SIZE.findall(Path("/proc/self/status").read_text())[0])
        limit = (size_kib << 10) + config.decoder_memory_mb * _MIB
        hard = before[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield from decode_unit(videos, config, start=start, gather=gather)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)  # the process serves others, too


def _out_of_memory(video: Video, config: VideoConfig) -> WorkerDiedError:
    return WorkerDiedError(
        f"the decoding process met its memory limit of {config.decoder_memory_mb} MiB",
        video=video.video_id,
        stage="decode",
    )


def decode(
    unit: Unit, config: JobConfig, start: int
) -> Iterator[Opening | list[tuple[int, Decoded]]]:
    """`decode_unit_limited` in a process of its own."""
    begin_process(config)
    with about(**unit.log_fields):
        gather = not unit.alone
        yield from decode_unit_limited(unit.videos, config.video, start=start, gather=gather)


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """What a running unit last said.

    Attributes:
        opened: number of the video that its decoder began with last.
        num_frames: that have gone through the models, also in an earlier attempt that it goes on
            from.
        idle_s: since it last moved.
    """

    opened: int
    num_frames: int
    idle_s: float


class JournalKeeper:
    """What is running and how far it is, as its processes last said."""

    def __init__(self) -> None:
        self._units: dict[str, tuple[int, int, float]] = {}
        self._num_frames = 0

    def report(self, unit: str, opened: int, num_frames: int) -> None:
        """Called when the decoder of a unit begins with a video, and now and then after chunks.

        Args:
            unit: its key.
            opened: number of the video that its decoder has begun with.
            num_frames: that are behind it; at the first call those of an earlier attempt.
        """
        before = self._units.get(unit, (0, num_frames, 0.0))[1]
        self._num_frames += max(0, num_frames - before)
        self._units[unit] = (opened, num_frames, time.monotonic())

    def forget(self, unit: str) -> None:
        """Called by the scheduler when a unit has ended."""
        self._units.pop(unit, None)

    def snapshot(self) -> dict[str, JournalEntry]:
        """Where the running units are."""
        now = time.monotonic()
        return {
            unit: JournalEntry(opened, num_frames, now - at)
            for unit, (opened, num_frames, at) in self._units.items()
        }

    def num_frames(self) -> int:
        """Frames that have gone through the models, also those of units that died."""
        return self._num_frames


decode_videos: Any = ray.remote(num_returns="streaming", max_retries=0)(decode)
Journal: Any = ray.remote(num_cpus=0)(JournalKeeper)

"""The model processes of a job, and how a video goes through one.

A *lane* is one model actor with its tracker actors. The model actor starts the decoders of its
videos itself, as streaming tasks in processes of their own, so a decoder that crashes or hangs
costs neither the models in memory nor the neighbours. Nothing here retries: whatever goes wrong
travels to the scheduler (`cluster/run.py`), where all decisions are.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from fourdh_batch.cluster.decoding import DecoderStarted, decode_video
from fourdh_batch.config import JobConfig
from fourdh_batch.errors import DecodeStalledError, FourdhError, VideoError, WorkerDiedError
from fourdh_batch.pipeline.engine import Engine, build_engine
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.records import ChunkResult
from fourdh_batch.pipeline.shard import VideoOutcome
from fourdh_batch.types import DecodeSummary, FrameChunk

logger = logging.getLogger(__name__)


class SharedEngine:
    """One set of models for several threads, whose chunks share batches.

    Whoever gets the lock first computes all chunks that wait; a chunk's result does not depend
    on its companions.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._waiting: deque[tuple[FrameChunk, Future[ChunkResult]]] = deque()

    def run(self, chunk: FrameChunk) -> ChunkResult:
        """The result of one chunk; raises what the models raised for it."""
        ticket: Future[ChunkResult] = Future()
        self._waiting.append((chunk, ticket))
        with self._lock:
            if not ticket.done():
                batch = []
                while self._waiting:
                    batch.append(self._waiting.popleft())
                self._compute(batch)
        return ticket.result()

    def _compute(self, batch: Sequence[tuple[FrameChunk, Future[ChunkResult]]]) -> None:
        try:
            results = self._engine.run([chunk for chunk, _ in batch])
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to one of the chunks
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for item in batch:  # find out whose it is
                self._compute([item])
            return
        for (_, ticket), result in zip(batch, results, strict=True):
            ticket.set_result(result)


class ModelWorker:
    """Holds the models of one GPU (or of some cores) and works on a few videos at once."""

    def __init__(self, config: JobConfig) -> None:
        self._config = config
        self._engine: SharedEngine | Exception
        try:
            self._engine = SharedEngine(build_engine(config))
        except Exception as error:  # noqa: BLE001
            # Raised by the first call instead: an error of a constructor loses its type in Ray.
            self._engine = error

    def process(
        self, shard: Shard, video: Video, unit: str, tracker: Any, journal: Any
    ) -> VideoOutcome:
        """One video from file to finished rows.

        Raises:
            WorkerDiedError, DecodeStalledError: its decoder died or hung.
            RayError: its tracker died.
            FourdhError: what the models or the store raised.
        """
        if isinstance(self._engine, Exception):
            raise self._engine
        unacknowledged: deque[Any] = deque()
        summary: DecodeSummary | None = None
        try:
            start: int = ray.get(tracker.begin.remote(unit, shard, video))
            num_frames = start
            for item in self._decode(video, start):
                if isinstance(item, DecoderStarted):
                    journal.report.remote(unit, num_frames)
                    continue
                if isinstance(item, VideoError):
                    return ray.get(tracker.fail.remote(unit, item))  # type: ignore[no-any-return]
                if isinstance(item, DecodeSummary):
                    summary = item
                    break
                try:
                    result = self._engine.run(item)
                except VideoError as error:  # e.g. impossible given boxes
                    return ray.get(tracker.fail.remote(unit, error))  # type: ignore[no-any-return]
                num_frames += item.num_frames
                unacknowledged.append(tracker.add.remote(unit, result))
                if len(unacknowledged) > self._config.cluster.chunks_ahead:
                    ray.get(unacknowledged.popleft())
                journal.report.remote(unit, num_frames)
            ray.get(list(unacknowledged))
            if summary is None:
                raise WorkerDiedError(
                    "the decoder ended without saying how", video=video.video_id, stage="decode"
                )
            return ray.get(tracker.finish.remote(unit, summary))  # type: ignore[no-any-return]
        except RayTaskError as error:
            # An error of the tracker's own code arrives wrapped; the scheduler wants its kind.
            if isinstance(error.cause, FourdhError):
                raise error.cause from error
            raise

    def _decode(
        self, video: Video, start: int
    ) -> Iterator[DecoderStarted | FrameChunk | DecodeSummary | VideoError]:
        config = self._config
        stream = decode_video.options(
            num_cpus=config.cluster.cpus_per_decoder,
            _generator_backpressure_num_objects=config.cluster.chunks_ahead,
        ).remote(video, config.video, start)
        num_frames = start
        timeout_s: float | None = None  # waiting for a free core is nobody's fault
        try:
            while True:
                ready, _ = ray.wait([stream], timeout=timeout_s)
                if not ready:
                    raise DecodeStalledError(
                        f"no frames for {config.video.stall_timeout_s:g} s",
                        video=video.video_id,
                        frame_index=num_frames,
                        stage="decode",
                    )
                try:
                    item = ray.get(next(stream))
                except StopIteration:
                    return
                except RayTaskError:
                    raise
                except RayError as error:
                    raise WorkerDiedError(
                        f"the decoder died: {type(error).__name__}: {error}",
                        video=video.video_id,
                        frame_index=num_frames,
                        stage="decode",
                    ) from error
                if isinstance(item, DecoderStarted):
                    timeout_s = config.video.stall_timeout_s
                if isinstance(item, FrameChunk):
                    num_frames += item.num_frames
                yield item
        finally:
            ray.cancel(stream, force=True)


ModelActor: Any = ray.remote(max_restarts=0, max_task_retries=0)(ModelWorker)

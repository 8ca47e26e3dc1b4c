"""The model processes of a job, and how a unit of videos goes through one.

A *lane* is one model actor with its tracker actors. The model actor starts the decoders of its
units itself, as streaming tasks in processes of their own, so a decoder that crashes or hangs
costs neither the models in memory nor the neighbours. Nothing here retries: whatever goes wrong
travels to the scheduler (`cluster/run.py`), where all decisions are.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from fourdh_batch.cluster.decoding import Decoded, Opening, Unit, decode_videos
from fourdh_batch.cluster.metrics import BACKLOG, DECODE, MODELS, TRACKER, Laps, begin_process
from fourdh_batch.cluster.tracker_actor import Dropped, Event
from fourdh_batch.config import JobConfig
from fourdh_batch.errors import (
    DecodeStalledError,
    FourdhError,
    StorageError,
    VideoError,
    WorkerDiedError,
)
from fourdh_batch.logs import about
from fourdh_batch.pipeline.engine import Engine, build_engine
from fourdh_batch.pipeline.records import ChunkResult
from fourdh_batch.pipeline.shard import VideoOutcome
from fourdh_batch.types import FrameChunk

logger = logging.getLogger(__name__)

REPORT_S = 2.0  # between two reports of a unit's progress
# What Ray raises where a node, its processes or what they hold cannot be reached: nobody's fault.
LOST_WITH_A_NODE = (
    *(ActorUnavailableError, LocalRayletDiedError, NodeDiedError, ObjectLostError),
    *(ObjectStoreFullError, OutOfDiskError, RuntimeEnvSetupError),
)


@dataclass(frozen=True, slots=True)
class UnitResult:
    """How a unit ended.

    Attributes:
        outcomes: of the videos that are finished.
        unread: by id, why the store did not hand out the others.
    """

    outcomes: list[VideoOutcome]
    unread: dict[str, StorageError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """Where a model process has started."""

    node_id: str
    device: str


class SharedEngine:
    """One set of models for several threads, whose chunks share batches.

    Whoever gets the lock first computes all chunks that wait; a chunk's result does not depend
    on its companions.

    Args:
        engine: the models.
        on_busy: told the seconds of every call of them.
    """

    def __init__(
        self, engine: Engine, on_busy: Callable[[float], None] = lambda seconds: None
    ) -> None:
        self._engine = engine
        self._on_busy = on_busy
        self._lock = threading.Lock()
        self._waiting: deque[tuple[FrameChunk, Future[ChunkResult]]] = deque()

    def run(self, chunks: Sequence[FrameChunk]) -> list[ChunkResult | VideoError]:
        """Results in the order of the chunks; other errors of the models are raised."""
        tickets: list[Future[ChunkResult]] = [Future() for _ in chunks]
        self._waiting.extend(zip(chunks, tickets, strict=True))
        with self._lock, about(shard="", unit=""):  # the chunks may be of other units
            if not all(ticket.done() for ticket in tickets):
                batch = []
                while self._waiting:
                    batch.append(self._waiting.popleft())
                start = time.perf_counter()
                self._compute(batch)
                self._on_busy(time.perf_counter() - start)
        results: list[ChunkResult | VideoError] = []
        for ticket in tickets:
            try:
                results.append(ticket.result())
            except VideoError as error:
                results.append(error)
        return results

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
    """Holds the models of one GPU (or of some cores) and works on a few units at once."""

    def __init__(self, config: JobConfig, run: str = "") -> None:
        self._config = config
        self._metrics = begin_process(config)
        self._engine: SharedEngine | Exception
        try:
            with about(run=run):
                self._engine = SharedEngine(build_engine(config), self._on_call)
        except Exception as error:  # noqa: BLE001
            # Raised by the first call instead: an error of a constructor loses its type in Ray.
            self._engine = error

    def ready(self) -> ModelPlace:
        """Where the models are, once they are loaded; raises what loading them raised."""
        if isinstance(self._engine, Exception):
            raise self._engine
        return ModelPlace(ray.get_runtime_context().get_node_id(), device_name())

    def _on_call(self, seconds: float) -> None:
        self._metrics.count("model_calls")
        self._metrics.count("model_busy_seconds", seconds)

    def process(self, unit: Unit, tracker: Any, journal: Any) -> UnitResult:
        """A unit from its files to finished rows.

        Raises:
            WorkerDiedError, DecodeStalledError: its decoder died or hung; names the video.
            RayError: its tracker died.
            FourdhError: what the models or the store raised.
        """
        with about(**unit.log_fields):
            return self._process(unit, tracker, journal)

    def _process(self, unit: Unit, tracker: Any, journal: Any) -> UnitResult:
        assert not isinstance(self._engine, Exception)
        ahead = 0 if unit.alone else self._config.cluster.chunks_ahead
        unacknowledged: deque[Any] = deque()
        ended: dict[int, StorageError | None] = {}
        opened, reported = -1, -math.inf
        laps = Laps(self._metrics)
        try:
            num_frames = start = ray.get(tracker.begin.remote(unit))
            laps.end(TRACKER)
            for item in self._decode(unit, start):
                laps.end(DECODE)
                if isinstance(item, Opening):
                    opened = item.number
                    journal.report.remote(unit.key, opened, num_frames)
                    reported = time.monotonic()
                    continue
                events, frames = self._reconstruct(self._engine, item, ended)
                num_frames += frames
                laps.end(MODELS)
                if events:
                    unacknowledged.append(tracker.work.remote(unit.key, events))
                    self._metrics.change(BACKLOG, 1)
                while len(unacknowledged) > ahead:
                    ray.get(unacknowledged[0])
                    unacknowledged.popleft()
                    self._metrics.change(BACKLOG, -1)
                laps.end(TRACKER)
                self._count(events, frames)
                # Not every chunk: a thousand GPUs have twenty thousand of them a second.
                if time.monotonic() - reported > REPORT_S or unit.alone:
                    journal.report.remote(unit.key, opened, num_frames)
                    reported = time.monotonic()
                if len(ended) == len(unit.videos):
                    break
            ray.get([*unacknowledged, journal.report.remote(unit.key, opened, num_frames)])
            if len(ended) < len(unit.videos):
                raise WorkerDiedError(
                    "the decoder ended without saying how",
                    video=unit.videos[max(opened, 0)].video_id,
                    stage="decode",
                )
            unread = {unit.videos[n].video_id: error for n, error in ended.items() if error}
            outcomes = ray.get(tracker.close.remote(unit.key))
            laps.end(TRACKER)
            return UnitResult(outcomes, unread)
        except RayTaskError as error:
            # An error of the tracker's own code arrives wrapped; the scheduler wants its kind.
            if isinstance(error.cause, FourdhError):
                raise error.cause from error
            raise
        finally:
            self._metrics.change(BACKLOG, -len(unacknowledged))

    def _count(self, events: Sequence[Event], num_frames: int) -> None:
        results = [event for event in events if isinstance(event, ChunkResult)]
        self._metrics.count("chunks", len(results))
        self._metrics.count("frames", num_frames)
        self._metrics.count("crops", sum(len(result.people) for result in results))

    def _reconstruct(
        self,
        engine: SharedEngine,
        items: Sequence[tuple[int, Decoded]],
        ended: dict[int, StorageError | None],
    ) -> tuple[list[Event], int]:
        """What the tracker is to be told of these items, and how many frames they had."""
        before = set(ended)
        chunks = [item for n, item in items if isinstance(item, FrameChunk) and n not in before]
        results = iter(engine.run(chunks))
        events: list[Event] = []
        for number, item in items:
            if number in ended:  # an error of the models came before
                if isinstance(item, FrameChunk) and number not in before:
                    next(results)
                continue
            event: Event
            if isinstance(item, FrameChunk):
                event = next(results)
            elif isinstance(item, StorageError):
                event = Dropped()
            else:
                event = item
            if not isinstance(event, ChunkResult):
                ended[number] = item if isinstance(item, StorageError) else None
            events.append(event)
        return events, sum(chunk.num_frames for chunk in chunks)

    def _decode(self, unit: Unit, start: int) -> Iterator[Opening | list[tuple[int, Decoded]]]:
        config = self._config
        # Half of what a decoder of short videos hands out are small notes.
        depth = config.cluster.chunks_ahead * (1 if len(unit.videos) == 1 else 2)
        stream = decode_videos.options(
            num_cpus=config.cluster.cpus_per_decoder,
            _generator_backpressure_num_objects=depth,
        ).remote(unit, config, start)
        opened = reached = 0
        timeout_s: float | None = None  # waiting for a free core is nobody's fault
        try:
            while True:
                ready, _ = ray.wait([stream], timeout=timeout_s)
                if not ready:
                    raise DecodeStalledError(
                        f"no frames for {config.video.stall_timeout_s:g} s",
                        video=unit.videos[opened].video_id,
                        frame_index=reached,
                        stage="decode",
                    )
                try:
                    item = ray.get(next(stream))
                except StopIteration:
                    return
                except (RayTaskError, *LOST_WITH_A_NODE):
                    raise
                except RayError as error:
                    if timeout_s is None:  # it had not begun with any video
                        raise
                    raise WorkerDiedError(
                        f"the decoder died: {type(error).__name__}: {error}",
                        video=unit.videos[opened].video_id,
                        frame_index=reached,
                        stage="decode",
                    ) from error
                if isinstance(item, Opening):
                    opened, reached = item.number, start if item.number == 0 else 0
                    timeout_s = config.video.stall_timeout_s
                else:
                    chunks = [c for n, c in item if n == opened and isinstance(c, FrameChunk)]
                    reached = int(chunks[-1].frame_index[-1]) + 1 if chunks else reached
                yield item
        finally:
            ray.cancel(stream, force=True)


def device_name() -> str:
    """The GPU of this process by its name, else `cpu`."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


ModelActor: Any = ray.remote(max_restarts=0, max_task_retries=0)(ModelWorker)

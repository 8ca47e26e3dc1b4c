"""The scheduler: what runs where, what happens when something dies, what is published when.

All decisions of a job are here. Retries are ours, not Ray's: a unit (one video) is idempotent, so
it may run again anywhere. Who is to blame for a death:

- infrastructure (a node is gone, an actor is unreachable, the unit had not begun): run again, free;
- the unit was running when its model actor, tracker or decoder died, or it stopped moving: it is a
  suspect and runs again *alone*; if it dies alone it is quarantined with the evidence;
- an unexpected error of our own code: again once, then quarantine;
- storage: again, then the shard fails and the job goes on;
- wrong settings, weights or schema: the job stops.

Whether a unit was running is read from the journal, not guessed from the order of errors, and
finished rows are looked for before anything is redone.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    RayActorError,
    RayError,
    RayTaskError,
)

from fourdh_batch.cluster.decoding import Journal
from fourdh_batch.cluster.model_actor import ModelActor
from fourdh_batch.cluster.tracker_actor import TrackerActor, publish_shard_task
from fourdh_batch.config import JobConfig, require
from fourdh_batch.errors import (
    CheckpointError,
    ConfigError,
    DecodeStalledError,
    FourdhError,
    SchemaError,
    StorageError,
    VideoError,
    WorkerDiedError,
)
from fourdh_batch.pipeline.engine import model_card
from fourdh_batch.pipeline.job import (
    STORAGE_ATTEMPTS,
    Ledger,
    OnProgress,
    RunReport,
    bring_up_to_date,
)
from fourdh_batch.pipeline.plan import Shard, Video, read_corpus
from fourdh_batch.pipeline.records import ModelCard
from fourdh_batch.pipeline.shard import (
    QUARANTINED,
    ShardReport,
    VideoOutcome,
    finished_outcome,
    record_failure,
)
from fourdh_batch.tables.writer import VideoSpool

logger = logging.getLogger(__name__)

POLL_S = 0.5
STARVING_S = 60.0  # without a running unit for so long, say what is lacking
FREE_RETRIES = 3  # then even an innocent-looking unit is a suspect
MAX_DEATHS_WITHOUT_WORK = 3
MAX_UNEXPECTED_ERRORS_IN_A_ROW = 5
NODE_DIED = "its node has died"  # Ray's words in an ActorDiedError; pinned by a test


class Blame(Enum):
    """Whose fault it is that a unit did not finish."""

    NOBODY = "nobody"  # run again, free of charge
    SUSPECT = "suspect"  # run again alone
    CODE = "code"  # run again once
    STORAGE = "storage"
    STOP = "stop"  # the job cannot go on


def blame(error: BaseException, *, had_begun: bool) -> Blame:
    """Classify what came out of a unit instead of its outcome.

    Args:
        error: as raised by `ray.get`.
        had_begun: the journal knows the unit.
    """
    cause: BaseException = error
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        cause = error.cause
    if isinstance(cause, (ConfigError, CheckpointError, SchemaError)):
        return Blame.STOP
    if isinstance(cause, StorageError):
        return Blame.STORAGE
    if isinstance(cause, VideoError):
        return Blame.SUSPECT
    if isinstance(cause, (ActorUnavailableError, NodeDiedError)):
        return Blame.NOBODY
    if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):
        if NODE_DIED in str(cause):
            return Blame.NOBODY
        return Blame.SUSPECT if had_begun else Blame.NOBODY
    return Blame.CODE


@dataclass(slots=True)
class _Unit:
    shard: Shard
    video: Video
    attempts: int = 0
    free_retries: int = 0
    alone: bool = False

    @property
    def key(self) -> str:
        turn = self.attempts + self.free_retries
        return f"{self.shard.shard_id}/{self.video.video_id}#{turn}"


@dataclass(slots=True, eq=False)
class _Lane:
    """A model actor, its trackers and what they work on."""

    model: Any
    trackers: list[Any]
    running: dict[Any, tuple[_Unit, int]] = field(default_factory=dict)  # ref -> unit, tracker

    @property
    def is_reserved(self) -> bool:
        return any(unit.alone for unit, _ in self.running.values())


def run_job(config: JobConfig, *, on_progress: OnProgress = lambda progress: None) -> RunReport:
    """Bring the tables under `config.output` up to date with the corpus `config.input`.

    Raises:
        ConfigError, ManifestError, CheckpointError, SchemaError: before any work is done.
        OutputInUseError: another driver is writing to this output.
    """
    require(config, "input", "output", "hmr.weights")
    card = model_card(config)
    videos = read_corpus(config.input, limit=config.plan.limit)

    def work(ledger: Ledger) -> None:
        with _ray(config):
            _Scheduler(config, card, ledger).run()

    return bring_up_to_date(config, card, videos, work, on_progress=on_progress)


class _Scheduler:
    """One run over the shards that are not up to date."""

    def __init__(self, config: JobConfig, card: ModelCard, ledger: Ledger) -> None:
        self._config = config
        self._card = card
        self._ledger = ledger
        self._journal = Journal.remote()
        self._lanes: list[_Lane] = []
        self._queue: deque[_Unit] = deque()
        self._publishing: dict[Any, tuple[Shard, list[VideoOutcome], int]] = {}
        self._deaths_without_work = 0
        self._unexpected: set[str] = set()  # videos that met an error of our own code
        self._last_seen_running = time.monotonic()

    def run(self) -> None:
        units = [_Unit(shard, video) for shard in self._ledger.shards for video in shard.videos]
        self._queue.extend(units)
        # What an interrupted run has finished needs no model at all.
        for unit in units:
            if outcome := self._finished(unit):
                self._queue.remove(unit)
                self._done(unit, outcome)
        num_lanes = min(self._num_lanes(), max(1, len(self._queue)))
        while self._queue or self._publishing or any(lane.running for lane in self._lanes):
            while self._queue and len(self._lanes) < num_lanes:
                self._lanes.append(self._start_lane())
            self._dispatch()
            self._collect()
            self._give_up_stalled()
            self._say_what_is_lacking()
            self._ledger.tick(self._frames_running)
        self._ledger.close()
        for lane in self._lanes:
            self._kill(lane)

    def _frames_running(self) -> int:
        return sum(frames for frames, _ in ray.get(self._journal.snapshot.remote()).values())

    def _num_lanes(self) -> int:
        """As many as asked for, or one per GPU; but every lane needs cores for a decoder too."""
        cluster = self._config.cluster
        resources = ray.cluster_resources()
        share = cluster.gpus_per_actor + cluster.trackers_per_actor * self._tracker_share()
        gpus = resources.get("GPU", 0)
        fitting = int(gpus) * int(1 / share + 1e-9) if share <= 1 else int(gpus / share)
        wanted = cluster.gpu_actors or max(1, fitting)
        cpus = resources.get("CPU", 0)
        room = max(1, int(cpus / (cluster.cpus_per_actor + cluster.cpus_per_decoder)))
        if room < wanted:
            logger.warning(
                "%d model processes instead of %d: each needs %g CPUs and %g for a decoder, "
                "the cluster has %g",
                room,
                wanted,
                cluster.cpus_per_actor,
                cluster.cpus_per_decoder,
                cpus,
            )
        return min(room, wanted)

    def _start_lane(self) -> _Lane:
        cluster = self._config.cluster
        model = ModelActor.options(
            num_cpus=cluster.cpus_per_actor,
            num_gpus=cluster.gpus_per_actor if self._wants_gpu() else 0,
            max_concurrency=cluster.units_per_actor + 1,
        ).remote(self._config)
        trackers = [self._start_tracker() for _ in range(cluster.trackers_per_actor)]
        return _Lane(model, trackers)

    def _start_tracker(self) -> Any:
        share = self._tracker_share()
        return TrackerActor.options(num_cpus=0, num_gpus=share).remote(self._config, self._card)

    def _tracker_share(self) -> float:
        """What a tracking process takes of a GPU: nothing without a network to run on it."""
        wants_gpu = self._config.tracker.device != "cpu" and self._wants_gpu()
        has_networks = self._config.tracker.has_networks
        return self._config.cluster.gpus_per_tracker if has_networks and wants_gpu else 0.0

    def _wants_gpu(self) -> bool:
        has_gpu = ray.cluster_resources().get("GPU", 0) > 0
        return has_gpu and not self._config.hmr.device.startswith("cpu")

    def _dispatch(self) -> None:
        """Feed idle places; suspects wait for an empty lane."""
        suspects = any(unit.alone for unit in self._queue)
        for number, lane in enumerate(self._lanes):
            while self._queue and not lane.is_reserved:
                if suspects and number == 0 and lane.running:
                    break  # this lane drains, so that a suspect gets it alone
                if len(lane.running) >= self._config.cluster.units_per_actor:
                    break
                unit = next((u for u in self._queue if u.alone is not bool(lane.running)), None)
                if unit is None and not lane.running:
                    unit = self._queue[0]
                if unit is None:
                    break
                self._queue.remove(unit)
                load = [0] * len(lane.trackers)
                for _, index in lane.running.values():
                    load[index] += 1
                index = load.index(min(load))
                tracker = lane.trackers[index]
                ref = lane.model.process.remote(
                    unit.shard, unit.video, unit.key, tracker, self._journal
                )
                lane.running[ref] = (unit, index)

    def _collect(self) -> None:
        refs = [ref for lane in self._lanes for ref in lane.running] + list(self._publishing)
        if not refs:
            return
        ready, _ = ray.wait(refs, timeout=POLL_S)
        for ref in ready:
            if ref in self._publishing:
                self._collect_published(ref)
            else:
                self._collect_unit(ref)

    def _collect_unit(self, ref: Any) -> None:
        lane = next(lane for lane in self._lanes if ref in lane.running)
        unit, index = lane.running.pop(ref)
        try:
            outcome: VideoOutcome = ray.get(ref)
        except Exception as error:  # noqa: BLE001 - every kind is sorted by `blame`
            if isinstance(error, RayActorError) and not isinstance(error, RayTaskError):
                # The model process is gone, and with it all that it was working on.
                lane.running[ref] = (unit, index)
                self._end_lane(lane, {u.key: error for u, _ in lane.running.values()})
                self._count_death(error)
                return
            had_begun = unit.key in ray.get(self._journal.snapshot.remote())
            self._journal.forget.remote(unit.key)
            if isinstance(_cause(error), RayActorError):  # raised inside: the tracker is gone
                lane.trackers[index] = self._start_tracker()
            else:
                lane.trackers[index].drop.remote(unit.key)
            if blame(error, had_begun=had_begun) is Blame.CODE:
                # Perhaps it is this process that is broken: the next attempt gets a new one.
                self._end_lane(lane, {})
            self._judge(unit, error, had_begun)
            return
        self._journal.forget.remote(unit.key)
        self._deaths_without_work = 0
        self._unexpected.clear()
        self._done(unit, outcome)

    def _judge(self, unit: _Unit, error: Exception, had_begun: bool) -> None:
        if outcome := self._finished(unit):  # a death can swallow the last reply
            self._done(unit, outcome)
            return
        verdict = blame(error, had_begun=had_begun)
        if verdict is Blame.NOBODY:
            unit.free_retries += 1
            if had_begun and unit.free_retries > FREE_RETRIES:
                verdict = Blame.SUSPECT
        logger.warning(
            "shard %s, video %s: attempt %d ended with %s (%s): %s",
            unit.shard.shard_id,
            unit.video.video_id,
            unit.attempts + 1,
            type(_cause(error)).__name__,
            verdict.value,
            str(_cause(error)).strip().splitlines()[0] if str(_cause(error)).strip() else "",
        )
        if verdict is Blame.STOP:
            raise _cause(error)
        if verdict is not Blame.NOBODY:
            unit.attempts += 1
        if verdict is Blame.CODE:
            self._unexpected.add(f"{unit.shard.shard_id}/{unit.video.video_id}")
            if len(self._unexpected) >= MAX_UNEXPECTED_ERRORS_IN_A_ROW:
                raise FourdhError(
                    f"stopped: {len(self._unexpected)} videos in a row met an unexpected "
                    f"error; the last one was\n{error}"
                ) from error
        if verdict is Blame.STORAGE and unit.attempts >= STORAGE_ATTEMPTS:
            self._fail_shard(unit.shard, str(_cause(error)))
            return
        dangerous = verdict is Blame.CODE or (verdict is Blame.SUSPECT and unit.alone)
        if dangerous and unit.attempts >= self._config.cluster.attempts:
            self._done(unit, self._quarantine(unit, _cause(error)))
            return
        unit.alone = unit.alone or verdict is Blame.SUSPECT
        self._queue.append(unit)

    def _quarantine(self, unit: _Unit, cause: BaseException) -> VideoOutcome:
        if not isinstance(cause, VideoError):
            text = f"{type(cause).__name__}: {cause}"
            cause = WorkerDiedError(text[:2000], video=unit.video.video_id, stage="reconstruct")
        return record_failure(
            self._ledger.store,
            self._config,
            self._card,
            unit.shard,
            unit.video,
            cause,
            status=QUARANTINED,
            attempts=unit.attempts,
        )

    def _finished(self, unit: _Unit) -> VideoOutcome | None:
        spool = VideoSpool(self._ledger.store, unit.shard.shard_id, unit.video.video_id)
        return finished_outcome(spool, unit.video, self._card)

    def _done(self, unit: _Unit, outcome: VideoOutcome) -> None:
        if outcomes := self._ledger.done(unit.shard, outcome):
            self._publish(unit.shard, outcomes, attempt=1)

    def _publish(self, shard: Shard, outcomes: list[VideoOutcome], attempt: int) -> None:
        ref = publish_shard_task.options(num_cpus=0).remote(
            self._config, self._card, shard, outcomes
        )
        self._publishing[ref] = (shard, outcomes, attempt)

    def _collect_published(self, ref: Any) -> None:
        shard, outcomes, attempt = self._publishing.pop(ref)
        try:
            published: ShardReport = ray.get(ref)
        except Exception as error:
            if blame(error, had_begun=True) is Blame.STOP:
                raise _cause(error) from error
            if attempt >= STORAGE_ATTEMPTS:
                self._fail_shard(shard, str(_cause(error)))
            else:
                self._publish(shard, outcomes, attempt + 1)
            return
        self._ledger.published(published)

    def _fail_shard(self, shard: Shard, reason: str) -> None:
        self._ledger.fail(shard, reason)
        self._queue = deque(u for u in self._queue if u.shard.shard_id != shard.shard_id)

    def _give_up_stalled(self) -> None:
        limit = self._config.cluster.progress_timeout_s
        idle = ray.get(self._journal.snapshot.remote())
        for lane in list(self._lanes):
            errors: dict[str, Exception] = {}
            for unit, _ in lane.running.values():
                num_frames, idle_s = idle.get(unit.key, (0, 0.0))
                if idle_s > limit:
                    errors[unit.key] = DecodeStalledError(
                        f"no progress for {idle_s:.0f} s",
                        video=unit.video.video_id,
                        frame_index=num_frames,
                        stage="reconstruct",
                    )
            if errors:
                self._end_lane(lane, errors)

    def _count_death(self, error: BaseException) -> None:
        self._deaths_without_work += 1
        if self._deaths_without_work >= MAX_DEATHS_WITHOUT_WORK:
            raise FourdhError(
                f"model processes died {self._deaths_without_work} times in a row before "
                f"finishing anything; the last one said:\n{error}"
            )

    def _say_what_is_lacking(self) -> None:
        now = time.monotonic()
        if self._publishing or ray.get(self._journal.snapshot.remote()):
            self._last_seen_running = now
        if now - self._last_seen_running < STARVING_S:
            return
        self._last_seen_running = now
        cluster = self._config.cluster
        logger.warning(
            "nothing has run for %.0f s. A model process needs %g CPUs (and %g GPUs where there "
            "are any), each of its decoders %g CPUs; the cluster has %s, of which free %s",
            STARVING_S,
            cluster.cpus_per_actor,
            cluster.gpus_per_actor,
            cluster.cpus_per_decoder,
            {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")},
            {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")},
        )

    def _end_lane(self, lane: _Lane, errors: dict[str, Exception]) -> None:
        """A lane has died or must; its units without an error run again free of charge."""
        running = [unit for unit, _ in lane.running.values()]
        lane.running.clear()
        self._lanes.remove(lane)
        self._kill(lane)
        begun = ray.get(self._journal.snapshot.remote())
        for unit in running:
            self._journal.forget.remote(unit.key)
            if unit.key in errors:
                self._judge(unit, errors[unit.key], unit.key in begun)
            else:
                unit.free_retries += 1
                self._queue.append(unit)

    def _kill(self, lane: _Lane) -> None:
        for actor in (lane.model, *lane.trackers):
            ray.kill(actor)


def _cause(error: BaseException) -> BaseException:
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return error.cause
    return error


@contextmanager
def _ray(config: JobConfig) -> Iterator[None]:
    """Connect to the cluster that the settings name, or start one here; leave it as it was."""
    if ray.is_initialized():
        yield
        return
    on_terminate = signal.getsignal(signal.SIGTERM)
    cluster = config.cluster
    local = cluster.address == "local" or (
        cluster.address == "auto" and "RAY_ADDRESS" not in os.environ
    )
    if local:
        # Actors mostly wait for each other; a small machine must still be able to hold them all.
        lanes = max(1, cluster.gpu_actors)
        decoders = lanes * cluster.units_per_actor * cluster.cpus_per_decoder
        wanted = math.ceil(lanes * cluster.cpus_per_actor + decoders)
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, wanted),
            include_dashboard=False,
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
    else:
        address = None if cluster.address == "auto" else cluster.address
        ray.init(address=address, logging_level=logging.WARNING)
    if on_terminate is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own in the place
    try:
        yield
    finally:
        ray.shutdown()

"""The scheduler: what runs where, what happens when something dies, what is published when.

All decisions of a job are here. Retries are ours, not Ray's: a unit (one long video, or some short
ones of a shard) is idempotent, so it may run again anywhere. Who is to blame for a death:

- infrastructure (a node is gone, an actor is unreachable, the unit had not begun): again, free;
- a video was being worked on when its model actor, tracker or decoder died, or it stopped moving:
  it is a suspect and runs again *alone*; if it dies alone without having got further, it is
  quarantined with the evidence;
- an unexpected error of our own code: again once, then quarantine;
- storage: again, then the shard fails and the job goes on;
- wrong settings or weights: the job stops.

Which video was being worked on is read from the journal, not guessed from the order of errors, and
finished rows are looked for before anything is redone.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fourdh_batch.cluster.decoding import Journal, JournalEntry, Unit
from fourdh_batch.cluster.metrics import FAILED, PUBLISHED, Metrics
from fourdh_batch.cluster.model_actor import LOST_WITH_A_NODE, ModelActor, ModelPlace, UnitResult
from fourdh_batch.cluster.tracker_actor import TrackerActor, publish_shard_task
from fourdh_batch.config import JobConfig, require
from fourdh_batch.errors import (
    CheckpointError,
    ConfigError,
    DecodeStalledError,
    FourdhError,
    LostRowsError,
    SchemaError,
    StorageError,
    VideoError,
    WorkerDiedError,
)
from fourdh_batch.logs import JSON, about
from fourdh_batch.pipeline.corpus import remembered_corpus
from fourdh_batch.pipeline.engine import model_card
from fourdh_batch.pipeline.job import (
    STORAGE_ATTEMPTS,
    Ledger,
    OnProgress,
    RunReport,
    bring_up_to_date,
)
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.records import ModelCard
from fourdh_batch.pipeline.shard import (
    QUARANTINED,
    STATUSES,
    SavedWork,
    ShardReport,
    VideoOutcome,
    record_failure,
    report_of,
)
from fourdh_batch.storage import Store, is_local, local_path, safe_key
from fourdh_batch.tables.manifest import CommitRecord, commit_key
from fourdh_batch.tables.writer import WORK, discard_work

logger = logging.getLogger(__name__)

POLL_S = 0.5
LOOK_AROUND_S = 1.0  # between two looks at what stalls, what is lacking, what has joined
STARVING_S = 60.0  # without a running unit for so long, say what is lacking
RESTART_PAUSE_S = 30.0  # after a model process that did not start
MIN_PUBLISHING = 8  # shards that are merged and written at a time, or two per model process
MAX_FAILED_SHARDS_IN_A_ROW = 20
FREE_RETRIES = 3  # then even an innocent-looking unit is a suspect
MAX_FAILED_STARTS = 3  # of model processes, in a row
MAX_DEATHS_WITHOUT_WORK = 10  # then it is not a handful of bad videos in a row
MAX_UNEXPECTED_ERRORS_IN_A_ROW = 5
MAX_GIVEN_UP_IN_A_ROW = 50  # then it is the machines, the weights or the store
CLOSE_TIMEOUT_S = 60.0  # for a tracker to save what is finished of a unit that died elsewhere
SUBMITTED = "working_dir_files"  # in the path where Ray runs a submitted job
NODE_DIED = "its node has died"  # Ray's words in an ActorDiedError; pinned by a test
_MIB = 1 << 20


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
    if isinstance(cause, (ConfigError, CheckpointError)):
        return Blame.STOP
    if isinstance(cause, StorageError):
        return Blame.STORAGE
    if isinstance(cause, VideoError):
        return Blame.SUSPECT
    if isinstance(cause, LOST_WITH_A_NODE):
        return Blame.NOBODY
    if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):
        if NODE_DIED in str(cause):
            return Blame.NOBODY
        return Blame.SUSPECT if had_begun else Blame.NOBODY
    return Blame.CODE


@dataclass(slots=True, eq=False)
class _Pending:
    """Videos of a shard that wait for a model process."""

    shard: Shard  # with these videos alone
    saved: str = ""
    alone: bool = False
    free_retries: int = 0


@dataclass(slots=True, eq=False)
class _Lane:
    """A model actor, its trackers and what they work on."""

    model: Any
    starting: Any  # ref of `ModelWorker.ready`, None once it is
    trackers: list[Any] = field(default_factory=list)
    node_id: str = ""
    since: float = 0.0
    num_begun: int = 0  # units so far
    running: dict[Any, _Running] = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        return self.starting is None

    @property
    def is_reserved(self) -> bool:
        return any(running.pending.alone for running in self.running.values())


@dataclass(frozen=True, slots=True)
class _Running:
    pending: _Pending
    unit: Unit
    index: int  # of its tracker in the lane
    tracker: Any


def run_job(config: JobConfig, *, on_progress: OnProgress = lambda progress: None) -> RunReport:
    """Bring the tables under `config.output` up to date with the corpus `config.input`.

    Raises:
        ConfigError, ManifestError, CheckpointError, SchemaError: before any work is done.
        OutputInUseError: another driver is writing to this output.
    """
    require(config, "input", "output", "hmr.weights")
    config = replace(config, output=_place_for_all(config.output))
    card = model_card(config)
    videos = remembered_corpus(config, Store(config.output))

    def work(ledger: Ledger) -> None:
        with _ray(config), about(run=ledger.report.run_id):
            _Scheduler(config, card, ledger).run()

    return bring_up_to_date(config, card, videos, work, on_progress=on_progress)


def _place_for_all(output: str) -> str:
    """The output as processes name it whose working folder is another one."""
    if not is_local(output) or local_path(output).is_absolute():
        return output
    if SUBMITTED in Path.cwd().parts:
        raise ConfigError(
            f"output={output}: expected an absolute path or object storage, got a path in the "
            "copy of the working folder that Ray makes for a submitted job and throws away"
        )
    return str(local_path(output).absolute())


class _Scheduler:
    """One run over the shards that are not up to date."""

    def __init__(self, config: JobConfig, card: ModelCard, ledger: Ledger) -> None:
        self._config = config
        self._card = card
        self._ledger = ledger
        # What it says is lost with its node, so it stays where this process is.
        here = ray.get_runtime_context().get_node_id()
        self._journal = Journal.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            max_restarts=-1,  # what runs is reported again at its next chunk
            max_task_retries=-1,
        ).remote()
        self._run_id = ledger.report.run_id
        self._metrics = _begin_metrics(config.dataset)
        self._lanes: list[_Lane] = []
        self._queue: deque[_Pending] = deque()
        self._publishing: dict[Any, tuple[Shard, list[VideoOutcome], int]] = {}
        self._attempts: Counter[tuple[str, str]] = Counter()
        self._reached: dict[tuple[str, str], int] = {}  # frame of the state saved at the last death
        self._storage_attempts: Counter[tuple[str, str]] = Counter()
        self._failed_in_a_row = 0
        self._start_again_at = -math.inf
        self._num_units = 0
        self._has_more = True
        self._in_progress = {key.split("/")[1] for key, _ in ledger.store.list(WORK)}
        self._deaths_without_work = self._failed_starts = self._given_up_in_a_row = 0
        self._unexpected: set[tuple[str, str]] = set()  # videos that met an error of our own code
        self._looked_around = -math.inf
        self._last_seen_running = time.monotonic()
        self._wanted_lanes = 1
        self._said_room: int | None = None

    def run(self) -> None:
        try:
            while True:
                self._look_around()
                self._take_shards()
                if not (self._queue or self._publishing or self._is_running):
                    break
                self._start_lanes()
                self._dispatch()
                self._collect()
                self._ledger.tick(self._frames_running)
            self._ledger.close()
        finally:
            self._ledger.report.num_units = self._num_units
            for lane in list(self._lanes):
                self._remove(lane)
            with suppress(RayError):
                num_frames = ray.get(self._journal.num_frames.remote(), timeout=CLOSE_TIMEOUT_S)
                self._ledger.report.frames_run = num_frames
            self._metrics.count_storage_retries(until_now=True)

    @property
    def _is_running(self) -> bool:
        return any(lane.running for lane in self._lanes)

    # --- what there is to do -------------------------------------------------------------------

    def _take_shards(self) -> None:
        """Keep the queue long enough for all model processes; the rest stays in the plan."""
        places = self._wanted_lanes * self._config.cluster.units_per_actor
        publishing = max(MIN_PUBLISHING, 2 * self._wanted_lanes)
        while self._has_more and len(self._queue) <= places and len(self._publishing) < publishing:
            work = self._ledger.next_shard()
            if work is None:
                self._has_more = False
                return
            shard = work.shard
            if work.problem:
                self._fail_shard(shard, work.problem)
                continue
            todo = replace(
                shard, videos=tuple(v for v in shard.videos if v.video_id not in work.keep)
            )
            if not todo.videos:  # only what the corpus says of them, or others are gone
                self._publish(shard, [], attempt=1)
            elif safe_key(shard.shard_id) in self._in_progress:
                self._enqueue(*self._take_over(todo))
            else:
                self._enqueue(todo)

    def _take_over(self, shard: Shard) -> tuple[Shard, SavedWork | None]:
        """Take over what earlier attempts finished of these videos; the others, what they saved.

        Where the store does not tell, the shard fails, and there are no others.
        """
        try:
            saved = SavedWork(self._ledger.store, shard, self._card)
        except StorageError as error:
            self._fail_shard(shard, str(error))
            return replace(shard, videos=()), None
        for outcome in saved.outcomes.values():
            self._done(shard, outcome)
        left = tuple(v for v in shard.videos if v.video_id not in saved.outcomes)
        return replace(shard, videos=left), saved

    def _enqueue(
        self,
        shard: Shard,
        saved: SavedWork | None = None,
        *,
        alone: bool = False,
        free_retries: int = 0,
    ) -> None:
        """Cut videos of a shard into units: those with a saved state each its own."""
        group: list[Video] = []
        num_bytes = 0
        cluster = self._config.cluster
        # Towards the end units get smaller, so that nobody waits long for the last one.
        places = 2 * self._wanted_lanes * cluster.units_per_actor
        most = min(cluster.videos_per_unit, max(1, self._ledger.num_videos_left // places))

        def close() -> None:
            nonlocal num_bytes
            if group:
                part = replace(shard, videos=tuple(group))
                self._queue.append(_Pending(part, alone=alone, free_retries=free_retries))
                group.clear()
                num_bytes = 0

        for video in shard.videos:
            if name := saved.unfinished.get(video.video_id) if saved else None:
                part = replace(shard, videos=(video,))
                self._queue.append(_Pending(part, name, alone, free_retries))
                continue
            heavy = num_bytes + video.num_bytes > cluster.unit_mb * _MIB
            if group and (heavy or len(group) >= most):
                close()
            group.append(video)
            num_bytes += video.num_bytes
        close()

    # --- model processes -----------------------------------------------------------------------

    def _look_around(self) -> None:
        now = time.monotonic()
        if now - self._looked_around < LOOK_AROUND_S:
            return
        self._looked_around = now
        journal = ray.get(self._journal.snapshot.remote())
        self._give_up_stalled(journal)
        self._say_what_is_lacking(journal)
        self._wanted_lanes = self._num_lanes()
        self._release_idle()
        self._metrics.show(
            units_queued=len(self._queue),
            units_running=sum(len(lane.running) for lane in self._lanes),
            models_wanted=self._wanted_lanes,
            models_ready=sum(lane.is_ready for lane in self._lanes),
            models_starting=sum(not lane.is_ready for lane in self._lanes),
            trackers=sum(len(lane.trackers) for lane in self._lanes),
            shards_publishing=len(self._publishing),
            videos_left=self._ledger.num_videos_left,
        )

    def _frames_running(self) -> int:
        return sum(entry.num_frames for entry in ray.get(self._journal.snapshot.remote()).values())

    def _num_lanes(self) -> int:
        """As many as asked for, or one per GPU; but every lane needs cores for a decoder too.

        With `cluster.max_gpu_actors` also more than fit: they wait, and the autoscaler sees it.
        """
        cluster = self._config.cluster
        resources = ray.cluster_resources()
        share = cluster.gpus_per_actor + cluster.trackers_per_actor * self._tracker_share()
        gpus = resources.get("GPU", 0)
        fitting = int(gpus) * int(1 / share + 1e-9) if share <= 1 else int(gpus / share)
        wanted = cluster.gpu_actors or max(1, fitting)
        if cluster.max_gpu_actors:
            return max(wanted, cluster.max_gpu_actors)
        cpus = resources.get("CPU", 0)
        room = max(1, int(cpus / (cluster.cpus_per_actor + cluster.cpus_per_decoder)))
        if room < wanted and room != self._said_room:
            self._said_room = room
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

    def _start_lanes(self) -> None:
        needed = min(self._wanted_lanes, len(self._queue) + sum(map(_is_busy, self._lanes)))
        cluster = self._config.cluster
        if time.monotonic() < self._start_again_at:
            return
        while self._queue and len(self._lanes) < needed:
            model = ModelActor.options(
                num_cpus=cluster.cpus_per_actor,
                num_gpus=cluster.gpus_per_actor if self._wants_gpu() else 0,
                max_concurrency=cluster.units_per_actor + 1,
            ).remote(self._config, self._run_id)
            self._lanes.append(_Lane(model, model.ready.remote()))

    def _start_tracker(self, node_id: str) -> Any:
        """Beside its model process where there is room, for what it is handed is large."""
        return TrackerActor.options(
            num_cpus=0,
            num_gpus=self._tracker_share(),
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=True),
        ).remote(self._config, self._card, self._run_id)

    def _tracker_share(self) -> float:
        """What a tracking process takes of a GPU: nothing without a network to run on it."""
        wants_gpu = self._config.tracker.device != "cpu" and self._wants_gpu()
        has_networks = self._config.tracker.has_networks
        return self._config.cluster.gpus_per_tracker if has_networks and wants_gpu else 0.0

    def _wants_gpu(self) -> bool:
        if self._config.hmr.device.startswith("cpu"):
            return False
        return ray.cluster_resources().get("GPU", 0) > 0 or self._config.hmr.device != "auto"

    def _release_idle(self) -> None:
        """Let processes go for which nothing is left, so that their nodes can go, too."""
        if self._has_more or self._queue:
            return
        idle = [lane for lane in self._lanes if not lane.running]
        for lane in idle[: len(self._lanes) - 1]:
            self._remove(lane)

    # --- units ---------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Feed idle places; suspects wait for an empty lane."""
        suspects = any(pending.alone for pending in self._queue)
        lanes = [lane for lane in self._lanes if lane.is_ready]
        for number, lane in enumerate(lanes):
            while self._queue and not lane.is_reserved:
                if suspects and number == 0 and lane.running:
                    break  # this lane drains, so that a suspect gets it alone
                if len(lane.running) >= self._config.cluster.units_per_actor:
                    break
                fits = (p for p in self._queue if p.alone is not bool(lane.running))
                pending = next(fits, None)
                if pending is None and not lane.running:
                    pending = self._queue[0]
                if pending is None:
                    break
                self._queue.remove(pending)
                if not lane.num_begun and not pending.alone:
                    pending = self._halved(pending)
                self._start_unit(lane, pending)

    def _halved(self, pending: _Pending) -> _Pending:
        """The first unit of a lane: half of it, the rest waits.

        Units that begin together and are equally long would end together, and the models would
        wait for the decoders of the next ones, every time.
        """
        videos = pending.shard.videos
        if len(videos) < 2 or pending.saved:
            return pending
        first, rest = (
            replace(pending, shard=replace(pending.shard, videos=part))
            for part in (videos[: len(videos) // 2], videos[len(videos) // 2 :])
        )
        self._queue.appendleft(rest)
        return first

    def _start_unit(self, lane: _Lane, pending: _Pending) -> None:
        load = [0] * len(lane.trackers)
        for running in lane.running.values():
            load[running.index] += 1
        index = load.index(min(load))
        self._num_units += 1
        lane.num_begun += 1
        key = f"{pending.shard.shard_id}/{pending.shard.videos[0].video_id}#{self._num_units}"
        unit = Unit(key, pending.shard, pending.saved, pending.alone, self._run_id)
        tracker = lane.trackers[index]
        ref = lane.model.process.remote(unit, tracker, self._journal)
        lane.running[ref] = _Running(pending, unit, index, tracker)

    def _collect(self) -> None:
        lane_of = {ref: lane for lane in self._lanes for ref in lane.running}
        starting = {lane.starting: lane for lane in self._lanes if not lane.is_ready}
        refs = [*lane_of, *starting, *self._publishing]
        if not refs:
            return
        ready, rest = ray.wait(refs, timeout=POLL_S)
        if rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for ref in ready:
            if ref in self._publishing:
                self._collect_published(ref)
            elif ref in starting:
                self._collect_started(starting[ref])
            elif ref in lane_of[ref].running:  # else its lane has ended meanwhile
                self._collect_unit(lane_of[ref], ref)

    def _collect_started(self, lane: _Lane) -> None:
        if lane not in self._lanes:
            return
        try:
            place: ModelPlace = ray.get(lane.starting)
        except Exception as error:
            self._remove(lane)
            if blame(error, had_begun=True) is Blame.STOP:
                raise _cause(error) from error
            logger.warning("a model process did not start: %s", str(error).splitlines()[0])
            if any(other.is_ready for other in self._lanes):  # the job goes on without it
                self._metrics.count("model_deaths")
                self._start_again_at = time.monotonic() + RESTART_PAUSE_S
                return
            self._failed_starts = self._count_death(error, self._failed_starts, MAX_FAILED_STARTS)
            return
        self._failed_starts = 0
        lane.starting, lane.node_id, lane.since = None, place.node_id, time.monotonic()
        self._ledger.report.device = place.device
        lane.trackers = [
            self._start_tracker(place.node_id)
            for _ in range(self._config.cluster.trackers_per_actor)
        ]

    def _collect_unit(self, lane: _Lane, ref: Any) -> None:
        running = lane.running.pop(ref)
        try:
            result: UnitResult = ray.get(ref)
        except Exception as error:  # noqa: BLE001 - every kind is sorted by `blame`
            if isinstance(error, RayActorError) and not isinstance(error, RayTaskError):
                # The model process is gone, and with it all that it was working on.
                lane.running[ref] = running
                self._end_lane(lane, dict.fromkeys(_units(lane), error))
                self._deaths_without_work = self._count_death(
                    error, self._deaths_without_work, MAX_DEATHS_WITHOUT_WORK
                )
                return
            opened = self._end_unit(running)
            gone = isinstance(_cause(error), RayActorError)  # raised inside: the tracker
            if gone and lane.trackers[running.index] is running.tracker:
                lane.trackers[running.index] = self._start_tracker(lane.node_id)
            if blame(error, had_begun=opened is not None) is Blame.CODE:
                # Perhaps it is this process that is broken: the next attempt gets a new one.
                self._end_lane(lane, {})
            self._judge(running.pending, error, opened)
            return
        self._journal.forget.remote(running.unit.key)
        self._deaths_without_work = 0
        if result.outcomes:
            self._given_up_in_a_row = 0
        self._unexpected.clear()
        shard = running.unit.shard
        for outcome in result.outcomes:
            self._done(shard, outcome)
        for video in shard.videos:
            if reason := result.unread.get(video.video_id):
                self._unread(shard, video, reason, alone=running.pending.alone)

    def _unread(self, shard: Shard, video: Video, error: StorageError, *, alone: bool) -> None:
        """The store did not hand out a file: again, then the shard goes without it."""
        if self._ledger.has_failed(shard):
            return
        self._metrics.count("retries", label=Blame.STORAGE.value)
        self._storage_attempts[shard.shard_id, video.video_id] += 1
        if self._storage_attempts[shard.shard_id, video.video_id] < STORAGE_ATTEMPTS:
            self._enqueue(replace(shard, videos=(video,)), alone=alone)
            return
        outcomes = self._ledger.give_up(shard, video.video_id, str(error))
        if outcomes is not None:
            self._publish(self._ledger.work_of(shard).shard, outcomes, attempt=1)

    def _end_unit(self, running: _Running) -> int | None:
        """A unit died: its tracker, if there, saves what is finished.

        Returns:
            Number of the video that its decoder had begun with last, None where it had not begun.
        """
        with suppress(RayError, FourdhError, OSError):
            ray.get(running.tracker.close.remote(running.unit.key), timeout=CLOSE_TIMEOUT_S)
        entry = ray.get(self._journal.snapshot.remote()).get(running.unit.key)
        self._journal.forget.remote(running.unit.key)
        return None if entry is None else entry.opened

    def _judge(self, pending: _Pending, error: Exception, opened: int | None) -> None:
        """A unit has ended with an error: what of it is finished, who is to blame, what now."""
        if self._ledger.has_failed(pending.shard):
            return
        rest, saved = self._take_over(pending.shard)
        left = rest.videos
        if not left:
            return
        cause = _cause(error)
        verdict = blame(error, had_begun=opened is not None)
        free_retries = pending.free_retries
        if verdict is Blame.NOBODY:
            free_retries += 1
            lost = isinstance(cause, LOST_WITH_A_NODE) or NODE_DIED in str(cause)
            if free_retries > FREE_RETRIES and (opened is not None or not lost):
                verdict = Blame.SUSPECT  # also where its tracker dies of taking it on
        culprits = _culprits(pending, left, cause, opened, verdict)
        self._metrics.count("retries", label=verdict.value)
        text = str(cause).strip().splitlines()
        logger.warning(
            "shard %s, video %s%s: ended with %s (%s): %s",
            pending.shard.shard_id,
            (culprits or left)[0].video_id,
            f" and {len(culprits or left) - 1} others" if len(culprits or left) > 1 else "",
            type(cause).__name__,
            verdict.value,
            text[0] if text else "",
            extra={"video": (culprits or left)[0].video_id, "shard": pending.shard.shard_id},
        )
        if verdict is Blame.STOP:
            raise cause
        shard_id = pending.shard.shard_id
        attempts = self._storage_attempts if verdict is Blame.STORAGE else self._attempts
        for video in culprits:
            name = shard_id, video.video_id
            reached = saved.reached.get(video.video_id, 0) if saved else 0
            moved = reached > self._reached.get(name, 0) and verdict is not Blame.STORAGE
            if moved:  # what it died of last is behind it
                self._reached[name], attempts[name] = reached, 0
            attempts[name] += 1
        if verdict is Blame.CODE:
            self._unexpected.add((shard_id, culprits[0].video_id))
            if len(self._unexpected) >= MAX_UNEXPECTED_ERRORS_IN_A_ROW:
                raise FourdhError(
                    f"stopped: {len(self._unexpected)} videos in a row met an unexpected "
                    f"error; the last one was\n{error}"
                ) from error
        if verdict is Blame.STORAGE:
            if any(attempts[shard_id, v.video_id] >= STORAGE_ATTEMPTS for v in culprits):
                self._fail_shard(pending.shard, str(cause))
                return
            culprits = []  # nobody's fault: again as they are
        if verdict is Blame.SUSPECT and opened is None:
            saved = None  # what it was to go on from may be what kills its tracker
        # Alone, or alone in its unit, it is known whose fault it was.
        known = pending.alone or (verdict is Blame.CODE and len(pending.shard.videos) == 1)
        again = []
        for video in culprits:
            if known and self._attempts[shard_id, video.video_id] >= self._config.cluster.attempts:
                try:
                    outcome = self._quarantine(pending.shard, video, cause)
                except StorageError as failure:
                    self._fail_shard(pending.shard, str(failure))
                    return
                self._done(pending.shard, outcome)
            else:
                again.append(video)
        others = [v for v in left if v not in culprits]
        if pending.alone:  # the others remain suspects
            again, others = again + others, []
        for videos, alone in ((again, True), (others, False)):
            part = replace(pending.shard, videos=tuple(videos))
            self._enqueue(part, saved, alone=alone, free_retries=free_retries)

    def _quarantine(self, shard: Shard, video: Video, cause: BaseException) -> VideoOutcome:
        if not isinstance(cause, VideoError):
            text = f"{type(cause).__name__}: {cause}"
            cause = WorkerDiedError(text[:2000], video=video.video_id, stage="reconstruct")
        self._given_up_in_a_row += 1
        if self._given_up_in_a_row >= MAX_GIVEN_UP_IN_A_ROW:
            raise FourdhError(
                f"stopped: {self._given_up_in_a_row} videos in a row were given up and no other "
                f"unit was finished in between; the last one: {cause}"
            ) from cause
        return record_failure(
            self._ledger.store,
            self._config,
            self._card,
            shard,
            video,
            cause,
            status=QUARANTINED,
            attempts=self._attempts[shard.shard_id, video.video_id],
        )

    # --- shards --------------------------------------------------------------------------------

    def _done(self, shard: Shard, outcome: VideoOutcome) -> None:
        self._metrics.count("videos", label=outcome.status)
        with about(shard=shard.shard_id, video=outcome.video_id):
            outcomes = self._ledger.done(shard, outcome)
        if outcomes is not None:
            self._publish(self._ledger.work_of(shard).shard, outcomes, attempt=1)

    def _publish(self, shard: Shard, outcomes: list[VideoOutcome], attempt: int) -> None:
        earlier = self._ledger.work_of(shard).commit
        # A task that asks for nothing would run on a head node that is to have no work.
        ref = publish_shard_task.options(num_cpus=0.01).remote(
            self._config, self._card, shard, outcomes, earlier, self._run_id
        )
        self._publishing[ref] = (shard, outcomes, attempt)

    def _collect_published(self, ref: Any) -> None:
        shard, outcomes, attempt = self._publishing.pop(ref)
        try:
            published: ShardReport = ray.get(ref)
        except Exception as error:
            if blame(error, had_begun=True) is Blame.STOP:
                raise _cause(error) from error
            if isinstance(_cause(error), LostRowsError):
                logger.warning("%s; its other videos are done again", _cause(error))
                self._enqueue(self._ledger.redo_kept(shard))
            elif found := self._published_all_the_same(shard, outcomes):
                with suppress(StorageError):  # else the next run does
                    discard_work(self._ledger.store, shard.shard_id)
                self._published(shard, found)
            elif attempt >= STORAGE_ATTEMPTS:
                self._fail_shard(shard, str(_cause(error)))
            else:
                self._publish(shard, outcomes, attempt + 1)
            return
        self._published(shard, published)

    def _published_all_the_same(
        self, shard: Shard, outcomes: list[VideoOutcome]
    ) -> ShardReport | None:
        """A death can swallow the reply of a task that had written its commit."""
        fingerprint = shard.fingerprint(self._card.fingerprint)
        earlier = self._ledger.work_of(shard).commit
        if earlier is not None and earlier.fingerprint == fingerprint:
            return None
        key = commit_key(shard.shard_id)
        try:
            commit = CommitRecord.from_json(self._ledger.store.read_bytes(key), key)
        except (FileNotFoundError, StorageError, SchemaError):
            return None
        return report_of(shard, outcomes, commit) if commit.fingerprint == fingerprint else None

    def _published(self, shard: Shard, published: ShardReport) -> None:
        self._failed_in_a_row = 0
        self._metrics.count("shards", label=PUBLISHED)
        self._metrics.count("published_bytes", published.num_bytes)
        self._metrics.count("track_rows", published.num_track_rows)
        with about(shard=shard.shard_id):
            self._ledger.published(published)

    def _fail_shard(self, shard: Shard, reason: str) -> None:
        self._metrics.count("shards", label=FAILED)
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= MAX_FAILED_SHARDS_IN_A_ROW:
            raise FourdhError(
                f"stopped: {self._failed_in_a_row} shards in a row could not be published; the "
                f"last one: {reason}"
            )
        with about(shard=shard.shard_id):
            self._ledger.fail(shard, reason)
        self._queue = deque(p for p in self._queue if p.shard.shard_id != shard.shard_id)

    # --- what goes wrong -----------------------------------------------------------------------

    def _give_up_stalled(self, journal: Mapping[str, JournalEntry]) -> None:
        limit = self._config.cluster.progress_timeout_s
        for lane in list(self._lanes):
            errors: dict[str, Exception] = {}
            for running in lane.running.values():
                entry = journal.get(running.unit.key)
                if entry is not None and entry.idle_s > limit:
                    errors[running.unit.key] = DecodeStalledError(
                        f"no progress for {entry.idle_s:.0f} s",
                        stage="reconstruct",  # any that it had begun with
                    )
            if errors:
                self._end_lane(lane, errors)

    def _count_death(self, error: BaseException, before: int, limit: int) -> int:
        """One more death in a row, unless a node has taken its processes with it.

        Raises:
            FourdhError: it is the last one.
        """
        self._metrics.count("model_deaths")
        if blame(error, had_begun=True) is Blame.NOBODY:
            return before
        if before + 1 >= limit:
            raise FourdhError(
                f"model processes died {limit} times in a row before finishing anything; the last "
                f"one said:\n{error}"
            )
        return before + 1

    def _say_what_is_lacking(self, journal: Mapping[str, JournalEntry]) -> None:
        now = time.monotonic()
        if self._publishing or journal:
            self._last_seen_running = now
        if now - self._last_seen_running < STARVING_S:
            return
        self._last_seen_running = now
        cluster = self._config.cluster
        logger.warning(
            "nothing has run for %.0f s. A model process needs %g CPUs (and %g GPUs where there "
            "are any), each of its decoders %g CPUs, each of its %d trackers %g GPUs; the cluster "
            "has %s, of which free %s",
            STARVING_S,
            cluster.cpus_per_actor,
            cluster.gpus_per_actor,
            cluster.cpus_per_decoder,
            cluster.trackers_per_actor,
            self._tracker_share(),
            {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")},
            {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")},
        )

    def _end_lane(self, lane: _Lane, errors: Mapping[str, Exception]) -> None:
        """A lane has died or must; its units without an error run again free of charge."""
        ended = [(running, self._end_unit(running)) for running in lane.running.values()]
        lane.running.clear()
        self._remove(lane)
        for running, opened in ended:
            if error := errors.get(running.unit.key):
                self._judge(running.pending, error, opened)
            elif not self._ledger.has_failed(running.unit.shard):
                pending = running.pending
                self._enqueue(
                    *self._take_over(pending.shard),
                    alone=pending.alone,
                    free_retries=pending.free_retries + 1,
                )

    def _remove(self, lane: _Lane) -> None:
        if lane in self._lanes:
            self._lanes.remove(lane)
        if lane.is_ready:
            self._ledger.report.actor_s += time.monotonic() - lane.since
        for actor in (lane.model, *lane.trackers):
            ray.kill(actor)


def _begin_metrics(dataset: str) -> Metrics:
    metrics = Metrics(dataset)
    metrics.count_storage_retries()
    metrics.begin("retries", (verdict.value for verdict in Blame))
    metrics.begin("videos", STATUSES)
    metrics.begin("shards", (PUBLISHED, FAILED))
    for name in ("model_deaths", "storage_retries", "published_bytes", "track_rows"):
        metrics.begin(name)
    return metrics


def _culprits(
    pending: _Pending,
    left: Sequence[Video],
    cause: BaseException,
    opened: int | None,
    verdict: Blame,
) -> list[Video]:
    """Who of the unfinished videos of a unit may be to blame.

    Alone, everything is waited for and saved, so it is the first one; an error that names a video
    means that one; else it may be any that the decoder had begun with.
    """
    if verdict is Blame.NOBODY:
        return []
    if verdict is Blame.STORAGE:
        return list(left)
    named = [v for v in left if isinstance(cause, VideoError) and v.video_id == cause.video]
    if named:
        return named
    if pending.alone:
        return [left[0]]
    begun = {v.video_id for v in pending.shard.videos[: (opened or 0) + 1]}
    return [v for v in left if v.video_id in begun] or [left[0]]


def _is_busy(lane: _Lane) -> bool:
    return bool(lane.running)


def _units(lane: _Lane) -> list[str]:
    return [running.unit.key for running in lane.running.values()]


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
    in_json = config.log.format == JSON
    if in_json:  # Ray's own lines as well
        own = logging.getLogger("ray")
        own.handlers.clear()
        own.propagate = True
    log: dict[str, Any] = {
        "logging_level": logging.WARNING,
        "log_to_driver": not in_json,
        "configure_logging": not in_json,
    }
    if local:
        # Actors mostly wait for each other; a small machine must still be able to hold them all.
        lanes = max(1, cluster.gpu_actors)
        decoders = lanes * cluster.units_per_actor * cluster.cpus_per_decoder
        wanted = math.ceil(lanes * cluster.cpus_per_actor + decoders)
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, wanted),
            include_dashboard=False,
            **log,
        )
    else:
        address = None if cluster.address == "auto" else cluster.address
        ray.init(address=address, **log)
    if on_terminate is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own in the place
    # Ray prints what happens to its processes; the output of a job is its summary alone.
    with redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            ray.shutdown()

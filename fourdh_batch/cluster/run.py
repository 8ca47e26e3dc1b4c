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

import json
import logging
import math
import os
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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

from fourdh_batch import __version__
from fourdh_batch.cluster.decoding import Journal
from fourdh_batch.cluster.model_actor import ModelActor
from fourdh_batch.cluster.tracker_actor import TrackerActor, publish_shard_task
from fourdh_batch.config import JobConfig, require, to_dict
from fourdh_batch.errors import (
    CheckpointError,
    ConfigError,
    DecodeStalledError,
    FourdhError,
    ManifestError,
    SchemaError,
    StorageError,
    VideoError,
    WorkerDiedError,
)
from fourdh_batch.pipeline.engine import model_card
from fourdh_batch.pipeline.plan import Shard, Video, plan_shards, read_corpus
from fourdh_batch.pipeline.records import ModelCard
from fourdh_batch.pipeline.shard import (
    FAILED,
    OK,
    PARTIAL,
    QUARANTINED,
    ShardReport,
    VideoOutcome,
    finished_outcome,
    record_failure,
)
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import (
    LEASE_S,
    CommitRecord,
    Lease,
    commit_key,
    read_commits,
)
from fourdh_batch.tables.writer import VideoSpool, discard_work

logger = logging.getLogger(__name__)

POLL_S = 0.5
PROGRESS_S = 0.5
STARVING_S = 60.0  # without a running unit for so long, say what is lacking
STORAGE_ATTEMPTS = 3
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


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a running job is."""

    videos_done: int
    videos_total: int
    bytes_done: int
    bytes_total: int
    frames_done: int
    shards_done: int
    shards_total: int


@dataclass(slots=True)
class RunReport:
    """How a job ended.

    Attributes:
        outcomes: of the videos that this run worked on.
        shards: reports of the shards that this run published.
        num_shards_before: shards that were up to date already.
        videos_before: per status, the videos in those.
        failed_shards: shard and reason; nothing of these was published.
        seconds: wall time of the run.
    """

    run_id: str
    output: str
    card: ModelCard
    shards: list[ShardReport] = field(default_factory=list)
    num_shards_before: int = 0
    videos_before: dict[str, int] = field(default_factory=dict)
    failed_shards: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def outcomes(self) -> list[VideoOutcome]:
        return [outcome for shard in self.shards for outcome in shard.outcomes]

    def videos(self, status: str) -> int:
        """Videos of the corpus that ended with this status, now or before."""
        now = sum(outcome.status == status for outcome in self.outcomes)
        return now + self.videos_before.get(status, 0)

    @property
    def exit_code(self) -> int:
        """0 all done; 3 done, but some videos failed, in part or wholly; 1 shards are missing."""
        if self.failed_shards:
            return 1
        return 3 if any(self.videos(s) for s in (PARTIAL, FAILED, QUARANTINED)) else 0


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


def run_job(
    config: JobConfig, *, on_progress: Callable[[Progress], None] = lambda progress: None
) -> RunReport:
    """Bring the tables under `config.output` up to date with the corpus `config.input`.

    Raises:
        ConfigError, ManifestError, CheckpointError, SchemaError: before any work is done.
        OutputInUseError: another driver is writing to this output.
    """
    require(config, "input", "output", "hmr.weights")
    started = time.monotonic()
    card = model_card(config)
    videos = read_corpus(config.input, limit=config.plan.limit)
    store = Store(config.output)
    run_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"
    report = RunReport(run_id=run_id, output=config.output, card=card)
    with Lease(store) as lease:
        shards = plan_shards(
            store,
            config.dataset,
            videos,
            videos_per_shard=config.plan.videos_per_shard,
            mb_per_shard=config.plan.mb_per_shard,
        )
        commits = read_commits(store)
        todo = []
        for shard in shards:
            commit = commits.get(shard.shard_id)
            if commit is None or _must_redo(shard, commit, card, config):
                todo.append(shard)
                continue
            report.num_shards_before += 1
            discard_work(store, shard.shard_id)  # left by a driver killed just after its commit
            for video in commit.videos:
                count = report.videos_before.get(video.status, 0)
                report.videos_before[video.status] = count + 1
        if config.plan.remove_missing:
            planned = {shard.shard_id for shard in shards}
            for commit in commits.values():
                if commit.dataset == config.dataset and commit.shard_id not in planned:
                    _remove_shard(store, commit)
        else:
            _refuse_losses(todo, commits)
        logger.info(
            "run %s: %d videos in %d shards, %d shards to do, weights %s",
            run_id,
            len(videos),
            len(shards),
            len(todo),
            card.weights_origin,
        )
        if todo:
            with _ray(config):
                _Scheduler(config, card, store, report, lease.renew, on_progress).run(todo)
        report.seconds = round(time.monotonic() - started, 3)
        _record_run(store, config, report)
    return report


def _must_redo(shard: Shard, commit: CommitRecord, card: ModelCard, config: JobConfig) -> bool:
    """Whether a finished shard differs from what a run of today would make of it."""
    if config.plan.retry_quarantined and any(v.status == QUARANTINED for v in commit.videos):
        return True
    if commit.fingerprint == shard.fingerprint(card.fingerprint):
        return False
    done = {video.video_id: video.content_fingerprint for video in commit.videos}
    unchanged = commit.model_fingerprint == card.fingerprint and all(
        done.get(video.video_id) == video.fingerprint for video in shard.videos
    )
    # Only videos are missing today (a smaller input, a limit): what is finished stays.
    return config.plan.remove_missing or not unchanged


def _refuse_losses(todo: Sequence[Shard], commits: Mapping[str, CommitRecord]) -> None:
    """A shard is published whole; one that is redone must not lose videos by oversight."""
    lost = []
    for shard in todo:
        today = {video.video_id for video in shard.videos}
        if commit := commits.get(shard.shard_id):
            lost += [v.video_id for v in commit.videos if v.video_id not in today]
    if lost:
        raise ManifestError(
            f"this run would remove {len(lost)} finished videos that are not in the input, "
            f"for example {lost[0]!r}: they share shards with videos that must be redone. Give the "
            "whole corpus, or plan.remove_missing=true to let them go"
        )


def _remove_shard(store: Store, commit: CommitRecord) -> None:
    """Take a shard none of whose videos is in the corpus any more out of the tables."""
    logger.info("shard %s: its %d videos are gone", commit.shard_id, len(commit.videos))
    store.delete(commit_key(commit.shard_id))
    for record in commit.objects.values():
        store.delete(record.key)


class _Scheduler:
    """One run over the shards that are not up to date."""

    def __init__(
        self,
        config: JobConfig,
        card: ModelCard,
        store: Store,
        report: RunReport,
        renew_lease: Callable[[], None],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._config = config
        self._card = card
        self._store = store
        self._report = report
        self._renew_lease = renew_lease
        self._on_progress = on_progress
        self._journal = Journal.remote()
        self._lanes: list[_Lane] = []
        self._queue: deque[_Unit] = deque()
        self._outcomes: dict[str, dict[str, VideoOutcome]] = {}  # shard -> video -> outcome
        self._shards: dict[str, Shard] = {}
        self._publishing: dict[Any, tuple[Shard, int]] = {}
        self._frames_before = 0
        self._lease_renewed = time.monotonic()
        self._last_progress = 0.0
        self._deaths_without_work = 0
        self._unexpected: set[str] = set()  # videos that met an error of our own code
        self._last_seen_running = time.monotonic()

    def run(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            self._shards[shard.shard_id] = shard
            self._outcomes[shard.shard_id] = {}
            for video in shard.videos:
                self._queue.append(_Unit(shard, video))
        # What an interrupted run has finished needs no model at all.
        for unit in list(self._queue):
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
            if time.monotonic() - self._lease_renewed > LEASE_S / 3:
                self._renew_lease()
                self._lease_renewed = time.monotonic()
            if time.monotonic() - self._last_progress > PROGRESS_S:
                self._last_progress = time.monotonic()
                self._on_progress(self._progress())
        self._on_progress(self._progress())
        for lane in self._lanes:
            self._kill(lane)

    def _num_lanes(self) -> int:
        """As many as asked for, or one per GPU; but every lane needs cores for a decoder too."""
        cluster = self._config.cluster
        resources = ray.cluster_resources()
        share = cluster.gpus_per_actor + cluster.trackers_per_actor * cluster.gpus_per_tracker
        gpus = int(resources.get("GPU", 0) / share)
        wanted = cluster.gpu_actors or max(1, gpus)
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
        tracker = self._config.tracker
        has_networks = bool(tracker.texture_weights or tracker.predictor_weights)
        wants_gpu = has_networks and not tracker.device.startswith("cpu") and self._wants_gpu()
        share = self._config.cluster.gpus_per_tracker if wants_gpu else 0
        return TrackerActor.options(num_cpus=0, num_gpus=share).remote(self._config, self._card)

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
            self._store,
            self._config,
            self._card,
            unit.shard,
            unit.video,
            cause,
            status=QUARANTINED,
            attempts=unit.attempts,
        )

    def _finished(self, unit: _Unit) -> VideoOutcome | None:
        spool = VideoSpool(self._store, unit.shard.shard_id, unit.video.video_id)
        return finished_outcome(spool, unit.video, self._card)

    def _done(self, unit: _Unit, outcome: VideoOutcome) -> None:
        shard = unit.shard
        if shard.shard_id in self._report.failed_shards:
            return
        self._frames_before += outcome.num_frames
        outcomes = self._outcomes[shard.shard_id]
        outcomes[unit.video.video_id] = outcome
        if outcome.problem:
            logger.warning(
                "shard %s, video %s: %s: %s",
                shard.shard_id,
                unit.video.video_id,
                outcome.status,
                outcome.problem,
            )
        if len(outcomes) == len(shard.videos):
            self._publish(shard, attempt=1)

    def _publish(self, shard: Shard, attempt: int) -> None:
        outcomes = [self._outcomes[shard.shard_id][v.video_id] for v in shard.videos]
        ref = publish_shard_task.options(num_cpus=0).remote(
            self._config, self._card, shard, outcomes
        )
        self._publishing[ref] = (shard, attempt)

    def _collect_published(self, ref: Any) -> None:
        shard, attempt = self._publishing.pop(ref)
        try:
            published: ShardReport = ray.get(ref)
        except Exception as error:
            if blame(error, had_begun=True) is Blame.STOP:
                raise _cause(error) from error
            if attempt >= STORAGE_ATTEMPTS:
                self._fail_shard(shard, str(_cause(error)))
            else:
                self._publish(shard, attempt + 1)
            return
        logger.info("%s", published.line())
        self._report.shards.append(published)

    def _fail_shard(self, shard: Shard, reason: str) -> None:
        logger.error("shard %s: not published: %s", shard.shard_id, reason)
        self._report.failed_shards[shard.shard_id] = reason
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

    def _progress(self) -> Progress:
        running = ray.get(self._journal.snapshot.remote())
        done = {k: set(v) for k, v in self._outcomes.items()}
        bytes_done = sum(
            v.num_bytes
            for s in self._shards.values()
            for v in s.videos
            if v.video_id in done[s.shard_id]
        )
        return Progress(
            videos_done=sum(map(len, done.values())),
            videos_total=sum(len(s.videos) for s in self._shards.values()),
            bytes_done=bytes_done,
            bytes_total=sum(v.num_bytes for s in self._shards.values() for v in s.videos),
            frames_done=self._frames_before + sum(frames for frames, _ in running.values()),
            shards_done=len(self._report.shards),
            shards_total=len(self._shards),
        )


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


def _record_run(store: Store, config: JobConfig, report: RunReport) -> None:
    """`_runs/<run_id>.json`: settings as run, versions, totals."""
    record = {
        "run_id": report.run_id,
        "version": __version__,
        "config": to_dict(config),
        "models": asdict(report.card),
        "seconds": report.seconds,
        "shards_done": [shard.shard_id for shard in report.shards],
        "shards_up_to_date": report.num_shards_before,
        "shards_failed": report.failed_shards,
        "videos": {s: report.videos(s) for s in (OK, PARTIAL, FAILED, QUARANTINED)},
        "frames": sum(outcome.num_frames for outcome in report.outcomes),
        "people": sum(outcome.num_people for outcome in report.outcomes),
        "track_rows": sum(shard.num_track_rows for shard in report.shards),
    }
    store.write_bytes(f"_runs/{report.run_id}.json", json.dumps(record, indent=1).encode())

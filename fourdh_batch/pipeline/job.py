"""What every job does around its work: plan minus commits, report, record. Imports no Ray.

`cluster/run.py` and `pipeline/retrack.py` differ in how a video comes to its rows, and in nothing
of this.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any

import pyarrow as pa

from fourdh_batch import __version__
from fourdh_batch.config import JobConfig, to_dict
from fourdh_batch.errors import ConfigError, FourdhError, ManifestError, StorageError
from fourdh_batch.logs import about
from fourdh_batch.pipeline.increment import Increment, ShardWork
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.records import ModelCard
from fourdh_batch.pipeline.shard import (
    FAILED,
    PARTIAL,
    QUARANTINED,
    STATUSES,
    ShardReport,
    VideoOutcome,
)
from fourdh_batch.storage import Store, redact_uri, safe_key
from fourdh_batch.tables.manifest import CommitRecord, Lease, commit_key, void_commit
from fourdh_batch.tables.reader import RELEASE_KEY
from fourdh_batch.tables.writer import WORK, discard_work, put_rows

logger = logging.getLogger(__name__)

RUNS = "_runs"
STORAGE_ATTEMPTS = 3
PROGRESS_S = 0.5
RECORD_S = 30.0  # between two records of a running job
CHANGES_SHOWN = 20  # videos of each kind, in the text
KINDS = {
    "new": "new",
    "changed": "with other content or window",
    "models": "to be done again with other weights or settings",
    "details": "with other columns in the manifest; no work",
    "removed": "gone from the corpus",
    "retried": "quarantined before, tried again",
    "unfinished": "planned before and not finished",
}
CHANGES = pa.schema(
    [(name, pa.string()) for name in ("video_id", "shard_id", "kind", "before", "after")]
)


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


OnProgress = Callable[[Progress], None]


@dataclass(slots=True)
class RunReport:
    """How a job ended.

    Attributes:
        shards: reports of the shards that this run published.
        num_shards_before: shards that were up to date already.
        videos_before: per status, the videos in those.
        videos_kept: videos in published shards whose rows were taken over from before.
        changes: per kind, what is new, changed or gone; see `increment.Change`.
        failed_shards: shard and reason; nothing of these was published. As <shard>/<video> also
            videos that were left out, for their files could not be had.
        num_units: units that were started, each one task of a decoder.
        frames_run: frames that went through the models, also those that had to be done again.
        actor_s: seconds that model processes were there for, all together.
        device: what they ran on.
        seconds: wall time of the run.
    """

    run_id: str
    output: str
    card: ModelCard
    shards: list[ShardReport] = field(default_factory=list)
    num_shards_before: int = 0
    videos_before: dict[str, int] = field(default_factory=dict)
    videos_kept: dict[str, int] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    failed_shards: dict[str, str] = field(default_factory=dict)
    num_units: int = 0
    frames_run: int = 0
    actor_s: float = 0.0
    device: str = ""
    seconds: float = 0.0

    def videos(self, status: str) -> int:
        """Videos of the corpus that ended with this status, now or before."""
        now = sum(shard.statuses.get(status, 0) for shard in self.shards)
        return now + self.videos_before.get(status, 0) + self.videos_kept.get(status, 0)

    @property
    def exit_code(self) -> int:
        """0 all done; 3 done, but some videos failed, in part or wholly; 1 shards are missing."""
        if self.failed_shards:
            return 1
        return 3 if any(self.videos(s) for s in (PARTIAL, FAILED, QUARANTINED)) else 0


@dataclass(slots=True)
class _OpenShard:
    work: ShardWork
    outcomes: dict[str, VideoOutcome] = field(default_factory=dict)


class Ledger:
    """The books of one run over the shards that are not up to date.

    Only shards that were begun and not ended are held, however many there are.

    Args:
        store: the output.
        todo: the shards, lazily.
        totals: `videos_total`, `bytes_total` and `shards_total` of `todo`.
        report: filled in as shards are published or fail.
        on_progress: called now and then by `tick`, and by `close`.
        on_tick: called by `tick`, at most every `PROGRESS_S` seconds: renews the lease, keeps the
            record of the run.

    Attributes:
        store, report: as given.
    """

    def __init__(
        self,
        store: Store,
        todo: Iterable[ShardWork],
        totals: Progress,
        report: RunReport,
        on_progress: OnProgress = lambda progress: None,
        on_tick: OnProgress = lambda progress: None,
    ) -> None:
        self.store = store
        self.report = report
        self._todo = iter(todo)
        self._totals = totals
        self._on_progress = on_progress
        self._on_tick = on_tick
        self._open: dict[str, _OpenShard] = {}
        self._num_videos = self._num_bytes = self._num_frames = 0
        self._shown = time.monotonic()

    @property
    def num_videos_left(self) -> int:
        """Videos that have not ended, of all shards."""
        return self._totals.videos_total - self._num_videos

    def next_shard(self) -> ShardWork | None:
        """The next shard to work on; None where there is none."""
        work = next(self._todo, None)
        if work is not None:
            self._open[work.shard.shard_id] = _OpenShard(work)
        return work

    def has_failed(self, shard: Shard) -> bool:
        """Whether a shard was given up."""
        return shard.shard_id in self.report.failed_shards

    def work_of(self, shard: Shard) -> ShardWork:
        """The whole of a shard that is being worked on."""
        return self._open[shard.shard_id].work

    def done(self, shard: Shard, outcome: VideoOutcome) -> list[VideoOutcome] | None:
        """A video has ended; with the last one of a shard, the outcomes of all that were to do."""
        if self.has_failed(shard):
            return None
        if outcome.problem:
            logger.warning(
                "shard %s, video %s: %s: %s",
                *(shard.shard_id, outcome.video_id, outcome.status, outcome.problem),
                extra={"shard": shard.shard_id, "video": outcome.video_id},
            )
        entry = self._open[shard.shard_id]
        if outcome.video_id in entry.outcomes or outcome.video_id in entry.work.keep:
            return None
        entry.outcomes[outcome.video_id] = outcome
        videos = entry.work.shard.videos
        self._num_videos += 1
        self._num_frames += outcome.num_frames
        self._num_bytes += next(v.num_bytes for v in videos if v.video_id == outcome.video_id)
        return self._complete(entry)

    def _complete(self, entry: _OpenShard) -> list[VideoOutcome] | None:
        videos = entry.work.shard.videos
        if len(entry.outcomes) + len(entry.work.keep) < len(videos):
            return None
        return [entry.outcomes[v.video_id] for v in videos if v.video_id in entry.outcomes]

    def give_up(self, shard: Shard, video_id: str, reason: str) -> list[VideoOutcome] | None:
        """Publish a shard without a video whose file cannot be had now: it is new to the next run.

        Returns:
            As `done`.
        """
        entry = self._open[shard.shard_id]
        logger.error(
            "shard %s, video %s: left out: %s",
            *(shard.shard_id, video_id, reason),
            extra={"shard": shard.shard_id, "video": video_id},
        )
        self.report.failed_shards[f"{shard.shard_id}/{video_id}"] = reason
        whole = entry.work.shard
        left = tuple(v for v in whole.videos if v.video_id != video_id)
        entry.work = replace(entry.work, shard=replace(whole, videos=left))
        self._num_videos += 1
        if not left:
            self._open.pop(shard.shard_id)
            return None
        return self._complete(entry)

    def redo_kept(self, shard: Shard) -> Shard:
        """The rows that were to be taken over are lost: their videos have to be done, too.

        Returns:
            The shard with these videos alone.
        """
        entry = self._open[shard.shard_id]
        keep = entry.work.keep
        entry.work = replace(entry.work, keep=frozenset(), commit=None)
        whole = entry.work.shard
        videos = tuple(v for v in whole.videos if v.video_id in keep)
        self._totals = replace(
            self._totals,
            videos_total=self._totals.videos_total + len(videos),
            bytes_total=self._totals.bytes_total + sum(v.num_bytes for v in videos),
        )
        return replace(whole, videos=videos)

    def published(self, report: ShardReport) -> None:
        """A shard is in the tables."""
        logger.info("%s", report.line(), extra={"shard": report.shard_id})
        work = self._open.pop(report.shard_id).work
        self.report.shards.append(report)
        if work.commit is not None:
            kept = Counter(v.status for v in work.commit.videos if v.video_id in work.keep)
            for status, count in kept.items():
                self.report.videos_kept[status] = self.report.videos_kept.get(status, 0) + count

    def fail(self, shard: Shard, reason: str) -> None:
        """Give a shard up; the job goes on."""
        where = {"shard": shard.shard_id}
        logger.error("shard %s: not published: %s", shard.shard_id, reason, extra=where)
        self._open.pop(shard.shard_id, None)
        self.report.failed_shards[shard.shard_id] = reason

    def tick(self, frames_running: Callable[[], int] = int) -> None:
        """Show progress and look after lease and record where it is time.

        Args:
            frames_running: frames of the videos that have begun and not ended.
        """
        now = time.monotonic()
        if now - self._shown > PROGRESS_S:
            self._shown = now
            progress = self.progress(frames_running())
            self._on_tick(progress)
            self._on_progress(progress)

    def close(self) -> None:
        """Show where the run has come to."""
        self._on_progress(self.progress())

    def progress(self, frames_running: int = 0) -> Progress:
        """Counts of now."""
        return Progress(
            videos_done=self._num_videos,
            videos_total=self._totals.videos_total,
            bytes_done=self._num_bytes,
            bytes_total=self._totals.bytes_total,
            frames_done=self._num_frames + frames_running,
            shards_done=len(self.report.shards),
            shards_total=self._totals.shards_total,
        )


def bring_up_to_date(
    config: JobConfig,
    card: ModelCard,
    videos: Iterable[Video],
    work: Callable[[Ledger], None],
    *,
    on_progress: OnProgress = lambda progress: None,
) -> RunReport:
    """Have `work` done on the shards that are not up to date, under the lease of the output.

    Args:
        config: settings of the job.
        card: the models; says with the videos what is up to date.
        videos: the corpus of today; read once, before the output is touched.
        work: brings all shards of the ledger to an end; not called where there are none.
        on_progress: told where the job is.
    Raises:
        ConfigError: the output is a release.
        ManifestError: finished videos would be lost; nothing was begun.
        OutputInUseError: another driver is writing to this output.
    """
    store = Store(config.output)
    if store.exists(RELEASE_KEY):
        raise ConfigError(
            f"output {redact_uri(store.root)}: expected an output root, got a release, which "
            "never changes"
        )
    run_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"
    report = RunReport(run_id=run_id, output=config.output, card=card)
    lease = Lease(store)
    with about(run=run_id), ExitStack() as stack:

        def take_lease() -> None:
            stack.enter_context(lease)
            stack.enter_context(lease.kept())

        plan = stack.enter_context(
            Increment(*(store, config, card.fingerprint, videos), record=True, when_read=take_lease)
        )
        _refuse_large_losses(config, plan)
        report.num_shards_before = plan.num_shards_before
        report.videos_before = dict(plan.videos_before)
        report.changes = dict(plan.num_changes)
        logger.info(
            "run %s: %d videos in %d shards, %d shards to do, weights %s",
            *(run_id, plan.num_videos, plan.num_shards, plan.todo_shards, card.weights_origin),
        )
        totals = Progress(0, plan.todo_videos, 0, plan.todo_bytes, 0, 0, plan.todo_shards)
        with _recorded(store, config, report, totals) as on_tick:
            _write_changes(store, run_id, plan)
            if config.plan.remove_missing:
                for commit in plan.removed():
                    _remove_shard(store, commit)
            if plan.todo_shards:

                def tick(progress: Progress) -> None:
                    lease.check()
                    on_tick(progress)

                work(Ledger(store, plan.work(), totals, report, on_progress, tick))
            if config.plan.remove_missing and not report.failed_shards:
                plan.record_removals()
            _discard_left_over(store, plan)
    return report


def summary_of(report: RunReport) -> dict[str, object]:
    """Totals of a run, by name, as JSON holds them."""
    return {
        "videos": {status: report.videos(status) for status in STATUSES},
        "changes": report.changes,
        "frames": sum(shard.num_frames for shard in report.shards),
        "people": sum(shard.num_people for shard in report.shards),
        "track_rows": sum(shard.num_track_rows for shard in report.shards),
    }


def run_key(run_id: str) -> str:
    """Where the record of a run lies, from its beginning on."""
    return f"{RUNS}/{run_id}.json"


def changes_key(run_id: str, ending: str = "parquet") -> str:
    """Where a run lists the videos that were not up to date, and why: all of them, or as text."""
    return f"{RUNS}/{run_id}-changes.{ending}"


def _refuse_large_losses(config: JobConfig, plan: Increment) -> None:
    """A corpus of which much is suddenly missing is more likely a mount that is."""
    removed = plan.num_changes.get("removed", 0)
    before = plan.num_videos - plan.num_changes.get("new", 0) + removed
    limit = config.plan.max_removed
    if config.plan.remove_missing and removed > limit * before:
        raise ManifestError(
            f"this run would take {removed} of {before} videos out of the tables, more than "
            f"plan.max_removed={limit:g} allows; is the whole corpus there? If so, raise it"
        )


def _write_changes(store: Store, run_id: str, plan: Increment) -> None:
    """All of them as a table, the first of every kind as text."""
    shown: dict[str, list[str]] = {kind: [] for kind in sorted(plan.num_changes)}

    def rows() -> Iterator[tuple[str, ...]]:
        for change in plan.changes():
            if len(shown[change.kind]) < CHANGES_SHOWN:
                shown[change.kind].append(change.video_id)
            yield astuple(change)

    if not any(plan.num_changes.values()):
        return
    put_rows(store, changes_key(run_id), CHANGES, rows())
    lines = [f"run {run_id}"]
    for kind, names in shown.items():
        lines.append(f"{plan.num_changes[kind]} {KINDS[kind]}")
        lines += [f"  {name}" for name in names]
        if (more := plan.num_changes[kind] - len(names)) > 0:
            lines.append(f"  and {more} more")
    lines.append(f"{plan.num_shards_before} shards are up to date")
    store.write_bytes(changes_key(run_id, "txt"), "\n".join([*lines, ""]).encode())


def _discard_left_over(store: Store, plan: Increment) -> None:
    """Work of shards that are published: a driver was killed just after a commit."""
    try:
        folders = {key.split("/")[1] for key, _ in store.list(WORK)}
        if folders:
            for shard_id in plan.up_to_date():
                if safe_key(shard_id) in folders:
                    discard_work(store, shard_id)
    except StorageError as error:
        logger.warning("left over work stays until the next run: %s", error)


def _remove_shard(store: Store, commit: CommitRecord) -> None:
    """Take a shard none of whose videos is in the corpus any more out of the tables."""
    logger.info("shard %s: its %d videos are gone", commit.shard_id, len(commit.videos))
    void_commit(store, commit.shard_id)
    for record in commit.objects.values():
        store.delete(record.key)
    discard_work(store, commit.shard_id)
    store.delete(commit_key(commit.shard_id))  # last, so that a killed removal is gone on with


@contextmanager
def _recorded(
    store: Store, config: JobConfig, report: RunReport, totals: Progress
) -> Iterator[OnProgress]:
    """`_runs/<run_id>.json`: settings as run, versions, totals; kept up to date while it runs."""
    started, began = time.time(), time.monotonic()
    written = began
    last = totals

    def write(state: str, exit_code: int | None) -> None:
        report.seconds = round(time.monotonic() - began, 3)
        record = {
            "run_id": report.run_id,
            "version": __version__,
            "state": state,
            "started_s": started,
            "updated_s": time.time(),
            "seconds": report.seconds,
            "exit_code": exit_code,
            "dataset": config.dataset,
            "config": _redacted(to_dict(config)),
            "models": asdict(report.card),
            "progress": asdict(last),
            "shards_up_to_date": report.num_shards_before,
            "shards_failed": report.failed_shards,
            **summary_of(report),
            "work": {
                "frames": report.frames_run,
                "actor_seconds": round(report.actor_s, 3),
                "track_rows": sum(shard.num_track_rows for shard in report.shards),
                "object_bytes": sum(map(_new_bytes, report.shards)),
                "device": report.device,
            },
        }
        body = json.dumps(record, indent=1).encode()
        store.write_bytes(run_key(report.run_id), body)

    def on_tick(progress: Progress) -> None:
        nonlocal written, last
        last = progress
        if time.monotonic() - written > RECORD_S:
            written = time.monotonic()
            try:
                write("running", None)
            except FourdhError as error:
                logger.warning("run %s: not recorded: %s", report.run_id, error)

    write("running", None)
    try:
        yield on_tick
    except BaseException as error:
        try:
            write("failed" if isinstance(error, Exception) else "stopped", 1)
        except FourdhError as second:
            logger.warning("run %s: not recorded: %s", report.run_id, second)
        raise
    done = sum(shard.num_videos for shard in report.shards)
    last = replace(last, shards_done=len(report.shards), videos_done=done)
    write("done", report.exit_code)


def _new_bytes(shard: ShardReport) -> int:
    """About the share of the videos that were worked on in the objects of a shard."""
    return shard.num_bytes * shard.num_videos // max(1, shard.num_videos + shard.num_kept)


def _redacted(value: Any) -> Any:
    """Settings without the secrets that addresses may hold."""
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    return redact_uri(value) if isinstance(value, str) else value

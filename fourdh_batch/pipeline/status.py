"""Where a run is, or how it ended, from storage alone: for whoever has no access to its cluster.

A few requests: the lease, the newest records of `_runs/`, one listing and a few objects of
`failures`. Only where no record tells how many videos there are, all commit records and the plan
are read. What lies in `_runs/` may be damaged, foreign, or of an older version with fewer fields.
"""

from __future__ import annotations

import json
import time
from calendar import timegm
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fourdh_batch.errors import FourdhError
from fourdh_batch.pipeline.job import RUNS
from fourdh_batch.pipeline.plan import assignments
from fourdh_batch.storage import Store, redact_uri, safe_key
from fourdh_batch.tables.check_shard import read_commit
from fourdh_batch.tables.manifest import COMMITS, NUM_READ_THREADS
from fourdh_batch.tables.verify import LeaseView, look_at_lease

NUM_RUNS = 5
MAX_RECORDS_READ = 50  # in search of a dataset's
MAX_RECORD_BYTES = 64 << 20
NUM_FAILURES = 5
MAX_FAILURE_OBJECTS = 10  # read in search of them
MAX_FAILURE_BYTES = 64 << 20
SAME_CLOCK_S = 5.0  # a run's record may be this much older than its lease
SILENT_S = 150.0  # a run that records itself every half minute is late

RUNNING, DONE, FAILED, STOPPED, DIED = "running", "done", "failed", "stopped", "died"
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One record of `_runs/`; what an older version did not write is None or empty.

    Attributes:
        state: ``running``, ``done``, ``failed`` or ``stopped``, as the run itself wrote it.
        started_s, updated_s: Unix times.
        videos: per status, videos in the tables.
        progress: counts of what this run had to do, see `job.Progress`.
        shards_failed: reason by shard.
    """

    run_id: str
    state: str
    dataset: str
    started_s: float | None
    updated_s: float | None
    seconds: float | None
    exit_code: int | None
    frames: int | None
    videos: dict[str, int] = field(default_factory=dict)
    progress: dict[str, int] = field(default_factory=dict)
    shards_up_to_date: int | None = None
    shards_failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: bytes) -> RunRecord | None:
        """None where it is no record of a run."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(body, dict) or not isinstance(body.get("run_id"), str):
            return None
        config = body["config"] if isinstance(body.get("config"), dict) else {}
        failed = body["shards_failed"] if isinstance(body.get("shards_failed"), dict) else {}
        videos, seconds = _counts(body.get("videos")), _number(body.get("seconds"))
        exit_code = body.get("exit_code")
        if "state" not in body:  # it was written at the end only, and only where there was one
            troubled = any(n for status, n in videos.items() if status != "ok")
            exit_code = 1 if failed else 3 if troubled else 0
        started = _number(body.get("started_s"))
        if started is None:
            started = _start_of(body["run_id"])
        updated = _number(body.get("updated_s"))
        if updated is None and started is not None and seconds is not None:
            updated = started + seconds
        return cls(
            run_id=body["run_id"],
            state=str(body.get("state", DONE)),
            dataset=str(body.get("dataset", config.get("dataset", ""))),
            started_s=started,
            updated_s=updated,
            seconds=seconds,
            exit_code=exit_code if isinstance(exit_code, int) else None,
            frames=_count(body.get("frames")),
            videos=videos,
            progress=_counts(body.get("progress")),
            shards_up_to_date=_count(body.get("shards_up_to_date")),
            shards_failed={str(shard): str(reason) for shard, reason in failed.items()},
        )


@dataclass(frozen=True, slots=True)
class Failure:
    """A row of `failures`."""

    video_id: str
    shard_id: str
    stage: str
    code: str
    message: str
    frame_index: int | None


@dataclass(slots=True)
class Status:
    """What storage tells of a run.

    Attributes:
        root: without credentials.
        state: ``running``; ``done``, ``failed`` or ``stopped`` as the run itself said; ``died``:
            its lease lapsed and it never said how it ended; ``unknown``: no run is recorded.
        holder: who holds the lease, or held it last.
        run: record of the run; None where there is none (yet).
        counted: where the counts come from: ``run``, or ``commits`` and the plan.
        videos: per status, videos in the tables.
        videos_left: videos that are still to be done.
        shards_done, shards_total: of the whole dataset.
        frames: that this run has decoded.
        frames_per_s: since its start, or since the status before.
        eta_s: seconds until it ends at this rate.
        failures: some of the newest shards'.
        runs: the newest ones, newest first.
        notes: what else is worth knowing.
        at_s: Unix time of the look.
    """

    root: str
    dataset: str
    state: str
    at_s: float
    holder: LeaseView | None = None
    run: RunRecord | None = None
    counted: str = "run"
    videos: dict[str, int] = field(default_factory=dict)
    videos_left: int | None = None
    shards_done: int | None = None
    shards_total: int | None = None
    frames: int | None = None
    frames_per_s: float | None = None
    eta_s: float | None = None
    failures: list[Failure] = field(default_factory=list)
    runs: list[RunRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """As text."""
        what = f"{self.root}, dataset {_plain(self.dataset)}" if self.dataset else self.root
        who = ""
        if self.holder is not None and self.state in (RUNNING, DIED):
            who = f" ({_plain(self.holder.owner)}, since {_clock(self.holder.since_s)})"
        yield f"{what}: {self.state}{who}"
        if self.run is not None:
            yield f"  run       {_plain(self.run.run_id)}"
            if self.run.updated_s is not None:
                ago = _duration(max(0.0, self.at_s - self.run.updated_s))
                yield f"  as of     {_clock(self.run.updated_s)}, {ago} ago"
        by_status = ", ".join(f"{n} {_plain(status)}" for status, n in self.videos.items() if n)
        left = "" if self.videos_left is None else f"; {self.videos_left} left"
        yield f"  videos    {sum(self.videos.values())} in the tables ({by_status or '-'}){left}"
        if self.shards_done is not None:
            total = "?" if self.shards_total is None else self.shards_total
            yield f"  shards    {self.shards_done} of {total}"
        if self.frames is not None:
            rate = "" if self.frames_per_s is None else f", {self.frames_per_s:.1f} a second"
            yield f"  frames    {self.frames}{rate}"
        if self.eta_s is not None:
            yield f"  time left {_duration(self.eta_s)}"
        for shard, reason in list(self.run.shards_failed.items() if self.run else ())[
            :NUM_FAILURES
        ]:
            yield f"  shard {_plain(shard)} failed: {_plain(reason)}"
        for failure in self.failures:
            at = "" if failure.frame_index is None else f", frame {failure.frame_index}"
            yield (
                f"  video {_plain(failure.video_id)}{at}: {_plain(failure.code)} in "
                f"{_plain(failure.stage)}: {_plain(failure.message)}"
            )
        for note in self.notes:
            yield f"  note      {_plain(note)}"
        if self.runs:
            yield "last runs"
        for run in self.runs:
            ended = run.state if run.exit_code is None else f"{run.state}, exit {run.exit_code}"
            took = "?" if run.seconds is None else _duration(run.seconds)
            done = ", ".join(f"{n} {_plain(s)}" for s, n in run.videos.items() if n)
            yield f"  {_plain(run.run_id)}  {_plain(ended)}  {took}  {done or 'no videos'}"


def status_of(root: str, *, dataset: str | None = None, before: Status | None = None) -> Status:
    """Where the newest run of an output root is, or how it ended.

    Args:
        root: output root, local or remote.
        dataset: its newest run and counts; by default those of the newest run of all.
        before: an earlier status, so that the rate is that of the time since then.
    Raises:
        FileNotFoundError: nothing of an output root lies there.
        StorageError: the store failed.
    """
    store = Store(root)
    status = Status(redact_uri(store.root), dataset or "", UNKNOWN, at_s=time.time())
    lease = look_at_lease(store)
    newest = None
    for record in _records(store, status.notes):
        newest = newest or record
        if dataset is None or record.dataset == dataset:
            status.runs.append(record)
        if len(status.runs) >= NUM_RUNS:
            break
    if lease is not None and newest is not None and dataset not in (None, newest.dataset):
        if lease.is_live and _belongs(newest, lease):
            status.notes.append(f"a run of dataset {newest.dataset!r} is writing")
        if _belongs(newest, lease):
            lease = None  # it tells nothing of this dataset
    last = status.runs[0] if status.runs else None
    status.holder = lease
    status.state, status.run = _state(last, lease)
    if status.run is None and lease is not None:
        status.notes.append(
            "this run has written no record yet"
            if lease.is_live
            else "the driver that held the lease last has left no record"
        )
    if not status.dataset and status.run is not None:
        status.dataset = status.run.dataset
    if status.run is None or not _counts_from_run(status, status.run):
        _counts_from_commits(store, status, dataset)
    if status.run is not None:
        _rate(status, status.run, before.run if before is not None else None)
    if status.state == UNKNOWN and not status.videos:
        raise FileNotFoundError(2, "no run and no commit record: no output", status.root)
    status.failures = _failures(store, status.dataset, status.notes)
    return status


def _records(store: Store, notes: list[str]) -> Iterator[RunRecord]:
    """Records of runs, newest first; their names begin with the time."""
    listed = [(key, size) for key, size in store.list(RUNS) if key.endswith(".json")]
    for key, size in sorted(listed, reverse=True)[:MAX_RECORDS_READ]:
        try:
            record = RunRecord.from_json(store.read_bytes(key) if size <= MAX_RECORD_BYTES else b"")
        except (FileNotFoundError, FourdhError) as error:
            notes.append(f"{key}: {error}")
            continue
        if record is None or key != f"{RUNS}/{record.run_id}.json":
            notes.append(f"{key} is no record of a run")
        else:
            yield record


def _belongs(record: RunRecord, lease: LeaseView) -> bool:
    """Whether a record is of the driver that holds this lease, or held it."""
    return record.started_s is None or record.started_s >= lease.since_s - SAME_CLOCK_S


def _state(last: RunRecord | None, lease: LeaseView | None) -> tuple[str, RunRecord | None]:
    """The state of the newest run, and its record where it has one."""
    if lease is not None and (last is None or not _belongs(last, lease)):
        # A driver came after the last record. Records begin once the plan is made; those of
        # older versions came at the end.
        if lease.is_live:
            return RUNNING, None
        return (STOPPED if lease.expires_s == 0 else DIED), None
    if last is None:
        return UNKNOWN, None
    if last.state == RUNNING and (lease is None or not lease.is_live):
        return DIED, last
    return last.state, last


# --- counts ------------------------------------------------------------------------------------


def _counts_from_run(status: Status, run: RunRecord) -> bool:
    """Take the counts of a record; False where it does not tell what is left."""
    if run.state != RUNNING and run.shards_failed:
        return False  # which videos those held, only plan and commits know
    status.videos = dict(run.videos)
    status.frames = run.frames
    progress = run.progress
    if {"videos_done", "videos_total", "shards_done", "shards_total"} <= progress.keys():
        status.videos_left = progress["videos_total"] - progress["videos_done"]
        if run.shards_up_to_date is not None:
            status.shards_done = run.shards_up_to_date + progress["shards_done"]
            status.shards_total = run.shards_up_to_date + progress["shards_total"]
        if run.state == RUNNING:
            status.frames = progress.get("frames_done", run.frames)
    elif run.state == DONE:
        status.videos_left = 0
    else:
        return False
    return True


def _counts_from_commits(store: Store, status: Status, dataset: str | None) -> None:
    """Count what is committed, and what the plan holds beyond it."""
    status.counted = "commits"
    status.videos, status.videos_left = {}, None
    keys = [(key, size) for key, size in store.list(COMMITS) if key.endswith(".json")]
    videos: Counter[str] = Counter()
    done: dict[str, set[str]] = {}

    def read(item: tuple[str, int]) -> tuple[str, list[tuple[str, str]]] | None:
        try:
            record, _ = read_commit(store, *item)
        except FileNotFoundError:
            return None
        except (ValueError, FourdhError) as error:
            status.notes.append(f"{item[0]}: {error}")
            return None
        if record.is_void:
            return None
        return record.dataset, [(video.video_id, video.status) for video in record.videos]

    num_shards = 0
    with ThreadPoolExecutor(NUM_READ_THREADS) as pool:
        for found in pool.map(read, keys):
            if found is None or (dataset is not None and found[0] != dataset):
                continue
            num_shards += 1
            videos.update(state for _, state in found[1])
            done.setdefault(found[0], set()).update(video for video, _ in found[1])
    status.videos = dict(sorted(videos.items()))
    status.shards_done = num_shards
    names = [dataset] if dataset is not None else sorted(done)
    if dataset is None and status.dataset and status.dataset not in done:
        names.append(status.dataset)
    shards: set[str] = set()
    left = planned = 0
    for name in names:
        try:
            for video, shard in assignments(store, name):
                planned += 1
                shards.add(shard)
                left += video not in done.get(name, ())
        except FourdhError as error:
            status.notes.append(str(error))
            return
    if planned:
        status.videos_left, status.shards_total = left, len(shards)


def _rate(status: Status, run: RunRecord, before: RunRecord | None) -> None:
    """Frames a second, and the time left of a running run."""
    frames_done = run.progress.get("frames_done", run.frames)
    if run.started_s is None or run.updated_s is None or frames_done is None:
        return
    seconds, frames = run.updated_s - run.started_s, frames_done
    if before is not None and before.run_id == run.run_id and before.updated_s is not None:
        since = run.updated_s - before.updated_s
        if since > 0:
            seconds, frames = since, frames_done - before.progress.get("frames_done", 0)
    if seconds > 0:
        status.frames_per_s = round(frames / seconds, 3)
    if status.state != RUNNING:
        return
    progress, elapsed = run.progress, run.updated_s - run.started_s
    late = status.at_s - run.updated_s
    if late > SILENT_S:
        status.notes.append(f"the run has not recorded itself for {_duration(late)}")
    for unit in ("bytes", "videos"):
        total, part = progress.get(f"{unit}_total", 0), progress.get(f"{unit}_done", 0)
        if total and part and elapsed > 0:
            status.eta_s = round(max(0.0, elapsed * (total - part) / part - late), 1)
            return


def _failures(store: Store, dataset: str, notes: list[str]) -> list[Failure]:
    """Rows of `failures`, of the newest shards that have any.

    Most objects of `failures` are empty, and then the smallest ones: one listing tells which.
    """
    folder = f"failures/{safe_key(dataset)}" if dataset else "failures"
    listed = [(key, size) for key, size in store.list(folder) if key.endswith(".parquet")]
    smallest = min((size for _, size in listed), default=0)
    newest = sorted(listed, key=lambda item: item[0].rpartition("/")[2], reverse=True)
    larger = [item for item in newest if item[1] > smallest]
    found: list[Failure] = []
    for key, size in (larger + [item for item in newest if item[1] == smallest])[
        :MAX_FAILURE_OBJECTS
    ]:
        if size > MAX_FAILURE_BYTES:
            continue
        try:
            rows = _read_failures(store, key)
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            notes.append(f"{key}: {error!s:.200}")
            continue
        found += rows
        if len(found) >= NUM_FAILURES or (size == smallest and not rows):
            break
    return found[:NUM_FAILURES]


def _read_failures(store: Store, key: str) -> list[Failure]:
    names = list(Failure.__dataclass_fields__)
    with pq.ParquetFile(pa.BufferReader(store.read_bytes(key))) as table:
        for batch in table.iter_batches(NUM_FAILURES, columns=names):
            return [Failure(**row) for row in batch.to_pylist()]
    return []


# --- words and numbers -------------------------------------------------------------------------


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e15 else None  # NaN is not, either


def _count(value: object) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _counts(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping):
        return {}
    counts = {str(name): _count(number) for name, number in value.items()}
    return {name: number for name, number in counts.items() if number is not None}


def _start_of(run_id: str) -> float | None:
    """The time with which the name of a run begins."""
    try:
        return float(timegm(time.strptime(run_id.partition("-")[0], "%Y%m%dT%H%M%SZ")))
    except ValueError:
        return None


def _clock(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "?"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _plain(text: str) -> str:
    """One line that does nothing to a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)[:300]

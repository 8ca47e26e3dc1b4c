"""What a run has to do: the plan of today minus the commits, in memory that does not grow.

Videos, assignments and what the commits say of them lie in a temporary SQLite file (in `TMPDIR`,
about 0.4 KB per video). Commit records are read one behind the other, a few ahead, compared with
the plan, and dropped.
"""

from __future__ import annotations

import logging
import sqlite3
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from fourdh_batch.config import JobConfig
from fourdh_batch.errors import ManifestError, StorageError
from fourdh_batch.pipeline.corpus import UNREADABLE, Video, raise_twice
from fourdh_batch.pipeline.plan import (
    TAKEN_OUT,
    Shard,
    cut_shards,
    read_generations,
    write_generation,
)
from fourdh_batch.pipeline.shard import QUARANTINED
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import COMMITS, CommitRecord, VideoRecord, commit_key

logger = logging.getLogger(__name__)

Kind = Literal["new", "changed", "models", "details", "removed", "retried", "unfinished"]

NUM_READ_THREADS = 16
_READ_AHEAD = 64  # commit records held at once, of up to some 100 KB each
_ROWS = 10_000  # of one call to SQLite
_CACHE_KIB = 32 * 1024
_UP_TO_DATE, _REDO, _NEW, _REMOVED = range(4)

_TABLES = """
CREATE TABLE video (video_id TEXT, uri BLOB, num_bytes INTEGER, fingerprint TEXT, start_s REAL,
                    end_s REAL, extra TEXT);
CREATE TABLE placed (video_id TEXT PRIMARY KEY, shard_id TEXT) WITHOUT ROWID;
CREATE TABLE fresh (video_id TEXT, shard_id TEXT);
CREATE TABLE planned (shard_id TEXT, video_id TEXT, uri BLOB, num_bytes INTEGER, fingerprint TEXT,
                      start_s REAL, end_s REAL, extra TEXT,
                      PRIMARY KEY (shard_id, video_id)) WITHOUT ROWID;
CREATE TABLE shard (shard_id TEXT PRIMARY KEY, state INTEGER) WITHOUT ROWID;
CREATE TABLE change (video_id TEXT, shard_id TEXT, kind TEXT, before TEXT, after TEXT);
"""
_COLUMNS = "video_id, uri, num_bytes, fingerprint, start_s, end_s, extra"


@dataclass(frozen=True, slots=True)
class ShardWork:
    """A shard that is not up to date.

    Attributes:
        shard: with its videos of today.
        keep: `video_id`s whose rows can be taken over from the published objects: neither their
            content nor the models have changed, and the commit knows how many rows they have.
            Their row in `videos` may have other extra columns than today.
        commit: what is published of the shard, None where nothing is.
        problem: why the shard cannot be worked on now, "" where it can.
    """

    shard: Shard
    keep: frozenset[str] = frozenset()
    commit: CommitRecord | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """Why a video is not up to date.

    Attributes:
        kind: ``new``; ``changed``: other content or window; ``models``: other weights, settings,
            schemas or code; ``details``: only the manifest's other columns; ``removed``: in the
            tables, not in the corpus; ``retried``: quarantined before; ``unfinished``: planned by
            an earlier run and never committed.
        before, after: what differs: fingerprint of the content, of the models or of the details;
            the status where retried; "" where there is none.
    """

    video_id: str
    shard_id: str
    kind: Kind
    before: str = ""
    after: str = ""


@dataclass(slots=True)
class _Comparison:
    """What one commit says against the plan of today."""

    redo: bool = False
    keep: set[str] = field(default_factory=set)
    changes: list[Change] = field(default_factory=list)
    missing: list[VideoRecord] = field(default_factory=list)


class Increment:
    """The plan of today minus the commits; a context manager, for one thread.

    Args:
        store: the output.
        config: `dataset` and `plan` are used.
        model_fingerprint: of the models and settings of today.
        videos: the corpus of today, in any order; read once, on entering.
        record: write new assignments; False for a dry run, which writes nothing.
        when_read: called once the corpus is read, and before the output is: takes its lease.
    Raises:
        ManifestError: on entering: a `video_id` stands twice, the corpus cannot be read, or
            finished videos would be lost. Nothing was recorded.

    Attributes:
        num_videos, num_shards: of the corpus of today.
        num_shards_before: shards that are up to date.
        num_missing: finished videos that are not in the corpus and stay in the tables all the
            same (`plan.remove_missing` is off).
        videos_before: per status, the videos in up-to-date shards.
        todo_shards, todo_videos, todo_bytes: what there is to do, without videos that are kept.
        num_changes: per kind, how many changes there are.
    """

    def __init__(
        self,
        store: Store,
        config: JobConfig,
        model_fingerprint: str,
        videos: Iterable[Video],
        *,
        record: bool,
        when_read: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._config = config
        self._model = model_fingerprint
        self._videos = videos
        self._record = record
        self._when_read = when_read
        self.num_videos = self.num_shards = self.num_shards_before = self.num_missing = 0
        self.todo_shards = self.todo_videos = self.todo_bytes = 0
        self.videos_before: dict[str, int] = {}
        self.num_changes: dict[str, int] = {}

    def __enter__(self) -> Increment:
        self._folder = tempfile.TemporaryDirectory(prefix="fourdh-increment-")
        try:
            self._db = sqlite3.connect(
                Path(self._folder.name) / "plan.sqlite", isolation_level="DEFERRED"
            )
            self._db.execute("PRAGMA journal_mode=OFF")
            self._db.execute("PRAGMA synchronous=OFF")
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            self._db.executescript(_TABLES)
            self._take_videos()
            self._when_read()
            generation = self._place()
            self._compare_all()
            self._count()
            if self._record:
                rows = self._db.execute("SELECT video_id, shard_id FROM fresh ORDER BY rowid")
                written = write_generation(self._store, self._config.dataset, generation, rows)
                self._generation = generation + written
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def work(self) -> Iterator[ShardWork]:
        """The shards that are not up to date, in `shard_id` order."""
        for shard_id, state in self._shards(_REDO, _NEW):
            shard = self._shard(shard_id)
            if state == _NEW:
                yield ShardWork(shard)
                continue
            key = commit_key(shard_id)
            try:
                commit = CommitRecord.from_json(self._store.read_bytes(key), key)
            except StorageError as error:
                yield ShardWork(shard, problem=str(error))
                continue
            yield ShardWork(shard, frozenset(self._compare(shard, commit).keep), commit)

    def up_to_date(self) -> Iterator[str]:
        """Ids of the shards that are up to date, in order."""
        return (shard_id for shard_id, _ in self._shards(_UP_TO_DATE))

    def removed(self) -> Iterator[CommitRecord]:
        """Commits of this dataset none of whose videos is in the corpus of today.

        They are to be acted on only with `plan.remove_missing`.
        """
        for shard_id, _ in self._shards(_REMOVED):
            key = commit_key(shard_id)
            yield CommitRecord.from_json(self._store.read_bytes(key), key)

    def record_removals(self) -> None:
        """Have the plan forget what is not in the corpus, once it has left the tables.

        Also videos that were planned and never finished.
        """
        rows = self._db.execute(
            "SELECT video_id, ? FROM placed LEFT JOIN planned USING (shard_id, video_id) "
            "WHERE uri IS NULL ORDER BY video_id",
            (TAKEN_OUT,),
        )
        write_generation(self._store, self._config.dataset, self._generation, rows)

    def changes(self) -> Iterator[Change]:
        """Why videos are not up to date: one entry for each, in no order of use.

        Videos that are done again only because they share a shard with others, and those of
        `num_missing`, are not among them.
        """
        for row in self._db.cursor().execute("SELECT * FROM change ORDER BY rowid"):
            yield Change(*row)

    # --- steps of entering ---------------------------------------------------------------------

    def _take_videos(self) -> None:
        rows = (
            (
                *(v.video_id, v.uri.encode("utf-8", "surrogatepass"), v.num_bytes),
                *(v.fingerprint, v.start_s, v.end_s, v.extra),
            )
            for v in self._videos
        )
        problem = ""
        try:
            self._db.executemany("INSERT INTO video VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        except ManifestError as error:
            problem = str(error)
        self._db.execute("CREATE INDEX video_order ON video (video_id)")
        twice = self._db.execute(
            "SELECT video_id FROM video GROUP BY video_id HAVING count(*) > 1 ORDER BY video_id"
        )
        raise_twice((video_id for (video_id,) in twice), self._config.input, problem)
        if limit := self._config.plan.limit:
            self._db.execute(
                "DELETE FROM video WHERE video_id NOT IN "
                "(SELECT video_id FROM video ORDER BY video_id LIMIT ?)",
                (limit,),
            )

    def _place(self) -> int:
        """Give every video its shard; returns the number of this plan."""
        db, plan = self._db, self._config.plan
        last = 0
        for number, rows in read_generations(self._store, self._config.dataset):
            db.executemany("INSERT OR REPLACE INTO placed VALUES (?, ?)", rows)
            last = number
        db.execute("DELETE FROM placed WHERE shard_id = ?", (TAKEN_OUT,))
        unplaced = db.cursor().execute(
            "SELECT v.video_id, v.num_bytes FROM video v LEFT JOIN placed p USING (video_id) "
            "WHERE p.video_id IS NULL ORDER BY v.video_id"
        )
        new = cut_shards(
            self._config.dataset,
            last + 1,
            unplaced,
            videos_per_shard=plan.videos_per_shard,
            mb_per_shard=plan.mb_per_shard,
        )
        while batch := list(islice(new, _ROWS)):
            db.executemany("INSERT INTO fresh VALUES (?, ?)", batch)
        for source in ("placed", "fresh"):
            db.execute(
                f"INSERT INTO planned SELECT p.shard_id, {_COLUMNS} FROM video v "
                f"JOIN {source} p USING (video_id) ORDER BY p.shard_id, video_id"
            )
        db.execute("DROP TABLE video")
        return last + 1

    def _compare_all(self) -> None:
        """Hold every commit against the plan."""
        lost = ""
        num_lost = 0
        dataset, plan = self._config.dataset, self._config.plan
        for commit in self._commits():
            if commit.dataset != dataset:
                continue
            shard = self._shard(commit.shard_id)
            if not shard.videos:
                self._mark(commit.shard_id, _REMOVED)
                if plan.remove_missing:
                    self._add_changes(_removals(commit.shard_id, commit.videos))
                else:
                    self.num_missing += len(commit.videos)
                continue
            found = self._compare(shard, commit)
            if not found.redo:
                self._mark(shard.shard_id, _UP_TO_DATE)
                self.num_missing += len(found.missing)
                for video in commit.videos:
                    count = self.videos_before.get(video.status, 0)
                    self.videos_before[video.status] = count + 1
                continue
            self._mark(shard.shard_id, _REDO)
            self._add_changes(found.changes)
            todo = [v for v in shard.videos if v.video_id not in found.keep]
            self.todo_videos += len(todo)
            self.todo_bytes += sum(v.num_bytes for v in todo)
            if found.missing and not plan.remove_missing:
                num_lost += len(found.missing)
                lost = lost or found.missing[0].video_id
        if num_lost:
            raise ManifestError(
                f"this run would remove {num_lost} finished videos that are not in the input, "
                f"for example {lost!r}: they share shards with videos that must be redone. "
                "Give the whole corpus, or plan.remove_missing=true to let them go"
            )

    def _compare(self, shard: Shard, commit: CommitRecord) -> _Comparison:
        """Whether a finished shard differs from what a run of today would make of it, and why."""
        plan = self._config.plan
        found = _Comparison()
        done = {video.video_id: video for video in commit.videos}
        same_models = commit.model_fingerprint == self._model
        for video in shard.videos:
            record = done.pop(video.video_id, None)
            change = self._change_of(video, record, shard.shard_id, commit.model_fingerprint)
            if change is not None:
                found.changes.append(change)
            keeps = change is None or change.kind == "details"
            if keeps and same_models and record is not None and record.num_rows:
                found.keep.add(video.video_id)
        found.missing = list(done.values())
        # Where only videos are missing today (a smaller input, a limit), what is finished stays.
        found.redo = bool(found.changes) or (bool(found.missing) and plan.remove_missing)
        found.redo |= commit.is_void
        if plan.retry_quarantined and any(v.status == QUARANTINED for v in found.missing):
            found.redo = True
        if found.redo and plan.remove_missing:
            found.changes += _removals(shard.shard_id, found.missing)
        return found

    def _change_of(
        self, video: Video, record: VideoRecord | None, shard_id: str, model_before: str
    ) -> Change | None:
        def change(kind: Kind, before: str, after: str) -> Change:
            return Change(video.video_id, shard_id, kind, before, after)

        if record is None:
            return change("new", "", video.fingerprint)
        lost = video.fingerprint.startswith(UNREADABLE)
        if lost and not record.content_fingerprint.startswith(UNREADABLE):
            # It may be back tomorrow, and its rows are good.
            logger.warning("video %s cannot be read now; its rows stay", video.video_id)
        elif record.content_fingerprint != video.fingerprint:
            return change("changed", record.content_fingerprint, video.fingerprint)
        if model_before != self._model:
            return change("models", model_before, self._model)
        if self._config.plan.retry_quarantined and record.status == QUARANTINED:
            return change("retried", record.status, "")
        if record.details is not None and record.details != video.details:
            return change("details", record.details, video.details)
        return None

    def _count(self) -> None:
        db = self._db
        db.execute(
            "INSERT INTO shard SELECT DISTINCT shard_id, ? FROM planned "
            "WHERE shard_id NOT IN (SELECT shard_id FROM shard)",
            (_NEW,),
        )
        db.execute(
            "INSERT INTO change SELECT video_id, shard_id, "
            "iif(shard_id IN (SELECT shard_id FROM fresh), 'new', 'unfinished'), '', fingerprint "
            "FROM planned JOIN shard USING (shard_id) WHERE state = ? ORDER BY shard_id, video_id",
            (_NEW,),
        )
        new = "FROM planned JOIN shard USING (shard_id) WHERE state = ?"
        num, size = db.execute(f"SELECT count(*), total(num_bytes) {new}", (_NEW,)).fetchone()
        self.todo_videos += num
        self.todo_bytes += int(size)
        self.num_videos = db.execute("SELECT count(*) FROM planned").fetchone()[0]
        per_state = dict(db.execute("SELECT state, count(*) FROM shard GROUP BY state"))
        self.num_shards_before = per_state.get(_UP_TO_DATE, 0)
        self.todo_shards = per_state.get(_REDO, 0) + per_state.get(_NEW, 0)
        self.num_shards = self.num_shards_before + self.todo_shards
        self.num_changes = dict(db.execute("SELECT kind, count(*) FROM change GROUP BY kind"))

    # --- parts ---------------------------------------------------------------------------------

    def _commits(self) -> Iterator[CommitRecord]:
        """All commit records below the root, in order, a few read ahead."""
        keys = (key for key, _ in self._store.list(COMMITS) if key.endswith(".json"))
        ahead: deque[tuple[str, Future[bytes]]] = deque()
        with ThreadPoolExecutor(NUM_READ_THREADS) as pool:
            for key in chain(keys, [""] * _READ_AHEAD):
                if key:
                    ahead.append((key, pool.submit(self._store.read_bytes, key)))
                if ahead and (not key or len(ahead) >= _READ_AHEAD):
                    first, body = ahead.popleft()
                    commit = CommitRecord.from_json(body.result(), first)
                    if first == commit_key(commit.shard_id):
                        yield commit
                    else:
                        logger.warning("%s is ignored: a copy, by its content", first)

    def _shard(self, shard_id: str) -> Shard:
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM planned WHERE shard_id = ? ORDER BY video_id", (shard_id,)
        )
        videos = tuple(
            Video(video_id, uri.decode("utf-8", "surrogatepass"), *rest)
            for video_id, uri, *rest in rows
        )
        return Shard(shard_id, self._config.dataset, videos)

    def _shards(self, *states: int) -> Iterator[tuple[str, int]]:
        """Ids and states, in order; the caller may do anything between two of them."""
        last = ""
        marks = ", ".join("?" * len(states))
        while rows := self._db.execute(
            f"SELECT shard_id, state FROM shard WHERE shard_id > ? AND state IN ({marks}) "
            "ORDER BY shard_id LIMIT 1000",
            (last, *states),
        ).fetchall():
            yield from rows
            last = rows[-1][0]

    def _mark(self, shard_id: str, state: int) -> None:
        self._db.execute("INSERT INTO shard VALUES (?, ?)", (shard_id, state))

    def _add_changes(self, changes: Iterable[Change]) -> None:
        self._db.executemany(
            "INSERT INTO change VALUES (?, ?, ?, ?, ?)",
            ((c.video_id, c.shard_id, c.kind, c.before, c.after) for c in changes),
        )

    def _close(self) -> None:
        if hasattr(self, "_db"):
            self._db.close()
        self._folder.cleanup()


def _removals(shard_id: str, videos: Iterable[VideoRecord]) -> list[Change]:
    return [Change(v.video_id, shard_id, "removed", v.content_fingerprint) for v in videos]

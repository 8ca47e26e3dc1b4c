"""Proof of an output root: what its commit records promise lies there, whole, and nothing twice.

Why this proves it: a video belongs to one shard (asked of the commit records), every row of an
object belongs to a video of its shard, and the rows of an object increase strictly in the order
of the schema. So no row can stand twice, and memory does not grow with the corpus. Everything
that is read may be damaged or made up: it becomes a `Problem`, and no key of a record is opened
unless it is the one key that its shard has.
"""

from __future__ import annotations

import contextlib
import errno
import json
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar, cast
from urllib.parse import unquote

from fourdh_batch.errors import ConfigError, FourdhError
from fourdh_batch.storage import Store, is_local, redact_uri, safe_key
from fourdh_batch.tables.check_shard import (
    ObjectCheck,
    Problem,
    check_record,
    check_together,
    read_commit,
)
from fourdh_batch.tables.manifest import COMMITS, LEASES, CommitRecord, has_lapsed
from fourdh_batch.tables.reader import RELEASE_KEY, UNFINISHED
from fourdh_batch.tables.schema import TABLES
from fourdh_batch.tables.writer import WORK, object_key

NUM_THREADS = 8  # each holds one object of about 100 MB in a temporary file, unless it is local
TICK_S = 0.5
ATTEMPTS = 5  # of a shard that does not fit while a run is writing
BACKOFF_S = 0.5  # doubles; a shard's objects are overwritten within seconds
BLOCK_BYTES = 8 << 20
MAX_PROBLEMS = 10_000  # kept with their words; all are counted
RELEASE_VERSION = 1  # of the JSON of a release

T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """Where a verification is."""

    bytes_done: int
    bytes_total: int
    shards_done: int
    shards_total: int


@dataclass(slots=True)
class VerifyReport:
    """What was looked at and what was found.

    Attributes:
        root: without credentials.
        quick: only presence and size of the objects were looked at.
        shards: readable commit records.
        objects, num_bytes: that were looked at, or (`quick`) of the listing.
        rows: per table, by the commit records.
        videos: per status.
        planned: videos of the plan or of the corpus that was given.
        problems: the first `MAX_PROBLEMS`; a proof has none.
        num_problems: all of them.
        notes: what is no problem but worth knowing.
    """

    root: str
    quick: bool
    shards: int = 0
    objects: int = 0
    num_bytes: int = 0
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TABLES, 0))
    videos: dict[str, int] = field(default_factory=dict)
    planned: int = 0
    problems: list[Problem] = field(default_factory=list)
    num_problems: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, problem: Problem) -> None:
        """Count a problem, and keep it unless there are too many already."""
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    @property
    def exit_code(self) -> int:
        """0 proved, 1 problems."""
        return 1 if self.num_problems else 0


def verify_root(
    root: str,
    *,
    dataset: str | None = None,
    planned: Callable[[str], Iterable[tuple[str, str]]] | None = None,
    corpus: Iterable[tuple[str, str]] | None = None,
    quick: bool = False,
    on_progress: Callable[[VerifyProgress], None] = lambda progress: None,
) -> VerifyReport:
    """Prove an output root, or a release of one.

    Args:
        root: output root, local or remote.
        dataset: only this one.
        planned: gives the recorded plan of a dataset as (video_id, shard_id); all of its videos
            must be done.
        corpus: (video_id, content fingerprint) of today's videos of the dataset. They must be
            done instead of those of the plan, which remembers removed ones.
        quick: do not open the objects; presence and size only.
        on_progress: told now and then where the verification is.
    Raises:
        FileNotFoundError: nothing of an output root lies there.
        ConfigError: `corpus` without saying which of several datasets it is.
        StorageError: the root cannot be listed.
    """
    started = time.monotonic()
    store = Store(root)
    report = VerifyReport(root=redact_uri(store.root), quick=quick)
    with tempfile.TemporaryDirectory(prefix="fourdh-verify-") as folder:
        books = _Books(Path(folder) / "books.sqlite")
        try:
            _Verification(store, dataset, quick, report, books, on_progress).run(planned, corpus)
        finally:
            books.close()
    report.seconds = round(time.monotonic() - started, 3)
    return report


# --- parts that `release.py` and `pipeline/status.py` use, too ---------------------------------


@dataclass(frozen=True, slots=True)
class LeaseView:
    """The newest lease of a root, seen from outside.

    Attributes:
        owner: host and process.
        since_s, expires_s: Unix times; `expires_s` is 0 where it was given back.
        is_live: whether its driver may write now.
    """

    owner: str
    since_s: float
    expires_s: float
    is_live: bool


def look_at_lease(store: Store) -> LeaseView | None:
    """Who writes or wrote last below a root; None where nobody did, or the lease is damaged."""
    keys = [key for key, _ in store.list(LEASES) if key[len(LEASES) + 1 : -5].isdigit()]
    if not keys:
        return None
    try:
        held = json.loads(store.read_bytes(max(keys)))
        return LeaseView(
            str(held["owner"]),
            float(held["since_s"]),
            float(held["expires_s"]),
            not has_lapsed(held),
        )
    except (FileNotFoundError, KeyError, TypeError, ValueError, RecursionError):
        return None


def fetch_object(store: Store, key: str, target: BinaryIO) -> tuple[int, str]:
    """Copy an object into an open local file; its bytes and SHA-256.

    Raises:
        FileNotFoundError, OSError.
    """
    digest, size = sha256(), 0
    with store.open_read(key) as source:
        while block := source.read(BLOCK_BYTES):
            digest.update(block)
            target.write(block)
            size += len(block)
    return size, digest.hexdigest()


def run_parallel(
    work: Callable[[Item], T], items: Iterable[Item], tick: Callable[[], None]
) -> Iterator[T]:
    """Results in the order in which they come; few are in flight, `tick` is called in between."""
    waiting: set[Future[T]] = set()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        try:
            rest = iter(items)
            while True:
                for item in islice(rest, 2 * NUM_THREADS - len(waiting)):
                    waiting.add(pool.submit(work, item))
                if not waiting:
                    return
                done, waiting = wait(waiting, TICK_S, FIRST_COMPLETED)
                tick()
                for future in done:
                    yield future.result()
        finally:
            for future in waiting:
                future.cancel()


# --- one shard ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Look:
    """What one look at a shard gave."""

    key: str
    record: CommitRecord | None = None
    data: bytes = b""
    num_objects: int = 0
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    is_gone: bool = False


# --- the whole root ----------------------------------------------------------------------------


class _Books:
    """Which videos there are and which there should be, on disk: memory stays flat."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path)
        self._db.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE done (dataset BLOB, video BLOB, shard BLOB, content BLOB, status TEXT,"
            " PRIMARY KEY (dataset, video)) WITHOUT ROWID;"
            "CREATE TABLE wanted (dataset BLOB, video BLOB, shard BLOB, content BLOB,"
            " PRIMARY KEY (dataset, video)) WITHOUT ROWID;"
        )

    def close(self) -> None:
        self._db.close()

    def add_done(self, record: CommitRecord) -> Iterator[tuple[str, str]]:
        """Enter the videos of a shard; those that are in another one, and in which."""
        dataset, shard = _blob(record.dataset), _blob(record.shard_id)
        for video in record.videos:
            row = (dataset, _blob(video.video_id), shard, _blob(video.content_fingerprint))
            added = self._db.execute(
                "INSERT OR IGNORE INTO done VALUES (?, ?, ?, ?, ?)", (*row, video.status)
            )
            if not added.rowcount:
                found = self._db.execute(
                    "SELECT shard FROM done WHERE dataset = ? AND video = ?", row[:2]
                ).fetchone()
                if found[0] != shard:
                    yield video.video_id, _text(found[0])

    def add_wanted(self, dataset: str, rows: Iterable[tuple[str, str, str]]) -> Iterator[str]:
        """Enter (video, shard or "", content or ""); those that were wanted in another shard."""
        for video_id, shard, content in rows:
            row = (_blob(dataset), _blob(video_id), _blob(shard), _blob(content))
            added = self._db.execute("INSERT OR IGNORE INTO wanted VALUES (?, ?, ?, ?)", row)
            if not added.rowcount:
                yield video_id

    def name_wanted(self, dataset: str) -> None:
        """Say of which dataset the videos are that were entered under ""."""
        self._db.execute("UPDATE wanted SET dataset = ?", (_blob(dataset),))

    def counts(self) -> dict[str, int]:
        """Videos per status."""
        return dict(self._db.execute("SELECT status, count(*) FROM done GROUP BY 1 ORDER BY 1"))

    def num_wanted(self) -> int:
        """Videos that should be there."""
        return int(self._db.execute("SELECT count(*) FROM wanted").fetchone()[0])

    def not_done(self) -> Iterator[tuple[str, str]]:
        """(video, shard) of those that should be there and are not."""
        for video, shard in self._db.execute(
            "SELECT video, shard FROM wanted NATURAL LEFT JOIN"
            " (SELECT dataset, video, 1 AS there FROM done) WHERE there IS NULL"
        ):
            yield _text(video), _text(shard)

    def unplanned(self, dataset: str) -> Iterator[tuple[str, str, str]]:
        """(video, its shard, the planned shard or "") where the two differ."""
        for row in self._db.execute(
            "SELECT done.video, done.shard, ifnull(wanted.shard, x'') FROM done LEFT JOIN wanted"
            " ON wanted.dataset = done.dataset AND wanted.video = done.video"
            " WHERE done.dataset = ? AND wanted.shard IS NOT done.shard",
            (_blob(dataset),),
        ):
            yield (_text(row[0]), _text(row[1]), _text(row[2]))

    def changed(self) -> Iterator[tuple[str, str, str, str]]:
        """(video, shard, wanted content, content) where the two differ."""
        for row in self._db.execute(
            "SELECT done.video, done.shard, wanted.content, done.content FROM done JOIN wanted"
            " ON wanted.dataset = done.dataset AND wanted.video = done.video"
            " WHERE wanted.content != done.content"
        ):
            yield (_text(row[0]), _text(row[1]), _text(row[2]), _text(row[3]))


def _blob(text: str) -> bytes:
    """Text for the database, which takes no lone surrogates."""
    return text.encode("utf-8", "surrogatepass")


def _text(blob: bytes) -> str:
    return blob.decode("utf-8", "surrogatepass")


class _Verification:
    """One verification of one root."""

    def __init__(
        self,
        store: Store,
        dataset: str | None,
        quick: bool,
        report: VerifyReport,
        books: _Books,
        on_progress: Callable[[VerifyProgress], None],
    ) -> None:
        self._store = store
        self._dataset = dataset
        self._quick = quick
        self._report = report
        self._books = books
        self._on_progress = on_progress
        self._others: set[str] = set()  # datasets that are not looked at
        self._shards_done = self._bytes_done = 0
        self._shards_total = self._bytes_total = 0

    def run(
        self,
        planned: Callable[[str], Iterable[tuple[str, str]]] | None,
        corpus: Iterable[tuple[str, str]] | None,
    ) -> None:
        store, report = self._store, self._report
        commits = dict(store.list(COMMITS))
        self._sizes = self._list_tables()
        plans = sorted({key.split("/")[1] for key, _ in store.list("_plan")})
        if not commits and not plans and not self._sizes:
            place = redact_uri(store.root)
            raise FileNotFoundError(2, "no commit record, no plan, no table: no output", place)
        lease = look_at_lease(store)
        self._is_writing = lease is not None and lease.is_live
        if lease is not None and lease.is_live:
            report.notes.append(
                f"a run is writing ({lease.owner}): this is a proof of what it has finished"
            )
        self._shards_total, self._bytes_total = len(commits), sum(self._sizes.values())
        if corpus is not None:  # first: it may be found impossible
            for video_id in self._books.add_wanted("", ((video, "", c) for video, c in corpus)):
                report.add(
                    Problem("plan", "one video of this id in the input", "two", "", "", video_id)
                )
        named: set[str] = set()
        datasets: set[str] = set()
        digests: dict[str, str] = {}
        finished: set[str] = set()
        unreadable: set[str] = set()
        for look in run_parallel(self._look, sorted(commits), self._tick):
            self._shards_done += 1
            self._bytes_done += look.num_bytes
            record = look.record
            if look.is_gone:
                report.notes.append(f"{look.key} was removed meanwhile")
            elif record is None:
                unreadable.add(look.key.rpartition("/")[2].removesuffix(".json"))
            elif self._dataset is not None and record.dataset != self._dataset:
                self._others.add(record.dataset)
            else:
                datasets.add(record.dataset)
                digests[record.shard_id] = sha256(look.data).hexdigest()
                finished.add(safe_key(record.shard_id))
                self._count(look, record)
                named |= {object_key(name, record.dataset, record.shard_id) for name in TABLES}
            for problem in look.problems:
                report.add(problem)
        if self._dataset is not None and not datasets and safe_key(self._dataset) not in plans:
            others = ", ".join(sorted(map(repr, self._others))) or "none"
            raise ConfigError(f"there is no dataset {self._dataset!r}; there are {others}")
        self._strays(named, unreadable)
        if store.exists(RELEASE_KEY):
            self._release(digests)
        if not any(key.endswith(f"/{UNFINISHED}") for key in self._sizes):
            self._whole_corpus(datasets, plans, planned, has_corpus=corpus is not None)
        if not report.shards and not report.num_problems:
            report.add(Problem("not_done", "at least one finished shard", "none"))
        self._leftovers(finished)
        report.videos = self._books.counts()

    def _tick(self) -> None:
        self._on_progress(
            VerifyProgress(
                min(self._bytes_done, self._bytes_total),
                self._bytes_total,
                self._shards_done,
                self._shards_total,
            )
        )

    def _list_tables(self, dataset: str = "") -> dict[str, int]:
        """Bytes by key of everything in the folders of the tables."""
        inside = f"/{safe_key(dataset)}" if dataset else ""
        return {key: size for name in TABLES for key, size in self._store.list(f"{name}{inside}")}

    def _count(self, look: _Look, record: CommitRecord) -> None:
        report = self._report
        report.shards += 1
        report.objects += look.num_objects
        report.num_bytes += look.num_bytes
        for name, item in record.objects.items():
            if name in report.rows:
                report.rows[name] += item.num_rows
        for video_id, other in self._books.add_done(record):
            report.add(
                Problem(
                    *("twice", "a video in one shard", f"it is in shard {other!r}, too"),
                    *(record.shard_id, "", video_id),
                )
            )

    def _look(self, key: str) -> _Look:
        """Look at a shard; again where a run may be writing it at this moment."""
        look = self._look_once(key, self._sizes)
        for attempt in range(ATTEMPTS - 1):
            if not look.problems or not self._is_writing:
                break
            time.sleep(BACKOFF_S * 2**attempt)
            fresh = self._list_tables(look.record.dataset) if look.record else self._sizes
            look = self._look_once(key, fresh)
        return look

    def _look_once(self, key: str, sizes: dict[str, int]) -> _Look:
        look = _Look(key)
        try:
            look.record, look.data = read_commit(self._store, key)
        except FileNotFoundError:
            look.is_gone = True
            return look
        except (ValueError, OSError) as error:
            expected = "a commit record" if key.endswith(".json") else "nothing but commit records"
            look.problems.append(Problem("commit", expected, f"{error!s:.300}", key=key))
            return look
        record = look.record
        if self._dataset is not None and record.dataset != self._dataset:
            return look
        look.problems += check_record(record)
        checks: dict[str, ObjectCheck] = {}
        for name, item in record.objects.items():
            if name in TABLES and item.key == object_key(name, record.dataset, record.shard_id):
                check = self._look_at_object(look, record, name, sizes.get(item.key))
                if check is not None:
                    checks[name] = check
                    look.problems += check.problems
        if all(name in checks and not checks[name].problems for name in TABLES):
            look.problems += check_together(record, checks)
        return look

    def _look_at_object(
        self, look: _Look, record: CommitRecord, name: str, size: int | None
    ) -> ObjectCheck | None:
        """The check of an object that is there as a whole; None where it was not opened."""
        item = record.objects[name]

        def add(kind: str, expected: object, got: object) -> None:
            look.problems.append(Problem(kind, str(expected), str(got), record.shard_id, item.key))

        if size is None:
            add("missing", f"{item.num_bytes} bytes", "nothing")
            return None
        look.num_objects += 1
        look.num_bytes += size
        if size != item.num_bytes:
            add("size", f"{item.num_bytes} bytes", f"{size} bytes")
            return None
        if self._quick:
            return None
        check = ObjectCheck(record, name)
        try:
            with self._opened(item.key) as (file, digest):
                if digest != item.sha256:
                    add("checksum", f"sha256 {item.sha256}", digest)
                    return None
                check.check(file)
        except FileNotFoundError:
            add("missing", f"{item.num_bytes} bytes", "nothing")
            return None
        except OSError as error:
            add("unreadable", "an object that can be read", f"{error!s:.300}")
            return None
        return check

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[tuple[BinaryIO, str]]:
        """The bytes of an object as one local file, and their SHA-256."""
        if is_local(self._store.root):
            if not self._store.exists(key):  # a pipe would be waited for
                raise OSError(errno.EINVAL, "not a regular file", key)
            with self._store.open_read(key) as file:
                digest = file_digest(cast(BufferedReader, file), "sha256").hexdigest()
                file.seek(0)
                yield file, digest
            return
        with tempfile.TemporaryFile(prefix="fourdh-") as copy:
            _, digest = fetch_object(self._store, key, copy)
            copy.seek(0)
            yield copy, digest

    def _strays(self, named: set[str], unreadable: set[str]) -> None:
        """Objects that `pd.read_parquet` would read, or stumble over, though no commit names them.

        An object whose commit record cannot be read was reported with that.
        """
        for key in sorted(self._sizes):
            name, *folders, file = key.split("/")
            if self._dataset is not None and folders[:1] not in ([], [safe_key(self._dataset)]):
                continue
            part = file.removeprefix("part-").removesuffix(".parquet")
            if key in named or part in unreadable:
                continue
            if any(each.startswith(("_", ".")) for each in (*folders, file)):
                continue
            if file == UNFINISHED:
                got = "a release that is not finished; give its command again"
                self._report.add(Problem("release", "a finished release", got, key=key))
            elif self._is_writing and folders and file == f"part-{part}.parquet":
                if not self._store.exists(f"{COMMITS}/{part}.json"):
                    self._report.notes.append(f"{key} is not committed yet")
            else:
                size = f"{self._sizes[key]} bytes that no commit record names"
                self._report.add(Problem("stray", f"nothing but objects of {name}", size, key=key))

    def _whole_corpus(
        self,
        datasets: set[str],
        plans: list[str],
        planned: Callable[[str], Iterable[tuple[str, str]]] | None,
        *,
        has_corpus: bool,
    ) -> None:
        """Every video that should be there is there."""
        report, books = self._report, self._books
        known = {safe_key(dataset): dataset for dataset in datasets}
        for folder in plans:
            known.setdefault(folder, unquote(folder))
        if self._dataset is not None:
            known = {safe_key(self._dataset): self._dataset}
        if has_corpus:
            if len(known) != 1:
                raise ConfigError(
                    f"the corpus of which dataset? There are {', '.join(sorted(known.values()))}"
                )
            books.name_wanted(*known.values())
        for folder, dataset in () if has_corpus else known.items():
            if folder not in plans or planned is None:
                continue
            if safe_key(dataset) != folder:  # a name too long to be read from its folder
                report.notes.append(f"_plan/{folder} was not looked at: nothing of it is committed")
                continue
            try:
                rows = ((video, shard, "") for video, shard in planned(dataset))
                for video_id in books.add_wanted(dataset, rows):
                    got = f"two, dataset {dataset!r}"
                    report.add(Problem("plan", "one shard per video", got, video=video_id))
            except (FourdhError, OSError) as error:
                key = f"_plan/{folder}"
                report.add(Problem("plan", "a recorded plan", f"{error!s:.300}", key=key))
                continue
            for video_id, shard, other in books.unplanned(dataset):
                got = f"shard {other!r}" if other else "a plan without it: it would be done twice"
                report.add(Problem("plan", "the planned shard", got, shard, video=video_id))
        report.planned = books.num_wanted()
        for video_id, shard in books.not_done():
            report.add(Problem("not_done", "a finished video", "none", shard, video=video_id))
        for video_id, shard, wanted, got in books.changed() if has_corpus else ():
            expected = f"content {wanted}"
            report.add(Problem("changed", expected, f"content {got}", shard, "", video_id))

    def _leftovers(self, finished: set[str]) -> None:
        found = Counter(key.split("/")[1] for key, _ in self._store.list(WORK))
        left = sorted(found.keys() & finished)
        if left and not self._is_writing:
            self._report.notes.append(
                f"{sum(found[shard] for shard in left)} objects of {len(left)} finished shards are "
                f"left below {WORK}/, for example {WORK}/{left[0]}; the next run removes them"
            )
        if open_ := sorted(found.keys() - finished):
            self._report.notes.append(f"{len(open_)} unfinished shards have rows below {WORK}/")

    def _release(self, digests: dict[str, str]) -> None:
        """A release holds exactly the commits that its manifest names."""

        def add(expected: str, got: str, shard: str = "") -> None:
            self._report.add(Problem("release", expected, got, shard, RELEASE_KEY))

        try:
            manifest = json.loads(self._store.read_bytes(RELEASE_KEY))
            version = manifest["release_version"]
            if version > RELEASE_VERSION:
                add(f"version {RELEASE_VERSION} or older", f"{version}")
                return
            promised = {
                shard: (str(item["commit_sha256"]), str(item["dataset"]))
                for shard, item in manifest["shards"].items()
            }
            digest = release_digest({shard: each for shard, (each, _) in promised.items()})
            if manifest["digest"] != digest:
                add(f"digest {digest} of its shards", f"{manifest['digest']!r:.80}")
            if self._dataset is None and manifest["totals"]["rows"] != self._report.rows:
                add(f"rows {self._report.rows}", f"{manifest['totals']['rows']!r:.200}")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            add("the manifest of a release", f"{type(error).__name__}: {error!s:.200}")
            return
        for shard in sorted(promised.keys() | digests.keys()):
            expected, dataset = promised.get(shard, ("no such shard", self._dataset))
            if self._dataset is not None and dataset != self._dataset:
                continue
            if expected != digests.get(shard):
                add(f"commit record {expected}", digests.get(shard, "none"), shard)


def release_digest(commits: dict[str, str]) -> str:
    """One checksum of a release: of its shards and the SHA-256 of their commit records."""
    text = json.dumps(commits, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

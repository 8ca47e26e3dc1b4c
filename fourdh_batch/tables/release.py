"""`<root>/releases/<name>/`: the tables of one moment, copied, for whoever needs a fixed set.

A release is an output root of its own: the same keys, byte for byte the same objects and commit
records, and in `_release.json` the checksums of those records. It is copied rather than pointed
at, because a root keeps one version of an object: the next run overwrites it.

Until it is finished, an object in each of its tables that is no Parquet file makes every reader
refuse the table. An interrupted release is completed by the same call. A job may go on meanwhile:
each shard is proved against its commit record, and what has changed since is copied again until a
look at all records finds nothing new. All of them then held at the moment that look began.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fourdh_batch import __version__
from fourdh_batch.errors import ConfigError, SchemaError, StorageError
from fourdh_batch.storage import Store, redact_uri, safe_key
from fourdh_batch.tables.check_shard import read_commit
from fourdh_batch.tables.manifest import COMMITS, CommitRecord, Lease
from fourdh_batch.tables.reader import RELEASE_KEY, UNFINISHED
from fourdh_batch.tables.schema import TABLES
from fourdh_batch.tables.verify import (
    RELEASE_VERSION,
    fetch_object,
    release_digest,
    run_parallel,
)
from fourdh_batch.tables.writer import object_key

RELEASES = "releases"
MAX_LOOKS = 10  # at all records; each copies what has changed since the one before
ATTEMPTS = 6  # of a shard whose objects do not fit its record: it is being published
BACKOFF_S = 0.5  # doubles; publishing takes seconds


@dataclass(frozen=True, slots=True)
class ReleaseProgress:
    """Where the copying is."""

    bytes_done: int
    bytes_total: int


OnProgress = Callable[[ReleaseProgress], None]


@dataclass(frozen=True, slots=True)
class ReleasedShard:
    """One shard of a release; `commit_sha256` is of its commit record, which has the rest."""

    dataset: str
    commit_sha256: str
    fingerprint: str
    model_fingerprint: str
    schema_versions: dict[str, int]
    code_version: int
    videos: dict[str, int]
    rows: dict[str, int]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Release:
    """A finished release.

    Attributes:
        name, place: of it; the place without credentials.
        digest: checksum of everything in it; equal for equal content.
        created: UTC.
        shards: by id.
    """

    name: str
    place: str
    digest: str
    created: str
    shards: dict[str, ReleasedShard]

    def totals(self) -> dict[str, Any]:
        """Counts over all shards, as JSON holds them."""
        videos: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        models: Counter[str] = Counter()
        for shard in self.shards.values():
            videos.update(shard.videos)
            rows.update(shard.rows)
            models[shard.model_fingerprint] += 1
        return {
            "datasets": sorted({shard.dataset for shard in self.shards.values()}),
            "num_shards": len(self.shards),
            "num_bytes": sum(shard.num_bytes for shard in self.shards.values()),
            "videos": dict(sorted(videos.items())),
            "rows": {name: rows[name] for name in TABLES},
            "shards_by_model_fingerprint": dict(sorted(models.items())),
        }


def release_root(
    root: str,
    name: str,
    *,
    datasets: Sequence[str] = (),
    on_progress: OnProgress = lambda progress: None,
) -> Release:
    """Copy what is committed below a root to `<root>/releases/<name>/`.

    Args:
        root: output root, local or remote.
        name: letters, digits, `-`, `.`, `_`; not beginning with `.` or `_`.
        datasets: only these; all by default.
        on_progress: told now and then where the copying is.
    Raises:
        ConfigError: an impossible name, or one that is taken.
        FileNotFoundError: nothing is committed (of these datasets).
        OutputInUseError: this release is being made at this moment.
        SchemaError: a commit record that cannot be read.
        StorageError: objects that do not fit their record and do not come to, a root that
            changes faster than it can be copied, or a store that fails.
    """
    if not name or safe_key(name) != name:
        raise ConfigError(
            f"release {name!r}: expected letters, digits, '-', '.' and '_', "
            "not beginning with '.' or '_'"
        )
    source = Store(root)
    target = Store(f"{source.root}/{RELEASES}/{name}")
    keys = [key for key, _ in source.list(COMMITS) if key.endswith(".json")]
    if not keys:
        raise FileNotFoundError(2, "nothing is committed", redact_uri(source.root))
    _refuse_finished(target, name)
    with Lease(target) as lease, lease.kept():
        _refuse_finished(target, name)
        if target.exists(RELEASE_KEY):  # interrupted between its last two steps
            release = _read_release(target, name)
        else:
            copy = _Copy(source, target, set(datasets), lease.check, on_progress)
            release = _finish(target, name, copy.run(keys))
        for table in TABLES:
            target.delete(f"{table}/{UNFINISHED}")
    return release


def _refuse_finished(target: Store, name: str) -> None:
    if target.exists(RELEASE_KEY) and not _is_guarded(target):
        raise ConfigError(
            f"release {name!r} exists and stays as it is: {redact_uri(target.root)}; take another "
            "name"
        )


def _is_guarded(target: Store) -> bool:
    return any(target.exists(f"{table}/{UNFINISHED}") for table in TABLES)


def _read_release(target: Store, name: str) -> Release:
    body = json.loads(target.read_bytes(RELEASE_KEY))
    shards = {shard: ReleasedShard(**item) for shard, item in body["shards"].items()}
    return Release(name, redact_uri(target.root), body["digest"], body["created"], shards)


def _finish(target: Store, name: str, shards: dict[str, ReleasedShard]) -> Release:
    """Write the manifest; only the guards of the tables are left then."""
    release = Release(
        name=name,
        place=redact_uri(target.root),
        digest=release_digest({shard: item.commit_sha256 for shard, item in shards.items()}),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        shards=dict(sorted(shards.items())),
    )
    body = {
        "release_version": RELEASE_VERSION,
        "name": name,
        "created": release.created,
        "created_by": f"fourdh_batch {__version__}",
        "digest": release.digest,
        "totals": release.totals(),
        "shards": {shard: asdict(item) for shard, item in release.shards.items()},
    }
    target.write_bytes(RELEASE_KEY, json.dumps(body, indent=1).encode())
    return release


class _TornError(Exception):
    """An object is not the one of its commit record, at this moment."""


class _Copy:
    """Brings a release to what is committed below a root."""

    def __init__(
        self,
        source: Store,
        target: Store,
        datasets: set[str],
        check_lease: Callable[[], None],
        on_progress: OnProgress,
    ) -> None:
        self._source = source
        self._target = target
        self._datasets = datasets
        self._check_lease = check_lease
        self._on_progress = on_progress
        self._shards: dict[str, tuple[str, ReleasedShard]] = {}  # by key of the commit record
        self._bytes_done = self._bytes_total = 0
        self._lock = threading.Lock()

    def run(self, keys: list[str]) -> dict[str, ReleasedShard]:
        """Copy; the shards that were, at one moment, behind these keys.

        Shards that are committed for the first time after the call began are left out.
        """
        for table in TABLES:
            self._target.write_bytes(
                f"{table}/{UNFINISHED}", b"This release is not finished. Make it again.\n"
            )
        folders = [safe_key(dataset) for dataset in sorted(self._datasets)] or [""]
        for table in TABLES:
            for folder in folders:
                listed = self._source.list(f"{table}/{folder}" if folder else table)
                self._bytes_total += sum(size for _, size in listed)
        for _ in range(MAX_LOOKS):
            if not sum(run_parallel(self._bring, keys, self._tick)):
                break
        else:
            raise StorageError(
                f"{redact_uri(self._source.root)}: shards were overwritten during each of "
                f"{MAX_LOOKS} looks; give the command again when less is being written"
            )
        shards = dict(self._shards.values())
        if not shards:
            wanted = f" of {', '.join(sorted(self._datasets))}" if self._datasets else ""
            place = redact_uri(self._source.root)
            raise FileNotFoundError(2, f"nothing is committed{wanted}", place)
        self._clear()
        return shards

    def _tick(self) -> None:
        self._check_lease()
        done = min(self._bytes_done, self._bytes_total)
        self._on_progress(ReleaseProgress(done, self._bytes_total))

    def _bring(self, key: str) -> bool:
        """Bring one shard to its state of now; whether anything had to be done."""
        for attempt in range(ATTEMPTS):
            try:
                return self._bring_once(key)
            except FileNotFoundError:  # the shard leaves the tables: its videos are gone
                return self._shards.pop(key, None) is not None
            except (_TornError, StorageError) as error:
                if attempt == ATTEMPTS - 1:
                    raise StorageError(
                        f"{error}; it is being published for long, or damaged: see fourdh verify"
                    ) from error
                time.sleep(BACKOFF_S * 2**attempt)
        raise AssertionError(ATTEMPTS)

    def _bring_once(self, key: str) -> bool:
        try:
            record, data = read_commit(self._source, key)
        except ValueError as error:
            raise SchemaError(f"{key}: expected a commit record, got {error}") from error
        if self._datasets and record.dataset not in self._datasets:
            return False
        if record.is_void:
            raise _TornError(f"shard {record.shard_id}: a run has begun to replace it")
        digest = sha256(data).hexdigest()
        before = self._shards.get(key)
        if before is not None and before[1].commit_sha256 == digest:
            return False
        if before is None and self._is_copied(key, data):  # by an interrupted call
            self._enter(key, record, digest)
            return False
        for name, item in record.objects.items():
            if name not in TABLES or item.key != object_key(name, record.dataset, record.shard_id):
                raise SchemaError(f"shard {record.shard_id!r}: its record names {item.key!r:.200}")
        self._target.delete(key)  # of an older state, whose objects are about to be overwritten
        for name in record.objects:
            self._copy_object(record, name)
        self._target.write_bytes(key, data)
        self._enter(key, record, digest)
        return True

    def _is_copied(self, key: str, data: bytes) -> bool:
        try:
            return self._target.read_bytes(key) == data
        except FileNotFoundError:
            return False

    def _enter(self, key: str, record: CommitRecord, digest: str) -> None:
        num_bytes = sum(item.num_bytes for item in record.objects.values())
        with self._lock:
            self._bytes_done += num_bytes
        self._shards[key] = (
            record.shard_id,
            ReleasedShard(
                dataset=record.dataset,
                commit_sha256=digest,
                fingerprint=record.fingerprint,
                model_fingerprint=record.model_fingerprint,
                schema_versions=dict(record.schema_versions),
                code_version=record.code_version,
                videos=dict(Counter(video.status for video in record.videos)),
                rows=record.num_rows,
                num_bytes=num_bytes,
            ),
        )

    def _copy_object(self, record: CommitRecord, name: str) -> None:
        item = record.objects[name]
        with tempfile.TemporaryDirectory(prefix="fourdh-release-") as folder:
            path = Path(folder) / "object"
            try:
                with path.open("wb") as file:
                    size, digest = fetch_object(self._source, item.key, file)
            except FileNotFoundError:
                size, digest = 0, "nothing"
            except OSError as error:
                raise _TornError(f"{item.key}: {error}") from error
            if (size, digest) != (item.num_bytes, item.sha256):
                raise _TornError(
                    f"shard {record.shard_id!r}: {item.key}: expected {item.num_bytes} bytes, "
                    f"sha256 {item.sha256} by its commit record, got {size} bytes, {digest}"
                )
            self._target.put_file(path, item.key)

    def _clear(self) -> None:
        """Remove what an interrupted call copied and no shard of now has."""
        keep = {f"{table}/{UNFINISHED}" for table in TABLES} | self._shards.keys()
        for shard_id, shard in self._shards.values():
            keep |= {object_key(table, shard.dataset, shard_id) for table in TABLES}
        for folder in (*TABLES, COMMITS):
            for key, _ in self._target.list(folder):
                if key not in keep:
                    self._target.delete(key)

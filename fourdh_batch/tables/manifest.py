"""What is done, from which inputs: commit records, fingerprints, and the lease of an output root.

A shard counts as done exactly when `_commits/<shard>.json` exists; it is written after all of the
shard's objects. A commit with another fingerprint than the plan's is redone.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fourdh_batch.errors import OutputInUseError, SchemaError
from fourdh_batch.storage import Store, redact_uri, safe_key

logger = logging.getLogger(__name__)

COMMITS = "_commits"
LEASES = "_lease"
LEASE_S = 120.0  # renew every third of it; a lost machine blocks its output so long at most
LEASE_ATTEMPTS = 8
NUM_READ_THREADS = 16
CODE_VERSION = 3  # raised when the same inputs and settings give other rows
RECORD_VERSION = 2  # of the JSON of a commit record; 1 lacked rows and details of videos


def fingerprint_of(values: Mapping[str, Any]) -> str:
    """Digest of a mapping; equal for equal content, whatever the order of its keys.

    Raises:
        TypeError, ValueError: something in it has no single JSON form (NaN, sets, objects).
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def details_digest(extra: str) -> str:
    """Digest of the other columns of a manifest, as JSON; "" without any."""
    return blake2b(extra.encode(), digest_size=8).hexdigest() if extra else ""


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """One published object: its key, size, SHA-256 and number of rows."""

    key: str
    num_bytes: int
    sha256: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """One video of a finished shard.

    Attributes:
        video_id, content_fingerprint: as in `videos`.
        status: how it ended, see `videos.status`.
        num_rows: rows by table name; empty in records of version 1.
        details: digest of the manifest's other columns as they stand in `videos`; None in records
            of version 1.
    """

    video_id: str
    content_fingerprint: str
    status: str
    num_rows: Mapping[str, int] = field(default_factory=dict)
    details: str | None = None


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """One finished shard.

    Attributes:
        shard_id: of the plan.
        dataset: name of the corpus.
        fingerprint: of the unit: contents, settings, weights, schemas and code that change rows.
        config_fingerprint: of the settings as run.
        model_fingerprint: of the weights and the settings that change rows.
        videos: in `video_id` order.
        objects: one per table, by table name.
        schema_versions: by table name.
        code_version: `CODE_VERSION` of the writer.
        timings_s: wall times; kept here because tables must not differ from run to run.
    """

    shard_id: str
    dataset: str
    fingerprint: str
    config_fingerprint: str
    model_fingerprint: str
    videos: tuple[VideoRecord, ...]
    objects: Mapping[str, ObjectRecord]
    schema_versions: Mapping[str, int]
    code_version: int = CODE_VERSION
    timings_s: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> bytes:
        body = {"record_version": RECORD_VERSION, **asdict(self)}
        return json.dumps(body, indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes, key: str) -> CommitRecord:
        """Raises: SchemaError: not a commit record, or of a newer version."""
        try:
            body = json.loads(data)
            version = body.pop("record_version")
            if version > RECORD_VERSION:
                raise SchemaError(
                    f"{key}: expected a commit record of version {RECORD_VERSION} or older, got "
                    f"{version}; it needs a newer fourdh_batch"
                )
            body["videos"] = tuple(VideoRecord(**video) for video in body["videos"])
            body["objects"] = {n: ObjectRecord(**o) for n, o in body["objects"].items()}
            return cls(**body)
        except SchemaError:
            raise
        except json.JSONDecodeError as error:
            raise SchemaError(f"{key}: expected JSON, got {data[:80]!r}") from error
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise SchemaError(f"{key}: expected a commit record, got {data[:80]!r}") from error

    @property
    def is_void(self) -> bool:
        """Whether its objects are being replaced, or were when a run was killed."""
        return not self.fingerprint

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows per table."""
        return {name: record.num_rows for name, record in self.objects.items()}


def commit_key(shard_id: str) -> str:
    """Where the commit record of a shard lies."""
    return f"{COMMITS}/{safe_key(shard_id)}.json"


def write_commit(store: Store, record: CommitRecord) -> None:
    """Publish a commit record; the shard counts as done from here on."""
    store.write_bytes(commit_key(record.shard_id), record.to_json())


def void_commit(store: Store, shard_id: str) -> None:
    """Before the objects of a finished shard change: no plan may take it for up to date any more.

    Its objects stay readable through the record as long as they are those that it names; with a
    kill from here on the next run takes over of them what it can. Nothing happens where there is
    no record.
    """
    key = commit_key(shard_id)
    try:
        record = CommitRecord.from_json(store.read_bytes(key), key)
    except (FileNotFoundError, SchemaError):
        return
    store.write_bytes(key, replace(record, fingerprint="").to_json())


def read_commits(store: Store) -> dict[str, CommitRecord]:
    """All commit records below a root, by shard."""
    keys = [key for key, _ in store.list(COMMITS) if key.endswith(".json")]

    def read(key: str) -> CommitRecord:
        return CommitRecord.from_json(store.read_bytes(key), key)

    with ThreadPoolExecutor(NUM_READ_THREADS) as pool:
        records = list(pool.map(read, keys))
    return {record.shard_id: record for record in sorted(records, key=lambda r: r.shard_id)}


class Lease:
    """The right of one driver to write below a root; a context manager.

    Leases are numbered objects below `_lease/`; the highest number counts. Taking over a lapsed
    one is the exclusive creation of the next number, so of several drivers one wins. A lease
    lapses when it is not renewed in time, or at once where its process is seen to be dead.

    Args:
        store: the output root.
        duration_s: seconds until it lapses unless renewed.

    Raises:
        OutputInUseError: on entering, another driver holds it; on `renew`, it was lost.
    """

    def __init__(self, store: Store, *, duration_s: float = LEASE_S) -> None:
        self._store = store
        self._duration_s = duration_s
        self._nonce = secrets.token_hex(8)
        self._since_s = 0.0
        self._lost: OutputInUseError | None = None
        self._renewed = 0.0  # when `kept` last did it
        self._number = 0

    def acquire(self) -> None:
        """Take the lease, also over one that has lapsed."""
        self._since_s = time.time()
        for _ in range(LEASE_ATTEMPTS):
            top = max(self._numbers(), default=0)
            held = self._read(top) if top else None
            if held is not None and not has_lapsed(held):
                raise OutputInUseError(self._in_use(held, top))
            self._number = top + 1
            if not self._store.create_exclusive(_lease_key(self._number), self._body()):
                continue
            numbers = self._numbers()
            if max(numbers, default=0) > self._number:  # cleared and overtaken since the look
                self._store.delete(_lease_key(self._number))
                continue
            for number in numbers:
                if number < self._number:
                    self._store.delete(_lease_key(number))
            return
        raise OutputInUseError(f"{self._place()}: several drivers are taking it at this moment")

    def renew(self) -> None:
        """Hold it for another `duration_s`."""
        self._check_held()
        self._store.write_bytes(_lease_key(self._number), self._body())
        self._check_held()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renew it in a thread of its own, whatever the caller is busy with; see `check`."""
        stop = threading.Event()

        def keep() -> None:
            while not stop.wait(self._duration_s / 3):
                begun = time.monotonic()  # the time in the object is of now, not of its arrival
                try:
                    self.renew()
                except OutputInUseError as error:
                    self._lost = error
                    return
                except Exception as error:  # noqa: BLE001 - it may work next time
                    logger.warning("lease not renewed: %s", error)
                    continue
                self._renewed = begun

        self._renewed = time.monotonic()
        thread = threading.Thread(target=keep, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def check(self) -> None:
        """Raises: OutputInUseError: `kept` found it lost, or could not renew it in time."""
        if self._lost is not None:
            raise self._lost
        if time.monotonic() - self._renewed > self._duration_s:
            raise OutputInUseError(
                f"{self._place()}: the lease could not be renewed for {self._duration_s:g} s"
            )

    def release(self) -> None:
        """Give it back; nothing happens where it was lost."""
        held = self._read(self._number)
        if held is not None and held["nonce"] == self._nonce:
            # It is kept, as lapsed: numbers must not start again while somebody is looking.
            self._store.write_bytes(_lease_key(self._number), self._body(expires_s=0.0))

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _place(self) -> str:
        return f"output {redact_uri(self._store.root)}"

    def _numbers(self) -> list[int]:
        names = [key.rpartition("/")[2] for key, _ in self._store.list(LEASES)]
        return [int(name[:-5]) for name in names if name[:-5].isdigit()]

    def _read(self, number: int) -> dict[str, Any] | None:
        key = _lease_key(number)
        try:
            data = self._store.read_bytes(key)
        except FileNotFoundError:
            return None
        try:
            held: dict[str, Any] = json.loads(data)
            float(held["expires_s"]), float(held["since_s"])
            str(held["nonce"]), str(held["owner"]), str(held["process"])
        except (KeyError, TypeError, ValueError) as error:
            raise OutputInUseError(
                f"{self._place()}: {key} is not a lease of ours ({data[:80]!r}); delete it if no "
                "driver is running"
            ) from error
        return held

    def _check_held(self) -> None:
        held = self._read(self._number)
        top = max(self._numbers(), default=0)
        if held is None or held["nonce"] != self._nonce or top != self._number:
            taken = self._read(top) if top else None
            raise OutputInUseError(
                f"{self._place()}: this driver lost its lease"
                + (f" to {taken['owner']}" if taken is not None else ", its object was deleted")
            )

    def _body(self, *, expires_s: float | None = None) -> bytes:
        held = {
            "owner": f"{socket.gethostname()}, process {os.getpid()}",
            "process": _process_identity(os.getpid()),
            "nonce": self._nonce,
            "since_s": self._since_s,
            "expires_s": time.time() + self._duration_s if expires_s is None else expires_s,
        }
        return json.dumps(held, indent=1).encode()

    def _in_use(self, held: dict[str, Any], number: int) -> str:
        return (
            f"{self._place()}: in use by {held['owner']} since {_clock(held['since_s'])}; unless "
            f"renewed the lease lapses at {_clock(held['expires_s'])}. If that driver is surely "
            f"dead, delete {redact_uri(self._store.uri(_lease_key(number)))}"
        )


def _lease_key(number: int) -> str:
    return f"{LEASES}/{number:08d}.json"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def has_lapsed(held: Mapping[str, Any]) -> bool:
    """Whether nobody renews a lease any more, by its content."""
    return float(held["expires_s"]) <= time.time() or _is_dead(str(held["process"]))


def _process_identity(pid: int) -> str:
    """Boot, process namespace, process and its start: never given twice.

    Returns:
        "" where the process is gone (or not yet reaped), and off Linux.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").stat().st_ino
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = status.rpartition(")")[2].split()  # from the third field of proc(5) on
    state, start_ticks = fields[0], fields[19]
    return "" if state in "ZX" else f"{boot} {namespace} {pid} {start_ticks}"


def _is_dead(identity: str) -> bool:
    """Whether a process of this very machine and namespace is gone; False where unknown."""
    here = _process_identity(os.getpid()).split()
    there = identity.split()
    if len(here) != 4 or len(there) != 4 or here[:2] != there[:2]:
        return False
    try:
        os.kill(int(there[2]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it lives, and is somebody else's
        return False
    return _process_identity(int(there[2])) != identity

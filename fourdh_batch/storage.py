"""Files and objects behind one door: local paths, `s3://`, `gs://`, `memory://`, any fsspec.

No other module imports fsspec. An address is a plain local path or `<protocol>://…`; chained
fsspec addresses (``zip://…::s3://…``) are not supported, so `::` may occur in any name.

What is written is seen whole or not at all: locally a temporary file in the same folder is
renamed, an object store gets one PUT (above `PUT_LIMIT_BYTES` a multipart upload, which also
appears only once it is complete). Files opened for writing are never used on object stores: there
an exception inside the `with` block publishes what was written so far.
"""

from __future__ import annotations

import asyncio
import errno
import glob
import io
import logging
import os
import random
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar, cast
from urllib.parse import quote

import fsspec
import fsspec.asyn
import fsspec.config
from fsspec.utils import glob_translate

from fourdh_batch.errors import ConfigError, StorageError

READ_BLOCK_BYTES = 8 * 2**20  # fetched at once; most clips of ten seconds are one block
MAX_SPOOLED_BYTES = 8 * 2**30  # of one remote file, on local disk; two hours of 1080p at 8 Mbit/s
KEEP_FREE_SHARE = 0.1  # of the disk; Ray stops spilling objects where only 0.05 are left
MAX_BLOCKS_IN_MEMORY = 3  # of one remote file, where the disk has no room: index, sound, pictures
PUT_LIMIT_BYTES = 256 * 2**20  # one PUT holds the object in memory; shards aim at 128 MB
KEYS_AT_ONCE = 1000  # S3's limit for a page of a listing and for a request that deletes
MAX_ATTEMPTS = 6  # with BACKOFF_S: up to about 12 s of waiting, more than a usual throttle lasts
BACKOFF_S = 0.4
MAX_BACKOFF_S = 10.0
CONNECT_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 60.0  # until a store answers a call; it may have 1,000 keys to delete
STALL_TIMEOUT_S = 20.0  # without a byte of a file that is being read
STALE_TEMPORARY_S = 86_400.0  # a temporary file this old belongs to no living process
MAX_KEY_PART = 120  # characters; file systems allow 255 bytes, names get prefixes and suffixes
_PIECE_BYTES = 2**20
SAMPLE_BLOCKS = 16  # of a local file's fingerprint
SAMPLE_BLOCK_BYTES = 16 * 1024

_PERMANENT_ERRNO = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
}
_CLIENT_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "fsspec"}
_PERMANENT_CLIENT_ERRORS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ParamValidationError",
    "ProfileNotFound",
    "InvalidEndpointConfigurationError",
}
_TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
# Of requests that did not arrive whole; S3 answers them with status 400
_TRANSIENT_CODES = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}
_S3 = ("s3", "s3a")
_KEYLESS = (*_S3, "gs", "gcs")  # they would take a key in an address for part of the bucket

T = TypeVar("T")
logger = logging.getLogger(__name__)


# --- addresses ---------------------------------------------------------------------------------


def is_local(uri: str) -> bool:
    """Whether the address is a path on this machine."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def local_path(uri: str) -> Path:
    """The path behind a local address."""
    return Path(uri.split("://", 1)[1] if "://" in uri else uri)


def normal_uri(uri: str) -> str:
    """One spelling of an address: local paths resolved, remote ones without slashes at the end."""
    return str(local_path(uri).resolve()) if is_local(uri) else uri.rstrip("/")


def redact_uri(uri: str) -> str:
    """The address without user, password and signed query: fit for logs and tables."""
    if "://" not in uri:
        return uri
    protocol, rest = uri.split("://", 1)
    host, slash, path = rest.partition("/")
    port = "" if host.endswith("]") else host.rpartition(":")[2]
    if "@" in host:
        host = "***@" + host.rpartition("@")[2]
    elif "@" in path and port != host and not port.isdecimal():  # a password with a slash in it
        host, slash, path = ("***@" + rest.rpartition("@")[2]).partition("/")
    before, mark, query = path.partition("?")
    if mark and (protocol in ("http", "https") or _SIGNED.search(query)):
        path = before + "?***"
    return f"{protocol}://{host}{slash}{path}"


_SIGNED = re.compile(r"(?i)(signature|credential|token|secret|password|\bsig|key)[^&=]*=")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def redact(text: str) -> str:
    """A text, the addresses in it without user, password and signed query."""
    return _ADDRESS.sub(lambda found: redact_uri(found[0]), text)


def safe_key(text: str) -> str:
    """Any text as one part of a key, different texts as different parts.

    Letters, digits, `-`, `.` and `_` stay, except a leading `.` or `_` (Arrow ignores files and
    folders with such names); everything else is percent-quoted UTF-8. Long texts keep their
    beginning, followed by `~` and a digest.
    """
    quoted = quote(text, safe="", errors="surrogatepass").replace("~", "%7E")
    if quoted[:1] in (".", "_"):
        quoted = f"%{ord(quoted[0]):02X}{quoted[1:]}"
    if not quoted:
        return "~"
    if len(quoted) <= MAX_KEY_PART:
        return quoted
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{quoted[: MAX_KEY_PART - len(digest) - 1]}~{digest}"


def _check_key(key: str) -> str:
    parts = key.split("/")
    if not key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"expected a relative key without empty, '.' or '..' parts, got {key!r}")
    return key


# --- retries -----------------------------------------------------------------------------------


def _http_status(error: BaseException) -> int | None:
    """Status of the reply behind an error of a client library."""
    cause: BaseException | None = error
    while cause is not None:
        library = type(cause).__module__.split(".")[0]
        response = getattr(cause, "response", None)
        status: object = None
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif library == "gcsfs":
            status = getattr(cause, "code", None)
        elif library == "aiohttp":  # other errors of aiohttp have a `code` of their own making
            status = getattr(cause, "status", None)
        if isinstance(status, int):
            return status
        cause = cause.__cause__
    return None


def _is_from_client(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in _CLIENT_LIBRARIES


def _error_code(error: BaseException) -> str:
    """What S3 calls an error."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        cause = cause.__cause__
    return ""


def _is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    status = _http_status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS or _error_code(error) in _TRANSIENT_CODES
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNO and not isinstance(error, PermissionError)
    return _is_from_client(error) and type(error).__name__ not in _PERMANENT_CLIENT_ERRORS


def _harmless(error: BaseException) -> BaseException | None:
    """The error as a cause to show, None where it or what led to it names a secret."""
    link: BaseException | None = error
    while link is not None:
        if redact(str(link)) != str(link):
            return None
        link = link.__cause__ or link.__context__
    return error


@dataclass(frozen=True)
class _Retry:
    """Calls until it works, with exponential backoff and full jitter."""

    attempts: int = MAX_ATTEMPTS
    backoff_s: float = BACKOFF_S

    def __call__(self, what: str, call: Callable[[], T]) -> T:
        """
        Raises:
            FileNotFoundError, FileExistsError: at once.
            StorageError: a lasting fault, at once; or a passing one that did not pass.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return call()
            except (FileNotFoundError, FileExistsError) as error:
                if _harmless(error) is not None:
                    raise
                number = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EEXIST
                raise OSError(number, os.strerror(number), what) from None
            except StorageError:
                raise
            except Exception as error:
                if not isinstance(error, OSError) and not _is_from_client(error):
                    raise
                reason = f"{type(error).__name__}: {redact(str(error))}"
                if not _is_transient(error):
                    raise StorageError(f"{what}: {reason}") from _harmless(error)
                if attempt == self.attempts:
                    raise StorageError(
                        f"{what}: failed {attempt} times, last {reason}"
                    ) from _harmless(error)
                wait_s = random.uniform(0, min(MAX_BACKOFF_S, self.backoff_s * 2 ** (attempt - 1)))
                logger.warning("%s: attempt %d of %d: %s", what, attempt, self.attempts, reason)
                time.sleep(wait_s)
        raise ValueError(f"attempts: expected at least 1, got {self.attempts}")


_retry = _Retry()


# --- backends ----------------------------------------------------------------------------------


class _Backend(Protocol):
    """What `Store` needs of a file system; keys are relative to its root."""

    def read(self, key: str) -> bytes: ...
    def open(self, key: str) -> BinaryIO: ...
    def write(self, key: str, data: bytes) -> None: ...
    def put(self, path: Path, key: str) -> None: ...
    def create(self, key: str, data: bytes) -> None: ...
    def exists(self, key: str) -> bool: ...
    def delete(self, key: str) -> None: ...
    def delete_tree(self, prefix: str) -> None: ...
    def list(self, prefix: str) -> list[tuple[str, int]]: ...


class _LocalBackend:
    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def _aside(self, key: str) -> Iterator[tuple[Path, BinaryIO]]:
        """The final path and a temporary file beside it, which is gone at the end."""
        target = self.root / key
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(target.parent)) from error
        for old in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            with suppress(FileNotFoundError):  # its process may be removing it
                if time.time() - old.stat().st_mtime > STALE_TEMPORARY_S:
                    old.unlink()
        temporary = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            with temporary.open("xb") as file:
                yield target, file
        finally:
            temporary.unlink(missing_ok=True)

    def _publish(self, target: Path, file: BinaryIO, *, exclusive: bool = False) -> None:
        file.flush()
        os.fsync(file.fileno())
        if exclusive:
            os.link(file.name, target)  # atomic, and fails where the target exists
        else:
            Path(file.name).replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def open(self, key: str) -> BinaryIO:
        return (self.root / key).open("rb")

    def write(self, key: str, data: bytes) -> None:
        with self._aside(key) as (target, file):
            file.write(data)
            self._publish(target, file)

    def put(self, path: Path, key: str) -> None:
        with self._aside(key) as (target, file), path.open("rb") as source:
            shutil.copyfileobj(source, file, READ_BLOCK_BYTES)
            self._publish(target, file)

    def create(self, key: str, data: bytes) -> None:
        with self._aside(key) as (target, file):
            file.write(data)
            self._publish(target, file, exclusive=True)

    def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        while (self.root / prefix).is_dir():
            with suppress(FileNotFoundError):  # another process may be removing the same
                shutil.rmtree(self.root / prefix)

    def list(self, prefix: str) -> list[tuple[str, int]]:
        folder = self.root / prefix
        return [
            (path.relative_to(self.root).as_posix(), size)
            for path, size in _walk(folder, all_or_nothing=True)
            if not (path.name.startswith(".") and path.name.endswith(".tmp"))
        ]


_CREATE_LOCK = threading.Lock()  # fsspec's memory file system looks and creates in two steps


class _RemoteBackend:
    def __init__(self, root: str, retry: _Retry) -> None:
        self.root = root
        self.retry = retry

    def _writing(self) -> dict[str, Any]:
        if self.root.split("://", 1)[0] not in _S3:
            return {}
        # One PUT below twice the chunk size
        return {"chunksize": PUT_LIMIT_BYTES // 2, "max_concurrency": 1}

    def _at(self, key: str) -> tuple[Any, str]:
        filesystem, path = _filesystem(self.root, single_attempt=True)
        return filesystem, f"{path.rstrip('/')}/{key}" if key else path.rstrip("/")

    def read(self, key: str) -> bytes:
        filesystem, path = self._at(key)
        if hasattr(filesystem, "call_s3"):
            return _get_from_s3(filesystem, path).data
        return cast(bytes, filesystem.cat_file(path))

    def open(self, key: str) -> BinaryIO:
        return _opened(f"{self.root}/{key}", self.retry)

    def write(self, key: str, data: bytes) -> None:
        filesystem, path = self._at(key)
        filesystem.pipe_file(path, data, **self._writing())

    def put(self, path: Path, key: str) -> None:
        filesystem, target = self._at(key)
        filesystem.put_file(str(path), target, **self._writing())

    def create(self, key: str, data: bytes) -> None:
        filesystem, path = self._at(key)
        try:
            with _CREATE_LOCK:
                filesystem.pipe_file(path, data, mode="create")
        except OSError as error:
            if _http_status(error) == 412:  # Ceph's gateway; others raise FileExistsError
                raise FileExistsError(key) from error
            raise

    def exists(self, key: str) -> bool:
        filesystem, path = self._at(key)
        try:
            return bool(filesystem.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def delete(self, key: str) -> None:
        filesystem, path = self._at(key)
        try:
            filesystem.rm_file(path)
        except FileNotFoundError:
            return

    def delete_tree(self, prefix: str) -> None:
        filesystem, path = self._at(prefix)
        found = (name for name, _ in _remote_files(filesystem, path, self.retry))
        if not hasattr(filesystem, "call_s3"):
            for name in found:
                filesystem.rm_file(name)
            return
        bucket, _, _ = filesystem.split_path(f"{path}/")
        while batch := [{"Key": name[len(bucket) + 1 :]} for name in islice(found, KEYS_AT_ONCE)]:
            what = {"Objects": batch, "Quiet": True}
            errors = filesystem.call_s3("delete_objects", Bucket=bucket, Delete=what).get("Errors")
            if errors:  # the call as a whole has worked; s3fs's own `rm` would pass over these
                said = f"{errors[0].get('Code')}: {errors[0].get('Message')}"
                raise OSError(errno.EIO, f"{len(errors)} keys are still there, the first by {said}")

    def list(self, prefix: str) -> list[tuple[str, int]]:
        filesystem, base = self._at("")
        _, path = self._at(prefix)
        found = _remote_files(filesystem, path, self.retry)
        return [(name[len(base) + 1 :], int(info["size"])) for name, info in found]


_filesystem_lock = threading.Lock()
_filesystems: dict[tuple[int, str, bool], Any] = {}


def _filesystem(uri: str, *, single_attempt: bool = False) -> tuple[Any, str]:
    """The fsspec file system of a remote address and the path in it.

    One instance per process serves all threads (fsspec would make one per thread, each with its
    own connections). `single_attempt` turns the client's retries off, where `_retry` has them.
    """
    protocol = uri.split("://", 1)[0]
    if protocol in _KEYLESS and redact_uri(uri).startswith(f"{protocol}://***@"):
        raise StorageError(
            f"{redact_uri(uri)}: expected an address without a key; give it by AWS_PROFILE, "
            "AWS_ACCESS_KEY_ID or the store's own settings"
        )
    cls = fsspec.get_filesystem_class(protocol)
    options: dict[str, Any] = cls._get_kwargs_from_urls(uri)
    path = cls._strip_protocol(uri)
    with _filesystem_lock:
        key = (os.getpid(), f"{protocol} {sorted(options.items())}", single_attempt)
        if key not in _filesystems:
            options["use_listings_cache"] = False
            if protocol in _S3:
                options["default_cache_type"] = "none"  # Arrow reads exactly the ranges it needs
                client: dict[str, Any] = {
                    "connect_timeout": CONNECT_TIMEOUT_S,
                    "read_timeout": CALL_TIMEOUT_S,
                }
                for name in _S3:  # the user's come first, such as the style of addresses
                    client |= fsspec.config.conf.get(name, {}).get("config_kwargs", {})
                if single_attempt:
                    client["retries"] = {"total_max_attempts": 1}
                options["config_kwargs"] = client
            filesystem = cls(**options, skip_instance_cache=True)
            if single_attempt and hasattr(filesystem, "retries"):
                filesystem.retries = 1
            _filesystems[key] = filesystem
        return _filesystems[key], path


# --- the store ---------------------------------------------------------------------------------


class Store:
    """Everything below one root. Picklable; safe to use from several threads.

    Every call retries passing faults (5xx, throttling, resets, timeouts) with backoff and jitter
    and then raises `StorageError`, which names the key and the number of attempts.

    Args:
        root: local path or `<protocol>://…`.
        attempts: how often a call is tried.
        backoff_s: longest first pause; doubles up to `MAX_BACKOFF_S`.
    """

    def __init__(
        self, root: str, *, attempts: int = MAX_ATTEMPTS, backoff_s: float = BACKOFF_S
    ) -> None:
        if not root:
            raise ValueError("expected a path or <protocol>://…, got an empty root")
        self._retry = _Retry(attempts, backoff_s)
        self._backend: _Backend
        if is_local(root):
            path = local_path(root).absolute()
            if path.is_file():
                raise ConfigError(f"{root}: expected the folder of an output, got a file")
            self.root = str(path)
            self._backend = _LocalBackend(path)
        else:
            self.root = root.rstrip("/")
            self._backend = _RemoteBackend(self.root, self._retry)

    def __repr__(self) -> str:
        return f"Store({redact_uri(self.root)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return (_store, (self.root, self._retry.attempts, self._retry.backoff_s))

    def _call(self, verb: str, key: str, call: Callable[[], T]) -> T:
        what = f"{verb} {redact_uri(self.uri(key) if key else self.root)}"
        return self._retry(what, call)

    def uri(self, key: str) -> str:
        """The full address of a key."""
        return f"{self.root}/{_check_key(key)}"

    def filesystem(self) -> tuple[Any, str]:
        """The fsspec file system and the root's path in it, for readers of many ranges.

        None stands for the local file system. The client's own retries are on.
        """
        return (None, self.root) if is_local(self.root) else _filesystem(self.root)

    def read_bytes(self, key: str) -> bytes:
        """Raises: FileNotFoundError."""
        _check_key(key)
        return self._call("read", key, lambda: self._backend.read(key))

    def open_read(self, key: str) -> BinaryIO:
        """Open for reading, seekable, as `open_read`. Raises: FileNotFoundError."""
        _check_key(key)
        return self._call("open", key, lambda: self._backend.open(key))

    def write_bytes(self, key: str, data: bytes) -> None:
        """Write or overwrite; seen whole or not at all."""
        _check_key(key)
        self._call("write", key, lambda: self._backend.write(key, data))

    def put_file(self, path: Path, key: str) -> None:
        """Copy a local file to a key; seen whole or not at all."""
        _check_key(key)
        self._call("write", key, lambda: self._backend.put(path, key))

    def create_exclusive(self, key: str, data: bytes) -> bool:
        """Write only where nothing is; of several callers exactly one gets True.

        Args:
            key: to create.
            data: must differ from caller to caller: it tells whose the object is.
        """
        _check_key(key)

        def create() -> bool:
            with suppress(FileExistsError):
                self._backend.create(key, data)
            # Ours, also where the reply was lost and the client asked again unseen; and not
            # overwritten by a store that ignores the condition.
            try:
                return self._backend.read(key) == data
            except FileNotFoundError:
                return False

        return self._call("create", key, create)

    def exists(self, key: str) -> bool:
        """Whether there is a file or object (not a folder) at this key."""
        _check_key(key)
        return self._call("look up", key, lambda: self._backend.exists(key))

    def delete(self, key: str) -> None:
        """Remove one file or object; nothing happens where there is none."""
        _check_key(key)
        self._call("delete", key, lambda: self._backend.delete(key))

    def delete_tree(self, prefix: str) -> None:
        """Remove everything in a folder; nothing happens where there is none."""
        _check_key(prefix)
        self._call("delete", prefix, lambda: self._backend.delete_tree(prefix))

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """(key, bytes) of everything in a folder, at all depths, sorted; empty where none is."""
        if prefix:
            _check_key(prefix)
        return self._call("list", prefix, lambda: self._backend.list(prefix))


def _store(root: str, attempts: int, backoff_s: float) -> Store:
    return Store(root, attempts=attempts, backoff_s=backoff_s)


# --- inputs ------------------------------------------------------------------------------------


def open_read(uri: str, *, on_progress: Callable[[], None] | None = None) -> BinaryIO:
    """Open a file or object for reading, seekable.

    An object is fetched in blocks of `READ_BLOCK_BYTES` when they are first needed, each of them
    once: of more than one block, those fetched are kept in a nameless file in the folder for
    temporary files (TMPDIR), which the kernel removes with the process, however that ends. At
    most `MAX_SPOOLED_BYTES` are kept, and nothing that would leave less than `KEEP_FREE_SHARE` of
    the disk free; other blocks are fetched again when they are needed again.

    Args:
        uri: local or remote address.
        on_progress: called, from any thread, whenever some of an object arrives and before each
            attempt to get it: the sign of life of a slow store.
    Raises:
        FileNotFoundError: there is nothing at this address.
        StorageError: by this call or by reading: a fault that did not pass, or the object was
            overwritten since it was opened.
    """
    if is_local(uri):
        return local_path(uri).open("rb")
    return _opened(uri, _retry, on_progress)


def _opened(uri: str, retry: _Retry, on_progress: Callable[[], None] | None = None) -> BinaryIO:
    return io.BufferedReader(_RemoteFile(uri, retry, on_progress or (lambda: None)))


@dataclass(frozen=True)
class _Range:
    """Some bytes of an object, the size of the whole, and the store's checksum where it has one."""

    data: bytes
    num_bytes: int
    checksum: str | None


class _RemoteFile(io.RawIOBase):
    """An object as a file for one thread; see `open_read`."""

    def __init__(self, uri: str, retry: _Retry, on_progress: Callable[[], None]) -> None:
        self.name = redact_uri(uri)
        self._filesystem, self._path = _filesystem(uri, single_attempt=True)
        self._retry = retry
        self._on_progress = on_progress
        self._at = 0
        self._recent: dict[int, bytes] = {}  # the last used stands last
        self._spool: BinaryIO | None = None
        self._spooled: set[int] = set()
        self._has_room = True
        first = self._fetch(0)
        self._num_bytes, self._checksum = first.num_bytes, first.checksum
        self._recent[0] = first.data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._num_bytes}[whence]
        if origin + offset < 0:
            raise OSError(errno.EINVAL, "expected a place in the file", self.name)
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        into = memoryview(buffer).cast("B")
        wanted = min(len(into), max(0, self._num_bytes - self._at))
        done = 0
        while done < wanted:
            number, start = divmod(self._at, READ_BLOCK_BYTES)
            count = min(READ_BLOCK_BYTES - start, wanted - done)
            into[done : done + count] = self._piece(number, start, count)
            done += count
            self._at += count
        return done

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()
        self._recent.clear()
        super().close()

    def _piece(self, number: int, start: int, count: int) -> bytes | memoryview:
        """Some bytes of a block."""
        if number in self._spooled:
            assert self._spool is not None
            place = number * READ_BLOCK_BYTES + start
            try:
                piece = os.pread(self._spool.fileno(), count, place)
            except OSError as error:
                raise StorageError(f"read the copy of {self.name} on disk: {error}") from error
            assert len(piece) == count
            return piece
        data = self._recent.pop(number, None)
        if data is None:
            try:
                found = self._fetch(number)
            except FileNotFoundError:
                raise StorageError(f"read {self.name}: it has gone since it was opened") from None
            if (found.num_bytes, found.checksum) != (self._num_bytes, self._checksum):
                raise StorageError(f"read {self.name}: it was overwritten since it was opened")
            data = found.data
        if self._num_bytes > READ_BLOCK_BYTES and self._spool_block(number, data):
            return memoryview(data)[start : start + count]
        while len(self._recent) >= MAX_BLOCKS_IN_MEMORY:
            del self._recent[next(iter(self._recent))]
        self._recent[number] = data
        return memoryview(data)[start : start + count]

    def _spool_block(self, number: int, data: bytes) -> bool:
        """Keep a block on disk, where there is room for it."""
        if not self._has_room:
            return False
        try:
            if self._spool is None:
                self._spool = cast(BinaryIO, tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
            disk = os.fstatvfs(self._spool.fileno())
            free = disk.f_bavail * disk.f_frsize - len(data)
            self._has_room = (
                free >= KEEP_FREE_SHARE * disk.f_blocks * disk.f_frsize
                and (len(self._spooled) + 1) * READ_BLOCK_BYTES <= MAX_SPOOLED_BYTES
                and os.pwrite(self._spool.fileno(), data, number * READ_BLOCK_BYTES) == len(data)
            )
        except OSError as error:
            self._has_room = False
            logger.warning("%s: no copy of what is read: %s", self.name, error.strerror)
        if self._has_room:
            self._spooled.add(number)
        else:
            logger.info("%s: the rest is fetched whenever it is needed", self.name)
        return self._has_room

    def _fetch(self, number: int) -> _Range:
        start = number * READ_BLOCK_BYTES
        what = f"read {self.name} from byte {start}"

        def fetch() -> _Range:
            self._on_progress()
            if hasattr(self._filesystem, "call_s3"):
                return _get_from_s3(self._filesystem, self._path, start, self._on_progress)
            info = self._filesystem.info(self._path)
            if info.get("size") is None:
                raise StorageError(f"{what}: the store does not tell how many bytes there are")
            num_bytes = int(info["size"])
            stop = min(start + READ_BLOCK_BYTES, num_bytes)
            data = b""
            if start < stop:
                data = self._filesystem.cat_file(self._path, start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(errno.EIO, f"expected {stop - start} bytes, got {len(data)}")
            return _Range(data, num_bytes, _fingerprint_of(info))

        return self._retry(what, fetch)


def _get_from_s3(
    filesystem: Any,
    path: str,
    start: int | None = None,
    on_progress: Callable[[], None] | None = None,
) -> _Range:
    """A block of an object from `start` on, or the whole, by one GET.

    s3fs would ask for the size first and then for ranges, of which an overwrite in between makes
    a mix. Nor would it notice a reply that is not S3's.
    """
    bucket, key, version = filesystem.split_path(path)
    request = {"Bucket": bucket, "Key": key, **filesystem.req_kw}
    if version:
        request["VersionId"] = version
    if start is not None:
        request["Range"] = f"bytes={start}-{start + READ_BLOCK_BYTES - 1}"

    async def get() -> _Range:
        async with asyncio.timeout(STALL_TIMEOUT_S):
            reply = await filesystem._call_s3("get_object", **request)
        data = bytearray()
        try:
            while True:
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    piece = await reply["Body"].read(_PIECE_BYTES)
                if not piece:
                    break
                data += piece
                if on_progress is not None:
                    on_progress()
        finally:
            reply["Body"].close()
        told = (
            reply.get("ContentRange") if start is not None else f"/{reply.get('ContentLength', 0)}"
        )
        if "ETag" not in reply or told is None:
            raise OSError(errno.EIO, "expected an object of S3, got something else")
        num_bytes = int(told.rpartition("/")[2])  # bytes 0-99/12345
        expected = num_bytes
        if start is not None:
            expected = min(start + READ_BLOCK_BYTES, num_bytes) - start
        if len(data) != expected:
            raise OSError(errno.EIO, f"expected {expected} bytes, got {len(data)}")
        return _Range(bytes(data), num_bytes, reply["ETag"])

    try:
        return cast(_Range, fsspec.asyn.sync(filesystem.loop, get))
    except TimeoutError as error:  # fsspec leaves out what it was
        said = f"no byte within {STALL_TIMEOUT_S:g} s"
        raise TimeoutError(errno.ETIMEDOUT, said) from error
    except OSError as error:
        if _http_status(error) == 416 and start == 0:  # an empty object has no ranges
            return _Range(b"", 0, None)
        raise


def fingerprint_file(uri: str) -> tuple[int, str]:
    """Bytes and content fingerprint of a file; never from its name or date.

    An object store's checksum (ETag) is taken where there is one. Otherwise up to
    `SAMPLE_BLOCKS` evenly spaced blocks are hashed, the first and the last among them; files of
    at most `SAMPLE_BLOCKS * SAMPLE_BLOCK_BYTES` are hashed whole.

    Raises:
        FileNotFoundError: there is nothing at this address.
        StorageError: it is a folder, may not be read, or the store fails.
    """

    def fingerprint() -> tuple[int, str]:
        digest = blake2b(digest_size=16)
        if not is_local(uri):
            filesystem, path = _filesystem(uri, single_attempt=True)
            info = filesystem.info(path)
            known = _fingerprint_of(info)
            if known is not None:
                return int(info["size"]), known
        elif local_path(uri).exists() and not local_path(uri).is_file():
            # Opening a pipe would wait for ever.
            raise IsADirectoryError(errno.EISDIR, "not a regular file", uri)
        with open_read(uri) as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{size} ".encode())
            for start in _sample_starts(size):
                file.seek(start)
                digest.update(file.read(SAMPLE_BLOCK_BYTES))
        return size, digest.hexdigest()

    return _retry(f"fingerprint {redact_uri(uri)}", fingerprint)


def _sample_starts(size: int) -> list[int]:
    if size <= SAMPLE_BLOCKS * SAMPLE_BLOCK_BYTES:
        return list(range(0, size, SAMPLE_BLOCK_BYTES))
    last = size - SAMPLE_BLOCK_BYTES
    return [last * i // (SAMPLE_BLOCKS - 1) for i in range(SAMPLE_BLOCKS)]


class Listed(NamedTuple):
    """A file or object that a listing found.

    Attributes:
        relative: path below the folder or prefix; the name alone of a single file.
        uri: full address.
        num_bytes: size; 0 for a dangling link.
        fingerprint: what `fingerprint_file` would give, where the store's listing tells it for
            nothing; None elsewhere.
    """

    relative: str
    uri: str
    num_bytes: int
    fingerprint: str | None


def list_objects(
    uri: str, extensions: Sequence[str], *, all_or_nothing: bool = False
) -> Iterator[Listed]:
    """Files of a folder, prefix or glob at all depths, or one file; sorted by path.

    Local folders and S3 are read as the iteration goes on: memory stays flat however many there
    are. Passing faults are retried page by page.

    Args:
        uri: local or remote address; `*`, `?`, `[…]` and `**` make it a glob unless something
            with exactly this name exists.
        extensions: endings to keep, in lower case; not asked of a single file. Hidden files and
            folders (a leading dot) are left out. Linked folders are followed, loops are not.
        all_or_nothing: a folder below that may not be read is an error; else it is left out,
            with a warning.
    Raises:
        FileNotFoundError: there is nothing at this address.
        StorageError: the store fails, or may not be read.
    """
    endings = tuple(extensions)
    local = is_local(uri)
    alone = str(local_path(uri)) if local else uri
    for item in _list_local(local_path(uri), all_or_nothing) if local else _list_remote(uri):
        is_fit = item.relative.lower().endswith(endings) and not _is_hidden(item.relative)
        if is_fit or item.uri == alone:
            yield item


def list_files(uri: str, extensions: Sequence[str]) -> list[tuple[str, str, int]]:
    """(path relative to the folder, address, bytes) of what `list_objects` lists.

    Raises: as `list_objects`.
    """
    return [(item.relative, item.uri, item.num_bytes) for item in list_objects(uri, extensions)]


def _is_hidden(relative: str) -> bool:
    """Below a hidden folder, or a macOS shadow file; other names may begin with a dot."""
    *folders, name = relative.split("/")
    return name.startswith("._") or any(folder.startswith(".") for folder in folders)


def _list_local(path: Path, all_or_nothing: bool) -> Iterator[Listed]:
    if path.is_file():
        yield Listed(path.name, str(path), path.stat().st_size, None)
        return
    found: Iterable[tuple[Path, int]]
    if path.is_dir():
        base, found = path, _walk(path, all_or_nothing)
    elif glob.has_magic(str(path)):
        base = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        names = base.glob(str(path.relative_to(base)))
        found = sorted((name, _size(name)) for name in names if not name.is_dir())
    else:
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(path))
    for name, size in found:
        yield Listed(name.relative_to(base).as_posix(), str(name), size, None)


def _size(path: Path) -> int:
    """Bytes of a file; 0 for a dangling link."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _walk(
    folder: Path, all_or_nothing: bool, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[Path, int]]:
    """(file, bytes) below a folder, by path; a link back to a folder above is not followed."""

    def entries() -> tuple[tuple[int, int], list[str]]:
        status = folder.stat()
        with os.scandir(folder) as found:
            names = sorted(_with_slash(entry, all_or_nothing) for entry in found)
            return (status.st_dev, status.st_ino), names

    try:
        here, names = _retry(f"list {folder}", entries)
    except FileNotFoundError:  # removed meanwhile
        return
    except StorageError as error:
        if not above or all_or_nothing or not isinstance(error.__cause__, PermissionError):
            raise
        logger.warning("folder %s is left out: %s", folder, error.__cause__.strerror)
        return
    if here in above:
        return
    for name in names:
        if name.endswith("/"):
            yield from _walk(folder / name, all_or_nothing, (*above, here))
        else:
            yield folder / name, _size(folder / name)


def _with_slash(entry: os.DirEntry[str], all_or_nothing: bool) -> str:
    """A folder's name with a slash behind it: the order of names is then that of whole paths."""
    try:
        return f"{entry.name}/" if entry.is_dir() else entry.name
    except OSError as error:
        if all_or_nothing and error.errno != errno.ELOOP:
            raise
        return entry.name  # such as a link to itself: listed, and found unreadable later


def _list_remote(uri: str) -> Iterator[Listed]:
    filesystem, path = _filesystem(uri, single_attempt=True)
    base = path.rstrip("/")
    pattern = None
    found = _remote_files(filesystem, base, _retry)
    # A web server may answer for a folder of a file's name with anything.
    is_web_file = uri.startswith(("http://", "https://")) and not uri.endswith("/")
    first = None if is_web_file else next(found, None)
    if first is None:

        def look() -> Any:
            return filesystem.info(base)

        try:
            info = _retry(f"look up {redact_uri(uri)}", look)
            if info["type"] == "file":
                name = redact_uri(uri).removesuffix("?***").rstrip("/").rpartition("/")[2]
                yield Listed(name, uri, int(info["size"] or 0), _fingerprint_of(info))
                return
        except FileNotFoundError:
            pass
        first = next(found, None)
        if first is None and glob.has_magic(base):
            pattern = re.compile(glob_translate(base))
            while glob.has_magic(base):
                base = base.rpartition("/")[0]
            found = (
                item for item in _remote_files(filesystem, base, _retry) if pattern.match(item[0])
            )
            first = next(found, None)
    if first is None:
        raise FileNotFoundError(errno.ENOENT, "no such object or prefix", redact_uri(uri))
    for name, info in chain((first,), found):
        yield Listed(
            name[len(base) + 1 :],
            filesystem.unstrip_protocol(name),
            int(info["size"] or 0),
            _fingerprint_of(info),
        )


def _remote_files(
    filesystem: Any, base: str, retry: _Retry
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, what the store says of it) of every object below `base`, by path.

    On an object store a folder is nothing but a common beginning of keys.
    """
    what = f"list {redact_uri(filesystem.unstrip_protocol(base))}"
    if hasattr(filesystem, "call_s3"):
        bucket, prefix, _ = filesystem.split_path(f"{base}/")
        token: dict[str, str] = {}
        while True:

            def page(token: dict[str, str] = token) -> Any:
                options = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": KEYS_AT_ONCE}
                options |= {**filesystem.req_kw, **token}
                listed = filesystem.call_s3("list_objects_v2", **options)
                if "IsTruncated" not in listed:  # an empty reply must not look like no objects
                    raise OSError(errno.EIO, "expected a listing, got something else")
                return listed

            listed = retry(what, page)
            for entry in listed.get("Contents", []):
                if not entry["Key"].endswith("/"):  # consoles make such keys for empty folders
                    yield f"{bucket}/{entry['Key']}", {"size": entry["Size"], "ETag": entry["ETag"]}
            if not listed.get("IsTruncated"):
                return
            token = {"ContinuationToken": listed["NextContinuationToken"]}

    def find() -> Any:
        with suppress(FileNotFoundError):  # a web server has no folder of a file's name
            return filesystem.find(f"{base}/", detail=True)
        return {}

    for name, info in sorted(retry(what, find).items()):
        if info.get("type") == "file" and name.startswith(f"{base}/"):
            yield name, info


def _fingerprint_of(info: Mapping[str, Any]) -> str | None:
    """Fingerprint by the checksum that an object store keeps, None where it keeps none."""
    checksum = info.get("ETag") or info.get("md5Hash") or info.get("crc32c")
    if not checksum or info.get("size") is None:
        return None
    text = f"{int(info['size'])} {str(checksum).strip(chr(34))}"
    return blake2b(text.encode(), digest_size=16).hexdigest()

"""From an input to its videos: a folder, prefix or glob, one file, a manifest or a list of names.

Videos are handed out one by one, in memory that does not grow with the corpus. Files are asked
for their fingerprint where the input does not tell it: a listing of S3 and a manifest's column
`fingerprint` do, and what was hashed for an earlier plan is remembered (`pipeline/probes.py`).
"""

from __future__ import annotations

import csv
import heapq
import io
import json
import math
import os
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from itertools import islice, pairwise
from operator import attrgetter
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

from fourdh_batch.config import JobConfig, PlanConfig
from fourdh_batch.errors import ManifestError, StorageError
from fourdh_batch.pipeline.probes import ProbeCache
from fourdh_batch.storage import Store, fingerprint_file, list_objects, open_read, redact_uri
from fourdh_batch.tables.manifest import details_digest

VIDEO_EXTENSIONS = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"),
    *(".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
MANIFEST_EXTENSIONS = (".csv", ".jsonl", ".parquet")
LIST_EXTENSION = ".txt"
MAX_ID_LENGTH = 1024
MAX_EXTRA_LENGTH = 65_536
MAX_LINE_BYTES = 1 << 20
NUM_PROBE_THREADS = 16
PROBES_AHEAD = 256
MAX_PROBLEMS_SHOWN = 50
UNREADABLE = "unreadable"  # begins the fingerprint of a file that could not be read
_BATCH_ROWS = 1 << 14
_OWN_COLUMNS = {"video_id", "uri", "start_s", "end_s", "num_bytes", "fingerprint"}

Row = Mapping[str, Any]
Probe = Callable[[str], tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Video:
    """One video of a corpus.

    Attributes:
        video_id: unique in its dataset; the path relative to the input folder, or the
            manifest's own.
        uri: where it is read from.
        num_bytes: size of the file, 0 where it could not be read or is not known.
        fingerprint: of its content and its window; never of its name or date.
        start_s: frames shown before this time of the file are left out; None: none are.
        end_s: frames shown at this time or later are left out; None: none are.
        extra: JSON object of the manifest's other columns, keys in order; "" without any.
    """

    video_id: str
    uri: str
    num_bytes: int
    fingerprint: str
    start_s: float | None = None
    end_s: float | None = None
    extra: str = ""

    @property
    def details(self) -> str:
        """Digest of `extra`, which changes no row but the one in `videos`; "" without any."""
        return details_digest(self.extra)

    @property
    def content_fingerprint(self) -> str:
        """Of the file alone, whatever the window."""
        return self.fingerprint.removesuffix(_window_mark(self.start_s, self.end_s))


def read_corpus(source: str, *, limit: int = 0) -> list[Video]:
    """All videos of an input at once, in `video_id` order; see `stream_corpus`.

    Args:
        source: folder, prefix, glob, single file, manifest or list.
        limit: only the first so many by `video_id`; 0 for all.
    Raises:
        ManifestError: lists every problem.
    """
    videos = _stream(source, PlanConfig(limit=limit), fingerprint_file)
    return list(checked_ids(videos, source))


def stream_corpus(config: JobConfig, *, cache: ProbeCache | None = None) -> Iterator[Video]:
    """The videos of `config.input`, in no order, checked as they come.

    A folder, prefix or glob is searched at all depths for files with a video's extension; ids are
    paths relative to it. A manifest is a csv, jsonl or Parquet file with the columns `video_id`
    and `uri` and, where it likes, `start_s` and `end_s` (the window), `num_bytes` and
    `fingerprint` (any text that changes with the content; the file is then not asked, and
    `num_bytes` is needed), and others, which go to `Video.extra`. A `.txt` file is a list of file
    names, one a line, which are the ids without their endings (as AVA has them);
    `plan.list_root`, `plan.list_start_s` and `plan.list_end_s` say more of them. Relative
    addresses count from the folder of the manifest or list.

    Args:
        config: `input` and `plan` are used.
        cache: remembers fingerprints of local files.
    Raises:
        ManifestError: at the end, with every problem but ids that stand twice; or that there is
            no video at all.
    """
    plan = config.plan
    return _stream(config.input, plan, cache.fingerprint if cache else fingerprint_file)


def remembered_corpus(config: JobConfig, store: Store) -> Iterator[Video]:
    """`stream_corpus` that keeps the fingerprints of local files in the output for the next time.

    Args:
        config: `dataset`, `input` and `plan` are used.
        store: the output; written to when all videos are handed out.
    Raises:
        ManifestError: as `stream_corpus`.
    """
    with ProbeCache(store, config.dataset) as cache:
        yield from stream_corpus(config, cache=cache)
        cache.save(forget_unseen=not config.plan.limit)


def checked_ids(videos: Iterable[Video], source: str) -> Iterator[Video]:
    """All videos in `video_id` order, held in memory.

    Raises:
        ManifestError: an id stands twice, or what `videos` raises; all of it in one message.
    """
    found: list[Video] = []
    problem = ""
    try:
        found.extend(videos)
    except ManifestError as error:
        problem = str(error)
    found.sort(key=attrgetter("video_id"))
    twice = sorted({a.video_id for a, b in pairwise(found) if a.video_id == b.video_id})
    raise_twice(twice, source, problem)
    return iter(found)


def raise_twice(twice: Iterable[str], source: str, problem: str = "") -> None:
    """Refuse a corpus in which ids stand twice, or that has another problem, or both.

    Raises:
        ManifestError: says all of it.
    """
    problems = Problems()
    for video_id in twice:
        problems.add(f"video_id {video_id!r} stands twice")
    if problem and problems.count:
        raise ManifestError(f"{problem}\n{problems.text(source)}")
    if problem:
        raise ManifestError(problem)
    problems.raise_if_any(source)


class Problems:
    """What is wrong with an input: all are counted, the first are kept.

    Attributes:
        count: how many.
    """

    def __init__(self) -> None:
        self._first: list[str] = []
        self.count = 0

    def add(self, problem: str) -> None:
        """Note one."""
        self.count += 1
        if len(self._first) < MAX_PROBLEMS_SHOWN:
            self._first.append(problem)

    def text(self, source: str) -> str:
        """How many there are, and the first of them."""
        shown = "\n  ".join(self._first)
        more = self.count - len(self._first)
        rest = f"\n  and {more} more" if more else ""
        return f"input {redact_uri(source)}: {self.count} problems:\n  {shown}{rest}"

    def raise_if_any(self, source: str) -> None:
        """Raises: ManifestError."""
        if self.count:
            raise ManifestError(self.text(source))


# --- what an input holds -----------------------------------------------------------------------


def _stream(source: str, plan: PlanConfig, probe: Probe) -> Iterator[Video]:
    """Videos whose fingerprint the input tells at once, the others as they are probed."""
    problems = Problems()
    listed: Iterator[Video]
    is_table = source.lower().endswith((*MANIFEST_EXTENSIONS, LIST_EXTENSION))
    if is_table:
        listed = _manifest_videos(source, plan, problems)
        if plan.limit:
            listed = iter(heapq.nsmallest(plan.limit, listed, key=attrgetter("video_id")))
    else:
        listed = _folder_videos(source, problems, all_or_nothing=plan.remove_missing)
        if plan.limit:
            listed = islice(listed, plan.limit)
    num_videos = 0
    with ThreadPoolExecutor(NUM_PROBE_THREADS) as pool:
        ahead: deque[tuple[Video, Future[tuple[int, str]]]] = deque()

        def next_probed() -> Iterator[Video]:
            video, future = ahead.popleft()
            try:
                num_bytes, fingerprint = future.result()
            except Exception as error:
                if is_table:  # also a protocol that nobody knows, or whose library is missing
                    where = redact_uri(video.uri)
                    problems.add(f"{video.video_id}: {where}: {type(error).__name__}")
                    return
                if not isinstance(error, (OSError, StorageError)):
                    raise
                # A dangling link or unreadable file among good ones: its own row in `failures`.
                num_bytes, fingerprint = 0, f"{UNREADABLE}-{type(error).__name__}"
            yield _with_content(video, num_bytes, fingerprint)

        for video in listed:
            num_videos += 1
            if video.fingerprint:
                yield _with_content(video, video.num_bytes, video.fingerprint)
                continue
            ahead.append((video, pool.submit(probe, video.uri)))
            if len(ahead) >= PROBES_AHEAD:
                yield from next_probed()
        while ahead:
            yield from next_probed()
    problems.raise_if_any(source)
    if not num_videos:
        raise ManifestError(
            f"input {redact_uri(source)}: no video found; looked for files ending in "
            f"{' '.join(VIDEO_EXTENSIONS)} at all depths. A file with another name can be given "
            "directly or through a manifest (csv, jsonl, parquet with video_id and uri)"
        )


def _with_content(video: Video, num_bytes: int, fingerprint: str) -> Video:
    mark = _window_mark(video.start_s, video.end_s)
    if not mark and num_bytes == video.num_bytes and fingerprint == video.fingerprint:
        return video
    return replace(video, num_bytes=num_bytes, fingerprint=f"{fingerprint}{mark}")


def _window_mark(start_s: float | None, end_s: float | None) -> str:
    """What a window adds to the fingerprint of a content."""
    if start_s is None and end_s is None:
        return ""
    begin, end = ("" if time is None else repr(time) for time in (start_s, end_s))
    return f"@{begin}-{end}"


def _folder_videos(source: str, problems: Problems, *, all_or_nothing: bool) -> Iterator[Video]:
    try:
        for item in list_objects(source, VIDEO_EXTENSIONS, all_or_nothing=all_or_nothing):
            if problem := _wrong_id(item.relative):
                problems.add(problem)
            else:
                yield Video(item.relative, item.uri, item.num_bytes, item.fingerprint or "")
    except (FileNotFoundError, StorageError) as error:
        what = "not found" if isinstance(error, FileNotFoundError) else "cannot be listed"
        raise ManifestError(f"input {redact_uri(source)}: {what} ({error})") from error


def _manifest_videos(source: str, plan: PlanConfig, problems: Problems) -> Iterator[Video]:
    folder = source.rpartition("/")[0]
    name = source.lower()
    try:
        with open_read(source) as file:
            rows: Iterator[Any]
            if name.endswith(LIST_EXTENSION):
                rows = _list_rows(file, plan)
                folder = plan.list_root.rstrip("/") or folder
            elif name.endswith(".csv"):
                rows = _csv_rows(file)
            elif name.endswith(".jsonl"):
                rows = _jsonl_rows(file)
            else:
                rows = _parquet_rows(file)
            for number, row in enumerate(rows, start=1):
                try:
                    yield _video_of(row, folder)
                except _RowError as error:
                    problems.add(f"row {number}: {error}")
    except (FileNotFoundError, StorageError) as error:
        raise ManifestError(f"manifest {redact_uri(source)}: not found ({error})") from error
    except (ValueError, OSError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, ManifestError):
            raise
        # undecodable text, broken JSON or Parquet
        raise ManifestError(f"manifest {redact_uri(source)}: not readable: {error}") from error


def _list_rows(file: Any, plan: PlanConfig) -> Iterator[Row]:
    window = {"start_s": plan.list_start_s or None, "end_s": plan.list_end_s or None}
    for line in _lines(file):
        remote = "://" in line
        absolute = remote or line.startswith("/")
        name = line.partition("?")[0].rpartition("/")[2] if absolute else line
        stem, dot, ending = name.rpartition(".")
        is_video = stem and f"{dot}{ending}".lower() in VIDEO_EXTENSIONS
        yield {"video_id": stem if is_video else name, "uri": line, **window}


def _csv_rows(file: Any) -> Iterator[Row]:
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        yield from csv.DictReader(text)


def _jsonl_rows(file: Any) -> Iterator[Any]:
    for line in _lines(file):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            yield line  # which is no object: refused with its number


def _parquet_rows(file: Any) -> Iterator[Row]:
    with pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        for batch in table.iter_batches(_BATCH_ROWS):
            columns = (column.to_pylist() for column in batch.columns)
            for values in zip(*columns, strict=True):
                yield dict(zip(names, values, strict=True))


def _lines(file: Any) -> Iterator[str]:
    """Lines of a text file that are not empty."""
    first = True
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) >= MAX_LINE_BYTES:
            raise ValueError(f"expected lines of less than {MAX_LINE_BYTES} bytes")
        text = line.decode("utf-8-sig" if first else "utf-8").strip()
        first = False
        if text:
            yield text


# --- one row -----------------------------------------------------------------------------------


class _RowError(ValueError):
    """What is wrong with a row."""


def _video_of(row: Any, folder: str) -> Video:
    """Raises: _RowError."""
    if not isinstance(row, dict):
        kind = "a line that is not JSON" if isinstance(row, str) else type(row).__name__
        raise _RowError(f"expected a JSON object, got {kind}")
    if None in row:  # where csv puts what it has no name for
        raise _RowError(f"expected {len(row) - 1} fields, as in the header, got more")
    video_id, uri = row.get("video_id"), row.get("uri")
    if not isinstance(video_id, str) or not isinstance(uri, str) or not uri:
        kinds = {str(name): type(value).__name__ for name, value in row.items()}  # no secrets
        raise _RowError(f"expected texts video_id and uri, got {kinds!r:.200}")
    if problem := _wrong_id(video_id):
        raise _RowError(problem)
    if not _is_path(uri):
        raise _RowError(f"{video_id}: expected an address, got {uri!r:.99}")
    if folder and "://" not in uri and not uri.startswith("/"):
        uri = f"{folder}/{uri}"
    start_s, end_s = _seconds(row, "start_s"), _seconds(row, "end_s")
    if end_s is not None and end_s <= (start_s or 0.0):
        raise _RowError(f"{video_id}: expected end_s after start_s, got {start_s} and {end_s}")
    num_bytes = _number(row, "num_bytes")
    if num_bytes is not None and not (0 <= num_bytes < 2**63 and num_bytes == int(num_bytes)):
        raise _RowError(f"{video_id}: expected num_bytes of 0 or more, got {num_bytes:g}")
    fingerprint = row.get("fingerprint")
    if fingerprint is not None and (not isinstance(fingerprint, str) or len(fingerprint) > 256):
        raise _RowError(f"{video_id}: expected a short text, fingerprint, got {fingerprint!r:.99}")
    if fingerprint and (fingerprint.startswith(UNREADABLE) or not _is_path(fingerprint)):
        raise _RowError(f"{video_id}: {fingerprint!r:.99} cannot be a fingerprint")
    if fingerprint and num_bytes is None:  # the file is not asked, and shards are cut by size
        raise _RowError(f"{video_id}: expected num_bytes beside fingerprint, got none")
    return Video(
        video_id, uri, int(num_bytes or 0), fingerprint or "", start_s, end_s, _extra(row, video_id)
    )


def _is_path(text: str) -> bool:
    """Whether the file system could have such a name."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    if value is None or value == "" or value != value:  # empty, or NaN
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise _RowError(f"expected a number as {name}, got {value!r:.99}") from None
    return number


def _seconds(row: Row, name: str) -> float | None:
    seconds = _number(row, name)
    if seconds is not None and seconds < 0:
        raise _RowError(f"expected {name} of 0 or more, got {seconds}")
    return seconds


def _extra(row: Row, video_id: str) -> str:
    """The other columns as canonical JSON, without those that are null; "" where none is left."""
    values = {
        name: value
        for name, value in row.items()
        if name not in _OWN_COLUMNS and value is not None and value == value  # no NaN
    }
    if not values:
        return ""
    try:
        text = json.dumps(
            values,
            allow_nan=False,
            default=_plain,
            ensure_ascii=False,
            separators=(",", ":"),
            sort_keys=True,
        )
        text.encode()
    except (TypeError, ValueError) as error:
        raise _RowError(f"{video_id}: its other columns are not JSON: {error}") from None
    if len(text) > MAX_EXTRA_LENGTH:
        raise _RowError(
            f"{video_id}: expected at most {MAX_EXTRA_LENGTH} characters of other columns, got "
            f"{len(text)}"
        )
    return text


def _plain(value: object) -> str:
    if isinstance(value, (date, datetime, time_of_day)):
        return value.isoformat()
    if isinstance(value, (Decimal, UUID)):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be carried")


def _wrong_id(video_id: str) -> str:
    if not video_id.strip() or len(video_id) > MAX_ID_LENGTH:
        return f"video_id {video_id!r:.80}: expected 1 to {MAX_ID_LENGTH} characters"
    if not video_id.isprintable() and any(
        unicodedata.category(c) in ("Cc", "Cs") for c in video_id
    ):
        return f"video_id {video_id!r}: expected no control characters, valid Unicode"
    return ""

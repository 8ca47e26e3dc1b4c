"""Whether one shard is what it should be: its commit record, its objects, their rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import CommitRecord, commit_key
from fourdh_batch.tables.schema import TABLES, schema_version, table_schema
from fourdh_batch.tables.writer import object_key

BATCH_ROWS = 1 << 16
MAX_COMMIT_BYTES = 256 << 20  # a shard of a million videos
MAX_EXAMPLES = 3
STATUSES = ("ok", "partial", "failed", "quarantined")
WITHOUT_RESULT = ("failed", "quarantined")
# Rows in strictly increasing order of the schema's columns; `failures` has no such key.
UNIQUE = ("tracks", "detections", "videos")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it must be.

    Attributes:
        kind: ``commit``, ``schema``, ``missing``, ``size``, ``checksum``, ``unreadable``,
            ``columns``, ``rows``, ``order``, ``duplicate``, ``video``, ``twice``, ``status``,
            ``plan``, ``not_done``, ``changed``, ``stray`` or ``release``.
        expected, got: in words.
        shard, key, video: what it is about; "" where it is about no single one.
    """

    kind: str
    expected: str
    got: str
    shard: str = ""
    key: str = ""
    video: str = ""

    def line(self) -> str:
        """One line of text that does nothing to a terminal."""
        where = [f"shard {self.shard!r}"] if self.shard else []
        where += [self.key] if self.key else []
        where += [f"video {self.video!r}"] if self.video else []
        text = f"{self.kind}: {', '.join(where)}: expected {self.expected}, got {self.got.strip()}"
        return "".join(c if c.isprintable() else "?" for c in text)


def read_commit(store: Store, key: str, size: int | None = None) -> tuple[CommitRecord, bytes]:
    """A commit record that may be damaged or made up, checked in every field; and its bytes.

    Raises:
        FileNotFoundError: it is gone.
        ValueError: says what is wrong with it.
        StorageError: the store failed.
    """
    if size is not None and size > MAX_COMMIT_BYTES:
        raise ValueError(f"{size} bytes")
    data = store.read_bytes(key)
    try:
        record = CommitRecord.from_json(data, key)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if reason := _misfit(record):
        raise ValueError(reason)
    if commit_key(record.shard_id) != key:
        raise ValueError(f"the record of shard {record.shard_id!r}")
    return record, data


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _misfit(record: Any) -> str:
    """What in a commit record is of the wrong kind; "" where nothing is."""
    for name in ("shard_id", "dataset", "fingerprint", "config_fingerprint", "model_fingerprint"):
        if not isinstance(getattr(record, name), str):
            return f"{name} {getattr(record, name)!r:.80}"
    for video in record.videos:
        parts = (video.video_id, video.content_fingerprint, video.status)
        if not all(isinstance(part, str) for part in parts):
            return f"video {parts!r:.80}"
        if not isinstance(video.num_rows, dict) or not all(map(_is_count, video.num_rows.values())):
            return f"rows {video.num_rows!r:.80} of video {video.video_id!r:.80}"
    for name, item in record.objects.items():
        if not (isinstance(item.key, str) and isinstance(item.sha256, str)):
            return f"key and sha256 of {name!r:.80}: {item.key!r:.80}, {item.sha256!r:.80}"
        if not (_is_count(item.num_bytes) and _is_count(item.num_rows)):
            return f"bytes and rows of {name!r:.80}: {item.num_bytes!r:.40}, {item.num_rows!r:.40}"
    versions = record.schema_versions
    if not isinstance(versions, dict) or not all(map(_is_count, versions.values())):
        return f"schema_versions {versions!r:.80}"
    return ""


def check_record(record: CommitRecord) -> Iterator[Problem]:
    """What can be told from the record alone."""
    shard = record.shard_id
    if record.is_void:
        got = "one that is being replaced, or was when a run was killed: run the job again"
        yield Problem("commit", "a finished shard", got, shard)
    for name in sorted({*record.objects, *TABLES}):
        if name not in TABLES:
            yield Problem("schema", f"the tables {', '.join(TABLES)}", f"{name!r:.80}", shard)
        elif name not in record.objects:
            yield Problem("commit", f"an object of {name}", "none", shard)
        else:
            version, expected = record.schema_versions.get(name), schema_version(name)
            if version is None or not 1 <= version <= expected:
                got = f"{version}; a newer one needs a newer fourdh_batch"
                yield Problem("schema", f"{name} of version 1 to {expected}", got, shard)
            key = object_key(name, record.dataset, shard)
            if record.objects[name].key != key:
                got = f"{record.objects[name].key!r:.200}, which was not opened"
                yield Problem("commit", f"key {key}", got, shard)
    seen: set[str] = set()
    for video in record.videos:
        if video.video_id in seen:
            yield Problem("twice", "each video once", "two", shard, video=video.video_id)
        seen.add(video.video_id)
        if video.status not in STATUSES:
            yield Problem(
                *("status", f"one of {', '.join(STATUSES)}", f"{video.status!r:.80}", shard),
                video=video.video_id,
            )
        rows = video.num_rows
        if rows and video.status in WITHOUT_RESULT and not rows.get("failures"):
            yield Problem(
                *("status", "a row in failures", f"none, status {video.status}", shard),
                video=video.video_id,
            )
    if not record.videos:
        yield Problem("commit", "at least one video", "none", shard)
    if all(video.num_rows for video in record.videos):
        for name, item in record.objects.items():
            total = sum(video.num_rows.get(name, 0) for video in record.videos)
            if total != item.num_rows:
                got = f"{item.num_rows} of the object"
                yield Problem("rows", f"{total} rows of the videos", got, shard, item.key)


class ObjectCheck:
    """The rows of one object, in one pass over its key columns.

    Attributes:
        counts: rows by video.
        problems: found so far.
    """

    def __init__(self, record: CommitRecord, name: str) -> None:
        self._record = record
        self._name = name
        self._key = record.objects[name].key
        self._videos = {video.video_id: video for video in record.videos}
        self.counts: Counter[str] = Counter()
        self.declared_detections: dict[str, int] = {}
        self.problems: list[Problem] = []

    def _add(self, kind: str, expected: str, got: str, video: str = "") -> None:
        self.problems.append(Problem(kind, expected, got, self._record.shard_id, self._key, video))

    def check(self, file: BinaryIO) -> None:
        """Read an object that is what its commit record says, byte for byte."""
        try:
            with pq.ParquetFile(file) as parquet:
                if self._columns_fit(parquet.schema_arrow):
                    self._rows(parquet)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            self._add("unreadable", "a Parquet file", f"{type(error).__name__}: {error!s:.200}")

    def _columns_fit(self, schema: Any) -> bool:
        version = self._record.schema_versions.get(self._name, 0)
        expected = {
            column.name: str(column.arrow_type)
            for column in table_schema(self._name).columns
            if column.since <= version
        }
        got = {item.name: str(item.type) for item in schema}
        if got == expected:
            return True
        lacking = sorted(f"{n} {t}" for n, t in expected.items() if got.get(n) != t)
        strange = sorted(f"{n} {t}" for n, t in got.items() if expected.get(n) != t)
        self._add("columns", f"{lacking} of version {version}", f"{strange!s:.300}")
        return False

    def _rows(self, parquet: Any) -> None:
        order = list(table_schema(self._name).order)
        if self._name not in UNIQUE:
            order = ["video_id"]
        more = ["status", "content_fingerprint", "num_detections"] * (self._name == "videos")
        last, num_rows, is_ordered = None, 0, True
        for batch in parquet.iter_batches(
            BATCH_ROWS, columns=["dataset", *order, *more], use_threads=False
        ):
            rows = pa.Table.from_batches([batch])
            if nulls := [n for n in ("dataset", *order, *more) if rows.column(n).null_count]:
                self._add("rows", "no null", f"null in {', '.join(nulls)}")
                return
            self._belong(rows)
            if more:
                self._same_videos(rows)
            keys = rows.select(order)
            if is_ordered:
                is_ordered = self._increases(
                    keys if last is None else pa.concat_tables([last, keys]), num_rows
                )
            if rows.num_rows:
                last = keys.slice(rows.num_rows - 1)
            num_rows += rows.num_rows
        expected = self._record.objects[self._name].num_rows
        if num_rows != expected:
            self._add("rows", f"{expected} rows", str(num_rows))
        if not is_ordered and self._name in UNIQUE:
            self._repeated(parquet, order)
        for video in self._record.videos:
            known = video.num_rows.get(self._name, 0)
            got = self.counts[video.video_id]
            if video.num_rows and got != known:
                self._add("rows", f"{known} rows", str(got), video.video_id)

    def _belong(self, rows: Any) -> None:
        """Every row is of this dataset and of a video of this shard."""
        for other in pc.unique(rows.column("dataset")).to_pylist():
            if other != self._record.dataset:
                self._add("video", f"dataset {self._record.dataset!r}", f"{other!r:.80}")
        for item in pc.value_counts(rows.column("video_id")).to_pylist():
            video_id = item["values"]
            if video_id not in self._videos and video_id not in self.counts:
                self._add("video", "a video of this shard", f"{item['counts']} rows", video_id)
            self.counts[video_id] += item["counts"]

    def _same_videos(self, rows: Any) -> None:
        """The rows of `videos` say what the commit record says."""
        for row in rows.to_pylist():
            video = self._videos.get(row["video_id"])
            if video is None:
                continue
            self.declared_detections[video.video_id] = row["num_detections"]
            for name in ("status", "content_fingerprint"):
                expected = getattr(video, name)
                if row[name] != expected:
                    got = f"{row[name]!r:.80}"
                    self._add("video", f"{name} {expected!r:.80}", got, video.video_id)

    def _increases(self, keys: Any, before: int) -> bool:
        """Whether rows increase in the order of the schema; a first row that does not is named."""
        if keys.num_rows < 2:
            return True
        is_later = np.zeros(keys.num_rows - 1, dtype=bool)
        is_equal = ~is_later
        for name in keys.column_names:
            column = keys.column(name).combine_chunks()
            here, there = column.slice(0, keys.num_rows - 1), column.slice(1)
            is_later |= is_equal & pc.greater(there, here).to_numpy(zero_copy_only=False)
            is_equal &= pc.equal(there, here).to_numpy(zero_copy_only=False)
        wrong = ~(is_later | is_equal) if self._name not in UNIQUE else ~is_later
        if not wrong.any():
            return True
        i = int(np.flatnonzero(wrong)[0])
        if not is_equal[i]:
            one, two = keys.slice(i, 2).to_pylist()
            self._add(
                *("order", f"increasing ({', '.join(keys.column_names)})"),
                f"{tuple(two.values())} after {tuple(one.values())} near row {before + i}",
            )
        return False

    def _repeated(self, parquet: Any, order: list[str]) -> None:
        """Name the rows that stand twice in an object whose rows are out of order."""
        keys = parquet.read(columns=order, use_threads=False)
        groups = keys.group_by(order).aggregate([([], "count_all")])
        repeated = groups.filter(pc.greater(groups.column("count_all"), 1))
        for row in repeated.slice(0, MAX_EXAMPLES).to_pylist():
            count, video = row.pop("count_all"), row.pop("video_id")
            named = ", ".join(f"{name} {value}" for name, value in row.items()) or "it"
            self._add("duplicate", "each row once", f"{named} {count} times", video)
        if repeated.num_rows > MAX_EXAMPLES:
            got = f"{repeated.num_rows - MAX_EXAMPLES} more rows that stand twice"
            self._add("duplicate", "each row once", got)


def check_together(record: CommitRecord, checks: Mapping[str, ObjectCheck]) -> Iterator[Problem]:
    """What only several tables of a shard can tell; all of them are sound."""
    key = record.objects["videos"].key
    for video in record.videos:
        about = {"shard": record.shard_id, "key": key, "video": video.video_id}
        rows = checks["videos"].counts[video.video_id]
        if rows != 1:
            yield Problem("rows", "one row in videos", str(rows), **about)
            continue
        declared = checks["videos"].declared_detections[video.video_id]
        got = checks["detections"].counts[video.video_id]
        if declared != got:
            yield Problem("rows", f"num_detections {declared}", f"{got} detections", **about)
        if video.status in WITHOUT_RESULT and not checks["failures"].counts[video.video_id]:
            yield Problem("status", "a row in failures", f"none, status {video.status}", **about)

"""Rows on their way to the store: spooled per video, then merged into one object per table.

While a video is being tracked its finished rows go to `_work/<shard>/<video>/` in parts of a few
MiB, so memory does not grow with the video. `publish_shard` streams the parts of all its videos
into local Parquet files, puts each under its final key with one PUT, writes the commit record
last, and removes the parts.

Layout: `<table>/<dataset>/part-<shard>.parquet`. The folder is named by the plain dataset, not
`dataset=<name>`: the column is also in the file, as a string. Measured with pyarrow 26, pandas 3.1
and DuckDB 2.0, a Hive-style folder makes `pd.read_parquet("<root>/tracks")` fail (string against
dictionary), and without the column in the file a dataset called ``007`` is read as the number 7.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from hashlib import file_digest, sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fourdh_batch.errors import SchemaError, StorageError
from fourdh_batch.storage import Store, safe_key
from fourdh_batch.tables.manifest import CommitRecord, ObjectRecord, VideoRecord, write_commit
from fourdh_batch.tables.schema import (
    TABLES,
    arrow_schema,
    check_table,
    schema_version,
    table_schema,
)

WORK = "_work"
# Rows of one row group: 3 MB of tracks. Larger ones save 0.5 % of space (1,433 bytes a row at
# 2,048, 1,426 at 8,192) and make reading one ten-second clip out of a shard dearer.
ROW_GROUP_ROWS = 2048
SPOOL_PART_BYTES = 4 * 2**20


def object_key(table: str, dataset: str, shard_id: str) -> str:
    """Where a shard's rows of a table lie; the same at every run."""
    return f"{table}/{safe_key(dataset)}/part-{safe_key(shard_id)}.parquet"


class ObjectWriter:
    """One Parquet object of one table; published whole on a clean exit, not at all otherwise.

    The bytes depend on the rows only, not on how they were divided among calls of `write`.

    Args:
        store: the output root.
        name: of the table.
        key: final key of the object.
        row_group_rows: rows of one row group.
    Attributes:
        record: key, size, checksum and rows; set on a clean exit.
    """

    record: ObjectRecord

    def __init__(
        self, store: Store, name: str, key: str, *, row_group_rows: int = ROW_GROUP_ROWS
    ) -> None:
        self._store = store
        self._name = name
        self._key = key
        self._row_group_rows = row_group_rows
        self._waiting: list[Any] = []
        self._num_waiting = 0
        self._num_rows = 0

    def __enter__(self) -> ObjectWriter:
        self._folder = tempfile.TemporaryDirectory(prefix="fourdh-")
        self._path = Path(self._folder.name) / "object.parquet"
        columns = table_schema(self._name).columns
        self._writer = pq.ParquetWriter(
            self._path,
            arrow_schema(self._name),
            compression="zstd",
            compression_level=3,
            use_dictionary=False,
            use_byte_stream_split=[
                f"{column.name}.list.element" if column.shape else column.name
                for column in columns
                if column.type.startswith("float")
            ],
            write_statistics=[c.name for c in columns if not c.shape and c.type != "binary"],
        )
        return self

    def write(self, table: Any) -> None:
        """Add rows; the caller keeps the order of the schema.

        Raises:
            SchemaError: the rows do not fit the table's schema.
        """
        check_table(self._name, table)
        self._waiting.append(table)
        self._num_waiting += table.num_rows
        if self._num_waiting >= self._row_group_rows:
            rest = pa.concat_tables(self._waiting)
            while rest.num_rows >= self._row_group_rows:
                self._write_row_group(rest.slice(0, self._row_group_rows))
                rest = rest.slice(self._row_group_rows)
            self._waiting = [rest]
            self._num_waiting = rest.num_rows

    def _write_row_group(self, rows: Any) -> None:
        self._writer.write_table(rows.combine_chunks(), row_group_size=self._row_group_rows)
        self._num_rows += rows.num_rows

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._folder, self._writer:
            if error is not None:
                return
            if self._num_waiting:
                self._write_row_group(pa.concat_tables(self._waiting))
            self._writer.close()
            with self._path.open("rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
            self._store.put_file(self._path, self._key)
            self.record = ObjectRecord(self._key, self._path.stat().st_size, digest, self._num_rows)


# --- rows of one video -------------------------------------------------------------------------


class _OrderCheck:
    """Rows of one video come in the order of the schema, none twice."""

    def __init__(self, video_id: str) -> None:
        self._video_id = video_id
        self._last: dict[str, tuple[int, int]] = {}

    def check(self, name: str, table: Any) -> None:
        """Raises: SchemaError: other video, wrong order or a repeated row."""
        ids = table.column("video_id").unique().to_pylist()
        if ids not in ([], [self._video_id]):
            raise SchemaError(f"{name}: expected rows of video {self._video_id}, got {ids[:3]}")
        columns = table_schema(name).order[1:]
        if len(columns) < 2 or not table.num_rows:
            return
        before = self._last.get(name, (-1, -1))
        major, minor = (
            np.concatenate([[start], table.column(column).to_numpy()])
            for start, column in zip(before, columns, strict=True)
        )
        step = np.diff(major)
        wrong = np.flatnonzero((step < 0) | ((step == 0) & (np.diff(minor) <= 0)))
        if len(wrong):
            i = int(wrong[0])
            raise SchemaError(
                f"{name}, video {self._video_id}: expected increasing ({', '.join(columns)}), got "
                f"({major[i + 1]}, {minor[i + 1]}) after ({major[i]}, {minor[i]})"
            )
        self._last[name] = (int(major[-1]), int(minor[-1]))

    def state(self) -> dict[str, list[int]]:
        return {name: list(pair) for name, pair in self._last.items()}

    def restore(self, state: Mapping[str, Sequence[int]]) -> None:
        self._last = {name: (int(pair[0]), int(pair[1])) for name, pair in state.items()}


def _with_track_len(table: Any, track_len: Mapping[str, int], video_id: str) -> Any:
    """`tracks` rows of one video with the column `track_len` filled in."""
    known = np.array(sorted((int(track), length) for track, length in track_len.items()))
    known = known.reshape(-1, 2)
    track_id = table.column("track_id").to_numpy()
    at = np.searchsorted(known[:, 0], track_id)
    found = at < len(known)
    found[found] = known[at[found], 0] == track_id[found]
    if not found.all():
        raise SchemaError(
            f"tracks, video {video_id}: track_len lacks the tracks "
            f"{np.unique(track_id[~found])[:5].tolist()}"
        )
    index = table.schema.get_field_index("track_len")
    return table.set_column(index, table.schema.field(index), pa.array(known[at, 1], pa.int64()))


class MemorySpool:
    """Rows of one video, kept in memory.

    Args:
        video_id: of the video.
    """

    def __init__(self, video_id: str) -> None:
        self._video_id = video_id
        self._order = _OrderCheck(video_id)
        self._tables: dict[str, list[Any]] = {name: [] for name in TABLES}
        self._metadata: dict[str, Any] | None = None

    def append(self, name: str, table: Any) -> None:
        """Add rows of a table, in order. Raises: SchemaError."""
        check_table(name, table)
        self._order.check(name, table)
        self._tables[name].append(table)

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """All rows are there; `metadata` as for `VideoSpool.finish`."""
        self._metadata = dict(metadata)

    def metadata(self) -> dict[str, Any] | None:
        """What `finish` was given; None before."""
        return self._metadata

    def tables(self) -> dict[str, Any]:
        """All tables by name, as they would be published; after `finish`."""
        if self._metadata is None:
            raise ValueError(f"video {self._video_id}: the spool is not finished")
        tables = {
            name: pa.concat_tables([arrow_schema(name).empty_table(), *parts])
            for name, parts in self._tables.items()
        }
        track_len = self._metadata["track_len"]
        tables["tracks"] = _with_track_len(tables["tracks"], track_len, self._video_id)
        return tables


class VideoSpool:
    """Rows of one video below `_work/`, from its first frame until its shard is published.

    A part's name is unique, and `done.json` names the parts that count, so what an interrupted
    or superseded writer left behind is never read.

    Args:
        store: the output root.
        shard_id: shard of the video.
        video_id: of the video.
        part_bytes: rows of this size are written as one part.
    """

    def __init__(
        self, store: Store, shard_id: str, video_id: str, *, part_bytes: int = SPOOL_PART_BYTES
    ) -> None:
        self.video_id = video_id
        self._store = store
        self._prefix = f"{WORK}/{safe_key(shard_id)}/{safe_key(video_id)}"
        self._part_bytes = part_bytes
        self._start()

    def _start(self) -> None:
        self._writer_id = secrets.token_hex(4)
        self._order = _OrderCheck(self.video_id)
        self._waiting: dict[str, list[Any]] = {name: [] for name in TABLES}
        self._num_bytes = dict.fromkeys(TABLES, 0)
        self._num_rows = dict.fromkeys(TABLES, 0)
        self._parts: dict[str, list[str]] = {name: [] for name in TABLES}

    def append(self, name: str, table: Any) -> None:
        """Add rows of a table, in order.

        Raises:
            SchemaError: they do not fit the schema, are of another video, or out of order.
            StorageError: a part cannot be written.
        """
        check_table(name, table)
        self._order.check(name, table)
        self._waiting[name].append(table)
        self._num_bytes[name] += table.nbytes
        self._num_rows[name] += table.num_rows
        if self._num_bytes[name] >= self._part_bytes:
            self._write_part(name)

    def _write_part(self, name: str) -> None:
        if not self._waiting[name]:
            return
        rows = pa.concat_tables(self._waiting[name])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, arrow_schema(name)) as writer:
            writer.write_table(rows)
        part = f"{name}-{self._writer_id}-{len(self._parts[name]):05d}.arrow"
        self._store.write_bytes(f"{self._prefix}/{part}", sink.getvalue().to_pybytes())
        self._parts[name].append(part)
        self._waiting[name] = []
        self._num_bytes[name] = 0

    def checkpoint(self) -> dict[str, Any]:
        """Write all waiting rows; the result, JSON-ready, is for `resume` in another process."""
        for name in TABLES:
            self._write_part(name)
        return {
            "parts": {name: list(parts) for name, parts in self._parts.items()},
            "num_rows": dict(self._num_rows),
            "last": self._order.state(),
        }

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; rows appended after it are forgotten."""
        self._start()
        self._parts = {name: list(checkpoint["parts"][name]) for name in TABLES}
        self._num_rows = {name: int(checkpoint["num_rows"][name]) for name in TABLES}
        self._order.restore(checkpoint["last"])

    def save(self, state: bytes, fingerprint: str) -> int:
        """Write all waiting rows and, behind them, a state from which another process can go on.

        Args:
            state: of whoever makes the rows, as of the last appended one.
            fingerprint: of what the rows are made from.
        Returns:
            Bytes of the object.
        """
        head = json.dumps({**self.checkpoint(), "fingerprint": fingerprint}).encode()
        body = len(head).to_bytes(8, "little") + head + state
        self._store.write_bytes(self._state_key, sha256(body).digest() + body)
        return len(body)

    def saved(self, fingerprint: str) -> bytes | None:
        """The state that was last saved; this spool then goes on behind the rows from before it.

        Returns:
            None where nothing was saved, or it is damaged or for another fingerprint, or rows from
            before it are gone: the video then starts anew.
        """
        try:
            saved = self._store.read_bytes(self._state_key)
        except FileNotFoundError:
            return None
        body = saved[sha256().digest_size :]
        if sha256(body).digest() != saved[: sha256().digest_size]:
            return None
        end = 8 + int.from_bytes(body[:8], "little")
        checkpoint = json.loads(body[8:end])
        if checkpoint["fingerprint"] != fingerprint:
            return None
        parts = [part for parts in checkpoint["parts"].values() for part in parts]
        if not all(self._store.exists(f"{self._prefix}/{part}") for part in parts):
            return None
        self.resume(checkpoint)
        return body[end:]

    @property
    def _state_key(self) -> str:
        return f"{self._prefix}/state.bin"

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """All rows are there.

        Args:
            metadata: JSON-ready; must hold `track_len`, the number of rows by track id (as text),
                and may hold whatever tells a later run that this spool can be used.
        """
        total = sum(metadata["track_len"].values())
        if total != self._num_rows["tracks"]:
            raise SchemaError(
                f"tracks, video {self.video_id}: track_len adds up to {total}, "
                f"but {self._num_rows['tracks']} rows were appended"
            )
        body = {**self.checkpoint(), "metadata": dict(metadata)}
        self._store.write_bytes(self._done_key, json.dumps(body, indent=1).encode())

    @property
    def _done_key(self) -> str:
        return f"{self._prefix}/done.json"

    def _done(self) -> dict[str, Any] | None:
        try:
            body: dict[str, Any] = json.loads(self._store.read_bytes(self._done_key))
        except FileNotFoundError:
            return None
        return body

    def metadata(self) -> dict[str, Any] | None:
        """What `finish` was given, in whatever process; None where the video is not finished."""
        done = self._done()
        return None if done is None else dict(done["metadata"])

    def read(self, name: str) -> Iterator[Any]:
        """The rows of a table as they would be published, part by part.

        Raises:
            StorageError: the video is not finished, or a part is missing or cut.
        """
        done = self._done()
        if done is None:
            raise StorageError(f"video {self.video_id}: {self._done_key} is missing; not finished")
        num_rows = 0
        for part in done["parts"][name]:
            key = f"{self._prefix}/{part}"
            try:
                with pa.ipc.open_stream(self._store.read_bytes(key)) as stream:
                    table = stream.read_all()
            except (OSError, pa.ArrowInvalid) as error:
                raise StorageError(f"video {self.video_id}: {key}: {error}") from error
            num_rows += table.num_rows
            if name == "tracks":
                table = _with_track_len(table, done["metadata"]["track_len"], self.video_id)
            yield table
        if num_rows != done["num_rows"][name]:
            raise StorageError(
                f"video {self.video_id}: expected {done['num_rows'][name]} rows of {name}, "
                f"got {num_rows}"
            )

    def discard(self) -> None:
        """Remove everything that was spooled for this video and begin anew."""
        self._store.delete_tree(self._prefix)
        self._start()


# --- shards ------------------------------------------------------------------------------------


def publish_shard(
    store: Store,
    *,
    shard_id: str,
    dataset: str,
    videos: Sequence[VideoSpool],
    fingerprint: str,
    config_fingerprint: str,
    model_fingerprint: str,
    timings_s: Mapping[str, float] | None = None,
) -> CommitRecord:
    """Merge finished spools into one object per table and commit them.

    Every table gets an object, also an empty one, so that `pd.read_parquet("<root>/tracks")`
    works for a corpus without people. All objects are made before the first is put.

    Args:
        store: the output root.
        shard_id, dataset: of the shard.
        videos: finished spools, in any order; each holds one row of `videos`.
        fingerprint: of the unit, see `CommitRecord`.
        config_fingerprint, model_fingerprint: see `CommitRecord`.
        timings_s: wall times, kept in the commit record only.
    Raises:
        StorageError: the store failed, or a spool is not finished.
        SchemaError: a spool does not fit, or a video is given twice.
    """
    ordered = sorted(videos, key=lambda video: video.video_id)
    ids = [video.video_id for video in ordered]
    if len(set(ids)) != len(ids):
        raise SchemaError(f"shard {shard_id}: expected each video once, got {ids}")
    records: list[VideoRecord] = []
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                ObjectWriter(store, name, object_key(name, dataset, shard_id))
            )
            for name in reversed(TABLES)  # left in the order of TABLES
        }
        for name in TABLES:
            for video in ordered:
                for table in video.read(name):
                    writers[name].write(table)
                    if name == "videos":
                        records += _video_records(table)
        if [record.video_id for record in records] != ids:
            raise SchemaError(
                f"shard {shard_id}: expected one row of videos for each of {ids}, "
                f"got {[record.video_id for record in records]}"
            )
    record = CommitRecord(
        shard_id=shard_id,
        dataset=dataset,
        fingerprint=fingerprint,
        config_fingerprint=config_fingerprint,
        model_fingerprint=model_fingerprint,
        videos=tuple(records),
        objects={name: writers[name].record for name in TABLES},
        schema_versions={name: schema_version(name) for name in TABLES},
        timings_s=dict(timings_s or {}),
    )
    write_commit(store, record)
    discard_work(store, shard_id)
    return record


def discard_work(store: Store, shard_id: str) -> None:
    """Remove what is left of a shard below `_work/`."""
    store.delete_tree(f"{WORK}/{safe_key(shard_id)}")


def _video_records(table: Any) -> list[VideoRecord]:
    columns = ["video_id", "content_fingerprint", "status"]
    return [VideoRecord(**row) for row in table.select(columns).to_pylist()]

"""Rows on their way to the store: spooled, then merged into one object per table.

While videos are being tracked their finished rows go to `_work/<shard>/` in parts of a few MiB, so
memory does not grow with a video. `publish_shard` streams the parts of all videos of a shard, and
the rows of those that need no work from the published objects, into local Parquet files, puts each
under its final key with one PUT, writes the commit record last, and removes the parts.

Layout: `<table>/<dataset>/part-<shard>.parquet`. The folder is named by the plain dataset, not
`dataset=<name>`: the column is also in the file, as a string. Measured with pyarrow 26, pandas 3.1
and DuckDB 2.0, a Hive-style folder makes `pd.read_parquet("<root>/tracks")` fail (string against
dictionary), and without the column in the file a dataset called ``007`` is read as the number 7.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fourdh_batch.errors import LostRowsError, SchemaError, StorageError
from fourdh_batch.storage import READ_BLOCK_BYTES, Store, safe_key
from fourdh_batch.tables.manifest import (
    CommitRecord,
    ObjectRecord,
    VideoRecord,
    details_digest,
    void_commit,
    write_commit,
)
from fourdh_batch.tables.schema import (
    TABLES,
    arrow_schema,
    check_table,
    schema_version,
    table_schema,
)

logger = logging.getLogger(__name__)

WORK = "_work"
# Rows of one row group: 3 MB of tracks. Larger ones save 0.5 % of space (1,433 bytes a row at
# 2,048, 1,426 at 8,192) and make reading one ten-second clip out of a shard dearer.
ROW_GROUP_ROWS = 2048
SPOOL_PART_BYTES = 4 * 2**20
_ROWS_PER_BATCH = 10_000


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


def put_rows(store: Store, key: str, schema: Any, rows: Iterable[Sequence[Any]]) -> None:
    """A small Parquet object that is no table of ours, e.g. a list beside the record of a run.

    Args:
        schema: of the columns.
        rows: one value per column; consumed lazily.
    """
    rows = iter(rows)
    with tempfile.TemporaryDirectory(prefix="fourdh-") as folder:
        path = Path(folder) / "object.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            while batch := list(islice(rows, _ROWS_PER_BATCH)):
                columns = [
                    pa.array(values, field.type)
                    for values, field in zip(zip(*batch, strict=True), schema, strict=True)
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        store.put_file(path, key)


# --- rows of videos -------------------------------------------------------------------------


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


class WorkSpool:
    """Rows of some videos of a shard below `_work/<shard>/`, one video after another.

    Rows are written in parts of a few MiB, so memory does not grow with a video, and many short
    videos share a part. What counts is what the writer's index names: `save` writes it, and rows
    behind it are lost with their process. All names are the writer's own, so what an interrupted
    or superseded writer left behind is never mixed in.

    Args:
        store: the output root.
        shard_id: shard of the videos.
        part_bytes: rows of this size are written as one part.
    Attributes:
        name: of this writer; `SavedSpool` reads by it what was saved.
    """

    def __init__(self, store: Store, shard_id: str, *, part_bytes: int = SPOOL_PART_BYTES) -> None:
        self.name = secrets.token_hex(8)
        self._store = store
        self._shard_id = shard_id
        self._folder = work_folder(shard_id)
        self._part_bytes = part_bytes
        self._waiting: dict[str, list[Any]] = {name: [] for name in TABLES}
        self._num_bytes = dict.fromkeys(TABLES, 0)
        self._num_rows = dict.fromkeys(TABLES, 0)
        self._parts: dict[str, list[tuple[str, int]]] = {name: [] for name in TABLES}
        self._finished: list[_Extent] = []
        self._video_id: str | None = None
        self._first_row = dict(self._num_rows)
        self._order = _OrderCheck("")

    def begin(self, video_id: str) -> None:
        """The rows that follow are of this video; those of an unfinished one are forgotten."""
        self._video_id = video_id
        self._first_row = dict(self._num_rows)
        self._order = _OrderCheck(video_id)

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

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """All rows of the video are there.

        Args:
            metadata: JSON-ready; must hold `track_len`, the number of rows by track id (as text),
                and may hold whatever tells a later run that these rows can be used.
        """
        if self._video_id is None:
            raise ValueError("expected begin() before finish()")
        num_rows = {name: self._num_rows[name] - self._first_row[name] for name in TABLES}
        total = sum(metadata["track_len"].values())
        if total != num_rows["tracks"]:
            raise SchemaError(
                f"tracks, video {self._video_id}: track_len adds up to {total}, "
                f"but {num_rows['tracks']} rows were appended"
            )
        extent = _Extent(self._video_id, self._first_row, num_rows, dict(metadata))
        self._finished.append(extent)
        self._video_id = None

    def save(self, state: bytes = b"", *, fingerprint: str = "", position: int = 0) -> int:
        """Write all waiting rows and the index; finished videos are safe from here on.

        Args:
            state: of whoever makes the rows of the unfinished video, as of its last row; empty
                where it could not be continued.
            fingerprint: of what the unfinished video's rows are made from.
            position: the further, the larger; of several states of a video the furthest is used.
        Returns:
            Bytes of the index, with the state.
        """
        for name in TABLES:
            self._write_part(name)
        head: dict[str, Any] = {
            "parts": self._parts,
            "finished": [asdict(extent) for extent in self._finished],
            "open": None,
        }
        if state:
            assert self._video_id is not None, "a state belongs to an unfinished video"
            head["open"] = {
                "video_id": self._video_id,
                "first_row": self._first_row,
                "num_rows": self._num_rows,
                "last": self._order.state(),
                "fingerprint": fingerprint,
                "position": position,
            }
        text = json.dumps(head).encode()
        body = len(text).to_bytes(8, "little") + text + state
        self._store.write_bytes(f"{self._folder}/{self.name}{_INDEX}", sha256(body).digest() + body)
        return len(body)

    def take_up(self, saved: SavedSpool) -> bytes:
        """Go on with the unfinished video of another writer, behind the rows that it saved.

        Returns:
            The state that was saved with them.
        Raises:
            StorageError: rows are gone.
        """
        assert saved.unfinished is not None, "nothing to take up"
        for part, _ in (part for parts in saved.parts.values() for part in parts):
            if not self._store.exists(f"{self._folder}/{part}"):
                raise StorageError(f"shard {self._shard_id}: {part} of a saved state is gone")
        head = saved.unfinished
        self._parts = {name: list(saved.parts[name]) for name in TABLES}
        self._num_rows = {name: int(head["num_rows"][name]) for name in TABLES}
        self._video_id = str(head["video_id"])
        self._first_row = {name: int(head["first_row"][name]) for name in TABLES}
        self._order = _OrderCheck(self._video_id)
        self._order.restore(head["last"])
        return saved.state

    def _write_part(self, name: str) -> None:
        if not self._waiting[name]:
            return
        rows = pa.concat_tables(self._waiting[name])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, arrow_schema(name)) as writer:
            writer.write_table(rows)
        part = f"{self.name}-{name}-{len(self._parts[name]):05d}.arrow"
        self._store.write_bytes(f"{self._folder}/{part}", sink.getvalue().to_pybytes())
        self._parts[name].append((part, rows.num_rows))
        self._waiting[name] = []
        self._num_bytes[name] = 0


_INDEX = ".index"


@dataclass(frozen=True, slots=True)
class _Extent:
    """Where the rows of one video lie among all rows of a writer, by table."""

    video_id: str
    first_row: Mapping[str, int]
    num_rows: Mapping[str, int]
    metadata: Mapping[str, Any]


class SavedSpool:
    """What a `WorkSpool` saved, read in whatever process.

    Args:
        store, shard_id: as for the writer.
        name: of the writer.
    Attributes:
        name: as given.
        finished: by video id, the metadata of the videos whose rows are all there.
        unfinished: None, or JSON of the one that can be continued: `video_id`, `fingerprint`,
            `position`, and more for `WorkSpool.take_up`.
        parts: by table, the objects of the rows and their numbers of rows.
        state: of the unfinished video.

    Raises:
        FileNotFoundError: nothing was saved.
        StorageError: what was saved is damaged.
    """

    def __init__(self, store: Store, shard_id: str, name: str) -> None:
        self.name = name
        self._store = store
        self._shard_id = shard_id
        self._folder = work_folder(shard_id)
        key = f"{self._folder}/{name}{_INDEX}"
        data = store.read_bytes(key)
        size = sha256().digest_size
        body = data[size:]
        if len(data) < size + 8 or sha256(body).digest() != data[:size]:
            raise StorageError(f"shard {shard_id}: {key} is damaged")
        end = 8 + int.from_bytes(body[:8], "little")
        head = json.loads(body[8:end])
        self.state = body[end:]
        self.unfinished: dict[str, Any] | None = head["open"]
        self.parts: dict[str, list[tuple[str, int]]] = {
            table: [(part, int(rows)) for part, rows in parts]
            for table, parts in head["parts"].items()
        }
        self._extents = {item["video_id"]: _Extent(**item) for item in head["finished"]}
        self.finished = {name: extent.metadata for name, extent in self._extents.items()}
        self._cached: tuple[str, Any] = ("", None)

    def read(self, name: str, video_id: str) -> Iterator[Any]:
        """The rows of a table of one finished video as they would be published, part by part.

        Raises:
            StorageError: the video is not finished, or a part is missing or cut.
        """
        extent = self._extents.get(video_id)
        if extent is None:
            raise StorageError(f"shard {self._shard_id}, video {video_id}: not finished")
        start, left = extent.first_row[name], extent.num_rows[name]
        first = 0
        for part, num_rows in self.parts[name]:
            if left and first <= start < first + num_rows:
                rows = self._part(part, num_rows, video_id).slice(start - first, left)
                if name == "tracks":
                    rows = _with_track_len(rows, extent.metadata["track_len"], video_id)
                yield rows
                start, left = start + rows.num_rows, left - rows.num_rows
            first += num_rows
        if left:
            raise StorageError(f"video {video_id}: {left} rows of {name} are missing")

    def _part(self, part: str, num_rows: int, video_id: str) -> Any:
        """All rows of a part; the last one is kept, for the next video."""
        if self._cached[0] != part:
            key = f"{self._folder}/{part}"
            try:
                with pa.ipc.open_stream(self._store.read_bytes(key)) as stream:
                    table = stream.read_all()
            except (OSError, pa.ArrowInvalid) as error:
                raise StorageError(f"video {video_id}: {key}: {error}") from error
            if table.num_rows != num_rows:
                raise StorageError(
                    f"video {video_id}: {key}: expected {num_rows} rows, got {table.num_rows}"
                )
            self._cached = (part, table)
        return self._cached[1]


def saved_spools(store: Store, shard_id: str) -> list[SavedSpool]:
    """Everything that was saved for a shard and not published; damaged ones are left out."""
    spools = []
    for key, _ in store.list(work_folder(shard_id)):
        if not key.endswith(_INDEX):
            continue
        name = key.rpartition("/")[2].removesuffix(_INDEX)
        try:
            spools.append(SavedSpool(store, shard_id, name))
        except (FileNotFoundError, StorageError, KeyError, TypeError, ValueError) as error:
            logger.warning("shard %s: saved rows are not used: %s", shard_id, error)
    return spools


class PublishedShard:
    """Rows of single videos out of the published objects of a shard.

    An object is fetched whole and must be the one that was committed: after a run that was killed
    between two objects of the shard it is not.

    Args:
        store: the output root.
        commit: record of the shard.
    """

    def __init__(self, store: Store, commit: CommitRecord) -> None:
        self._store = store
        self._commit = commit
        self._num_rows = {video.video_id: video.num_rows for video in commit.videos}
        self._files: dict[str, Any] = {}
        self._open = ExitStack()
        self._cached: dict[str, tuple[int, Any]] = {}

    def read(self, name: str, video_id: str) -> Iterator[Any]:
        """The rows of a table of one video, row group by row group.

        Raises:
            LostRowsError: the object is gone, or is not the one that was committed.
            StorageError: the store failed.
        """
        record = self._commit.objects[name]
        found = 0
        if name not in self._files:
            self._files[name] = self._fetch(record)
        for rows in self._groups(name, video_id):
            found += rows.num_rows
            yield rows
        expected = self._num_rows[video_id].get(name)
        if found != expected:
            raise LostRowsError(
                f"shard {self._commit.shard_id}, video {video_id}: {record.key}: "
                f"expected {expected} rows, got {found}"
            )

    def _fetch(self, record: ObjectRecord) -> Any:
        where = f"shard {self._commit.shard_id}: {record.key}"
        temporary = tempfile.TemporaryFile(prefix="fourdh-")  # noqa: SIM115 - closed by `close`
        file = self._open.enter_context(temporary)
        try:
            with self._store.open_read(record.key) as source:
                shutil.copyfileobj(source, file, READ_BLOCK_BYTES)
        except FileNotFoundError as error:
            raise LostRowsError(f"{where}: is gone") from error
        except OSError as error:
            raise StorageError(f"{where}: {error}") from error
        file.seek(0)
        digest = file_digest(file, "sha256").hexdigest()
        if digest != record.sha256:
            raise LostRowsError(f"{where}: expected SHA-256 {record.sha256}, got {digest}")
        return pq.ParquetFile(file)

    def _groups(self, name: str, video_id: str) -> Iterator[Any]:
        file = self._files[name]
        column = file.schema_arrow.get_field_index("video_id")
        for number in range(file.metadata.num_row_groups):
            statistics = file.metadata.row_group(number).column(column).statistics
            if statistics is not None and statistics.has_min_max:
                low, high = statistics.min, statistics.max
                # A writer may cut long texts in statistics: then `high` is only a beginning.
                if video_id < low or (video_id > high and not video_id.startswith(high)):
                    continue
            if self._cached.get(name, (-1, None))[0] != number:
                self._cached[name] = (number, file.read_row_group(number))
            rows = self._cached[name][1]
            rows = rows.filter(pc.equal(rows["video_id"], video_id))
            if rows.num_rows:
                yield rows

    def close(self) -> None:
        """Close the objects."""
        self._open.close()


# --- shards ------------------------------------------------------------------------------------


class VideoRows(Protocol):
    """Where the rows of a video come from: `SavedSpool` or `PublishedShard`."""

    def read(self, name: str, video_id: str) -> Iterator[Any]:
        """The rows of a table, in order."""


def publish_shard(
    store: Store,
    *,
    shard_id: str,
    dataset: str,
    videos: Mapping[str, VideoRows],
    fingerprint: str,
    config_fingerprint: str,
    model_fingerprint: str,
    timings_s: Mapping[str, float] | None = None,
) -> CommitRecord:
    """Merge the rows of videos into one object per table and commit them.

    Every table gets an object, also an empty one, so that `pd.read_parquet("<root>/tracks")`
    works for a corpus without people. All objects are made before the first is put.

    Args:
        store: the output root.
        shard_id, dataset: of the shard.
        videos: by id, where its rows are; each has one row of `videos`.
        fingerprint: of the unit, see `CommitRecord`.
        config_fingerprint, model_fingerprint: see `CommitRecord`.
        timings_s: wall times, kept in the commit record only.
    Raises:
        StorageError: the store failed, or a video is not finished.
        SchemaError: rows do not fit.
    """
    ids = sorted(videos)
    rows_of: dict[str, dict[str, int]] = {video_id: {} for video_id in ids}
    described: list[dict[str, Any]] = []
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                ObjectWriter(store, name, object_key(name, dataset, shard_id))
            )
            for name in reversed(TABLES)  # left in the order of TABLES
        }
        for name in TABLES:
            for video_id in ids:
                count = 0
                for table in videos[video_id].read(name, video_id):
                    writers[name].write(table)
                    count += table.num_rows
                    if name == "videos":
                        described += table.select(_OF_A_RECORD).to_pylist()
                rows_of[video_id][name] = count
        if [row["video_id"] for row in described] != ids:
            raise SchemaError(
                f"shard {shard_id}: expected one row of videos for each of {ids}, "
                f"got {[row['video_id'] for row in described]}"
            )
        void_commit(store, shard_id)
    record = CommitRecord(
        shard_id=shard_id,
        dataset=dataset,
        fingerprint=fingerprint,
        config_fingerprint=config_fingerprint,
        model_fingerprint=model_fingerprint,
        videos=tuple(
            VideoRecord(
                video_id=row["video_id"],
                content_fingerprint=row["content_fingerprint"],
                status=row["status"],
                num_rows=rows_of[row["video_id"]],
                details=details_digest(row["manifest"] or ""),
            )
            for row in described
        ),
        objects={name: writers[name].record for name in TABLES},
        schema_versions={name: schema_version(name) for name in TABLES},
        timings_s=dict(timings_s or {}),
    )
    write_commit(store, record)
    try:
        discard_work(store, shard_id)
    except StorageError as error:  # it is published; the next run clears away
        logger.warning("shard %s: published, but its work is left: %s", shard_id, error)
    return record


_OF_A_RECORD = ["video_id", "content_fingerprint", "status", "manifest"]


def work_folder(shard_id: str) -> str:
    """Where unpublished rows of a shard lie."""
    return f"{WORK}/{safe_key(shard_id)}"


def discard_work(store: Store, shard_id: str) -> None:
    """Remove what is left of a shard below `_work/`."""
    store.delete_tree(work_folder(shard_id))

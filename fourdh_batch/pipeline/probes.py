"""What is remembered of video files between two plans: fingerprints, and what headers say.

A fingerprint of a local file is taken over while size, times and inode are what they were; what
a header says goes with the content. All of it is one object, `_plan/<dataset>/probes.parquet`,
replaced as a whole. It may be deleted at any time.
"""

from __future__ import annotations

import logging
import sqlite3
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fourdh_batch.storage import Store, fingerprint_file, is_local, local_path, safe_key
from fourdh_batch.video.probe import Header

logger = logging.getLogger(__name__)

FRESH_S = 2.0  # a file written so lately may be written again within one tick of its clock
_BATCH_ROWS = 1 << 16
_SCHEMA = pa.schema(
    [
        ("uri", pa.binary()),  # null: the row tells of a header
        ("num_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("ctime_ns", pa.int64()),
        ("inode", pa.uint64()),
        ("fingerprint", pa.string()),
        ("num_frames", pa.int64()),
        ("fps", pa.float64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("problem", pa.string()),
    ]
)
_TABLES = """
CREATE TABLE file (uri BLOB PRIMARY KEY, num_bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER,
                   inode TEXT, fingerprint TEXT, is_seen INTEGER) WITHOUT ROWID;
CREATE TABLE header (fingerprint TEXT PRIMARY KEY, num_frames INTEGER, fps REAL, width INTEGER,
                     height INTEGER, problem TEXT, is_seen INTEGER) WITHOUT ROWID;
"""


class ProbeCache:
    """The probes of a dataset; a context manager, for several threads.

    They lie in a temporary SQLite file while it is open.

    Args:
        store: the output root.
        dataset: whose.
    """

    def __init__(self, store: Store, dataset: str) -> None:
        self._store = store
        self._key = f"_plan/{safe_key(dataset)}/probes.parquet"
        self._lock = threading.Lock()
        self._is_loaded = self._is_changed = False

    def __enter__(self) -> ProbeCache:
        self._folder = tempfile.TemporaryDirectory(prefix="fourdh-probes-")
        self._db = sqlite3.connect(
            Path(self._folder.name) / "probes.sqlite",
            isolation_level="DEFERRED",
            check_same_thread=False,  # the lock sees to it
        )
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.executescript(_TABLES)
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._folder.cleanup()

    def fingerprint(self, uri: str) -> tuple[int, str]:
        """`fingerprint_file`; the content of a local file is read only where it may be new.

        Raises: as `fingerprint_file`.
        """
        if not is_local(uri):
            return fingerprint_file(uri)
        try:
            status = local_path(uri).stat()
        except OSError:
            return fingerprint_file(uri)  # which says it properly
        name = uri.encode("utf-8", "surrogatepass")
        mark = (
            *(status.st_size, status.st_mtime_ns, status.st_ctime_ns),
            str(status.st_ino),  # may have 64 bits, SQLite's integers have 63
        )
        with self._lock:
            self._load()
            row = self._db.execute(
                "SELECT num_bytes, mtime_ns, ctime_ns, inode, fingerprint FROM file WHERE uri = ?",
                (name,),
            ).fetchone()
            if row is not None and row[:4] == mark:
                self._db.execute("UPDATE file SET is_seen = 1 WHERE uri = ?", (name,))
                return status.st_size, str(row[4])
        num_bytes, fingerprint = fingerprint_file(uri)
        newest = max(status.st_mtime_ns, status.st_ctime_ns) / 1e9
        if num_bytes == status.st_size and time.time() - newest > FRESH_S:
            with self._lock:
                self._is_changed = True
                self._db.execute(
                    "INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?, 1)",
                    (name, *mark, fingerprint),
                )
        return num_bytes, fingerprint

    def header(self, fingerprint: str) -> Header | None:
        """What the header of a content is known to say; None where it was not asked yet."""
        with self._lock:
            self._load()
            row = self._db.execute(
                "SELECT num_frames, fps, width, height, problem FROM header WHERE fingerprint = ?",
                (fingerprint,),
            ).fetchone()
            if row is None:
                return None
            self._db.execute("UPDATE header SET is_seen = 1 WHERE fingerprint = ?", (fingerprint,))
        return Header(*row)

    def add_header(self, fingerprint: str, header: Header) -> None:
        """Remember what a header says."""
        with self._lock:
            self._load()
            self._is_changed = True
            self._db.execute(
                "INSERT OR REPLACE INTO header VALUES (?, ?, ?, ?, ?, ?, 1)",
                (
                    *(fingerprint, header.num_frames, header.fps),
                    *(header.width, header.height, header.problem),
                ),
            )

    def save(self, *, forget_unseen: bool) -> None:
        """Replace the object, where there is something new.

        Args:
            forget_unseen: files that were not asked for are left out.
        """
        with self._lock:
            if not self._is_changed:
                return
            if forget_unseen:
                self._db.execute("DELETE FROM file WHERE NOT is_seen")
            path = Path(self._folder.name) / "probes.parquet"
            with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
                for columns, table in (
                    ("uri, num_bytes, mtime_ns, ctime_ns, inode, fingerprint", "file"),
                    ("fingerprint, num_frames, fps, width, height, problem", "header"),
                ):
                    names = columns.split(", ")
                    rows = self._db.execute(f"SELECT {columns} FROM {table} ORDER BY 1")
                    while batch := rows.fetchmany(_BATCH_ROWS):
                        writer.write_table(_table(names, batch))
            self._store.put_file(path, self._key)
            self._is_changed = False

    def _load(self) -> None:
        """Read the object, where it was not yet: a corpus that tells all has no need of it."""
        if self._is_loaded:
            return
        self._is_loaded = True
        try:
            self._read()
        except FileNotFoundError:
            pass
        except (pa.ArrowException, ValueError, TypeError, OverflowError, sqlite3.Error) as error:
            logger.warning("%s is damaged and made anew: %s", self._key, error)
            self._db.executescript("DELETE FROM file; DELETE FROM header;")

    def _read(self) -> None:
        with self._store.open_read(self._key) as file, pq.ParquetFile(file) as table:
            if not table.schema_arrow.equals(_SCHEMA):
                raise ValueError(f"expected the columns {_SCHEMA.names}")
            for batch in table.iter_batches(_BATCH_ROWS):
                rows = list(zip(*(column.to_pylist() for column in batch.columns), strict=True))
                self._db.executemany(
                    "INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?, 0)",
                    ((*r[:4], str(r[4]), r[5]) for r in rows if r[0] is not None),
                )
                self._db.executemany(
                    "INSERT OR REPLACE INTO header VALUES (?, ?, ?, ?, ?, ?, 0)",
                    (r[5:11] for r in rows if r[0] is None),
                )


def _table(names: list[str], rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    if "inode" in columns:
        columns["inode"] = tuple(map(int, columns["inode"]))
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.nulls(len(rows), field.type)
        for field in _SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)

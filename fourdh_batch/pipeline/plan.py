"""From a corpus to shards, the videos that one Parquet object per table holds.

The assignment of a video to a shard is recorded once, under `_plan/<dataset>/`, and never
changes: tonight's new videos form new shards, and adding or removing one moves no other. What is
left to do is the plan minus the commits with the same fingerprint (`tables/manifest.py`).
"""

from __future__ import annotations

import json
import re
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fourdh_batch.errors import OutputInUseError, SchemaError
from fourdh_batch.pipeline.corpus import UNREADABLE as UNREADABLE
from fourdh_batch.pipeline.corpus import Video as Video
from fourdh_batch.pipeline.corpus import read_corpus as read_corpus
from fourdh_batch.storage import Store, safe_key
from fourdh_batch.tables.manifest import fingerprint_of

_MIB = 1 << 20
_BATCH_ROWS = 1 << 16
TAKEN_OUT = ""
_GENERATION = re.compile(r"(\d{6,})\.(json|parquet)", re.ASCII)
_GENERATION_SCHEMA = pa.schema(
    [pa.field("video_id", pa.string(), False), pa.field("shard_id", pa.string(), False)]
)


@dataclass(frozen=True, slots=True)
class Shard:
    """The videos that one task finishes and one object per table holds, in `video_id` order."""

    shard_id: str
    dataset: str
    videos: tuple[Video, ...]

    def fingerprint(self, model_fingerprint: str) -> str:
        """Changes exactly when the rows of this shard may change."""
        return fingerprint_of(
            {
                "dataset": self.dataset,
                "model": model_fingerprint,
                "videos": {v.video_id: v.fingerprint for v in self.videos},
            }
        )


def plan_shards(
    store: Store,
    dataset: str,
    videos: Sequence[Video],
    *,
    videos_per_shard: int,
    mb_per_shard: int,
    record: bool = True,
) -> list[Shard]:
    """Group videos into shards, keeping every earlier assignment.

    Args:
        store: the output root, where the assignment is recorded.
        videos: the corpus of today.
        record: write new assignments; False for a dry run.
    Returns:
        Shards with at least one video of today, in `shard_id` order.
    """
    assigned = dict(assignments(store, dataset))
    last = max((number for number, _ in read_generations(store, dataset)), default=0)
    ordered = sorted(videos, key=lambda v: v.video_id)
    new = list(
        cut_shards(
            dataset,
            last + 1,
            ((v.video_id, v.num_bytes) for v in ordered if v.video_id not in assigned),
            videos_per_shard=videos_per_shard,
            mb_per_shard=mb_per_shard,
        )
    )
    if record:
        write_generation(store, dataset, last + 1, new)
    assigned.update(new)
    by_shard: dict[str, list[Video]] = {}
    for video in ordered:
        by_shard.setdefault(assigned[video.video_id], []).append(video)
    return [Shard(name, dataset, tuple(by_shard[name])) for name in sorted(by_shard)]


# --- the record of who belongs where -----------------------------------------------------------


def plan_folder(dataset: str) -> str:
    """Key of the folder with what planning remembers of a dataset."""
    return f"_plan/{safe_key(dataset)}"


def cut_shards(
    dataset: str,
    generation: int,
    videos: Iterable[tuple[str, int]],
    *,
    videos_per_shard: int,
    mb_per_shard: int,
) -> Iterator[tuple[str, str]]:
    """Group the new videos of a plan into new shards.

    Args:
        generation: number of this plan; part of the names.
        videos: `video_id` and bytes, in `video_id` order.
    Returns:
        (video_id, shard_id), in the same order.
    """
    shard_id = ""
    num_shards = num_members = num_bytes = 0
    for video_id, size in videos:
        full = num_members >= videos_per_shard or num_bytes + size > mb_per_shard * _MIB
        if not shard_id or full:
            digest = blake2b(f"{dataset}\0{video_id}".encode(), digest_size=4).hexdigest()
            shard_id = f"{generation:04d}-{num_shards:05d}-{digest}"
            num_shards += 1
            num_members = num_bytes = 0
        num_members += 1
        num_bytes += size
        yield video_id, shard_id


def assignments(store: Store, dataset: str) -> Iterator[tuple[str, str]]:
    """(video_id, shard_id) of every video that was planned and not taken out, in `video_id` order.

    Raises:
        SchemaError: as `read_generations`.
    """
    with (
        tempfile.TemporaryDirectory(prefix="fourdh-plan-") as folder,
        closing(sqlite3.connect(Path(folder) / "plan.sqlite")) as db,
    ):
        db.execute("PRAGMA journal_mode=OFF")
        db.execute("PRAGMA synchronous=OFF")
        db.execute("CREATE TABLE placed (video_id TEXT PRIMARY KEY, shard_id TEXT) WITHOUT ROWID")
        for _, rows in read_generations(store, dataset):
            db.executemany("INSERT OR REPLACE INTO placed VALUES (?, ?)", rows)
        yield from db.execute("SELECT * FROM placed WHERE shard_id != ? ORDER BY 1", (TAKEN_OUT,))


def read_generations(store: Store, dataset: str) -> Iterator[tuple[int, Iterator[tuple[str, str]]]]:
    """Every recorded plan of a dataset, oldest first: its number, and (video_id, shard_id).

    A later one counts; `TAKEN_OUT` as shard says that the video left the tables.

    Raises:
        SchemaError: a file there is not a recorded plan.
    """
    for key, _ in store.list(plan_folder(dataset)):
        name = _GENERATION.fullmatch(key.rpartition("/")[2])
        if name is None:
            continue
        yield int(name[1]), (_read_json if name[2] == "json" else _read_parquet)(store, key)


def write_generation(
    store: Store, dataset: str, generation: int, rows: Iterable[tuple[str, str]]
) -> bool:
    """Record new assignments (video_id, shard_id), where there are any.

    Returns:
        Whether there were.
    """
    rest = iter(rows)
    batch = list(islice(rest, _BATCH_ROWS))
    if not batch:
        return False
    with tempfile.TemporaryDirectory(prefix="fourdh-plan-") as folder:
        path = Path(folder) / "plan.parquet"
        with pq.ParquetWriter(path, _GENERATION_SCHEMA, compression="zstd") as writer:
            while batch:
                writer.write_table(pa.table(list(zip(*batch, strict=True)), _GENERATION_SCHEMA))
                batch = list(islice(rest, _BATCH_ROWS))
        key = f"{plan_folder(dataset)}/{generation:06d}.parquet"
        if not store.create_exclusive(key, path.read_bytes()):
            raise OutputInUseError(f"{key}: another driver has recorded a plan just now")
    return True


def _read_json(store: Store, key: str) -> Iterator[tuple[str, str]]:
    """A plan as it was recorded before Parquet."""
    try:
        shards = json.loads(store.read_bytes(key))["shards"]
        yield from ((video_id, name) for name, ids in shards.items() for video_id in ids)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SchemaError(f"{key}: expected a recorded plan, got {error!r}") from error


def _read_parquet(store: Store, key: str) -> Iterator[tuple[str, str]]:
    try:
        with store.open_read(key) as file, pq.ParquetFile(file) as table:
            if not table.schema_arrow.equals(_GENERATION_SCHEMA):
                raise SchemaError(
                    f"{key}: expected a recorded plan with the columns "
                    f"{_GENERATION_SCHEMA.names}, got {table.schema_arrow.names}"
                )
            for batch in table.iter_batches(_BATCH_ROWS):
                columns = (column.to_pylist() for column in batch.columns)
                yield from zip(*columns, strict=True)
    except pa.ArrowException as error:
        raise SchemaError(f"{key}: expected a recorded plan, got {error}") from error

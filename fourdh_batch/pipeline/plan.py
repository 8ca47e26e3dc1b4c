"""From a corpus to shards, the videos that one Parquet object per table holds.

The assignment of a video to a shard is recorded once, under `_plan/<dataset>/`, and never
changes: tonight's new videos form new shards, and adding or removing one moves no other. What is
left to do is the plan minus the commits with the same fingerprint (`tables/manifest.py`).
"""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fourdh_batch.errors import ManifestError, SchemaError, StorageError
from fourdh_batch.storage import Store, fingerprint_file, list_files, open_read, safe_key
from fourdh_batch.tables.manifest import fingerprint_of

VIDEO_EXTENSIONS = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"),
    *(".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
MANIFEST_EXTENSIONS = (".csv", ".jsonl", ".parquet")
MAX_ID_LENGTH = 1024
NUM_PROBE_THREADS = 16
MAX_PROBLEMS_SHOWN = 50
UNREADABLE = "unreadable"  # begins the fingerprint of a file that could not be read
_MIB = 1 << 20
_BATCH_ROWS = 1 << 16
_GENERATION = re.compile(r"(\d{6,})\.(json|parquet)", re.ASCII)
_GENERATION_SCHEMA = pa.schema(
    [pa.field("video_id", pa.string(), False), pa.field("shard_id", pa.string(), False)]
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Video:
    """One video of a corpus.

    Attributes:
        video_id: unique in its dataset; the path relative to the input folder, or the
            manifest's own.
        uri: where it is read from.
        num_bytes: size of the file, 0 where it could not be read.
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
        return blake2b(self.extra.encode(), digest_size=8).hexdigest() if self.extra else ""


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


def read_corpus(source: str, *, limit: int = 0) -> list[Video]:
    """All videos of a folder, glob, prefix, single file or manifest, in `video_id` order.

    A manifest is a csv, jsonl or Parquet file with the columns `video_id` and `uri`; a relative
    `uri` counts from the manifest's folder. A folder is searched at all depths for files with a
    video's extension; ids are then paths relative to the folder.

    Raises:
        ManifestError: lists every duplicate, missing file and impossible id at once; or says
            that there is no video at all.
    """
    if source.lower().endswith(MANIFEST_EXTENSIONS):
        listed = list(_read_manifest(source))
        from_manifest = True
    else:
        try:
            listed = [(relative, uri) for relative, uri, _ in list_files(source, VIDEO_EXTENSIONS)]
        except (FileNotFoundError, StorageError) as error:
            raise ManifestError(f"input {source}: not found ({error})") from error
        from_manifest = False
    if not listed:
        raise ManifestError(
            f"input {source}: no video found; looked for files ending in "
            f"{' '.join(VIDEO_EXTENSIONS)} at all depths. A file with another name can be given "
            "directly or through a manifest (csv, jsonl, parquet with video_id and uri)"
        )
    listed.sort()
    problems = list(_wrong_ids([video_id for video_id, _ in listed]))
    if limit:
        listed = listed[:limit]

    def probe(item: tuple[str, str]) -> Video | str:
        video_id, uri = item
        try:
            num_bytes, fingerprint = fingerprint_file(uri)
        except (OSError, StorageError) as error:
            if from_manifest:
                return f"{video_id}: {uri}: {type(error).__name__}"
            # A dangling link or unreadable file among good ones: its own row in `failures`.
            return Video(video_id, uri, 0, f"{UNREADABLE}-{type(error).__name__}")
        return Video(video_id, uri, num_bytes, fingerprint)

    videos: list[Video] = []
    for result in _in_threads(probe, listed):
        if isinstance(result, str):
            problems.append(result)
        else:
            videos.append(result)
    if problems:
        raise ManifestError(f"input {source}: {some_of(problems)}")
    return videos


def some_of(problems: Sequence[str]) -> str:
    """Problems as one text: how many, and the first of them."""
    text = f"{len(problems)} problems:\n  " + "\n  ".join(problems[:MAX_PROBLEMS_SHOWN])
    more = len(problems) - MAX_PROBLEMS_SHOWN
    return f"{text}\n  and {more} more" if more > 0 else text


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
    assigned: dict[str, str] = {}
    last = 0
    for number, rows in read_generations(store, dataset):
        assigned.update(rows)
        last = number
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


def read_generations(store: Store, dataset: str) -> Iterator[tuple[int, Iterator[tuple[str, str]]]]:
    """Every recorded plan of a dataset, oldest first: its number, and (video_id, shard_id).

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
) -> None:
    """Record new assignments (video_id, shard_id); nothing is written where there are none."""
    rest = iter(rows)
    batch = list(islice(rest, _BATCH_ROWS))
    if not batch:
        return
    with tempfile.TemporaryDirectory(prefix="fourdh-plan-") as folder:
        path = Path(folder) / "plan.parquet"
        with pq.ParquetWriter(path, _GENERATION_SCHEMA, compression="zstd") as writer:
            while batch:
                writer.write_table(pa.table(list(zip(*batch, strict=True)), _GENERATION_SCHEMA))
                batch = list(islice(rest, _BATCH_ROWS))
        store.put_file(path, f"{plan_folder(dataset)}/{generation:06d}.parquet")


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


def _read_manifest(source: str) -> Iterator[tuple[str, str]]:
    folder = source.rpartition("/")[0]
    try:
        with open_read(source) as file:
            body = file.read()
    except (FileNotFoundError, StorageError) as error:
        raise ManifestError(f"manifest {source}: not found ({error})") from error
    rows: Iterable[dict[str, object]]
    try:
        if source.lower().endswith(".parquet"):
            rows = pq.read_table(io.BytesIO(body)).to_pylist()
        elif source.lower().endswith(".jsonl"):
            rows = [
                json.loads(line) for line in body.decode("utf-8-sig").split("\n") if line.strip()
            ]
        else:
            rows = list(csv.DictReader(io.StringIO(body.decode("utf-8-sig"))))
    except (ValueError, OSError) as error:  # undecodable text, broken JSON or Parquet
        raise ManifestError(f"manifest {source}: not readable: {error}") from error
    problems = []
    for number, row in enumerate(rows, start=1):
        video_id, uri = (row.get("video_id"), row.get("uri")) if isinstance(row, dict) else (0, 0)
        if not isinstance(video_id, str) or not isinstance(uri, str) or not uri:
            problems.append(f"row {number}: expected texts video_id and uri, got {row!r:.200}")
            continue
        relative = "://" not in uri and not uri.startswith("/") and folder
        yield video_id, f"{folder}/{uri}" if relative else uri
    if problems:
        raise ManifestError(f"manifest {source}:\n  " + "\n  ".join(problems))


def _wrong_ids(ids: Sequence[str]) -> Iterator[str]:
    for previous, video_id in pairwise(ids):
        if previous == video_id:
            yield f"video_id {video_id!r} stands twice"
    for video_id in ids:
        if not video_id.strip() or len(video_id) > MAX_ID_LENGTH:
            yield f"video_id {video_id!r:.80}: expected 1 to {MAX_ID_LENGTH} characters"
        elif any(unicodedata.category(c) in ("Cc", "Cs") for c in video_id):
            yield f"video_id {video_id!r}: expected no control characters, valid Unicode"


def _in_threads(work: Callable[[tuple[str, str]], T], items: Sequence[tuple[str, str]]) -> list[T]:
    with ThreadPoolExecutor(NUM_PROBE_THREADS) as pool:
        return list(pool.map(work, items))

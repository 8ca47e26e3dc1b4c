"""From a corpus to shards, the videos that one Parquet object per table holds.

The assignment of a video to a shard is recorded once, under `_plan/<dataset>/`, and never
changes: tonight's new videos form new shards, and adding or removing one moves no other. What is
left to do is the plan minus the commits with the same fingerprint (`tables/manifest.py`).
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import TypeVar

import pyarrow.parquet as pq

from fourdh_batch.errors import ManifestError, StorageError
from fourdh_batch.storage import Store, fingerprint_file, list_files, open_read, safe_key
from fourdh_batch.tables.manifest import fingerprint_of

VIDEO_EXTENSIONS = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"),
    *(".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
MANIFEST_EXTENSIONS = (".csv", ".jsonl", ".parquet")
MAX_ID_LENGTH = 1024
NUM_PROBE_THREADS = 16
UNREADABLE = "unreadable"  # begins the fingerprint of a file that could not be read
_MIB = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Video:
    """One video of a corpus.

    Attributes:
        video_id: unique in its dataset; the path relative to the input folder, or the
            manifest's own.
        uri: where it is read from.
        num_bytes: size of the file, 0 where it could not be read.
        fingerprint: of its content; never of its name or date.
    """

    video_id: str
    uri: str
    num_bytes: int
    fingerprint: str


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
        raise ManifestError(
            f"input {source}: {len(problems)} problems:\n  " + "\n  ".join(problems)
        )
    return videos


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
    prefix = f"_plan/{safe_key(dataset)}"
    assigned: dict[str, str] = {}
    generation = 0
    for key, _ in sorted(store.list(prefix)):
        plan = json.loads(store.read_bytes(key))
        generation = max(generation, int(plan["generation"]))
        for shard_id, video_ids in plan["shards"].items():
            assigned.update(dict.fromkeys(video_ids, shard_id))

    new: dict[str, list[str]] = {}
    members: list[str] = []
    num_bytes = 0

    def close() -> None:
        if members:
            digest = blake2b(f"{dataset}\0{members[0]}".encode(), digest_size=4).hexdigest()
            new[f"{generation + 1:04d}-{len(new):05d}-{digest}"] = list(members)

    for video in sorted(videos, key=lambda v: v.video_id):
        if video.video_id in assigned:
            continue
        full = len(members) >= videos_per_shard
        heavy = bool(members) and num_bytes + video.num_bytes > mb_per_shard * _MIB
        if full or heavy:
            close()
            members, num_bytes = [], 0
        members.append(video.video_id)
        num_bytes += video.num_bytes
    close()
    if new and record:
        body = json.dumps({"generation": generation + 1, "dataset": dataset, "shards": new})
        store.write_bytes(f"{prefix}/{generation + 1:06d}.json", body.encode())
    for shard_id, video_ids in new.items():
        assigned.update(dict.fromkeys(video_ids, shard_id))

    by_shard: dict[str, list[Video]] = {}
    for video in sorted(videos, key=lambda v: v.video_id):
        by_shard.setdefault(assigned[video.video_id], []).append(video)
    return [Shard(name, dataset, tuple(by_shard[name])) for name in sorted(by_shard)]


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

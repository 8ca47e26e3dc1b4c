"""Planning and re-planning a corpus of a million clips on one core: seconds and memory.

The manifest is Parquet with sizes and fingerprints, the output a local folder; commit records are
as a run writes them. Every step is a process of its own, so that its peak memory is its own. The
baseline is what reading the same manifest takes: into pandas at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fourdh_batch.config import JobConfig
from fourdh_batch.pipeline.corpus import remembered_corpus
from fourdh_batch.pipeline.increment import Increment
from fourdh_batch.pipeline.plan import Shard
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import (
    CommitRecord,
    ObjectRecord,
    VideoRecord,
    commit_key,
)

SIZES = (100_000, 1_000_000)
CHANGED_EVERY = 100
MODEL = "0123456789abcdef0123456789abcdef"
TABLES = ("tracks", "detections", "videos", "failures")
_ROWS = 50_000


def run() -> list[dict[str, Any]]:
    figures: list[dict[str, Any]] = []
    peaks: dict[str, list[float]] = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="planning-") as folder:
            for step, what in (
                ("read", "reading the manifest with pandas (the baseline)"),
                ("first", "planning, nothing committed"),
                ("commit", ""),
                ("again", "planning again, all committed"),
                ("changed", f"planning again, 1 in {CHANGED_EVERY} changed, in every shard"),
            ):
                said = _measured(step, folder, size)
                if not what:
                    continue
                name = f"{size:,} videos: {what}"
                if step == "read":
                    baseline = said["cpu_s"]
                peaks.setdefault(what, []).append(said["peak_mib"])
                figures += [
                    {"what": f"{name}, wall time", "value": said["wall_s"], "unit": "s"},
                    {"what": f"{name}, CPU time", "value": said["cpu_s"], "unit": "s"},
                    {"what": f"{name}, CPU time", "value": said["cpu_s"] / baseline, "unit": "x"},
                    {"what": f"{name}, peak memory", "value": said["peak_mib"], "unit": "MiB"},
                ]
    figures += [
        {"what": f"peak memory of {what}: {SIZES[-1]:,} videos to {SIZES[0]:,}", "value": b / a}
        | {"unit": "x"}
        for what, (a, b) in peaks.items()
    ]
    return figures


def _measured(step: str, folder: str, size: int) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, step, folder, str(size)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return said


# --- the steps, each in its own process --------------------------------------------------------


def _rows(size: int, *, changed: bool) -> Iterator[pa.Table]:
    for start in range(0, size, _ROWS):
        # The order of the manifest is not that of the ids, as in real ones.
        numbers = [(n * 7_919) % size for n in range(start, min(start + _ROWS, size))]
        ids = [f"part-{n % 512:03d}/clip-{n:09d}.mp4" for n in numbers]
        contents = [blake2b(str(n).encode(), digest_size=16) for n in numbers]
        for content in contents:
            if changed and int.from_bytes(content.digest()[:4]) % CHANGED_EVERY == 0:
                content.update(b"changed")
        yield pa.table(
            {
                "video_id": ids,
                "uri": [f"s3://corpus/clips/{video_id}" for video_id in ids],
                "num_bytes": [1_000_000 + n % 900_000 for n in numbers],
                "fingerprint": [content.hexdigest() for content in contents],
            }
        )


def _write_manifest(path: Path, size: int, *, changed: bool) -> None:
    writer = None
    for table in _rows(size, changed=changed):
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None
    writer.close()


def _plan(folder: Path, manifest: str) -> tuple[int, int, int]:
    """Videos to do, videos kept and shards up to date, as a run would go through them."""
    config = JobConfig(input=str(folder / manifest), output=str(folder / "out"), dataset="d")
    store = Store(config.output)
    with Increment(store, config, MODEL, remembered_corpus(config, store), record=True) as plan:
        todo = kept = 0
        for work in plan.work():
            todo += len(work.shard.videos) - len(work.keep)
            kept += len(work.keep)
        assert todo == plan.todo_videos
        return todo, kept, plan.num_shards_before


def _commit_all(folder: Path) -> None:
    config = JobConfig(input=str(folder / "m.parquet"), output=str(folder / "out"), dataset="d")
    store = Store(config.output)
    with Increment(store, config, MODEL, remembered_corpus(config, store), record=True) as plan:
        for work in plan.work():
            record = _record(work.shard)
            path = folder / "out" / commit_key(record.shard_id)  # without 5,000 syncs to disk
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(record.to_json())


def _record(shard: Shard) -> CommitRecord:
    rows = {"tracks": 500, "detections": 520, "videos": 1, "failures": 0}
    return CommitRecord(
        shard_id=shard.shard_id,
        dataset=shard.dataset,
        fingerprint=shard.fingerprint(MODEL),
        config_fingerprint=MODEL,
        model_fingerprint=MODEL,
        videos=tuple(VideoRecord(v.video_id, v.fingerprint, "ok", rows) for v in shard.videos),
        objects={
            name: ObjectRecord(f"{name}/part-{shard.shard_id}.parquet", 10**8, "0" * 64, 10**5)
            for name in TABLES
        },
        schema_versions=dict.fromkeys(TABLES, 1),
        timings_s={v.video_id: 12.345 for v in shard.videos},
    )


def _step(step: str, folder: Path, size: int) -> None:
    if step == "read":
        import pandas as pd

        for name, changed in (("m.parquet", False), ("changed.parquet", True)):
            _write_manifest(folder / name, size, changed=changed)
    start, cpu = time.perf_counter(), time.process_time()
    peak_before = _peak_mib(reset=True)
    if step == "read":
        assert len(pd.read_parquet(folder / "m.parquet")) == size
    elif step == "first":
        assert _plan(folder, "m.parquet") == (size, 0, 0)
    elif step == "commit":
        _commit_all(folder)
    elif step == "again":
        todo, kept, before = _plan(folder, "m.parquet")
        assert (todo, kept) == (0, 0)
        assert before >= size // 200
    else:
        todo, kept, _ = _plan(folder, "changed.parquet")
        assert 0.9 < todo / (size / CHANGED_EVERY) < 1.1
        assert kept > 0.8 * size  # nearly every shard has one
    said = {
        "wall_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
        "peak_mib": _peak_mib(),
        "before_mib": peak_before,
    }
    print(json.dumps(said))


def _peak_mib(*, reset: bool = False) -> float:
    """Largest resident memory since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    _step(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))

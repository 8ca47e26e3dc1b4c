"""Two thousand tiny clips: how many objects and tasks they become, and what a clip costs.

The clips have ten frames of 64 x 64 pixels and nobody in them, so that what is timed is everything
but the work: opening, decoding, scheduling, rows, objects. The baseline is the same corpus in one
process without Ray, with a decoding process per clip (`process_shard`), and the bare decoder in
this process.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from fourdh_batch.cluster import decoding
from fourdh_batch.cluster.run import run_job
from fourdh_batch.config import JobConfig, load_config
from fourdh_batch.pipeline.corpus import Video
from fourdh_batch.pipeline.engine import build_engine, model_card
from fourdh_batch.pipeline.plan import Shard
from fourdh_batch.pipeline.shard import process_shard
from fourdh_batch.storage import Store, fingerprint_file
from tests.media import write_video
from tests.weights import untrained_hmr2_file

NUM_CLIPS = 2000
NUM_ALONE = 100  # of the baselines
NUM_FRAMES = 10


def no_boxes(path: Path) -> Path:
    """A file of given boxes without a box."""
    columns = {
        "video_id": pa.array([], pa.string()),
        "frame_index": pa.array([], pa.int64()),
        "bbox_xyxy_px": pa.array([], pa.list_(pa.float32(), 4)),
        "score": pa.array([], pa.float32()),
    }
    pq.write_table(pa.table(columns), path)
    return path


def corpus(folder: Path) -> list[str]:
    """A folder of clips with as many different names, and no boxes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (NUM_FRAMES, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    clip = write_video(folder.parent / "clip.mp4", frames)
    for k in range(NUM_CLIPS):
        shutil.copy(clip, folder / f"{k:05d}.mp4")
    return [
        f"input={folder}",
        f"hmr.weights={untrained_hmr2_file()}",
        "hmr.size=tiny",
        "hmr.device=cpu",
        "detector.name=boxes",
        f"detector.path={no_boxes(folder.parent / 'boxes.parquet')}",
        "cluster.gpu_actors=1",
    ]


def without_ray(config: JobConfig, count: int) -> float:
    """Seconds per clip in one process, with a process per decoder."""
    folder = Path(config.input)
    videos = []
    for path in sorted(folder.iterdir())[:count]:
        size, fingerprint = fingerprint_file(str(path))
        videos.append(Video(path.name, str(path), size, fingerprint))
    card, engine = model_card(config), build_engine(config)
    start = time.perf_counter()
    process_shard(Shard("s", "d", tuple(videos)), engine, Store(config.output), config, card)
    return (time.perf_counter() - start) / count


def bare(config: JobConfig, count: int) -> float:
    """Seconds per clip of decoding alone, in this process."""
    videos = [
        Video(path.name, str(path), 1, "f") for path in sorted(Path(config.input).iterdir())[:count]
    ]
    start = time.perf_counter()
    for _ in decoding.decode_unit(videos, config.video):
        pass
    return (time.perf_counter() - start) / count


def run() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = corpus(folder / "clips")
        alone = load_config(None, [*words, f"output={folder / 'alone'}"])
        baseline, decoding_s = without_ray(alone, NUM_ALONE), bare(alone, NUM_CLIPS // 4)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            report = run_job(load_config(None, [*words, f"output={folder / 'out'}"]))
            assert report.exit_code == 0
        finally:
            ray.shutdown()
        videos = pd.read_parquet(folder / "out" / "videos")
        assert len(videos) == NUM_CLIPS
        assert (videos["frames_decoded"] == NUM_FRAMES).all()
        num_objects = len(list((folder / "out").rglob("part-*.parquet")))
        assert not list((folder / "out" / "_work").rglob("*.*"))
    per_clip = report.seconds / NUM_CLIPS
    return [
        {"what": f"{NUM_CLIPS} clips: objects in four tables", "value": num_objects, "unit": ""},
        {"what": "shards", "value": len(report.shards), "unit": ""},
        {"what": "units, each one task of a decoder", "value": report.num_units, "unit": ""},
        {
            "what": "a clip on Ray, start-up included / one process, a decoder per clip",
            "value": per_clip / baseline,
            "unit": "x",
        },
        {
            "what": "a clip on Ray, start-up included / decoding it in this process",
            "value": per_clip / decoding_s,
            "unit": "x",
        },
    ]

"""Are the GPUs busy? 1 to 16 model processes whose GPU is a clock, fed by real decoders.

A model process sleeps `SERVICE_S` per frame and finds nobody, so that sixteen of them fit on a
small machine; decoders, trackers, rows, scheduler and storage are the real ones. Busy is the share
of the time between the moment when the last process has made some calls and the moment when the
first one has nothing left: before that processes start, behind it there is too little work for all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ray

from fourdh_batch.cluster import model_actor
from fourdh_batch.cluster import run as cluster
from fourdh_batch.config import JobConfig, load_config
from fourdh_batch.pipeline.records import ChunkResult
from fourdh_batch.types import Detections, FrameChunk, People
from tests.benchmark.small_clips import no_boxes
from tests.media import write_video
from tests.weights import untrained_hmr2_file

SERVICE_S = 1 / 5  # per frame; so slow that two cores decode for sixteen
CLIP_FRAMES = 32  # one chunk
CLIPS_PER_UNIT = 4
CLIPS_PER_ACTOR = {1: 16, 4: 24, 16: 48}  # by processes: longer than all of them take to start
WARM_UP = 6  # calls of each; until then processes start
LOG, SERVICE = "FOURDH_PLAYED_GPU", "FOURDH_PLAYED_GPU_S"


class PlayedEngine:
    """Takes its time, and finds nobody."""

    def run(self, chunks: Sequence[FrameChunk]) -> list[ChunkResult]:
        start = time.time()
        time.sleep(float(os.environ[SERVICE]) * sum(chunk.num_frames for chunk in chunks))
        with (Path(os.environ[LOG]) / f"{os.getpid()}").open("a") as log:
            log.write(f"{start} {time.time()}\n")
        return [
            ChunkResult(
                video_id=chunk.video_id,
                frame_index=chunk.frame_index,
                pts_s=chunk.pts_s,
                shot_scores=chunk.shot_scores,
                image_size_wh=chunk.image_size_wh,
                detections=Detections(
                    np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
                ),
                drop_reason=np.zeros(0, "<U16"),
                people=nobody(),
            )
            for chunk in chunks
        ]


def nobody() -> People:
    def empty(*shape: int) -> Any:
        return np.zeros((0, *shape), np.float32)

    return People(
        global_orient=empty(1, 3, 3),
        body_pose=empty(23, 3, 3),
        betas=empty(10),
        pred_cam=empty(3),
        box_center_px=empty(2),
        box_size_px=empty(),
        keypoints_3d_m=empty(44, 3),
    )


class PlayedWorker(model_actor.ModelWorker):
    """A model process with a clock for a GPU."""

    def __init__(self, config: JobConfig, run: str) -> None:
        with mock.patch.object(model_actor, "build_engine", return_value=PlayedEngine()):
            super().__init__(config, run)


PlayedActor: Any = ray.remote(max_restarts=0, max_task_retries=0)(PlayedWorker)


def busy_share(folder: Path) -> float:
    """Of all processes together, in the time when all had work."""
    spans = [np.loadtxt(path, ndmin=2) for path in folder.iterdir()]
    start, stop = max(s[WARM_UP, 0] for s in spans), min(s[-1, 1] for s in spans)
    busy = sum(
        np.clip(np.minimum(s[:, 1], stop) - np.maximum(s[:, 0], start), 0, None).sum()
        for s in spans
    )
    return float(busy / (len(spans) * (stop - start)))


def measure(
    folder: Path,
    num_actors: int,
    clip: Path,
    *,
    num_clips: int,
    clips_per_unit: int = CLIPS_PER_UNIT,
    service_s: float = SERVICE_S,
) -> tuple[float, float, int]:
    """Busy share, seconds of the driver's own processor time, and units."""
    place = folder / f"{num_actors}-{num_clips}"
    (place / "in").mkdir(parents=True)
    (place / "log").mkdir()
    for k in range(num_clips):
        shutil.copy(clip, place / "in" / f"{k:04d}.mp4")
    words = [
        f"input={place / 'in'}",
        f"output={place / 'out'}",
        f"hmr.weights={untrained_hmr2_file()}",
        "hmr.size=tiny",
        "hmr.device=cpu",
        "detector.name=boxes",
        f"detector.path={no_boxes(place / 'boxes.parquet')}",
        f"cluster.gpu_actors={num_actors}",
        "cluster.cpus_per_actor=0.01",
        "cluster.cpus_per_decoder=0.01",
        f"cluster.videos_per_unit={clips_per_unit}",
        "plan.videos_per_shard=32",
    ]
    environment = {"env_vars": {LOG: str(place / "log"), SERVICE: str(service_s)}}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=1 << 30,
        runtime_env=environment,
    )
    try:
        with mock.patch.object(cluster, "ModelActor", PlayedActor):
            before = time.process_time()
            report = cluster.run_job(load_config(None, words))
            spent = time.process_time() - before
    finally:
        ray.shutdown()
    assert report.exit_code == 0
    assert report.frames_run == num_clips * CLIP_FRAMES
    return busy_share(place / "log"), spent, report.num_units


def noise_clip(folder: Path) -> Path:
    """A clip of `CLIP_FRAMES` frames."""
    frames = np.random.default_rng(0).integers(0, 255, (CLIP_FRAMES, 2, 2, 3), dtype=np.uint8)
    return write_video(folder / "clip.mp4", frames.repeat(32, 1).repeat(32, 2), gop=64)


def driver_seconds_per_unit(folder: Path) -> float:
    """Processor time of the driver for one more unit, by two jobs of different length."""
    clip = noise_clip(folder)
    options: dict[str, Any] = {"clips_per_unit": 1, "service_s": 0.0}
    _, short_s, few = measure(folder, 1, clip, num_clips=30, **options)
    _, long_s, many = measure(folder, 1, clip, num_clips=230, **options)
    return (long_s - short_s) / (many - few)


def run() -> list[dict[str, Any]]:
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = noise_clip(folder)
        for num_actors, clips in CLIPS_PER_ACTOR.items():
            busy, _, _ = measure(folder, num_actors, clip, num_clips=num_actors * clips)
            figures.append(
                {
                    "what": f"{num_actors} model processes at {1 / SERVICE_S:g} frames/s: busy",
                    "value": 100 * busy,
                    "unit": "%",
                }
            )
    return figures

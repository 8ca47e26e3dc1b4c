"""Does a tracking process keep up with a GPU that hands it 100 frames a second with 5 people?

The GPU is played by a clock: chunks of 32 frames are due every 0.32 s, and no more than three
are under way, as in a job. Everything else is the real thing: Ray, a tracking actor, rows, spool.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from fourdh_batch.cluster.decoding import Unit
from fourdh_batch.cluster.tracker_actor import TrackerActor
from fourdh_batch.config import load_config
from fourdh_batch.pipeline.engine import model_card
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.records import ChunkResult
from fourdh_batch.types import Detections
from tests.tracking_scenes import frame_of_boxes
from tests.weights import untrained_predictor_file, untrained_texture_file

FRAMES_PER_S = 100.0
NUM_PEOPLE = 5
CHUNK_FRAMES = 32
DEPTH = 3
PREDICTOR = f"tracker.predictor_weights={untrained_predictor_file()}"
TEXTURE = f"tracker.texture_weights={untrained_texture_file()}"
CASES = {  # name: settings, chunks
    "location and last pose": ([], 30),
    "location and predicted pose (width 128, depth 2)": ([PREDICTOR], 15),
    "location, predicted pose and texture": ([PREDICTOR, TEXTURE], 1),
}


def chunk(number: int, rng: np.random.Generator, *, has_texture: bool) -> ChunkResult:
    """Five people who sway on the spot."""
    start = number * CHUNK_FRAMES
    left = 100 + 230 * np.arange(NUM_PEOPLE)
    low = np.stack([left, np.full(NUM_PEOPLE, 200)], 1)
    size = np.array([100, 280])
    boxes = np.concatenate([low, low + size], 1)
    num = CHUNK_FRAMES * NUM_PEOPLE
    corners = np.tile(boxes, (CHUNK_FRAMES, 1)) + rng.normal(0, 1, (num, 4))
    frame = frame_of_boxes(0, corners)
    texture = None
    if has_texture:
        texture = np.zeros((num, 4, 256, 256), np.uint8)
        own = np.random.default_rng(1)  # everybody keeps the own clothes, and turns a little
        colour = own.integers(20, 235, (NUM_PEOPLE, 3, 16, 16), dtype=np.uint8)
        seen = own.random((NUM_PEOPLE, 16, 16)) < 0.35
        cells = np.tile(seen, (CHUNK_FRAMES, 1, 1)) & (rng.random((num, 16, 16)) < 0.95)
        mask = cells.repeat(16, 1).repeat(16, 2)
        texture[:, 3] = 255 * mask
        texture[:, :3] = np.tile(colour, (CHUNK_FRAMES, 1, 1, 1)).repeat(16, 2).repeat(16, 3)
        texture[:, :3] *= mask[:, None]
    index = np.arange(start, start + CHUNK_FRAMES)
    scores = np.where(index == 0, np.nan, 0.0)
    return ChunkResult(
        video_id="v",
        frame_index=index,
        pts_s=index / FRAMES_PER_S,
        shot_scores=scores,
        image_size_wh=(1280, 720),
        detections=Detections(
            np.arange(CHUNK_FRAMES).repeat(NUM_PEOPLE), frame.bbox_xyxy_px, frame.score
        ),
        drop_reason=np.full(num, "", "<U16"),
        people=frame.people,
        texture=texture,
    )


def frames_per_s(folder: Path, words: list[str], num_chunks: int) -> float:
    """What a tracking actor takes in, at most as fast as the clock hands it out."""
    detector = folder / "boxes.csv"
    detector.write_text("")
    config = load_config(
        None,
        [
            f"output={folder / 'out'}",
            "hmr.weights=mini",
            "hmr.device=cpu",
            "detector.name=onnx",
            f"detector.path={detector}",
            *words,
        ],
    )
    rng = np.random.default_rng(0)
    chunks = [ray.put([chunk(i, rng, has_texture=TEXTURE in words)]) for i in range(num_chunks + 1)]
    tracker = TrackerActor.options(num_cpus=1).remote(config, model_card(config))
    video = Video("v", "v.mp4", 1, "fp")
    ray.get(tracker.begin.remote(Unit("u", Shard("s", "d", (video,)))))
    ray.get(tracker.work.remote("u", chunks[0]))  # loads the models
    start, under_way = time.perf_counter(), []
    for i in range(1, num_chunks + 1):
        due = start + i * CHUNK_FRAMES / FRAMES_PER_S
        time.sleep(max(0.0, due - time.perf_counter()))
        under_way.append(tracker.work.remote("u", chunks[i]))
        if len(under_way) >= DEPTH:
            ray.get(under_way.pop(0))
    ray.get(under_way)
    took = time.perf_counter() - start
    ray.kill(tracker)
    return num_chunks * CHUNK_FRAMES / took


def run() -> list[dict[str, Any]]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    figures = []
    try:
        for name, (words, num_chunks) in CASES.items():
            rates = []
            for _ in range(1 if TEXTURE in words else 3):
                with tempfile.TemporaryDirectory() as folder:
                    rates.append(frames_per_s(Path(folder), words, num_chunks) / FRAMES_PER_S)
            figures.append(
                {
                    "what": f"{name}: rate of a tracker / {FRAMES_PER_S:g} frames/s offered",
                    "value": statistics.median(rates),
                    "unit": "x",
                    "spread": (min(rates), max(rates)),
                }
            )
    finally:
        ray.shutdown()
    return figures

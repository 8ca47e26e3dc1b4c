"""Cost of tracking as people grow, against three people in a frame."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from fourdh_batch.tracking.tracker import PhalpTracker
from tests.benchmark.timing import ratio
from tests.tracking_scenes import frame_of_boxes

NUM_FRAMES = 100


def scene(num_people: int) -> list[Any]:
    """People who walk on the spot, spread over the picture."""
    rng = np.random.default_rng(num_people)
    low = np.stack([rng.uniform(0, 1800, num_people), rng.uniform(0, 800, num_people)], 1)
    boxes = np.concatenate([low, low + np.array([60, 160])], 1)
    return [
        frame_of_boxes(t, boxes + rng.normal(0, 1, boxes.shape), image_size_wh=(1920, 1080))
        for t in range(NUM_FRAMES)
    ]


def track(frames: list[Any]) -> None:
    tracker = PhalpTracker()
    for frame in frames:
        tracker.update(frame)


def run() -> list[dict[str, Any]]:
    three = scene(3)
    figures = []
    for num_people in (10, 20, 60):
        frames = scene(num_people)
        figures.append(
            ratio(
                f"{num_people} people / 3 people, CPU time per frame",
                lambda frames=frames: track(frames),  # type: ignore[misc]
                lambda: track(three),
                clock=time.process_time,
            )
        )
    return figures

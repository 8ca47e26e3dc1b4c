"""Our tracker with its networks on a GPU: frames/s, and whether it says the same as on a CPU.

    python tests/benchmark/gpu_tracker.py --json figures.json

Absolute times, with the name of the card; not part of `make bench`. Scenes and weights are those of
`reference_tracker.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fourdh_batch.models.smpl import load_body  # noqa: E402
from fourdh_batch.models.texture import (  # noqa: E402
    TextureSampler,
    body_atlas,
    pack_texture,
)
from fourdh_batch.tracking.tracker import update_together  # noqa: E402
from tests.benchmark.reference_tracker import WARM_UP, Ours  # noqa: E402
from tests.benchmark.tracker_scene import (  # noqa: E402
    Parts,
    make_scene,
    rows_of,
    texture_maps,
)

NUM_FRAMES = 30
PEOPLE = (3, 10, 20, 100)
VIDEOS = (1, 4, 16)


def packed(ours: Ours) -> list[Any]:
    """All frames of a scene, with looks as bytes, as a job hands them on."""
    frames = []
    for t, frame in enumerate(ours.frames):
        maps = torch.from_numpy(texture_maps(ours.scene, rows_of(ours.scene, t)))
        frames.append(replace(frame, appearance=pack_texture(maps).numpy()))
    return frames


def frames_per_s(num_people: int, predictor: str, device: str) -> dict[str, Any]:
    """One video; identities against those of the CPU in the first frames."""
    scene = make_scene(num_people, WARM_UP + NUM_FRAMES)
    ours = Ours(scene, predictor, Parts(), compat=False, device=device)
    twin = Ours(scene, predictor, Parts(), compat=False)
    frames, same = packed(ours), 0
    for frame in frames[:WARM_UP]:
        ids = ours.tracker.update(frame).detection_track_id
        same += bool(np.array_equal(ids, twin.tracker.update(frame).detection_track_id))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for frame in frames[WARM_UP:]:
        ours.tracker.update(frame)
    torch.cuda.synchronize()
    return {
        "what": f"{num_people} people, {predictor} predictor",
        "frames_per_s": NUM_FRAMES / (time.perf_counter() - start),
        "frames_with_the_identities_of_the_cpu": (same, WARM_UP),
        "peak_MiB": torch.cuda.max_memory_allocated() / 2**20,
    }


def frames_per_s_together(num_videos: int, predictor: str, device: str) -> dict[str, Any]:
    """Several videos of five people, stepped together: frames of all of them per second."""
    scene = make_scene(5, WARM_UP + NUM_FRAMES)
    sides = [
        Ours(scene, predictor, Parts(), compat=False, device=device) for _ in range(num_videos)
    ]
    predicts = sides[0].tracker._pose_predictor
    for side in sides:
        side.tracker._pose_predictor = predicts
    trackers, frames = [side.tracker for side in sides], packed(sides[0])
    for frame in frames[:WARM_UP]:
        update_together(trackers, [frame] * num_videos)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for frame in frames[WARM_UP:]:
        update_together(trackers, [frame] * num_videos)
    torch.cuda.synchronize()
    return {
        "what": f"{num_videos} videos of 5 people stepped together, {predictor} predictor",
        "frames_per_s": num_videos * NUM_FRAMES / (time.perf_counter() - start),
    }


def maps_per_s(batch: int, device: str) -> dict[str, Any]:
    """Texture maps off crops: mesh, depth, sampling, packing."""
    body = load_body().to(device)
    sampler = TextureSampler(body.faces, body_atlas(body)).to(device)
    upright = torch.diag(torch.tensor([1.0, -1.0, -1.0])).repeat(batch, 1, 1, 1)
    pose = torch.eye(3).repeat(batch, 23, 1, 1)
    betas = torch.randn(batch, 10, generator=torch.Generator().manual_seed(0))
    vertices = body(upright.to(device), pose.to(device), betas.to(device)).vertices
    camera = torch.tensor([0.0, 0.0, 45.0], device=device).repeat(batch, 1)
    rgb = torch.rand(batch, 3, 256, 256, device=device)
    mask = torch.ones(batch, 256, 256, device=device)

    def once() -> None:
        pack_texture(sampler.sample(vertices, camera, rgb, mask))

    once()
    torch.cuda.synchronize()
    start, rounds = time.perf_counter(), 10
    for _ in range(rounds):
        once()
    torch.cuda.synchronize()
    return {
        "what": f"texture maps, batch {batch}",
        "maps_per_s": batch * rounds / (time.perf_counter() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predictor", nargs="+", default=["small", "medium"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: this benchmark gives absolute times of one")
    figures: list[dict[str, Any]] = [{"card": torch.cuda.get_device_name()}]
    with torch.inference_mode():
        for batch in (1, 64):
            figures.append(maps_per_s(batch, "cuda"))
    for predictor in args.predictor:
        figures += [frames_per_s(num, predictor, "cuda") for num in PEOPLE]
        figures += [frames_per_s_together(num, predictor, "cuda") for num in VIDEOS]
    for figure in figures:
        print(json.dumps(figure), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

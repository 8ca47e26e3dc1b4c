"""The published PHALP tracker and ours side by side, on one CPU core.

    make bench-published
    python tests/benchmark/reference_tracker.py --reference ../PHALP --python ../venv/bin/python \
        --recorded tests/data/tracking/full_seqA.npz --people 3 10 20 --frames 10 \
        --predictor medium --json figures.json

`--reference` is a checkout of brjathu/PHALP 96f7e6c. 4D-Humans adds nothing between detections and
identities, so its own checkout is not needed. `--python` runs it and needs torch, SciPy,
scikit-learn, OmegaConf and einops (`published_tracker.py`); the target gets both. Not part of
`make bench`.

Both sides get the very same detections and weights (`tracker_scene.py`, the goldens' recipe). A
round is one frame: first the published tracker associates it, then ours; a ratio is the median over
the rounds, counted in processor time, after a warm-up that fills every track's memory. With
`--recorded`, both first have to repeat the identities of a sequence recorded from the published
tracker (ours in compat mode), and the driven tracker its costs.

People of a made scene keep apart: the best case for a lazy assignment, which then compares looks
once per track. In the recorded sequences they cross.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fourdh_batch.models.appearance import TextureMemory, untrained_texture_encoder  # noqa: E402
from fourdh_batch.models.predictor import (  # noqa: E402
    PosePredictor,
    PoseTransformer,
    PredictorSize,
)
from fourdh_batch.tracking import tracker as our_tracker  # noqa: E402
from fourdh_batch.tracking.tracker import PhalpTracker, TrackerSettings  # noqa: E402
from tests.benchmark.tracker_scene import (  # noqa: E402
    Parts,
    Scene,
    make_scene,
    rows_of,
    texture_maps,
)
from tests.golden import phalp_recipe as recipe  # noqa: E402
from tests.tracking_scenes import recorded_frames  # noqa: E402

SIZES = {
    "small": (recipe.SMALL, recipe.SMALL_SEED),
    "medium": (recipe.WIDE, recipe.WIDE_SEED),
}
WARM_UP = 8  # frames after which all seven remembered detections of a track differ
GROWTH = (10, 20, 50, 100)
GATE = 100.0
COST_TOLERANCE = 1e-2  # relative; the published float32 distances are no better
PARTS = (
    "texture distance",
    "texture memory",
    "predictor",
    "predictor read-out",
    "ridge",
    "cost",
    "assignment",
    "rest",
)


class Ours:
    """Our tracker over a scene."""

    def __init__(
        self, scene: Scene, predictor: str, parts: Parts, *, compat: bool, device: str = "cpu"
    ) -> None:
        size, seed = SIZES[predictor]
        self.scene, self.parts, self.passes, self.next_frame = scene, parts, 0, 0
        network = PoseTransformer(
            PredictorSize(
                dim=size["width"],
                depth=size["depth"],
                num_heads=size["num_heads"],
                head_dim=size["head_dim"],
                mlp_dim=size["mlp_dim"],
                mid_dim=recipe.MID_DIM,
                frame_length=recipe.FRAME_LENGTH,
                conv_stride=recipe.CONV_STRIDE,
                conv_pad=recipe.CONV_PAD,
            )
        )
        shapes = {key: value.shape for key, value in network.state_dict().items()}
        network.load_state_dict(recipe.weights(shapes, seed))
        statistics_ = [
            torch.from_numpy(np.append(scene[name], [filler] * 3).astype(np.float32))
            for name, filler in (("mean", 0.0), ("std", 1.0))
        ]
        pose = PosePredictor(network, *statistics_, device=device)
        pose.network.read_out = parts.timed("predictor read-out", pose.network.read_out)

        encoder = untrained_texture_encoder(device=device)
        encoder.load_state_dict(
            {
                key.removeprefix("encoding_head."): value
                for key, value in recipe.weights(recipe.TEXTURE_ENCODER_SHAPES, seed).items()
            }
        )
        encoder.get_submodule("conv1x").register_forward_hook(self._count)
        self.memory = TextureMemory(encoder)
        self.memory.distances = parts.timed("texture distance", self.memory.distances)  # type: ignore[method-assign]
        self.memory.bounds = parts.timed("texture distance", self.memory.bounds)  # type: ignore[method-assign]
        self.memory.observe = parts.timed("texture memory", self.memory.observe)  # type: ignore[method-assign]

        self.tracker = PhalpTracker(
            TrackerSettings(compat=compat),
            pose_predictor=parts.timed("predictor", pose),
            texture=self.memory,
        )
        self.update = parts.timed("rest", self.tracker.update)
        self.frames = recorded_frames(_in_our_terms(scene))

    def frame(self) -> dict[str, Any]:
        """Associate the next frame; identities by detection, seconds by part."""
        t, self.next_frame = self.next_frame, self.next_frame + 1
        detections = replace(
            self.frames[t], appearance=texture_maps(self.scene, rows_of(self.scene, t))
        )
        self.passes = 0
        tracked = self.update(detections)
        return {
            "track_id": tracked.detection_track_id.tolist(),
            "seconds": self.parts.take(),
            "passes": self.passes,
        }

    def bytes_per_track(self) -> dict[str, float]:
        """What a live track takes, in the mean: as it is held, and as `state` gives it."""
        state = self.tracker.state()
        num_tracks = len(state["track_id"])
        size = {name: array.nbytes for name, array in state.items()}
        plain = sum(n for name, n in size.items() if not name.startswith(our_tracker.TEXTURE_STATE))
        maps = 4 * int(np.prod(self.memory.maps([1]).shape)) * num_tracks
        return {
            "held": (plain + maps) / num_tracks,
            "state": sum(size.values()) / num_tracks,
        }

    def _count(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self.passes += len(args[0]) * args[0].shape[2] ** 2 / 256**2  # in whole maps


class Published:
    """The published tracker over a scene, in a process of its own."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.child = child

    def ask(self, what: str) -> dict[str, Any]:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        print(what, file=self.child.stdin, flush=True)
        answer = self.child.stdout.readline()
        if not answer:
            raise SystemExit(f"the published tracker ended with code {self.child.wait()}")
        found: dict[str, Any] = json.loads(answer)
        return found


@contextmanager
def published(reference: Path, python: str, scene: Scene, predictor: str) -> Iterator[Published]:
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scene.npz")
        np.savez(file, **scene)  # type: ignore[arg-type]
        module = "tests.benchmark.published_tracker"
        words = [python, "-m", module, str(reference.resolve()), str(file), predictor]
        with subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ | one_thread,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            try:
                yield Published(child)
            finally:
                child.kill()


def _in_our_terms(scene: Scene) -> Scene:
    """The arrays that `recorded_frames` reads."""
    box = scene["in_bbox"]
    kept = ("in_frame_ptr", "in_shots", "in_conf", "in_center", "in_pose")
    return {name: scene[name] for name in kept} | {
        "in_image_size_wh": scene["in_image_size"][::-1],
        "in_bbox_xyxy": np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], 1),
        "in_size": scene["in_scale"].max(1),
        "in_camera": scene["in_loca"][:, 90:93],
    }


def watch(parts: Parts) -> None:
    """Book what our tracker calls by name; once per process."""
    for name, part in {
        "predict_location": "ridge",
        "cost_terms": "cost",
        "cost_without_texture": "cost",
        "texture_factor": "cost",
        "assign": "assignment",
    }.items():
        setattr(our_tracker, name, parts.timed(part, getattr(our_tracker, name)))


def repeat_recording(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    """Both sides over a recorded sequence; raises SystemExit where the driven one differs."""
    with np.load(args.recorded) as z:
        scene = dict(z)
    size = next(name for name, (_, seed) in SIZES.items() if seed == int(scene["weights_seed"]))
    ours, worst = Ours(scene, size, parts, compat=True), 0.0
    wrong_ids, seconds, passes = Counter[str](), Counter[str](), Counter[str]()
    ends = np.cumsum(scene["cost_shape"].prod(1))
    with published(args.reference, args.python, scene, size) as theirs:
        for t, shape in enumerate(scene["cost_shape"]):
            expected = scene["det_track_id"][rows_of(scene, t)].tolist()
            answer = theirs.ask("frame")
            for name, found in (("published", answer), ("ours", ours.frame())):
                wrong_ids[name] += found["track_id"] != expected
                seconds[name] += sum(found["seconds"].values())
                passes[name] += found["passes"]
            if shape.prod():
                recorded = scene["cost"][ends[t] - shape.prod() : ends[t]].reshape(shape)
                recorded = np.where(recorded > GATE, GATE, recorded)
                cost = np.minimum(answer["cost"], GATE)
                worst = max(worst, float(np.abs(cost / recorded - 1).max()))
    figures = {
        "recorded": Path(args.recorded).name,
        "frames": len(ends),
        "frames_with_other_ids": dict(wrong_ids),
        "largest_relative_cost_difference_published": worst,
        "what": "published / ours, CPU time of the whole sequence",
        "value": seconds["published"] / seconds["ours"],
        "unit": "x",
        "encoder_passes": dict(passes),
    }
    print(json.dumps(figures), flush=True)
    if wrong_ids["published"] or worst > COST_TOLERANCE:
        raise SystemExit("the published tracker does not repeat its own recording: driven wrongly")
    return figures


def side_by_side(
    args: argparse.Namespace, num_people: int, predictor: str, parts: Parts
) -> dict[str, Any]:
    """Ratio, identities, parts, encoder passes and memory for one number of people."""
    scene = make_scene(num_people, WARM_UP + args.frames)
    ours = Ours(scene, predictor, parts, compat=args.mode == "compat")
    rounds: list[tuple[dict[str, Any], dict[str, Any]]] = []
    with published(args.reference, args.python, scene, predictor) as theirs:
        for _ in range(WARM_UP + args.frames):
            rounds.append((theirs.ask("frame"), ours.frame()))
        memory = theirs.ask("memory")
    same_ids = sum(a["track_id"] == b["track_id"] for a, b in rounds)
    timed = rounds[WARM_UP:]
    totals = [[sum(side["seconds"].values()) for side in pair] for pair in timed]
    ratios = [a / b for a, b in totals]
    figures: dict[str, Any] = {
        "people": num_people,
        "predictor": predictor,
        "mode": args.mode,
        "what": "published / ours, CPU time per frame",
        "value": statistics.median(ratios),
        "unit": "x",
        "spread": (min(ratios), max(ratios)),
        "frames": len(timed),
        "frames_with_same_ids": (same_ids, len(rounds)),
    }
    for side, name in enumerate(("published", "ours")):
        total = sum(pair[side] for pair in totals)
        seconds = Counter[str]()
        for pair in timed:
            seconds.update(pair[side]["seconds"])
        figures[name] = {
            "s_per_frame": total / len(timed),
            "encoder_passes_per_frame": statistics.mean(pair[side]["passes"] for pair in timed),
            "share": {part: seconds[part] / total for part in PARTS},
            "s_per_frame_by_part": {part: seconds[part] / len(timed) for part in PARTS},
        }
    figures["published"]["memory"] = memory
    figures["ours"]["bytes_per_track"] = ours.bytes_per_track()
    figures["ratio_by_part"] = {
        part: figures["published"]["s_per_frame_by_part"][part] / seconds_ours
        for part, seconds_ours in figures["ours"]["s_per_frame_by_part"].items()
        if seconds_ours
    }
    return figures


def growth(args: argparse.Namespace, predictor: str, parts: Parts) -> list[dict[str, Any]]:
    """Our cost per frame as people grow, against the fewest; in turn."""
    sides = [
        Ours(make_scene(n, WARM_UP + args.frames), predictor, parts, compat=args.mode == "compat")
        for n in GROWTH
    ]
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(WARM_UP + args.frames):
        for side, spent in zip(sides, seconds, strict=True):
            total = sum(side.frame()["seconds"].values())
            if turn >= WARM_UP:
                spent.append(total)
    figures = []
    for num_people, side, spent in zip(GROWTH, sides, seconds, strict=True):
        ratios = [a / b for a, b in zip(spent, seconds[0], strict=True)]
        figures.append(
            {
                "what": f"ours, {num_people} people / {GROWTH[0]} people, CPU time per frame",
                "predictor": predictor,
                "value": statistics.median(ratios),
                "unit": "x",
                "spread": (min(ratios), max(ratios)),
                "s_per_frame": statistics.mean(spent),
                "encoder_passes_last_frame": side.passes,
                "bytes_per_track": side.bytes_per_track(),
            }
        )
    return figures


def show(figures: dict[str, Any]) -> None:
    low, high = figures["spread"]
    where = f"{figures['people']} people, {figures['predictor']} predictor, {figures['mode']} mode"
    print(f"{where}: {figures['value']:.3g} x  ({low:.3g} to {high:.3g})")
    same, of = figures["frames_with_same_ids"]
    print(f"  identities equal in {same} of {of} frames")
    for name in ("published", "ours"):
        side = figures[name]
        shares = ", ".join(f"{part} {share:.2%}" for part, share in side["share"].items())
        passes = side["encoder_passes_per_frame"]
        print(f"  {name:9} {side['s_per_frame']:.4g} s per frame, {passes:.4g} encoder passes")
        print(f"  {'':9} {shares}")
    theirs, ours = figures["published"]["memory"], figures["ours"]["bytes_per_track"]
    print(
        f"  memory per track: published {theirs['bytes_per_track'] / 1e6:.3g} MB "
        f"({theirs['float32_maps_per_track']:.3g} float32 and "
        f"{theirs['float64_maps_per_track']:.3g} float64 maps), "
        f"ours {ours['held'] / 1e6:.3g} MB held, {ours['state'] / 1e6:.3g} MB as state",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True, help="checkout of PHALP")
    parser.add_argument("--python", default=sys.executable, help="runs the published tracker")
    parser.add_argument("--recorded", help="sequence recorded from the published tracker")
    parser.add_argument("--people", type=int, nargs="*", default=[3, 10, 20])
    parser.add_argument("--frames", type=int, default=10, help="timed frames")
    parser.add_argument("--predictor", nargs="+", choices=SIZES, default=["medium"])
    parser.add_argument("--mode", choices=("default", "compat"), default="default", help="of ours")
    parser.add_argument("--growth", action="store_true", help="ours alone, 10 to 100 people")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts, figures = Parts(), []
    watch(parts)
    if args.recorded:
        figures.append(repeat_recording(args, parts))
    for predictor in args.predictor:
        for num_people in args.people:
            figures.append(side_by_side(args, num_people, predictor, parts))
            show(figures[-1])
        if args.growth:
            for figure in growth(args, predictor, parts):
                figures.append(figure)
                print(f"{figure['what']}: {figure['value']:.3g} {figure['unit']}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

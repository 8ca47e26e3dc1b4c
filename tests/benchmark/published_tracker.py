"""Drives the published PHALP tracker over a scene, on a CPU; the child of `reference_tracker.py`.

    python -m tests.benchmark.published_tracker CHECKOUT_OF_PHALP SCENE.npz small|medium

Runs in a Python that has torch, SciPy, scikit-learn, OmegaConf and einops, and imports nothing of
our package. Everything between detections and identities is the checkout's own code; what it only
imports (detector, renderer, video reader) is stood in for, and `Tensor.cuda` stays on the CPU.
Weights come from the goldens' recipe and are loaded strictly; the published loader leaves a part of
the pose predictor at its random start.

For every line of standard input there is a JSON object on standard output: `frame` associates the
next frame, `memory` weighs the live tracks.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import logging
import sys
import tempfile
import types
from collections import deque
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np

# SciPy and scikit-learn look for optional modules as they load: before the stand-ins are there.
import scipy.signal
import scipy.stats  # noqa: F401
import sklearn.linear_model  # noqa: F401
import torch

from tests.benchmark.tracker_scene import Parts, Scene, rows_of, texture_maps
from tests.golden import phalp_recipe as recipe

# Imported by the published modules, never called on the way from detections to identities.
ABSENT = {
    *("PIL", "cv2", "joblib", "pycocotools", "pytube", "scenedetect", "skimage", "torchvision"),
    *("colordict", "dill", "hydra", "rich"),
    *("detectron2", "hmr2", "neural_renderer", "pyrender", "smplx", "trimesh"),
}
SIZES = {
    "small": (recipe.SMALL, recipe.SMALL_SEED, recipe.SMALL_DIGEST),
    "medium": (recipe.WIDE, recipe.WIDE_SEED, recipe.WIDE_DIGEST),
}


class StandIn(types.ModuleType):
    """A module that has any name one asks it for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the absent modules, after everybody else has looked."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Driver:
    """The published tracker and what is watched of it."""

    def __init__(self, scene: Scene, predictor: str) -> None:
        from phalp.configs.base import FullConfig
        from phalp.external.deep_sort_.detection import Detection
        from phalp.models.heads.encoding_head import EncodingHead
        from phalp.models.hmar import HMAR
        from phalp.models.predictor import Pose_transformer_v2
        from phalp.trackers.PHALP import PHALP

        self.scene, self.parts, self.passes, self.next_frame = scene, Parts(), 0, 0
        self.detection = Detection
        self.cfg = FullConfig()
        with tempfile.TemporaryDirectory() as folder:
            self._write_predictor_files(Path(folder), SIZES[predictor][0])
            # The bodies of the two classes are the published ones; only what builds the parts
            # that tracking does not use is left out.
            looks = HMAR.__new__(HMAR)
            torch.nn.Module.__init__(looks)
            looks.cfg, looks.smpl = self.cfg, None
            looks.encoding_head = EncodingHead(self.cfg, img_H=256, img_W=256)
            self.phalp = PHALP.__new__(PHALP)
            torch.nn.Module.__init__(self.phalp)
            self.phalp.cfg, self.phalp.HMAR = self.cfg, looks
            self.phalp.pose_predictor = Pose_transformer_v2(self.cfg, self.phalp)
        self._fill(*SIZES[predictor][1:])
        self.phalp.eval()
        self.phalp.setup_deepsort()
        self.tracker = self.phalp.tracker
        looks.encoding_head.register_forward_hook(self._count)
        self._watch()
        self.step = self.parts.timed("rest", self._step)

    def frame(self) -> dict[str, Any]:
        """Associate the next frame; identities by detection, costs as gated, seconds by part."""
        t, self.next_frame = self.next_frame, self.next_frame + 1
        detections = self._detections(t)
        self.cfg.phalp.shot = int(t in self.scene["in_shots"])
        self.passes = 0
        self.step(detections, t)
        track_id = [-1] * len(detections)
        for track in self.tracker.tracks:
            if track.time_since_update == 0:
                track_id[track.track_data["history"][-1]["extra_data"]] = track.track_id
        return {
            "track_id": track_id,
            "cost": np.asarray(self.tracker.tracked_cost[t][0], float).tolist(),
            "seconds": self.parts.take(),
            "passes": self.passes,
        }

    def memory(self) -> dict[str, Any]:
        """Arrays that a live track holds, in the mean: bytes of all, and maps among them."""
        tracks, samples = self.tracker.tracks, self.tracker.metric.samples
        held = list(_arrays([[t.track_data, samples[t.track_id]] for t in tracks]))
        maps = [a for a in held if a.shape[-2:] == (256, 256)]
        total = sum(a.nbytes for a in held)
        float64 = sum(a.dtype == np.float64 for a in maps)
        return {
            "bytes_per_track": total / len(tracks),
            "float32_maps_per_track": (len(maps) - float64) / len(tracks),
            "float64_maps_per_track": float64 / len(tracks),
        }

    def _step(self, detections: list[Any], t: int) -> None:
        self.tracker.predict()
        self.tracker.update(detections, t, f"{t + 1:06d}.jpg", self.cfg.phalp.shot)

    def _watch(self) -> None:
        from phalp.external.deep_sort_ import linear_assignment
        from phalp.external.deep_sort_.track import Track

        timed, phalp, predictor = self.parts.timed, self.phalp, self.phalp.pose_predictor
        phalp.get_uv_distance = timed("texture distance", phalp.get_uv_distance)
        predictor.predict_next = timed("predictor", predictor.predict_next)
        predictor.readout_pose = timed("predictor read-out", predictor.readout_pose)
        forward = phalp.forward_for_tracking
        ridge = timed("ridge", forward)

        def forward_for_tracking(vectors: Any, attribute: str, time: Any) -> Any:
            return (ridge if attribute == "L" else forward)(vectors, attribute, time)

        phalp.forward_for_tracking = forward_for_tracking
        self.tracker.metric.distance = timed("cost", self.tracker.metric.distance)
        solver = linear_assignment.linear_assignment
        linear_assignment.linear_assignment = timed("assignment", solver)
        update = timed("texture memory", Track.update)
        Track.update = lambda *args: update(*args)  # a method, as a function is

    def _count(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self.passes += len(args[0])

    def _fill(self, seed: int, digest: int) -> None:
        """Give the networks the goldens' weights; nothing that is used may be left out."""
        head = {
            f"encoding_head.{k}": v for k, v in self.phalp.HMAR.encoding_head.state_dict().items()
        }
        named = {
            key: tuple(value.shape)
            for key, value in (self.phalp.pose_predictor.encoder.state_dict() | head).items()
            if not key.startswith(("transformer.", "encoding_head.t_"))
            and key not in ("pe", "pos_embedding")
        }
        weights = recipe.weights(named, seed)
        if recipe.digest(weights) != digest:
            raise ValueError(f"weights: expected digest {digest}, got {recipe.digest(weights)}")
        for module, prefix in (
            (self.phalp.HMAR.encoding_head, "encoding_head."),
            (self.phalp.pose_predictor.encoder, ""),
        ):
            own = module.state_dict()
            own.update({k: weights[prefix + k] for k in own if prefix + k in weights})
            module.load_state_dict(own)

    def _write_predictor_files(self, folder: Path, size: dict[str, int]) -> None:
        """What the constructors read: configuration, statistics, a mean pose to be replaced."""
        transformer = {
            "depth": size["depth"],
            "heads": size["num_heads"],
            "dim_head": size["head_dim"],
            "mlp_dim": size["mlp_dim"],
            "dropout": 0.1,
            "emb_dropout": 0.1,
            "droppath": 0.4,
            "conv": {"pad": recipe.CONV_PAD, "stride": recipe.CONV_STRIDE},
        }
        classes = {"num_action_classes": 80, "num_valid_action_classes": recipe.NUM_ACTIONS}
        pose_shape = {"dim": 229, "mid_dim": recipe.MID_DIM, "en_dim": size["width"]}
        configs = {
            "frame_length": recipe.FRAME_LENGTH,
            "num_smpl_heads": 1,
            "in_feat": size["width"],
            "mask_type_test": "zero",
            "ava": {**classes, "predict_valid": True},
            "extra_feat": {"pose_shape": pose_shape},
            "transformer": transformer,
        }
        files = self.cfg.pose_predictor
        files.config_path = str(folder / "predictor.yaml")
        Path(files.config_path).write_text(json.dumps({"configs": configs}))
        files.mean_std = str(folder / "mean_std.npy")
        np.save(files.mean_std, np.stack([self.scene["mean"], self.scene["std"]]))
        mean_pose = str(folder / "mean.npz")
        np.savez(mean_pose, pose=np.zeros(144), shape=np.zeros(10), cam=np.zeros(3))
        self.cfg.MODEL.SMPL_HEAD.SMPL_MEAN_PARAMS = mean_pose

    def _detections(self, t: int) -> list[Any]:
        """Records as the published feature step makes them; `extra_data` holds the row."""
        scene, rows = self.scene, rows_of(self.scene, t)
        uv = texture_maps(scene, rows)
        appe = np.zeros(4096, np.float32)
        detections = []
        for row, i in enumerate(range(rows.start, rows.stop)):
            loca, pose = scene["in_loca"][i], scene["in_pose"][i]
            record = {
                "bbox": scene["in_bbox"][i],
                "mask": {"size": scene["in_image_size"].tolist(), "counts": b"0" * 300},
                "conf": scene["in_conf"][i],
                "appe": appe.copy(),
                "pose": pose,
                "loca": loca,
                "uv": uv[row].copy(),
                "embedding": torch.from_numpy(np.concatenate([appe, pose, loca])),
                "center": scene["in_center"][i],
                "scale": scene["in_scale"][i],
                "smpl": {
                    "global_orient": pose[:9].reshape(1, 3, 3),
                    "body_pose": pose[9:216].reshape(23, 3, 3),
                    "betas": pose[216:226],
                },
                "camera": loca[90:93],
                "camera_bbox": np.zeros(3, np.float32),
                "3d_joints": np.zeros((45, 3), np.float32),
                "2d_joints": loca[:90],
                "size": scene["in_image_size"].tolist(),
                "img_path": f"{t + 1:06d}.jpg",
                "img_name": f"{t + 1:06d}.jpg",
                "class_name": 0,
                "time": t,
                "ground_truth": -1,
                "annotations": [],
                "extra_data": row,
            }
            detections.append(self.detection(record))
        return detections


def _arrays(held: Any) -> list[np.ndarray]:
    """Different arrays in nested containers; of a view, the part that it shows."""
    found: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}
    open_ = [held]
    while open_:
        value = open_.pop()
        if isinstance(value, torch.Tensor):
            value = value.numpy()
        if isinstance(value, np.ndarray):
            found[value.__array_interface__["data"][0], value.shape] = value
        elif isinstance(value, dict):
            open_.extend(value.values())
        elif isinstance(value, list | tuple | deque):
            open_.extend(value)
    return list(found.values())


def main(checkout: str, scene: str, predictor: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    sys.path.insert(0, checkout)
    sys.meta_path.append(StandIns())
    with np.load(scene) as z:
        driver = Driver(dict(z), predictor)
    asked = {"frame": driver.frame, "memory": driver.memory}
    for line in sys.stdin:
        print(json.dumps(asked[line.strip()]()), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

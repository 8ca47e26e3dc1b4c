"""Bodies of a few walkers, and files of them as pose engines write them."""

from __future__ import annotations

import io
import pickle
import sys
import types
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fourdh_batch.geometry import (
    axis_angle_to_rotmat,
    crop_square,
    full_image_camera,
    full_image_focal,
    phalp_camera,
)
from fourdh_batch.types import F32, F64, I64


@dataclass(frozen=True)
class Walkers:
    """`N` bodies of two people who walk past each other, as rows in frame order.

    Attributes:
        image_size_px: width and height.
        num_frames: frames of the clip.
        frame_index, person: (N,).
        bbox_xyxy_px: (N, 4).
        score: (N,).
        axis_angle: (N, 24, 3).
        betas: (N, 10).
        pred_cam, center, side: (N, 3), (N, 2), (N,) camera of the square crop of the box.
    """

    image_size_px: tuple[int, int]
    num_frames: int
    frame_index: I64
    person: I64
    bbox_xyxy_px: F32
    score: F32
    axis_angle: F64
    betas: F64
    pred_cam: F64
    center: F64
    side: F64

    @property
    def rotmat(self) -> F64:
        return np.asarray(axis_angle_to_rotmat(self.axis_angle), dtype=np.float64)

    @property
    def cam_t_m(self) -> F32:
        """(N, 3) translation in the full frame, focal length `full_image_focal`."""
        return full_image_camera(self.pred_cam, self.center, self.side, self.image_size_px)

    def rows_of(self, person: int) -> I64:
        return np.flatnonzero(self.person == person)


def walkers(
    *,
    num_frames: int = 12,
    image_size_px: tuple[int, int] = (640, 361),
    empty: tuple[int, ...] = (),
) -> Walkers:
    """Two walkers; in the frames `empty` nobody is there."""
    rng = np.random.default_rng(5)
    present = [t for t in range(num_frames) if t not in empty]
    frame = np.repeat(present, 2)
    person = np.tile([0, 1], len(present))
    left = np.where(person == 0, 60 + 6.0 * frame, 420 - 6.0 * frame)
    top = np.where(person == 0, 80, 60)
    size = np.where(person[:, None] == 0, [90, 220], [240, 200])  # one is wider than 3:4
    corner = np.stack([left, top], axis=1)
    box = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
    center, side = (np.asarray(part, dtype=np.float64) for part in crop_square(box))
    pose = rng.normal(0, 0.3, (2, 24, 3))[person] + rng.normal(0, 0.01, (len(frame), 24, 3))
    return Walkers(
        image_size_px=image_size_px,
        num_frames=num_frames,
        frame_index=frame,
        person=person,
        bbox_xyxy_px=box,
        score=np.where(person == 0, 0.95, 0.85).astype(np.float32),
        axis_angle=pose,
        betas=rng.normal(0, 1, (2, 10))[person],
        pred_cam=np.stack(
            [0.9 + 0.02 * person, 0.05 - 0.1 * person, 0.2 + 0.01 * frame], axis=1
        ).astype(np.float64),
        center=center,
        side=side,
    )


# --- joblib ------------------------------------------------------------------------------------

_PythonPickler: Any = pickle._Pickler  # type: ignore[attr-defined]


class NumpyArrayWrapper:
    """What joblib 1.6 puts before the bytes of an array."""


NumpyArrayWrapper.__module__ = "joblib.numpy_pickle"
NumpyArrayWrapper.__qualname__ = "NumpyArrayWrapper"


class _JoblibPickler(_PythonPickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, alignment: int | None) -> None:
        super().__init__(file, 4)
        self._out = file
        self._alignment = alignment

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if type(obj) is not np.ndarray:
            super().save(obj, save_persistent_id)
            return
        order = "F" if obj.flags.f_contiguous and not obj.flags.c_contiguous else "C"
        head = NumpyArrayWrapper()
        head.__dict__.update(
            subclass=np.ndarray, shape=obj.shape, order=order, dtype=obj.dtype, allow_mmap=True
        )
        if self._alignment is not None:
            head.__dict__["numpy_array_alignment_bytes"] = self._alignment
        super().save(head)
        self.framer.commit_frame(force=True)
        if self._alignment is not None:
            padding = self._alignment - (self._out.tell() + 1) % self._alignment
            self._out.write(bytes([padding]) + b"\xff" * padding)
        self._out.write(obj.tobytes(order))


def joblib_bytes(value: object, *, compress: bool = False, alignment: int | None = 16) -> bytes:
    """What `joblib.dump` writes; compared with joblib 1.6 itself (tests/unit/test_unpickle.py)."""
    package, module = types.ModuleType("joblib"), types.ModuleType("joblib.numpy_pickle")
    module.NumpyArrayWrapper = NumpyArrayWrapper  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in ("joblib", "joblib.numpy_pickle")}
    sys.modules.update({"joblib": package, "joblib.numpy_pickle": module})
    try:
        file = io.BytesIO()
        _JoblibPickler(file, alignment).dump(value)
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return zlib.compress(file.getvalue(), 3) if compress else file.getvalue()


# --- layouts -----------------------------------------------------------------------------------


def phalp_content(w: Walkers, *, old: bool = False) -> dict[str, Any]:
    """Results of 4D-Humans; `old`: without `camera_bbox`, as PHALP wrote before 2023."""
    width, height = w.image_size_px
    longer = max(width, height)
    camera = phalp_camera(w.pred_cam, w.center, w.side, w.image_size_px)
    frames: dict[str, Any] = {}
    for t in range(w.num_frames):
        record: dict[str, Any] = {"time": t, "shot": 0, "frame_path": f"img/{t + 1:06d}.jpg"}
        names = (
            *("tid", "bbox", "tracked_time", "center", "scale", "size", "img_path", "conf"),
            *("smpl", "camera", "3d_joints"),
        )
        record |= {name: [] for name in names} | {"tracked_ids": [], "tracked_bbox": []}
        if not old:
            record["camera_bbox"] = []
        for i in np.flatnonzero(w.frame_index == t).tolist():
            x1, y1, x2, y2 = w.bbox_xyxy_px[i].tolist()
            _append(
                record,
                tid=int(w.person[i]) + 1,
                bbox=np.array([x1, y1, x2 - x1, y2 - y1]),
                tracked_time=0,
                center=w.center[i],
                scale=float(w.side[i]) / longer,
                size=[height, width],
                img_path=f"img/{t + 1:06d}.jpg",
                conf=w.score[i],
                smpl={
                    "global_orient": w.rotmat[i, :1].astype(np.float32),
                    "body_pose": w.rotmat[i, 1:].astype(np.float32),
                    "betas": w.betas[i].astype(np.float32),
                },
                camera=camera[i],
                tracked_ids=int(w.person[i]) + 1,
                tracked_bbox=np.array([x1, y1, x2 - x1, y2 - y1]),
            )
            record["3d_joints"].append(np.zeros((45, 3), np.float32))
            if not old:
                record["camera_bbox"].append(w.pred_cam[i].astype(np.float32))
        if t and len(record["tid"]):  # a ghost: a track that was not seen, with stale values
            _append(record, **{name: record[name][0] for name in names if name != "tid"})
            record["tid"].append(9)
            record["tracked_time"][-1] = 3
            if not old:
                record["camera_bbox"].append(record["camera_bbox"][0])
        frames[f"img/{t + 1:06d}.jpg"] = record
    return frames


def _append(record: dict[str, Any], **values: Any) -> None:
    for name, value in values.items():
        record[name].append(value)


def square_boxes(w: Walkers) -> tuple[F64, F64]:
    """(N, 4) square boxes (cx, cy, h, h) and the cameras (N, 3) of those squares."""
    size = w.bbox_xyxy_px[:, 2:] - w.bbox_xyxy_px[:, :2]
    side = size.max(1).astype(np.float64)
    boxes = np.stack([w.center[:, 0], w.center[:, 1], side, side], axis=1)
    camera = w.pred_cam.copy()
    camera[:, 0] *= w.side / side  # the same centre: only the scale is told in another unit
    return boxes, camera


def orig_cam(w: Walkers) -> F64:
    """(N, 4) orthographic camera of the frame (sx, sy, tx, ty), as VIBE's renderer wants it."""
    boxes, camera = square_boxes(w)
    width, height = w.image_size_px
    sx, sy = camera[:, 0] * boxes[:, 2] / width, camera[:, 0] * boxes[:, 2] / height
    tx = camera[:, 1] + (boxes[:, 0] - width / 2) / (width / 2) / sx
    ty = camera[:, 2] + (boxes[:, 1] - height / 2) / (height / 2) / sy
    return np.stack([sx, sy, tx, ty], axis=1)


def pare_content(w: Walkers) -> dict[int, Any]:
    """`pare_output.pkl`."""
    boxes, camera = square_boxes(w)
    return {
        person + 1: {
            "pred_cam": camera[rows].astype(np.float32),
            "orig_cam": orig_cam(w)[rows].astype(np.float32),
            "verts": np.zeros((len(rows), 6890, 3), np.float32),
            "pose": w.rotmat[rows].astype(np.float32),
            "betas": w.betas[rows].astype(np.float32),
            "joints2d": None,
            "bboxes": boxes[rows],
            "frame_ids": w.frame_index[rows],
        }
        for person in (0, 1)
        for rows in (w.rows_of(person),)
    }


def pymafx_content(w: Walkers, *, with_tensors: bool = True) -> dict[str, Any]:
    """`output.pkl` of PyMAF-X: all people in one, tensors among it."""
    boxes, camera = square_boxes(w)
    content: dict[str, Any] = {
        "pred_cam": camera.astype(np.float32),
        "orig_cam": orig_cam(w).astype(np.float32),
        "verts": np.zeros((len(boxes), 6890, 3), np.float32),
        "pose": w.axis_angle.reshape(-1, 72).astype(np.float32),
        "betas": w.betas.astype(np.float32),
        "bboxes": boxes,
        "frame_ids": w.frame_index.tolist(),
        "person_ids": [f"clip_f{t}_p{p}" for t, p in zip(w.frame_index, w.person, strict=True)],
    }
    if with_tensors:
        import torch

        content["smplx_params"] = [{"shape": torch.zeros(2, 10), "jaw_pose": torch.ones(1)}]
    return content


def cliff_content(w: Walkers) -> dict[str, Any]:
    """Arrays of the npz: full-frame cameras at a focal length of the frame's diagonal."""
    width, height = w.image_size_px
    focal = float(np.hypot(width, height))
    cam_t = w.cam_t_m.astype(np.float64)
    cam_t[:, 2] *= focal / full_image_focal(w.image_size_px)
    n = len(w.frame_index)
    found = np.concatenate(
        [w.frame_index[:, None], w.bbox_xyxy_px, w.score[:, None], np.full((n, 1), 0.99)], axis=1
    )
    return {
        "imgname": np.array([f"{t:06d}.png" for t in range(w.num_frames)]),
        "pose": w.axis_angle.reshape(-1, 72).astype(np.float32),
        "shape": w.betas.astype(np.float32),
        "global_t": cam_t.astype(np.float32),
        "pred_joints": np.zeros((n, 45, 3), np.float32),
        "focal_l": np.full(n, focal, np.float32),
        "detection_all": np.concatenate([found, w.person[:, None]], axis=1),
    }


def npz_content(w: Walkers, *, camera: str = "pred_cam") -> dict[str, Any]:
    """Our plain layout; `camera`: ``pred_cam`` or ``cam_t``."""
    content: dict[str, Any] = {
        "frame_index": w.frame_index,
        "bbox_xyxy_px": w.bbox_xyxy_px,
        "score": w.score,
        "poses": w.axis_angle.reshape(-1, 72),
        "betas": w.betas,
        "image_size_px": np.array(w.image_size_px),
        "num_frames": w.num_frames,
        "fps": 25.0,
    }
    if camera == "pred_cam":
        return content | {"pred_cam": w.pred_cam}
    focal = float(full_image_focal(w.image_size_px))
    return content | {"cam_t_m": w.cam_t_m, "focal_px": focal}


def parquet_frame(w: Walkers, video_id: str) -> pd.DataFrame:
    """Rows of our plain layout."""
    return pd.DataFrame(
        {
            "video_id": video_id,
            "frame_index": w.frame_index,
            "bbox_xyxy_px": list(w.bbox_xyxy_px),
            "score": w.score,
            "rotmat": list(w.rotmat.reshape(-1, 216)),
            "betas": list(w.betas),
            "pred_cam": list(w.pred_cam),
            "image_size_px": [list(w.image_size_px)] * len(w.frame_index),
            "num_frames": w.num_frames,
            "fps": 25.0,
        }
    )


def write_npz(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **content)


def write_joblib(path: Path, content: object, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(joblib_bytes(content, **options))


def write_parquet(path: Path, clips: dict[str, Walkers]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.concat([parquet_frame(w, name) for name, w in clips.items()]).to_parquet(path)


WRITERS: dict[str, tuple[str, Callable[[Path, Walkers], None]]] = {
    "npz": ("clip.npz", lambda path, w: write_npz(path, npz_content(w))),
    "parquet": ("clips.parquet", lambda path, w: write_parquet(path, {"clip": w})),
    "phalp": ("clip.pkl", lambda path, w: write_joblib(path, phalp_content(w), compress=True)),
    "pare": ("clip/pare_output.pkl", lambda path, w: write_joblib(path, pare_content(w))),
    "pymafx": ("clip/output.pkl", lambda path, w: write_joblib(path, pymafx_content(w))),
    "cliff": ("clip_cliff_hr48.npz", lambda path, w: write_npz(path, cliff_content(w))),
}
"""Per layout: the file's name below a folder, and what writes it."""

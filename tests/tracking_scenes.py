"""Frames for the tracker, from recorded sequences and from boxes alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fourdh_batch.types import F32, F64, FrameDetections, People

GOLDENS = Path(__file__).resolve().parent / "data" / "tracking"
REST_POSE = np.concatenate([np.tile(np.eye(3).ravel(), 24), np.zeros(10)]).astype(np.float32)


def load(name: str) -> dict[str, NDArray]:
    """Arrays of a recorded file (see data/tracking/strip_goldens.py)."""
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as z:
        return dict(z)


def people_of(pose: F32, pred_cam: F32, center: ArrayLike, size: ArrayLike) -> People:
    """M people of (M, 226) pose vectors."""
    m = len(pose)
    return People(
        global_orient=pose[:, :9].reshape(m, 1, 3, 3).astype(np.float32),
        body_pose=pose[:, 9:216].reshape(m, 23, 3, 3).astype(np.float32),
        betas=pose[:, 216:226].astype(np.float32),
        pred_cam=pred_cam.astype(np.float32),
        box_center_px=np.asarray(center, np.float32).reshape(m, 2),
        box_size_px=np.asarray(size, np.float32).reshape(m),
        keypoints_3d_m=np.zeros((m, 44, 3), np.float32),
    )


def frame_of_boxes(
    frame_index: int,
    bbox_xyxy: ArrayLike,
    *,
    pose: F32 | None = None,
    image_size_wh: tuple[int, int] = (1280, 720),
    is_shot_start: bool = False,
) -> FrameDetections:
    """A frame in which everybody stands in the middle of the own box and fills it equally.

    Boxes grow to 3:4 about their centres, as for the crops of HMR 2.0.
    """
    bbox = np.asarray(bbox_xyxy, np.float32).reshape(-1, 4)
    m = len(bbox)
    width, height = bbox[:, 2] - bbox[:, 0], bbox[:, 3] - bbox[:, 1]
    people = people_of(
        np.tile(REST_POSE, (m, 1)) if pose is None else pose,
        np.tile(np.float32([0.9, 0, 0]), (m, 1)),
        (bbox[:, :2] + bbox[:, 2:]) / 2,
        np.maximum(height, width * 256 / 192),
    )
    return FrameDetections(
        frame_index=frame_index,
        image_size_wh=image_size_wh,
        bbox_xyxy_px=bbox,
        score=np.full(m, 0.9, np.float32),
        people=people,
        is_shot_start=is_shot_start,
    )


def recorded_frames(z: dict[str, NDArray]) -> list[FrameDetections]:
    """Detections of a recorded sequence; crop cameras are solved from the recorded ones."""
    width, height = (int(v) for v in z["in_image_size_wh"])
    side = max(width, height)
    camera: F64 = z["in_camera"].astype(np.float64)
    center = z["in_center"] + [(side - width) // 2, (side - height) // 2]
    depth = camera[:, 2:]
    pred_cam = np.concatenate(
        [
            10000 / (depth * z["in_size"][:, None] * 256 / side),
            camera[:, :2] - (center * 256 / side - 128) * depth / 5000,
        ],
        1,
    )
    frames = []
    for i, (start, stop) in enumerate(
        zip(z["in_frame_ptr"][:-1], z["in_frame_ptr"][1:], strict=True)
    ):
        rows = slice(start, stop)
        frames.append(
            FrameDetections(
                frame_index=i,
                image_size_wh=(width, height),
                bbox_xyxy_px=z["in_bbox_xyxy"][rows],
                score=z["in_conf"][rows],
                people=people_of(
                    z["in_pose"][rows], pred_cam[rows], z["in_center"][rows], z["in_size"][rows]
                ),
                is_shot_start=i in z["in_shots"],
            )
        )
    return frames

"""Pose vectors: one body and its camera as 229 numbers.

24 rotation matrices row by row, 10 betas, then (tx, ty, tz / 200) of the virtual 256 camera.

Dimension letters: `M` people.
Source: docs/PHALP.md, section 2 (2.5).
"""

from __future__ import annotations

import numpy as np

from fourdh_batch.tracking.track import NUM_POSE
from fourdh_batch.types import F32, NUM_BETAS, NUM_BODY_JOINTS, Bool, People

DEPTH_IN_POSE = 200.0  # a pose vector ends with (tx, ty, tz / 200)
NUM_ROTATIONS = 1 + NUM_BODY_JOINTS
# Numbers beyond it are garbage and could overflow further down.
MAX_MAGNITUDE = 1e6
# A body reaches about 1 m from its origin: nearer, a part of it would be behind the camera.
MIN_DEPTH_M = 1.0
ROTATION_TOLERANCE = 1e-3  # of R^T R; a network's float32 matrices are within 1e-6


def pose_vectors(people: People, camera: F32) -> F32:
    """(M, 229) pose vectors.

    Args:
        people: M people.
        camera: (M, 3) their (tx, ty, tz) in the virtual 256 camera, of `geometry.phalp_camera`.
    """
    m = len(people)
    parts = [people.global_orient, people.body_pose, people.betas, camera[:, :2]]
    flat = [part.reshape(m, int(np.prod(part.shape[1:]))) for part in parts]
    return np.concatenate([*flat, camera[:, 2:] / DEPTH_IN_POSE], 1, dtype=np.float32)


def split_pose_vectors(pose: F32) -> tuple[F32, F32, F32, F32]:
    """The parts of (M, 229) pose vectors.

    Returns:
        global_orient (M, 1, 3, 3), body_pose (M, 23, 3, 3), betas (M, 10), and camera (M, 3) as
        (tx, ty, tz) in the virtual 256 camera.
    """
    if pose.ndim != 2 or pose.shape[1] != NUM_POSE:
        raise ValueError(f"pose vectors: expected (M, {NUM_POSE}), got {pose.shape}")
    rotation = pose[:, : 9 * NUM_ROTATIONS].reshape(-1, NUM_ROTATIONS, 3, 3)
    betas = pose[:, 9 * NUM_ROTATIONS : 9 * NUM_ROTATIONS + NUM_BETAS]
    camera = pose[:, -3:] * np.array([1, 1, DEPTH_IN_POSE], np.float32)
    return rotation[:, :1], rotation[:, 1:], betas, camera


def is_sound(pose: F32) -> Bool:
    """(M,) whether pose vectors are bodies in front of the camera: finite, rotations, depth."""
    with np.errstate(invalid="ignore", over="ignore"):
        is_finite = np.all(np.abs(pose) <= MAX_MAGNITUDE, axis=1)
        rotation = pose[:, : 9 * NUM_ROTATIONS].reshape(-1, NUM_ROTATIONS, 3, 3)
        rotation = np.where(is_finite[:, None, None, None], rotation, np.float32(0))
        unit = np.swapaxes(rotation, -1, -2) @ rotation
        off = np.abs(unit - np.eye(3, dtype=np.float32)).max((1, 2, 3))
        is_rotation = (off <= ROTATION_TOLERANCE) & np.all(np.linalg.det(rotation) > 0, axis=1)
        is_in_front = pose[:, -1] * DEPTH_IN_POSE >= MIN_DEPTH_M
        sound: Bool = is_finite & is_rotation & is_in_front
    return sound

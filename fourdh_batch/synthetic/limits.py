"""How far each joint of a body with SMPL's 24 joints turns.

A limit is a box of rotation vectors (axis-angle, radians, axes of the joint's parent at rest: x to
the person's left, y up, z forward; T-pose is zero). Boxes of rotation vectors are coarser than a
study of anatomy; they keep what is made here free of knees that bend forward and arms inside the
chest's own axis. The values are our own, rounded outwards from textbook ranges of motion.
"""

from __future__ import annotations

import numpy as np

from fourdh_batch.types import F64, NUM_BODY_JOINTS

_CENTRE = {  # joint: lowest and highest x, y, z
    3: ((-0.35, -0.45, -0.40), (1.00, 0.45, 0.40)),  # spine
    6: ((-0.30, -0.45, -0.35), (0.60, 0.45, 0.35)),
    9: ((-0.55, -0.45, -0.35), (0.50, 0.45, 0.35)),
    12: ((-0.60, -0.75, -0.60), (0.60, 0.75, 0.60)),  # neck
    15: ((-0.70, -0.80, -0.70), (0.90, 0.80, 0.70)),  # head
}
_LEFT = {  # the right side mirrors y and z; its joint is the next number
    1: ((-2.25, -0.65, -0.55), (0.60, 0.90, 1.00)),  # hip: lifted forwards is -x, outwards +z
    4: ((-0.15, -0.35, -0.25), (2.60, 0.35, 0.25)),  # knee: bent is +x
    7: ((-0.90, -0.55, -0.50), (0.90, 0.60, 0.50)),  # ankle: toes up is -x
    10: ((-0.90, -0.40, -0.20), (1.05, 0.30, 0.20)),  # toes
    13: ((-0.30, -0.50, -0.35), (0.30, 0.35, 0.55)),  # collar
    16: ((-1.50, -2.00, -1.75), (1.50, 0.90, 1.50)),  # shoulder: down is -z, forwards -y
    18: ((-1.30, -2.60, -0.50), (1.30, 0.10, 1.25)),  # elbow: bent is -y
    20: ((-1.35, -1.00, -1.20), (0.90, 0.85, 1.20)),  # wrist
    22: ((-0.40, -0.40, -0.40), (0.40, 0.40, 0.40)),  # hand
}


def _table() -> F64:
    limits = np.zeros((1 + NUM_BODY_JOINTS, 2, 3))
    limits[0] = (-np.pi, -np.pi, -np.pi), (np.pi, np.pi, np.pi)
    for joint, box in _CENTRE.items():
        limits[joint] = box
    mirror = np.array([1.0, -1, -1])
    for joint, box in _LEFT.items():
        limits[joint] = box
        limits[joint + 1] = np.sort(np.array(box) * mirror, axis=0)
    return limits


LIMITS = _table()
"""(24, 2, 3) radians: lowest and highest rotation vector of every joint; the root is free."""


def within_limits(pose: F64) -> F64:
    """(..., 24, 3) rotation vectors, each moved to the nearest one that the joint reaches."""
    return pose.clip(LIMITS[:, 0], LIMITS[:, 1])

"""Motions of a body with SMPL's 24 joints, and a walk made of smooth periodic functions.

The joint angles follow the shape of textbook gait curves (two knee waves, ankle push-off,
arms against legs); the constants are our own. The root moves so that the loaded foot rests on
the floor, hence speed and step length follow from the leg's length.

World axes: x right, y up, z towards the viewer; the floor is y = 0; metres. At heading 0 a body
faces +z, at heading 90 degrees +x. Dimension letters: `T` frames, `K` samples of one gait cycle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from fourdh_batch.types import F64, I64, NUM_BODY_JOINTS

# rows of the pose: the root, then the 23 body joints, in SMPL's order
PELVIS, SPINE_1, SPINE_2, SPINE_3, NECK, HEAD = 0, 3, 6, 9, 12, 15
HIPS, KNEES, ANKLES, TOES = (1, 2), (4, 5), (7, 8), (10, 11)  # (left, right) from here on
COLLARS, SHOULDERS, ELBOWS = (13, 14), (16, 17), (18, 19)

HEEL_KEYPOINTS = (21, 24)  # left, right among the 44 keypoints
BIG_TOE_KEYPOINTS = (19, 22)

NUM_SAMPLES = 96  # of one cycle; between them the root's path is interpolated
LOAD_SHARPNESS = 4.0  # of the change of weight from foot to foot; both bear it for about 20 %


class BodyOutput(Protocol):
    """What a body model returns for B people; metres, model axes (y up at rest)."""

    @property
    def vertices(self) -> Tensor: ...  # (B, V, 3)

    @property
    def joints(self) -> Tensor: ...  # (B, 24, 3)

    @property
    def keypoints_3d(self) -> Tensor: ...  # (B, 44, 3)


class Body(Protocol):
    """A body model: rotations and shape to a surface."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def faces(self) -> I64: ...  # (F, 3)

    def __call__(self, global_orient: Tensor, body_pose: Tensor, betas: Tensor) -> BodyOutput: ...


@dataclass(frozen=True, slots=True)
class Gait:
    """How somebody walks.

    Attributes:
        cycles_per_s: gait cycles (two steps) per second.
        stride: size of the leg's swing; 1 is an ordinary walk, 0 stands still.
        arm_swing: size of the arm's swing.
        lean_deg: trunk, forwards.
        elbow_deg: bend of the elbow in the middle of its swing.
        knee: size of the knee's bend; runners lift their heels more.
    """

    cycles_per_s: float = 0.95
    stride: float = 1.0
    arm_swing: float = 1.0
    lean_deg: float = 3.0
    elbow_deg: float = 16.0
    knee: float = 1.0


RUN = Gait(cycles_per_s=1.4, stride=1.5, arm_swing=1.8, lean_deg=10, elbow_deg=85, knee=1.15)


@dataclass(frozen=True, slots=True, eq=False)
class Motion:
    """T frames of one moving person.

    Attributes:
        global_orient: (T, 1, 3, 3) float32, world axes.
        body_pose: (T, 23, 3, 3) float32.
        transl_m: (T, 3) float32, world axes; added to the body model's vertices.
    """

    global_orient: Tensor
    body_pose: Tensor
    transl_m: Tensor

    def __getitem__(self, frames: slice) -> Motion:
        return Motion(self.global_orient[frames], self.body_pose[frames], self.transl_m[frames])

    def until(self, here: Tensor, other: Motion) -> Motion:
        """This motion in the frames `here` (T,) bool, another one of equal length elsewhere."""
        return Motion(
            torch.where(here[:, None, None, None], self.global_orient, other.global_orient),
            torch.where(here[:, None, None, None], self.body_pose, other.body_pose),
            torch.where(here[:, None], self.transl_m, other.transl_m),
        )


def gait_pose(phase: F64, gait: Gait) -> F64:
    """Rotations of the root and the 23 joints in the walk, facing +z.

    Args:
        phase: (T,) radians; 0 is the left heel's strike, pi the right one's.
    Returns:
        (T, 24, 3, 3) rotation matrices.
    """
    angles = np.zeros((len(phase), 1 + NUM_BODY_JOINTS, 3))  # degrees, extrinsic z, y, x
    swing = gait.stride
    for side, sign in enumerate((1.0, -1.0)):  # left is +x, right is -x
        t = phase + np.pi * side
        forward = np.cos(t + 0.2 + 0.3 * np.cos(t))  # leads in late swing, trails at push-off
        angles[:, HIPS[side], 0] = -swing * (10 + 23 * forward) + gait.lean_deg / 3
        angles[:, HIPS[side], 2] = sign * (-2.5 - 2.5 * swing * np.sin(t))  # pelvis drop undone
        angles[:, HIPS[side], 1] = sign * (4 + 5 * swing * forward)
        knee = 5 + 8 * _bump(t, 0.13, 0.10) + 56 * _bump(t, 0.72, 0.095)
        angles[:, KNEES[side], 0] = 2 + swing * gait.knee * knee
        ankle = -5 * _bump(t, 0.06, 0.05) + 10 * _bump(t, 0.42, 0.11) - 20 * _bump(t, 0.62, 0.06)
        ankle += 7 * _bump(t, 0.83, 0.08)
        angles[:, ANKLES[side], 0] = -swing * ankle
        angles[:, TOES[side], 0] = -22 * swing * _bump(t, 0.56, 0.06)
        arm = -np.cos(t + 0.15) * gait.arm_swing  # against the leg of the same side
        angles[:, COLLARS[side], 2] = -sign * 6
        angles[:, SHOULDERS[side], 2] = -sign * 73
        angles[:, SHOULDERS[side], 0] = 2 - 20 * arm
        angles[:, ELBOWS[side], 1] = -sign * (gait.elbow_deg + 9 * arm)
    left_forward = np.cos(phase + 0.30) * swing
    angles[:, PELVIS, 1] = -5 * left_forward  # the hip of the leading leg comes forward
    angles[:, PELVIS, 2] = 2.5 * swing * np.sin(phase)
    angles[:, PELVIS, 0] = gait.lean_deg / 3
    for joint, share in ((SPINE_1, 0.3), (SPINE_2, 0.4), (SPINE_3, 0.6)):
        angles[:, joint, 1] = share * 9 * left_forward  # the shoulders turn against the pelvis
        angles[:, joint, 2] = -share * 2 * swing * np.sin(phase)
        angles[:, joint, 0] = gait.lean_deg / 4
    angles[:, NECK, 1] = -3 * left_forward
    angles[:, HEAD, 0] = -gait.lean_deg / 2
    rotations = Rotation.from_euler("zyx", angles[..., ::-1].reshape(-1, 3), degrees=True)
    return rotations.as_matrix().reshape(len(phase), 1 + NUM_BODY_JOINTS, 3, 3)


def walk(
    body: Body,
    betas: Tensor,
    gait: Gait,
    *,
    times_s: F64,
    position_m: tuple[float, float],
    heading_deg: float,
    turn_deg_per_m: float = 0.0,
    phase: float = 0.0,
) -> Motion:
    """A person's walk along a straight line or an arc.

    Args:
        betas: (10,) shape.
        times_s: (T,) any order; at time 0 the person is at `position_m`.
        position_m: (x, z) of the pelvis on the floor at time 0.
        heading_deg: direction of the walk at time 0.
        turn_deg_per_m: change of direction per metre walked.
        phase: of the gait at time 0, radians.
    """
    angle = phase + 2 * np.pi * gait.cycles_per_s * times_s
    advance, lift, root = _root_path(body, betas, gait)
    cycles, within = np.divmod(angle / (2 * np.pi), 1.0)
    grid = np.arange(NUM_SAMPLES + 1) / NUM_SAMPLES
    distance = cycles * advance[-1] + np.interp(within, grid, advance)
    distance -= np.floor(phase / (2 * np.pi)) * advance[-1] + np.interp(
        phase / (2 * np.pi) % 1.0, grid, advance
    )
    height = np.interp(within, grid, lift)

    heading = np.radians(heading_deg + turn_deg_per_m * distance)
    middle = np.radians(heading_deg + turn_deg_per_m * distance / 2)  # direction of the chord
    half = np.radians(turn_deg_per_m) * distance / 2
    chord = distance * np.sinc(half / np.pi)
    x = position_m[0] + chord * np.sin(middle)
    z = position_m[1] + chord * np.cos(middle)
    pose = gait_pose(angle, gait)
    turned = Rotation.from_euler("y", heading[:, None]).as_matrix() @ pose[:, 0]
    transl = np.stack([x - root[0], height, z - root[2]], axis=-1)
    return Motion(
        global_orient=torch.from_numpy(turned[:, None]).float(),
        body_pose=torch.from_numpy(pose[:, 1:]).float(),
        transl_m=torch.from_numpy(transl).float(),
    )


def _bump(phase: F64, center: float, width: float) -> F64:
    """(T,) periodic bell: 1 at `center`, about exp(-1/2) a `width` beside it; both in cycles."""
    return np.exp((np.cos(phase - 2 * np.pi * center) - 1) / (2 * np.pi * width) ** 2)


def _root_path(body: Body, betas: Tensor, gait: Gait) -> tuple[F64, F64, F64]:
    """Where the root has to be in one cycle so that the loaded foot rests on the floor.

    Returns:
        advance: (K + 1,) metres walked since phase 0; the last is the length of a stride.
        lift: (K + 1,) metres that the body is raised by.
        root: (3,) the pelvis at rest, around which the body model turns.
    """
    phase = np.linspace(0, 2 * np.pi, NUM_SAMPLES + 1)
    pose = torch.from_numpy(gait_pose(phase, gait)).float()
    out = body(pose[:, :1], pose[:, 1:], betas.expand(len(pose), -1))
    lift = -out.vertices[..., 1].amin(dim=1).double().numpy()
    feet = out.keypoints_3d[:, (HEEL_KEYPOINTS, BIG_TOE_KEYPOINTS), 2].mean(dim=1)  # (K + 1, 2)
    backward = -np.diff(feet.double().numpy(), axis=0)  # (K, 2) under the root
    left_load = (1 + np.tanh(LOAD_SHARPNESS * np.sin((phase[1:] + phase[:-1]) / 2))) / 2
    steps = left_load * backward[:, 0] + (1 - left_load) * backward[:, 1]
    advance = np.concatenate([[0.0], np.cumsum(steps)])
    return advance, lift, out.joints[0, 0].double().numpy()

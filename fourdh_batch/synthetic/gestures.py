"""What people do besides walking: gestures blended over a gait, inside the limits of the joints.

A gesture is a pose of a few joints. It comes and goes smoothly over whatever the gait does, with
random deviations of its own, and may swing while it lasts (waving). All joints tremble a little
at low frequencies. Poses are rotation vectors (axis-angle, radians) of the root and the 23 body
joints, facing +z. Dimension letters: `T` frames, `N` samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from fourdh_batch.synthetic.limits import LIMITS, within_limits
from fourdh_batch.synthetic.motion import (
    RUN,
    Body,
    Gait,
    Motion,
    gait_pose,
)
from fourdh_batch.types import F64, NUM_BODY_JOINTS

NUM_JOINTS = 1 + NUM_BODY_JOINTS
ARMS = ((13, 16, 18, 20), (14, 17, 19, 21))  # collar, shoulder, elbow, wrist; left, right
MIRRORED = np.array(
    [0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20, 23, 22]
)
_FLIP = np.array([1.0, -1, -1])  # of a rotation vector seen in a mirror

TREMBLE = 0.05  # of each joint's range
DEVIATION_DEG = 9.0  # standard deviation of a gesture's angles from person to person
RAMP_S = 0.45  # a gesture takes this long to come, and to go


@dataclass(frozen=True, slots=True)
class Gesture:
    """A pose of some joints, degrees.

    Attributes:
        joints: rotation vector in degrees of each joint it moves; written for the left side.
        swing: joint, amplitude in degrees and cycles per second of what moves while it lasts.
        still: it needs both feet on the floor.
    """

    joints: dict[int, tuple[float, float, float]]
    swing: tuple[int, tuple[float, float, float], float] | None = None
    still: bool = False


def _squat(depth: float, lean: float) -> dict[int, tuple[float, float, float]]:
    """Root, hips, knees and ankles of somebody who lowers himself; 1 is thighs level."""
    hip, knee = -85 * depth - lean, 110 * depth
    return {
        0: (lean, 0, 0),
        1: (hip, 8, 14),
        2: (hip, -8, -14),
        4: (knee, 0, 0),
        5: (knee, 0, 0),
        7: (-25 * depth, 0, 0),
        8: (-25 * depth, 0, 0),
    }


GESTURES: dict[str, Gesture] = {
    "wave": Gesture({16: (0, -25, 30), 18: (0, -75, 0)}, (18, (0, 28, 0), 1.6)),
    "wave_high": Gesture(
        {13: (0, 0, 15), 16: (0, -15, 68), 18: (0, -20, 0)}, (16, (0, 0, 14), 1.3)
    ),
    "arms_up": Gesture({13: (0, 0, 18), 14: (0, 0, -18), 16: (0, -20, 72), 17: (0, 20, -72)}),
    "arms_wide": Gesture({16: (0, -10, 5), 17: (0, 10, -5)}),
    "reach": Gesture({13: (0, -15, 0), 16: (0, -78, -5), 18: (0, -12, 0)}),
    "reach_both": Gesture({16: (0, -75, -8), 17: (0, 75, 8), 18: (0, -15, 0), 19: (0, 15, 0)}),
    "reach_up": Gesture({13: (0, 0, 18), 16: (0, -50, 50), 18: (0, -15, 0), 15: (-18, 0, 0)}),
    "point": Gesture({16: (0, -45, 0), 18: (0, -5, 0), 12: (0, 18, 0)}),
    "on_hips": Gesture({16: (20, 30, -50), 18: (0, -95, 0), 17: (20, -30, 50), 19: (0, 95, 0)}),
    "crossed": Gesture({16: (0, -45, -62), 18: (30, -105, 0), 17: (0, 45, 62), 19: (30, 105, 0)}),
    "phone": Gesture({16: (0, -30, -55), 18: (25, -135, 0), 15: (0, 0, 10)}),
    "scratch": Gesture({16: (0, -15, 25), 18: (0, -130, 0)}),
    "punch": Gesture({16: (0, -80, 0), 18: (0, -10, 0), 17: (0, 30, 60), 19: (0, 120, 0)}),
    "throw": Gesture({16: (0, 20, 20), 18: (-40, -80, 0), 6: (0, 20, 0), 9: (0, 20, 0)}),
    "twist": Gesture({3: (0, 22, 0), 6: (0, 22, 0), 9: (0, 20, 0), 12: (0, 15, 0)}),
    "side_bend": Gesture({3: (0, 0, 20), 6: (0, 0, 18), 9: (0, 0, 15), 16: (0, 0, 60)}),
    "look_back": Gesture({12: (0, 35, 0), 15: (0, 32, 0), 9: (0, 15, 0)}),
    "look_down": Gesture({12: (22, 0, 0), 15: (20, 0, 0), 9: (10, 0, 0)}),
    "bow": Gesture(
        {0: (35, 0, 0), 1: (-38, 0, 3), 2: (-38, 0, -3), 3: (25, 0, 0), 6: (15, 0, 0)}, still=True
    ),
    "touch_floor": Gesture(
        {
            **{0: (60, 0, 0), 1: (-85, 0, 4), 2: (-85, 0, -4), 4: (25, 0, 0), 5: (25, 0, 0)},
            **{3: (35, 0, 0), 6: (25, 0, 0), 16: (0, -80, 0), 17: (0, 80, 0)},
        },
        still=True,
    ),
    "half_squat": Gesture({**_squat(0.55, 18), 16: (0, -60, -10), 17: (0, 60, 10)}, still=True),
    "squat": Gesture({**_squat(1.15, 30), 16: (0, -65, 0), 17: (0, 65, 0)}, still=True),
    "sit": Gesture({**_squat(0.95, 0), 7: (0, 0, 0), 8: (0, 0, 0), 3: (8, 0, 0)}, still=True),
    "kick": Gesture({1: (-70, 0, 5), 4: (20, 0, 0), 0: (-8, 0, 0)}, still=True),
    "knee_up": Gesture({1: (-95, 5, 8), 4: (100, 0, 0), 7: (15, 0, 0)}, still=True),
    "leg_out": Gesture({1: (0, 5, 45), 0: (0, 0, -8)}, still=True),
    "leg_back": Gesture({1: (28, 0, 4), 4: (45, 0, 0), 0: (18, 0, 0), 2: (-18, 0, 0)}, still=True),
    "lunge": Gesture(
        {
            1: (-80, 0, 3),
            4: (80, 0, 0),
            2: (22, 0, -3),
            5: (35, 0, 0),
            8: (10, 0, 0),
            11: (-30, 0, 0),
        },
        still=True,
    ),
    "kneel": Gesture(
        {1: (-85, 0, 8), 4: (90, 0, 0), 2: (0, 0, -4), 5: (95, 0, 0), 8: (40, 0, 0)}, still=True
    ),
    "straddle": Gesture({1: (0, 15, 28), 2: (0, -15, -28), 4: (8, 0, 0), 5: (8, 0, 0)}, still=True),
}
MOVING = tuple(name for name, gesture in GESTURES.items() if not gesture.still)
STILL = tuple(name for name, gesture in GESTURES.items() if gesture.still)


def mirrored(pose: F64) -> F64:
    """(..., 24, 3) rotation vectors of the mirror image."""
    image: F64 = pose[..., MIRRORED, :] * _FLIP
    return image


def gesture_target(name: str, mirror: bool, rng: np.random.Generator) -> tuple[F64, F64]:
    """One person's version of a gesture.

    Returns:
        (24, 3) rotation vectors, and (24,) 1 where the gesture moves the joint, else 0.
    """
    target, moves = np.zeros((NUM_JOINTS, 3)), np.zeros(NUM_JOINTS)
    for joint, angles in GESTURES[name].joints.items():
        target[joint] = np.radians(np.array(angles) + rng.normal(0, DEVIATION_DEG, 3))
        moves[joint] = 1
    if mirror:
        target, moves = mirrored(target), moves[MIRRORED]
    return target, moves


def free_arm(side: int, rng: np.random.Generator) -> tuple[F64, F64]:
    """An arm anywhere within its limits; as `gesture_target`, side 0 is left."""
    target, moves = np.zeros((NUM_JOINTS, 3)), np.zeros(NUM_JOINTS)
    joints = list(ARMS[side])
    target[joints] = rng.uniform(*LIMITS[joints].swapaxes(0, 1)) * 0.8
    moves[joints] = 1
    return target, moves


def gesture_curve(
    base: F64, times_s: F64, rng: np.random.Generator, *, busy: float, still: bool
) -> F64:
    """Gestures over a gait.

    Args:
        base: (T, 24, 3) rotation vectors of the gait.
        times_s: (T,) increasing.
        busy: share of the time that a person is in the middle of some gesture, 0 to 1.
        still: the person stands, so that squatting and kicking are possible.
    Returns:
        (T, 24, 3) within the limits of the joints.
    """
    pose = base.copy()
    begin, end = float(times_s[0]), float(times_s[-1])
    now = begin - rng.uniform(0, 1.5)
    while busy > 0 and now < end:
        lasts = rng.uniform(1.0, 3.0)
        stop = now + lasts
        envelope = _smooth((times_s - now) / RAMP_S) * _smooth((stop - times_s) / RAMP_S)
        names = STILL if still and rng.random() < 0.5 else MOVING
        parts = [(names[rng.integers(len(names))], bool(rng.integers(2)))]
        if rng.random() < 0.4:  # the arms do something else at the same time
            parts.append((MOVING[rng.integers(len(MOVING))], bool(rng.integers(2))))
        for name, mirror in parts:
            target, moves = gesture_target(name, mirror, rng)
            goal = np.broadcast_to(target, pose.shape).copy()
            if swing := GESTURES[name].swing:
                joint, amplitude, rate = swing
                wave = np.sin(2 * np.pi * rate * (times_s - now))[:, None] * np.radians(amplitude)
                goal[:, MIRRORED[joint] if mirror else joint] += wave * (_FLIP if mirror else 1)
            pose += (envelope[:, None] * moves)[..., None] * (goal - pose)
        if rng.random() < 0.35:
            target, moves = free_arm(int(rng.integers(2)), rng)
            pose += (envelope[:, None] * moves)[..., None] * (target - pose)
        now = stop + rng.exponential(0.8) * (1 - busy) / busy
    return within_limits(pose + _tremble(times_s, rng))


def _smooth(x: F64) -> F64:
    """0 before 0, 1 after 1, smooth between."""
    x = x.clip(0, 1)
    curve: F64 = x * x * (3 - 2 * x)
    return curve


def _tremble(times_s: F64, rng: np.random.Generator) -> F64:
    """(T, 24, 3) slow random curves; the root and what bears the body hardly move."""
    rate = rng.uniform(0.08, 0.6, (3, NUM_JOINTS, 3))
    phase = rng.uniform(0, 2 * np.pi, (3, NUM_JOINTS, 3))
    size = TREMBLE * (LIMITS[:, 1] - LIMITS[:, 0]) / np.sqrt(3)
    size[0] = 0.02
    size[[1, 2, 4, 5, 7, 8, 10, 11]] *= 0.3
    angle = 2 * np.pi * rate * times_s[:, None, None, None] + phase
    tremble: F64 = np.sin(angle).sum(axis=1) * size
    return tremble


def act(
    body: Body,
    betas: torch.Tensor,
    motion: Motion,
    times_s: F64,
    rng: np.random.Generator,
    *,
    busy: float,
    still: bool,
) -> Motion:
    """Gestures over a motion, with the lowest point of the body put back onto the floor.

    Args: as `gesture_curve`; `betas` (10,).
    """
    root = motion.global_orient[:, 0].double().numpy()
    ahead = root[:, :, 2]  # where the body faces; gestures of the root turn about its own axes
    heading = Rotation.from_euler("y", np.arctan2(ahead[:, 0], ahead[:, 2])[:, None])
    rotations = np.concatenate(
        [
            (heading.inv().as_matrix() @ root)[:, None],
            motion.body_pose.double().numpy(),
        ],
        axis=1,
    )
    base = Rotation.from_matrix(rotations.reshape(-1, 3, 3)).as_rotvec().reshape(-1, NUM_JOINTS, 3)
    pose = rotation_matrices(gesture_curve(base, times_s, rng, busy=busy, still=still))
    turned = heading.as_matrix() @ pose[:, 0]
    acted = Motion(
        global_orient=torch.from_numpy(turned[:, None]).float(),
        body_pose=torch.from_numpy(pose[:, 1:]).float(),
        transl_m=motion.transl_m.clone(),
    )
    out = body(acted.global_orient, acted.body_pose, betas.expand(len(turned), -1))
    acted.transl_m[:, 1] = -out.vertices[..., 1].amin(dim=1)
    return acted


def rotation_matrices(pose: F64) -> F64:
    """(..., 24, 3) rotation vectors to (..., 24, 3, 3)."""
    matrices: F64 = Rotation.from_rotvec(pose.reshape(-1, 3)).as_matrix()
    return matrices.reshape(*pose.shape, 3)


class PoseSampler:
    """Single poses of moving people, for pictures without a before and after."""

    def __init__(self, recorded: Sequence[F64] = (), recorded_share: float = 0.5) -> None:
        """
        Args:
            recorded: (T, 24, 3) rotation vectors each, facing +z; poses of motion capture.
            recorded_share: of the samples that start from a recorded pose, where there are any.
        """
        gaits = (
            *(Gait(), Gait(stride=0.0, arm_swing=0.3), Gait(stride=0.7, arm_swing=0.6), RUN),
            *(Gait(stride=1.25, arm_swing=1.4, lean_deg=6), Gait(stride=0.15, elbow_deg=40)),
        )
        phase = np.arange(48) / 48 * 2 * np.pi
        bank = np.concatenate([gait_pose(phase, gait) for gait in gaits])
        self._gaits = (
            Rotation.from_matrix(bank.reshape(-1, 3, 3)).as_rotvec().reshape(-1, NUM_JOINTS, 3)
        )
        self._recorded = np.concatenate(recorded) if recorded else np.zeros((0, NUM_JOINTS, 3))
        self._share = recorded_share if recorded else 0.0

    def sample(self, rng: np.random.Generator) -> F64:
        """(24, 3) rotation vectors within the limits of the joints, facing about +z."""
        if rng.random() < self._share:
            pose = self._recorded[rng.integers(len(self._recorded))].copy()
            return mirrored(pose) if rng.random() < 0.5 else pose
        pose = self._gaits[rng.integers(len(self._gaits))].copy()
        for names, chance in ((STILL, 0.4), (MOVING, 0.75), (MOVING, 0.3)):
            if rng.random() < chance:
                name = names[rng.integers(len(names))]
                target, moves = gesture_target(name, bool(rng.integers(2)), rng)
                weight = rng.uniform(0.3, 1.0)
                pose += weight * moves[:, None] * (target - pose)
        for side in (0, 1):
            if rng.random() < 0.35:
                target, moves = free_arm(side, rng)
                pose += rng.uniform(0.4, 1.0) * moves[:, None] * (target - pose)
        spread = 0.05 * (LIMITS[:, 1] - LIMITS[:, 0])
        spread[0] = 0.08
        return within_limits(pose + rng.normal(0, 1, pose.shape) * spread)

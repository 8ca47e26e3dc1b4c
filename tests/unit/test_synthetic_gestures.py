from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.synthetic.gestures import (
    GESTURES,
    MOVING,
    STILL,
    PoseSampler,
    act,
    gesture_curve,
    mirrored,
    rotation_matrices,
)
from fourdh_batch.synthetic.limits import LIMITS, within_limits
from fourdh_batch.synthetic.motion import RUN, Gait, gait_pose, walk
from fourdh_batch.types import F64

FPS = 25
MEAN_POSE_PA_MPJPE_MM = 90  # what answering with one pose costs; see the test


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


def is_within(pose: F64) -> bool:
    slack = 1e-6
    return bool(((pose >= LIMITS[:, 0] - slack) & (pose <= LIMITS[:, 1] + slack)).all())


def gait_curve(gait: Gait, frames: int) -> F64:
    matrices = gait_pose(np.arange(frames) / FPS * 2 * np.pi * gait.cycles_per_s, gait)
    return Rotation.from_matrix(matrices.reshape(-1, 3, 3)).as_rotvec().reshape(-1, 24, 3)


@pytest.mark.parametrize("gait", [Gait(), RUN, Gait(stride=0, arm_swing=0)])
def test_gaits_and_gestures_keep_within_the_limits(gait: Gait) -> None:
    base = gait_curve(gait, 200)
    assert is_within(base)
    times = np.arange(200) / FPS
    for seed in range(4):
        curve = gesture_curve(
            base, times, np.random.default_rng(seed), busy=1.0, still=gait.stride == 0
        )
        assert is_within(curve)
        assert np.abs(curve - base).max() > 0.5


def test_the_limits_move_only_what_exceeds_them() -> None:
    pose = np.zeros((24, 3))
    pose[4] = 3.0, 0, 0
    pose[5] = -1.0, 0.1, 0
    held = within_limits(pose)
    np.testing.assert_array_equal(held[4], [LIMITS[4, 1, 0], 0, 0])
    np.testing.assert_array_equal(held[5], [LIMITS[5, 0, 0], 0.1, 0])


def test_gestures_come_and_go_smoothly() -> None:
    base = gait_curve(Gait(stride=0, arm_swing=0), 250)
    curve = gesture_curve(
        base, np.arange(250) / FPS, np.random.default_rng(1), busy=0.9, still=True
    )
    matrices = rotation_matrices(curve)
    turn = Rotation.from_matrix(
        (matrices[:-1].swapaxes(-1, -2) @ matrices[1:]).reshape(-1, 3, 3)
    ).magnitude()
    assert np.degrees(turn.max()) < 45  # per frame; a quick throw
    assert np.degrees(np.percentile(turn, 99)) < 20


def test_a_seed_gives_one_curve_and_none_busy_gives_the_gait() -> None:
    base = gait_curve(Gait(), 60)
    times = np.arange(60) / FPS

    def curve(seed: int, busy: float) -> F64:
        return gesture_curve(base, times, np.random.default_rng(seed), busy=busy, still=False)

    np.testing.assert_array_equal(curve(1, 0.8), curve(1, 0.8))
    assert np.abs(curve(1, 0.8) - curve(2, 0.8)).max() > 0.3
    assert np.abs(curve(1, 0.0) - base).max() < 0.35  # only the trembling


def test_a_mirrored_pose_is_the_mirror_image(body: SmplBody) -> None:
    pose = PoseSampler().sample(np.random.default_rng(5))
    both = torch.from_numpy(rotation_matrices(np.stack([pose, mirrored(pose)]))).float()
    joints = body(both[:, :1], both[:, 1:], torch.zeros(2, 10)).joints
    left, right = [16, 18, 20, 4, 7], [17, 19, 21, 5, 8]
    image = joints[0, left] * torch.tensor([-1.0, 1, 1])
    torch.testing.assert_close(image, joints[1, right], atol=0.01, rtol=0)


def test_acting_people_stand_on_the_floor_and_keep_their_way(body: SmplBody) -> None:
    times = np.arange(50) / FPS
    betas = torch.zeros(10)
    walked = walk(
        body, betas, Gait(), times_s=times, position_m=(0, 0), heading_deg=70, turn_deg_per_m=20
    )
    acted = act(body, betas, walked, times, np.random.default_rng(0), busy=0.9, still=False)
    out = body(acted.global_orient, acted.body_pose, betas.expand(50, -1))
    lowest = (out.vertices + acted.transl_m[:, None])[..., 1].amin(dim=1)
    assert lowest.abs().max() < 1e-4
    torch.testing.assert_close(acted.transl_m[:, [0, 2]], walked.transl_m[:, [0, 2]])


def test_every_gesture_is_either_for_walkers_or_for_those_who_stand() -> None:
    assert set(MOVING) | set(STILL) == set(GESTURES)
    assert not set(MOVING) & set(STILL)
    for name, gesture in GESTURES.items():
        pose = np.zeros((24, 3))
        for joint, angles in gesture.joints.items():
            pose[joint] = np.radians(angles)
        assert is_within(pose), name


def pa_mpjpe_mm(points: F64, to: F64) -> F64:
    """(N,) of (N, J, 3) after the best similarity."""
    a, b = points - points.mean(1, keepdims=True), to - to.mean(1, keepdims=True)
    u, s, vt = np.linalg.svd(a.swapaxes(1, 2) @ b)
    sign = np.sign(np.linalg.det(u @ vt))
    s[:, -1] *= sign
    u[:, :, -1] *= sign[:, None]
    scale = s.sum(1) / (a**2).sum((1, 2))
    fitted = scale[:, None, None] * a @ (u @ vt)
    return np.asarray(1000 * np.linalg.norm(fitted - b, axis=2).mean(1))


def test_the_mean_pose_scores_badly_on_sampled_poses(body: SmplBody) -> None:
    rng = np.random.default_rng(0)
    sampler = PoseSampler()
    matrices = torch.from_numpy(
        rotation_matrices(np.stack([sampler.sample(rng) for _ in range(200)]))
    ).float()
    body_pose = matrices[:, 1:]
    identity = torch.eye(3).expand(200, 1, 3, 3)
    joints = body.keypoints_3d(identity, body_pose, torch.zeros(200, 10)).double().numpy()[:, 25:39]
    u, _, vt = torch.linalg.svd(body_pose.mean(0))
    mean = body.keypoints_3d(identity[:1], (u @ vt)[None], torch.zeros(1, 10)).double().numpy()
    error = pa_mpjpe_mm(np.repeat(mean[:, 25:39], 200, axis=0), joints)
    assert error.mean() > MEAN_POSE_PA_MPJPE_MM
    assert pa_mpjpe_mm(joints * 1.1 + 3, joints).max() < 1e-6

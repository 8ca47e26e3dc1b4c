from __future__ import annotations

import numpy as np
import pytest
import torch

from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.synthetic.motion import (
    BIG_TOE_KEYPOINTS,
    HEEL_KEYPOINTS,
    BodyOutput,
    Gait,
    Motion,
    gait_pose,
    walk,
)

FPS = 25
NOSE, NECK, MID_HIP = 0, 1, 8


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


def seconds(duration_s: float) -> np.ndarray:
    return np.arange(round(duration_s * FPS)) / FPS


def pose(body: SmplBody, path: Motion) -> BodyOutput:
    return body(path.global_orient, path.body_pose, torch.zeros(len(path.transl_m), 10))


def test_rotations_are_proper() -> None:
    rotations = gait_pose(np.linspace(0, 2 * np.pi, 17), Gait())
    np.testing.assert_allclose(
        rotations @ rotations.swapaxes(-1, -2),
        np.broadcast_to(np.eye(3), rotations.shape),
        atol=1e-9,
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-9)


def test_the_gait_is_periodic_and_its_halves_mirror_each_other() -> None:
    phase = np.linspace(0, 2 * np.pi, 9)
    here, later = gait_pose(phase, Gait()), gait_pose(phase + 2 * np.pi, Gait())
    np.testing.assert_allclose(here, later, atol=1e-9)
    mirror = np.diag([-1.0, 1, 1])
    half = gait_pose(phase + np.pi, Gait())
    for left, right in ((1, 2), (4, 5), (7, 8), (16, 17), (18, 19), (0, 0), (6, 6)):
        np.testing.assert_allclose(mirror @ here[:, left] @ mirror, half[:, right], atol=1e-9)


def test_somebody_walks_upright_forwards_and_on_the_floor(body: SmplBody) -> None:
    path = walk(
        body, torch.zeros(10), Gait(), times_s=seconds(3), position_m=(1.0, -2.0), heading_deg=90
    )
    out = pose(body, path)
    vertices = out.vertices + path.transl_m[:, None]
    keypoints = out.keypoints_3d + path.transl_m[:, None]
    lowest = vertices[..., 1].amin(dim=1)
    assert lowest.abs().max() < 0.004  # the root's path is interpolated between samples
    assert (keypoints[:, NOSE, 1] > 1.4).all()
    trunk = torch.nn.functional.normalize(keypoints[:, NECK] - keypoints[:, MID_HIP], dim=1)
    assert (trunk[:, 1] > 0.97).all()
    pelvis = out.joints[:, 0] + path.transl_m
    torch.testing.assert_close(pelvis[0, [0, 2]], torch.tensor([1.0, -2.0]), atol=1e-5, rtol=0)
    assert (pelvis[1:, 0] > pelvis[:-1, 0]).all()  # to the right, never back
    assert (pelvis[:, 2] + 2).abs().max() < 1e-4
    speed = float(pelvis[-1, 0] - pelvis[0, 0]) / (seconds(3)[-1])
    assert 1.0 < speed < 1.5  # m/s, a brisk but ordinary walk
    assert (keypoints[:, NOSE, 0] > keypoints[:, NECK, 0]).all()  # looks where it goes


def test_a_loaded_foot_hardly_slides(body: SmplBody) -> None:
    gait = Gait()
    path = walk(body, torch.zeros(10), gait, times_s=seconds(2), position_m=(0, 0), heading_deg=0)
    feet = (pose(body, path).keypoints_3d + path.transl_m[:, None])[
        :, [HEEL_KEYPOINTS, BIG_TOE_KEYPOINTS]
    ].mean(dim=1)  # (T, 2, 3)
    phase = 2 * np.pi * gait.cycles_per_s * seconds(2)
    for side, sign in ((0, 1), (1, -1)):
        stance = np.flatnonzero(sign * np.sin(phase) > 0.7)
        for run in np.split(stance, np.flatnonzero(np.diff(stance) > 1) + 1):
            span = np.ptp(feet[run, side].numpy(), axis=0)
            assert max(span[0], span[2]) < 0.06  # metres, of a stride of 1.3 m


def test_legs_and_arms_of_one_side_swing_against_each_other(body: SmplBody) -> None:
    path = walk(body, torch.zeros(10), Gait(), times_s=seconds(2), position_m=(0, 0), heading_deg=0)
    out = pose(body, path)
    wrist, ankle, pelvis = out.joints[:, 20, 2], out.joints[:, 7, 2], out.joints[:, 0, 2]
    together = np.corrcoef((wrist - pelvis).numpy(), (ankle - pelvis).numpy())[0, 1]
    assert together < -0.6


def test_a_turning_walk_follows_its_arc(body: SmplBody) -> None:
    path = walk(
        body,
        torch.zeros(10),
        Gait(),
        times_s=seconds(4) - 2,
        position_m=(0, 0),
        heading_deg=0,
        turn_deg_per_m=60,
    )
    pelvis = (pose(body, path).joints[:, 0] + path.transl_m).numpy()
    radius = 1 / np.radians(60)
    to_center = np.hypot(pelvis[:, 0] - radius, pelvis[:, 2])
    np.testing.assert_allclose(to_center, radius, atol=1e-4)
    step = np.diff(pelvis[:, [0, 2]], axis=0)
    forward = path.global_orient[:-1, 0, :, 2].numpy()[:, [0, 2]]
    cosine = (
        (step * forward).sum(axis=1)
        / np.linalg.norm(step, axis=1)
        / np.linalg.norm(forward, axis=1)
    )
    assert cosine.min() > 0.97


def test_without_stride_somebody_stands(body: SmplBody) -> None:
    path = walk(
        body,
        torch.zeros(10),
        Gait(stride=0, arm_swing=0),
        times_s=seconds(1),
        position_m=(0, 0),
        heading_deg=0,
    )
    assert np.ptp(path.transl_m.numpy(), axis=0).max() < 1e-5


def test_taller_people_take_longer_steps(body: SmplBody) -> None:
    def speed(first_beta: float) -> float:
        betas = torch.zeros(10)
        betas[0] = first_beta
        path = walk(body, betas, Gait(), times_s=seconds(2), position_m=(0, 0), heading_deg=0)
        return float(path.transl_m[-1, 2] - path.transl_m[0, 2])

    assert speed(2.0) > 1.03 * speed(-2.0)

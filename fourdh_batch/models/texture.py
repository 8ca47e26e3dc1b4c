"""How people look, laid out on the body: from a posed mesh and its crop to a texture map.

Every texel of the map is a fixed point of the surface. It gets the colour of the crop pixel onto
which that point falls, and counts as seen where nothing of the body stands in front of it and the
person's mask covers the pixel.

`B` people, `V` vertices, `F` faces, `N` texels that lie on the body, `S` = 256 side of map and
crop.

Source: docs/PHALP.md, sections 3 (sampler), 2.2 (crop) and 15 (far plane).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fourdh_batch.errors import CheckpointError
from fourdh_batch.geometry import CROP_FOCAL_PX, CROP_PX
from fourdh_batch.models.smpl import SmplBody
from fourdh_batch.rasterizer import NEAR_M, rasterize, rasterize_depth
from fourdh_batch.types import F32, I64

ATLAS_PX = 256
NUM_CHANNELS = 4  # RGB and mask
FACE_FILE, WEIGHT_FILE = "fmap_256.npy", "bmap_256.npy"

# The crop as the depth renderer counts it: pixel i reaches from i to i + 1, so that its middle,
# 128, is our 127.5. The network's own keypoints lie half a pixel beside that, as published.
CROP_CENTER_PX = (CROP_PX - 1) / 2
DEPTH_TOLERANCE_M = 1e-4
MAX_WEIGHT_ERROR = 1e-3  # of a stored atlas: how far a point may lie beside its face
RGB_SCALE = 5.0  # normalised colours are divided by this

# What crops are normalised with, of 0..255 pixels; `video.crops` has the same.
MEAN_RGB = (123.675, 116.28, 103.53)
STD_RGB = (58.395, 57.12, 57.375)


@dataclass(frozen=True, slots=True, eq=False)
class Atlas:
    """Which point of the surface every texel shows.

    Attributes:
        face: (S, S) int64 number of the face, -1 where a texel shows nothing.
        barycentric: (S, S, 3) float32 weights of the face's corners; 0 where it shows nothing.
        digest: SHA-256 of both, 64 hex digits.
    """

    face: I64
    barycentric: F32

    def __post_init__(self) -> None:
        shape = (ATLAS_PX, ATLAS_PX)
        if self.face.shape != shape or self.barycentric.shape != (*shape, 3):
            raise ValueError(
                f"expected face {shape} and barycentric {(*shape, 3)}, "
                f"got {self.face.shape} and {self.barycentric.shape}"
            )

    @property
    def texels(self) -> I64:
        """(N,) texels that show something, row by row from the top."""
        return np.flatnonzero(self.face >= 0)

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for array in (self.face.astype("<i8"), self.barycentric.astype("<f4")):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def load_atlas(folder: str | Path, *, num_faces: int) -> Atlas:
    """The published atlas: ``fmap_256.npy`` and ``bmap_256.npy``.

    Args:
        folder: holds both files.
        num_faces: faces of the body that the atlas is for.

    Raises:
        CheckpointError: a file is missing, is no plain array, or does not fit.
    """
    face_path, weight_path = Path(folder) / FACE_FILE, Path(folder) / WEIGHT_FILE
    face = _read_npy(face_path, (ATLAS_PX, ATLAS_PX))
    barycentric = _read_npy(weight_path, (ATLAS_PX, ATLAS_PX, 3))
    is_used = face >= 0
    if not np.array_equal(face, np.floor(face)) or not is_used.any() or face.max() >= num_faces:
        raise CheckpointError(
            f"{face_path}: expected whole numbers below {num_faces}, negative where a texel is "
            f"empty and not all of them, got {face.min()} to {face.max()}"
        )
    if not np.isfinite(barycentric[is_used]).all():
        raise CheckpointError(f"{weight_path}: expected finite weights, got NaN or inf")
    weights = barycentric[is_used].astype(np.float64)
    with np.errstate(over="ignore"):
        total = weights.sum(axis=-1)
    if weights.min() < -MAX_WEIGHT_ERROR or np.abs(total - 1).max() > MAX_WEIGHT_ERROR:
        raise CheckpointError(
            f"{weight_path}: expected weights of at least {-MAX_WEIGHT_ERROR} whose sums are "
            f"within {MAX_WEIGHT_ERROR} of 1, got weights from {weights.min():g} and sums from "
            f"{total.min():g} to {total.max():g}"
        )
    return Atlas(
        face=np.where(is_used, face, -1).astype(np.int64),
        barycentric=np.where(is_used[..., None], barycentric, 0).astype(np.float32),
    )


def body_atlas(body: SmplBody) -> Atlas:
    """The atlas of the body's own texture coordinates.

    The map is a picture as usual: u runs along its rows from left to right, v up its columns, so
    that texel (row i, column j) shows (u, v) = ((j + 0.5) / 256, 1 - (i + 0.5) / 256). Texels
    whose centre lies in no triangle are empty; where triangles overlap, the first face counts.

    Raises:
        CheckpointError: the body has no texture coordinates.
    """
    if body.vt is None or body.ft is None:
        raise CheckpointError(
            f"body {body.name}: expected texture coordinates (vt, ft), got none; give "
            f"tracker.atlas=FOLDER with {FACE_FILE} and {WEIGHT_FILE} of the PHALP data"
        )
    flat = np.ones((len(body.vt), 3), np.float32)  # at depth 1 perspective changes nothing
    flat[:, :2] = body.vt
    flat[:, 1] = 1 - flat[:, 1]
    seen = rasterize(
        torch.from_numpy(flat)[None],
        torch.from_numpy(body.ft),
        focal_px=ATLAS_PX,
        principal_point_px=(-0.5, -0.5),
        image_size_hw=(ATLAS_PX, ATLAS_PX),
    )
    return Atlas(face=seen.face_index[0].numpy(), barycentric=seen.barycentric[0].numpy())


class TextureSampler(nn.Module):
    """Takes texture maps off crops.

    Args:
        faces: (F, 3) vertex numbers of the body.
        atlas: of the same faces.
    """

    _faces: Tensor
    _corners: Tensor
    _weights: Tensor
    _texels: Tensor

    def __init__(self, faces: I64, atlas: Atlas) -> None:
        super().__init__()
        texels = atlas.texels
        corners = faces[atlas.face.ravel()[texels]]  # (N, 3)
        weights = atlas.barycentric.reshape(-1, 3)[texels]
        arrays: dict[str, NDArray[Any]] = {
            "_faces": faces,
            "_corners": corners.T,  # (3, N)
            "_weights": weights.T[..., None],  # (3, N, 1)
            "_texels": texels,
        }
        for name, array in arrays.items():
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            self.register_buffer(name, tensor, persistent=False)

    @torch.no_grad()
    def sample(
        self,
        vertices: Tensor,
        pred_cam_t: Tensor,
        crop_rgb: Tensor,
        crop_mask: Tensor,
        *,
        depth: Tensor | None = None,
    ) -> Tensor:
        """Texture maps of people; a person's map does not depend on its companions.

        Bodies beyond the far plane of 100 m (s below 0.39) get an empty map, and near silhouettes
        some texels of the far side count as seen, both as in the reference. Points behind the
        camera are never seen.

        Args:
            vertices: (B, V, 3) float32 metres, camera not added.
            pred_cam_t: (B, 3) float32 metres, translation of the crop camera.
            crop_rgb: (B, 3, S, S) float32, normalised.
            crop_mask: (B, S, S) float32 in [0, 1].
            depth: (B, S, S) metres, 100 where nothing is seen; None: drawn here.

        Returns:
            (B, 4, S, S) float32: normalised RGB / 5, 0 where it is not seen; +1 where the person
            is seen, -1 elsewhere.

        Source: docs/PHALP.md, section 3.
        """
        points_cam = vertices + pred_cam_t[:, None]
        if depth is None:
            depth = self.draw_depth(points_cam)
        x, y, z = (
            sum(
                coordinate.index_select(1, corner) * weight
                for corner, weight in zip(self._corners, self._weights[..., 0], strict=True)
            )
            for coordinate in points_cam.unbind(dim=-1)
        )  # (B, N) each
        scale = CROP_FOCAL_PX / (CROP_PX / 2)
        grid = torch.stack((scale * x / z, scale * y / z), dim=-1)[:, None]  # (B, 1, N, 2)
        picture = torch.cat((crop_rgb, crop_mask[:, None], depth[:, None]), dim=1)
        found = F.grid_sample(picture, grid, padding_mode="zeros", align_corners=False)[:, :, 0]
        is_seen = (z <= found[:, 4] + DEPTH_TOLERANCE_M) & (z > NEAR_M) & (found[:, 3] != 0)
        values = torch.where(is_seen[:, None], found[:, :NUM_CHANNELS], 0).div_(RGB_SCALE)
        values[:, 3] = is_seen.float().mul_(2).sub_(1)

        num = len(vertices)
        texture = vertices.new_zeros(num, NUM_CHANNELS, ATLAS_PX * ATLAS_PX)
        texture[:, 3] = -1
        texture.scatter_(2, self._texels.expand_as(values), values)
        return texture.view(num, NUM_CHANNELS, ATLAS_PX, ATLAS_PX)

    def draw_depth(self, points_cam: Tensor) -> Tensor:
        """(B, V, 3) metres in camera axes to what the crop camera sees, (B, S, S) metres."""
        return rasterize_depth(
            points_cam,
            self._faces,
            focal_px=CROP_FOCAL_PX,
            principal_point_px=(CROP_CENTER_PX, CROP_CENTER_PX),
            image_size_hw=(CROP_PX, CROP_PX),
        )


def pack_texture(texture: Tensor) -> Tensor:
    """Texture maps in a quarter of the memory, as they travel between processes.

    Args:
        texture: (B, 4, S, S) float32 of `TextureSampler.sample`.

    Returns:
        (B, 4, S, S) uint8: grey levels of RGB where the person is seen, 0 elsewhere; 255 where the
        person is seen, 0 elsewhere.
    """
    mean, scale = _levels(texture.device)
    is_seen = texture[:, 3:] > 0
    packed = torch.empty(texture.shape, dtype=torch.uint8, device=texture.device)
    levels = (texture[:, :3] * scale).add_(mean).round_().clamp_(0, 255)
    packed[:, :3] = levels.mul_(is_seen)
    packed[:, 3:] = is_seen.byte() * 255
    return packed


def unpack_texture(packed: Tensor) -> Tensor:
    """Inverse of `pack_texture` up to half a grey level; the mask is exact.

    Args:
        packed: (B, 4, S, S) uint8.

    Returns:
        (B, 4, S, S) float32, as `TextureSampler.sample` gives it.
    """
    mean, scale = _levels(packed.device)
    is_seen = packed[:, 3:] > 0
    texture = torch.empty(packed.shape, device=packed.device)
    texture[:, :3] = ((packed[:, :3].float() - mean) / scale).mul_(is_seen)
    texture[:, 3:] = is_seen.float().mul_(2).sub_(1)
    return texture


def _levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two (3, 1, 1): grey level of a value 0, and grey levels per unit."""
    mean = torch.tensor(MEAN_RGB, device=device)[:, None, None]
    std = torch.tensor(STD_RGB, device=device)[:, None, None]
    return mean, std * RGB_SCALE


def _read_npy(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: expected an .npy of numbers, got {error}") from error
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.kind not in "iuf":
        raise CheckpointError(
            f"{path}: expected numbers {shape}, got {getattr(array, 'shape', type(array))} "
            f"{getattr(array, 'dtype', '')}"
        )
    return array

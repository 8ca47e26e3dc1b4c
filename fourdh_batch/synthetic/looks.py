"""Outfits on texture maps as the pipeline sees them: in part, in some light, a little out of place.

A *view* is a posed body before the crop camera and an estimate of it that is a few degrees off, as
an estimate is. Which texels the estimate shows, and which point of the true body each of them
then takes its colour from, does not depend on clothes: views are made once, and any outfit can be
worn in any of them.

Dimension letters: `V` vertices, `N` texels of the map that lie on the body, `M` texels that are
seen in a view, `S` side of a map, 256 or a half, a quarter, ... of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from fourdh_batch.geometry import CROP_FOCAL_PX, CROP_PX
from fourdh_batch.models.smpl import SmplBody
from fourdh_batch.models.texture import (
    ATLAS_PX,
    CROP_CENTER_PX,
    MEAN_RGB,
    RGB_SCALE,
    STD_RGB,
    TextureSampler,
    body_atlas,
)
from fourdh_batch.rasterizer import rasterize
from fourdh_batch.synthetic.gestures import NUM_JOINTS, PoseSampler, rotation_matrices
from fourdh_batch.synthetic.scene import Light, shading, vertex_normals
from fourdh_batch.synthetic.wardrobe import Outfit, Wardrobe, random_outfits
from fourdh_batch.types import NUM_BETAS

CLOTH_M = 0.01  # by which clothes stand off the body of a view
# Standard deviations of the estimate: of joints about each axis (one drawn for every view, between
# those of a good network and of a small one), of betas, of the place and the logarithm of the size
# in the crop.
JOINT_DEG = (2.0, 14.0)
BETAS, SHIFT_M, SCALE = 0.3, 0.03, 0.03
# Standard deviations of what a camera makes of one light in two pictures: of each channel, and of
# the logarithm of all together.
TINT, EXPOSURE = 0.015, 0.04
NO_MASK_SHARE = 0.3  # of the views: the detector gives no mask, the crop counts as a whole
WAIST_SHARE = 0.2  # the picture ends below the waist
THING_SHARE = 0.3  # something stands in front
ANY_COLOUR_SHARE = 0.5  # of the outfits have colours that no wardrobe holds
VIEWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What a texture map shows of a body, whatever it wears.

    Attributes:
        texel: (M,) of the S * S of the map, row by row from the top.
        corner: (M, 3) vertices around the point that gives the colour.
        weight: (M, 3) of these vertices; 0 where the texel shows what is behind the person.
        normal: (M, 3) there, world axes.
    """

    texel: Tensor
    corner: Tensor
    weight: Tensor
    normal: Tensor


class LookStudio:
    """Outfits, views, and maps of both.

    Args:
        body: with texture coordinates, on the CPU.
        seed: of the views.
        map_px: side S of the maps.
        num_views: that are made.

    Raises:
        ValueError: 256 is no multiple of the side.
        CheckpointError: the body has no texture coordinates.
    """

    def __init__(self, body: SmplBody, *, seed: int, map_px: int, num_views: int) -> None:
        if map_px < 1 or ATLAS_PX % map_px:
            raise ValueError(f"map_px: expected a divisor of {ATLAS_PX}, got {map_px}")
        self.map_px = map_px
        self._body = body
        self._faces = torch.from_numpy(body.faces)
        self._wardrobe = Wardrobe(body)
        atlas = body_atlas(body)
        self._sampler = TextureSampler(body.faces, atlas)
        every = ATLAS_PX // map_px
        face = torch.from_numpy(atlas.face[::every, ::every].reshape(-1).copy())
        self.texel = (face >= 0).nonzero()[:, 0]  # (N,) that lie on the body
        self._corner = self._faces[face[self.texel]]
        weight = atlas.barycentric[::every, ::every].reshape(-1, 3)
        self._weight = torch.from_numpy(weight.copy())[self.texel]
        self._poses = PoseSampler()
        self.views: list[View] = []
        for first in range(0, num_views, VIEWS_AT_ONCE):
            numbers = range(first, min(first + VIEWS_AT_ONCE, num_views))
            self.views += self._make_views([np.random.default_rng((seed, n)) for n in numbers])

    def colours(self, rng: np.random.Generator) -> Tensor:
        """(V, 3) of a random outfit."""
        outfit = random_outfits(rng, 1)[0]
        if rng.random() < ANY_COLOUR_SHARE:
            outfit = _recoloured(outfit, rng)
        return self._wardrobe.dress(outfit)[0]

    def whole(self, colours: Tensor) -> Tensor:
        """(3, S, S) normalised RGB of all texels in even light, 0 beside the body."""
        seen = (colours[self._corner] * self._weight[..., None]).sum(dim=1)
        return self._map(self.texel, seen)

    def look(self, colours: Tensor, view: View, light: Light, rng: np.random.Generator) -> Tensor:
        """(3, S, S) normalised RGB of what a view shows in a light, 0 elsewhere; with noise."""
        worn = (colours[view.corner] * view.weight[..., None]).sum(dim=1)
        tint = rng.normal(1, TINT, 3) * np.exp(rng.normal(0, EXPOSURE))
        seen = worn * torch.from_numpy(tint).float() * shading(view.normal, light)
        behind = torch.from_numpy(rng.uniform(0.05, 0.95, 3)).float()
        seen = torch.where(view.weight.sum(dim=1, keepdim=True) > 0, seen, behind)
        noise = rng.standard_normal(tuple(seen.shape), np.float32) * rng.uniform(0, 0.04)
        return self._map(view.texel, seen + torch.from_numpy(noise))

    def mask(self, view: View) -> Tensor:
        """(S, S) 1 where a view shows something, else 0."""
        mask = torch.zeros(self.map_px**2)
        mask[view.texel] = 1
        return mask.view(self.map_px, self.map_px)

    def _map(self, texel: Tensor, rgb: Tensor) -> Tensor:
        normalised = (rgb.clamp(0, 1) * 255 - torch.tensor(MEAN_RGB)) / torch.tensor(STD_RGB)
        flat = torch.zeros(3, self.map_px**2)
        flat[:, texel] = (normalised / RGB_SCALE).T
        return flat.view(3, self.map_px, self.map_px)

    @torch.no_grad()
    def _make_views(self, rngs: list[np.random.Generator]) -> list[View]:
        num = len(rngs)
        pose = rotation_matrices(np.stack([self._poses.sample(rng) for rng in rngs]))
        turn = np.stack([_turn(rng) for rng in rngs])  # world to camera
        pose[:, 0] = turn @ pose[:, 0]
        betas = np.stack([rng.normal(0, 0.9, NUM_BETAS).clip(-2, 2) for rng in rngs])
        wrong = np.stack([rng.normal(0, rng.uniform(*JOINT_DEG), (NUM_JOINTS, 3)) for rng in rngs])
        told_pose = pose @ rotation_matrices(np.radians(wrong))
        told_betas = betas + np.stack([rng.normal(0, BETAS, NUM_BETAS) for rng in rngs])

        naked = self._vertices(pose, betas)
        normal = vertex_normals(naked, self._faces)
        vertices = naked + CLOTH_M * normal
        cam_t = torch.stack([_crop_camera(v, rng) for v, rng in zip(vertices, rngs, strict=True)])
        seen = rasterize(
            vertices + cam_t[:, None],
            self._faces,
            focal_px=CROP_FOCAL_PX,
            principal_point_px=(CROP_CENTER_PX, CROP_CENTER_PX),
            image_size_hw=(CROP_PX, CROP_PX),
            facing_only=True,
        )
        masks = torch.stack(
            [_mask(face >= 0, rng) for face, rng in zip(seen.face_index, rngs, strict=True)]
        )
        told = self._vertices(told_pose, told_betas)
        told_cam_t = cam_t * torch.tensor([1.0, 1.0, 0.0])
        told_cam_t += torch.from_numpy(np.stack([_off(rng) for rng in rngs])).float()
        told_cam_t[:, 2] = cam_t[:, 2] * told_cam_t[:, 2].exp()
        maps = self._sampler.sample(
            told, told_cam_t, torch.zeros(num, 3, CROP_PX, CROP_PX), masks.float()
        )
        every = ATLAS_PX // self.map_px
        shown = maps[:, 3, ::every, ::every].reshape(num, -1)[:, self.texel] > 0  # (B, N)
        upright = normal @ torch.from_numpy(turn).float()  # camera to world
        views = []
        for i in range(num):
            rows = shown[i].nonzero()[:, 0]
            point = (told[i][self._corner[rows]] * self._weight[rows][..., None]).sum(dim=1)
            x, y, z = (point + told_cam_t[i]).unbind(dim=1)
            column, row = (
                (CROP_FOCAL_PX * along / z + CROP_CENTER_PX).round().long().clamp(0, CROP_PX - 1)
                for along in (x, y)
            )
            face, weight = seen.face_index[i, row, column], seen.barycentric[i, row, column]
            corner = self._faces[face.clamp(min=0)]
            there = (upright[i][corner] * weight[..., None]).sum(dim=1)
            views.append(View(self.texel[rows], corner, weight, there))
        return views

    def _vertices(self, pose: np.ndarray, betas: np.ndarray) -> Tensor:
        rotations = torch.from_numpy(pose).float()
        out = self._body(rotations[:, :1], rotations[:, 1:], torch.from_numpy(betas).float())
        vertices: Tensor = out.vertices
        return vertices


def _recoloured(outfit: Outfit, rng: np.random.Generator) -> Outfit:
    top, second, trousers, shoes = (tuple(rgb) for rgb in rng.uniform(0.03, 0.97, (4, 3)).tolist())
    return replace(outfit, top=top, second=second, trousers=trousers, shoes=shoes)


def _turn(rng: np.random.Generator) -> np.ndarray:
    """(3, 3) world to camera: from anywhere around, mostly level."""
    angles = [rng.normal(0, 5), rng.normal(6, 9), rng.uniform(-180, 180)]
    turn = Rotation.from_euler("ZXY", angles, degrees=True).as_matrix()
    return np.asarray(np.diag([1.0, -1, -1]) @ turn)


def _crop_camera(vertices: Tensor, rng: np.random.Generator) -> Tensor:
    """(3,) metres: the body of vertices (V, 3) fills the crop, more or less."""
    low, high = vertices.amin(dim=0), vertices.amax(dim=0)
    width, height = (high - low)[:2].tolist()
    side_m = max(height, width * 4 / 3) * float(np.exp(rng.normal(0.05, 0.1)))
    shift = torch.from_numpy(rng.normal(0, 0.03, 2) * side_m).float()
    depth = torch.tensor([CROP_FOCAL_PX * side_m / CROP_PX])
    return torch.cat([shift - (low + high)[:2] / 2, depth])


def _off(rng: np.random.Generator) -> np.ndarray:
    """(3,) what the estimate is off: metres in x and y, the logarithm of the depth."""
    return np.array([rng.normal(0, SHIFT_M), rng.normal(0, SHIFT_M), rng.normal(0, SCALE)])


def _mask(person: Tensor, rng: np.random.Generator) -> Tensor:
    """(256, 256) bool, what the detector says of where the person (likewise) is."""
    mask = torch.ones_like(person) if rng.random() < NO_MASK_SHARE else person.clone()
    if rng.random() < WAIST_SHARE:
        mask[int(rng.uniform(0.5, 0.8) * CROP_PX) :] = False
    if rng.random() < THING_SHARE:
        top, left = (int(v) for v in rng.uniform(0, 0.8, 2) * CROP_PX)
        high, wide = (int(v) for v in rng.uniform(0.1, 0.4, 2) * CROP_PX)
        mask[top : top + high, left : left + wide] = False
    return mask

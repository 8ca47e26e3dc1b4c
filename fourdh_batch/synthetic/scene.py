"""Pictures of people in a place: light, shadows, things that stand in the way.

World axes: x right, y up, z towards the viewer; the floor is y = 0, a wall stands at the back;
metres. Camera axes: x right, y down, z forward. Colours are RGB in [0, 1] until the picture is
quantised. Dimension letters: `P` people, `V` vertices, `F` faces, `H`, `W` picture size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor

from fourdh_batch.rasterizer import FAR_M, Fragments, rasterize, rasterize_depth
from fourdh_batch.synthetic.camera import Camera
from fourdh_batch.synthetic.rooms import SUPERSAMPLING, Backdrop, area_mean
from fourdh_batch.types import F32, U8, Bool

SHADOW = 0.38  # of the light that a shadow takes away, times the light's strength
SHADOW_BLUR_PX = 3


@dataclass(frozen=True, slots=True)
class Light:
    """One sun or lamp and a sky.

    Attributes:
        to: towards the light, world axes, any length; above the floor.
        ambient: brightness of what the light does not reach.
        diffuse: brightness that the light adds where it falls straight.
        colour: of the light.
    """

    to: tuple[float, float, float] = (0.45, 0.75, 0.5)
    ambient: float = 0.5
    diffuse: float = 0.6
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)


DAYLIGHT = Light()


def random_light(rng: np.random.Generator) -> Light:
    """From above, anywhere around; soft to hard, warm to cold, dim to bright."""
    around, height = rng.uniform(-np.pi, np.pi), rng.uniform(0.5, 2.0)
    ambient = rng.uniform(0.35, 0.7)
    warm = rng.uniform(-0.08, 0.08)
    return Light(
        to=(float(np.sin(around)), float(height), float(np.cos(around))),
        ambient=float(ambient),
        diffuse=float(rng.uniform(0.85, 1.2) - ambient),
        colour=(1 + float(warm), 1.0, 1 - float(warm)),
    )


@dataclass(frozen=True, slots=True)
class Block:
    """A box on the floor that hides what is behind it: a pillar, a table, a wall.

    Attributes:
        position_m: (x, z) of its middle.
        size_m: (width, height, depth).
        turn_deg: about the vertical.
        colour: of its sides.
    """

    position_m: tuple[float, float]
    size_m: tuple[float, float, float]
    turn_deg: float = 0.0
    colour: tuple[float, float, float] = (0.6, 0.55, 0.5)

    def mesh(self) -> tuple[Tensor, Tensor]:
        """(24, 3) corners in the world, and (12, 3) faces; every side has its own four corners."""
        sign = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], float)
        sides = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))
        corners = sign[np.array(sides).reshape(-1)] * np.array(self.size_m) / 2
        corners[:, 1] += self.size_m[1] / 2
        corners = Rotation.from_euler("y", self.turn_deg, degrees=True).apply(corners)
        corners += np.array([self.position_m[0], 0.0, self.position_m[1]])
        faces = [[4 * s, 4 * s + a, 4 * s + a + 1] for s in range(6) for a in (1, 2)]
        return torch.from_numpy(corners).float(), torch.tensor(faces)


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A rendered frame.

    Attributes:
        rgb: (H, W, 3) float32 in [0, 1].
        visible_fraction: (P,) float32, share of each person's pixels that is seen: neither
            hidden by somebody or something else nor outside the picture.
        owner: (H * n, W * n) int64, n = `SUPERSAMPLING`: which of the P people is seen; -1 the
            backdrop, P something that stands in the way.
    """

    rgb: Tensor
    visible_fraction: F32
    owner: Tensor

    def mask(self) -> Bool:
        """(P, H, W) pixels of which a person is seen in at least a half."""
        mine = self.owner[..., None] == torch.arange(len(self.visible_fraction))
        return (area_mean(mine.float()) >= 0.5).permute(2, 0, 1).numpy()


def render(
    camera: Camera,
    backdrop: Backdrop,
    vertices_m: Tensor,
    colours: Tensor,
    faces: Tensor,
    *,
    normals: Tensor | None = None,
    light: Light = DAYLIGHT,
    blocks: Sequence[Block] = (),
) -> Picture:
    """People in a place.

    Args:
        vertices_m: (P, V, 3) in the world; people behind the camera are not drawn.
        colours: (P, V, 3).
        faces: (F, 3).
        normals: (P, V, 3) of the surface, world axes; None: found from the faces.
    """
    width, height = camera.image_size_wh
    canvas = _Canvas((height * SUPERSAMPLING, width * SUPERSAMPLING))
    num_people = len(vertices_m)
    whole = torch.zeros(num_people)
    if num_people:
        if normals is None:
            normals = vertex_normals(vertices_m, faces)
        shaded = colours * shading(normals, light)
        vertices_cam = camera.to_camera(vertices_m)
        for p in range(num_people):
            seen, left, top = _draw_whole(camera, vertices_cam[p], faces)
            whole[p] = (seen.depth < FAR_M).sum()
            canvas.add(seen, left, top, shaded[p], faces, p)
    solid = [block.mesh() for block in blocks]
    center_x, center_y = _finer(torch.tensor(camera.principal_point_px)).tolist()
    for block, (corners, sides) in zip(blocks, solid, strict=True):
        seen = rasterize(
            camera.to_camera(corners)[None],
            sides,
            focal_px=camera.focal_px * SUPERSAMPLING,
            principal_point_px=(center_x, center_y),
            image_size_hw=canvas.size_hw,
        )
        canvas.add(seen, 0, 0, block_colours(block, corners, light), sides, num_people)

    behind = backdrop.rgb * torch.tensor(light.colour)
    if num_people or blocks:
        casting = [(vertices_m, faces), *((corners[None], sides) for corners, sides in solid)]
        behind = behind * _shadow(camera, backdrop, casting, light)[..., None]
    covered = area_mean((canvas.owner >= 0).float()[..., None])
    rgb = area_mean(canvas.front) + behind * (1 - covered)
    people = canvas.owner[(canvas.owner >= 0) & (canvas.owner < num_people)]
    visible = torch.bincount(people, minlength=num_people)
    return Picture(
        rgb=rgb,
        visible_fraction=(visible / whole.clamp(min=1)).numpy(),
        owner=canvas.owner,
    )


class _Canvas:
    """The supersampled picture: the nearest surface so far, whose it is, its colour."""

    def __init__(self, size_hw: tuple[int, int]) -> None:
        self.size_hw = size_hw
        self.depth = torch.full(size_hw, FAR_M)
        self.owner = torch.full(size_hw, -1)
        self.front = torch.zeros(*size_hw, 3)

    def add(
        self, seen: Fragments, left: int, top: int, colours: Tensor, faces: Tensor, owner: int
    ) -> None:
        """Draws a mesh whose own picture has its upper left corner at (left, top)."""
        rows, columns = seen.depth.shape[1:]
        window = (
            slice(max(top, 0), max(top + rows, 0)),
            slice(max(left, 0), max(left + columns, 0)),
        )
        inner = self.depth[window]  # the part of the mesh's own picture that is in the frame
        y, x = max(-top, 0), max(-left, 0)
        part = 0, slice(y, y + inner.shape[0]), slice(x, x + inner.shape[1])
        nearer = seen.depth[part] < inner
        corners = colours[faces[seen.face_index[part][nearer]]]  # (N, 3, 3)
        inner[nearer] = seen.depth[part][nearer]
        self.owner[window][nearer] = owner
        self.front[window][nearer] = (corners * seen.barycentric[part][nearer][..., None]).sum(1)


def _draw_whole(camera: Camera, vertices_cam: Tensor, faces: Tensor) -> tuple[Fragments, int, int]:
    """A person alone in a window that holds all of it, and the window's left and top.

    The window lies on the pixels of the supersampled picture and may reach beyond it.

    Args:
        vertices_cam: (V, 3), all in front of the camera.
    """
    pixels = _finer(camera.project(vertices_cam))
    left, top = pixels.amin(dim=0).floor().int().tolist()
    right, bottom = pixels.amax(dim=0).ceil().int().tolist()
    center_x, center_y = _finer(torch.tensor(camera.principal_point_px)).tolist()
    seen = rasterize(
        vertices_cam[None],
        faces,
        focal_px=camera.focal_px * SUPERSAMPLING,
        principal_point_px=(center_x - left, center_y - top),
        image_size_hw=(bottom - top + 1, right - left + 1),
    )
    return seen, left, top


def _finer(pixels: Tensor) -> Tensor:
    """Coordinates of the picture in the supersampled one; integers are pixel centres in both."""
    return (pixels + 0.5) * SUPERSAMPLING - 0.5


def quantise(rgb: Tensor) -> U8:
    """(..., 3) in [0, 1] to uint8."""
    return (rgb.clamp(0, 1) * 255).round().byte().numpy()


def vertex_normals(vertices_m: Tensor, faces: Tensor) -> Tensor:
    """(P, V, 3) unit normals, smooth over the faces that meet in a vertex."""
    corners = vertices_m[:, faces]  # (P, F, 3, 3)
    normals = torch.linalg.cross(
        corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0]
    )
    smooth = torch.zeros_like(vertices_m)
    for corner in range(3):
        smooth.index_add_(1, faces[:, corner], normals)
    return F.normalize(smooth, dim=-1)


def shading(normals: Tensor, light: Light) -> Tensor:
    """(..., 3) Lambert brightness of normals (..., 3), with a sky that lights from above."""
    to = F.normalize(torch.tensor(light.to), dim=0)
    sky = light.ambient * (0.85 + 0.2 * normals[..., 1])
    bright = sky + light.diffuse * (normals @ to).clamp(min=0)
    return bright[..., None] * torch.tensor(light.colour)


def block_colours(block: Block, corners: Tensor, light: Light) -> Tensor:
    """(24, 3): each side by its direction, darker towards the floor."""
    sides = corners.view(6, 4, 3)
    outward = sides.mean(dim=1) - corners.mean(dim=0)
    normals = F.normalize(outward, dim=-1)[:, None].expand(6, 4, 3).reshape(24, 3)
    height = corners[:, 1:2] / max(block.size_m[1], 1e-6)
    return torch.tensor(block.colour) * shading(normals, light) * (0.8 + 0.2 * height)


def _shadow(
    camera: Camera, backdrop: Backdrop, casting: Sequence[tuple[Tensor, Tensor]], light: Light
) -> Tensor:
    """(H, W) factor: meshes flattened onto the floor along the light, drawn, softened."""
    to = torch.tensor(light.to)
    dark = torch.zeros_like(backdrop.floor)
    for vertices_m, faces in casting:
        if len(vertices_m) == 0:
            continue
        depth = rasterize_depth(
            camera.to_camera(vertices_m - (vertices_m[..., 1:2] / to[1]) * to),
            faces,
            focal_px=camera.focal_px,
            principal_point_px=camera.principal_point_px,
            image_size_hw=(camera.image_size_wh[1], camera.image_size_wh[0]),
        )
        dark |= (depth < FAR_M).any(dim=0) & backdrop.floor
    soft = F.avg_pool2d(
        dark[None, None].float(), SHADOW_BLUR_PX, 1, SHADOW_BLUR_PX // 2, count_include_pad=False
    )[0, 0]
    strength = min(0.7, SHADOW * light.diffuse / 0.6)
    return torch.where(backdrop.floor, 1 - strength * soft, 1.0)

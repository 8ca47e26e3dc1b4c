"""Whole pictures of several people with exact boxes, as fast as a detector's training eats them.

Smaller and coarser than a clip of `corpus`, of the same people, places, light, shadows and things
in the way. Most people stand on the floor of a place, at any distance before its wall; in some
pictures they float at any size, so that small ones and those who fill the picture are seen, too.

Boxes are those of `corpus`: they hold the dressed body, hidden parts too, and end at the picture's
border; people of whom less than `MIN_VISIBLE_FRACTION` is seen have none. Frame `i` of a seed is
the same wherever one starts. Dimension letters: `B` frames, `N` people in them, `V` vertices, `H`,
`W` picture size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from fourdh_batch.models.smpl import SmplBody
from fourdh_batch.rasterizer import FAR_M, Fragments, rasterize, rasterize_depth
from fourdh_batch.synthetic.camera import Camera
from fourdh_batch.synthetic.corpus import MIN_VISIBLE_FRACTION
from fourdh_batch.synthetic.crops import coarse_mesh, expose
from fourdh_batch.synthetic.gestures import PoseSampler, rotation_matrices
from fourdh_batch.synthetic.mocap import Recording
from fourdh_batch.synthetic.rooms import Backdrop, random_room
from fourdh_batch.synthetic.scene import (
    SHADOW,
    Block,
    Light,
    block_colours,
    random_light,
    shading,
    vertex_normals,
)
from fourdh_batch.synthetic.tracks import MIN_DEPTH_M
from fourdh_batch.synthetic.wardrobe import Wardrobe, random_outfits
from fourdh_batch.types import F32, F64, I64, NUM_BETAS, U8

BLOCK = 16  # frames that are made together, whatever the start
VIEWS_PER_PLACE = 6
GRAIN_FRAMES = 4
PEOPLE_SHARES = (0.05, 0.20, 0.23, 0.19, 0.12, 0.08, 0.06, 0.04, 0.03)  # of frames with 0 to 8
FLOATING_SHARE = 0.3  # of the frames
SHADOW_SHARE = 0.7
BLOCKS_SHARE = 0.45  # of the frames with something in the way
BODY_M = 1.7
NEAREST_M = 2.8  # of those who stand, before the camera
LEAST_HEIGHT = 0.09  # of a floating person, of the picture's height
MOST_HEIGHT = 1.25


@dataclass(frozen=True, slots=True, eq=False)
class LabelledFrames:
    """B frames and the N people to be found in them.

    Attributes:
        index: (B,) number of each frame.
        rgb: (B, H, W, 3) uint8.
        frame_row: (N,) which of the B, rising.
        bbox_xyxy_px: (N, 4) float32, integers are pixel centres.
        visible_fraction: (N,) float32, about: of what is inside the picture it is exact.
        owner: (B, H, W) int16, the row among the N whose person is seen; -1: nobody of these.
    """

    index: I64
    rgb: U8
    frame_row: I64
    bbox_xyxy_px: F32
    visible_fraction: F32
    owner: NDArray[np.int16]


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    camera: Camera
    backdrop: Backdrop
    wall_z: float


class FrameStudio:
    """Outfits, views of places and the mesh that all frames of a seed share.

    Args:
        body: its tensors on the CPU.
        image_size_wh: of the frames.
        recordings: motion capture; half of the people take a pose of it.
        num_places, num_outfits: made once, and reused.
    """

    def __init__(
        self,
        body: SmplBody,
        *,
        seed: int,
        image_size_wh: tuple[int, int],
        recordings: Sequence[Recording] = (),
        num_places: int = 24,
        num_outfits: int = 160,
    ) -> None:
        self._seed = seed
        self._size_wh = image_size_wh
        rows, faces = coarse_mesh(body)
        self._part = body.part(rows)
        self._faces = torch.from_numpy(faces)
        self._poses = PoseSampler([r.facing_forwards() for r in recordings])
        rng = np.random.default_rng([seed, 0xF0])
        wardrobe = Wardrobe(body)
        dressed = [wardrobe.dress(outfit) for outfit in random_outfits(rng, num_outfits)]
        self._colours = torch.stack([colours[rows] for colours, _ in dressed])
        self._thickness = torch.stack([thickness[rows] for _, thickness in dressed])
        grain = rng.standard_normal(GRAIN_FRAMES * 3 * image_size_wh[0] * image_size_wh[1])
        self._grain = torch.from_numpy(grain.astype(np.float32))
        self._views: list[_View] = []
        for _ in range(num_places):
            room = random_room(rng)
            for _ in range(VIEWS_PER_PLACE):
                camera = _random_camera(rng, image_size_wh)
                self._views.append(_View(camera, room.view(camera), room.wall_z))

    @torch.no_grad()
    def block(self, number: int) -> LabelledFrames:
        """Frames `number * BLOCK` up to the next block's first."""
        index = np.arange(number * BLOCK, (number + 1) * BLOCK)
        rngs = [np.random.default_rng([self._seed, int(i)]) for i in index]
        views = [self._views[rng.integers(len(self._views))] for rng in rngs]
        counts = [int(rng.choice(len(PEOPLE_SHARES), p=PEOPLE_SHARES)) for rng in rngs]
        row = np.repeat(np.arange(BLOCK), counts)  # frame of each person
        lights = [random_light(rng) for rng in rngs]

        vertices, shaded = self._people(row, rngs, views, lights)
        things = [_things(rng, view) for rng, view in zip(rngs, views, strict=True)]
        return self._draw(index, rngs, views, lights, row, vertices, shaded, things)

    def _people(
        self,
        row: I64,
        rngs: list[np.random.Generator],
        views: list[_View],
        lights: list[Light],
    ) -> tuple[Tensor, Tensor]:
        """(N, V, 3) vertices in the world, and their colours in the light."""
        if len(row) == 0:
            empty = torch.zeros(0, self._thickness.shape[1], 3)
            return empty, empty
        matrices = rotation_matrices(np.stack([self._poses.sample(rngs[i]) for i in row]))
        turns = [[rngs[i].uniform(-180, 180)] for i in row]
        turn = Rotation.from_euler("y", turns, degrees=True).as_matrix()
        matrices[:, 0] = turn @ matrices[:, 0]
        rotations = torch.from_numpy(matrices).float()
        betas = np.stack([rngs[i].normal(0, 0.9, NUM_BETAS).clip(-2, 2) for i in row])
        outfit = np.array([rngs[i].integers(len(self._colours)) for i in row])
        tint = np.stack([rngs[i].normal(1, 0.06, 3).clip(0.8, 1.2) for i in row])
        vertices, joints = self._part(
            rotations[:, :1], rotations[:, 1:], torch.from_numpy(betas).float()
        )
        normals = vertex_normals(vertices, self._faces)
        vertices = vertices + normals * self._thickness[outfit][..., None] - joints[:, :1]
        soles = vertices[..., 1].amin(dim=1).tolist()
        floats = [rng.random() < FLOATING_SHARE for rng in rngs]
        place = np.stack(
            [
                _float(rngs[i], views[i].camera) if floats[i] else _stand(rngs[i], views[i], sole)
                for i, sole in zip(row, soles, strict=True)
            ]
        )
        colours = self._colours[outfit] * torch.from_numpy(tint).float()[:, None]
        light = torch.stack([shading(normals[n], lights[i]) for n, i in enumerate(row)])
        return vertices + torch.from_numpy(place).float()[:, None], colours * light

    def _draw(
        self,
        index: I64,
        rngs: list[np.random.Generator],
        views: list[_View],
        lights: list[Light],
        row: I64,
        vertices: Tensor,
        shaded: Tensor,
        things: list[list[Block]],
    ) -> LabelledFrames:
        width, height = self._size_wh
        cameras = [view.camera for view in views]
        num_people = len(row)
        in_camera = self._to_cameras(vertices, cameras, row)
        before = in_camera[..., 2].amin(dim=1) > MIN_DEPTH_M if num_people else torch.zeros(0)
        # A face with a corner that is not finite is not drawn.
        drawn = torch.where(before.bool()[:, None, None], in_camera, torch.nan)
        seen = self._rasterize(drawn, self._faces, facing_only=True)

        solid = [block.mesh() for blocks in things for block in blocks]
        thing_row = np.repeat(np.arange(BLOCK), [len(blocks) for blocks in things])
        depth = torch.full((BLOCK, height, width), FAR_M)
        owner = torch.full((BLOCK, height, width), -1, dtype=torch.int16)
        front = torch.zeros(BLOCK, height, width, 3)
        for n, i in enumerate(row):
            nearer = seen.depth[n] < depth[i]
            depth[i][nearer] = seen.depth[n][nearer]
            owner[i][nearer] = n
            corners = shaded[n][self._faces[seen.face_index[n][nearer]]]  # (M, 3, 3)
            front[i][nearer] = (corners * seen.barycentric[n][nearer][..., None]).sum(dim=1)
        if solid:
            sides = solid[0][1]
            corners = torch.stack([corners for corners, _ in solid])
            boxes = self._rasterize(self._to_cameras(corners, cameras, thing_row), sides)
            blocks = [block for some in things for block in some]
            for k, i in enumerate(thing_row):
                nearer = boxes.depth[k] < depth[i]
                depth[i][nearer] = boxes.depth[k][nearer]
                owner[i][nearer] = -1
                colour = block_colours(blocks[k], corners[k], lights[i])
                painted = colour[sides[boxes.face_index[k][nearer]]]
                front[i][nearer] = (painted * boxes.barycentric[k][nearer][..., None]).sum(dim=1)

        behind = torch.stack([view.backdrop.rgb for view in views])
        behind = behind * torch.tensor([light.colour for light in lights])[:, None, None]
        behind *= self._shadows(rngs, views, lights, row, vertices)[..., None]
        rgb = torch.where((depth < FAR_M)[..., None], front, behind).permute(0, 3, 1, 2)
        pictures = np.stack([expose(rgb[i], self._grain, rng) for i, rng in enumerate(rngs)])

        box, inside = _boxes(drawn, cameras, row, self._size_wh)
        alone = (seen.depth < FAR_M).sum(dim=(1, 2)).numpy()
        kept = torch.bincount(owner[owner >= 0].long(), minlength=num_people).numpy()
        visible = (inside * kept / np.maximum(alone, 1)).astype(np.float32)
        labelled = visible >= MIN_VISIBLE_FRACTION
        number = np.full(num_people + 1, -1, dtype=np.int16)
        number[:num_people][labelled] = np.arange(labelled.sum())
        return LabelledFrames(
            index=index,
            rgb=pictures,
            frame_row=row[labelled],
            bbox_xyxy_px=box[labelled],
            visible_fraction=visible[labelled],
            owner=number[owner.numpy()],
        )

    def _to_cameras(self, points_m: Tensor, cameras: list[Camera], row: I64) -> Tensor:
        """(N, V, 3) world points in the axes of their frames' cameras, of a focal length of `H`."""
        if len(row) == 0:
            return points_m
        rotation = torch.stack([cameras[i].rotation for i in row])
        eye = torch.tensor([cameras[i].position_m for i in row])[:, None]
        zoom = torch.tensor([[cameras[i].focal_px / self._size_wh[1]] * 2 + [1.0] for i in row])
        return ((points_m - eye) @ rotation.mT) * zoom[:, None]

    def _rasterize(
        self, vertices_cam: Tensor, faces: Tensor, *, facing_only: bool = False
    ) -> Fragments:
        width, height = self._size_wh
        return rasterize(
            vertices_cam,
            faces,
            focal_px=height,
            principal_point_px=(width / 2, height / 2),
            image_size_hw=(height, width),
            facing_only=facing_only,
        )

    def _shadows(
        self,
        rngs: list[np.random.Generator],
        views: list[_View],
        lights: list[Light],
        row: I64,
        vertices: Tensor,
    ) -> Tensor:
        """(B, H, W) factor: people flattened onto the floor along the light, drawn coarsely."""
        width, height = self._size_wh
        factor = torch.ones(BLOCK, height, width)
        casts = np.array([rng.random() < SHADOW_SHARE for rng in rngs])
        casting = np.flatnonzero(casts[row])
        if len(casting) == 0:
            return factor
        to = torch.tensor([lights[row[n]].to for n in casting])[:, None]  # (M, 1, 3)
        flat = vertices[casting] - (vertices[casting][..., 1:2] / to[..., 1:2]) * to
        depth = rasterize_depth(
            self._to_cameras(flat, [view.camera for view in views], row[casting]),
            self._faces,
            focal_px=height / 2,
            principal_point_px=((width / 2 - 0.5) / 2, (height / 2 - 0.5) / 2),
            image_size_hw=((height + 1) // 2, (width + 1) // 2),
        )
        dark = torch.zeros(BLOCK, *depth.shape[1:])
        for n, i in enumerate(row[casting]):
            dark[i][depth[n] < FAR_M] = 1.0
        soft = F.interpolate(dark[:, None], (height, width), mode="bilinear", align_corners=False)[
            :, 0
        ]
        for i, view in enumerate(views):
            strength = min(0.7, SHADOW * lights[i].diffuse / 0.6)
            factor[i] = torch.where(view.backdrop.floor, 1 - strength * soft[i], 1.0)
        return factor


def _random_camera(rng: np.random.Generator, image_size_wh: tuple[int, int]) -> Camera:
    distance = float(rng.uniform(2.5, 8.5))
    height = float(rng.uniform(0.8, 2.6))
    aim = rng.uniform(0.6, 1.3)  # height of what it looks at
    return Camera(
        position_m=(float(rng.uniform(-4, 4)), height, distance),
        yaw_deg=float(rng.uniform(-25, 25)),
        pitch_deg=float(np.degrees(np.arctan2(height - aim, distance)) + rng.normal(0, 3)),
        focal_px=float(rng.uniform(1.2, 2.4) * image_size_wh[1]),
        image_size_wh=image_size_wh,
        roll_deg=float(rng.normal(0, 1.5)),
    )


def _stand(rng: np.random.Generator, view: _View, sole_y_m: float) -> F64:
    """(3,) the pelvis in the world: with the lowest point on the floor, before the wall."""
    camera = view.camera
    rotation = camera.rotation.numpy().astype(np.float64)
    wall = max(camera.position_m[2] - view.wall_z - 0.6, NEAREST_M + 1)
    depth = float(np.exp(rng.uniform(np.log(NEAREST_M), np.log(wall))))
    across = rng.uniform(-0.55, 0.55) * camera.image_size_wh[0] / camera.focal_px
    eye = np.array(camera.position_m)
    # The ray's point with world height 0, found by its height in the camera.
    x_z = across * depth * rotation[0] + depth * rotation[2]
    down = -(eye[1] + x_z[1]) / rotation[1, 1]
    place: F64 = eye + x_z + down * rotation[1]
    place[1] = -sole_y_m
    return place


def _float(rng: np.random.Generator, camera: Camera) -> F64:
    """(3,) the pelvis in the world: at any place of the picture and any size."""
    height = np.exp(rng.uniform(np.log(LEAST_HEIGHT), np.log(MOST_HEIGHT)))
    depth = camera.focal_px * BODY_M / (height * camera.image_size_wh[1])
    half = np.array(camera.image_size_wh) / 2 / camera.focal_px
    where = rng.uniform(-1, 1, 2) * half * np.array([1.05, 0.9])
    in_camera = np.array([where[0] * depth, where[1] * depth, depth])
    place: F64 = in_camera @ camera.rotation.numpy() + np.array(camera.position_m)
    return place


def _things(rng: np.random.Generator, view: _View) -> list[Block]:
    """Pillars, walls, tables and crates."""
    if rng.random() >= BLOCKS_SHARE:
        return []
    blocks = []
    for _ in range(int(rng.integers(1, 4))):
        x, _, z = _stand(rng, view, 0.0)
        if rng.random() < 0.5:
            low, high = (0.3, 1.8, 0.2), (1.5, 3.0, 0.5)
        else:
            low, high = (0.3, 0.3, 0.3), (1.6, 1.1, 0.8)
        width, height, depth = rng.uniform(low, high).tolist()
        colour = tuple(rng.uniform(0.15, 0.85, 3).tolist())
        turn = float(rng.uniform(-45, 45))
        blocks.append(Block((float(x), float(z)), (width, height, depth), turn, colour))
    return blocks


def _boxes(
    in_camera: Tensor, cameras: list[Camera], row: I64, image_size_wh: tuple[int, int]
) -> tuple[F32, F64]:
    """(N, 4) boxes that end at the border, and (N,) the share of the vertices inside."""
    width, height = image_size_wh
    if len(row) == 0:
        return np.zeros((0, 4), np.float32), np.zeros(0)
    pixels = in_camera[..., :2] / in_camera[..., 2:] * height
    pixels = (pixels + torch.tensor([width / 2, height / 2])).nan_to_num(-1.0)
    last = torch.tensor([width, height]) - 1
    inside = ((pixels >= 0) & (pixels <= last)).all(dim=2).double().mean(dim=1)
    low, high = pixels.amin(dim=1).clamp(min=0), torch.minimum(pixels.amax(dim=1), last)
    return torch.cat([low, high], dim=1).float().numpy(), inside.numpy()

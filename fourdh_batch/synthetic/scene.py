"""Pictures of people in a plain room: camera, clothes, room, light, shadows.

World axes: x right, y up, z towards the viewer; the floor is y = 0, a wall stands at the back;
metres. Camera axes: x right, y down, z forward. Colours are RGB in [0, 1] until the picture is
quantised. Dimension letters: `P` people, `V` vertices, `H`, `W` picture size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor

from fourdh_batch.rasterizer import FAR_M, Fragments, rasterize, rasterize_depth
from fourdh_batch.synthetic.motion import (
    ANKLES,
    ELBOWS,
    HIPS,
    KNEES,
    NECK,
    SHOULDERS,
    SPINE_1,
    Body,
)
from fourdh_batch.types import F32, F64, NUM_BODY_JOINTS, U8

SUPERSAMPLING = 2  # pictures are drawn so many times larger and averaged down
LIGHT_TO = (0.45, 0.75, 0.5)  # towards the light, world axes
AMBIENT, DIFFUSE = 0.5, 0.6
SHADOW = 0.62  # brightness of the floor where the light is hidden
SHADOW_BLUR_PX = 3
RIGHT_EYE, LEFT_EYE, LEFT_EAR = 15, 16, 18  # among the 44 keypoints


@dataclass(frozen=True, slots=True, eq=False)
class Camera:
    """A pinhole camera that stands still.

    Attributes:
        position_m: (3,) in the world.
        yaw_deg: to the left; 0 looks along -z.
        pitch_deg: downwards.
        focal_px: focal length.
        image_size_wh: (width, height); the principal point is (width / 2, height / 2).
    """

    position_m: tuple[float, float, float]
    yaw_deg: float
    pitch_deg: float
    focal_px: float
    image_size_wh: tuple[int, int]

    @property
    def rotation(self) -> Tensor:
        """(3, 3) float32, world axes to camera axes."""
        turn = Rotation.from_euler("yx", [self.yaw_deg, -self.pitch_deg], degrees=True)
        return torch.from_numpy(np.diag([1.0, -1, -1]) @ turn.inv().as_matrix()).float()

    @property
    def principal_point_px(self) -> tuple[float, float]:
        return self.image_size_wh[0] / 2, self.image_size_wh[1] / 2

    def to_camera(self, points_m: Tensor) -> Tensor:
        """(..., 3) world points in camera axes."""
        return (points_m - torch.tensor(self.position_m)) @ self.rotation.T

    def project(self, points_cam: Tensor) -> Tensor:
        """(..., 3) points in camera axes to (..., 2) pixels."""
        center = torch.tensor(self.principal_point_px)
        return points_cam[..., :2] / points_cam[..., 2:] * self.focal_px + center


@dataclass(frozen=True, slots=True, eq=False)
class Outfit:
    """Colours of a person, RGB in [0, 1].

    Attributes:
        sleeve: share of the arm that the top covers, 0 to 1 (elbow at 0.5).
        trouser: share of the leg that the trousers cover, 0 to 1 (knee at 0.5).
        stripes_per_m: horizontal stripes in `stripe` colour on the top; 0 for none.
    """

    skin: tuple[float, float, float]
    hair: tuple[float, float, float]
    top: tuple[float, float, float]
    stripe: tuple[float, float, float]
    trousers: tuple[float, float, float]
    shoes: tuple[float, float, float]
    sleeve: float
    trouser: float
    stripes_per_m: float


SKINS = ((0.87, 0.68, 0.57), (0.76, 0.56, 0.43), (0.55, 0.37, 0.27), (0.36, 0.24, 0.18))
HAIRS = ((0.10, 0.08, 0.07), (0.28, 0.18, 0.10), (0.55, 0.42, 0.22), (0.45, 0.44, 0.43))
TOPS = (
    *((0.70, 0.12, 0.13), (0.13, 0.28, 0.62), (0.90, 0.88, 0.83), (0.12, 0.45, 0.28)),
    *((0.92, 0.70, 0.16), (0.45, 0.18, 0.45), (0.15, 0.15, 0.17), (0.16, 0.52, 0.56)),
)
TROUSERS = ((0.12, 0.15, 0.28), (0.10, 0.10, 0.11), (0.45, 0.38, 0.28), (0.32, 0.36, 0.42))
EYES = (0.12, 0.09, 0.08)
WALLS = ((0.72, 0.70, 0.64), (0.58, 0.66, 0.68), (0.76, 0.66, 0.55), (0.62, 0.68, 0.58))
FLOORS = ((0.55, 0.40, 0.27), (0.50, 0.50, 0.49), (0.66, 0.58, 0.46), (0.40, 0.36, 0.33))
SHOES = ((0.08, 0.07, 0.07), (0.80, 0.79, 0.76), (0.36, 0.21, 0.12))


def random_outfits(rng: np.random.Generator, count: int) -> list[Outfit]:
    """Outfits whose tops differ (up to 8 people)."""

    def pick(colours: tuple[tuple[float, float, float], ...]) -> tuple[float, float, float]:
        return colours[rng.integers(len(colours))]

    tops = rng.permutation(len(TOPS))
    return [
        Outfit(
            skin=pick(SKINS),
            hair=pick(HAIRS),
            top=TOPS[tops[i % len(TOPS)]],
            stripe=TOPS[tops[(i + 3) % len(TOPS)]],
            trousers=pick(TROUSERS),
            shoes=pick(SHOES),
            sleeve=float(rng.choice([0.3, 0.95])),
            trouser=float(rng.choice([0.45, 0.97, 0.97])),
            stripes_per_m=float(rng.choice([0.0, 0.0, 6.0])),
        )
        for i in range(count)
    ]


def dress(body: Body, betas: Tensor, outfit: Outfit) -> Tensor:
    """(V, 3) colours of a body's vertices, found from where they lie in the T-pose.

    Args:
        betas: (10,).
    """
    identity = torch.eye(3).expand(1, 1 + NUM_BODY_JOINTS, 3, 3)
    out = body(identity[:, :1], identity[:, 1:], betas[None])
    vertices, joints, keypoints = out.vertices[0], out.joints[0], out.keypoints_3d[0]
    x, y, z = vertices.unbind(dim=-1)
    hip, knee, ankle = joints[HIPS[0], 1], joints[KNEES[0], 1], joints[ANKLES[0], 1]
    shoulder, elbow = joints[SHOULDERS[0], 0], joints[ELBOWS[0], 0]
    neck, eye, ear = joints[NECK], keypoints[LEFT_EYE], keypoints[LEFT_EAR]
    waist = joints[SPINE_1, 1]

    arm = (x.abs() - shoulder) / (2 * (elbow - shoulder))  # 0 shoulder, 0.5 elbow, 1 near wrist
    thigh, shin = 0.5 * (hip - y) / (hip - knee), 0.5 + 0.5 * (knee - y) / (knee - ankle)
    leg = torch.where(y > knee, thigh, shin)  # 0 hip, 0.5 knee, 1 ankle
    collar = neck[1] - 0.5 * (z - neck[2]).clamp(min=0)  # lower in front
    on_top = (y > waist) & (y < collar) & (arm < outfit.sleeve)
    on_stripe = on_top & ((y * outfit.stripes_per_m) % 1 > 0.6) & (arm < 0.1)
    in_head = (y > neck[1] + 0.02) & (x.abs() < 0.2)
    hairline = eye[1] + 0.5 * (y.max() - eye[1])
    hair = in_head & ((y > hairline) | ((z < ear[2] + 0.01) & (y > ear[1] - 0.07)))
    eyes = in_head & (torch.cdist(vertices, keypoints[[RIGHT_EYE, LEFT_EYE]]).amin(1) < 0.014)

    colours = torch.tensor(outfit.skin).repeat(len(vertices), 1)
    for region, colour in (
        ((y <= waist) & (leg < outfit.trouser), outfit.trousers),
        (y < ankle + 0.01, outfit.shoes),
        (on_top, outfit.top),
        (on_stripe, outfit.stripe),
        (hair, outfit.hair),
        (eyes, EYES),
    ):
        colours[region] = torch.tensor(colour)
    return colours


@dataclass(frozen=True, slots=True, eq=False)
class Backdrop:
    """An empty room as a camera sees it.

    Attributes:
        rgb: (H, W, 3) float32 in [0, 1].
        floor: (H, W) bool.
    """

    rgb: Tensor
    floor: Tensor


def random_room(camera: Camera, rng: np.random.Generator) -> Backdrop:
    """A room with a planked or tiled floor, a painted wall, and a few flat things on the wall."""
    width, height = (n * SUPERSAMPLING for n in camera.image_size_wh)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    pixel = (np.stack([x, y], axis=-1) + 0.5) / SUPERSAMPLING - 0.5
    center = np.array(camera.principal_point_px, np.float32)
    ray = np.concatenate([(pixel - center) / camera.focal_px, np.ones((height, width, 1))], axis=-1)
    ray = ray @ camera.rotation.double().numpy()  # camera to world
    eye = np.array(camera.position_m)
    wall_z = rng.uniform(-4.5, -3.5)
    with np.errstate(divide="ignore"):
        to_wall = np.where(ray[..., 2] < 0, (wall_z - eye[2]) / ray[..., 2], np.inf)
        to_floor = np.where(ray[..., 1] < 0, -eye[1] / ray[..., 1], np.inf)
    is_floor = to_floor < to_wall
    hit = eye + np.where(np.isfinite(to_wall), np.minimum(to_floor, to_wall), 50.0)[..., None] * ray

    wall = _wall(hit[..., 0], hit[..., 1], rng)
    floor = _floor(hit[..., 0], hit[..., 2], rng)
    rgb = np.where(is_floor[..., None], floor, wall)
    corner = np.where(is_floor, hit[..., 2] - wall_z, hit[..., 1])  # darker where they meet
    rgb *= (1 - 0.25 * np.exp(-np.abs(corner) / 0.25))[..., None]
    return Backdrop(
        rgb=_area_mean(torch.from_numpy(rgb.clip(0, 1)).float()),
        floor=torch.from_numpy(is_floor[::SUPERSAMPLING, ::SUPERSAMPLING].copy()),
    )


def _wall(x: F64, y: F64, rng: np.random.Generator) -> F64:
    """(H, W, 3) colours of the wall at its points (x, y) in metres."""
    paint = np.array(WALLS[rng.integers(len(WALLS))])
    shade = (
        0.88 + 0.05 * y + 0.05 * _noise(x * 0.7, y * 0.7, rng) + 0.03 * _noise(x * 9, y * 9, rng)
    )
    rgb = paint * shade[..., None]
    rgb[y < 0.1] = 0.85 * paint + 0.1  # skirting board
    left = rng.uniform(-4.5, -3.5)
    while left < 4:
        kind = rng.integers(3)
        wide, low, high = ((0.95, 0.0, 2.05), (1.3, 1.0, 2.2), (0.7, 1.3, 1.85))[kind]
        colour = np.array(((0.42, 0.30, 0.20), (0.80, 0.88, 0.95), rng.uniform(0.2, 0.8, 3))[kind])
        inside = (x > left) & (x < left + wide) & (y >= low) & (y < high)
        frame = inside & ~((x > left + 0.06) & (x < left + wide - 0.06) & (y < high - 0.06))
        rgb[inside] = colour * (0.9 + 0.1 * _noise(x * 3, y * 3, rng)[inside, None])
        rgb[frame] = 0.75 * colour
        left += wide + rng.uniform(0.5, 1.6)
    return rgb


def _floor(x: F64, z: F64, rng: np.random.Generator) -> F64:
    """(H, W, 3) colours of the floor at its points (x, z) in metres."""
    base = np.array(FLOORS[rng.integers(len(FLOORS))])
    across = 0.18 if rng.random() < 0.5 else 0.5  # planks or square tiles
    along = 1.4 if across < 0.3 else 0.5
    row = np.floor(z / across)
    shift = np.where(across < 0.3, (row * 0.618) % 1, 0.0)
    column = np.floor(x / along + shift)
    tone = np.sin(row * 12.9898 + column * 78.233) * 43758.5453 % 1  # by plank
    seam = np.minimum(z / across % 1, 1 - z / across % 1) * across < 0.006
    seam |= np.minimum((x / along + shift) % 1, 1 - (x / along + shift) % 1) * along < 0.006
    grain = _noise(x * 3, z * 25, rng) if across < 0.3 else _noise(x * 12, z * 12, rng)
    shade = 0.86 + 0.16 * tone + 0.08 * grain + 0.06 * _noise(x * 0.6, z * 0.6, rng)
    return base * (shade * np.where(seam, 0.8, 1.0))[..., None]


def _noise(u: F64, v: F64, rng: np.random.Generator) -> F64:
    """Smooth noise in [-1, 1] at (u, v); one bump per unit, repeats after 64."""
    grid = rng.uniform(-1, 1, (64, 64))
    u0, v0 = np.floor(u), np.floor(v)
    s, t = ((w * w * (3 - 2 * w)) for w in (u - u0, v - v0))
    i, j = u0.astype(np.int64) % 64, v0.astype(np.int64) % 64
    k, m = (i + 1) % 64, (j + 1) % 64
    value: F64 = (grid[i, j] * (1 - s) + grid[k, j] * s) * (1 - t)
    value += (grid[i, m] * (1 - s) + grid[k, m] * s) * t
    return value


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A rendered frame.

    Attributes:
        rgb: (H, W, 3) uint8.
        visible_fraction: (P,) float32, share of each person's pixels that is seen: neither
            hidden by somebody else nor outside the picture.
    """

    rgb: U8
    visible_fraction: F32


def render(
    camera: Camera, backdrop: Backdrop, vertices_m: Tensor, colours: Tensor, faces: Tensor
) -> Picture:
    """People in a room.

    Args:
        vertices_m: (P, V, 3) in the world; people behind the camera are not drawn.
        colours: (P, V, 3).
        faces: (F, 3).
    """
    if len(vertices_m) == 0:
        return Picture(_quantise(backdrop.rgb), np.zeros(0, np.float32))
    width, height = camera.image_size_wh
    fine_hw = (height * SUPERSAMPLING, width * SUPERSAMPLING)
    vertices_cam = camera.to_camera(vertices_m)
    shaded = colours * _brightness(vertices_m, faces)[..., None]  # (P, V, 3)
    depth = torch.full(fine_hw, FAR_M)
    owner = torch.full(fine_hw, -1)
    front = torch.zeros(*fine_hw, 3)
    whole = torch.zeros(len(vertices_m))
    for p in range(len(vertices_m)):
        seen, left, top = _draw_whole(camera, vertices_cam[p], faces)
        whole[p] = (seen.depth < FAR_M).sum()
        rows, columns = seen.depth.shape[1:]
        window = (
            slice(max(top, 0), max(top + rows, 0)),
            slice(max(left, 0), max(left + columns, 0)),
        )
        inner = depth[window]  # the part of the person's own picture that is in the frame
        y, x = max(-top, 0), max(-left, 0)
        part = 0, slice(y, y + inner.shape[0]), slice(x, x + inner.shape[1])
        nearer = seen.depth[part] < inner
        corners = shaded[p][faces[seen.face_index[part][nearer]]]  # (N, 3, 3)
        inner[nearer] = seen.depth[part][nearer]
        owner[window][nearer] = p
        front[window][nearer] = (corners * seen.barycentric[part][nearer][..., None]).sum(dim=1)

    behind = backdrop.rgb * _shadow(camera, backdrop, vertices_m, faces)[..., None]
    rgb = _area_mean(front) + behind * (1 - _area_mean((owner >= 0).float()[..., None]))
    visible = torch.bincount(owner[owner >= 0], minlength=len(vertices_m))
    return Picture(
        rgb=_quantise(rgb),
        visible_fraction=(visible / whole).numpy(),
    )


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


def _area_mean(fine: Tensor) -> Tensor:
    """(H, W, C) to (H / n, W / n, C), n being `SUPERSAMPLING`."""
    n = SUPERSAMPLING
    parts = [fine[y::n, x::n] for y in range(n) for x in range(n)]
    return torch.stack(parts).mean(dim=0)


def _quantise(rgb: Tensor) -> U8:
    """(H, W, 3) in [0, 1] to uint8."""
    return (rgb.clamp(0, 1) * 255).round().byte().numpy()


def _brightness(vertices_m: Tensor, faces: Tensor) -> Tensor:
    """(P, V) Lambert shading of smooth normals, with a sky that lights from above."""
    corners = vertices_m[:, faces]  # (P, F, 3, 3)
    normals = torch.linalg.cross(
        corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0]
    )
    smooth = torch.zeros_like(vertices_m)
    for corner in range(3):
        smooth.index_add_(1, faces[:, corner], normals)
    smooth = F.normalize(smooth, dim=-1)
    light = F.normalize(torch.tensor(LIGHT_TO), dim=0)
    return AMBIENT * (0.9 + 0.2 * smooth[..., 1]) + DIFFUSE * (smooth @ light).clamp(min=0)


def _shadow(camera: Camera, backdrop: Backdrop, vertices_m: Tensor, faces: Tensor) -> Tensor:
    """(H, W) factor: the bodies flattened onto the floor along the light, drawn, softened."""
    light = torch.tensor(LIGHT_TO)
    flat = vertices_m - (vertices_m[..., 1:2] / light[1]) * light
    depth = rasterize_depth(
        camera.to_camera(flat),
        faces,
        focal_px=camera.focal_px,
        principal_point_px=camera.principal_point_px,
        image_size_hw=(camera.image_size_wh[1], camera.image_size_wh[0]),
    )
    dark = (depth < FAR_M).any(dim=0) & backdrop.floor
    soft = F.avg_pool2d(
        dark[None, None].float(), SHADOW_BLUR_PX, 1, SHADOW_BLUR_PX // 2, count_include_pad=False
    )[0, 0]
    return torch.where(backdrop.floor, 1 - (1 - SHADOW) * soft, 1.0)

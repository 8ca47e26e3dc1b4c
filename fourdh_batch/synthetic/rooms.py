"""Places without people: a floor and a wall with painted pictures, indoors or outdoors.

A place is two textured planes, made once and then looked at by any camera. Axes as in `scene`.
Dimension letters: `H`, `W` picture size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fourdh_batch.synthetic.camera import Camera
from fourdh_batch.types import F32

SUPERSAMPLING = 2  # pictures are drawn so many times larger and averaged down
PX_PER_M = 40  # of the painted planes
HALF_WIDTH_M = 13.0
FRONT_M = 12.0  # the floor ends here, towards the viewer
WALL_HEIGHT_M = 6.5

WALLS = (
    *((0.72, 0.70, 0.64), (0.58, 0.66, 0.68), (0.76, 0.66, 0.55), (0.62, 0.68, 0.58)),
    *((0.82, 0.82, 0.80), (0.45, 0.42, 0.44)),
)
FLOORS = (
    *((0.55, 0.40, 0.27), (0.50, 0.50, 0.49), (0.66, 0.58, 0.46), (0.40, 0.36, 0.33)),
    (0.30, 0.31, 0.33),
)
BRICKS = ((0.55, 0.32, 0.25), (0.66, 0.60, 0.52), (0.50, 0.52, 0.55))


@dataclass(frozen=True, slots=True, eq=False)
class Backdrop:
    """An empty place as a camera sees it.

    Attributes:
        rgb: (H, W, 3) float32 in [0, 1].
        floor: (H, W) bool.
    """

    rgb: Tensor
    floor: Tensor


class Room:
    """A place; see `random_room`."""

    def __init__(self, wall: F32, floor: F32, wall_z: float) -> None:
        """
        Args:
            wall: (h, w, 3) from the top; floor: (h, w, 3) from the wall to the front.
            wall_z: metres.
        """
        self.wall_z = wall_z
        self._wall = torch.from_numpy(wall.clip(0, 1)).permute(2, 0, 1)[None].float()
        self._floor = torch.from_numpy(floor.clip(0, 1)).permute(2, 0, 1)[None].float()

    def view(self, camera: Camera) -> Backdrop:
        """What a camera sees of it."""
        width, height = (n * SUPERSAMPLING for n in camera.image_size_wh)
        center_x, center_y = camera.principal_point_px
        x = ((torch.arange(width) + 0.5) / SUPERSAMPLING - 0.5 - center_x) / camera.focal_px
        y = ((torch.arange(height) + 0.5) / SUPERSAMPLING - 0.5 - center_y) / camera.focal_px
        turn = camera.rotation  # world to camera
        ray = x[None, :, None] * turn[0] + y[:, None, None] * turn[1] + turn[2]  # (H, W, 3)
        eye = camera.position_m
        to_wall = torch.where(ray[..., 2] < 0, (self.wall_z - eye[2]) / ray[..., 2], torch.inf)
        to_floor = torch.where(ray[..., 1] < 0, -eye[1] / ray[..., 1], torch.inf)
        is_floor = to_floor < to_wall
        far = torch.minimum(to_floor, to_wall).clamp(max=60.0)
        hit_x, hit_y, hit_z = (eye[i] + far * ray[..., i] for i in range(3))
        on_wall = torch.stack([hit_x / HALF_WIDTH_M, 1 - 2 * hit_y / WALL_HEIGHT_M], dim=-1)
        depth = (hit_z - self.wall_z) / (FRONT_M - self.wall_z)
        on_floor = torch.stack([hit_x / HALF_WIDTH_M, 2 * depth - 1], dim=-1)
        rgb = torch.where(
            is_floor[..., None], _sample(self._floor, on_floor), _sample(self._wall, on_wall)
        )
        corner = torch.where(is_floor, hit_z - self.wall_z, hit_y)  # darker where they meet
        rgb *= (1 - 0.25 * torch.exp(-corner.abs() / 0.25))[..., None]
        return Backdrop(
            rgb=area_mean(rgb), floor=is_floor[::SUPERSAMPLING, ::SUPERSAMPLING].contiguous()
        )


def area_mean(fine: Tensor) -> Tensor:
    """(H, W, C) to (H / n, W / n, C), n being `SUPERSAMPLING`."""
    n = SUPERSAMPLING
    parts = [fine[y::n, x::n] for y in range(n) for x in range(n)]
    return torch.stack(parts).mean(dim=0)


def _sample(plane: Tensor, where: Tensor) -> Tensor:
    """(H, W, 3) of a plane (1, 3, h, w) at (H, W, 2) in -1..1; mirrored beyond."""
    seen = F.grid_sample(plane, where[None], padding_mode="reflection", align_corners=False)
    return seen[0].permute(1, 2, 0)


def random_room(rng: np.random.Generator) -> Room:
    """A room with planks or tiles and things on the wall, a street with a house, or a park."""
    kind = int(rng.choice(4, p=[0.4, 0.2, 0.2, 0.2]))
    wall_z = float(rng.uniform(-4.5, -3.5) if kind < 2 else rng.uniform(-9, -6))
    width = round(2 * HALF_WIDTH_M * PX_PER_M)
    x = (np.arange(width, dtype=np.float32) + 0.5) / PX_PER_M - np.float32(HALF_WIDTH_M)
    wall_y = np.float32(WALL_HEIGHT_M) - (
        np.arange(round(WALL_HEIGHT_M * PX_PER_M), dtype=np.float32) + 0.5
    ) / np.float32(PX_PER_M)
    floor_z = np.float32(wall_z) + (
        np.arange(round((FRONT_M - wall_z) * PX_PER_M), dtype=np.float32) + 0.5
    ) / np.float32(PX_PER_M)
    wall_x, wall_y = np.meshgrid(x, wall_y)
    floor_x, floor_z = np.meshgrid(x, floor_z)
    painters = (_painted_wall, _cluttered_wall, _facade, _trees)
    wall = painters[kind](wall_x, wall_y, rng)
    floor = _grass(floor_x, floor_z, rng) if kind == 3 else _floor(floor_x, floor_z, rng)
    return Room(wall, floor, wall_z)


def _painted_wall(x: F32, y: F32, rng: np.random.Generator) -> F32:
    paint = np.array(WALLS[rng.integers(len(WALLS))], np.float32)
    shade = 0.88 + 0.03 * y + 0.05 * _noise(x, y, 0.7, rng) + 0.03 * _noise(x, y, 9, rng)
    rgb: F32 = paint * shade[..., None]
    rgb[y < 0.1] = 0.85 * paint + 0.1  # skirting board
    left = rng.uniform(-12.5, -11.5)
    while left < 12:
        kind = rng.integers(3)
        wide, low, high = ((0.95, 0.0, 2.05), (1.3, 1.0, 2.2), (0.7, 1.3, 1.85))[kind]
        colour = np.array(((0.42, 0.30, 0.20), (0.80, 0.88, 0.95), rng.uniform(0.2, 0.8, 3))[kind])
        inside = (x > left) & (x < left + wide) & (y >= low) & (y < high)
        frame = inside & ~((x > left + 0.06) & (x < left + wide - 0.06) & (y < high - 0.06))
        rgb[inside] = colour * (0.9 + 0.1 * np.sin(5 * x[inside] + 3 * y[inside]))[:, None]
        rgb[frame] = 0.75 * colour
        left += wide + rng.uniform(0.5, 1.6)
    return rgb


def _cluttered_wall(x: F32, y: F32, rng: np.random.Generator) -> F32:
    """Shelves and posters: many edges behind the people."""
    rgb = _painted_wall(x, y, rng)
    for _ in range(70):
        left, low = rng.uniform(-12.5, 12), rng.uniform(0.0, 2.4)
        wide, high = rng.uniform(0.08, 0.9), rng.uniform(0.1, 0.7)
        inside = (x > left) & (x < left + wide) & (y > low) & (y < low + high)
        rgb[inside] = rng.uniform(0.08, 0.92, 3) * rng.uniform(0.6, 1.0)
    return rgb


def _facade(x: F32, y: F32, rng: np.random.Generator) -> F32:
    base = np.array(BRICKS[rng.integers(len(BRICKS))], np.float32)
    row = np.floor(y / 0.12)
    seam = (y / 0.12 % 1 < 0.12) | ((x / 0.3 + 0.5 * (row % 2)) % 1 < 0.05)
    shade = 0.95 + 0.12 * _noise(x, y, 4, rng, along=2) + 0.08 * _noise(x, y, 0.4, rng)
    rgb: F32 = base * (shade * np.where(seam, 0.85, 1.0))[..., None]
    every = rng.uniform(1.8, 3.0)
    across, along = x / every % 1, (y - 0.9) / 2.6 % 1
    window = (across > 0.25) & (across < 0.75) & (along > 0.05) & (along < 0.6) & (y > 0.9)
    pane = window & (across > 0.29) & (across < 0.71) & (along > 0.08) & (along < 0.57)
    rgb[window] = (0.85, 0.84, 0.80)
    glass = 0.35 + 0.2 * _noise(x, y, 0.8, rng)
    rgb[pane] = (glass[..., None] * np.array([0.7, 0.85, 1.0], np.float32))[pane]
    return rgb


def _trees(x: F32, y: F32, rng: np.random.Generator) -> F32:
    sky = np.array([0.62, 0.75, 0.90], np.float32) * (1 - 0.03 * (y - 3))[..., None]
    leaves = 0.6 * _noise(x, y, 0.9, rng) + 0.5 * _noise(x, y, 4, rng)
    tone = 0.30 + 0.12 * leaves + 0.10 * _noise(x, y, 14, rng)
    green = tone[..., None] * np.array([0.75, 1.15, 0.55], np.float32)
    tops = 2.2 + 1.3 * _noise(x, y, 0.35, rng, along=0) + 0.35 * leaves
    rgb: F32 = np.where((y < tops)[..., None], green, sky)
    trunk = (np.abs((x / 1.9 % 1) - 0.5) < 0.05) & (y < 1.6)
    rgb[trunk] = (0.24, 0.18, 0.13)
    return rgb


def _grass(x: F32, z: F32, rng: np.random.Generator) -> F32:
    tone = 0.42 + 0.10 * _noise(x, z, 18, rng) + 0.08 * _noise(x, z, 1.1, rng)
    rgb: F32 = tone[..., None] * np.array([0.72, 1.0, 0.48], np.float32)
    if rng.random() < 0.5:  # a path
        path = np.abs(z - rng.uniform(-1, 1) - 0.3 * np.sin(0.5 * x)) < 0.8
        gravel = 0.62 + 0.06 * _noise(x, z, 22, rng)
        rgb[path] = (gravel[..., None] * np.array([1.0, 0.94, 0.84], np.float32))[path]
    return rgb


def _floor(x: F32, z: F32, rng: np.random.Generator) -> F32:
    base = np.array(FLOORS[rng.integers(len(FLOORS))], np.float32)
    across = 0.18 if rng.random() < 0.5 else 0.5  # planks or square tiles
    along = 1.4 if across < 0.3 else 0.5
    row = np.floor(z / across)
    shift = (row * 0.618) % 1 if across < 0.3 else np.zeros_like(row)
    column = np.floor(x / along + shift)
    tone = np.sin(row * 12.9898 + column * 78.233) * 437.585 % 1  # by plank
    seam = np.minimum(z / across % 1, 1 - z / across % 1) * across < 0.008
    seam |= np.minimum((x / along + shift) % 1, 1 - (x / along + shift) % 1) * along < 0.008
    grain = _noise(x, z, 3, rng, along=8) if across < 0.3 else _noise(x, z, 12, rng)
    shade = 0.86 + 0.16 * tone + 0.08 * grain + 0.06 * _noise(x, z, 0.6, rng)
    result: F32 = base * (shade * np.where(seam, 0.8, 1.0))[..., None]
    return result


def _noise(x: F32, y: F32, per_m: float, rng: np.random.Generator, *, along: float = 1.0) -> F32:
    """Smooth noise in about [-1, 1] over a plane.

    Args:
        x, y: (h, w) of the plane's pixels, metres.
        per_m: bumps per metre across.
        along: bumps in y per bump in x.
    """
    columns = int(np.ptp(x[0]) * per_m) + 2
    rows = int(np.ptp(y[:, 0]) * per_m * along) + 2
    grid = torch.from_numpy(rng.uniform(-1, 1, (1, 1, rows, columns))).float()
    fine = F.interpolate(grid, x.shape, mode="bicubic", align_corners=True)
    result: F32 = fine[0, 0].numpy()
    return result

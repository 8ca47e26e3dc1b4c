"""What the published tracker and ours share when they run side by side: scenes and a stopwatch.

Needs NumPy alone, so that the Python of either side can import it. A scene is a dict of arrays
laid out like the sequences recorded from the published tracker: `in_frame_ptr` row ranges of the
frames, then one row per detection. `in_bbox` is (x, y, w, h), `in_scale` the box grown to 3:4,
`in_loca` and `in_pose` are PHALP's vectors of 99 and 229 numbers. Texture maps are 16 x 16 cells
of 16 x 16 equal texels: `in_uv_rgb_q` in 1/256, `in_uv_mask`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scene = dict[str, NDArray[Any]]

IMAGE_SIZE_WH = (1920, 1080)
NUM_JOINTS = 24
NUM_CELLS = 16  # along each side of a texture map
CELL_PX = 16
FOCAL_PX, CANVAS_PX = 5000.0, 256.0
DEPTH_IN_POSE = 200.0
COVERAGE = 1 / 3  # of a texture map that one view shows
FLICKER = 0.02  # cells that are seen or missed by chance


def make_scene(num_people: int, num_frames: int) -> Scene:
    """People spread over the picture, all visible in every frame, who move and turn a little."""
    rng = np.random.default_rng(num_people)
    t = np.arange(num_frames)[:, None]  # (T, 1), people in columns
    center, height, cam = _boxes(rng, num_people, t)
    width = 0.42 * height
    size_wh = np.stack([np.maximum(width, 0.75 * height), np.maximum(height, width / 0.75)], -1)
    camera = _canvas_camera(cam, center, size_wh.max(-1))
    rows = num_people * num_frames
    rgb, mask = _textures(rng, num_people, t)
    pose = np.concatenate([_poses(rng, num_people, t), camera], -1)
    pose[..., -1] /= DEPTH_IN_POSE
    pose = pose.reshape(rows, 229).astype(np.float32)
    origin = camera[..., :2] / camera[..., 2:] * FOCAL_PX / CANVAS_PX + 0.5
    joints = origin[..., None, :] + rng.normal(0, 0.02, (num_frames, num_people, 45, 2))
    joints[..., 44, :] = origin
    return {
        "in_frame_ptr": np.arange(num_frames + 1) * num_people,
        "in_shots": np.zeros(0, np.int64),
        "in_image_size": np.array(IMAGE_SIZE_WH[::-1]),
        "in_bbox": np.stack([*np.moveaxis(center, -1, 0) - (width / 2, height / 2), width, height])
        .reshape(4, rows)
        .T.astype(np.float32),
        "in_conf": rng.uniform(0.85, 0.99, rows).astype(np.float32),
        "in_loca": np.concatenate(
            [joints.reshape(rows, 90), np.tile(camera.reshape(rows, 3), 3)], 1
        ).astype(np.float32),
        "in_pose": pose,
        "in_uv_rgb_q": rgb.reshape(rows, 3, NUM_CELLS, NUM_CELLS),
        "in_uv_mask": mask.reshape(rows, NUM_CELLS, NUM_CELLS),
        "in_center": center.reshape(rows, 2),
        "in_scale": size_wh.reshape(rows, 2),
        "mean": pose[:, :226].mean(0, dtype=np.float64)[None],
        "std": pose[:, :226].std(0, dtype=np.float64)[None] + 0.05,
    }


def texture_maps(scene: Scene, rows: slice) -> NDArray[np.float32]:
    """(M, 4, 256, 256) rgb and mask (1 seen, -1 not) of some detections."""
    mask = scene["in_uv_mask"][rows, None]
    rgb = np.where(mask, scene["in_uv_rgb_q"][rows] / 256.0, 0.0)
    cells = np.concatenate([rgb, np.where(mask, 1.0, -1.0)], 1).astype(np.float32)
    return cells.repeat(CELL_PX, 2).repeat(CELL_PX, 3)


def rows_of(scene: Scene, frame: int) -> slice:
    """Rows of the detections of a frame."""
    start, stop = scene["in_frame_ptr"][frame : frame + 2]
    return slice(int(start), int(stop))


class Parts:
    """Processor time by part; what a part spends inside another one counts for that one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time booked under `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._book()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._book()
                self._running.pop()

        return call

    def take(self) -> dict[str, float]:
        """Seconds of all parts since the last call."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    def _book(self) -> None:
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


def _boxes(
    rng: np.random.Generator, num_people: int, t: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Centres (T, N, 2) and heights (T, N) in pixels, weak cameras (T, N, 3)."""
    wide, high = IMAGE_SIZE_WH
    columns = int(np.ceil(np.sqrt(num_people * wide / high)))
    lines = -(-num_people // columns)
    place = rng.permutation(columns * lines)[:num_people]
    cell = np.array([wide / columns, high / lines])
    grid = np.stack([place % columns, place // columns], 1) + 0.5
    home = (grid + rng.uniform(-0.2, 0.2, grid.shape)) * cell
    shape = (len(t), num_people)
    phase = rng.uniform(0, 2 * np.pi, (3, num_people))
    sway = 15 * np.stack([np.sin(t / 9 + phase[0]), 0.3 * np.sin(t / 7 + phase[1])], -1)
    center = home + sway + rng.normal(0, 0.7, (*shape, 2))
    height = np.minimum(420, 2.2 * cell[1]) * rng.uniform(0.75, 1.25, num_people)
    height = height * (1 + 0.03 * np.sin(t / 11 + phase[2])) + rng.normal(0, 0.7, shape)
    cam = np.stack([np.full(shape, 0.9), np.zeros(shape), np.full(shape, 0.1)], -1)
    return center, height, cam + rng.normal(0, 0.004, cam.shape)


def _canvas_camera(
    cam: NDArray[Any], center: NDArray[Any], size: NDArray[Any]
) -> NDArray[np.float64]:
    """Cameras (..., 3) of the frame padded to a square of 256 pixels (docs/PHALP.md, section 2)."""
    side = max(IMAGE_SIZE_WH)
    margin = [(side - length) // 2 for length in IMAGE_SIZE_WH]
    scaled = (center + margin) * CANVAS_PX / side
    depth = 2 * FOCAL_PX / (cam[..., :1] * size[..., None] * CANVAS_PX / side)
    return np.concatenate([cam[..., 1:] + (scaled - 128) * depth / FOCAL_PX, depth], -1)


def _poses(rng: np.random.Generator, num_people: int, t: NDArray[Any]) -> NDArray[np.float64]:
    """24 rotation matrices and 10 betas, (T, N, 226), that change smoothly."""
    joints = (num_people, NUM_JOINTS, 3)
    phase = rng.uniform(0, 2 * np.pi, joints)
    axis_angle = rng.normal(0, 0.1, joints) + 0.1 * np.sin(t[..., None, None] / 6 + phase)
    angle = np.linalg.norm(axis_angle, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(axis_angle / angle[..., 0], -1, 0)
    o = np.zeros_like(x)
    cross = np.stack([o, -z, y, z, o, -x, -y, x, o], -1).reshape(*x.shape, 3, 3)
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    betas = rng.normal(0, 0.3, (num_people, 10)) + rng.normal(0, 0.02, (len(t), num_people, 10))
    return np.concatenate([rotation.reshape(len(t), num_people, -1), betas], -1)


def _textures(
    rng: np.random.Generator, num_people: int, t: NDArray[Any]
) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """Colours (T, N, 3, 16, 16) and masks (T, N, 16, 16): each cell faces some way all the time,
    and is seen while its owner's slowly changing heading comes near."""
    cells = (num_people, NUM_CELLS, NUM_CELLS)
    facing = rng.uniform(0, 2 * np.pi, cells)
    heading = rng.uniform(0, 2 * np.pi, num_people) + 0.03 * t
    apart = np.abs((facing - heading[..., None, None] + np.pi) % (2 * np.pi) - np.pi)
    mask = (apart < COVERAGE * np.pi) ^ (rng.random((len(t), *cells)) < FLICKER)
    own = rng.normal(0, 35, (num_people, 3, NUM_CELLS, NUM_CELLS))
    colour = own + rng.normal(0, 5, (len(t), *own.shape))
    rgb = np.clip(np.rint(colour), -127, 127).astype(np.int8)
    return np.where(mask[:, :, None], rgb, np.int8(0)), mask

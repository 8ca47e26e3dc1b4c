"""A labelled person to a training crop, with the published random changes.

Picture, keypoints and SMPL parameters change together: a rotation of the picture turns the body
about the viewing axis, a mirrored picture shows a mirrored body whose left is its right.

`K` = 44 keypoints, `S` side of a crop: 256, or smaller for a small model.

Source: training configuration of HMR 2.0. Extreme crops: Joo et al., Exemplar Fine-Tuning for 3D
Human Model Fitting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from fourdh_batch.config import AugmentConfig
from fourdh_batch.geometry import CROP_PX
from fourdh_batch.training.examples import Example, Person
from fourdh_batch.types import F32, F64, NUM_KEYPOINTS
from fourdh_batch.video.crops import MEAN_RGB, STD_RGB

# Where each keypoint, and each body joint, stands in a mirrored body.
FLIPPED_KEYPOINTS = (
    *(0, 1, 5, 6, 7, 2, 3, 4, 8, 12, 13, 14, 9, 10, 11, 16, 15, 18, 17, 22, 23, 24, 19, 20, 21),
    *(30, 29, 28, 27, 26, 25, 36, 35, 34, 33, 32, 31, 37, 38, 39, 40, 41, 42, 43),
)
FLIPPED_JOINTS = (
    *(1, 0, 2, 4, 3, 5, 7, 6, 8, 10, 9, 11),
    *(13, 12, 14, 16, 15, 18, 17, 20, 19, 22, 21),
)
MIRROR = (-1, 1, 1)  # diagonal of M, which turns the x axis round

MAX_TRANSLATION_SIGMAS = 1.0
MAX_SCALE_SIGMAS = 1.0
MAX_ROTATION_SIGMAS = 2.0

# Extreme crops: keypoints that stay in the picture (others may), and how much larger the crop is
# than their box.
KEYPOINT_MARGIN = 1.2
LIMBS = (
    # the same limb joints by OpenPose's names and by those of the extra keypoints
    *((2, 33), (3, 32), (4, 31), (5, 34), (6, 35), (7, 36)),
    *((10, 26), (11, 25), (13, 29), (14, 30)),
)
LOWER_BODY = (10, 11, 13, 14, 25, 26, 29, 30)
UPPER_BODY = (0, 1, 15, 16, 17, 18, 33, 34, 37, 38, 42, 43)
MIN_UPPER_BODY = 2
MIN_CONFIDENCE_SUM = 1.0
MIN_EXTREME_CROP_PX = 4.0


class _Part(NamedTuple):
    """A part of the body that an extreme crop shows.

    Attributes:
        keypoints: that decide the crop.
        margin: factor on their box, beside `KEYPOINT_MARGIN`.
    """

    keypoints: tuple[int, ...]
    margin: float


def _all_but(*hidden: int) -> tuple[int, ...]:
    return tuple(k for k in range(NUM_KEYPOINTS) if k not in hidden)


_DOWN_TO_HIPS = _Part(_all_but(10, 11, 13, 14, *range(19, 25), 25, 26, 29, 30), 1.1)
_DOWN_TO_SHOULDERS = _Part((0, 1, 2, 5, 15, 16, 17, 18, 33, 34, 37, 38, 42, 43), 1.2)
_HEAD = _Part((0, 1, 2, 5, 15, 16, 17, 18, 37, 38, 42, 43), 1.3)
_TORSO = _Part((1, 2, 5, 8, 9, 12, 27, 28, 33, 34, 37, 39, 40, 41), 1.1)
_RIGHT_ARM = _Part((2, 3, 4, 31, 32, 33), 1.1)
_LEFT_ARM = _Part((5, 6, 7, 34, 35, 36), 1.1)
_LEGS = _Part((*range(8, 15), *range(19, 31), 39), 1.1)
_RIGHT_LEG = _Part((9, 10, 11, 22, 23, 24, 25, 26, 27), 1.1)
_LEFT_LEG = _Part((12, 13, 14, 19, 20, 21, 28, 29, 30), 1.1)

# With their shares, of people seen whole and of those without legs in the picture.
_PARTS_OF_WHOLE = (
    (0.2, _DOWN_TO_HIPS),
    *((0.1, part) for part in (_DOWN_TO_SHOULDERS, _HEAD, _TORSO, _RIGHT_ARM, _LEFT_ARM)),
    *((0.1, part) for part in (_LEGS, _RIGHT_LEG, _LEFT_LEG)),
)
_PARTS_OF_UPPER = tuple(
    (0.2, part) for part in (_DOWN_TO_SHOULDERS, _HEAD, _TORSO, _RIGHT_ARM, _LEFT_ARM)
)


class Changes(NamedTuple):
    """What happens to one person.

    Attributes:
        scale: factor on the side of the crop.
        rotation_deg: the picture turns by this, clockwise as the viewer sees it where negative.
        translation: (x, y) of the crop, in sides of the crop.
        color: factors on red, green and blue.
        is_flipped: the picture is mirrored.
        extreme_crop: None, or a number in [0, 1) that chooses the part to be shown.
    """

    scale: float = 1.0
    rotation_deg: float = 0.0
    translation: tuple[float, float] = (0.0, 0.0)
    color: tuple[float, float, float] = (1.0, 1.0, 1.0)
    is_flipped: bool = False
    extreme_crop: float | None = None


UNCHANGED = Changes()


def draw_changes(random: np.random.Generator, config: AugmentConfig) -> Changes:
    """Random changes; takes the same amount of random numbers whatever comes out."""
    normal = random.standard_normal(4)
    uniform = random.random(4)
    color = random.uniform(1 - config.color, 1 + config.color, 3)
    shift = np.clip(normal[:2], -MAX_TRANSLATION_SIGMAS, MAX_TRANSLATION_SIGMAS)
    shift *= config.translation
    scale = 1 + config.scale * np.clip(normal[2], -MAX_SCALE_SIGMAS, MAX_SCALE_SIGMAS)
    rotation = config.rotation_deg * np.clip(normal[3], -MAX_ROTATION_SIGMAS, MAX_ROTATION_SIGMAS)
    return Changes(
        scale=float(scale),
        rotation_deg=float(rotation) if uniform[0] < config.rotation_share else 0.0,
        translation=(float(shift[0]), float(shift[1])),
        color=(float(color[0]), float(color[1]), float(color[2])),
        is_flipped=bool(uniform[1] < config.flip_share),
        extreme_crop=float(uniform[3]) if uniform[2] < config.extreme_crop_share else None,
    )


def make_example(
    person: Person, changes: Changes = UNCHANGED, *, crop_px: int = CROP_PX
) -> Example:
    """The crop of a person after these changes, of side `crop_px`.

    A picture that ends with the box (`Person.is_framed`) is mirrored and coloured only.
    """
    if person.is_framed:
        changes = Changes(color=changes.color, is_flipped=changes.is_flipped)
    center, size = person.box_center_px.astype(np.float64), float(person.box_size_px)
    if changes.extreme_crop is not None:
        center, size = _extreme_crop(person, changes.extreme_crop, center, size)
    center = center + size * np.array(changes.translation)
    image, keypoints_2d, keypoints_3d = person.image, person.keypoints_2d, person.keypoints_3d
    global_orient, body_pose = person.global_orient, person.body_pose
    if changes.is_flipped:
        last = image.shape[1] - 1
        image = np.ascontiguousarray(image[:, ::-1])
        center[0] = last - center[0]
        keypoints_2d = flip_keypoints(keypoints_2d, last)
        keypoints_3d = flip_keypoints(keypoints_3d, 0)
        global_orient, body_pose = flip_pose(global_orient, body_pose)
    affine = crop_affine(center, size * changes.scale, changes.rotation_deg, crop_px)
    pixels = cv2.warpAffine(image, affine, (crop_px, crop_px), flags=cv2.INTER_LINEAR)
    colored = np.clip(pixels * np.array(changes.color, dtype=np.float32), 0, 255)
    crop = ((colored - MEAN_RGB) / STD_RGB).astype(np.float32).transpose(2, 0, 1)
    in_crop = keypoints_2d[:, :2] @ affine[:, :2].T + affine[:, 2]
    turn = _turn(changes.rotation_deg)
    return Example(
        crop=np.ascontiguousarray(crop),
        keypoints_2d=_float32(np.column_stack((in_crop / crop_px - 0.5, keypoints_2d[:, 2]))),
        keypoints_3d=_float32(np.column_stack((keypoints_3d[:, :3] @ turn.T, keypoints_3d[:, 3]))),
        global_orient=_float32(turn @ global_orient),
        body_pose=_float32(body_pose),
        betas=_float32(person.betas),
        has_pose=np.float32(person.has_pose),  # type: ignore[arg-type]
        has_betas=np.float32(person.has_betas),  # type: ignore[arg-type]
        relative_size=np.float32(size * changes.scale / person.longer_side_px),  # type: ignore[arg-type]
    )


def crop_affine(center_px: F64, size_px: float, rotation_deg: float, crop_px: int = CROP_PX) -> F64:
    """Matrix that takes pixels of the picture to pixels of the crop, as published.

    Args:
        center_px: (2,) that falls on the middle of the crop, pixel (128, 128) of 256.
        size_px: side of the square.
        rotation_deg: the square turns by this in the picture, and the picture against it.

    Returns:
        (2, 3) float64, of three points in float32.
    """
    angle = np.deg2rad(rotation_deg)
    sine, cosine = np.sin(angle), np.cos(angle)
    half = size_px / 2
    down = np.array([-half * sine, half * cosine])
    right = np.array([half * cosine, half * sine])
    source = np.stack((center_px, center_px + down, center_px + right)).astype(np.float32)
    low, high = crop_px / 2, float(crop_px)
    target = np.array([[low, low], [low, high], [high, low]], dtype=np.float32)
    affine: F64 = cv2.getAffineTransform(source, target).astype(np.float64)
    return affine


def flip_keypoints(keypoints: F32, last: float) -> F32:
    """Keypoints of the mirrored body.

    Args:
        keypoints: (K, 3 or 4) position and confidence.
        last: x of what x = 0 becomes: the last column of a picture, 0 in space.
    """
    flipped = keypoints[list(FLIPPED_KEYPOINTS)].copy()
    flipped[:, 0] = last - flipped[:, 0]
    return flipped


def flip_pose(global_orient: F32, body_pose: F32) -> tuple[F32, F32]:
    """Rotations of the mirrored body.

    Args:
        global_orient: (1, 3, 3).
        body_pose: (23, 3, 3).
    """
    sign = np.outer(MIRROR, MIRROR).astype(np.float32)  # of M R M
    return sign * global_orient, sign * body_pose[list(FLIPPED_JOINTS)]


def _turn(rotation_deg: float) -> F64:
    """(3, 3) rotation about the viewing axis that goes with a rotated crop."""
    sine, cosine = np.sin(np.deg2rad(-rotation_deg)), np.cos(np.deg2rad(-rotation_deg))
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])


def _extreme_crop(person: Person, choice: float, center: F64, size: float) -> tuple[F64, float]:
    """Centre and side of a crop of a part; as they were where too little of it is known."""
    confidence = person.keypoints_2d[:, 2]
    if all(confidence[list(names)].max() > 0 for names in LIMBS):
        part = _chosen(_PARTS_OF_WHOLE, choice)
    elif (
        not (confidence[list(LOWER_BODY)] > 0).any()
        and (confidence[list(UPPER_BODY)] > 0).sum() >= MIN_UPPER_BODY
    ):
        part = _chosen(_PARTS_OF_UPPER, choice)
    else:
        return center, size
    keypoints = person.keypoints_2d[list(part.keypoints)].astype(np.float64)
    if not keypoints[:, 2].sum() > MIN_CONFIDENCE_SUM:
        return center, size
    seen = keypoints[keypoints[:, 2] > 0, :2]
    low, high = seen.min(axis=0), seen.max(axis=0)
    side = float((high - low).max()) * KEYPOINT_MARGIN * part.margin
    return ((low + high) / 2, side) if side >= MIN_EXTREME_CROP_PX else (center, size)


def _chosen(parts: Sequence[tuple[float, _Part]], choice: float) -> _Part:
    total = 0.0
    for share, part in parts:
        total += share
        if choice < total:
            return part
    return parts[-1][1]


def _float32(array: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> F32:
    return np.ascontiguousarray(array, dtype=np.float32)

"""What training examples are: a labelled person in a picture, and the crop made of it.

`B` examples, `K` = 44 keypoints, `S` side of a crop, 256 or smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fourdh_batch.types import F32, NUM_BETAS, NUM_BODY_JOINTS, NUM_KEYPOINTS, U8


@dataclass(frozen=True, slots=True, eq=False)
class Person:
    """One person in a picture and what is known of the body.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        box_center_px: (2,) float32, centre of the square crop.
        box_size_px: side of the square crop: the longer side of the box grown to 192 : 256.
        longer_side_px: of the box before it was grown, for PCK.
        keypoints_2d: (K, 3) float32: pixels of the picture, then the confidence, 0 where unknown.
        keypoints_3d: (K, 4) float32: metres in camera axes from any origin, then the confidence.
        global_orient: (1, 3, 3) float32 rotation into camera axes.
        body_pose: (23, 3, 3) float32 rotations, each relative to its parent joint.
        betas: (10,) float32.
        has_pose: 1 where both rotations are known, else 0.
        has_betas: 1 where the betas count, else 0.
        is_framed: the picture ends with the box, so that it must not be turned, moved or scaled.
    """

    image: U8
    box_center_px: F32
    box_size_px: float
    longer_side_px: float
    keypoints_2d: F32
    keypoints_3d: F32
    global_orient: F32
    body_pose: F32
    betas: F32
    has_pose: float
    has_betas: float
    is_framed: bool = False

    def __post_init__(self) -> None:
        expected = {
            "keypoints_2d": (NUM_KEYPOINTS, 3),
            "keypoints_3d": (NUM_KEYPOINTS, 4),
            "global_orient": (1, 3, 3),
            "body_pose": (NUM_BODY_JOINTS, 3, 3),
            "betas": (NUM_BETAS,),
            "box_center_px": (2,),
        }
        for name, shape in expected.items():
            got = getattr(self, name).shape
            if got != shape:
                raise ValueError(f"{name}: expected {shape}, got {got}")
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise ValueError(
                f"image: expected (H, W, 3) uint8, got {self.image.shape} {self.image.dtype}"
            )
        if not self.box_size_px > 0:
            raise ValueError(f"box_size_px: expected more than 0, got {self.box_size_px}")


class Example(NamedTuple):
    """One crop and the truth in its frame of reference; float32.

    Attributes:
        crop: (3, S, S) normalised RGB.
        keypoints_2d: (K, 3) crop widths, 0 is the crop centre; then the confidence.
        keypoints_3d: (K, 4) metres in the axes of the crop camera; then the confidence.
        global_orient, body_pose, betas: as of `Person`.
        has_pose, has_betas: () 1 or 0.
        relative_size: () side of the crop over the longer side of the person's box.
    """

    crop: F32
    keypoints_2d: F32
    keypoints_3d: F32
    global_orient: F32
    body_pose: F32
    betas: F32
    has_pose: F32
    has_betas: F32
    relative_size: F32


class Batch(NamedTuple):
    """B examples; the fields of `Example` with an axis more."""

    crop: Tensor
    keypoints_2d: Tensor
    keypoints_3d: Tensor
    global_orient: Tensor
    body_pose: Tensor
    betas: Tensor
    has_pose: Tensor
    has_betas: Tensor
    relative_size: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def collate(examples: Sequence[Example]) -> Batch:
    """Examples side by side."""
    return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*examples, strict=True)))

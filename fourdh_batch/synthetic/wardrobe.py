"""Clothes, hair and faces: a colour and a thickness for every vertex of a body.

Regions are found once, from where the vertices lie in the T-pose of the mean shape, so that one
wardrobe fits every shape. Colours are RGB in [0, 1]. Dimension letter: `V` vertices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fourdh_batch.synthetic.motion import ANKLES, ELBOWS, HIPS, KNEES, NECK, SHOULDERS, Body
from fourdh_batch.types import F32, NUM_BETAS, NUM_BODY_JOINTS, Bool

NOSE, RIGHT_EYE, LEFT_EYE, LEFT_EAR = 0, 15, 16, 18  # among the 44 keypoints

RGB = tuple[float, float, float]
Pattern = Literal["plain", "stripes", "bars", "plaid", "block", "print"]
PATTERNS: tuple[Pattern, ...] = ("plain", "plain", "stripes", "bars", "plaid", "block", "print")
Hair = Literal["short", "long", "bald", "cap"]
HAIR_CUTS: tuple[Hair, ...] = ("short", "short", "long", "long", "bald", "cap")

SKINS: tuple[RGB, ...] = (
    *((0.87, 0.68, 0.57), (0.80, 0.60, 0.48), (0.68, 0.48, 0.36), (0.55, 0.37, 0.27)),
    *((0.42, 0.28, 0.20), (0.32, 0.21, 0.16)),
)
HAIRS: tuple[RGB, ...] = (
    *((0.07, 0.06, 0.06), (0.16, 0.10, 0.07), (0.30, 0.19, 0.11), (0.58, 0.43, 0.23)),
    *((0.45, 0.44, 0.43), (0.42, 0.20, 0.10)),
)
TOPS: tuple[RGB, ...] = (
    *((0.70, 0.12, 0.13), (0.13, 0.28, 0.62), (0.90, 0.88, 0.83), (0.12, 0.45, 0.28)),
    *((0.92, 0.70, 0.16), (0.45, 0.18, 0.45), (0.15, 0.15, 0.17), (0.16, 0.52, 0.56)),
)
TROUSERS: tuple[RGB, ...] = (
    *((0.12, 0.15, 0.28), (0.10, 0.10, 0.11), (0.45, 0.38, 0.28), (0.32, 0.36, 0.42)),
    *((0.20, 0.26, 0.42), (0.62, 0.60, 0.56), (0.24, 0.27, 0.20)),
)
SHOES: tuple[RGB, ...] = ((0.08, 0.07, 0.07), (0.80, 0.79, 0.76), (0.36, 0.21, 0.12))
EYE: RGB = (0.10, 0.08, 0.07)


@dataclass(frozen=True, slots=True)
class Outfit:
    """What a person wears.

    Attributes:
        skin, hair, top, second, trousers, shoes: colours; `second` is that of the top's pattern.
        sleeve: share of the arm that the top covers, 0 to 1 (elbow at 0.5).
        trouser: share of the leg that the trousers cover, 0 to 1 (knee at 0.5).
        pattern: of the top.
        cut: of the hair; a cap has the colour `second`.
        loose_m: how far clothes stand off the skin.
        beard: hair on the chin.
        folds: phase of the folds, radians.
    """

    skin: RGB
    hair: RGB
    top: RGB
    second: RGB
    trousers: RGB
    shoes: RGB
    sleeve: float
    trouser: float
    pattern: Pattern
    cut: Hair
    loose_m: float
    beard: bool
    folds: float


def random_outfits(rng: np.random.Generator, count: int) -> list[Outfit]:
    """Outfits whose tops differ (up to 8 people)."""

    def pick(colours: tuple[RGB, ...], spread: float = 0.04) -> RGB:
        colour = np.array(colours[rng.integers(len(colours))])
        red, green, blue = (colour + rng.normal(0, spread, 3)).clip(0.03, 0.97).tolist()
        return red, green, blue

    tops = rng.permutation(len(TOPS))
    return [
        Outfit(
            skin=pick(SKINS, 0.02),
            hair=pick(HAIRS, 0.02),
            top=pick((TOPS[tops[i % len(TOPS)]],)),
            second=pick((TOPS[tops[(i + 3) % len(TOPS)]],)),
            trousers=pick(TROUSERS),
            shoes=pick(SHOES),
            sleeve=float(rng.choice([0.05, 0.3, 0.3, 0.95, 0.95])),
            trouser=float(rng.choice([0.25, 0.45, 0.97, 0.97, 0.97])),
            pattern=PATTERNS[rng.integers(len(PATTERNS))],
            cut=HAIR_CUTS[rng.integers(len(HAIR_CUTS))],
            loose_m=float(rng.uniform(0.004, 0.02)),
            beard=bool(rng.random() < 0.2),
            folds=float(rng.uniform(0, 2 * np.pi)),
        )
        for i in range(count)
    ]


class Wardrobe:
    """Dresses bodies of one topology."""

    def __init__(self, body: Body) -> None:
        identity = torch.eye(3).expand(1, 1 + NUM_BODY_JOINTS, 3, 3)
        out = body(identity[:, :1], identity[:, 1:], torch.zeros(1, NUM_BETAS))
        vertices, joints, points = (
            tensor[0].numpy() for tensor in (out.vertices, out.joints, out.keypoints_3d)
        )
        x, y, z = vertices.T
        self._x, self._y, self._z = x, y, z
        hip, knee, ankle = (joints[pair[0], 1] for pair in (HIPS, KNEES, ANKLES))
        shoulder, elbow = joints[SHOULDERS[0], 0], joints[ELBOWS[0], 0]
        neck, eye, ear, nose = joints[NECK], points[LEFT_EYE], points[LEFT_EAR], points[NOSE]

        # 0 shoulder, 0.5 elbow, 1 near the wrist; 0 hip, 0.5 knee, 1 ankle
        self._arm = (np.abs(x) - shoulder) / (2 * (elbow - shoulder))
        thigh, shin = 0.5 * (hip - y) / (hip - knee), 0.5 + 0.5 * (knee - y) / (knee - ankle)
        self._leg = np.where(y > knee, thigh, shin)
        self._waist = hip + 0.07
        self._above_waist = y > self._waist
        self._below_collar = y < neck[1] - 0.5 * (z - neck[2]).clip(min=0)  # lower in front
        self._is_shoe = y < ankle + 0.015
        self._chest_y = (neck[1] + self._waist) / 2 + 0.05

        head = (y > neck[1] + 0.02) & (np.abs(x) < 0.2)
        hairline = eye[1] + 0.55 * (y.max() - eye[1])
        back = (z < ear[2] + 0.01) & (y > ear[1] - 0.07)
        self._short_hair = head & ((y > hairline) | back)
        long = (y > neck[1] - 0.08) & (np.abs(x) < 0.13) & (z < ear[2] - 0.005)
        self._long_hair = (
            self._short_hair | long | (head & (np.abs(x) > 0.068) & (z < ear[2] + 0.04))
        )
        self._cap = head & (y > hairline - 0.03)
        eyes = points[[RIGHT_EYE, LEFT_EYE]]
        near = np.linalg.norm(vertices[:, None] - eyes, axis=2).min(axis=1)
        self._eyes = head & (near < 0.014)
        brow = np.abs(vertices[:, None, 0] - eyes[:, 0]).min(axis=1)
        in_front = head & (z > ear[2] + 0.03)
        self._brows = in_front & (brow < 0.02) & (np.abs(y - eye[1] - 0.022) < 0.008)
        below = nose[1] - y
        self._mouth = in_front & (np.abs(x) < 0.026) & (np.abs(below - 0.040) < 0.009)
        self._beard = in_front & (below > 0.022) & (np.abs(x) < 0.075)
        self._flush = in_front & (np.abs(below) < 0.012) & (np.abs(np.abs(x) - 0.035) < 0.02)

    def dress(self, outfit: Outfit) -> tuple[Tensor, Tensor]:
        """(V, 3) colours, and (V,) metres by which clothes and hair stand off the skin."""
        x, y, z = self._x, self._y, self._z
        on_top = self._above_waist & self._below_collar & (self._arm < outfit.sleeve)
        on_legs = ~self._above_waist & (self._leg < outfit.trouser)
        colours = np.tile(np.array(outfit.skin, np.float32), (len(y), 1))
        thickness = np.zeros(len(y), np.float32)

        def paint(region: Bool, colour: RGB | F32, stand_off_m: float | None = None) -> None:
            colours[region] = colour
            if stand_off_m is not None:
                thickness[region] = stand_off_m

        skin = np.array(outfit.skin, np.float32)
        paint(self._flush, skin * np.array([1.05, 0.93, 0.93], np.float32))
        paint(self._mouth, skin * np.array([0.85, 0.55, 0.55], np.float32))
        paint(on_legs, outfit.trousers, 0.9 * outfit.loose_m)
        paint(self._is_shoe, outfit.shoes, 0.008)
        paint(on_top, outfit.top, outfit.loose_m)
        paint(on_top & self._patterned(outfit.pattern), outfit.second)
        cloth = on_top | on_legs
        fold = np.sin(38 * y + 9 * np.sin(14 * x + outfit.folds) + outfit.folds)
        fold += np.sin(31 * (y + z) - 11 * x + 2 * outfit.folds)
        colours[cloth] *= (1 + 0.055 * fold[cloth])[:, None].astype(np.float32)
        hem = cloth & (np.abs(y - self._waist) < 0.012)
        colours[hem] *= 0.7

        if outfit.beard:
            paint(self._beard & ~self._mouth, outfit.hair, 0.006)
        if outfit.cut != "bald":
            region = self._long_hair if outfit.cut == "long" else self._short_hair
            paint(region, outfit.hair, 0.03 if outfit.cut == "long" else 0.018)
            strands = 1 + 0.12 * np.sin(150 * x + 60 * z)
            colours[region] *= strands[region, None].astype(np.float32)
        if outfit.cut == "cap":
            paint(self._cap, outfit.second, 0.022)
        paint(self._brows, 0.6 * np.array(outfit.hair, np.float32) + 0.2 * skin)
        paint(self._eyes, EYE)
        return torch.from_numpy(colours.clip(0, 1)), torch.from_numpy(thickness)

    def _patterned(self, pattern: Pattern) -> Bool:
        x, y = self._x, self._y
        bars, stripes = (x * 9) % 1 > 0.6, (y * 7) % 1 > 0.6
        chosen: dict[str, Bool] = {
            "plain": np.zeros(len(y), bool),
            "stripes": stripes,
            "bars": bars & (self._arm < 0.1),
            "plaid": stripes ^ bars,
            "block": y > self._chest_y,
            "print": (np.hypot(x, y - self._chest_y) < 0.09) & (self._z > 0),
        }
        return chosen[pattern]

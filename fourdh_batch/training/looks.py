"""Looks at outfits as numbered examples for the texture encoder.

`B` examples, `S` side of a map. Outfits and what is drawn of them follow from (seed, number).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fourdh_batch.models.smpl import SmplBody
from fourdh_batch.synthetic.looks import LookStudio, View
from fourdh_batch.synthetic.scene import random_light

FIRST, AGAIN, OTHER = range(3)  # the looks of an example
MIN_SHARED = 0.05  # of the body's texels, that two views have to show both
TRIES = 8  # to find such views; then a view is compared with itself
HOLES_SHARE = 0.3  # of the examples, from whose maps a rectangle is cut
_VIEWS, _LOOKS = 1, 2  # what a seed is for


class Looks(NamedTuple):
    """Two looks at one outfit and one at another, as the tracker would compare them.

    Attributes:
        maps: (3, 4, S, S) float32, what `TextureEncoder.embed` takes: normalised RGB and a mask of
            1 and 0, and RGB 0 where that is 0. `FIRST` and `AGAIN` are of one outfit; `AGAIN` and
            `OTHER` are the same view. One light falls on all three, as in a video: people turn in
            it, the camera's exposure drifts a little.
        whole: (2, 3, S, S) the whole first outfit and the whole other one, in even light.
    """

    maps: Tensor
    whole: Tensor


def collate_looks(examples: Sequence[Looks]) -> Looks:
    """Examples side by side: (B, 3, 4, S, S) and (B, 2, 3, S, S)."""
    return Looks(*(torch.stack(column) for column in zip(*examples, strict=True)))


class OutfitLooks:
    """Numbered examples.

    All three maps are cut to what both views show. Of `filled_share` of the examples each map is
    cut to its own view and the rest filled with its mean colour instead, as
    `models.appearance.AppearanceProjection` does.

    Args:
        body: with texture coordinates, on the CPU.
        seed: of everything.
        map_px: side S.
        num_views: that outfits are seen in.
        filled_share: see above.
    """

    def __init__(
        self, body: SmplBody, *, seed: int, map_px: int, num_views: int, filled_share: float
    ) -> None:
        self._body = body
        self._seed = seed
        self._map_px = map_px
        self._num_views = num_views
        self._filled_share = filled_share
        self._studio: LookStudio | None = None

    @property
    def studio(self) -> LookStudio:
        """Made in the process that makes the examples: it takes a while and some memory."""
        if self._studio is None:
            seed = int(np.random.SeedSequence((self._seed, _VIEWS)).generate_state(1)[0])
            self._studio = LookStudio(
                self._body, seed=seed, map_px=self._map_px, num_views=self._num_views
            )
        return self._studio

    def __getitem__(self, number: int) -> Looks:
        studio = self.studio
        rng = np.random.default_rng((self._seed, _LOOKS, number))
        outfit, other = studio.colours(rng), studio.colours(rng)
        view, second, shared = self._views(rng)
        light = random_light(rng)
        looks = torch.stack(
            [
                studio.look(outfit, view, light, rng),
                studio.look(outfit, second, light, rng),
                studio.look(other, second, light, rng),
            ]
        )
        if rng.random() < self._filled_share:
            own = torch.stack([studio.mask(v) for v in (view, second, second)])[:, None]
            mean = looks.sum(dim=(2, 3), keepdim=True) / own.sum(dim=(2, 3), keepdim=True)
            maps = torch.cat([torch.where(own > 0, looks, mean), torch.ones_like(own)], dim=1)
        else:
            mask = shared.expand(3, 1, -1, -1)
            maps = torch.cat([looks * mask, mask], dim=1)
        return Looks(maps, torch.stack([studio.whole(outfit), studio.whole(other)]))

    def _views(self, rng: np.random.Generator) -> tuple[View, View, Tensor]:
        """Two views, and (S, S) what both show."""
        studio = self.studio
        least = MIN_SHARED * len(studio.texel)
        first = studio.views[rng.integers(len(studio.views))]
        for _ in range(TRIES):
            second = studio.views[rng.integers(len(studio.views))]
            shared = studio.mask(first) * studio.mask(second)
            if rng.random() < HOLES_SHARE:
                _cut(shared, rng)
            if shared.sum() >= least:
                return first, second, shared
        return first, first, studio.mask(first)


def _cut(mask: Tensor, rng: np.random.Generator) -> None:
    side = len(mask)
    top, left = (int(v) for v in rng.uniform(0, 0.8, 2) * side)
    high, wide = (int(v) for v in rng.uniform(0.1, 0.5, 2) * side)
    mask[top : top + high, left : left + wide] = 0

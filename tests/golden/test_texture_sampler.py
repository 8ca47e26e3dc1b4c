"""Texture maps that the reference's sampler took off three bodies.

`tests/data/tracking/texture_sampler.npz`, recorded by running the reference on the bodies of
`tests/data/rasterizer/depth.npz`: atlas (`fmap`, `bmap`), crops (each cell of `crop_rgb_32`
repeated 8 x 8), crop masks, and the maps. The recorded maps before their scaling are left out. The
third body lies beyond the far plane.

Tolerances: docs/PHALP.md, section 16. A tenth of the texels lies within 1e-4 m of the limit of
visibility, so masks are compared by fraction.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fourdh_batch.models.texture import Atlas, TextureSampler

DATA = Path(__file__).parents[1] / "data"


class Golden(NamedTuple):
    sampler: TextureSampler
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    depth: Tensor
    expected: Tensor


@pytest.fixture(scope="module")
def golden() -> Golden:
    with np.load(DATA / "rasterizer" / "depth.npz") as z:
        vertices, cam_t, depth = (torch.from_numpy(z[k]) for k in ("vertices", "cam_t", "depth"))
        faces = z["faces"].astype(np.int64)
    with np.load(DATA / "tracking" / "texture_sampler.npz") as z:
        atlas = Atlas(face=z["fmap"].astype(np.int64), barycentric=z["bmap"])
        crop_rgb = torch.from_numpy(z["crop_rgb_32"].repeat(8, axis=2).repeat(8, axis=3))
        crop_mask = torch.from_numpy(z["crop_mask"]).float().clamp(0, 1)
        expected = torch.from_numpy(z["uv_vector"])
    inputs = vertices, cam_t, crop_rgb, crop_mask
    return Golden(TextureSampler(faces, atlas), inputs, depth, expected)


def compare(got: Tensor, expected: Tensor, *, min_agreement: float) -> None:
    is_same = got[:, 3] == expected[:, 3]
    assert (is_same.double().mean(dim=(1, 2)) >= min_agreement).all()
    rgb_error = (got - expected)[:, :3].abs().amax(dim=1)
    assert rgb_error[is_same].max() <= 1e-4


def test_given_the_depth_the_maps_equal_those_of_the_reference(golden: Golden) -> None:
    got = golden.sampler.sample(*golden.inputs, depth=golden.depth)
    assert got.shape == golden.expected.shape
    compare(got, golden.expected, min_agreement=0.999)


def test_with_depth_drawn_here_masks_agree(golden: Golden) -> None:
    vertices, cam_t, *_ = golden.inputs
    depth = golden.sampler.draw_depth(vertices + cam_t[:, None])
    is_covered = (depth < 100) | (golden.depth < 100)
    is_close = (depth - golden.depth).abs()[is_covered] <= 2e-4
    assert is_close.double().mean() >= 0.998
    compare(golden.sampler.sample(*golden.inputs), golden.expected, min_agreement=0.995)


def test_q8_nothing_is_seen_of_a_body_beyond_the_far_plane(golden: Golden) -> None:
    got = golden.sampler.sample(*golden.inputs)
    assert (golden.expected[2, 3] == -1).all()
    assert (got[2, 3] == -1).all()
    assert (got[2, :3] == 0).all()
    assert (golden.expected[:2, 3] == 1).float().mean() > 0.3  # the others are seen


def test_a_map_does_not_depend_on_its_companions(golden: Golden) -> None:
    together = golden.sampler.sample(*golden.inputs)
    for i in range(len(together)):
        alone = golden.sampler.sample(*(part[i : i + 1] for part in golden.inputs))
        assert torch.equal(alone[0], together[i])

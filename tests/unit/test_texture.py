from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdh_batch.models import texture as texture_module
from fourdh_batch.models.texture import pack_texture, unpack_texture
from fourdh_batch.video import crops


def test_colours_are_normalised_as_crops_are() -> None:
    np.testing.assert_allclose(texture_module.MEAN_RGB, crops.MEAN_RGB, rtol=1e-12)
    np.testing.assert_allclose(texture_module.STD_RGB, crops.STD_RGB, rtol=1e-12)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_packing_keeps_the_mask_and_half_a_grey_level(seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = torch.from_numpy(rng.uniform(0, 255, (2, 3, 256, 256)).astype(np.float32))
    is_seen = torch.from_numpy(rng.random((2, 1, 256, 256)) < 0.5)
    mean = torch.tensor(texture_module.MEAN_RGB)[:, None, None]
    scale = 5 * torch.tensor(texture_module.STD_RGB)[:, None, None]
    rgb = torch.where(is_seen, (levels - mean) / scale, 0)
    texture = torch.cat((rgb, is_seen * 2.0 - 1), dim=1)

    packed = pack_texture(texture)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed[:, 3:], is_seen * torch.tensor(255, dtype=torch.uint8))
    assert not packed[:, :3][~is_seen.expand(-1, 3, -1, -1)].any()
    back = unpack_texture(packed)
    assert back.dtype == torch.float32
    assert torch.equal(back[:, 3], texture[:, 3])
    assert ((back - texture)[:, :3].abs() * scale).max() <= 0.5001
    assert torch.equal(pack_texture(back), packed)


def test_colours_beyond_white_and_black_are_clamped() -> None:
    texture = torch.ones(1, 4, 256, 256)
    texture[:, 0] = -1
    packed = pack_texture(texture)[0, :, 0, 0]
    assert packed.tolist() == [0, 255, 255, 255]

"""Embeddings and distances of texture maps, computed with the published encoder.

The file holds six maps of 16 x 16 cells, their embeddings and seven pairs; weights are those of
`phalp_recipe.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fourdh_batch.models.appearance import EMBEDDING_SCALE, TextureEncoder, texture_distance
from tests.golden.phalp_recipe import TEXTURE_ENCODER_SHAPES, weights
from tests.texture_maps import uv_maps
from tests.tracking_scenes import load


@pytest.fixture(scope="module")
def z() -> dict[str, np.ndarray]:
    return load("texture_autoencoder")


@pytest.fixture(scope="module")
def encoder(z: dict[str, np.ndarray]) -> TextureEncoder:
    encoder = TextureEncoder()
    tensors = weights(TEXTURE_ENCODER_SHAPES, int(z["weights_seed"]))
    encoder.load_state_dict({k.removeprefix("encoding_head."): t for k, t in tensors.items()})
    return encoder.eval()


@pytest.fixture(scope="module")
def maps(z: dict[str, np.ndarray]) -> Tensor:
    return torch.from_numpy(uv_maps(z["uv_rgb_q"], z["uv_mask"]))


def test_embeddings_of_whole_maps_equal_the_reference(
    z: dict[str, np.ndarray], encoder: TextureEncoder, maps: Tensor
) -> None:
    expected = z["embedding_unmasked"]
    # Sums of up to 2304 products in another order; measured 2e-6 of the largest number.
    assert np.abs(encoder.embed(maps).numpy() - expected).max() <= 1e-4 * expected.max()


def test_embeddings_of_masked_pairs_equal_the_reference(
    z: dict[str, np.ndarray], encoder: TextureEncoder, maps: Tensor
) -> None:
    track, detection = maps[z["pairs"][:, 0]], maps[z["pairs"][:, 1]]
    both = ((track[:, 3:] > 0.5) & (detection[:, 3:] > 0.5)).float()
    for side, name in ((track, "track_emb"), (detection, "det_emb")):
        masked = torch.cat((side[:, :3] * both, both), dim=1)
        expected = z[name] * EMBEDDING_SCALE
        assert np.abs(encoder.embed(masked).numpy() - expected).max() <= 1e-4 * expected.max()


def test_distances_and_overlaps_equal_the_reference(
    z: dict[str, np.ndarray], encoder: TextureEncoder, maps: Tensor
) -> None:
    track, detection = (maps[rows] for rows in z["pairs"].T)
    distance, overlap = texture_distance(encoder, track, detection)
    assert distance.numpy() == pytest.approx(z["r_texture"], rel=1e-3, abs=1e-6)
    assert overlap.numpy() == pytest.approx(z["overlap"], abs=1e-12)
    assert (z["overlap"] == 0).any()  # the case of quirk Q7 is among them
    assert (distance.numpy()[z["overlap"] == 0] == 0).all()

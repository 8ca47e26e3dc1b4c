from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from fourdh_batch.errors import CheckpointError
from fourdh_batch.models import texture as texture_module
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.models.texture import (
    Atlas,
    TextureSampler,
    body_atlas,
    load_atlas,
    pack_texture,
    unpack_texture,
)
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


# ---------------------------------------------------------------- atlases


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(scope="module")
def atlas(body: SmplBody) -> Atlas:
    return body_atlas(body)


def test_a_texel_of_the_bodys_atlas_lies_at_its_texture_coordinates(
    body: SmplBody, atlas: Atlas
) -> None:
    assert body.vt is not None
    assert body.ft is not None
    row, column = np.divmod(atlas.texels, 256)
    corners = body.vt[body.ft[atlas.face[row, column]]]  # (N, 3, 2)
    weights = atlas.barycentric[row, column]
    u, v = (corners * weights[..., None]).sum(axis=1).T
    # float32 corners and weights: a hundredth of a texel
    np.testing.assert_allclose(u * 256, column + 0.5, rtol=0, atol=1e-2)
    np.testing.assert_allclose((1 - v) * 256, row + 0.5, rtol=0, atol=1e-2)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert len(atlas.texels) > 256 * 256 / 2
    # Left and right of the body have as many texels as each other.
    is_left = body.v_template.numpy()[body.faces].mean(axis=1)[:, 0] > 0
    assert np.mean(is_left[atlas.face[row, column]]) == pytest.approx(0.5, abs=0.02)


def test_a_body_without_texture_coordinates_asks_for_an_atlas(body: SmplBody) -> None:
    bare = copy.copy(body)
    bare.vt = None
    with pytest.raises(CheckpointError, match=r"body open: .* tracker\.atlas=FOLDER with fmap_256"):
        body_atlas(bare)


def save(folder: Path, face: np.ndarray, weights: np.ndarray) -> Path:
    np.save(folder / "fmap_256.npy", face)
    np.save(folder / "bmap_256.npy", weights)
    return folder


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float64])
def test_a_stored_atlas_is_read_as_it_was(tmp_path: Path, atlas: Atlas, dtype: type) -> None:
    face = np.where(atlas.face < 0, -7, atlas.face).astype(dtype)
    weights = np.where(atlas.face[..., None] < 0, np.nan, atlas.barycentric)
    read = load_atlas(save(tmp_path, face, weights.astype(np.float64)), num_faces=13776)
    np.testing.assert_array_equal(read.face, atlas.face)
    np.testing.assert_array_equal(read.barycentric, atlas.barycentric)
    assert (read.face.dtype, read.barycentric.dtype) == (np.int64, np.float32)
    assert read.digest == atlas.digest
    assert re.fullmatch("[0-9a-f]{64}", read.digest)


def test_the_digest_tells_atlases_apart(atlas: Atlas) -> None:
    weights = atlas.barycentric.copy()
    weights.flat[3 * atlas.texels[0]] += 0.25
    assert Atlas(atlas.face, weights).digest != atlas.digest
    assert Atlas(np.roll(atlas.face, 1), atlas.barycentric).digest != atlas.digest


def test_atlases_that_do_not_fit_are_refused(tmp_path: Path, atlas: Atlas) -> None:
    face, weights = atlas.face, atlas.barycentric
    with pytest.raises(CheckpointError, match=r"fmap_256.npy: no such file"):
        load_atlas(tmp_path, num_faces=13776)
    with pytest.raises(CheckpointError, match=r"numbers below 4992, .* got -1 to 13773"):
        load_atlas(save(tmp_path, face, weights), num_faces=4992)
    with pytest.raises(CheckpointError, match="not all of them, got -1 to -1"):
        load_atlas(save(tmp_path, np.full_like(face, -1), weights), num_faces=13776)
    with pytest.raises(CheckpointError, match="expected whole numbers"):
        load_atlas(save(tmp_path, face + 0.5, weights), num_faces=13776)
    with pytest.raises(CheckpointError, match=r"bmap_256.npy: expected numbers \(256, 256, 3\), g"):
        load_atlas(save(tmp_path, face, weights[..., :2]), num_faces=13776)
    with pytest.raises(CheckpointError, match="expected finite weights"):
        load_atlas(save(tmp_path, face, np.full_like(weights, np.inf)), num_faces=13776)
    off_sum, negative = weights.copy(), weights.copy()
    off_sum.reshape(-1, 3)[atlas.texels[5]] += 0.001
    negative.reshape(-1, 3)[atlas.texels[5]] = [1.5, -0.5, 0]
    for impossible, got in (
        (np.zeros_like(weights), "weights from 0 and sums from 0 to 0"),
        (np.full_like(weights, 1e30), r"weights from 1e\+30 and sums from 3e\+30 to 3e\+30"),
        (np.full((256, 256, 3), 1e308), "sums from inf to inf"),
        (off_sum, r"sums from [01.]+\d* to 1\.003"),
        (negative, r"weights from -0\.5 and"),
    ):
        with pytest.raises(CheckpointError, match=rf"bmap_256.npy: .* within 0\.001 of 1, .*{got}"):
            load_atlas(save(tmp_path, face, impossible), num_faces=13776)
    pickled = np.empty((256, 256), object)
    with pytest.raises(CheckpointError, match=r"expected an \.npy of numbers"):
        load_atlas(save(tmp_path, pickled, weights), num_faces=13776)


# ---------------------------------------------------------------- maps


@pytest.fixture(scope="module")
def sampler(body: SmplBody, atlas: Atlas) -> TextureSampler:
    return TextureSampler(body.faces, atlas)


def standing(body: SmplBody, *, turn_deg: float = 0) -> torch.Tensor:
    """(1, V, 3) the body upright in camera axes, facing the camera when not turned."""
    half_turn = Rotation.from_euler("x", 180, degrees=True)  # y up to y down
    turn = half_turn * Rotation.from_euler("y", turn_deg, degrees=True)
    orient = torch.from_numpy(turn.as_matrix()).float()[None, None]
    pose = torch.eye(3).expand(1, 23, 3, 3)
    return body(orient, pose, torch.zeros(1, 10)).vertices


# The whole body is in the picture.
CAM_T = torch.tensor([[0.0, 0.3, 2 * 5000 / (256 * 0.6)]])


def visible_faces(sampler: TextureSampler, atlas: Atlas, texture: torch.Tensor) -> np.ndarray:
    return atlas.face[texture[0, 3].numpy() > 0]


def test_the_front_of_a_person_is_seen_and_the_back_is_not(
    body: SmplBody, atlas: Atlas, sampler: TextureSampler
) -> None:
    rest = body.v_template.numpy()[body.faces].astype(np.float64)
    normal = np.cross(rest[:, 1] - rest[:, 0], rest[:, 2] - rest[:, 0])
    facing = normal[:, 2] / np.linalg.norm(normal, axis=1)  # towards the front
    white = torch.ones(1, 3, 256, 256), torch.ones(1, 256, 256)
    for turn_deg, sign in ((0, 1), (180, -1)):
        texture = sampler.sample(standing(body, turn_deg=turn_deg), CAM_T, *white)
        seen = np.bincount(visible_faces(sampler, atlas, texture), minlength=len(facing))
        there = np.bincount(atlas.face[atlas.face >= 0], minlength=len(facing))
        towards, away = sign * facing > 0.5, sign * facing < -0.5
        assert seen[towards].sum() > 0.75 * there[towards].sum()  # arms hide some of the rest
        assert seen[away].sum() < 0.08 * there[away].sum()  # at silhouettes, as in the reference


def test_a_picture_with_two_halves_colours_the_sides_of_the_body(
    body: SmplBody, atlas: Atlas, sampler: TextureSampler
) -> None:
    crop = torch.zeros(1, 3, 256, 256)
    crop[:, 0, :, :128] = 1  # left in the picture is the right of a person that faces the camera
    crop[:, 1, :128] = 1  # upper half
    texture = sampler.sample(standing(body), CAM_T, crop, torch.ones(1, 256, 256))[0]
    is_seen = texture[3].numpy() > 0
    at_rest = body.v_template.numpy()[body.faces[atlas.face]].mean(axis=2)  # (256, 256, 3)
    is_right = (at_rest[..., 0] < -0.02) & is_seen
    is_left = (at_rest[..., 0] > 0.02) & is_seen
    assert (texture[0].numpy()[is_right] > 0.199).all()
    assert (texture[0].numpy()[is_left] == 0).all()
    y = (standing(body) + CAM_T)[0, :, 1].numpy()[body.faces[atlas.face]].mean(axis=2)
    is_up, is_down = y < -0.05, y > 0.05
    assert (texture[1].numpy()[is_up & is_seen] > 0.199).all()
    assert (texture[1].numpy()[is_down & is_seen] == 0).all()


def test_only_the_masked_part_is_seen(body: SmplBody, sampler: TextureSampler) -> None:
    crop = torch.ones(1, 3, 256, 256)
    mask = torch.zeros(1, 256, 256)
    assert (sampler.sample(standing(body), CAM_T, crop, mask)[0, 3] == -1).all()
    mask[:, :, :128] = 1
    whole = sampler.sample(standing(body), CAM_T, crop, torch.ones_like(mask))
    half = sampler.sample(standing(body), CAM_T, crop, mask)
    is_seen = half[:, 3] == 1
    assert 0.4 < is_seen.sum() / (whole[:, 3] == 1).sum() < 0.6
    assert (whole[:, 3][is_seen] == 1).all()
    assert (half[:, :3][~is_seen[:, None].expand(-1, 3, -1, -1)] == 0).all()


@pytest.mark.parametrize("depth_m", [-60.0, 0.0, 1e9, float("nan"), float("inf")])
def test_bodies_without_a_sensible_place_are_not_seen(
    body: SmplBody, sampler: TextureSampler, depth_m: float
) -> None:
    cam_t = torch.tensor([[0.0, 0.0, depth_m]])
    crop = torch.ones(1, 3, 256, 256), torch.ones(1, 256, 256)
    texture = sampler.sample(standing(body), cam_t, *crop)
    if depth_m != 0:  # around the lens a few points may count
        assert (texture[:, 3] == -1).all()
    assert torch.isfinite(texture).all()
    assert (texture[:, :3].abs().amax(dim=1)[texture[:, 3] < 0] == 0).all()

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fourdh_batch.models.build_phalp import untrained_pose_predictor
from fourdh_batch.models.predictor import NUM_POSE_VECTOR, PosePredictor, PredictorSize

TOLERANCE = 2e-5
# 12 slots, and a kernel that reaches two windows to either side.
TINY = PredictorSize(
    dim=24,
    depth=2,
    num_heads=3,
    head_dim=16,
    mlp_dim=40,
    frame_length=12,
    conv_stride=2,
    conv_pad=2,
)


@pytest.fixture(scope="module")
def predictor() -> PosePredictor:
    return untrained_pose_predictor(size=TINY)


def histories(frame_index: list[list[int]]) -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    frames = np.array(frame_index, np.int64)
    pose = generator.standard_normal((*frames.shape, NUM_POSE_VECTOR)).astype(np.float32)
    return pose, frames


def reference(predictor: PosePredictor, pose: Any, frames: Any, slot: Any) -> Any:
    """The network step by step as published: all slots, all keys, all read-outs."""
    size, network = predictor.network.size, predictor.network
    w: dict[str, Tensor] = dict(network.state_dict())
    rows = torch.zeros(len(pose), size.frame_length, NUM_POSE_VECTOR)
    is_seen = torch.zeros(rows.shape[:2], dtype=torch.bool)
    for track, (vectors, times) in enumerate(zip(pose, frames, strict=True)):
        for vector, time in zip(vectors, times, strict=True):
            at = min(time - times[0], size.frame_length - 1)
            rows[track, at], is_seen[track, at] = torch.from_numpy(vector), True
    x = (rows - predictor.mean) / (predictor.std + 1e-10)
    x = torch.where(is_seen[..., None], network.pose_shape_encoder(x), w["mask_token"])
    x = x + w["pos_embedding_learned1"]

    def block(x: Tensor, name: str, is_key: Tensor | None) -> Tensor:
        def linear(x: Tensor, part: str) -> Tensor:
            return F.linear(x, w[f"{name}.{part}.weight"], w.get(f"{name}.{part}.bias"))

        def norm(x: Tensor, part: str) -> Tensor:
            affine = w[f"{name}.{part}.norm.weight"], w[f"{name}.{part}.norm.bias"]
            return F.layer_norm(x, (size.dim,), *affine)

        qkv = linear(norm(x, "0"), "0.fn.to_qkv").view(*x.shape[:2], 3, size.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (K, A, L, G)
        logits = q @ k.transpose(2, 3) * size.head_dim**-0.5
        if is_key is not None:
            logits = logits.masked_fill(~is_key[:, None, None], -1000)
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, "0.fn.to_out.0")
        return x + linear(F.gelu(linear(norm(x, "1"), "1.fn.net.0")), "1.fn.net.3")

    for depth in range(size.depth):
        x = block(x, f"transformer1.layers.{depth}", is_seen)
    x = network.conv_de(network.conv_en(x.transpose(1, 2))).transpose(1, 2)
    x = block(x + w["pos_embedding_learned2"], "transformer2.layers.0", None)
    at = torch.from_numpy(np.minimum(slot, size.frame_length - 1))
    return network.read_out(x[torch.arange(len(x)), at]).numpy()


FRAMES = [
    [5, 6, 7, 8, 9, 10, 11],
    [3, 3, 3, 3, 3, 3, 4],
    [0, 1, 2, 5, 6, 8, 9],
    [0, 9, 20, 30, 31, 32, 33],
]


def test_shortcuts_change_nothing(predictor: PosePredictor) -> None:
    pose, frames = histories(FRAMES)
    slot = np.array([7, 2, 11, 40])
    expected = reference(predictor, pose, frames, slot)
    np.testing.assert_allclose(predictor(pose, frames, slot), expected, rtol=0, atol=TOLERANCE)


def test_a_track_does_not_depend_on_its_companions(predictor: PosePredictor) -> None:
    pose, frames = histories(FRAMES)
    slot = np.array([7, 2, 11, 40])
    together = predictor(pose, frames, slot)
    for row in range(len(pose)):
        one = slice(row, row + 1)
        alone = predictor(pose[one], frames[one], slot[one])
        np.testing.assert_allclose(alone, together[one], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_broken_history_stays_alone(predictor: PosePredictor, bad: float) -> None:
    pose, frames = histories(FRAMES)
    slot = np.array([7, 2, 11, 40])
    expected = predictor(pose, frames, slot)
    pose[1, -1] = bad
    got = predictor(pose, frames, slot)
    others = [0, 2, 3]
    np.testing.assert_allclose(got[others], expected[others], rtol=0, atol=TOLERANCE)
    if not np.isfinite(bad):
        assert not np.isfinite(got[1]).all()


def test_the_newest_of_several_poses_in_a_slot_counts(predictor: PosePredictor) -> None:
    pose, frames = histories([[3, 3, 3, 3, 3, 3, 4]])
    slot = np.array([2])
    expected = predictor(pose, frames, slot)
    pose[0, :5] = 7.0
    np.testing.assert_array_equal(predictor(pose, frames, slot), expected)
    pose[0, 5] += 1.0
    assert np.abs(predictor(pose, frames, slot) - expected).max() > 1e-4


def test_q4_a_history_longer_than_the_slots_is_clamped(predictor: PosePredictor) -> None:
    pose, frames = histories([[0, 9, 20, 30, 31, 32, 33]])
    got = predictor(pose, frames, np.array([34]))
    capped = predictor(pose, np.minimum(frames, TINY.frame_length - 1), np.array([11]))
    np.testing.assert_array_equal(got, capped)
    assert np.isfinite(got).all()


def test_no_tracks_give_no_predictions(predictor: PosePredictor) -> None:
    pose, frames = histories(FRAMES)
    assert predictor(pose[:0], frames[:0], np.zeros(0, np.int64)).shape == (0, NUM_POSE_VECTOR)
    none = predictor.complete(pose[0], np.ones(7, np.bool_), np.zeros(0, np.int64))
    assert none.shape == (0, NUM_POSE_VECTOR)


def test_predictions_have_rotations(predictor: PosePredictor) -> None:
    pose, frames = histories(FRAMES)
    got = predictor(pose, frames, np.array([7, 2, 11, 40]))
    assert got.dtype == np.float32
    rotmats = got[:, :216].reshape(-1, 3, 3)
    np.testing.assert_allclose(
        rotmats @ rotmats.transpose(0, 2, 1), np.tile(np.eye(3), (len(rotmats), 1, 1)), atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.det(rotmats), 1, atol=1e-5)


def test_a_stretch_is_completed_as_a_track_would_be(predictor: PosePredictor) -> None:
    pose, frames = histories([[0, 1, 2, 5, 6, 8, 9]])
    row, is_seen = np.full((10, NUM_POSE_VECTOR), np.nan, np.float32), np.zeros(10, np.bool_)
    row[frames[0]], is_seen[frames[0]] = pose[0], True
    wanted = np.array([3, 7, 11])
    got = predictor.complete(row, is_seen, wanted)
    for slot, one in zip(wanted, got, strict=True):
        expected = predictor(pose, frames, np.array([slot]))[0]
        np.testing.assert_allclose(one, expected, rtol=0, atol=TOLERANCE)


def test_a_stretch_without_any_pose_has_an_answer(predictor: PosePredictor) -> None:
    row = np.full((5, NUM_POSE_VECTOR), np.nan, np.float32)
    got = predictor.complete(row, np.zeros(5, np.bool_), np.array([0, 4]))
    # What is empty is keyed alike: a track with no history at all.
    network = predictor.network
    rows = np.zeros((1, 0, NUM_POSE_VECTOR), np.float32), np.zeros((1, 0), np.int64)
    expected = [reference(predictor, *rows, np.array([slot]))[0] for slot in (0, 4)]
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    assert network.size.frame_length == predictor.frame_length


def test_impossible_slots_and_lengths_are_refused(predictor: PosePredictor) -> None:
    row, is_seen = np.zeros((13, NUM_POSE_VECTOR), np.float32), np.ones(13, np.bool_)
    with pytest.raises(ValueError, match="at most 12 frames, got 13"):
        predictor.complete(row, is_seen, np.array([0]))
    for slot in (-1, 12):
        with pytest.raises(ValueError, match="slots below 12"):
            predictor.complete(row[:5], is_seen[:5], np.array([slot]))


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="multiple of the stride 5"):
        PredictorSize(dim=8, depth=1, num_heads=1, head_dim=8, mlp_dim=8, frame_length=12)
    with pytest.raises(ValueError, match="num_heads: expected 1 or more, got 0"):
        PredictorSize(dim=8, depth=1, num_heads=0, head_dim=8, mlp_dim=8)

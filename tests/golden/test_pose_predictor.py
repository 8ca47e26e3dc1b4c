"""The pose predictor against the published code, on weights that anyone can make again.

Tolerance: 2e-5 absolute in float32, as the published code itself differs by 1e-6 between batch
sizes. What was left out of the recorded numbers: actions, and three of four slots.

Source: docs/PHALP.md, sections 5, 13.2 and 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import phalp_recipe as recipe
import pytest
import torch
from torch import Tensor

from fourdh_batch.models.build_phalp import expected_shapes, untrained_pose_predictor
from fourdh_batch.models.predictor import (
    NUM_POSE_VECTOR,
    PosePredictor,
    PoseTransformer,
    PredictorSize,
)
from fourdh_batch.types import F32
from tests.conftest import DATA

TOLERANCE = 2e-5
SIZES = {"small": (recipe.SMALL, recipe.SMALL_SEED), "wide": (recipe.WIDE, recipe.WIDE_SEED)}
RECORDED_SLOTS = np.arange(0, recipe.FRAME_LENGTH, 4)
STEP, MARGIN = 32, 32  # of the windows in which a whole track is completed


def size_of(name: str) -> PredictorSize:
    config = dict(SIZES[name][0])
    return PredictorSize(
        dim=config.pop("width"),
        mid_dim=recipe.MID_DIM,
        frame_length=recipe.FRAME_LENGTH,
        conv_stride=recipe.CONV_STRIDE,
        conv_pad=recipe.CONV_PAD,
        **config,
    )


def golden(name: str) -> Any:
    return np.load(DATA / "tracking" / f"pose_transformer_{name}.npz")


def weights(name: str) -> dict[str, Tensor]:
    return recipe.weights(expected_shapes(size_of(name)), SIZES[name][1])


def make_predictor(name: str) -> PosePredictor:
    network = PoseTransformer(size_of(name))
    network.load_state_dict(weights(name))
    mean, std = torch.zeros(NUM_POSE_VECTOR), torch.ones(NUM_POSE_VECTOR)
    with golden(name) as z:
        for padded, values in ((mean, z["mean"]), (std, z["std"])):
            padded[: values.size] = torch.from_numpy(values.ravel()).float()
    return PosePredictor(network, mean, std)


@pytest.fixture(scope="module")
def small() -> PosePredictor:
    return make_predictor("small")


def placed(pose: F32, frame_index: np.ndarray) -> tuple[F32, np.ndarray]:
    """A history laid out over all slots: (L, 229) and (L,) whether there is a pose."""
    row, is_seen = (
        np.zeros((recipe.FRAME_LENGTH, NUM_POSE_VECTOR), np.float32),
        np.zeros(recipe.FRAME_LENGTH, np.bool_),
    )
    for vector, slot in zip(pose, frame_index - frame_index[0], strict=True):
        row[slot], is_seen[slot] = vector, True
    return row, is_seen


@pytest.mark.parametrize(
    ("name", "num_tensors", "digest"),
    [("small", 78, recipe.SMALL_DIGEST), ("wide", 122, recipe.WIDE_DIGEST)],
)
def test_recipe_gives_the_weights_of_the_goldens(name: str, num_tensors: int, digest: int) -> None:
    seed, dim = SIZES[name][1], size_of(name).dim
    never_read = {
        "class_token": (1, 1, dim),
        "action_head_ava.0.0.weight": (recipe.NUM_ACTIONS, dim),
        "action_head_ava.0.0.bias": (recipe.NUM_ACTIONS,),
    }
    others = recipe.weights(never_read | recipe.TEXTURE_ENCODER_SHAPES, seed)
    everything = weights(name) | others
    assert len(everything) == num_tensors
    assert recipe.digest(everything) == digest


def test_untrained_weights_are_those_of_the_recipe() -> None:
    untrained = untrained_pose_predictor(recipe.SMALL_SEED).network.state_dict()
    expected = weights("small")
    assert untrained.keys() == expected.keys()
    assert recipe.digest(untrained) == recipe.digest(expected)


@pytest.mark.parametrize("name", SIZES)
def test_predictions_at_the_own_slot_equal_the_published_ones(name: str) -> None:
    predictor = make_predictor(name)
    with golden(name) as z:
        got = predictor(z["history_pose"], z["history_time"], z["t_x"])
        np.testing.assert_allclose(got, z["own_time_pred"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SIZES)
def test_predictions_at_a_shared_slot_equal_the_published_ones(name: str) -> None:
    predictor = make_predictor(name)
    with golden(name) as z:
        for n in range(5):
            order = z[f"order{n}"]
            first = order[0]
            # Nothing is capped here: the caller need not know how far a predictor can tell.
            span = z["history_time"][first, -1] - z["history_time"][first, 0]
            slot = np.full(len(order), span + z["time_since_update"][first] + 1)
            got = predictor(z["history_pose"][order], z["history_time"][order], slot)
            np.testing.assert_allclose(got, z[f"pred{n}"], rtol=0, atol=TOLERANCE)


def test_all_slots_of_a_history_equal_the_published_ones(small: PosePredictor) -> None:
    with golden("small") as z:
        histories = zip(z["history_pose"], z["history_time"], strict=True)
        for (pose, frame_index), expected in zip(histories, z["decoded_all_times"], strict=True):
            got = small.complete(*placed(pose, frame_index), RECORDED_SLOTS)
            np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def test_tokens_equal_the_published_ones(small: PosePredictor) -> None:
    with golden("small") as z, torch.inference_mode():
        for n, expected in enumerate(z["tokens_first3"]):
            row, is_seen = placed(z["history_pose"][n], z["history_time"][n])
            slot = torch.from_numpy(np.flatnonzero(is_seen))[None]
            pose = (torch.from_numpy(row) - small.mean) / (small.std + 1e-10)
            got = small.network.tokens(
                pose[slot],
                slot,
                torch.zeros_like(slot, dtype=torch.bool),
                torch.from_numpy(RECORDED_SLOTS)[None],
            )
            np.testing.assert_allclose(got[0].numpy(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("track", [2, 3, 4])
def test_completed_tracks_equal_the_published_ones(small: PosePredictor, track: int) -> None:
    with np.load(DATA / "tracking" / "postprocess.npz") as z:
        pose, is_seen = z[f"track{track}_pose_shape"], z[f"track{track}_has_detection"] > 0
        expected = z[f"track{track}_smoothed_pose"]
    for window in range(0, len(pose), STEP):
        start, end = max(0, window - MARGIN), min(len(pose), window + STEP + MARGIN)
        kept = np.arange(window, min(window + STEP, len(pose)))
        got = small.complete(pose[start:end], is_seen[start:end], kept - start)
        np.testing.assert_allclose(got, expected[kept], rtol=0, atol=1e-4)

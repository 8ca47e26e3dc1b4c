"""Losses, discriminator and their gradients against the published code (`losses.npz`).

Tolerances: sums of some hundred float32 numbers; other orders of summation give 1e-6 of the sum.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import recipe
import torch
from test_hmr2_network import checkpoint_keys
from torch import Tensor

from fourdh_batch.config import LossConfig
from fourdh_batch.geometry import axis_angle_to_rotmat
from fourdh_batch.models.hmr2 import HmrOutput
from fourdh_batch.training.discriminator import Discriminator
from fourdh_batch.training.examples import Batch
from fourdh_batch.training.losses import (
    Losses,
    discriminator_loss,
    generator_loss,
    hmr2_losses,
)
from tests.conftest import DATA

RELATIVE = 2e-6
SCORES = 1e-5
PREFIX = "discriminator."
PREDICTED = ("global_orient", "body_pose", "betas", "keypoints_3d", "keypoints_2d")


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(DATA / "hmr2" / "losses.npz")


@pytest.fixture(scope="module")
def discriminator() -> Discriminator:
    network = Discriminator()
    shapes = {PREFIX + name: tensor.shape for name, tensor in network.state_dict().items()}
    weights = recipe.weights(shapes, {})
    network.load_state_dict({name.removeprefix(PREFIX): w for name, w in weights.items()})
    return network


def rotmats(axis_angle: Any) -> Tensor:
    return torch.from_numpy(axis_angle_to_rotmat(axis_angle.reshape(len(axis_angle), -1, 3)))


def predicted(golden: Any) -> HmrOutput:
    fields = {name: torch.from_numpy(golden[f"pred_{name}"]).requires_grad_() for name in PREDICTED}
    return HmrOutput(
        **fields,
        **dict.fromkeys(("pred_cam", "pred_cam_t", "pose6d", "token_out"), torch.empty(0)),
    )


def truth(golden: Any) -> Batch:
    np.testing.assert_array_equal(golden["has_global_orient"], golden["has_body_pose"])
    return Batch(
        crop=torch.empty(0),
        keypoints_2d=torch.from_numpy(golden["gt_keypoints_2d"]),
        keypoints_3d=torch.from_numpy(golden["gt_keypoints_3d"]),
        global_orient=rotmats(golden["gt_global_orient"]),
        body_pose=rotmats(golden["gt_body_pose"]),
        betas=torch.from_numpy(golden["gt_betas"]),
        has_pose=torch.from_numpy(golden["has_body_pose"]),
        has_betas=torch.from_numpy(golden["has_betas"]),
        relative_size=torch.ones(4),
    )


def test_every_loss_and_their_sum(golden: Any) -> None:
    losses = hmr2_losses(predicted(golden), truth(golden))
    for name in Losses._fields:
        expected = torch.tensor(golden[f"out_loss_{name}"])
        torch.testing.assert_close(getattr(losses, name).detach(), expected, rtol=RELATIVE, atol=0)
    total = losses.weighted(LossConfig()).detach()
    torch.testing.assert_close(total, torch.tensor(golden["out_loss"]), rtol=RELATIVE, atol=0)


def test_scores_and_adversarial_losses(golden: Any, discriminator: Discriminator) -> None:
    output = predicted(golden)
    real = rotmats(golden["mocap_body_pose"]), torch.from_numpy(golden["mocap_betas"])
    with torch.no_grad():
        fake_scores = discriminator(output.body_pose, output.betas)
        real_scores = discriminator(*real)
    for got, name in ((fake_scores, "disc_fake_out"), (real_scores, "disc_real_out")):
        torch.testing.assert_close(
            got, torch.from_numpy(golden[f"out_{name}"]), rtol=0, atol=SCORES
        )
    for loss, name in (
        (generator_loss(fake_scores), "gen"),
        (discriminator_loss(fake_scores, real_scores), "disc"),
    ):
        expected = torch.tensor(golden[f"out_loss_{name}"])
        torch.testing.assert_close(loss, expected, rtol=RELATIVE, atol=0)


def test_gradients_of_the_predictions(golden: Any, discriminator: Discriminator) -> None:
    output, weights = predicted(golden), LossConfig()
    total = hmr2_losses(output, truth(golden)).weighted(weights)
    total = total + weights.adversarial * generator_loss(
        discriminator(output.body_pose, output.betas)
    )
    expected = torch.tensor(golden["out_loss_total_generator"])
    torch.testing.assert_close(total.detach(), expected, rtol=RELATIVE, atol=0)
    gradients = torch.autograd.grad(total, [getattr(output, name) for name in PREDICTED])
    for name, got in zip(PREDICTED, gradients, strict=True):
        wanted = torch.from_numpy(golden[f"grad_{name}"])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7, msg=name)


def test_gradients_of_the_discriminator(golden: Any, discriminator: Discriminator) -> None:
    output = predicted(golden)
    real = rotmats(golden["mocap_body_pose"]), torch.from_numpy(golden["mocap_betas"])
    discriminator.zero_grad()
    fake_scores = discriminator(output.body_pose.detach(), output.betas.detach())
    loss = LossConfig().adversarial * discriminator_loss(fake_scores, discriminator(*real))
    loss.backward()
    gradient = {PREFIX + name: p.grad for name, p in discriminator.named_parameters()}
    names = golden["grad_names"].tolist()
    assert sorted(gradient) == names
    norms, firsts = golden["grad_discriminator_norm"], golden["grad_discriminator_first"]
    for name, norm, first in zip(names, norms, firsts, strict=True):
        got = gradient[name]
        assert got is not None
        assert float(got.norm()) == pytest.approx(float(norm), rel=1e-4, abs=1e-7), name
        some = got.flatten()[: len(first)]
        wanted = torch.from_numpy(first[: len(some)])
        torch.testing.assert_close(some, wanted, rtol=1e-4, atol=1e-7, msg=name)


def test_names_and_shapes_are_those_of_the_published_checkpoint() -> None:
    published = {k: s for k, s in checkpoint_keys().items() if k.startswith(PREFIX)}
    ours = {PREFIX + k: tuple(t.shape) for k, t in Discriminator().state_dict().items()}
    assert ours == published
    assert sum(int(np.prod(shape)) for shape in ours.values()) == 1_807_619
    weights = recipe.fill(0, "discriminator.D_conv1.weight", (32, 9, 1, 1))
    assert zlib.crc32(weights.tobytes()) == 3970327404


def test_gradients_agree_with_finite_differences() -> None:
    """In float64, of everything that the generator is trained on."""
    random = torch.Generator().manual_seed(0)
    network = Discriminator().double()

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    batch = Batch(
        crop=torch.empty(0),
        keypoints_2d=some(2, 44, 3).abs(),
        keypoints_3d=some(2, 44, 4).abs(),
        global_orient=some(2, 1, 3, 3),
        body_pose=some(2, 23, 3, 3),
        betas=some(2, 10),
        has_pose=torch.tensor([1.0, 0.0], dtype=torch.float64),
        has_betas=torch.tensor([0.0, 1.0], dtype=torch.float64),
        relative_size=torch.ones(2),
    )

    def total(*fields: Tensor) -> Tensor:
        output = HmrOutput(
            **dict(zip(PREDICTED, fields, strict=True)),
            **dict.fromkeys(("pred_cam", "pred_cam_t", "pose6d", "token_out"), torch.empty(0)),
        )
        loss = hmr2_losses(output, batch).weighted(LossConfig())
        return loss + 0.01 * generator_loss(network(output.body_pose, output.betas))

    shapes = (2, 1, 3, 3), (2, 23, 3, 3), (2, 10), (2, 44, 3), (2, 44, 2)
    fields = [some(*shape).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(total, fields, fast_mode=True)

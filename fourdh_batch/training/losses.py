"""The losses of HMR 2.0, as published.

All are sums, over the batch too: only the adversarial terms are divided by its size. Predictions
are those of `models.hmr2`, truth is a `training.examples.Batch`.

`B` people, `K` = 44 keypoints.

Source: Goel et al., Humans in 4D, section 3.2; numbers of the published training configuration.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fourdh_batch.config import LossConfig
from fourdh_batch.models.hmr2 import HmrOutput
from fourdh_batch.training.examples import Batch

PELVIS = 39  # Pelvis (MPII): keypoints in space count from it


class Losses(NamedTuple):
    """Sums without their weights, each of one number."""

    keypoints_2d: Tensor
    keypoints_3d: Tensor
    global_orient: Tensor
    body_pose: Tensor
    betas: Tensor

    def weighted(self, weights: LossConfig) -> Tensor:
        """What is published as `loss`: their weighted sum, without the adversarial term."""
        return (
            weights.keypoints_2d * self.keypoints_2d
            + weights.keypoints_3d * self.keypoints_3d
            + weights.global_orient * self.global_orient
            + weights.body_pose * self.body_pose
            + weights.betas * self.betas
        )


def keypoints_2d_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """L1 in the picture.

    Args:
        predicted: (B, K, 2) crop widths.
        truth: (B, K, 3) crop widths, then the confidence, which weighs linearly.
    """
    return (truth[..., 2:] * (predicted - truth[..., :2]).abs()).sum()


def keypoints_3d_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """L1 in space, each side counted from its own pelvis, whatever that one's confidence.

    Args:
        predicted: (B, K, 3) metres.
        truth: (B, K, 4) metres, then the confidence.
    """
    position = truth[..., :3]
    difference = (predicted - predicted[:, PELVIS, None]) - (position - position[:, PELVIS, None])
    return (truth[..., 3:] * difference.abs()).sum()


def parameter_loss(predicted: Tensor, truth: Tensor, has_truth: Tensor) -> Tensor:
    """Squared differences.

    Args:
        predicted, truth: (B, ...) rotation matrices or shape coefficients.
        has_truth: (B,) 1 where the truth is known, 0 where the person does not count.
    """
    return (has_truth[:, None] * (predicted - truth).flatten(1).square()).sum()


def generator_loss(scores: Tensor) -> Tensor:
    """How far predicted bodies are from passing as real.

    Args:
        scores: (B, 25) of the discriminator.
    """
    return (scores - 1).square().sum() / len(scores)


def discriminator_loss(scores_predicted: Tensor, scores_real: Tensor) -> Tensor:
    """How far the discriminator is from telling both kinds.

    Args:
        scores_predicted: (B, 25).
        scores_real: (R, 25), as published of twice as many bodies; both sums are divided by B.
    """
    wrong = scores_predicted.square().sum() + (scores_real - 1).square().sum()
    return wrong / len(scores_predicted)


def hmr2_losses(output: HmrOutput, truth: Batch) -> Losses:
    """All losses of a batch that need no discriminator."""
    return Losses(
        keypoints_2d=keypoints_2d_loss(output.keypoints_2d, truth.keypoints_2d),
        keypoints_3d=keypoints_3d_loss(output.keypoints_3d, truth.keypoints_3d),
        global_orient=parameter_loss(output.global_orient, truth.global_orient, truth.has_pose),
        body_pose=parameter_loss(output.body_pose, truth.body_pose, truth.has_pose),
        betas=parameter_loss(output.betas, truth.betas, truth.has_betas),
    )

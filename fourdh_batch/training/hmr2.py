"""HMR 2.0 as a task of the training loop: generator, then discriminator, in every step.

Source: Goel et al., Humans in 4D, section 3.2; training code of HMR 2.0. Deviations: bf16 in place
of fp16 autocast (no loss scaling then), and the head stays float32, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from fourdh_batch.config import LoopConfig, LossConfig
from fourdh_batch.evaluate.pose import (
    EVALUATION_KEYPOINTS,
    PELVIS_KEYPOINT,
    mpjpe_mm,
    pa_mpjpe_mm,
    pck,
    pck_distances,
)
from fourdh_batch.models.build import save_hmr2
from fourdh_batch.models.checkpoint import read_safetensors_metadata
from fourdh_batch.models.hmr2 import Hmr2, HmrOutput, backbone_view
from fourdh_batch.models.smpl import SmplBody
from fourdh_batch.training.discriminator import Discriminator
from fourdh_batch.training.examples import Batch, Example, collate
from fourdh_batch.training.keypoint_cells import KeypointCells
from fourdh_batch.training.loop import Examples, update
from fourdh_batch.training.losses import discriminator_loss, generator_loss, hmr2_losses
from fourdh_batch.types import F32

REAL_PER_EXAMPLE = 2  # bodies of motion capture for each predicted one, as published
WEIGHTS_NAME = "hmr2.safetensors"


class RealPoses(Protocol):
    """Numbered bodies that the discriminator takes for real."""

    def __getitem__(self, number: int) -> tuple[F32, F32]:
        """(23, 3, 3) rotation matrices and (10,) betas, of any number from 0 on."""


class HmrBatch(NamedTuple):
    """What a step sees.

    Attributes:
        people: B examples.
        real_pose, real_betas: (2 B, 23, 3, 3) and (2 B, 10); empty without a discriminator.
    """

    people: Batch
    real_pose: Tensor
    real_betas: Tensor


class _WithRealPoses:
    """Examples, each with its bodies for the discriminator."""

    def __init__(self, examples: Examples, real: RealPoses | None) -> None:
        self._examples = examples
        self._real = real

    def __getitem__(self, number: int) -> tuple[Example, list[tuple[F32, F32]]]:
        first = REAL_PER_EXAMPLE * number
        numbers = range(first, first + REAL_PER_EXAMPLE) if self._real else ()
        return self._examples[number], [cast(RealPoses, self._real)[n] for n in numbers]


class _Bodies(nn.Module):
    """The network with gradients; one call for `DistributedDataParallel` to watch."""

    def __init__(self, model: Hmr2, precision: str, cells: KeypointCells | None = None) -> None:
        super().__init__()
        self.model = model
        self.cells = cells
        self._precision = precision

    def forward(self, crops: Tensor) -> tuple[HmrOutput, Tensor]:
        """As `Hmr2`, and what `KeypointCells` makes of its tokens, which may be empty."""
        with torch.autocast(crops.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            tokens = self.model.backbone(backbone_view(crops))
        tokens = tokens.float()
        told = self.cells(tokens) if self.cells else tokens.new_empty(0)
        return self.model.read_out(tokens), told


class HmrTask:
    """See `loop.Task`.

    Args:
        model: with its first weights, on the device of the training.
        loop, loss: settings.
        examples, held_out, num_held_out: see `loop.Task`; people with `Example`s.
        real: bodies for the discriminator; None trains without one.
        drop_path: see `ViT.set_drop_path`.
    """

    weights_name = WEIGHTS_NAME

    def __init__(
        self,
        model: Hmr2,
        *,
        loop: LoopConfig,
        loss: LossConfig,
        examples: Examples,
        held_out: Mapping[str, Examples],
        num_held_out: int,
        real: RealPoses | None,
        drop_path: float = 0.0,
    ) -> None:
        self._model = model
        self._loop = loop
        self._loss = loss
        self._device = next(model.parameters()).device
        model.backbone.set_drop_path(drop_path)
        model.requires_grad_(True)
        # Never acts on an answer: its input is zero.
        model.smpl_head.transformer.to_token_embedding.weight.requires_grad_(False)
        self._cells: KeypointCells | None = None
        self._discriminator: Discriminator | None = None
        self._judge: nn.Module | None = None
        modules: dict[str, nn.Module] = {"backbone": model.backbone, "smpl_head": model.smpl_head}
        self._trained = [p for p in model.parameters() if p.requires_grad]
        if loss.keypoint_cells:
            torch.manual_seed(loop.seed)
            self._cells = KeypointCells(model.backbone).to(self._device)
            modules["cells"] = self._cells
            self._trained += self._cells.parameters()
        self._bodies: nn.Module = _Bodies(model, loop.precision, self._cells)
        if real:
            torch.manual_seed(loop.seed)
            self._judge = self._discriminator = Discriminator().to(self._device)
            modules["discriminator"] = self._discriminator
        self.modules: Mapping[str, nn.Module] = modules
        self.optimizers: Mapping[str, Optimizer] = {"generator": self._optimizer(self._trained)}
        if self._discriminator:
            own = self._discriminator.parameters()
            self.optimizers = {**self.optimizers, "discriminator": self._optimizer(own)}
        self.examples: Examples = _WithRealPoses(examples, real)
        self.held_out: Mapping[str, Examples] = {
            name: _WithRealPoses(people, None) for name, people in held_out.items()
        }
        self.num_held_out = num_held_out
        self.metadata = {"size": model.size_name, "origin": "trained"}

    def _optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return AdamW(parameters, lr=self._loop.learning_rate, weight_decay=self._loop.weight_decay)

    def collate(self, examples: Sequence[tuple[Example, list[tuple[F32, F32]]]]) -> HmrBatch:
        """Examples side by side."""
        return collate_with_real(examples)

    def distribute(self) -> None:
        """See `loop.Task`."""
        # Buffers are the body's and the mean: the same everywhere, and never change.
        self._bodies = DistributedDataParallel(self._bodies, broadcast_buffers=False)
        if self._discriminator:
            self._judge = DistributedDataParallel(self._discriminator)

    def step(self, batch: HmrBatch) -> dict[str, Tensor]:
        """See `loop.Task`. The figure `loss` leaves the adversarial term out, as published."""
        people = batch.people.to(self._device)
        output, told = self._bodies(people.crop)
        losses = hmr2_losses(output, people)
        loss = losses.weighted(self._loss)
        figures = {"loss": loss.detach()}
        figures |= {f"loss_{name}": value.detach() for name, value in losses._asdict().items()}
        if self._cells:
            cells = self._cells.loss(told, people.keypoints_2d)
            figures["loss_keypoint_cells"] = cells.detach()
            loss = loss + self._loss.keypoint_cells * cells
        if self._discriminator:
            self._discriminator.requires_grad_(False)
            scores = self._discriminator(output.body_pose, output.betas)
            self._discriminator.requires_grad_(True)
            adversarial = generator_loss(scores)
            figures["loss_generator"] = adversarial.detach()
            loss = loss + self._loss.adversarial * adversarial
        generator = self.optimizers["generator"]
        figures["gradient_norm"] = update(generator, loss, self._trained, self._loop.clip_norm)
        if self._judge and self._discriminator:
            figures["loss_discriminator"] = self._judge_step(batch, output)
        return figures

    def _judge_step(self, batch: HmrBatch, output: HmrOutput) -> Tensor:
        assert self._judge
        assert self._discriminator
        num = len(output.betas)
        # One pass over both kinds: the scores of a body do not depend on its companions.
        scores = self._judge(
            torch.cat((output.body_pose.detach(), batch.real_pose.to(self._device))),
            torch.cat((output.betas.detach(), batch.real_betas.to(self._device))),
        )
        loss = discriminator_loss(scores[:num], scores[num:])
        update(
            self.optimizers["discriminator"],
            self._loss.adversarial * loss,
            self._discriminator.parameters(),
            0.0,
        )
        return loss.detach()

    def evaluate(self, batches: Iterable[HmrBatch]) -> dict[str, float]:
        """See `loop.Task`: MPJPE and PA-MPJPE in mm of people with known keypoints in space, what
        the mean body of the same people would get, and PCK."""
        return evaluate_hmr2(_Bodies(self._model, self._loop.precision), self._model, batches)

    def save(self, path: Path) -> str:
        """See `loop.Task`."""
        save_hmr2(self._model, path, origin="trained")
        return read_safetensors_metadata(path)["digest"]


def collate_with_real(
    examples: Sequence[tuple[Example, list[tuple[F32, F32]]]],
) -> HmrBatch:
    """Examples and real bodies side by side."""
    people, real = zip(*examples, strict=True)
    bodies = [body for some in real for body in some]
    if not bodies:
        return HmrBatch(collate(people), torch.empty(0), torch.empty(0))
    poses, betas = zip(*bodies, strict=True)
    return HmrBatch(
        collate(people), torch.from_numpy(np.stack(poses)), torch.from_numpy(np.stack(betas))
    )


def evaluate_hmr2(bodies: nn.Module, model: Hmr2, batches: Iterable[HmrBatch]) -> dict[str, float]:
    """Figures of crops; see `HmrTask.evaluate`."""
    device = next(model.parameters()).device
    found, truth = [], []
    for batch in batches:
        output, _ = bodies(batch.people.crop.to(device))
        found.append((output.keypoints_3d.cpu().numpy(), output.keypoints_2d.cpu().numpy()))
        truth.append(batch.people._replace(crop=torch.empty(0)))
    keypoints_3d, keypoints_2d = (np.concatenate(part) for part in zip(*found, strict=True))
    true_3d = np.concatenate([batch.keypoints_3d.numpy() for batch in truth])
    true_2d = np.concatenate([batch.keypoints_2d.numpy() for batch in truth])
    size = np.concatenate([batch.relative_size.numpy() for batch in truth])
    figures: dict[str, float] = {}
    in_space = (true_3d[:, [*EVALUATION_KEYPOINTS, PELVIS_KEYPOINT], 3] > 0).all(axis=1)
    if in_space.any():
        pair = keypoints_3d[in_space], true_3d[in_space, :, :3]
        figures["mpjpe_mm"] = float(mpjpe_mm(*pair).mean())
        figures["pa_mpjpe_mm"] = float(pa_mpjpe_mm(*pair).mean())
        mean = _mean_body(cast(SmplBody, model.body), truth)
        if mean is not None:
            alike = np.repeat(mean[None], len(pair[1]), axis=0)
            figures["pa_mpjpe_mm_of_mean_body"] = float(pa_mpjpe_mm(alike, pair[1]).mean())
    confidence = true_2d[..., 2]
    if (confidence > 0.5).any():
        distances = pck_distances(keypoints_2d, true_2d[..., :2], confidence, 1 / size)
        result = pck(distances)
        figures |= {
            f"pck_{threshold:g}": float(value)
            for threshold, value in zip(result.thresholds, result.mean, strict=True)
        }
    return figures


def _mean_body(body: SmplBody, truth: Sequence[Batch]) -> F32 | None:
    """(K, 3) keypoints of the mean pose and shape of those whose parameters are known."""
    known = torch.cat([batch.has_pose for batch in truth]) > 0
    if not known.any():
        return None
    mean_pose = mean_rotations(torch.cat([batch.body_pose for batch in truth])[known])
    betas = torch.cat([batch.betas for batch in truth])[known].mean(dim=0)
    device = body.v_template.device
    upright = torch.eye(3)[None, None]
    parameters = (tensor.to(device) for tensor in (upright, mean_pose[None], betas[None]))
    keypoints: F32 = body.keypoints_3d(*parameters)[0].cpu().numpy()
    return keypoints


def mean_rotations(rotations: Tensor) -> Tensor:
    """(J, 3, 3) rotations that are closest to all of (N, J, 3, 3), by least squares."""
    u, _, vt = torch.linalg.svd(rotations.mean(dim=0).double())
    sign = torch.ones(len(u), 3, dtype=u.dtype)
    sign[:, 2] = torch.linalg.det(u @ vt)
    nearest: Tensor = (u * sign[:, None]) @ vt
    return nearest.float()

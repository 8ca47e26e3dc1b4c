"""The pose predictor as a task of the training loop: hide poses of a track, tell them again.

Source: Goel et al., Humans in 4D, section 3.3 (masked modelling of tracks, after BERT); the
published code of LART, which this predictor comes from: hidden poses are replaced by the mask
token, losses are taken on them alone, AdamW with betas (0.9, 0.95) and no decay of vectors. That
code offers L1 and L2 and does not say which the released weights had: here L2 on rotations and
betas, L1 on the location.

The first weights are ours: from random ones little more than the mean pose is learnt in the same
time. Encoder and read-out learn single poses first (`_learn_single_poses`), which is quick without
the transformers between them, and these begin by letting poses through (`_let_poses_through`).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from fourdh_batch.config import LoopConfig, SourceConfig, TrainPredictorConfig
from fourdh_batch.errors import TrainingError
from fourdh_batch.evaluate.pose import PELVIS_KEYPOINT
from fourdh_batch.models.build_phalp import save_pose_predictor, untrained_pose_predictor
from fourdh_batch.models.predictor import (
    NUM_POSE_VECTOR,
    STD_EPSILON,
    PosePredictor,
    PoseTransformer,
    PredictorSize,
)
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.storage import normal_uri
from fourdh_batch.training.loop import Examples, seed_of, update
from fourdh_batch.training.sources import paths_in_both
from fourdh_batch.training.tracks import (
    HELD_OUT_STEP,
    GapTracks,
    ListedTracks,
    MaskedTrack,
    MaskedTracks,
    SyntheticTracks,
    TrackBatch,
    TrackPoses,
    TrackSource,
    collate_tracks,
    is_held_out,
    read_track_poses,
)
from fourdh_batch.types import F32, F64, NUM_BETAS, NUM_BODY_JOINTS

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "pose_predictor.safetensors"
ADAM_BETAS = (0.9, 0.95)
NUM_ROTATION_NUMBERS = 9 * (1 + NUM_BODY_JOINTS)
NUM_LOCATION = NUM_POSE_VECTOR - NUM_ROTATION_NUMBERS - NUM_BETAS
MIN_STD = 1e-6  # of a number that is ever the same
_TRAINING, _HELD_OUT, _MASKS, _GAPS, _SINGLE = range(5)  # what a seed is for
SINGLE_POSES, SINGLE_POSE_RATE, SINGLE_POSE_WARMUP = 256, 2e-3, 50
POSITION_SCALES = 0.5, 0.1  # of first weights, before the first and the second transformer
CONV_NOISE = 0.1  # share of the random part of first weights that stays
UPRIGHT_ROT6D = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)


class _Normalisation(nn.Module):
    """(229,) mean and standard deviation of pose vectors; a training that goes on keeps its own."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, pose: Tensor) -> Tensor:
        return (pose - self.mean) / (self.std + STD_EPSILON)


class _Told(nn.Module):
    """Pose vectors of all slots; one call for `DistributedDataParallel` to watch."""

    def __init__(self, network: PoseTransformer, precision: str) -> None:
        super().__init__()
        self.network = network
        self._precision = precision

    def forward(self, pose: Tensor, is_seen: Tensor, is_wanted: Tensor) -> Tensor:
        """(K, L, 229) normalised, (K, L), (K, L) to (N, 229) of the N wanted slots, in order."""
        with torch.autocast(pose.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            tokens = self.network(pose, is_seen)
        return self.network.read_out(tokens.float()[is_wanted])


class PredictorTask:
    """See `loop.Task`.

    Args:
        network: with its first weights, on the device of the training.
        mean, std: (229,) of pose vectors; of a training that goes on those of its checkpoint count.
        loop: settings.
        examples, held_out: of `MaskedTrack`s.
        num_held_out: examples of each held-out set.
        body: whose keypoints errors are measured on.
    """

    weights_name = WEIGHTS_NAME

    def __init__(
        self,
        network: PoseTransformer,
        mean: Tensor,
        std: Tensor,
        *,
        loop: LoopConfig,
        examples: Examples,
        held_out: Mapping[str, Examples],
        body: SmplBody,
        num_held_out: int,
    ) -> None:
        self._network = network.requires_grad_(True)
        self._device = network.mask_token.device
        self._normalised = _Normalisation(mean, std).to(self._device)
        self._loop = loop
        self._body = body.to(self._device)
        self._told: nn.Module = _Told(network, loop.precision)
        self._trained = list(network.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._trained if p.ndim > 1]},
            {"params": [p for p in self._trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.modules: Mapping[str, nn.Module] = {
            "network": network,
            "normalisation": self._normalised,
        }
        self.optimizers: Mapping[str, Optimizer] = {
            "network": AdamW(
                groups, lr=loop.learning_rate, weight_decay=loop.weight_decay, betas=ADAM_BETAS
            )
        }
        self.examples = examples
        self.held_out = held_out
        self.num_held_out = num_held_out
        self.metadata = {"origin": "trained"}

    def collate(self, examples: Sequence[MaskedTrack]) -> TrackBatch:
        """Examples side by side."""
        return collate_tracks(examples)

    def distribute(self) -> None:
        """See `loop.Task`."""
        self._told = DistributedDataParallel(self._told, broadcast_buffers=False)

    def step(self, batch: TrackBatch) -> dict[str, Tensor]:
        """See `loop.Task`."""
        pose, shown, is_seen, is_wanted = (tensor.to(self._device) for tensor in batch[:4])
        told = self._told(self._normalised(shown), is_seen, is_wanted)
        pose_loss, location_loss = _losses(told, pose[is_wanted])
        loss = pose_loss + location_loss
        norm = update(self.optimizers["network"], loss, self._trained, self._loop.clip_norm)
        return {
            "loss": loss.detach(),
            "loss_pose": pose_loss.detach(),
            "loss_location": location_loss.detach(),
            "gradient_norm": norm,
        }

    def evaluate(self, batches: Iterable[TrackBatch]) -> dict[str, float]:
        """See `loop.Task`: MPJPE in mm of hidden poses, root rotation included, for every gap; of
        the predictor, of holding the last pose, and of interpolating rotations (slerp)."""
        told_by: dict[str, list[F64]] = {"": [], "_hold": [], "_slerp": []}
        gaps: list[int] = []
        model = _Told(self._network, self._loop.precision)
        for batch in batches:
            pose, shown, is_seen, is_wanted = (tensor.to(self._device) for tensor in batch[:4])
            told = model(self._normalised(shown), is_seen, is_wanted).cpu().numpy()
            truth = self._keypoints(pose[is_wanted].cpu().numpy())
            row = is_wanted.nonzero()[:, 0].cpu().numpy()
            gaps += batch.gap.numpy()[row].tolist()
            columns = (batch.shown.numpy(), batch.is_seen.numpy(), batch.is_wanted.numpy())
            simple = [_simple(*track) for track in zip(*columns, strict=True)]
            ways = {
                "": told,
                "_hold": np.concatenate([hold for hold, _ in simple]),
                "_slerp": np.concatenate([slerp for _, slerp in simple]),
            }
            for name, vectors in ways.items():
                off = self._keypoints(vectors) - truth
                told_by[name].append(np.linalg.norm(off, axis=-1).mean(axis=-1) * 1000)
        gap = np.array(gaps)
        figures = {}
        for name, errors in told_by.items():
            error = np.concatenate(errors)
            for frames in np.unique(gap):
                what = f"gap_{frames}" if frames else "next"
                if frames or name != "_slerp":
                    figures[f"{what}_mpjpe_mm{name}"] = float(error[gap == frames].mean())
        return figures

    def save(self, path: Path) -> str:
        """See `loop.Task`."""
        network = copy.deepcopy(self._network)
        predictor = PosePredictor(
            network,
            self._normalised.mean,
            self._normalised.std,
            device=self._device,
            weights_origin="trained",
        )
        return save_pose_predictor(predictor, path)

    def learn_single_poses(self, tracks: Sequence[TrackPoses], num_steps: int) -> None:
        """Let encoder and read-out tell exact poses from shown ones, a slot by itself."""
        network, seed = self._network, self._loop.seed
        pose, shown = (
            torch.from_numpy(np.concatenate(column)).to(self._device)
            for column in zip(*((track.pose, track.shown) for track in tracks), strict=True)
        )
        parts = (network.pose_shape_encoder, network.smpl_head, network.loca_head)
        trained = [parameter for part in parts for parameter in part.parameters()]
        optimizer = AdamW(
            trained,
            lr=SINGLE_POSE_RATE,
            weight_decay=0.0,
            betas=ADAM_BETAS,
        )
        random = np.random.default_rng(seed_of(seed, _SINGLE))
        for step in range(num_steps):
            for group in optimizer.param_groups:
                rise, share = (step + 1) / SINGLE_POSE_WARMUP, step / num_steps
                group["lr"] = SINGLE_POSE_RATE * min(rise, (1 + math.cos(math.pi * share)) / 2)
            rows = torch.from_numpy(random.integers(len(pose), size=SINGLE_POSES)).to(self._device)
            told = network.read_out(network.pose_shape_encoder(self._normalised(shown[rows])))
            pose_loss, location_loss = _losses(told, pose[rows])
            loss = pose_loss + location_loss
            update(optimizer, loss, trained, 0.0)
        logger.info("single poses: loss %.4g after %d steps", loss.item(), num_steps)

    def _keypoints(self, vectors: F32) -> F64:
        """(N, 229) to (N, 44, 3) metres from the pelvis."""
        rotations = torch.from_numpy(vectors[:, :NUM_ROTATION_NUMBERS]).view(-1, 24, 3, 3)
        betas = torch.from_numpy(vectors[:, NUM_ROTATION_NUMBERS:-NUM_LOCATION])
        with torch.no_grad():
            points = self._body.keypoints_3d(
                *(t.to(self._device) for t in (rotations[:, :1], rotations[:, 1:], betas))
            )
        return (points - points[:, [PELVIS_KEYPOINT]]).double().cpu().numpy()


def build_predictor_task(
    config: TrainPredictorConfig, device: str | torch.device = "auto"
) -> PredictorTask:
    """The pose predictor with its first weights and its tracks.

    Raises:
        FileNotFoundError: a root holds no tables.
        MotionError: a folder has no motion capture, or a file of it cannot be used.
        TrainingError: there are too few tracks, or none long enough.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    body, seed = load_body(), config.loop.seed
    roots = {
        normal_uri(source.path): source.path
        for source in (*config.sources, *config.held_out)
        if source.kind == "tables"
    }
    tables = {
        root: read_track_poses(path, min_rows=config.min_rows) for root, path in roots.items()
    }
    split = {normal_uri(path) for path in paths_in_both(config, "tables")}

    def made_here(source: SourceConfig, *use: int) -> SyntheticTracks:
        return SyntheticTracks(
            body,
            source.path,
            seed=seed_of(seed, *use),
            jitter_deg=config.jitter_deg,
            min_rows=config.min_rows,
        )

    def of_root(path: str, *, held_out: bool) -> list[TrackPoses]:
        root = normal_uri(path)
        if root not in split:
            return tables[root]
        tracks = [track for track in tables[root] if is_held_out(track.video) == held_out]
        if not tracks:
            num = len({track.video for track in tables[root]})
            raise TrainingError(
                f"{path}: expected videos to train on and others to hold out, one in "
                f"{HELD_OUT_STEP} by the digest of its name; of {num} with tracks of "
                f"{config.min_rows} rows or more {'none' if held_out else 'every one'} is held "
                "out; give another held_out="
            )
        return tracks

    sources: list[TrackSource] = []
    known: list[TrackPoses] = []  # of which mean and standard deviation are taken
    for row, source in enumerate(config.sources):
        if source.kind == "tables":
            known += (tracks := of_root(source.path, held_out=False))
            sources.append(ListedTracks(tracks))
        else:
            sources.append(made := made_here(source, _TRAINING, row))
            known += made.block(0)
    held_out = {
        source.name or source.kind: GapTracks(
            of_root(source.path, held_out=True)
            if source.kind == "tables"
            else made_here(source, _HELD_OUT, row).block(0),
            frame_length=config.frame_length,
            seed=seed_of(seed, _GAPS),
        )
        for row, source in enumerate(config.held_out)
    }
    size = PredictorSize(
        dim=config.dim,
        depth=config.depth,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        mlp_dim=config.mlp_dim,
        smpl_dim=config.smpl_dim,
        frame_length=config.frame_length,
    )
    network = untrained_pose_predictor(seed, size=size, device=device).network
    network = copy.deepcopy(network).train()
    mean, std = _statistics(known)
    _set_mean(network, mean)
    task = PredictorTask(
        network,
        torch.from_numpy(mean),
        torch.from_numpy(std),
        loop=config.loop,
        examples=MaskedTracks(
            sources,
            [source.weight for source in config.sources],
            frame_length=config.frame_length,
            mask_share=config.mask_share,
            stretch_share=config.stretch_share,
            seed=seed_of(seed, _MASKS),
        ),
        held_out=held_out,
        num_held_out=config.held_out_examples,
        body=body,
    )
    if config.single_pose_steps:
        task.learn_single_poses(known, config.single_pose_steps)
        _let_poses_through(network)
    return task


def _statistics(tracks: Sequence[TrackPoses]) -> tuple[F32, F32]:
    """(229,) mean and standard deviation over all rows."""
    poses = np.concatenate([track.pose for track in tracks])
    mean, std = poses.mean(axis=0, dtype=np.float64), poses.std(axis=0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std < MIN_STD, 1.0, std).astype(np.float32)


def _set_mean(network: PoseTransformer, mean: F32) -> None:
    """Let the read-out count from the mean body; the root, of which there is no mean, upright."""
    rotations = mean[:NUM_ROTATION_NUMBERS].reshape(-1, 3, 3)
    rot6d = np.concatenate((rotations[:, :, 0], rotations[:, :, 1]), axis=1)
    rot6d[0] = UPRIGHT_ROT6D
    head = network.smpl_head[0]
    with torch.no_grad():
        cast(Tensor, head.init_body_pose).copy_(torch.from_numpy(rot6d.reshape(1, -1)))
        betas = mean[NUM_ROTATION_NUMBERS:-NUM_LOCATION]
        cast(Tensor, head.init_betas).copy_(torch.from_numpy(betas[None]))
        cast(Tensor, head.init_cam).zero_()


@torch.no_grad()
def _let_poses_through(network: PoseTransformer) -> None:
    """First weights that make every slot a mean of seen tokens, of near ones as soon as learnt.

    Attention mixes tokens as they are; the code of five slots is their mean, and each gets it back;
    slots are numbered by waves, which are alike in near slots, not by noise.
    """
    size = network.size
    slot, wave = torch.arange(size.frame_length)[:, None], torch.arange(-(-size.dim // 2))
    turns = slot / size.frame_length ** (wave / max(len(wave) - 1, 1))  # 2 to 2 L slots long
    waves = torch.cat((torch.sin(torch.pi * turns), torch.cos(torch.pi * turns)), dim=1)
    network.pos_embedding_learned1.copy_(POSITION_SCALES[0] * waves[None, :, : size.dim])
    network.pos_embedding_learned2.copy_(POSITION_SCALES[1] * waves[None, :, : size.dim])
    for _, attention, _ in network.transformer1.blocks():
        to_out = cast(nn.Linear, attention.to_out[0])
        nn.init.eye_(attention.to_qkv.weight[2 * to_out.in_features :])
        nn.init.eye_(to_out.weight)
        to_out.weight.div_(size.depth)
        to_out.bias.zero_()
    inner = slice(size.conv_pad, size.conv_pad + size.conv_stride)
    for conv, share in ((network.conv_en, 1 / size.conv_stride), (network.conv_de, 1.0)):
        conv.weight.mul_(CONV_NOISE)
        conv.weight[..., inner] += share * torch.eye(size.dim, device=conv.weight.device)[..., None]


def _losses(told: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Of poses and of locations, per slot."""
    off, count = told - truth, len(told) + 1  # as published
    return (
        off[:, :-NUM_LOCATION].square().sum() / count,
        off[:, -NUM_LOCATION:].abs().sum() / count,
    )


def _simple(pose: F32, is_seen: np.ndarray, is_wanted: np.ndarray) -> tuple[F32, F32]:
    """(n, 229) of the wanted slots of one track: the last seen pose before, and interpolated."""
    seen, wanted = np.flatnonzero(is_seen), np.flatnonzero(is_wanted)
    before = seen[np.searchsorted(seen, wanted) - 1]
    held = pose[before]
    following = np.minimum(np.searchsorted(seen, wanted), len(seen) - 1)
    after = seen[following]
    span = np.maximum(after - before, 1)
    share = np.where(after > before, (wanted - before) / span, 0.0).astype(np.float32)[:, None]
    between = (1 - share) * held + share * pose[after]
    low, high = (
        Rotation.from_matrix(ends[:, :NUM_ROTATION_NUMBERS].reshape(-1, 3, 3))
        for ends in (held, pose[after])
    )
    way = (low.inv() * high).as_rotvec() * np.repeat(share, 1 + NUM_BODY_JOINTS, axis=0)
    turned = (low * Rotation.from_rotvec(way)).as_matrix()
    between[:, :NUM_ROTATION_NUMBERS] = turned.reshape(len(wanted), -1)
    return held, between

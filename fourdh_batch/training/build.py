"""Settings to what is trained: sources of examples, first weights, tasks."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from fourdh_batch.config import SourceConfig, TrainHmrConfig
from fourdh_batch.errors import CheckpointError
from fourdh_batch.geometry import CROP_PX
from fourdh_batch.models.build import HMR2_SIZES, load_hmr2, untrained_hmr2
from fourdh_batch.models.checkpoint import fitting_tensors, read_lightning_state_dict
from fourdh_batch.models.hmr2 import Hmr2
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.models.smpl_head import NUM_CAM_NUMBERS, NUM_POSE_NUMBERS
from fourdh_batch.synthetic.crops import fit_weak_camera
from fourdh_batch.synthetic.mocap import Recording, load_recordings
from fourdh_batch.training.data import MixedExamples, PeopleSource
from fourdh_batch.training.examples import collate
from fourdh_batch.training.hmr2 import HmrTask, mean_rotations
from fourdh_batch.training.loop import seed_of
from fourdh_batch.training.pose_histogram import PoseHistogram, load_pose_histogram
from fourdh_batch.training.real_poses import load_real_poses
from fourdh_batch.training.synthetic_people import RECORDED_SHARE, SyntheticPeople
from fourdh_batch.training.table_people import TablePeople
from fourdh_batch.training.tars import TarPeople
from fourdh_batch.types import NUM_BETAS

logger = logging.getLogger(__name__)

MEAN_EXAMPLES = 128  # of which random weights take the body that answers are counted from
_TRAINING, _HELD_OUT, _MIXTURE, _REAL = range(4)  # what a seed is for
# `smpl_mean_params.npz` to the buffers of the head; the pose is in the head's own order.
MEAN_PARAMS = {
    "pose": ("init_body_pose", NUM_POSE_NUMBERS),
    "shape": ("init_betas", NUM_BETAS),
    "cam": ("init_cam", NUM_CAM_NUMBERS),
}


def build_hmr_task(config: TrainHmrConfig, device: str | torch.device = "auto") -> HmrTask:
    """HMR 2.0 with its first weights and its data.

    Raises:
        CheckpointError: a file of weights, a body or poses does not fit.
        FileNotFoundError: a source is not there.
        MotionError: a folder has no motion capture, or a file of it cannot be used.
        TrainingError: a source has nobody to train on.
    """
    seed = config.loop.seed
    body = load_body(config.body or None, extra_regressor=config.extra_regressor or None)
    histogram = load_pose_histogram(config.pose_histogram) if config.pose_histogram else None
    recordings = cache(load_recordings)  # here, once: not at the first picture, in every worker
    sources = partial(_examples, body=body, recordings=recordings, histogram=histogram, seed=seed)
    training = sources(config.sources, use=_TRAINING, config=config)
    held_out = {
        source.name or source.kind: sources([source], use=_HELD_OUT, config=config)
        for source in config.held_out
    }
    adversarial = bool(config.real_poses) and config.loss.adversarial > 0
    real = load_real_poses(config.real_poses, seed=seed_of(seed, _REAL)) if adversarial else None
    model = first_model(config, body, device)
    if not (config.init or config.mean_params):
        _set_mean_of(model, training)
    return HmrTask(
        model,
        loop=config.loop,
        loss=config.loss,
        examples=training,
        held_out=held_out,
        num_held_out=config.held_out_examples,
        real=real,
        drop_path=config.drop_path,
    )


def first_model(
    config: TrainHmrConfig, body: SmplBody, device: str | torch.device = "auto"
) -> Hmr2:
    """The network before the first step.

    Raises:
        CheckpointError: a file is missing, damaged, or of another size.
    """
    if config.init:
        model = load_hmr2(config.init, body, size=config.size, device=device, precision="fp32")
    else:
        model = untrained_hmr2(config.size, body, config.loop.seed, device=device, precision="fp32")
    if config.init_backbone:
        state = read_lightning_state_dict(config.init_backbone)
        expected = {name: t.shape for name, t in model.backbone.state_dict().items()}
        what = f"the backbone of size {config.size!r}"
        fitting = fitting_tensors(state, expected, what=what, source=config.init_backbone)
        model.backbone.load_state_dict(fitting)
    if config.mean_params:
        _set_mean(model, Path(config.mean_params))
    return model


def _set_mean(model: Hmr2, path: Path) -> None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            for name, (buffer, count) in MEAN_PARAMS.items():
                value = stored[name].astype(np.float32).reshape(1, count)
                getattr(model.smpl_head, buffer).copy_(torch.from_numpy(value))
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: expected an npz of {list(MEAN_PARAMS)}, got {error}"
        ) from error


def _set_mean_of(model: Hmr2, training: MixedExamples) -> None:
    """Count answers from the mean of the first examples; it turns no way, their people turn all."""
    people = collate([training[number] for number in range(MEAN_EXAMPLES)])
    head = model.smpl_head
    posed, shaped = people.has_pose > 0, people.has_betas > 0
    if posed.any():
        mean = mean_rotations(people.body_pose[posed])
        head.init_body_pose[0, 6:] = mean[..., :2].transpose(1, 2).flatten()
    if shaped.any():
        head.init_betas[0] = people.betas[shaped].mean(dim=0)
    seen = (people.keypoints_2d[..., 2] > 0).all(1) & (people.keypoints_3d[..., 3] > 0).all(1)
    if seen.any():
        points, pixels = people.keypoints_3d[seen, :, :3], people.keypoints_2d[seen, :, :2]
        head.init_cam[0] = fit_weak_camera(points, pixels).median(dim=0).values


def _examples(
    configs: Sequence[SourceConfig],
    *,
    use: int,
    config: TrainHmrConfig,
    body: SmplBody,
    recordings: Callable[[str], Sequence[Recording]],
    histogram: PoseHistogram | None,
    seed: int,
) -> MixedExamples:
    crop_px = CROP_PX // HMR2_SIZES[config.size].shrink
    open_source: dict[str, Callable[[str, int], PeopleSource]] = {
        "synthetic": lambda path, own: SyntheticPeople(
            body,
            recordings(path) if path else (),
            seed=own,
            crop_px=crop_px,
            # Figures of motions that were never seen say nothing where half of them were.
            recorded_share=RECORDED_SHARE if use == _TRAINING else 1.0,
        ),
        "tables": lambda path, own: TablePeople(
            path, seed=own, body_model=f"{body.name}:{body.digest[:16]}"
        ),
        "tars": lambda path, own: TarPeople(path, seed=own, histogram=histogram),
    }
    return MixedExamples(
        [
            open_source[source.kind](source.path, seed_of(seed, use, row))
            for row, source in enumerate(configs)
        ],
        [source.weight for source in configs],
        seed=seed_of(seed, use, _MIXTURE),
        augment=config.augment if use == _TRAINING else None,
        crop_px=crop_px,
    )

"""A person detector or segmenter as a task of the training loop.

Architecture and losses are those of the library that also runs it (`models/detector_transformers`):
matching, denoising queries and auxiliary losses are the published ones. What is ours is the data:
people rendered here, with the boxes of `synthetic/corpus.py` (of the whole body, hidden parts too,
cut at the picture's border), and for a segmenter the pixels in which each is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from fourdh_batch.config import LoopConfig, TrainDetectorConfig
from fourdh_batch.evaluate.detection import FrameBoxes, average_precision, match_frame
from fourdh_batch.geometry import box_iou
from fourdh_batch.models.detector_transformers import (
    DetectorSize,
    corners_px,
    detection_losses,
    normalised,
    save_detector,
    untrained_detector,
)
from fourdh_batch.models.smpl import load_body
from fourdh_batch.synthetic.mocap import load_recordings
from fourdh_batch.training.detector_data import (
    FrameBatch,
    FrameExample,
    FrameExamples,
    collate_frames,
)
from fourdh_batch.training.loop import Examples, seed_of, update
from fourdh_batch.types import F64, Bool

WEIGHTS_NAME = "detector"  # a folder
SCORE = 0.5  # from which recall and precision count a box
HALF_VISIBLE = 0.5  # people of whom less is seen need not be found, for recall


class _Losses(nn.Module):
    """Losses by name; one call for `DistributedDataParallel` to watch."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model = model
        self._precision = precision

    def forward(self, pixels: Tensor, labels: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            return detection_losses(self.model, pixels, labels)


class DetectorTask:
    """See `loop.Task`.

    Args:
        model: with its first weights, on the device of the training.
        size: of the model.
        segment: the model gives masks.
        loop: settings.
        examples, held_out: of `FrameExample`s.
        num_held_out: frames.
    """

    weights_name = WEIGHTS_NAME

    def __init__(
        self,
        model: nn.Module,
        size: DetectorSize,
        *,
        segment: bool,
        loop: LoopConfig,
        examples: Examples,
        held_out: Mapping[str, Examples],
        num_held_out: int,
    ) -> None:
        self._model = model
        self._size = size
        self._segment = segment
        self._loop = loop
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._device = self._trained[0].device
        self._losses: nn.Module = _Losses(model, loop.precision)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._trained if p.ndim > 1]},
            {"params": [p for p in self._trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.modules: Mapping[str, nn.Module] = {"model": model}
        self.optimizers: Mapping[str, Optimizer] = {
            "model": AdamW(groups, lr=loop.learning_rate, weight_decay=loop.weight_decay)
        }
        self.examples = examples
        self.held_out = held_out
        self.num_held_out = num_held_out
        self.metadata = {"origin": "trained"}

    def collate(self, examples: Sequence[FrameExample]) -> FrameBatch:
        """Examples side by side."""
        return collate_frames(examples)

    def distribute(self) -> None:
        """See `loop.Task`."""
        self._losses = DistributedDataParallel(self._losses, find_unused_parameters=True)

    def step(self, batch: FrameBatch) -> dict[str, Tensor]:
        """See `loop.Task`. Figures are those of the last layer of the decoder."""
        losses = self._losses(normalised(batch.rgb.to(self._device)), self._labels(batch))
        norm = update(self.optimizers["model"], losses["loss"], self._trained, self._loop.clip_norm)
        names = {
            name: value.detach()
            for name, value in losses.items()
            if name.startswith("loss")
            and not any(part in name for part in ("_aux_", "_dn_", "_enc"))
        }
        return {**names, "gradient_norm": norm}

    def evaluate(self, batches: Iterable[FrameBatch]) -> dict[str, float]:
        """See `loop.Task`: average precision of boxes; at a score of `SCORE` and IoU 0.5 the recall
        of people who are at least half visible, the precision and the mean IoU of hits; of a
        segmenter the mean IoU of their masks."""
        size_wh = self._size.width, self._size.height
        matches, num_found, num_right, num_wanted, num_recalled = [], 0, 0, 0, 0
        ious: list[F64] = []
        mask_ious: list[F64] = []
        for batch in batches:
            outputs: Any = self._model(pixel_values=normalised(batch.rgb.to(self._device)))
            scores = outputs.logits.float().sigmoid()[..., 0].cpu()  # (B, Q)
            for i, (score, boxes) in enumerate(zip(scores, outputs.pred_boxes, strict=True)):
                truth = corners_px(batch.boxes[i], size_wh).double().numpy()
                found = corners_px(boxes.float().cpu(), size_wh).double().numpy()
                hidden = (batch.visible_fraction[i] < HALF_VISIBLE).numpy()
                whole = FrameBoxes(truth, np.zeros_like(hidden), found, score.double().numpy())
                matches.append(match_frame(whole))

                sure = (score >= SCORE).numpy()
                row, hit_iou, hits = _hits(found[sure], score.numpy()[sure], truth)
                num_found += int(sure.sum())
                num_right += len(row)
                num_wanted += int((~hidden).sum())
                num_recalled += int((~hidden[hits]).sum())
                ious.append(hit_iou)
                if self._segment:
                    owner = batch.owner[i]
                    logits = outputs.pred_masks[i].float().cpu()[torch.from_numpy(sure)]
                    # Queries as a batch, which may be empty; nobody is found in some pictures.
                    masks = F.interpolate(logits[row][:, None], owner.shape, mode="bilinear")[:, 0]
                    own = owner[None] == torch.tensor(hits)[:, None, None]
                    mask_ious.append(_mask_iou((masks > 0).numpy(), own.numpy()))
        precision = average_precision(matches)
        figures = {
            "ap": precision.ap,
            "ap50": precision.ap50,
            "recall_half_visible": num_recalled / num_wanted if num_wanted else float("nan"),
            "precision": num_right / num_found if num_found else float("nan"),
            "mean_iou": _mean(ious),
        }
        return figures | ({"mask_iou": _mean(mask_ious)} if self._segment else {})

    def save(self, path: Path) -> str:
        """See `loop.Task`: a folder for `detector.path=`."""
        return save_detector(self._model, self._size, path)

    def _labels(self, batch: FrameBatch) -> list[dict[str, Tensor]]:
        labels = []
        for boxes, owner in zip(batch.boxes, batch.owner, strict=True):
            label = {
                "class_labels": torch.zeros(len(boxes), dtype=torch.int64, device=self._device),
                "boxes": boxes.to(self._device),
            }
            if self._segment:
                number = torch.arange(len(boxes))[:, None, None]
                label["masks"] = (owner[None] == number).float().to(self._device)
            labels.append(label)
        return labels


def build_detector_task(
    config: TrainDetectorConfig, device: str | torch.device = "auto"
) -> DetectorTask:
    """The network with its first weights and its frames.

    Raises:
        ConfigError: transformers is not installed.
        FileNotFoundError: the folder of motion capture is not there.
        MotionError: it holds none, or a file of it cannot be used.
    """
    recordings = load_recordings(config.motion) if config.motion else []
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    size = DetectorSize(
        height=config.height,
        width=config.width,
        dim=config.dim,
        num_queries=config.num_queries,
        decoder_layers=config.decoder_layers,
        backbone_widths=tuple(config.backbone_widths),
        levels=config.levels,
    )
    model = untrained_detector(size, segment=config.segment, seed=config.loop.seed)
    if config.segment and torch.device(device).type == "cpu":
        # The fused kernel's backward pass is the slower one for these few, narrow windows.
        cast(Any, model).set_attn_implementation("eager")
    body = load_body()

    def frames(use: int, reuse: int) -> FrameExamples:
        return FrameExamples(
            body,
            recordings,
            seed=seed_of(config.loop.seed, use),
            size_hw=(config.height, config.width),
            reuse=reuse,
            num_places=config.num_places,
            num_outfits=config.num_outfits,
        )

    return DetectorTask(
        model.to(device),
        size,
        segment=config.segment,
        loop=config.loop,
        examples=frames(0, config.reuse),
        held_out={"frames": frames(1, 0)},
        num_held_out=config.held_out_examples,
    )


def _hits(found: F64, score: F64, truth: F64) -> tuple[list[int], F64, list[int]]:
    """Rows of `found`, their IoU, rows of `truth`: pairs of IoU 0.5 or more, best score first."""
    iou = box_iou(found, truth)
    rows: list[int] = []
    hits: list[int] = []
    for row in np.argsort(-score, kind="stable").tolist():
        free = [t for t in range(len(truth)) if t not in hits and iou[row, t] >= 0.5]
        if free:
            rows.append(row)
            hits.append(max(free, key=lambda t: float(iou[row, t])))
    return rows, np.asarray(iou[rows, hits], dtype=np.float64), hits


def _mask_iou(a: Bool, b: Bool) -> F64:
    """(N,) of masks (N, H, W)."""
    both, either = (a & b).sum(axis=(1, 2)), (a | b).sum(axis=(1, 2))
    iou: F64 = both / np.maximum(either, 1)
    return iou


def _mean(parts: list[F64]) -> float:
    values = np.concatenate(parts) if parts else np.zeros(0)
    return float(values.mean()) if len(values) else float("nan")

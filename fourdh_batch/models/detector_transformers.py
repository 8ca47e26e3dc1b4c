"""Detection transformers of Hugging Face: D-FINE, DEIMv2, RT-DETR (v1, v2), RF-DETR, RF-DETR-Seg.

Preparation of the pictures and reading of the outputs are ours, in batches and on the device, so
that torchvision is not needed; numbers come from the processor's file beside the weights.

Dimension letters: `B` frames of a batch, `Q` queries, `C` classes, `N` detections.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.masks import encode_rle
from fourdh_batch.models.detector import (
    DETECTORS,
    batch_bounds,
    clip_boxes,
    ordered_detections,
    settings_digest,
)
from fourdh_batch.models.minis import shipped_detector
from fourdh_batch.types import F32, I64, U8, Detections, FrameChunk, RleMask

logger = logging.getLogger(__name__)

# Families whose classes are independent sigmoids and whose boxes are cx, cy, w, h of the picture.
# The value: whether the published processor low-pass filters when it scales down.
FAMILIES = {
    "d_fine": True,
    "deimv2": True,
    "rt_detr": True,
    "rt_detr_v2": True,
    "rf_detr": False,
}
PIL_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as processors store them
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# Statistics of ImageNet, by which networks trained here normalise their input, too.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROCESSOR = "preprocessor_config.json"
PATCH_PX, NUM_WINDOWS = 16, 2  # of the segmenter's backbone: sides are multiples of the product
MASK_BLOCK_PIXELS = 64 * 2**20  # mask logits scaled up at once: 256 MiB in float32


class TransformersDetector:
    """A detector from a model directory or a hub.

    Args:
        path: a local directory written by `save_pretrained`; or ``organisation/model``, with
            ``@revision`` to pin it, which the library may download; ``mini`` or ``mini-segmenter``
            for those that come with the package.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        min_score: people with lower scores are not handed out.
        batch_size: frames per forward pass.
        input_size: side of the square input in pixels; None for the processor's.
        half: float16; None for float16 on a GPU and float32 on a CPU.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: no such model, of another family, without a person class, with keys that
            do not fit, or without safetensors.
    """

    def __init__(
        self,
        path: str,
        *,
        device: str,
        min_score: float,
        batch_size: int,
        input_size: int | None = None,
        half: bool | None = None,
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        model, processor = _load(path)
        self._person = _person_class(model.config, path)
        self._prepare = Preparation(processor, model.config.model_type, input_size, path)
        self._min_score = min_score
        self._batch_size = batch_size
        self.name = f"transformers_{model.config.model_type}"
        half = self._device.type == "cuda" if half is None else half
        self._dtype = torch.float16 if half else torch.float32
        self.digest = settings_digest(
            _weights_digest(model),
            preparation=self._prepare.settings(),
            person=self._person,
            min_score=min_score,
            dtype=str(self._dtype),
        )
        self.gives_masks = type(model).__name__.endswith("ForInstanceSegmentation")
        self._model = model.to(device=self._device, dtype=self._dtype).eval()
        logger.info("detector %s: %s on %s", self.name, self._prepare.settings(), self._device)

    @torch.inference_mode()
    def detect(self, chunk: FrameChunk) -> Detections:
        """See `Detector.detect`."""
        rows: list[I64] = []
        boxes: list[F32] = []
        scores: list[F32] = []
        masks: list[RleMask] = []
        frames = np.empty((self._batch_size, *chunk.rgb.shape[1:]), dtype=np.uint8)
        for first, end in batch_bounds(chunk.num_frames, self._batch_size):
            frames[: end - first] = chunk.rgb[first:end]
            frames[end - first :] = 0
            outputs = self._model(pixel_values=self._prepare(frames, self._device, self._dtype))
            # Of the whole batch: on a CPU the last bit depends on the place among the lanes.
            score = outputs.logits.float().sigmoid()[: end - first, :, self._person]  # (B, Q)
            place, query = torch.nonzero(score >= self._min_score, as_tuple=True)
            rows.append(place.cpu().numpy() + first)
            scores.append(score[place, query].cpu().numpy())
            box = corners_px(outputs.pred_boxes[place, query].float(), chunk.image_size_wh)
            boxes.append(clip_boxes(box.cpu().numpy(), chunk.image_size_wh))
            if self.gives_masks:
                masks += frame_masks(outputs.pred_masks[place, query], chunk.rgb.shape[1:3])
        return ordered_detections(
            np.concatenate(rows),
            np.concatenate(boxes),
            np.concatenate(scores),
            masks if self.gives_masks else None,
        )


class Preparation:
    """Frames to network input, by the numbers of a processor's file.

    Args:
        processor: content of `preprocessor_config.json`.
        family: a key of `FAMILIES`.
        input_size: side of a square input in pixels instead of the file's.
        path: of the model, for messages.

    Raises:
        CheckpointError: the file asks for something that these families do not have.
    """

    def __init__(
        self, processor: dict[str, Any], family: str, input_size: int | None, path: str
    ) -> None:
        size = processor.get("size")
        resample = processor.get("resample", 2)
        if not (
            isinstance(size, dict)
            and {"height", "width"} <= size.keys()
            and processor.get("do_resize", True)
            and resample in PIL_RESAMPLING
            and "do_normalize" in processor
        ):
            raise CheckpointError(
                f"{path}: preprocessor_config.json: expected do_resize to a size of height and "
                f"width with resample {list(PIL_RESAMPLING)}, and do_normalize; got size={size}, "
                f"resample={resample}, do_normalize={processor.get('do_normalize')}"
            )
        self._size_hw = (input_size or size["height"], input_size or size["width"])
        self._mode = PIL_RESAMPLING[resample]
        self._low_pass = FAMILIES[family]
        factor = (
            processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
        )
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if processor["do_normalize"]:
            mean, std = tuple(processor["image_mean"]), tuple(processor["image_std"])
        self._factor, self._mean, self._std = float(factor), mean, std

    def settings(self) -> dict[str, object]:
        """Everything that changes the input."""
        return {
            "size_hw": self._size_hw,
            "resample": self._mode,
            "low_pass": self._low_pass,
            "factor": self._factor,
            "mean": self._mean,
            "std": self._std,
        }

    def __call__(self, rgb: U8, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, H, W, 3) uint8 to (B, 3, h, w) of the network."""
        frames = torch.from_numpy(rgb).to(device)
        pixels = frames.permute(0, 3, 1, 2).float()
        if self._low_pass:  # like PIL: across, then down, each to whole grey levels
            for size_hw in ((rgb.shape[1], self._size_hw[1]), self._size_hw):
                pixels = F.interpolate(pixels, size_hw, mode=self._mode, antialias=True)
                pixels = pixels.round_().clamp_(0, 255)
        else:
            pixels = F.interpolate(pixels, self._size_hw, mode=self._mode)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self._mean, self._std))
        return ((pixels * self._factor - mean) / std).to(dtype)


def corners_px(box_cxcywh: Tensor, image_size_wh: tuple[int, int]) -> Tensor:
    """(N, 4) centre and size as parts of the frame to corners in pixels from its edges."""
    center, half = box_cxcywh[:, :2], box_cxcywh[:, 2:] / 2
    scale = torch.tensor([*image_size_wh, *image_size_wh], device=box_cxcywh.device)
    return torch.cat([center - half, center + half], dim=1) * scale


def frame_masks(mask_logits: Tensor, size_hw: tuple[int, int]) -> list[RleMask]:
    """(N, h, w) mask logits, scaled up to the frame and cut at probability one half."""
    block = max(1, MASK_BLOCK_PIXELS // (size_hw[0] * size_hw[1]))
    masks: list[RleMask] = []
    for logits in torch.split(mask_logits.float(), block):
        scaled = F.interpolate(logits[:, None], size_hw, mode="bilinear", align_corners=False)
        masks += encode_rle((scaled[:, 0] > 0).cpu().numpy())
    return masks


@dataclass(frozen=True, slots=True)
class DetectorSize:
    """Sizes of a network to be trained; see `untrained_detector`.

    Attributes:
        height, width: of the input, px.
        dim: width of encoder and decoder, a multiple of 16.
        num_queries: at most so many people are found in a frame.
        decoder_layers: of the decoder.
        backbone_widths: channels of the stages with strides 4, 8, 16, 32 of a detector. Of a
            segmenter the last one is the width of its transformer backbone, and their number times
            two its depth.
        levels: feature maps that a detector looks at, counted from the coarsest.
    """

    height: int
    width: int
    dim: int
    num_queries: int
    decoder_layers: int
    backbone_widths: tuple[int, ...]
    levels: int


def untrained_detector(size: DetectorSize, *, segment: bool, seed: int) -> nn.Module:
    """A network with random weights and the one class `person`, in training mode on the CPU.

    RT-DETR on a small ResNet; with `segment` RF-DETR-Seg on a small DINOv2, whose patches are
    attended in windows. Given `labels` it computes its published losses, denoising (RT-DETR) or
    groups of queries (RF-DETR) included.

    Raises:
        ConfigError: transformers is not installed.
    """
    transformers = _transformers()
    labels = {"id2label": {0: "person"}, "label2id": {"person": 0}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if segment:
            config = _segmenter_config(transformers, size, labels)
            model = transformers.RfDetrForInstanceSegmentation(config)
        else:
            config = _detector_config(transformers, size, labels)
            model = transformers.RTDetrForObjectDetection(config)
    trained: nn.Module = model.train()
    return trained


def detection_losses(
    model: nn.Module, pixels: Tensor, labels: Sequence[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The library's losses by name, and as `loss` the sum by its weights.

    Args:
        pixels: (B, 3, H, W) as of `normalised`.
        labels: of every frame `class_labels` (N,), `boxes` (N, 4) centre and size as parts of the
            frame; for a segmenter `masks` (N, H, W) float.
    """
    outputs: Any = model(pixel_values=pixels, labels=list(labels))
    if outputs.loss.numel() == 1:
        return {"loss": outputs.loss, **outputs.loss_dict}
    # Where a batch shows nobody the losses of masks are empty, not 0, and so is the library's sum.
    losses = {name: value.sum() for name, value in outputs.loss_dict.items()}
    class_weight = cast(Any, model).config.class_loss_coefficient
    loss = sum(  # the other losses are 0, whatever their weights
        value * (class_weight if name.startswith("loss_ce") else 1)
        for name, value in losses.items()
        if name.startswith("loss_")
    )
    return {"loss": loss, **losses}


def normalised(rgb: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 to the input of networks trained here."""
    mean, std = (torch.tensor(v, device=rgb.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (rgb.float() / 255 - mean) / std


def save_detector(model: nn.Module, size: DetectorSize, folder: Path) -> str:
    """Write a directory that `TransformersDetector` reads, weights in float16; their digest."""
    stored: Any = copy.deepcopy(model).half().cpu()
    for name, buffer in stored.named_buffers():
        if name.endswith("num_batches_tracked"):  # begins anew where a training goes on
            buffer.zero_()
    stored.save_pretrained(folder)
    is_segmenter = stored.config.model_type == "rf_detr"
    processor = {
        "image_processor_type": "RfDetrImageProcessor" if is_segmenter else "RTDetrImageProcessor",
        "size": {"height": size.height, "width": size.width},
        "resample": 2,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }
    (folder / PROCESSOR).write_text(json.dumps(processor, indent=1))
    return _weights_digest(stored.float())


def _detector_config(transformers: Any, size: DetectorSize, labels: dict[str, Any]) -> Any:
    widths = list(size.backbone_widths)
    first = len(widths) - size.levels
    return transformers.RTDetrConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=widths[0],
            hidden_sizes=widths,
            depths=[1] * len(widths),
            layer_type="basic",
            out_features=[f"stage{i + 1}" for i in range(first, len(widths))],
        ),
        freeze_backbone_batch_norms=False,  # there is nothing to freeze in random weights
        encoder_in_channels=widths[first:],
        feat_strides=[4 * 2**i for i in range(first, len(widths))],
        encode_proj_layers=[size.levels - 1],
        encoder_hidden_dim=size.dim,
        encoder_ffn_dim=2 * size.dim,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=size.dim,
        num_queries=size.num_queries,
        num_denoising=size.num_queries,
        num_feature_levels=size.levels,
        decoder_in_channels=[size.dim] * size.levels,
        decoder_ffn_dim=2 * size.dim,
        decoder_layers=size.decoder_layers,
        decoder_attention_heads=4,
        **labels,
    )


def _segmenter_config(transformers: Any, size: DetectorSize, labels: dict[str, Any]) -> Any:
    depth = 2 * len(size.backbone_widths)
    return transformers.RfDetrConfig(
        backbone_config={
            "model_type": "rf_detr_dinov2",
            "image_size": max(size.height, size.width),  # of positions; interpolated from a square
            "hidden_size": size.backbone_widths[-1],
            "num_hidden_layers": depth,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "patch_size": PATCH_PX,
            "num_windows": NUM_WINDOWS,
            "out_indices": [depth // 2, depth],
        },
        d_model=size.dim,
        num_queries=size.num_queries,
        group_detr=2,
        decoder_layers=size.decoder_layers,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=8,
        decoder_ffn_dim=2 * size.dim,
        intermediate_size=2 * size.dim,
        dropout=0.0,
        **labels,
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "detector 'transformers' needs another package: pip install 'fourdh_batch[detectors]'"
        ) from error
    return transformers


def _load(path: str) -> tuple[Any, dict[str, Any]]:
    """Model in float32 on the CPU, and the content of its processor's file."""
    source: dict[str, Any] = {"local_files_only": True}
    name = path = str(shipped_detector(path))
    hub_id = HUB_ID.fullmatch(path)
    if not Path(path).is_dir():
        if hub_id is None:
            raise CheckpointError(f"{path}: no such directory; pass {DETECTORS['transformers'][1]}")
        name = hub_id[1]
        source = {"local_files_only": False, "revision": hub_id[2] or "main"}
    transformers = _transformers()
    from transformers.image_processing_base import ImageProcessingMixin

    with _as_checkpoint_error(path):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **source)
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"{path}: expected a model of {', '.join(FAMILIES)}, got {config.model_type!r}"
        )
    segments = any("InstanceSegmentation" in name for name in config.architectures or [])
    auto = (
        transformers.AutoModelForInstanceSegmentation
        if segments
        else transformers.AutoModelForObjectDetection
    )
    with _as_checkpoint_error(path):
        model, loading = auto.from_pretrained(
            name,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **source,
        )
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name, **source)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors of {type(model).__name__} are not in the file, "
            f"for example {missing[:3]}"
        )
    return model, processor


@contextmanager
def _as_checkpoint_error(path: str) -> Iterator[None]:
    """What the library raises for files that are missing, damaged or of another model."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: expected config.json, model.safetensors and preprocessor_config.json of a "
            f"detector: {error}"
        ) from error


def _person_class(config: Any, path: str) -> int:
    """Index of the class called person; lists of 80 and 91 classes both exist."""
    found = [int(i) for i, label in config.id2label.items() if str(label).lower() == "person"]
    if len(found) != 1:
        raise CheckpointError(
            f"{path}: expected one class 'person' in id2label, got {len(found)} among "
            f"{list(config.id2label.values())}"
        )
    return found[0]


def _weights_digest(model: Any) -> str:
    """Digest of all tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()

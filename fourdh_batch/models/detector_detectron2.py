"""The published detectors of PHALP, through Detectron2: ViTDet-H cascade and Mask R-CNN X-101.

Detectron2 is an optional extra. Its model definitions are used, its checkpoint reader is not: that
one unpickles whatever it is given.
"""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import safetensors.torch
import torch

from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.masks import encode_rle
from fourdh_batch.models.detector import (
    DETECTORS,
    batch_bounds,
    ordered_detections,
    read_weights,
    settings_digest,
)
from fourdh_batch.models.unpickle import load_restricted_pickle
from fourdh_batch.types import F32, I64, Detections, FrameChunk, RleMask

COCO_PERSON = 0
MASK_RCNN_CONFIG = "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml"
# (shorter side, limit of the longer side) of the picture, as in the published test settings
VITDET_EDGES_PX = (1024, 1024)
MASK_RCNN_EDGES_PX = (800, 1333)
INSTALL = (
    "needs Detectron2, which is built from source, and timm: pip install timm && pip install "
    "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2'"
)


class Detectron2Detector:
    """A published detector of Detectron2, with masks.

    Args:
        name: ``detectron2_vitdet_h`` or ``detectron2_mask_rcnn``.
        path: weights as .pkl (up to the size that `models/unpickle.py` allows), .pth or
            .safetensors.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        min_score: instances with lower scores are not handed out.
        batch_size: frames per forward pass.

    Raises:
        ConfigError: Detectron2 is not installed.
        CheckpointError: no such file, or weights of another model.
    """

    gives_masks = True

    def __init__(
        self, name: str, path: str, *, device: str, min_score: float, batch_size: int
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            import detectron2.data.transforms as d2_transforms
        except ImportError as error:
            raise ConfigError(f"detector {name!r} {INSTALL}") from error
        if name == "detectron2_vitdet_h":
            model, edges_px = vitdet_h(min_score), VITDET_EDGES_PX
        else:
            model, edges_px = mask_rcnn(min_score), MASK_RCNN_EDGES_PX
        data = read_weights(path, DETECTORS[name][1])
        _load_state(model, _state(data, path), path)
        self.name = name
        self.digest = settings_digest(hashlib.sha256(data).hexdigest(), min_score=min_score)
        self._batch_size = batch_size
        self._resize = d2_transforms.ResizeShortestEdge(*edges_px)
        self._model = model.to(device).eval()

    @torch.inference_mode()
    def detect(self, chunk: FrameChunk) -> Detections:
        """See `Detector.detect`."""
        height, width = chunk.rgb.shape[1:3]
        resize = self._resize.get_transform(chunk.rgb[0])
        is_bgr = self._model.input_format == "BGR"
        rows: list[I64] = []
        boxes: list[F32] = []
        scores: list[F32] = []
        masks: list[RleMask] = []
        for first, end in batch_bounds(chunk.num_frames, self._batch_size):
            images = [
                resize.apply_image(rgb[..., ::-1] if is_bgr else rgb)
                for rgb in chunk.rgb[first:end]
            ]
            images += [np.zeros_like(images[0])] * (self._batch_size - len(images))
            inputs = [
                {
                    "image": torch.from_numpy(
                        np.ascontiguousarray(image.transpose(2, 0, 1))
                    ).float(),
                    "height": height,
                    "width": width,
                }
                for image in images
            ]
            for place, output in enumerate(self._model(inputs)[: end - first]):
                found = output["instances"]
                people = found[found.pred_classes == COCO_PERSON].to("cpu")
                rows.append(np.full(len(people), first + place))
                boxes.append(people.pred_boxes.tensor.numpy())
                scores.append(people.scores.numpy())
                masks += encode_rle(people.pred_masks.numpy())
        return ordered_detections(
            np.concatenate(rows), np.concatenate(boxes), np.concatenate(scores), masks
        )


def vitdet_h(min_score: float) -> Any:
    """Cascade Mask R-CNN with ViTDet-H, as in Detectron2's projects/ViTDet (75 epochs)."""
    from detectron2 import model_zoo
    from detectron2.config import LazyCall, instantiate
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.roi_heads import (
        CascadeROIHeads,
        FastRCNNConvFCHead,
        FastRCNNOutputLayers,
    )

    config = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    net = config.backbone.net
    net.embed_dim, net.depth, net.num_heads, net.drop_path_rate = 1280, 32, 16, 0.0
    # Every eighth block attends to the whole picture, the others within windows.
    net.window_block_indexes = [block for block in range(32) if block % 8 != 7]
    heads = config.roi_heads
    for single in ("box_head", "box_predictor", "proposal_matcher"):
        heads.pop(single)
    heads.update(
        _target_=CascadeROIHeads,
        box_heads=[
            LazyCall(FastRCNNConvFCHead)(
                input_shape=ShapeSpec(channels=256, height=7, width=7),
                conv_dims=[256] * 4,
                fc_dims=[1024],
                conv_norm="LN",
            )
            for _ in range(3)
        ],
        box_predictors=[
            LazyCall(FastRCNNOutputLayers)(
                input_shape=ShapeSpec(channels=1024),
                test_score_thresh=min_score,
                box2box_transform=LazyCall(Box2BoxTransform)(weights=(xy, xy, wh, wh)),
                cls_agnostic_bbox_reg=True,
                num_classes="${...num_classes}",
            )
            for xy, wh in ((10, 5), (20, 10), (30, 15))
        ],
        proposal_matchers=[
            LazyCall(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
            for iou in (0.5, 0.6, 0.7)
        ],
    )
    return instantiate(config)


def mask_rcnn(min_score: float) -> Any:
    """Mask R-CNN X-101-32x8d-FPN, 3x schedule, from Detectron2's model zoo."""
    from detectron2 import model_zoo
    from detectron2.modeling import build_model

    config = model_zoo.get_config(MASK_RCNN_CONFIG)
    config.MODEL.DEVICE = "cpu"
    config.MODEL.ROI_HEADS.SCORE_THRESH_TEST = min_score
    return build_model(config)


def _state(data: bytes, path: str) -> dict[str, Any]:
    """Tensors or arrays of a weights file by name; nothing in it is executed."""
    if path.endswith(".safetensors"):
        content: object = safetensors.torch.load(data)
    elif path.endswith(".pkl"):
        content = load_restricted_pickle(io.BytesIO(data))
    else:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected tensors by name, got {type(content).__name__}")
    return content


def _load_state(model: Any, state: dict[str, Any], path: str) -> None:
    try:
        result = model.load_state_dict(
            {name: torch.as_tensor(value) for name, value in state.items()}, strict=False
        )
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if result.missing_keys:
        raise CheckpointError(
            f"{path}: {len(result.missing_keys)} tensors are not in the file, "
            f"for example {result.missing_keys[:3]}"
        )

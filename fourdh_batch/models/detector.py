"""Person boxes and masks: one door, many detectors.

`build_detector` makes a detector from a short name; what it gives is a `Detector`. Detectors hand
out every person above a low floor, so that `drop_reasons` can say of each box that is not used
why it is not.

Dimension letters: `T` frames of a chunk, `N` detections.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.geometry import box_iou
from fourdh_batch.storage import open_read
from fourdh_batch.types import F32, I64, Bool, Detections, FrameChunk, RleMask

# Boxes of networks below this are not even recorded: under it real clips hold ten times as many
# boxes as people. PHALP's detectors cut at 0.5, its filter at 0.8.
MIN_SCORE = 0.2


class Detector(Protocol):
    """What finds people.

    Stateless and deterministic: what is found in a frame does not depend on its companions in the
    chunk or batch. (With some networks its place in the batch may change the last bit of a number;
    a chunk always gives the same.)

    Attributes:
        name: short name, with the kind of network where it was recognised.
        digest: hex digest of the weights (or given boxes) and of the settings that change results.
        gives_masks: whether detections carry masks.
    """

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def gives_masks(self) -> bool: ...

    def detect(self, chunk: FrameChunk) -> Detections:
        """People of every frame, by descending score within a frame.

        Raises:
            VideoError: what was given for this video cannot be used.
        """
        ...


@dataclass(frozen=True, slots=True)
class DetectorSettings:
    """What a builder may use.

    Attributes:
        path: weights file, model directory, hub id or file of boxes.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        min_score: boxes of networks with lower scores are not handed out.
        batch_size: frames per batch.
        input_size: side of the network's input in pixels, None for the model's own.
        num_threads: threads of one network on a CPU, where its library allows a choice.
        boxes_format: ``auto``, ``ava``, ``mot``, ``posetrack`` or ``parquet``.
        boxes_score: score given to every box instead of the one in the file.
        boxes_time_offset_s: time in an AVA file at which the video begins (900 for the published
            cuts, which start at minute 15 of the film).
    """

    path: str
    device: str
    min_score: float
    batch_size: int
    input_size: int | None
    num_threads: int
    boxes_format: str
    boxes_score: float | None
    boxes_time_offset_s: float


def _onnx(settings: DetectorSettings) -> Detector:
    from fourdh_batch.models.detector_onnx import load_onnx_detector

    return load_onnx_detector(
        settings.path,
        device=settings.device,
        min_score=settings.min_score,
        batch_size=settings.batch_size,
        input_size=settings.input_size,
        num_threads=settings.num_threads,
    )


def _transformers(settings: DetectorSettings) -> Detector:
    from fourdh_batch.models.detector_transformers import TransformersDetector

    return TransformersDetector(
        settings.path,
        device=settings.device,
        min_score=settings.min_score,
        batch_size=settings.batch_size,
        input_size=settings.input_size,
    )


def _boxes(settings: DetectorSettings) -> Detector:
    from fourdh_batch.models.detector_given import GivenDetector

    return GivenDetector(
        settings.path,
        format=settings.boxes_format,
        fixed_score=settings.boxes_score,
        time_offset_s=settings.boxes_time_offset_s,
    )


def _detectron2(name: str) -> Callable[[DetectorSettings], Detector]:
    def build(settings: DetectorSettings) -> Detector:
        from fourdh_batch.models.detector_detectron2 import Detectron2Detector

        return Detectron2Detector(
            name,
            settings.path,
            device=settings.device,
            min_score=settings.min_score,
            batch_size=settings.batch_size,
        )

    return build


# short name: its builder, and what `path` must be
DETECTORS: dict[str, tuple[Callable[[DetectorSettings], Detector], str]] = {
    "onnx": (_onnx, "an .onnx file (RTMDet with its own NMS, or YOLOX with raw output)"),
    "transformers": (
        _transformers,
        "a directory written by `save_pretrained` (D-FINE, RT-DETRv2, RF-DETR, RF-DETR-Seg, ...), "
        "a hub id such as ustc-community/dfine-large-obj2coco-e25, or the word mini",
    ),
    "boxes": (
        _boxes,
        "given boxes: an AVA csv, PoseTrack json or Parquet file, or for MOT a folder or a path "
        "with {video_id}",
    ),
    "detectron2_vitdet_h": (
        _detectron2("detectron2_vitdet_h"),
        "the published cascade Mask R-CNN with ViTDet-H (model_final_f05665.pkl, too large to be "
        "unpickled safely here), saved again as .pth or .safetensors",
    ),
    "detectron2_mask_rcnn": (
        _detectron2("detectron2_mask_rcnn"),
        "the published model_final_2d9806.pkl of Mask R-CNN X-101-32x8d-FPN 3x, "
        "or the same as .pth or .safetensors",
    ),
}


def build_detector(
    name: str,
    *,
    path: str | None,
    device: str = "auto",
    score_threshold: float = 0.8,
    batch_size: int = 8,
    input_size: int | None = None,
    min_score: float | None = None,
    num_threads: int = 1,
    boxes_format: str = "auto",
    boxes_score: float | None = None,
    boxes_time_offset_s: float = 0.0,
) -> Detector:
    """A detector by its short name.

    Args:
        name: a key of `DETECTORS`.
        path, device, batch_size, input_size, num_threads, boxes_format, boxes_score,
            boxes_time_offset_s: see `DetectorSettings`.
        score_threshold: what the later filter will keep; the floor is never above it.
        min_score: the floor; None for `MIN_SCORE`, or `score_threshold` where that is lower.
            Given boxes are all handed out, whatever their score.

    Raises:
        ConfigError: an unknown name or a setting that does not fit; given boxes that cannot be
            read.
        CheckpointError: weights are missing or not what the name says.
    """
    if name not in DETECTORS:
        raise ConfigError(f"detector {name!r} is unknown; known are: {', '.join(DETECTORS)}")
    build, wanted = DETECTORS[name]
    if not path:
        error = ConfigError if name == "boxes" else CheckpointError
        raise error(f"detector {name!r} has no path; pass {wanted}")
    if batch_size < 1 or num_threads < 1 or (input_size is not None and input_size < 1):
        raise ConfigError(
            f"detector {name!r}: expected batch_size, num_threads and input_size >= 1, "
            f"got {batch_size}, {num_threads}, {input_size}"
        )
    floor = min(MIN_SCORE, score_threshold) if min_score is None else min_score
    if not 0 <= floor <= score_threshold <= 1:
        raise ConfigError(
            f"detector {name!r}: expected 0 <= min_score <= score_threshold <= 1, "
            f"got min_score={floor}, score_threshold={score_threshold}"
        )
    return build(
        DetectorSettings(
            path=path,
            device=device,
            min_score=floor,
            batch_size=batch_size,
            input_size=input_size,
            num_threads=num_threads,
            boxes_format=boxes_format,
            boxes_score=boxes_score,
            boxes_time_offset_s=boxes_time_offset_s,
        )
    )


def drop_reasons(
    detections: Detections, *, score_threshold: float, min_width_px: float, min_height_px: float
) -> NDArray[np.str_]:
    """Why each box is not used, as PHALP filters: by score first, then by the size of the box.

    A box is used when its score is strictly greater than the threshold, and neither width nor
    height is strictly less than its minimum. The box is the detector's own, before it is grown to
    the crop's shape and whether or not it reaches beyond the frame.

    Returns:
        (N,) of ``""`` (used), ``low_score`` or ``too_small``.
    """
    box = detections.bbox_xyxy_px
    width, height = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    # Compared in float32, as the reference does: a score of float32(0.8) is not greater than 0.8.
    low_score = ~(detections.score > np.float32(score_threshold))
    too_small = (width < np.float32(min_width_px)) | (height < np.float32(min_height_px))
    return np.select([low_score, too_small], ["low_score", "too_small"], default="")


def ordered_detections(
    frame_row: I64,
    bbox_xyxy_px: F32,
    score: F32,
    masks: Sequence[RleMask] | None = None,
) -> Detections:
    """Detections in the door's order: by frame, then by descending score; ties keep their order."""
    order = np.lexsort((-score, frame_row))
    return Detections(
        frame_row=frame_row[order].astype(np.int64),
        bbox_xyxy_px=bbox_xyxy_px[order].astype(np.float32),
        score=score[order].astype(np.float32),
        masks=None if masks is None else [masks[i] for i in order.tolist()],
        mask_source="box" if masks is None else "detector",
    )


def clip_boxes(bbox_xyxy_px: F32, image_size_wh: tuple[int, int]) -> F32:
    """Boxes cut at the borders of the frame, as the published detectors give them."""
    width, height = image_size_wh
    limit = np.array([width, height, width, height], dtype=np.float32)
    return np.clip(bbox_xyxy_px, np.float32(0), limit)


def suppress_overlaps(bbox_xyxy_px: F32, max_iou: float) -> Bool:
    """Greedy non-maximum suppression of boxes that come by descending score.

    A box stays when no better box that stays overlaps it by more than `max_iou`. That rule has
    one solution, and applying it to all boxes at once until nothing changes reaches it.

    Returns:
        (N,) True where the box stays.
    """
    overlaps = np.triu(box_iou(bbox_xyxy_px, bbox_xyxy_px) > max_iou, k=1)  # better box, box
    keep = np.ones(len(bbox_xyxy_px), dtype=np.bool_)
    while True:
        now = ~np.any(overlaps & keep[:, None], axis=0)
        if np.array_equal(now, keep):
            return keep
        keep = now


def batch_bounds(rows: int, batch_size: int) -> list[tuple[int, int]]:
    """(first, end) of the batches of a chunk; only the last may be short, and is to be filled up.

    Batches always run at full size: the kernels that a library picks for another batch shape may
    round differently, and a frame's boxes must not depend on how many frames came with it.
    """
    return [(first, min(first + batch_size, rows)) for first in range(0, rows, batch_size)]


def read_weights(path: str, what: str) -> bytes:
    """The bytes of a weights file.

    Raises:
        CheckpointError: there is nothing at this address.
    """
    try:
        with open_read(path) as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"detector weights {path!r}: no such file; pass {what}") from error


def settings_digest(content_sha256: str, **settings: object) -> str:
    """Hex digest of weights and the settings that change results."""
    text = json.dumps({"content": content_sha256, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

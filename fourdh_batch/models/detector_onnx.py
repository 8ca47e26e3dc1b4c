"""Detectors stored as ONNX graphs: RTMDet with its own NMS, YOLOX with raw grid output.

Both take a letterboxed BGR picture: scaled to fit, placed at the top left, filled with 114.

Dimension letters: `B` frames of a batch, `H`, `W` network input, `K` grid cells, `C` classes.

Source: RTMDet (arXiv 2212.07784), exported with non-maximum suppression inside; YOLOX
(arXiv 2107.08430), exported without decoding.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.models.detector import (
    DETECTORS,
    batch_bounds,
    clip_boxes,
    ordered_detections,
    read_weights,
    settings_digest,
    suppress_overlaps,
)
from fourdh_batch.types import F32, I64, Detections, FrameChunk

logger = logging.getLogger(__name__)

LETTERBOX_GREY = 114  # both families are trained with it around the picture
SIZE_MULTIPLE = 32  # largest stride of both
RTMDET_MEAN_BGR = (103.53, 116.28, 123.675)
RTMDET_STD_BGR = (57.375, 57.12, 58.395)
RTMDET_INPUT_SIZE = 416  # finds all near people of our clips; 640 finds more far ones, fewer near
YOLOX_STRIDES = (8, 16, 32)
YOLOX_NMS_IOU = 0.6
YOLOX_MAX_RAW = 50.0  # raw centres and log sizes are a few units, decoded ones are pixels
COCO_NUM_CLASSES = 80
# What the runtime raises for bytes that are no graph, or a graph that it cannot run.
GRAPH_ERRORS = (
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NotImplemented,
)
PERSON_CLASS = 0  # of COCO's 80, and the only one of person detectors


@dataclass(frozen=True, slots=True)
class Layout:
    """What a family of networks wants and what its first output means.

    Attributes:
        name: family.
        mean_bgr, std_bgr: `(pixel - mean) / std` is fed.
        people: output of B frames, input size (H, W) and lowest score to place in the batch (N,),
            corners in input pixels (N, 4), score (N,).
    """

    name: str
    mean_bgr: tuple[float, float, float]
    std_bgr: tuple[float, float, float]
    people: Callable[[F32, tuple[int, int], float], tuple[I64, F32, F32]]


class OnnxDetector:
    """A letterbox network in ONNX Runtime; see `load_onnx_detector`."""

    gives_masks = False

    def __init__(
        self,
        session: Any,
        layout: Layout,
        *,
        digest: str,
        min_score: float,
        batch_size: int,
        input_size_hw: tuple[int, int],
    ) -> None:
        self.name = f"onnx_{layout.name}"
        self.digest = digest
        self.input_size_hw = input_size_hw
        self.batch_size = batch_size
        self._session = session
        self._input_name = session.get_inputs()[0].name
        self._layout = layout
        self._min_score = min_score

    def detect(self, chunk: FrameChunk) -> Detections:
        """See `Detector.detect`."""
        height, width = self.input_size_hw
        frame_w, frame_h = chunk.image_size_wh
        scale = min(width / frame_w, height / frame_h)
        fitted_w, fitted_h = max(round(frame_w * scale), 1), max(round(frame_h * scale), 1)
        scale_xyxy = np.array([fitted_w / frame_w, fitted_h / frame_h] * 2, dtype=np.float32)

        mean = np.array(self._layout.mean_bgr, dtype=np.float32)
        std = np.array(self._layout.std_bgr, dtype=np.float32)
        batch = np.empty((self.batch_size, 3, height, width), dtype=np.float32)
        batch[:] = ((LETTERBOX_GREY - mean) / std)[:, None, None]
        rows: list[I64] = []
        boxes: list[F32] = []
        scores: list[F32] = []
        for first, end in batch_bounds(chunk.num_frames, self.batch_size):
            for image, frame in enumerate(chunk.rgb[first:end]):
                fitted = cv2.resize(frame, (fitted_w, fitted_h), interpolation=cv2.INTER_LINEAR)
                normalised = (fitted[..., ::-1] - mean) / std
                batch[image, :, :fitted_h, :fitted_w] = normalised.transpose(2, 0, 1)
            output = self._session.run(None, {self._input_name: batch})[0][: end - first]
            place, box, score = self._layout.people(output, self.input_size_hw, self._min_score)
            rows.append(place + first)
            boxes.append(clip_boxes(box / scale_xyxy, chunk.image_size_wh))
            scores.append(score)
        return ordered_detections(
            np.concatenate(rows), np.concatenate(boxes), np.concatenate(scores)
        )


def load_onnx_detector(
    path: str,
    *,
    device: str,
    min_score: float,
    batch_size: int,
    input_size: int | None = None,
    num_threads: int = 1,
) -> OnnxDetector:
    """Open a graph and recognise its family by its outputs.

    Args:
        path: local or remote .onnx file.
        device: ``auto`` and ``cuda`` use the CUDA provider where ONNX Runtime has one.
        min_score: boxes with lower scores are not handed out.
        batch_size: frames per run; a graph made for one batch size keeps it.
        input_size: longer side of the input in pixels, a multiple of 32; None for the graph's own,
            `RTMDET_INPUT_SIZE` where it leaves it open.
        num_threads: threads of one run on a CPU.

    Raises:
        CheckpointError: no such file, not an ONNX graph, or of no known family.
        ConfigError: the graph does not take this input size.
    """
    data = read_weights(path, DETECTORS["onnx"][1])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    # Idle threads that spin take the cores of the other actors on the machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(data, options, providers=_providers(device))
    except GRAPH_ERRORS as error:
        raise CheckpointError(
            f"{path}: not an ONNX graph that ONNX Runtime opens: {error}"
        ) from error
    layout = _recognise(session, path)

    batch, _, height, width = session.get_inputs()[0].shape
    wanted = input_size or RTMDET_INPUT_SIZE
    fixed = isinstance(height, int) and isinstance(width, int)
    size_hw = (height, width) if fixed else (wanted, wanted)
    if input_size is not None and input_size != max(size_hw):
        raise ConfigError(f"{path}: the graph takes {width} x {height} px only, got {input_size}")
    if size_hw[0] % SIZE_MULTIPLE or size_hw[1] % SIZE_MULTIPLE:
        raise ConfigError(
            f"{path}: expected an input size that is a multiple of {SIZE_MULTIPLE}, got {size_hw}"
        )
    detector = OnnxDetector(
        session,
        layout,
        digest=settings_digest(
            hashlib.sha256(data).hexdigest(),
            layout=layout.name,
            input_size_hw=size_hw,
            min_score=min_score,
        ),
        min_score=min_score,
        batch_size=batch if isinstance(batch, int) else batch_size,
        input_size_hw=size_hw,
    )
    logger.info(
        "detector %s: %s px, batches of %d, %s",
        detector.name, size_hw, detector.batch_size, session.get_providers()[0],
    )  # fmt: skip
    return detector


def rtmdet_people(
    output: F32, input_size_hw: tuple[int, int], min_score: float
) -> tuple[I64, F32, F32]:
    """People of RTMDet's (B, N, 5): corners, score; after suppression, filled up with score 0."""
    place, row = np.nonzero(output[..., 4] >= min_score)
    found = output[place, row]
    return place, found[:, :4], found[:, 4]


def yolox_people(
    output: F32, input_size_hw: tuple[int, int], min_score: float
) -> tuple[I64, F32, F32]:
    """People of YOLOX's (B, K, 5 + C): centre, log size, objectness, classes of every grid cell."""
    score = output[..., 4] * output[..., 5 + PERSON_CLASS]
    place, cell = np.nonzero(score >= min_score)
    raw = output[place, cell, :4]
    if raw.size and np.abs(raw).max() > YOLOX_MAX_RAW:
        raise CheckpointError(
            f"YOLOX output: expected raw centres and log sizes, got values up to "
            f"{np.abs(raw).max():.0f}; export the graph without decoding"
        )
    corner_xy, stride = _yolox_grid(input_size_hw)
    center = (raw[:, :2] + corner_xy[cell]) * stride[cell]
    half = np.exp(raw[:, 2:]) * stride[cell] / 2
    box, score = np.concatenate([center - half, center + half], axis=1), score[place, cell]

    order = np.lexsort((-score, place))
    place, box, score = place[order], box[order], score[order]
    bounds = np.searchsorted(place, np.arange(len(output) + 1))
    keep = np.concatenate(
        [suppress_overlaps(box[b:e], YOLOX_NMS_IOU) for b, e in pairwise(bounds.tolist())]
    )
    return place[keep], box[keep], score[keep]


RTMDET = Layout("rtmdet", RTMDET_MEAN_BGR, RTMDET_STD_BGR, rtmdet_people)
YOLOX = Layout("yolox", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), yolox_people)


def _yolox_grid(input_size_hw: tuple[int, int]) -> tuple[F32, F32]:
    """(K, 2) x and y index of the grid cells, row by row, and their (K, 1) strides."""
    corners, strides = [], []
    for stride in YOLOX_STRIDES:
        rows, columns = np.indices((input_size_hw[0] // stride, input_size_hw[1] // stride))
        corners.append(np.stack([columns.ravel(), rows.ravel()], axis=1))
        strides.append(np.full((rows.size, 1), stride))
    return np.concatenate(corners).astype(np.float32), np.concatenate(strides).astype(np.float32)


def _recognise(session: Any, path: str) -> Layout:
    """The family of a graph, by the number and shapes of its outputs."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shapes = [list(output.shape) for output in outputs]
    if len(inputs) == 1 and len(inputs[0].shape) == 4 and inputs[0].shape[1] == 3:
        height, width = inputs[0].shape[2:]
        if [len(shape) for shape in shapes] == [3, 2] and "int64" in outputs[1].type:
            return RTMDET
        if [len(shape) for shape in shapes] == [3] and isinstance(height, int):
            cells = sum((height // s) * (width // s) for s in YOLOX_STRIDES)
            if shapes[0][1:] in ([cells, 6], [cells, 5 + COCO_NUM_CLASSES]):
                return YOLOX
    raise CheckpointError(
        f"{path}: expected the outputs of RTMDet with suppression, (B, N, 5) and labels (B, N), "
        f"or of raw YOLOX with one or {COCO_NUM_CLASSES} classes, (B, cells, 6 or 85), "
        f"got inputs {[i.shape for i in inputs]}, outputs {shapes}"
    )


def _providers(device: str) -> list[Any]:
    """ONNX Runtime's execution providers for a device, best first."""
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if device not in ("auto", "cuda") and not device.startswith("cuda:"):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:<index>, got {device!r}")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        if device != "auto":
            logger.warning(
                "this ONNX Runtime has no CUDA provider, the detector runs on the CPU; "
                "install fourdh_batch[gpu] in its place"
            )
        return ["CPUExecutionProvider"]
    index = int(device.partition(":")[2] or 0)
    return [("CUDAExecutionProvider", {"device_id": index}), "CPUExecutionProvider"]

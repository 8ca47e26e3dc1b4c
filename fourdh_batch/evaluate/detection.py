"""Average precision of person boxes, as COCO computes it.

One class, boxes of all areas, the 100 best boxes of a frame, 101 points of recall, mean over IoU
0.50 to 0.95 in steps of 0.05. Written here because pycocotools wants its own JSON in memory and a
compiled module for what is one sorting and one loop; equal to it on `tests/data/evaluate`.

Source: Lin et al., Microsoft COCO; the detection evaluation of cocoapi.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fourdh_batch.geometry import box_iou
from fourdh_batch.types import F64, I64, Bool

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_BOXES = 100  # of a frame


@dataclass(frozen=True, slots=True, eq=False)
class FrameBoxes:
    """One frame.

    Attributes:
        truth_xyxy: (A, 4) px.
        ignored: (A,) true boxes that need not be found and may be.
        found_xyxy: (B, 4) px.
        score: (B,).
    """

    truth_xyxy: F64
    ignored: Bool
    found_xyxy: F64
    score: F64


@dataclass(frozen=True, slots=True)
class AveragePrecision:
    """In [0, 1]; NaN without a single true box.

    Attributes:
        ap: mean over the ten IoU thresholds.
        ap50, ap75: at IoU 0.5 and 0.75.
        recall50: share of the true boxes that are found at IoU 0.5, whatever their score.
        num_truth_boxes: that had to be found.
    """

    ap: float
    ap50: float
    ap75: float
    recall50: float
    num_truth_boxes: int


def average_precision(frames: Iterable[FrameBoxes]) -> AveragePrecision:
    """Average precision over all frames together.

    Args:
        frames: every frame that was searched, also those where nobody is or nothing was found.
    """
    scores: list[F64] = [np.zeros(0)]
    hits: list[Bool] = [np.zeros((len(IOU_THRESHOLDS), 0), np.bool_)]
    counts: list[Bool] = [np.zeros((len(IOU_THRESHOLDS), 0), np.bool_)]
    num_truth = 0
    for frame in frames:
        order = np.argsort(-frame.score, kind="stable")[:MAX_BOXES]
        hit, is_ignored = _match(frame, order)
        scores.append(frame.score[order])
        hits.append(hit)
        counts.append(~is_ignored)
        num_truth += int((~frame.ignored).sum())
    if num_truth == 0:
        return AveragePrecision(np.nan, np.nan, np.nan, np.nan, 0)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hit = np.concatenate(hits, axis=1)[:, order]
    counted = np.concatenate(counts, axis=1)[:, order]
    true = np.cumsum(hit & counted, axis=1)
    false = np.cumsum(~hit & counted, axis=1)
    ap = np.array([_area(t, f, num_truth) for t, f in zip(true, false, strict=True)])
    recall50 = float(true[0, -1]) / num_truth if true.shape[1] else 0.0
    return AveragePrecision(float(ap.mean()), float(ap[0]), float(ap[5]), recall50, num_truth)


def _match(frame: FrameBoxes, order: I64) -> tuple[Bool, Bool]:
    """Per threshold and box, best score first: whether it has a true box, and an ignored one."""
    num_thresholds = len(IOU_THRESHOLDS)
    hit = np.zeros((num_thresholds, len(order)), dtype=np.bool_)
    is_ignored = np.zeros_like(hit)
    if len(order) == 0 or len(frame.truth_xyxy) == 0:
        return hit, is_ignored
    iou = box_iou(frame.found_xyxy[order], frame.truth_xyxy)
    for t, threshold in enumerate(IOU_THRESHOLDS):
        free = np.ones(len(frame.truth_xyxy), dtype=np.bool_)
        for i, overlaps in enumerate(iou):
            fits = free & (overlaps >= threshold - 1e-10)
            wanted = fits & ~frame.ignored
            choice = wanted if wanted.any() else fits
            if not choice.any():
                continue
            # Of equals the last one, as in cocoapi.
            best = len(overlaps) - 1 - int(np.argmax(np.where(choice, overlaps, -1)[::-1]))
            free[best] = False
            hit[t, i] = True
            is_ignored[t, i] = frame.ignored[best]
    return hit, is_ignored


def _area(true: I64, false: I64, num_truth: int) -> float:
    """Mean over `RECALLS` of the best precision at that recall or a higher one."""
    recall = true / num_truth
    precision = true / np.maximum(true + false, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    index = np.searchsorted(recall, RECALLS, side="left")
    reached = index < len(precision)
    return float(np.where(reached, np.append(precision, 0.0)[index], 0.0).mean())

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


@dataclass(frozen=True, slots=True, eq=False)
class FrameMatches:
    """One frame after matching, at the ten IoU thresholds.

    Attributes:
        score: (B,) of the boxes that count at most, best first.
        is_hit: (10, B) the box has a true box to itself.
        counts: (10, B) False where that is an ignored one.
        num_truth: true boxes that have to be found.
    """

    score: F64
    is_hit: Bool
    counts: Bool
    num_truth: int


def match_frame(frame: FrameBoxes) -> FrameMatches:
    """Give found boxes, best score first, the free true box that they overlap most."""
    order = np.argsort(-frame.score, kind="stable")[:MAX_BOXES]
    hit = np.zeros((len(IOU_THRESHOLDS), len(order)), dtype=np.bool_)
    counts = np.ones_like(hit)
    iou = box_iou(frame.found_xyxy[order], frame.truth_xyxy)
    for t, threshold in enumerate(IOU_THRESHOLDS):
        free = np.ones(len(frame.truth_xyxy), dtype=np.bool_)
        fits_any = iou >= threshold - 1e-10
        for i in np.flatnonzero(fits_any.any(axis=1)).tolist():
            fits = free & fits_any[i]
            wanted = fits & ~frame.ignored
            choice = wanted if wanted.any() else fits
            if not choice.any():
                continue
            # Of equals the last one, as in cocoapi.
            best = len(choice) - 1 - int(np.argmax(np.where(choice, iou[i], -1)[::-1]))
            free[best] = False
            hit[t, i] = True
            counts[t, i] = not frame.ignored[best]
    return FrameMatches(frame.score[order], hit, counts, int((~frame.ignored).sum()))


def average_precision(frames: Iterable[FrameMatches]) -> AveragePrecision:
    """Average precision over all frames together.

    Args:
        frames: every frame that was searched, also those where nobody is or nothing was found.
    """
    matched = list(frames)
    num_truth = sum(frame.num_truth for frame in matched)
    if num_truth == 0:
        return AveragePrecision(np.nan, np.nan, np.nan, np.nan, 0)
    order = np.argsort(-np.concatenate([frame.score for frame in matched]), kind="stable")
    hit = np.concatenate([frame.is_hit for frame in matched], axis=1)[:, order]
    counts = np.concatenate([frame.counts for frame in matched], axis=1)[:, order]
    true = np.cumsum(hit & counts, axis=1)
    false = np.cumsum(~hit & counts, axis=1)
    ap = np.array([_area(t, f, num_truth) for t, f in zip(true, false, strict=True)])
    recall50 = float(true[0, -1]) / num_truth if true.shape[1] else 0.0
    return AveragePrecision(float(ap.mean()), float(ap[0]), float(ap[5]), recall50, num_truth)


def _area(true: I64, false: I64, num_truth: int) -> float:
    """Mean over `RECALLS` of the best precision at that recall or a higher one."""
    recall = true / num_truth
    precision = true / np.maximum(true + false, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    index = np.searchsorted(recall, RECALLS, side="left")
    reached = index < len(precision)
    return float(np.where(reached, np.append(precision, 0.0)[index], 0.0).mean())

"""Which predicted box is which true one, frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from fourdh_batch.geometry import box_iou
from fourdh_batch.types import F64, I64, Bool

MATCH_MIN_IOU = 0.5  # of boxes that are taken for the same person's


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """Boxes of one video with identities, in any order.

    Attributes:
        frame_index: (M,).
        track_id: (M,) any numbers; at most once in a frame.
        bbox_xyxy_px: (M, 4).
    """

    frame_index: I64
    track_id: I64
    bbox_xyxy_px: F64

    @classmethod
    def empty(cls) -> Boxes:
        """Nobody in any frame."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)))

    def __len__(self) -> int:
        return len(self.frame_index)

    def take(self, rows: NDArray[Any]) -> Boxes:
        """Some rows, by a mask or by indices."""
        return Boxes(self.frame_index[rows], self.track_id[rows], self.bbox_xyxy_px[rows])


def by_frame(*frame_indices: I64) -> Iterator[tuple[I64, ...]]:
    """For every frame that occurs, in order: the rows that each argument has in it."""
    orders = [np.argsort(frames, kind="stable") for frames in frame_indices]
    frames = np.unique(np.concatenate(frame_indices)) if frame_indices else np.zeros(0, np.int64)
    bounds = [
        np.append(np.searchsorted(frame_index[order], frames), len(order))
        for frame_index, order in zip(frame_indices, orders, strict=True)
    ]
    for i in range(len(frames)):
        yield tuple(
            order[bound[i] : bound[i + 1]] for order, bound in zip(orders, bounds, strict=True)
        )


def match_boxes(
    truth: Boxes, predicted: Boxes, min_iou: float = MATCH_MIN_IOU
) -> tuple[I64, I64, F64]:
    """One-to-one pairs within each frame, with the largest sum of overlaps.

    Returns:
        Rows of the truth, rows of the prediction, and their IoU; only pairs of at least `min_iou`.
    """
    rows: list[I64] = [np.zeros(0, np.int64)]
    columns: list[I64] = [np.zeros(0, np.int64)]
    overlaps: list[F64] = [np.zeros(0)]
    for there, found in by_frame(truth.frame_index, predicted.frame_index):
        if len(there) == 0 or len(found) == 0:
            continue
        iou = box_iou(truth.bbox_xyxy_px[there], predicted.bbox_xyxy_px[found])
        iou[iou < min_iou] = 0
        row, column = linear_sum_assignment(iou, maximize=True)
        keep = iou[row, column] > 0
        rows.append(there[row[keep]])
        columns.append(found[column[keep]])
        overlaps.append(iou[row, column][keep].astype(np.float64))
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(overlaps)


def drop_hidden(truth: Boxes, is_visible: Bool, predicted: Boxes) -> tuple[Boxes, Bool]:
    """The truth that a detector can be asked for, and which predictions count against it.

    People who are there but cannot be seen are neither misses nor, where somebody predicts them
    all the same, false alarms.

    Args:
        truth: everybody.
        is_visible: (M,) of the truth.
        predicted: of the same video.

    Returns:
        The visible truth, and per prediction whether it counts: it is not the box that fits a
        hidden person best.
    """
    counts = np.ones(len(predicted), dtype=np.bool_)
    if not is_visible.all():
        rows, columns, _ = match_boxes(truth, predicted)
        counts[columns[~is_visible[rows]]] = False
    return truth.take(is_visible), counts

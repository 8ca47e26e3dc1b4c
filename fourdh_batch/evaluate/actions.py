"""Mean average precision of AVA's actions, as the official evaluation computes it.

Per action: a prediction is right where the true box of that action that it overlaps most has an
IoU of at least 0.5 and was not found by a better scored one. Average precision is the area under
the curve of precision made monotone (Pascal VOC); the mean goes over those of the 60 scored
actions that occur in the truth. Of a frame the 50 best scored predictions count, whatever their
actions.

Source: Gu et al., AVA; ActivityNet's `get_ava_performance.py`.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from fourdh_batch.evaluate.datasets import ActionBoxes
from fourdh_batch.evaluate.matching import by_frame
from fourdh_batch.geometry import box_iou
from fourdh_batch.types import Bool

MIN_IOU = 0.5
MAX_PREDICTIONS = 50  # of a frame
# The actions of list v2.1 that occur often enough to be scored; AVA v2.2 is scored on the same.
SCORED_ACTIONS = (
    *(1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 20, 22, 24, 26, 27, 28, 29, 30, 34, 36),
    *(37, 38, 41, 43, 45, 46, 47, 48, 49, 51, 52, 54, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65, 66),
    *(67, 68, 69, 70, 72, 73, 74, 76, 77, 78, 79, 80),
)
# Kinds of actions by their first and last number.
KINDS = {"person_movement": (1, 14), "object_manipulation": (15, 63), "interaction": (64, 80)}


@dataclass(frozen=True, slots=True)
class ActionScores:
    """In [0, 1].

    Attributes:
        mean_ap: over the actions that occur in the truth; NaN without any.
        ap: by action number.
        by_kind: means over the actions of each of `KINDS`; NaN without any.
    """

    mean_ap: float
    ap: dict[int, float]
    by_kind: dict[str, float]


def action_scores(
    truth: ActionBoxes, found: ActionBoxes, excluded: AbstractSet[str] = frozenset()
) -> ActionScores:
    """Score predictions of actions.

    Args:
        truth: labels; predictions in frames that it does not name do not count.
        found: predictions; those without an extent do not count.
        excluded: frames that are left out on both sides.
    """
    frames, codes = np.unique(np.concatenate([truth.frame, found.frame]), return_inverse=True)
    true_frame, found_frame = codes[: len(truth.frame)], codes[len(truth.frame) :]
    counts = np.isin(frames, truth.frame) & ~np.isin(frames, sorted(excluded))
    keep = counts[true_frame] & np.isin(truth.action_id, SCORED_ACTIONS)
    truth, true_frame = truth.take(keep), true_frame[keep]
    keep = counts[found_frame] & np.isin(found.action_id, SCORED_ACTIONS)
    found, found_frame = found.take(keep), found_frame[keep]
    best = np.concatenate(
        [np.zeros(0, np.int64), *(_best(found, rows) for (rows,) in by_frame(found_frame))]
    )
    best = best[(found.bbox_xyxy[best, 2:] > found.bbox_xyxy[best, :2]).all(axis=1)]
    found, found_frame = found.take(best), found_frame[best]

    ap: dict[int, float] = {}
    for action in np.unique(truth.action_id).tolist():
        true_rows = np.flatnonzero(truth.action_id == action)
        found_rows = np.flatnonzero(found.action_id == action)
        hit = np.zeros(len(found_rows), dtype=np.bool_)
        for there, here in by_frame(true_frame[true_rows], found_frame[found_rows]):
            hit[here] = _hits(truth, true_rows[there], found, found_rows[here])
        # As published: of equal scores the last read comes first.
        order = np.argsort(found.score[found_rows], kind="stable")[::-1]
        ap[action] = _area(hit[order], len(true_rows))
    return ActionScores(
        mean_ap=_mean(list(ap.values())),
        ap=ap,
        by_kind={
            kind: _mean([value for action, value in ap.items() if first <= action <= last])
            for kind, (first, last) in KINDS.items()
        },
    )


def _best(found: ActionBoxes, rows: np.ndarray) -> np.ndarray:
    """The rows of one frame that count, best first; equal scores by number of the action."""
    order = np.lexsort((-found.action_id[rows], -found.score[rows]))
    return rows[order[:MAX_PREDICTIONS]]


def _hits(truth: ActionBoxes, there: np.ndarray, found: ActionBoxes, here: np.ndarray) -> Bool:
    """Which predictions of one action in one frame are right."""
    hit = np.zeros(len(here), dtype=np.bool_)
    if len(there) == 0 or len(here) == 0:
        return hit
    iou = box_iou(found.bbox_xyxy[here], truth.bbox_xyxy[there])
    nearest = iou.argmax(axis=1)
    is_free = np.ones(len(there), dtype=np.bool_)
    for i in np.argsort(-found.score[here], kind="stable").tolist():
        if iou[i, nearest[i]] >= MIN_IOU and is_free[nearest[i]]:
            is_free[nearest[i]] = False
            hit[i] = True
    return hit


def _area(hit: Bool, num_truth: int) -> float:
    """Area under precision over recall, precision made monotone from the right."""
    true = np.cumsum(hit)
    recall = np.concatenate([[0], true / num_truth, [1]])
    precision = np.concatenate([[0], true / np.arange(1, len(hit) + 1), [0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * precision[1:]).sum())


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")

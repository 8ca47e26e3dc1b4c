"""Which detection belongs to which track: one assignment over all of them.

Source: docs/PHALP.md, section 9.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from fourdh_batch.types import F64, I64

GATED_EXCESS = 1e-5  # what a refused pair costs above the gate


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """Rows and columns of a cost matrix that belong together.

    Attributes:
        track: (P,) rows, ascending.
        detection: (P,) the column of each.
        unmatched_detection: (Q,) columns left over, in the order in which they open tracks.
    """

    track: I64
    detection: I64
    unmatched_detection: I64


def gated(cost: F64, gate: float) -> F64:
    """Refuse what costs more than the gate, and what has no cost at all (section 15, Q6)."""
    return np.where(cost <= gate, cost, gate + GATED_EXCESS)


def assign(cost: F64, gate: float, *, solver_order: bool = False) -> Assignment:
    """Cheapest one-to-one assignment of detections to tracks.

    Args:
        cost: (K, M), rows are tracks; may hold NaN and infinity.
        gate: a pair above it is never a match.
        solver_order: hand out the left-over columns as the reference does: first those that the
            solver left alone, then those it paired at a refused cost, by row. Otherwise they
            come in their own order (section 15, Q28).
    """
    matrix = gated(cost, gate)
    row, column = linear_sum_assignment(matrix)  # rows ascend
    matched = cost[row, column] <= gate
    taken = column if solver_order else column[matched]
    left_over = np.setdiff1d(np.arange(cost.shape[1]), taken, assume_unique=True)
    if solver_order:
        left_over = np.concatenate([left_over, column[~matched]])
    return Assignment(row[matched], column[matched], left_over)

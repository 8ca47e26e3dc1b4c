"""Ratios of processor time, measured in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

ROUNDS = 5


def ratio(
    what: str,
    measured: Callable[[], object],
    baseline: Callable[[], object],
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Any]:
    """Median over the rounds of time(measured) / time(baseline), after one uncounted round."""
    ratios = []
    for turn in range(rounds + 1):
        times = []
        for call in (measured, baseline):
            start = clock()
            call()
            times.append(clock() - start)
        if turn:
            ratios.append(times[0] / times[1])
    return {
        "what": what,
        "value": statistics.median(ratios),
        "unit": "x",
        "spread": (min(ratios), max(ratios)),
    }

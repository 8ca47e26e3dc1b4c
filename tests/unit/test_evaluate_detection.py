from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from fourdh_batch.evaluate.detection import FrameBoxes, FrameMatches, average_precision, match_frame


def frame(
    truth: Sequence[float], found: Sequence[tuple[float, float]], ignored: Sequence[int] = ()
) -> FrameMatches:
    """Boxes of 100 x 100 px by their left sides; found ones with a score."""

    def square(left: Sequence[float]) -> np.ndarray:
        x = np.array(left, dtype=np.float64)
        return np.stack((x, 0 * x, x + 100, 0 * x + 100), axis=1)

    return match_frame(
        FrameBoxes(
            truth_xyxy=square(truth),
            ignored=np.isin(np.arange(len(truth)), ignored),
            found_xyxy=square([left for left, _ in found]),
            score=np.array([score for _, score in found], dtype=np.float64),
        )
    )


def test_perfect_boxes_score_one() -> None:
    result = average_precision([frame([0, 300], [(0, 0.9), (300, 0.2)]), frame([], [])])
    assert (result.ap, result.ap50, result.recall50, result.num_truth_boxes) == (1, 1, 1, 2)


def test_a_better_scored_false_alarm_halves_the_precision() -> None:
    result = average_precision([frame([0], [(0, 0.5)]), frame([], [(0, 0.9)])])
    assert result.ap50 == pytest.approx(0.5)
    result = average_precision([frame([0], [(0, 0.9)]), frame([], [(0, 0.5)])])
    assert result.ap50 == pytest.approx(1)


def test_a_missed_person_cuts_the_recall() -> None:
    result = average_precision([frame([0, 300], [(0, 0.9)])])
    assert result.ap50 == pytest.approx(51 / 101)  # recalls 0, 0.01, ... 0.50
    assert result.recall50 == 0.5


def test_a_second_box_on_the_same_person_is_a_false_alarm() -> None:
    result = average_precision([frame([0, 300], [(0, 0.9), (3, 0.8), (300, 0.7)])])
    assert result.ap50 == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_the_hundred_best_boxes_of_a_frame_count() -> None:
    wrong = [(1000.0 + 200 * n, 0.9) for n in range(99)]
    assert average_precision([frame([0], [*wrong, (0, 0.5)])]).recall50 == 1
    assert average_precision([frame([0], [*wrong, (900, 0.8), (0, 0.5)])]).recall50 == 0


def test_a_loose_box_counts_at_low_thresholds_only() -> None:
    result = average_precision([frame([0], [(100 / 3, 0.9)])])  # IoU 0.5
    assert (result.ap50, result.ap75) == (1, 0)
    assert result.ap == pytest.approx(0.1)


def test_an_ignored_person_need_not_be_found_and_may_be() -> None:
    found = [(0, 0.9), (300, 0.8)]
    result = average_precision([frame([0, 300], found, ignored=[1])])
    assert (result.ap, result.num_truth_boxes) == (1, 1)
    result = average_precision([frame([0, 300], found[:1], ignored=[1])])
    assert result.ap == 1


def test_a_box_finds_whoever_has_to_be_found_before_an_ignored_person() -> None:
    # IoU 0.74 with the one, 0.90 with the ignored one
    result = average_precision([frame([0, 20], [(15, 0.9)], ignored=[1])])
    assert (result.ap50, result.recall50, result.ap75) == (1, 1, 0)


def test_nothing_found_is_zero_and_nobody_there_is_no_number() -> None:
    assert average_precision([frame([0], [])]).ap == 0
    assert math.isnan(average_precision([frame([], [(0, 0.9)])]).ap)
    assert math.isnan(average_precision([]).ap50)

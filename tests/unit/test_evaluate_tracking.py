from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdh_batch.errors import ConfigError
from fourdh_batch.evaluate import tracking
from fourdh_batch.evaluate.matching import Boxes, drop_hidden, match_boxes

needs_trackeval = pytest.mark.skipif(find_spec("trackeval") is None, reason=tracking.INSTALL)


def boxes(rows: Iterable[tuple[int, int, float]], *, width: float = 100) -> Boxes:
    """Boxes of (frame, track, left), 200 px high."""
    table = np.array(list(rows), dtype=np.float64).reshape(-1, 3)
    left = table[:, 2]
    zero = np.zeros_like(left)
    return Boxes(
        table[:, 0].astype(np.int64),
        table[:, 1].astype(np.int64),
        np.stack((left, zero, left + width, zero + 200), axis=1),
    )


def walk(tracks: Iterable[int], frames: int = 10, shift: float = 0) -> Boxes:
    return boxes((f, t, 300 * t + 5 * f + shift) for f in range(frames) for t in tracks)


@needs_trackeval
@given(rows=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1), data=st.randoms())
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("protocol", tracking.PROTOCOLS)
def test_perfect_tracks_score_one_whatever_their_numbers(
    protocol: str, rows: set[tuple[int, int]], data: Random
) -> None:
    truth = boxes((f, t, 300 * t) for f, t in rows)
    named = list(range(5))
    data.shuffle(named)
    same = Boxes(
        truth.frame_index, np.array([named[t] + 70 for t in truth.track_id]), truth.bbox_xyxy_px
    )
    _, overall = tracking.tracking_scores({"v": (truth, same)}, protocol)
    assert (overall.hota, overall.mota, overall.idf1) == pytest.approx((1, 1, 1))
    assert (overall.id_switches, overall.misses, overall.false_positives) == (0, 0, 0)


@needs_trackeval
def test_a_swap_of_two_people_is_two_switches() -> None:
    truth = walk([1, 2])
    swapped = boxes(
        (f, (3 - t) if f >= 5 else t, 300 * t + 5 * f) for f in range(10) for t in (1, 2)
    )
    _, overall = tracking.tracking_scores({"v": (truth, swapped)}, "iou50")
    assert (overall.id_switches, overall.mota, overall.idf1) == (2, 0.9, 0.5)


@needs_trackeval
def test_a_loose_box_matches_under_the_published_protocol_only() -> None:
    videos = {"v": (walk([1]), walk([1], shift=90))}  # IoU 1 / 19
    _, loose = tracking.tracking_scores(videos, "phalp")
    _, strict = tracking.tracking_scores(videos, "iou50")
    assert (loose.matches, loose.mota) == (10, 1.0)
    assert (strict.matches, strict.misses, strict.false_positives) == (0, 10, 10)


@needs_trackeval
def test_frames_without_annotation_count_under_iou50_only() -> None:
    videos = {"v": (walk([1], frames=3), walk([1], frames=5))}
    _, published = tracking.tracking_scores(videos, "phalp")
    _, strict = tracking.tracking_scores(videos, "iou50")
    assert (published.false_positives, published.num_predicted_boxes) == (0, 3)
    assert (strict.false_positives, strict.num_predicted_boxes) == (2, 5)


@needs_trackeval
def test_a_missing_video_is_all_misses_and_lowers_the_mean() -> None:
    videos = {
        "long": (walk([1, 2], frames=30), walk([1, 2], frames=30)),
        "gone": (walk([1]), Boxes.empty()),
    }
    scores, published = tracking.tracking_scores(videos, "phalp")
    assert (scores["gone"].misses, scores["gone"].hota) == (10, 0)
    assert published.hota == pytest.approx(0.5)  # the mean of the videos
    assert published.mota == pytest.approx(60 / 70)
    _, together = tracking.tracking_scores(videos, "iou50")
    assert together.hota == pytest.approx(np.sqrt(60 / 70))


@needs_trackeval
def test_an_identity_twice_in_a_frame_is_refused() -> None:
    twice = boxes([(4, 1, 0), (4, 1, 500)])
    with pytest.raises(ValueError, match="video v, frame 4: expected track 1 once, the prediction"):
        tracking.tracking_scores({"v": (walk([1]), twice)}, "iou50")


def test_without_trackeval_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tracking._library.cache_clear()
    monkeypatch.setitem(sys.modules, "trackeval", None)
    monkeypatch.setitem(sys.modules, "trackeval.metrics", None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps trackeval==1\.3\.0"):
        tracking.tracking_scores({"v": (walk([1]), walk([1]))}, "iou50")
    tracking._library.cache_clear()


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="phalp"):
        tracking.tracking_scores({"v": (walk([1]), walk([1]))}, "mot")
    with pytest.raises(ValueError, match="at least one video"):
        tracking.tracking_scores({}, "phalp")


def test_matching_takes_the_best_sum_and_no_pair_below_the_limit() -> None:
    truth = boxes([(0, 1, 0), (0, 2, 40), (3, 1, 0), (9, 9, 0)])
    predicted = boxes([(3, 5, 70), (0, 6, 30), (0, 7, 10)])
    there, found, iou = match_boxes(truth, predicted)
    assert sorted(zip(there.tolist(), found.tolist(), strict=True)) == [(0, 2), (1, 1)]
    assert iou == pytest.approx([90 / 110] * 2)
    assert len(match_boxes(truth, Boxes.empty())[0]) == 0
    assert len(match_boxes(Boxes.empty(), Boxes.empty())[0]) == 0
    frames = np.array([2**63 - 1, 2**63 - 2])
    last = Boxes(frames, np.array([1, 1]), np.array([[0.0, 0, 9, 9]] * 2))
    assert len(match_boxes(last, last)[0]) == 2


def test_whoever_finds_a_hidden_person_is_not_wrong() -> None:
    truth = boxes([(0, 1, 0), (0, 2, 500)])
    predicted = boxes([(0, 1, 0), (0, 2, 505), (0, 3, 900)])
    visible, counts = drop_hidden(truth, np.array([True, False]), predicted)
    assert visible.track_id.tolist() == [1]
    assert counts.tolist() == [True, False, True]

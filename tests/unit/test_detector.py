"""The door of the detectors: names, settings, filter, order and overlap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.geometry import box_iou
from fourdh_batch.models.detector import (
    DETECTORS,
    batch_bounds,
    build_detector,
    clip_boxes,
    drop_reasons,
    ordered_detections,
    suppress_overlaps,
)
from fourdh_batch.types import Detections, RleMask


def detections(*rows: tuple[float, float, float]) -> Detections:
    """Boxes of (width, height, score) in one frame."""
    box = [(10, 20, 10 + width, 20 + height) for width, height, _ in rows]
    return Detections(
        frame_row=np.zeros(len(rows), dtype=np.int64),
        bbox_xyxy_px=np.array(box, dtype=np.float32).reshape(-1, 4),
        score=np.array([score for _, _, score in rows], dtype=np.float32),
    )


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'yolo' is unknown; known are: onnx, transformers, box"):
        build_detector("yolo", path="x")


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("path", [None, ""])
def test_a_missing_path_says_what_to_pass(name: str, path: str | None) -> None:
    error = ConfigError if name == "boxes" else CheckpointError
    with pytest.raises(error, match=f"{name}' has no path; pass "):
        build_detector(name, path=path)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("onnx", CheckpointError, r"nowhere\.onnx'?: no such file; pass an \.onnx file"),
        ("boxes", ConfigError, r"nowhere\.onnx'?: no such file"),
        ("transformers", CheckpointError, r"nowhere\.onnx: no such directory; pass a directory"),
    ],
)
def test_a_missing_file_says_what_to_pass(
    name: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        build_detector(name, path=str(tmp_path / "nowhere.onnx"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"num_threads": 0}, "num_threads"),
        ({"input_size": 0}, "input_size"),
        ({"min_score": 0.5, "score_threshold": 0.4}, "min_score <= score_threshold"),
        ({"score_threshold": 1.2}, "score_threshold <= 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_detector("onnx", path="x.onnx", **settings)


def test_filter_is_strict_on_both_sides_as_in_phalp() -> None:
    found = detections(
        (50, 100, 0.81),
        (50, 100, 0.8),  # not greater
        (49.99, 100, 0.9),  # narrower
        (50, 99.99, 0.9),  # lower
        (10, 10, 0.1),  # both: the score decides first
    )
    reasons = drop_reasons(found, score_threshold=0.8, min_width_px=50, min_height_px=100)
    assert reasons.tolist() == ["", "low_score", "too_small", "too_small", "low_score"]


def test_filter_of_no_boxes_gives_no_reasons() -> None:
    reasons = drop_reasons(detections(), score_threshold=0.8, min_width_px=50, min_height_px=100)
    assert reasons.shape == (0,)


def test_order_is_by_frame_then_score_and_ties_keep_their_order() -> None:
    masks = [RleMask((4, 4), bytes([48 + i])) for i in range(5)]
    found = ordered_detections(
        np.array([1, 0, 1, 1, 0]),
        np.arange(20, dtype=np.float32).reshape(5, 4),
        np.array([0.5, 0.2, 0.9, 0.5, 0.8], dtype=np.float32),
        masks,
    )
    order = [4, 1, 2, 0, 3]
    assert found.frame_row.tolist() == [0, 0, 1, 1, 1]
    assert found.bbox_xyxy_px[:, 0].tolist() == [4 * i for i in order]
    assert found.masks == [masks[i] for i in order]
    assert found.mask_source == "detector"


def test_boxes_are_cut_at_the_frame() -> None:
    boxes = np.array([[-3, 5, 20, 50], [1, 2, 3, 4]], dtype=np.float32)
    assert clip_boxes(boxes, (10, 30)).tolist() == [[0, 5, 10, 30], [1, 2, 3, 4]]


def test_iou_of_known_boxes() -> None:
    a = np.array([[0, 0, 2, 2], [5, 5, 5, 5]], dtype=np.float32)
    b = np.array([[0, 0, 2, 2], [1, 0, 3, 2], [2, 2, 3, 3], [5, 5, 5, 5]], dtype=np.float32)
    np.testing.assert_allclose(box_iou(a, b), [[1, 1 / 3, 0, 0], [0, 0, 0, 0]], rtol=1e-6)


def test_suppression_equals_the_greedy_rule_box_by_box() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        corner = rng.uniform(0, 40, (60, 2))
        boxes = np.hstack([corner, corner + rng.uniform(5, 30, (60, 2))]).astype(np.float32)
        iou = box_iou(boxes, boxes)
        kept: list[int] = []
        for box in range(len(boxes)):
            if all(iou[better, box] <= 0.4 for better in kept):
                kept.append(box)
        assert np.flatnonzero(suppress_overlaps(boxes, 0.4)).tolist() == kept


def test_a_chain_of_overlaps_loses_every_second_box() -> None:
    left = np.arange(0, 50, 5, dtype=np.float32)
    boxes = np.stack([left, 0 * left, left + 10, 0 * left + 10], axis=1)  # neighbours: 1/3
    assert suppress_overlaps(boxes, 0.3).tolist() == [True, False] * 5


def test_batches_cover_the_rows_once() -> None:
    assert batch_bounds(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert batch_bounds(6, 3) == [(0, 3), (3, 6)]

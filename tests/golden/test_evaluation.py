"""Measures against the published evaluator, TrackEval and pycocotools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fourdh_batch.evaluate.actions import action_scores
from fourdh_batch.evaluate.datasets import ActionBoxes
from fourdh_batch.evaluate.detection import FrameBoxes, average_precision, match_frame
from fourdh_batch.evaluate.matching import Boxes
from fourdh_batch.evaluate.pose import (
    EVALUATION_KEYPOINTS,
    PELVIS_KEYPOINT,
    keypoint_error,
    mpjpe_mm,
    pa_mpjpe_mm,
    pck,
    pck_distances,
)
from fourdh_batch.geometry import xywh_to_xyxy
from tests.conftest import DATA

FOLDER = DATA / "evaluate"


@pytest.fixture(scope="module")
def people() -> Any:
    return np.load(FOLDER / "pose.npz")


def test_the_keypoints_are_the_published_ones(people: Any) -> None:
    assert people["keypoint_list"].tolist() == list(EVALUATION_KEYPOINTS)
    assert int(people["pelvis_index"]) == PELVIS_KEYPOINT


def test_errors_in_space_equal_the_published_ones(people: Any) -> None:
    predicted, truth = people["pred_keypoints_3d"], people["gt_keypoints_3d"][..., :3]
    # The reference computes in float32: errors of metres have a rounding of 1e-4 mm.
    np.testing.assert_allclose(mpjpe_mm(predicted, truth), people["mpjpe_mm"], rtol=1e-6)
    ours = pa_mpjpe_mm(predicted, truth)
    np.testing.assert_allclose(ours, people["pa_mpjpe_mm"], rtol=2e-6, atol=1e-3)
    assert ours[1] < 1e-3  # an exact similarity
    assert ours[2] > 100  # a mirror image is not unmirrored


def test_errors_in_the_picture_equal_the_published_ones(people: Any) -> None:
    predicted = people["pred_keypoints_2d"]
    truth, confidence = people["gt_keypoints_2d"][..., :2], people["gt_keypoints_2d"][..., 2]
    np.testing.assert_allclose(
        keypoint_error(predicted, truth, confidence), people["kpl2"], rtol=2e-6
    )
    crop_px = people["box_size"][:, None, None]
    longer_side_px = people["scale_wh_over_200"].max(axis=1) * 200
    distances = pck_distances(predicted * crop_px, truth * crop_px, confidence, longer_side_px)
    got = pck(distances, people["pck_thresholds"].tolist())
    expected = people["pck_per_keypoint"]
    np.testing.assert_array_equal(np.nan_to_num(got.per_keypoint, nan=-1), expected)
    np.testing.assert_allclose(got.mean, people["pck_avg"], rtol=1e-15)
    assert people["pck_count"].tolist() == [got.num_keypoints] * 2


@pytest.fixture(scope="module")
def cases() -> Any:
    with np.load(FOLDER / "tracking.npz") as file:
        return {name: file[name] for name in file.files}


def boxes_of(cases: Any, case: int, *, is_truth: bool) -> Boxes:
    rows = (cases["case"] == case) & (cases["is_truth"] == is_truth)
    return Boxes(
        cases["frame_index"][rows].astype(np.int64),
        cases["track_id"][rows].astype(np.int64),
        cases["bbox_xyxy_centipx"][rows] / 100,
    )


def test_tracking_scores_equal_those_of_trackeval(cases: Any) -> None:
    pytest.importorskip("trackeval")
    from fourdh_batch.evaluate.tracking import tracking_scores

    videos = {
        str(name): (boxes_of(cases, i, is_truth=True), boxes_of(cases, i, is_truth=False))
        for i, name in enumerate(cases["cases"])
    }
    scores, _ = tracking_scores(videos, "iou50")
    names = {
        "HOTA": "hota",
        "DetA": "det_a",
        "AssA": "ass_a",
        "MOTA": "mota",
        "IDF1": "idf1",
        "num_switches": "id_switches",
        "num_misses": "misses",
        "num_false_positives": "false_positives",
        "num_matches": "matches",
    }
    columns = {str(name): i for i, name in enumerate(cases["measures"])}
    for i, case in enumerate(cases["cases"]):
        expected = {ours: cases["expected"][i, columns[theirs]] for theirs, ours in names.items()}
        got = scores[str(case)].to_dict()
        # written with six digits
        assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-6), case


def test_average_precision_equals_that_of_cocoapi() -> None:
    file = np.load(FOLDER / "detection.npz")
    truth, found = file["truth_xywh"], file["found_xywh"]
    result = average_precision(
        match_frame(
            FrameBoxes(
                truth_xyxy=xywh_to_xyxy(truth[truth[:, 0] == frame, 1:]),
                ignored=np.zeros(int((truth[:, 0] == frame).sum()), np.bool_),
                found_xyxy=xywh_to_xyxy(found[found[:, 0] == frame, 1:5]),
                score=found[found[:, 0] == frame, 5],
            )
        )
        for frame in range(int(file["num_frames"]))
    )
    ap = file["ap_per_iou"]
    assert result.ap == pytest.approx(ap.mean(), abs=1e-12)
    assert (result.ap50, result.ap75) == pytest.approx((ap[0], ap[5]), abs=1e-12)
    assert result.recall50 == pytest.approx(file["recall_per_iou"][0], abs=1e-12)
    assert result.num_truth_boxes == len(truth)


def test_the_average_precision_of_actions_equals_the_official_one() -> None:
    file = np.load(FOLDER / "actions.npz")

    def rows(side: str, score: Any) -> ActionBoxes:
        video, second = file["videos"][file[f"{side}_video"]], file[f"{side}_second"]
        frame = [f"{v},{s:04d}" for v, s in zip(video, second, strict=True)]
        action = file[f"{side}_action"].astype(np.int64)
        box = file[f"{side}_box_milli"] / 1000
        return ActionBoxes(np.array(frame), box, action, score)

    found = rows("found", file["found_score_tenth_milli"] / 10_000)
    truth = rows("truth", np.ones(len(file["truth_action"])))
    left_out = zip(file["videos"][file["excluded_video"]], file["excluded_second"], strict=True)
    scores = action_scores(truth, found, {f"{v},{s:04d}" for v, s in left_out})
    expected = dict(zip(file["action_id"].tolist(), file["ap"].tolist(), strict=True))
    # written with nine digits
    assert {action: scores.ap[action] for action in expected} == pytest.approx(expected, abs=1e-8)
    assert scores.mean_ap == pytest.approx(float(file["mean_ap"]), abs=1e-8)
    assert action_scores(truth, found).mean_ap != pytest.approx(scores.mean_ap, abs=1e-4)

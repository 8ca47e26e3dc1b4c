"""RTMDet-nano and YOLOX-nano on real clips.

References: counts of people by eye; boxes that another implementation of the same preparation
stored for RTMDet (data/detections/real_videos.parquet); the labelled pedestrians of MOT17-04.
"""

from __future__ import annotations

import csv
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from fourdh_batch.geometry import box_iou
from fourdh_batch.models.detector import Detector, build_detector, drop_reasons
from fourdh_batch.types import F32, Detections, FrameChunk

pytestmark = pytest.mark.shared

RTMDET = "models/detector_rtmdet_nano_person.onnx"
YOLOX = "models/detector_yolox_nano_coco80.onnx"
RUNNER = "runner_1p_1088p30.mp4"
BEDROOM = "bedroom_2p_540p30.mp4"
CHAPLIN = "chaplin_2p_bw_25fps_mp3.mp4"
DOGWALK = "dogwalk_1p_720p2997_aac.mp4"
JUGGLE = "juggle_1p_720p24.mp4"
STREET = "street_crowd_5f_540p.mp4"
CROWD = "crowd_mot17_04_8f_1080p.mp4"
SIGNING = "signing_1p_yuvj_30fps.mkv"
SURE = 0.5  # what the nano models reach on people in front


def read_chunk(shared: Path, clip: str, rows: list[int]) -> FrameChunk:
    """Some frames of a clip as a chunk."""
    frames = []
    with av.open(str(shared / "videos" / "real" / clip)) as container:
        for row, frame in enumerate(container.decode(video=0)):
            if row in rows:
                frames.append(frame.to_ndarray(format="rgb24"))
            if row >= rows[-1]:
                break
    index = np.array(rows)
    return FrameChunk(clip, index, index, index / 25.0, np.stack(frames))


def load(shared: Path, weights: str, **options: int) -> Detector:
    return build_detector("onnx", path=str(shared / weights), device="cpu", **options)


@pytest.fixture(scope="module")
def rtmdet(shared: Path) -> Detector:
    return load(shared, RTMDET, batch_size=2)


@pytest.fixture(scope="module")
def yolox(shared: Path) -> Detector:
    return load(shared, YOLOX)


def sure_boxes(found: Detections, row: int, score: float = SURE) -> F32:
    return found.bbox_xyxy_px[(found.frame_row == row) & (found.score > score)]


def test_the_runner_is_found_in_every_frame(shared: Path, rtmdet: Detector) -> None:
    chunk = read_chunk(shared, RUNNER, [0, 60, 120])
    found = rtmdet.detect(chunk)
    for row in range(3):
        (box,) = sure_boxes(found, row)
        width, height = box[2:] - box[:2]
        assert 550 < height < 700
        assert 150 < width < 400
    # By eye: head at (755, 230), front foot at (730, 805) in frame 0.
    left, top, right, bottom = sure_boxes(found, 0)[0]
    assert 190 < top < 225
    assert 790 < bottom < 850
    assert left < 740 < right


def test_two_children_are_found_until_one_hides_the_other(shared: Path, rtmdet: Detector) -> None:
    found = rtmdet.detect(read_chunk(shared, BEDROOM, [0, 40]))
    first, hidden = sure_boxes(found, 0), sure_boxes(found, 1)
    assert len(first) == 2
    assert box_iou(first, first)[0, 1] < 0.1
    assert len(hidden) == 1  # one box round both


def test_boxes_equal_those_of_another_implementation(shared: Path, rtmdet: Detector) -> None:
    """Same weights, own preparation; it divides by one scale where we use one per axis."""
    table = pq.read_table(shared / "data" / "detections" / "real_videos.parquet").to_pandas()
    for clip in (RUNNER, BEDROOM, CHAPLIN):
        rows = [0, 40]
        found = rtmdet.detect(read_chunk(shared, clip, rows))
        for row, frame in enumerate(rows):
            stored = table[(table["video"] == clip) & (table["frame_index"] == frame)]
            here = found.frame_row == row
            np.testing.assert_allclose(found.score[here], stored["score"], atol=2e-4)
            boxes = np.stack(stored["bbox_xyxy_px"].tolist())
            np.testing.assert_allclose(found.bbox_xyxy_px[here], boxes, atol=1.0)


def test_given_boxes_of_that_file_equal_detection(shared: Path, rtmdet: Detector) -> None:
    path = shared / "data" / "detections" / "real_videos.parquet"
    given = build_detector("boxes", path=str(path))
    chunk = read_chunk(shared, BEDROOM, [0, 1, 2])
    a, b = given.detect(chunk), rtmdet.detect(chunk)
    assert a.frame_row.tolist() == b.frame_row.tolist()
    np.testing.assert_allclose(a.bbox_xyxy_px, b.bbox_xyxy_px, atol=0.1)


def test_street_people_are_counted(shared: Path, rtmdet: Detector) -> None:
    """About 12 people, by eye; the far ones get low scores."""
    found = rtmdet.detect(read_chunk(shared, STREET, [0, 2, 4]))
    counts = [len(sure_boxes(found, row, 0.3)) for row in range(3)]
    assert all(9 <= count <= 16 for count in counts), counts
    # Full size and near: what PHALP's size filter leaves is few.
    reasons = drop_reasons(found, score_threshold=0.4, min_width_px=50, min_height_px=100)
    assert 3 <= np.sum(reasons == "") <= 15


def test_a_larger_input_finds_more_of_a_labelled_crowd(shared: Path) -> None:
    with (shared / "videos" / "real" / "gt" / "crowd_mot17_04_8f.gt.csv").open() as file:
        truth = np.array(
            [
                [float(row[key]) for key in ("x1", "y1", "x2", "y2")]
                for row in csv.DictReader(file)
                if row["frame_index"] == "0" and row["considered"] == "1" and row["class_id"] == "1"
            ],
            dtype=np.float32,
        )
    chunk = read_chunk(shared, CROWD, [0])
    hits, precision = [], []
    for size in (416, 960):
        found = load(shared, RTMDET, batch_size=1, input_size=size).detect(chunk)
        iou = box_iou(truth, sure_boxes(found, 0, 0.3))
        hits.append(int((iou.max(axis=1) > 0.5).sum()))
        precision.append(float((iou.max(axis=0) > 0.5).mean()))
    assert len(truth) == 42
    assert hits[0] >= 14
    assert hits[1] >= 28
    assert min(precision) > 0.5


def test_a_frame_does_not_depend_on_batch_or_companions(shared: Path) -> None:
    chunk = read_chunk(shared, BEDROOM, [0, 40, 90])
    pair = load(shared, RTMDET, batch_size=2).detect(chunk)
    single = load(shared, RTMDET, batch_size=1).detect(chunk)
    np.testing.assert_array_equal(pair.frame_row, single.frame_row)
    np.testing.assert_array_equal(pair.bbox_xyxy_px, single.bbox_xyxy_px)
    np.testing.assert_array_equal(pair.score, single.score)


@pytest.mark.parametrize("clip", [RUNNER, BEDROOM, DOGWALK, JUGGLE, SIGNING])
def test_two_families_agree_on_people_in_front(
    clip: str, shared: Path, rtmdet: Detector, yolox: Detector
) -> None:
    """One box each, IoU above 0.7. Frame 60: the runner's trailing leg splits them at frame 0."""
    chunk = read_chunk(shared, clip, [60])
    a, b = sure_boxes(rtmdet.detect(chunk), 0, 0.6), sure_boxes(yolox.detect(chunk), 0, 0.6)
    assert len(a) == len(b) >= 1
    assert box_iou(a, b).max(axis=1).min() > 0.7


def test_a_dog_and_a_fireplace_are_no_people(
    shared: Path, rtmdet: Detector, yolox: Detector
) -> None:
    chunk = read_chunk(shared, "phone_vfr_rot180_aac.mp4", [0, 10])
    upright = FrameChunk(
        chunk.video_id,
        chunk.frame_index,
        chunk.pts,
        chunk.pts_s,
        np.ascontiguousarray(chunk.rgb[:, ::-1, ::-1]),
    )
    for detector in (rtmdet, yolox):
        assert not np.any(detector.detect(upright).score > 0.4)

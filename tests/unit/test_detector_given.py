"""Given boxes: every layout of files, the frame they are placed on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fourdh_batch.errors import BadBoxesError, ConfigError
from fourdh_batch.masks import decode_rle, encode_rle
from fourdh_batch.models.detector import build_detector
from fourdh_batch.models.detector_given import GivenDetector, nearest_rows
from fourdh_batch.types import Detections, FrameChunk

AVA = """\
film,0902,0.100,0.200,0.300,0.600,12,0.40
film,0902,0.100,0.200,0.300,0.600,80,0.90
film,0902,0.500,0.200,0.700,0.600,80,0.95
other,0902,0.000,0.000,1.000,1.000,80,0.50
film,0904,0.100,0.200,0.300,0.600,12,0.70
"""


def chunk(
    video_id: str,
    first: int = 0,
    count: int = 8,
    *,
    start_s: float = 0.0,
    fps: float = 10.0,
    size_wh: tuple[int, int] = (200, 100),
) -> FrameChunk:
    index = np.arange(first, first + count)
    rgb = np.zeros((count, size_wh[1], size_wh[0], 3), dtype=np.uint8)
    return FrameChunk(video_id, index, index, start_s + index / fps, rgb)


def boxes_of(found: Detections) -> list[tuple[int, list[float], float]]:
    return [
        (int(row), [round(v, 3) for v in box.tolist()], round(float(score), 3))
        for row, box, score in zip(found.frame_row, found.bbox_xyxy_px, found.score, strict=True)
    ]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


# --- AVA ---------------------------------------------------------------------------------------


def test_ava_boxes_with_several_actions_count_once_with_the_best_score(tmp_path: Path) -> None:
    detector = build_detector("boxes", path=write(tmp_path / "ava.csv", AVA))
    found = detector.detect(chunk("film", start_s=901.7))
    assert detector.name == "boxes_ava"
    assert boxes_of(found) == [
        (3, [100, 20, 140, 60], 0.95),
        (3, [20, 20, 60, 60], 0.9),
    ]
    assert found.mask_source == "box"


def test_ava_key_frames_go_to_the_nearest_time_of_presentation(tmp_path: Path) -> None:
    path = write(tmp_path / "ava.csv", AVA)
    detector = GivenDetector(path)
    # 901.96, 902.06: the first is nearer; 903.96, 904.06: again
    assert set(detector.detect(chunk("film", start_s=901.66, count=30)).frame_row) == {3, 23}
    # 901.94, 902.04: the second
    assert set(detector.detect(chunk("film", start_s=901.64, count=30)).frame_row) == {4, 24}
    # the published cuts begin at minute 15 of the film
    cut = GivenDetector(path, time_offset_s=900.0)
    assert set(cut.detect(chunk("film", count=60)).frame_row) == {20, 40}


@pytest.mark.parametrize("fps", [10.0, 24.0, 25.0, 30_000 / 1001, 30.0])
@pytest.mark.parametrize("size", [2, 7, 32])
def test_every_key_frame_is_placed_once_however_the_video_is_cut(fps: float, size: int) -> None:
    pts_s = np.arange(400) / fps
    keys = np.arange(0, pts_s[-1])
    nearest = np.abs(pts_s[None] - keys[:, None]).argmin(axis=1)
    placed = []
    for first in range(0, len(pts_s), size):
        part = pts_s[first : first + size]
        if len(part) > 1:
            row = nearest_rows(part, keys)
            placed += (row[row >= 0] + first).tolist()
    assert sorted(placed) == sorted(nearest.tolist())


def test_no_key_frame_is_lost_where_times_are_rounded_to_milliseconds() -> None:
    for offset in np.linspace(0, 0.034, 18):
        pts_s = np.round((np.arange(300) / 29.97 + offset) * 1000) / 1000
        keys = np.arange(1, 10, dtype=np.float64)
        for size in (8, 29, 30, 31):
            parts = [pts_s[first : first + size] for first in range(0, 300, size)]
            placed = [keys[nearest_rows(part, keys) >= 0] for part in parts]
            assert set(np.concatenate(placed)) == set(keys)


def test_a_chunk_of_one_frame_takes_what_is_near_it() -> None:
    rows = nearest_rows(np.array([5.0]), np.array([4.9, 4.99, 5.0, 5.01, 5.1]))
    assert rows.tolist() == [-1, 0, 0, 0, -1]


def test_ava_truth_has_person_ids_in_the_last_column_and_no_scores(tmp_path: Path) -> None:
    text = "film,0902,0.1,0.2,0.3,0.6,12,7\nfilm,0902,0.1,0.2,0.3,0.6,80,7\n"
    text += "film,0902,0.1,0.2,0.3,0.6,80,8\n"  # the same box, another person
    found = GivenDetector(write(tmp_path / "t.csv", text)).detect(chunk("film", start_s=902.0))
    assert found.score.tolist() == [1, 1]


def test_ava_without_last_column_or_action_and_with_empty_key_frames(tmp_path: Path) -> None:
    seven = "film,0902\nfilm,0902,0.1,0.2,0.3,0.6,12\n\n"
    found = GivenDetector(write(tmp_path / "a.csv", seven)).detect(chunk("film", start_s=902.0))
    assert found.score.tolist() == [1]
    no_action = "film,0902,0.1,0.2,0.3,0.6,,0.987\r\n"
    found = GivenDetector(write(tmp_path / "b.csv", no_action)).detect(chunk("film", start_s=902.0))
    np.testing.assert_allclose(found.score, [0.987], rtol=1e-6)


def test_a_fixed_score_replaces_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "ava.csv", AVA.replace("0.40", "40").replace("0.90", "90.0"))
    with pytest.raises(BadBoxesError, match=r"line 1: expected a score from 0 to 1.*got 90\.0"):
        GivenDetector(path).detect(chunk("film", start_s=902.0))
    found = build_detector("boxes", path=path, boxes_score=0.85).detect(
        chunk("film", start_s=902.0)
    )
    np.testing.assert_allclose(found.score, [0.85, 0.85])


def test_a_video_that_is_absent_has_no_boxes_and_can_be_counted(tmp_path: Path) -> None:
    detector = GivenDetector(write(tmp_path / "ava.csv", AVA))
    assert len(detector.detect(chunk("nobody"))) == 0
    known = [v for v in ("film", "nobody", "other") if detector.has_video(v)]
    assert known == ["film", "other"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("film,0902,0.1,x,0.3,0.6,12,0.5", r"line 6: expected a number in column y1, got 'x'"),
        ("film,,0.1,0.2,0.3,0.6,12,0.5", r"line 6: expected a number in column second, got ''"),
        ("film,0902,0.1,0.2,0.3", r"line 6: expected 8 columns, got 5: 'film,0902,0\.1,0\.2,0\.3'"),
        ("film,0902,10,20,30,40,12,0.5", r"line 6: expected corners from 0 to 1, got \[10"),
    ],
)
def test_a_line_of_another_layout_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "ava.csv", AVA + line + "\n")
    with pytest.raises(ConfigError, match=rf"ava\.csv, {message}"):
        GivenDetector(path, format="ava")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("film,0902,0.4,0.2,0.3,0.6,12,0.5", r"line 6: expected left <= right and top <= bottom"),
        ("film,0902,nan,0.2,0.3,0.6,12,0.5", r"line 6: expected finite corners, got \[nan"),
        ("film,0902,0.1,0.2,0.3,0.7,12,nan", r"line 6: expected a score from 0 to 1.*got nan"),
        ("film,-1,0.1,0.2,0.3,0.6,12,0.5", r"line 6: expected a frame or time .*got -1"),
    ],
)
def test_boxes_that_are_none_fail_their_video_only(line: str, message: str, tmp_path: Path) -> None:
    detector = GivenDetector(write(tmp_path / "ava.csv", AVA + line + "\n"))
    with pytest.raises(BadBoxesError, match=rf"video film: .*ava\.csv, {message}"):
        detector.detect(chunk("film", start_s=902.0))
    assert len(detector.detect(chunk("other", start_s=902.0))) == 1


# --- MOT ---------------------------------------------------------------------------------------

MOT = """\
2,-1,11,21,30,60,0.9,-1,-1,-1
1,-1,11,21,30,60,0.8,-1,-1,-1
2, -1, 1.5, 1, 10, 20, 0.95, -1, -1, -1
9,-1,1,1,10,20,0.5,-1,-1,-1
"""


@pytest.mark.parametrize("place", ["v.txt", "v/det/det.txt", "v/gt/gt.txt"])
def test_mot_frames_and_corners_count_from_one(place: str, tmp_path: Path) -> None:
    write(tmp_path / place, MOT)
    detector = build_detector("boxes", path=str(tmp_path))
    assert detector.name == "boxes_mot"
    assert boxes_of(detector.detect(chunk("v"))) == [
        (0, [10, 20, 40, 80], 0.8),
        (1, [0.5, 0, 10.5, 20], 0.95),
        (1, [10, 20, 40, 80], 0.9),
    ]
    assert boxes_of(detector.detect(chunk("v", first=8))) == [(0, [0, 0, 10, 20], 0.5)]
    assert len(detector.detect(chunk("w"))) == 0


def test_mot_by_a_path_with_the_id(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4" / "x.txt", "1,1,1,1,10,20\n")
    write(tmp_path / "sub" / "b" / "x.txt", "")
    detector = GivenDetector(f"{tmp_path}/{{video_id}}/x.txt")
    assert boxes_of(detector.detect(chunk("a.mp4"))) == [(0, [0, 0, 10, 20], 1)]
    assert detector.has_video("sub/b")
    assert len(detector.detect(chunk("sub/b"))) == 0
    assert not detector.has_video("b")


@pytest.mark.parametrize(
    "video_id",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a//b",
        ".",
        "",
        "a\\b",
        "a\nb",
        "*",
        "[ab]",
        "a\0",
    ],
)
def test_an_id_never_leaves_the_folder(video_id: str, tmp_path: Path) -> None:
    write(tmp_path / "x.txt", "1,1,1,1,10,20\n")
    write(tmp_path / "in" / "a.txt", "1,1,1,1,10,20\n")
    detector = GivenDetector(str(tmp_path / "in"), format="mot")
    with pytest.raises(BadBoxesError, match="cannot be part of a path"):
        detector.detect(chunk(video_id))


def test_one_mot_file_does_not_say_which_video_it_is_of(tmp_path: Path) -> None:
    path = write(tmp_path / "det.txt", MOT)
    with pytest.raises(
        ConfigError, match=r"does not name its video; pass its folder.*\{video_id\}"
    ):
        GivenDetector(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,1,1,1,10\n", "expected at least 6 columns"),
        ("1,1,1,1,10,20\n1,1,a,1,10,20\n", "line 2: expected a number in column left, got 'a'"),
        ("1.5,1,1,1,10,20\n", "line 1: expected a whole frame, got 1.5"),
        ("0,1,1,1,10,20\n", "line 1: expected a frame .*got -1"),
        ("1,1,1,1,-10,20\n", "line 1: expected left <= right"),
        ("1,1,1,1,10,20,3.5\n", "line 1: expected a score from 0 to 1"),
    ],
)
def test_a_bad_mot_file_fails_its_video_only(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "bad.txt", text)
    write(tmp_path / "good.txt", MOT)
    detector = GivenDetector(str(tmp_path))
    with pytest.raises(BadBoxesError, match=rf"video bad: .*bad\.txt.*{message}"):
        detector.detect(chunk("bad"))
    assert len(detector.detect(chunk("good"))) == 3


# --- PoseTrack ---------------------------------------------------------------------------------

POSETRACK = {
    "images": [
        {"id": 10003420000, "file_name": "images/val/000342_mpii/000000.jpg", "vid_id": "000342"},
        {"id": 10003420003, "file_name": "images/val/000342_mpii/000003.jpg", "vid_id": "000342"},
        {"id": 10009990001, "frame_id": 10009990001, "vid_id": "000999"},
    ],
    "annotations": [
        {"image_id": 10003420003, "bbox": [10, 20, 30, 40], "category_id": 1, "track_id": 5},
        {"image_id": 10003420000, "bbox": [1, 2, 3, 4], "score": 0.5},
        {"image_id": 10003420000, "bbox": [1, 2, 3, 4], "category_id": 2},
        {"image_id": 10009990001, "bbox": [5, 5, 5, 5]},
    ],
}


def test_posetrack_boxes_lie_on_the_frame_of_the_image_name(tmp_path: Path) -> None:
    detector = build_detector("boxes", path=write(tmp_path / "val.json", json.dumps(POSETRACK)))
    assert detector.name == "boxes_posetrack"
    assert boxes_of(detector.detect(chunk("000342_mpii"))) == [
        (0, [1, 2, 4, 6], 0.5),
        (3, [10, 20, 40, 60], 1),
    ]
    assert boxes_of(detector.detect(chunk("000999"))) == [(1, [5, 5, 10, 10], 1)]
    assert not detector.has_video("000342")


def test_posetrack_with_a_json_per_video(tmp_path: Path) -> None:
    one = {kind: entries[:2] for kind, entries in POSETRACK.items()}
    write(tmp_path / "000342.json", json.dumps(one))
    write(tmp_path / "both.json", json.dumps(POSETRACK))
    detector = GivenDetector(str(tmp_path))
    assert len(detector.detect(chunk("000342"))) == 2
    with pytest.raises(BadBoxesError, match=r"both\.json: expected one video, got \['000342_mpii'"):
        detector.detect(chunk("both"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "expected json with images"),
        (
            {"annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]},
            r"annotation 0: .*KeyError\(1\)",
        ),
        ({"annotations": [{"image_id": 10003420000}]}, r"annotation 0: .*'bbox'"),
        ({"annotations": [{"image_id": 10003420000, "bbox": [1, 2, 3]}]}, "annotation 0"),
        (
            {"annotations": [{"image_id": 10003420000, "bbox": "abcd"}]},
            "expected numbers in bbox",
        ),
        ({"annotations": ["x"]}, "annotation 0"),
    ],
)
def test_a_posetrack_file_that_is_none_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "p.json", json.dumps({**POSETRACK, **change}))
    with pytest.raises(ConfigError, match=rf"p\.json.*{message}"):
        GivenDetector(path)


def test_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected json with images"):
        GivenDetector(write(tmp_path / "p.json", "{broken"))


# --- Parquet -----------------------------------------------------------------------------------


def write_parquet(path: Path, rows: int = 4, **columns: object) -> str:
    content: dict[str, object] = {
        "video_id": ["a", "a", "b", "b"],
        "frame_index": pa.array([3, 1, 1, 2], pa.int64()),
        "bbox_xyxy_px": pa.array(
            [[0, 0, 10, 20], [1, 1, 5, 5], [2, 2, 9, 9], [-5, 3, 300, 90]],
            pa.list_(pa.float32(), 4),
        ),
        "score": pa.array([0.9, 0.2, 0.7, 0.8], pa.float32()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({k: v for k, v in (content | columns).items() if v is not None})
    pq.write_table(table.slice(0, rows), path, row_group_size=2)
    return str(path)


def test_parquet_is_read_per_video(tmp_path: Path) -> None:
    detector = build_detector("boxes", path=write_parquet(tmp_path / "boxes.parquet"))
    assert detector.name == "boxes_parquet"
    assert not detector.gives_masks
    assert boxes_of(detector.detect(chunk("a"))) == [
        (1, [1, 1, 5, 5], 0.2),
        (3, [0, 0, 10, 20], 0.9),
    ]
    assert boxes_of(detector.detect(chunk("b", first=2))) == [(0, [-5, 3, 300, 90], 0.8)]
    assert not detector.has_video("c")


def test_only_row_groups_that_can_hold_the_video_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = GivenDetector(write_parquet(tmp_path / "boxes.parquet"))
    groups: list[list[int]] = []
    read = pq.ParquetFile.read_row_groups

    def spy(self: pq.ParquetFile, row_groups: list[int], **options: object) -> pa.Table:
        groups.append(list(row_groups))
        return read(self, row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", spy)
    for first in range(0, 40, 8):
        detector.detect(chunk("b", first=first))
        detector.detect(chunk("nobody", first=first))
    assert groups == [[1]]  # the second group, once; "nobody" would sort after both


def test_a_folder_of_parts_with_masks(tmp_path: Path) -> None:
    masks = np.zeros((4, 100, 200), dtype=np.bool_)
    for row in range(4):
        masks[row, row : 10 * row + 5, 3:30] = True
    rle = [mask.counts for mask in encode_rle(masks)]
    write_parquet(tmp_path / "dataset=x" / "part-0.parquet", mask_rle=pa.array(rle, pa.binary()))
    write_parquet(
        tmp_path / "dataset=x" / "part-1.parquet",
        video_id=["a", "a", "c", "c"],
        frame_index=[5, 6, 7, 8],
        mask_rle=pa.array(rle, pa.binary()),
    )
    write_parquet(tmp_path / "_work" / "part-2.parquet", score=None)
    detector = build_detector("boxes", path=str(tmp_path))
    assert detector.gives_masks
    found = detector.detect(chunk("a"))
    assert found.frame_row.tolist() == [1, 3, 5, 6]
    assert found.masks is not None
    expected = [masks[1], masks[0], masks[0], masks[1]]
    for mask, wanted in zip(found.masks, expected, strict=True):
        np.testing.assert_array_equal(decode_rle(mask), wanted)
    empty = detector.detect(chunk("nobody"))
    assert list(empty.masks or []) == []
    assert empty.mask_source == "detector"


def test_masks_that_are_null_throughout_are_no_masks(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", mask_rle=pa.array([None] * 4, pa.binary()))
    detector = GivenDetector(path)
    assert not detector.gives_masks
    assert detector.detect(chunk("a")).masks is None


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    (rle,) = encode_rle(np.ones((1, 4, 4), dtype=np.bool_))
    path = write_parquet(tmp_path / "d.parquet", mask_rle=pa.array([rle.counts] * 4, pa.binary()))
    with pytest.raises(BadBoxesError, match=r"video a, frame 3: mask_rle .* 100 \* 200"):
        GivenDetector(path).detect(chunk("a"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"mask_rle": pa.array([None, b"<", b"<", b"<"], pa.binary())}, "no null in mask_rle"),
        ({"score": pa.array([None, 0.5, 0.5, 0.5])}, "no null in score"),
        ({"bbox_xyxy_px": [[1, 2, 3]] * 4}, r"expected 4 numbers per box, got \{3\}"),
        ({"bbox_xyxy_px": [[5.0, 2.0, 3.0, 4.0]] * 4}, "frame 3: expected left <= right"),
    ],
)
def test_bad_rows_fail_their_video(
    columns: dict[str, object], message: str, tmp_path: Path
) -> None:
    detector = GivenDetector(write_parquet(tmp_path / "d.parquet", **columns))
    with pytest.raises(BadBoxesError, match=rf"video a: .*d\.parquet.*{message}"):
        detector.detect(chunk("a"))


def test_parquet_without_the_columns_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", score=None)
    with pytest.raises(ConfigError, match=r"expected columns video_id .*got .*'bbox_xyxy_px'"):
        GivenDetector(path)


# --- formats -----------------------------------------------------------------------------------


def test_formats_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        GivenDetector(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="expected Parquet, json, or lines of an AVA csv"):
        GivenDetector(write(tmp_path / "x.csv", "frame,id,x\nhello,world,what\n"))
    with pytest.raises(ConfigError, match=r"expected \.parquet, \.txt \(MOT\) or \.json"):
        GivenDetector(str(tmp_path))
    with pytest.raises(ConfigError, match="boxes_format: expected auto or one of"):
        GivenDetector(str(tmp_path), format="coco")
    with pytest.raises(ConfigError, match="boxes_score: expected 0 to 1"):
        GivenDetector(str(tmp_path), format="mot", fixed_score=2)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match="not a Parquet file"):
        GivenDetector(str(tmp_path / "broken.parquet"))


def test_digest_follows_content_and_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "ava.csv", AVA)
    digest = GivenDetector(path).digest
    assert GivenDetector(write(tmp_path / "copy.csv", AVA)).digest == digest
    assert GivenDetector(path, time_offset_s=1).digest != digest
    assert GivenDetector(path, fixed_score=1).digest != digest
    assert GivenDetector(write(tmp_path / "new.csv", AVA[:-1] + "\n\n")).digest != digest
    write(tmp_path / "mot" / "v.txt", MOT)
    folder = GivenDetector(str(tmp_path / "mot")).digest
    write(tmp_path / "mot" / "v.txt", MOT.replace("0.9", "0.8"))
    assert GivenDetector(str(tmp_path / "mot")).digest != folder

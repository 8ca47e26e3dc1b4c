from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from fourdh_batch.cli import app
from fourdh_batch.errors import ConfigError, SchemaError, StorageError
from fourdh_batch.evaluate.report import POSE_COLUMNS, evaluate
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.storage import Store
from fourdh_batch.tables.reader import smpl_arrays
from fourdh_batch.tables.schema import with_video_ids
from tests.evaluation_files import people, write_root, write_truth

pytest.importorskip("trackeval")

runner = CliRunner()


def test_the_truth_itself_scores_perfectly(tmp_path: Path) -> None:
    root = write_root(str(tmp_path / "with space"), {"a.mp4": people("a.mp4")})
    truth = write_truth(tmp_path / "truth here.parquet", people("a.mp4", dataset="other"))
    report = evaluate(root, truth)
    pose = report.overall.pose
    assert (pose.num_people, pose.matched, pose.mpjpe_mm, pose.fps) == (16, 1, 0, 25)
    assert (pose.acceleration_mm_per_frame2, pose.pck) == (0, {"0.05": 1, "0.1": 1})
    assert pose.pa_mpjpe_mm == pytest.approx(0, abs=1e-3)
    for scores in report.overall.tracking.values():
        assert (scores.hota, scores.mota, scores.idf1) == pytest.approx((1, 1, 1))
    assert (report.overall.boxes.ap, report.boxes_of) == (1, "detections")
    assert (report.missing, report.without_truth) == ([], [])


def test_a_root_of_tables_is_a_truth_too(tmp_path: Path) -> None:
    root = write_root(str(tmp_path / "a"), {"a.mp4": people("a.mp4")})
    truth = write_root(str(tmp_path / "b"), {"a.mp4": people("a.mp4")})
    assert evaluate(root, truth).overall.pose.mpjpe_mm == 0


def test_errors_have_their_exact_size(tmp_path: Path) -> None:
    true = people("a.mp4")
    points = np.stack(true["keypoints_3d_m"].to_numpy()).reshape(-1, 44, 3)
    pixels = np.stack(true["keypoints_2d_px"].to_numpy()).reshape(-1, 44, 2)
    moved = points.copy()
    moved[:, 25, 1] += 0.07  # one of fourteen
    moved[2 * 4, 26, 0] += 0.014  # person 1 in frame 4
    root = write_root(
        str(tmp_path / "root"),
        {
            "a.mp4": people(
                "a.mp4", keypoints_3d_m=moved, keypoints_2d_px=pixels + np.array([0, 15])
            )
        },
    )
    pose = evaluate(root, write_truth(tmp_path / "t.parquet", true)).overall.pose
    assert pose.mpjpe_mm == pytest.approx(5 + 1 / 16, rel=1e-5)
    # triples with frame 4: 1, 2 and 1 mm, of six triples of each of two people
    assert pose.acceleration_mm_per_frame2 == pytest.approx(4 / 12, rel=1e-4)
    assert pose.pck == {"0.05": 0, "0.1": 1}  # 15 of 200 px


def test_the_frame_rate_is_the_one_of_the_video(tmp_path: Path) -> None:
    times_s = np.round(np.repeat(np.arange(8), 2) / 30, 3)  # of a container that counts in ms
    rows = people("a.mkv", pts_s=times_s)
    root = write_root(str(tmp_path / "root"), {"a.mkv": rows}, fps=89 / 2.967)
    assert evaluate(root, write_truth(tmp_path / "t.parquet", rows)).overall.pose.fps == 30


def test_acceleration_is_that_of_the_body_about_its_pelvis(tmp_path: Path) -> None:
    true = people("a.mp4")
    points = np.stack(true["keypoints_3d_m"].to_numpy()).reshape(-1, 44, 3)
    shaken = points + np.random.default_rng(0).normal(size=(16, 1, 3)).astype(np.float32)
    for found, other in ((shaken, points), (points, shaken)):
        root = write_root(
            str(tmp_path / str(len(list(tmp_path.iterdir())))),
            {"a.mp4": people("a.mp4", keypoints_3d_m=found)},
        )
        truth = write_truth(tmp_path / "t.parquet", people("a.mp4", keypoints_3d_m=other))
        error = evaluate(root, truth).overall.pose.acceleration_mm_per_frame2
        assert error == pytest.approx(0, abs=1e-2)


def test_no_acceleration_is_taken_across_a_cut_or_a_gap(tmp_path: Path) -> None:
    points = np.random.default_rng(1).normal(size=(16, 44, 3)).astype(np.float32)
    root = write_root(str(tmp_path / "root"), {"a.mp4": people("a.mp4", keypoints_3d_m=points)})

    def error(true: Any) -> float:
        report = evaluate(root, write_truth(tmp_path / "t.parquet", true))
        return report.overall.pose.acceleration_mm_per_frame2 or 0.0

    still = np.zeros_like(points)
    whole = people("a.mp4", keypoints_3d_m=still)
    halves = [whole.slice(0, 8), whole.slice(8, 8)]  # frames 0 to 3, 4 to 7
    shot = (np.arange(16) // 8).astype(np.int64)
    cut = people("a.mp4", keypoints_3d_m=still, shot_id=shot)
    assert error(cut) != pytest.approx(error(whole))
    assert error(cut) == pytest.approx((error(halves[0]) + error(halves[1])) / 2)


def test_nothing_is_cut_off_in_a_narrow_terminal_and_left_out_videos_are_named(
    tmp_path: Path,
) -> None:
    long = "00012-crowd-cut-long_occlusion-motion_blur-reentry.mp4"
    root = write_root(str(tmp_path / "root"), {long: people(long), "extra.mp4": None})
    truth = write_truth(tmp_path / "t.parquet", people(long), people("gone.mp4"))
    result = runner.invoke(app, ["evaluate", root, truth], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "…" not in result.output
    assert "missing: gone.mp4" in result.output
    assert "not scored: extra.mp4" in result.output


def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path: Path) -> None:
    name = "walk [/x] [final] :dog:.mp4"
    root = write_root(str(tmp_path / "[bold] root"), {name: people(name)})
    truth = write_truth(tmp_path / "t.parquet", people(name))
    result = runner.invoke(app, ["evaluate", root, truth], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.exception
    assert name in result.output
    assert "[bold] root" in result.output


def test_a_missing_or_failed_video_is_all_misses_and_named(tmp_path: Path) -> None:
    root = write_root(
        str(tmp_path / "root"),
        {"a.mp4": people("a.mp4"), "bad.mp4": None, "extra.mp4": None},
        statuses={"bad.mp4": "failed"},
    )
    names = ("a.mp4", "bad.mp4", "gone.mp4", "none.mp4")
    truth = write_truth(tmp_path / "t.parquet", *map(people, names))
    report = evaluate(root, truth)
    assert report.missing == ["bad.mp4", "gone.mp4", "none.mp4"]
    assert report.without_truth == ["extra.mp4"]
    strict = report.overall.tracking["iou50"]
    assert (strict.misses, strict.mota) == (48, 0.25)
    assert report.overall.tracking["phalp"].hota == pytest.approx(0.25)
    assert (report.overall.pose.matched, report.overall.pose.num_people) == (0.25, 16)
    assert report.overall.boxes.recall50 == 0.25


def test_a_video_that_lost_frames_is_scored_with_those_it_has(tmp_path: Path) -> None:
    half = people("a.mp4").slice(0, 8)
    root = write_root(str(tmp_path / "root"), {"a.mp4": half}, statuses={"a.mp4": "partial"})
    report = evaluate(root, write_truth(tmp_path / "t.parquet", people("a.mp4")))
    assert (report.status, report.overall.pose.matched) == ({"a.mp4": "ok"}, 0.5)
    assert report.overall.tracking["iou50"].misses == 8


def test_a_run_that_found_nobody_is_a_result(tmp_path: Path) -> None:
    root = write_root(str(tmp_path / "root"), {"a.mp4": None})
    report = evaluate(root, write_truth(tmp_path / "t.parquet", people("a.mp4")))
    assert (report.status, report.overall.pose.matched) == ({"a.mp4": "ok"}, 0)
    assert report.overall.tracking["iou50"].misses == 16
    assert (report.overall.boxes.ap, report.overall.pose.mpjpe_mm) == (0, None)


def test_what_is_found_where_nobody_is_is_wrong(tmp_path: Path) -> None:
    root = write_root(
        str(tmp_path / "root"),
        {"a.mp4": people("a.mp4"), "a-empty.mp4": people("a-empty.mp4"), "still.mp4": None},
    )
    rows = with_video_ids(people("a.mp4"), ["a.mp4", "a-empty.mp4", "still.mp4"])
    report = evaluate(root, write_truth(tmp_path / "t.parquet", rows))
    assert (list(report.per_video), report.without_truth) == (
        ["a-empty.mp4", "a.mp4", "still.mp4"],
        [],
    )
    strict, phalp = (report.overall.tracking[name] for name in ("iou50", "phalp"))
    assert (strict.matches, strict.misses, strict.false_positives, strict.mota) == (16, 0, 16, 0)
    assert strict.idf1 == pytest.approx(2 / 3)
    assert strict.hota == pytest.approx(0.5**0.5)
    assert (phalp.false_positives, phalp.hota, phalp.mota) == (0, 1, 1)  # annotated frames only
    assert report.per_video["a-empty.mp4"].tracking["iou50"].false_positives == 16
    assert report.overall.boxes.ap < 1
    assert report.overall.pose.matched == 1
    nobody = write_truth(tmp_path / "n.parquet", with_video_ids(rows.slice(0, 0), ["a-empty.mp4"]))
    strict = evaluate(root, nobody).overall.tracking["iou50"]
    assert (strict.matches, strict.misses, strict.false_positives) == (0, 0, 16)
    told = pq.read_table(tmp_path / "t.parquet").replace_schema_metadata({"video_ids": "{}"})
    pq.write_table(told, tmp_path / "t.parquet")
    with pytest.raises(SchemaError, match="video_ids: expected a list of ids"):
        evaluate(root, str(tmp_path / "t.parquet"))


def test_ghosts_count_neither_as_tracks_nor_as_bodies_but_are_scored_apart(tmp_path: Path) -> None:
    state = np.where(np.arange(16) % 2 == 0, "detected", "predicted").tolist()
    score = np.where(np.arange(16) % 2 == 0, 0.9, np.nan).astype(np.float32)
    root = write_root(str(tmp_path / "root"), {"a.mp4": people("a.mp4", state=state, score=score)})
    report = evaluate(root, write_truth(tmp_path / "t.parquet", people("a.mp4")))
    assert (report.overall.pose.num_people, report.overall.pose.matched) == (8, 0.5)
    assert report.overall.completed.num_people == 8
    assert report.overall.completed.mpjpe_mm == 0
    assert report.overall.tracking["iou50"].misses == 8


def test_a_person_is_as_large_as_the_true_box_says(tmp_path: Path) -> None:
    true = people("a.mp4")
    box = smpl_arrays(true)["bbox_xyxy_px"]
    pixels = smpl_arrays(true)["keypoints_2d_px"] + np.array([0, 10.5])  # 0.0525 of 200 px
    rows = people("a.mp4", bbox_xyxy_px=box + np.float32([0, 0, 0, 40]), keypoints_2d_px=pixels)
    root = write_root(str(tmp_path / "root"), {"a.mp4": rows})
    pose = evaluate(root, write_truth(tmp_path / "t.parquet", true)).overall.pose
    assert (pose.matched, pose.pck) == (1, {"0.05": 0, "0.1": 1})


def test_pck_is_a_share_of_all_keypoints_of_all_videos(tmp_path: Path) -> None:
    true = {"a.mp4": people("a.mp4"), "b.mp4": people("b.mp4").slice(0, 4)}
    pixels = smpl_arrays(true["a.mp4"])["keypoints_2d_px"].copy()
    pixels[:, :11, 1] += 15  # 0.075 of 200 px, a quarter of the keypoints
    rows = people("a.mp4", keypoints_2d_px=pixels)
    root = write_root(str(tmp_path / "root"), {"a.mp4": rows, "b.mp4": true["b.mp4"]})
    report = evaluate(root, write_truth(tmp_path / "t.parquet", *true.values()))
    assert report.per_video["a.mp4"].pose.pck == {"0.05": 0.75, "0.1": 1}
    assert report.overall.pose.pck == {"0.05": pytest.approx(0.8), "0.1": 1}  # of 20 rows


def test_completed_bodies_are_compared_with_people_whom_nobody_can_see(tmp_path: Path) -> None:
    state = np.where(np.arange(16) % 8 < 6, "detected", "predicted").tolist()
    rows = people("a.mp4", state=state)
    root = write_root(str(tmp_path / "root"), {"a.mp4": rows})
    overall = evaluate(root, write_truth(tmp_path / "t.parquet", rows)).overall
    assert (overall.completed.num_people, overall.completed.mpjpe_mm) == (4, 0)
    assert (overall.pose.num_people, overall.pose.matched) == (12, 1)


def test_people_whom_nobody_can_see_need_not_be_found(tmp_path: Path) -> None:
    hidden = np.where(np.arange(16) % 2 == 0, "detected", "predicted").tolist()
    truth = write_truth(tmp_path / "t.parquet", people("a.mp4", state=hidden))
    both = write_root(str(tmp_path / "both"), {"a.mp4": people("a.mp4")})
    one = people("a.mp4").filter(pa.array(np.arange(16) % 2 == 0))
    single = write_root(str(tmp_path / "single"), {"a.mp4": one})
    for root in (both, single):
        report = evaluate(root, truth)
        strict = report.overall.tracking["iou50"]
        assert (strict.mota, strict.false_positives, strict.misses) == (1, 0, 0)
        assert (report.overall.pose.matched, report.overall.boxes.ap) == (1, 1)


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


def smpl_posed(body: SmplBody, global_orient: torch.Tensor) -> torch.Tensor:
    """(V, 3) of the straight body, from keypoint 39."""
    straight = torch.eye(3).expand(1, 23, 3, 3)
    with torch.inference_mode():
        out = body(global_orient[None, None], straight, torch.zeros(1, 10))
    return out.vertices[0] - out.keypoints_3d[0, 39]


def test_pve_needs_the_body_that_both_were_made_with(tmp_path: Path, body: SmplBody) -> None:
    name = f"open:{body.digest[:16]}"
    turned = np.broadcast_to(np.diag([-1, 1, -1]).astype(np.float32), (16, 1, 3, 3))
    true = people("a.mp4", body_model=name)
    truth = write_truth(tmp_path / "t.parquet", true)
    same = write_root(str(tmp_path / "same"), {"a.mp4": true})
    assert evaluate(same, truth, body=body).overall.pose.pve_mm == 0
    other = people("a.mp4", body_model=name, global_orient=turned)
    away = write_root(str(tmp_path / "away"), {"a.mp4": other})
    found = evaluate(away, truth, body=body).overall.pose.pve_mm
    points = [
        smpl_posed(body, torch.from_numpy(np.diag([sign, 1.0, sign]).astype(np.float32)))
        for sign in (1, -1)
    ]
    expected = 1000 * (points[0] - points[1]).norm(dim=1).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)
    strange = write_root(str(tmp_path / "strange"), {"a.mp4": people("a.mp4")})
    report = evaluate(strange, truth, body=body)
    assert report.overall.pose.pve_mm is None
    assert any("PVE: not scored" in note and "open:?" in note for note in report.notes)
    assert evaluate(same, truth).overall.pose.pve_mm is None


def test_a_truth_of_boxes_scores_boxes_and_tracks(tmp_path: Path) -> None:
    root = write_root(str(tmp_path / "root"), {"a.mp4": people("a.mp4")})
    table = people("a.mp4").select(["video_id", "frame_index", "track_id", "bbox_xyxy_px"])
    report = evaluate(root, write_truth(tmp_path / "t.parquet", table))
    assert report.overall.tracking["iou50"].mota == 1
    assert (report.overall.pose.num_people, report.overall.pose.mpjpe_mm) == (16, None)
    assert any(note.startswith("bodies: not scored") for note in report.notes)


def test_a_truth_may_be_written_by_pandas(tmp_path: Path) -> None:
    root = write_root(str(tmp_path / "root"), {"a.mp4": people("a.mp4")})
    columns = ["video_id", "frame_index", "track_id", "bbox_xyxy_px", *POSE_COLUMNS]
    frame = people("a.mp4").select(columns).to_pandas()
    for name in ("bbox_xyxy_px", *POSE_COLUMNS):
        frame[name] = frame[name].map(lambda values: values.astype(float).tolist())
    frame.to_parquet(tmp_path / "t.parquet")  # lists of doubles, of any length
    pose = evaluate(root, str(tmp_path / "t.parquet")).overall.pose
    assert (pose.num_people, pose.mpjpe_mm) == (16, 0)
    frame["bbox_xyxy_px"] = frame["bbox_xyxy_px"].map(lambda box: box[:3])
    frame.to_parquet(tmp_path / "short.parquet")
    with pytest.raises(SchemaError, match=r"tracks\.bbox_xyxy_px: expected lists of 4"):
        evaluate(root, str(tmp_path / "short.parquet"))


def test_a_truth_of_other_types_is_refused_unless_they_mean_the_same(tmp_path: Path) -> None:
    root = write_root(str(tmp_path / "root"), {"a.mp4": people("a.mp4")})
    true = people("a.mp4")

    def score(name: str, values: Any) -> Any:
        table = true.set_column(true.column_names.index(name), name, values)
        return evaluate(root, write_truth(tmp_path / "t.parquet", table)).overall.pose.matched

    assert score("video_id", true["video_id"].combine_chunks().dictionary_encode()) == 1
    assert score("state", true["state"].cast(pa.large_string())) == 1
    assert score("frame_index", true["frame_index"].cast(pa.int32())) == 1
    points = np.stack(true["keypoints_3d_m"].to_numpy())
    points[3, 7] = np.nan
    for name, values, said in (
        ("track_id", true["track_id"].cast(pa.string()), "expected int64, got string"),
        ("track_id", pa.array([2**64 - 1] * 16, pa.uint64()), "expected int64, got"),
        ("frame_index", true["frame_index"].cast(pa.float64()), "expected int64, got double"),
        ("video_id", pa.array([1] * 16), "expected string, got int64"),
        ("keypoints_3d_m", pa.array(points.tolist()), "expected finite numbers"),
    ):
        with pytest.raises(SchemaError, match=f"{name}: {said}"):
            score(name, values)
    twice = true.append_column("state", true["state"])
    with pytest.raises(SchemaError, match="state: expected one such column"):
        evaluate(root, write_truth(tmp_path / "t.parquet", twice))


def test_a_truth_is_read_for_some_videos_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["c.mp4", "a.mp4", "b.mp4"]
    root = write_root(str(tmp_path / "root"), {name: people(name) for name in names})
    table = pa.concat_tables([people(name) for name in names])
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    pq.write_table(shuffled, tmp_path / "mixed.parquet", row_group_size=7)
    pq.write_table(table, tmp_path / "apart.parquet", row_group_size=16)
    whole = evaluate(root, str(tmp_path / "apart.parquet")).to_dict()

    groups: list[list[int]] = []
    read = pq.ParquetFile.read_row_groups

    def spy(file: Any, which: list[int], columns: Any = None, **words: Any) -> Any:
        if columns != ["video_id"]:
            groups.append(which)
        return read(file, which, columns=columns, **words)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", spy)
    monkeypatch.setattr("fourdh_batch.evaluate.report.VIDEOS_AT_ONCE", 1)
    report = evaluate(root, str(tmp_path / "apart.parquet")).to_dict()
    assert report == whole
    assert groups == [[1], [2], [0]]
    groups.clear()
    pq.write_table(table, tmp_path / "large.parquet", row_group_size=32)  # two videos, and one
    large = evaluate(root, str(tmp_path / "large.parquet")).to_dict()
    assert {**large, "truth": ""} == {**whole, "truth": ""}
    assert groups == [[0], [1], [0]]
    groups.clear()
    pq.write_table(table, tmp_path / "one.parquet")
    one = evaluate(root, str(tmp_path / "one.parquet")).to_dict()
    assert {**one, "truth": ""} == {**whole, "truth": ""}
    assert groups == [[0]]  # not once for every few videos
    mixed = evaluate(root, str(tmp_path / "mixed.parquet")).to_dict()
    assert {**mixed, "truth": ""} == {**whole, "truth": ""}


def test_a_root_as_truth_tells_of_empty_videos_and_has_each_video_once(tmp_path: Path) -> None:
    empty = people("b.mp4").slice(0, 0)
    found = {name: people(name) for name in ("a.mp4", "b.mp4")}
    root = write_root(str(tmp_path / "root"), found)
    truth = write_root(str(tmp_path / "truth"), {"a.mp4": people("a.mp4"), "b.mp4": empty})
    report = evaluate(root, truth)
    assert report.per_video["a.mp4"].tracking["iou50"].mota == 1
    assert report.overall.tracking["iou50"].false_positives == 16
    assert report.without_truth == []
    write_root(truth, {"a.mp4": people("a.mp4", dataset="other")}, dataset="other")
    with pytest.raises(ConfigError, match="one truth of a video, got several datasets: ava, o"):
        evaluate(root, truth)


def test_a_root_as_truth_says_nothing_of_videos_that_it_failed_on(tmp_path: Path) -> None:
    names = ("a.mp4", "b.mp4", "c.mp4")
    root = write_root(str(tmp_path / "root"), {name: people(name) for name in names})
    truth = write_root(
        str(tmp_path / "truth"),
        {"a.mp4": people("a.mp4"), "b.mp4": people("b.mp4").slice(0, 2), "c.mp4": None},
        statuses={"b.mp4": "partial", "c.mp4": "failed"},
    )
    report = evaluate(root, truth)
    assert report.status == {"a.mp4": "ok", "b.mp4": "ok"}
    assert report.without_truth == ["c.mp4"]
    assert report.overall.tracking["iou50"].false_positives == 14


def test_a_store_that_fails_is_no_damaged_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_root(str(tmp_path / "root"), {"a.mp4": people("a.mp4")})
    truth = write_truth(tmp_path / "t.parquet", people("a.mp4"))
    for fault in (StorageError("the store is away"), OSError(5, "Input/output error")):
        monkeypatch.setattr(pq.ParquetFile, "read_row_groups", Mock(side_effect=fault))
        with pytest.raises(type(fault), match=r"store is away|output error"):
            evaluate(root, truth)


def test_mistakes_are_said_clearly(tmp_path: Path) -> None:
    root = write_root(str(tmp_path / "root"), {"a.mp4": people("a.mp4")})
    true = people("a.mp4")
    with pytest.raises(ConfigError, match=r"no common video: .* has a.mp4 done, .* has b.mp4"):
        evaluate(root, write_truth(tmp_path / "b.parquet", people("b.mp4")))
    with pytest.raises(SchemaError, match="missing track_id"):
        evaluate(root, write_truth(tmp_path / "c.parquet", true, drop=("track_id",)))
    twice = pa.concat_tables([true, true.slice(3, 1)])
    with pytest.raises(SchemaError, match=r"video a.mp4, frame 1: expected track 2 once"):
        evaluate(root, write_truth(tmp_path / "g.parquet", twice))
    flat = people("a.mp4", bbox_xyxy_px=np.tile(np.float32([1, 2, 1, 9]), (16, 1)))
    with pytest.raises(SchemaError, match=r"video a.mp4, frame 0: expected a box with an extent"):
        evaluate(root, write_truth(tmp_path / "h.parquet", flat))
    state = ["detected", "hidden"] * 8
    hidden = true.set_column(true.column_names.index("state"), "state", pa.array(state))
    with pytest.raises(SchemaError, match="state: expected detected or predicted, got 'hidden'"):
        evaluate(root, write_truth(tmp_path / "i.parquet", hidden))
    with pytest.raises(ConfigError, match="rows of true people, got none"):
        evaluate(root, write_truth(tmp_path / "d.parquet", true.slice(0, 0)))
    damaged = Path(write_truth(tmp_path / "damaged.parquet", true))
    start = pq.ParquetFile(damaged).metadata.row_group(0).column(0).dictionary_page_offset
    content = bytearray(damaged.read_bytes())
    content[start : start + 200] = bytes(200)
    damaged.write_bytes(content)
    with pytest.raises(SchemaError, match=r"damaged\.parquet: expected Parquet, got"):
        evaluate(root, str(damaged))
    (tmp_path / "e.parquet").write_text("no parquet")
    with pytest.raises(SchemaError, match=r"e\.parquet: expected Parquet"):
        evaluate(root, str(tmp_path / "e.parquet"))
    with pytest.raises(FileNotFoundError):
        evaluate(str(tmp_path / "nowhere"), write_truth(tmp_path / "f.parquet", true))


def test_addresses_go_through_the_storage_door(tmp_path: Path) -> None:
    root = write_root("memory://evaluate/root", {"a.mp4": people("a.mp4")})
    Store("memory://evaluate").put_file(
        Path(write_truth(tmp_path / "t.parquet", people("a.mp4"))), "t.parquet"
    )
    result = runner.invoke(
        app,
        ["evaluate", root, "memory://evaluate/t.parquet", "--to", "memory://evaluate/out.json"],
    )
    assert result.exit_code == 0, result.output
    written = json.loads(Store("memory://evaluate").read_bytes("out.json"))
    assert written["overall"]["tracking"]["iou50"]["mota"] == 1


def test_the_command_prints_and_writes_the_same_numbers(tmp_path: Path) -> None:
    root = write_root(str(tmp_path / "root"), {"a.mp4": people("a.mp4")})
    truth = write_truth(tmp_path / "t.parquet", people("a.mp4"), people("gone.mp4"))
    result = runner.invoke(app, ["evaluate", root, truth, "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["missing"] == ["gone.mp4"]
    assert said["overall"]["tracking"].keys() == {"phalp", "iou50"}
    assert said["per_video"][1]["pose"]["mpjpe_mm"] is None
    for name in ("out.json", "out.parquet"):
        words = ["evaluate", root, truth, "--to", str(tmp_path / name), "--gate", "iou50"]
        result = runner.invoke(app, words)
        assert result.exit_code == 0, result.output
        assert "missing: gone.mp4" in result.output
        assert "MOTA 0.500" in " ".join(result.output.split())
    assert json.loads((tmp_path / "out.json").read_text())["overall"]["tracking"].keys() == {
        "iou50"
    }
    rows = pq.read_table(tmp_path / "out.parquet").to_pandas()
    assert rows["video_id"].tolist() == ["a.mp4", "gone.mp4"]
    assert rows["tracking.iou50.mota"].tolist() == [1, 0]
    assert math.isnan(rows["pose.mpjpe_mm"][1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gate", "mot"], "phalp or iou50"),
        (["--to", "out.txt"], "ends in .json or .parquet"),
        (["--body", "/nowhere.npz"], "/nowhere.npz"),
    ],
)
def test_wrong_options_of_the_command_are_usage(words: list[str], said: str) -> None:
    result = runner.invoke(app, ["evaluate", "x", "y.parquet", *words])
    assert result.exit_code == 2
    assert said in result.output

"""The accuracy benchmark replaces nothing but its own, its ablations differ by the cue alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fourdh_batch.config import load_config
from fourdh_batch.evaluate.pose import mpjpe_mm, pa_mpjpe_mm
from fourdh_batch.geometry import box_iou, rot6d_to_rotmat
from fourdh_batch.masks import box_mask, decode_rle, encode_rle
from fourdh_batch.models.build import load_hmr2
from fourdh_batch.models.minis import MINI
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.pipeline.following import TrackerModels
from fourdh_batch.pipeline.records import ChunkResult
from fourdh_batch.synthetic.corpus import BOXES, Clip
from fourdh_batch.tables.reader import smpl_arrays
from fourdh_batch.types import F64, Bool, Detections, People, RleMask
from tests.benchmark import __main__ as benchmarks
from tests.benchmark.accuracy import (
    MARKER,
    MEAN_OF_THESE,
    MEAN_OF_TRAINING,
    _Set,
    require_ours,
    run,
)
from tests.benchmark.accuracy_input import write_perturbed_boxes
from tests.benchmark.accuracy_trackers import SORT_MAX_AGE, OneCueLessModels, track_by_overlap
from tests.evaluation_files import people, write_root

SIZE_HW = (120, 160)
NUM_FRAMES = 60
NUM_HIDDEN = 20  # first frames, in which little of a person is seen


def test_options_are_told_and_others_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        raise AssertionError(f"{name} was run")

    monkeypatch.setattr(benchmarks, "import_module", fail)
    assert benchmarks.main(["decode", "--help"]) == 0
    assert "python -m tests.benchmark" in capsys.readouterr().out
    assert benchmarks.main(["decode", "--jsn"]) == 2
    assert "unknown: --jsn" in capsys.readouterr().err


def test_motion_capture_survives_an_output_beside_it(tmp_path: Path) -> None:
    walk = tmp_path / "mocap" / "walk.npz"
    walk.parent.mkdir()
    walk.touch()
    with pytest.raises(ValueError, match=f"motion={walk.parent}.*{tmp_path / 'mocap'}"):
        run([f"motion={walk.parent}", f"output={tmp_path}"])
    with pytest.raises(ValueError, match=f"motion={tmp_path}"):
        run([f"motion={tmp_path}", f"output={tmp_path / 'inside'}"])
    with pytest.raises(ValueError, match=r"mocap.*expected an empty folder.*motion=/elsewhere"):
        run(["motion=/elsewhere", f"output={tmp_path}"])
    assert walk.exists()


def test_an_earlier_run_may_be_replaced(tmp_path: Path) -> None:
    require_ours(tmp_path / "not_there", "")
    require_ours(tmp_path, "")
    (tmp_path / "tables").mkdir()
    with pytest.raises(ValueError, match="expected an empty folder"):
        require_ours(tmp_path, "")
    (tmp_path / MARKER).touch()
    require_ours(tmp_path, "")


def test_a_word_without_a_value_is_named() -> None:
    with pytest.raises(ValueError, match="expected key=value words, got foo"):
        run(["foo"])


def test_an_ablation_has_the_settings_of_the_job() -> None:
    config = load_config(None, ["tracker.compat=true", "tracker.max_age=9", "tracker.gate=7"])
    ours = TrackerModels(config).new_tracker().settings
    assert ours.compat
    assert OneCueLessModels(config).new_tracker().settings == ours


def test_poses_of_missed_frames_are_compared_with_their_baselines(tmp_path: Path) -> None:
    true = people("a.mp4")  # two people who stand, in eight frames
    frame, track = (true[name].to_numpy() for name in ("frame_index", "track_id"))
    missed = (track == 1) & np.isin(frame, (3, 4))
    points = smpl_arrays(true)["keypoints_3d_m"]
    told = points.copy()
    told[missed, 25, 0] += 0.014  # one of fourteen: completed 1 mm wrong
    told[(track == 1) & (frame == 2), 25, 0] += 0.07  # the last pose: 5 mm
    state = np.where(missed, "predicted", "detected").tolist()
    rows = people("a.mp4", keypoints_3d_m=told, state=state)
    measured = bare_set(tmp_path, rows, true)
    table = measured._gaps()
    assert table[["frames", "rows"]].to_numpy().tolist() == [["to 5", 2]]
    assert table[["completed", "hold"]].to_numpy().tolist() == [
        [pytest.approx(1, rel=1e-4), pytest.approx(5, rel=1e-4)]
    ]
    # With equal turns and shapes on both sides: the upright body.
    upright = np.repeat(keypoints_of(measured.body, np.zeros(10)), 2, axis=0)
    expected = mpjpe_mm(upright, points[missed]).mean()
    assert table["slerp"].to_list() == [pytest.approx(expected, rel=1e-4)]


def test_the_bars_are_the_mean_of_the_training_and_of_these_people(tmp_path: Path) -> None:
    betas = np.zeros((16, 10), np.float32)
    betas[::2, 0], betas[1::2, 0] = 1, 2
    state = ["detected"] * 14 + ["predicted"] * 2  # who cannot be seen has no part in it
    betas[14:] = 100
    true = people("a.mp4", betas=betas, state=state)
    measured = bare_set(tmp_path, true, true)
    found = measured._mean_body_mm()
    points = smpl_arrays(true)["keypoints_3d_m"][:14]

    def error(body: np.ndarray) -> float:
        return float(pa_mpjpe_mm(np.repeat(body, 14, axis=0), points).mean())

    mean = keypoints_of(measured.body, np.array([1.5, *9 * [0.0]]))
    head = load_hmr2(MINI, measured.body, device="cpu").smpl_head
    pose = rot6d_to_rotmat(head.init_body_pose.view(-1, 6))[None, 1:]
    with torch.inference_mode():
        trained = measured.body.keypoints_3d(torch.eye(3)[None, None], pose, head.init_betas)
    assert found == {
        MEAN_OF_THESE: pytest.approx(error(mean), rel=1e-5),
        MEAN_OF_TRAINING: pytest.approx(error(trained.numpy()), rel=1e-5),
    }


def bare_set(folder: Path, rows: Any, truth: Any) -> _Set:
    """A set of one clip that was run before."""
    bare = object.__new__(_Set)
    bare.body, bare.truth = load_body(), truth
    bare.clips = [SimpleNamespace(video_id="a.mp4")]  # type: ignore[list-item]
    root = write_root(str(folder / "tables"), {"a.mp4": rows})
    bare.config = load_config(None, [f"output={root}", "hmr.weights=mini"])
    return bare


def keypoints_of(body: SmplBody, betas: np.ndarray) -> np.ndarray:
    """(1, 44, 3) of nobody's pose."""
    straight = torch.eye(3).expand(1, 24, 3, 3)
    with torch.inference_mode():
        shape = torch.from_numpy(betas).float()[None]
        points: np.ndarray = body.keypoints_3d(straight[:, :1], straight[:, 1:], shape).numpy()
    return points


def chunk(start: int, boxes: list[list[list[float]]]) -> ChunkResult:
    """Frames from `start` on with such boxes; those of no width were dropped."""
    bbox = np.array([box for frame in boxes for box in frame], np.float32).reshape(-1, 4)
    kept = bbox[:, 2] > bbox[:, 0]
    m = int(kept.sum())
    frame_index = np.arange(start, start + len(boxes))
    return ChunkResult(
        video_id="v",
        frame_index=frame_index,
        pts_s=frame_index / 25,
        shot_scores=None,
        image_size_wh=(640, 480),
        detections=Detections(
            np.repeat(np.arange(len(boxes)), [len(frame) for frame in boxes]),
            bbox,
            np.ones(len(bbox), np.float32),
        ),
        drop_reason=np.where(kept, "", "too_small"),
        people=People(
            global_orient=np.zeros((m, 1, 3, 3), np.float32),
            body_pose=np.zeros((m, 23, 3, 3), np.float32),
            betas=np.zeros((m, 10), np.float32),
            pred_cam=np.zeros((m, 3), np.float32),
            box_center_px=np.zeros((m, 2), np.float32),
            box_size_px=np.zeros(m, np.float32),
            keypoints_3d_m=np.zeros((m, 44, 3), np.float32),
        ),
    )


def walk(frame: int) -> list[float]:
    return [100.0 + frame, 50, 140 + frame, 150]


def stand(frame: int) -> list[float]:
    return [400.0, 60, 440, 160]


@pytest.mark.parametrize(
    ("unseen", "max_age", "is_lost"),
    [(1, SORT_MAX_AGE, False), (2, SORT_MAX_AGE, True), (9, 9, False), (10, 9, True)],
)
def test_overlap_alone_remembers_as_long_as_it_is_told(
    unseen: int, max_age: int, is_lost: bool
) -> None:
    """The other person's number stays, boxes come in another order, chunks end anywhere."""
    gap = range(5, 5 + unseen)
    boxes = [[walk(t), stand(t)][:: 1 if t % 2 else -1] for t in range(20)]
    for t in gap:
        boxes[t] = [stand(t)]
    chunks = [chunk(0, boxes[:6]), chunk(6, boxes[6:])]
    told = track_by_overlap(chunks, n_init=3, max_age=max_age)
    walks = told.bbox_xyxy_px[:, 0] < 300
    np.testing.assert_array_equal(told.frame_index[~walks], np.arange(20))
    assert len(set(told.track_id[~walks])) == 1
    np.testing.assert_array_equal(np.sort(told.frame_index[walks]), np.delete(np.arange(20), gap))
    before, after = (
        set(told.track_id[walks & side])
        for side in (told.frame_index < gap[0], told.frame_index > gap[-1])
    )
    assert len(before) == len(after) == 1
    assert (before != after) == is_lost
    assert not set(told.track_id[~walks]) & (before | after)


def test_overlap_alone_needs_a_few_sights_in_a_row_and_no_small_boxes() -> None:
    boxes = [[walk(t), [300.0, 50, 300, 150]] for t in range(6)]
    boxes[2].append(stand(2))
    boxes[3].append(stand(3))
    boxes[5].append(stand(5))
    told = track_by_overlap([chunk(0, boxes)], n_init=3, max_age=9)
    np.testing.assert_array_equal(told.frame_index, np.arange(6))
    np.testing.assert_array_equal(told.bbox_xyxy_px, [walk(t) for t in range(6)])
    assert len(track_by_overlap([], n_init=3, max_age=9).frame_index) == 0


def ellipse(box: F64) -> Bool:
    """(H, W) that fills a box."""
    y, x = np.indices(SIZE_HW)
    middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    return np.asarray(((x - middle[0]) / half[0]) ** 2 + ((y - middle[1]) / half[1]) ** 2 < 1)


def test_masks_of_perturbed_boxes_move_with_their_boxes(tmp_path: Path) -> None:
    true_box = np.array([[40 + t, 20, 70 + t, 100] for t in range(NUM_FRAMES)], np.float64)
    rows = {
        "video_id": ["a"] * NUM_FRAMES,
        "frame_index": np.arange(NUM_FRAMES),
        "bbox_xyxy_px": pa.FixedSizeListArray.from_arrays(true_box.astype(np.float32).ravel(), 4),
        "score": np.where(np.arange(NUM_FRAMES) < NUM_HIDDEN, 0.15, 1).astype(np.float32),
    }
    seen = np.arange(NUM_FRAMES) % 10 != 7
    truth = pa.table(rows | {"state": np.where(seen, "detected", "predicted")})
    counts = [encode_rle(ellipse(box)[None])[0].counts for box in true_box]
    given = pa.table(rows | {"mask_rle": counts}).cast(BOXES).filter(pa.array(seen))
    pq.write_table(given, tmp_path / "given.parquet")
    clips = [
        Clip(name, tmp_path, NUM_FRAMES, 25, SIZE_HW[::-1], (0,), people, frozenset())
        for name, people in (("a", 1), ("nobody", 0))
    ]
    tables = []
    for name in ("one", "same"):
        path = tmp_path / f"{name}.parquet"
        write_perturbed_boxes(tmp_path / "given.parquet", truth, clips, path, seed=3)
        tables.append(pd.read_parquet(path))
    found, again = tables
    pd.testing.assert_frame_equal(found, again)
    box = np.stack(found["bbox_xyxy_px"].to_list()).astype(np.float64)
    mask = np.stack([decode_rle(RleMask(SIZE_HW, text)) for text in found["mask_rle"]])
    made_up = (mask == box_mask(box.astype(np.float32), SIZE_HW)).all(axis=(1, 2))
    assert set(found["video_id"][made_up]) == {"a", "nobody"}
    assert found["score"][made_up].between(0.5, 0.8).all()
    real = ~made_up
    assert set(found["video_id"][real]) == {"a"}
    frame = found["frame_index"].to_numpy()[real]
    assert len(frame) == len(set(frame))
    assert set(frame) <= set(np.flatnonzero(seen))
    assert 0.2 < (frame < NUM_HIDDEN).sum() / seen[:NUM_HIDDEN].sum() < 0.8
    assert (frame >= NUM_HIDDEN).sum() > 0.9 * seen[NUM_HIDDEN:].sum()
    assert found["score"][real][frame < NUM_HIDDEN].max() < found["score"][real].max() - 0.2
    assert (np.diagonal(box_iou(box[real], true_box[frame])) > 0.75).all()
    off = box[real] - true_box[frame]
    assert np.abs(off).max(axis=1).min() > 0.1
    for one, where in zip(mask[real], box[real], strict=True):
        ideal = ellipse(where)
        assert (one & ideal).sum() > 0.95 * (one | ideal).sum()

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.ndimage
import torch

from fourdh_batch.geometry import box_iou
from fourdh_batch.masks import decode_rle
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.synthetic.camera import Camera, CameraMove
from fourdh_batch.synthetic.corpus import MIN_VISIBLE_FRACTION, Clip, make_corpus
from fourdh_batch.synthetic.mocap import Recording
from fourdh_batch.synthetic.motion import Gait
from fourdh_batch.synthetic.plans import (
    CLIPS,
    FEATURES,
    FPS,
    ClipPlan,
    ShotPlan,
    Step,
    draw_plan,
    drawn_clips,
)
from fourdh_batch.synthetic.rooms import random_room
from fourdh_batch.synthetic.scene import Block, render
from fourdh_batch.tables.schema import check_table, video_ids_of
from fourdh_batch.types import U8, Bool, RleMask
from fourdh_batch.video.decode import read_frames

SIZE_WH = (192, 144)
FRAMES = 12


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(scope="module")
def corpus(body: SmplBody, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Clip]]:
    folder = tmp_path_factory.mktemp("synthetic") / "corpus"
    return folder, make_corpus(folder, body, image_size_wh=SIZE_WH, num_frames=FRAMES)


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    return pd.read_parquet(folder / "boxes.parquet"), pd.read_parquet(folder / "truth.parquet")


def masks(folder: Path) -> list[Bool]:
    """Of `boxes.parquet`, of pictures of `SIZE_WH`."""
    counts = pd.read_parquet(folder / "boxes.parquet")["mask_rle"]
    return [decode_rle(RleMask(SIZE_WH[::-1], text)) for text in counts]


def stacked(rows: pd.DataFrame, column: str, *shape: int) -> np.ndarray:
    return np.stack(rows[column].to_list()).reshape(-1, *shape)


def decode(path: Path) -> list[U8]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_every_clip_decodes_to_what_its_record_says(corpus: tuple[Path, list[Clip]]) -> None:
    folder, clips = corpus
    assert [clip.video_id for clip in clips] == [f"{name}.mp4" for name in CLIPS]
    for clip in clips:
        assert clip.path == folder / clip.video_id
        frames = decode(clip.path)
        assert len(frames) == clip.num_frames == FRAMES
        assert frames[0].shape == (SIZE_WH[1], SIZE_WH[0], 3)
    assert {clip.video_id: clip.num_people for clip in clips} == {
        "crossing.mp4": 2,
        "enter_leave.mp4": 2,
        "trio.mp4": 3,
        "empty.mp4": 0,
        "cut.mp4": 2,
    }


def test_nobody_is_in_the_empty_clip(corpus: tuple[Path, list[Clip]]) -> None:
    boxes, truth = tables(corpus[0])
    assert "empty.mp4" not in set(boxes["video_id"]) | set(truth["video_id"])
    told = video_ids_of(pq.read_schema(corpus[0] / "truth.parquet"))
    assert told == [clip.video_id for clip in corpus[1]]
    frames = decode(corpus[0] / "empty.mp4")
    assert np.abs(frames[0].astype(int) - frames[-1]).max() < 40  # a still picture, recompressed


def test_the_cut_is_the_only_hard_change(corpus: tuple[Path, list[Clip]]) -> None:
    clip = next(clip for clip in corpus[1] if clip.video_id == "cut.mp4")
    assert clip.shot_starts == (0, FRAMES // 2)
    frames = np.stack(decode(clip.path)).astype(int)
    change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert int(change.argmax()) + 1 == clip.shot_starts[1]
    assert change.max() > 5 * np.sort(change)[-2]
    _, truth = tables(corpus[0])
    mine = truth[truth["video_id"] == "cut.mp4"]
    assert set(zip(mine["shot_id"], mine["track_id"], strict=True)) == {(0, 0), (0, 1), (1, 0)}


def test_boxes_are_the_truth_of_those_who_can_be_seen(corpus: tuple[Path, list[Clip]]) -> None:
    boxes, truth = tables(corpus[0])
    seen = truth[truth["state"] == "detected"].reset_index(drop=True)
    assert (seen["score"] >= MIN_VISIBLE_FRACTION).all()
    pd.testing.assert_frame_equal(
        boxes.drop(columns=["score", "mask_rle"]), seen[["video_id", "frame_index", "bbox_xyxy_px"]]
    )
    assert (boxes["score"] == 1).all()
    assert boxes["score"].dtype == np.float32
    corners = stacked(boxes, "bbox_xyxy_px", 4)
    assert corners.dtype == np.float32
    assert (corners >= 0).all()
    assert (corners <= np.tile(SIZE_WH, 2) - 1).all()
    assert (corners[:, 2:] > corners[:, :2]).all()


def test_masks_are_what_is_seen_of_a_person(corpus: tuple[Path, list[Clip]]) -> None:
    """Inside the box, on nobody else, and as large as the share that is seen."""
    boxes, truth = tables(corpus[0])
    boxes["share"] = truth["score"][truth["state"] == "detected"].to_numpy()
    boxes["mask"] = masks(corpus[0])
    areas = []
    for row in boxes.itertuples():
        y, x = np.nonzero(row.mask)
        left, top, right, bottom = row.bbox_xyxy_px
        assert len(x) > 0
        # half of a pixel is seen where its middle is at most a quarter outside
        assert left - 0.26 <= x.min() <= x.max() <= right + 0.26
        assert top - 0.26 <= y.min() <= y.max() <= bottom + 0.26
        areas.append(len(x) / ((right - left) * (bottom - top)))
    for _, frame in boxes.groupby(["video_id", "frame_index"]):
        share = np.sum(list(frame["mask"]), axis=0)
        assert (share > 1).sum() < 0.05 * (share > 0).sum()  # two halves of a pixel
    whole = boxes["share"].to_numpy() > 0.99
    assert np.median(np.array(areas)[whole]) > 0.25
    hidden = boxes["share"].to_numpy() < 0.5
    assert np.median(np.array(areas)[hidden]) < 0.6 * np.median(np.array(areas)[whole])


def test_the_truth_is_a_tracks_table(corpus: tuple[Path, list[Clip]], body: SmplBody) -> None:
    table = pq.read_table(corpus[0] / "truth.parquet")
    check_table("tracks", table)
    truth = table.to_pandas()
    key = ["video_id", "frame_index", "track_id"]
    assert not truth.duplicated(key).any()
    for _, mine in truth.groupby("video_id"):
        assert mine[key].equals(mine[key].sort_values(key))
    assert set(truth["body_model"]) == {f"open:{body.digest[:16]}"}
    frames = read_frames(str(corpus[0] / "trio.mp4"), 0, FRAMES)
    first = truth[(truth["video_id"] == "trio.mp4") & (truth["track_id"] == 0)]
    np.testing.assert_allclose(first["pts_s"], frames.pts_s[first["frame_index"]], atol=1e-9)


def test_truth_gives_back_the_people_in_camera_axes(
    corpus: tuple[Path, list[Clip]], body: SmplBody
) -> None:
    _, truth = tables(corpus[0])
    out = body(
        torch.from_numpy(stacked(truth, "global_orient", 1, 3, 3)),
        torch.from_numpy(stacked(truth, "body_pose", 23, 3, 3)),
        torch.from_numpy(stacked(truth, "betas", 10)),
    )
    keypoints = stacked(truth, "keypoints_3d_m", 44, 3)
    np.testing.assert_allclose(out.keypoints_3d, keypoints, atol=2e-5)
    cam_t = stacked(truth, "cam_t_m", 1, 3)
    focal = truth["focal_px"].to_numpy()[:, None, None]
    center = stacked(truth, "principal_point_px", 1, 2)
    points = keypoints + cam_t
    pixels = points[..., :2] / points[..., 2:] * focal + center
    np.testing.assert_allclose(pixels, stacked(truth, "keypoints_2d_px", 44, 2), atol=1e-2)

    vertices = out.vertices.numpy() + cam_t
    pixels = vertices[..., :2] / vertices[..., 2:] * focal + center
    box = np.concatenate([pixels.min(axis=1).clip(min=0), pixels.max(axis=1)], axis=1)
    box[:, 2:] = np.minimum(box[:, 2:], np.array(SIZE_WH) - 1)
    # the box is that of the dressed body: clothes and hair stand off by up to 3 cm
    thick = 0.035 * focal[:, :, 0] / points[..., 2].min(axis=1, keepdims=True)
    outside = (stacked(truth, "bbox_xyxy_px", 4) - box) * np.array([-1, -1, 1, 1])
    assert (outside > -0.02).all()
    assert (outside < thick).all()


def test_people_are_painted_where_the_truth_says(corpus: tuple[Path, list[Clip]]) -> None:
    # what differs between two distant frames of one shot lies in somebody's box or shadow
    folder = corpus[0]
    boxes, _ = tables(folder)
    mine = boxes[boxes["video_id"] == "crossing.mp4"]
    frames = np.stack(decode(folder / "crossing.mp4")).astype(int)
    background = np.median(frames, axis=0)
    changed = np.abs(frames[0] - background).max(axis=2) > 60
    inside = np.zeros_like(changed)
    for left, top, right, bottom in stacked(mine[mine["frame_index"] == 0], "bbox_xyxy_px", 4):
        inside[int(top) : int(bottom) + 2, int(left) : int(right) + 2] = True
    assert changed.sum() > 100
    assert (changed & inside).sum() > 0.9 * changed.sum()


def test_people_hide_each_other_and_leave_the_picture(body: SmplBody, tmp_path: Path) -> None:
    chosen = {name: CLIPS[name] for name in ("crossing", "enter_leave")}
    make_corpus(tmp_path, body, clips=chosen, image_size_wh=(96, 72))
    boxes, truth = tables(tmp_path)
    crossing = truth[truth["video_id"] == "crossing.mp4"]
    hidden = crossing[crossing["frame_index"].between(20, 40)].set_index("track_id")
    behind = hidden.loc[1]  # the farther of the two
    assert behind["score"].min() < 0.5 or (behind["state"] == "predicted").any()
    assert hidden.loc[0, "score"].min() == 1
    passing = truth[truth["video_id"] == "enter_leave.mp4"]
    frames = passing.groupby("track_id")["frame_index"]
    assert frames.min()[0] == 0
    assert frames.max()[0] < 70  # has left
    assert frames.min()[1] > 5  # comes later
    last = passing[(passing["track_id"] == 0) & (passing["frame_index"] == frames.max()[0])]
    assert last["score"].item() < 0.6
    assert len(boxes) == (truth["state"] == "detected").sum()


def test_an_identity_lasts_through_occlusion_and_absence(body: SmplBody, tmp_path: Path) -> None:
    behind_wall = ShotPlan(
        (Step(3, (0.0, -0.4), 90),), blocks=(Block((0.0, 0.9), (0.9, 2.4, 0.2)),)
    )
    comes_back = ShotPlan((Step(5, (2.75, -0.2), 90, turns_back_s=0.0),))
    clips = {"wall": ClipPlan(75, (behind_wall,)), "back": ClipPlan(90, (comes_back,))}
    made = make_corpus(tmp_path, body, clips=clips, image_size_wh=(96, 72))
    _, truth = tables(tmp_path)
    assert [clip.num_people for clip in made] == [1, 1]

    wall = truth[truth["video_id"] == "wall.mp4"]
    assert set(wall["track_id"]) == {3}
    assert wall["frame_index"].tolist() == list(range(75))
    gone = wall["state"].to_numpy() == "predicted"
    assert gone.sum() >= 8
    assert not gone[:15].any()
    assert not gone[-15:].any()
    runs = np.flatnonzero(gone)
    assert (np.diff(runs) == 1).all()
    np.testing.assert_array_equal(wall["frames_since_seen"][gone], np.arange(1, len(runs) + 1))
    assert (wall["frames_since_seen"][~gone] == 0).all()
    assert wall["score"][gone].isna().all()
    assert (wall["track_len"] == 75).all()
    assert wall["hits"].iloc[-1] == 75 - gone.sum()
    x = stacked(wall, "cam_t_m", 3)[:, 0]
    assert (np.diff(x) > 0).all()  # walks on where nobody sees him

    back = truth[truth["video_id"] == "back.mp4"]
    assert set(back["track_id"]) == {5}
    frames = back["frame_index"].to_numpy()
    assert frames[0] == 0
    assert frames[-1] == 89
    assert np.diff(frames).max() > 10  # away in the middle
    assert np.diff(stacked(back, "cam_t_m", 3)[-10:, 0]).max() < 0  # comes from the right


def test_a_moving_camera_moves_the_truth_with_the_picture(body: SmplBody, tmp_path: Path) -> None:
    moves = {
        "pan": CameraMove(pan_deg_s=25),
        "dolly": CameraMove(velocity_m_s=(0.0, 0.0, -2.5)),
        "hand": CameraMove(shake_deg=2.0),
    }
    standing = Gait(stride=0, arm_swing=0)
    for folder, x in (("with", 0.0), ("without", 50.0)):
        step = Step(0, (x, 0.0), 20, gait=standing)
        clips = {name: ClipPlan(9, (ShotPlan((step,), camera=c),)) for name, c in moves.items()}
        make_corpus(tmp_path / folder, body, clips=clips, image_size_wh=SIZE_WH)
    _, truth = tables(tmp_path / "with")
    assert len(tables(tmp_path / "without")[1]) == 0
    boxes = {}
    for name in moves:
        mine = truth[truth["video_id"] == f"{name}.mp4"]
        boxes[name] = stacked(mine, "bbox_xyxy_px", 4)
        there, empty = (
            read_frames(str(tmp_path / folder / f"{name}.mp4"), 0, 9).rgb.astype(int)
            for folder in ("with", "without")
        )
        silhouette = np.abs(there - empty).max(axis=3) > 14
        for t, points in enumerate(stacked(mine, "keypoints_2d_px", 44, 2)):
            around = scipy.ndimage.binary_dilation(silhouette[t], iterations=2)
            x, y = points.round().astype(int).T
            inside = (x >= 0) & (x < SIZE_WH[0]) & (y >= 0) & (y < SIZE_WH[1])
            assert around[y[inside], x[inside]].mean() > 0.9, (name, t)
    middle = {name: (box[:, 0] + box[:, 2]) / 2 for name, box in boxes.items()}
    assert (np.diff(middle["pan"]) > 2).all()  # turns to the left, so people move to the right
    assert (np.diff(boxes["dolly"][:, 3] - boxes["dolly"][:, 1]) > 0.5).all()
    assert np.abs(np.diff(middle["hand"])).max() > 0.3


def test_a_long_exposure_smears_a_runner(body: SmplBody, tmp_path: Path) -> None:
    runs = Step(0, (0.0, 0.0), 90, gait=Gait(cycles_per_s=1.5, stride=1.4))
    clips = {
        name: ClipPlan(5, (ShotPlan((runs,), exposure=exposure),))
        for name, exposure in (("sharp", 0.0), ("smeared", 0.9))
    }
    make_corpus(tmp_path / "sharp", body, clips={"a": clips["sharp"]}, image_size_wh=(192, 144))
    make_corpus(tmp_path / "smeared", body, clips={"a": clips["smeared"]}, image_size_wh=(192, 144))
    _, sharp = tables(tmp_path / "sharp")
    _, smeared = tables(tmp_path / "smeared")
    np.testing.assert_allclose(
        stacked(sharp, "keypoints_2d_px", 44, 2),
        stacked(smeared, "keypoints_2d_px", 44, 2),
        atol=0.05,
    )  # the truth is the middle of the exposure
    for one, other in zip(masks(tmp_path / "sharp"), masks(tmp_path / "smeared"), strict=True):
        assert (one & other).sum() > 0.97 * (one | other).sum()

    def edges(folder: str) -> float:
        rgb = read_frames(str(tmp_path / folder / "a.mp4"), 2, 3).rgb[0].astype(float)
        box = stacked(sharp, "bbox_xyxy_px", 4)[2].astype(int)
        return float(np.abs(np.diff(rgb[box[1] : box[3], box[0] : box[2]], axis=1)).mean())

    assert edges("smeared") < 0.9 * edges("sharp")


def test_somebody_plays_a_recording(body: SmplBody, tmp_path: Path) -> None:
    pose = np.zeros((60, 24, 3))
    pose[:, 16, 2] = np.linspace(-1.2, 1.2, 60)  # raises the left arm
    recording = Recording("arm", pose, np.zeros((60, 3)), 30.0)
    step = Step(0, (0.0, 0.0), 0, recording=(0, 0.0))
    clips = {"a": ClipPlan(20, (ShotPlan((step,)),))}
    make_corpus(tmp_path, body, clips=clips, recordings=[recording], image_size_wh=(96, 72))
    _, truth = tables(tmp_path)
    wrist = stacked(truth, "keypoints_3d_m", 44, 3)[:, 7, 1]  # y down
    assert wrist[-1] < wrist[0] - 0.3
    with pytest.raises(ValueError, match="a wants recording 0, got 0 recordings"):
        make_corpus(tmp_path, body, clips=clips)


def test_plans_are_drawn_by_seed_and_show_what_was_asked_for() -> None:
    assert draw_plan(1, 5) == draw_plan(1, 5)
    assert draw_plan(1, 5) != draw_plan(1, 6)
    assert draw_plan(1, 5) != draw_plan(2, 5)
    for index, feature in enumerate(FEATURES):
        plan = draw_plan(0, index, features=[feature])
        assert plan.features == {feature}
        shot = plan.shots[0]
        assert {
            "crossing": len(shot.steps) >= 2
            and shot.steps[0].heading_deg * shot.steps[1].heading_deg < 0,
            "occlusion": any(block.size_m[1] > 2 for block in shot.blocks),
            "long_occlusion": any(block.size_m[0] > 0.9 for block in shot.blocks),
            "reentry": any(step.turns_back_s is not None for step in shot.steps),
            "scale": any(abs(np.sin(np.radians(s.heading_deg))) < 0.6 for s in shot.steps),
            "moving_camera": shot.camera.shake_deg > 0,
            "motion_blur": shot.exposure > 0,
            "cut": len(plan.shots) >= 2,
            "crowd": 5 <= len(shot.steps) <= 8,
            "gestures": all(step.busy > 0 for step in shot.steps),
        }[feature]
        assert all(len({s.person for s in shot.steps}) == len(shot.steps) for shot in plan.shots)
    with pytest.raises(ValueError, match=r"got \['dance'\]"):
        draw_plan(0, 0, features=["dance"])
    drawn = drawn_clips(0, 25)
    assert len({plan.features for plan in drawn.values()}) > 15
    assert list(drawn)[3] == "00003-reentry"
    assert all(name.split("-")[1:] == sorted(plan.features) for name, plan in drawn.items())


def test_a_plan_of_several_features_shows_all_of_them() -> None:
    features = {"crossing", "long_occlusion", "reentry", "motion_blur", "scale"}
    for index in range(20):
        [shot] = draw_plan(4, index, features=features).shots
        there, back, *others = shot.steps
        assert there.heading_deg * back.heading_deg < 0
        assert any(block.size_m[0] > 0.9 for block in shot.blocks)
        assert any(step.turns_back_s is not None for step in others)
        assert any(step.gait.cycles_per_s >= 1.25 for step in others)


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["crossing", "long_occlusion", "reentry", "scale"])
def test_a_drawn_clip_shows_its_feature(body: SmplBody, tmp_path: Path, feature: str) -> None:
    clips = {"a": draw_plan(3, 1, features=[feature])}
    make_corpus(tmp_path, body, clips=clips, image_size_wh=(96, 72))
    _, truth = tables(tmp_path)
    by_track = dict(iter(truth.groupby("track_id")))
    if feature == "crossing":
        both = by_track[0].merge(by_track[1], on="frame_index")
        side = stacked(both, "bbox_xyxy_px_x", 4)[:, 0] - stacked(both, "bbox_xyxy_px_y", 4)[:, 0]
        assert side[0] * side[-1] < 0
    elif feature == "long_occlusion":
        assert max((mine["state"] == "predicted").sum() for mine in by_track.values()) > FPS // 2
    elif feature == "reentry":
        assert max(np.diff(mine["frame_index"]).max() for mine in by_track.values()) > 8
    else:
        box = stacked(by_track[0], "bbox_xyxy_px", 4)
        assert np.ptp(box[:, 3] - box[:, 1]) > 0.25 * (box[:, 3] - box[:, 1]).min()


def test_the_same_seed_gives_the_same_bytes(body: SmplBody, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_corpus(
            tmp_path / folder,
            body,
            seed=seed,
            clips={"crossing": CLIPS["crossing"], "drawn": draw_plan(7, 3, num_frames=8)},
            image_size_wh=(96, 72),
            num_frames=3,
        )
    first, again, other = (digests(tmp_path / folder) for folder in "abc")
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_a_clip_does_not_depend_on_the_others(
    corpus: tuple[Path, list[Clip]], body: SmplBody, tmp_path: Path
) -> None:
    make_corpus(
        tmp_path, body, clips={"cut": CLIPS["cut"]}, image_size_wh=SIZE_WH, num_frames=FRAMES
    )
    assert digests(tmp_path)["cut.mp4"] == digests(corpus[0])["cut.mp4"]


def test_the_number_of_threads_changes_nothing_and_is_left_alone(
    body: SmplBody, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            make_corpus(
                tmp_path / str(threads),
                body,
                clips={"crossing": CLIPS["crossing"]},
                image_size_wh=(96, 72),
                num_frames=2,
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_only_the_empty_clip_still_gives_tables(body: SmplBody, tmp_path: Path) -> None:
    make_corpus(
        tmp_path, body, clips={"empty": CLIPS["empty"]}, image_size_wh=(64, 48), num_frames=2
    )
    boxes, truth = tables(tmp_path)
    assert len(boxes) == len(truth) == 0
    assert list(boxes.columns) == ["video_id", "frame_index", "bbox_xyxy_px", "score", "mask_rle"]


def test_a_corpus_that_broke_off_has_no_tables_and_can_be_made_again(
    body: SmplBody, tmp_path: Path
) -> None:
    def make(folder: Path, names: str, seed: int) -> None:
        clips = dict.fromkeys(names, CLIPS["crossing"])
        make_corpus(folder, body, seed=seed, clips=clips, image_size_wh=(64, 48), num_frames=1)

    folder = tmp_path / "of two words"
    make(folder, "a", seed=0)
    (folder / "b.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match="directory"):
        make(folder, "ab", seed=1)
    assert {path.name for path in folder.iterdir()} == {"a.mp4", "b.mp4"}
    (folder / "b.mp4").rmdir()
    make(folder, "ab", seed=1)
    make(tmp_path / "at_once", "ab", seed=1)
    assert digests(folder) == digests(tmp_path / "at_once")


def test_wrong_wishes_are_refused(body: SmplBody, tmp_path: Path) -> None:
    for name in ("../a", "", ".a"):
        with pytest.raises(ValueError, match="expected plain names"):
            make_corpus(tmp_path, body, clips={name: CLIPS["cut"]})
    with pytest.raises(ValueError, match="even sizes"):
        make_corpus(tmp_path, body, image_size_wh=(65, 48))
    with pytest.raises(ValueError, match="2 shots, got 1 frames"):
        make_corpus(tmp_path, body, clips={"cut": CLIPS["cut"]}, num_frames=1)


def test_visible_fraction_counts_what_is_hidden_and_what_is_outside() -> None:
    camera = Camera((0.0, 1.0, 4.0), 0.0, 0.0, 50.0, (64, 48))
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])

    def square(x: float, z: float, half: float) -> torch.Tensor:
        corners = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * half
        return corners + torch.tensor([x, 1.0, z])

    left_edge = -32 / 50 * 4.0  # of the picture, at z = 0
    people = [square(0.0, 0.0, 0.4), square(0.4, 1.0, 0.3), square(left_edge, 0, 0.4)]
    people.append(square(0.4, 0.0, 0.1))  # wholly behind the second
    picture = render(
        camera,
        random_room(np.random.default_rng(0)).view(camera),
        torch.stack(people),
        torch.tensor([0.9, 0.1, 0.1]).expand(4, 4, 3),
        faces,
    )
    # seen from z = 4, the second (depth 3) spans x 0.1 to 0.7 there, so 0.133 to 0.933 at depth 4
    hidden = (0.4 - 0.4 / 3) / 0.8
    assert picture.visible_fraction[0] == pytest.approx(1 - hidden, abs=0.08)
    assert picture.visible_fraction[1] == 1
    assert picture.visible_fraction[2] == pytest.approx(0.5, abs=0.06)
    assert picture.visible_fraction[3] == 0

    def covered(left: float, right: float, top: float, bottom: float) -> np.ndarray:
        """(96, 128) points half a pixel apart that a rectangle in pixels holds."""
        x, y = ((np.arange(2 * size) + 0.5) / 2 - 0.5 for size in camera.image_size_wh)
        in_x, in_y = (left < x) & (x < right), (top < y) & (y < bottom)
        return np.asarray(in_y[:, None] & in_x)

    x, y = camera.principal_point_px
    second = covered(x + 5 / 3, x + 35 / 3, y - 5, y + 5)
    seen = covered(x - 5, x + 5, y - 5, y + 5) & ~second, second, covered(-5, 5, y - 5, y + 5)
    fine = np.stack([*seen, np.zeros_like(second)])
    share = fine.reshape(4, 48, 2, 64, 2).mean(axis=(2, 4))
    np.testing.assert_array_equal(picture.mask(), share >= 0.5)


@pytest.fixture(scope="module")
def seen(
    shared: Path, body: SmplBody, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[U8, pd.DataFrame]]:
    """Some frames with the true rows of those who are seen whole."""
    folder = tmp_path_factory.mktemp("seen")
    clips = {name: CLIPS[name] for name in ("trio", "cut")} | drawn_clips(77, 4, num_frames=6)
    make_corpus(folder, body, clips=clips, num_frames=6)
    _, truth = tables(folder)
    whole = truth[truth["score"] > 0.95]
    return [
        (rgb, whole[(whole["video_id"] == f"{name}.mp4") & (whole["frame_index"] == frame_index)])
        for name in clips
        for frame_index, rgb in enumerate(decode(folder / f"{name}.mp4"))
    ]


def onnx_model(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    (image,) = session.get_inputs()

    def run(picture: np.ndarray) -> np.ndarray:
        """The first answer to one (H, W, 3) picture."""
        batch = picture.transpose(2, 0, 1)[None].astype(np.float32)
        answer: np.ndarray = session.run(None, {image.name: batch})[0][0]
        return answer

    return run


@pytest.mark.shared
def test_an_independent_detector_finds_the_people(
    shared: Path, seen: list[tuple[U8, pd.DataFrame]]
) -> None:
    model = onnx_model(shared / "models" / "detector_rtmdet_nano_person.onnx")
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    found = []
    for rgb, rows in seen:
        image = np.full((384, 384, 3), 114.0)
        image[: rgb.shape[0], : rgb.shape[1]] = rgb
        detections = model(((image - mean) / std)[..., ::-1])
        boxes = detections[detections[:, 4] > 0.3, :4].astype(np.float64)
        if len(rows):
            iou = box_iou(stacked(rows, "bbox_xyxy_px", 4).astype(np.float64), boxes)
            found += (iou > 0.5).any(axis=1).tolist()
    assert len(found) > 30
    assert np.mean(found) >= 0.95


@pytest.mark.shared
def test_an_independent_pose_network_finds_the_joints(
    shared: Path, seen: list[tuple[U8, pd.DataFrame]]
) -> None:
    """PP-TinyPose: shoulders, elbows, wrists, hips, knees and ankles of COCO, on true boxes."""
    model = onnx_model(shared / "models" / "pose_tinypose_256x192_coco17.onnx")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    ours = [5, 2, 6, 3, 7, 4, 12, 9, 13, 10, 14, 11]  # OpenPose's numbers of COCO's last twelve
    near = []
    for rgb, rows in seen:
        for row in rows.itertuples():
            left, top, right, bottom = row.bbox_xyxy_px
            height = 1.25 * max(bottom - top, (right - left) * 4 / 3)
            zoom = 256 / height
            shift = np.array([96, 128]) - zoom * np.array([left + right, top + bottom]) / 2
            affine = np.column_stack((zoom * np.eye(2), shift))
            crop = cv2.warpAffine(rgb, affine, (192, 256)) / 255
            heatmaps = model((crop - mean) / std)[5:]  # (12, 64, 48)
            y, x = np.divmod(heatmaps.reshape(12, -1).argmax(axis=1), heatmaps.shape[2])
            told = (4 * (np.stack((x, y), axis=1) + 0.5) - shift) / zoom
            off = np.linalg.norm(told - np.stack(row.keypoints_2d_px).reshape(44, 2)[ours], axis=1)
            near.append(off < 0.1 * max(right - left, bottom - top))
    assert len(near) > 30
    assert np.mean(near) >= 0.9

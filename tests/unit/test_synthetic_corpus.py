from __future__ import annotations

import hashlib
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch

from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.synthetic.corpus import CLIPS, MIN_VISIBLE_FRACTION, Clip, make_corpus
from fourdh_batch.synthetic.scene import Camera, random_room, render
from fourdh_batch.types import U8

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
    assert set(zip(mine["shot_id"], mine["person_id"], strict=True)) == {(0, 0), (0, 1), (1, 0)}


def test_boxes_are_the_truth_of_those_who_can_be_seen(corpus: tuple[Path, list[Clip]]) -> None:
    boxes, truth = tables(corpus[0])
    seen = truth[truth["visible_fraction"] >= MIN_VISIBLE_FRACTION].reset_index(drop=True)
    assert len(boxes) == len(seen)
    pd.testing.assert_frame_equal(
        boxes.drop(columns="score"), seen[["video_id", "frame_index", "bbox_xyxy_px"]]
    )
    assert (boxes["score"] == 1).all()
    assert boxes["score"].dtype == np.float32
    corners = stacked(boxes, "bbox_xyxy_px", 4)
    assert corners.dtype == np.float32
    assert (corners >= 0).all()
    assert (corners <= np.tile(SIZE_WH, 2) - 1).all()
    assert (corners[:, 2:] > corners[:, :2]).all()


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
    np.testing.assert_allclose(box, stacked(truth, "bbox_xyxy_px", 4), atol=1e-2)


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
    make_corpus(tmp_path, body, clips=["crossing", "enter_leave"], image_size_wh=(96, 72))
    _, truth = tables(tmp_path)
    crossing = truth[truth["video_id"] == "crossing.mp4"]
    hidden = crossing[crossing["frame_index"].between(20, 40)].set_index("person_id")
    assert hidden.loc[1, "visible_fraction"].min() < 0.5  # the farther of the two
    assert hidden.loc[0, "visible_fraction"].min() == 1
    passing = truth[truth["video_id"] == "enter_leave.mp4"]
    frames = passing.groupby("person_id")["frame_index"]
    assert frames.min()[0] == 0
    assert frames.max()[0] < 70  # has left
    assert frames.min()[1] > 5  # comes later
    last = passing[(passing["person_id"] == 0) & (passing["frame_index"] == frames.max()[0])]
    assert last["visible_fraction"].item() < 0.5
    boxes, _ = tables(tmp_path)
    assert len(boxes) < len(truth)


def test_the_same_seed_gives_the_same_bytes(body: SmplBody, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_corpus(
            tmp_path / folder,
            body,
            seed=seed,
            clips=["crossing"],
            image_size_wh=(96, 72),
            num_frames=5,
        )
    first, again, other = (digests(tmp_path / folder) for folder in "abc")
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_a_clip_does_not_depend_on_the_others(
    corpus: tuple[Path, list[Clip]], body: SmplBody, tmp_path: Path
) -> None:
    make_corpus(tmp_path, body, clips=["cut"], image_size_wh=SIZE_WH, num_frames=FRAMES)
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
                clips=["crossing"],
                image_size_wh=(96, 72),
                num_frames=2,
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_only_the_empty_clip_still_gives_tables(body: SmplBody, tmp_path: Path) -> None:
    make_corpus(tmp_path, body, clips=["empty"], image_size_wh=(64, 48), num_frames=2)
    boxes, truth = tables(tmp_path)
    assert len(boxes) == len(truth) == 0
    assert list(boxes.columns) == ["video_id", "frame_index", "bbox_xyxy_px", "score"]


def test_wrong_wishes_are_refused(body: SmplBody, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got \\['dance'\\]"):
        make_corpus(tmp_path, body, clips=["dance"])
    with pytest.raises(ValueError, match="even sizes"):
        make_corpus(tmp_path, body, image_size_wh=(65, 48))
    with pytest.raises(ValueError, match="2 shots, got 1 frames"):
        make_corpus(tmp_path, body, clips=["cut"], num_frames=1)


def test_visible_fraction_counts_what_is_hidden_and_what_is_outside() -> None:
    camera = Camera((0.0, 1.0, 4.0), 0.0, 0.0, 50.0, (64, 48))
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])

    def square(x: float, z: float, half: float) -> torch.Tensor:
        corners = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * half
        return corners + torch.tensor([x, 1.0, z])

    left_edge = -32 / 50 * 4.0  # of the picture, at z = 0
    people = torch.stack([square(0.0, 0.0, 0.4), square(0.4, 1.0, 0.3), square(left_edge, 0, 0.4)])
    picture = render(
        camera,
        random_room(camera, np.random.default_rng(0)),
        people,
        torch.tensor([0.9, 0.1, 0.1]).expand(3, 4, 3),
        faces,
    )
    # seen from z = 4, the second (depth 3) spans x 0.1 to 0.7 there, so 0.133 to 0.933 at depth 4
    hidden = (0.4 - 0.4 / 3) / 0.8
    assert picture.visible_fraction[0] == pytest.approx(1 - hidden, abs=0.08)
    assert picture.visible_fraction[1] == 1
    assert picture.visible_fraction[2] == pytest.approx(0.5, abs=0.06)


@pytest.mark.shared
def test_an_independent_detector_finds_the_people(
    shared: Path, body: SmplBody, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = onnxruntime.InferenceSession(
        str(shared / "models" / "detector_rtmdet_nano_person.onnx"), options
    )
    make_corpus(tmp_path, body, clips=["trio", "cut"], num_frames=6)
    _, truth = tables(tmp_path)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    found = []
    for video_id, mine in truth.groupby("video_id"):
        for frame_index, rgb in enumerate(decode(tmp_path / str(video_id))):
            image = np.full((384, 384, 3), 114.0)
            image[: rgb.shape[0], : rgb.shape[1]] = rgb
            image = ((image - mean) / std)[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32)
            detections = model.run(None, {"input": image})[0][0]
            boxes = detections[detections[:, 4] > 0.3, :4]
            here = mine[(mine["frame_index"] == frame_index) & (mine["visible_fraction"] > 0.95)]
            for box in stacked(here, "bbox_xyxy_px", 4) if len(here) else []:
                low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
                common = (high - low).clip(min=0).prod(axis=1)
                areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
                iou = common / (areas + (box[2:] - box[:2]).prod() - common)
                found.append(bool((iou > 0.5).any()))
    assert len(found) > 15
    assert np.mean(found) >= 0.9

"""Poses of other engines: every camera convention puts the body where its engine had it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourdh_batch.errors import BadPosesError, ConfigError, ManifestError
from fourdh_batch.geometry import (
    crop_square,
    full_image_camera,
    full_image_focal,
    project_full_image,
)
from fourdh_batch.models.poses_given import (
    VideoPoses,
    camera_of_other_square,
    camera_of_square,
    open_poses,
    video_id_of,
)
from fourdh_batch.types import F32, F64
from tests import pose_files
from tests.pose_files import WRITERS, Walkers, walkers

RNG = np.random.default_rng(2)


def read(path: Path, layout: str = "auto", **options: Any) -> VideoPoses:
    source = open_poses(str(path), layout=layout, **options)
    [video] = source.videos()
    assert video.video_id == "clip"
    return source.read(video)


def written(folder: Path, layout: str, w: Walkers) -> Path:
    name, write = WRITERS[layout]
    write(folder / name, w)
    return folder / name.split("/")[0] if "/" not in name else folder


def points(n: int, *, flat: bool) -> F64:
    """(n, 30, 3) points of a body; `flat`: all at the depth of its origin."""
    xyz = RNG.uniform(-1, 1, (n, 30, 3))
    if flat:
        xyz[..., 2] = 0
    return xyz


def projected(poses: VideoPoses, size_wh: tuple[int, int], xyz: F64) -> F32:
    cam_t = full_image_camera(poses.pred_cam, poses.box_center_px, poses.box_size_px, size_wh)
    middle = (size_wh[0] / 2, size_wh[1] / 2)
    return project_full_image(xyz, cam_t, full_image_focal(size_wh), middle)


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("named", [True, False])
def test_every_layout_gives_the_same_bodies(tmp_path: Path, layout: str, named: bool) -> None:
    w = walkers(empty=(4, 5))
    path = written(tmp_path, layout, w)
    poses = read(path, layout if named else "auto", image_size_px=w.image_size_px)
    assert poses.frame_index.tolist() == list(range(12))
    assert np.array_equal(poses.frame_index[poses.frame_row], w.frame_index)
    assert (poses.image_size_px == w.image_size_px).all()
    assert set(poses.drop_reason) == {""}
    rotmat = np.concatenate([poses.global_orient, poses.body_pose], axis=1)
    assert np.allclose(rotmat, w.rotmat, atol=1e-5)
    assert np.allclose(poses.betas, w.betas, atol=1e-6)
    center, side = crop_square(poses.bbox_xyxy_px)
    assert np.allclose(poses.box_center_px, center, atol=1e-3)
    assert np.allclose(poses.box_size_px, side, rtol=1e-5)
    if layout not in ("pare", "pymafx"):  # those know square boxes only
        assert np.allclose(poses.bbox_xyxy_px, w.bbox_xyxy_px, atol=1e-4)
        assert np.allclose(poses.pred_cam, w.pred_cam, atol=1e-4)
    has_scores = layout not in ("pare", "pymafx")
    assert np.array_equal(poses.score, w.score if has_scores else np.ones(len(w.score)))


@pytest.mark.parametrize("layout", WRITERS)
def test_bodies_stay_at_their_pixels(tmp_path: Path, layout: str) -> None:
    w = walkers()
    poses = read(written(tmp_path, layout, w), layout, image_size_px=w.image_size_px)
    # Engines differ in focal length; at the depth of the body's origin all must agree.
    xyz = points(len(w.score), flat=True)
    middle = (w.image_size_px[0] / 2, w.image_size_px[1] / 2)
    expected = project_full_image(xyz, w.cam_t_m, full_image_focal(w.image_size_px), middle)
    assert np.abs(projected(poses, w.image_size_px, xyz) - expected).max() < 0.02
    if layout in ("npz", "parquet", "phalp"):  # the same camera altogether
        xyz = points(len(w.score), flat=False)
        expected = project_full_image(xyz, w.cam_t_m, full_image_focal(w.image_size_px), middle)
        assert np.abs(projected(poses, w.image_size_px, xyz) - expected).max() < 0.02


def test_pare_agrees_with_its_own_orthographic_camera(tmp_path: Path) -> None:
    w = walkers()
    poses = read(written(tmp_path, "pare", w), "pare")
    xyz = points(len(w.score), flat=True)
    camera = pose_files.orig_cam(w)
    half = np.array(w.image_size_px) / 2
    expected = (camera[:, None, :2] * (xyz[..., :2] + camera[:, None, 2:]) + 1) * half
    assert np.abs(projected(poses, w.image_size_px, xyz) - expected).max() < 0.02


def test_pymafx_agrees_with_its_own_perspective_camera(tmp_path: Path) -> None:
    """PyMAF-X's `orig_cam_t`: focal length 5000 px in the full frame."""
    w = walkers()
    poses = read(written(tmp_path, "pymafx", w), "pymafx")
    boxes, camera = pose_files.square_boxes(w)
    width, height = w.image_size_px
    scaled = camera[:, 0] * boxes[:, 2]
    cam_t = np.stack(
        [
            camera[:, 1] + 2 * (boxes[:, 0] - width / 2) / scaled,
            camera[:, 2] + 2 * (boxes[:, 1] - height / 2) / scaled,
            2 * 5000 / scaled,
        ],
        axis=1,
    )
    xyz = points(len(w.score), flat=True)
    expected = project_full_image(xyz, cam_t, 5000.0, (width / 2, height / 2))
    assert np.abs(projected(poses, w.image_size_px, xyz) - expected).max() < 0.02


def test_cliff_agrees_with_its_own_camera_up_to_perspective(tmp_path: Path) -> None:
    w = walkers()
    poses = read(written(tmp_path, "cliff", w), "cliff", image_size_px=w.image_size_px)
    content = pose_files.cliff_content(w)
    half = (w.image_size_px[0] / 2, w.image_size_px[1] / 2)
    xyz = points(len(w.score), flat=True)
    expected = project_full_image(xyz, content["global_t"], content["focal_l"], half)
    assert np.abs(projected(poses, w.image_size_px, xyz) - expected).max() < 0.02
    # Its camera is near, ours far: limbs before and behind the origin differ by perspective.
    xyz = points(len(w.score), flat=False) * [1, 1, 0.2]
    expected = project_full_image(xyz, content["global_t"], content["focal_l"], half)
    off = np.abs(projected(poses, w.image_size_px, xyz) - expected).max(axis=(1, 2))
    assert (off < 0.12 * w.side).all()


@pytest.mark.parametrize("size", [(640, 361), (361, 640), (500, 500)])
def test_old_phalp_files_tell_the_camera_of_the_padded_frame(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    w = walkers(image_size_px=size)
    pose_files.write_joblib(tmp_path / "clip.pkl", pose_files.phalp_content(w, old=True))
    poses = read(tmp_path / "clip.pkl")
    assert np.allclose(poses.pred_cam, w.pred_cam, atol=2e-4)


def test_a_camera_of_the_frame_and_one_of_another_square_invert() -> None:
    w = walkers()
    focal = np.full(len(w.score), float(full_image_focal(w.image_size_px)))
    middle = np.tile(np.array(w.image_size_px) / 2, (len(w.score), 1))
    back = camera_of_square(w.cam_t_m.astype(np.float64), focal, middle, w.center, w.side)
    assert np.allclose(back, w.pred_cam, atol=1e-5)
    other, size = w.center + 17.5, w.side * 1.3
    moved = camera_of_other_square(w.pred_cam, w.center, w.side, other, size)
    assert np.allclose(
        full_image_camera(moved, other, size, w.image_size_px), w.cam_t_m, rtol=1e-5, atol=1e-5
    )


def test_npz_with_a_camera_of_the_frame(tmp_path: Path) -> None:
    w = walkers()
    pose_files.write_npz(tmp_path / "clip.npz", pose_files.npz_content(w, camera="cam_t"))
    poses = read(tmp_path / "clip.npz")
    assert np.allclose(poses.pred_cam, w.pred_cam, atol=1e-4)
    assert np.allclose(poses.pts_s, np.arange(12) / 25)


def test_ghosts_of_phalp_are_not_taken_for_detections(tmp_path: Path) -> None:
    w = walkers()
    content = pose_files.phalp_content(w)
    assert max(len(frame["tid"]) for frame in content.values()) == 3
    pose_files.write_joblib(tmp_path / "clip.pkl", content)
    assert len(read(tmp_path / "clip.pkl").score) == len(w.score)


def test_shots_of_phalp_and_of_columns_are_kept(tmp_path: Path) -> None:
    w = walkers()
    content = pose_files.phalp_content(w)
    content["img/000007.jpg"]["shot"] = 1
    pose_files.write_joblib(tmp_path / "clip.pkl", content)
    assert np.flatnonzero(read(tmp_path / "clip.pkl").is_shot_start).tolist() == [6]
    columns = pose_files.npz_content(w) | {"is_shot_start": w.frame_index == 3}
    pose_files.write_npz(tmp_path / "other" / "clip.npz", columns)
    assert np.flatnonzero(read(tmp_path / "other").is_shot_start).tolist() == [3]


def test_times_are_interpolated_where_nobody_is() -> None:
    from fourdh_batch.models.poses_given import rows_of_columns, settle

    w = walkers(empty=(0, 5, 11))
    times = 3 + w.frame_index * 0.04
    columns = pose_files.npz_content(w) | {"pts_s": times}
    del columns["fps"]
    poses = settle(rows_of_columns(columns, "x", "clip", None), "clip")
    assert np.allclose(poses.pts_s, 3 + np.arange(12) * 0.04)


def test_parquet_holds_many_videos_and_boxes_without_a_body(tmp_path: Path) -> None:
    w = walkers()
    ids = ["../../etc/passwd", "a/b.mp4", "ü # 1"]
    frames = [pose_files.parquet_frame(w, name) for name in ids]
    for name in ("rotmat", "betas", "pred_cam"):
        frames[1].loc[0, name] = None
    frames[1]["drop_reason"] = None
    frames[1].loc[0, "drop_reason"] = "low_score"
    (tmp_path / "_ignored.parquet").write_bytes(b"no")
    for k, frame in enumerate(frames):
        frame.to_parquet(tmp_path / f"part{k}.parquet")
    source = open_poses(str(tmp_path))
    videos = source.videos()
    assert [v.video_id for v in videos] == sorted(ids)
    assert len({v.fingerprint for v in videos}) == 3
    poses = {v.video_id: source.read(v) for v in videos}
    assert {len(p.score) for p in poses.values()} == {24}
    assert poses["a/b.mp4"].drop_reason[0] == "low_score"
    assert len(poses["a/b.mp4"].betas) == 23
    assert np.allclose(poses["ü # 1"].pred_cam, w.pred_cam, atol=1e-5)


def test_a_person_without_a_usable_body_stays_as_a_box(tmp_path: Path) -> None:
    w = walkers()
    content = pose_files.npz_content(w)
    content["poses"][3, 5] = np.nan
    content["poses"][6, 5] = np.inf
    content["betas"][4, 0] = np.inf
    content["pred_cam"] = w.pred_cam.copy()
    content["pred_cam"][5, 0] = 1e300
    pose_files.write_npz(tmp_path / "clip.npz", content)
    poses = read(tmp_path / "clip.npz")
    assert np.flatnonzero(poses.drop_reason == "invalid_pose").tolist() == [3, 4, 5, 6]
    assert len(poses.betas) == 20
    assert np.isfinite(poses.body_pose).all()


def test_looks_and_cuts_come_from_columns(tmp_path: Path) -> None:
    w = walkers()
    frame = pose_files.parquet_frame(w, "clip")
    looks = RNG.normal(size=(24, 256))
    looks[3] = 1e9
    frame["appearance"] = [None if k == 2 else row for k, row in enumerate(looks)]
    frame["is_shot_start"] = w.frame_index == 7
    frame.to_parquet(tmp_path / "clip.parquet")
    poses = read(tmp_path / "clip.parquet")
    assert poses.appearance is not None
    unknown = np.isnan(poses.appearance).all(axis=1)
    assert np.flatnonzero(unknown).tolist() == [2, 3]
    assert np.allclose(poses.appearance[~unknown], looks[~unknown], atol=4e-3)
    assert np.flatnonzero(poses.is_shot_start).tolist() == [7]


def test_a_body_behind_the_camera_is_left_to_the_tracker(tmp_path: Path) -> None:
    w = walkers()
    content = pose_files.npz_content(w, camera="cam_t")
    content["cam_t_m"] = content["cam_t_m"] * [1, 1, -1]
    pose_files.write_npz(tmp_path / "clip.npz", content)
    poses = read(tmp_path / "clip.npz")
    assert (poses.pred_cam[:, 0] < 0).all()
    assert set(poses.drop_reason) == {""}


# --- broken files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"poses": np.zeros((24, 71))}, r"clip\.npz: poses: expected .*72.* got \(24, 71\)"),
        ({"betas": np.zeros(24)}, r"betas: expected"),
        ({"pred_cam": np.zeros((23, 3))}, r"pred_cam: expected \(24, 3\), got \(23, 3\)"),
        ({"pred_cam": None}, r"expected cam_t_m"),
        ({"image_size_px": None}, "give poses.image_size=WIDTHxHEIGHT"),
        ({"image_size_px": np.array([0, 10])}, r"width and height.*got \[0\.0, 10\.0\]"),
        ({"score": np.full(24, 1.5)}, r"score from 0 to 1, got 1\.5"),
        ({"frame_index": np.full(24, -1)}, "whole frame"),
        ({"frame_index": np.full(24, 10**9)}, "whole frame"),
        ({"frame_index": np.arange(24) + 0.5}, "whole frame"),
        ({"num_frames": 5}, "expected 5 frames, got a box in frame 11"),
        ({"num_frames": 9_999_999}, r"frame 9999998: .*at most 301200 frames.* got 9999987"),
        ({"fps": 0.0}, "fps: expected more than 0"),
        ({"bbox_xyxy_px": np.full((24, 4), np.nan)}, "finite corners"),
        ({"bbox_xyxy_px": np.full((24, 4), 1e300)}, "finite corners"),
        ({"image_size_px": np.array([1e300, 1e300])}, "width and height"),
        ({"bbox_xyxy_px": np.tile([9.0, 9, 1, 1], (24, 1))}, "left <= right"),
        ({"poses": None, "rotmat": np.full((24, 24, 3, 3), 0.5)}, "rotation matrices"),
        ({"poses": None, "rotmat": np.tile(-np.eye(3), (24, 24, 1, 1))}, "rotation matrices"),
        ({"frame_index": None}, "expected one of the layouts"),
        ({"poses": np.full((24, 72), "a")}, "poses: expected numbers"),
    ],
)
def test_wrong_numbers_are_named(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    content = pose_files.npz_content(walkers()) | change
    content = {name: value for name, value in content.items() if value is not None}
    pose_files.write_npz(tmp_path / "clip.npz", content)
    with pytest.raises(BadPosesError, match=match) as caught:
        read(tmp_path / "clip.npz")
    assert caught.value.video == "clip"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_few_rows_cannot_claim_days_of_empty_frames(tmp_path: Path) -> None:
    content = pose_files.npz_content(walkers())
    content.pop("num_frames", None)
    frame = content["frame_index"]
    content["frame_index"] = np.where(frame == 11, 9_999_999, frame)
    pose_files.write_npz(tmp_path / "clip.npz", content)
    with pytest.raises(BadPosesError, match="the longest gap ends here") as caught:
        read(tmp_path / "clip.npz")
    assert caught.value.frame_index == 9_999_999
    content["frame_index"] = np.where(frame == 11, 300_000, frame)  # hours with nobody are fine
    pose_files.write_npz(tmp_path / "clip.npz", content)
    assert len(read(tmp_path / "clip.npz").frame_index) == 300_001


def test_the_frame_of_a_bad_row_is_named(tmp_path: Path) -> None:
    content = pose_files.npz_content(walkers())
    content["bbox_xyxy_px"] = content["bbox_xyxy_px"].copy()
    content["bbox_xyxy_px"][9] = np.inf
    pose_files.write_npz(tmp_path / "clip.npz", content)
    with pytest.raises(BadPosesError, match=r"video clip, frame 4: clip\.npz: row 9") as caught:
        read(tmp_path / "clip.npz")
    assert caught.value.frame_index == 4


def test_cliff_needs_the_right_size_of_the_frame(tmp_path: Path) -> None:
    w = walkers()
    path = written(tmp_path, "cliff", w)
    with pytest.raises(BadPosesError, match=r"give poses\.image_size=WIDTHxHEIGHT"):
        read(path)
    with pytest.raises(BadPosesError, match=r"focal_l: expected the diagonal.*734\.8"):
        read(path, image_size_px=(1920, 1080))


def test_cameras_that_tell_no_single_frame_size_are_refused(tmp_path: Path) -> None:
    content = pose_files.pare_content(walkers())
    content[1]["orig_cam"][:, 0] *= np.linspace(1, 2, 12)
    pose_files.write_joblib(tmp_path / "clip.pkl", content)
    with pytest.raises(BadPosesError, match="one frame size"):
        read(tmp_path / "clip.pkl")
    for person in content.values():
        del person["orig_cam"]
    pose_files.write_joblib(tmp_path / "clip.pkl", content)
    with pytest.raises(BadPosesError, match="image_size"):
        read(tmp_path / "clip.pkl")
    assert len(read(tmp_path / "clip.pkl", image_size_px=(640, 361)).score) == 24


class _Hostile:
    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/should_not_exist_fourdh",))


@pytest.mark.parametrize("layout", ["auto", "phalp", "pare", "pymafx"])
@pytest.mark.parametrize("suffix", ["pkl", "joblib", "npz"])
def test_a_hostile_pickle_is_refused_unread(tmp_path: Path, layout: str, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    path.write_bytes(pickle.dumps({"img/000001.jpg": {"tid": [_Hostile()]}}))
    with pytest.raises(BadPosesError, match=r"system|npz of plain arrays"):
        read(path, layout)
    assert not Path("/tmp/should_not_exist_fourdh").exists()


@pytest.mark.parametrize(
    "content",
    [
        *({}, [], 3, {"a": 1}, {"a": {}}, {1: {"tid": [1], "bbox": 3, "smpl": [{}], "time": 0}}),
        {"x": {"tid": [1], "bbox": [1], "smpl": [1], "time": "now"}},
        {"x": {"tid": 5, "bbox": [1], "smpl": [1], "time": 0, "tracked_time": [0]}},
        {1: {"pred_cam": np.zeros((2, 3)), "bboxes": [1, 2], "frame_ids": [0, 1]}},
        {"pred_cam": None, "bboxes": None, "frame_ids": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["auto", "phalp", "pare", "pymafx"])
def test_a_strange_pickle_is_one_clear_error(tmp_path: Path, content: object, layout: str) -> None:
    pose_files.write_joblib(tmp_path / "clip.pkl", content)
    if content == {} and layout in ("phalp", "pare"):
        assert len(read(tmp_path / "clip.pkl", layout).score) == 0  # a video of no frames
        return
    with pytest.raises(BadPosesError):
        read(tmp_path / "clip.pkl", layout)


@pytest.mark.parametrize("name", ["clip.npz", "clip.pkl"])
def test_a_file_cut_anywhere_is_one_clear_error(tmp_path: Path, name: str) -> None:
    w = walkers(num_frames=2)
    if name == "clip.npz":
        pose_files.write_npz(tmp_path / name, pose_files.npz_content(w))
    else:
        pose_files.write_joblib(tmp_path / name, pose_files.phalp_content(w), compress=True)
    data = (tmp_path / name).read_bytes()
    for stop in [0, 1, 3, *range(10, len(data), max(1, len(data) // 40))]:
        (tmp_path / name).write_bytes(data[:stop])
        with pytest.raises(BadPosesError):
            read(tmp_path / name)


def test_wrong_sources_are_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout: expected auto or one of"):
        open_poses(str(tmp_path), layout="vibe")
    with pytest.raises(ManifestError, match="no file ending in"):
        open_poses(str(tmp_path))
    with pytest.raises(ManifestError, match="not found"):
        open_poses(str(tmp_path / "nowhere"))
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(ManifestError, match=r"a\.parquet: not a Parquet file"):
        open_poses(str(tmp_path)).videos()
    (tmp_path / "b.npz").write_bytes(b"no")
    with pytest.raises(ManifestError, match="one kind of files"):
        open_poses(str(tmp_path))
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "b.pkl").write_bytes(b"no")
    with pytest.raises(ManifestError, match="two files for one video"):
        open_poses(str(tmp_path)).videos()


def test_parquet_with_uneven_lists_is_refused(tmp_path: Path) -> None:
    frame = pose_files.parquet_frame(walkers(), "clip")
    frame["betas"] = [row[: 2 if k == 3 else 10] for k, row in enumerate(frame["betas"])]
    frame.to_parquet(tmp_path / "clip.parquet")
    with pytest.raises(BadPosesError, match="betas: expected lists of one length"):
        read(tmp_path / "clip.parquet")


@pytest.mark.parametrize(
    ("relative", "uri", "expected"),
    [
        ("results/demo_clip.pkl", "/x/results/demo_clip.pkl", "results/demo_clip"),
        ("clip_/pare_output.pkl", "/x/clip_/pare_output.pkl", "clip_"),
        ("output.pkl", "/x/clip/output.pkl", "clip"),
        ("clip/clip_cliff_hr48.npz", "/x/clip/clip_cliff_hr48.npz", "clip/clip"),
        ("a_cliff_res50_infill.npz", "/x/a_cliff_res50_infill.npz", "a"),
        ("v1.2/a.b.npz", "/x/v1.2/a.b.npz", "v1.2/a.b"),
    ],
)
def test_ids_come_from_paths(relative: str, uri: str, expected: str) -> None:
    assert video_id_of(relative, uri) == expected

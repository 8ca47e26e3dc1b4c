"""Tiny files in the layouts of the published data sets."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.evaluate.actions import action_scores
from fourdh_batch.evaluate.datasets import (
    load_ava_actions,
    load_ava_excluded,
    load_emdb,
    load_people,
    load_posetrack,
)
from fourdh_batch.geometry import axis_angle_to_rotmat
from fourdh_batch.storage import Store
from tests.evaluation_files import POSETRACK, emdb, write_emdb

N = 3
RNG = np.random.default_rng(0)


def published_npz(path: Path, **changes: Any) -> str:
    """As 3DPW and Human3.6M come; None leaves a field out."""
    fields = {
        "imgname": np.array([f"imageFiles/a/image_{i:05d}.jpg" for i in range(N)]),
        "center": RNG.uniform(100, 500, (N, 2)),
        "scale": RNG.uniform(100, 500, (N, 2)),
        "body_keypoints_2d": RNG.normal(size=(N, 25, 3)),
        "extra_keypoints_2d": RNG.normal(size=(N, 19, 3)),
        "body_keypoints_3d": np.ones((N, 25, 4), np.float32),
        "extra_keypoints_3d": RNG.normal(size=(N, 19, 4)),
        "body_pose": RNG.normal(size=(N, 72)),
        "extra_info": np.array([{"any": "thing"}] * N, dtype=object),
    } | changes
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    return str(path)


def test_people_come_with_openpose_joints_first(tmp_path: Path) -> None:
    uri = published_npz(tmp_path / "3dpw test.npz")
    people, stored = load_people(uri), np.load(uri)
    assert people.image == stored["imgname"].tolist()
    np.testing.assert_array_equal(people.center_px, stored["center"].astype(np.float32))
    np.testing.assert_array_equal(people.size_px, stored["scale"].astype(np.float32))
    np.testing.assert_allclose(people.keypoints_2d_px[:, 25:], stored["extra_keypoints_2d"])
    np.testing.assert_allclose(people.keypoints_3d_m[:, 25:], stored["extra_keypoints_3d"])
    confidence = people.keypoints_3d_m[:, :25, 3]
    assert confidence.sum(axis=0).tolist() == [3] + [0] * 14 + [3] * 10


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_one_number_of_size_stands_for_both_sides(tmp_path: Path, shape: tuple[int, ...]) -> None:
    people = load_people(published_npz(tmp_path / "a.npz", scale=np.full(shape, 240.0)))
    assert people.size_px.tolist() == [[240, 240]] * N


def test_fields_that_a_data_set_lacks_have_no_confidence(tmp_path: Path) -> None:
    lacking = dict.fromkeys(["body_keypoints_2d", "body_keypoints_3d", "extra_keypoints_3d"])
    people = load_people(published_npz(tmp_path / "hr-lspet_train.npz", **lacking))
    assert not people.keypoints_2d_px[:, :25].any()
    assert not people.keypoints_3d_m.any()
    assert people.keypoints_2d_px[:, 25:].any()


def test_names_may_be_bytes(tmp_path: Path) -> None:
    names = np.array([b"a.jpg", b"b.jpg", b"c.jpg"])
    assert load_people(published_npz(tmp_path / "a.npz", imgname=names)).image[2] == "c.jpg"


def test_numbers_kept_as_objects_are_read_without_running_anything(tmp_path: Path) -> None:
    scale = np.empty(N, dtype=object)
    scale[:] = [100.0, 200.0, 300.0]
    people = load_people(published_npz(tmp_path / "a.npz", scale=scale))
    assert people.size_px[:, 0].tolist() == [100, 200, 300]


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_a_pickle_that_would_call_something_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = np.empty(N, dtype=object)
    bad[:] = [Hostile(), 1, 2]
    uri = published_npz(tmp_path / "a.npz", scale=bad)
    with pytest.raises(ConfigError, match="scale: expected an array of numbers or text"):
        load_people(uri)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"center": None}, "expected the field 'center'"),
        ({"center": np.zeros((N, 3))}, r"center: expected \(3, 2\) numbers, got \(3, 3\)"),
        ({"scale": np.zeros(N)}, "scale: expected more than 0 px"),
        ({"scale": np.ones((N, 3))}, r"scale: expected \(3,\) or \(3, 2\)"),
        ({"scale": np.ones((2, N))}, r"scale: expected \(3,\) or \(3, 2\), got \(2, 3\)"),
        ({"scale": np.array(["a"] * N)}, "scale: expected numbers"),
        ({"imgname": np.array("abc")}, r"imgname: expected \(N,\) names"),
        ({"imgname": np.arange(N)}, r"imgname: expected \(N,\) names"),
        ({"extra_keypoints_2d": np.zeros((N, 24, 3))}, "extra_keypoints_2d: expected"),
    ],
)
def test_a_file_of_another_layout_is_said_clearly(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_people(published_npz(tmp_path / "a.npz", **changes))


def test_nobody_is_no_error_of_shapes(tmp_path: Path) -> None:
    empty = {"imgname": np.zeros(0, "U1"), "center": np.zeros((0, 2))}
    empty |= {f"{part}_keypoints_{d}": None for part in ("body", "extra") for d in ("2d", "3d")}
    for shape in ((0,), (0, 1), (0, 2)):
        uri = published_npz(tmp_path / "a.npz", **empty, scale=np.zeros(shape))
        assert len(load_people(uri)) == 0


def test_a_damaged_member_is_said_clearly(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    center = RNG.normal(size=(200, 2))
    np.savez_compressed(path, imgname=np.array(["a"] * 200), center=center, scale=np.ones(200))
    with zipfile.ZipFile(path) as stored:
        at = stored.getinfo("center.npy").header_offset
    content = bytearray(path.read_bytes())
    content[at + 100 : at + 400] = bytes(300)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.npz: center: expected an array of numbers"):
        load_people(str(path))


def test_what_a_hostile_npz_claims_is_said_clearly(tmp_path: Path) -> None:
    header = io.BytesIO()
    claims = {"descr": "<f8", "fortran_order": False, "shape": (10**13, 2)}
    np.lib.format.write_array_header_1_0(header, claims)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("imgname.npy", header.getvalue())
    with pytest.raises(ConfigError, match="imgname: expected an array of numbers or text"):
        load_people(str(tmp_path / "a.npz"))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.find(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ConfigError, match="encrypted"):
        load_people(str(tmp_path / "a.npz"))


def test_what_is_no_npz_is_said_clearly(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("no zip")
    with pytest.raises(ConfigError, match=r"a\.npz: expected an \.npz"):
        load_people(str(tmp_path / "a.npz"))
    with pytest.raises(FileNotFoundError):
        load_people(str(tmp_path / "b.npz"))


# --- PoseTrack ---------------------------------------------------------------------------------


def test_posetrack_gives_boxes_and_identities_by_video(tmp_path: Path) -> None:
    (tmp_path / "000342_mpii_test.json").write_text(json.dumps(POSETRACK))
    other = json.loads(json.dumps(POSETRACK).replace("000342", "000522"))
    (tmp_path / "000522_mpii_test.json").write_text(json.dumps(other))
    videos = load_posetrack(str(tmp_path))
    assert sorted(videos) == ["000342_mpii_test", "000522_mpii_test"]
    boxes = videos["000342_mpii_test"]
    assert boxes.frame_index.tolist() == [0, 4]
    assert boxes.track_id.tolist() == [7, 7]
    assert boxes.bbox_xyxy_px[1].tolist() == [5, 2, 35, 42]
    single = load_posetrack(str(tmp_path / "000342_mpii_test.json"))
    assert list(single) == ["000342_mpii_test"]


def test_a_posetrack_of_another_layout_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="annotated people"):
        load_posetrack(str(tmp_path))
    (tmp_path / "a.json").write_text('{"annolist": []}')
    with pytest.raises(ConfigError, match=r"a\.json: expected json with images"):
        load_posetrack(str(tmp_path))

    def load(first: dict[str, Any]) -> Any:
        content = json.loads(json.dumps(POSETRACK))
        content["annotations"][0] |= first
        (tmp_path / "a.json").write_text(json.dumps(content))
        return load_posetrack(str(tmp_path))["000342_mpii_test"]

    for nothing in ({"bbox": []}, {"bbox": None}, {"track_id": None}):
        assert load(nothing).track_id.tolist() == [7]
    assert load({"track_id": 2**62 + 1}).track_id.tolist() == [2**62 + 1, 7]  # no double has it
    for bad in ({"bbox": [float("nan")] * 4}, {"bbox": [1, 2]}, {"track_id": 10**30}):
        with pytest.raises(ConfigError, match="expected json with images"):
            load(bad)
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="expected json with images"):
        load_posetrack(str(tmp_path))


# --- EMDB --------------------------------------------------------------------------------------


def test_emdb_comes_in_camera_axes_with_its_good_frames(tmp_path: Path) -> None:
    write_emdb(tmp_path, emdb())
    (sequence,) = load_emdb(str(tmp_path))
    assert (sequence.name, sequence.gender, sequence.is_emdb1) == (
        *("P1_14_outdoor_climb", "female"),
        True,
    )
    assert sequence.images == f"{tmp_path}/P1/14_outdoor_climb/images"
    assert sequence.is_good.tolist() == [True, False, False, True]
    expected = axis_angle_to_rotmat(np.array([0.0, np.pi / 2, 0]))
    np.testing.assert_allclose(sequence.global_orient[3, 0], expected, atol=1e-6)
    assert sequence.body_pose.shape == (4, 23, 3, 3)
    assert sequence.betas.tolist() == list(range(10))


def test_an_emdb_of_another_layout_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got none"):
        list(load_emdb(str(tmp_path)))
    write_emdb(tmp_path / "a", emdb(smpl={}))
    with pytest.raises(ConfigError, match=r"_data\.pkl: expected the fields of EMDB"):
        list(load_emdb(str(tmp_path / "a")))
    nan = emdb()
    nan["smpl"]["poses_body"][3] = np.nan
    write_emdb(tmp_path / "c", nan)
    with pytest.raises(ConfigError, match="good frame are not finite"):
        list(load_emdb(str(tmp_path / "c")))
    write_emdb(tmp_path / "b", Hostile())
    with pytest.raises(CheckpointError, match="print"):
        list(load_emdb(str(tmp_path / "b")))


# --- AVA ---------------------------------------------------------------------------------------


def test_ava_files_of_all_kinds_of_lines(tmp_path: Path) -> None:
    truth = "v,902,0.1,0.1,0.3,0.9,12,0\nv,0902,0.1,0.1,0.3,0.9,80,0\nv,903\nv,904,0,0,1,1,,3\n"
    found = "v,0902,0.1,0.1,0.3,0.9,12,0.9\nv,0903,0,0,1,1,80,0.8\nw,0902,0,0,1,1,12,0.95\n"
    store = Store(str(tmp_path))
    store.write_bytes("truth.csv", truth.encode())
    store.write_bytes("found.csv", found.encode())
    store.write_bytes("excluded.csv", b"v,0903\n")
    true = load_ava_actions(str(tmp_path / "truth.csv"), scored=False)
    assert true.frame.tolist() == ["v,0902", "v,0902", "v,0903", "v,0904"]
    assert true.action_id.tolist() == [12, 80, 0, 0]
    seen = load_ava_actions(str(tmp_path / "found.csv"), scored=True)
    assert seen.score.tolist() == [0.9, 0.8, 0.95]
    scores = action_scores(true, seen)  # video w is not in the truth
    assert scores.ap == {12: 1, 80: 0}
    assert scores.mean_ap == 0.5
    assert scores.by_kind["person_movement"] == 1
    assert load_ava_excluded(str(tmp_path / "excluded.csv")) == {"v,0903"}


def test_an_ava_line_of_another_layout_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("v,902,0.1,0.1,0.3,0.9,12,0.5\nv,902,left,0.1,0.3,0.9,12,0.5\n")
    with pytest.raises(ConfigError, match=r"a\.csv, line 2: expected video, second"):
        load_ava_actions(str(path), scored=True)
    for bad in ("0,0,1,1,0,0.5", "0,0,1,1,81,0.5", "0,0,1,1,12,nan", "0,inf,1,1,12,0.5"):
        path.write_text(f"v,902,{bad}\n")
        with pytest.raises(ConfigError, match="line 1: expected video, second"):
            load_ava_actions(str(path), scored=True)
    path.write_text("v" * 200_000)
    with pytest.raises(ConfigError, match=r"a\.csv: expected csv"):
        load_ava_actions(str(path), scored=True)

"""The paper's tables on tiny copies of the data sets, with an untrained model."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from fourdh_batch.config import EvaluateConfig
from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.evaluate.benchmarks import NOT_GIVEN, Figure, evaluate_benchmarks, predict
from fourdh_batch.evaluate.pose import pa_mpjpe_mm
from fourdh_batch.geometry import crop_square, crop_to_image
from fourdh_batch.models.build import untrained_hmr2
from fourdh_batch.models.hmr2 import Hmr2
from fourdh_batch.models.smpl import OPEN_BODY_PATH, SmplBody, load_body
from fourdh_batch.video.crops import crop_batch
from tests.evaluation_files import POSETRACK, emdb, people, write_emdb, write_root
from tests.weights import untrained_hmr2_file

N = 5


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(scope="module")
def model(body: SmplBody) -> Hmr2:
    return untrained_hmr2("tiny", body, device="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data set") / "images"
    (folder / "val").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 255, (90 + i, 120, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "val" / f"{i}.png"), pixels)
    return folder


NAMES = np.array([f"val/{i}.png" for i in (0, 0, 1, 2, 2)])
CENTER = np.array([[60, 45], [30, 40], [70, 50], [50, 50], [10, 80]], np.float32)
SIZE = np.array([[40, 80], [30, 30], [50, 20], [40, 60], [20, 40]], np.float32)


def by_name(figures: list[Figure]) -> dict[tuple[str, str], Figure]:
    return {(one.dataset, one.measure): one for one in figures}


def evaluated(model: Hmr2, given: EvaluateConfig) -> dict[tuple[str, str], Figure]:
    figures = evaluate_benchmarks(
        given, load_model=lambda: model, load_body=lambda path: load_body(path)
    )
    return by_name(figures)


def predicted_by_hand(model: Hmr2, images: Path) -> tuple[np.ndarray, np.ndarray]:
    """One person at a time: (N, 44, 3) m and (N, 44, 2) px."""
    points, pixels = [], []
    for name, center, size in zip(NAMES, CENTER, SIZE, strict=True):
        rgb = cv2.imread(str(images / name))[..., ::-1].copy()
        corners = np.concatenate((center - size / 2, center + size / 2))[None]
        middle, side = crop_square(corners)
        crop = crop_batch(
            *(torch.from_numpy(rgb)[None], torch.zeros(1, dtype=torch.int64)),
            *(torch.from_numpy(middle), torch.from_numpy(side)),
        )
        with torch.inference_mode():
            out = model(crop)
        points.append(out.keypoints_3d[0].numpy())
        pixels.append(crop_to_image(out.keypoints_2d.numpy(), middle, side)[0])
    return np.stack(points), np.stack(pixels)


def test_nothing_given_is_said_for_every_figure_and_loads_nothing() -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("loaded")

    figures = evaluate_benchmarks(EvaluateConfig(), load_model=fail, load_body=fail)
    assert all(one.ours is None and one.note.startswith(NOT_GIVEN) for one in figures)
    rows = by_name(figures)
    assert rows["3DPW", "PA-MPJPE mm"].paper == {"HMR 2.0b": 54.3, "HMR 2.0a": 44.5}
    assert list(dict.fromkeys(one.section for one in figures)) == [
        *("Table 1: 3D pose", "Table 2: 2D pose", "Table 3: tracking"),
        *("Table 4: action recognition", "3D pose, not in the paper"),
    ]


def test_truth_made_of_predictions_gives_exact_figures(
    tmp_path: Path, model: Hmr2, images: Path
) -> None:
    points, pixels = predicted_by_hand(model, images)
    fields = {"imgname": NAMES, "center": CENTER, "scale": SIZE}
    moved = points.copy()
    moved[:, 25, 0] += 0.07  # one of fourteen keypoints
    confidence = np.ones((N, 44, 1), np.float32)
    space = np.concatenate(
        (moved + np.array([1, 2, 3]), confidence), axis=-1
    )  # wherever the camera is
    np.savez(tmp_path / "3dpw_test.npz", **fields, extra_keypoints_3d=space[:, 25:])
    seen = np.concatenate((pixels, confidence), axis=-1)
    # of longer sides 80, 30, 50, 60, 40: off by 4.5 px, which is 0.05625, 0.15, 0.09, 0.075, 0.1125
    seen[:, 0, 0] += 4.5
    seen[:, 30, 2] = 0.5  # counts nowhere
    np.savez(
        tmp_path / "coco_val.npz",
        **fields,
        body_keypoints_2d=seen[:, :25],
        extra_keypoints_2d=seen[:, 25:],
    )
    given = EvaluateConfig(
        metadata=str(tmp_path), images_3dpw=str(images), images_coco=f"{images}/"
    )
    rows = evaluated(model, given)
    assert rows["3DPW", "MPJPE mm"].ours == pytest.approx(5, rel=1e-3)
    aligned = pa_mpjpe_mm(points, moved).mean()
    assert rows["3DPW", "PA-MPJPE mm"].ours == pytest.approx(aligned, rel=1e-3)
    assert rows["COCO", "PCK@0.05"].ours == pytest.approx(42 / 43)
    assert rows["COCO", "PCK@0.1"].ours == pytest.approx((42 + 0.6) / 43)
    assert rows["3DPW", "MPJPE mm"].note == "5 people"
    assert rows["Human3.6M", "MPJPE mm"].ours is None


def test_results_do_not_depend_on_the_batch(model: Hmr2, images: Path) -> None:
    names = [str(images / name) for name in NAMES]
    corners = np.concatenate((CENTER - SIZE / 2, CENTER + SIZE / 2), axis=1)
    all_ = predict(model, names, corners, batch_size=8)
    few = predict(model, names, corners, batch_size=2)
    np.testing.assert_allclose(all_.keypoints_3d_m, few.keypoints_3d_m, atol=1e-5)


def larger_body(path: Path, by: float) -> str:
    """The open body, so many times larger, as a file."""
    with np.load(OPEN_BODY_PATH) as stored:
        arrays = {name: stored[name] for name in stored.files}
    lengths = {name: arrays[name] * by for name in ("v_template", "shapedirs", "posedirs")}
    np.savez(path, **{**arrays, **lengths})
    return str(path)


def test_emdb_is_scored_on_its_good_frames_with_the_body_of_its_gender(
    tmp_path: Path, model: Hmr2, body: SmplBody
) -> None:
    truth = emdb()  # frames 0 and 3 are good, and alike
    picture = np.full((200, 150, 3), 99, "u1")
    cv2.imwrite(str(tmp_path / "picture.png"), picture)
    box = truth["bboxes"]["bboxes"][:1].astype(np.float32)
    found = predict(model, [str(tmp_path / "picture.png")], box)
    root = truth["camera"]["extrinsics"][0, :3, :3].T @ found.global_orient[0, 0]  # in the world
    truth["smpl"]["poses_root"][:] = Rotation.from_matrix(root).as_rotvec()
    pose = Rotation.from_matrix(found.body_pose[0]).as_rotvec()
    truth["smpl"]["poses_body"][:] = pose.reshape(-1)
    truth["smpl"]["betas"] = found.betas[0]
    folder = write_emdb(tmp_path / "emdb", truth)
    (folder / "images").mkdir()
    for frame in (0, 3):  # no other frame is opened
        written = cv2.imencode(".png", picture)[1].tobytes()
        (folder / "images" / f"{frame:05d}.jpg").write_bytes(written)
    like_neutral, larger = str(OPEN_BODY_PATH), larger_body(tmp_path / "larger.npz", 1.1)

    def rows(female: str, male: str) -> list[float]:
        given = EvaluateConfig(emdb=str(tmp_path / "emdb"), smpl_female=female, smpl_male=male)
        figures = evaluated(model, given)
        assert figures["EMDB 1", "PVE mm"].note == "2 frames of 1 videos"
        measures = ("MPJPE mm", "PA-MPJPE mm", "PVE mm")
        return [figures["EMDB 1", measure].ours or 0 for measure in measures]

    assert rows(like_neutral, larger) == pytest.approx([0, 0, 0], abs=1e-2)
    with torch.inference_mode():
        arrays = (found.global_orient, found.body_pose, found.betas)
        posed = body(*map(torch.from_numpy, arrays))
    middle = posed.joints[:, [1, 2]].mean(dim=1, keepdim=True)
    off = [100 * float((p - middle).norm(dim=2).mean()) for p in (posed.joints, posed.vertices)]
    assert rows(larger, like_neutral) == pytest.approx([off[0], 0, off[1]], rel=1e-3, abs=1e-2)
    with pytest.raises(ConfigError, match="smpl_male"):
        evaluated(model, EvaluateConfig(emdb=str(tmp_path / "emdb")))


def test_emdb_is_not_scored_with_a_body_of_other_vertices(tmp_path: Path, model: Hmr2) -> None:
    write_emdb(tmp_path, emdb())
    with np.load(OPEN_BODY_PATH) as stored:
        arrays = {name: stored[name] for name in stored.files}
    faces = np.roll(arrays["f"], 1, axis=0)
    np.savez(tmp_path / "smpl.npz", **{**arrays, "f": faces, "body_name": "smpl"})
    smpl = str(tmp_path / "smpl.npz")
    given = EvaluateConfig(emdb=str(tmp_path), smpl_female=smpl, smpl_male=smpl)
    with pytest.raises(ConfigError, match=r"hmr.body: .* another surface \(open, theirs is smpl\)"):
        evaluated(model, given)


def test_posetrack_counts_annotated_frames_and_missing_videos(tmp_path: Path, model: Hmr2) -> None:
    pytest.importorskip("trackeval")
    video = "000342_mpii_test"
    boxes = [[100 + f, 0, 100, 200] for f in (0, 4)]  # person 1 of `people`
    content = json.loads(json.dumps(POSETRACK))
    for annotation, box in zip(content["annotations"], boxes, strict=False):
        annotation["bbox"] = box
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / f"{video}.json").write_text(json.dumps(content))
    root = write_root(str(tmp_path / "tables"), {video: people(video)})
    given = EvaluateConfig(posetrack_annotations=str(folder), posetrack_tables=root)
    rows = evaluated(model, given)
    # In frames 0 and 4 the second person of the tables is a false alarm.
    assert rows["PoseTrack", "MOTA"].ours == 0
    assert rows["PoseTrack", "IDF1"].ours == pytest.approx(100 * 2 / 3)
    assert rows["PoseTrack", "IDs"].ours == 0
    assert rows["PoseTrack", "MOTA at IoU 0.5"].ours == 0
    table = people(video)
    seen = ["detected" if track == 1 else "predicted" for track in table["track_id"].to_pylist()]
    ghosts = write_root(str(tmp_path / "ghosts"), {video: people(video, state=seen)})
    figures = evaluated(model, replace(given, posetrack_tables=ghosts))
    for measure in ("MOTA", "MOTA at IoU 0.5", "HOTA", "IDF1"):
        assert figures["PoseTrack", measure].ours == pytest.approx(100)  # ghosts do not count
    (folder / "gone.json").write_text(json.dumps(content).replace("000342", "000999"))
    rows = evaluated(model, given)
    assert "1 without a result count as misses: 000999_mpii_test" in rows["PoseTrack", "MOTA"].note
    assert rows["PoseTrack", "HOTA"].ours == pytest.approx(50 * np.sqrt(0.5))


def test_actions_are_scored_when_predictions_are_given(tmp_path: Path, model: Hmr2) -> None:
    (tmp_path / "t.csv").write_text("v,902,0.1,0.1,0.3,0.9,12,0\nv,0902,0.1,0.1,0.3,0.9,80,0\n")
    (tmp_path / "f.csv").write_text("v,0902,0.1,0.1,0.3,0.9,12,0.9\n")
    given = EvaluateConfig(ava_truth=str(tmp_path / "t.csv"), ava_found=str(tmp_path / "f.csv"))
    rows = evaluated(model, given)
    assert rows["AVA", "mAP"].ours == 50
    assert rows["AVA", "mAP person movement"].ours == 100
    assert rows["AVA", "mAP"].note == "no second is left out"
    none = rows["AVA", "mAP object manipulation"]
    assert (none.ours, none.note) == (None, "no such action in the truth")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"images_3dpw": "/x"}, "evaluate.metadata: needed with evaluate.images_3dpw"),
        ({"posetrack_tables": "/x"}, "evaluate.posetrack_annotations: needed"),
        ({"ava_truth": "/x", "ava_excluded": "/y"}, "evaluate.ava_found: needed"),
    ],
)
def test_a_data_set_given_in_part_is_usage(model: Hmr2, given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        evaluated(model, EvaluateConfig(**given))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "s3://other/place.png"])
def test_names_of_images_never_lead_out_of_their_folder(
    tmp_path: Path, model: Hmr2, images: Path, name: str
) -> None:
    keypoints = np.ones((1, 19, 3))
    np.savez(
        tmp_path / "coco_val.npz",
        imgname=np.array([name]),
        center=CENTER[:1],
        scale=SIZE[:1],
        extra_keypoints_2d=keypoints,
    )
    given = EvaluateConfig(metadata=str(tmp_path), images_coco=str(images))
    with pytest.raises(ConfigError, match="expected a name below"):
        evaluated(model, given)


@pytest.mark.parametrize(
    ("keypoint", "said"),
    [((1.0, 2.0, 0.5), "got none with confidence"), ((np.nan, 2.0, 1.0), "finite keypoints")],
)
def test_keypoints_that_give_no_figure_are_refused(
    tmp_path: Path, model: Hmr2, images: Path, keypoint: tuple[float, ...], said: str
) -> None:
    np.savez(
        tmp_path / "coco_val.npz",
        imgname=NAMES[:1],
        center=CENTER[:1],
        scale=SIZE[:1],
        extra_keypoints_2d=np.tile(keypoint, (1, 19, 1)),
    )
    given = EvaluateConfig(metadata=str(tmp_path), images_coco=str(images))
    with pytest.raises(ConfigError, match=said):
        evaluated(model, given)


def test_a_model_that_gives_nan_is_said(body: SmplBody, images: Path) -> None:
    broken = untrained_hmr2("tiny", body, device="cpu")
    for parameter in broken.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="expected finite bodies"):
        predict(broken, [str(images / NAMES[0])], np.array([[0, 0, 10, 10]], np.float32))


def test_a_broken_or_missing_image_is_named(tmp_path: Path, model: Hmr2) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    box = np.array([[0, 0, 10, 10]], np.float32)
    with pytest.raises(ConfigError, match=r"bad\.png: expected an image"):
        predict(model, [str(tmp_path / "bad.png")], box)
    with pytest.raises(FileNotFoundError):
        predict(model, [str(tmp_path / "gone.png")], box)


def test_the_job_prints_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], images: Path
) -> None:
    path = Path(__file__).resolve().parents[2] / "jobs" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("evaluate_job", path)
    assert spec is not None
    assert spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    np.savez(
        tmp_path / "hr-lspet_train.npz",
        imgname=NAMES,
        center=CENTER,
        scale=SIZE,
        extra_keypoints_2d=np.ones((N, 19, 3)),
    )
    words = [
        *(f"hmr.weights={untrained_hmr2_file()}", "hmr.size=tiny", "hmr.device=cpu"),
        *(f"evaluate.metadata={tmp_path}", f"evaluate.images_lsp={images}"),
    ]
    assert job.main(["--help"]) == 0
    assert "evaluate.posetrack_tables" in capsys.readouterr().out
    assert job.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "HMR 2.0: size tiny, untrained weights" in said
    assert "0.53 (HMR 2.0b)" in said
    assert job.main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["figures"]
    ours = {(row["dataset"], row["measure"]): row["ours"] for row in rows}
    assert 0 <= ours["LSP-Extended", "PCK@0.1"] <= 1
    assert ours["3DPW", "MPJPE mm"] is None
    assert job.main(["evaluate.images_lsp=/x"]) == 2
    assert "needed with" in capsys.readouterr().err

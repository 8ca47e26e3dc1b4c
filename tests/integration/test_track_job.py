"""Tracking again, end to end: every layout, our own tables, reruns, broken and hostile files."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import fourdh_batch as fb
from fourdh_batch.config import load_config
from fourdh_batch.errors import (
    BadPosesError,
    CheckpointError,
    ConfigError,
    ManifestError,
    OutputInUseError,
    SchemaError,
)
from fourdh_batch.geometry import project_full_image
from fourdh_batch.models import build_phalp
from fourdh_batch.pipeline import retrack as retrack_module
from fourdh_batch.pipeline.job import RunReport
from fourdh_batch.pipeline.retrack import resolved, retrack
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import Lease
from fourdh_batch.tables.schema import make_table
from fourdh_batch.tables.writer import SavedSpool, WorkSpool, publish_shard
from tests import pose_files
from tests.pose_files import WRITERS, walkers
from tests.weights import untrained_predictor_file

REPO = Path(__file__).resolve().parents[2]
YAML = REPO / "jobs" / "track.yaml"


def run(source: Path, output: Path, *words: str) -> RunReport:
    words = (f"input={source}", f"output={output}", "poses.workers=1", *words)
    return retrack(load_config(YAML, words))


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_becomes_tables_in_which_people_keep_their_ids(
    tmp_path: Path, layout: str
) -> None:
    w = walkers(num_frames=20, empty=(9,))
    name, write = WRITERS[layout]
    write(tmp_path / "in" / name, w)
    report = run(tmp_path / "in", tmp_path / "out", "poses.image_size=640x361")
    assert report.exit_code == 0
    assert report.videos("ok") == 1

    tracks = pd.read_parquet(tmp_path / "out" / "tracks")
    detected = tracks[tracks["state"] == "detected"]
    assert len(detected) == 38
    assert set(tracks["video_id"]) == {"clip"}
    assert set(tracks["weights"]) == {"given"}
    assert detected["track_id"].nunique() == 2
    # People, by their betas, and identities, are the same.
    people = {round(float(row[0]), 4) for row in detected["betas"]}
    pairs = set(
        zip(detected["track_id"], [round(float(b[0]), 4) for b in detected["betas"]], strict=True)
    )
    assert len(people) == len(pairs) == 2
    # The empty frame was looked at: both people are completed there.
    predicted = tracks[tracks["state"] == "predicted"]
    assert predicted["frame_index"].tolist() == [9, 9]

    arrays = fb.smpl_arrays(detected)
    origin = project_full_image(
        np.zeros((len(detected), 1, 3)),
        arrays["cam_t_m"],
        detected["focal_px"].to_numpy(),
        arrays["principal_point_px"],
    )[:, 0]
    order = np.lexsort((w.person, w.frame_index))
    truth = project_full_image(
        np.zeros((38, 1, 3)), w.cam_t_m[order], 5000 / 256 * 640, (320.0, 180.5)
    )[:, 0]
    for k, frame in enumerate(detected["frame_index"]):
        here = truth[w.frame_index[order] == frame]
        assert np.abs(here - origin[k]).max(1).min() < 0.05

    videos = fb.read_table(str(tmp_path / "out"), "videos")
    assert videos[
        ["status", "width", "height", "frames_decoded", "num_tracks"]
    ].values.tolist() == [["ok", 640, 361, 20, 2]]
    assert videos["codec"].isna().all()
    assert videos["fps"].tolist() == ([25.0] if layout in ("npz", "parquet") else [None]) or (
        videos["fps"].isna().all()
    )
    detections = fb.read_table(str(tmp_path / "out"), "detections")
    assert len(detections) == 38
    assert set(detections["mask_source"]) == {"box"}
    assert fb.read_table(str(tmp_path / "out"), "failures").empty


def test_a_rerun_does_nothing_and_other_settings_or_poses_redo(tmp_path: Path) -> None:
    w = walkers(num_frames=10)
    pose_files.write_npz(tmp_path / "in" / "a.npz", pose_files.npz_content(w))
    pose_files.write_npz(tmp_path / "in" / "b.npz", pose_files.npz_content(w))
    out = tmp_path / "out"
    assert run(tmp_path / "in", out).videos("ok") == 2
    parts = {p: p.read_bytes() for p in out.rglob("part-*.parquet")}
    stamps = {p: p.stat().st_mtime_ns for p in parts}
    report = run(tmp_path / "in", out)
    assert (len(report.shards), report.num_shards_before, report.exit_code) == (0, 1, 0)
    assert {p: p.stat().st_mtime_ns for p in parts} == stamps
    assert not list((out / "_work").rglob("*.*"))

    assert len(run(tmp_path / "in", out, "tracker.n_init=3").shards) == 1
    assert len(run(tmp_path / "in", out).shards) == 1
    assert {p: p.read_bytes() for p in parts} == parts  # and back: the same bytes

    pose_files.write_npz(tmp_path / "in" / "c.npz", pose_files.npz_content(w))
    report = run(tmp_path / "in", out)
    assert ([shard.num_videos for shard in report.shards], report.changes) == ([1], {"new": 1})
    content = pose_files.npz_content(w) | {"score": np.full(20, 0.5)}
    pose_files.write_npz(tmp_path / "in" / "c.npz", content)
    report = run(tmp_path / "in", out)
    assert ([shard.num_videos for shard in report.shards], report.changes) == ([1], {"changed": 1})

    (tmp_path / "in" / "a.npz").unlink()
    with pytest.raises(ManifestError, match="would remove 1 finished videos"):
        run(tmp_path / "in", out, "tracker.n_init=2")
    run(tmp_path / "in", out, "plan.remove_missing=true")
    assert sorted(fb.read_table(str(out), "videos")["video_id"]) == ["b", "c"]


def test_the_pose_predictor_counts_by_its_content(tmp_path: Path) -> None:
    from fourdh_batch.models.build_phalp import save_pose_predictor, untrained_pose_predictor

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        predictor = untrained_pose_predictor(seed)
        save_pose_predictor(predictor, tmp_path / f"{name}.safetensors")
    w = walkers(num_frames=10)
    pose_files.write_npz(tmp_path / "in" / "a.npz", pose_files.npz_content(w))

    def shards(weights: str) -> int:
        word = f"tracker.predictor_weights={tmp_path / weights}.safetensors"
        return len(run(tmp_path / "in", tmp_path / "out", word).shards)

    assert (shards("a"), shards("b"), shards("c")) == (1, 0, 1)
    with pytest.raises(CheckpointError, match=r"d\.safetensors: no such file"):
        shards("d")


def test_a_predictor_too_short_to_complete_is_refused_before_any_work(tmp_path: Path) -> None:
    from fourdh_batch.models.build_phalp import save_pose_predictor, untrained_pose_predictor
    from fourdh_batch.models.predictor import PredictorSize

    size = PredictorSize(dim=24, depth=1, num_heads=3, head_dim=8, mlp_dim=40, frame_length=95)
    weights = tmp_path / "short.safetensors"
    save_pose_predictor(untrained_pose_predictor(size=size), weights)
    pose_files.write_npz(tmp_path / "in" / "a.npz", pose_files.npz_content(walkers()))
    expected = r"short\.safetensors: expected more than 96 frames, .* got 95"
    with pytest.raises(CheckpointError, match=expected):
        run(tmp_path / "in", tmp_path / "out", f"tracker.predictor_weights={weights}")
    assert not (tmp_path / "out").exists()


def test_no_gpu_is_used_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    w = walkers(num_frames=10, empty=(4,))
    pose_files.write_npz(tmp_path / "in" / "a.npz", pose_files.npz_content(w))
    devices = []
    load = build_phalp.load_pose_predictor

    def spied(weights: str, *, device: Any = "cpu") -> Any:
        devices.append(str(device))
        return load(weights, device=device)

    monkeypatch.setattr(build_phalp, "load_pose_predictor", spied)
    words = [f"tracker.predictor_weights={untrained_predictor_file()}", "tracker.device=auto"]
    assert run(tmp_path / "in", tmp_path / "out", *words).exit_code == 0
    assert set(devices) == {"cpu"}
    words[1] = "tracker.device=cpu"  # the same job
    assert run(tmp_path / "in", tmp_path / "out", *words).num_shards_before == 1
    config = load_config(YAML, ["tracker.device=cuda", "poses.layout=npz"])
    assert resolved(config).tracker.device == "cuda"


def test_two_processes_give_the_same_tables_as_one(tmp_path: Path) -> None:
    w = walkers(num_frames=8)
    clips = {f"clip {k}": w for k in range(3)}
    pose_files.write_parquet(tmp_path / "in" / "clips.parquet", clips)
    assert run(tmp_path / "in", tmp_path / "one", "plan.videos_per_shard=2").exit_code == 0
    words = ["poses.workers=2", "plan.videos_per_shard=2"]
    assert run(tmp_path / "in", tmp_path / "two", *words).exit_code == 0
    for name in ("tracks", "detections", "videos"):
        one, two = (pd.read_parquet(tmp_path / root / name) for root in ("one", "two"))
        pd.testing.assert_frame_equal(one, two, check_exact=True)


class _Hostile:
    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/should_not_exist_fourdh",))


def test_broken_and_hostile_files_are_reported_beside_good_ones(tmp_path: Path) -> None:
    w = walkers(num_frames=8)
    pose_files.write_joblib(tmp_path / "in" / "good.pkl", pose_files.phalp_content(w))
    (tmp_path / "in" / "hostile.pkl").write_bytes(pickle.dumps({"a": _Hostile()}))
    (tmp_path / "in" / "cut.pkl").write_bytes((tmp_path / "in" / "good.pkl").read_bytes()[:5000])
    (tmp_path / "in" / "empty.npz").touch()
    bad = pose_files.npz_content(w) | {"betas": np.zeros(3)}
    pose_files.write_npz(tmp_path / "in" / "shape.npz", bad)
    report = run(tmp_path / "in", tmp_path / "out")
    assert report.exit_code == 3
    videos = fb.read_table(str(tmp_path / "out"), "videos").set_index("video_id")
    assert videos["status"].to_dict() == {
        "good": "ok",
        "hostile": "failed",
        "cut": "failed",
        "empty": "failed",
        "shape": "failed",
    }
    failures = fb.read_table(str(tmp_path / "out"), "failures").set_index("video_id")
    assert set(failures["code"]) == {"BAD_POSES"}
    assert "system" in failures.loc["hostile", "message"]
    assert "betas: expected" in failures.loc["shape", "message"]
    assert not Path("/tmp/should_not_exist_fourdh").exists()
    assert run(tmp_path / "in", tmp_path / "out").exit_code == 3  # still broken, not redone


@pytest.mark.parametrize("error", [RuntimeError("no luck"), BadPosesError("no", stage="track")])
def test_an_unexpected_error_costs_one_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for name in "abc":
        pose_files.write_npz(tmp_path / "in" / f"{name}.npz", pose_files.npz_content(walkers()))
    chunks_of = retrack_module.chunks_of

    def broken(poses: Any, video_id: str, config: Any, models: Any) -> Any:
        yield from chunks_of(poses, video_id, config, models)
        if video_id == "b":
            raise error

    monkeypatch.setattr(retrack_module, "chunks_of", broken)
    words = ["tracker.texture_weights=/not/wanted/here.pth"]
    assert run(tmp_path / "in", tmp_path / "out", *words).exit_code == 3
    out = str(tmp_path / "out")
    videos = fb.read_table(out, "videos").set_index("video_id")
    assert videos["status"].to_dict() == {"a": "ok", "b": "quarantined", "c": "ok"}
    assert set(fb.read_tracks(out)["video_id"]) == {"a", "c"}  # nothing of half a video
    [failure] = fb.read_table(out, "failures").to_dict("records")
    is_ours = isinstance(error, BadPosesError)
    assert failure["code"] == ("BAD_POSES" if is_ours else "WORKER_DIED")
    assert (failure["video_id"], failure["stage"]) == ("b", "track")
    assert failure["message"] == ("no" if is_ours else "RuntimeError: no luck")
    monkeypatch.setattr(retrack_module, "chunks_of", chunks_of)
    report = run(tmp_path / "in", tmp_path / "out", *words, "plan.retry_quarantined=true")
    assert (report.exit_code, report.videos("ok")) == (0, 3)


@pytest.mark.parametrize("kind", [ConfigError, CheckpointError, SchemaError])
def test_errors_of_settings_weights_and_schema_stop_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    pose_files.write_npz(tmp_path / "in" / "a.npz", pose_files.npz_content(walkers()))

    def broken(*args: Any) -> Any:
        raise kind("stop")

    monkeypatch.setattr(retrack_module, "chunks_of", broken)
    with pytest.raises(kind, match="stop"):
        run(tmp_path / "in", tmp_path / "out")


def test_unusable_people_are_refused_one_by_one(tmp_path: Path) -> None:
    w = walkers(num_frames=10)
    content = pose_files.npz_content(w)
    content["poses"][6] = np.nan
    content["pred_cam"] = w.pred_cam.copy()
    content["pred_cam"][9, 0] = -1
    content["bbox_xyxy_px"] = w.bbox_xyxy_px.copy()
    content["bbox_xyxy_px"][12, 2:] = content["bbox_xyxy_px"][12, :2]
    content["score"] = np.full(20, 0.9)
    content["score"][15] = 0.4
    pose_files.write_npz(tmp_path / "in" / "clip.npz", content)
    words = ["detector.score_threshold=0.5", "tracker.n_init=2"]
    assert run(tmp_path / "in", tmp_path / "out", *words).exit_code == 0
    detections = fb.read_table(str(tmp_path / "out"), "detections")
    reasons = detections["drop_reason"].dropna()
    assert reasons.to_dict() == {
        6: "invalid_pose",
        9: "invalid_pose",
        12: "invalid_pose",
        15: "low_score",
    }


def test_ids_with_dots_stay_below_the_output(tmp_path: Path) -> None:
    names = ["../../evil", "/etc/passwd", "a/../b", "ü"]
    clips = {name: walkers(num_frames=6) for name in names}
    pose_files.write_parquet(tmp_path / "in" / "clips.parquet", clips)
    before = set(tmp_path.rglob("*"))
    assert run(tmp_path / "in", tmp_path / "x" / "out").exit_code == 0
    new = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "x") for path in new)
    assert sorted(fb.read_table(str(tmp_path / "x" / "out"), "videos")["video_id"]) == sorted(names)


# --- from our own tables -----------------------------------------------------------------------


def test_our_own_output_is_tracked_again_to_the_same_rows(tmp_path: Path) -> None:
    w = walkers(num_frames=20, empty=(9,))
    content = pose_files.npz_content(w) | {
        "is_shot_start": w.frame_index == 14,
        "appearance": np.eye(256)[w.person],
    }
    content["betas"] = content["betas"].copy()
    content["betas"][7] = np.nan
    pose_files.write_npz(tmp_path / "in" / "clip.npz", content)
    first, again = tmp_path / "first", tmp_path / "again"
    assert run(tmp_path / "in", first, "tracker.store_appearance=true").exit_code == 0
    report = run(first, again, "tracker.store_appearance=true")
    assert report.exit_code == 0
    assert report.card.detector == "poses:ours"
    before, after = (fb.read_tracks(str(root)) for root in (first, again))
    assert set(after["shot_id"]) == {0, 1}
    drop = ["model_fingerprint"]
    pd.testing.assert_frame_equal(before.drop(columns=drop), after.drop(columns=drop))
    kept = ["model_fingerprint", "detector"]
    one, two = (
        fb.read_table(str(root), "detections").drop(columns=kept) for root in (first, again)
    )
    pd.testing.assert_frame_equal(one, two)
    videos = fb.read_table(str(again), "videos")
    assert videos["frames_decoded"].tolist() == [20]
    assert videos["num_shots"].tolist() == [2]
    assert videos["fps"].tolist() == [25.0]
    assert run(first, again, "tracker.store_appearance=true").num_shards_before == 1
    assert len(run(first, again, "poses.looks=false").shards) == 1
    report = run(first, again, "tracker.box_weight=2", "tracker.log_cost=true")
    assert len(report.shards) == 1
    assert report.card.cues.endswith(" + compact looks where given + boxes + log cost")


def test_output_without_stored_bodies_is_tracked_from_its_tracks(tmp_path: Path) -> None:
    w = walkers(num_frames=20, empty=(9,))
    pose_files.write_npz(tmp_path / "in" / "clip.npz", pose_files.npz_content(w))
    first, again = tmp_path / "first", tmp_path / "again"
    run(tmp_path / "in", first)
    assert run(first, again, "tracker.max_age=0").exit_code == 0
    tracks = fb.read_tracks(str(again))
    assert (tracks["state"] == "detected").all()
    assert tracks["track_id"].nunique() == 4  # nobody outlives the empty frame
    assert fb.read_table(str(again), "videos")["frames_decoded"].tolist() == [20]


def test_what_the_decoder_said_is_kept(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "first"))
    names = {"dataset": "d", "uri": "/v.mp4", "content_fingerprint": "c", "model_fingerprint": "m"}
    spool = WorkSpool(store, "s")
    for video_id, status in (("gone.mp4", "failed"), ("part.mp4", "partial")):
        spool.begin(video_id)
        row = {
            **names,
            "video_id": video_id,
            "shard_id": "s",
            "status": status,
            "frames_decoded": 0 if status == "failed" else 4,
            "num_shots": 0,
            "num_tracks": 0,
            "num_detections": 0,
        }
        if status == "partial":
            lost = {"code": "CORRUPT", "message": "x", "first_frame_index": 1}
            row |= {"codec": "h264", "damage": json.dumps([lost | {"last_frame_index": 2}])}
        spool.append("videos", make_table("videos", row, num_rows=1))
        failure = {
            **names,
            "video_id": video_id,
            "shard_id": "s",
            "stage": "decode",
            "error_class": "CorruptVideoError",
            "code": "CORRUPT",
            "message": "x",
            "frame_index": np.int64(1),
            "attempts": 1,
        }
        spool.append("failures", make_table("failures", failure, num_rows=1))
        spool.finish({"track_len": {}})
    spool.save()
    saved = SavedSpool(store, "s", spool.name)
    publish_shard(
        store,
        shard_id="s",
        dataset="d",
        videos={"gone.mp4": saved, "part.mp4": saved},
        fingerprint="f",
        config_fingerprint="c",
        model_fingerprint="m",
    )
    assert run(tmp_path / "first", tmp_path / "again").exit_code == 3
    videos = fb.read_table(str(tmp_path / "again"), "videos").set_index("video_id")
    assert videos["status"].to_dict() == {"gone.mp4": "failed", "part.mp4": "partial"}
    assert videos["frames_decoded"].to_dict() == {"gone.mp4": 0, "part.mp4": 4}
    assert videos.loc["part.mp4", "codec"] == "h264"
    assert videos.loc["part.mp4", "uri"] == "/v.mp4"
    failures = fb.read_table(str(tmp_path / "again"), "failures")
    assert failures["error_class"].tolist() == ["CorruptVideoError"] * 2


def rewrite_tracks(root: Path, column: str, value: str) -> None:
    """Give one column of the only shard another value throughout."""
    path = next((root / "tracks").rglob("*.parquet"))
    table = pd.read_parquet(path)
    table[column] = value
    table.to_parquet(path, index=False)
    commit = next((root / "_commits").iterdir())
    record = json.loads(commit.read_text())
    record["objects"]["tracks"]["num_bytes"] = path.stat().st_size
    commit.write_text(json.dumps(record))


def test_another_body_than_that_of_the_earlier_run_is_refused(tmp_path: Path) -> None:
    w = walkers(num_frames=8)
    pose_files.write_npz(tmp_path / "in" / "clip.npz", pose_files.npz_content(w))
    run(tmp_path / "in", tmp_path / "first")
    rewrite_tracks(tmp_path / "first", "body_model", "smpl:0123456789abcdef")
    with pytest.raises(ConfigError, match=r"hmr\.body: expected.*smpl:0123456789abcdef"):
        run(tmp_path / "first", tmp_path / "again")


def test_the_origin_of_the_weights_is_that_of_the_earlier_run(tmp_path: Path) -> None:
    w = walkers(num_frames=8)
    pose_files.write_npz(tmp_path / "in" / "clip.npz", pose_files.npz_content(w))
    run(tmp_path / "in", tmp_path / "first")
    rewrite_tracks(tmp_path / "first", "weights", "official")
    for num_shards in (1, 0):  # a rerun says the same
        report = run(tmp_path / "first", tmp_path / "again")
        assert len(report.shards) == num_shards
        assert report.card.weights_origin == "official"
    assert set(fb.read_tracks(str(tmp_path / "again"))["weights"]) == {"official"}


# --- settings and the script -------------------------------------------------------------------


def test_wrong_settings_stop_before_anything_is_written(tmp_path: Path) -> None:
    pose_files.write_npz(tmp_path / "in" / "clip.npz", pose_files.npz_content(walkers()))
    out = tmp_path / "out"
    for words, error, match in (
        (["poses.layout=vibe"], ConfigError, r"poses\.layout: expected one of auto, ours"),
        (["poses.image_size=big"], ConfigError, r"poses\.image_size: expected WIDTHxHEIGHT"),
        (["poses.fps=-1"], ConfigError, r"poses\.fps"),
        (["poses.fps=x"], ConfigError, r"poses\.fps: expected float"),
        (["poses.looks=maybe"], ConfigError, r"poses\.looks: expected bool"),
        (["poses.workers=-2"], ConfigError, r"poses\.workers"),
        (["poses.layout=ours"], ManifestError, "no output of an earlier run"),
        (["hmr.body=/no/such.pkl"], ConfigError, r"hmr\.body=/no/such\.pkl: no such file"),
        (["input=/nowhere/at/all"], ManifestError, "not found"),
        (["output="], ConfigError, "give output"),
        ([f"output={tmp_path / 'in'}"], ConfigError, "another place than input"),
        (["traker.gate=5"], ConfigError, "did you mean tracker.gate"),
    ):
        with pytest.raises(error, match=match):
            run(tmp_path / "in", out, *words)
        assert not out.exists() or not any(out.iterdir())


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    pose_files.write_npz(tmp_path / "in" / "clip.npz", pose_files.npz_content(walkers()))
    store = Store(str(tmp_path / "out"))
    with Lease(store), pytest.raises(OutputInUseError, match="in use by"):
        run(tmp_path / "in", tmp_path / "out")


def test_the_script_prints_help_and_json_and_needs_no_torch_for_a_rerun(tmp_path: Path) -> None:
    script = [sys.executable, str(REPO / "jobs" / "track.py")]
    text = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "poses.layout='auto'" in text
    assert "tracker.gate=100.0" in text
    bad = subprocess.run(
        [*script, "poses.image_size=no"], capture_output=True, text=True, check=False
    )
    assert bad.returncode == 2
    assert "poses.image_size: expected" in bad.stderr

    w = walkers(num_frames=8)
    pose_files.write_joblib(tmp_path / "in" / "clip.pkl", pose_files.pymafx_content(w))
    words = [f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "poses.workers=1", "--json"]
    done = subprocess.run([*script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["videos"]["ok"] == 1
    assert summary["people"] == 2
    assert "shard " in done.stderr  # one line per shard

    code = (
        "import sys; sys.path.insert(0, 'jobs'); import track; "
        f"code = track.main({words[:3]!r}); "
        "print(code, 'torch' in sys.modules, 'ray' in sys.modules)"
    )
    again = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO
    )
    assert again.stdout.strip().splitlines()[-1] == "0 False False"
    assert "1 shards are up to date" in again.stdout

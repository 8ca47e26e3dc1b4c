"""The main job on real (tiny) videos: a local Ray, several workers, and the same without Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import psutil
import pytest

import fourdh_batch as fb
from fourdh_batch.cluster.run import run_job
from fourdh_batch.config import load_config
from fourdh_batch.errors import CheckpointError, ConfigError, ManifestError, OutputInUseError
from fourdh_batch.pipeline.engine import build_engine, model_card
from fourdh_batch.pipeline.plan import plan_shards, read_corpus
from fourdh_batch.pipeline.shard import process_shard
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import Lease
from fourdh_batch.tables.schema import TABLES
from tests.media import BoxCorpus
from tests.weights import untrained_hmr2_file

REPO = Path(__file__).resolve().parents[2]
SOUND = ["cut.mp4", "deep er/ünï & #1.mkv", "nobody.mp4", "one_frame.mp4", "two.mp4"]


def tables_of(root: Path) -> dict[str, pd.DataFrame]:
    """All tables in an order of content, without the shard that happened to hold a row."""
    result = {}
    for name in TABLES:
        frame = fb.read_table(str(root), name)
        keys = [k for k in ("video_id", "frame_index", "track_id") if k in frame]
        frame = frame.sort_values(keys, kind="stable").reset_index(drop=True)
        result[name] = frame.drop(columns=["shard_id"], errors="ignore")
    return result


def assert_same(a: dict[str, pd.DataFrame], b: dict[str, pd.DataFrame]) -> None:
    for name in TABLES:
        pd.testing.assert_frame_equal(a[name], b[name], check_exact=True, obj=name)


@pytest.fixture(scope="module")
def first(
    corpus: BoxCorpus, tmp_path_factory: pytest.TempPathFactory, local_ray: None
) -> tuple[Path, list[str]]:
    """A finished run with one model actor."""
    root = tmp_path_factory.mktemp("tables one")
    words = [*corpus.settings(root), "cluster.gpu_actors=1"]
    report = run_job(load_config(None, words))
    assert report.exit_code == 3  # two files are broken
    assert not report.failed_shards
    return root, words


def test_q21_every_video_has_its_row_and_every_problem_is_named(
    first: tuple[Path, list[str]],
) -> None:
    root, _ = first
    videos = fb.read_table(str(root), "videos").set_index("video_id")
    assert sorted(videos.index) == sorted([*SOUND, "empty.mp4", "cut_short.mp4"])
    assert (videos.loc[SOUND, "status"] == "ok").all()
    assert videos.loc["empty.mp4", "status"] == "failed"
    assert videos.loc["cut_short.mp4", "status"] in ("failed", "partial")
    assert videos.loc["cut.mp4", "num_shots"] == 2
    assert videos.loc["nobody.mp4", "num_tracks"] == 0
    failures = fb.read_table(str(root), "failures").set_index("video_id")
    assert sorted(failures.index) == ["cut_short.mp4", "empty.mp4"]
    assert failures.loc["empty.mp4", "code"] == "EMPTY"


def test_tables_open_with_pandas_and_duckdb_and_hold_people(first: tuple[Path, list[str]]) -> None:
    root, _ = first
    tracks = pd.read_parquet(root / "tracks")
    assert len(tracks) == len(fb.read_tracks(str(root))) > 100
    assert not tracks.duplicated(["video_id", "frame_index", "track_id"]).any()
    assert set(tracks["weights"]) == {"untrained"}
    assert set(tracks["dataset"]) == {"blocks"}
    count = duckdb.sql(f"select count(*) from '{root}/tracks/**/*.parquet'").fetchall()
    assert count == [(len(tracks),)]
    arrays = fb.smpl_arrays(tracks)
    assert arrays["body_pose"].shape == (len(tracks), 23, 3, 3)
    identity = np.eye(3, dtype=np.float32)
    rotations = arrays["global_orient"]
    assert np.allclose(rotations @ rotations.swapaxes(-1, -2), identity, atol=1e-5)
    detected = tracks[tracks["state"] == "detected"]
    # a standing body fills its box: joints lie inside, feet below the head
    box = np.stack(detected["bbox_xyxy_px"])
    joints = np.stack(detected["keypoints_2d_px"]).reshape(-1, 44, 2)
    assert (np.abs(joints.mean(1)[:, 0] - box[:, [0, 2]].mean(1)) < 15).all()
    assert (joints[:, [11, 14], 1].mean(1) > joints[:, 0, 1]).all()


def test_q14_rows_filled_in_later_stand_in_order(first: tuple[Path, list[str]]) -> None:
    root, _ = first
    tracks = fb.read_tracks(str(root), video_id="two.mp4")
    keys = tracks[["frame_index", "track_id"]]
    assert keys.equals(keys.sort_values(["frame_index", "track_id"]))
    before_confirmation = tracks[tracks["hits"] < 5]
    assert not before_confirmation.empty
    assert set(before_confirmation["state"]) == {"detected"}


def test_each_walker_keeps_one_identity(first: tuple[Path, list[str]], corpus: BoxCorpus) -> None:
    root, _ = first
    tracks = fb.read_tracks(str(root), video_id="two.mp4")
    detected = tracks[tracks["state"] == "detected"]
    truth = pd.DataFrame(corpus.rows)
    truth = truth[truth["video_id"] == "two.mp4"]
    assert detected["track_id"].nunique() <= 3
    assert len(detected) > 0.7 * len(truth)


def test_three_workers_one_worker_and_no_ray_give_the_same_tables(
    first: tuple[Path, list[str]], corpus: BoxCorpus, tmp_path: Path
) -> None:
    root, _ = first
    one = tables_of(root)
    words = [*corpus.settings(tmp_path / "three"), "cluster.gpu_actors=3"]
    report = run_job(load_config(None, words))
    assert report.exit_code == 3
    assert_same(one, tables_of(tmp_path / "three"))

    config = load_config(None, corpus.settings(tmp_path / "none"))
    card, engine = model_card(config), build_engine(config)
    store = Store(config.output)
    videos = read_corpus(config.input)
    for shard in plan_shards(store, config.dataset, videos, videos_per_shard=2, mb_per_shard=9):
        process_shard(shard, engine, store, config, card)
    assert_same(one, tables_of(tmp_path / "none"))

    models = fb.load_models(*corpus.settings(tmp_path / "unused"))
    alone = fb.process_video(corpus.folder / "cut.mp4", models=models, video_id="cut.mp4")
    expected = one["tracks"][one["tracks"]["video_id"] == "cut.mp4"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone.tracks, expected, check_exact=True)


def test_a_rerun_does_nothing(first: tuple[Path, list[str]]) -> None:
    root, words = first
    before = {p: p.stat().st_mtime_ns for p in root.rglob("part-*.parquet")}
    report = run_job(load_config(None, words))
    assert (len(report.shards), report.num_shards_before) == (0, len(before) // len(TABLES))
    assert report.exit_code == 3  # the broken videos are still broken
    assert {p: p.stat().st_mtime_ns for p in root.rglob("part-*.parquet")} == before
    assert not list((root / "_work").rglob("*.*"))


def test_other_settings_redo_and_new_videos_add_only_their_shard(
    corpus: BoxCorpus, tmp_path: Path, local_ray: None
) -> None:
    mine = BoxCorpus(tmp_path / "in")
    mine.add("a.mp4", num_frames=12, seed=1)
    mine.add("b.mp4", num_frames=12, seed=2)
    words = mine.settings(tmp_path / "out")
    assert run_job(load_config(None, words)).exit_code == 0
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/tracks").rglob("*.parquet")}
    boxes = mine.boxes.read_bytes()
    mine.add("c.mp4", num_frames=12, seed=3)
    mine.boxes.write_bytes(boxes)  # the same detector: only the video is new
    report = run_job(load_config(None, words))
    assert [shard.num_videos for shard in report.shards] == [1]
    assert all(p.stat().st_mtime_ns == at for p, at in parts.items())
    report = run_job(load_config(None, [*words, "tracker.max_age=3"]))
    assert len(report.shards) == 2
    assert all(p.stat().st_mtime_ns > at for p, at in parts.items())
    assert len(fb.read_table(str(tmp_path / "out"), "videos")) == 3


def test_a_smaller_input_loses_nothing_that_is_finished(tmp_path: Path, local_ray: None) -> None:
    mine = BoxCorpus(tmp_path / "in")
    for seed, name in enumerate(("a.mp4", "b.mp4", "c.mp4")):
        mine.add(name, num_frames=8, seed=seed)
    out = tmp_path / "out"
    words = mine.settings(out)  # two videos per shard
    assert run_job(load_config(None, words)).exit_code == 0

    report = run_job(load_config(None, [*words, "plan.limit=1"]))
    assert not report.shards
    with pytest.raises(ManifestError, match=r"would remove 1 finished videos.*'b\.mp4'"):
        run_job(load_config(None, [*words, "plan.limit=1", "tracker.max_age=9"]))
    assert len(fb.read_table(str(out), "videos")) == 3

    (mine.folder / "b.mp4").unlink()
    (mine.folder / "c.mp4").unlink()
    assert not run_job(load_config(None, words)).shards
    report = run_job(load_config(None, [*words, "plan.remove_missing=true"]))
    assert [(shard.num_videos, shard.num_kept) for shard in report.shards] == [(0, 1)]
    assert fb.read_table(str(out), "videos")["video_id"].tolist() == ["a.mp4"]
    assert len(list((out / "tracks").rglob("*.parquet"))) == 1


def test_boxes_may_lie_in_a_file_per_video(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1,1,10,10,50,100,1,-1,-1,-1\n")
    words = [
        f"hmr.weights={untrained_hmr2_file()}",
        "detector.name=boxes",
        f"detector.path={tmp_path}/{{video_id}}.txt",
    ]
    before = model_card(load_config(None, words))
    assert model_card(load_config(None, words)) == before
    (tmp_path / "a.txt").write_text("1,1,10,10,50,101,1,-1,-1,-1\n")
    assert model_card(load_config(None, words)).fingerprint != before.fingerprint


def test_a_killed_driver_is_continued_not_repeated(
    first: tuple[Path, list[str]], corpus: BoxCorpus, tmp_path: Path
) -> None:
    root, _ = first
    words = [*corpus.settings(tmp_path / "out"), "plan.videos_per_shard=9"]
    driver = subprocess.Popen(
        [sys.executable, str(REPO / "jobs" / "ava_pseudogt.py"), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (done := list((tmp_path / "out").glob("_work/*/*.index"))):
            assert driver.poll() is None, "the job ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not list((tmp_path / "out").glob("_commits/*"))
    finished = {p: p.stat().st_mtime_ns for p in done}
    seen: list[int] = []
    report = run_job(load_config(None, words), on_progress=lambda p: seen.append(p.videos_done))
    assert report.exit_code == 3
    assert seen[0] >= len(finished)  # taken over, not redone
    assert_same(tables_of(root), tables_of(tmp_path / "out"))


@pytest.mark.parametrize("name", ["ModelWorker", "JournalKeeper"])
def test_a_killed_process_costs_nothing_but_time(
    first: tuple[Path, list[str]], corpus: BoxCorpus, tmp_path: Path, name: str
) -> None:
    root, _ = first
    killed: list[int] = []

    def kill_once(progress: object) -> None:
        if not killed and getattr(progress, "frames_done", 0) > 0:
            for process in psutil.Process().children(recursive=True):
                if process.name().startswith(f"ray::{name}"):
                    killed.append(process.pid)
                    process.kill()

    words = [*corpus.settings(tmp_path / "out"), "cluster.gpu_actors=1"]
    report = run_job(load_config(None, words), on_progress=kill_once)
    assert killed
    assert report.exit_code == 3
    assert_same(tables_of(root), tables_of(tmp_path / "out"))


def test_more_model_processes_than_the_cluster_holds_are_cut_not_waited_for(
    tmp_path: Path, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    mine = BoxCorpus(tmp_path / "in")
    mine.add("a.mp4", num_frames=12, seed=1)
    mine.add("b.mp4", num_frames=12, seed=2)
    words = [*mine.settings(tmp_path / "out"), "cluster.gpu_actors=50", "cluster.cpus_per_actor=9"]
    assert run_job(load_config(None, words)).exit_code == 0
    assert "1 model processes instead of 50" in caplog.text


def test_a_second_driver_is_refused(corpus: BoxCorpus, tmp_path: Path) -> None:
    config = load_config(None, corpus.settings(tmp_path / "out"))
    with Lease(Store(config.output)), pytest.raises(OutputInUseError, match="in use by"):
        run_job(config)
    assert not (tmp_path / "out" / "tracks").exists()


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        (["input="], ConfigError, r"give input="),
        (["input=/nowhere/at/all"], ManifestError, "not found"),
        (["hmr.weights="], ConfigError, r"hmr\.weights"),
        (["hmr.weights=/no/such.ckpt"], CheckpointError, "no such file"),
        (["hmr.body=/no/SMPL_NEUTRAL.pkl"], CheckpointError, "SMPL_NEUTRAL"),
        (["hmr.size=huge"], ConfigError, "vit_h"),
        (["tracker.n_init=9"], ConfigError, "1 to 7"),
        (["detector.path=/no/boxes.parquet"], ConfigError, r"/no/boxes\.parquet"),
        (["detector.path="], ConfigError, r"detector\.path"),
        (["detector.name=yolo"], ConfigError, "transformers"),
    ],
)
def test_bad_input_stops_before_anything_is_written(
    corpus: BoxCorpus, tmp_path: Path, words: list[str], error: type[Exception], match: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(error, match=match):
        run_job(load_config(None, [*corpus.settings(out), *words]))
    assert not out.exists() or not any(out.iterdir())


def test_a_missing_model_inside_the_workers_stops_with_its_own_error(
    corpus: BoxCorpus, tmp_path: Path, local_ray: None
) -> None:
    words = [*corpus.settings(tmp_path / "out"), "detector.name=onnx"]
    with pytest.raises(CheckpointError):
        run_job(load_config(None, words))


def test_the_script_prints_help_and_json(corpus: BoxCorpus, tmp_path: Path) -> None:
    script = [sys.executable, str(REPO / "jobs" / "ava_pseudogt.py")]
    text = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "ray job submit" in text
    assert "tracker.max_age=50" in text
    bad = subprocess.run([*script, "inptu=x"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert "did you mean input?" in bad.stderr
    words = [*corpus.settings(tmp_path / "out"), f"input={corpus.folder / 'cut.mp4'}", "--json"]
    done = subprocess.run([*script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["videos"]["ok"] == 1
    assert summary["weights"] == "untrained"

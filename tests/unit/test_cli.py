from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fourdh_batch as fb
from fourdh_batch.cli import app
from tests.media import write_video
from tests.weights import untrained_hmr2_file

runner = CliRunner()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["run"],
        ["plan"],
        ["show"],
        ["evaluate"],
        ["synthesize"],
        ["doctor"],
        ["settings"],
        ["weights", "import"],
    ],
)
def test_every_command_explains_itself(words: list[str]) -> None:
    result = runner.invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_asking_for_help_loads_no_model_library() -> None:
    code = "import sys, fourdh_batch.cli; print({'torch', 'ray'} & sys.modules.keys())"
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_wrong_words_end_with_usage_and_say_what_is_meant() -> None:
    result = runner.invoke(app, ["run", "inptu=/x"])
    assert result.exit_code == 2
    assert "did you mean input?" in result.output
    result = runner.invoke(app, ["run", "input=/x", "output=/y"])
    assert result.exit_code == 2
    assert "hmr.weights" in result.output


def test_plan_shows_the_shards_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / f"{name}.mp4").write_bytes(name.encode())
    words = [f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "plan.videos_per_shard=2"]
    result = runner.invoke(app, ["plan", "--json", *words])
    said = json.loads(result.output)
    assert [shard["videos"] for shard in said["shards"]] == [2, 1]
    assert (said["num_videos"], said["shards_todo"], said["changes"]) == (3, 2, {"new": 3})
    assert not (tmp_path / "out").exists()


def test_show_names_the_videos_that_there_are(tmp_path: Path) -> None:
    result = runner.invoke(app, ["show", str(tmp_path / "nowhere"), "x.mp4"])
    assert result.exit_code in (1, 2)
    assert "nowhere" in result.output


def test_synthesize_writes_a_corpus_with_its_truth(tmp_path: Path) -> None:
    words = ["--clips", "1", "--seed", "2", "--frames", "6", "--height", "72"]
    result = runner.invoke(app, ["synthesize", str(tmp_path), *words])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("00000-crossing.mp4", "boxes.parquet", "sheet.png", "truth.parquet"),
    ]
    result = runner.invoke(app, ["synthesize", str(tmp_path), *words])
    assert result.exit_code == 2
    assert "holds a corpus already" in result.output
    others = ["--clips", "1", "--seed", "3", "--frames", "6", "--height", "72"]
    (tmp_path / "mine.txt").write_text("kept")
    result = runner.invoke(app, ["synthesize", str(tmp_path), *others, "--overwrite"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "mine.txt").exists()
    result = runner.invoke(app, ["synthesize", str(tmp_path / "mine.txt"), *words])
    assert (result.exit_code, "got a file" in result.output) == (2, True)
    result = runner.invoke(app, ["synthesize", str(tmp_path / "new"), "--height", "20000000"])
    assert (result.exit_code, (tmp_path / "new").exists()) == (2, False)
    result = runner.invoke(app, ["synthesize", str(tmp_path), "--motion", "/nowhere"])
    assert result.exit_code == 2
    assert "expected a folder" in result.output
    (tmp_path / "motion").mkdir()
    (tmp_path / "motion" / "bad.bvh").write_text("no motion")
    words = ["--motion", str(tmp_path / "motion"), "--overwrite"]
    assert runner.invoke(app, ["synthesize", str(tmp_path), *words]).exit_code == 1
    assert (tmp_path / "truth.parquet").exists()  # what is there stays until it is replaced


def test_weights_check_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "hmr2.ckpt"
    path.write_bytes(b"no checkpoint")
    result = runner.invoke(app, ["weights", "check", str(path)])
    assert result.exit_code == 1
    assert "hmr2.ckpt" in result.output


def test_public_names_are_those_promised() -> None:
    assert set(fb.__all__) == {
        "KEYPOINT_NAMES",
        "PhalpTracker",
        "__version__",
        "load_body",
        "load_hmr2",
        "load_models",
        "process_video",
        "read_table",
        "read_tracks",
        "smooth_tracks",
        "smpl_arrays",
    }
    for name in fb.__all__:
        assert getattr(fb, name) is not None


def test_process_video_takes_a_broken_file_without_raising(tmp_path: Path) -> None:
    import numpy as np

    boxes = tmp_path / "boxes.csv"
    boxes.write_text("x,902,0.1,0.1,0.5,0.9,1,1.0\n")
    models = fb.load_models(
        f"hmr.weights={untrained_hmr2_file()}",
        "hmr.size=tiny",
        "hmr.device=cpu",
        "detector.name=boxes",
        f"detector.path={boxes}",
    )
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 99)
    tables = fb.process_video(tmp_path / "bad.mp4", models=models)
    assert (tables.outcome.status, len(tables.tracks)) == ("failed", 0)
    assert tables.failures["code"].tolist() == ["NOT_A_VIDEO"]
    good = write_video(tmp_path / "good.mp4", np.full((8, 64, 64, 3), 90, np.uint8))
    tables = fb.process_video(good, models=models)
    assert (tables.outcome.status, tables.outcome.num_frames) == ("ok", 8)
    with pytest.raises(FileNotFoundError):
        fb.process_video(tmp_path / "absent.mp4", models=models)

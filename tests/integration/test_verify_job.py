"""What a real job leaves behind is proved, told and frozen; also while it is writing."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import fourdh_batch as fb
from fourdh_batch.cli import app
from fourdh_batch.cluster.run import run_job
from fourdh_batch.config import load_config
from fourdh_batch.pipeline.job import Progress
from fourdh_batch.pipeline.status import Status, status_of
from fourdh_batch.tables.release import Release, release_root
from fourdh_batch.tables.verify import VerifyReport, verify_root
from tests.media import BoxCorpus

runner = CliRunner()


@pytest.mark.slow
def test_a_job_is_followed_proved_and_frozen(tmp_path: Path, local_ray: None) -> None:
    corpus = BoxCorpus(tmp_path / "corpus")
    for number, name in enumerate(("a.mp4", "b.mp4", "c.mp4")):
        corpus.add(name, num_frames=12, seed=number)
    (corpus.folder / "empty.mp4").touch()
    root = str(tmp_path / "tables")
    seen: list[tuple[Status, Release, VerifyReport]] = []

    def look(progress: Progress) -> None:
        if progress.shards_done and not seen:
            now, early = status_of(root), release_root(root, "early")
            seen.append((now, early, verify_root(root)))

    words = [*corpus.settings(tmp_path / "tables"), "cluster.gpu_actors=1"]
    config = load_config(None, [*words, "plan.videos_per_shard=1"])
    assert run_job(config, on_progress=look).exit_code == 3  # one file is broken

    now, early, report = seen[0]
    assert now.state == "running"
    assert now.videos_left in (2, 3, 4)  # the record is some seconds old
    assert report.problems == []
    assert "a run is writing" in report.notes[0]
    assert 1 <= len(early.shards) < 4

    now = status_of(root)
    assert (now.state, now.videos_left, now.shards_done, now.shards_total) == ("done", 0, 4, 4)
    assert [failure.video_id for failure in now.failures] == ["empty.mp4"]
    for more in ([], ["--input", str(corpus.folder)]):
        result = runner.invoke(app, ["verify", root, *more])
        assert result.exit_code == 0, result.output
    (corpus.folder / "new.mp4").touch()
    result = runner.invoke(app, ["verify", root, "--input", str(corpus.folder), "--quick"])
    assert result.exit_code == 1
    assert "not_done: video 'new.mp4': expected a finished video, got none" in result.stdout

    assert verify_root(f"{root}/releases/early").problems == []
    late = release_root(root, "late")
    assert len(late.shards) == 4
    for name in ("tracks", "detections", "videos", "failures"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(f"{root}/releases/late/{name}"), fb.read_table(root, name)
        )

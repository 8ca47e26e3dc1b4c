"""Night after night: exactly what changed goes through the models, and nothing else is touched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import fourdh_batch as fb
from fourdh_batch.cluster.run import run_job
from fourdh_batch.config import JobConfig, load_config
from fourdh_batch.errors import ManifestError
from fourdh_batch.pipeline.job import RunReport
from tests.media import BoxCorpus

REPO = Path(__file__).resolve().parents[2]
YAML = REPO / "jobs" / "nightly.yaml"


class Nights:
    """A corpus in a manifest with a column of its own, and its tables."""

    def __init__(self, folder: Path) -> None:
        self.corpus = BoxCorpus(folder / "in")
        self.manifest = folder / "corpus.csv"
        self.out = folder / "out"
        self.labels: dict[str, str] = {}
        self.frames: dict[str, int] = {}
        for seed, name in enumerate("abcdefg"):
            self.add(name, 20 + seed, seed)
        self.boxes = self.corpus.boxes.read_bytes()

    def add(self, name: str, num_frames: int, seed: int) -> None:
        self.corpus.add(f"{name}.mp4", num_frames=num_frames, seed=seed)
        self.labels[name] = "indoor"
        self.frames[name] = num_frames

    def config(self, *words: str) -> JobConfig:
        rows = [
            {"video_id": f"{n}.mp4", "uri": f"in/{n}.mp4", "scene": label}
            for n, label in self.labels.items()
        ]
        pd.DataFrame(rows).to_csv(self.manifest, index=False)
        self.corpus.boxes.write_bytes(self.boxes)  # the same detector: only videos are new
        place = [f"input={self.manifest}", "plan.max_removed=1", *words]
        return load_config(YAML, [*self.corpus.settings(self.out), *place])

    def run(self, *words: str) -> RunReport:
        report = run_job(self.config(*words))
        assert report.exit_code == 0
        return report

    def objects(self) -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in self.out.rglob("part-*.parquet")}

    def tables(self) -> dict[str, pd.DataFrame]:
        frames = {name: fb.read_table(str(self.out), name) for name in ("tracks", "detections")}
        return {
            f"{name} {video_id.removesuffix('.mp4')}": rows.reset_index(drop=True)
            for name, table in frames.items()
            for video_id, rows in table.groupby("video_id")
        }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Nights:
    """After the first night; two videos to a shard."""
    nights = Nights(tmp_path_factory.mktemp("first"))
    report = nights.run()
    assert (report.changes, report.frames_run) == ({"new": 7}, sum(nights.frames.values()))
    return nights


@pytest.fixture
def nights(first: Nights, tmp_path: Path) -> Nights:
    """A copy that a test may change; commits name no absolute path."""
    mine = Nights.__new__(Nights)
    mine.corpus = BoxCorpus(tmp_path / "in", list(first.corpus.rows))
    mine.manifest, mine.out = tmp_path / "corpus.csv", tmp_path / "out"
    mine.labels, mine.frames, mine.boxes = dict(first.labels), dict(first.frames), first.boxes
    shutil.copytree(first.corpus.folder, mine.corpus.folder)
    shutil.copytree(first.out, mine.out)
    return mine


def test_a_night_without_a_change_touches_nothing(nights: Nights) -> None:
    before = nights.objects()
    report = nights.run()
    assert (report.changes, report.frames_run, len(report.shards)) == ({}, 0, 0)
    assert nights.objects() == before


def test_only_what_is_new_changed_or_gone_is_worked_on(nights: Nights) -> None:
    objects, tables = nights.objects(), nights.tables()
    nights.add("h", 31, seed=30)  # new
    nights.add("b", 33, seed=31)  # changed, beside a
    del nights.labels["d"]  # removed, beside c
    nights.labels["e"] = "outdoor"  # another column alone, beside f; g is as before
    report = nights.run()
    assert report.changes == {"new": 1, "changed": 1, "removed": 1, "details": 1}
    assert report.frames_run == 31 + 33  # nothing else went through the models
    done = sorted((s.num_videos, s.num_kept) for s in report.shards)
    assert done == [(0, 1), (0, 2), (1, 0), (1, 1)]

    now = nights.objects()
    untouched = {key for key, stamp in now.items() if objects.get(key) == stamp}
    assert len(untouched) == 4  # the tables of g's shard
    after = nights.tables()
    assert {key.split()[1] for key in after} == set("abcefg")  # no boxes are given for h
    for key, rows in tables.items():
        if key.split()[1] in "acefg":
            pd.testing.assert_frame_equal(rows, after[key], check_exact=True)
    videos = fb.read_table(str(nights.out), "videos").set_index("video_id")
    assert sorted(videos.index) == [f"{name}.mp4" for name in "abcefgh"]
    assert json.loads(videos.loc["e.mp4", "manifest"]) == {"scene": "outdoor"}
    assert videos.loc["b.mp4", "frames_decoded"] == 33

    afresh = Nights.__new__(Nights)  # the tables are those of a first run over today's corpus
    afresh.__dict__ |= nights.__dict__ | {"out": nights.out.with_name("afresh")}
    afresh.run()
    everything = afresh.tables()
    assert everything.keys() == after.keys()
    for key, rows in everything.items():
        pd.testing.assert_frame_equal(rows, after[key], check_exact=True)

    changes = pd.read_parquet(nights.out / "_runs" / f"{report.run_id}-changes.parquet")
    kinds = {"h.mp4": "new", "b.mp4": "changed", "d.mp4": "removed", "e.mp4": "details"}
    assert dict(zip(changes["video_id"], changes["kind"], strict=True)) == kinds
    text = (nights.out / "_runs" / f"{report.run_id}-changes.txt").read_text()
    assert "1 gone from the corpus\n  d.mp4\n" in text


def test_rows_that_cannot_be_taken_over_are_made_again(nights: Nights) -> None:
    before = nights.tables()
    [commit] = [
        body
        for path in (nights.out / "_commits").iterdir()
        if "a.mp4" in (body := json.loads(path.read_text()))["videos"][0]["video_id"]
    ]
    damaged = nights.out / commit["objects"]["tracks"]["key"]
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"otherwise")
    nights.add("b", 33, seed=31)
    report = nights.run()
    assert report.changes == {"changed": 1}
    assert report.frames_run == 33 + nights.frames["a"]
    for key, rows in nights.tables().items():
        if key.split()[1] != "b":
            pd.testing.assert_frame_equal(rows, before[key], check_exact=True)


def test_other_settings_do_everything_again_and_back(nights: Nights) -> None:
    total = sum(nights.frames.values())
    report = nights.run("tracker.max_age=3")
    assert (report.changes, report.frames_run) == ({"models": 7}, total)
    assert nights.run("tracker.max_age=3").frames_run == 0


def test_a_night_that_would_lose_much_is_refused(nights: Nights) -> None:
    for name in "abc":
        del nights.labels[name]
    before = nights.objects()
    with pytest.raises(ManifestError, match=r"take 3 of 7 videos out.*max_removed=0\.2"):
        nights.run("plan.max_removed=0.2")
    assert nights.objects() == before


def test_the_script_says_what_changed(nights: Nights) -> None:
    nights.add("h", 12, seed=30)
    nights.config()
    script = [sys.executable, str(REPO / "jobs" / "nightly.py")]
    words = [*nights.corpus.settings(nights.out), f"input={nights.manifest}"]
    done = subprocess.run([*script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 new\n  h.mp4\n4 shards are up to date" in done.stdout
    assert "changes" in done.stdout

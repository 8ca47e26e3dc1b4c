"""What Prometheus and a log collector get of a real (tiny) job, and what is built on it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fourdh_batch.cluster.metrics import COUNTERS, GAUGES, LABELS
from tests.media import BoxCorpus

REPO = Path(__file__).resolve().parents[2]
DASHBOARD = REPO / "infra" / "grafana" / "fourdh.json"
NAMES = {
    *(f"ray_fourdh_{name}_total" for name in COUNTERS),
    *(f"ray_fourdh_{name}" for name in GAUGES),
}
LINE = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')

# A job by the way of the command line, whose progress bar looks at the endpoint of its node.
JOB = """
import errno, json, sys, time, urllib.request
import ray
from fsspec.implementations.memory import MemoryFileSystem
from fourdh_batch import cli
from fourdh_batch.cluster import run
from fourdh_batch.storage import Store

found = {}
failed = []

def scrape():
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=60) as reply:
        lines = [x for x in reply.read().decode().splitlines() if x.startswith("ray_")]
    found.update(line.rsplit(" ", 1) for line in lines)  # gauges leave; the last value stays

def fail_once():
    whole = MemoryFileSystem.cat_file

    def broken(self, *args, **options):
        MemoryFileSystem.cat_file = whole
        raise OSError(errno.EIO, "a passing fault")

    store = Store("memory://metrics")
    store.write_bytes("a", b"1")
    MemoryFileSystem.cat_file = broken
    assert store.read_bytes("a") == b"1"

def job(config, *, on_progress):
    def look(now):
        on_progress(now)
        scrape()
        if now.shards_done == now.shards_total and not failed:
            failed.append(True)  # the end may be told more than once
            fail_once()
            end = time.monotonic() + 5  # a few times the interval of reports
            while time.monotonic() < end:
                time.sleep(0.5)
                scrape()

    report = run.run_job(config, on_progress=look)
    facts = {
        "found": found,
        "run": report.run_id,
        "shards": [shard.shard_id for shard in report.shards],
        "frames_run": report.frames_run,
        "actor_s": report.actor_s,
        "videos": {status: report.videos(status) for status in ("ok", "failed", "quarantined")},
        "people": sum(shard.num_people for shard in report.shards),
        "track_rows": sum(shard.num_track_rows for shard in report.shards),
        "num_bytes": sum(shard.num_bytes for shard in report.shards),
        "logs": str(LOGS),
    }
    open(sys.argv[1], "w").write(json.dumps(facts))
    return report

init = ray.init

def remember(**options):
    global LOGS
    init(**options)
    LOGS = ray._private.worker._global_node.get_logs_dir_path()

ray.init = remember
sys.exit(cli.run_job(None, sys.argv[2:], run=job))
"""


@dataclass
class Finished:
    """A job that has run: what it knows of itself, and what others were told."""

    facts: dict[str, Any]
    log: list[dict[str, Any]]
    worker_log: list[dict[str, Any]]

    def total(self, name: str, **labels: str) -> float:
        """Sum of all series of a counter with these labels."""
        values = []
        for series, value in self.facts["found"].items():
            match = LINE.fullmatch(f"{series} {value}")
            assert match, series
            has = dict(LABEL.findall(match["labels"] or ""))
            if match["name"] == f"ray_fourdh_{name}_total" and labels.items() <= has.items():
                assert has["dataset"] == "blocks"
                values.append(float(value))
        assert values, name
        return sum(values)

    def names(self) -> set[str]:
        return {series.partition("{")[0] for series in self.facts["found"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("watched")
    corpus = BoxCorpus(root / "in")
    corpus.add("a.mp4", num_frames=40, seed=1)
    corpus.add("b.mp4", num_frames=20, seed=2)
    (corpus.folder / "empty.mp4").touch()
    words = [*corpus.settings(root / "out"), "log.format=json"]
    env = {**os.environ, "PYTHONPATH": str(REPO), "RAY_metrics_report_interval_ms": "1500"}
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(root / "facts.json"), *words],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 3, done.stderr[-4000:]
    facts = json.loads((root / "facts.json").read_text())
    files = sorted(Path(facts["logs"]).glob("worker-*.err"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return Finished(
        facts,
        [json.loads(line) for line in done.stderr.splitlines()],
        [json.loads(line) for line in lines if line.startswith("{")],
    )


def test_every_metric_is_scraped_and_documented_by_the_same_name(finished: Finished) -> None:
    assert {name for name in finished.names() if "fourdh" in name} == NAMES
    text = (REPO / "docs" / "OBSERVABILITY.md").read_text()
    documented = re.findall(r"^\| `(ray_fourdh_\w+)`", text, re.MULTILINE)
    assert sorted(documented) == sorted(NAMES)


def test_counters_agree_with_the_report(finished: Finished) -> None:
    facts = finished.facts
    assert facts["frames_run"] == 60
    assert facts["videos"] == {"ok": 2, "failed": 1, "quarantined": 0}
    assert finished.total("frames") == facts["frames_run"]
    for status, count in facts["videos"].items():
        assert finished.total("videos", status=status) == pytest.approx(count, abs=1e-300)
    assert finished.total("shards", result="published") == len(facts["shards"]) == 2
    assert finished.total("published_bytes") == facts["num_bytes"]
    assert finished.total("track_rows") == facts["track_rows"]
    assert finished.total("crops") >= facts["people"]
    assert finished.total("storage_retries") == 1
    assert finished.total("retries") < 1e-300
    assert finished.total("model_deaths") < 1e-300


def test_the_seconds_say_where_the_time_went(finished: Finished) -> None:
    stages = [finished.total("unit_seconds", stage=s) for s in ("decode", "models", "tracker")]
    units_per_actor = 2
    assert min(stages) > 0
    assert sum(stages) < units_per_actor * finished.facts["actor_s"]
    assert finished.total("model_busy_seconds") < finished.facts["actor_s"]
    # Each of the two units waits at least as long as its own chunks take.
    assert finished.total("model_busy_seconds") <= stages[1]
    assert finished.total("tracker_busy_seconds") > 0
    assert 0 < finished.total("model_calls") <= finished.total("chunks")


def test_a_broken_video_is_named_in_a_json_line(finished: Finished) -> None:
    warnings = [e for e in finished.log if e.get("video") == "empty.mp4"]
    assert [entry["level"] for entry in warnings] == ["WARNING"]
    assert warnings[0]["run"] == finished.facts["run"]
    assert warnings[0]["shard"] in finished.facts["shards"]
    assert "0 bytes" in warnings[0]["message"]
    said = {entry["shard"] for entry in finished.log if "shard" in entry}
    assert said == set(finished.facts["shards"])


def test_workers_log_in_json_for_which_run_they_work(finished: Finished) -> None:
    told = [entry for entry in finished.worker_log if "untrained" in entry["message"]]
    assert told
    assert {entry["run"] for entry in told} == {finished.facts["run"]}


def test_the_dashboard_asks_for_what_there_is(finished: Finished) -> None:
    board = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"\bray_\w+", target["expr"])
    }
    assert asked <= finished.names()
    assert {name for name in asked if "fourdh" in name} >= NAMES - {"ray_fourdh_track_rows_total"}
    for panel in panels:
        for target in panel["targets"]:
            for selector in re.findall(r"ray_fourdh_\w+(\{[^}]*\})?", target["expr"]):
                assert 'dataset=~"$dataset"' in selector, target["expr"]
            for name, label in LABELS.items():
                by = re.findall(r"by \((\w+)\)", target["expr"])
                assert name not in target["expr"] or set(by) <= {label}, target["expr"]


def test_the_dashboard_is_whole() -> None:
    board: Mapping[str, Any] = json.loads(DASHBOARD.read_text())
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert len(rows) == 3
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert panel["description"], panel["title"]

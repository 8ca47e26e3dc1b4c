"""The books of a run, without any work behind them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourdh_batch.pipeline import job
from fourdh_batch.pipeline.job import Ledger, Progress, RunReport
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.records import ModelCard
from fourdh_batch.pipeline.shard import OK, QUARANTINED, VideoOutcome
from fourdh_batch.storage import Store

CARD = ModelCard("m", "w", "official", "open", "boxes", "location")
SHARDS = [
    Shard("s1", "d", (Video("a", "/a", 10, "fa"), Video("b", "/b", 20, "fb"))),
    Shard("s2", "d", (Video("c", "/c", 30, "fc"),)),
]


def ledger_of(tmp_path: Path, seen: list[Progress], renewed: list[int]) -> Ledger:
    report = RunReport("r", str(tmp_path), CARD)
    return Ledger(
        Store(str(tmp_path)), SHARDS, report, lambda: renewed.append(1), on_progress=seen.append
    )


def test_a_shard_is_complete_with_its_last_video_in_the_order_of_its_plan(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, [], [])
    assert ledger.done(SHARDS[0], VideoOutcome("b", OK, num_frames=5)) is None
    complete = ledger.done(SHARDS[0], VideoOutcome("a", OK, num_frames=7))
    assert complete is not None
    assert [outcome.video_id for outcome in complete] == ["a", "b"]
    now = ledger.progress(frames_running=3)
    assert now == Progress(
        videos_done=2,
        videos_total=3,
        bytes_done=30,
        bytes_total=60,
        frames_done=15,
        shards_done=0,
        shards_total=2,
    )


def test_a_failed_shard_takes_no_more_videos_and_ends_the_run_with_1(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, [], [])
    ledger.fail(SHARDS[1], "the store is full")
    assert ledger.has_failed(SHARDS[1])
    assert ledger.done(SHARDS[1], VideoOutcome("c", OK)) is None
    assert ledger.report.failed_shards == {"s2": "the store is full"}
    assert ledger.report.exit_code == 1


def test_lease_and_progress_are_cared_for_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Progress] = []
    renewed: list[int] = []
    ledger = ledger_of(tmp_path, seen, renewed)
    ledger.tick()
    assert (seen, renewed) == ([], [])
    monkeypatch.setattr(job, "PROGRESS_S", -1.0)
    ledger.tick(lambda: 4)
    assert seen[0].frames_done == 4
    monkeypatch.setattr(job, "LEASE_S", -1.0)
    ledger.tick()
    assert renewed == [1]
    ledger.close()
    assert len(seen) == 3


def test_videos_of_now_and_before_are_counted_together() -> None:
    report = RunReport("r", "/o", CARD, videos_before={OK: 2})
    assert (report.videos(OK), report.exit_code) == (2, 0)
    report.videos_before[QUARANTINED] = 1
    assert report.exit_code == 3

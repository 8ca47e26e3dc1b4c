"""The books of a run, without any work behind them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourdh_batch.pipeline import job
from fourdh_batch.pipeline.increment import ShardWork
from fourdh_batch.pipeline.job import Ledger, Progress, RunReport
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.records import ModelCard
from fourdh_batch.pipeline.shard import OK, QUARANTINED, ShardReport, VideoOutcome
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import CommitRecord, VideoRecord

CARD = ModelCard("m", "w", "official", "open", "boxes", "location")
BEFORE = CommitRecord(
    *("s1", "d", "f", "c", "m"), (VideoRecord("k", "fk", QUARANTINED, {"tracks": 0}),), {}, {}
)
FIRST = Shard(
    "s1", "d", (Video("a", "/a", 10, "fa"), Video("b", "/b", 20, "fb"), Video("k", "/k", 9, "fk"))
)
SECOND = Shard("s2", "d", (Video("c", "/c", 30, "fc"),))
TODO = [ShardWork(FIRST, frozenset("k"), BEFORE), ShardWork(SECOND)]
TOTALS = Progress(0, 3, 0, 60, 0, 0, 2)


def ledger_of(
    tmp_path: Path, seen: list[Progress], ticks: list[Progress], num_begun: int = 2
) -> Ledger:
    report = RunReport("r", str(tmp_path), CARD)
    store = Store(str(tmp_path))
    ledger = Ledger(store, TODO, TOTALS, report, seen.append, ticks.append)
    for _ in range(num_begun):
        assert ledger.next_shard() is not None
    return ledger


def test_a_shard_is_complete_with_its_last_video_in_the_order_of_its_plan(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, [], [])
    assert ledger.next_shard() is None
    assert ledger.done(FIRST, VideoOutcome("b", OK, num_frames=5)) is None
    complete = ledger.done(FIRST, VideoOutcome("a", OK, num_frames=7))
    assert complete is not None
    assert [outcome.video_id for outcome in complete] == ["a", "b"]
    assert ledger.done(FIRST, VideoOutcome("a", OK, num_frames=7)) is None  # counted once
    assert ledger.num_videos_left == 1
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


def test_rows_that_were_kept_count_among_the_videos_of_the_corpus(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, [], [])
    ledger.published(ShardReport("s1", {OK: 2}, 1, 12, 3, 40, 999))
    report = ledger.report
    assert (report.videos(OK), report.videos(QUARANTINED), report.exit_code) == (2, 1, 3)


def test_a_failed_shard_takes_no_more_videos_and_ends_the_run_with_1(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, [], [])
    ledger.fail(SECOND, "the store is full")
    assert ledger.has_failed(SECOND)
    assert ledger.done(SECOND, VideoOutcome("c", OK)) is None
    assert ledger.report.failed_shards == {"s2": "the store is full"}
    assert ledger.report.exit_code == 1


def test_a_video_whose_file_is_not_to_be_had_is_left_out(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, [], [])
    assert ledger.done(FIRST, VideoOutcome("k", OK)) is None  # kept: its rows are there
    assert ledger.done(FIRST, VideoOutcome("b", OK)) is None
    complete = ledger.give_up(FIRST, "a", "404")
    assert complete is not None
    assert [outcome.video_id for outcome in complete] == ["b"]
    assert [v.video_id for v in ledger.work_of(FIRST).shard.videos] == ["b", "k"]
    assert ledger.give_up(SECOND, "c", "404") is None  # nothing of it is left
    assert ledger.num_videos_left == 0
    assert set(ledger.report.failed_shards) == {"s1/a", "s2/c"}
    assert ledger.report.exit_code == 1


def test_rows_that_are_lost_are_to_be_made_again(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, [], [])
    for name in "ab":
        ledger.done(FIRST, VideoOutcome(name, OK))
    again = ledger.redo_kept(FIRST)
    assert [v.video_id for v in again.videos] == ["k"]
    assert ledger.num_videos_left == 2
    complete = ledger.done(FIRST, VideoOutcome("k", OK))
    assert complete is not None
    assert [outcome.video_id for outcome in complete] == ["a", "b", "k"]
    assert ledger.work_of(FIRST).commit is None


def test_progress_is_shown_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []
    ticks: list[Progress] = []
    ledger = ledger_of(tmp_path, seen, ticks)
    ledger.tick()
    assert (seen, ticks) == ([], [])
    monkeypatch.setattr(job, "PROGRESS_S", -1.0)
    ledger.tick(lambda: 4)
    assert seen[0].frames_done == 4
    assert ticks == seen
    ledger.close()
    assert len(seen) == 2


def test_videos_of_now_and_before_are_counted_together() -> None:
    report = RunReport("r", "/o", CARD, videos_before={OK: 2})
    assert (report.videos(OK), report.exit_code) == (2, 0)
    report.videos_before[QUARANTINED] = 1
    assert report.exit_code == 3

"""Where a run is, told from storage alone, whatever lies there."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fourdh_batch.cli import app
from fourdh_batch.pipeline import status as status_module
from fourdh_batch.pipeline.plan import Video, plan_shards
from fourdh_batch.pipeline.status import status_of
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import (
    CommitRecord,
    Lease,
    ObjectRecord,
    VideoRecord,
    write_commit,
)
from fourdh_batch.tables.schema import TABLES, make_table
from fourdh_batch.tables.writer import ObjectWriter, object_key

runner = CliRunner()
OLD_RUN = "20260102T030405Z-abc123"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def record(
    store: Store,
    *,
    state: str = "running",
    run_id: str = "20990101T000000Z-aaaaaa",
    age_s: float = 100.0,
    updated_ago_s: float = 0.0,
    **more: Any,
) -> None:
    """A record of a run as a job writes it."""
    now = time.time()
    body = {
        "run_id": run_id,
        "version": "0",
        "state": state,
        "started_s": now - age_s,
        "updated_s": now - updated_ago_s,
        "seconds": age_s - updated_ago_s,
        "exit_code": None if state == "running" else 3,
        "dataset": "ava",
        "config": {"dataset": "ava"},
        "models": {},
        "progress": {
            "videos_done": 40,
            "videos_total": 120,
            "bytes_done": 250,
            "bytes_total": 1000,
            "frames_done": 5000,
            "shards_done": 3,
            "shards_total": 9,
        },
        "shards_up_to_date": 10,
        "shards_failed": {},
        "videos": {"ok": 130, "partial": 2, "failed": 1, "quarantined": 0},
        "frames": 4000,
        **more,
    }
    store.write_bytes(f"_runs/{run_id}.json", json.dumps(body).encode())


def old_record(store: Store, run_id: str = OLD_RUN, **more: Any) -> None:
    """A record as it was written before runs told where they are."""
    body = {
        "run_id": run_id,
        "config": {"dataset": "ava"},
        "seconds": 60.0,
        "shards_done": ["s1"],
        "shards_up_to_date": 1,
        "shards_failed": {},
        "videos": {"ok": 5, "partial": 0, "failed": 1, "quarantined": 0},
        "frames": 600,
        **more,
    }
    store.write_bytes(f"_runs/{run_id}.json", json.dumps(body).encode())


def commit(store: Store, shard: str, statuses: dict[str, str], dataset: str = "ava") -> None:
    objects = {n: ObjectRecord(object_key(n, dataset, shard), 1, "", 0) for n in TABLES}
    videos = tuple(VideoRecord(video, "c", status) for video, status in statuses.items())
    write_commit(
        store,
        CommitRecord(shard, dataset, "f", "c", "m", videos, objects, dict.fromkeys(TABLES, 1)),
    )


def plan(store: Store, videos: str, dataset: str = "ava") -> None:
    plan_shards(
        store,
        dataset,
        [Video(v, v, 1, v) for v in videos],
        videos_per_shard=2,
        mb_per_shard=9,
    )


def fail(store: Store, shard: str, videos: str, dataset: str = "ava") -> None:
    """The failures of a shard, none where there are no videos."""
    with ObjectWriter(store, "failures", object_key("failures", dataset, shard)) as writer:
        for video in videos:
            row = {
                "dataset": dataset,
                "video_id": video,
                "uri": "/x",
                "shard_id": shard,
                "stage": "decode",
                "error_class": "CorruptVideoError",
                "code": "CORRUPT",
                "message": f"of {video}\x1b[2J",
                "frame_index": [7],
                "model_fingerprint": "m",
                "attempts": 2,
            }
            writer.write(make_table("failures", row, num_rows=1))


def text_of(store: Store, **options: Any) -> str:
    text = "\n".join(status_of(store.root, **options).lines())
    assert all(line.isprintable() for line in text.split("\n"))
    return text


def test_a_running_job_is_seen_with_its_rate_and_the_time_left(store: Store) -> None:
    with Lease(store):
        record(store, age_s=0.0, updated_ago_s=-100.0)
        now = status_of(store.root)
        assert now.state == "running"
        assert now.counted == "run"
        assert now.videos_left == 80
        assert (now.shards_done, now.shards_total) == (13, 19)
        assert now.frames == 5000
        assert now.frames_per_s == pytest.approx(50, abs=1)
        assert now.holder is not None
        assert now.holder.is_live
        # a quarter of the bytes took 100 s
        assert now.eta_s == pytest.approx(300 + 100, abs=5)
        text = text_of(store)
        assert ": running (" in text
        assert "133 in the tables (130 ok, 2 partial, 1 failed); 80 left" in text
        json.dumps(now.to_dict())


def test_the_rate_between_two_looks_is_that_of_now(store: Store) -> None:
    with Lease(store):
        record(store, age_s=0.0, updated_ago_s=-100.0)
        before = status_of(store.root)
        progress = {"frames_done": 6000, "bytes_done": 500, "bytes_total": 1000}
        record(store, age_s=0.0, updated_ago_s=-200.0, progress=progress)
        assert status_of(store.root).frames_per_s == pytest.approx(30, abs=1)
        assert status_of(store.root, before=before).frames_per_s == pytest.approx(10, abs=0.5)


def test_a_silent_job_is_noted(store: Store) -> None:
    with Lease(store):
        record(store, age_s=3.0)
        assert status_of(store.root).notes == []
    lease = Lease(store)
    lease.acquire()
    lease._since_s -= 10_000
    lease.renew()
    record(store, age_s=1000.0, updated_ago_s=400.0)
    assert "has not recorded itself for 6 min 40 s" in text_of(store)


@pytest.mark.parametrize("state", ["done", "failed", "stopped"])
def test_an_ended_run_says_how(store: Store, state: str) -> None:
    with Lease(store):
        record(store, state=state, age_s=0.0)
    now = status_of(store.root)
    assert (now.state, now.eta_s) == (state, None)
    assert f": {state}\n" in text_of(store)
    assert f"{state}, exit 3" in text_of(store)


def test_a_run_that_never_said_how_it_ended_has_died(store: Store) -> None:
    lease = Lease(store, duration_s=0.0)
    lease.acquire()
    record(store, age_s=0.0)
    now = status_of(store.root)
    assert now.state == "died"
    assert now.holder is not None
    assert not now.holder.is_live
    store.delete_tree("_lease")
    assert status_of(store.root).state == "died"


def test_a_driver_without_a_record_yet_is_seen(store: Store) -> None:
    old_record(store)
    commit(store, "s1", {"a": "ok", "b": "failed"})
    plan(store, "abcd")
    with Lease(store):
        now = status_of(store.root)
        assert (now.state, now.run, now.counted) == ("running", None, "commits")
        assert (now.videos, now.videos_left) == ({"failed": 1, "ok": 1}, 2)
        assert "no record yet" in now.notes[0]
    now = status_of(store.root)
    assert now.state == "stopped"
    assert "no record" in now.notes[0]
    lapsed = Lease(store, duration_s=0.0)
    lapsed.acquire()
    assert status_of(store.root).state == "died"


def test_an_older_record_lacks_fields_and_says_enough(store: Store) -> None:
    old_record(store)
    now = status_of(store.root)
    assert (now.state, now.counted, now.dataset) == ("done", "run", "ava")
    assert now.run is not None
    assert now.run.exit_code == 3
    assert now.run.started_s == 1767323045
    assert (now.videos_left, now.frames, now.frames_per_s) == (0, 600, 10.0)
    assert "done, exit 3" in text_of(store)


@pytest.mark.parametrize(
    "make", [old_record, lambda store, **more: record(store, state="done", **more)]
)
def test_after_failed_shards_what_is_left_is_counted(store: Store, make: Any) -> None:
    make(store, shards_failed={"s2": "the store is full"})
    commit(store, "s1", {"a": "ok", "b": "failed"})
    commit(store, "x1", {"z": "ok"}, "own")
    plan(store, "abcd")
    now = status_of(store.root, dataset="ava")
    assert (now.counted, now.videos, now.videos_left) == ("commits", {"failed": 1, "ok": 1}, 2)
    assert (now.shards_done, now.shards_total) == (1, 2)
    assert "shard s2 failed: the store is full" in text_of(store)


def test_commits_without_any_run_are_counted(store: Store) -> None:
    with pytest.raises(FileNotFoundError, match="no output"):
        status_of(store.root)
    commit(store, "s1", {"a": "ok", "b": "failed"})
    commit(store, "x1", {"z": "ok"}, "own")
    now = status_of(store.root)
    assert (now.state, now.videos, now.videos_left) == ("unknown", {"failed": 1, "ok": 2}, None)
    assert status_of(store.root, dataset="own").videos == {"ok": 1}


def test_runs_of_other_datasets_are_told_apart(store: Store) -> None:
    old_record(store)
    with Lease(store):
        record(store, age_s=0.0, dataset="own")
        assert status_of(store.root).dataset == "own"
        now = status_of(store.root, dataset="ava")
        assert (now.state, len(now.runs)) == ("done", 1)
        assert now.notes == ["a run of dataset 'own' is writing"]


def test_the_newest_runs_are_listed_first(store: Store) -> None:
    for day in range(1, 9):
        old_record(store, f"202601{day:02d}T000000Z-abcdef")
    store.write_bytes("_runs/20260108T000000Z-abcdef-changes.parquet", b"x")
    runs = [run.run_id for run in status_of(store.root).runs]
    assert runs == [f"202601{day:02d}T000000Z-abcdef" for day in (8, 7, 6, 5, 4)]


FOREIGN: list[Any] = [
    b"",
    b"\xff",
    b"[]",
    b"[" * 100_000,
    b"{}",
    {"run_id": 7},
    {"run_id": "x\x1b[2J", "state": ["running"], "started_s": "now", "progress": [1]},
    {"run_id": "x", "seconds": float("nan"), "videos": {"ok": "many"}, "shards_failed": [1]},
    {"run_id": "x", "state": "running", "started_s": 1e300, "updated_s": -1e300},
    {"run_id": "x", "state": "done", "progress": {"videos_done": None, "videos_total": 1e400}},
    {"run_id": "x", "config": 3, "exit_code": "0", "frames": True},
    {"run_id": OLD_RUN, "state": "failed"},
]


@pytest.mark.parametrize("body", FOREIGN, ids=range(len(FOREIGN)))
def test_damaged_and_foreign_records_are_survived(store: Store, body: Any) -> None:
    old_record(store)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    store.write_bytes("_runs/zzz.json", data)
    if b'"run_id": "x"' in data:  # under its own name, as a run that came later
        store.write_bytes("_runs/x.json", data)
    for with_lease in (False, True):
        if with_lease:
            Lease(store).acquire()
        text_of(store)
        now = status_of(store.root)
        assert any("zzz.json is no record" in note for note in now.notes)
        json.dumps(now.to_dict())
        assert OLD_RUN in {run.run_id for run in now.runs}
    store.write_bytes("_lease/00000009.json", b"{}")
    status_of(store.root)


# --- failures ----------------------------------------------------------------------------------


def test_some_failures_are_shown_with_their_reasons(store: Store) -> None:
    old_record(store)
    fail(store, "0001-00001-aa", "ab")
    fail(store, "0001-00002-bb", "")
    fail(store, "0002-00000-cc", "c")
    fail(store, "0001-00000-dd", "d", "own")
    now = status_of(store.root)
    assert [f.video_id for f in now.failures] == ["c", "a", "b"]
    assert now.failures[0].frame_index == 7
    assert "video c, frame 7: CORRUPT in decode: of c?[2J" in text_of(store)


def test_of_many_failures_the_newest_shards_are_read_and_few_objects(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_record(store)
    for shard in range(20):
        fail(store, f"0001-{shard:05d}-aa", "ab" if shard % 2 else "")
    read: list[str] = []
    original = Store.read_bytes
    monkeypatch.setattr(
        Store, "read_bytes", lambda self, key: read.append(key) or original(self, key)
    )
    now = status_of(store.root)
    assert len(now.failures) == status_module.NUM_FAILURES
    assert {f.shard_id for f in now.failures} == {f"0001-{n:05d}-aa" for n in (19, 17, 15)}
    assert len(read) == 1 + 3


def test_objects_of_one_size_are_not_mistaken_for_empty_ones(store: Store) -> None:
    old_record(store)
    fail(store, "s1", "a")
    assert [f.video_id for f in status_of(store.root).failures] == ["a"]
    fail(store, "s2", "b")
    assert [f.video_id for f in status_of(store.root).failures] == ["b", "a"]
    store.write_bytes(object_key("failures", "ava", "s3"), b"no Parquet" * 2000)
    now = status_of(store.root)
    assert [f.video_id for f in now.failures] == ["b", "a"]
    assert any("part-s3" in note for note in now.notes)


# --- the command -------------------------------------------------------------------------------


def test_the_command_shows_it_and_watches_until_the_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runner.invoke(app, ["status", store.root]).exit_code == 2
    lease = Lease(store)
    lease.acquire()
    record(store, age_s=0.0)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            record(store, state="done", age_s=0.0)
            lease.release()

    monkeypatch.setattr("fourdh_batch.cli.time.sleep", sleep)
    result = runner.invoke(app, ["status", store.root, "--watch", "7", "--json"])
    assert result.exit_code == 0, result.output
    states = [json.loads(line)["state"] for line in result.stdout.splitlines()]
    assert (states, slept) == (["running", "running", "done"], [7.0, 7.0])
    result = runner.invoke(app, ["status", store.root])
    assert "dataset ava: done" in result.stdout

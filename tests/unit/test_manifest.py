"""Commit records, fingerprints and the lease of an output root."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fourdh_batch.errors import OutputInUseError, SchemaError
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import (
    CommitRecord,
    Lease,
    ObjectRecord,
    VideoRecord,
    commit_key,
    fingerprint_of,
    read_commits,
    write_commit,
)


def record(shard_id: str = "s1") -> CommitRecord:
    return CommitRecord(
        shard_id=shard_id,
        dataset="ava",
        fingerprint="f",
        config_fingerprint="c",
        model_fingerprint="m",
        videos=(VideoRecord("a", "x", "ok"), VideoRecord("ü/..", "y", "failed")),
        objects={"tracks": ObjectRecord("tracks/ava/part-s1.parquet", 10, "00", 3)},
        schema_versions={"tracks": 1},
        timings_s={"decode": 0.25},
    )


def test_commit_records_come_back_as_written(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert read_commits(store) == {}
    for shard_id in ("s2", "s1", "../s3"):
        write_commit(store, record(shard_id))
    commits = read_commits(store)
    assert list(commits) == ["../s3", "s1", "s2"]
    assert commits["s1"] == record("s1")
    assert commits["s1"].num_rows == {"tracks": 3}
    assert {p.parent for p in tmp_path.rglob("*.json")} == {tmp_path / "_commits"}


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"record_version": 1}', b"null"])
def test_what_is_no_commit_record_is_named(tmp_path: Path, data: bytes) -> None:
    store = Store(str(tmp_path))
    store.write_bytes(commit_key("s1"), data)
    with pytest.raises(SchemaError, match=r"_commits/s1\.json: expected"):
        read_commits(store)


def test_a_commit_record_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    body = json.loads(record().to_json())
    store.write_bytes(commit_key("s1"), json.dumps({**body, "record_version": 99}).encode())
    with pytest.raises(SchemaError, match="needs a newer fourdh_batch"):
        read_commits(store)


def test_a_commit_record_of_version_1_knows_less_of_its_videos(tmp_path: Path) -> None:
    body = json.loads(record().to_json())
    for video in body["videos"]:
        del video["num_rows"], video["details"]
    old = CommitRecord.from_json(json.dumps({**body, "record_version": 1}).encode(), "k")
    assert {(tuple(v.num_rows), v.details) for v in old.videos} == {((), None)}


def test_a_lease_is_renewed_beside_the_work_and_tells_when_it_is_lost(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with Lease(store, duration_s=1.5) as lease, lease.kept():
        time.sleep(2)
        with pytest.raises(OutputInUseError):
            Lease(store).acquire()
        lease.check()
        for key, _ in store.list("_lease"):
            store.delete(key)
        time.sleep(1)
        with pytest.raises(OutputInUseError, match="its object was deleted"):
            lease.check()


def test_fingerprints_depend_on_content_not_on_order() -> None:
    assert fingerprint_of({"a": 1, "b": [1, 2]}) == fingerprint_of({"b": [1, 2], "a": 1})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 1.5})
    assert fingerprint_of({"a": "1"}) != fingerprint_of({"a": 1})
    # By `b2sum -l 128` of the canonical text. A change makes every user's shards start again.
    assert fingerprint_of({"a": [1, "ü", None]}) == "cf4ee949bc510f67bb4f2d98bdd0c86c"
    for value in (float("nan"), {1}, object()):
        with pytest.raises((TypeError, ValueError)):
            fingerprint_of({"a": value})


def test_a_second_driver_is_told_who_holds_the_output(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with (
        Lease(store),
        pytest.raises(OutputInUseError, match=rf"in use by .*, process {os.getpid()} since .*UTC;"),
    ):
        Lease(store).acquire()
    with Lease(store):
        pass


def test_deleting_the_named_object_breaks_a_lease(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    old = Lease(store)
    old.acquire()
    with pytest.raises(OutputInUseError) as caught:
        Lease(store).acquire()
    Path(str(caught.value).rpartition("delete ")[2]).unlink()
    with Lease(store), pytest.raises(OutputInUseError, match="lost its lease"):
        old.renew()
    with pytest.raises(OutputInUseError, match="lost its lease"):
        old.renew()
    old.release()


def test_a_lease_lapses_unless_renewed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    held = Lease(store, duration_s=2.0)
    held.acquire()
    time.sleep(1.2)
    held.renew()
    time.sleep(1.0)
    with pytest.raises(OutputInUseError, match="in use by"):
        Lease(store).acquire()
    time.sleep(1.2)
    with Lease(store), pytest.raises(OutputInUseError, match=r"lost its lease to .*process"):
        held.renew()


def test_a_killed_driver_blocks_its_machine_no_longer(tmp_path: Path) -> None:
    code = f"""
import time
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import Lease
Lease(Store({str(tmp_path)!r})).acquire()
print("held", flush=True)
time.sleep(60)
"""
    store = Store(str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"held\n"
        with pytest.raises(OutputInUseError, match=f"process {driver.pid} since"):
            Lease(store).acquire()
        driver.send_signal(signal.SIGKILL)
        time.sleep(0.2)  # not waited for: it is a zombie now
        with Lease(store):
            pass


def test_of_many_that_find_a_lapsed_lease_one_gets_it(tmp_path: Path) -> None:
    for turn in range(20):
        store = Store(str(tmp_path / str(turn)))
        if turn % 2:
            lapsed = Lease(store, duration_s=-1.0)
            lapsed.acquire()
        won: list[Lease] = []
        barrier = threading.Barrier(8)

        def acquire(
            store: Store = store, barrier: threading.Barrier = barrier, won: list[Lease] = won
        ) -> None:
            lease = Lease(store)
            barrier.wait()
            try:
                lease.acquire()
            except OutputInUseError:
                return
            won.append(lease)

        threads = [threading.Thread(target=acquire) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].renew()


def test_something_else_under_the_lease_key_is_not_overwritten(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("_lease/00000001.json", b"hello")
    with pytest.raises(OutputInUseError, match="is not a lease of ours"):
        Lease(store).acquire()
    assert store.read_bytes("_lease/00000001.json") == b"hello"

"""A root that is right is proved; whatever is done to it is named."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fourdh_batch.cli import app
from fourdh_batch.errors import ConfigError
from fourdh_batch.pipeline.plan import Video, plan_shards, read_generations
from fourdh_batch.storage import Store
from fourdh_batch.tables import check_shard, verify
from fourdh_batch.tables.manifest import (
    CommitRecord,
    Lease,
    VideoRecord,
    commit_key,
    read_commits,
    write_commit,
)
from fourdh_batch.tables.schema import make_table, schema_version
from fourdh_batch.tables.verify import VerifyReport, verify_root
from fourdh_batch.tables.writer import ObjectWriter, object_key
from tests.conftest import DATA
from tests.table_rows import finished_spool, publish, tracks_table, videos_table

runner = CliRunner()
HOSTILE_ID = "../ü\x1b[31m"
VIDEOS = {"s1": ["a", "b"], "s2": ["c", HOSTILE_ID]}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of two videos; the second has detections and a failed video."""
    root = tmp_path_factory.mktemp("sound")
    store = Store(str(root))
    for shard, videos in VIDEOS.items():
        spools = [finished_spool(store, v, 10, shard_id=shard) for v in videos]
        publish(store, spools, shard_id=shard)
    rewrite(store, "s2", "videos", [videos_table(HOSTILE_ID, status="failed"), with_boxes("c")])
    rewrite(store, "s2", "detections", [detections_table("c", 3)])
    rewrite(store, "s2", "failures", [failures_table(HOSTILE_ID)])
    rewrite(store, "s2", "tracks", [tracks_table("c", 10)])
    records = (VideoRecord(HOSTILE_ID, "c", "failed"), VideoRecord("c", "c", "ok"))
    edit(store, "s2", lambda record: replace(record, videos=records))
    return root


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Store:
    """A copy of it to be damaged."""
    shutil.copytree(sound, tmp_path / "root")
    return Store(str(tmp_path / "root"))


def with_boxes(video_id: str, num_detections: int = 3) -> Any:
    table = videos_table(video_id)
    index = table.schema.get_field_index("num_detections")
    return table.set_column(index, table.schema.field(index), pa.array([num_detections]))


def detections_table(video_id: str, num_rows: int) -> Any:
    rows = {
        "dataset": "ava",
        "video_id": video_id,
        "frame_index": list(range(num_rows)),
        "pts_s": 0.0,
        "detection_index": 0,
        "bbox_xyxy_px": np.zeros((num_rows, 4), np.float32),
        "score": 1.0,
        "mask_source": "box",
        "detector": "d",
        "model_fingerprint": "m",
    }
    return make_table("detections", rows, num_rows=num_rows)


def failures_table(video_id: str, num_rows: int = 1) -> Any:
    rows = {
        "dataset": "ava",
        "video_id": video_id,
        "uri": "/x",
        "shard_id": "s2",
        "stage": "open",
        "error_class": "EmptyFileError",
        "code": "EMPTY",
        "message": "no bytes",
        "model_fingerprint": "m",
        "attempts": 1,
    }
    return make_table("failures", rows, num_rows=num_rows)


def rewrite(store: Store, shard: str, name: str, tables: list[Any]) -> None:
    """Other rows for an object, and a commit record that promises just them."""
    with ObjectWriter(store, name, object_key(name, "ava", shard)) as writer:
        for table in tables:
            writer.write(table)
    edit(store, shard, lambda record: with_object(record, name, writer.record))


def with_object(record: CommitRecord, name: str, item: Any) -> CommitRecord:
    videos = tuple(replace(video, num_rows={}) for video in record.videos)
    return replace(record, videos=videos, objects={**record.objects, name: item})


def edit(store: Store, shard: str, change: Callable[[CommitRecord], CommitRecord]) -> None:
    write_commit(store, change(read_commits(store)[shard]))


def put_whole(store: Store, shard: str, name: str, data: bytes) -> None:
    """Any bytes as an object, and a commit record that promises just them."""
    key = object_key(name, "ava", shard)
    store.write_bytes(key, data)
    edit(
        store,
        shard,
        lambda record: with_object(
            record,
            name,
            replace(record.objects[name], num_bytes=len(data), sha256=sha256(data).hexdigest()),
        ),
    )


def found(report: VerifyReport) -> list[tuple[str, str, str]]:
    return sorted((p.kind, p.shard, p.video) for p in report.problems)


def check(store: Store, **options: Any) -> VerifyReport:
    report = verify_root(store.root, **options)
    assert report.num_problems == len(report.problems)
    assert report.exit_code == bool(report.problems)
    for problem in report.problems:
        assert problem.line().isprintable()
    return report


def test_a_sound_root_is_proved(store: Store) -> None:
    seen: list[verify.VerifyProgress] = []
    report = check(store, on_progress=seen.append)
    assert report.problems == []
    assert report.notes == []
    assert (report.shards, report.objects) == (2, 8)
    assert report.rows == {"tracks": 60, "detections": 3, "videos": 4, "failures": 1}
    assert report.videos == {"failed": 1, "ok": 3}
    assert report.num_bytes == sum(size for name in report.rows for _, size in store.list(name))
    assert seen[-1].shards_total == 2
    quick = check(store, quick=True)
    assert (quick.problems, quick.num_bytes) == ([], report.num_bytes)


def test_records_with_rows_per_video_are_held_to_them(store: Store) -> None:
    def promise(tracks: int) -> Callable[[CommitRecord], CommitRecord]:
        rows = {"tracks": 20, "detections": 0, "videos": 1, "failures": 0}
        return lambda record: replace(
            record,
            videos=(
                replace(record.videos[0], num_rows=rows),
                replace(record.videos[1], num_rows={**rows, "tracks": tracks}),
            ),
        )

    edit(store, "s1", promise(20))
    assert check(store).problems == []
    edit(store, "s1", promise(21))
    assert found(check(store)) == [("rows", "s1", ""), ("rows", "s1", "b")]
    assert found(check(store, quick=True)) == [("rows", "s1", "")]


def test_a_missing_object_is_named(store: Store) -> None:
    key = object_key("detections", "ava", "s1")
    store.delete(key)
    for quick in (False, True):
        report = check(store, quick=quick)
        assert found(report) == [("missing", "s1", "")]
        assert report.problems[0].key == key


def test_a_cut_object_is_named(store: Store) -> None:
    key = object_key("tracks", "ava", "s2")
    size = len(store.read_bytes(key))
    store.write_bytes(key, store.read_bytes(key)[: size // 2])
    for quick in (False, True):
        report = check(store, quick=quick)
        assert found(report) == [("size", "s2", "")]
        assert report.problems[0].got == f"{size // 2} bytes"


def test_a_flipped_bit_is_named_unless_in_a_hurry(store: Store) -> None:
    key = object_key("tracks", "ava", "s2")
    data = bytearray(store.read_bytes(key))
    data[len(data) // 3] ^= 1
    store.write_bytes(key, bytes(data))
    assert found(check(store)) == [("checksum", "s2", "")]
    assert check(store, quick=True).problems == []


def test_objects_of_two_shards_that_were_exchanged_are_named(store: Store) -> None:
    one, two = (object_key("tracks", "ava", shard) for shard in ("s1", "s2"))
    a, b = store.read_bytes(one), store.read_bytes(two)
    store.write_bytes(one, b)
    store.write_bytes(two, a)
    assert [(p.kind, p.shard) for p in check(store).problems] != []
    assert {p.shard for p in check(store).problems} == {"s1", "s2"}


@pytest.mark.parametrize(
    ("tables", "kinds"),
    [
        (
            [tracks_table("a", 10), tracks_table("a", 1, first=9)],
            {("order", ""), ("duplicate", "a")},
        ),
        ([tracks_table("b", 10), tracks_table("a", 10)], {("order", "")}),
        ([tracks_table("a", 10), tracks_table("b", 10), tracks_table("c", 1)], {("video", "c")}),
        ([tracks_table("a", 10), tracks_table("b", 10, dataset="other")], {("video", "")}),
    ],
)
def test_rows_that_do_not_belong_are_named(
    store: Store, tables: list[Any], kinds: set[tuple[str, str]]
) -> None:
    rewrite(store, "s1", "tracks", tables)
    report = check(store)
    assert {(p.kind, p.video) for p in report.problems} == kinds
    assert {p.shard for p in report.problems} == {"s1"}


def test_a_row_that_stands_twice_far_apart_is_named_with_frame_and_track(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_shard, "BATCH_ROWS", 7)
    rewrite(store, "s1", "tracks", [tracks_table("a", 10), tracks_table("b", 10)])
    assert check(store).problems == []
    again = tracks_table("a", 10).slice(3, 1)
    rewrite(store, "s1", "tracks", [tracks_table("a", 10), tracks_table("b", 10), again])
    duplicate = next(p for p in check(store).problems if p.kind == "duplicate")
    assert (duplicate.video, duplicate.got) == ("a", "frame_index 1, track_id 2 2 times")


def test_a_detection_that_stands_twice_is_named(store: Store) -> None:
    rewrite(store, "s2", "detections", [detections_table("c", 3), detections_table("c", 1)])
    rewrite(store, "s2", "videos", [videos_table(HOSTILE_ID, status="failed"),
                                    with_boxes("c", 4)])  # fmt: skip
    assert {p.kind for p in check(store).problems} == {"order", "duplicate"}


def test_tables_of_a_shard_that_contradict_each_other_are_named(store: Store) -> None:
    rewrite(store, "s2", "detections", [detections_table("c", 2)])
    assert found(check(store)) == [("rows", "s2", "c")]
    rewrite(store, "s2", "detections", [detections_table("c", 3)])
    rewrite(store, "s2", "failures", [failures_table("c")])
    assert found(check(store)) == [("status", "s2", HOSTILE_ID)]
    rewrite(store, "s2", "failures", [failures_table(HOSTILE_ID, num_rows=2)])
    assert check(store).problems == []
    rewrite(store, "s1", "videos", [videos_table("a"), videos_table("b", status="partial")])
    assert found(check(store)) == [("video", "s1", "b")]
    rewrite(store, "s1", "videos", [videos_table("a")])
    assert found(check(store)) == [("rows", "s1", "b")]


def test_a_count_that_is_not_true_is_named(store: Store) -> None:
    edit(
        store,
        "s1",
        lambda record: with_object(record, "tracks", replace(record.objects["tracks"], num_rows=7)),
    )
    report = check(store)
    assert found(report) == [("rows", "s1", "")]
    assert (report.problems[0].expected, report.problems[0].got) == ("7 rows", "40")


def test_a_video_in_two_shards_is_named(store: Store) -> None:
    spools = [finished_spool(store, v, 10, shard_id="s3") for v in ("b", "x")]
    publish(store, spools, "ava", shard_id="s3")
    for quick in (False, True):
        report = check(store, quick=quick)
        assert [(p.kind, p.video) for p in report.problems] == [("twice", "b")]
    spool = finished_spool(store, "c", 10, dataset="own", shard_id="s4")
    publish(store, [spool], "own", shard_id="s4")  # another dataset's video of the same name
    assert len(check(store).problems) == 1
    assert check(store, dataset="own").problems == []


def test_a_video_that_a_record_names_twice_is_named(store: Store) -> None:
    edit(store, "s1", lambda r: replace(r, videos=(*r.videos, r.videos[0])))
    assert ("twice", "s1", "a") in found(check(store))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no Parquet", b"PAR1" + bytes(100) + b"PAR1"])
def test_an_object_that_never_was_a_table_is_named(store: Store, data: bytes) -> None:
    put_whole(store, "s1", "tracks", data)
    assert found(check(store)) == [("unreadable", "s1", "")]


def test_a_table_damaged_before_its_checksum_was_taken_is_named(store: Store) -> None:
    whole = store.read_bytes(object_key("tracks", "ava", "s1"))
    for cut in (len(whole) // 2, len(whole) - 1):
        put_whole(store, "s1", "tracks", whole[:cut])
        assert found(check(store)) == [("unreadable", "s1", "")]
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for at in range(4, len(whole) - footer, (len(whole) - footer) // 8):
        broken = bytearray(whole)
        broken[at : at + 40] = os.urandom(40)
        put_whole(store, "s1", "tracks", bytes(broken))
        check(store)  # says what it likes, and comes back


def test_other_columns_are_named(store: Store) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(tracks_table("a", 10).drop_columns(["betas"]), sink)
    put_whole(store, "s1", "tracks", sink.getvalue().to_pybytes())
    report = check(store)
    assert found(report) == [("columns", "s1", "")]
    assert "betas" in report.problems[0].expected


@pytest.mark.parametrize("name", ["detections", "videos"])
def test_older_schema_versions_are_right_and_newer_ones_need_newer_code(
    store: Store, name: str, tmp_path: Path
) -> None:
    old = pq.read_table(DATA / "tables" / f"{name}-v1.parquet")
    check_ = check_shard.ObjectCheck(read_commits(store)["s1"], name)
    assert not check_._columns_fit(old.schema)
    edit(store, "s1", lambda r: replace(r, schema_versions={**r.schema_versions, name: 1}))
    check_ = check_shard.ObjectCheck(read_commits(store)["s1"], name)
    assert check_._columns_fit(old.schema)
    newer = schema_version(name) + 1
    edit(store, "s1", lambda r: replace(r, schema_versions={**r.schema_versions, name: newer}))
    report = check(store, quick=True)
    assert found(report) == [("schema", "s1", "")]
    assert "newer fourdh_batch" in report.problems[0].got


HOSTILE: list[Any] = [
    b"",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"record_version": 99}',
    b'{"record_version": 1, "videos": 7}',
    b"[" * 200_000,
    b'{"record_version": ' + b"9" * 10_000 + b"}",
    {"shard_id": 7},
    {"dataset": None},
    {"dataset": "../../x"},
    {"videos": [{"video_id": 3, "content_fingerprint": "c", "status": "ok"}]},
    {"videos": [{"video_id": "a", "content_fingerprint": "c", "status": ["ok"]}]},
    {"videos": [{"video_id": "\ud800", "content_fingerprint": "c", "status": "odd\x1b"}]},
    {"videos": []},
    {"objects": {}},
    {"objects": {"tracks": 5}},
    {"objects": {"people": {"key": "k", "num_bytes": 1, "sha256": "", "num_rows": 1}}},
    {"schema_versions": {"tracks": "1"}},
    {"schema_versions": {}},
    {"shard_id": "s9"},
]


@pytest.mark.parametrize("change", HOSTILE, ids=range(len(HOSTILE)))
def test_a_made_up_commit_record_is_named_and_survived(store: Store, change: Any) -> None:
    key = commit_key("s1")
    if isinstance(change, dict):
        body = {**json.loads(store.read_bytes(key)), **change}
        change = json.dumps(body).encode()
    store.write_bytes(key, change)
    report = check(store)
    assert report.problems
    assert all(p.shard == "s1" or p.key == key or "part-s1" in p.key for p in report.problems)
    assert report.shards in (1, 2)


@pytest.mark.parametrize(
    "key", ["../secret", "tracks/../../secret", "/etc/hostname", "tracks/ava/part-s2.parquet", ""]
)
def test_no_key_of_a_record_leads_out_of_its_shard(
    store: Store, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(store.root).parent / "secret").write_bytes(b"x" * 10)
    body = json.loads(store.read_bytes(commit_key("s1")))
    body["objects"]["tracks"]["key"] = key
    store.write_bytes(commit_key("s1"), json.dumps(body).encode())
    opened: list[str] = []
    original = Store.open_read
    monkeypatch.setattr(
        Store, "open_read", lambda self, key: opened.append(key) or original(self, key)
    )
    report = check(store)
    assert [(p.kind, p.shard) for p in report.problems] == [("commit", "s1")]
    assert "not opened" in report.problems[0].got
    assert len(opened) == 7
    assert len(set(opened)) == 7


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("tracks/ava/part-s3.parquet", "stray"),
        ("tracks/readme.json", "stray"),
        ("tracks/x.parquet", "stray"),
        ("failures/other/part-s1.parquet", "stray"),
        ("videos/ava/part-s1.parquet.bak", "stray"),
        ("tracks/ava/deep/part-s1.parquet", "stray"),
        ("_commits/readme.txt", "commit"),
        ("tracks/_metadata", None),
        ("tracks/.hidden/x.parquet", None),
        ("_notes/x.txt", None),
        ("notes.txt", None),
    ],
)
def test_what_a_reader_would_take_for_a_table_is_named(
    store: Store, key: str, kind: str | None
) -> None:
    store.write_bytes(key, b"x")
    report = check(store)
    assert [(p.kind, p.key) for p in report.problems] == ([(kind, key)] if kind else [])


def test_an_uncommitted_shard_is_stray_unless_a_run_is_writing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.delete(commit_key("s1"))
    assert {p.kind for p in check(store).problems} == {"stray"}
    monkeypatch.setattr(verify, "BACKOFF_S", 0.01)
    with Lease(store):
        report = check(store)
        assert report.problems == []
        assert "a run is writing" in report.notes[0]
        assert len(report.notes) == 1 + 4
        store.write_bytes("tracks/readme.json", b"x")
        assert [p.kind for p in check(store).problems] == ["stray"]


def test_a_shard_that_is_published_during_the_look_is_looked_at_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "BACKOFF_S", 0.01)
    record, key = read_commits(store)["s1"], object_key("tracks", "ava", "s1")
    new = Store(store.root + "-new")
    spools = [finished_spool(new, v, 30) for v in VIDEOS["s1"]]
    publish(new, spools)
    looks = 0
    original = verify._Verification._look_once

    def look_once(self: Any, key_: str, sizes: dict[str, int]) -> Any:
        nonlocal looks
        if key_ == commit_key("s1"):
            looks += 1
            if looks == 3:
                for item in record.objects.values():
                    store.write_bytes(item.key, new.read_bytes(item.key))
                store.write_bytes(key_, new.read_bytes(key_))
        return original(self, key_, sizes)

    store.write_bytes(key, new.read_bytes(key))  # the first object is put already
    monkeypatch.setattr(verify._Verification, "_look_once", look_once)
    with Lease(store):
        report = check(store)
    assert report.problems == []
    assert (looks, report.rows["tracks"]) == (3, 140)
    looks = 10
    store.write_bytes(key, b"x")
    with Lease(store):
        assert found(check(store)) == [("size", "s1", "")]


# --- the corpus --------------------------------------------------------------------------------


def plan(store: Store, shards: dict[str, list[str]], dataset: str = "ava") -> None:
    body = {"generation": 1, "dataset": dataset, "shards": shards}
    store.write_bytes(f"_plan/{dataset}/000001.json", json.dumps(body).encode())


def planned(store: Store) -> Callable[[str], Iterator[tuple[str, str]]]:
    return lambda name: (row for _, rows in read_generations(store, name) for row in rows)


def test_every_planned_video_must_be_done(store: Store) -> None:
    plan(store, VIDEOS)
    report = check(store, planned=planned(store))
    assert (report.problems, report.planned) == ([], 4)
    plan(store, {**VIDEOS, "s3": ["d", "e"]})
    report = check(store, planned=planned(store))
    assert found(report) == [("not_done", "s3", "d"), ("not_done", "s3", "e")]


def test_a_video_outside_its_planned_shard_would_be_done_twice(store: Store) -> None:
    plan(store, {"s1": ["a"], "s2": VIDEOS["s2"], "s3": ["b"]})
    assert found(check(store, planned=planned(store))) == [("plan", "s1", "b")]
    plan(store, {"s1": ["a"], "s2": VIDEOS["s2"]})
    assert found(check(store, planned=planned(store))) == [("plan", "s1", "b")]


@pytest.mark.parametrize("data", [b"{}", b"[]", b"\xff", b'{"shards": {"s1": 7}}'])
def test_a_damaged_plan_is_named(store: Store, data: bytes) -> None:
    store.write_bytes("_plan/ava/000001.json", data)
    assert [(p.kind, p.key) for p in check(store, planned=planned(store)).problems] == [
        ("plan", "_plan/ava")
    ]


def test_a_planned_root_without_a_commit_has_everything_to_do(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    plan_shards(
        store,
        "späť",
        [Video(v, v, 1, v) for v in "abc"],
        videos_per_shard=2,
        mb_per_shard=1,
    )
    report = check(store, planned=planned(store))
    assert [(p.kind, p.video) for p in report.problems] == [("not_done", v) for v in "abc"]


def test_a_corpus_counts_instead_of_the_plan(store: Store) -> None:
    plan(store, {**VIDEOS, "s3": ["removed since"]})
    corpus = [(v, "c") for videos in VIDEOS.values() for v in videos]
    assert check(store, planned=planned(store), corpus=corpus).problems == []
    corpus += [("new", "c")]
    corpus[0] = ("a", "other content")
    report = check(store, planned=planned(store), corpus=corpus)
    assert found(report) == [("changed", "s1", "a"), ("not_done", "", "new")]
    publish(store, [finished_spool(store, "x", 10, dataset="own", shard_id="s4")], "own",
            shard_id="s4")  # fmt: skip
    with pytest.raises(ConfigError, match="which dataset"):
        check(store, corpus=corpus)
    assert len(check(store, corpus=corpus, dataset="ava").problems) == 2
    twice = check(store, corpus=[*corpus, corpus[-1]], dataset="ava")
    assert ("plan", "", "new") in found(twice)


# --- beside the tables -------------------------------------------------------------------------


def test_what_lies_about_is_noted(store: Store) -> None:
    store.write_bytes("_work/s1/x/part.arrow", b"x")
    store.write_bytes("_work/s7/x/part.arrow", b"x")
    report = check(store)
    assert report.problems == []
    assert any("1 objects of 1 finished shards" in note for note in report.notes)
    assert any("1 unfinished shards" in note for note in report.notes)


def test_no_output_is_no_proof(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no output"):
        verify_root(str(tmp_path))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="no output"):
        verify_root(str(tmp_path))


def test_a_dataset_that_is_not_there_is_not_proved(store: Store) -> None:
    with pytest.raises(ConfigError, match="no dataset 'avva'; there are 'ava'"):
        verify_root(store.root, dataset="avva")
    long = "x" * 500
    plan_shards(store, long, [Video("a", "a", 1, "a")], videos_per_shard=1, mb_per_shard=1)
    plan(store, VIDEOS)
    report = check(store, planned=planned(store))
    assert report.problems == []
    assert "was not looked at" in report.notes[0]
    report = check(store, dataset=long, planned=planned(store))
    assert [(p.kind, p.video) for p in report.problems] == [("not_done", "a")]
    store.delete_tree("_commits")
    for name in report.rows:
        store.delete_tree(name)
    assert [p.kind for p in check(store).problems] == ["not_done"]


def test_many_problems_are_counted_and_some_are_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "MAX_PROBLEMS", 3)
    plan(store, {**VIDEOS, "s3": [f"v{i}" for i in range(10)]})
    report = verify_root(store.root, planned=planned(store))
    assert (report.num_problems, len(report.problems)) == (10, 3)


def test_an_object_that_is_a_folder_or_a_pipe_does_not_hold_it_up(store: Store) -> None:
    path = Path(store.root, object_key("tracks", "ava", "s1"))
    path.unlink()
    path.mkdir()
    assert found(check(store)) == [("missing", "s1", "")]
    path.rmdir()
    os.mkfifo(path)
    edit(
        store,
        "s1",
        lambda r: with_object(r, "tracks", replace(r.objects["tracks"], num_bytes=0)),
    )
    started = time.monotonic()
    assert [p.kind for p in check(store).problems] == ["unreadable"]
    assert time.monotonic() - started < 10


def test_the_command_says_what_is_wrong_and_ends_accordingly(store: Store) -> None:
    plan(store, VIDEOS)
    result = runner.invoke(app, ["verify", store.root])
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"{store.root}: proved\n")
    store.write_bytes("tracks/readme.json", b"x")
    result = runner.invoke(app, ["verify", store.root, "--json", "--quick"])
    assert result.exit_code == 1
    body = json.loads(result.stdout)
    assert (body["exit_code"], body["problems"][0]["key"]) == (1, "tracks/readme.json")
    assert body["problems"] == [asdict(p) for p in verify_root(store.root).problems]
    result = runner.invoke(app, ["verify", store.root])
    assert "stray: tracks/readme.json: expected" in result.stdout
    assert runner.invoke(app, ["verify", f"{store.root}/nowhere"]).exit_code == 2
    assert runner.invoke(app, ["verify"]).exit_code == 2

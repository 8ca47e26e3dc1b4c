"""Spools and published objects."""

from __future__ import annotations

import hashlib
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from fourdh_batch.errors import LostRowsError, SchemaError, StorageError
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import read_commits
from fourdh_batch.tables.schema import TABLES, arrow_schema
from fourdh_batch.tables.writer import (
    MemorySpool,
    ObjectWriter,
    PublishedShard,
    SavedSpool,
    WorkSpool,
    object_key,
    publish_shard,
    saved_spools,
)
from tests.table_rows import finished_spool, publish, tracks_table, videos_table

OF_A_SHARD = {
    "shard_id": "s1",
    "dataset": "ava",
    "fingerprint": "f",
    "config_fingerprint": "c",
    "model_fingerprint": "m",
}
HOSTILE = ["../x", "a/b", "Grüße 映像", ".", "..", "CON", "dots...", "_hidden", "=", "%2F", "~"]
HOSTILE += ["x" * 300, " ", ""]


def test_a_published_shard_holds_its_videos_in_order_with_track_lengths(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    record = publish(store, [finished_spool(store, "b", 20), finished_spool(store, "a", 30)])
    table = pq.read_table(tmp_path / "tracks")
    assert table.schema.equals(arrow_schema("tracks"), check_metadata=True)
    assert table.column("video_id").to_pylist() == ["a"] * 60 + ["b"] * 40
    assert table.column("track_len").to_pylist() == [30] * 60 + [20] * 40
    expected = pa.concat_tables([tracks_table("a", 10, first=f) for f in (0, 10, 20)])
    assert table.slice(0, 60).drop_columns("track_len") == expected.drop_columns("track_len")
    assert [video.video_id for video in record.videos] == ["a", "b"]
    assert read_commits(store) == {"s1": record}
    data = (tmp_path / record.objects["tracks"].key).read_bytes()
    assert record.objects["tracks"].num_bytes == len(data)
    assert record.objects["tracks"].sha256 == hashlib.sha256(data).hexdigest()
    assert record.num_rows == {"tracks": 100, "detections": 0, "videos": 2, "failures": 0}
    assert store.list("_work") == []


DATASETS = ["ava", "007", "2024-01-01", "a b/ü=", "dataset=x", "_x", "null"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_pandas_and_duckdb_read_the_dataset_as_a_plain_string(tmp_path: Path, dataset: str) -> None:
    store = Store(str(tmp_path))
    publish(store, [finished_spool(store, "a", 10, dataset=dataset)], dataset)
    frame = pd.read_parquet(tmp_path / "tracks")
    assert frame["dataset"].dtype == "str"
    assert frame["dataset"].unique().tolist() == [dataset]
    for hive in ("true", "false"):
        rows = duckdb.sql(
            f"select distinct dataset from read_parquet('{tmp_path}/tracks/**/*.parquet', "
            f"hive_partitioning={hive})"
        ).fetchall()
        assert rows == [(dataset,)]


def test_a_corpus_without_people_reads_as_empty_tables(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    publish(store, [finished_spool(store, "a", 0)])
    for name in TABLES:
        frame = pd.read_parquet(tmp_path / name)
        assert len(frame) == (name == "videos")
        assert list(frame.columns) == arrow_schema(name).names


def test_the_bytes_of_an_object_do_not_depend_on_the_division_into_parts(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    rows = tracks_table("a", 300)
    digests = set()
    for step in (1, 7, 64, 65, 599, 600):
        with ObjectWriter(store, "tracks", "tracks/ava/x.parquet", row_group_rows=64) as writer:
            for first in range(0, 600, step):
                writer.write(rows.slice(first, step))
        digests.add(writer.record.sha256)
    assert len(digests) == 1
    assert pq.read_table(tmp_path / "tracks") == rows


def test_an_exception_while_writing_publishes_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def write_half() -> None:
        with ObjectWriter(store, "tracks", "tracks/ava/x.parquet", row_group_rows=5) as writer:
            writer.write(tracks_table("a", 10))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert store.list() == []


def test_an_exception_keeps_the_object_of_before(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    key = object_key("tracks", "ava", "s1")
    with ObjectWriter(store, "tracks", key) as writer:
        writer.write(tracks_table("a", 10))
    before = store.read_bytes(key)
    with pytest.raises(SchemaError, match="expected"), ObjectWriter(store, "tracks", key) as writer:
        writer.write(videos_table("a"))
    assert store.read_bytes(key) == before
    assert [k for k, _ in store.list()] == [key]


def test_a_spool_that_is_not_finished_stops_the_shard_and_leaves_no_object(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    done = finished_spool(store, "a", 10)
    half = WorkSpool(store, "s1")
    half.begin("b")
    half.append("tracks", tracks_table("b", 10))
    half.save()
    saved = SavedSpool(store, "s1", half.name)
    with pytest.raises(StorageError, match=r"video b: not finished"):
        publish_shard(store, videos={"a": done, "b": saved}, **OF_A_SHARD)
    assert {key.split("/")[0] for key, _ in store.list()} == {"_work"}


def test_a_video_without_its_row_in_videos_stops_the_shard(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    spool = WorkSpool(store, "s1")
    spool.begin("a")
    spool.finish({"track_len": {}})
    spool.save()
    spool = SavedSpool(store, "s1", spool.name)
    with pytest.raises(SchemaError, match="expected one row of videos for each of"):
        publish(store, [spool])
    assert {key.split("/")[0] for key, _ in store.list()} == {"_work"}


@pytest.mark.parametrize("video_id", HOSTILE)
def test_hostile_ids_stay_inside_the_root_and_apart(tmp_path: Path, video_id: str) -> None:
    root = tmp_path / "deep" / "root"
    store = Store(str(root))
    spools = [finished_spool(store, v, 10, part_bytes=1) for v in (video_id, video_id + "x")]
    for spool in spools:
        [name] = spool.finished
        assert len(list(spool.read("tracks", name))) == 1
    publish(store, spools)
    assert {p.relative_to(tmp_path).parts[:2] for p in tmp_path.rglob("*") if p.is_file()} == {
        ("deep", "root")
    }
    ids = pq.read_table(root / "tracks").column("video_id").unique().to_pylist()
    assert ids == [video_id, video_id + "x"]


def test_rows_out_of_order_or_twice_are_refused(tmp_path: Path) -> None:
    spool = WorkSpool(Store(str(tmp_path)), "s1")
    spool.begin("a")
    spool.append("tracks", tracks_table("a", 5, first=5))
    with pytest.raises(SchemaError, match=r"got \(9, 1\) after \(9, 2\)"):
        spool.append("tracks", tracks_table("a", 5, first=9))
    with pytest.raises(SchemaError, match="expected rows of video a, got"):
        spool.append("tracks", tracks_table("b", 5, first=20))


def test_track_lengths_must_add_up(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    spool = WorkSpool(store, "s1")
    spool.begin("a")
    spool.append("tracks", tracks_table("a", 5))
    with pytest.raises(SchemaError, match="adds up to 9, but 10 rows"):
        spool.finish({"track_len": {"1": 9}})
    spool.finish({"track_len": {"1": 5, "3": 5}})
    spool.save()
    with pytest.raises(SchemaError, match=r"lacks the tracks \[2\]"):
        list(SavedSpool(store, "s1", spool.name).read("tracks", "a"))


def rows(spool: SavedSpool, video_id: str, name: str = "tracks") -> list[int]:
    """Frames of a finished video."""
    return [f for t in spool.read(name, video_id) for f in t.column("frame_index").to_pylist()]


@pytest.mark.parametrize("part_bytes", [1, 2**20])
def test_a_spool_goes_on_from_what_was_saved_and_forgets_what_came_after(
    tmp_path: Path, part_bytes: int
) -> None:
    store = Store(str(tmp_path))
    first = WorkSpool(store, "s1", part_bytes=part_bytes)
    first.begin("0")
    first.append("tracks", tracks_table("0", 7))
    first.finish({"track_len": {"1": 7, "2": 7}})
    first.begin("a")
    first.append("tracks", tracks_table("a", 10))
    first.save(b"state", fingerprint="f", position=10)
    first.append("tracks", tracks_table("a", 10, first=10))  # lost with its process

    saved = SavedSpool(store, "s1", first.name)
    assert saved.unfinished is not None
    assert [saved.unfinished[k] for k in ("video_id", "fingerprint", "position")] == ["a", "f", 10]
    assert rows(saved, "0") == [f for f in range(7) for _ in range(2)]
    second = WorkSpool(store, "s1", part_bytes=part_bytes)
    assert second.take_up(saved) == b"state"
    with pytest.raises(SchemaError, match="expected increasing"):
        second.append("tracks", tracks_table("a", 5, first=9))
    second.append("tracks", tracks_table("a", 5, first=10))
    second.append("videos", videos_table("a"))
    second.finish({"track_len": {"1": 15, "2": 15}})
    second.begin("b")
    second.append("tracks", tracks_table("b", 3))
    second.finish({"track_len": {"1": 3, "2": 3}})
    second.save()
    done = SavedSpool(store, "s1", second.name)
    assert rows(done, "a") == [f for f in range(15) for _ in range(2)]
    assert rows(done, "b") == [0, 0, 1, 1, 2, 2]
    assert sorted(done.finished) == ["a", "b"]
    assert done.unfinished is None
    with pytest.raises(StorageError, match="video c: not finished"):
        list(done.read("tracks", "c"))


def test_many_short_videos_share_a_few_objects(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    spool = WorkSpool(store, "s1")
    for k in range(50):
        spool.begin(f"{k:02d}")
        spool.append("tracks", tracks_table(f"{k:02d}", 3))
        spool.append("videos", videos_table(f"{k:02d}"))
        spool.finish({"track_len": {"1": 3, "2": 3}})
    spool.save()
    assert len(store.list("_work")) == 3  # rows of two tables and the index
    record = publish(store, [SavedSpool(store, "s1", spool.name)])
    assert record.num_rows["tracks"] == 300
    assert {video.num_rows["tracks"] for video in record.videos} == {6}
    assert not store.list("_work")


def test_a_video_that_was_given_up_leaves_no_rows_behind(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    spool = WorkSpool(store, "s1")
    spool.begin("a")
    spool.append("tracks", tracks_table("a", 4))
    spool.begin("b")  # instead of finishing
    spool.append("tracks", tracks_table("b", 2))
    spool.finish({"track_len": {"1": 2, "2": 2}})
    spool.save()
    assert rows(SavedSpool(store, "s1", spool.name), "b") == [0, 0, 1, 1]


def test_a_superseded_writer_cannot_mix_its_rows_in(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    old, new = (WorkSpool(store, "s1", part_bytes=1) for _ in range(2))
    for spool in (old, new):
        spool.begin("a")
    old.append("tracks", tracks_table("a", 10))
    new.append("tracks", tracks_table("a", 3))
    old.append("tracks", tracks_table("a", 10, first=10))
    new.finish({"track_len": {"1": 3, "2": 3}})
    new.save()
    [saved] = saved_spools(store, "s1")
    assert saved.name == new.name
    assert rows(saved, "a") == [0, 0, 1, 1, 2, 2]


def test_a_lost_part_is_noticed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    finished_spool(store, "a", 20, part_bytes=1)
    [part, _] = [key for key, _ in store.list("_work") if "-tracks-" in key]
    store.write_bytes(part, store.read_bytes(part)[:-500])
    for _ in range(2):
        [spool] = saved_spools(store, "s1")
        with pytest.raises(StorageError, match=r"video a: _work/s1/[0-9a-f]+-tracks-"):
            list(spool.read("tracks", "a"))
        store.delete(part)


@pytest.mark.parametrize("damage", [b"", b"\0" * 20, b"x" * 80])
def test_a_damaged_index_is_not_used(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(str(tmp_path))
    finished_spool(store, "a", 20)
    [index] = [key for key, _ in store.list("_work") if key.endswith(".index")]
    whole = store.read_bytes(index)
    for body in (damage, whole[:-9] + damage, damage + whole[max(1, len(damage)) :]):
        store.write_bytes(index, body)
        assert saved_spools(store, "s1") == []
        assert "saved rows are not used" in caplog.text


# --- rows of before ----------------------------------------------------------------------------


def test_rows_of_single_videos_are_taken_out_of_published_objects(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    names = ["a", "ab", "b", "ü"]
    spools = [finished_spool(store, v, 1500, step=500) for v in names]  # several row groups
    before = publish(store, spools)
    body = store.read_bytes(before.objects["tracks"].key)
    earlier = PublishedShard(store, before)
    again = finished_spool(store, "ab", 10)
    record = publish_shard(
        store, videos={"a": earlier, "b": earlier, "ab": again, "ü": earlier}, **OF_A_SHARD
    )
    earlier.close()
    assert [video.num_rows["tracks"] for video in record.videos] == [3000, 20, 3000, 3000]
    tracks = pq.read_table(tmp_path / "tracks")
    assert tracks.filter(pc.equal(tracks["video_id"], "ab")).num_rows == 20
    # and back: as if nothing had been taken over
    last = PublishedShard(store, record)
    whole = finished_spool(store, "ab", 1500, step=500)
    publish_shard(store, videos={"ab": whole, **dict.fromkeys("abü", last)}, **OF_A_SHARD)
    last.close()
    assert store.read_bytes(before.objects["tracks"].key) == body


def test_a_shard_that_is_cut_off_while_it_is_replaced_is_not_taken_for_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    before = publish(store, [finished_spool(store, "a", 10)])
    put, num_puts = Store.put_file, 0

    def cut(self: Store, path: Path, key: str) -> None:
        nonlocal num_puts
        num_puts += 1
        if num_puts > 1:
            raise StorageError("cut off")
        put(self, path, key)

    monkeypatch.setattr(Store, "put_file", cut)
    with pytest.raises(StorageError, match="cut off"):
        publish(store, [finished_spool(store, "a", 20)])
    [record] = read_commits(store).values()
    assert record.is_void
    assert record.objects == before.objects  # and readers still find the objects
    monkeypatch.undo()
    after = publish(store, [finished_spool(store, "a", 20)])
    assert read_commits(store)["s1"] == after


def test_rows_of_before_that_are_not_those_committed_are_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    record = publish(store, [finished_spool(store, "a", 10)])
    publish(store, [finished_spool(store, "a", 20)])  # behind its back
    earlier = PublishedShard(store, record)
    with pytest.raises(LostRowsError, match=r"part-s1\.parquet: expected SHA-256"):
        list(earlier.read("tracks", "a"))
    earlier.close()
    store.delete(record.objects["tracks"].key)
    again = PublishedShard(store, record)
    with pytest.raises(LostRowsError, match=r"tracks/ava/part-s1\.parquet: is gone"):
        list(again.read("tracks", "a"))
    again.close()


def test_memory_and_store_spools_give_the_same_rows(tmp_path: Path) -> None:
    stored = finished_spool(Store(str(tmp_path)), "a", 30)
    memory = MemorySpool("a")
    for first in range(0, 30, 10):
        memory.append("tracks", tracks_table("a", 10, first=first))
    memory.append("videos", videos_table("a"))
    with pytest.raises(ValueError, match="not finished"):
        memory.tables()
    memory.finish({"track_len": {"1": 30, "2": 30}})
    tables = memory.tables()
    assert tables["tracks"] == pa.concat_tables(list(stored.read("tracks", "a")))
    assert tables["videos"] == pa.concat_tables(list(stored.read("videos", "a")))
    assert tables["failures"] == arrow_schema("failures").empty_table()


def test_an_object_is_compressed_and_has_small_row_groups(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    key = object_key("tracks", "ava", "s1")
    with ObjectWriter(store, "tracks", key, row_group_rows=64) as writer:
        writer.write(tracks_table("a", 50))
        writer.write(tracks_table("b", 50))
    metadata = pq.ParquetFile(tmp_path / key).metadata
    assert [metadata.row_group(i).num_rows for i in range(4)] == [64, 64, 64, 8]
    columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    by_name = {column.path_in_schema: column for column in columns}
    pose = by_name["body_pose.list.element"]
    assert pose.compression == "ZSTD"
    assert "BYTE_STREAM_SPLIT" in pose.encodings
    assert not pose.has_dictionary_page
    assert not pose.is_stats_set
    assert by_name["video_id"].statistics.min == by_name["video_id"].statistics.max == "a"

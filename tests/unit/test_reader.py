"""Published tables read back."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from fourdh_batch.errors import SchemaError, StorageError
from fourdh_batch.storage import Store
from fourdh_batch.tables import reader
from fourdh_batch.tables.manifest import commit_key, void_commit
from fourdh_batch.tables.reader import read_arrow, read_table, read_tracks, smpl_arrays
from fourdh_batch.tables.schema import arrow_schema, check_table, table_schema
from fourdh_batch.tables.writer import object_key
from tests.conftest import DATA
from tests.table_rows import finished_spool, publish, tracks_table

OLDER = sorted((DATA / "tables").glob("*.parquet"))


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Two datasets, three videos."""
    store = Store(str(tmp_path))
    publish(store, [finished_spool(store, v, 10) for v in ("a", "b")], shard_id="s1")
    spool = finished_spool(store, "a", 20, dataset="own", shard_id="s2")
    publish(store, [spool], "own", shard_id="s2")
    return str(tmp_path)


def test_all_rows_come_back_in_order(root: str) -> None:
    frame = read_tracks(root)
    assert frame.equals(pd.read_parquet(f"{root}/tracks"))
    assert frame.groupby(["dataset", "video_id"]).size().to_dict() == {
        ("ava", "a"): 20,
        ("ava", "b"): 20,
        ("own", "a"): 40,
    }
    ordered = frame.sort_values(["dataset", "video_id", "frame_index", "track_id"])
    assert ordered.index.equals(frame.index)
    assert read_table(root, "videos")["video_id"].tolist() == ["a", "b", "a"]
    assert len(read_table(root, "failures")) == 0


def test_rows_and_columns_can_be_chosen(root: str) -> None:
    assert len(read_tracks(root, dataset="own")) == 40
    assert len(read_tracks(root, video_id="a")) == 60
    assert len(read_tracks(root, video_id=["a", "b"], dataset=["ava"])) == 40
    assert len(read_tracks(root, dataset="nobody")) == 0
    late = read_tracks(root, filters=[("frame_index", ">=", 8)], columns=["track_id", "pts_s"])
    assert list(late.columns) == ["track_id", "pts_s"]
    assert len(late) == 2 * (2 + 2 + 12)
    by_expression = read_arrow(root, "tracks", filters=pc.field("frame_index") >= 8)
    assert by_expression.num_rows == len(late)
    assert by_expression.schema.equals(arrow_schema("tracks"), check_metadata=True)


def test_only_the_objects_of_the_wanted_videos_are_opened(root: str) -> None:
    Path(root, object_key("tracks", "ava", "s1")).write_bytes(
        bytes(Path(root, object_key("tracks", "ava", "s1")).stat().st_size)
    )
    assert len(read_tracks(root, dataset="own", video_id="a")) == 40


def test_a_shard_that_is_about_to_be_replaced_is_still_found_by_its_videos(root: str) -> None:
    before = read_tracks(root, video_id="a")
    void_commit(Store(root), "s1")
    pd.testing.assert_frame_equal(read_tracks(root, video_id="a"), before)
    assert len(before)


def test_what_is_not_committed_is_left_out_unless_asked_for(root: str) -> None:
    Path(root, commit_key("s1")).unlink()
    assert read_tracks(root)["dataset"].unique().tolist() == ["own"]
    both = read_tracks(root, committed_only=False)
    assert both["dataset"].unique().tolist() == ["ava", "own"]
    assert len(read_tracks(root, committed_only=False, dataset="ava")) == 40


@pytest.mark.parametrize("committed_only", [True, False])
def test_a_mistyped_root_is_not_an_empty_table(tmp_path: Path, committed_only: bool) -> None:
    with pytest.raises(FileNotFoundError, match=r"no commit record|no objects of tracks"):
        read_tracks(f"{tmp_path}/typo", committed_only=committed_only)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda root: read_table(root, "trackz"), "expected one of the tables"),
        (lambda root: read_tracks(root, columns=["boxes"]), r"got \['boxes'\]"),
        (lambda root: read_tracks(root, filters=[("boxes", "=", 1)]), "filters do not fit"),
        (lambda root: read_tracks(root, filters=[("score", ">", "x")]), "filters do not fit"),
    ],
)
def test_mistakes_of_the_caller_are_named(
    root: str, call: Callable[[str], object], match: str
) -> None:
    with pytest.raises(SchemaError, match=match):
        call(root)


def test_an_object_that_differs_from_its_commit_record_is_not_read(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "READ_BACKOFF_S", 0.0)
    key = object_key("tracks", "ava", "s1")
    shutil.copy(Path(root, object_key("tracks", "own", "s2")), Path(root, key))
    with pytest.raises(StorageError, match=f"shard s1: {key}: expected .* bytes by its commit"):
        read_tracks(root)


def test_tables_of_a_newer_version_are_refused(root: str) -> None:
    path = Path(root, commit_key("s2"))
    body = json.loads(path.read_text())
    body["schema_versions"]["tracks"] = 99
    path.write_text(json.dumps(body))
    with pytest.raises(SchemaError, match="shard s2: expected tracks of version 1 or older"):
        read_tracks(root)


def test_reading_during_overwrites_gives_one_version_or_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "READ_BACKOFF_S", 0.02)
    store = Store(str(tmp_path))
    publish(store, [finished_spool(store, "a", 10)])
    stop = threading.Event()

    def overwrite() -> None:
        turn = 0
        while not stop.wait(0.02):
            turn += 1
            publish(store, [finished_spool(store, "a", 10 + 10 * (turn % 2))])

    thread = threading.Thread(target=overwrite)
    thread.start()
    try:
        seen = [
            tuple(frame["frame_index"]) for frame in (read_tracks(str(tmp_path)) for _ in range(30))
        ]
    finally:
        stop.set()
        thread.join()
    versions = {tuple(np.repeat(np.arange(n), 2)) for n in (10, 20)}
    assert set(seen) <= versions
    assert len(pd.read_parquet(tmp_path / "tracks")) in (20, 40)


# --- versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OLDER, ids=lambda path: path.stem)
def test_files_of_every_older_version_are_read(tmp_path: Path, path: Path) -> None:
    name = path.stem.split("-")[0]
    target = tmp_path / name / "ava" / "part-0.parquet"
    target.parent.mkdir(parents=True)
    shutil.copy(path, target)
    table = read_arrow(str(tmp_path), name, committed_only=False)
    check_table(name, table)
    stored = pq.read_table(path)
    assert stored.num_rows > 0
    assert table.select(stored.column_names) == stored
    for column in set(table.column_names) - set(stored.column_names):
        assert table.column(column).null_count == table.num_rows


def test_there_is_a_file_of_every_version() -> None:
    versions = {
        f"{name}-v{version}"
        for name in ("tracks", "detections", "videos", "failures")
        for version in range(1, table_schema(name).version + 1)
    }
    assert {path.stem for path in OLDER} == versions


def test_a_column_that_came_later_reads_as_null(tmp_path: Path) -> None:
    folder = tmp_path / "tracks" / "ava"
    folder.mkdir(parents=True)
    rows = tracks_table("a", 2)
    pq.write_table(rows.drop_columns("pred_cam"), folder / "part-0.parquet")
    pq.write_table(rows, folder / "part-1.parquet")
    table = read_arrow(str(tmp_path), "tracks", committed_only=False)
    assert table.column("pred_cam").is_null().to_pylist() == [True] * 4 + [False] * 4
    pq.write_table(rows.drop_columns("betas"), folder / "part-2.parquet")
    with pytest.raises(SchemaError, match=r"tracks\.betas: expected in every object"):
        read_tracks(str(tmp_path), committed_only=False)


# --- arrays ------------------------------------------------------------------------------------


def frames_of(root: str, how: str) -> Any:
    if how == "arrow":
        return read_arrow(root, "tracks")
    if how == "pandas":
        return read_tracks(root)
    if how == "pandas on arrow":
        return pd.read_parquet(f"{root}/tracks", dtype_backend="pyarrow")
    return duckdb.sql(f"select * from read_parquet('{root}/tracks/**/*.parquet')").df()


@pytest.mark.parametrize("how", ["arrow", "pandas", "pandas on arrow", "duckdb"])
def test_shapes_come_back_however_the_rows_were_read(root: str, how: str) -> None:
    arrays = smpl_arrays(frames_of(root, how))
    shaped = {c.name: c.shape for c in table_schema("tracks").columns if c.shape}
    assert {name: array.shape[1:] for name, array in arrays.items()} == shaped
    assert arrays["global_orient"].shape == (80, 1, 3, 3)
    assert arrays["body_pose"].dtype == np.float32
    assert all(array.flags.writeable for array in arrays.values())
    expected = np.array(read_arrow(root, "tracks").column("keypoints_2d_px").to_pylist())
    assert np.array_equal(arrays["keypoints_2d_px"].reshape(80, 88), expected.astype(np.float32))


def test_arrays_follow_chosen_rows_and_null_is_nan(root: str) -> None:
    frame = read_tracks(root, columns=["track_id", "pred_cam", "betas"])
    frame = frame[frame["track_id"] == 2].reset_index(drop=True)
    whole = smpl_arrays(frame)
    assert sorted(whole) == ["betas", "pred_cam"]
    frame.at[3, "pred_cam"] = None
    holed = smpl_arrays(frame)
    assert np.isnan(holed["pred_cam"][3]).all()
    rest = np.arange(len(frame)) != 3
    assert np.array_equal(holed["pred_cam"][rest], whole["pred_cam"][rest])
    assert smpl_arrays(frame.iloc[:0])["betas"].shape == (0, 10)
    table = read_arrow(root, "tracks").slice(5, 7)
    assert np.array_equal(
        smpl_arrays(table)["betas"],
        smpl_arrays(read_arrow(root, "tracks"))["betas"][5:12],
    )


def test_arrays_of_the_wrong_length_are_named() -> None:
    frame = pd.DataFrame({"betas": [np.zeros(10, np.float32), np.zeros(9, np.float32)]})
    with pytest.raises(SchemaError, match=r"tracks\.betas: expected lists of 10 float32"):
        smpl_arrays(frame)
    with pytest.raises(SchemaError, match=r"tracks\.betas: expected lists of 10 float32"):
        smpl_arrays(pa.table({"betas": pa.array([[1.0, 2.0]])}))

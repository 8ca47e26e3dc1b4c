"""YAML schemas to Arrow schemas, and arrays to checked tables."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fourdh_batch.errors import SchemaError
from fourdh_batch.tables.schema import (
    TABLES,
    arrow_schema,
    check_table,
    make_table,
    schema_version,
    table_schema,
    tables_markdown,
)
from tests.conftest import REPO
from tests.table_rows import tracks_table


def video_rows(**changes: Any) -> dict[str, Any]:
    return {
        "dataset": "ava",
        "video_id": ["a", "b"],
        "uri": ["s3://x/a", "s3://x/b"],
        "content_fingerprint": "f",
        "frames_decoded": np.array([3, 4]),
        "num_shots": 1,
        "num_tracks": 2,
        "num_detections": 3,
        "status": "ok",
        "shard_id": "s",
        "model_fingerprint": "m",
        **changes,
    }


def detection_rows(**changes: Any) -> dict[str, Any]:
    return {
        "dataset": "d",
        "video_id": "v",
        "frame_index": np.arange(2),
        "pts_s": np.arange(2.0),
        "detection_index": np.zeros(2, np.int64),
        "bbox_xyxy_px": np.ones((2, 4), np.float32),
        "score": np.ones(2, np.float32),
        "mask_source": "box",
        "detector": "mini",
        "model_fingerprint": "m",
        **changes,
    }


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_an_arrow_schema_with_its_version(name: str) -> None:
    schema = arrow_schema(name)
    assert schema.metadata[b"schema_version"] == str(schema_version(name)).encode()
    assert schema.metadata[b"table"] == name.encode()
    assert all(schema.field(i).metadata[b"meaning"] for i in range(len(schema)))


@pytest.mark.parametrize("name", TABLES)
def test_later_columns_are_nullable_and_names_tell_their_unit(name: str) -> None:
    schema = table_schema(name)
    assert schema.table == name
    names = [column.name for column in schema.columns]
    assert len(set(names)) == len(names)
    assert set(schema.order) <= set(names)
    for column in schema.columns:
        assert column.since <= schema.version
        assert column.since == 1 or column.nullable
        unit = re.search(r"_(px|s|m|deg)$", column.name)
        assert unit is None or column.unit == unit[1], column.name


def test_shapes_and_units_stand_in_the_metadata() -> None:
    field = arrow_schema("tracks").field("body_pose")
    assert field.type == pa.list_(pa.field("element", pa.float32(), nullable=False), 207)
    assert field.metadata[b"shape"] == b"23,3,3"
    assert arrow_schema("tracks").field("cam_t_m").metadata[b"unit"] == b"m"


def test_the_document_is_made_from_the_yaml() -> None:
    assert (REPO / "docs" / "TABLES.md").read_text(encoding="utf-8") == tables_markdown()


def test_scalars_are_repeated_and_absent_nullable_columns_are_null() -> None:
    table = make_table("videos", video_rows())
    assert table.schema.equals(arrow_schema("videos"), check_metadata=True)
    assert table.column("dataset").to_pylist() == ["ava", "ava"]
    assert table.column("frames_decoded").to_pylist() == [3, 4]
    assert table.column("codec").null_count == 2


def test_an_array_of_exactly_the_shape_is_repeated() -> None:
    table = make_table("detections", detection_rows(bbox_xyxy_px=np.array([1, 2, 3, 4])))
    assert table.column("bbox_xyxy_px").to_pylist() == [[1, 2, 3, 4]] * 2


def test_arrays_of_the_right_type_are_not_copied() -> None:
    boxes = np.ones((2, 4), np.float32)
    table = make_table("detections", detection_rows(bbox_xyxy_px=boxes))
    values = table.column("bbox_xyxy_px").chunk(0).values
    assert values.buffers()[1].address == boxes.ctypes.data


def test_null_is_nan_masked_or_none() -> None:
    table = make_table(
        "detections",
        detection_rows(
            track_id=np.ma.array([5, 0], mask=[False, True]),
            drop_reason=[None, "too_small"],
            mask_rle=[b"x", None],
        ),
    )
    assert table.column("track_id").to_pylist() == [5, None]
    assert table.column("drop_reason").to_pylist() == [None, "too_small"]
    assert table.column("mask_rle").to_pylist() == [b"x", None]
    videos = make_table("videos", video_rows(fps=np.array([np.nan, 25.0])))
    assert videos.column("fps").to_pylist() == [None, 25.0]
    columns = {name: tracks_table("a", 1).column(name) for name in arrow_schema("tracks").names}
    holed = make_table("tracks", {**columns, "pred_cam": np.array([[np.nan] * 3, [1, 2, 3]])})
    assert holed.column("pred_cam").to_pylist() == [None, [1, 2, 3]]
    with pytest.raises(SchemaError, match=r"tracks\.pred_cam: a row must be null in all"):
        make_table("tracks", {**columns, "pred_cam": np.array([[np.nan, 0, 0], [1, 2, 3]])})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bbox_xyxy_px": np.ones((2, 5), np.float32)}, r"bbox_xyxy_px: expected \(2, 4\) float32"),
        ({"bbox_xyxy_px": np.ones((3, 4), np.float32)}, r"got \(3, 4\) float32"),
        ({"score": np.array([1.0, np.nan])}, "score: expected finite values"),
        ({"score": np.array([1.0, np.inf])}, "score: expected finite values"),
        ({"frame_index": np.array([0.0, 1.0])}, r"frame_index: expected \(2,\) int64"),
        ({"frame_index": ["0", "1"]}, "frame_index: expected int64"),
        ({"detector": [None, "x"]}, "detector: expected no null, got 1 in 2"),
        ({"detector": ["x"]}, "detector: expected 2 values, got 1"),
        ({"detector": 5}, "detector: expected string"),
        ({"detector": "\udcff"}, "detector: expected string"),
        ({"mask_source": "guess"}, r"mask_source: expected one of .*, got \['guess'\]"),
        ({"drop_reason": ["bored", None]}, r"drop_reason: expected one of .*, got \['bored'\]"),
        ({"colour": "red"}, r"unknown columns \['colour'\], missing columns \[\]"),
        ({"detector": pa.array([1, 2])}, "detector: expected 2 of string, got 2 of int64"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(SchemaError, match=match):
        make_table("detections", detection_rows(**changes))


def test_missing_columns_are_named() -> None:
    rows = detection_rows()
    del rows["score"]
    with pytest.raises(SchemaError, match=r"missing columns \['score'\]"):
        make_table("detections", rows)


def test_the_number_of_rows_must_be_known() -> None:
    scalars = video_rows(video_id="a", uri="u", frames_decoded=1)
    with pytest.raises(SchemaError, match="num_rows is needed"):
        make_table("videos", scalars)
    assert make_table("videos", scalars, num_rows=3).num_rows == 3
    assert make_table("videos", scalars, num_rows=0).schema == arrow_schema("videos")


def test_finished_tables_are_checked_too() -> None:
    table = make_table("videos", video_rows())
    check_table("videos", table)
    with pytest.raises(SchemaError, match=r"expected \['pyarrow.Field<fps: double>'\], got \[\]"):
        check_table("videos", table.drop_columns("fps"))
    with pytest.raises(SchemaError, match="columns in the order"):
        check_table("videos", table.select(table.column_names[::-1]))
    index = table.column_names.index("status")
    wrong = table.set_column(index, table.schema.field(index), pa.array(["fine", "ok"]))
    with pytest.raises(SchemaError, match=r"videos\.status: .*got \['fine'\]"):
        check_table("videos", wrong)


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(SchemaError, match=r"expected one of the tables tracks, .*, got 'trax'"):
        arrow_schema("trax")

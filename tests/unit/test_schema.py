"""YAML schemas to Arrow schemas, and arrays to checked tables."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from fourdh_batch.errors import SchemaError
from fourdh_batch.tables.schema import TABLES, arrow_schema, make_table, schema_version


def video_row() -> dict[str, object]:
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
    }


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_an_arrow_schema_with_its_version(name: str) -> None:
    schema = arrow_schema(name)
    assert schema.metadata[b"schema_version"] == str(schema_version(name)).encode()
    assert all(schema.field(i).metadata[b"meaning"] for i in range(len(schema)))


def test_scalars_are_repeated_and_absent_nullable_columns_are_null() -> None:
    table = make_table("videos", video_row())
    assert table.schema.equals(arrow_schema("videos"), check_metadata=True)
    assert table.column("dataset").to_pylist() == ["ava", "ava"]
    assert table.column("codec").null_count == 2


def test_a_value_that_is_not_allowed_is_named() -> None:
    with pytest.raises(SchemaError, match=r"videos\.status: expected one of .*got \['fine'\]"):
        make_table("videos", {**video_row(), "status": "fine"})


def test_arrays_of_the_right_type_are_not_copied() -> None:
    boxes = np.ones((2, 4), np.float32)
    table = make_table(
        "detections",
        {
            "dataset": "d",
            "video_id": "v",
            "frame_index": np.arange(2),
            "pts_s": np.arange(2.0),
            "detection_index": np.zeros(2, np.int64),
            "bbox_xyxy_px": boxes,
            "score": np.ones(2, np.float32),
            "mask_source": "box",
            "detector": "mini",
            "model_fingerprint": "m",
        },
    )
    values = table.column("bbox_xyxy_px").chunk(0).values
    assert isinstance(values, pa.FloatArray)
    assert values.buffers()[1].address == boxes.ctypes.data

"""What must hold of keys and tables whatever goes in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourdh_batch.storage import MAX_KEY_PART, Store, safe_key
from fourdh_batch.tables.manifest import fingerprint_of
from fourdh_batch.tables.schema import arrow_schema, make_table
from fourdh_batch.tables.writer import ObjectWriter
from tests.table_rows import tracks_table

ANY_TEXT = st.text(st.characters(), max_size=200)  # surrogates included: file names have them
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)


@settings(deadline=None)
@given(ANY_TEXT)
def test_a_safe_key_is_one_visible_part_of_a_path(text: str) -> None:
    key = safe_key(text)
    assert 0 < len(key) <= MAX_KEY_PART
    assert key.isascii()
    assert not set(key) & set("/\\ =*?[]\0\n")
    assert key[0] not in "._"


@settings(deadline=None)
@given(st.lists(ANY_TEXT, unique=True, max_size=20))
def test_different_texts_have_different_keys(texts: list[str]) -> None:
    everything = {*texts, *map(safe_key, texts)}
    assert len(set(map(safe_key, everything))) == len(everything)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), JSON, max_size=8))
def test_a_fingerprint_ignores_the_order_of_keys(values: dict[str, object]) -> None:
    assert fingerprint_of(values) == fingerprint_of(dict(reversed(values.items())))
    assert fingerprint_of({**values, "more": 1}) != fingerprint_of({**values, "more": 2})


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 40))
def test_any_division_of_rows_gives_the_same_object(
    tmp_path: Path, sizes: list[int], row_group_rows: int
) -> None:
    rows = tracks_table("a", (sum(sizes) + 1) // 2).slice(0, sum(sizes))
    store = Store(str(tmp_path))
    with ObjectWriter(store, "tracks", "x/a.parquet", row_group_rows=row_group_rows) as parts:
        start = 0
        for size in sizes:
            parts.write(rows.slice(start, size))
            start += size
    with ObjectWriter(store, "tracks", "x/b.parquet", row_group_rows=row_group_rows) as whole:
        whole.write(rows)
    assert parts.record.sha256 == whole.record.sha256
    assert pq.read_table(tmp_path / "x" / "a.parquet") == rows


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 2**40), st.booleans()), max_size=20), st.integers(0, 2**32)
)
def test_arrays_survive_the_way_through_a_table(rows: list[tuple[int, bool]], seed: int) -> None:
    n = len(rows)
    boxes = np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)
    known = np.array([k for _, k in rows], dtype=bool)
    track_id = np.array([t for t, _ in rows], dtype=np.int64)
    table = make_table(
        "detections",
        {
            "dataset": "d",
            "video_id": "v",
            "frame_index": np.arange(n),
            "pts_s": np.arange(n) / 25,
            "detection_index": 0,
            "bbox_xyxy_px": boxes,
            "score": 0.5,
            "mask_source": "box",
            "drop_reason": [None if k else "low_score" for k in known],
            "track_id": np.ma.array(track_id, mask=~known),
            "detector": "mini",
            "model_fingerprint": "m",
        },
        num_rows=n,
    )
    assert table.schema.equals(arrow_schema("detections"), check_metadata=True)
    back = np.array(table.column("bbox_xyxy_px").to_pylist(), np.float32).reshape(n, 4)
    assert np.array_equal(back, boxes)
    expected = [int(t) if k else None for t, k in rows]
    assert table.column("track_id").to_pylist() == expected

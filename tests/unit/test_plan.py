from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdh_batch.errors import SchemaError
from fourdh_batch.pipeline.plan import (
    Shard,
    Video,
    plan_shards,
    read_generations,
)
from fourdh_batch.storage import Store


def corpus(names: list[str], num_bytes: int = 1) -> list[Video]:
    return [Video(name, f"/x/{name}", num_bytes, f"fp-{name}") for name in names]


def plan(store: Store, names: list[str], **kw: int) -> list[Shard]:
    sizes = {"videos_per_shard": 3, "mb_per_shard": 100} | kw
    return plan_shards(store, "d", corpus(names), **sizes)


@settings(max_examples=30, deadline=None)
@given(
    nights=st.lists(
        st.sets(st.integers(0, 30).map(lambda n: f"v{n:02d}"), min_size=1), min_size=1, max_size=4
    )
)
def test_tonights_videos_move_no_earlier_one(
    tmp_path_factory: pytest.TempPathFactory, nights: list[set[str]]
) -> None:
    store = Store(str(tmp_path_factory.mktemp("root")))
    seen: dict[str, str] = {}
    for night in nights:
        shards = plan(store, sorted(night))
        placed = {v.video_id: s.shard_id for s in shards for v in s.videos}
        assert sorted(placed) == sorted(night)  # a partition of the corpus
        assert all(len(s.videos) <= 3 for s in shards)
        for name, shard_id in placed.items():
            assert seen.setdefault(name, shard_id) == shard_id
        again = plan(store, sorted(night, reverse=True))
        assert again == shards


def test_a_shard_closes_by_size(tmp_path: Path) -> None:
    videos = corpus(["a", "b", "c"], num_bytes=60 << 20)
    shards = plan_shards(
        Store(str(tmp_path)), "d", videos, videos_per_shard=9, mb_per_shard=100, record=False
    )
    assert [len(s.videos) for s in shards] == [1, 1, 1]
    assert not list(tmp_path.iterdir())  # a dry run writes nothing


def test_a_shards_fingerprint_follows_content_and_models_only(tmp_path: Path) -> None:
    [shard] = plan(Store(str(tmp_path)), ["a", "b"])
    moved = Shard(
        "other", "d", tuple(Video(v.video_id, "/y", 9, v.fingerprint) for v in shard.videos)
    )
    changed = Shard("x", "d", (*shard.videos[:1], Video("b", "/x/b", 1, "new")))
    assert shard.fingerprint("m") == moved.fingerprint("m")
    assert len({shard.fingerprint("m"), shard.fingerprint("n"), changed.fingerprint("m")}) == 3


def test_plans_recorded_as_json_are_still_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    old = {"generation": 1, "dataset": "d", "shards": {"0001-00000-aa": ["b", "c"]}}
    store.write_bytes("_plan/d/000001.json", json.dumps(old).encode())
    shards = plan(store, ["a", "b", "c"])
    assert {v.video_id: s.shard_id for s in shards for v in s.videos} == {
        "a": "0002-00000-c17a20b7",
        "b": "0001-00000-aa",
        "c": "0001-00000-aa",
    }
    assert [key for key, _ in store.list("_plan")] == [
        "_plan/d/000001.json",
        "_plan/d/000002.parquet",
    ]
    assert plan(store, ["c", "b", "a"]) == shards


def test_what_is_no_recorded_plan_is_left_alone_or_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name in ("probes.parquet", "1.json", "note.txt"):
        store.write_bytes(f"_plan/d/{name}", b"?")
    assert list(read_generations(store, "d")) == []
    for name, body in (("000001.json", b"[]"), ("000001.parquet", b"?")):
        store.write_bytes(f"_plan/d/{name}", body)
        with pytest.raises(SchemaError, match=f"{name}: expected a recorded plan"):
            plan(store, ["a"])
        store.delete(f"_plan/d/{name}")

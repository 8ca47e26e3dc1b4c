"""Roots on S3 are proved, frozen and told as local ones are."""

from __future__ import annotations

import pytest

from fourdh_batch.pipeline.status import status_of
from fourdh_batch.storage import Store
from fourdh_batch.tables.reader import read_tracks
from fourdh_batch.tables.release import release_root
from fourdh_batch.tables.verify import verify_root
from fourdh_batch.tables.writer import object_key
from tests.table_rows import finished_spool, publish
from tests.unit.test_storage_s3 import needs_s3, s3, s3_url

__all__ = ["s3", "s3_url"]  # fixtures


@needs_s3
def test_a_root_on_s3_is_proved_frozen_and_told(
    s3: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for shard, videos in (("s1", "ab"), ("s2", "cd")):
        publish(s3, [finished_spool(s3, v, 10, shard_id=shard) for v in videos], shard_id=shard)
    report = verify_root(s3.root)
    assert report.problems == []
    assert (report.shards, report.objects) == (2, 8)
    assert status_of(s3.root).videos == {"ok": 4}
    release_root(s3.root, "v1")
    assert verify_root(f"{s3.root}/releases/v1").problems == []
    before = read_tracks(f"{s3.root}/releases/v1")

    key = object_key("tracks", "ava", "s1")
    data = bytearray(s3.read_bytes(key))
    data[len(data) // 2] ^= 1
    s3.write_bytes(key, bytes(data))
    s3.write_bytes("tracks/readme.json", b"x")
    s3.delete(object_key("videos", "ava", "s2"))
    found = sorted((p.kind, p.key) for p in verify_root(s3.root).problems)
    assert found == [
        ("checksum", key),
        ("missing", object_key("videos", "ava", "s2")),
        ("stray", "tracks/readme.json"),
    ]
    assert read_tracks(f"{s3.root}/releases/v1").equals(before)
    assert verify_root(f"{s3.root}/releases/v1").problems == []

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdh_batch.errors import ManifestError
from fourdh_batch.pipeline.plan import Shard, Video, plan_shards, read_corpus
from fourdh_batch.storage import Store


def some_file(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_folder_is_searched_at_all_depths_and_ids_are_relative_paths(tmp_path: Path) -> None:
    some_file(tmp_path / "b.mp4")
    some_file(tmp_path / "deep er" / "ünï" / "A.MKV", b"yy")
    some_file(tmp_path / "notes.txt")
    (tmp_path / "folder.mp4").mkdir()
    videos = read_corpus(str(tmp_path))
    assert [v.video_id for v in videos] == ["b.mp4", "deep er/ünï/A.MKV"]
    assert [v.num_bytes for v in videos] == [1, 2]


def test_equal_content_has_equal_fingerprints_whatever_its_name(tmp_path: Path) -> None:
    some_file(tmp_path / "a.mp4", b"same")
    some_file(tmp_path / "b.mp4", b"same")
    some_file(tmp_path / "c.mp4", b"other")
    a, b, c = read_corpus(str(tmp_path))
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_an_empty_corpus_says_what_was_looked_for(tmp_path: Path) -> None:
    some_file(tmp_path / "notes.txt")
    with pytest.raises(ManifestError, match=r"no video found; looked for files ending in .*\.mp4"):
        read_corpus(str(tmp_path))
    with pytest.raises(ManifestError, match="not found"):
        read_corpus(str(tmp_path / "absent"))


def test_a_dangling_link_becomes_a_failing_video_not_a_failed_job(tmp_path: Path) -> None:
    some_file(tmp_path / "good.mp4")
    (tmp_path / "bad.mp4").symlink_to(tmp_path / "gone.mp4")
    videos = read_corpus(str(tmp_path))
    assert "good.mp4" in [v.video_id for v in videos]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_manifests_of_all_kinds_read_alike(tmp_path: Path, kind: str) -> None:
    some_file(tmp_path / "clips" / "one.mp4")
    some_file(tmp_path / "two")
    table = pd.DataFrame(
        {
            "video_id": ["2", "1"],
            "uri": [str(tmp_path / "two"), "clips/one.mp4"],
            "fold": ["a", "b"],
        }
    )
    manifest = tmp_path / f"corpus.{kind}"
    if kind == "csv":
        table.to_csv(manifest, index=False)
    elif kind == "jsonl":
        table.to_json(manifest, orient="records", lines=True)
    else:
        table.to_parquet(manifest)
    videos = read_corpus(str(manifest))
    assert [v.video_id for v in videos] == ["1", "2"]
    assert videos[0].uri == f"{tmp_path}/clips/one.mp4"


def test_all_problems_of_a_manifest_are_listed_before_any_work(tmp_path: Path) -> None:
    some_file(tmp_path / "one.mp4")
    rows = [
        {"video_id": "a", "uri": "one.mp4"},
        {"video_id": "a", "uri": "one.mp4"},
        {"video_id": "b", "uri": "gone.mp4"},
        {"video_id": "line\nbreak", "uri": "one.mp4"},
        {"video_id": " ", "uri": "one.mp4"},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ManifestError) as caught:
        read_corpus(str(manifest))
    text = str(caught.value)
    for part in ("'a' stands twice", "gone.mp4", "control characters", "expected 1 to"):
        assert part in text
    bad = tmp_path / "bad.csv"
    bad.write_text("name,path\nx,y\n")
    with pytest.raises(ManifestError, match="expected texts video_id and uri"):
        read_corpus(str(bad))


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

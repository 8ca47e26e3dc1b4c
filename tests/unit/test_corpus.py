"""What an input holds: folders, manifests, lists; and what is remembered of files."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fourdh_batch.config import JobConfig, PlanConfig
from fourdh_batch.errors import ManifestError
from fourdh_batch.pipeline import corpus, probes
from fourdh_batch.pipeline.corpus import (
    MAX_PROBLEMS_SHOWN,
    Video,
    read_corpus,
    remembered_corpus,
    stream_corpus,
)
from fourdh_batch.pipeline.probes import ProbeCache
from fourdh_batch.storage import Listed, Store
from fourdh_batch.video.probe import Header


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


def videos_of(source: Path, **plan: Any) -> dict[str, Video]:
    config = JobConfig(input=str(source), plan=PlanConfig(**plan))
    return {video.video_id: video for video in stream_corpus(config)}


def jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_manifest_may_tell_windows_sizes_fingerprints_and_more(tmp_path: Path, kind: str) -> None:
    some_file(tmp_path / "one.mp4", b"12345")
    table = pd.DataFrame(
        {
            "video_id": ["a", "b"],
            "uri": ["one.mp4", "https://user:pw@nowhere.invalid/two.mp4?sig=1"],
            "start_s": [1.5, None],
            "end_s": [None, None],
            "num_bytes": [None, 77],
            "fingerprint": [None, "etag-1"],
            "title": ['ü, "x"', None],
            "num_frames": [12, 34],
        }
    )
    manifest = tmp_path / f"m.{kind}"
    if kind == "csv":
        table.to_csv(manifest, index=False)
    elif kind == "jsonl":
        table.to_json(manifest, orient="records", lines=True)
    else:
        table.to_parquet(manifest)
    found = videos_of(manifest)
    a, b = found["a"], found["b"]
    assert (a.start_s, a.end_s, a.num_bytes) == (1.5, None, 5)
    assert a.fingerprint == f"{a.content_fingerprint}@1.5-"
    assert a.content_fingerprint == read_corpus(str(tmp_path / "one.mp4"))[0].fingerprint
    assert (b.start_s, b.end_s, b.num_bytes, b.fingerprint) == (None, None, 77, "etag-1")
    frames = ("12", "34") if kind == "csv" else (12, 34)
    assert json.loads(a.extra) == {"num_frames": frames[0], "title": 'ü, "x"'}
    assert json.loads(b.extra) == {"num_frames": frames[1]} | (
        {"title": ""} if kind == "csv" else {}
    )
    assert a.details != b.details


def test_a_window_is_part_of_the_fingerprint_and_columns_are_not(tmp_path: Path) -> None:
    base = {"uri": "x", "fingerprint": "f", "num_bytes": 1}
    rows = [
        {"video_id": "whole", **base},
        {"video_id": "part", **base, "start_s": 1, "end_s": 2},
        {"video_id": "other", **base, "start_s": 1, "end_s": 3},
        {"video_id": "more", **base, "b": 1, "a": [1.5, {"c": None}], "gone": None},
        {"video_id": "same", **base, "a": [1.5, {"c": None}], "b": 1},
    ]
    found = videos_of(jsonl(tmp_path / "m.jsonl", rows))
    assert [found[r["video_id"]].fingerprint for r in rows] == [
        *("f", "f@1.0-2.0", "f@1.0-3.0", "f", "f")
    ]
    assert found["more"].extra == found["same"].extra == '{"a":[1.5,{"c":null}],"b":1}'
    assert found["more"].details == found["same"].details != ""
    assert found["whole"].extra == found["whole"].details == ""


def test_dates_become_text_and_what_cannot_be_carried_is_named(tmp_path: Path) -> None:
    rows = {"video_id": ["a"], "uri": ["x"], "fingerprint": ["f"], "num_bytes": [1]}
    pd.DataFrame({**rows, "day": [date(2026, 1, 2)]}).to_parquet(tmp_path / "m.parquet")
    assert videos_of(tmp_path / "m.parquet")["a"].extra == '{"day":"2026-01-02"}'
    pd.DataFrame({**rows, "image": [b"x"]}).to_parquet(tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match="row 1: a: its other columns are not JSON: bytes"):
        videos_of(tmp_path / "m.parquet")


def test_every_kind_of_wrong_row_is_told_with_its_number(tmp_path: Path) -> None:
    good = {"video_id": "a", "uri": "x", "fingerprint": "f", "num_bytes": 1}
    wrong: list[tuple[object, str]] = [
        ([1], "expected a JSON object"),
        ({**good, "start_s": "soon"}, "expected a number as start_s, got 'soon'"),
        ({**good, "start_s": -1}, "expected start_s of 0 or more, got -1"),
        ({**good, "start_s": 2, "end_s": 2}, "expected end_s after start_s"),
        ({**good, "end_s": True}, "expected a number as end_s, got True"),
        ({**good, "num_bytes": 1.5}, "expected num_bytes of 0 or more, got 1.5"),
        ({**good, "fingerprint": 7}, "expected a short text, fingerprint, got 7"),
        ({**good, "x": "y" * 70_000}, "expected at most 65536 characters of other columns"),
        ({**good, "x": "\ud800"}, "its other columns are not JSON"),
        ({**good, "video_id": "\ud800"}, "valid Unicode"),
        ({**good, "uri": ""}, "expected texts video_id and uri"),
        ({**good, "uri": "a\0b"}, "expected an address"),
        ({**good, "uri": "\ud800"}, "expected an address"),
        ({**good, "fingerprint": "\ud800"}, "cannot be a fingerprint"),
        ({**good, "fingerprint": "unreadable-x"}, "cannot be a fingerprint"),
        ({**good, "num_bytes": None}, "expected num_bytes beside fingerprint, got none"),
        ({**good, "num_bytes": 1e30}, "expected num_bytes of 0 or more, got 1e+30"),
        ({**good, "start_s": 10**400}, "expected a number as start_s"),
    ]
    path = jsonl(tmp_path / "m.jsonl", [row for row, _ in wrong])
    path.write_text(path.read_text() + "\n" + "[" * 100_000)
    with pytest.raises(ManifestError) as caught:
        videos_of(path)
    lines = str(caught.value).split("\n  ")
    assert lines[0].endswith(f"{len(wrong) + 1} problems:")
    for number, (line, (_, text)) in enumerate(zip(lines[1:], wrong, strict=False), start=1):
        assert line.startswith(f"row {number}: ")
        assert text in line
    csv = tmp_path / "m.csv"
    csv.write_text("video_id,uri,fingerprint\na,x,f,more\n")
    with pytest.raises(ManifestError, match="row 1: expected 3 fields, as in the header, got more"):
        videos_of(csv)


def test_of_very_many_problems_the_first_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    manifest = jsonl(tmp_path / "m.jsonl", [{"video_id": str(n)} for n in range(900)])
    with pytest.raises(ManifestError, match=r"900 problems:(.|\n)*and 850 more") as caught:
        videos_of(manifest)
    assert str(caught.value).count("\n") == MAX_PROBLEMS_SHOWN + 1


def test_problems_tell_no_secret_of_an_address(tmp_path: Path) -> None:
    address = "memory://user:hunter2@x/y"
    rows = [{"video_id": "a", "uri": address}, {"uri": address}, f"s3://{address}"]
    with pytest.raises(ManifestError, match=r"memory://\*\*\*@x/y: FileNotFoundError") as caught:
        videos_of(jsonl(tmp_path / "m.jsonl", rows))
    assert "hunter2" not in str(caught.value)


def test_a_list_of_names_has_a_window_and_a_place(tmp_path: Path) -> None:
    some_file(tmp_path / "films" / "-5KQ66BBWC4.mkv")
    some_file(tmp_path / "films" / "b c.mp4")
    names = tmp_path / "ava_file_names_trainval_v2.1.txt"
    names.write_text("-5KQ66BBWC4.mkv\r\n\nb c.mp4\n")
    found = videos_of(names, list_root=f"{tmp_path}/films/", list_start_s=902.0, list_end_s=1799.0)
    assert sorted(found) == ["-5KQ66BBWC4", "b c"]  # AVA's ids
    one = found["b c"]
    assert (one.uri, one.start_s, one.end_s) == (f"{tmp_path}/films/b c.mp4", 902.0, 1799.0)
    beside = tmp_path / "films" / "list.txt"
    beside.write_text(f"b c.mp4\n{tmp_path}/films/-5KQ66BBWC4.mkv")
    found = videos_of(beside)
    assert sorted(found) == ["-5KQ66BBWC4", "b c"]
    assert {v.start_s for v in found.values()} == {None}
    with pytest.raises(ManifestError, match=r"b c: .*FileNotFoundError"):
        videos_of(names)


def test_a_limit_takes_the_first_by_id_and_asks_no_other_file(tmp_path: Path) -> None:
    some_file(tmp_path / "x.mp4")
    rows = [{"video_id": n, "uri": "x.mp4" if n in "ab" else "gone.mp4"} for n in "dbca"]
    assert sorted(videos_of(jsonl(tmp_path / "m.jsonl", rows), limit=2)) == ["a", "b"]


def test_addresses_that_nothing_can_read_are_listed_with_the_others(tmp_path: Path) -> None:
    uris = ["foo://x/a.mp4", "/nowhere/b.mp4", "data://", "abfs://c@d/e.mp4"]
    rows = [{"video_id": str(n), "uri": uri} for n, uri in enumerate(uris)]
    with pytest.raises(ManifestError, match=r"4 problems:\n  0: foo://x/a\.mp4: ValueError"):
        videos_of(jsonl(tmp_path / "m.jsonl", rows))


def test_a_folder_that_may_not_be_read_stops_a_run_that_would_remove_its_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_file(tmp_path / "a.mp4")
    (tmp_path / "sub").mkdir()
    some_file(tmp_path / "sub" / "b.mp4")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "sub":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    config = JobConfig(input=str(tmp_path))
    assert [video.video_id for video in stream_corpus(config)] == ["a.mp4"]
    config.plan.remove_missing = True
    with pytest.raises(ManifestError, match=r"cannot be listed \(.*sub.*Permission denied"):
        list(stream_corpus(config))


def test_what_a_listing_tells_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listing(uri: str, extensions: Iterable[str], **_: bool) -> Iterable[Listed]:
        yield Listed("a.mp4", "s3://nowhere/a.mp4", 7, "etag")
        yield Listed("b.mp4", str(some_file(tmp_path / "b.mp4")), 1, None)

    def unexpected(uri: str) -> tuple[int, str]:
        assert uri.endswith("/b.mp4")
        return 1, "hashed"

    monkeypatch.setattr(corpus, "list_objects", listing)
    monkeypatch.setattr(corpus, "fingerprint_file", unexpected)
    found = videos_of(Path("bucket"))
    assert found["a.mp4"] == Video("a.mp4", "s3://nowhere/a.mp4", 7, "etag")
    assert found["b.mp4"].fingerprint == "hashed"


# --- the memory of probes ----------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files whose content was read; what was written just now counts as settled."""
    seen: list[str] = []
    read = probes.fingerprint_file

    def fingerprint_file(uri: str) -> tuple[int, str]:
        seen.append(Path(uri).name)
        return read(uri)

    monkeypatch.setattr(probes, "fingerprint_file", fingerprint_file)
    monkeypatch.setattr(probes, "FRESH_S", -1.0)
    return seen


def remembered(tmp_path: Path, **plan: Any) -> list[Video]:
    config = JobConfig(input=str(tmp_path / "in"), dataset="d", plan=PlanConfig(**plan))
    return sorted(remembered_corpus(config, Store(str(tmp_path / "out"))), key=lambda v: v.video_id)


def test_a_file_is_read_again_only_when_it_may_be_another(tmp_path: Path, asked: list[str]) -> None:
    a, b = (some_file(tmp_path / "in" / name, b"1234") for name in ("a.mp4", "b.mp4"))
    first = remembered(tmp_path)
    assert sorted(asked) == ["a.mp4", "b.mp4"]
    asked.clear()
    assert remembered(tmp_path) == first
    assert asked == []
    times = (a.stat().st_atime_ns, a.stat().st_mtime_ns)
    a.write_bytes(b"1235")  # same size, and its time turned back: the inode's own clock tells
    os.utime(a, ns=times)
    b.rename(tmp_path / "b.old")
    some_file(b, b"1236")
    again = remembered(tmp_path)
    assert sorted(asked) == ["a.mp4", "b.mp4"]
    assert [v.num_bytes for v in again] == [4, 4]
    assert not {v.fingerprint for v in again} & {v.fingerprint for v in first}


def test_a_file_written_just_now_is_not_remembered(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "FRESH_S", 3600.0)
    some_file(tmp_path / "in" / "a.mp4")
    remembered(tmp_path)
    assert not (tmp_path / "out").exists()
    remembered(tmp_path)
    assert asked == ["a.mp4", "a.mp4"]


def test_a_limited_run_forgets_nothing_and_a_whole_one_forgets_what_is_gone(
    tmp_path: Path, asked: list[str]
) -> None:
    for name in "abc":
        some_file(tmp_path / "in" / f"{name}.mp4")
    remembered(tmp_path)
    (tmp_path / "in" / "a.mp4").write_bytes(b"longer")
    remembered(tmp_path, limit=1)
    asked.clear()
    remembered(tmp_path)
    assert asked == []
    (tmp_path / "in" / "b.mp4").rename(tmp_path / "b.mp4")
    (tmp_path / "in" / "c.mp4").write_bytes(b"longer")
    remembered(tmp_path)
    (tmp_path / "b.mp4").rename(tmp_path / "in" / "b.mp4")
    asked.clear()
    remembered(tmp_path)
    assert asked == ["b.mp4"]


def test_a_damaged_memory_is_made_anew(
    tmp_path: Path, asked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    some_file(tmp_path / "in" / "a.mp4")
    first = remembered(tmp_path)
    [memory] = (tmp_path / "out" / "_plan" / "d").iterdir()
    memory.write_bytes(b"?")
    with caplog.at_level(logging.WARNING):
        assert remembered(tmp_path) == first
    assert "is damaged and made anew" in caplog.text
    asked.clear()
    assert remembered(tmp_path) == first
    assert asked == []


def test_headers_go_with_the_content(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    said = Header(100, 25.0, 640, 480)
    with ProbeCache(store, "d") as cache:
        assert cache.header("f") is None
        cache.add_header("f", said)
        cache.save(forget_unseen=True)
    with ProbeCache(store, "d") as cache:
        assert cache.header("f") == said
        cache.add_header("g", Header(problem="EMPTY"))
        cache.save(forget_unseen=True)
    with ProbeCache(store, "d") as cache:
        assert (cache.header("f"), cache.header("g")) == (said, Header(problem="EMPTY"))

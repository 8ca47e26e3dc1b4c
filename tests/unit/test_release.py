"""A release is one moment of a root, whatever happens meanwhile, and nobody reads half of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest
from typer.testing import CliRunner

import fourdh_batch as fb
from fourdh_batch.cli import app
from fourdh_batch.errors import ConfigError, OutputInUseError, SchemaError, StorageError
from fourdh_batch.storage import Store
from fourdh_batch.tables import release
from fourdh_batch.tables.manifest import Lease, commit_key, void_commit
from fourdh_batch.tables.reader import READ_BACKOFF_S, RELEASE_KEY, UNFINISHED
from fourdh_batch.tables.release import release_root
from fourdh_batch.tables.schema import TABLES
from fourdh_batch.tables.verify import verify_root
from fourdh_batch.tables.writer import object_key
from tests.table_rows import finished_spool, publish

runner = CliRunner()


def add(store: Store, shard: str, videos: str, num_frames: int = 10, dataset: str = "ava") -> None:
    spools = [finished_spool(store, v, num_frames, dataset=dataset, shard_id=shard) for v in videos]
    publish(store, spools, dataset, shard_id=shard)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of two datasets."""
    root = tmp_path_factory.mktemp("sound")
    store = Store(str(root))
    add(store, "s1", "ab")
    add(store, "s2", "cd")
    add(store, "s3", "a", 20, dataset="own")
    return root


@pytest.fixture
def store(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy of it to be changed."""
    monkeypatch.setattr(release, "BACKOFF_S", 0.001)
    shutil.copytree(sound, tmp_path / "root")
    return Store(str(tmp_path / "root"))


def place(store: Store, name: str = "v1") -> str:
    return f"{store.root}/releases/{name}"


def test_a_release_is_an_output_root_of_its_own(store: Store) -> None:
    before = pd.read_parquet(f"{store.root}/tracks")
    seen: list[release.ReleaseProgress] = []
    made = release_root(store.root, "v1", on_progress=seen.append)
    assert seen[-1].bytes_done == seen[-1].bytes_total == made.totals()["num_bytes"]
    for frame in (pd.read_parquet(f"{place(store)}/tracks"), fb.read_tracks(place(store))):
        pd.testing.assert_frame_equal(frame, before)
    assert len(fb.read_tracks(place(store), dataset="own", video_id="a")) == 40
    pd.testing.assert_frame_equal(pd.read_parquet(f"{store.root}/tracks"), before)
    assert verify_root(place(store)).problems == []
    assert verify_root(store.root).problems == []
    assert made.totals()["videos"] == {"ok": 5}
    assert made.totals()["datasets"] == ["ava", "own"]
    manifest = json.loads(Path(place(store), RELEASE_KEY).read_bytes())
    assert manifest["digest"] == made.digest
    for shard, item in manifest["shards"].items():
        record = Path(store.root, commit_key(shard)).read_bytes()
        assert item["commit_sha256"] == sha256(record).hexdigest()
        for name in TABLES:
            key = object_key(name, item["dataset"], shard)
            assert Path(place(store), key).read_bytes() == store.read_bytes(key)


def test_it_stays_as_it_is_when_the_root_goes_on(store: Store) -> None:
    made = release_root(store.root, "v1")
    before = fb.read_tracks(place(store))
    add(store, "s1", "ab", 30)
    store.delete(commit_key("s2"))
    add(store, "s4", "e")
    pd.testing.assert_frame_equal(fb.read_tracks(place(store)), before)
    assert verify_root(place(store)).problems == []
    again = release_root(store.root, "v2")
    assert sorted(again.shards) == ["s1", "s3", "s4"]
    assert again.digest != made.digest


def test_equal_content_has_an_equal_digest(store: Store) -> None:
    assert release_root(store.root, "v1").digest == release_root(store.root, "v2").digest


def test_datasets_can_be_chosen(store: Store) -> None:
    made = release_root(store.root, "own", datasets=["own"])
    assert list(made.shards) == ["s3"]
    assert set(pd.read_parquet(f"{place(store, 'own')}/tracks")["dataset"]) == {"own"}
    with pytest.raises(FileNotFoundError, match="nothing is committed of nobody"):
        release_root(store.root, "nobody", datasets=["nobody"])
    with pytest.raises(FileNotFoundError, match="not finished"):
        fb.read_tracks(place(store, "nobody"))


@pytest.mark.parametrize("name", ["", "a/b", "..", "../x", ".v1", "_v1", "ü", "a b", "x" * 200])
def test_names_that_are_no_folder_are_refused(store: Store, name: str) -> None:
    with pytest.raises(ConfigError, match="expected letters"):
        release_root(store.root, name)
    assert not Path(store.root, "releases").exists()


def test_a_name_is_given_once(store: Store) -> None:
    release_root(store.root, "v1")
    listed = Store(place(store)).list()
    with pytest.raises(ConfigError, match="exists and stays as it is"):
        release_root(store.root, "v1")
    assert Store(place(store)).list() == listed
    with Lease(Store(place(store, "v2"))), pytest.raises(OutputInUseError, match="in use by"):
        release_root(store.root, "v2")


def test_an_empty_root_has_no_release(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is committed"):
        release_root(str(tmp_path), "v1")
    assert list(tmp_path.iterdir()) == []


# --- interrupted -------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let the process end before the so-manieth change of a store; the changes until then."""
    done: list[str] = []
    for name in ("write_bytes", "put_file", "delete"):
        original: Callable[..., Any] = getattr(Store, name)

        def changed(
            self: Store,
            *args: Any,
            original: Callable[..., Any] = original,
            name: str = name,
        ) -> Any:
            key = args[1] if name == "put_file" else args[0]
            if not key.startswith("_lease"):
                if len(done) >= number:
                    raise Killed
                done.append(f"{name} {key}")
            return original(self, *args)

        monkeypatch.setattr(Store, name, changed)
    return done


def test_a_release_killed_anywhere_is_not_read_and_can_be_completed(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    want = fb.read_tracks(store.root)
    with monkeypatch.context() as patch:
        changes = kill_at(patch, 1000)
        release_root(store.root, "v1")
    assert len(changes) == 4 + 3 * 6 + 1 + 4  # guards; shards; manifest; guards again
    for number in (0, 2, 4, 9, 10, 21, 22, 23, 25, 26):
        shutil.rmtree(f"{store.root}/releases")
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with pytest.raises(Killed):
                release_root(store.root, "v1")
        there = [name for name in TABLES if Path(place(store), name).exists()]
        assert there == list(TABLES[:number])
        for name in there if number <= 23 else ():
            assert_not_read(store, name)
        if there:
            assert verify_root(place(store)).exit_code == 1
        made = release_root(store.root, "v1")
        assert len(made.shards) == 3
        assert verify_root(place(store)).problems == []
        pd.testing.assert_frame_equal(fb.read_tracks(place(store)), want)


def assert_not_read(store: Store, name: str) -> None:
    with pytest.raises((OSError, ValueError)):
        pd.read_parquet(f"{place(store)}/{name}")
    with pytest.raises(FileNotFoundError, match="not finished"):
        fb.read_table(place(store), name)
    with pytest.raises(duckdb.Error):
        duckdb.sql(f"select * from '{place(store)}/{name}/**/*.parquet'").fetchall()


def test_completing_copies_only_what_is_missing_and_drops_what_is_gone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(release, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            release_root(store.root, "v1")
    add(store, "s1", "ab", 30)
    store.delete(commit_key("s2"))
    with monkeypatch.context() as patch:
        changes = kill_at(patch, 1000)
        release_root(store.root, "v1")
    copied = [change for change in changes if change.startswith("put_file")]
    assert sorted(copied) == sorted(f"put_file {object_key(n, 'ava', 's1')}" for n in TABLES)
    assert verify_root(place(store)).problems == []
    pd.testing.assert_frame_equal(
        pd.read_parquet(f"{place(store)}/tracks"), fb.read_tracks(store.root)
    )


# --- a root that changes -----------------------------------------------------------------------


def during(monkeypatch: pytest.MonkeyPatch, happenings: dict[int, Callable[[], None]]) -> None:
    """Have things happen after so many objects were copied."""
    original = release._Copy._copy_object
    copied = 0

    def copy_object(self: Any, *args: Any) -> None:
        nonlocal copied
        original(self, *args)
        copied += 1
        happenings.get(copied, lambda: None)()

    monkeypatch.setattr(release._Copy, "_copy_object", copy_object)


@pytest.mark.parametrize("number", [1, 4, 7, 12])
def test_a_shard_that_changes_meanwhile_is_copied_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def overwrite() -> None:
        for shard, videos in (("s1", "ab"), ("s2", "cd")):
            add(store, shard, videos, 30)

    during(monkeypatch, {number: overwrite})
    release_root(store.root, "v1")
    assert verify_root(place(store)).problems == []
    pd.testing.assert_frame_equal(fb.read_tracks(place(store)), fb.read_tracks(store.root))
    assert len(fb.read_tracks(place(store))) == 4 * 60 + 40


def test_a_shard_that_leaves_meanwhile_leaves_the_release(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove() -> None:
        store.delete(commit_key("s2"))
        for name in TABLES:
            store.delete(object_key(name, "ava", "s2"))

    during(monkeypatch, {12: remove})
    made = release_root(store.root, "v1")
    assert sorted(made.shards) == ["s1", "s3"]
    assert verify_root(place(store)).problems == []


def test_a_shard_that_comes_meanwhile_is_left_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    during(monkeypatch, {2: lambda: add(store, "s4", "e")})
    assert sorted(release_root(store.root, "v1").shards) == ["s1", "s2", "s3"]
    assert verify_root(place(store)).problems == []


def test_a_root_that_never_rests_is_not_released(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "MAX_LOOKS", 2)
    again = {4 * n: (lambda n=n: add(store, "s1", "ab", 10 * n)) for n in range(2, 9)}
    during(monkeypatch, again)
    with pytest.raises(StorageError, match="overwritten during each of 2 looks"):
        release_root(store.root, "v1")
    with pytest.raises(FileNotFoundError, match="not finished"):
        fb.read_tracks(place(store))


def test_a_shard_that_is_being_replaced_is_never_released(store: Store) -> None:
    void_commit(store, "s1")
    with pytest.raises(StorageError, match="shard s1: a run has begun to replace it"):
        release_root(store.root, "v1")


def test_objects_that_do_not_fit_their_record_are_never_released(store: Store) -> None:
    key = object_key("tracks", "ava", "s1")
    data = bytearray(store.read_bytes(key))
    data[1000] ^= 1
    store.write_bytes(key, bytes(data))
    with pytest.raises(StorageError, match=r"part-s1\.parquet: expected .* see fourdh verify"):
        release_root(store.root, "v1")
    store.delete(key)
    with pytest.raises(StorageError, match="got 0 bytes, nothing"):
        release_root(store.root, "v1")
    add(store, "s1", "ab")
    assert len(release_root(store.root, "v1").shards) == 3


def test_a_record_that_names_other_places_is_never_followed(store: Store) -> None:
    body = json.loads(store.read_bytes(commit_key("s1")))
    body["objects"]["tracks"]["key"] = "../../../etc/hostname"
    store.write_bytes(commit_key("s1"), json.dumps(body).encode())
    with pytest.raises(SchemaError, match=r"names '\.\./\.\./\.\./etc/hostname'"):
        release_root(store.root, "v1")
    store.write_bytes(commit_key("s1"), b"[")
    with pytest.raises(SchemaError, match="expected a commit record"):
        release_root(store.root, "v1")


# --- damage afterwards -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["object", "commit", "extra", "manifest", "digest", "rows", "gone"]
)
def test_damage_to_a_release_is_named(store: Store, what: str) -> None:
    release_root(store.root, "v1")
    made = Store(place(store))
    body = json.loads(made.read_bytes(RELEASE_KEY))
    if what == "object":
        key = object_key("videos", "own", "s3")
        made.write_bytes(key, made.read_bytes(key)[:-1] + b"x")
    elif what == "commit":
        record = made.read_bytes(commit_key("s1"))
        made.write_bytes(
            commit_key("s1"), record.replace(b'"fingerprint": "f"', b'"fingerprint": "g"')
        )
    elif what == "extra":
        add(made, "s9", "z")
    elif what == "manifest":
        made.write_bytes(RELEASE_KEY, b"{}")
    elif what == "digest":
        made.write_bytes(RELEASE_KEY, json.dumps({**body, "digest": "x"}).encode())
    elif what == "rows":
        body["totals"]["rows"]["tracks"] += 1
        made.write_bytes(RELEASE_KEY, json.dumps(body).encode())
    else:
        made.delete(commit_key("s2"))
        for name in TABLES:
            made.delete(object_key(name, "ava", "s2"))
    report = verify_root(place(store))
    assert report.problems
    assert {p.kind for p in report.problems} == {"checksum" if what == "object" else "release"}


def test_reading_an_unfinished_release_does_not_wait(store: Store) -> None:
    release_root(store.root, "v1")
    Store(place(store)).write_bytes(f"tracks/{UNFINISHED}", b"x")
    started = time.monotonic()
    for committed_only in (True, False):
        with pytest.raises(FileNotFoundError, match="not finished"):
            fb.read_tracks(place(store), committed_only=committed_only)
    assert time.monotonic() - started < READ_BACKOFF_S
    assert len(fb.read_table(place(store), "videos")) == 5


def test_the_command_says_what_it_made(store: Store) -> None:
    result = runner.invoke(app, ["release", store.root, "v1", "--dataset", "ava", "--json"])
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert (body["num_shards"], body["videos"]) == (2, {"ok": 4})
    again = runner.invoke(app, ["release", store.root, "v1"])
    assert again.exit_code == 2
    assert "exists and stays as it is" in again.output
    assert runner.invoke(app, ["release", store.root, "../x"]).exit_code == 2
    result = runner.invoke(app, ["release", store.root, "v2"])
    assert "v2" in result.stdout
    assert runner.invoke(app, ["verify", place(store)]).exit_code == 0

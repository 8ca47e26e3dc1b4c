"""The store on a local path and in memory; the same behaviour on both."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from fourdh_batch import storage
from fourdh_batch.errors import StorageError
from fourdh_batch.storage import (
    Store,
    fingerprint_file,
    list_files,
    list_objects,
    open_read,
    redact_uri,
    safe_key,
)


@pytest.fixture(params=["local", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "memory":
        yield Store("memory://store-test/out")
        fsspec.filesystem("memory").store.clear()
        fsspec.filesystem("memory").pseudo_dirs[:] = [""]
    else:
        yield Store(f"{'file://' if request.param == 'file' else ''}{tmp_path}/out")


def test_what_is_written_is_read_back_and_overwritten(store: Store) -> None:
    store.write_bytes("a/b c/ü%2F.json", b"one")
    store.write_bytes("a/b c/ü%2F.json", b"two!")
    assert store.read_bytes("a/b c/ü%2F.json") == b"two!"
    with store.open_read("a/b c/ü%2F.json") as stream:
        stream.seek(1)
        assert stream.read(2) == b"wo"
    with open_read(store.uri("a/b c/ü%2F.json")) as stream:
        assert stream.read() == b"two!"


def test_a_folder_is_listed_without_its_neighbours(store: Store) -> None:
    for key in ("plan/ava/1", "plan/ava/x/2", "plan/ava2/3", "4"):
        store.write_bytes(key, key.encode())
    assert store.list("plan/ava") == [("plan/ava/1", 10), ("plan/ava/x/2", 12)]
    assert [key for key, _ in store.list()] == ["4", "plan/ava/1", "plan/ava/x/2", "plan/ava2/3"]
    assert store.list("plan/av") == []
    store.delete_tree("plan/ava")
    assert [key for key, _ in store.list()] == ["4", "plan/ava2/3"]


def test_a_folder_may_be_deleted_by_several_at_once(store: Store) -> None:
    for i in range(50):
        store.write_bytes(f"work/{i % 7}/{i}", b"")
    threads = [threading.Thread(target=store.delete_tree, args=("work",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.list() == []


def test_absent_keys_are_absent(store: Store) -> None:
    assert not store.exists("a/b")
    store.write_bytes("a/b", b"")
    assert store.exists("a/b")
    assert not store.exists("a")
    store.delete("a/b")
    store.delete("a/b")
    store.delete_tree("never")
    with pytest.raises(FileNotFoundError):
        store.read_bytes("a/b")
    with pytest.raises(FileNotFoundError):
        store.open_read("a/b")


def test_a_file_is_copied_to_its_key(store: Store, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(range(256)) * 50_000)
    store.put_file(tmp_path / "big", "x/y.bin")
    assert store.read_bytes("x/y.bin") == (tmp_path / "big").read_bytes()


def test_exclusive_creation_has_one_winner_among_threads(store: Store) -> None:
    for turn in range(20):
        barrier = threading.Barrier(8)
        won: list[bytes] = []

        def create(
            name: bytes,
            key: str = f"leases/{turn}",
            barrier: threading.Barrier = barrier,
            won: list[bytes] = won,
        ) -> None:
            barrier.wait()
            if store.create_exclusive(key, name):
                won.append(name)

        threads = [threading.Thread(target=create, args=(b"%d" % i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read_bytes(f"leases/{turn}") == won[0]


@pytest.mark.parametrize(
    "key", ["", "/", "/etc/passwd", "a//b", "a/", "../x", "a/../../x", ".", "a/./b", "a\0b"]
)
def test_keys_that_could_leave_the_root_are_refused(store: Store, key: str) -> None:
    for call in (
        store.read_bytes,
        store.open_read,
        store.exists,
        store.delete,
        store.delete_tree,
        store.uri,
        lambda key: store.write_bytes(key, b""),
        lambda key: store.create_exclusive(key, b""),
        lambda key: store.put_file(Path(__file__), key),
    ):
        with pytest.raises(ValueError, match="expected a relative key"):
            call(key)


def test_a_store_travels_to_another_process(store: Store) -> None:
    store.write_bytes("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes("a") == b"1"


# --- local files -------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    code = f"""
import resource
from fourdh_batch.errors import StorageError
from fourdh_batch.storage import Store
store = Store({str(tmp_path)!r})
store.write_bytes("a/x", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    store.write_bytes("a/x", bytes(5000))
except StorageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert f"write {tmp_path}/a/x: OSError: [Errno {errno.EFBIG}]" in done.stdout
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"]
    assert (tmp_path / "a" / "x").read_bytes() == b"old"


def test_a_file_where_a_folder_should_be_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "tracks").write_text("x")
    with pytest.raises(StorageError, match="not a folder"):
        Store(str(tmp_path)).create_exclusive("tracks/a", b"1")


def test_temporary_files_are_not_listed_and_old_ones_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("a", b"1")
    left_over = tmp_path / ".a.99999-abcd.tmp"
    left_over.write_bytes(b"half")
    assert store.list() == [("a", 1)]
    store.write_bytes("a", b"2")
    assert left_over.exists()  # young: its process may be alive
    monkeypatch.setattr(storage, "STALE_TEMPORARY_S", -1.0)
    store.write_bytes("a", b"3")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    Store(str(tmp_path)).write_bytes("a", b"1")
    (tmp_path / "b").write_bytes(b"1")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


# --- retries -----------------------------------------------------------------------------------


class FailingBackend:
    """A store that fails a number of times before it works."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors
        self.calls = 0

    def read(self, key: str) -> bytes:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return b"there"


def store_with(errors: list[Exception], monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store("/nowhere", attempts=4, backoff_s=0.001)
    monkeypatch.setattr(store, "_backend", FailingBackend(errors))
    return store


def test_passing_faults_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(
        [ConnectionResetError("reset"), TimeoutError("slow"), OSError(errno.EIO, "io")], monkeypatch
    )
    assert store.read_bytes("a") == b"there"


def test_faults_that_do_not_pass_name_key_and_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with([ConnectionResetError("reset") for _ in range(9)], monkeypatch)
    with pytest.raises(
        StorageError, match=r"read /nowhere/a: failed 4 times, last ConnectionResetError: reset"
    ):
        store.read_bytes("a")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_lasting_faults_are_not_retried(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with([OSError(number, "no")], monkeypatch)
    with pytest.raises(StorageError, match="read /nowhere/a: "):
        store.read_bytes("a")


def test_mistakes_of_the_program_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with([TypeError("bug")], monkeypatch)
    with pytest.raises(TypeError, match="bug"):
        store.read_bytes("a")


# --- names -------------------------------------------------------------------------------------


def test_secrets_do_not_show() -> None:
    assert redact_uri("ftp://user:pass@host/x@y") == "ftp://***@host/x@y"
    assert redact_uri("https://h/a.mp4?X-Amz-Signature=abc") == "https://h/a.mp4?***"
    assert redact_uri("s3://bucket/a@b?.mp4") == "s3://bucket/a@b?.mp4"
    assert redact_uri("s3://key:se/cret@bucket/a") == "s3://***@bucket/a"
    assert redact_uri("http://[::1]:80/a@b") == "http://[::1]:80/a@b"
    assert redact_uri("az://box/a?sv=1&sig=abc") == "az://box/a?***"
    assert redact_uri("s3://bucket/a?versionId=1") == "s3://bucket/a?versionId=1"
    for address in ("s3://key:secret@bucket/a", "gs://key:se/cret@bucket/a"):
        with pytest.raises(StorageError, match=r"://\*\*\*@bucket/a: expected an address without"):
            open_read(address)
    assert redact_uri("/local/a@b?x") == "/local/a@b?x"
    assert "pass" not in repr(Store("sftp://user:pass@host/x"))


def test_ids_become_one_part_of_a_key() -> None:
    assert safe_key("clip_01.mp4") == "clip_01.mp4"
    assert safe_key("../x") == "%2E.%2Fx"
    assert safe_key("a/b") == "a%2Fb"
    assert safe_key("_plan") == "%5Fplan"
    assert safe_key("x=ü") == "x%3D%C3%BC"
    assert safe_key("") == "~"
    assert len(safe_key("ü" * 300)) == storage.MAX_KEY_PART
    assert safe_key("x" * 300) != safe_key("x" * 301)
    assert safe_key(safe_key("x" * 300)) != safe_key("x" * 300)


# --- inputs ------------------------------------------------------------------------------------


def test_a_folder_lists_its_videos_at_all_depths(tmp_path: Path) -> None:
    for name in ("b.MP4", "a/c.mkv", "a/notes.txt", ".hidden/d.mp4", "a/._c.mkv", "z [1].mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "gone")
    endings = (".mp4", ".mkv")
    assert list_files(str(tmp_path), endings) == [
        ("a/c.mkv", f"{tmp_path}/a/c.mkv", 5),
        ("b.MP4", f"{tmp_path}/b.MP4", 5),
        ("dangling.mp4", f"{tmp_path}/dangling.mp4", 0),
        ("z [1].mp4", f"{tmp_path}/z [1].mp4", 5),
    ]
    assert [item[0] for item in list_files(f"{tmp_path}/*/*.mkv", endings)] == ["a/c.mkv"]
    assert [item[0] for item in list_files(f"{tmp_path}/**/*.[mM]*", endings)][:2] == [
        "a/c.mkv",
        "b.MP4",
    ]
    assert list_files(f"{tmp_path}/z [1].mp4", endings)[0][0] == "z [1].mp4"
    assert list_files(f"{tmp_path}/a/notes.txt", endings)[0][2] == 5
    assert list_files(f"{tmp_path}/a/none*", endings) == []
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        list_files(f"{tmp_path}/missing", endings)


def test_a_listing_is_in_the_order_of_whole_paths(store: Store) -> None:
    names = ["a-b.mp4", "a.mp4", "a/x.mp4", "a0.mp4", "aa/b.mp4", "z.mp4", "é/1.mp4", "字.mp4"]
    for name in reversed(names):
        store.write_bytes(f"v/{name}", b"1")
    assert [item.relative for item in list_objects(store.uri("v"), (".mp4",))] == names
    assert [key for key, _ in store.list("v")] == [f"v/{name}" for name in names]


def test_one_file_needs_no_ending_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    for address in (f"{tmp_path}/a.txt", f"file://{tmp_path}/a.txt", "a.txt", "./a.txt"):
        assert [item[0] for item in list_files(address, (".mp4",))] == ["a.txt"]


def test_a_remote_file_behaves_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "READ_BLOCK_BYTES", 100)
    data = bytes(range(256)) * 4
    store = Store("memory://store-test/file")
    store.write_bytes("a", data)
    dice = random.Random(0)
    with store.open_read("a") as there, io.BytesIO(data) as here:
        for _ in range(300):
            at, size = dice.randrange(1100), dice.choice([0, 1, 99, 100, 101, 350, -1])
            assert there.seek(at) == here.seek(at)
            assert there.read(size) == here.read(size)
            assert there.tell() == here.tell()
        assert there.seek(-24, os.SEEK_END) == 1000
        assert there.read() == data[1000:]
        with pytest.raises(OSError, match="expected a place in the file"):
            there.seek(-2000, os.SEEK_END)
    with pytest.raises(ValueError, match="closed"):
        there.read()


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.mp4").write_bytes(b"1")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "disk")
    assert [f[0] for f in list_files(f"{tmp_path}/corpus", (".mp4",))] == ["linked/a.mp4"]


def test_remote_inputs_are_listed_like_local_ones(store: Store) -> None:
    for key in ("v/b.mp4", "v/a/c::d.mp4", "v/x.txt", "w/e.mp4"):
        store.write_bytes(key, b"123")
    listed = list_files(store.uri("v"), (".mp4",))
    assert [(name, size) for name, _, size in listed] == [("a/c::d.mp4", 3), ("b.mp4", 3)]
    for _, uri, _ in listed:
        with open_read(uri) as stream:
            assert stream.read() == b"123"
    assert [f[0] for f in list_files(store.uri("*/*.mp4"), (".mp4",))] == ["v/b.mp4", "w/e.mp4"]
    assert [f[0] for f in list_files(store.uri("v/x.txt"), (".mp4",))] == ["x.txt"]
    with pytest.raises(FileNotFoundError):
        list_files(store.uri("missing"), (".mp4",))


@pytest.mark.parametrize("size", [0, 1, 1000, 262_144, 262_145, 3_000_000])
def test_a_fingerprint_depends_on_content_alone(tmp_path: Path, size: int) -> None:
    content = bytearray(i % 251 for i in range(size))
    first, second = tmp_path / "a.mp4", tmp_path / "b.mp4"
    first.write_bytes(content)
    second.write_bytes(content)
    assert fingerprint_file(str(first)) == fingerprint_file(str(second))
    assert fingerprint_file(str(first))[0] == size
    for at in (0, size // 2, size - 1) if size <= 262_144 else (0, size - 1):
        if size:
            changed = bytearray(content)
            changed[at] ^= 1
            second.write_bytes(changed)
            assert fingerprint_file(str(first))[1] != fingerprint_file(str(second))[1]
    second.write_bytes(content + b"x")
    assert fingerprint_file(str(first))[1] != fingerprint_file(str(second))[1]


def test_what_cannot_be_fingerprinted_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fingerprint_file(f"{tmp_path}/missing")
    with pytest.raises(StorageError, match=r"fingerprint .*: IsADirectoryError"):
        fingerprint_file(str(tmp_path))

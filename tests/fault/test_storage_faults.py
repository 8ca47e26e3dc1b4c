"""What the store makes of every fault of an object store and of a disk that is full.

A proxy before a real S3 endpoint spoils chosen requests. A fault that passes costs nothing but
time; one that stays is a `StorageError` with key and attempts; nothing is ever half there.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fourdh_batch import storage
from fourdh_batch.config import VideoConfig
from fourdh_batch.errors import StorageError
from fourdh_batch.pipeline.corpus import Video
from fourdh_batch.pipeline.reading import read_chunks, read_chunks_isolated, remote_chunks
from fourdh_batch.storage import Store, fingerprint_file, list_objects, open_read, redact_uri
from fourdh_batch.types import FrameChunk
from fourdh_batch.video.decode import VideoReader
from fourdh_batch.video.isolate import run_isolated
from tests.s3_proxy import SECRET_KEY, Fault, S3Proxy, has_endpoint, s3_endpoint
from tests.unit.test_storage_s3 import use_endpoint
from tests.video_makers import make_video

pytest.importorskip("s3fs")
pytestmark = pytest.mark.skipif(
    not has_endpoint(),
    reason="moto[s3], flask and flask-cors are not installed and FOURDH_TEST_S3 is not set",
)

BUCKET = f"faults-{os.getpid()}"
BLOCK = 4096
CAPTIVE = b"<html><p>Welcome &nbsp; to our network"
ATTEMPTS = 4
ANY_SHARE = -10.0  # of the disk may be free: tests must not depend on what else is on it


@pytest.fixture(scope="module")
def running() -> Iterator[S3Proxy]:
    with S3Proxy(s3_endpoint()) as proxy:
        yield proxy


@pytest.fixture
def proxy(running: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> S3Proxy:
    use_endpoint(running.url, monkeypatch)
    running.reset()
    running.bytes_per_s = None
    monkeypatch.setattr(storage, "READ_BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(storage, "_retry", storage._Retry(ATTEMPTS, 0.001))
    monkeypatch.setattr(storage, "KEEP_FREE_SHARE", ANY_SHARE)
    return running


def be_impatient(proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(proxy.url, monkeypatch, "impatient")
    monkeypatch.setattr(storage, "STALL_TIMEOUT_S", 0.7)
    monkeypatch.setattr(storage, "CALL_TIMEOUT_S", 0.7)


@pytest.fixture
def store(proxy: S3Proxy, request: pytest.FixtureRequest) -> Store:
    store = Store(
        f"s3://{BUCKET}/{abs(hash(request.node.name))}", backoff_s=0.001, attempts=ATTEMPTS
    )
    filesystem, _ = store.filesystem()
    if not filesystem.exists(BUCKET):
        filesystem.mkdir(BUCKET)
    store.write_bytes("there/a", b"old")
    proxy.reset()
    return store


# --- every call --------------------------------------------------------------------------------

CALLS: dict[str, tuple[str, Callable[[Store], object], object]] = {
    "write": ("PUT", lambda store: store.write_bytes("there/b", bytes(9000)), None),
    "create": ("PUT", lambda store: store.create_exclusive("there/c", b"mine"), True),
    "read": ("GET", lambda store: store.read_bytes("there/a"), b"old"),
    "list": ("GET", lambda store: store.list("there"), [("there/a", 3)]),
    "look up": ("HEAD", lambda store: store.exists("there/a"), True),
    "delete": ("DELETE", lambda store: store.delete("there/a"), None),
    "delete tree": ("POST", lambda store: store.delete_tree("there"), None),
}
ANY = ["503", "500", "429", "400", "refuse", "silent"]
SLOW = ["silent", "stall"]
WITH_BODY = ["truncate", "reset", "stall"]
SPOILT = [(call, kind) for call in CALLS for kind in ANY if (call, kind) != ("look up", "400")]
SPOILT += [(call, kind) for call in ("read", "list") for kind in WITH_BODY]
SPOILT += [(call, kind) for call in ("write", "create") for kind in ("cut", "forget")]
SPOILT += [("delete", "forget"), ("delete tree", "forget")]


@pytest.mark.parametrize(("call", "kind"), SPOILT)
def test_a_call_survives_a_fault_that_passes(
    store: Store, proxy: S3Proxy, call: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, run, expected = CALLS[call]
    if kind in SLOW:
        be_impatient(proxy, monkeypatch)
    proxy.faults = [Fault(kind, method, times=1 if kind in SLOW else 2)]
    assert run(store) == expected
    spoilt = [request for request in proxy.requests if request.fault]
    assert {request.method for request in spoilt} == {method}
    proxy.faults = []
    kept = {"there/a": 3, "there/b": 9000, "there/c": 4}
    assert all(kept[key] == size for key, size in store.list())


@pytest.mark.parametrize("call", CALLS)
def test_a_fault_that_stays_names_key_and_attempts(store: Store, proxy: S3Proxy, call: str) -> None:
    method, run, _ = CALLS[call]
    proxy.faults = [Fault("503", method, times=None)]
    with pytest.raises(
        StorageError, match=rf"{BUCKET}/\d+/there.*: failed 4 times, last "
    ) as caught:
        run(store)
    assert SECRET_KEY not in "".join(traceback.format_exception(caught.value))
    assert len([request for request in proxy.requests if request.fault]) == ATTEMPTS
    proxy.faults = []
    assert store.list() == [("there/a", 3)]


@pytest.mark.parametrize("body", [CAPTIVE, b""])
def test_a_reply_that_is_not_of_s3_is_not_taken_for_one(
    store: Store, proxy: S3Proxy, body: bytes
) -> None:
    proxy.faults = [Fault("200", "GET", times=None, body=body)]
    for call in (
        lambda: store.list("there"),
        lambda: store.read_bytes("there/a"),
        lambda: open_read(store.uri("there/a")),
        lambda: list(list_objects(store.uri("there"), ())),
    ):
        with pytest.raises(StorageError, match="failed 4 times"):
            call()
    proxy.faults = [Fault("200", "GET", times=2, body=body)]
    assert store.list("there") == [("there/a", 3)]


def test_a_refusal_is_not_retried(store: Store, proxy: S3Proxy) -> None:
    for status, error in (("403", "PermissionError"), ("507", "InsufficientStorage")):
        proxy.reset()
        proxy.faults = [Fault(status, times=None)]
        with pytest.raises(StorageError, match=rf"write s3://.*there/a: .*{error}"):
            store.write_bytes("there/a", b"1")
        assert len(proxy.requests) == 1
    proxy.reset()
    with pytest.raises(FileNotFoundError):
        store.read_bytes("missing")
    assert len(proxy.requests) == 1


def test_a_page_of_a_listing_is_retried_by_itself(
    store: Store, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "KEYS_AT_ONCE", 2)
    for i in range(5):
        store.write_bytes(f"there/{i}", b"")
    proxy.reset()
    proxy.faults = [Fault("503", "GET", skip=1, times=2), Fault("reset", "GET", skip=1)]
    assert len(store.list("there")) == 6
    assert [request.status for request in proxy.requests].count(200) == 3


def test_keys_that_could_not_be_deleted_are_told(store: Store, proxy: S3Proxy) -> None:
    reply = (
        b'<?xml version="1.0"?><DeleteResult><Error><Key>x</Key><Code>InternalError</Code>'
        b"<Message>try again</Message></Error></DeleteResult>"
    )
    proxy.faults = [Fault("200", "POST", body=reply)]
    store.delete_tree("there")
    assert store.list() == []
    store.write_bytes("there/a", b"old")
    proxy.faults = [Fault("200", "POST", times=None, body=reply)]
    with pytest.raises(StorageError, match="1 keys are still there, the first by InternalError"):
        store.delete_tree("there")


def test_a_lost_reply_does_not_lose_the_race(store: Store, proxy: S3Proxy) -> None:
    proxy.faults = [Fault("forget", "PUT")]
    assert store.create_exclusive("lease", b"mine")
    assert not store.create_exclusive("lease", b"other")
    proxy.faults = [Fault("503", "PUT")]
    assert not store.create_exclusive("lease", b"third")
    assert store.read_bytes("lease") == b"mine"


def test_a_store_that_cannot_be_reached_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint("http://127.0.0.1:9", monkeypatch)
    for method, run, _ in CALLS.values():
        with pytest.raises(StorageError, match="failed 2 times"):
            run(Store("s3://bucket/out", attempts=2, backoff_s=0.001))
        assert method


def test_random_faults_cost_time_and_nothing_else(store: Store, proxy: S3Proxy) -> None:
    patient = Store(store.root, attempts=12, backoff_s=0.001)
    kinds = ("503", "500", "reset", "truncate", "refuse")
    proxy.faults = [Fault(kind, share=0.12, times=None) for kind in kinds]
    for i in range(12):
        patient.write_bytes(f"many/{i}", b"%d" % i)
    assert [patient.read_bytes(f"many/{i}") for i in range(12)] == [b"%d" % i for i in range(12)]
    assert len(patient.list("many")) == 12
    patient.delete_tree("many")
    assert patient.list("many") == []
    assert len([request for request in proxy.requests if request.fault]) > 5


# --- uploads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["there/a", "new"])
def test_an_upload_that_is_cut_leaves_what_was_there(
    store: Store, proxy: S3Proxy, tmp_path: Path, key: str
) -> None:
    proxy.faults = [Fault("cut", "PUT", times=None)]
    (tmp_path / "file").write_bytes(bytes(200_000))
    for call in (
        lambda: store.write_bytes(key, bytes(200_000)),
        lambda: store.put_file(tmp_path / "file", key),
    ):
        with pytest.raises(StorageError, match="failed 4 times"):
            call()
    proxy.faults = []
    assert store.list() == [("there/a", 3)]


def test_a_part_that_is_cut_publishes_nothing_and_leaves_no_parts(
    store: Store, proxy: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PUT_LIMIT_BYTES", 10 * 2**20)
    (tmp_path / "file").write_bytes(os.urandom(11 * 2**20))
    proxy.faults = [Fault("cut", "PUT", "partNumber=2", times=None)]
    with pytest.raises(StorageError, match="failed 4 times"):
        store.put_file(tmp_path / "file", "there/a")
    assert store.read_bytes("there/a") == b"old"
    filesystem, _ = store.filesystem()
    assert not filesystem.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads")
    proxy.faults = [Fault("cut", "PUT", "partNumber=2"), Fault("503", "POST", "uploadId")]
    store.put_file(tmp_path / "file", "there/a")
    assert store.read_bytes("there/a") == (tmp_path / "file").read_bytes()


# --- in the middle of a file -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*ANY, *WITH_BODY])
def test_reading_goes_on_after_a_fault_in_the_middle(
    store: Store, proxy: S3Proxy, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(5 * BLOCK + 17)
    store.write_bytes("v", data)
    proxy.reset()
    times = 2
    if kind in SLOW:
        times = 1
        be_impatient(proxy, monkeypatch)
    proxy.faults = [Fault(kind, "GET", skip=2, times=times)]
    with open_read(store.uri("v")) as file:
        assert file.read() == data
        file.seek(100)
        assert file.read() == data[100:]  # from disk
    if kind in SLOW:  # a busy machine may seem to stall
        assert [request.fault for request in proxy.requests].count(kind) == 1
        return
    assert [request.fault for request in proxy.requests] == ["", "", *[kind] * times, *[""] * 4]


def test_a_fault_that_stays_in_the_middle_names_the_place(store: Store, proxy: S3Proxy) -> None:
    store.write_bytes("v", bytes(5 * BLOCK))
    proxy.faults = [Fault("reset", "GET", skip=2, times=None)]
    with open_read(store.uri("v")) as file:
        assert len(file.read(2 * BLOCK)) == 2 * BLOCK
        with pytest.raises(StorageError, match=rf"/v from byte {2 * BLOCK}: failed 4 times"):
            file.read()


def test_a_slow_store_gives_signs_of_life(
    store: Store, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "READ_BLOCK_BYTES", 2**20)
    store.write_bytes("v", bytes(2**20))
    monkeypatch.setattr(storage, "STALL_TIMEOUT_S", 0.7)
    proxy.bytes_per_s = 1e6  # longer for a block than a stall may last
    signs: list[int] = []
    with open_read(store.uri("v"), on_progress=lambda: signs.append(1)) as file:
        assert len(file.read()) == 2**20
    assert len(signs) > 4


def test_an_overwritten_file_is_never_mixed(store: Store, proxy: S3Proxy) -> None:
    store.write_bytes("v", bytes(5 * BLOCK))
    with open_read(store.uri("v")) as file:
        file.read(BLOCK)
        store.write_bytes("v", b"\1" * 5 * BLOCK)
        with pytest.raises(StorageError, match="overwritten since it was opened"):
            file.read()
    store.write_bytes("v", bytes(5 * BLOCK))
    with open_read(store.uri("v")) as file:
        store.delete("v")
        with pytest.raises(StorageError, match="has gone since it was opened"):
            file.read()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("clip") / "clip.mp4", 40)


def frames(source: object) -> list[FrameChunk]:
    with VideoReader(source) as reader:  # type: ignore[arg-type]
        return list(reader.chunks(8))


def test_a_video_is_decoded_through_random_faults(
    store: Store, proxy: S3Proxy, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_file(clip, "clip.mp4")
    monkeypatch.setattr(storage, "READ_BLOCK_BYTES", 1024)
    monkeypatch.setattr(storage, "_retry", storage._Retry(12, 0.001))
    kinds = ("503", "reset", "truncate", "refuse")
    proxy.faults = [Fault(kind, share=0.1, times=None) for kind in kinds]
    with open_read(store.uri("clip.mp4")) as file:
        there = frames(file)
    here = frames(str(clip))
    assert len([request for request in proxy.requests if request.fault]) > 3
    assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(here, there, strict=True))


def test_a_store_that_fails_under_a_decoder_is_no_damage_of_the_video(
    store: Store, proxy: S3Proxy, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_file(clip, "clip.mp4")
    monkeypatch.setattr(storage, "READ_BLOCK_BYTES", 1024)
    num_blocks = clip.stat().st_size // 1024
    for skip in (1, num_blocks // 2, num_blocks - 1):
        proxy.faults = [Fault("503", "GET", skip=skip, times=None)]
        with (
            open_read(store.uri("clip.mp4")) as file,
            pytest.raises(StorageError, match="failed 4 times"),
        ):
            frames(file)


def test_a_store_that_is_too_slow_is_not_blamed_on_the_video(
    store: Store, proxy: S3Proxy, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_file(clip, "clip.mp4")
    proxy.bytes_per_s = clip.stat().st_size / 4
    video = Video("v", store.uri("clip.mp4"), clip.stat().st_size, "f")
    with pytest.raises(StorageError, match="the store is too slow, no chunk of frames within 1 s"):
        list(read_chunks(video, VideoConfig(stall_timeout_s=2)))
    # whoever waits for a child sees that something comes
    *chunks, _ = read_chunks_isolated(video, VideoConfig(stall_timeout_s=2))
    assert sum(chunk.num_frames for chunk in chunks if isinstance(chunk, FrameChunk)) == 40


def test_a_store_that_refuses_is_told_by_an_isolated_decoder(
    store: Store, proxy: S3Proxy, clip: Path
) -> None:
    store.put_file(clip, "clip.mp4")
    proxy.faults = [Fault("403", "GET", times=None)]
    arguments = {
        "uri": store.uri("clip.mp4"),
        "video_id": "v",
        "max_pixels": 10**7,
        "decoder": "auto",
        "start": 0,
        "chunk_frames": 8,
        "max_chunk_bytes": 10**8,
        "score_shots": False,
    }
    maker = f"{remote_chunks.__module__}:{remote_chunks.__name__}"
    with pytest.raises(StorageError, match="PermissionError"):
        list(run_isolated(maker, arguments, video="v"))


# --- the copy on disk --------------------------------------------------------------------------


def test_a_killed_reader_leaves_nothing_on_disk(
    store: Store, proxy: S3Proxy, tmp_path: Path
) -> None:
    store.write_bytes("v", bytes(5 * BLOCK))
    code = f"""
import os, signal
from fourdh_batch import storage
storage.READ_BLOCK_BYTES = {BLOCK}
storage.KEEP_FREE_SHARE = {ANY_SHARE}
file = storage.open_read({store.uri("v")!r})
file.read()
print(len(file.raw._spooled), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.split() == ["5"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_on_disk_is_bounded(
    store: Store, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(10 * BLOCK)
    store.write_bytes("v", data)
    monkeypatch.setattr(storage, "MAX_SPOOLED_BYTES", 6 * BLOCK)
    proxy.reset()
    with open_read(store.uri("v")) as file:
        assert file.read() == data
        assert len(proxy.requests) == 10
        file.seek(0)
        assert file.read() == data
    assert len(proxy.requests) == 10 + 4  # only what did not fit


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """4 MB, all of them."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if not made or made.returncode:
        pytest.skip("a small file system cannot be mounted here (not root)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("is_full", [False, True])
def test_a_disk_without_room_costs_requests_and_nothing_else(
    store: Store,
    proxy: S3Proxy,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_full: bool,
) -> None:
    data = os.urandom(6 * 2**20)
    store.write_bytes("v", data)
    monkeypatch.setattr(storage, "READ_BLOCK_BYTES", 2**19)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    if is_full:
        fill(small_disk / "other")
    else:
        monkeypatch.setattr(storage, "KEEP_FREE_SHARE", 0.1)
    with caplog.at_level(logging.INFO), open_read(store.uri("v")) as file:
        for _ in range(2):
            file.seek(0)
            assert file.read() == data
        if not is_full:
            assert 0.1 <= shutil.disk_usage(small_disk).free / (4 * 2**20) < 0.4
    assert "the rest is fetched whenever it is needed" in caplog.text
    assert ("No space left on device" in caplog.text) == is_full


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


def test_a_full_disk_is_told_and_keeps_what_was_there(small_disk: Path, tmp_path: Path) -> None:
    store = Store(str(small_disk / "out"), backoff_s=0.001)
    store.write_bytes("tracks/a", b"old" * 1000)
    (tmp_path / "big").write_bytes(bytes(5 * 2**20))
    for key in ("tracks/a", "tracks/b"):
        for call in (
            lambda key: store.write_bytes(key, bytes(5 * 2**20)),
            lambda key: store.put_file(tmp_path / "big", key),
            lambda key: store.create_exclusive(f"{key}.lease", bytes(5 * 2**20)),
        ):
            with pytest.raises(StorageError, match=rf"{key}.*Errno 28\] No space left on device"):
                call(key)
    assert store.read_bytes("tracks/a") == b"old" * 1000
    assert [path.name for path in (small_disk / "out").rglob("*")] == ["tracks", "a"]
    fill(small_disk / "other")
    with pytest.raises(StorageError, match="No space left on device"):
        store.write_bytes("tracks/a", b"new" * 10_000)
    (small_disk / "other").unlink()
    assert store.read_bytes("tracks/a") == b"old" * 1000
    store.write_bytes("tracks/a", b"new")
    assert store.list() == [("tracks/a", 3)]


# --- secrets -----------------------------------------------------------------------------------


def test_no_secret_of_an_address_is_told(
    store: Store, proxy: S3Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    host = proxy.url.removeprefix("http://")
    path = store.uri("there/a").removeprefix("s3://")
    addresses = [
        f"http://{host}/{path}?X-Amz-Credential=me&X-Amz-Signature=5ecret",
        f"http://user:5ecret@{host}/{path}",
        f"http://user:5ecret@127.0.0.1:9/{path}",
        f"s3://AKIA:5ecret@{path}",
        f"s3://AKIA:5ec/ret5ecret@{path}",
    ]
    num_told = 0
    for fault in ("403", "404", "503", "reset"):
        proxy.faults = [Fault(fault, times=None)]
        for address in addresses:
            for call in (
                lambda address: open_read(address),
                lambda address: fingerprint_file(address),
                lambda address: list(list_objects(address, ())),
                lambda address: Store(address, attempts=2, backoff_s=0.001).list(),
            ):
                told = ""
                try:
                    call(address)
                except OSError as error:
                    told = "".join(traceback.format_exception(error)) + str(error)
                assert "5ec" not in told, (address, fault, told)
                num_told += bool(told)
    assert num_told > 60
    assert "5ec" not in caplog.text
    assert all("5ec" not in redact_uri(address) for address in addresses)


def test_no_secret_of_the_environment_is_told(
    store: Store,
    proxy: S3Proxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(storage, "_filesystems", {})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "5ecret-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "5ecret-token")
    for fault in ("403", "503", "400", "refuse", "200"):
        proxy.faults = [Fault(fault, times=None, body=CAPTIVE if fault == "200" else None)]
        for method, run, _ in CALLS.values():
            if fault == "200" and method != "GET":
                continue
            with pytest.raises(StorageError) as caught:
                run(store)
            assert "5ec" not in "".join(traceback.format_exception(caught.value))
    assert "5ec" not in caplog.text + repr(store)
    assert proxy.requests[-1].headers["x-amz-security-token"] == "5ecret-token"

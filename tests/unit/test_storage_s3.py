"""The store, the tables and the lease on S3, over HTTP.

`moto` answers as S3 does; FOURDH_TEST_S3 may name another endpoint, e.g. a Ceph gateway, with the
access key `test` and the secret `testtest`. Faults come from a server of a few lines, which can
refuse, cut and forget replies at will.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from fourdh_batch import storage
from fourdh_batch.errors import OutputInUseError, StorageError
from fourdh_batch.storage import Store, fingerprint_file, list_files, list_objects, open_read
from fourdh_batch.tables.manifest import Lease
from fourdh_batch.tables.reader import read_tracks
from tests.table_rows import finished_spool, publish

pytest.importorskip("s3fs")
ENDPOINT = os.environ.get("FOURDH_TEST_S3")
needs_s3 = pytest.mark.skipif(
    ENDPOINT is None and not all(map(importlib.util.find_spec, ("moto", "flask", "flask_cors"))),
    reason="moto[s3], flask and flask-cors are not installed and FOURDH_TEST_S3 is not set",
)
BUCKET = f"bucket-{os.getpid()}"


FILESYSTEMS: dict[str, dict[object, object]] = {}


def use_endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testtest")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # File systems remember their endpoint; one set of them per endpoint saves seconds.
    monkeypatch.setattr(storage, "_filesystems", FILESYSTEMS.setdefault(url, {}))


# --- a real protocol ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if ENDPOINT is not None:
        yield ENDPOINT
        return
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 60
        while "Running on http://" not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield "http://" + log.read_text().split("Running on http://")[1].split()[0]
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Store:
    use_endpoint(s3_url, monkeypatch)
    store = Store(f"s3://{BUCKET}/{request.node.name}")
    filesystem, _ = store.filesystem()
    if not filesystem.exists(BUCKET):
        filesystem.mkdir(BUCKET)
    return store


@needs_s3
def test_s3_keeps_what_is_written(s3: Store, tmp_path: Path) -> None:
    for key in ("a/%2F x+ü=.json", "a/b", "a2"):
        s3.write_bytes(key, key.encode())
        assert s3.read_bytes(key) == key.encode()
    assert [key for key, _ in s3.list("a")] == ["a/%2F x+ü=.json", "a/b"]
    assert s3.exists("a/b")
    assert not s3.exists("a")
    with s3.open_read("a/b") as stream:
        stream.seek(2)
        assert stream.read() == b"b"
    s3.delete("a/b")
    s3.delete("a/b")
    s3.delete_tree("a")
    s3.delete_tree("a")
    assert [key for key, _ in s3.list()] == ["a2"]
    with pytest.raises(FileNotFoundError):
        s3.read_bytes("a/b")
    with pytest.raises(FileNotFoundError):
        s3.open_read("a/b")


@needs_s3
def test_s3_exclusive_creation_has_one_winner(s3: Store) -> None:
    for turn in range(5):
        won: list[int] = []
        barrier = threading.Barrier(8)

        def create(
            i: int,
            key: str = f"lease{turn}",
            won: list[int] = won,
            barrier: threading.Barrier = barrier,
        ) -> None:
            barrier.wait()
            if s3.create_exclusive(key, b"%d" % i):
                won.append(i)

        threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert s3.read_bytes(f"lease{turn}") == b"%d" % won[0]


@needs_s3
def test_s3_large_files_go_up_in_several_parts(
    s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PUT_LIMIT_BYTES", 10 * 2**20)
    data = os.urandom(12 * 2**20)
    (tmp_path / "big").write_bytes(data)
    s3.put_file(tmp_path / "big", "big")
    assert s3.read_bytes("big") == data


@needs_s3
def test_s3_inputs_are_listed_and_fingerprinted_without_reading(s3: Store) -> None:
    s3.write_bytes("v/a.mp4", b"one")
    s3.write_bytes("v/x/b.mp4", b"one")
    s3.write_bytes("v/c.mp4", b"two")
    listed = list_files(s3.uri("v"), (".mp4",))
    assert [(name, size) for name, _, size in listed] == [
        ("a.mp4", 3),
        ("c.mp4", 3),
        ("x/b.mp4", 3),
    ]
    a, c, b = (fingerprint_file(uri) for _, uri, _ in listed)
    assert a == b
    assert a != c
    told = [(item.num_bytes, item.fingerprint) for item in list_objects(s3.uri("v"), (".mp4",))]
    assert told == [a, c, b]
    with open_read(listed[0][1]) as stream:
        assert stream.read() == b"one"


@needs_s3
def test_s3_tables_are_published_overwritten_and_read(s3: Store, s3_url: str) -> None:
    for num_frames in (10, 20):
        publish(s3, [finished_spool(s3, v, num_frames) for v in ("a", "../b")])
        options = {
            "endpoint_url": s3_url,
            "key": "test",
            "secret": "testtest",
            "skip_instance_cache": True,
        }
        frame = pd.read_parquet(f"{s3.root}/tracks", storage_options=options)
        assert len(frame) == 4 * num_frames
        assert frame.equals(read_tracks(s3.root))
        assert len(read_tracks(s3.root, video_id="a")) == 2 * num_frames
    assert s3.list("_work") == []


@needs_s3
def test_s3_lease_keeps_a_second_driver_out(s3: Store) -> None:
    with Lease(s3), pytest.raises(OutputInUseError, match="in use by"):
        Lease(s3).acquire()
    with Lease(s3):
        pass


@needs_s3
def test_s3_connections_are_closed_at_exit(s3: Store) -> None:
    code = f"""
from fourdh_batch.storage import Store, open_read
store = Store({s3.root!r})
store.write_bytes("a", b"1")
with open_read(store.uri("a")) as stream:
    assert stream.read() == b"1"
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout + done.stderr == ""


# --- faults ------------------------------------------------------------------------------------


class FaultyServer(ThreadingHTTPServer):
    """PUT and GET of whole objects; `plan` holds what happens to the next requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.objects: dict[str, bytes] = {}
        self.plan: list[str] = []
        self.num_requests = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that the client gave up are part of the game."""


class FaultyHandler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def answer(self, status: int, body: bytes = b"", *, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0"')
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def error(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

    def fault(self) -> str:
        self.server.num_requests += 1
        return self.server.plan.pop(0) if self.server.plan else ""

    def do_PUT(self) -> None:
        fault = self.fault()
        size = int(self.headers["Content-Length"])
        if fault == "cut":
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        data = self.rfile.read(size)
        if fault.isdigit():
            self.error(int(fault), {"503": "SlowDown", "403": "AccessDenied"}.get(fault, "X"))
        elif self.headers.get("If-None-Match") and self.path in self.server.objects:
            self.error(412, "PreconditionFailed")
        else:
            self.server.objects[self.path] = data
            if fault == "forget":
                self.close_connection = True
            else:
                self.answer(200)

    def do_GET(self) -> None:
        fault = self.fault()
        if fault.isdigit():
            self.error(int(fault), "InternalError")
        elif self.path not in self.server.objects:
            self.error(404, "NoSuchKey")
        else:
            self.answer(200, self.server.objects[self.path], cut=fault == "cut")


@pytest.fixture(scope="module")
def faulty_server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def faulty(
    faulty_server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> tuple[FaultyServer, Store]:
    faulty_server.objects.clear()
    faulty_server.plan.clear()
    faulty_server.num_requests = 0
    # The handler does not know the trailing checksums that the client adds by default.
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    use_endpoint(f"http://127.0.0.1:{faulty_server.server_port}", monkeypatch)
    return faulty_server, Store("s3://bucket/out", attempts=4, backoff_s=0.001)


@pytest.mark.parametrize("fault", ["503", "500", "429", "cut", "forget"])
def test_a_write_survives_passing_faults(faulty: tuple[FaultyServer, Store], fault: str) -> None:
    server, store = faulty
    server.plan = [fault] * 3
    store.write_bytes("a", b"0123456789" * 1000)
    assert server.num_requests == 4
    assert server.objects == {"/bucket/out/a": b"0123456789" * 1000}


@pytest.mark.parametrize("fault", ["503", "500", "cut"])
def test_a_read_survives_passing_faults(faulty: tuple[FaultyServer, Store], fault: str) -> None:
    server, store = faulty
    server.objects["/bucket/out/a"] = b"0123456789" * 1000
    server.plan = [fault] * 3
    assert store.read_bytes("a") == b"0123456789" * 1000
    assert server.num_requests == 4


def test_a_fault_that_stays_names_key_and_attempts_but_no_secret(
    faulty: tuple[FaultyServer, Store],
) -> None:
    server, store = faulty
    server.plan = ["503"] * 99
    with pytest.raises(StorageError, match="write s3://bucket/out/a: failed 4 times") as caught:
        store.write_bytes("a", b"1")
    assert "testtest" not in str(caught.value) + repr(store)
    assert server.num_requests == 4


def test_an_upload_that_is_cut_shows_nothing(faulty: tuple[FaultyServer, Store]) -> None:
    server, store = faulty
    server.plan = ["cut"] * 99
    with pytest.raises(StorageError, match="failed 4 times"):
        store.write_bytes("a", bytes(100_000))
    assert server.objects == {}


def test_refusals_are_not_retried(faulty: tuple[FaultyServer, Store]) -> None:
    server, store = faulty
    server.plan = ["403"]
    with pytest.raises(StorageError, match="write s3://bucket/out/a: PermissionError"):
        store.write_bytes("a", b"1")
    with pytest.raises(FileNotFoundError):
        store.read_bytes("missing")
    assert server.num_requests == 2


def test_a_lost_reply_does_not_lose_the_race(faulty: tuple[FaultyServer, Store]) -> None:
    server, store = faulty
    server.plan = ["forget"]
    assert store.create_exclusive("lease", b"mine")
    assert not store.create_exclusive("lease", b"other")
    server.plan = ["503"]
    assert not store.create_exclusive("lease", b"third")
    assert server.objects == {"/bucket/out/lease": b"mine"}


def test_a_store_that_cannot_be_reached_is_a_storage_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_endpoint("http://127.0.0.1:9", monkeypatch)
    calls: list[Callable[[Store], object]] = [
        lambda store: store.write_bytes("a", b""),
        lambda store: store.list(),
        lambda store: store.exists("a"),
        lambda store: store.create_exclusive("a", b""),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="failed 2 times"):
            call(Store("s3://bucket/out", attempts=2, backoff_s=0.001))

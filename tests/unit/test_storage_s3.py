"""The store, the tables and the lease on S3, over HTTP.

`moto` answers as S3 does; `make test-s3` runs the same against Ceph's gateway. What happens when
the store fails is in tests/fault/test_storage_faults.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from fourdh_batch import storage
from fourdh_batch.errors import OutputInUseError
from fourdh_batch.storage import (
    Store,
    fingerprint_file,
    list_files,
    list_objects,
    open_read,
    redact_uri,
)
from fourdh_batch.tables.manifest import Lease
from fourdh_batch.tables.reader import read_tracks
from tests.s3_proxy import ACCESS_KEY, ENVIRONMENT, SECRET_KEY, S3Proxy, has_endpoint, s3_endpoint
from tests.table_rows import finished_spool, publish

pytest.importorskip("s3fs")
needs_s3 = pytest.mark.skipif(
    not has_endpoint(),
    reason="moto[s3], flask and flask-cors are not installed and FOURDH_TEST_S3 is not set",
)
BUCKET = f"bucket-{os.getpid()}"


FILESYSTEMS: dict[str, dict[object, object]] = {}


def use_endpoint(url: str, monkeypatch: pytest.MonkeyPatch, settings: str = "") -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    # File systems remember their endpoint; one set of them per endpoint saves seconds.
    monkeypatch.setattr(storage, "_filesystems", FILESYSTEMS.setdefault(url + settings, {}))


# --- a real protocol ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_url() -> str:
    return s3_endpoint()


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Store:
    use_endpoint(s3_url, monkeypatch)
    store = Store(f"s3://{BUCKET}/{re.sub('[^a-z0-9_]+', '-', request.node.name)}")
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
    s3.put_file(tmp_path / "big", "put")
    s3.write_bytes("written", data)
    assert s3.read_bytes("put") == data
    assert s3.read_bytes("written") == data


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
            "key": ACCESS_KEY,
            "secret": SECRET_KEY,
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


NAMES = (
    "#1.mp4",
    "+ plus & and = is.mp4",
    "50%25 %2F.mp4",
    "[a]*?.mp4",
    "a b/ü 字 \u202e.mp4",
    "quote'\"<>.mp4",
    "~.mp4",
)


@needs_s3
@pytest.mark.parametrize("pattern", ["", "/*.mp4"])
def test_s3_any_name_is_listed_fingerprinted_read_and_deleted(s3: Store, pattern: str) -> None:
    for name in NAMES:
        s3.write_bytes(f"v/{name}", name.encode())
    s3.write_bytes("v/a.mp4", b"what a careless glob of [a]*?.mp4 would take")
    listed = list(list_objects(s3.uri("v") + pattern, (".mp4",)))
    expected = sorted(n for n in (*NAMES, "a.mp4") if not pattern or "/" not in n)
    assert [item.relative for item in listed] == expected
    for item in listed:
        assert fingerprint_file(item.uri) == (item.num_bytes, item.fingerprint)
        if item.relative != "a.mp4":
            with open_read(item.uri) as stream:
                assert stream.read() == item.relative.encode()
            assert [f.uri for f in list_objects(item.uri, ())] == [item.uri]
    s3.delete("v/[a]*?.mp4")
    assert s3.exists("v/a.mp4")
    s3.write_bytes("v/[a]*?.mp4/x", b"")
    s3.delete_tree("v/[a]*?.mp4")
    assert s3.exists("v/a.mp4")
    s3.delete_tree("v")
    assert s3.list("v") == []


def check_many_keys(s3: Store, num_keys: int) -> None:
    filesystem, root = s3.filesystem()
    filesystem.pipe({f"{root}/many/{i:04}.mp4": b"%d" % i for i in range(num_keys)})
    s3.write_bytes("many.txt", b"a neighbour")
    assert [key for key, _ in s3.list("many")] == [f"many/{i:04}.mp4" for i in range(num_keys)]
    first = next(list_objects(s3.uri("many"), (".mp4",)))
    assert first[:3] == ("0000.mp4", s3.uri("many/0000.mp4"), 1)
    assert len(list_files(s3.uri("many"), (".mp4",))) == num_keys
    s3.delete_tree("many")
    assert s3.list() == [("many.txt", 11)]


@needs_s3
def test_s3_many_keys_are_listed_by_pages_and_deleted_in_batches(
    s3: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "KEYS_AT_ONCE", 20)
    check_many_keys(s3, 45)


@needs_s3
@pytest.mark.slow
def test_s3_more_keys_than_a_page_of_the_store(s3: Store) -> None:
    check_many_keys(s3, 1050)


@needs_s3
def test_s3_what_is_not_there_is_not_found(s3: Store) -> None:
    for uri in (s3.uri("none"), s3.uri("none/*.mp4"), "s3://no-such-bucket-anywhere/v"):
        with pytest.raises(FileNotFoundError):
            list(list_objects(uri, (".mp4",)))
        with pytest.raises(FileNotFoundError):
            open_read(uri)
    s3.write_bytes("empty", b"")
    with open_read(s3.uri("empty")) as stream:
        assert stream.read() == b""
        assert stream.seek(0, os.SEEK_END) == 0


@needs_s3
def test_s3_a_signed_address_is_read_over_http(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "READ_BLOCK_BYTES", 4096)
    data = os.urandom(10_000)
    s3.write_bytes("a.mp4", data)
    filesystem, root = s3.filesystem()
    signed = filesystem.sign(f"{root}/a.mp4")
    assert signed.startswith("http")
    with open_read(signed) as stream:
        assert stream.read() == data
    (item,) = list_objects(signed, ())
    assert (item.relative, item.num_bytes) == ("a.mp4", 10_000)
    assert "?***" in redact_uri(item.uri)


# --- settings ----------------------------------------------------------------------------------

WRITE = """
import sys
from fourdh_batch.storage import Store
Store(sys.argv[1]).write_bytes("a", b"1")
"""
PROFILE = f"""
[profile other]
aws_access_key_id = {ACCESS_KEY}
aws_secret_access_key = {SECRET_KEY}
region = eu-west-3
endpoint_url = URL
s3 =
    addressing_style = path
"""
FSSPEC = (
    '{"s3": {"endpoint_url": "URL", "client_kwargs": {"region_name": "eu-west-3"}, '
    '"config_kwargs": {"s3": {"addressing_style": "path"}}}}'
)


@needs_s3
@pytest.mark.parametrize("way", ["aws environment", "aws profile", "fsspec file", "fsspec env"])
def test_s3_settings_are_those_of_aws_and_fsspec(s3: Store, tmp_path: Path, way: str) -> None:
    (tmp_path / "fsspec").mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "FSSPEC_"))}
    kept |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": f"{tmp_path}/config"}
    kept |= {"AWS_SHARED_CREDENTIALS_FILE": "/none", "FSSPEC_CONFIG_DIR": f"{tmp_path}/fsspec"}
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with S3Proxy(s3_endpoint()) as proxy:
        # Where the host has a name the client would put the bucket before it, unless told.
        url = proxy.url.replace("127.0.0.1", "localhost")
        if way == "aws environment":
            kept |= {**keys, "AWS_REGION": "eu-west-3", "AWS_ENDPOINT_URL": proxy.url}
            kept["AWS_DEFAULT_REGION"] = "eu-west-3"
        elif way == "aws profile":
            (tmp_path / "config").write_text(PROFILE.replace("URL", url))
            kept["AWS_PROFILE"] = "other"
        elif way == "fsspec file":
            (tmp_path / "fsspec" / "s3.json").write_text(FSSPEC.replace("URL", url))
            kept |= keys
        else:
            kept["FSSPEC_S3_KEY"], kept["FSSPEC_S3_SECRET"] = ACCESS_KEY, SECRET_KEY
            kept["FSSPEC_S3"] = FSSPEC.replace("URL", url)[len('{"s3": ') : -1]
        done = subprocess.run(
            [sys.executable, "-c", WRITE, s3.root],
            env=kept,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        (seen,) = [request for request in proxy.requests if request.method == "PUT"]
        assert seen.path == f"/{s3.root[5:]}/a"
        assert f"Credential={ACCESS_KEY}/" in seen.headers["authorization"]
        assert "/eu-west-3/s3/" in seen.headers["authorization"]
    assert s3.read_bytes("a") == b"1"

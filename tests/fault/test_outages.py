"""Whole jobs on a store that fails now and then, for a while, or because it is full."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import fourdh_batch as fb
from fourdh_batch.storage import Store
from tests.fault_tools import (
    JOB,
    REPO,
    Bench,
    Faults,
    Tables,
    assert_same_tables,
    tables_of,
    undisturbed_tables,
)
from tests.media import BoxCorpus
from tests.s3_proxy import Fault, S3Proxy, has_endpoint, s3_endpoint
from tests.unit.test_storage_s3 import use_endpoint

pytestmark = pytest.mark.timeout(900)  # processes start slowly on a busy machine
COMMON = ["plan.videos_per_shard=2", "cluster.checkpoint_frames=48"]
NUM_VIDEOS = 6


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> BoxCorpus:
    corpus = BoxCorpus(tmp_path_factory.mktemp("clips"))
    for seed in range(NUM_VIDEOS - 1):
        corpus.add(f"{seed}.mp4", num_frames=32, seed=seed, miss=0.1)
    corpus.add("long.mp4", num_frames=120, seed=99, miss=0.2)
    return corpus


@pytest.fixture(scope="module")
def undisturbed(clips: BoxCorpus, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    root = tmp_path_factory.mktemp("undisturbed")
    return undisturbed_tables([*clips.settings(root), *COMMON])


@pytest.fixture(scope="module")
def proxy() -> Iterator[S3Proxy]:
    if not has_endpoint():
        pytest.skip("s3fs and moto[s3] are not installed and FOURDH_TEST_S3 is not set")
    with S3Proxy(s3_endpoint()) as proxy:
        yield proxy


@pytest.fixture
def bucket(proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address; this process and the bench reach it through the proxy."""
    s3fs = pytest.importorskip("s3fs")
    use_endpoint(proxy.url, monkeypatch)
    proxy.reset()
    name = f"outages-{os.getpid()}"
    with suppress(FileExistsError):  # of the test before
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    yield f"s3://{name}"
    proxy.reset()


@pytest.mark.slow
def test_throttles_resets_and_lost_replies_are_ridden_out_and_an_outage_costs_its_shard(
    clips: BoxCorpus, undisturbed: Tables, proxy: S3Proxy, bucket: str, tmp_path: Path
) -> None:
    words = [*clips.settings(tmp_path), f"output={bucket}/out", *COMMON]
    with Bench(tmp_path / "bench") as bench:
        # One shard cannot be put at all; everything else fails now and then.
        proxy.faults = [
            Fault("503", method="PUT", path=r"/tracks/blocks/part-0001-00001", times=None),
            Fault("503", share=0.05, times=None),
            Fault("reset", method="GET", share=0.03, times=None),
            Fault("cut", method="PUT", share=0.03, times=None),
            Fault("forget", method="PUT", share=0.03, times=None),
        ]
        run = bench.run(words)
        spoilt = [request for request in proxy.requests if request.fault]
        assert len(spoilt) > 15
        assert run.exit_code == 1, run.story
        [(shard, reason)] = run.failed_shards.items()
        assert shard.startswith("0001-00001")
        assert "failed 6 times" in reason
        assert run.statuses == {"ok": NUM_VIDEOS - 2}
        proxy.reset()
        store = Store(f"{bucket}/out")
        keys = [key for key, _ in store.list("")]
        assert not [key for key in keys if key.startswith("_commits/") and shard in key]
        assert not [key for key in keys if key.startswith("tracks/") and shard in key]
        found = tables_of(f"{bucket}/out")
        assert len(found["videos"]) == NUM_VIDEOS - 2

        # What is published stays published, also where nothing can be cleared away.
        proxy.faults = [Fault("503", method="POST", path=r"\?delete", times=None)]
        run = bench.run(words)
        assert (run.exit_code, run.statuses, run.frames_run) == (0, {"ok": 2}, 0), run.story
        proxy.reset()
        assert list(store.list("_work"))
        run = bench.run(words)
        assert (run.exit_code, run.statuses) == (0, {}), run.story
    assert_same_tables(tables_of(f"{bucket}/out"), undisturbed)
    assert not list(store.list("_work"))


@pytest.mark.slow
def test_a_store_that_takes_no_work_costs_its_shards_and_nothing_is_half_published(
    clips: BoxCorpus, undisturbed: Tables, proxy: S3Proxy, bucket: str, tmp_path: Path
) -> None:
    words = [*clips.settings(tmp_path), f"output={bucket}/work", *COMMON]
    with Bench(tmp_path / "bench") as bench:
        proxy.faults = [Fault("503", path=r"/_work/0001-0000[01]", times=None)]
        run = bench.run(words, timeout_s=800)
        assert run.exit_code == 1, run.story
        assert len(run.failed_shards) == 2
        assert run.statuses == {"ok": 2}
        proxy.reset()
        run = bench.run(words)
        assert (run.exit_code, run.statuses) == (0, {"ok": 4}), run.story
    assert_same_tables(tables_of(f"{bucket}/work"), undisturbed)


FULL_DISK = """
mount -t tmpfs -o size=$SIZE_KB none "$OUT" || exit 77
"$PYTHON" "$JOB" "$@" > "$COPY.first" 2> "$COPY.first.log"
echo "first $?"
cp -a "$OUT" "$COPY.full"
mount -o remount,size=64m "$OUT"
"$PYTHON" "$JOB" "$@" > "$COPY.second" 2> "$COPY.second.log"
echo "second $?"
cp -a "$OUT" "$COPY"
"""


@pytest.mark.slow
def test_a_full_disk_fails_its_shards_clearly_and_publishes_nothing_half(
    clips: BoxCorpus, undisturbed: Tables, tmp_path: Path
) -> None:
    unshare = shutil.which("unshare")
    out, copy = tmp_path / "out", tmp_path / "copy"
    out.mkdir()
    faults = Faults(tmp_path / "faults")
    env = {
        **faults.environment(),
        **{"SIZE_KB": "700k", "PYTHON": sys.executable, "JOB": str(JOB)},
        **{"OUT": str(out), "COPY": str(copy)},
    }
    words = [*clips.settings(out), *COMMON, "--json"]
    alone = [unshare or "unshare", "--user", "--map-root-user", "--mount"]
    if unshare is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("a small disk needs user namespaces")
    done = subprocess.run(
        [*alone, "sh", "-c", FULL_DISK, "sh", *words],
        cwd=REPO,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=800,
    )
    if done.returncode == 77:
        pytest.skip("a small disk needs mounts in a user namespace")
    log = Path(f"{copy}.first.log").read_text()
    assert done.stdout.split() == ["first", "1", "second", "0"], log
    assert "No space left on device" in log
    full = Path(f"{copy}.full")
    committed = {path.stem for path in (full / "_commits").glob("*.json")}
    assert len(committed) < 3
    for path in full.rglob("part-*.parquet"):
        # What is there is whole; only what is committed is in the tables.
        assert path.read_bytes()[-4:] == b"PAR1"
    assert not list(full.rglob("*.tmp"))
    if committed:
        assert len(fb.read_table(str(full), "videos")) == 2 * len(committed)
    assert json.loads(Path(f"{copy}.second").read_text())["videos"]["ok"] == NUM_VIDEOS
    assert_same_tables(tables_of(copy), undisturbed)

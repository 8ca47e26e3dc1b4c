"""Videos from a bucket, tables into a bucket: the job's script against an S3 endpoint over HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import fourdh_batch as fb
from fourdh_batch.cluster.run import run_job
from fourdh_batch.config import load_config
from fourdh_batch.storage import Store
from tests.media import BoxCorpus
from tests.unit.test_storage_s3 import needs_s3, s3_url, use_endpoint

__all__ = ["s3_url"]  # a fixture
REPO = Path(__file__).resolve().parents[2]


@needs_s3
def test_a_corpus_in_a_bucket_gives_the_rows_of_the_same_files_on_disk(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    s3fs = pytest.importorskip("s3fs")
    use_endpoint(s3_url, monkeypatch)
    corpus = BoxCorpus(tmp_path / "in")
    corpus.add("a b/ü.mp4", num_frames=24, seed=1)
    corpus.add("two.mkv", num_frames=24, seed=2)
    bucket = f"job-{os.getpid()}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    remote = Store(f"s3://{bucket}/in")
    for path in corpus.folder.rglob("*.m*"):
        remote.put_file(path, path.relative_to(corpus.folder).as_posix())
    words = corpus.settings(tmp_path / "out")
    assert run_job(load_config(None, words)).exit_code == 0
    script = [sys.executable, str(REPO / "jobs" / "ava_pseudogt.py"), *words]
    place = [f"input=s3://{bucket}/in", f"output=s3://{bucket}/tables"]
    done = subprocess.run([*script, *place], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "testtest" not in done.stdout + done.stderr
    here = fb.read_tracks(str(tmp_path / "out"))
    there = fb.read_tracks(f"s3://{bucket}/tables")
    assert len(here) > 40
    pd.testing.assert_frame_equal(here, there, check_exact=True)

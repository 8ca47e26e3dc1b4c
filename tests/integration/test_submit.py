"""`ray job submit` against a real local head node, as a user would type it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fourdh_batch as fb
from tests.media import BoxCorpus

REPO = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[dict[str, str], str]]:
    """Environment and dashboard address of a head node that this test starts and stops."""
    env = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "HOME": str(tmp_path),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    env.pop("RAY_ADDRESS", None)
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0123456789abcdef" * 4)
    gcs, dashboard, agent = free_port(), free_port(), free_port()
    temp = Path("/tmp") / f"fourdh-ray-{os.getpid()}"  # sockets below it need a short path
    process = subprocess.Popen(
        [
            *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=6"),
            *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={temp}"),
            *(f"--dashboard-agent-listen-port={agent}", "--object-store-memory=268435456"),
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield env, f"http://127.0.0.1:{dashboard}"
    finally:
        process.terminate()
        process.wait(timeout=60)
        shutil.rmtree(temp, ignore_errors=True)


@pytest.mark.slow
def test_a_submitted_job_fills_the_tables(head: tuple[dict[str, str], str], tmp_path: Path) -> None:
    env, address = head
    corpus = BoxCorpus(tmp_path / "in")
    corpus.add("a.mp4", num_frames=24, seed=1)
    words = [word for word in corpus.settings(tmp_path / "out") if "address" not in word]
    job = ["python", "jobs/ava_pseudogt.py", *words]
    submit = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--", *job]
    for _ in range(30):  # a head node that has just started says to try again
        done = subprocess.run(
            submit, cwd=REPO, env=env, capture_output=True, text=True, check=False, timeout=280
        )
        if done.returncode == 0 or "driver" in done.stdout.lower():
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "1 done, 0 before" in done.stdout
    assert len(fb.read_tracks(str(tmp_path / "out"))) > 20

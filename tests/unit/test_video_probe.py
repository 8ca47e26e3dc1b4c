"""Headers of many files, some of which kill whoever opens them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fourdh_batch.types import DecodeSummary
from fourdh_batch.video import probe
from fourdh_batch.video.probe import Header, headers_of, read_headers, read_headers_in_parallel
from tests.video_makers import FPS, HEIGHT, WIDTH, make_video


def hostile_headers(
    allocate: Any, on_packet: Any, *, uris: list[str], max_pixels: int
) -> Iterator[DecodeSummary]:
    """Runs in the child: files may kill, hang or eat memory, by their name."""
    for uri in uris:
        if "segfault" in uri:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in uri:
            time.sleep(60)
        if "memory" in uri:
            bytearray(8 << 30)
        yield from headers_of(allocate, on_packet, uris=[uri], max_pixels=max_pixels)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("probe") / "clip.mp4", 12)


GOOD = Header(12, float(FPS), WIDTH, HEIGHT)


def test_headers_come_in_order_and_what_does_not_open_says_why(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("#EXTM3U\n/etc/passwd\n" * 20)
    files = [clip, tmp_path / "empty.mp4", tmp_path / "gone.mp4", tmp_path / "text.mp4", clip]
    assert list(read_headers(list(map(str, files)))) == [
        GOOD,
        Header(problem="EMPTY"),
        Header(problem="NOT_A_VIDEO"),
        Header(problem="NOT_A_VIDEO"),
        GOOD,
    ]


def test_a_file_that_kills_hangs_or_eats_memory_costs_itself_alone(clip: Path) -> None:
    files = [clip, "segfault", clip, "hang", "memory", clip, "segfault"]
    maker = f"{__name__}:hostile_headers"
    # Long enough for a child to start on a busy machine.
    found = list(read_headers(list(map(str, files)), stall_timeout_s=8.0, maker=maker))
    assert [header.problem for header in found] == [
        *("", "WORKER_DIED", "", "STALLED", "WORKER_DIED", "", "WORKER_DIED")
    ]
    assert found[0] == found[2] == found[5] == GOOD


def test_many_addresses_are_shared_out_to_several_children(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "FILES_PER_CHILD", 3)
    asked = ((str(number), str(clip)) for number in range(10))
    found = list(read_headers_in_parallel(asked, num_children=2))
    assert found == [(str(number), GOOD) for number in range(10)]


def test_long_addresses_fit_one_argument_of_a_process(clip: Path) -> None:
    long = str(clip.parent / ("x" * 200))
    uris = [*([long] * 100), str(clip)]
    assert probe._task_length(uris, 0) < 100
    assert len(json.dumps(uris[: probe._task_length(uris, 0)])) < probe.MAX_TASK_CHARACTERS
    assert list(read_headers(uris))[-1] == GOOD

"""Decoding in a child process: the same frames, and no harm when the child misbehaves."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fourdh_batch.errors import (
    DecoderRefusedError,
    DecodeStalledError,
    EmptyFileError,
    NotAVideoError,
    TooLargeError,
    UndecodableError,
    WorkerDiedError,
)
from fourdh_batch.types import DecodeSummary, FrameChunk
from fourdh_batch.video.decode import VideoReader, read_frames
from fourdh_batch.video.isolate import decode_isolated, read_frames_isolated, run_isolated
from tests.video_makers import make_video, number_of, overwrite, packets_of, picture

CHILDREN = "tests.video_children"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("isolated")
    return make_video(folder / "clip.mp4", 40, muxer={"movflags": "faststart"})


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process and no mapping stays behind, whatever a test does to a child."""
    before = set(psutil.Process().children(recursive=True))
    yield
    gc.collect()
    assert set(psutil.Process().children(recursive=True)) <= before
    assert "memfd:chunk" not in Path("/proc/self/maps").read_text()


def run(maker: str, stall_timeout_s: float = 30, **arguments: Any) -> Iterator[Any]:
    return run_isolated(
        f"{CHILDREN}:{maker}", arguments, video="v", stall_timeout_s=stall_timeout_s
    )


def equal(a: FrameChunk, b: FrameChunk) -> bool:
    return (
        a.video_id == b.video_id
        and np.array_equal(a.frame_index, b.frame_index)
        and np.array_equal(a.pts, b.pts)
        and np.array_equal(a.pts_s, b.pts_s)
        and np.array_equal(a.rgb, b.rgb)
        and (a.shot_scores is None) == (b.shot_scores is None)
        and (
            a.shot_scores is None
            or b.shot_scores is None
            or np.array_equal(a.shot_scores, b.shot_scores, equal_nan=True)
        )
    )


class TestGoodVideo:
    @pytest.mark.parametrize("options", [{}, {"score_shots": True, "start": 13}])
    def test_gives_what_the_reader_gives(self, clip: Path, options: dict[str, Any]) -> None:
        with VideoReader(str(clip), video_id="a") as reader:
            expected = list(reader.chunks(7, **options))
            summary = reader.summary
        *chunks, last = decode_isolated(str(clip), video_id="a", chunk_frames=7, **options)
        assert len(chunks) == len(expected)
        assert all(equal(a, b) for a, b in zip(chunks, expected, strict=True))
        assert last == summary
        assert {c.rgb.dtype for c in chunks} == {np.dtype(np.uint8)}
        del chunks, last

    def test_chunks_that_are_kept_are_not_overwritten(self) -> None:
        chunks = list(run("count", num_chunks=12))
        for number, chunk in enumerate(chunks):
            assert chunk.rgb.shape == (2, 4 + number % 3, 6, 3)
            assert np.all(chunk.rgb == number)
            assert chunk.frame_index.tolist() == [2 * number, 2 * number + 1]
            assert chunk.pts.tolist() == [20 * number, 20 * number + 10]

    def test_parts_of_a_chunk_keep_its_memory(self) -> None:
        kept = []
        for chunk in run("count", num_chunks=12):
            kept.append(chunk.rgb[1:, 2])
            del chunk
        assert [int(part.max()) for part in kept] == list(range(12))
        assert [int(part.min()) for part in kept] == list(range(12))

    def test_memory_is_used_again(self) -> None:
        addresses = set()
        for chunk in run("count", num_chunks=30):
            addresses.add(chunk.rgb.ctypes.data)
        assert len(addresses) <= 8

    def test_chunks_made_elsewhere_are_copied(self) -> None:
        assert [int(c.rgb.max()) for c in run("copied", num_chunks=5)] == list(range(5))

    def test_decodes_ahead_only_so_far(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        for prefetch, most in ((0, 1), (1, 2), (3, 4)):
            log.unlink(missing_ok=True)
            chunks = run_isolated(
                f"{CHILDREN}:count",
                {"num_chunks": 20, "log": str(log)},
                video="v",
                prefetch_chunks=prefetch,
            )
            for taken in range(2):
                next(chunks)
                deadline = time.monotonic() + 20
                while len(log.read_text().split()) < most + taken and time.monotonic() < deadline:
                    time.sleep(0.02)
                time.sleep(0.1)  # time to make one too many
                assert len(log.read_text().split()) == most + taken
            chunks.close()  # type: ignore[attr-defined]

    def test_imports_little(self) -> None:
        code = (
            "import sys, fourdh_batch.video.isolate; "
            "print({'torch', 'cv2', 'ray', 'scipy', 'pandas', 'pyarrow'} & sys.modules.keys())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "set()", done.stderr


class TestTypedErrors:
    def test_cross_unchanged(self, clip: Path, tmp_path: Path) -> None:
        (tmp_path / "empty.mp4").touch()
        (tmp_path / "text.mp4").write_text("no video " * 50)
        os.mkfifo(tmp_path / "pipe.mp4")
        for name, error in (
            ("empty.mp4", EmptyFileError),
            ("text.mp4", NotAVideoError),
            ("pipe.mp4", NotAVideoError),
            ("none.mp4", NotAVideoError),
        ):
            with pytest.raises(error) as here:
                VideoReader(str(tmp_path / name), video_id="x")
            with pytest.raises(error) as there:
                next(decode_isolated(str(tmp_path / name), video_id="x"))
            assert str(there.value) == str(here.value)
            assert there.value.video == "x"
        with pytest.raises(TooLargeError, match="at most 10 pixels"):
            next(decode_isolated(str(clip), max_pixels=10))
        with pytest.raises(DecoderRefusedError, match="cannot stream"):
            next(decode_isolated(str(clip), decoder="decord"))

    def test_of_decoding_cross_too(self, clip: Path, tmp_path: Path) -> None:
        data = bytearray(clip.read_bytes())
        for position, size, _ in packets_of(clip):
            data[position : position + size] = bytes(size)
        (tmp_path / "a.mp4").write_bytes(data)
        with pytest.raises(UndecodableError) as raised:
            next(decode_isolated(str(tmp_path / "a.mp4"), video_id="x"))
        error = raised.value
        assert (error.video, error.stage, error.frame_index) == ("x", "decode", 0)

    def test_damage_crosses_in_the_summary(self, clip: Path, tmp_path: Path) -> None:
        path = overwrite(clip, tmp_path / "a.mp4", 11)
        *chunks, summary = decode_isolated(str(path))
        assert isinstance(summary, DecodeSummary)
        (damage,) = summary.damage
        assert (damage.code, damage.first_frame_index, damage.last_frame_index) == (
            "CORRUPT",
            10,
            19,
        )
        assert sum(c.num_frames for c in chunks) == summary.num_frames_decoded == 30
        del chunks

    def test_long_list_of_damage_crosses(self, tmp_path: Path) -> None:
        path = make_video(tmp_path / "all_keys.mp4", 1500, "mpeg4", g="1", b="400k")
        data = bytearray(path.read_bytes())
        for position, size, _ in packets_of(path)[1::2]:
            data[position : position + size] = bytes(size)
        path.write_bytes(data)
        *_, summary = decode_isolated(str(path))
        assert len(summary.damage) == 750
        assert summary.num_frames_decoded == 750

    def test_mistakes_of_the_caller_are_told_at_once(self, clip: Path) -> None:
        with pytest.raises(ValueError, match="chunk_frames"):
            decode_isolated(str(clip), chunk_frames=0)
        with pytest.raises(ValueError, match="expected one of"):
            decode_isolated(str(clip), decoder="opencv")


class TestBadChild:
    def test_that_hangs_is_stalled(self) -> None:
        chunks = run("then", stall_timeout_s=3, act="hang")
        assert next(chunks).frame_index.tolist() == [0, 1]
        began = time.monotonic()
        with pytest.raises(DecodeStalledError, match="every 3 s") as raised:
            next(chunks)
        assert 2.5 < time.monotonic() - began < 8
        assert (raised.value.video, raised.value.frame_index) == ("v", 2)

    def test_that_is_slow_but_alive_is_not_stalled(self) -> None:
        (chunk,) = run("slowly", stall_timeout_s=4, packet_s=0.8, num_packets=8)
        assert chunk.num_frames == 2

    def test_that_crashes_has_died(self) -> None:
        chunks = run("then", act="crash")
        next(chunks)
        with pytest.raises(WorkerDiedError, match="killed by SIGSEGV") as raised:
            next(chunks)
        assert raised.value.frame_index == 2

    def test_that_is_killed_has_died(self, tmp_path: Path) -> None:
        chunks = run("then", act="hang", pid_file=str(tmp_path / "pid"))
        next(chunks)
        os.kill(_pid_in(tmp_path / "pid"), signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match="killed by SIGKILL"):
            next(chunks)

    def test_that_leaves_has_died(self) -> None:
        with pytest.raises(WorkerDiedError, match="exited with status 7"):
            list(run("then", act="leave"))

    def test_that_fails_has_died(self, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(WorkerDiedError, match="exited with status 1"):
            list(run("then", act="fail"))
        assert "a mistake of ours" in capfd.readouterr().err

    def test_that_eats_memory_meets_its_limit(self) -> None:
        chunks = run_isolated(
            f"{CHILDREN}:then", {"act": "eat"}, video="v", memory_limit_bytes=500 << 20
        )
        next(chunks)
        with pytest.raises(WorkerDiedError, match="memory limit of 524288000 bytes"):
            next(chunks)

    def test_decoder_that_eats_memory_meets_its_limit(self, tmp_path: Path) -> None:
        path = make_video(tmp_path / "large.mp4", 20, size=(1280, 720), preset="ultrafast")
        with pytest.raises(WorkerDiedError, match="memory limit"):
            list(decode_isolated(str(path), memory_limit_bytes=30 << 20))
        *chunks, summary = decode_isolated(str(path), memory_limit_bytes=1 << 30)
        assert summary.num_frames_decoded == 20
        assert [number_of(rgb) for c in chunks for rgb in c.rgb] == list(range(20))
        del chunks

    def test_is_killed_when_its_chunks_are_not_wanted(self, tmp_path: Path) -> None:
        chunks = run("then", act="hang", pid_file=str(tmp_path / "pid"))
        next(chunks)
        pid = _pid_in(tmp_path / "pid")
        began = time.monotonic()
        chunks.close()  # type: ignore[attr-defined]
        assert time.monotonic() - began < 2
        assert not psutil.pid_exists(pid)

    def test_ends_with_a_caller_that_is_killed(self, tmp_path: Path) -> None:
        pid_file = tmp_path / "pid"
        code = (
            "from fourdh_batch.video.isolate import run_isolated\n"
            f"chunks = run_isolated('{CHILDREN}:then', "
            f"{{'act': 'hang', 'pid_file': {str(pid_file)!r}}}, video='v')\n"
            "next(chunks); next(chunks)\n"
        )
        caller = subprocess.Popen([sys.executable, "-c", code])
        pid = _pid_in(pid_file)
        caller.kill()
        caller.wait()
        deadline = time.monotonic() + 10
        while psutil.pid_exists(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not psutil.pid_exists(pid)


def test_nothing_stays_open(clip: Path) -> None:
    code = f"""
import gc, itertools, psutil
from fourdh_batch.errors import WorkerDiedError
from fourdh_batch.video.isolate import decode_isolated, run_isolated

def use():
    list(decode_isolated({str(clip)!r}, chunk_frames=8))
    next(decode_isolated({str(clip)!r}, chunk_frames=8))
    for act in ("crash", "leave"):
        try:
            list(run_isolated("{CHILDREN}:then", {{"act": act}}, video="v"))
        except WorkerDiedError:
            continue

use(), gc.collect()
before = psutil.Process().num_fds()
use(), use(), gc.collect()
print(psutil.Process().num_fds() - before, psutil.Process().children())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"


def _pid_in(path: Path) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return int(text)
        time.sleep(0.02)
    raise AssertionError(f"nothing in {path}")


class TestRange:
    def test_equals_the_sequential_read(self, clip: Path) -> None:
        expected = read_frames(str(clip), 5, 17, video_id="a")
        assert equal(read_frames_isolated(str(clip), 5, 17, video_id="a"), expected)

    def test_decord_gives_the_same_frames(self, clip: Path) -> None:
        expected = read_frames(str(clip), 5, 17)
        got = read_frames_isolated(str(clip), 5, 17, decoder="decord")
        assert equal(got, expected)

    def test_decord_turns_frames_upright(self, tmp_path: Path) -> None:
        stored = [np.ascontiguousarray(np.rot90(picture(i))) for i in range(6)]
        path = str(make_video(tmp_path / "a.mp4", pictures=stored, size=(96, 128), rotation=90))
        got = read_frames_isolated(path, 1, 5, decoder="decord")
        assert equal(got, read_frames(path, 1, 5))

    def test_refusals_cross(self, tmp_path: Path) -> None:
        path = str(make_video(tmp_path / "a.avi", 5, "mpeg4"))
        with pytest.raises(DecoderRefusedError, match="AVI"):
            read_frames_isolated(path, 1, 5, decoder="decord")

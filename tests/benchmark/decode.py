"""Our reader against the bare library on the same 720p clip."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

from fourdh_batch.types import FrameChunk
from fourdh_batch.video.decode import VideoReader
from fourdh_batch.video.isolate import decode_isolated
from tests.benchmark.timing import ratio
from tests.media import write_video

NUM_FRAMES = 150


def clip(folder: Path) -> Path:
    """A moving picture with noise, 1280 x 720, H.264 with long groups of pictures."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 255, (90, 160, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    frames = np.stack([np.roll(ground, 3 * t, axis=1) for t in range(NUM_FRAMES)])
    return write_video(folder / "clip720.mp4", frames, gop=250)


def bare(path: Path) -> int:
    """PyAV's own loop, one thread, RGB out."""
    count = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            count += frame.to_ndarray(format="rgb24").shape[0] > 0
    return count


def ours(path: Path, *, shots: bool = False) -> int:
    with VideoReader(str(path)) as reader:
        return sum(chunk.num_frames for chunk in reader.chunks(32, score_shots=shots))


def isolated(path: Path) -> int:
    return sum(
        item.num_frames
        for item in decode_isolated(str(path), video_id="v", chunk_frames=32)
        if isinstance(item, FrameChunk)
    )


def run() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = clip(Path(folder))
        assert bare(path) == ours(path) == isolated(path) == NUM_FRAMES
        return [
            ratio("reader / bare PyAV loop, CPU time", lambda: ours(path), lambda: bare(path)),
            ratio(
                "reader with shot scores / reader, CPU time",
                lambda: ours(path, shots=True),
                lambda: ours(path),
            ),
            ratio(
                "reader in a child process / in this one, wall time with start-up",
                lambda: isolated(path),
                lambda: ours(path),
                clock=time.perf_counter,
            ),
        ]

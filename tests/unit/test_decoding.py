"""Units of several videos through a decoder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from fourdh_batch.cluster.decoding import Decoded, JournalKeeper, Opening, decode_unit
from fourdh_batch.cluster.model_actor import ModelWorker, SharedEngine
from fourdh_batch.config import VideoConfig
from fourdh_batch.errors import BadBoxesError, EmptyFileError, StorageError
from fourdh_batch.pipeline.corpus import Video
from fourdh_batch.pipeline.engine import Engine
from fourdh_batch.pipeline.records import ChunkResult
from fourdh_batch.types import DecodeSummary, FrameChunk
from tests.media import write_video

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def videos(tmp_path: Path) -> list[Video]:
    """Ten frames, forty frames, an empty file, one that has gone, ten frames."""
    made = []
    for name, num_frames in (("a", 10), ("b", 40), ("empty", 0), ("gone", 0), ("c", 10)):
        path = tmp_path / f"{name}.mp4"
        if num_frames:
            write_video(path, np.full((num_frames, 48, 64, 3), 90, np.uint8))
        elif name == "empty":
            path.touch()
        made.append(Video(name, str(path), 1, "f"))
    return made


@pytest.mark.parametrize("gather", [True, False])
def test_short_videos_share_batches_and_every_end_is_told(
    videos: list[Video], gather: bool
) -> None:
    items = list(decode_unit(videos, VideoConfig(chunk_frames=16), gather=gather))
    assert [i.number for i in items if isinstance(i, Opening)] == [0, 1, 2, 3, 4]
    batches = [item for item in items if not isinstance(item, Opening)]
    flat = [pair for batch in batches for pair in batch]
    frames = {
        number: sum(c.num_frames for n, c in flat if n == number and isinstance(c, FrameChunk))
        for number in range(5)
    }
    assert frames == {0: 10, 1: 40, 2: 0, 3: 0, 4: 10}
    ends = {n: type(item) for n, item in flat if not isinstance(item, FrameChunk)}
    assert ends == {
        **dict.fromkeys((0, 1, 4), DecodeSummary),
        2: EmptyFileError,
        3: StorageError,
    }
    assert [n for n, _ in flat] == sorted(n for n, _ in flat)
    if gather:
        sizes = [sum(c.num_frames for _, c in b if isinstance(c, FrameChunk)) for b in batches]
        assert sizes == [26, 16, 18, 0]  # chunks of 10+16, 16, 8+10; the last one's end
    else:
        assert {len(batch) for batch in batches} == {1}


def test_a_start_counts_for_the_first_video_alone(videos: list[Video]) -> None:
    found = decode_unit([videos[1], videos[0]], VideoConfig(chunk_frames=16), start=32)
    pairs = [pair for batch in found if not isinstance(batch, Opening) for pair in batch]
    frames = [(n, c.frame_index.tolist()) for n, c in pairs if isinstance(c, FrameChunk)]
    assert frames == [(0, list(range(32, 40))), (1, list(range(10)))]


GREEDY = """
import resource, sys
import numpy as np
from fourdh_batch.cluster import decoding
from fourdh_batch.config import VideoConfig
from fourdh_batch.pipeline.corpus import Video

def greedy(video, config, start):
    if video.video_id == "greedy":
        np.ones(1 << 28, np.float32)  # a GiB
    yield from ()

decoding.read_chunks = greedy
videos = [Video(name, name, 1, "f") for name in ("modest", "greedy", "other")]
items = list(decoding.decode_unit_limited(videos, VideoConfig(decoder_memory_mb=300)))
print([type(e).__name__ + str(e) for b in items if isinstance(b, list) for _, e in b])
print(resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY)
"""


def test_a_video_that_wants_too_much_memory_costs_itself_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GREEDY], capture_output=True, text=True, check=True, cwd=REPO
    )
    said, restored = done.stdout.splitlines()
    assert "WorkerDiedError" in said
    assert "met its memory limit of 300 MiB" in said
    assert said.count("Error") == 1
    assert restored == "True"


def test_the_journal_counts_frames_once_whatever_becomes_of_a_unit() -> None:
    journal = JournalKeeper()
    journal.report("a", 0, 512)  # goes on from an earlier attempt
    journal.report("a", 0, 544)
    journal.report("b", 3, 0)
    journal.report("b", 4, 10)
    snapshot = journal.snapshot()
    assert (snapshot["a"].num_frames, snapshot["b"].opened) == (544, 4)
    journal.forget("a")
    assert set(journal.snapshot()) == {"b"}
    assert journal.num_frames() == 42


def test_an_error_of_the_models_costs_one_video_of_a_batch() -> None:
    made: dict[int, str] = {}

    class Models:
        def run(self, chunks: list[FrameChunk]) -> list[ChunkResult]:
            if any(chunk.video_id == "bad" for chunk in chunks):
                raise BadBoxesError("no", video="bad")
            results = [ChunkResult.__new__(ChunkResult) for _ in chunks]
            made.update({id(r): c.video_id for r, c in zip(results, chunks, strict=True)})
            return results

    def chunk(name: str) -> FrameChunk:
        frames = np.arange(4)
        return FrameChunk(name, frames, frames, frames / 25, np.zeros((4, 8, 8, 3), np.uint8))

    worker = ModelWorker.__new__(ModelWorker)
    engine = SharedEngine(cast(Engine, Models()))
    ended: dict[int, StorageError | None] = {}
    events, frames = worker._reconstruct(engine, [(0, chunk("bad")), (1, chunk("good"))], ended)
    assert isinstance(events[0], BadBoxesError)
    assert made[id(events[1])] == "good"
    assert (frames, set(ended)) == (8, {0})
    items: list[tuple[int, Decoded]] = [(0, chunk("bad")), (1, chunk("good")), (2, chunk("fine"))]
    later, frames = worker._reconstruct(engine, items, ended)
    assert [made[id(event)] for event in later] == ["good", "fine"]
    assert frames == 8

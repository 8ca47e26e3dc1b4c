"""What holds for any damage, any start and any size of chunk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourdh_batch.errors import UndecodableError
from fourdh_batch.types import DecodeSummary
from fourdh_batch.video.decode import VideoReader
from fourdh_batch.video.shots import ShotRule, shot_starts
from tests.video_makers import make_video, packets_of

NUM_FRAMES, GROUP = 48, 8
MANY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("properties") / "clip.mp4"
    return make_video(path, NUM_FRAMES, g=str(GROUP), muxer={"movflags": "faststart"})


@pytest.fixture(scope="module")
def sound(clip: Path) -> dict[int, str]:
    return read(clip)[0]


def read(path: Path, start: int = 0) -> tuple[dict[int, str], DecodeSummary]:
    with VideoReader(str(path)) as reader:
        frames = {
            f.frame_index: hashlib.md5(f.rgb().tobytes()).hexdigest() for f in reader.frames(start)
        }
        return frames, reader.summary


def damaged(clip: Path, packets: set[int], fill: int) -> Path:
    """The clip with packets filled with one byte."""
    data = bytearray(clip.read_bytes())
    for number, (position, size, _) in enumerate(packets_of(clip)):
        if number in packets:
            keep = 0 if fill == 0 else 5  # the length and head of the unit
            data[position + keep : position + size] = bytes([fill]) * (size - keep)
    path = clip.with_name("damaged.mp4")
    path.write_bytes(data)
    return path


@MANY
@given(
    packets=st.sets(st.integers(0, NUM_FRAMES - 1), min_size=1, max_size=4),
    fill=st.sampled_from([0, 255]),
    start=st.integers(0, NUM_FRAMES),
)
def test_damage_costs_only_its_groups_and_every_loss_is_told(
    clip: Path, sound: dict[int, str], packets: set[int], fill: int, start: int
) -> None:
    path = damaged(clip, packets, fill)
    frames, summary = read(path)
    # Frames outside the damaged groups are there, bit for bit. (A keyframe that is destroyed
    # joins its group to the one before, whose frames ahead of it are kept.)
    hurt = {packet // GROUP for packet in packets}
    for index, digest in sound.items():
        if index // GROUP not in hurt:
            assert frames.get(index) == digest
    # What came out and what is told lost make the whole, and nothing is both.
    lost: set[int] = set()
    for entry in summary.damage:
        last = NUM_FRAMES - 1 if entry.last_frame_index is None else entry.last_frame_index
        lost |= set(range(entry.first_frame_index, last + 1))
    assert lost.isdisjoint(frames)
    assert lost | set(frames) == set(range(NUM_FRAMES))
    assert summary.num_frames_decoded == len(frames)
    # A read from the middle gives the same frames.
    rest, _ = read(path, start)
    assert rest == {i: digest for i, digest in frames.items() if i >= start}


@MANY
@given(chunk_frames=st.integers(1, 60), start=st.integers(0, NUM_FRAMES - 1))
def test_chunks_join_to_the_whole(clip: Path, chunk_frames: int, start: int) -> None:
    with VideoReader(str(clip)) as reader:
        chunks = list(reader.chunks(chunk_frames, start=start, score_shots=True))
        whole = list(reader.chunks(NUM_FRAMES, score_shots=True))
    assert all(c.num_frames == chunk_frames for c in chunks[:-1])
    index = np.concatenate([c.frame_index for c in chunks])
    assert index.tolist() == list(range(start, NUM_FRAMES))
    assert np.array_equal(np.concatenate([c.rgb for c in chunks]), whole[0].rgb[start:])
    scores = np.concatenate([c.shot_scores for c in chunks if c.shot_scores is not None])
    assert whole[0].shot_scores is not None
    assert np.array_equal(scores, whole[0].shot_scores[start:], equal_nan=True)


@given(
    scores=st.lists(st.floats(0, 100), max_size=80),
    pieces=st.lists(st.integers(1, 20), min_size=1),
)
def test_cuts_do_not_depend_on_how_scores_arrive(scores: list[float], pieces: list[int]) -> None:
    values, index = np.array(scores), np.arange(len(scores))
    rule, cuts, at = ShotRule(), [], 0
    while at < len(scores):
        for piece in pieces:
            cuts += rule.push(index[at : at + piece], values[at : at + piece])
            at += piece
    cuts += rule.finish()
    assert cuts == shot_starts(index, values).tolist()
    assert all(b - a >= 15 for a, b in zip([0, *cuts], cuts, strict=False))


def test_destroyed_everywhere_is_undecodable(clip: Path) -> None:
    with pytest.raises(UndecodableError):
        read(damaged(clip, set(range(NUM_FRAMES)), 0))

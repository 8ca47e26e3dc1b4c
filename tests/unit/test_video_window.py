"""Reading a part of a video by time: the same frames, indices and times as in the whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fourdh_batch.config import VideoConfig
from fourdh_batch.errors import EmptyWindowError, UndecodableError
from fourdh_batch.pipeline.plan import Video
from fourdh_batch.pipeline.reading import read_chunks, read_chunks_isolated
from fourdh_batch.types import DecodeSummary, FrameChunk
from tests.video_makers import FPS, make_video, overwrite

NUM_FRAMES, GROUP = 48, 8
KINDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {"g": str(GROUP)},
    "h264_open_gop.mp4": {"x264-params": f"open-gop=1:scenecut=0:keyint={GROUP}"},
    "h264_without_times.avi": {"g": str(GROUP)},
    "h264_one_key.mp4": {"g": "250"},
}
# whole seconds, between frames, exactly on a frame, from the start, to the end, one frame
WINDOWS = [(0.4, 1.2), (0.41, 1.19), (None, 0.5), (1.0, None), (0.8, 0.81), (-5.0, 99.0)]


@pytest.fixture(scope="module", params=KINDS)
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("window")
    return make_video(folder / request.param, NUM_FRAMES, **KINDS[request.param])


def video(path: Path, start_s: float | None, end_s: float | None) -> Video:
    return Video("v", str(path), path.stat().st_size, "f", start_s, end_s)


def read(items: Iterator[FrameChunk | DecodeSummary]) -> tuple[dict[int, Any], DecodeSummary]:
    """Per frame its time, pixels and shot score; and the summary."""
    frames: dict[int, Any] = {}
    for item in items:
        if isinstance(item, DecodeSummary):
            return frames, item
        assert item.shot_scores is not None
        for row, index in enumerate(item.frame_index.tolist()):
            assert index not in frames
            pixels = item.rgb[row].tobytes()
            score = str(item.shot_scores[row])  # NaN equals itself only as text
            frames[index] = (item.pts[row], item.pts_s[row], pixels, score)
    raise AssertionError("no summary")


CONFIG = VideoConfig(chunk_frames=16)


@pytest.mark.parametrize(("start_s", "end_s"), WINDOWS)
def test_a_window_gives_the_frames_of_the_whole_video_that_lie_in_it(
    clip: Path, start_s: float | None, end_s: float | None
) -> None:
    whole, _ = read(read_chunks(video(clip, None, None), CONFIG))
    wanted = {
        index: frame
        for index, frame in whole.items()
        if frame[1] >= (-9 if start_s is None else start_s)
        and frame[1] < (99 if end_s is None else end_s)
    }
    frames, summary = read(read_chunks(video(clip, start_s, end_s), CONFIG))
    assert list(frames) == list(wanted)
    first = next(iter(wanted))
    for index in frames:
        score = slice(0, 3) if index == first else slice(0, 4)  # the first has none before it
        assert frames[index][score] == wanted[index][score]
    assert (summary.num_frames_decoded, summary.damage) == (len(wanted), ())


def test_a_read_goes_on_inside_a_window_as_if_it_had_never_stopped(clip: Path) -> None:
    window = video(clip, 0.4, 1.6)
    frames, _ = read(read_chunks(window, CONFIG))
    first, last = min(frames), max(frames)
    for start in (0, first, first + 1, first + 9, last, last + 1, NUM_FRAMES + 5):
        rest, summary = read(read_chunks(window, CONFIG, start=start))
        assert rest == {index: f for index, f in frames.items() if index >= start}
        assert summary.damage == ()


def test_a_child_process_reads_the_same_window(clip: Path) -> None:
    window = video(clip, 0.4, 1.2)
    here, _ = read(read_chunks(window, CONFIG))
    there, summary = read(read_chunks_isolated(window, CONFIG))
    assert there == here
    assert summary.num_frames_decoded == len(here)


@pytest.mark.parametrize(("start_s", "end_s"), [(60.0, None), (60.0, 70.0), (1.0, 1.0), (None, -1)])
def test_a_window_without_frames_is_an_error_that_says_what_there_is(
    tmp_path: Path, start_s: float | None, end_s: float | None
) -> None:
    clip = make_video(tmp_path / "clip.mp4", 12)
    for reader in (read_chunks, read_chunks_isolated):
        with pytest.raises(EmptyWindowError, match=r"expected frames from .*, got 12 frames shown"):
            list(reader(video(clip, start_s, end_s), CONFIG))


def test_only_damage_inside_the_window_is_told(tmp_path: Path) -> None:
    sound = make_video(tmp_path / "sound.mp4", NUM_FRAMES, g=str(GROUP), bf="0")
    damaged = overwrite(sound, tmp_path / "damaged.mp4", 2 * GROUP)  # the third group's keyframe

    def told(first: int, end: int) -> list[tuple[int, int | None]]:
        window = video(damaged, (first - 0.5) / FPS, (end - 0.5) / FPS)
        _, summary = read(read_chunks(window, CONFIG))
        return [(d.first_frame_index, d.last_frame_index) for d in summary.damage]

    assert told(0, 16) == told(24, 48) == []
    assert told(10, 30) == [(16, 23)]
    assert told(10, 20) == [(16, 19)]
    assert told(20, 30) == [(20, 23)]
    with pytest.raises(UndecodableError, match="expected 4 frames, got none"):
        told(18, 22)

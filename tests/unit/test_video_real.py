"""The reader on real and on hostile files, against frames known from two other decoders."""

from __future__ import annotations

import csv
import hashlib
import random
import time
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest

from fourdh_batch.errors import DecoderRefusedError, VideoError
from fourdh_batch.types import U8, DecodeSummary, FrameChunk
from fourdh_batch.video.decode import VideoReader, probe, read_frames
from fourdh_batch.video.isolate import decode_isolated, read_frames_isolated
from tests.conftest import SHARED

pytestmark = pytest.mark.shared

VIDEOS = SHARED / "videos"
# Small files that stand for the others: B-frames, rotation, no index, AVI, variable rate, damage
QUICK = {
    "carphone_qcif_2997.mp4",
    "nasa_rot90_2997.mp4",
    "phone_vfr_rot180_aac.mp4",
    "archery_1p_mpeg4_25fps.avi",
    "pancake_2p_30fps_opus.mkv",
    "armwrestle_glitch_28fps.mp4",
    "variants/juggle_60fps.mp4",
    "variants/bedroom_vp9_altref.webm",
}
# Of other recordings than base_60f.mp4
OWN_PICTURES = {"single_frame.mp4", "vfr_gap_20s.mp4"}
DECORD_WRONG = [".avi", "av1", "mpegts", "intrarefresh", "opengop", "main10", "noduration"]
HOSTILE_TIME_S = 20.0  # a loaded machine takes a second
HOSTILE_MEMORY = 512 << 20


def rows(index: Path) -> list[dict[str, str]]:
    if not index.is_file():
        return []
    with index.open(newline="") as file:
        return list(csv.DictReader(file))


REAL = [row["file"] for row in rows(VIDEOS / "real" / "INDEX.csv")] or ["none"]
HOSTILE = {row["file"]: row for row in rows(VIDEOS / "hostile" / "INDEX.csv")} or {"none": {}}
REAL_QUICK_FIRST = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in REAL
]


def planes_md5(frame: av.VideoFrame) -> str:
    """MD5 of the decoded planes without padding, in the file's own pixel format."""
    sample_bytes = (frame.format.components[0].bits + 7) // 8
    digest = hashlib.md5()
    for plane in frame.planes:
        lines = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)
        digest.update(lines[:, : plane.width * sample_bytes].tobytes())
    return digest.hexdigest()


def known_frames(name: str) -> list[tuple[int, int, float, str]]:
    table = VIDEOS / "real" / "gt" / "frames" / f"{name.replace('/', '__')}.frames.csv"
    return [
        (int(row["index"]), int(row["pts"]), float(row["time_s"]), row["md5_planes"])
        for row in rows(table)
    ]


@pytest.mark.parametrize("name", REAL_QUICK_FIRST)
def test_every_frame_is_the_known_one(shared: Path, name: str) -> None:
    known = known_frames(name)
    with VideoReader(str(VIDEOS / "real" / name)) as reader:
        assert reader.info.num_frames == len(known)
        got = [(f.frame_index, f.pts, f.pts_s, planes_md5(f.native)) for f in reader.frames()]
        assert reader.summary.damage == ()
        assert reader.summary.num_frames_decoded == len(known)
    assert [(i, pts, md5) for i, pts, _, md5 in got] == [(i, p, md5) for i, p, _, md5 in known]
    assert [s for *_, s, _ in got] == pytest.approx([s for *_, s, _ in known], abs=1e-6)


@pytest.mark.parametrize("name", REAL_QUICK_FIRST)
def test_any_part_is_part_of_the_whole(shared: Path, name: str) -> None:
    path, known = str(VIDEOS / "real" / name), known_frames(name)
    num_frames, rng = len(known), random.Random(name)
    starts = {1, num_frames // 2, num_frames - 1, *(rng.randrange(num_frames) for _ in range(3))}
    keys = [i for i, row in enumerate(rows_of_keys(name)) if row]
    starts |= {k + d for k in rng.sample(keys, min(2, len(keys))) for d in (-1, 0, 1)}
    for start in sorted(s for s in starts if 0 <= s < num_frames):
        with VideoReader(path) as reader:
            part = [(f.frame_index, planes_md5(f.native)) for f in islice(reader.frames(start), 4)]
        assert part == [(i, md5) for i, _, _, md5 in known[start : start + 4]]
    start = rng.randrange(num_frames)
    stop = min(num_frames, start + 5)
    chunk = read_frames(path, start, stop)
    assert chunk.frame_index.tolist() == list(range(start, stop))
    with VideoReader(path) as reader:
        for frame, rgb in zip(islice(reader.frames(), start, stop), chunk.rgb, strict=True):
            assert np.array_equal(frame.rgb(), rgb)


def rows_of_keys(name: str) -> list[bool]:
    table = VIDEOS / "real" / "gt" / "frames" / f"{name.replace('/', '__')}.frames.csv"
    return [row["key"] == "1" for row in rows(table)]


@pytest.mark.parametrize("name", REAL)
def test_description_fits_the_index(shared: Path, name: str) -> None:
    (row,) = [r for r in rows(VIDEOS / "real" / "INDEX.csv") if r["file"] == name]
    info = probe(str(VIDEOS / "real" / name))
    size = int(row["width"]), int(row["height"])
    assert info.rotation_deg == int(row["rotation_deg"]) % 360
    assert (info.width, info.height) == (size[::-1] if info.rotation_deg % 180 else size)
    assert (info.codec, info.pix_fmt) == (row["codec"], row["pix_fmt"])
    assert info.num_frames == int(row["frames_decoded"])
    assert info.fps == pytest.approx(float(row["fps_avg"]), rel=0.06)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_ends_as_it_should(shared: Path, name: str) -> None:
    expected, path = HOSTILE[name], str(VIDEOS / "hostile" / name)
    began = time.monotonic()
    frames: dict[int, U8] = {}
    outcome = message = ""
    try:
        for item in decode_isolated(path, memory_limit_bytes=HOSTILE_MEMORY, stall_timeout_s=20):
            if isinstance(item, FrameChunk):
                frames |= zip(item.frame_index.tolist(), item.rgb, strict=True)
            else:
                assert isinstance(item, DecodeSummary)
                outcome = item.damage[0].code if item.damage else "OK"
                assert item.num_frames_decoded == len(frames)
    except VideoError as error:
        outcome, message = error.code, str(error)
    assert message.startswith(f"video {path}") or not message
    assert time.monotonic() - began < HOSTILE_TIME_S
    assert (outcome, len(frames)) == (expected["outcome"], int(expected["frames"]))
    is_copy = "same bytes as single_frame" not in expected["what_and_why"]
    if expected["exact_frames"] and is_copy and name not in OWN_PICTURES:
        exact = _numbers(expected["exact_frames"])
        base = read_frames(str(VIDEOS / "hostile" / "base_60f.mp4"), 0, 60).rgb
        assert all(np.array_equal(frames[i], base[i]) for i in exact)
        if outcome == "CORRUPT":
            assert sorted(frames) == exact


def _numbers(ranges: str) -> list[int]:
    parts = [part.split("-") for part in ranges.split(",")]
    return [i for part in parts for i in range(int(part[0]), int(part[-1]) + 1)]


@pytest.mark.parametrize("name", REAL_QUICK_FIRST)
def test_decord_is_refused_or_right(shared: Path, name: str) -> None:
    path = str(VIDEOS / "real" / name)
    num_frames = probe(path).num_frames
    start = num_frames // 3
    stop = min(num_frames, start + 20)
    if any(word in name for word in DECORD_WRONG):
        with pytest.raises(DecoderRefusedError, match="decord would be wrong or hang"):
            read_frames_isolated(path, start, stop, decoder="decord")
    else:
        got = read_frames_isolated(path, start, stop, decoder="decord")
        expected = read_frames(path, start, stop)
        assert np.array_equal(got.rgb, expected.rgb)
        assert np.array_equal(got.pts_s, expected.pts_s)

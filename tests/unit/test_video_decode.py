"""The reader on videos whose pictures show their own number: the right frame at the right time."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from fourdh_batch.errors import (
    BadTimestampsError,
    CorruptVideoError,
    DecoderRefusedError,
    EmptyFileError,
    NoIndexError,
    NotAVideoError,
    NoVideoStreamError,
    StorageError,
    TooLargeError,
    TruncatedVideoError,
    UndecodableError,
    VideoError,
)
from fourdh_batch.types import U8, Damage, FrameChunk
from fourdh_batch.video.decode import VideoReader, probe, read_frames
from tests.video_makers import (
    FPS,
    HEIGHT,
    WIDTH,
    make_audio,
    make_growing_video,
    make_video,
    number_of,
    overwrite,
    packets_of,
    picture,
)

QUICK_VPX = {
    "auto-alt-ref": "1",
    "lag-in-frames": "10",
    "cpu-used": "8",
    "deadline": "good",
    "g": "15",
    "b": "500k",
}

# name: encoder and its options; together they cover B-frames, open groups of pictures, hidden
# references, one keyframe only, no true keyframe but the first, no index, no times
KINDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "h264.mkv": {},
    "h264.ts": {},
    "h264.flv": {},
    "h264_without_times.avi": {},
    "h264_one_key.mp4": {"g": "250"},
    "h264_one_key.ts": {"g": "250"},
    "h264_open_gop.mp4": {"x264-params": "open-gop=1:scenecut=0"},
    "h264_intra_refresh.mp4": {"x264-params": "intra-refresh=1:scenecut=0", "bf": "0"},
    "h264_fragments.mp4": {"muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc_open_gop.mp4": {
        "codec": "libx265",
        "x265-params": "keyint=10:bframes=2:pools=1:frame-threads=1:log-level=none",
    },
    "mpeg4.avi": {"codec": "mpeg4", "bf": "2", "g": "10", "b": "2M"},
    "mpeg2.mpg": {"codec": "mpeg2video", "bf": "2", "g": "10", "b": "2M"},
    "vp8_hidden_references.webm": {"codec": "libvpx", **QUICK_VPX},
    "vp9_hidden_references.webm": {"codec": "libvpx-vp9", **QUICK_VPX},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    """30 frames of H.264 with B-frames, three groups of ten, index first."""
    return make_video(folder / "clip.mp4", muxer={"movflags": "faststart"})


def numbers(path: Path, start: int = 0) -> list[tuple[int, int]]:
    """(frame index, number in the picture) of all frames from `start`."""
    with VideoReader(str(path)) as reader:
        return [(f.frame_index, number_of(f.rgb())) for f in reader.frames(start)]


def digests(path: Path, start: int = 0) -> dict[int, str]:
    with VideoReader(str(path)) as reader:
        return {
            f.frame_index: hashlib.md5(f.rgb().tobytes()).hexdigest() for f in reader.frames(start)
        }


def damage_of(path: Path, start: int = 0, **options: Any) -> tuple[Damage, ...]:
    with VideoReader(str(path), **options) as reader:
        for _ in reader.frames(start):
            pass
        return reader.summary.damage


class TestFrames:
    @pytest.mark.parametrize("name", KINDS)
    def test_come_out_once_in_order_and_from_any_start(self, folder: Path, name: str) -> None:
        path = make_video(folder / name, 34, **KINDS[name])
        assert numbers(path) == [(i, i) for i in range(34)]
        whole = digests(path)
        for start in (1, 9, 10, 11, 19, 25, 33):
            assert digests(path, start) == {i: whole[i] for i in range(start, 34)}
        assert damage_of(path) == ()

    def test_hidden_references_of_vp8_are_no_frames(self, folder: Path) -> None:
        whole = make_video(folder / "vp8.webm", 34, "libvpx", g="34", b="500k")
        position = packets_of(whole)[20][0]
        first_byte = whole.read_bytes()[position]
        hidden = overwrite(whole, folder / "hidden.webm", 20, bytes([first_byte & ~16]))
        assert len(packets_of(hidden)) == 34
        assert [n for _, n in numbers(hidden)] == [*range(20), *range(21, 34)]
        assert [i for i, _ in numbers(hidden, 25)] == list(range(25, 33))
        assert damage_of(hidden) == ()

    def test_keep_irregular_times(self, folder: Path) -> None:
        pts = [0, 1, 2, 30, 31, 33, 60, 61, 100, 130, 131, 133, 140, 150, 151]
        path = make_video(folder / "irregular.mp4", 15, pts=pts)
        with VideoReader(str(path)) as reader:
            frames = list(reader.frames())
            assert [f.pts_s for f in frames] == pytest.approx([t / FPS for t in pts])
            assert [f.pts * reader.info.time_base * FPS for f in frames] == pts
            assert [number_of(f.rgb()) for f in frames] == list(range(15))
            assert reader.info.fps == pytest.approx(14 / (151 / FPS))

    def test_cut_away_by_an_edit_list_are_not_shown(self, folder: Path) -> None:
        path = make_video(folder / "edited.mp4", 30, shift=-5)
        assert probe(str(path)).num_frames_declared == 30
        assert numbers(path) == [(i, i + 5) for i in range(25)]
        assert numbers(path, 13) == [(i, i + 5) for i in range(13, 25)]
        with VideoReader(str(path)) as reader:
            assert next(iter(reader.frames())).pts == 0

    def test_that_start_late_keep_their_time(self, folder: Path) -> None:
        path = make_video(folder / "late.mkv", 12, shift=60)
        with VideoReader(str(path)) as reader:
            assert next(f.pts_s for f in reader.frames()) == pytest.approx(2.0, abs=1e-3)

    @pytest.mark.parametrize("rotation", [90, 180, 270])
    def test_are_turned_upright(self, folder: Path, rotation: int) -> None:
        # The player turns clockwise what is stored turned counter-clockwise.
        upright = [picture(i) for i in range(3)]
        stored = [np.ascontiguousarray(np.rot90(p, rotation // 90)) for p in upright]
        size = stored[0].shape[1], stored[0].shape[0]
        path = make_video(
            folder / f"turned{rotation}.mp4", pictures=stored, size=size, rotation=rotation
        )
        info = probe(str(path))
        assert (info.width, info.height) == (WIDTH, HEIGHT)
        assert info.rotation_deg == (360 - rotation) % 360
        with VideoReader(str(path)) as reader:
            for frame, expected in zip(reader.frames(), upright, strict=True):
                assert number_of(frame.rgb()) == frame.frame_index
                native = frame.native.to_ndarray(format="rgb24")
                assert np.array_equal(frame.rgb(), np.rot90(native, info.rotation_deg // 90))
                assert np.abs(frame.rgb().astype(int) - expected).mean() < 12

    def test_of_ten_bits_come_out_in_eight(self, folder: Path) -> None:
        path = make_video(folder / "ten.mkv", 4, "libx264", pix_fmt="yuv420p10le")
        assert probe(str(path)).pix_fmt == "yuv420p10le"
        assert numbers(path) == [(i, i) for i in range(4)]

    def test_equal_pyavs_own_conversion(self, clip: Path) -> None:
        with VideoReader(str(clip)) as reader:
            for frame in reader.frames(25):
                assert np.array_equal(frame.rgb(), frame.native.to_ndarray(format="rgb24"))

    def test_of_an_odd_size(self, folder: Path) -> None:
        size = WIDTH + 1, HEIGHT + 1
        path = make_video(folder / "odd.mkv", 5, "libx264", size=size, pix_fmt="yuv444p")
        assert numbers(path) == [(i, i) for i in range(5)]
        assert (probe(str(path)).width, probe(str(path)).height) == size

    def test_are_the_film_and_not_the_cover(self, folder: Path) -> None:
        path = make_video(folder / "cover.mp4", 12, cover=picture(200, 2 * WIDTH, 2 * HEIGHT))
        assert numbers(path) == [(i, i) for i in range(12)]

    def test_of_an_opened_file_are_the_same(self, clip: Path) -> None:
        with clip.open("rb") as file, VideoReader(file) as reader:
            got = [(f.frame_index, number_of(f.rgb())) for f in reader.frames(7)]
            assert got == [(i, i) for i in range(7, 30)]
            assert reader.info.uri == str(clip)
        with VideoReader(io.BytesIO(clip.read_bytes())) as reader:
            assert sum(1 for _ in reader.frames()) == 30

    def test_before_the_first_are_refused(self, clip: Path) -> None:
        with VideoReader(str(clip)) as reader, pytest.raises(ValueError, match="frame index of 0"):
            reader.frames(-1)

    def test_behind_the_last_are_none(self, clip: Path) -> None:
        assert numbers(clip, 30) == []
        assert numbers(clip, 1000) == []


class TestInfo:
    def test_says_what_the_file_is(self, clip: Path) -> None:
        info = probe(str(clip))
        assert info.container.startswith("mov")
        assert (info.codec, info.pix_fmt) == ("h264", "yuv420p")
        assert (info.width, info.height, info.rotation_deg) == (WIDTH, HEIGHT, 0)
        assert (info.num_frames, info.num_frames_declared, info.num_keyframes) == (30, 30, 3)
        assert (info.fps, info.duration_s) == (30.0, 1.0)
        assert info.decoder == f"PyAV {av.__version__} with FFmpeg {av.ffmpeg_version_info}"

    def test_of_a_single_frame_has_no_rate(self, folder: Path) -> None:
        path = make_video(folder / "one.mp4", 1)
        assert probe(str(path)).fps is None
        assert numbers(path) == [(0, 0)]

    def test_survives_metadata_in_no_encoding(self, folder: Path) -> None:
        path = make_video(folder / "plain.mkv", 3)
        data = path.read_bytes()
        assert b"Lavf" in data
        odd = folder / "odd_metadata.mkv"
        odd.write_bytes(data.replace(b"Lavf", b"\xff\xfe\xfa\xfb"))
        assert probe(str(odd)).num_frames == 3

    @pytest.mark.parametrize(
        "name", ["-dash.mp4", "50%20#a&b.mp4", "quo'te $HOME;.mp4", "人 物.MP4", "concat:a|b", "x"]
    )
    def test_does_not_depend_on_the_name(
        self, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        (tmp_path / name).write_bytes(clip.read_bytes())
        monkeypatch.chdir(tmp_path)
        assert probe(name).num_frames == 30
        assert probe(str(tmp_path / name)).num_frames == 30


class TestChunks:
    def test_hold_all_frames_in_pieces(self, clip: Path) -> None:
        with VideoReader(str(clip), video_id="a") as reader:
            chunks = list(reader.chunks(8))
            assert [c.num_frames for c in chunks] == [8, 8, 8, 6]
            assert np.concatenate([c.frame_index for c in chunks]).tolist() == list(range(30))
            shown = [number_of(rgb) for c in chunks for rgb in c.rgb]
            assert shown == list(range(30))
            assert {c.video_id for c in chunks} == {"a"}
            times = np.concatenate([c.pts_s for c in chunks])
            assert times == pytest.approx(np.arange(30) / FPS)
            assert all(c.shot_scores is None for c in chunks)
            summary = reader.summary
        assert (summary.num_frames_decoded, summary.damage) == (30, ())

    def test_stay_within_their_bytes(self, clip: Path) -> None:
        frame_bytes = 3 * WIDTH * HEIGHT
        with VideoReader(str(clip)) as reader:
            sizes = [c.num_frames for c in reader.chunks(32, max_chunk_bytes=7 * frame_bytes + 5)]
            assert sizes == [7, 7, 7, 7, 2]
            assert {c.num_frames for c in reader.chunks(32, max_chunk_bytes=1)} == {1}

    def test_end_where_the_picture_grows(self, folder: Path) -> None:
        path = make_growing_video(folder / "grows.ts")
        with VideoReader(str(path)) as reader:
            chunks = list(reader.chunks(16))
        assert [c.num_frames for c in chunks] == [16, 4, 16, 4]
        assert [c.image_size_wh[0] // WIDTH for c in chunks] == [1, 1, 2, 2]
        # The number stands in the same squares, whatever the size.
        shown = [number_of(rgb) for c in chunks for rgb in c.rgb]
        assert shown == list(range(40))

    def test_fill_the_memory_they_are_given(self, clip: Path) -> None:
        given: list[U8] = []

        def allocate(shape: tuple[int, int, int, int]) -> U8:
            given.append(np.empty(shape, np.uint8))
            return given[-1]

        with VideoReader(str(clip)) as reader:
            for chunk in reader.chunks(16, allocate=allocate):
                assert np.shares_memory(chunk.rgb, given[-1])
        assert [len(memory) for memory in given] == [16, 14]

    def test_use_memory_again_but_not_while_it_is_seen(self, clip: Path) -> None:
        with VideoReader(str(clip)) as reader:
            kept = [chunk.rgb[-1, 4:12] for chunk in reader.chunks(5)]
            whole = next(reader.chunks(30)).rgb
            addresses = {chunk.rgb.ctypes.data for chunk in reader.chunks(5)}
        assert len(addresses) <= 3
        for number, part in enumerate(kept):
            assert np.array_equal(part, whole[5 * number + 4, 4:12])

    @pytest.mark.parametrize("start", [1, 10, 17])
    def test_from_the_middle_have_the_scores_of_the_whole(self, clip: Path, start: int) -> None:
        with VideoReader(str(clip)) as reader:
            whole = _scores(list(reader.chunks(7, score_shots=True)))
            rest = _scores(list(reader.chunks(7, score_shots=True, start=start)))
            assert reader.summary.num_frames_decoded == 30 - start
        assert np.isnan(whole[0])
        assert not np.isnan(whole[1:]).any()
        assert np.array_equal(rest, whole[start:])

    def test_refuse_impossible_sizes(self, clip: Path) -> None:
        with VideoReader(str(clip)) as reader:
            for settings in ({"chunk_frames": 0}, {"max_chunk_bytes": 0}, {"start": -1}):
                with pytest.raises(ValueError, match="expected"):
                    next(reader.chunks(**settings))


def _scores(chunks: list[FrameChunk]) -> np.ndarray[Any, Any]:
    scores = [c.shot_scores for c in chunks if c.shot_scores is not None]
    assert len(scores) == len(chunks)
    return np.concatenate(scores)


class TestReadFrames:
    def test_equals_the_sequential_read(self, clip: Path) -> None:
        whole = read_frames(str(clip), 0, 30)
        for start, stop in ((0, 1), (5, 6), (7, 23), (9, 11), (29, 30)):
            part = read_frames(str(clip), start, stop, video_id="v")
            assert part.video_id == "v"
            assert part.frame_index.tolist() == list(range(start, stop))
            assert np.array_equal(part.rgb, whole.rgb[start:stop])
            assert np.array_equal(part.pts, whole.pts[start:stop])

    @pytest.mark.parametrize("wanted", [(-1, 3), (3, 3), (5, 2), (0, 31)])
    def test_refuses_a_range_outside(self, clip: Path, wanted: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="expected 0 <= start < stop <= 30"):
            read_frames(str(clip), *wanted)

    def test_leaves_out_lost_frames(self, clip: Path, tmp_path: Path) -> None:
        path = overwrite(clip, tmp_path / "a.mp4", 10)
        assert read_frames(str(path), 5, 25).frame_index.tolist() == [5, 6, 7, 8, 9, *range(20, 25)]
        with pytest.raises(CorruptVideoError, match="frames 12 to 14, all are lost"):
            read_frames(str(path), 12, 15)

    def test_refuses_two_sizes_at_once(self, folder: Path) -> None:
        path = str(make_growing_video(folder / "grows2.ts"))
        assert read_frames(path, 0, 20).num_frames == 20
        with pytest.raises(ValueError, match="expected one picture size"):
            read_frames(path, 15, 25)


class TestNotAVideo:
    @pytest.mark.parametrize(
        ("content", "error", "match"),
        [
            (b"", EmptyFileError, "0 bytes"),
            (b"Dear reader,\n" * 100, NotAVideoError, "one of the containers"),
            (bytes(range(256)) * 64, NotAVideoError, "one of the containers"),
            (struct.pack(">I4s", 999, b"ftyp") + b"isom" * 9, NoIndexError, "moov"),
        ],
    )
    def test_is_told_by_content(
        self, tmp_path: Path, content: bytes, error: type[VideoError], match: str
    ) -> None:
        path = tmp_path / "a.mp4"
        path.write_bytes(content)
        with pytest.raises(error, match=match):
            probe(str(path))
        with pytest.raises(error, match=match):
            probe(io.BytesIO(content))

    def test_script_of_names_is_not_followed(self, clip: Path, tmp_path: Path) -> None:
        for number, text in enumerate(
            (
                f"ffconcat version 1.0\nfile '{clip}'\n",
                f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip}\n#EXT-X-ENDLIST\n",
            )
        ):
            path = tmp_path / f"playlist{number}.mp4"
            path.write_text(text)
            for source in (str(path), io.BytesIO(text.encode())):
                with pytest.raises(NotAVideoError, match="playlist; what it names is not opened"):
                    VideoReader(source)

    def test_still_picture(self, tmp_path: Path) -> None:
        for name, codec in (("a.jpg", "mjpeg"), ("a.png", "png")):
            frame = av.VideoFrame.from_ndarray(picture(1), format="rgb24")
            frame.save(str(tmp_path / name))
            path = tmp_path / f"{codec}.mp4"
            path.write_bytes((tmp_path / name).read_bytes())
            with pytest.raises(NotAVideoError, match="one of the containers"):
                probe(str(path))

    def test_still_picture_in_a_container_of_films(self, clip: Path, tmp_path: Path) -> None:
        data = clip.read_bytes()
        assert data[4:12] == b"ftypisom"
        path = tmp_path / "still.mp4"
        path.write_bytes(data[:8] + b"heic" + data[12:])
        with pytest.raises(NotAVideoError, match="got a still picture"):
            probe(str(path))

    @pytest.mark.parametrize(
        "url", ["http://127.0.0.1:9/a.mp4", "s3://bucket/a.mp4", "file:///etc/passwd"]
    )
    def test_url_is_refused(self, url: str) -> None:
        with pytest.raises(NotAVideoError, match="got the URL"):
            VideoReader(url)

    def test_pipe_does_not_block(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.mp4")
        with pytest.raises(NotAVideoError, match="got a pipe"):
            probe(str(tmp_path / "pipe.mp4"))

    def test_directory_link_and_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "dir.mp4").mkdir()
        (tmp_path / "link.mp4").symlink_to("nowhere")
        (tmp_path / "loop.mp4").symlink_to("loop.mp4")
        for name, match in (
            ("dir.mp4", "got a directory"),
            ("link.mp4", "got a broken link"),
            ("none.mp4", "got nothing there"),
            ("dir.mp4/a.mp4", "got nothing there"),
            ("nul\0.mp4", "got nothing there"),
        ):
            with pytest.raises(NotAVideoError, match=match):
                probe(str(tmp_path / name))
        with pytest.raises(StorageError, match="symbolic links"):
            probe(str(tmp_path / "loop.mp4"))

    def test_sound_without_pictures(self, tmp_path: Path) -> None:
        with pytest.raises(NoVideoStreamError, match="got streams: audio"):
            probe(str(make_audio(tmp_path / "a.m4a")))
        with pytest.raises(NoVideoStreamError, match="got streams: audio, video"):
            probe(str(make_audio(tmp_path / "b.mp4", cover=picture(3))))

    def test_reading_that_fails_is_told_as_it_is(self, clip: Path) -> None:
        class Failing(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if self.tell() > 4000:
                    raise StorageError("503")
                return super().read(min(size or 0, 1000))

        with pytest.raises(StorageError, match="503"):
            probe(Failing(clip.read_bytes()))


class TestTooLarge:
    def test_is_refused_before_decoding(self, clip: Path) -> None:
        with pytest.raises(TooLargeError, match=f"at most 100 pixels, got {WIDTH} x {HEIGHT}"):
            probe(str(clip), max_pixels=100)
        assert probe(str(clip), max_pixels=WIDTH * HEIGHT).width == WIDTH

    def test_later_part_is_damage(self, folder: Path) -> None:
        path = make_growing_video(folder / "grows3.ts")
        with VideoReader(str(path), max_pixels=WIDTH * HEIGHT) as reader:
            assert [f.frame_index for f in reader.frames()] == list(range(20))
            (damage,) = reader.summary.damage
        assert (damage.code, damage.first_frame_index) == ("TOO_LARGE", 20)
        assert f"got {2 * WIDTH} x {2 * HEIGHT}" in damage.message

    def test_impossible_size_in_an_avi_header(self, tmp_path: Path) -> None:
        path = make_video(tmp_path / "a.avi", 2, "rawvideo")
        data = bytearray(path.read_bytes())
        old, new = struct.pack("<II", WIDTH, HEIGHT), struct.pack("<II", 100_000, 100_000)
        assert data.count(old) == 2  # in the header of the file and of the stream's pictures
        path.write_bytes(data.replace(old, new))
        with pytest.raises(TooLargeError, match="got 100000 x 100000"):
            probe(str(path))


class TestBadTimestamps:
    def test_all_equal_are_refused(self, clip: Path, tmp_path: Path) -> None:
        data = bytearray(clip.read_bytes())
        table = data.index(b"stts")
        count, _, delta = struct.unpack_from(">III", data, table + 8)
        assert (count, delta) == (1, 512)
        struct.pack_into(">I", data, table + 16, 0)
        data[data.index(b"ctts") :][:4] = b"free"
        data = data.replace(b"ctts", b"free")
        path = tmp_path / "a.mp4"
        path.write_bytes(data)
        with pytest.raises(BadTimestampsError, match="expected increasing presentation times"):
            VideoReader(str(path))

    def test_jump_back_is_refused(self, tmp_path: Path) -> None:
        one = make_video(tmp_path / "one.ts", 60)
        two = tmp_path / "two.ts"
        two.write_bytes(one.read_bytes() * 2)  # as recordings are sometimes joined
        with pytest.raises(BadTimestampsError, match="out of order"):
            VideoReader(str(two))


class TestDamage:
    def test_inside_a_group_costs_that_group(self, clip: Path, tmp_path: Path) -> None:
        whole = digests(clip)
        path = overwrite(clip, tmp_path / "a.mp4", 11, bytes(4) + b"\xff" * 10_000)
        kept = digests(path)
        assert kept == {i: whole[i] for i in (*range(10), *range(20, 30))}
        (damage,) = damage_of(path)
        assert (damage.code, damage.first_frame_index, damage.last_frame_index) == (
            "CORRUPT",
            10,
            19,
        )
        assert "packet 11" in damage.message
        for start in range(31):
            assert digests(path, start) == {i: kept[i] for i in kept if i >= start}

    def test_of_a_keyframe_hides_it_from_the_scan(self, clip: Path, tmp_path: Path) -> None:
        path = overwrite(clip, tmp_path / "a.mp4", 10)
        assert probe(str(path)).num_keyframes == 2
        whole = digests(clip)
        assert digests(path) == {i: whole[i] for i in (*range(10), *range(20, 30))}

    def test_late_in_a_group_keeps_its_beginning(self, folder: Path, tmp_path: Path) -> None:
        path = make_video(folder / "one_group.mp4", 40, g="40", bf="0")
        whole = digests(path)
        damaged = overwrite(path, tmp_path / "a.mp4", 30)
        assert digests(damaged) == {i: whole[i] for i in range(30)}
        (damage,) = damage_of(damaged)
        assert (damage.first_frame_index, damage.last_frame_index) == (30, None)

    def test_of_the_last_packet_of_a_group_spares_the_next(
        self, clip: Path, tmp_path: Path
    ) -> None:
        whole = digests(clip)
        kept = digests(overwrite(clip, tmp_path / "a.mp4", 19))
        assert all(kept.get(i) == whole[i] for i in (*range(10), *range(20, 30)))

    @pytest.mark.parametrize(("packet", "bf"), [(17, "0"), (20, "0"), (20, "2"), (27, "2")])
    def test_without_true_keyframes_is_the_same_from_any_start(
        self, folder: Path, tmp_path: Path, packet: int, bf: str
    ) -> None:
        params = {"x264-params": "intra-refresh=1:scenecut=0", "bf": bf, "g": "12"}
        path = make_video(folder / f"refresh{packet}{bf}.mp4", 72, **params)
        whole = digests(path)
        damaged = overwrite(path, tmp_path / "a.mp4", packet)
        kept = digests(damaged)
        assert 12 <= len(kept) <= packet  # no keyframe behind the damage is a clean start
        assert all(whole[i] == kept[i] for i in kept)
        for start in range(1, 72, 7):
            assert digests(damaged, start) == {i: kept[i] for i in kept if i >= start}

    @pytest.mark.parametrize("start", [15, 20, 25])
    def test_shot_score_across_it_compares_with_the_last_good_frame(
        self, clip: Path, tmp_path: Path, start: int
    ) -> None:
        path = overwrite(clip, tmp_path / "a.mp4", 11)
        with VideoReader(str(path)) as reader:
            chunks = list(reader.chunks(30, score_shots=True))
            index = np.concatenate([c.frame_index for c in chunks])
            whole = _scores(chunks)
            rest = _scores(list(reader.chunks(30, score_shots=True, start=start)))
        assert not np.isnan(whole[1:]).any()
        assert np.array_equal(rest, whole[index >= start])

    def test_of_every_packet_leaves_nothing(self, clip: Path, tmp_path: Path) -> None:
        path = tmp_path / "a.mp4"
        data = bytearray(clip.read_bytes())
        for position, size, _ in packets_of(clip):
            data[position : position + size] = bytes(size)
        path.write_bytes(data)
        with VideoReader(str(path)) as reader:
            match = "expected 30 frames, got none: packet 0: decoding failed"
            with pytest.raises(UndecodableError, match=match) as raised:
                next(reader.frames())
            assert (raised.value.stage, raised.value.frame_index) == ("decode", 0)

    @pytest.mark.parametrize("name", ["half.mp4", "half.mkv", "half.ts"])
    def test_missing_end(self, folder: Path, tmp_path: Path, name: str) -> None:
        muxer = {"movflags": "faststart"} if name.endswith("mp4") else {}
        path = make_video(folder / name, 60, muxer=muxer)
        whole = digests(path)
        cut = tmp_path / name
        cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        kept = digests(cut)
        assert 15 < len(kept) < 45
        # The very last picture may be one whose neighbours are missing.
        assert all(kept[i] == whole[i] for i in range(len(kept) - 1))
        damage = damage_of(cut)
        if name.endswith("ts"):  # says nowhere how long it is
            assert {d.code for d in damage} <= {"CORRUPT", "TRUNCATED"}
        else:
            assert [(d.code, d.first_frame_index, d.last_frame_index) for d in damage] == [
                ("TRUNCATED", len(kept), None)
            ]
            assert [d.code for d in damage_of(cut, start=3)] == ["TRUNCATED"]

    def test_missing_from_the_first_packet_on(self, clip: Path, tmp_path: Path) -> None:
        path = tmp_path / "a.mp4"
        path.write_bytes(clip.read_bytes()[: packets_of(clip)[0][0]])
        with pytest.raises(TruncatedVideoError, match="by the header"):
            probe(str(path))

    def test_long_last_frame_is_no_missing_end(self, folder: Path) -> None:
        path = make_video(folder / "slides.mkv", 6, pts=[0, 90, 180, 270, 360, 450])
        assert damage_of(path) == ()

    def test_beginning_inside_a_group(self, folder: Path, tmp_path: Path) -> None:
        path = make_video(folder / "whole.ts", 40)
        position = packets_of(path)[4][0]
        cut = tmp_path / "a.ts"
        header = path.read_bytes()[: 3 * 188]  # tables of programmes and streams
        cut.write_bytes(header + path.read_bytes()[position:])
        shown = numbers(cut)
        assert [n for _, n in shown] == list(range(10, 40))
        first = shown[0][0]
        assert [i for i, _ in shown] == list(range(first, first + 30))
        (damage,) = damage_of(cut)
        assert (damage.first_frame_index, damage.last_frame_index) == (0, first - 1)
        assert "begins inside a group" in damage.message


class TestReader:
    def test_has_no_summary_before_the_end(self, clip: Path) -> None:
        with VideoReader(str(clip)) as reader:
            frames = reader.frames()
            next(frames)
            with pytest.raises(RuntimeError, match="read to the end"):
                _ = reader.summary

    def test_new_pass_ends_the_one_before(self, clip: Path) -> None:
        with VideoReader(str(clip)) as reader:
            old = reader.frames()
            next(old)
            assert sum(1 for _ in reader.frames(20)) == 10
            assert next(old, None) is None

    def test_leaves_no_file_open(self, clip: Path, tmp_path: Path) -> None:
        broken = overwrite(clip, tmp_path / "a.mp4", 11)

        def read(path: Path, num_frames: int) -> None:
            with VideoReader(str(path)) as reader:
                for _, _ in zip(range(num_frames), reader.frames(3), strict=False):
                    pass

        read(clip, 5)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            read(clip, 5)
            read(broken, 100)
            with pytest.raises(TooLargeError):
                probe(str(clip), max_pixels=1)
        assert len(list(Path("/proc/self/fd").iterdir())) == before

    @pytest.mark.slow
    def test_needs_no_more_memory_for_a_longer_video(self, tmp_path: Path) -> None:
        path = make_video(tmp_path / "long.mp4", 20_000, "mpeg4", g="100", b="300k")
        code = f"""
import resource
from fourdh_batch.video.decode import VideoReader
peaks = []
with VideoReader({str(path)!r}) as reader:
    for chunk in reader.chunks(32, score_shots=True):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks[-1] - peaks[len(peaks) // 10])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert float(done.stdout) < 4, done.stderr  # MiB

    def test_gives_signs_of_life(self, clip: Path) -> None:
        signs: list[int] = []
        with VideoReader(str(clip), on_packet=lambda: signs.append(1)) as reader:
            num_scanned = len(signs)
            assert num_scanned >= 30
            list(reader.frames())
        assert len(signs) >= num_scanned + 30


class TestDecord:
    def test_may_not_stream(self, clip: Path) -> None:
        with pytest.raises(DecoderRefusedError, match="cannot stream"):
            VideoReader(str(clip), decoder="decord")

    @pytest.mark.parametrize(
        ("name", "options", "reason"),
        [
            ("a.avi", {"codec": "mpeg4"}, "AVI"),
            ("b.ts", {"g": "250"}, "MPEG-TS with one keyframe"),
            ("c.mp4", {"shift": -5}, "edit list"),
            ("d.mkv", {"codec": "mpeg2video"}, "codec mpeg2video"),
            ("e.mp4", {"x264-params": "intra-refresh=1", "bf": "0"}, "refer to pictures before"),
            ("f.mp4", {"x264-params": "open-gop=1", "bf": "2"}, "refer to pictures before"),
            ("g.mkv", {"pix_fmt": "yuv420p10le"}, "more than 8 bits"),
        ],
    )
    def test_is_refused_where_it_would_be_wrong(
        self, folder: Path, name: str, options: dict[str, Any], reason: str
    ) -> None:
        path = make_video(folder / f"decord_{name}", 40, **options)
        with pytest.raises(DecoderRefusedError, match=reason):
            read_frames(str(path), 0, 5, decoder="decord")

    def test_is_refused_long_reads_and_opened_files(self, folder: Path, clip: Path) -> None:
        path = make_video(folder / "long.mp4", 300)
        with pytest.raises(DecoderRefusedError, match="more than 256 frames"):
            read_frames(str(path), 0, 300, decoder="decord")
        with clip.open("rb") as file, pytest.raises(DecoderRefusedError, match="needs a path"):
            read_frames(file, 0, 3, decoder="decord")

    def test_other_names_are_mistakes(self, clip: Path) -> None:
        with pytest.raises(ValueError, match="expected one of"):
            read_frames(str(clip), 0, 3, decoder="opencv")


def test_keyframes_are_where_the_makers_put_them(clip: Path) -> None:
    keys = [i for i, (_, _, is_key) in enumerate(packets_of(clip)) if is_key]
    assert keys == [0, 10, 20]
    assert {b - a for a, b in pairwise(keys)} == {10}

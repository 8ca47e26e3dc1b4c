"""Tiny videos whose every picture shows its own number, and ways to damage them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from fourdh_batch.types import U8

WIDTH, HEIGHT, FPS = 128, 96, 30
_BIT = 16  # side of a black or white square that holds one bit of the number
_NUM_BITS = WIDTH // _BIT


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> U8:
    """(height, width, 3): bits of `number` along the top, a moving colour ramp below."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([(x + 3 * number) % 256, (2 * y + number) % 256, (x + y) // 2 % 256], axis=2)
    for bit in range(_NUM_BITS):
        rgb[:_BIT, bit * _BIT : (bit + 1) * _BIT] = 255 if number >> bit & 1 else 0
    return rgb.astype(np.uint8)


def number_of(rgb: U8) -> int:
    """The number an upright picture shows."""
    squares = rgb[4 : _BIT - 4, : _NUM_BITS * _BIT].reshape(_BIT - 8, _NUM_BITS, _BIT, 3)
    means = squares[:, :, 4:-4].mean(axis=(0, 2, 3))
    assert np.all((means < 90) | (means > 165)), f"no number in this picture: {means}"
    return int(sum(1 << bit for bit in np.flatnonzero(means > 127)))


H264 = {"bf": "2", "g": "10", "sc_threshold": "0", "crf": "18", "preset": "veryfast"}


def make_video(
    path: Path,
    num_frames: int = 30,
    codec: str = "libx264",
    *,
    pts: Sequence[int] | None = None,
    pictures: Iterable[U8] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    shift: int = 0,
    cover: U8 | None = None,
    muxer: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Write a video of numbered pictures.

    Args:
        pts: times in 1/30 s, one after the other by default.
        rotation: clockwise degrees by which a player must turn the stored picture.
        shift: frames by which all times are moved; negative: an edit list hides the first ones.
        cover: cover art as a second video stream.
    """
    if codec == "libx264":
        options = {**H264, **options}
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream: Any = container.add_stream(codec, rate=FPS)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.thread_count = 1
        stream.time_base = Fraction(1, FPS)
        stream.options = options
        if rotation:
            stream.set_display_rotation(-rotation)
        art: Any = None
        if cover is not None:
            art = container.add_stream("mjpeg", rate=1)
            art.width, art.height = cover.shape[1], cover.shape[0]
            art.pix_fmt = "yuvj420p"
            art.disposition = Disposition.attached_pic
        numbered = (picture(i, *size) for i in range(num_frames))
        for number, rgb in enumerate(numbered if pictures is None else pictures):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = Fraction(1, FPS)
            for packet in stream.encode(frame):
                _mux(container, packet, shift)
        for packet in stream.encode(None):
            _mux(container, packet, shift)
        if cover is not None:
            frame = av.VideoFrame.from_ndarray(cover, format="rgb24")
            frame.pts = 0
            container.mux(art.encode(frame) + art.encode(None))
    return path


def _mux(container: Any, packet: Any, shift: int) -> None:
    ticks = round(shift / FPS / packet.time_base)
    packet.pts += ticks
    packet.dts += ticks
    container.mux(packet)


def packets_of(path: Path) -> list[tuple[int, int, bool]]:
    """(position of its data, bytes, keyframe) of the packets of a file's best video stream."""
    data = path.read_bytes()
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        packets = [p for p in container.demux(stream) if p.size]
        # Matroska's position is that of the block's header; MPEG-TS interleaves data and headers
        found = [data.find(bytes(p), max(0, p.pos)) for p in packets]
        return [
            (p.pos if at < 0 else at, p.size, p.is_keyframe)
            for p, at in zip(packets, found, strict=True)
        ]


def overwrite(source: Path, target: Path, packet: int, content: bytes | None = None) -> Path:
    """Copy a video with one packet zeroed, or overwritten from its start."""
    data = bytearray(source.read_bytes())
    position, size, _ = packets_of(source)[packet]
    content = bytes(size) if content is None else content[:size]
    data[position : position + len(content)] = content
    target.write_bytes(data)
    return target


def make_growing_video(path: Path, num_each: int = 20) -> Path:
    """MPEG-TS whose picture size doubles half-way, as a stream may that is edited together."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS)
        for part, scale in enumerate((1, 2)):
            encoder: Any = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height = scale * WIDTH, scale * HEIGHT
            encoder.pix_fmt = "yuv420p"
            encoder.time_base = Fraction(1, FPS)
            encoder.framerate = FPS
            encoder.thread_count = 1
            encoder.options = H264
            if part == 0:
                stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
                stream.options = H264
                stream.codec_context.open()
            packets = []
            for number in range(part * num_each, (part + 1) * num_each):
                rgb = picture(number, encoder.width, encoder.height)
                frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, FPS)
                packets += encoder.encode(frame)
            for packet in packets + encoder.encode(None):
                packet.stream, packet.time_base = stream, Fraction(1, FPS)
                container.mux(packet)
    return path


def make_audio(path: Path, cover: U8 | None = None) -> Path:
    """A second of silence, with cover art if given."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=48000)
        stream.layout = "mono"
        art: Any = None
        if cover is not None:
            art = container.add_stream("mjpeg", rate=1)
            art.width, art.height = cover.shape[1], cover.shape[0]
            art.pix_fmt = "yuvj420p"
            art.disposition = Disposition.attached_pic
        for number in range(40):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 48000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if cover is not None:
            container.mux(art.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
            container.mux(art.encode(None))
    return path

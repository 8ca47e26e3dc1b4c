"""What a video file holds, by opening it with care and reading its packets, not decoding them.

The scan costs some 200 times less than decoding. It says which frames there are, when they are
shown, where decoding can begin and whether the end is missing; one frame is decoded for the
display rotation.

Files nobody vouches for: only containers in `CONTAINERS` are opened, and only through FFmpeg's
file protocol (or from an opened file). A playlist, a script of file names or a still picture is
refused, whatever its name, and opens nothing else. The picture size is held against a limit when
the file is opened and by the decoder whenever it changes. (MPEG program streams and FLV name
their streams late: FFmpeg looks at a first picture before its size can be checked, and only the
memory limit of a child process helps.)
"""

from __future__ import annotations

import logging
import os
import stat
import struct
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import Enum
from errno import EACCES
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.stream import Disposition

from fourdh_batch.errors import (
    BadTimestampsError,
    CorruptVideoError,
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
from fourdh_batch.types import I64, Bool, VideoInfo

logger = logging.getLogger(__name__)

MAX_PIXELS = 8192 * 4352  # 8K cinema is 8192 x 4320; codecs round the height up

# FFmpeg's names. None of these demuxers opens another file (external references of MP4 are off by
# default); those that do (hls, concat, dash, image2 ...) and those of single pictures are missing.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"

MAX_REORDER_FRAMES = 16  # pictures a decoder can hold back (H.264 and HEVC, all levels)
MAX_REPEATED_TIMES = 0.1  # share of frames whose time repeats another's
TRUNCATION_TOLERANCE_S = 0.5  # headers round durations and may count a gap at the end
FIRST_FRAME_PACKETS = 64  # packets decoded at most, to see one picture
IO_BUFFER_BYTES = 1024**2  # read-ahead on opened files, e.g. from object storage

NO_TIME = -(2**63)

_STILLS = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# Types a top-level box of an ISO base media file (MP4, MOV) may begin with
_ISO_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof", b"sidx"}
_STILL_BRANDS = {"avif", "heic", "heix", "mif1"}  # AVIF and HEIF share the container
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]", b"<?xml")
# FFmpeg's HEVC decoder passes over errors unless told to report them. Files whose very first
# picture fails then (odd metadata, sound pictures) are read without.
_STRICT_CODECS = {"hevc"}


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """What the packets of a video say, in decode order or by frame.

    Packets are numbered in decode order, those without data left out.

    Attributes:
        info: see `VideoInfo`.
        stream_index: the stream read.
        pts: (F,) times of the frames shown, not decreasing, in ticks.
        packet: (F,) number of each frame's packet.
        key_packet: (K,) numbers of the packets where decoding can begin; at least one. Keyframes
            of which the first picture is not good are left out.
        key_frame: (K,) frame shown by each of them (the next one where it is not shown).
        key_pts: (K,) their times; `NO_TIME` where there is none.
        has_true_keys: no keyframe has pictures around it that refer across it.
        reorder_frames: a frame's references come out at most this many frames after it.
        coded_size_wh: as the decoder has it.
        order_is_truth: times cannot tell which frame came out of the decoder, only order can.
        seekable: times are unique and fit to find a keyframe by.
        is_strict: the decoder reports what it would else pass over.
        has_discards: some packets are decoded and not shown (edit list).
        ends_early: code and message if the file ends before its header says.
    """

    info: VideoInfo
    stream_index: int
    pts: I64
    packet: I64
    key_packet: I64
    key_frame: I64
    key_pts: I64
    has_true_keys: bool
    reorder_frames: int
    coded_size_wh: tuple[int, int]
    order_is_truth: bool
    seekable: bool
    is_strict: bool
    has_discards: bool
    ends_early: tuple[str, str] | None

    def seconds(self, pts: int) -> float:
        return float(pts * self.info.time_base)


def scan_video(
    source: str | BinaryIO,
    video_id: str,
    max_pixels: int,
    on_packet: Callable[[], None] | None,
    *,
    may_be_strict: bool = True,
) -> Scan:
    """Read all packets and decode the first frame. Raises: as `probe`."""
    video = video_id or name_of(source)
    pts, dts, flagged, keys = array("q"), array("q"), array("q"), array("q")
    has_true_keys = True
    discarded, hidden = bytearray(), bytearray()
    ends: dict[int, int] = {}  # stream: where its last packet ends, in its ticks
    failures: list[str] = []
    first: list[av.VideoFrame] = []
    num_decoded, last_is_corrupt = 0, False
    with opened(source, video, max_pixels) as container:
        stream = _video_stream(container, video)
        is_strict = may_be_strict and stream.codec_context.codec.canonical_name in _STRICT_CODECS
        codec = decoder_of(stream, max_pixels, is_strict)
        _check_size(codec, source, max_pixels, video)
        is_vp8 = codec.codec.canonical_name == "vp8"
        with closing(container.demux()) as packets:
            for packet in packets_with_data(packets, on_packet, failures):
                at = packet.dts if packet.pts is None else packet.pts
                if at is not None:
                    end = at + (packet.duration or 0)
                    ends[packet.stream_index] = max(end, ends.get(packet.stream_index, end))
                if packet.stream_index != stream.index:
                    continue
                if packet.is_keyframe:
                    flagged.append(len(pts))
                    kind = _kind_of_key(packet, codec)
                    has_true_keys = has_true_keys and kind is _Key.TRUE
                    if kind is not _Key.RECOVERY:
                        keys.append(len(pts))
                pts.append(NO_TIME if packet.pts is None else packet.pts)
                dts.append(NO_TIME if packet.dts is None else packet.dts)
                discarded.append(packet.is_discard)
                # A VP8 packet may hold a reference that is never shown: bit 4 is show_frame
                hidden.append(packet.is_discard or (is_vp8 and not memoryview(packet)[0] & 16))
                last_is_corrupt = packet.is_corrupt
                if flagged and not first and num_decoded < FIRST_FRAME_PACKETS:
                    num_decoded += 1
                    first = _decoded_or_none(codec, packet)
        if num_decoded and not first:
            first = _decoded_or_none(codec, None)
        if num_decoded and not first and is_strict:
            return scan_video(source, video_id, max_pixels, on_packet, may_be_strict=False)
        _check_size(codec, source, max_pixels, video)

        all_pts = np.frombuffer(pts, np.int64)
        is_discarded = np.frombuffer(discarded, np.bool_)
        ends_early = _missing_end(container, stream, ends, all_pts, last_is_corrupt, failures)
        if all(hidden):
            raise _nothing_shown(all_pts, ends_early, video)
        times, packet_of_frame, order_is_truth = _frames_of_packets(
            all_pts,
            np.frombuffer(dts, np.int64),
            ~np.frombuffer(hidden, np.bool_),
            # AVI stores no presentation times; what FFmpeg makes up follows the decoding order
            is_made_up=container.format.name == "avi" and codec.reorder_depth > 0,
            ticks_per_frame=_ticks_per_frame(stream),
            video=video,
        )
        num_repeated = int(np.count_nonzero(np.diff(times) == 0))
        in_decode_order = np.argsort(packet_of_frame)
        reorder = int(np.max(np.maximum.accumulate(in_decode_order) - in_decode_order))
        num_frames = len(times)
        if num_repeated > MAX_REPEATED_TIMES * num_frames or reorder > MAX_REORDER_FRAMES:
            raise BadTimestampsError(
                f"expected increasing presentation times, got {num_frames - num_repeated} "
                f"different ones for {num_frames} frames, up to {reorder} frames out of order",
                video=video,
            )
        key_packet = np.frombuffer(keys or flagged[:1] or array("q", [0]), np.int64)
        key_pts = all_pts[key_packet]
        cut_away = all_pts[is_discarded]
        time_base = Fraction(stream.time_base)
        shown = first[0] if first else None
        turns = round(shown.rotation / 90) % 4 if shown is not None else 0
        size = (codec.width, codec.height) if shown is None else (shown.width, shown.height)
        span = int(times[-1] - times[0]) * time_base
        info = VideoInfo(
            uri=name_of(source),
            container=container.format.name,
            codec=codec.codec.canonical_name,
            pix_fmt=codec.pix_fmt or "",
            width=size[turns % 2],
            height=size[1 - turns % 2],
            rotation_deg=90 * turns,
            num_frames=num_frames,
            num_frames_declared=stream.frames or None,
            num_keyframes=len(flagged),
            fps=float((num_frames - 1) / span) if span > 0 else None,
            duration_s=_header_duration_s(container, stream),
            time_base=time_base,
            decoder=f"PyAV {av.__version__} with FFmpeg {av.ffmpeg_version_info}",
        )
        return Scan(
            info=info,
            stream_index=stream.index,
            pts=times,
            packet=packet_of_frame,
            key_packet=key_packet,
            key_frame=np.searchsorted(
                packet_of_frame if order_is_truth else times,
                key_packet if order_is_truth else key_pts,
            ),
            key_pts=key_pts,
            has_true_keys=has_true_keys,
            reorder_frames=reorder,
            coded_size_wh=(codec.width, codec.height),
            order_is_truth=order_is_truth,
            seekable=not order_is_truth and num_repeated == 0 and bool(np.all(cut_away < times[0])),
            is_strict=is_strict,
            has_discards=len(cut_away) > 0,
            ends_early=ends_early,
        )


def read_header(source: str | BinaryIO, video_id: str, max_pixels: int) -> VideoInfo:
    """What the header claims, unchecked: no packet is read and no picture decoded.

    `num_frames` is by duration and rate where the header does not count, and 0 where it does not
    tell either; the size is that before the display rotation. Raises: as `probe`, where the file
    does not open.
    """
    video = video_id or name_of(source)
    with opened(source, video, max_pixels, decode_ahead=False) as container:
        stream = _video_stream(container, video)
        rate = stream.average_rate or stream.guessed_rate
        duration_s = _header_duration_s(container, stream)
        by_time = round(duration_s * rate) if duration_s and rate else 0
        codec = stream.codec_context
        return VideoInfo(
            uri=name_of(source),
            container=container.format.name,
            codec=codec.codec.canonical_name,
            pix_fmt=codec.pix_fmt or "",
            width=codec.width,
            height=codec.height,
            rotation_deg=0,
            num_frames=max(0, stream.frames or by_time),
            num_frames_declared=stream.frames or None,
            num_keyframes=0,
            fps=float(rate) if rate else None,
            duration_s=duration_s,
            time_base=Fraction(stream.time_base),
            decoder=f"PyAV {av.__version__} with FFmpeg {av.ffmpeg_version_info}",
        )


class _Key(Enum):
    """What a packet flagged as key is for a decoder that starts there."""

    TRUE = "nothing behind it refers to anything before it"
    OPEN = "good from its own picture on; pictures shown before it are not"
    RECOVERY = "good some pictures later; with B-frames FFmpeg misjudges when"


def _kind_of_key(packet: av.Packet, codec: av.VideoCodecContext) -> _Key:
    """By the units (NAL) of an H.264 or HEVC packet; keys of other codecs are true."""
    name = codec.codec.canonical_name
    if name not in ("h264", "hevc"):
        return _Key.TRUE
    units = list(_units(bytes(packet), codec.extradata or b"", 21 if name == "hevc" else 4))
    if name == "hevc":
        idr = {19, 20}
        return _Key.TRUE if any(u[0] >> 1 & 63 in idr for u in units) else _Key.OPEN
    if any(unit[0] & 31 == 5 for unit in units):  # IDR
        return _Key.TRUE
    is_late = any(unit[0] & 31 == 6 and _recovers_later(unit) for unit in units)
    return _Key.RECOVERY if is_late else _Key.OPEN


def _units(data: bytes, extradata: bytes, length_at: int) -> Iterator[bytes]:
    """Units of a packet: behind their lengths where avcC or hvcC says so, else start codes."""
    if len(extradata) <= length_at or extradata[0] != 1:
        yield from (unit for unit in data.split(b"\0\0\1")[1:] if unit)
        return
    num_bytes, at = (extradata[length_at] & 3) + 1, 0
    while at + num_bytes < len(data):
        begin = at + num_bytes
        at = begin + int.from_bytes(data[at:begin])
        if at == begin:  # not what an encoder writes
            return
        yield data[begin:at]


def _recovers_later(unit: bytes) -> bool:
    """Whether supplemental information (H.264 annex D) names a recovery point frames away."""
    at = 1
    while at + 2 < len(unit):
        kind, size = 0, 0
        while unit[at] == 255 and at + 2 < len(unit):
            kind, at = kind + 255, at + 1
        kind, at = kind + unit[at], at + 1
        while unit[at] == 255 and at + 1 < len(unit):
            size, at = size + 255, at + 1
        size, at = size + unit[at], at + 1
        if kind == 6 and at < len(unit):  # recovery point: its count is zero if bit one is set
            return not unit[at] & 0x80
        at += size
    return False


def _nothing_shown(pts: I64, ends_early: tuple[str, str] | None, video: str) -> VideoError:
    if len(pts) > 1 and np.all(pts == pts[0]):
        message = f"expected increasing presentation times, got one for {len(pts)} packets"
        return BadTimestampsError(message, video=video)
    if ends_early is not None and ends_early[0] == TruncatedVideoError.code:
        return TruncatedVideoError(f"expected frames, got none: {ends_early[1]}", video=video)
    return UndecodableError(
        f"expected frames, got none in {len(pts)} packets"
        f"{': ' + ends_early[1] if ends_early else ''}",
        video=video,
    )


def _frames_of_packets(
    pts: I64, dts: I64, is_shown: Bool, *, is_made_up: bool, ticks_per_frame: int | None, video: str
) -> tuple[I64, I64, bool]:
    """Which packet each frame comes from, and when it is shown.

    Args:
        pts, dts: (P,) by packet in decode order; `NO_TIME` where there is none.
        is_shown: (P,).
        is_made_up: the codec reorders pictures and the container does not store when to show
            them; then times that rise with the packets say nothing.
        ticks_per_frame: by the nominal rate, None if unknown.
    Returns:
        (F,) times, not decreasing; (F,) packets; whether only the order of decoding counts.
    Raises:
        BadTimestampsError: neither times nor a rate.
    """
    packet = np.flatnonzero(is_shown)
    pts, dts = pts[packet], dts[packet]
    is_made_up = is_made_up and len(pts) > 1 and bool(np.all(np.diff(pts) > 0))
    if not is_made_up and not np.any(pts == NO_TIME):
        order = np.argsort(pts, kind="stable")
        return pts[order], packet[order], False
    if not np.any(dts == NO_TIME) and np.all(np.diff(dts) > 0):
        return dts, packet, True
    if ticks_per_frame is None:
        raise BadTimestampsError("expected a time for every frame, got neither times nor a rate")
    return np.arange(len(packet), dtype=np.int64) * ticks_per_frame, packet, True


def _ticks_per_frame(stream: av.VideoStream) -> int | None:
    rate = stream.average_rate or stream.guessed_rate
    return max(1, round(1 / (rate * stream.time_base))) if rate else None


def _missing_end(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    ends: dict[int, int],
    pts: I64,
    last_is_corrupt: bool,
    failures: list[str],
) -> tuple[str, str] | None:
    """Code and message if the data end before the header says.

    The header's duration is that of the longest stream, so all streams count. A last frame may
    stand as long as the longest shown before it.
    """
    if failures:
        return CorruptVideoError.code, f"the container cannot be read on: {failures[0]}"
    if last_is_corrupt:
        return TruncatedVideoError.code, "the last packet is cut off"
    fewer = not stream.frames or len(pts) < stream.frames
    has_header = container.format.name in ("matroska,webm", "avi") or (
        container.format.name.startswith("mov") and fewer
    )
    if not has_header or container.duration is None:
        return None
    promised_s = container.duration / av.time_base
    end_s = max(
        (float(end * container.streams[i].time_base) for i, end in ends.items()), default=0.0
    )
    known = np.sort(pts[pts != NO_TIME])
    longest_s = float(np.max(np.diff(known), initial=0) * stream.time_base)
    if promised_s - end_s <= max(TRUNCATION_TOLERANCE_S, longest_s):
        return None
    message = f"expected {promised_s:.3f} s by the header, the data end at {end_s:.3f} s"
    return TruncatedVideoError.code, message


def _header_duration_s(
    container: av.container.InputContainer, stream: av.VideoStream
) -> float | None:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base


@contextmanager
def opened(
    source: str | BinaryIO, video: str, max_pixels: int, *, decode_ahead: bool = True
) -> Iterator[av.container.InputContainer]:
    """The container, closed in the end.

    Args:
        decode_ahead: let FFmpeg decode some pictures to describe the streams; that costs as much
            as decoding a large keyframe or two.
    Raises:
        as `probe`.
    """
    _check_source(source, video)
    file: str | BinaryIO
    if isinstance(source, str):
        file, protocols = f"file:{source}", "file"  # the prefix keeps FFmpeg from reading URLs
    else:
        source.seek(0)
        file, protocols = source, "none"
    options = {
        "format_whitelist": CONTAINERS,
        "protocol_whitelist": protocols,
        "max_pixels": str(max_pixels),  # for the decoders FFmpeg opens while it looks at streams
    }
    if not decode_ahead:
        options["skip_frame"] = "all"
    try:
        container = av.open(
            file,
            options=options,
            metadata_errors="replace",
            buffer_size=IO_BUFFER_BYTES,
        )
    except MemoryError:
        raise
    except av.FFmpegError as error:
        raise _not_opened(source, error, video) from error
    with container:
        yield container


def _check_source(source: str | BinaryIO, video: str) -> None:
    """Refuse what is not a file with bytes in it, without opening it: a pipe would block."""
    if not isinstance(source, str):
        if source.seek(0, os.SEEK_END) == 0:
            raise EmptyFileError("expected a video, got 0 bytes", video=video)
        return
    if "://" in source:
        raise NotAVideoError(
            f"expected a path of a local file or an opened file, got the URL {source!r}; "
            "open it through fourdh_batch.storage",
            video=video,
        )
    try:
        found = Path(source).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        kind = "a broken link" if Path(source).is_symlink() else "nothing there"
        raise NotAVideoError(f"expected a file at {source!r}, got {kind}", video=video) from error
    except OSError as error:
        raise StorageError(f"video {video}: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise NotAVideoError(f"expected a file at {source!r}, got {kind}", video=video)
    if found.st_size == 0:
        raise EmptyFileError("expected a video, got 0 bytes", video=video)


def _not_opened(
    source: str | BinaryIO, error: av.FFmpegError, video: str
) -> VideoError | StorageError:
    """Why FFmpeg would not open a file, by a look at its beginning."""
    if error.errno == EACCES:
        return StorageError(f"video {video}: {said(error)}")
    head = _head(source, 64)
    if head.lstrip().startswith(_PLAYLISTS):
        message = "expected a video, got a playlist; what it names is not opened"
        return NotAVideoError(message, video=video)
    if head[4:8] in _ISO_BOXES:
        message = "MP4 whose sample table (moov) is missing, cut off or damaged"
        return NoIndexError(message, video=video)
    return NotAVideoError(
        f"expected one of the containers {CONTAINERS}: {said(error)}", video=video
    )


def _head(source: str | BinaryIO, num_bytes: int) -> bytes:
    if isinstance(source, str):
        with Path(source).open("rb") as file:
            return file.read(num_bytes)
    position = source.tell()
    source.seek(0)
    head = source.read(num_bytes)
    source.seek(position)
    return head


def _video_stream(container: av.container.InputContainer, video: str) -> av.VideoStream:
    if container.metadata.get("major_brand", "").strip() in _STILL_BRANDS:
        raise NotAVideoError("expected a video, got a still picture", video=video)
    streams = [s for s in container.streams.video if not s.disposition & _STILLS]
    best = container.streams.best("video")
    if not streams:
        raise NoVideoStreamError(
            f"expected moving pictures, got streams: "
            f"{', '.join(s.type for s in container.streams) or 'none'}",
            video=video,
        )
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise UndecodableError("expected a codec with a decoder, got an unknown one", video=video)
    return stream


def decoder_of(stream: av.VideoStream, max_pixels: int, is_strict: bool) -> av.VideoCodecContext:
    """The stream's decoder with one thread, so that damage looks the same every time."""
    codec = stream.codec_context
    codec.thread_count = 1
    codec.thread_type = "NONE"
    codec.options = {"max_pixels": str(max_pixels)}
    if is_strict:
        codec.options["err_detect"] = "explode"
    return codec


def _check_size(
    codec: av.VideoCodecContext, source: str | BinaryIO, max_pixels: int, video: str
) -> None:
    width, height = codec.width, codec.height
    if width == height == 0:  # FFmpeg forgets sizes it finds impossible; AVI has it at byte 64
        head = _head(source, 72)
        if head[:4] == b"RIFF" and head[24:28] == b"avih" and len(head) == 72:
            width, height = struct.unpack_from("<II", head, 64)
    if width * height > max_pixels:
        raise TooLargeError(
            f"expected at most {max_pixels} pixels, got {width} x {height}", video=video
        )


def packets_with_data(
    packets: Iterator[av.Packet],
    on_packet: Callable[[], None] | None,
    failures: list[str] | None = None,
) -> Iterator[av.Packet]:
    """Packets up to the end or to where the container cannot be read on, noted in `failures`.

    Packets without data are left out: a decoder takes one for the end of the stream.
    """
    while True:
        try:
            packet = next(packets, None)
        except MemoryError:
            raise
        except av.FFmpegError as error:
            logger.debug("no more packets: %s", said(error))
            if failures is not None:
                failures.append(said(error))
            return
        if packet is None:
            return
        if on_packet is not None:
            on_packet()
        if packet.size:
            yield packet


def _decoded_or_none(codec: av.VideoCodecContext, packet: av.Packet | None) -> list[av.VideoFrame]:
    try:
        frames: list[av.VideoFrame] = codec.decode(packet)
    except MemoryError:
        raise
    except av.FFmpegError:
        return []
    return frames


def said(error: av.FFmpegError) -> str:
    return error.strerror or type(error).__name__


def name_of(source: str | BinaryIO) -> str:
    return source if isinstance(source, str) else str(getattr(source, "name", "<opened file>"))

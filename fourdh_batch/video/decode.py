"""Videos in, frames with index and time out.

A video is read by one streaming reader in one pass; memory does not grow with its length, apart
from 16 bytes per frame for the table of times. Before anything is decoded all packets are scanned
(`video/scan.py`), and every decoded frame must fit the scan.

What is read
    The stream FFmpeg takes for the best video stream, but never cover art, thumbnails or stills.
    Frames are turned upright by their display rotation, converted to 8-bit RGB whatever their
    depth, and keep their presentation times: variable rates, late starts, frames cut away by an
    edit list. In AVI files whose codec reorders pictures the stored times follow the order of
    decoding; there the order in which the decoder hands pictures out is the truth, and a read
    from the middle decodes from the beginning.

Damage
    Decoders paper over damage, and their inventions differ with the number of threads and with
    the point where reading began. From the first packet that fails, gives no picture or gives
    one marked as damaged, nothing is handed out until the next keyframe, where the decoder
    starts afresh. Frames wait until every frame that may have served as their reference has come
    out sound; if damage shows before the first frame of a group of pictures has gone out, the
    whole group is dropped. `DecodeSummary.damage` lists what is missing; the rest is bit-exact,
    but for damage that the codec itself cannot notice: few carry checksums, and a flipped bit
    may well be another valid picture.

decord is a second reader for short reads only, see `read_frames`.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, cast

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import VideoReformatter

from fourdh_batch.errors import (
    BadTimestampsError,
    CorruptVideoError,
    DecoderRefusedError,
    EmptyWindowError,
    TooLargeError,
    TruncatedVideoError,
    UndecodableError,
    VideoError,
)
from fourdh_batch.types import U8, Damage, DecodeSummary, FrameChunk, VideoInfo
from fourdh_batch.video.scan import (
    MAX_PIXELS,
    NO_TIME,
    Scan,
    decoder_of,
    name_of,
    opened,
    packets_with_data,
    said,
    scan_video,
)

logger = logging.getLogger(__name__)

DECODERS = ("auto", "pyav", "decord")
Allocate = Callable[[tuple[int, int, int, int]], U8]

CHUNK_FRAMES = 32
MAX_CHUNK_BYTES = 128 * 1024**2

MAX_DECORD_FRAMES = 256  # decord decodes ahead without bound while it is open
DECORD_CODECS = {"h264", "hevc", "vp9", "mpeg4"}

# FFmpeg's filters for counter-clockwise quarter turns; faster than numpy.rot90
_TURN_FILTERS: dict[int, tuple[tuple[str, str | None], ...]] = {
    1: (("transpose", "cclock"),),
    2: (("hflip", None), ("vflip", None)),
    3: (("transpose", "clock"),),
}

# Codecs of which every packet becomes a picture, so that a missing one is damage; MPEG-4 has
# packets that say "as before"
_EVERY_PACKET_SHOWS = {"h264", "hevc"}
_NO_PICTURE = (CorruptVideoError.code, "the decoder gave no picture")
_BEGINS_INSIDE = (CorruptVideoError.code, "the file begins inside a group of pictures")

_NEVER = 2**62  # number of a packet or frame that does not come

_ERROR_OF_CODE: dict[str, type[VideoError]] = {
    BadTimestampsError.code: BadTimestampsError,
    CorruptVideoError.code: UndecodableError,  # said where not one frame is left
    TooLargeError.code: TooLargeError,
    TruncatedVideoError.code: TruncatedVideoError,
}


def probe(source: str | BinaryIO, *, video_id: str = "", max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """What a video says of itself, checked by a scan of its packets.

    Args:
        source: path of a local file, or an opened seekable binary file.
        video_id: name for messages; the path where empty.
        max_pixels: refuse pictures with more pixels.
    Raises:
        VideoError: `EmptyFileError`, `NotAVideoError` (also for a missing path, a directory, a
            pipe, a URL, a playlist, a still), `NoVideoStreamError`, `NoIndexError`,
            `TooLargeError`, `BadTimestampsError`, `TruncatedVideoError` or `UndecodableError`.
            Damage inside the pictures shows only when they are decoded.
        StorageError: the file is there and may not be read.
    """
    return scan_video(source, video_id, max_pixels, None).info


@dataclass(frozen=True, slots=True, eq=False)
class DecodedFrame:
    """One frame as it leaves the decoder.

    Attributes:
        frame_index: 0-based in presentation order.
        pts: ticks of the stream's time base.
        pts_s: seconds.
        native: PyAV's frame, in the pixel format of the file and not rotated.
        quarter_turns: counter-clockwise turns that make it upright, 0 to 3.
    """

    frame_index: int
    pts: int
    pts_s: float
    native: av.VideoFrame
    quarter_turns: int
    _converter: _RgbConverter

    @property
    def size_hw(self) -> tuple[int, int]:
        """(height, width) in pixels, upright."""
        height, width = self.native.height, self.native.width
        return (width, height) if self.quarter_turns % 2 else (height, width)

    def rgb(self, out: U8 | None = None) -> U8:
        """The upright picture, (H, W, 3) uint8; written to `out` where given."""
        if out is None:
            out = np.empty((*self.size_hw, 3), np.uint8)
        out[...] = self._converter.convert(self.native, self.quarter_turns)
        return out


class VideoReader:
    """Frames of one video, in order, in bounded memory.

    One decoding thread; many videos at once are the way to use many cores.

    Args:
        source: path of a local file, or an opened seekable binary file that nothing else uses
            while frames are read.
        video_id: name for messages and chunks; messages say the path where it is empty.
        max_pixels: refuse pictures with more pixels.
        decoder: ``auto`` and ``pyav`` are PyAV; ``decord`` is refused here, see `read_frames`.
        on_packet: called for every packet scanned or decoded, as a sign of life.
    Raises:
        VideoError, StorageError: as `probe`.

    Attributes:
        info: see `VideoInfo`.
    """

    def __init__(
        self,
        source: str | BinaryIO,
        *,
        video_id: str = "",
        max_pixels: int = MAX_PIXELS,
        decoder: str = "auto",
        on_packet: Callable[[], None] | None = None,
    ) -> None:
        self._source = source
        self._video_id = video_id
        self._video = video_id or name_of(source)
        self._max_pixels = max_pixels
        self._on_packet = on_packet
        check_decoder(decoder)
        if decoder == "decord":
            raise DecoderRefusedError(
                "decord decodes ahead without bound and cannot stream; expected decoder 'pyav' "
                "or 'auto', or read_frames for a short read",
                video=self._video,
            )
        self._scan = scan_video(source, video_id, max_pixels, on_packet)
        self.info = self._scan.info
        self._running: Generator[DecodedFrame] | None = None
        self._summary: DecodeSummary | None = None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the pass that is running, if any, and free its decoder."""
        if self._running is not None:
            self._running.close()
            self._running = None

    @property
    def summary(self) -> DecodeSummary:
        """How the last pass ended.

        Raises:
            RuntimeError: the last pass has not reached the end.
        """
        if self._summary is None:
            raise RuntimeError(f"video {self._video}: read to the end before asking for a summary")
        return self._summary

    def frames(self, start: int = 0) -> Iterator[DecodedFrame]:
        """One pass over the frames from `start` on; ends the pass before it.

        A pass that begins in the middle gives the same frames, bit for bit, as one from the
        beginning.

        Raises:
            VideoError: from the beginning not one frame could be had (`UndecodableError`,
                `TruncatedVideoError`, `TooLargeError`, `BadTimestampsError`). Where some could,
                `summary.damage` says which are missing.
            MemoryError: the limit of this process.
        """
        return self._begin(start, (0, self.info.num_frames), with_previous=False)

    def window(self, start_s: float | None, end_s: float | None) -> tuple[int, int]:
        """The first frame shown at `start_s` or later, and the first shown at `end_s` or later.

        Args:
            start_s, end_s: seconds, as in `pts_s`; None: from the beginning, to the end.
        Raises:
            EmptyWindowError: no frame lies between.
        """

        def first_at(time_s: float) -> int:
            return bisect_left(self._scan.pts.tolist(), time_s, key=self._scan.seconds)

        num_frames = self.info.num_frames
        begin = 0 if start_s is None else first_at(start_s)
        end = num_frames if end_s is None else first_at(end_s)
        if begin >= end:
            asked = f"{start_s or 0:g} s to {'the end' if end_s is None else f'{end_s:g} s'}"
            first, last = (self._scan.seconds(int(self._scan.pts[i])) for i in (0, -1))
            raise EmptyWindowError(
                f"expected frames from {asked}, got {num_frames} frames shown from {first:g} s "
                f"to {last:g} s",
                video=self._video,
            )
        return begin, end

    def chunks(
        self,
        chunk_frames: int = CHUNK_FRAMES,
        *,
        start: int = 0,
        start_s: float | None = None,
        end_s: float | None = None,
        max_chunk_bytes: int = MAX_CHUNK_BYTES,
        score_shots: bool = False,
        allocate: Allocate | None = None,
    ) -> Iterator[FrameChunk]:
        """One pass over the frames from `start` on, in chunks.

        A chunk holds one picture size and ends early where the size changes.

        Args:
            chunk_frames: frames in a chunk, at most.
            start: first frame.
            start_s, end_s: only frames of this window, see `window`. They keep the index and
                the times they have in the whole video.
            max_chunk_bytes: RGB bytes in a chunk, at most (but one frame at least).
            score_shots: fill `FrameChunk.shot_scores`. In a pass from the middle the first score
                compares with the frame an uninterrupted pass (of the same window) would have
                compared with.
            allocate: makes the (T, H, W, 3) uint8 memory a chunk is written to. By default
                memory is used again once no array looks into it any more.
        Raises:
            as `frames`, `EmptyWindowError`.
        """
        check_chunking(chunk_frames, max_chunk_bytes, start)
        begin, end = self.window(start_s, end_s)
        start = max(start, begin)
        allocate = allocate or _ReusedMemory().allocate
        score = None
        if score_shots:
            from fourdh_batch.video.shots import ContentScore  # OpenCV takes 0.1 s to import

            score = ContentScore().push
        chunk: _OpenChunk | None = None
        for frame in self._begin(start, (begin, end), with_previous=score_shots):
            if frame.frame_index < start:
                assert score is not None
                score(frame.rgb())
                continue
            if chunk is not None and chunk.size_hw != frame.size_hw:
                done, chunk = chunk.close(), None
                yield done
                del done
            if chunk is None:
                height, width = frame.size_hw
                capacity = min(
                    chunk_frames,
                    max(1, max_chunk_bytes // (3 * height * width)),
                    end - frame.frame_index,
                )
                shape = (capacity, height, width, 3)
                chunk = _OpenChunk(self._video_id, allocate(shape), score)
            if chunk.add(frame):
                done, chunk = chunk.close(), None
                yield done
                del done
        if chunk is not None:
            yield chunk.close()

    def _begin(
        self, start: int, window: tuple[int, int], *, with_previous: bool
    ) -> Iterator[DecodedFrame]:
        if start < 0:
            raise ValueError(f"start: expected a frame index of 0 or more, got {start}")
        self.close()
        self._summary = None
        self._running = self._pass(start, window, with_previous)
        return self._running

    def _pass(
        self, start: int, window: tuple[int, int], with_previous: bool
    ) -> Generator[DecodedFrame]:
        """Frames of the window from `start` on, and the last good one ahead of `start` if asked.

        Verified seek: decode from the last keyframe at or before the frame wanted; unless its
        own picture comes first, go back to earlier keyframes and at last to the beginning.
        """
        if start >= window[1]:
            decoding = _Decoding(self._scan, self._max_pixels, self._on_packet)
            yield from self._hand_out(None, iter(()), decoding, start, window, False)
            return
        wanted = max(window[0], start - 1) if with_previous else start
        for key in self._entries(wanted):
            decoding = _Decoding(self._scan, self._max_pixels, self._on_packet)
            with closing(decoding.run(self._source, self._video, key)) as frames:
                first = next(frames, None)
                if key is not None and (first is None or first[0] != self._scan.key_frame[key]):
                    logger.debug("video %s: key %d is no clean start", self._video, key)
                    continue
                yield from self._hand_out(first, frames, decoding, start, window, with_previous)
                return

    def _entries(self, wanted: int) -> Iterator[int | None]:
        """Keyframes to try, nearest first in growing steps back; None is the beginning."""
        if self._scan.seekable:
            key = int(np.searchsorted(self._scan.key_frame, wanted, side="right")) - 1
            step = 1
            while key > 0:
                yield key
                key -= step
                step *= 2
        yield None

    def _hand_out(
        self,
        first: tuple[int, av.VideoFrame] | None,
        frames: Iterator[tuple[int, av.VideoFrame]],
        decoding: _Decoding,
        start: int,
        window: tuple[int, int],
        with_previous: bool,
    ) -> Iterator[DecodedFrame]:
        begin, end = window
        scan, converter = self._scan, _RgbConverter()
        damage: list[Damage] = []
        expected, num_handed = start, 0
        previous: tuple[int, av.VideoFrame] | None = None

        def decoded(index: int, native: av.VideoFrame) -> DecodedFrame:
            pts = int(scan.pts[index])
            turns = round(native.rotation / 90) % 4
            return DecodedFrame(index, pts, scan.seconds(pts), native, turns, converter)

        for index, native in frames if first is None else chain((first,), frames):
            if index < start:
                if index >= begin:
                    previous = index, native
                continue
            if with_previous and previous is not None:
                yield decoded(*previous)
            with_previous, previous = False, None
            if index > expected:
                last = min(index, end) - 1
                damage.append(Damage(*decoding.cause_of_loss(expected), expected, last))
                expected = last + 1
            if expected == end:
                break
            yield decoded(index, native)
            expected, num_handed = index + 1, num_handed + 1
            if expected == end < scan.info.num_frames:
                break

        reaches_end = end == scan.info.num_frames
        if expected < end:
            cause = decoding.stopped or scan.ends_early or decoding.cause_of_loss(expected)
            damage.append(Damage(*cause, expected, None if reaches_end else end - 1))
        elif reaches_end and scan.ends_early is not None:
            damage.append(Damage(*scan.ends_early, max(start, end), None))
        if num_handed == 0 and start == begin:
            raise _ERROR_OF_CODE[damage[-1].code](
                f"expected {end - begin} frames, got none: {damage[-1].message}",
                video=self._video,
                frame_index=begin,
                stage="decode",
            )
        self._summary = DecodeSummary(self.info, num_handed, tuple(damage))


def read_frames(
    source: str | BinaryIO,
    start: int,
    stop: int,
    *,
    decoder: str = "auto",
    video_id: str = "",
    max_pixels: int = MAX_PIXELS,
    on_packet: Callable[[], None] | None = None,
) -> FrameChunk:
    """Frames [start, stop) of a video, equal to those of a sequential read.

    With ``decoder="decord"`` decord reads them, as a check of the default by other hands. It is
    opened, asked once and closed, and only for files where it was found right: it is silently
    wrong or endless on others. It can hang or crash the process it runs in: call it through
    `fourdh_batch.video.isolate.read_frames_isolated`.

    Args:
        source: path of a local file, or an opened seekable binary file (not for decord).
        start: first frame.
        stop: frame after the last; at most the number of frames.
        decoder: ``auto`` is PyAV.
        video_id: name for messages and for the chunk.
        max_pixels: refuse pictures with more pixels.
        on_packet: called for every packet scanned or decoded, as a sign of life.
    Returns:
        The frames, without those lost to damage. `shot_scores` is None.
    Raises:
        ValueError: a range outside the video, or one in which the picture size changes.
        VideoError: as `VideoReader`; `CorruptVideoError` if no frame of the range is left;
            `DecoderRefusedError` with the reason why decord would be wrong here.
    """
    check_decoder(decoder)
    with VideoReader(
        source, video_id=video_id, max_pixels=max_pixels, on_packet=on_packet
    ) as reader:
        num_frames = reader.info.num_frames
        if not 0 <= start < stop <= num_frames:
            raise ValueError(f"expected 0 <= start < stop <= {num_frames}, got [{start}, {stop})")
        if decoder == "decord":
            return _read_by_decord(source, video_id, reader._scan, start, stop)
        chunks = reader.chunks(stop - start, start=start, max_chunk_bytes=_NEVER)
        chunk = next(chunks, None)
        num_wanted = 0 if chunk is None else int(np.searchsorted(chunk.frame_index, stop))
        if chunk is None or num_wanted == 0:
            raise CorruptVideoError(
                f"expected frames {start} to {stop - 1}, all are lost",
                video=video_id or name_of(source),
                frame_index=start,
                stage="decode",
            )
        if num_wanted == chunk.num_frames < stop - start:
            rest = next(chunks, None)
            if rest is not None and rest.frame_index[0] < stop:
                raise ValueError(
                    f"frames {start} to {stop - 1}: expected one picture size, got "
                    f"{chunk.image_size_wh} and {rest.image_size_wh}; read them apart"
                )
        return FrameChunk(
            video_id=video_id,
            frame_index=chunk.frame_index[:num_wanted],
            pts=chunk.pts[:num_wanted],
            pts_s=chunk.pts_s[:num_wanted],
            rgb=chunk.rgb[:num_wanted],
        )


def check_chunking(chunk_frames: int, max_chunk_bytes: int, start: int) -> None:
    """Raise ValueError for chunks that cannot be."""
    for name, value, least in (
        ("chunk_frames", chunk_frames, 1),
        ("max_chunk_bytes", max_chunk_bytes, 1),
        ("start", start, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")


def check_decoder(decoder: str) -> None:
    """Raise ValueError for an unknown decoder."""
    if decoder not in DECODERS:
        raise ValueError(f"decoder: expected one of {DECODERS}, got {decoder!r}")


class _OpenChunk:
    """A chunk being filled."""

    def __init__(self, video_id: str, rgb: U8, score: Callable[[U8], float] | None) -> None:
        self._video_id = video_id
        self._rgb = rgb
        self._score = score
        self._times: list[tuple[int, int, float, float]] = []
        self.size_hw = rgb.shape[1:3]

    def add(self, frame: DecodedFrame) -> bool:
        """Convert a frame into its place; True when the chunk is full."""
        row = frame.rgb(out=self._rgb[len(self._times)])
        score = 0.0 if self._score is None else self._score(row)
        self._times.append((frame.frame_index, frame.pts, frame.pts_s, score))
        return len(self._times) == len(self._rgb)

    def close(self) -> FrameChunk:
        index, pts, pts_s, scores = zip(*self._times, strict=True)
        return FrameChunk(
            video_id=self._video_id,
            frame_index=np.array(index, np.int64),
            pts=np.array(pts, np.int64),
            pts_s=np.array(pts_s, np.float64),
            rgb=self._rgb[: len(index)],
            shot_scores=None if self._score is None else np.array(scores, np.float64),
        )


class _ReusedMemory:
    """Memory for chunks, used again when the arrays made of it are gone.

    Fresh pages for every chunk would cost a fifth of the time of decoding 720p.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def allocate(self, shape: tuple[int, int, int, int]) -> U8:
        num_bytes = prod(shape)
        memory = self._free.pop() if self._free else None
        if memory is None or len(memory) < num_bytes:
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
        pixels = np.frombuffer(memory, np.uint8, num_bytes)
        # All views of `pixels` hold on to it, because what it is made of is no array.
        weakref.finalize(pixels, self._free.append, memory).atexit = False
        return pixels.reshape(shape)


class _RgbConverter:
    """Native frames to upright 8-bit RGB, in one thread."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._turner: Graph | None = None
        self._turner_is_for = (0, 0, 0)

    def convert(self, native: av.VideoFrame, quarter_turns: int) -> U8:
        """(H, W, 3) uint8, a view whose rows need not be adjacent."""
        picture = self._reformatter.reformat(native, format="rgb24", threads=1)
        if quarter_turns:
            picture = self._turn(picture, quarter_turns)
        return cast(U8, picture.to_ndarray())

    def _turn(self, picture: av.VideoFrame, quarter_turns: int) -> av.VideoFrame:
        wanted = picture.width, picture.height, quarter_turns
        if self._turner is None or self._turner_is_for != wanted:
            graph = Graph()
            graph.threads = 1
            nodes = [
                graph.add_buffer(
                    width=picture.width,
                    height=picture.height,
                    format=picture.format,
                    time_base=Fraction(1, 1),
                )
            ]
            nodes += [graph.add(name, setting) for name, setting in _TURN_FILTERS[quarter_turns]]
            graph.link_nodes(*nodes, graph.add("buffersink")).configure()
            self._turner, self._turner_is_for = graph, wanted
        self._turner.vpush(picture)
        return self._turner.vpull()


class _Loss(NamedTuple):
    """What comes from packet `bad_from` on is bad unless it is shown from `good_from` on."""

    bad_from: int
    good_from: int
    cause: tuple[str, str]


class _Decoding:
    """One pass of a decoder, and which of its frames may go out.

    Attributes:
        stopped: code and message if the pass ended before the packets did.
    """

    def __init__(self, scan: Scan, max_pixels: int, on_packet: Callable[[], None] | None) -> None:
        self._scan = scan
        self._max_pixels = max_pixels
        self._on_packet = on_packet
        self.stopped: tuple[str, str] | None = None
        self._held: deque[tuple[int, av.VideoFrame]] = deque()
        self._released = -1  # last frame that went out
        self._fresh_from = 0  # frame shown by the keyframe at which the decoder started afresh
        self._taken: int | None = None  # last frame held since then
        self._next_frame = 0  # expected from the decoder
        self._skip_to = int(scan.key_packet[0])  # packets before it are not decoded
        self._damage: _Loss | None = None  # the last one met
        self._lost = [_Loss(_NEVER, int(scan.key_frame[0]), _BEGINS_INSIDE)]

    def run(
        self, source: str | BinaryIO, video: str, key: int | None
    ) -> Generator[tuple[int, av.VideoFrame]]:
        """Good frames with their index, from the given keyframe or from the beginning."""
        scan = self._scan
        # These containers store all that the scan relies on; others are read as they were scanned
        stores_all = scan.info.container.startswith(("mov", "matroska"))
        with ExitStack() as stack:
            container = stack.enter_context(
                opened(source, video, self._max_pixels, decode_ahead=not stores_all)
            )
            codec = container.streams[scan.stream_index].codec_context
            if (codec.width, codec.height) != scan.coded_size_wh:  # its header lies
                stack.close()
                container = stack.enter_context(opened(source, video, self._max_pixels))
            stream = container.streams[scan.stream_index]
            self._codec = decoder_of(stream, self._max_pixels, scan.is_strict)
            if key is not None:
                try:
                    container.seek(int(scan.key_pts[key]), stream=stream)
                except av.FFmpegError as error:
                    logger.debug("video %s: no seek to key %d: %s", video, key, said(error))
                    return
            with closing(container.demux(stream)) as packets:
                yield from self._decode(packets, number=0 if key is None else None)

    def _decode(
        self, packets: Iterator[av.Packet], number: int | None
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        """Args: number: of the first packet; None: unknown, find it by the first key's time."""
        hold = self._scan.reorder_frames + 1
        for packet in packets_with_data(packets, self._on_packet):
            if number is None:
                number = self._locate(packet)
                if number is None:
                    continue
            current, number = number, number + 1
            if current < self._skip_to:
                continue
            self._feed(packet, current)
            while len(self._held) > hold:
                yield self._release()
            if self.stopped is not None or self._skip_to == _NEVER:
                break
        else:
            self._take(self._drain(), _NEVER)
        while self._held:
            yield self._release()

    def _locate(self, packet: av.Packet) -> int | None:
        """Number of the first packet after a seek, if it is a keyframe of the scan."""
        if not packet.is_keyframe:
            return None
        found = np.flatnonzero(self._scan.key_pts == packet.pts)
        if len(found) == 0:
            return None
        number = int(self._scan.key_packet[found[0]])
        self._next_frame = int(self._scan.key_frame[found[0]])
        # Pictures shown before the keyframe lack their references
        self._lost.append(_Loss(0, self._next_frame, _NO_PICTURE))
        self._skip_to = number
        return number

    def _feed(self, packet: av.Packet, number: int) -> None:
        if packet.is_corrupt:
            self._take(self._lose(number, number, "the container marks it as damaged"), number)
            return
        try:
            frames = self._codec.decode(packet)
        except MemoryError:
            raise
        except av.FFmpegError as error:
            code, message = CorruptVideoError.code, f"decoding failed: {said(error)}"
            width, height = self._codec.width, self._codec.height
            if width * height > self._max_pixels:
                code = TooLargeError.code
                message = f"expected at most {self._max_pixels} pixels, got {width} x {height}"
            frames = self._lose(number, number, message, code)
        self._take(frames, number)

    def _take(self, frames: list[av.VideoFrame], fed: int) -> None:
        """Hold the good ones of what the decoder gave after packet number `fed`."""
        queue = deque(frames)
        while queue and self.stopped is None:
            native = queue.popleft()
            index = self._index(native)
            if index is None or self._is_lost(index):
                continue
            if native.is_corrupt:
                if index >= self._scan.key_frame[0]:  # ahead of it references are missing
                    first_bad = int(self._scan.packet[index])
                    queue += self._lose(first_bad, fed, "the decoder marks its picture as damaged")
                continue
            if index <= (self._released if self._taken is None else self._taken):
                self._stop_at(native.pts)
                break
            queue += self._lose_skipped(index, fed)
            if not self._is_lost(index):
                self._held.append((index, native))
                self._taken = index

    def _lose_skipped(self, index: int, fed: int) -> list[av.VideoFrame]:
        """Frames that should have come out before this one did not: their packets are bad."""
        packet = self._scan.packet
        if self._taken is None or self._taken < self._fresh_from:
            if self._fresh_from == 0 or index <= self._fresh_from:
                return []
            return self._lose(int(packet[self._fresh_from]), fed, "its picture did not come first")
        if self._scan.info.codec not in _EVERY_PACKET_SHOWS:
            return []
        skipped = [i for i in range(self._taken + 1, index) if not self._is_lost(i)]
        return self._lose(int(packet[skipped].min()), fed, _NO_PICTURE[1]) if skipped else []

    def _index(self, native: av.VideoFrame) -> int | None:
        """Frame index of a decoded picture; None for one that is not shown."""
        index, pts = self._next_frame, self._scan.pts
        if not self._scan.order_is_truth and (index >= len(pts) or pts[index] != native.pts):
            index = int(np.searchsorted(pts, NO_TIME if native.pts is None else native.pts))
            if index == len(pts) or pts[index] != native.pts:
                if not self._scan.has_discards:
                    self._stop_at(native.pts)
                return None
        elif index >= len(pts):
            self._stop_at(native.pts)
            return None
        self._next_frame = index + 1
        return index

    def _stop_at(self, pts: int | None) -> None:
        self.stopped = (
            BadTimestampsError.code,
            f"expected a frame after frame {self._next_frame - 1}, got one with time {pts}",
        )

    def _is_lost(self, index: int) -> bool:
        return any(
            index < loss.good_from and self._scan.packet[index] >= loss.bad_from
            for loss in self._lost
        )

    def cause_of_loss(self, index: int) -> tuple[str, str]:
        """Code and message for a frame that did not go out, asked as soon as the next one has."""
        return next((loss.cause for loss in self._lost if loss.good_from > index), _NO_PICTURE)

    def _lose(
        self, first_bad: int, fed: int, message: str, code: str = CorruptVideoError.code
    ) -> list[av.VideoFrame]:
        """Distrust what follows from a bad packet, up to the next keyframe.

        Args:
            first_bad: number of the packet.
            fed: number of the packet that was decoded last, or would have been.
        Returns:
            What the decoder still held, if it had to be emptied.
        """
        scan = self._scan
        group = int(np.searchsorted(scan.key_packet, first_bad, side="right")) - 1
        after = group + 1
        nothing_out = self._released < scan.key_frame[group]
        bad_from = int(scan.key_packet[group]) if nothing_out else first_bad
        if scan.order_is_truth:  # pictures still in the decoder cannot be told apart
            bad_from = 0
            after = int(np.searchsorted(scan.key_packet, fed, side="right"))
        resume, good_from = _NEVER, _NEVER
        if after < len(scan.key_packet):
            resume, good_from = int(scan.key_packet[after]), int(scan.key_frame[after])
        loss = _Loss(bad_from, good_from, (code, f"packet {first_bad}: {message}"))
        before = self._damage
        if nothing_out and before is not None and before.good_from == scan.key_frame[group]:
            # The group before is lost as well: one loss, however many groups it takes in
            self._lost.remove(before)
            loss = before._replace(good_from=good_from)
        self._damage = loss
        self._lost.append(loss)
        self._held = deque(item for item in self._held if not self._is_lost(item[0]))
        if resume <= fed or self._skip_to > fed:  # already past it, or already emptied
            return []
        self._skip_to = resume
        inside = self._drain()
        self._next_frame, self._fresh_from, self._taken = good_from, good_from, None
        return [] if scan.order_is_truth else inside

    def _drain(self) -> list[av.VideoFrame]:
        """The pictures still in the decoder, which then is as new."""
        try:
            frames: list[av.VideoFrame] = self._codec.decode(None)
        except MemoryError:
            raise
        except av.FFmpegError as error:
            logger.debug("lost what the decoder held: %s", said(error))
            frames = []
        self._codec.flush_buffers()
        return frames

    def _release(self) -> tuple[int, av.VideoFrame]:
        self._lost = [loss for loss in self._lost if loss.good_from > self._released]
        index, native = self._held.popleft()
        self._released = index
        return index, native


def _read_by_decord(
    source: str | BinaryIO, video_id: str, scan: Scan, start: int, stop: int
) -> FrameChunk:
    """Frames [start, stop) by decord, opened, asked once and closed."""
    video = video_id or name_of(source)
    reason = _why_not_decord(source, scan, stop - start)
    if reason:
        raise DecoderRefusedError(
            f"decord would be wrong or hang here: {reason}; use decoder 'auto'", video=video
        )
    import decord  # loads FFmpeg libraries of its own; most processes never need them

    try:
        path = str(Path(str(source)).absolute())  # its FFmpeg would take "concat:a" for a protocol
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        if len(reader) != scan.info.num_frames:
            raise DecoderRefusedError(
                f"expected {scan.info.num_frames} frames, decord counts {len(reader)}", video=video
            )
        rgb = reader.get_batch(list(range(start, stop))).asnumpy()
        del reader
    except decord.DECORDError as error:
        raise DecoderRefusedError(f"decord failed: {error}", video=video) from error
    pts = scan.pts[start:stop].copy()
    return FrameChunk(
        video_id=video_id,
        frame_index=np.arange(start, stop, dtype=np.int64),
        pts=pts,
        pts_s=np.array([scan.seconds(t) for t in pts.tolist()]),
        rgb=rgb,
    )


def _why_not_decord(source: str | BinaryIO, scan: Scan, num_frames: int) -> str:
    """Why decord is not to be trusted with a file; empty where it is."""
    info = scan.info
    refusals = {
        "it needs a path": not isinstance(source, str),
        f"more than {MAX_DECORD_FRAMES} frames at once": num_frames > MAX_DECORD_FRAMES,
        "AVI": info.container == "avi",
        f"codec {info.codec}": info.codec not in DECORD_CODECS,
        "more than 8 bits": info.pix_fmt.endswith(("le", "be")),
        "MPEG-TS with one keyframe": info.container == "mpegts" and info.num_keyframes < 2,
        "no duration in the header": info.duration_s is None,
        "an edit list cuts frames away": scan.has_discards,
        "times do not order the frames": not scan.seekable,
        "keyframes that refer to pictures before them": not scan.has_true_keys,
        f"the header counts {info.num_frames_declared} frames, the scan {info.num_frames}": (
            info.num_frames_declared not in (None, info.num_frames)
        ),
        "the file ends early": scan.ends_early is not None,
    }
    reasons = [reason for reason, applies in refusals.items() if applies]
    return ", ".join(reasons)

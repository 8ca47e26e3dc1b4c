"""The decoding half of the pipeline: a video in, chunks of frames out. Imports no model library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from fourdh_batch.config import VideoConfig
from fourdh_batch.errors import StorageError
from fourdh_batch.pipeline.corpus import UNREADABLE, Video
from fourdh_batch.storage import STALL_TIMEOUT_S, is_local, local_path, open_read, redact_uri
from fourdh_batch.types import DecodeSummary, FrameChunk
from fourdh_batch.video.decode import VideoReader
from fourdh_batch.video.isolate import decode_chunks, decode_isolated, run_isolated

_MIB = 1 << 20


def read_chunks(
    video: Video, config: VideoConfig, *, start: int = 0
) -> Iterator[FrameChunk | DecodeSummary]:
    """Decode a video in this process, from frame `start` on: its chunks, then how it ended.

    Of a video with a window only the frames of the window are read; `frame_index` and times stay
    those of the file, so that the first frame need not be frame 0. A remote video is read by
    ranges as the decoder asks for them.

    Raises:
        VideoError: nothing (more) can be read.
        StorageError: the file has gone, or its store is so slow that whoever waits for a chunk
            would soon blame the video (`video.stall_timeout_s`).
    """
    options = _reader_options(video, config)
    _check_still_there(video)
    if is_local(video.uri):
        with VideoReader(str(local_path(video.uri)), **options) as reader:
            yield from reader.chunks(**_chunk_options(video, config, start))
            yield reader.summary
        return
    patience = _Patience(video, config.stall_timeout_s)
    with (
        _open_remote(video.uri, video.video_id, patience.check) as file,
        VideoReader(file, **options) as reader,
    ):
        for chunk in reader.chunks(**_chunk_options(video, config, start)):
            yield chunk
            patience.begin()
        yield reader.summary


class _Patience:
    """With a store: ends just before the one with the decoder does, which blames the video."""

    def __init__(self, video: Video, stall_timeout_s: float) -> None:
        self._video = video
        self._limit_s = max(stall_timeout_s / 2, stall_timeout_s - STALL_TIMEOUT_S)
        self.begin()

    def begin(self) -> None:
        """Somebody waits for a chunk from now on."""
        self._since = time.monotonic()

    def check(self) -> None:
        """Raises: StorageError."""
        if time.monotonic() - self._since > self._limit_s:
            raise StorageError(
                f"video {self._video.video_id}: {redact_uri(self._video.uri)}: the store is too "
                f"slow, no chunk of frames within {self._limit_s:g} s"
            )


def read_chunks_isolated(
    video: Video, config: VideoConfig, *, start: int = 0
) -> Iterator[FrameChunk | DecodeSummary]:
    """The same from a child process that may crash, hang or eat memory without harm here.

    Raises:
        VideoError: also when the child dies or hands out nothing for too long.
    """
    options = {**_reader_options(video, config), **_chunk_options(video, config, start)}
    _check_still_there(video)
    memory_limit_bytes = config.decoder_memory_mb * _MIB or None
    if is_local(video.uri):
        yield from decode_isolated(
            str(local_path(video.uri)),
            **options,
            stall_timeout_s=config.stall_timeout_s,
            memory_limit_bytes=memory_limit_bytes,
        )
        return
    yield from run_isolated(
        f"{__name__}:remote_chunks",
        {"uri": video.uri, **options},
        video=video.video_id,
        stall_timeout_s=config.stall_timeout_s,
        memory_limit_bytes=memory_limit_bytes,
    )


def remote_chunks(
    allocate: Any, on_packet: Callable[[], None], *, uri: str, video_id: str, **options: Any
) -> Iterator[FrameChunk | DecodeSummary]:
    """What the child of `read_chunks_isolated` runs for a remote video."""
    with _open_remote(uri, video_id, on_packet) as file:
        yield from decode_chunks(allocate, on_packet, source=file, video_id=video_id, **options)


def _check_still_there(video: Video) -> None:
    """A file that was read when planning and is gone now is a fault of the store, not a video."""
    gone = is_local(video.uri) and not local_path(video.uri).exists()
    if gone and not video.fingerprint.startswith(UNREADABLE):
        raise StorageError(f"video {video.video_id}: {video.uri} has gone since it was planned")


def _open_remote(uri: str, video_id: str, on_progress: Callable[[], None]) -> Any:
    try:
        return open_read(uri, on_progress=on_progress)
    except FileNotFoundError as error:
        raise StorageError(
            f"video {video_id}: {redact_uri(uri)} has gone since it was planned"
        ) from error


def _reader_options(video: Video, config: VideoConfig) -> dict[str, Any]:
    return {
        "video_id": video.video_id,
        "max_pixels": int(config.max_megapixels * 1e6),
        "decoder": config.decoder,
    }


def _chunk_options(video: Video, config: VideoConfig, start: int) -> dict[str, Any]:
    return {
        "start": start,
        "start_s": video.start_s,
        "end_s": video.end_s,
        "chunk_frames": config.chunk_frames,
        "max_chunk_bytes": config.max_chunk_mb * _MIB,
        "score_shots": config.detect_shots,
    }

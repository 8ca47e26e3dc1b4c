"""The decoding half of the pipeline: a video in, chunks of frames out. Imports no model library."""

from __future__ import annotations

from collections.abc import Iterator

from fourdh_batch.config import VideoConfig
from fourdh_batch.pipeline.plan import Video
from fourdh_batch.types import DecodeSummary, FrameChunk
from fourdh_batch.video.decode import VideoReader
from fourdh_batch.video.isolate import decode_isolated

_MIB = 1 << 20


def read_chunks(video: Video, config: VideoConfig) -> Iterator[FrameChunk | DecodeSummary]:
    """Decode a video in this process: its chunks, then how it ended.

    Raises:
        VideoError: nothing (more) can be read.
    """
    with VideoReader(
        video.uri,
        video_id=video.video_id,
        max_pixels=int(config.max_megapixels * 1e6),
        decoder=config.decoder,
    ) as reader:
        yield from reader.chunks(
            config.chunk_frames,
            max_chunk_bytes=config.max_chunk_mb * _MIB,
            score_shots=config.detect_shots,
        )
        yield reader.summary


def read_chunks_isolated(video: Video, config: VideoConfig) -> Iterator[FrameChunk | DecodeSummary]:
    """The same from a child process that may crash, hang or eat memory without harm here.

    Raises:
        VideoError: also when the child dies or hands out nothing for too long.
    """
    yield from decode_isolated(
        video.uri,
        video_id=video.video_id,
        chunk_frames=config.chunk_frames,
        max_chunk_bytes=config.max_chunk_mb * _MIB,
        score_shots=config.detect_shots,
        decoder=config.decoder,
        max_pixels=int(config.max_megapixels * 1e6),
        stall_timeout_s=config.stall_timeout_s,
        memory_limit_bytes=config.decoder_memory_mb * _MIB or None,
    )

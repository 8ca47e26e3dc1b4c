"""Decoding in a child process that may crash, hang or be killed without harm to its caller.

The child is a fresh interpreter (nothing is forked, so the caller may have threads) that imports
the reader and nothing else of weight. What it makes crosses in shared memory without a name
(memfd): the child decodes straight into blocks of it, the caller maps the same pages, and the
kernel frees them with the last mapping, however the processes end. A block is used again when no
array of the caller looks into it any more, because new pages would cost more than copying.
Control runs over a socket pair as JSON; nothing is unpickled.

    caller                                      child
    credit for one chunk, blocks freed  ──▶     makes the next chunk, waits for a credit again
    chunk, summary or error             ◀──     header on the socket, contents in shared memory
    reads the counter                   ◀──     counts packets (shared memory)
    holds a pipe to the child's stdin   ──▶     the kernel ends the child when it closes

Three things end the child at once: closing the generator, a counter that stands still for too
long while the caller waits, and the end of the caller, even by SIGKILL (the pipe closes).
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from errno import ENOMEM
from fractions import Fraction
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fourdh_batch import errors
from fourdh_batch.errors import DecodeStalledError, FourdhError, VideoError, WorkerDiedError
from fourdh_batch.types import U8, Damage, DecodeSummary, FrameChunk, VideoInfo
from fourdh_batch.video.decode import (
    CHUNK_FRAMES,
    MAX_CHUNK_BYTES,
    Allocate,
    VideoReader,
    check_chunking,
    check_decoder,
    read_frames,
)
from fourdh_batch.video.scan import MAX_PIXELS

logger = logging.getLogger(__name__)

Item = FrameChunk | DecodeSummary

STALL_TIMEOUT_S = 60.0
_POLLS_PER_TIMEOUT = 8  # how often a waiting caller looks at the counter
_EXIT_TIMEOUT_S = 5.0  # for a child that has said all it had to say
_MAX_HEADER_BYTES = 65536
_MAX_FREED = 1000  # blocks named in one message

# Before numpy: its linear algebra would start threads and reserve address space for each
_CHILD = (
    "import json, os, sys; os.environ['OPENBLAS_NUM_THREADS'] = '1'; "
    "task = json.loads(sys.argv[1]); sys.path[:] = task['path']; "
    "from fourdh_batch.video.isolate import run_child; run_child(task)"
)


def decode_isolated(
    source: str,
    *,
    video_id: str = "",
    chunk_frames: int = CHUNK_FRAMES,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    score_shots: bool = False,
    start: int = 0,
    start_s: float | None = None,
    end_s: float | None = None,
    decoder: str = "auto",
    max_pixels: int = MAX_PIXELS,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    memory_limit_bytes: int | None = None,
    prefetch_chunks: int = 1,
) -> Iterator[Item]:
    """The chunks of a video and then its summary, decoded in a child process.

    Args:
        source: path of a local file.
        video_id: name for messages and chunks.
        chunk_frames, max_chunk_bytes, score_shots, start, start_s, end_s: see
            `VideoReader.chunks`.
        decoder, max_pixels: see `VideoReader`.
        stall_timeout_s: longest time without a packet read or decoded while the caller waits.
        memory_limit_bytes: address space the child may take beyond what it starts with, its
            chunks included; None for no limit.
        prefetch_chunks: chunks decoded ahead of the caller, at most.
    Yields:
        `FrameChunk`s, then one `DecodeSummary`.
    Raises:
        VideoError, StorageError: as `VideoReader`, with the same fields.
        DecodeStalledError: no packet within `stall_timeout_s`.
        WorkerDiedError: the child was killed, crashed, failed, or met its memory limit.
        ValueError: settings that cannot be.
    """
    check_chunking(chunk_frames, max_chunk_bytes, start)
    check_decoder(decoder)
    return run_isolated(
        f"{__name__}:decode_chunks",
        {
            "source": source,
            "video_id": video_id,
            "chunk_frames": chunk_frames,
            "max_chunk_bytes": max_chunk_bytes,
            "score_shots": score_shots,
            "start": start,
            "start_s": start_s,
            "end_s": end_s,
            "decoder": decoder,
            "max_pixels": max_pixels,
        },
        video=video_id or source,
        stall_timeout_s=stall_timeout_s,
        memory_limit_bytes=memory_limit_bytes,
        prefetch_chunks=prefetch_chunks,
    )


def read_frames_isolated(
    source: str,
    start: int,
    stop: int,
    *,
    decoder: str = "auto",
    video_id: str = "",
    max_pixels: int = MAX_PIXELS,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    memory_limit_bytes: int | None = None,
) -> FrameChunk:
    """`read_frames` in a child process: the only safe way to use decord.

    Raises:
        as `decode_isolated`; a range outside the video ends as `WorkerDiedError`.
    """
    check_decoder(decoder)
    items = run_isolated(
        f"{__name__}:decode_range",
        {
            "source": source,
            "start": start,
            "stop": stop,
            "decoder": decoder,
            "video_id": video_id,
            "max_pixels": max_pixels,
        },
        video=video_id or source,
        stall_timeout_s=stall_timeout_s,
        memory_limit_bytes=memory_limit_bytes,
        prefetch_chunks=0,
    )
    (chunk,) = items
    assert isinstance(chunk, FrameChunk)
    return chunk


def decode_chunks(
    allocate: Allocate,
    on_packet: Callable[[], None],
    *,
    source: str,
    video_id: str,
    decoder: str,
    max_pixels: int,
    **chunking: Any,
) -> Iterator[Item]:
    """What the child of `decode_isolated` runs."""
    with VideoReader(
        source,
        video_id=video_id,
        decoder=decoder,
        max_pixels=max_pixels,
        on_packet=on_packet,
    ) as reader:
        yield from reader.chunks(**chunking, allocate=allocate)
        yield reader.summary


def decode_range(
    allocate: Allocate, on_packet: Callable[[], None], **arguments: Any
) -> Iterator[Item]:
    """What the child of `read_frames_isolated` runs."""
    yield read_frames(**arguments, on_packet=on_packet)


def run_isolated(
    maker: str,
    arguments: dict[str, Any],
    *,
    video: str,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    memory_limit_bytes: int | None = None,
    prefetch_chunks: int = 1,
) -> Iterator[Item]:
    """Run a maker of chunks in a child process and yield what it makes.

    Args:
        maker: ``module:function``; the child calls ``function(allocate, on_packet,
            **arguments)``, where `allocate` makes shared memory for pictures and `on_packet` is
            to be called as a sign of life.
        arguments: what JSON can hold.
        video: for messages.
        stall_timeout_s, memory_limit_bytes, prefetch_chunks: see `decode_isolated`.
    """
    child = _Child(maker, arguments, memory_limit_bytes)
    next_frame = 0
    try:
        child.allow(prefetch_chunks)
        while True:
            child.allow(1)
            if not child.wait(stall_timeout_s):
                raise DecodeStalledError(
                    f"expected a sign of life every {stall_timeout_s:g} s, got none; "
                    "the decoding process was killed",
                    video=video,
                    frame_index=next_frame,
                    stage="decode",
                )
            header = child.receive()
            kind = header.get("kind")
            if kind == "chunk":
                chunk = child.chunk_of(header)
                next_frame = int(chunk.frame_index[-1]) + 1
                yield chunk
                del chunk
            elif kind == "summary":
                yield _summary_of(header["summary"])
            elif kind == "error":
                raise _error_of(header, memory_limit_bytes, video, next_frame)
            elif kind == "end":
                child.finish()
                return
            else:
                raise WorkerDiedError(
                    f"the decoding process {child.epitaph()}",
                    video=video,
                    frame_index=next_frame,
                    stage="decode",
                )
    finally:
        child.kill()


class _Child:
    """The caller's end of a child process."""

    def __init__(
        self, maker: str, arguments: dict[str, Any], memory_limit_bytes: int | None
    ) -> None:
        self._blocks: dict[int, mmap.mmap] = {}
        self._freed: deque[int] = deque()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        counter = os.memfd_create("progress")
        try:
            os.ftruncate(counter, 8)
            self._counter = np.frombuffer(mmap.mmap(counter, 8), np.int64)
            task = {
                "path": [entry or str(Path.cwd()) for entry in sys.path],
                "maker": maker,
                "arguments": arguments,
                "memory_limit_bytes": memory_limit_bytes,
                "socket": theirs.fileno(),
                "counter": counter,
            }
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), counter),
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
            os.close(counter)

    def allow(self, num_chunks: int) -> None:
        """Let the child make so many more chunks, in these blocks among others."""
        num_freed = min(len(self._freed), _MAX_FREED)
        freed = [self._freed.popleft() for _ in range(num_freed)]
        try:
            for _ in range(num_chunks):
                self._socket.send(json.dumps(freed).encode())
                freed = []
        except BrokenPipeError:
            logger.debug("the child ended before its credit arrived")

    def wait(self, timeout_s: float) -> bool:
        """Wait for a message; False if the child shows no sign of life for `timeout_s`."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        seen, since = int(self._counter[0]), time.monotonic()
        while not poll.poll(1000 * timeout_s / _POLLS_PER_TIMEOUT):
            now, at = int(self._counter[0]), time.monotonic()
            if now != seen:
                seen, since = now, at
            elif at - since >= timeout_s:
                return False
        return True

    def receive(self) -> dict[str, Any]:
        """The next message; an empty one if the child has gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _MAX_HEADER_BYTES, 1)
        except ConnectionResetError:  # it left credit unread; its last words come after this
            data, fds, _, _ = socket.recv_fds(self._socket, _MAX_HEADER_BYTES, 1)
        header: dict[str, Any] = json.loads(data) if data else {}
        for fd in fds:
            if header["kind"] == "chunk":
                self._blocks[header["block"]] = _mapped(fd)
            else:
                header.update(json.loads(_mapped(fd)[:]))
            os.close(fd)
        return header

    def chunk_of(self, header: dict[str, Any]) -> FrameChunk:
        """The chunk a header tells of; its block is freed with the last array that needs it."""
        for block in header["dropped"]:
            del self._blocks[block]
        memory = self._blocks[header["block"]]
        num_frames, height, width, _ = header["shape"]
        pictures = np.frombuffer(memory, np.uint8, num_frames * height * width * 3)
        weakref.finalize(pictures, self._freed.append, header["block"]).atexit = False
        at = header["times_at"]

        def times(row: int, dtype: type[np.int64] | type[np.float64]) -> Any:
            return np.frombuffer(memory, dtype, num_frames, at + row * 8 * num_frames).copy()

        return FrameChunk(
            video_id=header["video_id"],
            frame_index=times(0, np.int64),
            pts=times(1, np.int64),
            pts_s=times(2, np.float64),
            rgb=pictures.reshape(header["shape"]),
            shot_scores=times(3, np.float64) if header["is_scored"] else None,
        )

    def finish(self) -> None:
        """Let a child that has said "end" leave by itself."""
        try:
            self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning("a decoding process did not exit; killing it")

    def epitaph(self) -> str:
        """How a child that closed its socket ended."""
        self.finish()
        status = self._process.poll()
        if status is None:
            return "closed its connection"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"exited with status {status} before the end, see its standard error"

    def kill(self) -> None:
        """End the child now and leave nothing behind."""
        self._process.kill()
        try:
            self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # it waits inside the kernel, say for a lost disk
            logger.warning("decoding process %d was killed and lingers", self._process.pid)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._socket.close()


def run_child(task: dict[str, Any]) -> None:
    """The child's main function; see `run_isolated`."""
    _end_with_the_caller()
    control = socket.socket(fileno=task["socket"])
    counter = np.frombuffer(mmap.mmap(task["counter"], 8), np.int64)
    if task["memory_limit_bytes"] is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * mmap.PAGESIZE + task["memory_limit_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def on_packet() -> None:
        counter[0] += 1

    module, function = task["maker"].split(":")
    memory = _SharedMemory()
    try:
        items = getattr(import_module(module), function)(
            memory.allocate, on_packet, **task["arguments"]
        )
        while credit := control.recv(_MAX_HEADER_BYTES):
            memory.free(json.loads(credit))
            item = next(items, None)
            on_packet()
            if item is None:
                control.send(json.dumps({"kind": "end"}).encode())
                break
            if isinstance(item, FrameChunk):
                memory.send_chunk(control, item)
            else:
                _send_text(control, "summary", {"summary": asdict(item)})
            del item
    except FourdhError as error:
        _send_text(control, "error", _described(error))
    except MemoryError:
        _send_text(control, "error", {"class": "MemoryError"})
    os._exit(0)  # tearing down the interpreter would take longer than starting it


def _end_with_the_caller() -> None:
    """Have the kernel end this process, whatever it does, when standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what Ctrl-C means
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # ends the process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([0], [], [], 0)[0]:  # it closed before the signal was set
        os._exit(1)


class _SharedMemory:
    """Blocks the child puts pictures and times into; the caller maps the same pages."""

    def __init__(self) -> None:
        self._blocks: dict[int, mmap.mmap] = {}
        self._num_made = 0
        self._free: set[int] = set()
        self._dropped: list[int] = []
        self._unsent: dict[int, int] = {}  # block: descriptor the caller has not got yet
        self._current: tuple[int, U8] | None = None

    def allocate(self, shape: tuple[int, int, int, int]) -> U8:
        """(T, H, W, 3) uint8 in a block with room for the times behind it."""
        num_bytes = _times_at(prod(shape)) + 4 * 8 * shape[0]
        block = next((b for b in self._free if len(self._blocks[b]) >= num_bytes), None)
        if block is None:
            self._drop_free_blocks()  # too small
            self._num_made += 1
            block = self._num_made
            fd = os.memfd_create("chunk")
            os.ftruncate(fd, num_bytes)
            self._blocks[block] = _mapped(fd)
            self._unsent[block] = fd
        self._free.discard(block)
        pictures = np.frombuffer(self._blocks[block], np.uint8, prod(shape)).reshape(shape)
        self._current = block, pictures
        return pictures

    def free(self, blocks: list[int]) -> None:
        """The caller needs these blocks no more."""
        self._free.update(blocks)

    def send_chunk(self, control: socket.socket, chunk: FrameChunk) -> None:
        """Hand a chunk over; its pictures are copied only if they lie elsewhere."""
        if self._current is None or self._current[1].ctypes.data != chunk.rgb.ctypes.data:
            num_frames, height, width, _ = chunk.rgb.shape
            self.allocate((num_frames, height, width, 3))[...] = chunk.rgb
        assert self._current is not None
        block, pictures = self._current
        at = times_at = _times_at(pictures.size)
        for values in (chunk.frame_index, chunk.pts, chunk.pts_s, chunk.shot_scores):
            if values is not None:
                np.frombuffer(self._blocks[block], values.dtype, len(values), at)[...] = values
                at += values.nbytes
        header = {
            "kind": "chunk",
            "video_id": chunk.video_id,
            "block": block,
            "dropped": self._dropped,
            "shape": chunk.rgb.shape,
            "times_at": times_at,
            "is_scored": chunk.shot_scores is not None,
        }
        fds = [self._unsent.pop(block)] if block in self._unsent else []
        socket.send_fds(control, [json.dumps(header).encode()], fds)
        for fd in fds:
            os.close(fd)
        self._dropped, self._current = [], None

    def _drop_free_blocks(self) -> None:
        for block in self._free:
            del self._blocks[block]
        self._dropped += self._free
        self._free.clear()


def _times_at(num_bytes: int) -> int:
    """Where the times begin behind so many bytes of pictures."""
    return -(-num_bytes // 8) * 8


def _mapped(fd: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, os.fstat(fd).st_size)
    except OSError as error:
        if error.errno == ENOMEM:
            raise MemoryError(str(error)) from error
        raise


def _send_text(control: socket.socket, kind: str, text: dict[str, Any]) -> None:
    """A message of any length; a list of damage can be longer than the socket takes at once."""
    data = json.dumps(text, default=str).encode()
    fd = os.memfd_create("text")
    os.write(fd, data)
    socket.send_fds(control, [json.dumps({"kind": kind}).encode()], [fd])
    os.close(fd)


def _summary_of(text: dict[str, Any]) -> DecodeSummary:
    info = {**text["info"], "time_base": Fraction(text["info"]["time_base"])}
    return DecodeSummary(
        info=VideoInfo(**info),
        num_frames_decoded=text["num_frames_decoded"],
        damage=tuple(Damage(**entry) for entry in text["damage"]),
    )


def _described(error: FourdhError) -> dict[str, Any]:
    if isinstance(error, VideoError):
        fields = {
            "video": error.video,
            "frame_index": error.frame_index,
            "stage": error.stage,
        }
        return {"class": type(error).__name__, "message": error.message, "fields": fields}
    return {"class": type(error).__name__, "message": str(error), "fields": {}}


def _error_of(
    text: dict[str, Any], memory_limit_bytes: int | None, video: str, frame_index: int
) -> FourdhError:
    if text["class"] == "MemoryError":
        limit = "" if memory_limit_bytes is None else f" of {memory_limit_bytes} bytes"
        return WorkerDiedError(
            f"the decoding process met its memory limit{limit}",
            video=video,
            frame_index=frame_index,
            stage="decode",
        )
    error: FourdhError = getattr(errors, text["class"])(text["message"], **text["fields"])
    return error

"""What the headers of many files say, asked in child processes that a file may kill.

One child opens many files, one after the other. A file at which it dies, hangs or meets its
memory limit is marked, and another child goes on behind it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any

from fourdh_batch.errors import FourdhError, VideoError
from fourdh_batch.storage import is_local, local_path, open_read, redact_uri
from fourdh_batch.types import Damage, DecodeSummary, VideoInfo
from fourdh_batch.video.isolate import run_isolated
from fourdh_batch.video.scan import MAX_PIXELS, read_header

FILES_PER_CHILD = 200
MAX_TASK_CHARACTERS = 50_000  # of addresses; Linux takes 128 KiB in one argument
MAX_CHILDREN = 8
STALL_TIMEOUT_S = 30.0
MEMORY_LIMIT_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Header:
    """What a header claims; None is unknown.

    Attributes:
        num_frames: of the whole file.
        fps: frames per second.
        width, height: pixels, before the display rotation.
        problem: why nothing is known: code of the error.
    """

    num_frames: int | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    problem: str = ""


def read_headers(
    uris: Sequence[str],
    *,
    max_pixels: int = MAX_PIXELS,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    maker: str = f"{__name__}:headers_of",
) -> Iterator[Header]:
    """What the header of each file says, in order; files that do not open say why.

    Args:
        uris: local or remote addresses.
        max_pixels: larger pictures are a problem.
        stall_timeout_s: longest time that opening one file may take.
        memory_limit_bytes: address space of the child beyond what it starts with.
        maker: what the child runs, see `run_isolated`.
    """
    done = 0
    while done < len(uris):
        rest = list(uris[done : done + _task_length(uris, done)])
        items = run_isolated(
            maker,
            {"uris": rest, "max_pixels": max_pixels},
            video=redact_uri(rest[0]),
            stall_timeout_s=stall_timeout_s,
            memory_limit_bytes=memory_limit_bytes,
        )
        num_said = 0
        try:
            for item in items:
                assert isinstance(item, DecodeSummary)
                num_said += 1
                yield _header_of(item)
        except (VideoError, MemoryError) as error:  # the file behind those told killed it
            num_said += 1
            yield Header(problem=getattr(error, "code", "MEMORY"))
        done += num_said


def read_headers_in_parallel(
    uris: Iterator[tuple[str, str]], *, num_children: int = 0, **options: Any
) -> Iterator[tuple[str, Header]]:
    """The same from several children, for any number of files.

    Args:
        uris: (key, address).
        num_children: at once; 0: one per core, up to `MAX_CHILDREN`.
        options: of `read_headers`.
    Returns:
        (key, header), in order.
    """
    num_children = num_children or min(MAX_CHILDREN, os.cpu_count() or 1)

    def ask(batch: list[tuple[str, str]]) -> list[tuple[str, Header]]:
        headers = read_headers([uri for _, uri in batch], **options)
        return [(key, header) for (key, _), header in zip(batch, headers, strict=True)]

    ahead: deque[Future[list[tuple[str, Header]]]] = deque()
    with ThreadPoolExecutor(num_children) as pool:
        while batch := list(islice(uris, FILES_PER_CHILD)):
            ahead.append(pool.submit(ask, batch))
            if len(ahead) > 2 * num_children:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def headers_of(
    allocate: Any, on_packet: Callable[[], None], *, uris: list[str], max_pixels: int
) -> Iterator[DecodeSummary]:
    """What the child of `read_headers` runs: one summary per file, problems as damage."""
    for uri in uris:
        on_packet()
        try:
            if is_local(uri):
                yield DecodeSummary(read_header(str(local_path(uri)), "", max_pixels), 0)
            else:
                with open_read(uri) as file:
                    yield DecodeSummary(read_header(file, redact_uri(uri), max_pixels), 0)
        except (FourdhError, OSError) as error:
            code = getattr(error, "code", type(error).__name__)
            yield DecodeSummary(_NOTHING, 0, (Damage(code, "", 0, None),))


_NOTHING = VideoInfo("", "", "", "", 0, 0, 0, 0, None, 0, None, None, Fraction(1), "")


def _header_of(said: DecodeSummary) -> Header:
    if said.damage:
        return Header(problem=said.damage[0].code)
    info = said.info
    return Header(info.num_frames or None, info.fps, info.width or None, info.height or None)


def _task_length(uris: Sequence[str], start: int) -> int:
    """How many files from `start` on one child is told of."""
    total = 0
    for count, uri in enumerate(uris[start : start + FILES_PER_CHILD]):
        total += len(uri) * 6 + 8  # as JSON, in the worst case
        if count and total > MAX_TASK_CHARACTERS:
            return count
    return min(FILES_PER_CHILD, len(uris) - start)

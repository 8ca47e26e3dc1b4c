"""Makers of chunks that misbehave, for the child process of `fourdh_batch.video.isolate`."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fourdh_batch.types import FrameChunk
from fourdh_batch.video.decode import Allocate


def chunk(number: int, num_frames: int = 2, rgb: Any = None) -> FrameChunk:
    """Chunk number `number`: its pictures are filled with its number."""
    index = np.arange(num_frames) + number * num_frames
    if rgb is None:
        rgb = np.empty((num_frames, 4, 6, 3), np.uint8)
    rgb[...] = number % 256
    return FrameChunk("v", index, 10 * index, index / 3.0, rgb)


def count(
    allocate: Allocate, on_packet: Callable[[], None], *, num_chunks: int, log: str = ""
) -> Iterator[FrameChunk]:
    """Good chunks in shared memory, noting in a file how many were asked for."""
    for number in range(num_chunks):
        if log:
            with Path(log).open("a") as file:
                file.write(f"{number}\n")
        yield chunk(number, rgb=allocate((2, 4 + number % 3, 6, 3)))


def copied(
    allocate: Allocate, on_packet: Callable[[], None], *, num_chunks: int
) -> Iterator[FrameChunk]:
    """Good chunks in memory of their own."""
    for number in range(num_chunks):
        yield chunk(number)


def then(
    allocate: Allocate, on_packet: Callable[[], None], *, act: str, pid_file: str = ""
) -> Iterator[FrameChunk]:
    """One good chunk, then something else."""
    yield chunk(0)
    if pid_file:
        Path(pid_file).write_text(str(os.getpid()))
    if act == "hang":
        time.sleep(600)
    elif act == "crash":
        ctypes.string_at(0)
    elif act == "leave":
        os._exit(7)
    elif act == "eat":
        blocks = [np.ones(64 << 20, np.uint8) for _ in range(64)]
        yield chunk(len(blocks))
    elif act == "fail":
        raise RuntimeError("a mistake of ours")
    yield chunk(1)


def slowly(
    allocate: Allocate, on_packet: Callable[[], None], *, packet_s: float, num_packets: int
) -> Iterator[FrameChunk]:
    """A chunk that takes many packets, each a sign of life."""
    for _ in range(num_packets):
        time.sleep(packet_s)
        on_packet()
    yield chunk(0)

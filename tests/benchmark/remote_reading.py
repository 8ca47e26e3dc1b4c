"""Ways to read a video from object storage, by requests, bytes and time.

The reader first scans the packets of the whole file, then decodes them. A proxy gives the
endpoint (moto, or what FOURDH_TEST_S3 names) the latency and the rate of a store that is not next
next door. Reading waits for the store and decoding waits for reading, so that the time against
the same file on local disk is 1 + waiting / decoding; both are measured apart, because the noise
of a shared machine in the second would hide the first.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from fourdh_batch.storage import Store, open_read
from fourdh_batch.video.decode import VideoReader
from tests.conftest import SHARED
from tests.s3_proxy import ENVIRONMENT, S3Proxy, s3_endpoint

LATENCY_S = 0.03
BYTES_PER_S = 50e6  # of one connection; a large store gives many of them at once
ROUNDS = 3
PATIENCE_S = 10.0  # a way that waits longer is measured once
NUM_FRAMES = 400
WIDTH, HEIGHT = 320, 180
REAL = ("dogwalk_1p_720p2997_aac.mp4", "variants/bedroom_fragmented.mp4")
MIB = 2**20

Opener = Callable[[str, Any, str], Any]


@contextmanager
def _whole(uri: str, filesystem: Any, path: str) -> Iterator[BinaryIO]:
    with tempfile.NamedTemporaryFile() as local:
        filesystem.get_file(path, local.name)
        with Path(local.name).open("rb") as file:
            yield file


def _ranges(cache_type: str, block_bytes: int) -> Opener:
    return lambda uri, filesystem, path: filesystem.open(
        path, "rb", cache_type=cache_type, block_size=block_bytes
    )


WAYS: dict[str, Opener] = {
    "s3fs, read ahead 1 MiB": _ranges("readahead", MIB),
    "s3fs, read ahead 8 MiB": _ranges("readahead", 8 * MIB),
    "s3fs, 32 blocks of 8 MiB in memory": _ranges("blockcache", 8 * MIB),
    "copied to disk first": _whole,
    "storage.open_read": lambda uri, filesystem, path: open_read(uri),
}


def make_clip(path: Path, *, is_apart: bool = False, **options: str) -> None:
    """Some 40 MB that decode fast: small pictures of noise, and sound for the first quarter.

    Args:
        path: of the file.
        is_apart: all pictures first, then the sound, instead of both in turn.
        options: of the muxer.
    """
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"preset": "ultrafast", "qp": "4", "g": "250"}
        sound = container.add_stream("aac", rate=48000)
        sounds = []
        for t in range(NUM_FRAMES):
            plane = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)
            plane[:HEIGHT] = rng.integers(0, 255, (HEIGHT, WIDTH))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(plane, format="yuv420p")))
            if t >= NUM_FRAMES // 4:
                continue
            samples = rng.standard_normal((1, 1920)).astype(np.float32) / 8
            heard = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            heard.sample_rate = 48000
            sounds += sound.encode(heard)
            if not is_apart:
                container.mux(sounds)
                sounds = []
        container.mux(stream.encode(None))
        container.mux(sounds + sound.encode(None))


class _Watched(io.RawIOBase):
    """A file that notes how long its reads take."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.waited_s = 0.0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        began = time.perf_counter()
        data = self.file.read(size)
        self.waited_s += time.perf_counter() - began
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def decode(source: Any) -> int:
    with VideoReader(source) as reader:
        return sum(chunk.num_frames for chunk in reader.chunks(32))


def run() -> list[dict[str, Any]]:
    figures: list[dict[str, Any]] = []
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        for name in REAL:
            if (SHARED / "videos" / "real" / name).exists():
                files[name] = SHARED / "videos" / "real" / name
        kinds: dict[str, dict[str, Any]] = {
            "index in front": {"movflags": "faststart"},
            "index at the end": {},
            "sound far from pictures": {"max_interleave_delta": "1", "is_apart": True},
        }
        for name, options in kinds.items():
            files[name] = Path(folder) / f"{len(files)}.mp4"
            make_clip(files[name], **options)
        with S3Proxy(s3_endpoint(), latency_s=LATENCY_S, bytes_per_s=BYTES_PER_S) as proxy:
            os.environ["AWS_ENDPOINT_URL"] = proxy.url
            bucket = f"reading-{os.getpid()}"
            store = Store(f"s3://{bucket}")
            filesystem, _ = store.filesystem()
            filesystem.mkdir(bucket)
            for name, path in files.items():
                store.put_file(path, name)
            for name, path in files.items():
                figures += _compare(name, path, store, filesystem, proxy)
    return figures


def _compare(
    name: str, path: Path, store: Store, filesystem: Any, proxy: S3Proxy
) -> list[dict[str, Any]]:
    num_bytes = path.stat().st_size
    local_s = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        num_frames = decode(str(path))
        local_s.append(time.perf_counter() - began)
    figures: list[dict[str, Any]] = []
    for way, opener in WAYS.items():
        waits = []
        for _ in range(ROUNDS):
            proxy.reset()
            began = time.perf_counter()
            with opener(store.uri(name), filesystem, f"{store.root[5:]}/{name}") as file:
                opening_s = time.perf_counter() - began
                watched = _Watched(file)
                assert decode(watched) == num_frames
            waits.append(opening_s + watched.waited_s)
            if waits[0] > PATIENCE_S:
                break
        fetched = sum(request.num_bytes for request in proxy.requests)
        slower = [1 + wait / min(local_s) for wait in waits]
        what = f"{name}, {num_bytes / 1e6:.1f} MB: {way}"
        figures += [
            {"what": f"{what}: requests", "value": len(proxy.requests), "unit": ""},
            {"what": f"{what}: bytes / size", "value": fetched / num_bytes, "unit": "x"},
            {
                "what": f"{what}: waiting for the store",
                "value": statistics.median(waits),
                "unit": "s",
                "spread": (min(waits), max(waits)),
            },
            {
                "what": f"{what}: time / local file",
                "value": statistics.median(slower),
                "unit": "x",
                "spread": (min(slower), max(slower)),
            },
        ]
    return figures

"""Resident memory of every process of a job over a 30-minute 720p video.

A clip is looped by copying its packets, two people walk through given boxes, and the smallest model
runs on CPU, so that decoding and the tables are what the time goes to. Memory must not grow with
the video: the figure is the sum over all processes in the last quarter against the second.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from fourdh_batch.cluster.run import run_job
from fourdh_batch.config import load_config
from fourdh_batch.pipeline.job import Progress
from fourdh_batch.tables.reader import read_table
from tests.benchmark.decode import clip
from tests.conftest import SHARED
from tests.weights import untrained_hmr2_file

MINUTES = 30
REAL = SHARED / "videos" / "real" / "juggle_1p_720p24.mp4"
_MIB = 1 << 20


def loop(source: Path, target: Path, seconds: float) -> int:
    """Copy the packets of a clip again and again; returns the number of frames."""
    count, shift = 0, 0
    with av.open(str(target), "w") as out:
        stream = None
        while True:
            with av.open(str(source)) as container:
                template = container.streams.video[0]
                if stream is None:
                    stream = out.add_stream_from_template(template)
                last = 0
                for packet in container.demux(template):
                    if packet.dts is None or packet.pts is None:
                        continue
                    assert packet.duration is not None
                    last = max(last, packet.pts + packet.duration)
                    packet.pts += shift
                    packet.dts += shift
                    packet.stream = stream
                    out.mux(packet)
                    count += 1
                shift += last
                assert template.time_base is not None
                if shift * template.time_base >= seconds:
                    return count


def boxes(path: Path, video_ids: list[str], num_frames: int) -> None:
    """Two people who walk to and fro, each unseen for 20 frames now and then."""
    t = np.arange(num_frames)
    parts = []
    for k in range(2):
        seen = t[(t + 97 * k) % 400 >= 20]
        x = 300 + 400 * k + 150 * np.sin(seen / 40)
        parts.append((seen, np.stack([x, 200 + 0 * x, x + 150, 620 + 0 * x], 1)))
    frame = np.concatenate([seen for seen, _ in parts])
    box = np.concatenate([b for _, b in parts]).astype(np.float32)
    order = np.argsort(frame, kind="stable")
    flat = pa.array(box[order].reshape(-1))
    columns = {
        "frame_index": pa.array(frame[order]),
        "bbox_xyxy_px": pa.FixedSizeListArray.from_arrays(flat, 4),
        "score": pa.array(np.full(len(frame), 0.95, np.float32)),
    }
    tables = [
        pa.table({"video_id": pa.repeat(video_id, len(frame)), **columns}) for video_id in video_ids
    ]
    pq.write_table(pa.concat_tables(tables), path)


class Sampler(threading.Thread):
    """Resident memory by kind of process, every second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._ended = threading.Event()

    def run(self) -> None:
        start = time.monotonic()
        me = psutil.Process()
        while not self._ended.wait(1.0):
            sizes: dict[str, float] = defaultdict(float)
            for process in [me, *me.children(recursive=True)]:
                try:
                    name = "driver" if process.pid == me.pid else process.name()
                    memory = process.memory_info()
                except psutil.NoSuchProcess:
                    continue
                if name == "driver" or name.startswith("ray::"):
                    # without the object store, which all of them map
                    sizes[name.split(".")[0]] += (memory.rss - memory.shared) / _MIB
            self.samples.append((time.monotonic() - start, dict(sizes)))

    def end(self) -> None:
        self._ended.set()
        self.join()


def run(minutes: float = MINUTES) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = REAL if REAL.is_file() else clip(folder)
        (folder / "in").mkdir()
        num_frames = loop(source, folder / "in" / "long.mp4", minutes * 60)
        boxes(folder / "boxes.parquet", ["long.mp4"], num_frames)
        words = [
            f"input={folder / 'in'}",
            f"output={folder / 'out'}",
            f"hmr.weights={untrained_hmr2_file()}",
            "hmr.size=tiny",
            "hmr.device=cpu",
            "detector.name=boxes",
            f"detector.path={folder / 'boxes.parquet'}",
            "cluster.address=local",
        ]
        frames: list[tuple[float, int]] = []
        sampler = Sampler()
        sampler.start()
        started = time.monotonic()

        def note(progress: Progress) -> None:
            frames.append((time.monotonic() - started, progress.frames_done))

        report = run_job(load_config(None, words), on_progress=note)
        sampler.end()
        assert report.exit_code == 0
        [video] = read_table(str(folder / "out"), "videos").to_dict("records")
        assert video["frames_decoded"] == num_frames
        rows = report.shards[0].num_track_rows
        at = np.array([t for t, _ in frames])
        done = np.array([n for _, n in frames])
        times = np.array([t for t, _ in sampler.samples])
        reached = np.interp(times, at, done) / num_frames
        total = np.array([sum(sizes.values()) for _, sizes in sampler.samples])
        curve = {
            f"{int(100 * share)} %": round(float(total[np.argmin(np.abs(reached - share))]))
            for share in (0.1, 0.25, 0.5, 0.75, 0.95)
        }
        second = total[(reached > 0.25) & (reached < 0.5)]
        last = total[(reached > 0.75) & (reached < 0.999)]
        names = sorted({n for _, sizes in sampler.samples for n in sizes})
        peaks = {n: round(max(s.get(n, 0) for _, s in sampler.samples)) for n in names}
        return [
            {
                "what": f"{num_frames} frames, {rows} rows: private memory, last / 2nd quarter",
                "value": float(np.median(last) / np.median(second)),
                "unit": "x",
            },
            {
                "what": f"MiB at share of the video {curve}",
                "value": float(total.max()),
                "unit": "MiB peak",
            },
            {
                "what": f"peak MiB by process {peaks}",
                "value": float(total.max()),
                "unit": "MiB peak",
            },
        ]

"""Writes a small file of every table in its present version; kept for good, never overwritten.

python -m tests.data.tables.make
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fourdh_batch.storage import Store
from fourdh_batch.tables.frames import FrameRuns
from fourdh_batch.tables.schema import make_table, schema_version
from fourdh_batch.tables.writer import ObjectWriter
from tests.table_rows import tracks_table, videos_table

HERE = Path(__file__).parent


def main() -> None:
    rng = np.random.default_rng(0)
    is_dropped = np.array([False, True, True])

    def reconstructed(*shape: int) -> np.ndarray:
        values = rng.normal(size=(3, *shape)).astype(np.float32)
        values[is_dropped] = np.nan
        return values

    detections = {
        "dataset": "ava",
        "video_id": "a",
        "frame_index": np.array([0, 0, 4]),
        "pts_s": np.array([0.0, 0.0, 0.16]),
        "detection_index": np.array([0, 1, 0]),
        "bbox_xyxy_px": np.arange(12, dtype=np.float32).reshape(3, 4),
        "score": np.array([0.9, 0.5, 0.25], np.float32),
        "mask_rle": [b"\x00mask", None, b""],
        "mask_source": "detector",
        "drop_reason": [None, "low_score", "too_small"],
        "track_id": np.ma.array([1, 0, 0], mask=[False, True, True]),
        "detector": "mini",
        "model_fingerprint": "m",
        "global_orient": reconstructed(1, 3, 3),
        "body_pose": reconstructed(23, 3, 3),
        "betas": reconstructed(10),
        "pred_cam": reconstructed(3),
        "box_center_px": reconstructed(2),
        "box_size_px": reconstructed(),
        "appearance": reconstructed(256),
        "image_size_px": np.array([640, 480]),
        "shot_id": np.array([0, 0, 1]),
        "is_shot_start": np.array([False, False, True]),
    }
    runs = FrameRuns()
    for frame_index in range(5):
        runs.add(frame_index, frame_index / 25, int(frame_index >= 4), (640, 480))
    videos = videos_table("a")
    videos = {name: videos.column(name) for name in videos.column_names}
    failures = {
        "dataset": "ava",
        "video_id": "a",
        "uri": "/videos/a",
        "shard_id": "s1",
        "stage": "decode",
        "error_class": "CorruptVideoError",
        "code": "CORRUPT",
        "message": "expected a frame, got none",
        "frame_index": [7, None],
        "model_fingerprint": "m",
        "attempts": 1,
    }
    tables = {
        "tracks": tracks_table("a", 2),
        "detections": make_table("detections", detections),
        "videos": make_table("videos", {**videos, "frame_runs": [runs.to_json()]}),
        "failures": make_table("failures", failures),
    }
    store = Store(str(HERE))
    for name, table in tables.items():
        key = f"{name}-v{schema_version(name)}.parquet"
        if not store.exists(key):
            with ObjectWriter(store, name, key) as writer:
                writer.write(table)


if __name__ == "__main__":
    main()

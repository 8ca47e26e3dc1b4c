"""Rows and finished spools for tests of the tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import CommitRecord
from fourdh_batch.tables.schema import arrow_schema, make_table
from fourdh_batch.tables.writer import SavedSpool, WorkSpool, publish_shard


def tracks_table(
    video_id: str, num_frames: int, *, first: int = 0, people: int = 2, dataset: str = "ava"
) -> Any:
    """Rows of a few people in consecutive frames; values depend on the row."""
    n = num_frames * people
    rng = np.random.default_rng(first)
    floats = {
        c.name: rng.normal(size=(n, *[int(d) for d in c.metadata[b"shape"].split(b",")]))
        for c in arrow_schema("tracks")
        if c.metadata.get(b"shape") and c.name not in ("image_size_px", "principal_point_px")
    }
    return make_table(
        "tracks",
        {
            **{name: values.astype(np.float32) for name, values in floats.items()},
            "dataset": dataset,
            "video_id": video_id,
            "shot_id": 0,
            "frame_index": np.repeat(np.arange(first, first + num_frames), people),
            "pts_s": np.repeat(np.arange(first, first + num_frames) / 25, people),
            "track_id": np.tile(np.arange(1, people + 1), num_frames),
            "state": "detected",
            "frames_since_seen": 0,
            "score": np.ones(n, np.float32),
            "box_size_px": np.ones(n, np.float32),
            "focal_px": 1000.0,
            "principal_point_px": np.array([320, 240]),
            "image_size_px": np.array([640, 480]),
            "hits": 1,
            "track_len": 0,
            "weights": "untrained",
            "body_model": "open",
            "model_fingerprint": "m",
        },
        num_rows=n,
    )


def videos_table(
    video_id: str, *, dataset: str = "ava", status: str = "ok", fps: float | None = None
) -> Any:
    """The row of one video."""
    row = {
        "dataset": dataset,
        "video_id": video_id,
        "uri": f"/videos/{video_id}",
        "content_fingerprint": "c",
        "fps": fps,
        "frames_decoded": 1,
        "num_shots": 1,
        "num_tracks": 2,
        "num_detections": 0,
        "status": status,
        "shard_id": "s1",
        "model_fingerprint": "m",
    }
    return make_table("videos", row, num_rows=1)


def finished_spool(
    store: Store,
    video_id: str,
    num_frames: int,
    *,
    step: int = 10,
    dataset: str = "ava",
    shard_id: str = "s1",
    part_bytes: int = 2**20,
) -> SavedSpool:
    """A finished video with two people in every frame."""
    spool = WorkSpool(store, shard_id, part_bytes=part_bytes)
    spool.begin(video_id)
    for first in range(0, num_frames, step):
        spool.append("tracks", tracks_table(video_id, step, first=first, dataset=dataset))
    spool.append("videos", videos_table(video_id, dataset=dataset))
    spool.finish({"track_len": {"1": num_frames, "2": num_frames} if num_frames else {}})
    spool.save()
    return SavedSpool(store, shard_id, spool.name)


def publish(
    store: Store, videos: list[SavedSpool], dataset: str = "ava", *, shard_id: str = "s1"
) -> CommitRecord:
    """Publish finished spools as one shard."""
    return publish_shard(
        store,
        shard_id=shard_id,
        dataset=dataset,
        videos={name: spool for spool in videos for name in spool.finished},
        fingerprint="f",
        config_fingerprint="c",
        model_fingerprint="m",
    )

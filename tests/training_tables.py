"""A published run of one video: people whose rows and pictures are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.spatial.transform import Rotation

from fourdh_batch.storage import Store
from fourdh_batch.tables.writer import SavedSpool, WorkSpool
from fourdh_batch.types import U8
from tests.media import write_video
from tests.table_rows import publish, tracks_table, videos_table

WIDTH, HEIGHT = 64, 48
BOX = (8.0, 4.0, 32.0, 44.0)


def with_columns(table: Any, **columns: Any) -> Any:
    """A table with other values in some columns of lists."""
    for name, values in columns.items():
        flat = np.broadcast_to(values, (len(table), *np.shape(values)[-1:])).astype(np.float32)
        field = table.schema.field(name)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), type=field.type)
        table = table.set_column(table.schema.get_field_index(name), field, lists)
    return table


def picture(frame: int) -> U8:
    """Grey, lighter from frame to frame."""
    return np.full((HEIGHT, WIDTH, 3), 20 + 3 * frame, dtype=np.uint8)


def publish_turning_people(folder: Path, root: Path, videos: dict[str, int]) -> None:
    """Tables of two people who turn steadily about their own axis, and the videos.

    Args:
        folder: for the videos.
        root: for the tables.
        videos: frames by id.
    """
    store = Store(str(root))
    spools = []
    for row, (video_id, num_frames) in enumerate(videos.items()):
        clip = write_video(
            folder / f"{video_id}.mp4", np.stack([picture(i) for i in range(num_frames)])
        )
        frames = np.repeat(np.arange(num_frames), 2)
        turn = Rotation.from_rotvec(np.outer(0.05 * frames + row, (0, 1, 0)))
        bend = Rotation.from_rotvec(np.outer(0.5 * np.sin(0.1 * frames + row), (1, 0, 0)))
        pose = np.tile(np.eye(3).ravel(), (2 * num_frames, 23))
        pose[:, 9 * 3 : 9 * 4] = bend.as_matrix().reshape(-1, 9)
        table = with_columns(
            tracks_table(video_id, num_frames),
            global_orient=turn.as_matrix().reshape(-1, 9),
            body_pose=pose,
            betas=np.zeros(10),
            pred_cam=np.array([0.9, 0.01, 0.02]),
            box_center_px=np.array([20.0, 24.0]),
            bbox_xyxy_px=np.array(BOX),
        )
        at = table.schema.get_field_index("box_size_px")
        side = pa.array(np.full(2 * num_frames, 40, np.float32))
        table = table.set_column(at, table.schema.field("box_size_px"), side)
        spool = WorkSpool(store, f"s{row}", part_bytes=2**20)
        spool.begin(video_id)
        spool.append("tracks", table)
        told = videos_table(video_id)
        at = told.schema.get_field_index("uri")
        told = told.set_column(at, told.schema.field("uri"), pa.array([str(clip)]))
        spool.append("videos", told)
        spool.finish({"track_len": {"1": num_frames, "2": num_frames}})
        spool.save()
        spools.append((f"s{row}", SavedSpool(store, f"s{row}", spool.name)))
    for shard_id, spool in spools:
        publish(store, [spool], shard_id=shard_id)

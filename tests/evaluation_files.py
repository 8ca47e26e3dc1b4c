"""Small tables, truths and data sets for the tests of evaluation."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fourdh_batch.geometry import axis_angle_to_rotmat
from fourdh_batch.storage import Store
from fourdh_batch.tables.schema import make_table
from fourdh_batch.tables.writer import SavedSpool, WorkSpool
from tests.table_rows import publish, tracks_table, videos_table

FRAMES, PEOPLE = 8, 2


def people(video_id: str, **changes: Any) -> Any:
    """Rows of two people who stand apart for eight frames; the same in every call."""
    table = tracks_table(video_id, FRAMES, people=PEOPLE)
    rng = np.random.default_rng(5)
    left = np.tile([100.0, 400.0], FRAMES) + np.repeat(np.arange(FRAMES), PEOPLE)
    n = len(left)
    box = np.stack((left, left * 0, left + 100, left * 0 + 200), axis=1).astype(np.float32)
    keypoints = np.tile(rng.normal(size=(PEOPLE, 44, 3)), (FRAMES, 1, 1)).astype(np.float32)
    same = np.eye(3, dtype=np.float32)
    columns = {name: table[name] for name in table.column_names} | {
        "bbox_xyxy_px": box,
        "keypoints_3d_m": keypoints,
        "keypoints_2d_px": box[:, None, :2] + 50 + keypoints[..., :2],
        "global_orient": np.broadcast_to(same, (n, 1, 3, 3)),
        "body_pose": np.broadcast_to(same, (n, 23, 3, 3)),
        "betas": np.zeros((n, 10), np.float32),
        "body_model": "open:?",
    }
    return make_table("tracks", columns | changes, num_rows=n)


def detections_of(tracks: Any) -> Any:
    """A detection for every row."""
    n = tracks.num_rows
    return make_table(
        "detections",
        {
            **{name: tracks[name] for name in ("dataset", "video_id", "frame_index", "pts_s")},
            "bbox_xyxy_px": tracks["bbox_xyxy_px"],
            "detection_index": np.arange(n),
            "score": np.full(n, 0.9, np.float32),
            "mask_source": "box",
            "detector": "given",
            "model_fingerprint": "m",
        },
        num_rows=n,
    )


def write_root(
    root: str,
    videos: Mapping[str, Any],
    *,
    statuses: Mapping[str, str] | None = None,
    fps: float | None = None,
    dataset: str = "ava",
) -> str:
    """An output root with these rows of `tracks`, and a detection for each."""
    store = Store(root)
    spool = WorkSpool(store, "s1", part_bytes=2**20)
    for name, tracks in videos.items():
        spool.begin(name)
        if tracks is not None:
            spool.append("tracks", tracks)
            spool.append("detections", detections_of(tracks))
        status = (statuses or {}).get(name, "ok")
        spool.append("videos", videos_table(name, dataset=dataset, status=status, fps=fps))
        ids = [] if tracks is None else tracks["track_id"].to_pylist()
        spool.finish({"track_len": {str(track): ids.count(track) for track in set(ids)}})
    spool.save()
    publish(store, [SavedSpool(store, "s1", spool.name)], dataset, shard_id=f"{dataset}-s1")
    return root


def write_truth(path: Path, *tables: Any, drop: tuple[str, ...] = ()) -> str:
    """A Parquet file of these rows."""
    pq.write_table(pa.concat_tables(tables).drop_columns(list(drop)), path)
    return str(path)


POSETRACK = {
    "images": [
        {"id": 10000, "file_name": "images/val/000342_mpii_test/000000.jpg", "frame_id": 10000},
        {"id": 10004, "file_name": "images/val/000342_mpii_test/000004.jpg", "frame_id": 10004},
    ],
    "annotations": [
        {"image_id": 10000, "track_id": 7, "bbox": [1, 2, 30, 40], "keypoints": [0] * 51},
        {"image_id": 10004, "track_id": 7, "bbox": [5, 2, 30, 40], "keypoints": [0] * 51},
        {"image_id": 10004, "track_id": 8, "keypoints": [0] * 51},
    ],
    "categories": [{"id": 1, "name": "person"}],
}


def emdb(num: int = 4, **changes: Any) -> dict[str, Any]:
    """The content of one of EMDB's pickles; frames 1 and 2 are no good."""
    extrinsics = np.tile(np.eye(4), (num, 1, 1))
    extrinsics[:, :3, :3] = axis_angle_to_rotmat(np.array([0.0, np.pi / 2, 0]))
    box = np.tile(np.array([10.0, 20, 60, 120]), (num, 1))
    box[2, 2] = 5  # no extent
    return {
        "gender": "female",
        "name": "P1_14_outdoor_climb",
        "emdb1": True,
        "emdb2": False,
        "n_frames": num,
        "good_frames_mask": np.array([True, False, True, True]),
        "camera": {
            "intrinsics": np.eye(3),
            "extrinsics": extrinsics,
            "width": 1440,
            "height": 1920,
        },
        "smpl": {
            "poses_root": np.zeros((num, 3)),
            "poses_body": np.zeros((num, 69)),
            "trans": np.zeros((num, 3)),
            "betas": np.arange(10.0),
        },
        "kp2d": np.zeros((num, 24, 2)),
        "bboxes": {"bboxes": box, "invalid_idxs": np.array([1])},
    } | changes


def write_emdb(root: Path, content: Any) -> Path:
    """A folder of EMDB with one sequence; returns that of the sequence."""
    folder = root / "P1" / "14_outdoor_climb"
    folder.mkdir(parents=True)
    (folder / "P1_14_outdoor_climb_data.pkl").write_bytes(pickle.dumps(content))
    return folder

"""Real people, told apart by where they are alone: every body has the same pose.

Boxes come from hand-made tracks or from a detector; nothing is known of looks or poses, which the
full cost also uses, so crossings cannot all be solved here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fourdh_batch.tracking.tracker import PhalpTracker
from tests.tracking_scenes import frame_of_boxes

pytestmark = pytest.mark.shared


def identities(boxes: pd.DataFrame, image_size_wh: tuple[int, int]) -> pd.DataFrame:
    """The same rows in frame order, with a column `id` from the tracker.

    Args:
        boxes: columns frame_index, x1, y1, x2, y2.
        image_size_wh: pixels.
    """
    boxes = boxes.sort_values("frame_index", kind="stable")
    corners = boxes[["x1", "y1", "x2", "y2"]].to_numpy(np.float32)
    tracker, ids = PhalpTracker(), []
    for i, end in enumerate(ends := np.bincount(boxes.frame_index).cumsum()):
        rows = corners[ends[i - 1] if i else 0 : end]
        frame = frame_of_boxes(i, rows, image_size_wh=image_size_wh)
        ids.append(tracker.update(frame).detection_track_id)
    return boxes.assign(id=np.concatenate(ids))


def num_switches(rows: pd.DataFrame) -> int:
    """How often a true person's identity differs from the one before."""
    return sum(int((np.diff(person.id) != 0).sum()) for _, person in rows.groupby("track_id"))


def test_five_tumbling_gymnasts_use_five_identities(shared: Path) -> None:
    table = pd.read_csv(shared / "videos/real/gt/gymnasts_gt_tracks.csv")
    table = table.assign(
        frame_index=table.frame_number_from_1 - 1,
        x1=table.x,
        y1=table.y,
        x2=table.x + table.w,
        y2=table.y + table.h,
    )
    rows = identities(table, (1280, 720))
    assert rows.id.nunique() == table.track_id.nunique() == 5
    # All at crossings; matching boxes greedily by overlap needs 14 identities and switches 18
    # times.
    assert num_switches(rows) <= 10


@pytest.mark.parametrize("step", [1, 2, 4])
def test_forty_two_pedestrians_keep_their_identities(shared: Path, step: int) -> None:
    table = pd.read_csv(shared / "videos/real/gt/crowd_mot17_04_8f.gt.csv")
    table = table[(table.considered == 1) & (table.class_id == 1) & (table.frame_index % step == 0)]
    table = table.assign(frame_index=table.frame_index // step)
    rows = identities(table, (1920, 1080))
    assert rows.id.nunique() == table.track_id.nunique() == 42
    assert num_switches(rows) == 0


@pytest.mark.parametrize(
    ("video", "image_size_wh", "num_frames", "num_people"),
    [
        ("dogwalk_1p_720p2997_aac.mp4", (1280, 720), 289, 1),
        ("juggle_1p_720p24.mp4", (1280, 720), 247, 1),
        ("chaplin_2p_bw_25fps_mp3.mp4", (640, 360), 241, 2),
        # Then boxes jump between her arm and her trunk; the person at the back never passes 0.5.
        ("pancake_2p_30fps_opus.mkv", (426, 240), 277, 1),
        ("onebyone_139s_10fps.mp4", (768, 432), 1394, 6),
    ],
)
def test_detected_people_of_a_clip_get_one_identity_each(
    shared: Path, video: str, image_size_wh: tuple[int, int], num_frames: int, num_people: int
) -> None:
    table = pd.read_parquet(
        shared / "data/detections/real_videos.parquet",
        columns=["video", "frame_index", "bbox_xyxy_px", "score"],
    )
    table = table[(table.video == video) & (table.score > 0.5) & (table.frame_index < num_frames)]
    corners = np.stack(table.bbox_xyxy_px.to_list()).T
    table = table.assign(**dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True)))
    rows = identities(table, image_size_wh)
    assert sum(count >= 5 for count in Counter(rows.id).values()) == num_people

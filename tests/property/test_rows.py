"""Rows leave in frame order, once, final, and whatever the chunks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdh_batch.pipeline.records import ChunkResult, ModelCard
from fourdh_batch.pipeline.rows import RowBuilder
from fourdh_batch.tracking.tracker import PhalpTracker, TrackerSettings
from fourdh_batch.types import F32, Detections, FrameDetections, People

SIZE_WH = (640, 360)
CARD = ModelCard("fp", "untrained", "untrained", "open", "boxes")
SETTINGS = TrackerSettings(max_age=6)


@dataclass
class Scene:
    """Boxes per frame; `low` marks boxes that the score filter drops."""

    boxes: list[F32]
    low: list[np.ndarray]
    shot_of: list[int]


def walk(seed: int, num_frames: int) -> Scene:
    """Three walkers, each unseen now and then, plus passing false boxes."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(60, 500, 3)
    speed = rng.uniform(-4, 4, 3)
    boxes, low, shots = [], [], []
    cut = int(rng.integers(1, num_frames + 1))
    for t in range(num_frames):
        x = place + speed * t + rng.normal(0, 1, 3)
        here = np.stack([x, np.full(3, 100.0), x + 60, np.full(3, 260.0)], 1)
        here = here[rng.random(3) > 0.25]
        if rng.random() < 0.3:
            here = np.concatenate([here, [[rng.uniform(0, 500), 50, rng.uniform(560, 600), 200]]])
        boxes.append(here.astype(np.float32))
        low.append(rng.random(len(here)) < 0.2)
        shots.append(int(t >= cut))
    return Scene(boxes, low, shots)


def people(bbox: F32) -> People:
    m = len(bbox)
    eye = np.tile(np.eye(3, dtype=np.float32), (m, 24, 1, 1))
    height = bbox[:, 3] - bbox[:, 1]
    return People(
        global_orient=eye[:, :1],
        body_pose=eye[:, 1:],
        betas=np.zeros((m, 10), np.float32),
        pred_cam=np.tile(np.float32([0.9, 0, 0]), (m, 1)),
        box_center_px=((bbox[:, :2] + bbox[:, 2:]) / 2).astype(np.float32),
        box_size_px=height.astype(np.float32),
        keypoints_3d_m=np.zeros((m, 44, 3), np.float32),
    )


def chunk_of(scene: Scene, frames: range) -> ChunkResult:
    bbox = np.concatenate([scene.boxes[t] for t in frames]).astype(np.float32)
    reason = np.where(np.concatenate([scene.low[t] for t in frames]), "low_score", "")
    return ChunkResult(
        video_id="v",
        frame_index=np.array(frames, dtype=np.int64),
        pts_s=np.array(frames) / 25.0,
        shot_scores=None,
        image_size_wh=SIZE_WH,
        detections=Detections(
            frame_row=np.repeat(np.arange(len(frames)), [len(scene.boxes[t]) for t in frames]),
            bbox_xyxy_px=bbox,
            score=np.full(len(bbox), 0.9, np.float32),
        ),
        drop_reason=reason,
        people=people(bbox[reason == ""]),
    )


def still(global_orient: F32, body_pose: F32, betas: F32) -> F32:
    return np.zeros((len(betas), 44, 3), np.float32)


def build(
    scene: Scene, lengths: list[int], *, keep_predicted: bool = True
) -> tuple[pa.Table, pa.Table, RowBuilder, int]:
    """Tables of a scene cut into chunks of these lengths (repeated), and the most held chunks."""
    rows = RowBuilder(
        dataset="d", video_id="v", card=CARD, keypoints=still, keep_predicted=keep_predicted
    )
    tracker = PhalpTracker(SETTINGS)
    tracks, detections, most, start, turn = [], [], 0, 0, 0
    while start < len(scene.boxes):
        frames = range(start, min(start + lengths[turn % len(lengths)], len(scene.boxes)))
        start, turn = frames.stop, turn + 1
        rows.hold(chunk_of(scene, frames))
        for t in frames:
            bbox, score, bodies = rows.people_of(t)
            frame = FrameDetections(t, SIZE_WH, bbox, score, bodies)
            rows.tracked(tracker.update(frame), shot_id=scene.shot_of[t])
        for ready in rows.settled():
            tracks.append(ready.tracks)
            detections.append(ready.detections)
        most = max(most, rows.num_held)
    rows.finish(tracker.finish())
    for ready in rows.settled():
        tracks.append(ready.tracks)
        detections.append(ready.detections)
    assert rows.num_held == 0
    return pa.concat_tables(tracks), pa.concat_tables(detections), rows, most


def expected_rows(scene: Scene) -> set[tuple[int, int, str, int]]:
    """(frame, track, state, frames_since_seen), collected over the whole video, then filtered."""
    tracker = PhalpTracker(SETTINGS)
    seen: dict[int, set[int]] = defaultdict(set)
    ghosts: list[tuple[int, int, int]] = []
    for t, (bbox, low) in enumerate(zip(scene.boxes, scene.low, strict=True)):
        kept = bbox[~low]
        frame = FrameDetections(t, SIZE_WH, kept, np.full(len(kept), 0.9, np.float32), people(kept))
        out = tracker.update(frame)
        for track, row, since in zip(
            out.track_id, out.detection_row, out.frames_since_seen, strict=True
        ):
            if row >= 0:
                seen[int(track)].add(t)
            else:
                ghosts.append((t, int(track), int(since)))
        for track, past in zip(out.backfill.track_id, out.backfill.frame_index, strict=True):
            seen[int(track)].add(int(past))
    rows = {(t, track, "detected", 0) for track, frames in seen.items() for t in frames}
    return rows | {(t, k, "predicted", s) for t, k, s in ghosts if t < max(seen[k])}


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_frames=st.integers(1, 60),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)
def test_rows_equal_an_offline_assembly_whatever_the_chunks(
    seed: int, num_frames: int, lengths: list[int]
) -> None:
    scene = walk(seed, num_frames)
    tracks, detections, rows, _ = build(scene, lengths)
    whole_tracks, whole_detections, _, _ = build(scene, [num_frames])
    assert tracks.equals(whole_tracks)
    assert detections.equals(whole_detections)

    frame = tracks.to_pandas()
    got = set(
        zip(
            frame["frame_index"],
            frame["track_id"],
            frame["state"],
            frame["frames_since_seen"],
            strict=True,
        )
    )
    assert got == expected_rows(scene)
    assert len(got) == len(frame)  # no row twice
    keys = list(zip(frame["frame_index"], frame["track_id"], strict=True))
    assert keys == sorted(keys)
    assert dict(rows.track_len) == frame["track_id"].value_counts().to_dict()
    assert (frame["shot_id"] == [scene.shot_of[t] for t in frame["frame_index"]]).all()
    # hits count the detected rows of a track up to each row
    detected = frame[frame["state"] == "detected"]
    assert (detected.groupby("track_id").cumcount() + 1 == detected["hits"]).all()

    boxes = detections.to_pandas()
    assert len(boxes) == sum(map(len, scene.boxes))  # nothing vanishes
    assert set(boxes["drop_reason"].dropna()) <= {"low_score", "unconfirmed"}
    assert (boxes["track_id"].isna() == boxes["drop_reason"].notna()).all()
    joined = pd.merge(detected, boxes.dropna(subset=["track_id"]), on=["frame_index", "track_id"])
    assert len(joined) == len(detected)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(joined["bbox_xyxy_px_x"], joined["bbox_xyxy_px_y"], strict=True)
    )


def test_few_chunks_are_held_back_however_long_the_video() -> None:
    *_, most = build(walk(1, 900), [4])
    assert most <= (SETTINGS.max_age + 1) // 4 + 2


def test_predicted_rows_can_be_left_out() -> None:
    scene = walk(3, 60)
    with_them = build(scene, [16])[0].to_pandas()
    without = build(scene, [16], keep_predicted=False)[0].to_pandas()
    assert (with_them["state"] == "predicted").any()
    assert set(without["state"]) == {"detected"}
    assert len(without) == (with_them["state"] == "detected").sum()


def test_a_result_with_missing_bodies_is_refused() -> None:
    chunk = chunk_of(walk(0, 5), range(5))
    with pytest.raises(ValueError, match="boxes kept"):
        ChunkResult(
            chunk.video_id,
            chunk.frame_index,
            chunk.pts_s,
            None,
            SIZE_WH,
            chunk.detections,
            np.full(len(chunk.detections), "low_score"),
            chunk.people,
        )

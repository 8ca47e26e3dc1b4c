"""Rows leave in frame order, once, final, and whatever the chunks."""

from __future__ import annotations

import json
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fourdh_batch.geometry import axis_angle_to_rotmat
from fourdh_batch.pipeline.records import ChunkResult, ModelCard
from fourdh_batch.pipeline.rows import RowBuilder, _HeldChunk, _reconstructions
from fourdh_batch.tables.frames import FrameRuns
from fourdh_batch.tables.schema import table_schema
from fourdh_batch.tracking.completion import MARGIN, WINDOW, PoseCompleter
from fourdh_batch.tracking.location import locate, moved_box
from fourdh_batch.tracking.tracker import PhalpTracker, TrackerSettings
from fourdh_batch.types import F32, I64, Bool, Detections, FrameDetections, People, RleMask

SIZE_WH = (640, 360)
CARD = ModelCard("fp", "untrained", "untrained", "open", "boxes", "location")
SETTINGS = TrackerSettings(max_age=6)
COMPLETED = {
    *("global_orient", "body_pose", "betas", "cam_t_m"),
    *("bbox_xyxy_px", "keypoints_2d_px", "keypoints_3d_m"),
}


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
    turned = np.zeros((m, 24, 3), np.float32)
    turned[:, :, 1] = bbox[:, :1] / 300  # people turn as they walk
    turned = axis_angle_to_rotmat(turned).astype(np.float32)
    height = bbox[:, 3] - bbox[:, 1]
    return People(
        global_orient=turned[:, :1],
        body_pose=turned[:, 1:],
        betas=np.tile(bbox[:, :1] / 300, (1, 10)),
        pred_cam=np.tile(np.float32([0.9, 0, 0]), (m, 1)),
        box_center_px=((bbox[:, :2] + bbox[:, 2:]) / 2).astype(np.float32),
        box_size_px=height.astype(np.float32),
        keypoints_3d_m=np.zeros((m, 44, 3), np.float32),
    )


def looks(bbox: F32) -> NDArray[np.float16]:
    return np.tile(bbox[:, :1], (1, 256)).astype(np.float16)


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
            masks=[RleMask((SIZE_WH[1], SIZE_WH[0]), box.tobytes()) for box in bbox],
            mask_source="detector",
        ),
        drop_reason=reason,
        people=people(bbox[reason == ""]),
        appearance=looks(bbox[reason == ""]),
    )


class Nearest:
    """Completes a pose by the nearest one, the earlier of two, and moves it 3 m away."""

    frame_length = 125

    def complete(self, pose: F32, is_seen: Bool, wanted: I64) -> F32:
        seen = np.flatnonzero(is_seen)
        told = pose[seen[np.abs(wanted[:, None] - seen).argmin(1)]].copy()
        told[:, -1] += 3 / 200
        return told


class Broken(Nearest):
    """Completes to something else: what `breaks` makes of it."""

    def __init__(self, breaks: Callable[[F32], None]) -> None:
        self.breaks = breaks

    def complete(self, pose: F32, is_seen: Bool, wanted: I64) -> F32:
        told = super().complete(pose, is_seen, wanted)
        self.breaks(told)
        return told


def copied(state: Any) -> Any:
    """A state through another process: arrays, JSON and bytes survive, nothing else."""
    if isinstance(state, np.ndarray):
        assert state.dtype.kind in "iufb"
        return state.copy()
    if isinstance(state, dict):
        assert all(isinstance(key, str) for key in state)
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [copied(value) for value in state]
    if isinstance(state, bytes):
        return bytes(bytearray(state))
    return json.loads(json.dumps(state))


def still(global_orient: F32, body_pose: F32, betas: F32) -> F32:
    return np.zeros((len(betas), 44, 3), np.float32)


def build(
    scene: Scene,
    lengths: list[int],
    *,
    keep_predicted: bool = True,
    completer: PoseCompleter | None = None,
    keep_reconstructions: bool = False,
    restart_every: int = 0,
) -> tuple[pa.Table, pa.Table, RowBuilder, int]:
    """Tables of a scene cut into chunks of these lengths (repeated), and the most held chunks.

    `restart_every` frames, a new builder goes on from the state of the one before.
    """

    def new_builder() -> RowBuilder:
        return RowBuilder(
            dataset="d",
            video_id="v",
            card=CARD,
            keypoints=still,
            completer=completer,
            keep_predicted=keep_predicted,
            keep_reconstructions=keep_reconstructions,
        )

    rows, tracker = new_builder(), PhalpTracker(SETTINGS)
    tracks, detections, most, start, turn = [], [], 0, 0, 0
    while start < len(scene.boxes):
        frames = range(start, min(start + lengths[turn % len(lengths)], len(scene.boxes)))
        start, turn = frames.stop, turn + 1
        rows.hold(chunk_of(scene, frames))
        for t in frames:
            bbox, score, bodies = rows.people_of(t)
            frame = FrameDetections(t, SIZE_WH, bbox, score, bodies)
            rows.tracked(tracker.update(frame), shot_id=scene.shot_of[t])
            if restart_every and t % restart_every == restart_every - 1:
                state, rows = copied(rows.state()), new_builder()
                rows.restore(state)
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
    for t, track, since in ghosts:
        later = [frame for frame in seen[track] if frame > t]
        if later and scene.shot_of[t - since] == scene.shot_of[min(later)]:
            rows.add((t, track, "predicted", since))
    return rows


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_frames=st.integers(1, 60),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    completer=st.sampled_from([None, Nearest()]),
    restart_every=st.integers(0, 9),
)
def test_rows_equal_an_offline_assembly_whatever_the_chunks(
    seed: int,
    num_frames: int,
    lengths: list[int],
    completer: PoseCompleter | None,
    restart_every: int,
) -> None:
    scene = walk(seed, num_frames)
    tracks, detections, rows, _ = build(
        scene,
        lengths,
        completer=completer,
        keep_reconstructions=seed % 2 == 0,
        restart_every=restart_every,
    )
    whole_tracks, whole_detections, whole_rows, _ = build(
        scene, [num_frames], completer=completer, keep_reconstructions=seed % 2 == 0
    )
    assert rows.frame_runs == whole_rows.frame_runs
    assert (rows.frame_runs is None) == (seed % 2 == 1)
    assert rows.num_detections == whole_rows.num_detections == len(detections)
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


def test_a_pose_predictor_holds_back_a_few_chunks_more() -> None:
    *_, most = build(walk(1, 900), [4], completer=Nearest())
    assert most <= (WINDOW + MARGIN + SETTINGS.max_age + 1) // 4 + 2


def with_and_without(completer: PoseCompleter) -> tuple[pa.Table, pa.Table]:
    scene = walk(3, 90)
    return build(scene, [16], completer=completer)[0], build(scene, [16])[0]


def test_a_missed_frame_gets_the_completed_body_camera_and_box() -> None:
    table, plain = with_and_without(Nearest())
    rows = table.to_pandas()
    is_predicted = rows["state"] == "predicted"
    assert is_predicted.sum() > 20
    assert table.drop_columns(list(COMPLETED)) == plain.drop_columns(list(COMPLETED))
    assert table.filter((~is_predicted).to_numpy()) == plain.filter((~is_predicted).to_numpy())

    seen = {k: track[track["state"] == "detected"] for k, track in rows.groupby("track_id")}
    for row in rows[is_predicted].itertuples():
        track = seen[row.track_id]
        distance = (track["frame_index"] - row.frame_index).abs().to_numpy()
        nearest = track.iloc[distance.argmin()]
        last = track[track["frame_index"] == row.frame_index - row.frames_since_seen].iloc[0]
        for name in ("global_orient", "body_pose", "betas"):
            assert np.array_equal(getattr(row, name), nearest[name])
        expected = nearest["cam_t_m"] + [0, 0, 3]
        assert row.cam_t_m == pytest.approx(expected, rel=1e-5)
        box = moved_box(
            last["bbox_xyxy_px"][None],
            locate(last["cam_t_m"][None]),
            locate(row.cam_t_m[None]),
            SIZE_WH,
        )[0]
        assert row.bbox_xyxy_px == pytest.approx(box, abs=1e-2)  # px; cameras went through float32


def not_finite(pose: F32) -> None:
    pose[:, 5] = np.nan


def behind(pose: F32) -> None:
    pose[:, -1] = -0.2


def at_the_lens(pose: F32) -> None:
    pose[:, -1] = 1e-30


def squeezed(pose: F32) -> None:
    pose[:, :9] *= 0.9


def mirrored(pose: F32) -> None:
    pose[:, :9] *= -1


def huge(pose: F32) -> None:
    pose[:, 220] = 1e30


def much_nearer(pose: F32) -> None:
    pose[:, -1] /= 5


@pytest.mark.parametrize(
    "breaks", [not_finite, behind, at_the_lens, squeezed, mirrored, huge, much_nearer]
)
def test_what_is_no_body_in_front_of_the_camera_is_not_taken(
    breaks: Callable[[F32], None],
) -> None:
    broken, plain = with_and_without(Broken(breaks))
    assert broken == plain


@pytest.mark.parametrize("completer", [None, Nearest()])
def test_q18_frames_after_the_last_detection_get_no_rows(completer: PoseCompleter | None) -> None:
    scene = walk(5, 80)
    for t in range(60, 80):
        scene.boxes[t], scene.low[t] = scene.boxes[t][:0], scene.low[t][:0]
    rows = build(scene, [16], completer=completer)[0].to_pandas()
    last = rows.groupby("track_id")["frame_index"].transform("max")
    assert (rows["state"] == "predicted").any()
    assert (rows.loc[rows["frame_index"] == last, "state"] == "detected").all()
    assert rows["frame_index"].max() < 60


def test_texture_maps_are_not_held() -> None:
    chunk = chunk_of(walk(0, 5), range(5))
    texture = np.zeros((len(chunk.people), 4, 256, 256), np.uint8)
    alive = weakref.ref(texture)
    rows = RowBuilder(dataset="d", video_id="v", card=CARD, keypoints=still)
    rows.hold(replace(chunk, texture=texture))
    del texture
    assert rows.num_held == 1
    assert alive() is None


def test_reconstructions_are_kept_where_asked_for() -> None:
    scene = walk(2, 40)
    plain = build(scene, [16])[1]
    kept, rows = build(scene, [16], keep_reconstructions=True)[1:3]
    new = [c.name for c in table_schema("detections").columns if c.since == 2]
    assert kept.drop_columns(new) == plain.drop_columns(new)
    assert all(plain.column(name).null_count == len(plain) for name in new)
    frame = kept.to_pandas()
    dropped = (frame["drop_reason"] == "low_score").to_numpy()
    assert 0 < dropped.sum() < len(frame)
    bodies = people(np.stack(frame["bbox_xyxy_px"])[~dropped])
    for name in ("global_orient", "body_pose", "betas", "pred_cam", "box_center_px", "box_size_px"):
        assert (frame[name].isna() == dropped).all()
        values = np.stack(frame.loc[~dropped, name].to_numpy())
        assert np.array_equal(values.ravel(), getattr(bodies, name).ravel())
    assert np.array_equal(
        np.stack(frame.loc[~dropped, "appearance"].to_numpy()),
        looks(np.stack(frame["bbox_xyxy_px"])[~dropped]),
    )
    assert (np.stack(frame["image_size_px"]) == SIZE_WH).all()

    assert rows.frame_runs is not None
    frames = FrameRuns.from_json(rows.frame_runs).frames()
    assert frames.frame_index.tolist() == list(range(40))
    assert frames.pts_s == pytest.approx(np.arange(40) / 25, abs=1e-6)
    assert frames.shot_id.tolist() == scene.shot_of
    is_start = frame["frame_index"].map(dict(enumerate(frames.is_shot_start.tolist())))
    assert (frame["is_shot_start"] == is_start).all()
    assert (frame["shot_id"] == frame["frame_index"].map(dict(enumerate(scene.shot_of)))).all()


def test_looks_are_kept_and_numbers_that_are_not_finite_are_not() -> None:
    chunk = chunk_of(walk(8, 1), range(1))
    num = len(chunk.people)
    assert num > 1
    chunk.people.betas[0, 3] = np.nan
    seen = np.random.default_rng(0).normal(size=(num, 256)).astype(np.float16)
    rows = RowBuilder(
        dataset="d", video_id="v", card=CARD, keypoints=still, keep_reconstructions=True
    )
    rows.hold(replace(chunk, appearance=seen))
    bbox, score, bodies = rows.people_of(0)
    tracker = PhalpTracker(SETTINGS)
    rows.tracked(tracker.update(FrameDetections(0, SIZE_WH, bbox, score, bodies)), shot_id=0)
    rows.finish(tracker.finish())
    [ready] = rows.settled()
    frame = ready.detections.to_pandas()
    frame = frame[frame["drop_reason"] != "low_score"]
    assert frame["drop_reason"].tolist() == ["invalid_pose"] + ["unconfirmed"] * (num - 1)
    assert frame["appearance"].isna().tolist() == [True] + [False] * (num - 1)
    assert frame["pred_cam"].isna().tolist() == [True] + [False] * (num - 1)
    assert np.array_equal(np.stack(frame["appearance"].iloc[1:]), seen[1:].astype(np.float32))


def test_a_state_of_other_settings_is_refused() -> None:
    saved = RowBuilder(dataset="d", video_id="v", card=CARD, keypoints=still).state()
    other = RowBuilder(dataset="d", video_id="v", card=CARD, keypoints=still, completer=Nearest())
    with pytest.raises(ValueError, match="completion: the state was saved under other settings"):
        other.restore(saved)


@pytest.mark.parametrize("completer", [None, Nearest()])
@pytest.mark.parametrize(("cut", "num_predicted"), [(9, 4), (10, 0), (12, 0), (14, 0), (15, 4)])
def test_a_gap_with_a_cut_in_it_gets_no_rows(
    completer: PoseCompleter | None, cut: int, num_predicted: int
) -> None:
    """Somebody is seen up to frame 9 and from 14 on."""
    box = np.float32([[100, 100, 160, 260]])
    boxes = [box[:0] if 10 <= t < 14 else box for t in range(24)]
    low = [np.zeros(len(here), bool) for here in boxes]
    scene = Scene(boxes, low, [int(t >= cut) for t in range(24)])
    for chunks in ([24], [5]):
        rows = build(scene, chunks, completer=completer)[0].to_pandas()
        assert (rows["state"] == "predicted").sum() == num_predicted
        assert (rows["state"] == "detected").sum() == 20


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


def test_a_body_of_which_nothing_is_seen_keeps_its_reconstruction() -> None:
    """Its looks are unknown, not a number; the tracker takes it all the same."""
    scene = walk(3, 20)
    held = _HeldChunk.of(chunk_of(scene, range(20)))
    assert held.result.appearance is not None
    held.result.appearance[0] = np.nan
    kept = np.flatnonzero(held.result.drop_reason == "")
    columns = _reconstructions(held, kept)
    assert np.isfinite(columns["pred_cam"][kept]).all()
    assert np.isnan(columns["appearance"][kept[0]]).all()
    assert np.isfinite(columns["appearance"][kept[1:]]).all()

"""Quirks of the published tracker that no other test names (docs/PHALP.md, section 15)."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
import torch

from fourdh_batch.geometry import full_image_camera, phalp_camera, rot6d_to_rotmat
from fourdh_batch.models.appearance import TextureMemory, untrained_texture_encoder
from fourdh_batch.models.build_phalp import untrained_pose_predictor
from fourdh_batch.models.predictor import PosePredictor
from fourdh_batch.tracking.track import DetectionRefs
from fourdh_batch.tracking.tracker import PhalpTracker, TrackedFrame, TrackerSettings
from fourdh_batch.types import FrameDetections, People
from tests.texture_maps import random_maps
from tests.tracking_scenes import frame_of_boxes

LEFT, RIGHT = [100.0, 200, 180, 400], [900.0, 200, 980, 400]


@cache
def predictor() -> PosePredictor:
    return untrained_pose_predictor()


def texture_memory() -> TextureMemory:
    return TextureMemory(untrained_texture_encoder())


def with_looks(frame: FrameDetections) -> FrameDetections:
    """Everybody looks the same."""
    return replace(frame, appearance=np.repeat(random_maps(1, seed=1), len(frame.people), 0))


def test_q9_the_first_association_of_a_track_is_lenient() -> None:
    """A jump of half a picture keeps a new track and ends one whose motion is known."""
    jumped = frame_of_boxes(1, [[650.0, 200, 730, 400]])
    new, known = PhalpTracker(), PhalpTracker()
    new.update(frame_of_boxes(0, [LEFT]))
    assert new.update(jumped).detection_track_id.tolist() == [1]
    for t in range(5):
        known.update(frame_of_boxes(t, [LEFT]))
    assert known.update(replace(jumped, frame_index=5)).detection_track_id.tolist() == [2]


def test_q12_a_cut_does_not_change_who_is_matched() -> None:
    for is_cut in (False, True):
        tracker = PhalpTracker()
        for t in range(8):
            tracker.update(frame_of_boxes(t, [LEFT, RIGHT]))
        cut = frame_of_boxes(8, [RIGHT, LEFT], is_shot_start=is_cut)
        assert tracker.update(cut).detection_track_id.tolist() == [2, 1]


def test_q17_everything_that_comes_out_is_a_plain_array() -> None:
    tracker = PhalpTracker(pose_predictor=predictor(), texture=texture_memory())
    for t in range(9):
        tracked = tracker.update(with_looks(frame_of_boxes(t, [LEFT] if t != 7 else [])))
    for field in fields(TrackedFrame):
        value = getattr(tracked, field.name)
        if isinstance(value, DetectionRefs):
            assert all(type(getattr(value, f.name)) is np.ndarray for f in fields(value))
        elif field.name != "frame_index":
            assert type(value) is np.ndarray, field.name
    assert all(type(array) is np.ndarray for array in tracker.state().values())


def test_q19_tracking_leaves_the_cameras_as_they_were() -> None:
    frame = frame_of_boxes(0, [LEFT, RIGHT])
    before = [getattr(frame.people, field.name).copy() for field in fields(People)]
    tracker = PhalpTracker(pose_predictor=predictor())
    for t in range(6):
        tracked = tracker.update(replace(frame, frame_index=t))
    for field, values in zip(fields(People), before, strict=True):
        assert np.array_equal(getattr(frame.people, field.name), values), field.name
    people = frame.people
    camera = full_image_camera(
        people.pred_cam, people.box_center_px, people.box_size_px, frame.image_size_wh
    )
    assert tracked.camera == pytest.approx(camera, rel=1e-5)


def test_q20_the_tracker_reads_the_middle_of_the_box() -> None:
    """A person in the middle of the picture is in the middle of the padded square."""
    frame = frame_of_boxes(0, [[600.0, 260, 680, 460]], image_size_wh=(1280, 720))
    people = frame.people
    camera = phalp_camera(
        people.pred_cam, people.box_center_px, people.box_size_px, frame.image_size_wh
    )
    assert camera[0, :2] == pytest.approx(0, abs=1e-6)


def test_q22_a_track_keeps_one_map() -> None:
    memory = texture_memory()
    tracker = PhalpTracker(texture=memory)
    for t in range(12):
        tracker.update(with_looks(frame_of_boxes(t, [LEFT, RIGHT])))
    assert len(memory._maps) == 2
    one_map = 4 * 4 * 256 * 256
    held = sum(array.nbytes for array in tracker.state().values())
    assert held < 2 * one_map  # the published tracker keeps fourteen per track


def test_q24_looks_and_poses_outlive_a_cut() -> None:
    memory = texture_memory()
    tracker = PhalpTracker(texture=memory)
    for t in range(8):
        tracker.update(with_looks(frame_of_boxes(t, [LEFT], is_shot_start=t == 7)))
    state = tracker.state()
    assert state["track_id"].tolist() == state["texture.track_id"].tolist() == [1]
    assert state["frame_index"][0].tolist() == [1, 2, 3, 4, 5, 6, 7]  # times stay
    assert np.ptp(state["location"][0], axis=0).tolist() == [0, 0, 0]  # places start afresh


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_q25_rotations_do_not_depend_on_the_size_of_the_batch(num: int) -> None:
    rot6d = torch.randn(num, 3, 6, generator=torch.Generator().manual_seed(num))
    rotmat = rot6d_to_rotmat(rot6d)
    assert torch.linalg.det(rotmat).sub(1).abs().max() < 1e-5
    assert torch.equal(rotmat[:1], rot6d_to_rotmat(rot6d[:1]))


def test_q30_a_video_has_no_last_frame_to_track() -> None:
    tracker = PhalpTracker()
    for t in range(1400):
        tracked = tracker.update(frame_of_boxes(t, [LEFT]))
    assert (tracked.track_id.tolist(), tracked.hits.tolist()) == ([1], [1400])


@pytest.mark.parametrize("compat", [False, True])
def test_degenerate_frames_with_all_cues_neither_raise_nor_end_the_video(compat: bool) -> None:
    """Nobody, everybody on one spot, garbage, a long gap; then the video goes on as before."""
    tracker = PhalpTracker(
        TrackerSettings(compat=compat), pose_predictor=predictor(), texture=texture_memory()
    )
    garbage = frame_of_boxes(0, [LEFT] * 4)
    garbage.people.pred_cam[0] = -1
    garbage.people.body_pose[1] = np.nan
    garbage.bbox_xyxy_px[2] = 7
    crowd = frame_of_boxes(0, [LEFT] * 6)
    scenes = [[LEFT]] * 3 + [[]] * 2 + [[LEFT, RIGHT]] * 6
    frames = [frame_of_boxes(0, boxes) for boxes in scenes]
    frames += [garbage, crowd, garbage, frame_of_boxes(0, [])]
    index = 0
    for number, frame in enumerate([*frames, *frames]):
        index += 1 if number != len(frames) else 5000
        tracked = tracker.update(with_looks(replace(frame, frame_index=index)))
        for name in ("bbox_xyxy_px", "camera", "global_orient", "body_pose", "betas"):
            assert np.isfinite(getattr(tracked, name)).all()
    assert tracked.track_id.size > 0

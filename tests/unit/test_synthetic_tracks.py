"""Tracks of people made here, without pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fourdh_batch.errors import TrainingError
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.synthetic.mocap import load_recordings
from fourdh_batch.synthetic.tracks import PlannedTrack, PlannedTracks
from fourdh_batch.tracking.pose import is_sound, split_pose_vectors
from fourdh_batch.training.tracks import BLOCK_EXAMPLES, SyntheticTracks, jittered

CLIPS = 4
FRAMES = 40


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(scope="module")
def tracks(body: SmplBody) -> list[PlannedTrack]:
    planned = PlannedTracks(body, seed=1, num_frames=FRAMES)
    return [track for number in range(CLIPS) for track in planned.clip(number)]


def test_a_clip_follows_from_its_number(body: SmplBody, tracks: list[PlannedTrack]) -> None:
    again = PlannedTracks(body, seed=1, num_frames=FRAMES).clip(CLIPS - 1)
    for one, other in zip(tracks[-len(again) :], again, strict=True):
        np.testing.assert_array_equal(one.body_pose, other.body_pose)
        np.testing.assert_array_equal(one.cam_t_m, other.cam_t_m)
    different = PlannedTracks(body, seed=2, num_frames=FRAMES).clip(CLIPS - 1)
    assert (
        len(different) != len(again) or (different[0].body_pose[0] != again[0].body_pose[0]).any()
    )


def test_people_stand_upright_before_the_camera_and_move(tracks: list[PlannedTrack]) -> None:
    assert len(tracks) >= CLIPS
    moved = []
    for track in tracks:
        assert (np.diff(track.frame_index) >= 1).all()
        assert track.frame_index[-1] < FRAMES
        assert (track.cam_t_m[:, 2] > 1).all()
        steps = np.linalg.norm(np.diff(track.body_pose, axis=0), axis=(2, 3)).max(axis=1)
        assert steps.max() < 1.2  # nobody jumps from one pose to another
        moved.append(np.abs(track.body_pose[-1] - track.body_pose[0]).max())
    up = np.concatenate([track.global_orient[:, 0, 1, 1] for track in tracks])
    assert np.median(up) < -0.9  # camera axes: y points down; some bow
    assert np.median(moved) > 0.1


def test_pose_vectors_have_the_place_in_the_camera_of_the_tracker(body: SmplBody) -> None:
    source = SyntheticTracks(body, "", seed=1, jitter_deg=0, min_rows=2)
    track = PlannedTracks(body, seed=4, num_frames=FRAMES).clip(0)[0]
    poses = source._poses(0, track, np.random.default_rng(0))
    assert is_sound(poses.pose).all()
    global_orient, body_pose, betas, camera = split_pose_vectors(poses.pose)
    np.testing.assert_array_equal(global_orient, track.global_orient)
    np.testing.assert_array_equal(body_pose, track.body_pose)
    np.testing.assert_array_equal(betas, track.betas)
    # The picture of 384 x 288 is padded to a square, which is shown in 256 px.
    width, height = track.image_size_wh
    origin = track.cam_t_m
    true_px = track.focal_px * origin[:, :2] / origin[:, 2:] + np.array([width, height]) / 2
    square_px = (true_px + np.array([0, (width - height) / 2])) * 256 / width
    told_px = 5000 * camera[:, :2] / camera[:, 2:] + 128
    np.testing.assert_allclose(told_px, square_px, rtol=0, atol=1e-2)
    # A metre is as many pixels in either.
    np.testing.assert_allclose(
        5000 / camera[:, 2], track.focal_px / origin[:, 2] * 256 / width, rtol=1e-5
    )


def test_shown_poses_are_wrong_by_what_was_asked_for(body: SmplBody) -> None:
    track = PlannedTracks(body, seed=4, num_frames=FRAMES).clip(0)[0]
    poses = SyntheticTracks(body, "", seed=1, jitter_deg=5, min_rows=2)._poses(
        0, track, np.random.default_rng(0)
    )
    assert is_sound(poses.shown).all()
    np.testing.assert_array_equal(poses.shown[:, 216:], poses.pose[:, 216:])
    told, true = (
        Rotation.from_matrix(p[:, :216].reshape(-1, 3, 3)) for p in (poses.shown, poses.pose)
    )
    wrong_deg = np.degrees((true.inv() * told).as_rotvec())
    assert wrong_deg.std() == pytest.approx(5, rel=0.05)
    assert jittered(poses.pose, 0, np.random.default_rng(0)) is poses.pose


def test_everybody_plays_the_motion_capture_and_ends_with_it(
    body: SmplBody, tmp_path: Path
) -> None:
    num, fps = 31, 25.0
    poses = np.zeros((num, 72))
    poses[:, 3 * 4] = np.linspace(0, 1.2, num)  # the left knee
    trans = np.tile([0.0, 0.0, 0.9], (num, 1))
    np.savez(tmp_path / "knee.npz", poses=poses, trans=trans, mocap_framerate=fps)
    planned = PlannedTracks(body, seed=1, recordings=load_recordings(tmp_path), num_frames=60)
    tracks = [track for number in range(3) for track in planned.clip(number)]
    bend = Rotation.from_euler("x", poses[:, 12][:, None]).as_matrix()
    for track in tracks:
        first = int(track.frame_index[0])
        shot_starts = {0, 20, 30, 40}
        assert len(track.frame_index) <= num
        if len(track.frame_index) == num:
            assert first in shot_starts
            np.testing.assert_allclose(track.body_pose[:, 3], bend, rtol=0, atol=1e-5)
    assert any(len(track.frame_index) == num for track in tracks)


def test_no_track_is_long_enough(body: SmplBody) -> None:
    source = SyntheticTracks(body, "", seed=1, jitter_deg=0, min_rows=1000, block_clips=1)
    with pytest.raises(TrainingError, match="tracks of 1000 rows"):
        source.block(0)


def test_examples_in_a_row_share_clips_that_do_not_come_again(body: SmplBody) -> None:
    source = SyntheticTracks(body, "", seed=1, jitter_deg=3, min_rows=20, block_clips=2)
    random = np.random.default_rng(0)
    first = {source.draw(number, random).video for number in range(40)}
    later = {
        source.draw(number, random).video for number in range(BLOCK_EXAMPLES, BLOCK_EXAMPLES + 40)
    }
    assert first == {("", "0"), ("", "1")}
    assert later == {("", "2"), ("", "3")}
    again = SyntheticTracks(body, "", seed=1, jitter_deg=3, min_rows=20, block_clips=2)
    np.testing.assert_array_equal(again.block(0)[1].shown, source.block(0)[1].shown)

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import scipy.ndimage
import torch

from fourdh_batch.geometry import crop_camera_translation, project_to_crop
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.synthetic.crops import (
    BLOCK,
    HIDDEN_BY_M,
    Crops,
    CropStudio,
    coarse_mesh,
    crops,
)
from fourdh_batch.synthetic.gestures import mirrored
from fourdh_batch.synthetic.limits import LIMITS
from fourdh_batch.synthetic.mocap import Recording

SIZE_HW = (128, 96)


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


def make(body: SmplBody, start: int = 0, count: int = 1, seed: int = 0) -> list[Crops]:
    made = crops(body, seed=seed, start=start, size_hw=SIZE_HW, num_places=2, num_outfits=8)
    return list(islice(made, count))


@pytest.fixture(scope="module")
def blocks(body: SmplBody) -> list[Crops]:
    return make(body, count=2)


def test_a_crop_has_all_of_its_truth(blocks: list[Crops]) -> None:
    first, second = blocks
    assert first.index.tolist() == list(range(BLOCK))
    assert second.index.tolist() == list(range(BLOCK, 2 * BLOCK))
    assert first.rgb.shape == (BLOCK, *SIZE_HW, 3)
    assert first.rgb.dtype == np.uint8
    assert first.keypoints_2d.shape == (BLOCK, 44, 3)
    assert first.keypoints_3d.shape == (BLOCK, 44, 4)
    assert first.keypoint_visible.shape == (BLOCK, 44)
    assert first.global_orient.shape == (BLOCK, 1, 3, 3)
    assert first.body_pose.shape == (BLOCK, 23, 3, 3)
    assert first.betas.shape == (BLOCK, 10)
    for name in ("keypoints_2d", "keypoints_3d", "body_pose", "betas", "pred_cam"):
        assert getattr(first, name).dtype == np.float32, name
        assert np.isfinite(getattr(first, name)).all(), name
    assert (first.has_pose == 1).all()
    assert (first.has_betas == 1).all()
    assert np.ptp(first.rgb.reshape(BLOCK, -1), axis=1).min() > 30


def test_the_truth_of_a_crop_is_consistent(blocks: list[Crops], body: SmplBody) -> None:
    for made in blocks:
        keypoints = body.keypoints_3d(
            *(torch.from_numpy(a) for a in (made.global_orient, made.body_pose, made.betas))
        )
        np.testing.assert_allclose(keypoints, made.keypoints_3d[..., :3], atol=1e-5)
        # The weak camera sees the same, but for the perspective of a person who is near.
        moved = crop_camera_translation(torch.from_numpy(made.pred_cam))
        seen = project_to_crop(keypoints, moved).numpy()
        off = np.linalg.norm(seen - made.keypoints_2d[..., :2], axis=2)
        assert (made.pred_cam[:, 0] > 0).all()
        assert off.mean() < 0.03  # of the side
        assert off.max() < 0.2


def test_keypoints_lie_on_the_person(body: SmplBody) -> None:
    """Against the same crops with nobody in them: what differs is the person."""

    class Empty(CropStudio):
        def _boxes(self, vertices_cam, joints_cam, rngs):  # type: ignore[no-untyped-def]
            box = super()._boxes(vertices_cam, joints_cam, rngs)
            vertices_cam[..., 2] = -5.0  # behind the camera; the rest is drawn as before
            return box

    def studio(kind: type[CropStudio]) -> CropStudio:
        return kind(
            body, seed=4, size_hw=SIZE_HW, recordings=(), recorded_share=0, num_places=2,
            num_outfits=8, supersampling=1,
        )  # fmt: skip

    there, empty = studio(CropStudio).block(0), studio(Empty).block(0)
    difference = np.abs(there.rgb.astype(int) - empty.rgb).max(axis=3)
    x = there.keypoints_2d[..., 0] * SIZE_HW[0] + SIZE_HW[1] / 2
    y = there.keypoints_2d[..., 1] * SIZE_HW[0] + SIZE_HW[0] / 2
    on, total = 0, 0
    for i in range(BLOCK):
        silhouette = scipy.ndimage.binary_dilation(difference[i] > 12, iterations=2)
        mine = there.keypoint_visible[i]
        columns = x[i, mine].round().astype(int).clip(0, SIZE_HW[1] - 1)
        rows = y[i, mine].round().astype(int).clip(0, SIZE_HW[0] - 1)
        on += int(silhouette[rows, columns].sum())
        total += int(mine.sum())
    assert total > 20 * BLOCK
    assert on > 0.95 * total


def test_most_people_fill_their_crop_and_some_are_hidden(blocks: list[Crops]) -> None:
    where = np.concatenate([made.keypoints_2d[..., :2] for made in blocks])
    visible = np.concatenate([made.keypoint_visible for made in blocks])
    height = np.ptp(where[..., 1], axis=1)
    assert np.median(height) > 0.5
    share = visible.mean(axis=1)
    assert 0.6 < share.mean() < 0.99
    assert (share < 0.8).any()
    assert (share > 0.97).any()


def test_people_who_pass_hide_each_other(body: SmplBody, monkeypatch: pytest.MonkeyPatch) -> None:
    class Measured(CropStudio):
        def _visible(self, where, z, depth):  # type: ignore[no-untyped-def]
            x = (where[..., 0] * SIZE_HW[0] + SIZE_HW[1] / 2).round().long()
            y = (where[..., 1] * SIZE_HW[0] + SIZE_HW[0] / 2).round().long()
            inside = (x >= 0) & (x < SIZE_HW[1]) & (y >= 0) & (y < SIZE_HW[0])
            crop = torch.arange(BLOCK)[:, None].expand(x.shape)
            nearest = depth[crop, y.clamp(0, SIZE_HW[0] - 1), x.clamp(0, SIZE_HW[1] - 1)]
            self.hidden = inside & (nearest > 0) & (nearest < z - HIDDEN_BY_M)  # things have 0
            return super()._visible(where, z, depth)

    def num_hidden(companion_share: float, passing_share: float) -> int:
        """Of 64 people; more than a quarter of one is behind a body."""
        monkeypatch.setattr("fourdh_batch.synthetic.crops.COMPANION_SHARE", companion_share)
        monkeypatch.setattr("fourdh_batch.synthetic.crops.PASSING_SHARE", passing_share)
        studio = Measured(
            body, seed=0, size_hw=SIZE_HW, recordings=(), recorded_share=0, num_places=2,
            num_outfits=8, supersampling=1,
        )  # fmt: skip
        num = 0
        for number in range(2):
            visible = studio.block(number).keypoint_visible
            hidden = studio.hidden.numpy()
            assert not (visible & hidden).any()
            num += int((hidden.mean(axis=1) > 0.25).sum())
        return num

    near, passing = num_hidden(1.0, 0.0), num_hidden(1.0, 1.0)
    assert passing > 2 * near
    assert passing > 8


def test_some_pictures_end_within_the_box_and_are_black_beyond(body: SmplBody) -> None:
    below, beside = 0, 0
    for made in make(body, count=4):
        black = (made.rgb == 0).all(axis=3)
        rows, columns = black.all(axis=2), black.all(axis=1)
        assert not rows[:, 0].any()  # nobody is cut off at the head
        below += int(rows[:, -1].sum())
        beside += int((columns[:, 0] | columns[:, -1]).sum())
        for i in np.flatnonzero(rows.any(axis=1) | columns.any(axis=1)):
            x = made.keypoints_2d[i, :, 0] * SIZE_HW[0] + SIZE_HW[1] / 2
            y = made.keypoints_2d[i, :, 1] * SIZE_HW[0] + SIZE_HW[0] / 2
            x, y = (v[made.keypoint_visible[i]].round().astype(int) for v in (x, y))
            inside = (x >= 0) & (x < SIZE_HW[1]) & (y >= 0) & (y < SIZE_HW[0])
            shown = ~(rows[i][y[inside]] | columns[i][x[inside]])
            assert shown.all()
    assert 4 <= below <= 40, below  # of 128
    assert 2 <= beside <= 20, beside


def test_a_training_goes_on_from_any_crop(blocks: list[Crops], body: SmplBody) -> None:
    (rest,) = make(body, start=BLOCK + 5)
    assert rest.index[0] == BLOCK + 5
    for name in ("rgb", "keypoints_2d", "pred_cam", "body_pose", "keypoint_visible"):
        np.testing.assert_array_equal(getattr(rest, name), getattr(blocks[1][5:], name))
    (other,) = make(body, seed=1)
    assert np.abs(other.body_pose - blocks[0].body_pose).max() > 0.1


def test_poses_come_from_recordings_too(body: SmplBody) -> None:
    pose = np.zeros((3, 24, 3))
    pose[:, 18, 1] = -1.0  # the left elbow is bent
    made = crops(
        body,
        seed=0,
        size_hw=SIZE_HW,
        recordings=[Recording("bent", pose, np.zeros((3, 3)), 30.0)],
        recorded_share=1.0,
        num_places=1,
        num_outfits=2,
    )
    first = next(made)
    bent = np.arccos(first.body_pose[:, 17:19, 0, 0].clip(-1, 1))  # left and right elbow
    np.testing.assert_allclose(np.sort(bent, axis=1), np.tile([0, 1], (BLOCK, 1)), atol=1e-3)
    assert 0 < (bent[:, 0] < 0.5).sum() < BLOCK  # some are mirrored
    assert mirrored(pose)[0, 19, 1] == 1.0


def test_the_coarse_mesh_is_the_same_surface(body: SmplBody) -> None:
    rows, faces = coarse_mesh(body)
    assert len(np.unique(rows)) == len(rows) < 0.4 * 6890
    assert faces.max() == len(rows) - 1
    vertices = body.v_template.double().numpy()

    def area(points: np.ndarray, corners: np.ndarray) -> float:
        a, b, c = (points[corners[:, k]] for k in range(3))
        return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)

    coarse, fine = area(vertices[rows], faces), area(vertices, body.faces)
    assert 0.85 * fine < coarse < 1.05 * fine
    part, joints = body.part(rows)(
        torch.eye(3).expand(2, 1, 3, 3), torch.eye(3).expand(2, 23, 3, 3), torch.ones(2, 10)
    )
    whole = body(
        torch.eye(3).expand(2, 1, 3, 3), torch.eye(3).expand(2, 23, 3, 3), torch.ones(2, 10)
    )
    torch.testing.assert_close(part, whole.vertices[:, rows], atol=1e-5, rtol=0)
    torch.testing.assert_close(joints, whole.joints, atol=1e-5, rtol=0)


def test_sampled_poses_keep_within_the_limits(blocks: list[Crops]) -> None:
    from scipy.spatial.transform import Rotation

    pose = Rotation.from_matrix(blocks[0].body_pose.reshape(-1, 3, 3)).as_rotvec()
    pose = pose.reshape(BLOCK, 23, 3)
    turned = np.linalg.norm(pose, axis=2) > 2.9  # near pi the vector's sign is not unique
    within = (pose >= LIMITS[1:, 0] - 1e-3) & (pose <= LIMITS[1:, 1] + 1e-3)
    assert (within.all(axis=2) | turned).all()


def test_wrong_wishes_are_refused(body: SmplBody) -> None:
    with pytest.raises(ValueError, match="width <= height"):
        next(crops(body, seed=0, size_hw=(96, 128)))
    with pytest.raises(ValueError, match="start >= 0"):
        next(crops(body, seed=0, start=-1))

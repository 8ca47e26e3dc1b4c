"""What the reference carries per detection, recorded by running it on a made-up frame.

`tests/data/tracking/features.npz`: a frame of coloured noise, five boxes and masks (bits packed
along the rows) of which three pass the size filter, bodies and crop cameras; then what the
reference made of them. The recorded embeddings are left out.

Tolerances: docs/PHALP.md, section 16. The crops were recorded with an OpenCV that interpolates
exactly; ours are those of OpenCV 4, whose positions are multiples of 1/32 pixel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fourdh_batch.geometry import (
    crop_square,
    expand_to_aspect,
    phalp_camera,
    project_to_canvas,
    xyxy_to_xywh,
)
from fourdh_batch.models.detector import drop_reasons
from fourdh_batch.tracking.location import locate
from fourdh_batch.tracking.pose import pose_vectors
from fourdh_batch.types import Detections, People
from fourdh_batch.video.crops import MEAN_RGB, STD_RGB, crop_batch, crop_masks

GOLDEN = Path(__file__).parents[1] / "data" / "tracking" / "features.npz"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as z:
        return {name: z[name] for name in z.files}


def people(golden: dict[str, np.ndarray]) -> People:
    center, size = crop_square(golden["boxes_xyxy"][:3])
    return People(
        global_orient=golden["rotmats"][:, :1],
        body_pose=golden["rotmats"][:, 1:],
        betas=golden["betas"],
        pred_cam=golden["pred_cam"],
        box_center_px=center,
        box_size_px=size,
        keypoints_3d_m=golden["joints44"],
    )


def camera(golden: dict[str, np.ndarray]) -> np.ndarray:
    body = people(golden)
    size_wh = golden["image_bgr"].shape[1::-1]
    return phalp_camera(body.pred_cam, body.box_center_px, body.box_size_px, size_wh)


def test_small_boxes_are_dropped_and_the_others_grow_to_three_by_four(
    golden: dict[str, np.ndarray],
) -> None:
    boxes = golden["boxes_xyxy"]
    detections = Detections(np.zeros(5, np.int64), boxes, np.ones(5, np.float32))
    reasons = drop_reasons(detections, score_threshold=0.8, min_width_px=50, min_height_px=100)
    assert reasons.tolist() == ["", "", "", "too_small", "too_small"]
    np.testing.assert_allclose(expand_to_aspect(boxes), golden["padded_xyxy"], **TOLERANCE)
    np.testing.assert_allclose(xyxy_to_xywh(boxes[:3]), golden["det_bbox"], **TOLERANCE)
    np.testing.assert_allclose(people(golden).box_center_px, golden["det_center"], **TOLERANCE)


def test_crops_have_the_four_channels_of_the_reference(golden: dict[str, np.ndarray]) -> None:
    body, row = people(golden), torch.arange(3)
    square = torch.from_numpy(body.box_center_px), torch.from_numpy(body.box_size_px)
    frame = torch.from_numpy(golden["image_bgr"][None, ..., ::-1].copy())
    crops = crop_batch(frame, torch.zeros_like(row), *square).permute(0, 2, 3, 1)
    levels = (crops.numpy() * STD_RGB + MEAN_RGB).transpose(0, 3, 1, 2)
    is_close = np.abs(levels - golden["crop_rgb_uint8"]) < 1.01
    assert (is_close.mean(axis=(1, 2, 3)) >= 0.995).all()
    masks = torch.from_numpy(np.unpackbits(golden["seg_masks"][:3], axis=2) * np.uint8(255))
    is_covered = crop_masks(masks, row, *square).numpy() > 0  # all that the sampler asks
    assert (is_covered == (golden["crop_mask"] > 0)).mean() >= 0.999


def test_cameras_and_locations(golden: dict[str, np.ndarray]) -> None:
    found, recorded = camera(golden), golden["det_loca"]
    np.testing.assert_allclose(found, golden["det_camera"], **TOLERANCE)
    np.testing.assert_allclose(found, recorded[:, 90:93], **TOLERANCE)
    location = locate(found)
    np.testing.assert_allclose(location[:, :2], recorded[:, 88:90], **TOLERANCE)
    np.testing.assert_allclose(np.exp(location[:, 2]), recorded[:, 92], **TOLERANCE)
    # 44 joints, then the model's origin
    points = np.concatenate([golden["joints44"], np.zeros((3, 1, 3), np.float32)], axis=1)
    np.testing.assert_allclose(points, golden["det_3d_joints"], **TOLERANCE)
    projected = project_to_canvas(points, found).reshape(3, 90)
    np.testing.assert_allclose(projected, golden["det_2d_joints"], **TOLERANCE)
    np.testing.assert_allclose(projected, recorded[:, :90], **TOLERANCE)


def test_pose_vectors(golden: dict[str, np.ndarray]) -> None:
    vectors = pose_vectors(people(golden), camera(golden))
    np.testing.assert_allclose(vectors, golden["det_pose"], **TOLERANCE)

"""Rotations, boxes, cameras and projection.

Dimension letters: `M` people (or boxes), `K` points. Functions of the network's own forward pass
take and give torch tensors: `rot6d_to_rotmat`, `crop_camera_translation`, `project_to_crop`. All
others take and give NumPy arrays, for the tracker and the tables.

Camera axes: x right, y down, z forward; metres. Pixels follow OpenCV: integer coordinates are
pixel centres. Box formats: `xyxy` corners, `xywh` upper left corner and size, `cxcywh` centre and
size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fourdh_batch.types import F32, F64

if TYPE_CHECKING:  # imported where it is used: the tracker's process does without torch
    from torch import Tensor

Floats = NDArray[np.floating[Any]]

CROP_PX = 256  # side of the square crop that HMR 2.0 looks at
CROP_FOCAL_PX = 5000.0  # focal length of the crop camera (HMR 2.0, EXTRA.FOCAL_LENGTH)
FOCAL_PER_SIDE = CROP_FOCAL_PX / CROP_PX  # focal length over picture side, in every camera here
BBOX_ASPECT_WH = (192, 256)  # HMR 2.0, MODEL.BBOX_SHAPE: boxes grow to this width : height
DEPTH_EPSILON = 1e-9  # added to the divisor of a depth, as published
SCALE_UNIT_PX = np.float32(200)  # published records hold box sizes in units of 200 px

# ---------------------------------------------------------------- rotations


def rot6d_to_rotmat(rot6d: Tensor) -> Tensor:
    """Rotations from their first two columns by Gram-Schmidt.

    Args:
        rot6d: (..., 6): three numbers of the first column, then three of the second. (Related
            code bases interleave them as 3 x 2; HMR 2.0 does not.)

    Returns:
        (..., 3, 3) with the orthonormal columns b1, b2, b3. Norms are clamped below at 1e-12.

    Source: Zhou et al., On the Continuity of Rotation Representations, equation 15.
    """
    import torch
    import torch.nn.functional as F

    a1, a2 = rot6d[..., :3], rot6d[..., 3:]
    b1 = F.normalize(a1, dim=-1)
    b2 = F.normalize(a2 - (b1 * a2).sum(-1, keepdim=True) * b1, dim=-1)
    b3 = torch.linalg.cross(b1, b2, dim=-1)
    return torch.stack((b1, b2, b3), dim=-1)


def axis_angle_to_rotmat(axis_angle: ArrayLike) -> Floats:
    """Rotation matrices of axis-angle vectors, through a quaternion.

    Args:
        axis_angle: (..., 3) radians. As published, 1e-8 is added to every component before the
            angle is taken, so that a zero vector gives the identity.

    Returns:
        (..., 3, 3), of the dtype given (float32 or float64).
    """
    vector = np.asarray(axis_angle)
    angle = np.linalg.norm(vector + vector.dtype.type(1e-8), axis=-1, keepdims=True)
    quaternion = np.concatenate(
        (np.cos(angle / 2), np.sin(angle / 2) * vector / angle), axis=-1, dtype=vector.dtype
    )
    w, x, y, z = np.moveaxis(quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
    rows = (
        (w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (w * y + x * z)),
        (2 * (w * z + x * y), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (w * x + y * z), w * w - x * x - y * y + z * z),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def rotmat_to_axis_angle(rotmat: ArrayLike) -> Floats:
    """Axis-angle vectors of rotation matrices; the inverse of `axis_angle_to_rotmat`.

    Args:
        rotmat: (..., 3, 3) orthonormal.

    Returns:
        (..., 3) radians with length in [0, pi], of the dtype given. Computed in float64 and
        through the largest quaternion component, hence exact to rounding near 0 and near pi.
    """
    given = np.asarray(rotmat)
    m = given.astype(np.float64)
    diagonal = np.diagonal(m, axis1=-2, axis2=-1)
    trace = diagonal.sum(-1, keepdims=True)
    # 4 q_i q_j for all pairs of quaternion components (w, x, y, z): a rank-one matrix, of which
    # the row with the largest diagonal element is the best conditioned multiple of q.
    products = np.empty((*m.shape[:-2], 4, 4))
    products[..., 0, 0] = 1 + trace[..., 0]
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        products[..., i + 1, i + 1] = 1 + 2 * m[..., i, i] - trace[..., 0]
        products[..., i + 1, j + 1] = products[..., j + 1, i + 1] = m[..., i, j] + m[..., j, i]
        products[..., 0, i + 1] = products[..., i + 1, 0] = m[..., k, j] - m[..., j, k]
    largest = np.diagonal(products, axis1=-2, axis2=-1).argmax(-1)[..., None, None]
    quaternion = np.take_along_axis(products, largest, axis=-2)[..., 0, :]
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    quaternion = np.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    imaginary = quaternion[..., 1:]
    sine = np.linalg.norm(imaginary, axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, quaternion[..., :1])
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = np.where(sine < 1e-12, 2.0, angle / sine)
    return (imaginary * factor).astype(given.dtype)


# ---------------------------------------------------------------- boxes


def xyxy_to_cxcywh(bbox_xyxy: Floats) -> Floats:
    """(..., 4) corners to centre and size."""
    low, high = bbox_xyxy[..., :2], bbox_xyxy[..., 2:]
    return np.concatenate(((low + high) / 2, high - low), axis=-1, dtype=bbox_xyxy.dtype)


def cxcywh_to_xyxy(bbox_cxcywh: Floats) -> Floats:
    """(..., 4) centre and size to corners."""
    center, half = bbox_cxcywh[..., :2], bbox_cxcywh[..., 2:] / 2
    return np.concatenate((center - half, center + half), axis=-1, dtype=bbox_cxcywh.dtype)


def xyxy_to_xywh(bbox_xyxy: Floats) -> Floats:
    """(..., 4) corners to upper left corner and size."""
    low, high = bbox_xyxy[..., :2], bbox_xyxy[..., 2:]
    return np.concatenate((low, high - low), axis=-1)


def xywh_to_xyxy(bbox_xywh: Floats) -> Floats:
    """(..., 4) upper left corner and size to corners."""
    low, size = bbox_xywh[..., :2], bbox_xywh[..., 2:]
    return np.concatenate((low, low + size), axis=-1)


def expand_to_aspect(bbox_xyxy: ArrayLike, aspect_wh: tuple[int, int] = BBOX_ASPECT_WH) -> F32:
    """Grow boxes about their centres until width : height fits; never shrink, never clip.

    Args:
        bbox_xyxy: (..., 4) pixels.
        aspect_wh: width and height of the wanted ratio.

    Returns:
        (..., 4) float32 pixels.
    """
    box = xyxy_to_cxcywh(np.asarray(bbox_xyxy, dtype=np.float32))
    return cxcywh_to_xyxy(
        np.concatenate((box[..., :2], _grown_size(box[..., 2:], aspect_wh)), axis=-1)
    ).astype(np.float32, copy=False)


def crop_square(bbox_xyxy: ArrayLike) -> tuple[F32, F32]:
    """The square that is cropped around boxes.

    Args:
        bbox_xyxy: (..., 4) pixels, as the detector gives them.

    Returns:
        center (..., 2) and side (...) in pixels, float32: the longer side of the box grown to
        192 : 256, without any further margin. Equal to the published values to the last bit:
        the size goes through units of 200 px on its way.

    Source: HMR 2.0's demo data set.
    """
    box = xyxy_to_cxcywh(np.asarray(bbox_xyxy, dtype=np.float32))
    size = box[..., 2:] / SCALE_UNIT_PX * SCALE_UNIT_PX
    return box[..., :2].astype(np.float32), _grown_size(size, BBOX_ASPECT_WH).max(-1)


def _grown_size(size_wh: Floats, aspect_wh: tuple[int, int]) -> F32:
    width, height = size_wh[..., 0], size_wh[..., 1]
    aspect_w, aspect_h = np.float32(aspect_wh[0]), np.float32(aspect_wh[1])
    too_wide = height * aspect_w < width * aspect_h
    grown_w = np.where(too_wide, width, np.maximum(width, height * aspect_w / aspect_h))
    grown_h = np.where(too_wide, np.maximum(height, width * aspect_h / aspect_w), height)
    return np.stack((grown_w, grown_h), axis=-1).astype(np.float32, copy=False)


def box_iou(a_xyxy: Floats, b_xyxy: Floats) -> Floats:
    """(A, B) intersection over union of (A, 4) and (B, 4) corners; 0 where both are empty."""
    low = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    high = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    overlap = np.prod(np.maximum(high - low, 0), axis=2)
    area_a = np.prod(a_xyxy[:, 2:] - a_xyxy[:, :2], axis=1)
    area_b = np.prod(b_xyxy[:, 2:] - b_xyxy[:, :2], axis=1)
    union = area_a[:, None] + area_b[None, :] - overlap
    return np.asarray(np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0))


# ---------------------------------------------------------------- cameras


def crop_camera_translation(pred_cam: Tensor) -> Tensor:
    """Translation of the crop camera, focal length 5000 px on the 256 px crop.

    Args:
        pred_cam: (M, 3) weak perspective (s, tx, ty); s in half crops per metre, tx, ty in metres.

    Returns:
        (M, 3) metres.

    Source: HMR 2.0, section 3.1.
    """
    import torch

    depth = 2 * CROP_FOCAL_PX / (CROP_PX * pred_cam[:, 0] + DEPTH_EPSILON)
    return torch.stack((pred_cam[:, 1], pred_cam[:, 2], depth), dim=-1)


def project_to_crop(points: Tensor, pred_cam_t: Tensor) -> Tensor:
    """Perspective projection into the crop.

    Args:
        points: (M, K, 3) metres, model frame.
        pred_cam_t: (M, 3) metres, of `crop_camera_translation`.

    Returns:
        (M, K, 2) in crop widths, 0 is the crop centre, -0.5 to 0.5 is visible.
    """
    moved = points + pred_cam_t[:, None]
    return FOCAL_PER_SIDE * (moved[..., :2] / moved[..., 2:])


def crop_to_image(keypoints_crop: Floats, box_center: Floats, box_size: Floats) -> Floats:
    """Points of `project_to_crop` in pixels of the full frame.

    Args:
        keypoints_crop: (M, K, 2) crop widths.
        box_center: (M, 2) px.
        box_size: (M,) px.
    """
    scaled: Floats = keypoints_crop * box_size[:, None, None]
    return scaled + box_center[:, None]


def full_image_focal(image_size_wh: ArrayLike) -> F64:
    """Focal length (...) px of `full_image_camera` in frames (..., 2): 5000/256 * longer side."""
    sides: F64 = np.asarray(image_size_wh, dtype=np.float64).max(-1)
    return np.asarray(FOCAL_PER_SIDE * sides)


def full_image_camera(
    pred_cam: Floats, box_center: Floats, box_size: Floats, image_size_wh: ArrayLike
) -> F32:
    """Translation of the camera that shows a crop's person in the full frame.

    Its focal length is `full_image_focal`, its principal point the frame's centre (W/2, H/2).
    The focal length follows each person's own frame, where the published demo takes the largest
    of the batch.

    Args:
        pred_cam: (M, 3) weak perspective (s, tx, ty) of the crop.
        box_center: (M, 2) px.
        box_size: (M,) px.
        image_size_wh: (2,) for all, or (M, 2) px.

    Returns:
        (M, 3) metres, float32; computed in float64.
    """
    cam, center, size_wh = _camera_inputs(pred_cam, box_center, image_size_wh)
    scaled = (box_size * cam[:, 0] + DEPTH_EPSILON)[:, None]
    depth = 2 * full_image_focal(size_wh)[:, None] / scaled
    xy = cam[:, 1:] + 2 * (center - size_wh / 2) / scaled
    return np.concatenate((xy, depth), axis=-1).astype(np.float32)


def phalp_camera(
    pred_cam: Floats, box_center: Floats, box_size: Floats, image_size_wh: ArrayLike
) -> F32:
    """Camera of the tracker: focal length 5000 px on the frame padded to a square of 256 px.

    Equals `full_image_camera` except where the padding is odd: it is split by integer division,
    which moves the centre by half a source pixel.

    Args:
        pred_cam: (M, 3) weak perspective (s, tx, ty) of the crop.
        box_center: (M, 2) px in the full frame.
        box_size: (M,) px.
        image_size_wh: (2,) for all, or (M, 2) px.

    Returns:
        (M, 3) metres, float32; computed in float64.

    Source: PHALP, as 4D-Humans' tracking script uses it.
    """
    cam, center, size_wh = _camera_inputs(pred_cam, box_center, image_size_wh)
    side = size_wh.max(-1, keepdims=True)
    ratio = CROP_PX / side
    canvas_center = (center + (side - size_wh) // 2) * ratio
    scaled = cam[:, :1] * box_size[:, None] * ratio + DEPTH_EPSILON
    depth = 2 * CROP_FOCAL_PX / scaled
    xy = cam[:, 1:] + (canvas_center - CROP_PX / 2) * depth / CROP_FOCAL_PX
    return np.concatenate((xy, depth), axis=-1).astype(np.float32)


def project_full_image(
    points: Floats, cam_t_full: Floats, focal_px: ArrayLike, principal_point_px: ArrayLike
) -> F32:
    """Perspective projection into the full frame.

    Args:
        points: (M, K, 3) metres, model frame.
        cam_t_full: (M, 3) metres.
        focal_px: one for all, or (M,) px.
        principal_point_px: (2,) for all, or (M, 2) px.

    Returns:
        (M, K, 2) pixels, float32; computed in float64.
    """
    moved = points.astype(np.float64) + cam_t_full[:, None]
    focal = np.broadcast_to(focal_px, len(points))[:, None, None]
    principal = np.broadcast_to(principal_point_px, (len(points), 2))[:, None]
    projected: F64 = moved[..., :2] / moved[..., 2:] * focal + principal
    return projected.astype(np.float32)


def project_to_canvas(points: Floats, phalp_cam_t: Floats) -> F32:
    """Perspective projection into the tracker's square canvas.

    Args:
        points: (M, K, 3) metres, model frame.
        phalp_cam_t: (M, 3) metres, of `phalp_camera`.

    Returns:
        (M, K, 2) in canvas sides, 0 to 1 inside, float32; computed in float64.
    """
    return project_full_image(points, phalp_cam_t, FOCAL_PER_SIDE, (0.5, 0.5))


def _camera_inputs(
    pred_cam: Floats, box_center: Floats, image_size_wh: ArrayLike
) -> tuple[F64, F64, F64]:
    center = box_center.astype(np.float64)
    size_wh = np.broadcast_to(np.asarray(image_size_wh, dtype=np.float64), center.shape)
    return pred_cam.astype(np.float64), center, size_wh

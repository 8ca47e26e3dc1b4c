"""Bodies and boxes that another pose engine has written: read, checked, and made ours.

One file holds one video, but for Parquet. What every field becomes, the camera formulas and the
places where the layouts are published: docs/POSE_ENGINES.md.

`parquet`, `npz`: our own plain layout, for whatever has no reader here. `phalp`: results of
4D-Humans and of PHALP with HMAR. `pare`, `pymafx`: output of their video demos. `cliff`: npz of
its demo.

Pickles are read by `models/unpickle.py`, so nothing in them runs. A file whose numbers cannot be
meant (wrong shapes, boxes that are not finite, matrices that are no rotations) is refused with the
file, video and frame; one person without a usable body is kept as a box and marked
``invalid_pose``.

Dimension letters: `T` frames of a video, `N` its boxes, `M` its bodies.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fourdh_batch.errors import (
    BadPosesError,
    CheckpointError,
    ConfigError,
    ManifestError,
    StorageError,
)
from fourdh_batch.geometry import (
    FOCAL_PER_SIDE,
    Floats,
    axis_angle_to_rotmat,
    crop_square,
    cxcywh_to_xyxy,
    xywh_to_xyxy,
)
from fourdh_batch.masks import run_lengths
from fourdh_batch.models.unpickle import load_restricted_joblib
from fourdh_batch.storage import fingerprint_file, list_files, open_read
from fourdh_batch.types import F32, F64, I64, NUM_BETAS, NUM_BODY_JOINTS, Bool, RleMask

LAYOUTS = ("parquet", "npz", "phalp", "pare", "pymafx", "cliff")
ENDINGS = (".parquet", ".npz", ".pkl", ".joblib")
DEFAULT_FPS = 30.0  # for presentation times where nothing tells the rate
INVALID_POSE = "invalid_pose"
APPEARANCE_SIZE = 256
NUM_ROTATIONS = 1 + NUM_BODY_JOINTS
MAX_FRAMES = 10_000_000  # four days at 30 frames per second
# Frames without a box that a file may claim without listing them: three hours at 30 frames per
# second, and more with every frame in which it has somebody. They are tracked like any other, so a
# file of a few rows could hold a process for hours.
MAX_EMPTY_FRAMES = 300_000
MAX_EMPTY_PER_BUSY_FRAME = 100
MAX_COORDINATE_PX = 1e9
MAX_IMAGE_SIDE_PX = 1_000_000
MAX_NPZ_BYTES = 4 * 2**30  # of the arrays that are wanted
MAX_ROTATION_ERROR = 0.02  # of R R^T against the identity; engines write single precision
MAX_SIZE_ERROR_PX = 0.5  # of a frame size that was computed back from cameras
SAME_SQUARE = 1e-4  # of its side: a crop this close to ours is left as it is
UNREADABLE = "unreadable"  # begins the fingerprint of a file that could not be read

# Names of the published files that say nothing about the video: the folder's name stands for it.
FOLDER_NAMED = ("pare_output", "output")
CLIFF_SUFFIX = re.compile(r"_cliff_(?:hr48|res50)(?:_infill)?$")
# Large arrays under these keys are not even read.
UNWANTED = frozenset(
    (
        *(
            "verts",
            "smplx_verts",
            "joints3d",
            "joints2d",
            "smpl_joints2d",
            "3d_joints",
            "2d_joints",
        ),
        *("appe", "uv", "prediction_uv", "embedding", "frame"),
    )
)
NPZ_FIELDS = (
    *("frame_index", "bbox_xyxy_px", "score", "rotmat", "poses", "global_orient", "body_pose"),
    *("betas", "pred_cam", "box_center_px", "box_size_px", "cam_t_m", "focal_px"),
    *("principal_point_px", "image_size_px", "num_frames", "fps", "pts_s", "is_shot_start"),
    "appearance",
)
PARQUET_FIELDS = (*NPZ_FIELDS, "mask_rle", "drop_reason")
# What a dictionary that only looks like one of a layout makes a reader raise.
_MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, MemoryError)
CLIFF_FIELDS = ("imgname", "pose", "shape", "global_t", "focal_l", "detection_all")
CROP_FIELDS = ("pred_cam", "orig_cam", "pose", "betas", "bboxes", "frame_ids")


@dataclass(frozen=True, slots=True)
class GivenVideo:
    """A video whose poses are given.

    Attributes:
        video_id: unique in its source.
        uri: of the file with the poses.
        num_bytes: size of that file; divided among its videos where it holds several.
        fingerprint: of the content.
    """

    video_id: str
    uri: str
    num_bytes: int
    fingerprint: str


@dataclass(frozen=True, slots=True, eq=False)
class GivenRows:
    """What a file says, one row per box, nothing checked but shapes.

    Attributes:
        where: the file, for messages.
        frame_index: (N,) 0-based.
        bbox_xyxy_px: (N, 4).
        score: (N,), None where the file has none.
        rotmat: (N, 24, 3, 3) root and body joints; NaN where a box has no body.
        betas: (N, 10).
        pred_cam: (N, 3) weak perspective (s, tx, ty) of the square below.
        box_center_px, box_size_px: (N, 2), (N,) the square.
        image_size_px: (N, 2) width and height.
        num_frames: of the video; None: up to the last box.
        frames: (F,) indices of the frames that were looked at; None: all of `num_frames`.
        frame_pts_s: (F,) their times, None where unknown.
        pts_s: (N,) presentation times, None where unknown; they go before `frame_pts_s`.
        fps: frames per second, None where unknown.
        cuts: frames that begin a shot.
        drop_reason: (N,) text, None: nothing was dropped.
        masks: N masks, or None.
        appearance: (N, 256) compact looks, or None.
    """

    where: str
    frame_index: F64
    bbox_xyxy_px: F64
    score: F64 | None
    rotmat: F64
    betas: F64
    pred_cam: F64
    box_center_px: F64
    box_size_px: F64
    image_size_px: F64
    num_frames: int | None = None
    frames: I64 | None = None
    frame_pts_s: F64 | None = None
    pts_s: F64 | None = None
    fps: float | None = None
    cuts: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    drop_reason: Sequence[str] | None = None
    masks: Sequence[RleMask] | None = None
    appearance: NDArray[Any] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class VideoPoses:
    """A whole video as the tracker wants it, without keypoints.

    Attributes:
        frame_index, pts_s: (T,) all frames that were looked at, also empty ones; seconds.
        image_size_px: (T, 2) width and height of each frame.
        is_shot_start: (T,).
        fps: where known.
        frame_row: (N,) row of each box's frame, non-decreasing.
        bbox_xyxy_px, score: (N, 4) full frame, (N,) in [0, 1].
        drop_reason: (N,) text, empty for the M boxes with a body.
        masks: N masks or None.
        global_orient, body_pose: (M, 1, 3, 3), (M, 23, 3, 3) rotation matrices, camera axes and
            parent joint.
        betas: (M, 10).
        pred_cam: (M, 3) weak perspective (s, tx, ty) of the square; half crops per metre, metres.
        box_center_px, box_size_px: (M, 2), (M,) the square crop of the box grown to 3:4.
        appearance: (M, 256) float16 compact looks, or None.
    """

    frame_index: I64
    pts_s: F64
    image_size_px: I64
    is_shot_start: Bool
    fps: float | None
    frame_row: I64
    bbox_xyxy_px: F32
    score: F32
    drop_reason: NDArray[np.str_]
    masks: Sequence[RleMask] | None
    global_orient: F32
    body_pose: F32
    betas: F32
    pred_cam: F32
    box_center_px: F32
    box_size_px: F32
    appearance: NDArray[np.float16] | None


class PoseSource(Protocol):
    """Where poses come from."""

    def videos(self) -> list[GivenVideo]:
        """All videos, in `video_id` order."""

    def read(self, video: GivenVideo) -> VideoPoses:
        """The poses of one of them. Raises: VideoError."""


def open_poses(
    path: str,
    *,
    layout: str = "auto",
    image_size_px: tuple[int, int] | None = None,
    fps: float | None = None,
) -> PoseSource:
    """Poses in files.

    Args:
        path: file, folder or glob, local or remote; folders are searched at all depths.
        layout: one of `LAYOUTS`; ``auto``: by ending, then each file by what is in it.
        image_size_px: width and height of all videos, for files that do not tell.
        fps: frames per second of all videos, for files that do not tell.

    Raises:
        ConfigError: unknown layout.
        ManifestError: there is no file of this layout.
    """
    if layout not in (*LAYOUTS, "auto"):
        raise ConfigError(
            f"poses.layout: expected auto or one of {', '.join(LAYOUTS)}, got {layout!r}"
        )
    endings = {
        "auto": ENDINGS,
        "parquet": (".parquet",),
        "npz": (".npz",),
        "cliff": (".npz",),
    }.get(layout, (".npz", ".pkl", ".joblib"))
    try:
        files = list_files(path, endings)
    except (FileNotFoundError, StorageError) as error:
        raise ManifestError(f"input {path}: not found ({error})") from error
    files = [item for item in files if not _is_private(item[0])]
    if not files:
        raise ManifestError(f"input {path}: no file ending in {' '.join(endings)}")
    parquet = [item for item in files if item[0].lower().endswith(".parquet")]
    if layout == "auto" and parquet and len(parquet) < len(files):
        raise ManifestError(
            f"input {path}: expected one kind of files, got {parquet[0][0]} beside others; "
            "give poses.layout"
        )
    if parquet:
        return ParquetPoses(files, image_size_px=image_size_px, fps=fps)
    return FilePoses(path, files, layout=layout, image_size_px=image_size_px, fps=fps)


def _is_private(relative: str) -> bool:
    """Whether a name or folder begins with `_`: not part of a table."""
    return any(part.startswith("_") for part in relative.split("/"))


# --- cameras -----------------------------------------------------------------------------------


def camera_of_square(
    cam_t_m: Floats,
    focal_px: Floats,
    principal_point_px: Floats,
    box_center_px: Floats,
    box_size_px: Floats,
) -> F64:
    """Weak-perspective camera (s, tx, ty) of a square, from a camera of the full frame.

    Inverts `geometry.full_image_camera` for any focal length and principal point: the model
    origin stays at its pixel, and the scale there, focal_px / z, stays too.

    Args:
        cam_t_m: (N, 3) translation of the body; metres, camera axes.
        focal_px: (N,).
        principal_point_px: (N, 2).
        box_center_px, box_size_px: (N, 2), (N,) the square.

    Returns:
        (N, 3): s = 2 f / (z b), t = t_full + (p - c) z / f.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        metres_per_px = (cam_t_m[:, 2] / focal_px)[:, None]
        scale = 2 / (metres_per_px * box_size_px[:, None])
        shift = cam_t_m[:, :2] + (principal_point_px - box_center_px) * metres_per_px
    return np.concatenate((scale, shift), axis=1)


def camera_of_other_square(
    pred_cam: Floats,
    box_center_px: Floats,
    box_size_px: Floats,
    new_center_px: Floats,
    new_size_px: Floats,
) -> F64:
    """The same camera in another square: s' = s b / b', t' = t + 2 (c - c') / (s b).

    Args:
        pred_cam: (N, 3) weak perspective (s, tx, ty) of the first square.
        box_center_px, box_size_px: (N, 2), (N,) the first square.
        new_center_px, new_size_px: the second.

    Returns:
        (N, 3); `geometry.full_image_camera` gives the same translation for both.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        px_per_metre = (pred_cam[:, :1] * box_size_px[:, None]) / 2
        scale = 2 * px_per_metre / new_size_px[:, None]
        shift = pred_cam[:, 1:] + (box_center_px - new_center_px) / px_per_metre
    return np.concatenate((scale, shift), axis=1)


def _square_of(bbox_xyxy_px: Floats) -> tuple[F64, F64]:
    """`geometry.crop_square` in float64, also of boxes that are refused later."""
    with np.errstate(invalid="ignore", over="ignore"):
        center, side = crop_square(bbox_xyxy_px)
    return center.astype(np.float64), side.astype(np.float64)


# --- from a file's rows to a video -------------------------------------------------------------


def settle(rows: GivenRows, video_id: str, *, default_fps: float | None = None) -> VideoPoses:
    """Check the rows of a video, put them in frame order, and bring cameras to our square crop.

    Args:
        rows: as read.
        video_id: for messages.
        default_fps: where the file has no times.

    Raises:
        BadPosesError: numbers that cannot be meant; names the first.
    """
    _check_rows(rows, video_id)
    order = np.argsort(rows.frame_index, kind="stable")
    frame = rows.frame_index[order].astype(np.int64)
    frames = _frames(rows, frame, video_id)
    frame_row = np.searchsorted(frames, frame)
    bbox = rows.bbox_xyxy_px[order].astype(np.float32)
    score = np.ones(len(order)) if rows.score is None else rows.score[order]

    center, side = _square_of(bbox)
    given_center, given_size = rows.box_center_px[order], rows.box_size_px[order]
    near = SAME_SQUARE * side
    is_ours = (np.abs(given_center - center).max(1, initial=0) <= near) & (
        np.abs(given_size - side) <= near
    )
    is_ours |= side <= 0  # no square at all: left to the tracker, which refuses the box
    pred_cam = rows.pred_cam[order]
    moved = camera_of_other_square(pred_cam, given_center, given_size, center, side)
    pred_cam = np.where(is_ours[:, None], pred_cam, moved)
    center = np.where(is_ours[:, None], given_center, center)
    side = np.where(is_ours, given_size, side)

    rotmat, betas = rows.rotmat[order], rows.betas[order]
    finite = np.ones(len(order), dtype=np.bool_)
    for values in (rotmat, betas, pred_cam, center, side):
        single = np.isfinite(values) & (np.abs(values) < np.finfo(np.float32).max)
        finite &= single.all(axis=tuple(range(1, values.ndim)))
    given = rows.drop_reason
    reason = np.array(["" if given is None else given[i] for i in order.tolist()], dtype="<U16")
    reason[(reason == "") & ~finite] = INVALID_POSE
    kept = np.flatnonzero(reason == "")
    is_shot_start = np.isin(frames, rows.cuts)
    is_shot_start[:1] = False  # the first frame begins the first shot without a cut
    appearance = rows.appearance
    return VideoPoses(
        frame_index=frames,
        pts_s=_times(rows, frames, order, default_fps),
        image_size_px=_sizes(rows, frames, frame_row, order, video_id),
        is_shot_start=is_shot_start,
        fps=rows.fps if rows.fps is not None else default_fps,
        frame_row=frame_row,
        bbox_xyxy_px=bbox,
        score=score.astype(np.float32),
        drop_reason=reason,
        masks=None if rows.masks is None else [rows.masks[i] for i in order.tolist()],
        global_orient=rotmat[kept, :1].astype(np.float32),
        body_pose=rotmat[kept, 1:].astype(np.float32),
        betas=betas[kept].astype(np.float32),
        pred_cam=pred_cam[kept].astype(np.float32),
        box_center_px=center[kept].astype(np.float32),
        box_size_px=side[kept].astype(np.float32),
        appearance=None if appearance is None else _half(appearance[order[kept]]),
    )


def _half(looks: NDArray[Any]) -> NDArray[np.float16]:
    """Half precision; what does not fit counts as unknown looks."""
    fits = np.abs(looks) <= np.finfo(np.float16).max
    result: NDArray[np.float16] = np.where(fits, looks, np.nan).astype(np.float16)
    return result


def _check_rows(rows: GivenRows, video_id: str) -> None:
    """Raises: BadPosesError: names the first bad row."""
    frame, box = rows.frame_index, rows.bbox_xyxy_px
    with np.errstate(invalid="ignore", over="ignore"):
        gram = rows.rotmat @ rows.rotmat.swapaxes(-1, -2) - np.eye(3)
        off = np.abs(gram).max(axis=(1, 2, 3), initial=0)
        turned = np.linalg.det(np.nan_to_num(rows.rotmat)).min(axis=1, initial=1)
        is_rotation = ~(off > MAX_ROTATION_ERROR) & ~((turned < 0) & np.isfinite(off))
    size = rows.image_size_px
    checks: list[tuple[Bool, NDArray[Any], str]] = [
        (
            np.isfinite(frame) & (frame >= 0) & (frame == np.floor(frame)) & (frame < MAX_FRAMES),
            frame,
            f"a whole frame from 0 to {MAX_FRAMES - 1}",
        ),
        (
            np.asarray((np.abs(box) <= MAX_COORDINATE_PX).all(1), dtype=np.bool_),
            box,
            f"a box with finite corners, within {MAX_COORDINATE_PX:.0e} px",
        ),
        (
            (box[:, 2] >= box[:, 0]) & (box[:, 3] >= box[:, 1]),
            box,
            "a box with left <= right and top <= bottom",
        ),
        (
            ((size >= 1) & (size <= MAX_IMAGE_SIDE_PX) & (size == np.floor(size))).all(1),
            size,
            "a width and height in whole pixels",
        ),
        (is_rotation, off, "rotation matrices (R times its transpose is the identity)"),
    ]
    if rows.score is not None:
        score = rows.score
        checks.append(((score >= 0) & (score <= 1), score, "a score from 0 to 1"))
    if rows.pts_s is not None:
        checks.append((np.isfinite(rows.pts_s), rows.pts_s, "a finite time"))
    for is_good, values, expected in checks:
        if not is_good.all():
            row = int(np.argmin(is_good))
            at = frame[row] if np.isfinite(frame[row]) else None
            raise BadPosesError(
                f"{rows.where}: row {row}: expected {expected}, got {values[row].tolist()}",
                video=video_id,
                frame_index=None if at is None else int(at),
                stage="reconstruct",
            )
    for mask, at in zip(rows.masks or (), frame.tolist(), strict=False):
        try:
            run_lengths(mask)
        except ValueError as error:
            raise BadPosesError(
                f"{rows.where}: a mask does not fit the frame: {error}",
                video=video_id,
                frame_index=int(at),
                stage="reconstruct",
            ) from error


def _frames(rows: GivenRows, frame: I64, video_id: str) -> I64:
    """(T,) the frames that were looked at."""
    last = int(frame[-1]) if len(frame) else -1
    if rows.frames is not None:
        return np.union1d(rows.frames, frame).astype(np.int64)
    num_frames = last + 1 if rows.num_frames is None else rows.num_frames
    if not last < num_frames <= MAX_FRAMES:
        raise BadPosesError(
            f"{rows.where}: expected {num_frames} frames, got a box in frame {last}",
            video=video_id,
            frame_index=last,
            stage="reconstruct",
        )
    busy = np.unique(frame)
    num_empty = num_frames - len(busy)
    allowed = MAX_EMPTY_FRAMES + MAX_EMPTY_PER_BUSY_FRAME * len(busy)
    if num_empty > allowed:
        edges: I64 = np.concatenate(([-1], busy, [num_frames]))
        after = int(edges[1 + np.argmax(np.diff(edges))])
        raise BadPosesError(
            f"{rows.where}: expected at most {allowed} frames without a box, as there are "
            f"{len(busy)} with one, got {num_empty}; the longest gap ends here",
            video=video_id,
            frame_index=min(after, num_frames - 1),
            stage="reconstruct",
        )
    return np.arange(num_frames)


def _times(rows: GivenRows, frames: I64, order: I64, default_fps: float | None) -> F64:
    """(T,) seconds; between and beyond known times evenly spaced."""
    fps = rows.fps or default_fps or DEFAULT_FPS
    known: F64 = np.zeros(0)
    times: F64 = np.zeros(0)
    if rows.pts_s is not None:
        seen, first = np.unique(rows.frame_index[order], return_index=True)
        known = np.asarray(seen, dtype=np.float64)
        times = rows.pts_s[order][first]
    if rows.frames is not None and rows.frame_pts_s is not None:
        more = ~np.isin(rows.frames, known)
        both: F64 = np.concatenate((known, rows.frames[more].astype(np.float64)))
        times = np.concatenate((times, rows.frame_pts_s[more]))[np.argsort(both)]
        known = np.sort(both)
    if not len(known):
        return frames / fps
    step = 1 / fps
    if rows.fps is None and len(known) > 1:
        step = float(np.median(np.diff(times) / np.diff(known)))
    result: F64 = np.asarray(np.interp(frames, known, times), dtype=np.float64)
    before, after = frames < known[0], frames > known[-1]
    result[before] = times[0] - (known[0] - frames[before]) * step
    result[after] = times[-1] + (frames[after] - known[-1]) * step
    return result


def _sizes(rows: GivenRows, frames: I64, frame_row: I64, order: I64, video_id: str) -> I64:
    """(T, 2) size of every frame; an empty frame has that of the frame before it."""
    if not len(order):
        return np.ones((len(frames), 2), np.int64)
    size = rows.image_size_px[order].astype(np.int64)
    same = np.flatnonzero((np.diff(frame_row) == 0) & (np.diff(size, axis=0) != 0).any(1))
    if len(same):
        row = int(same[0])
        raise BadPosesError(
            f"{rows.where}: expected one image size per frame, "
            f"got {size[row].tolist()} and {size[row + 1].tolist()}",
            video=video_id,
            frame_index=int(frames[frame_row[row]]),
            stage="reconstruct",
        )
    newest = np.searchsorted(frame_row, np.arange(len(frames)), side="right") - 1
    return size[np.maximum(newest, 0)]


# --- fields of a file --------------------------------------------------------------------------


class _Fields:
    """Named arrays of one file (or of one person in it), taken with their shapes checked."""

    def __init__(self, values: Mapping[Any, Any], where: str, video_id: str) -> None:
        self._values = values
        self.where = where
        self._video_id = video_id

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def bad(self, message: str, frame_index: int | None = None) -> BadPosesError:
        return BadPosesError(
            f"{self.where}: {message}",
            video=self._video_id,
            frame_index=frame_index,
            stage="reconstruct",
        )

    def take(self, name: str, *shapes: tuple[int | None, ...]) -> F64:
        """An array of one of these shapes (None: any length), as float64."""
        if name not in self:
            raise self.bad(f"expected {name}, got only {sorted(map(str, self._values))[:20]}")
        try:
            array = np.asarray(self._values[name], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise self.bad(f"{name}: expected numbers, got {error}") from error
        if array.size == 0 and shapes and 0 in shapes[0]:  # no rows: nothing tells the rest
            return np.zeros([length or 0 for length in shapes[0]])
        if shapes and not any(_fits(array.shape, shape) for shape in shapes):
            wanted = " or ".join(str(shape).replace("None", "any") for shape in shapes)
            raise self.bad(f"{name}: expected {wanted}, got {array.shape}")
        return array

    def rotations(self, name: str, n: int) -> F64:
        """(n, 24, 3, 3) from matrices or axis-angle vectors."""
        pose = self.take(name, (n, NUM_ROTATIONS, 3, 3), (n, 3 * NUM_ROTATIONS), (n, 24, 3))
        if pose.ndim == 4:
            return pose
        with np.errstate(invalid="ignore", over="ignore"):  # such a body is marked later
            return np.asarray(axis_angle_to_rotmat(pose.reshape(n, NUM_ROTATIONS, 3)))

    def shape_coefficients(self, name: str, n: int) -> F64:
        """(n, 10): the first ten; those that are not there are 0."""
        betas = self.take(name, (n, None))
        missing = np.zeros((n, max(0, NUM_BETAS - betas.shape[1])))
        return np.concatenate((betas[:, :NUM_BETAS], missing), axis=1)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        want is None or have == want for have, want in zip(shape, wanted, strict=True)
    )


def _size_rows(fields: _Fields, image_size_px: tuple[int, int] | None, n: int) -> F64:
    """(n, 2) of the setting, where the file does not tell."""
    if image_size_px is None:
        raise fields.bad(
            "the file does not tell the size of the frames; give poses.image_size=WIDTHxHEIGHT"
        )
    return np.tile(np.array(image_size_px, dtype=np.float64), (n, 1))


# --- layouts -----------------------------------------------------------------------------------


def rows_of_columns(
    fields: Mapping[str, Any], where: str, video_id: str, image_size_px: tuple[int, int] | None
) -> GivenRows:
    """The plain layout: arrays by name, from a npz or from the columns of a table.

    Raises:
        BadPosesError: a field is missing or of the wrong shape.
    """
    given = _Fields(fields, where, video_id)
    frame = given.take("frame_index", (None,))
    n = len(frame)
    bbox = given.take("bbox_xyxy_px", (n, 4))
    if "rotmat" in given or "poses" in given:
        rotmat = given.rotations("rotmat" if "rotmat" in given else "poses", n)
    else:
        root = given.take("global_orient", (n, 1, 3, 3), (n, 9))
        body = given.take("body_pose", (n, NUM_BODY_JOINTS, 3, 3), (n, 9 * NUM_BODY_JOINTS))
        rotmat = np.concatenate(
            (root.reshape(n, 1, 3, 3), body.reshape(n, NUM_BODY_JOINTS, 3, 3)), axis=1
        )
    if "image_size_px" in given:
        size = np.broadcast_to(given.take("image_size_px", (n, 2), (2,)), (n, 2))
        # Rows written before the size was known have none.
        size = size if image_size_px is None else np.where(np.isnan(size), image_size_px, size)
    else:
        size = _size_rows(given, image_size_px, n)
    center, side = _square_of(bbox)
    if "pred_cam" in given:
        pred_cam = given.take("pred_cam", (n, 3))
        if ("box_center_px" in given) != ("box_size_px" in given):
            raise given.bad("expected box_center_px and box_size_px, got one of them")
        if "box_center_px" in given:
            center = given.take("box_center_px", (n, 2))
            side = given.take("box_size_px", (n,))
    else:
        cam_t = given.take("cam_t_m", (n, 3))
        focal = np.broadcast_to(given.take("focal_px", (n,), ()), n)
        principal = size / 2
        if "principal_point_px" in given:
            principal = np.broadcast_to(given.take("principal_point_px", (n, 2), (2,)), (n, 2))
        pred_cam = camera_of_square(cam_t, focal, principal, center, side)
    cuts = np.zeros(0, np.int64)
    if "is_shot_start" in given:
        starts = np.nan_to_num(given.take("is_shot_start", (n,))) > 0
        cuts = frame[starts & np.isfinite(frame)].astype(np.int64)
    fps = float(given.take("fps", ())) if "fps" in given else None
    if fps is not None and not 0 < fps < math.inf:
        raise given.bad(f"fps: expected more than 0, got {fps}")
    num_frames = float(given.take("num_frames", ())) if "num_frames" in given else None
    if num_frames is not None and not (num_frames >= 0 and num_frames.is_integer()):
        raise given.bad(f"num_frames: expected a whole number, got {num_frames}")
    return GivenRows(
        where=where,
        frame_index=frame,
        bbox_xyxy_px=bbox,
        score=given.take("score", (n,)) if "score" in given else None,
        rotmat=rotmat,
        betas=given.shape_coefficients("betas", n),
        pred_cam=pred_cam,
        box_center_px=center,
        box_size_px=side,
        image_size_px=np.asarray(size, dtype=np.float64),
        num_frames=None if num_frames is None else int(num_frames),
        pts_s=given.take("pts_s", (n,)) if "pts_s" in given else None,
        fps=fps,
        cuts=cuts,
        drop_reason=fields.get("drop_reason"),
        masks=_masks(fields.get("mask_rle"), size),
        appearance=(
            given.take("appearance", (n, APPEARANCE_SIZE)) if "appearance" in given else None
        ),
    )


def _masks(counts: Any, size_wh: Floats) -> list[RleMask] | None:
    """Masks, where every box has one."""
    if counts is None or any(item is None for item in counts):
        return None
    return [
        RleMask(size_hw=(int(height), int(width)), counts=bytes(item))
        for item, (width, height) in zip(counts, np.nan_to_num(size_wh).tolist(), strict=True)
    ]


def _rows_of_phalp(content: Mapping[Any, Any], where: str, video_id: str) -> GivenRows:
    """Results of 4D-Humans or PHALP: by frame name, lists over its people.

    Taken are the people that were seen (`tracked_time` 0); the others are guesses of that tracker.
    """
    people: list[tuple[Any, ...]] = []
    cuts = []
    wanted = ("bbox", "tracked_time", "center", "scale", "size", "smpl")
    for name, record in content.items():
        frame = _Fields(record, f"{where}, frame {str(name)[-80:]!r}", video_id)
        at = float(frame.take("time", ()))
        if "shot" in frame and float(frame.take("shot", ())) > 0:
            cuts.append(int(at))
        num = len(record["tid"])
        for key in (*wanted, "camera", "camera_bbox", "conf", "mask"):
            if (key in wanted or key in record) and len(record.get(key, ())) != num:
                raise frame.bad(
                    f"{key}: expected one for each of {num} people, got {len(record.get(key, ()))}",
                    int(at),
                )
        for i in range(num):
            if np.asarray(record["tracked_time"][i]).item() == 0:
                one = _Fields(
                    {key: record[key][i] for key in record if _has(record[key], num)},
                    f"{frame.where}, person {i}",
                    video_id,
                )
                people.append((at, *_phalp_person(one, record["smpl"][i])))
    columns = list(zip(*people, strict=True)) or [()] * 9
    frame_index, bbox, score, rotmat, betas, pred_cam, square, size, counts = (
        list(column) for column in columns
    )
    n = len(frame_index)
    size_px = np.array(size, dtype=np.float64).reshape(n, 2)
    squares = np.array(square, dtype=np.float64).reshape(n, 3)
    return GivenRows(
        where=where,
        frame_index=np.array(frame_index, dtype=np.float64),
        bbox_xyxy_px=np.array(bbox, dtype=np.float64).reshape(n, 4),
        score=np.array(score, dtype=np.float64),
        rotmat=np.array(rotmat, dtype=np.float64).reshape(n, NUM_ROTATIONS, 3, 3),
        betas=np.array(betas, dtype=np.float64).reshape(n, NUM_BETAS),
        pred_cam=np.array(pred_cam, dtype=np.float64).reshape(n, 3),
        box_center_px=squares[:, :2],
        box_size_px=squares[:, 2],
        image_size_px=size_px,
        num_frames=len(content),
        cuts=np.array(cuts, dtype=np.int64),
        masks=_masks(counts, size_px) if n else None,
    )


def _has(values: object, num: int) -> bool:
    return isinstance(values, (list, tuple)) and len(values) == num


def _phalp_person(one: _Fields, smpl: object) -> tuple[Any, ...]:
    """Box, score, rotations, betas, camera, square, size and mask of one record."""
    if not isinstance(smpl, Mapping):
        raise one.bad(f"smpl: expected a dictionary, got {type(smpl).__name__}")
    body = _Fields(smpl, one.where, one._video_id)
    root = body.take("global_orient", (1, 3, 3), (3, 3)).reshape(1, 3, 3)
    joints = body.take("body_pose", (NUM_BODY_JOINTS, 3, 3))
    height, width = one.take("size", (2,)).tolist()
    side = max(height, width)
    center = one.take("center", (2,))
    box_size = float(one.take("scale", ())) * side
    if "camera_bbox" in one:
        pred_cam = one.take("camera_bbox", (3,))
    else:  # before 2023 only the camera of the frame, padded to a square, was kept
        margin = np.array([(side - width) // 2, (side - height) // 2])
        pred_cam = camera_of_square(
            one.take("camera", (3,))[None],
            np.array([FOCAL_PER_SIDE * side]),
            side / 2 - margin[None],
            center[None],
            np.array([box_size]),
        )[0]
    score = float(one.take("conf", ())) if "conf" in one else 1.0
    mask = one._values.get("mask")
    if isinstance(mask, (list, tuple)) and len(mask) == 1:
        mask = mask[0]
    counts = mask.get("counts") if isinstance(mask, Mapping) else None
    if isinstance(counts, str):
        counts = counts.encode()
    return (
        xywh_to_xyxy(one.take("bbox", (4,))),
        score,
        np.concatenate((root, joints)),
        body.take("betas", (NUM_BETAS,), (1, NUM_BETAS)).reshape(NUM_BETAS),
        pred_cam,
        (*center.tolist(), box_size),
        (width, height),
        counts if isinstance(counts, bytes) else None,
    )


def _rows_of_crops(
    people: Sequence[_Fields], where: str, image_size_px: tuple[int, int] | None
) -> GivenRows:
    """PARE (a dictionary per person) and PyMAF-X (one for all): camera of a square crop."""
    parts: list[tuple[F64, ...]] = []
    for person in people:
        frame = person.take("frame_ids", (None,))
        n = len(frame)
        parts.append(
            (
                frame,
                person.take("bboxes", (n, 4), (n, 3)),
                person.rotations("pose", n),
                person.shape_coefficients("betas", n),
                person.take("pred_cam", (n, 3)),
                person.take("orig_cam", (n, 4))
                if "orig_cam" in person
                else np.full((n, 4), np.nan),
            )
        )
    parts.append(
        (
            np.zeros(0),
            np.zeros((0, 4)),
            np.zeros((0, NUM_ROTATIONS, 3, 3)),
            np.zeros((0, NUM_BETAS)),
            np.zeros((0, 3)),
            np.zeros((0, 4)),
        )
    )
    parts = [(p[0], np.concatenate((p[1][:, :3], p[1][:, 2:3]), 1), *p[2:]) for p in parts]
    frame, bboxes, rotmat, betas, pred_cam, orig_cam = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    # orig_cam[0] = s b / W and orig_cam[1] = s b / H: the only trace of the size of the frame.
    with np.errstate(divide="ignore", invalid="ignore"):
        size = (pred_cam[:, :1] * bboxes[:, 2:3]) / orig_cam[:, :2]
    known = size[np.isfinite(size).all(1)]
    if len(known):
        found = np.round(np.median(known, axis=0))
        if np.abs(known - found).max() > MAX_SIZE_ERROR_PX:
            raise people[0].bad(
                "orig_cam, pred_cam and bboxes: expected one frame size behind them, "
                f"got {np.median(known, axis=0).tolist()}"
            )
        size = np.tile(found, (len(frame), 1))
    elif len(frame):
        size = _size_rows(people[0], image_size_px, len(frame))
    return GivenRows(
        where=where,
        frame_index=frame,
        bbox_xyxy_px=np.asarray(cxcywh_to_xyxy(bboxes)),
        score=None,
        rotmat=rotmat,
        betas=betas,
        pred_cam=pred_cam,
        box_center_px=bboxes[:, :2],
        box_size_px=bboxes[:, 2],
        image_size_px=size,
    )


def _rows_of_cliff(
    content: Mapping[str, Any], where: str, video_id: str, image_size_px: tuple[int, int] | None
) -> GivenRows:
    """CLIFF: arrays over all boxes of a video, camera of the full frame."""
    given = _Fields(content, where, video_id)
    found = given.take("detection_all", (None, None), (0,))
    if found.size == 0:
        found = np.zeros((0, 8))
    if found.shape[1] < 6:
        raise given.bad(f"detection_all: expected frame, box and score, got {found.shape}")
    n = len(found)
    box = found[:, 1:5]
    size = _size_rows(given, image_size_px, n)
    focal = given.take("focal_l", (n,))
    wrong = np.abs(focal - np.hypot(size[:, 0], size[:, 1])) > 0.01 * focal
    if wrong.any():
        row = int(np.argmax(wrong))
        raise given.bad(
            f"focal_l: expected the diagonal of the frame, {np.hypot(*size[row]):.1f} px for "
            f"poses.image_size={size[row, 0]:.0f}x{size[row, 1]:.0f}, got {focal[row]:.1f}",
            int(found[row, 0]),
        )
    center, side = _square_of(box)
    cam_t = given.take("global_t", (n, 3), (0,)).reshape(n, 3)
    return GivenRows(
        where=where,
        frame_index=found[:, 0],
        bbox_xyxy_px=box,
        score=found[:, 5],
        rotmat=given.rotations("pose", n),
        betas=given.shape_coefficients("shape", n),
        pred_cam=camera_of_square(cam_t, focal, size / 2, center, side),
        box_center_px=center,
        box_size_px=side,
        image_size_px=size,
        num_frames=len(np.atleast_1d(content["imgname"])) if "imgname" in content else None,
    )


# --- files of one video ------------------------------------------------------------------------


class FilePoses:
    """One file per video; see `open_poses`."""

    def __init__(
        self,
        path: str,
        files: Sequence[tuple[str, str, int]],
        *,
        layout: str,
        image_size_px: tuple[int, int] | None,
        fps: float | None,
    ) -> None:
        self._path = path
        self._files = files
        self._layout = layout
        self._image_size_px = image_size_px
        self._fps = fps

    def videos(self) -> list[GivenVideo]:
        """See `PoseSource.videos`.

        Raises:
            ManifestError: two files would be the same video.
        """
        found = []
        for relative, uri, num_bytes in self._files:
            try:
                num_bytes, fingerprint = fingerprint_file(uri)
            except (OSError, StorageError) as error:
                fingerprint = f"{UNREADABLE}-{type(error).__name__}"
            found.append(GivenVideo(video_id_of(relative, uri), uri, num_bytes, fingerprint))
        found.sort(key=lambda video: (video.video_id, video.uri))
        problems = [
            f"video {a.video_id}: {a.uri} and {b.uri}"
            for a, b in pairwise(found)
            if a.video_id == b.video_id
        ]
        if problems:
            raise ManifestError(
                f"input {self._path}: two files for one video:\n  " + "\n  ".join(problems)
            )
        return found

    def read(self, video: GivenVideo) -> VideoPoses:
        """See `PoseSource.read`."""
        try:
            rows = self._rows(video.uri, video.video_id)
        except _MALFORMED as error:
            raise BadPosesError(
                f"{PurePosixPath(video.uri).name}: not of its layout: "
                f"{type(error).__name__}: {error}",
                video=video.video_id,
            ) from error
        return settle(rows, video.video_id, default_fps=self._fps)

    def _rows(self, uri: str, video_id: str) -> GivenRows:
        content = _read_file(uri, video_id)
        layout = recognise_layout(content) if self._layout == "auto" else self._layout
        where = PurePosixPath(uri).name
        if layout == "cliff":
            return _rows_of_cliff(content, where, video_id, self._image_size_px)
        if layout == "npz":
            return rows_of_columns(content, where, video_id, self._image_size_px)
        if layout == "phalp":
            return _rows_of_phalp(_of_dicts(content, where, video_id), where, video_id)
        if layout == "pare":
            people = [
                _Fields(person, f"{where}, person {str(key)[:80]}", video_id)
                for key, person in _of_dicts(content, where, video_id).items()
            ]
            return _rows_of_crops(people, where, self._image_size_px)
        if layout == "pymafx":
            fields = _Fields(content, where, video_id)
            return _rows_of_crops([fields], where, self._image_size_px)
        raise BadPosesError(
            f"{where}: expected one of the layouts {', '.join(LAYOUTS)}, got fields "
            f"{sorted(map(str, content))[:12]}",
            video=video_id,
        )


def _of_dicts(content: Mapping[Any, Any], where: str, video_id: str) -> Mapping[Any, Any]:
    for key, value in content.items():
        if not isinstance(value, Mapping):
            raise BadPosesError(
                f"{where}: {str(key)[:80]!r}: expected a dictionary, got {type(value).__name__}",
                video=video_id,
            )
    return content


def recognise_layout(content: Mapping[Any, Any]) -> str:
    """The layout of a file's fields, "" where it is none of ours."""
    names = set(content)
    if {"pose", "shape", "global_t", "detection_all"} <= names:
        return "cliff"
    if {"pred_cam", "bboxes", "frame_ids"} <= names:
        return "pymafx"
    if {"frame_index", "bbox_xyxy_px"} <= names:
        return "npz"
    first = next(iter(content.values()), None)
    if isinstance(first, Mapping):
        if {"tid", "bbox", "smpl"} <= set(first):
            return "phalp"
        if {"pred_cam", "bboxes", "frame_ids"} <= set(first):
            return "pare"
    return ""


def video_id_of(relative: str, uri: str) -> str:
    """Name of the video behind a file: its path without ending, or its folder where that is so."""
    path = PurePosixPath(relative)
    path = path.with_name(path.stem)
    if path.name in FOLDER_NAMED:
        folder = path.parent.as_posix()
        return folder if folder != "." else PurePosixPath(uri).parent.name or path.name
    return path.with_name(CLIFF_SUFFIX.sub("", path.name) or path.name).as_posix()


def _read_file(uri: str, video_id: str) -> Mapping[Any, Any]:
    """The content of a npz or pickle, a dictionary.

    Raises:
        BadPosesError: damaged, or asking for more than plain data.
    """
    try:
        with open_read(uri) as file:
            if uri.lower().endswith(".npz"):
                return _read_npz(file)
            content = load_restricted_joblib(file, skip=UNWANTED, inert=("torch",))
    except FileNotFoundError as error:
        raise StorageError(f"video {video_id}: {uri} has gone since it was planned") from error
    except (CheckpointError, BadPosesError) as error:
        raise BadPosesError(str(error), video=video_id) from error
    if not isinstance(content, Mapping):
        raise BadPosesError(
            f"{uri}: expected a dictionary, got {type(content).__name__}", video=video_id
        )
    return content


def _read_npz(file: Any) -> dict[str, NDArray[Any]]:
    wanted = {*NPZ_FIELDS, *CLIFF_FIELDS, *CROP_FIELDS}
    try:
        # np.load would take a file that is no zip for a pickle.
        with zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if info.filename[:-4] in wanted]
            total = sum(info.file_size for info in infos)
            if total > MAX_NPZ_BYTES:
                raise BadPosesError(f"expected at most {MAX_NPZ_BYTES} bytes, got {total}")
            return {
                info.filename[:-4]: np.lib.format.read_array(
                    io.BytesIO(archive.read(info)), allow_pickle=False
                )
                for info in infos
                if info.filename.endswith(".npy")
            }
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, MemoryError) as error:
        raise BadPosesError(f"expected a npz of plain arrays, got {error}") from error


# --- Parquet -----------------------------------------------------------------------------------


class ParquetPoses:
    """Many videos in Parquet: one file, or parts; see `open_poses`.

    A video's rows may lie in several parts; only row groups that can hold it are read.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, str, int]],
        *,
        image_size_px: tuple[int, int] | None,
        fps: float | None,
    ) -> None:
        self._files = files
        self._image_size_px = image_size_px
        self._fps = fps

    def videos(self) -> list[GivenVideo]:
        """See `PoseSource.videos`.

        Raises:
            ManifestError: a part is no Parquet file or lacks a column.
        """
        holders: dict[str, list[tuple[str, int, str]]] = {}
        for _, uri, num_bytes in self._files:
            try:
                with open_read(uri) as file:
                    ids = pq.read_table(file, columns=["video_id"])["video_id"]
                names = pc.unique(ids).to_pylist()
            except (pa.ArrowInvalid, KeyError, OSError) as error:
                raise ManifestError(
                    f"input {uri}: not a Parquet file with a column video_id: {error}"
                ) from error
            if None in names or not all(isinstance(name, str) for name in names):
                raise ManifestError(f"input {uri}: expected texts in video_id, got {names[:3]}")
            fingerprint = fingerprint_file(uri)[1]
            for name in names:
                share = num_bytes // max(1, len(names))
                holders.setdefault(name, []).append((uri, share, fingerprint))
        return [
            GivenVideo(
                video_id,
                holders[video_id][0][0],
                sum(share for _, share, _ in holders[video_id]),
                blake2b(
                    " ".join(fingerprint for _, _, fingerprint in holders[video_id]).encode(),
                    digest_size=16,
                ).hexdigest(),
            )
            for video_id in sorted(holders)
        ]

    def read(self, video: GivenVideo) -> VideoPoses:
        """See `PoseSource.read`."""
        parts = []
        for _, uri, _ in self._files:
            try:
                with open_read(uri) as file:
                    parquet = pq.ParquetFile(file)
                    names = parquet.schema_arrow.names
                    parts.append(
                        pq.read_table(
                            file,
                            columns=[name for name in PARQUET_FIELDS if name in names],
                            filters=[("video_id", "=", video.video_id)],
                        )
                    )
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError) as error:
                raise BadPosesError(f"{uri}: {error}", video=video.video_id) from error
        where = PurePosixPath(video.uri).name
        try:
            table = pa.concat_tables(parts, promote_options="permissive")
            columns = columns_of(table, where, video.video_id)
            rows = rows_of_columns(columns, where, video.video_id, self._image_size_px)
        except (*_MALFORMED, pa.ArrowException) as error:
            raise BadPosesError(
                f"{where}: not of its layout: {type(error).__name__}: {error}",
                video=video.video_id,
            ) from error
        return settle(rows, video.video_id, default_fps=self._fps)


def columns_of(table: Any, where: str, video_id: str) -> dict[str, Any]:
    """Columns of an Arrow table as arrays, for `rows_of_columns`; null is NaN.

    Args:
        table: N rows of one video. A list column must have one length throughout. A body that is
            null marks a box without one. `fps` and `num_frames` hold one value.

    Raises:
        BadPosesError: lists of different lengths, or null where it must not be.
    """
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name]
        if column.null_count == len(column) and len(column):
            continue
        if name in ("mask_rle", "drop_reason"):
            columns[name] = column.to_pylist()
        elif name in ("fps", "num_frames"):
            values = pc.unique(column.drop_null()).to_pylist()
            if len(values) > 1:
                raise BadPosesError(
                    f"{where}: {name}: expected one value, got {values[:3]}", video=video_id
                )
            columns[name] = values[0]
        else:
            columns[name] = _column(column, f"{where}: {name}", video_id)
    if "drop_reason" in columns:  # of an earlier filter; what the tracker said is not kept
        columns["drop_reason"] = [
            reason if reason in ("too_small", "low_score") else ""
            for reason in columns["drop_reason"]
        ]
    return columns


def _column(column: Any, where: str, video_id: str) -> NDArray[Any]:
    """(N,) or (N, K) float64; the shapes of joints are put back."""
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        combined = pa.concat_arrays(combined.chunks) if combined.num_chunks else column.chunk(0)
    try:
        if not pa.types.is_nested(combined.type):
            flat = combined.cast(pa.float64()).to_numpy(zero_copy_only=False)
            return np.asarray(flat, dtype=np.float64)
        present = combined.is_valid().to_numpy(zero_copy_only=False)
        lengths = set(pc.list_value_length(combined).drop_null().to_pylist())
        if len(lengths) > 1:
            raise BadPosesError(
                f"{where}: expected lists of one length, got {sorted(lengths)}", video=video_id
            )
        size = lengths.pop() if lengths else 0
        values = combined.drop_null().flatten().cast(pa.float64())
        result = np.full((len(combined), size), np.nan)
        result[present] = values.to_numpy(zero_copy_only=False).reshape(int(present.sum()), size)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise BadPosesError(f"{where}: expected numbers, got {error}", video=video_id) from error
    if where.endswith("rotmat"):
        return result.reshape(-1, NUM_ROTATIONS, 3, 3) if size == 9 * NUM_ROTATIONS else result
    return result

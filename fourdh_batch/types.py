"""The records that travel between the steps.

Dimension letters: `T` frames of a chunk, `N` detections, `M` people (detections that were kept
and reconstructed), `H`, `W` picture size. Everything is a structure of arrays: one record holds
a chunk or a frame, never one person, so that no step loops over detections in Python.

A *chunk* is 16 to 256 consecutive decoded frames of one size; it is the unit of GPU work.
Pixel coordinates follow OpenCV: integer coordinates are pixel centres, x right, y down, after
the display rotation. Colour is RGB everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]

NUM_BODY_JOINTS = 23  # SMPL joints without the root
NUM_BETAS = 10  # shape coefficients used by HMR 2.0
NUM_KEYPOINTS = 44  # 25 OpenPose body joints, then the first 19 of SPIN's 24
KEYPOINT_NAMES = (
    "OP Nose",
    "OP Neck",
    "OP RShoulder",
    "OP RElbow",
    "OP RWrist",
    "OP LShoulder",
    "OP LElbow",
    "OP LWrist",
    "OP MidHip",
    "OP RHip",
    "OP RKnee",
    "OP RAnkle",
    "OP LHip",
    "OP LKnee",
    "OP LAnkle",
    "OP REye",
    "OP LEye",
    "OP REar",
    "OP LEar",
    "OP LBigToe",
    "OP LSmallToe",
    "OP LHeel",
    "OP RBigToe",
    "OP RSmallToe",
    "OP RHeel",
    "Right Ankle",
    "Right Knee",
    "Right Hip",
    "Left Hip",
    "Left Knee",
    "Left Ankle",
    "Right Wrist",
    "Right Elbow",
    "Right Shoulder",
    "Left Shoulder",
    "Left Elbow",
    "Left Wrist",
    "Neck (LSP)",
    "Top of Head (LSP)",
    "Pelvis (MPII)",
    "Thorax (MPII)",
    "Spine (H36M)",
    "Jaw (H36M)",
    "Head (H36M)",
)
"""The 44 keypoints in order: OpenPose's 25 (`OP`), then SPIN's first 19 extra ones."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a file says of itself, checked by a scan of its packets (nothing decoded).

    Attributes:
        uri: where it was read from.
        container, codec, pix_fmt: FFmpeg's names.
        width, height: pixels as shown, i.e. after the display rotation.
        rotation_deg: 0, 90, 180 or 270; frames are turned by `np.rot90(frame, rotation_deg // 90)`.
        num_frames: packets that will be shown, by the scan.
        num_frames_declared: what the header claims, None where it claims nothing.
        num_keyframes: packets flagged as key.
        fps: average rate in 1/s, None where no interval can be derived.
        duration_s: seconds by the header, None where unknown.
        time_base: seconds per tick of `pts`.
        decoder: name and version of the decoder and its FFmpeg.
    """

    uri: str
    container: str
    codec: str
    pix_fmt: str
    width: int
    height: int
    rotation_deg: int
    num_frames: int
    num_frames_declared: int | None
    num_keyframes: int
    fps: float | None
    duration_s: float | None
    time_base: Fraction
    decoder: str


@dataclass(frozen=True, slots=True)
class Damage:
    """Frames that were lost inside a video, or the way in which it ended early.

    Attributes:
        code: code of the matching `VideoError`, e.g. ``CORRUPT`` or ``TRUNCATED``.
        message: expected and got.
        first_frame_index: first lost frame.
        last_frame_index: last lost frame; None: everything from there to the end.
    """

    code: str
    message: str
    first_frame_index: int
    last_frame_index: int | None


@dataclass(frozen=True, slots=True, eq=False)
class FrameChunk:
    """Consecutive decoded frames of one size.

    Attributes:
        video_id: id of the video in its corpus.
        frame_index: (T,) 0-based in presentation order; jumps over lost frames only.
        pts: (T,) ticks of the stream's time base.
        pts_s: (T,) seconds, `pts * time_base`.
        rgb: (T, H, W, 3) uint8.
        shot_scores: (T,) content change against the previous frame (see `video/shots.py`);
            NaN for the first frame of a video; None when shots are off.
    """

    video_id: str
    frame_index: I64
    pts: I64
    pts_s: F64
    rgb: U8
    shot_scores: F64 | None = None

    def __post_init__(self) -> None:
        t = len(self.frame_index)
        if self.rgb.ndim != 4 or self.rgb.shape[0] != t or self.rgb.shape[3] != 3:
            raise ValueError(f"rgb: expected ({t}, H, W, 3), got {self.rgb.shape}")
        if self.rgb.dtype != np.uint8:
            raise ValueError(f"rgb: expected uint8, got {self.rgb.dtype}")
        if len(self.pts) != t or len(self.pts_s) != t:
            raise ValueError(f"expected {t} time stamps, got {len(self.pts)}, {len(self.pts_s)}")
        if self.shot_scores is not None and len(self.shot_scores) != t:
            raise ValueError(f"expected {t} shot scores, got {len(self.shot_scores)}")

    @property
    def num_frames(self) -> int:
        return len(self.frame_index)

    @property
    def image_size_wh(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[2], self.rgb.shape[1]


@dataclass(frozen=True, slots=True)
class DecodeSummary:
    """How the reading of a video ended; follows its last chunk.

    Attributes:
        info: see `VideoInfo`.
        num_frames_decoded: frames handed out.
        damage: empty for a sound file; otherwise the video is partial.
    """

    info: VideoInfo
    num_frames_decoded: int
    damage: tuple[Damage, ...] = ()


@dataclass(frozen=True, slots=True)
class RleMask:
    """Binary mask of a whole frame as COCO run lengths (column-major, first run counts zeros).

    Attributes:
        size_hw: (height, width) of the frame.
        counts: COCO's compressed run-length string.
    """

    size_hw: tuple[int, int]
    counts: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """Person boxes of a chunk, in frame order and within a frame in the detector's own order.

    Attributes:
        frame_row: (N,) row of the frame in its chunk, non-decreasing.
        bbox_xyxy_px: (N, 4) float32 corners in the full frame; may reach beyond it.
        score: (N,) float32 in [0, 1].
        masks: N run-length masks, or None where the detector gives none.
        mask_source: ``detector`` where `masks` is set, ``box`` where the box stands for the mask.
    """

    frame_row: I64
    bbox_xyxy_px: F32
    score: F32
    masks: Sequence[RleMask] | None = None
    mask_source: str = "box"

    def __post_init__(self) -> None:
        n = len(self.frame_row)
        if self.bbox_xyxy_px.shape != (n, 4):
            raise ValueError(f"bbox_xyxy_px: expected ({n}, 4), got {self.bbox_xyxy_px.shape}")
        if self.score.shape != (n,):
            raise ValueError(f"score: expected ({n},), got {self.score.shape}")
        if n and np.any(np.diff(self.frame_row) < 0):
            raise ValueError("frame_row must not decrease")
        if self.masks is not None and len(self.masks) != n:
            raise ValueError(f"masks: expected {n}, got {len(self.masks)}")
        if self.mask_source != ("box" if self.masks is None else "detector"):
            raise ValueError(f"mask_source {self.mask_source!r} does not fit masks={self.masks!r}")

    def __len__(self) -> int:
        return len(self.frame_row)


@dataclass(frozen=True, slots=True, eq=False)
class People:
    """SMPL reconstructions of M people: what a pose engine gives for M boxes.

    Rotation matrices are in camera axes (x right, y down, z forward).

    Attributes:
        global_orient: (M, 1, 3, 3) float32.
        body_pose: (M, 23, 3, 3) float32.
        betas: (M, 10) float32.
        pred_cam: (M, 3) float32, weak perspective (s, tx, ty) of the square crop.
        box_center_px: (M, 2) float32, centre of the square crop in the full frame.
        box_size_px: (M,) float32, side of the square crop.
        keypoints_3d_m: (M, 44, 3) float32, metres in the model frame, camera not added.
    """

    global_orient: F32
    body_pose: F32
    betas: F32
    pred_cam: F32
    box_center_px: F32
    box_size_px: F32
    keypoints_3d_m: F32

    def __post_init__(self) -> None:
        m = len(self.global_orient)
        expected = {
            "global_orient": (m, 1, 3, 3),
            "body_pose": (m, NUM_BODY_JOINTS, 3, 3),
            "betas": (m, NUM_BETAS),
            "pred_cam": (m, 3),
            "box_center_px": (m, 2),
            "box_size_px": (m,),
            "keypoints_3d_m": (m, NUM_KEYPOINTS, 3),
        }
        for name, shape in expected.items():
            got = getattr(self, name).shape
            if got != shape:
                raise ValueError(f"{name}: expected {shape}, got {got}")

    def __len__(self) -> int:
        return len(self.global_orient)

    def take(self, rows: I64 | Bool | slice) -> People:
        """The people at these rows, in the order given."""
        return People(
            global_orient=self.global_orient[rows],
            body_pose=self.body_pose[rows],
            betas=self.betas[rows],
            pred_cam=self.pred_cam[rows],
            box_center_px=self.box_center_px[rows],
            box_size_px=self.box_size_px[rows],
            keypoints_3d_m=self.keypoints_3d_m[rows],
        )


@dataclass(frozen=True, slots=True, eq=False)
class FrameDetections:
    """One frame as the tracker eats it: boxes and bodies in detector order.

    Attributes:
        frame_index: 0-based; must increase from call to call, gaps allowed.
        image_size_wh: (width, height) in pixels.
        bbox_xyxy_px: (M, 4) float32, the detector's box before it was grown to 3:4.
        score: (M,) float32.
        people: the M reconstructions.
        is_shot_start: the frame is the first of a new shot.
        appearance: (M, ...) how the people look, as the tracker's texture term wants it: texture
            maps (M, 4, 256, 256) uint8 (see `models/texture.py`) or compact vectors; None where
            looks do not count.
    """

    frame_index: int
    image_size_wh: tuple[int, int]
    bbox_xyxy_px: F32
    score: F32
    people: People
    is_shot_start: bool = False
    appearance: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        m = len(self.people)
        if self.bbox_xyxy_px.shape != (m, 4) or self.score.shape != (m,):
            raise ValueError(
                f"frame {self.frame_index}: expected {m} boxes and scores, "
                f"got {self.bbox_xyxy_px.shape} and {self.score.shape}"
            )
        if self.appearance is not None and len(self.appearance) != m:
            raise ValueError(
                f"frame {self.frame_index}: expected the looks of {m} people, "
                f"got {len(self.appearance)}"
            )

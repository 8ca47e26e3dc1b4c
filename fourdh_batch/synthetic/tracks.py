"""People of plans as moving bodies: what a step looks like, and tracks without pictures.

Dimension letter: `T` frames of a track.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fourdh_batch.models.smpl import SmplBody
from fourdh_batch.synthetic.gestures import act
from fourdh_batch.synthetic.mocap import Recording, play
from fourdh_batch.synthetic.motion import Body, Motion, walk
from fourdh_batch.synthetic.plans import FPS, ShotPlan, Step, draw_plan
from fourdh_batch.types import F32, F64, I64, NUM_BETAS

MIN_DEPTH_M = 0.5  # nearer people are left out
EVERY_VERTEX = 12  # tells where the floor is, and who is in the picture, within a centimetre
IMAGE_SIZE_WH = (384, 288)  # a person 5 m away is about 195 pixels tall


@dataclass(frozen=True, slots=True, eq=False)
class PlannedTrack:
    """One person in one shot, in the frames that show a part of him, hidden or not.

    Attributes:
        frame_index: (T,) increasing, of the clip.
        global_orient: (T, 1, 3, 3) rotation into camera axes.
        body_pose: (T, 23, 3, 3).
        betas: (T, 10).
        cam_t_m: (T, 3) translation of the body model in camera axes, metres.
        focal_px: focal length; the principal point is the middle of the picture.
        image_size_wh: (width, height).
    """

    frame_index: I64
    global_orient: F32
    body_pose: F32
    betas: F32
    cam_t_m: F32
    focal_px: float
    image_size_wh: tuple[int, int]


def move_person(
    body: Body,
    recordings: Sequence[Recording],
    betas: Tensor,
    step: Step,
    *,
    times_s: F64,
    phase: float,
    rng: np.random.Generator,
) -> Motion:
    """What one person does in one shot.

    Args:
        recordings: that steps refer to by number.
        betas: (10,) shape.
        times_s: (T,) increasing, 0 being the middle of the shot.
        phase: of the gait, radians.
        rng: of the gestures.
    """
    if step.recording is not None:
        number, moment = step.recording
        recording = recordings[number]
        half = (times_s[-1] - times_s[0]) / 2
        room_s = max(recording.duration_s - 2 * half, 0.0)
        start = half + (moment % room_s if room_s > 0 else 0.0)
        return play(
            recording,
            body,
            betas,
            times_s=times_s + start,
            position_m=step.position_m,
            heading_deg=step.heading_deg,
        )

    def walked(heading_deg: float, since_s: float) -> Motion:
        return walk(
            body,
            betas,
            step.gait,
            times_s=times_s - since_s,
            position_m=step.position_m,
            heading_deg=heading_deg,
            turn_deg_per_m=step.turn_deg_per_m,
            phase=phase,
        )

    if step.turns_back_s is None:
        motion = walked(step.heading_deg, 0.0)
    else:
        there = walked(step.heading_deg, step.turns_back_s)
        back = walked(step.heading_deg + 180, step.turns_back_s)
        motion = there.until(torch.from_numpy(times_s < step.turns_back_s), back)
    if step.busy == 0:
        return motion
    still = step.gait.stride == 0
    return act(body, betas, motion, times_s, rng, busy=step.busy, still=still)


class PlannedTracks:
    """Numbered clips of drawn plans, as tracks.

    Args:
        body: its tensors on the CPU.
        seed: of everything.
        recordings: motion capture; where there is some, everybody plays it.
        num_frames: of a clip.
    """

    def __init__(
        self,
        body: SmplBody,
        *,
        seed: int,
        recordings: Sequence[Recording] = (),
        num_frames: int,
    ) -> None:
        self._body = _CoarseBody(body)
        self._seed = seed
        self._recordings = recordings
        self._num_frames = num_frames

    @torch.no_grad()
    def clip(self, number: int) -> list[PlannedTrack]:
        """The tracks of any number from 0 on, of two frames or more."""
        plan = draw_plan(self._seed, number, num_frames=self._num_frames)
        rng = np.random.default_rng((self._seed, number))
        cast = sorted({step.person for shot in plan.shots for step in shot.steps})
        shapes = rng.normal(0, 0.9, (len(cast), NUM_BETAS)).clip(-1.8, 1.8)
        betas = dict(zip(cast, torch.from_numpy(shapes).float(), strict=True))
        length = self._num_frames / len(plan.shots)
        starts = [round(i * length) for i in range(len(plan.shots) + 1)]
        return [
            track
            for shot, first, last in zip(plan.shots, starts[:-1], starts[1:], strict=True)
            for step in shot.steps
            if (track := self._track(shot, step, betas[step.person], np.arange(first, last), rng))
        ]

    def _track(
        self, shot: ShotPlan, step: Step, betas: Tensor, frame: I64, rng: np.random.Generator
    ) -> PlannedTrack | None:
        if self._recordings:
            number = int(rng.integers(len(self._recordings)))
            step = replace(step, recording=(number, float(rng.uniform(0, 1e3))))
            lasts = int(np.floor(self._recordings[number].duration_s * FPS)) + 1
            frame = frame[:lasts]
        times_s = (frame - frame.mean()) / FPS
        motion = move_person(
            self._body,
            self._recordings,
            betas,
            step,
            times_s=times_s,
            phase=float(rng.uniform(0, 2 * np.pi)),
            rng=rng,
        )
        width, height = IMAGE_SIZE_WH
        focal_px = shot.focal_heights * height
        unmoved = replace(shot.camera, velocity_m_s=(0.0, 0.0, 0.0), pan_deg_s=0.0, shake_deg=0.0)
        moments = times_s[:1] if shot.camera == unmoved else times_s
        cameras = [shot.camera.at(float(t), focal_px, IMAGE_SIZE_WH) for t in moments]
        rotation = torch.stack([camera.rotation for camera in cameras])  # (T or 1, 3, 3)
        eye = torch.tensor([camera.position_m for camera in cameras])[:, None]
        shape = betas.expand(len(frame), -1)
        out = self._body(motion.global_orient, motion.body_pose, shape)
        pelvis = out.joints[:, :1]  # about which the model turns
        transl = motion.transl_m[:, None]
        cam_t = (pelvis + transl - eye) @ rotation.mT - pelvis
        vertices = (out.vertices + transl - eye) @ rotation.mT
        pixels = cameras[0].project(vertices)
        low, high = pixels.amin(dim=1), pixels.amax(dim=1)
        meets = ((high > 0) & (low < torch.tensor([width - 1, height - 1]))).all(dim=1)
        shown = ((vertices[..., 2].amin(dim=1) > MIN_DEPTH_M) & meets).numpy()
        if shown.sum() < 2:
            return None
        return PlannedTrack(
            frame_index=frame[shown],
            global_orient=(rotation[:, None] @ motion.global_orient).numpy()[shown],
            body_pose=motion.body_pose.numpy()[shown],
            betas=shape.numpy()[shown],
            cam_t_m=cam_t[:, 0].numpy()[shown],
            focal_px=focal_px,
            image_size_wh=IMAGE_SIZE_WH,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _CoarseOutput:
    vertices: Tensor
    joints: Tensor
    keypoints_3d: Tensor


class _CoarseBody:
    """A body of which only some vertices are posed."""

    def __init__(self, body: SmplBody) -> None:
        self._body = body
        self._part = body.part(np.arange(0, len(body.v_template), EVERY_VERTEX))
        self.name, self.digest, self.faces = body.name, body.digest, body.faces

    def __call__(self, global_orient: Tensor, body_pose: Tensor, betas: Tensor) -> _CoarseOutput:
        vertices, joints = self._part(global_orient, body_pose, betas)
        keypoints = self._body.keypoints_3d(global_orient, body_pose, betas)
        return _CoarseOutput(vertices, joints, keypoints)

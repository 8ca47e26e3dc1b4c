"""What the models are given in `accuracy`: held-out clips, boxes as of a detector, true bodies."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdh_batch.evaluate.matching import Boxes, match_boxes
from fourdh_batch.geometry import crop_camera_translation, crop_square
from fourdh_batch.masks import box_mask, decode_rle, encode_rle
from fourdh_batch.models.hmr2 import Hmr2, HmrOutput
from fourdh_batch.models.smpl import SmplBody
from fourdh_batch.models.texture import TextureSampler
from fourdh_batch.pipeline.reconstruct import Reconstruction, Reconstructor
from fourdh_batch.synthetic.corpus import BOXES, Clip, make_corpus
from fourdh_batch.synthetic.mocap import load_recordings
from fourdh_batch.synthetic.plans import FEATURES, ClipPlan, draw_plan
from fourdh_batch.tables.reader import smpl_arrays
from fourdh_batch.types import F32, F64, I64, Bool, FrameChunk, RleMask

# A middling detector: what a person loses in sharpness and safety follows from how much of him is
# seen. Shares of a box's sides, of boxes, of frames.
CENTRE_JITTER = 0.02
SIZE_JITTER = 0.03
MISSED = 0.02
MISSED_BARELY_VISIBLE = 0.5  # at the least that the truth calls visible
SAFE_VISIBILITY = 0.5  # from which a person is only missed like anybody
BARELY_VISIBLE = 0.15
FALSE_PER_FRAME = 0.03
MASK_CELLS = 28  # across and down a box, which is as fine as Mask R-CNN tells a mask

# What the clips show, in turn: every feature by itself, then what is hard together.
SHOWN = (
    *((feature,) for feature in FEATURES),
    ("crossing", "occlusion"),
    ("crossing", "reentry"),
    ("crossing", "long_occlusion", "moving_camera"),
    ("crossing", "crowd"),
)

UPRIGHT = np.diag([1.0, -1.0, -1.0]).astype(np.float32)  # a body in camera axes, facing the viewer


def held_out_corpus(
    folder: Path,
    body: SmplBody,
    *,
    seed: int,
    count: int,
    num_frames: int,
    height: int,
    motion: str = "",
) -> list[Clip]:
    """Clips of what is `SHOWN`.

    Args:
        motion: folder of motion capture; everybody plays it, but for those who turn back outside
            the picture. Empty: the package's own motions.
    """
    recordings = load_recordings(motion) if motion else []
    plans = {}
    for index in range(count):
        features = SHOWN[index % len(SHOWN)]
        plan = draw_plan(seed, index, features=features, num_frames=num_frames)
        if recordings:
            rng = np.random.default_rng([seed, index, 0xACC])
            plan = _recorded(plan, len(recordings), rng)
        plans[f"{index:02d}-{'-'.join(features)}"] = plan
    return make_corpus(
        folder,
        body,
        seed=seed,
        clips=plans,
        recordings=recordings,
        image_size_wh=(height * 2 // 3 * 2, height),
    )


def _recorded(plan: ClipPlan, num_recordings: int, rng: np.random.Generator) -> ClipPlan:
    """The plan with a recording for everybody who does not turn back."""

    def played(step: Any) -> Any:
        which = int(rng.integers(num_recordings)), float(rng.uniform(0, 1e3))
        return step if step.turns_back_s is not None else replace(step, recording=which, busy=0.0)

    shots = tuple(replace(s, steps=tuple(played(step) for step in s.steps)) for s in plan.shots)
    return replace(plan, shots=shots)


def write_perturbed_boxes(
    given: Path, truth: Any, clips: Sequence[Clip], path: Path, *, seed: int
) -> None:
    """Boxes of a faultless detector made worse: jitter, misses, false boxes (constants above).

    A mask moves with its box and is as coarse as `MASK_CELLS`; that of a false box is the box.

    Args:
        given: `boxes.parquet` of the corpus, whose rows are the `detected` ones of `truth`.
        path: what to write.
    """
    table = pq.read_table(given)
    detected = truth.filter(pa.compute.field("state") == "detected")
    columns: dict[str, list[Any]] = {name: [] for name in BOXES.names}
    for clip in clips:
        mine = pa.compute.field("video_id") == clip.video_id
        rows, seen = table.filter(mine), detected.filter(mine)
        assert rows["frame_index"].to_pylist() == seen["frame_index"].to_pylist()
        rng = np.random.default_rng([seed, zlib.crc32(clip.video_id.encode())])
        width, height = clip.image_size_wh
        true_box = smpl_arrays(seen.select(["bbox_xyxy_px"]))["bbox_xyxy_px"].astype(np.float64)
        visible = seen["score"].to_numpy().astype(np.float64)
        frame = seen["frame_index"].to_numpy().astype(np.int64)
        hidden = np.clip((SAFE_VISIBILITY - visible) / (SAFE_VISIBILITY - BARELY_VISIBLE), 0, 1)
        found = rng.random(len(frame)) >= np.maximum(MISSED, MISSED_BARELY_VISIBLE * hidden)
        side = true_box[:, 2:] - true_box[:, :2]
        centre = (true_box[:, :2] + true_box[:, 2:]) / 2
        centre = centre + side * rng.normal(0, CENTRE_JITTER, side.shape)
        side = side * np.exp(rng.normal(0, SIZE_JITTER, side.shape))
        score = 0.97 - 0.35 * (1 - visible) + rng.normal(0, 0.02, len(frame))
        box = np.concatenate((centre - side / 2, centre + side / 2), axis=1)
        masks = [
            _coarse_mask(decode_rle(RleMask((height, width), counts)), true_box[i], box[i])
            for i, counts in enumerate(rows["mask_rle"].to_pylist())
            if found[i]
        ]
        box = box[found]

        in_frame = np.flatnonzero(rng.random(clip.num_frames) < FALSE_PER_FRAME)
        tall = rng.uniform(0.3, 0.7, len(in_frame)) * height
        wide = tall * rng.uniform(0.3, 0.5, len(in_frame))
        x, y = rng.uniform(0, width - wide), rng.uniform(0, height - tall)
        false = np.stack((x, y, x + wide, y + tall), axis=1)
        masks += list(box_mask(false.astype(np.float32), (height, width)))
        box = np.concatenate((box, false)).clip(0, np.tile([width - 1, height - 1], 2))
        frame = np.concatenate((frame[found], in_frame))
        score = np.concatenate((score[found], rng.uniform(0.5, 0.8, len(in_frame))))

        order = np.argsort(frame, kind="stable")
        columns["video_id"] += [clip.video_id] * len(order)
        columns["frame_index"] += frame[order].tolist()
        columns["bbox_xyxy_px"] += box[order].tolist()
        columns["score"] += score[order].clip(0, 1).tolist()
        columns["mask_rle"] += [encode_rle(masks[i][None])[0].counts for i in order.tolist()]
    pq.write_table(pa.table(columns, schema=BOXES), path)


def _coarse_mask(mask: Bool, true_box: F64, box: F64) -> Bool:
    """(H, W) the cells of a mask in its true box, stretched over another box."""
    fine = torch.from_numpy(mask).float()[None, None]
    low, side = torch.from_numpy(true_box[:2]), torch.from_numpy(true_box[2:] - true_box[:2])
    size = torch.tensor(mask.shape[::-1])

    def sample(plane: Tensor, where: Tensor, size_wh: Tensor) -> Tensor:
        """Of a plane (1, 1, h, w) at (H, W, 2), integers being pixel centres."""
        unit = (2 * where + 1) / size_wh - 1
        return F.grid_sample(plane, unit[None].float(), align_corners=False)[0, 0]

    steps = (torch.arange(4 * MASK_CELLS) + 0.5) / (4 * MASK_CELLS)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=2)
    cells = F.avg_pool2d(sample(fine, low + grid * side, size)[None, None], 4)
    pixels = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="xy")
    new_low, new_side = torch.from_numpy(box[:2]), torch.from_numpy(box[2:] - box[:2])
    inside = (torch.stack(pixels, dim=2) - new_low) / new_side
    cell = sample(cells, inside * MASK_CELLS - 0.5, torch.tensor([MASK_CELLS, MASK_CELLS]))
    return (cell >= 0.5).numpy()


class TrueBodies(Reconstructor):
    """In the place of HMR 2.0: the true body of whoever fits a box, upright for false boxes.

    What the tracker does with them is what it can do at best. Texture maps are taken as always.

    Args:
        truth: table `tracks` of all videos.
        sampler: as of the engine that is measured.
    """

    def __init__(self, truth: Any, body: SmplBody, sampler: TextureSampler | None) -> None:
        self._told = _Told(body)
        super().__init__(cast(Hmr2, self._told), batch_size=1, device="cpu", sampler=sampler)
        self._columns = smpl_arrays(truth)
        self._frames: dict[tuple[str, int], list[int]] = {}
        keys = zip(truth["video_id"].to_pylist(), truth["frame_index"].to_pylist(), strict=True)
        for row, key in enumerate(keys):
            self._frames.setdefault(key, []).append(row)

    def reconstruct(
        self,
        chunks: Sequence[FrameChunk],
        boxes: Sequence[tuple[I64, F32]],
        masks: Sequence[Sequence[RleMask] | None] | None = None,
    ) -> list[Reconstruction]:
        """See `Reconstructor`."""
        self._told.people = [
            person
            for chunk, (frame_row, bbox) in zip(chunks, boxes, strict=True)
            for row in np.unique(frame_row).tolist()
            for person in self._of_frame(
                (chunk.video_id, int(chunk.frame_index[row])), bbox[frame_row == row]
            )
        ]
        return super().reconstruct(chunks, boxes, masks)

    def _of_frame(self, frame: tuple[str, int], bbox: F32) -> list[tuple[F32, ...]]:
        there = np.array(self._frames.get(frame, []), np.int64)
        truth, found, _ = match_boxes(
            _boxes(self._columns["bbox_xyxy_px"][there]), _boxes(bbox), min_iou=0.3
        )
        row_of = dict(zip(found.tolist(), there[truth].tolist(), strict=True))
        return [self._person(row_of.get(i), box) for i, box in enumerate(bbox)]

    def _person(self, row: int | None, box: F32) -> tuple[F32, ...]:
        if row is None:
            pose = np.tile(np.eye(3, dtype=np.float32), (23, 1, 1))
            return UPRIGHT[None], pose, np.zeros(10, np.float32), np.float32([0.9, 0, 0.2])
        columns = {name: values[row] for name, values in self._columns.items()}
        return (
            columns["global_orient"].reshape(1, 3, 3),
            columns["body_pose"].reshape(23, 3, 3),
            columns["betas"],
            weak_camera(columns["keypoints_3d_m"], columns["keypoints_2d_px"], box),
        )


class _Told(nn.Module):
    """Gives the bodies that it was told, one after the other."""

    def __init__(self, body: SmplBody) -> None:
        super().__init__()
        self.body = body
        self.people: list[tuple[F32, ...]] = []

    def forward(self, crops: Tensor, *, with_vertices: bool = False) -> HmrOutput:
        assert len(crops) == 1
        person = [torch.from_numpy(part)[None].float() for part in self.people.pop(0)]
        global_orient, body_pose, betas, pred_cam = person
        pose = global_orient, body_pose, betas
        posed = self.body(*pose) if with_vertices else None
        nothing = torch.zeros(1, 0)
        return HmrOutput(
            global_orient=global_orient,
            body_pose=body_pose,
            betas=betas,
            pred_cam=pred_cam,
            pred_cam_t=crop_camera_translation(pred_cam),
            keypoints_3d=posed.keypoints_3d if posed else self.body.keypoints_3d(*pose),
            keypoints_2d=nothing,
            pose6d=nothing,
            token_out=nothing,
            vertices=posed.vertices if posed else None,
        )


def weak_camera(keypoints_3d_m: F32, keypoints_2d_px: F32, bbox_xyxy_px: F32) -> F32:
    """(3,) the weak perspective (s, tx, ty) of a crop that fits true keypoints best."""
    centre, size = crop_square(bbox_xyxy_px)
    flat = keypoints_3d_m[:, :2].astype(np.float64)
    crop = (keypoints_2d_px - centre) / size  # crop widths from its centre
    middle, middle_crop = flat.mean(0), crop.mean(0)
    half_s = ((flat - middle) * (crop - middle_crop)).sum() / np.square(flat - middle).sum()
    return np.float32([2 * half_s, *(middle_crop / half_s - middle)])


def _boxes(bbox: F32 | F64) -> Boxes:
    """Boxes of one frame, numbered."""
    numbers = np.arange(len(bbox))
    return Boxes(np.zeros(len(bbox), np.int64), numbers, bbox.astype(np.float64))

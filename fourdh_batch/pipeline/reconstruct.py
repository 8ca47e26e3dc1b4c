"""Boxes of many chunks to bodies: crops of any frames and videos share batches of one size.

`M` people of a chunk, `B` crops of a batch, `K` = 44 keypoints, `S` = 256 side of a crop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fourdh_batch.geometry import CROP_PX, crop_square
from fourdh_batch.masks import run_lengths
from fourdh_batch.models.hmr2 import Hmr2, HmrOutput
from fourdh_batch.models.texture import ATLAS_PX, NUM_CHANNELS, TextureSampler, pack_texture
from fourdh_batch.types import (
    F32,
    I64,
    NUM_BETAS,
    NUM_BODY_JOINTS,
    NUM_KEYPOINTS,
    U8,
    Bool,
    FrameChunk,
    People,
    RleMask,
)
from fourdh_batch.video.crops import (
    COORDINATE_SCALE,
    STEPS,
    crop_affine,
    crop_batch,
    crop_masks,
)

logger = logging.getLogger(__name__)

CUDA_BATCH_SIZE = 64
# Larger batches gain a tenth on a CPU, and a batch of one has no companions on which the last bits
# of a result could depend.
CPU_BATCH_SIZE = 1

# What a row holds: rotations of root and joints, betas, pred_cam, keypoints.
_WIDTHS = (9, 9 * NUM_BODY_JOINTS, NUM_BETAS, 3, 3 * NUM_KEYPOINTS)

APPEARANCE_WIDTH = 256
_TEXTURE_SHAPE = (NUM_CHANNELS, ATLAS_PX, ATLAS_PX)


@dataclass(frozen=True, slots=True, eq=False)
class Reconstruction:
    """What the M boxes of a chunk give, in the order of the boxes.

    Attributes:
        people: the bodies.
        texture: (M, 4, 256, 256) uint8 packed texture maps (`models.texture.pack_texture`); None
            without a sampler.
        appearance: (M, 256) float16 compact vectors of the maps; None unless asked for.
    """

    people: People
    texture: U8 | None = None
    appearance: NDArray[np.float16] | None = None


class Reconstructor:
    """Runs HMR 2.0 over the people of chunks.

    Every batch has the same size; the last one is filled up with empty crops, so that a person
    always meets the same kernels. On a CPU with its default batch of one the result of a person
    is the same to the last bit whatever chunks, frames and people come with it. In larger batches
    the last bits may follow the place in the batch, as libraries sum in other orders there.

    Args:
        model: moved to the device, set to evaluation.
        batch_size: crops per batch; None: 64 on GPUs, 1 on CPUs.
        device: where to run; None: where the model is.
        sampler: takes texture maps of people; moved to the device. None: no maps. With it the
            whole surface is posed, which changes the last bits of the keypoints.
        embed: (B, 4, 256, 256) uint8 packed maps to (B, 256) float16, on the device; needs a
            sampler. None: no compact vectors.

    Attributes:
        batch_size: crops per batch now.
        num_people, num_non_finite: counts over all calls; non-finite results are kept in the
            output, it is for the tracker and the tables to leave them out.
    """

    def __init__(
        self,
        model: Hmr2,
        *,
        batch_size: int | None = None,
        device: str | torch.device | None = None,
        sampler: TextureSampler | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.device = torch.device(device or model.smpl_head.init_cam.device)
        if batch_size is None:
            batch_size = CPU_BATCH_SIZE if self.device.type == "cpu" else CUDA_BATCH_SIZE
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if embed is not None and sampler is None:
            raise ValueError("embed: expected a sampler with it, got none")
        self.model = model.to(self.device).eval()
        self.batch_size = batch_size
        self.sampler = None if sampler is None else sampler.to(self.device)
        self.embed = embed
        self.num_people = 0
        self.num_non_finite = 0

    def reconstruct(
        self,
        chunks: Sequence[FrameChunk],
        boxes: Sequence[tuple[I64, F32]],
        masks: Sequence[Sequence[RleMask] | None] | None = None,
    ) -> list[Reconstruction]:
        """Bodies of all boxes, and how they look.

        Args:
            chunks: of any videos and picture sizes.
            boxes: per chunk the rows of the frames (M,) and the boxes (M, 4) as xyxy in pixels.
            masks: per chunk M masks of whole frames, or None where the boxes stand for them; None:
                the boxes stand for all masks. Read only for texture maps.

        Returns:
            Per chunk what its M boxes give, in the order of the boxes.

        Raises:
            ValueError: a box is not finite or has no extent, or names no frame of its chunk; masks
                of another number or size.
            torch.OutOfMemoryError: a single crop does not fit into the device's memory.
        """
        crops = _Crops(chunks, boxes, masks, self.device)
        out = _Rows.empty(
            len(crops), with_texture=self.sampler is not None, with_appearance=bool(self.embed)
        )
        start = 0
        while start < len(crops):
            stop = min(start + self.batch_size, len(crops))
            if self._run(crops, start, stop, out=out):
                start = stop
            else:
                self._halve()
        self.num_people += len(crops)
        self._report_non_finite(crops, ~np.asarray(np.isfinite(out.body).all(axis=1)))
        return [
            Reconstruction(
                people=_people(out.body[part], crops.center[part], crops.size[part]),
                texture=None if out.texture is None else out.texture[part],
                appearance=None if out.appearance is None else out.appearance[part],
            )
            for part in crops.parts
        ]

    def _run(self, crops: _Crops, start: int, stop: int, *, out: _Rows) -> bool:
        """Compute the people from `start` to `stop` as one full batch; False: out of memory."""
        num = stop - start
        try:
            with torch.inference_mode():
                batch = torch.zeros(self.batch_size, 3, CROP_PX, CROP_PX, device=self.device)
                crops.write(start, stop, out=batch)
                body = self.model(batch, with_vertices=self.sampler is not None)
                fields = (
                    body.global_orient,
                    body.body_pose,
                    body.betas,
                    body.pred_cam,
                    body.keypoints_3d,
                )
                rows = torch.cat([field.flatten(1) for field in fields], dim=1)
                out.body[start:stop] = rows[:num].cpu().numpy()
                if self.sampler is not None and out.texture is not None:
                    texture = self._textures(self.sampler, batch, body, crops.masks(start, stop))
                    out.texture[start:stop] = texture[:num].cpu().numpy()
                    if self.embed is not None and out.appearance is not None:
                        out.appearance[start:stop] = self.embed(texture)[:num].cpu().numpy()
        except torch.OutOfMemoryError:
            if self.batch_size == 1:
                raise
            return False
        return True

    def _textures(
        self, sampler: TextureSampler, batch: Tensor, body: HmrOutput, masks: Tensor
    ) -> Tensor:
        """(B, 4, 256, 256) uint8 maps; those of crops that nobody is in are empty.

        Args:
            batch: (B, 3, S, S) crops, the people first.
            masks: (n, S, S) of the n people.
        """
        num = len(masks)
        assert body.vertices is not None  # asked for
        texture = torch.zeros(len(batch), *_TEXTURE_SHAPE, dtype=torch.uint8, device=self.device)
        texture[:num] = pack_texture(
            sampler.sample(body.vertices[:num], body.pred_cam_t[:num], batch[:num], masks)
        )
        return texture

    def _halve(self) -> None:
        self.batch_size //= 2
        logger.warning("out of device memory: batches of %d crops from now on", self.batch_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _report_non_finite(self, crops: _Crops, is_bad: Bool) -> None:
        self.num_non_finite += int(is_bad.sum())
        for i in np.unique(crops.chunk[is_bad]):
            chunk = crops.chunks[i]
            frames = chunk.frame_index[crops.frame_row[is_bad & (crops.chunk == i)]]
            logger.warning(
                "video %s, frames %s: results that are not finite",
                chunk.video_id,
                np.unique(frames).tolist(),
                extra={"video": chunk.video_id},
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Results of all P people: (P, sum of widths), (P, 4, 256, 256) and (P, 256)."""

    body: F32
    texture: U8 | None
    appearance: NDArray[np.float16] | None

    @classmethod
    def empty(cls, num: int, *, with_texture: bool, with_appearance: bool) -> _Rows:
        return cls(
            body=np.empty((num, sum(_WIDTHS)), np.float32),
            texture=np.empty((num, *_TEXTURE_SHAPE), np.uint8) if with_texture else None,
            appearance=np.empty((num, APPEARANCE_WIDTH), np.float16) if with_appearance else None,
        )


class _Crops:
    """The crops of all people, numbered through all P of them and all chunks.

    Of a chunk only the frames that show people go to the device, once, when its first crop is
    wanted; they are freed after its last.

    Attributes:
        chunk: (P,) number of the chunk.
        frame_row: (P,) row in the chunk.
        bbox: (P, 4) xyxy px.
        center, size: (P, 2), (P,) px, the square.
        parts: per chunk its slice of all people.
    """

    def __init__(
        self,
        chunks: Sequence[FrameChunk],
        boxes: Sequence[tuple[I64, F32]],
        masks: Sequence[Sequence[RleMask] | None] | None,
        device: torch.device,
    ) -> None:
        if masks is None:
            masks = [None] * len(chunks)
        for chunk, (frame_row, bbox_xyxy), given in zip(chunks, boxes, masks, strict=True):
            _check(chunk, frame_row, bbox_xyxy)
            if given is not None:
                _check_masks(chunk, given, len(frame_row))
        nums = [len(frame_row) for frame_row, _ in boxes]
        ends = np.cumsum([0, *nums])
        self.chunks = chunks
        self.chunk = np.repeat(np.arange(len(chunks)), nums)
        self.frame_row = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in boxes)])
        self.bbox = np.concatenate([np.zeros((0, 4), np.float32), *(box for _, box in boxes)])
        self.center, self.size = crop_square(self.bbox)
        self.parts = [slice(a, b) for a, b in pairwise(ends.tolist())]
        self._masks = masks
        self._device = device
        self._frames: dict[int, Tensor] = {}
        self._used_rows: dict[int, I64] = {}

    def __len__(self) -> int:
        return len(self.size)

    def write(self, start: int, stop: int, *, out: Tensor) -> None:
        """Write the crops from `start` to `stop` into the first rows of `out` (B, 3, 256, 256)."""
        for i in np.unique(self.chunk[start:stop]).tolist():
            part = self.parts[i]
            first, last = max(start, part.start), min(stop, part.stop)
            if i not in self._frames:
                self._used_rows[i] = np.unique(self.frame_row[part])
                self._frames[i] = _to_device(self.chunks[i].rgb, self._used_rows[i], self._device)
            row = np.searchsorted(self._used_rows[i], self.frame_row[first:last])
            out[first - start : last - start] = crop_batch(
                self._frames[i],
                torch.from_numpy(row),
                torch.from_numpy(self.center[first:last]),
                torch.from_numpy(self.size[first:last]),
            )
            if last == part.stop:
                del self._frames[i]

    def masks(self, start: int, stop: int) -> Tensor:
        """(n, S, S) float32 masks in [0, 1] of the crops from `start` to `stop`.

        A pixel that the mask covers by a 255th counts as fully inside (docs/PHALP.md, section 2.2).
        """
        found = []
        for i in np.unique(self.chunk[start:stop]).tolist():
            part, given = self.parts[i], self._masks[i]
            people = slice(max(start, part.start), min(stop, part.stop))
            square = torch.from_numpy(self.center[people]), torch.from_numpy(self.size[people])
            width, height = self.chunks[i].image_size_wh
            if given is None:
                crops = _box_crops(self.bbox[people], (height, width), *square, self._device)
            else:
                dense = _dense_masks(
                    given[people.start - part.start : people.stop - part.start], self._device
                )
                crops = crop_masks(dense, torch.arange(len(dense)), *square)
            found.append(crops.clamp_(max=1))
        return torch.cat(found)


def _check(chunk: FrameChunk, frame_row: I64, bbox_xyxy: F32) -> None:
    where = f"video {chunk.video_id}, frames from {chunk.frame_index[:1].tolist()}"
    num = len(frame_row)
    if frame_row.shape != (num,) or bbox_xyxy.shape != (num, 4):
        raise ValueError(
            f"{where}: expected rows ({num},) and boxes ({num}, 4), "
            f"got {frame_row.shape} and {bbox_xyxy.shape}"
        )
    is_row = (frame_row >= 0) & (frame_row < chunk.num_frames)
    if not is_row.all():
        raise ValueError(
            f"{where}: expected rows 0 to {chunk.num_frames - 1}, got {frame_row[~is_row][:8]}"
        )
    is_box = np.isfinite(bbox_xyxy).all(axis=1) & (bbox_xyxy[:, 2:] > bbox_xyxy[:, :2]).all(axis=1)
    if not is_box.all():
        i = int(np.flatnonzero(~is_box)[0])
        raise ValueError(
            f"video {chunk.video_id}, frame {chunk.frame_index[frame_row[i]]}: expected a finite "
            f"box with x1 < x2 and y1 < y2, got {bbox_xyxy[i].tolist()}"
        )


def _check_masks(chunk: FrameChunk, masks: Sequence[RleMask], num: int) -> None:
    width, height = chunk.image_size_wh
    if len(masks) != num or any(mask.size_hw != (height, width) for mask in masks):
        raise ValueError(
            f"video {chunk.video_id}, frames from {chunk.frame_index[:1].tolist()}: expected "
            f"{num} masks of {(height, width)}, got {len(masks)} of "
            f"{sorted({tuple(mask.size_hw) for mask in masks})}"
        )


def _dense_masks(masks: Sequence[RleMask], device: torch.device) -> Tensor:
    """(n, H, W) uint8, 255 inside: unrolled on the device, which is sent the run lengths only."""
    height, width = masks[0].size_hw
    runs = [run_lengths(mask) for mask in masks]
    lengths = np.concatenate(runs)
    values = np.concatenate([-(np.arange(len(run)) % 2) for run in runs])  # -1 is 255
    steps = torch.from_numpy(np.diff(values, prepend=0).astype(np.int8)).to(device)
    first = torch.from_numpy(np.cumsum(lengths) - lengths).to(device)
    # One more pixel for empty runs at the very end.
    flat = torch.zeros(len(masks) * height * width + 1, dtype=torch.int8, device=device)
    flat.index_add_(0, first, steps)
    inside = flat.cumsum_(0)[:-1].view(torch.uint8)
    return inside.view(len(masks), width, height).transpose(1, 2)  # runs go down the columns


def _box_crops(
    bbox_xyxy: F32, size_hw: tuple[int, int], center: Tensor, size: Tensor, device: torch.device
) -> Tensor:
    """`crop_masks` of `masks.box_mask`, equal in every bit, without drawing the boxes.

    Boxes and crops are upright, so that coverage is a product of that along x and that along y.

    Args:
        bbox_xyxy: (n, 4) px.
        size_hw: of the frame.
        center, size: (n, 2), (n,) px of the squares.

    Returns:
        (n, S, S) float32 whole numbers in 0..255.
    """
    affine = crop_affine(center, size) * COORDINATE_SCALE
    index = np.arange(CROP_PX)
    x = np.rint(affine[:, 0, :1] * index) + np.rint(affine[:, 0, 2:])
    y = np.rint(affine[:, 1, 1:2] * index + affine[:, 1, 2:])
    coverage = []
    for axis, (position, length) in enumerate(((x, size_hw[1]), (y, size_hw[0]))):
        low = np.maximum(bbox_xyxy[:, axis, None], 0)
        high = np.minimum(bbox_xyxy[:, axis + 2, None], length)
        step = np.floor(position * STEPS / COORDINATE_SCALE + 0.5)  # 1/32 px
        pixel = np.floor(step / STEPS)
        fraction = step / STEPS - pixel
        inside = (1 - fraction) * ((low <= pixel) & (pixel < high))
        inside += fraction * ((low <= pixel + 1) & (pixel + 1 < high))
        coverage.append(torch.from_numpy(inside.astype(np.float32)).to(device))
    along_x, along_y = coverage
    return (along_y[:, :, None] * along_x[:, None, :]).mul_(255).add_(0.5).floor_()


def _to_device(rgb: U8, rows: I64, device: torch.device) -> Tensor:
    """Some frames as a tensor; copied once, through pinned memory where there is a GPU.

    Args:
        rgb: (T, H, W, 3); may be read-only, as arrays out of shared memory are.
        rows: (n,) frames wanted.
    """
    shape = (len(rows), *rgb.shape[1:])
    host = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.take(rgb, rows, axis=0, out=host.numpy(), mode="clip")
    return host.to(device, non_blocking=True)


def _people(rows: F32, center: F32, size: F32) -> People:
    """(M, sum of widths) to a record."""
    num = len(rows)
    fields = np.split(rows, np.cumsum(_WIDTHS)[:-1], axis=1)
    orient, pose, betas, pred_cam, keypoints = (np.ascontiguousarray(field) for field in fields)
    return People(
        global_orient=orient.reshape(num, 1, 3, 3),
        body_pose=pose.reshape(num, NUM_BODY_JOINTS, 3, 3),
        betas=betas,
        pred_cam=pred_cam,
        box_center_px=center.copy(),
        box_size_px=size.copy(),
        keypoints_3d_m=keypoints.reshape(num, NUM_KEYPOINTS, 3),
    )

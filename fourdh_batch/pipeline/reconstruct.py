"""Boxes of many chunks to bodies: crops of any frames and videos share batches of one size.

`M` people of a chunk, `B` crops of a batch, `K` = 44 keypoints.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fourdh_batch.geometry import CROP_PX, crop_square
from fourdh_batch.models.hmr2 import Hmr2
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
)
from fourdh_batch.video.crops import crop_batch

logger = logging.getLogger(__name__)

CUDA_BATCH_SIZE = 64
# Larger batches gain a tenth on a CPU, and a batch of one has no companions on which the last bits
# of a result could depend.
CPU_BATCH_SIZE = 1

# What a row holds: rotations of root and joints, betas, pred_cam, keypoints.
_WIDTHS = (9, 9 * NUM_BODY_JOINTS, NUM_BETAS, 3, 3 * NUM_KEYPOINTS)


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
    ) -> None:
        self.device = torch.device(device or model.smpl_head.init_cam.device)
        if batch_size is None:
            batch_size = CPU_BATCH_SIZE if self.device.type == "cpu" else CUDA_BATCH_SIZE
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.model = model.to(self.device).eval()
        self.batch_size = batch_size
        self.num_people = 0
        self.num_non_finite = 0

    def reconstruct(
        self, chunks: Sequence[FrameChunk], boxes: Sequence[tuple[I64, F32]]
    ) -> list[People]:
        """Bodies of all boxes.

        Args:
            chunks: of any videos and picture sizes.
            boxes: per chunk the rows of the frames (M,) and the boxes (M, 4) as xyxy in pixels.

        Returns:
            Per chunk its M people, in the order of the boxes.

        Raises:
            ValueError: a box is not finite or has no extent, or names no frame of its chunk.
            torch.OutOfMemoryError: a single crop does not fit into the device's memory.
        """
        crops = _Crops(chunks, boxes, self.device)
        rows = np.empty((len(crops), sum(_WIDTHS)), np.float32)
        start = 0
        while start < len(rows):
            stop = min(start + self.batch_size, len(rows))
            if self._run(crops, start, stop, out=rows):
                start = stop
            else:
                self._halve()
        self.num_people += len(rows)
        self._report_non_finite(crops, ~np.asarray(np.isfinite(rows).all(axis=1)))
        return [_people(rows[part], crops.center[part], crops.size[part]) for part in crops.parts]

    def _run(self, crops: _Crops, start: int, stop: int, *, out: F32) -> bool:
        """Compute the people from `start` to `stop` as one full batch; False: out of memory."""
        try:
            with torch.inference_mode():
                batch = torch.zeros(self.batch_size, 3, CROP_PX, CROP_PX, device=self.device)
                crops.write(start, stop, out=batch)
                body = self.model(batch)
                fields = (
                    body.global_orient,
                    body.body_pose,
                    body.betas,
                    body.pred_cam,
                    body.keypoints_3d,
                )
                rows = torch.cat([field.flatten(1) for field in fields], dim=1)
                out[start:stop] = rows[: stop - start].cpu().numpy()
        except torch.OutOfMemoryError:
            if self.batch_size == 1:
                raise
            return False
        return True

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
            )


class _Crops:
    """The crops of all people, numbered through all P of them and all chunks.

    Of a chunk only the frames that show people go to the device, once, when its first crop is
    wanted; they are freed after its last.

    Attributes:
        chunk: (P,) number of the chunk.
        frame_row: (P,) row in the chunk.
        center, size: (P, 2), (P,) px, the square.
        parts: per chunk its slice of all people.
    """

    def __init__(
        self,
        chunks: Sequence[FrameChunk],
        boxes: Sequence[tuple[I64, F32]],
        device: torch.device,
    ) -> None:
        for chunk, (frame_row, bbox_xyxy) in zip(chunks, boxes, strict=True):
            _check(chunk, frame_row, bbox_xyxy)
        nums = [len(frame_row) for frame_row, _ in boxes]
        ends = np.cumsum([0, *nums])
        self.chunks = chunks
        self.chunk = np.repeat(np.arange(len(chunks)), nums)
        self.frame_row = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in boxes)])
        self.center, self.size = crop_square(
            np.concatenate([np.zeros((0, 4), np.float32), *(box for _, box in boxes)])
        )
        self.parts = [slice(a, b) for a, b in pairwise(ends.tolist())]
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

"""Pictures of people rendered here as numbered training examples of a detector.

A frame takes as long to render as a small network takes to learn from it, so that each is used a
few times, cut, mirrored and coloured differently. Which frame an example is of and how it is
changed follow from (seed, number) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fourdh_batch.models.smpl import SmplBody
from fourdh_batch.synthetic.corpus import MIN_VISIBLE_FRACTION
from fourdh_batch.synthetic.frames import BLOCK, FrameStudio, LabelledFrames
from fourdh_batch.synthetic.mocap import Recording

FRAME_SCALE = 1.2  # of rendered frames to the network's input, so that cuts are seldom enlarged
POOL_FRAMES = 512  # in memory; rendered, used in any order, and dropped
WHOLE_SHARE = 0.35  # of the examples that are not cut
LEAST_SIDE = 0.55  # of a cut, of the frame's
LEAST_BOX_PX = 4.0  # smaller boxes at a cut's border are nobody's
_ORDER, _CHANGE = 1, 2  # what a random generator is for


class FrameExample(NamedTuple):
    """One picture and who is in it.

    Attributes:
        rgb: (3, H, W) uint8.
        boxes: (N, 4) float32 centre and size as parts of the picture, whose outer edges are 0 and
            1: what published detectors are trained on (COCO), and what `1 - x` mirrors.
        visible_fraction: (N,) float32.
        owner: (H, W) int16, row among the N; -1: nobody of these.
    """

    rgb: Tensor
    boxes: Tensor
    visible_fraction: Tensor
    owner: Tensor


class FrameBatch(NamedTuple):
    """B examples; `rgb` (B, 3, H, W), the others a tensor per picture."""

    rgb: Tensor
    boxes: list[Tensor]
    visible_fraction: list[Tensor]
    owner: list[Tensor]


def collate_frames(examples: Sequence[FrameExample]) -> FrameBatch:
    """Pictures side by side."""
    rgb, boxes, visible, owner = zip(*examples, strict=True)
    return FrameBatch(torch.stack(rgb), list(boxes), list(visible), list(owner))


class FrameExamples:
    """See `loop.Examples`.

    Args:
        body: of the people, on the CPU.
        recordings: motion capture; none: the package's own motions alone.
        seed: of people and changes.
        size_hw: of the examples.
        reuse: times that a frame is used; 0: once and unchanged, to evaluate on.
    """

    def __init__(
        self,
        body: SmplBody,
        recordings: Sequence[Recording],
        *,
        seed: int,
        size_hw: tuple[int, int],
        reuse: int,
        num_places: int,
        num_outfits: int,
    ) -> None:
        self._body = body
        self._recordings = recordings
        self._seed = seed
        self._size_hw = size_hw
        self._reuse = reuse
        self._num_places, self._num_outfits = num_places, num_outfits
        self._studio: FrameStudio | None = None
        self._pool = -1
        self._order = np.zeros(0, dtype=np.int64)
        self._blocks: dict[int, LabelledFrames] = {}

    def __getitem__(self, number: int) -> FrameExample:
        frame = self._frame_of(number)
        block, row = divmod(frame, BLOCK)
        if block not in self._blocks:
            self._blocks[block] = self._open().block(block)
        frames = self._blocks[block]
        mine = frames.frame_row == row
        rgb = torch.from_numpy(frames.rgb[row])
        height, width = rgb.shape[:2]
        first = int(np.argmax(mine)) if mine.any() else 0
        owner = torch.from_numpy(frames.owner[row])
        owner = torch.where(owner >= 0, owner - first, -1)
        box = torch.from_numpy(frames.bbox_xyxy_px[mine])
        visible = torch.from_numpy(frames.visible_fraction[mine])
        if not self._reuse:
            return _cut(rgb, box, visible, owner, (0, 0, width, height), self._size_hw)
        rng = np.random.default_rng((self._seed, _CHANGE, number))
        window = _random_window(rng, (width, height))
        example = _cut(rgb, box, visible, owner, window, self._size_hw)
        if rng.random() < 0.5:
            example = _mirrored(example)
        gain = torch.from_numpy(rng.normal(1, 0.06, 3) * np.exp(rng.normal(0, 0.12))).float()
        coloured = (example.rgb * gain[:, None, None]).clamp(0, 255).round().byte()
        return example._replace(rgb=coloured)

    def _frame_of(self, number: int) -> int:
        """The frame of an example; forgets frames that do not come again."""
        pool = number // (POOL_FRAMES * max(self._reuse, 1))
        if pool != self._pool:
            self._pool = pool
            self._blocks.clear()
            rng = np.random.default_rng((self._seed, _ORDER, pool))
            self._order = rng.permutation(POOL_FRAMES * self._reuse) % POOL_FRAMES
        if self._reuse <= 1:  # in the order in which they are rendered, for many data workers
            return number
        return pool * POOL_FRAMES + int(self._order[number % len(self._order)])

    def _open(self) -> FrameStudio:
        # In the process that makes the examples: it takes seconds and some memory.
        if self._studio is None:
            height, width = (round(n * FRAME_SCALE) for n in self._size_hw)
            self._studio = FrameStudio(
                self._body,
                seed=self._seed,
                image_size_wh=(width, height),
                recordings=self._recordings,
                num_places=self._num_places,
                num_outfits=self._num_outfits,
            )
        return self._studio


def _random_window(
    rng: np.random.Generator, image_size_wh: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a cut; its shape is nearly the frame's."""
    width, height = image_size_wh
    if rng.random() < WHOLE_SHARE:
        return 0, 0, width, height
    side = rng.uniform(LEAST_SIDE, 1.0)
    shape = np.exp(rng.normal(0, 0.08))
    w, h = (min(round(n * side * s), n) for n, s in ((width, shape), (height, 1 / shape)))
    return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h


def _cut(
    rgb: Tensor,
    box_xyxy: Tensor,
    visible: Tensor,
    owner: Tensor,
    window: tuple[int, int, int, int],
    size_hw: tuple[int, int],
) -> FrameExample:
    """A part of a frame, scaled, with the people of whom enough is left.

    Args:
        rgb: (H, W, 3) uint8.
        box_xyxy: (N, 4) px, integers are pixel centres; cut at the centres of the border's pixels,
            as a corpus has it.
        visible: (N,) fraction.
        owner: (H, W) row among the N; -1: nobody.
        window: left, top, width and height in whole pixels.
        size_hw: of the example.
    """
    left, top, width, height = window
    inner = owner[top : top + height, left : left + width]
    before = torch.bincount(owner[owner >= 0].long(), minlength=len(visible))
    after = torch.bincount(inner[inner >= 0].long(), minlength=len(visible))
    visible = visible * after / before.clamp(min=1)
    corner = torch.tensor([left, top] * 2)
    size = torch.tensor([width, height] * 2)
    box = torch.minimum((box_xyxy - corner).clamp(min=0), size - 1)
    sides = box[:, 2:] - box[:, :2]
    keep = (visible >= MIN_VISIBLE_FRACTION) & (sides >= LEAST_BOX_PX).all(dim=1)
    box, sides = ((box + 0.5) / size)[keep], (sides / size[:2])[keep]  # from edge to edge
    row = torch.full((len(visible) + 1,), -1, dtype=torch.int16)  # the last one is nobody's
    row[:-1][keep] = torch.arange(int(keep.sum()), dtype=torch.int16)
    part = rgb[top : top + height, left : left + width].permute(2, 0, 1)[None].float()
    scaled = F.interpolate(part, size_hw, mode="bilinear", antialias=True)
    where = F.interpolate(row[inner.long()][None, None].float(), size_hw, mode="nearest-exact")
    return FrameExample(
        rgb=scaled[0].round().clamp(0, 255).byte(),
        boxes=torch.cat([box[:, :2] + sides / 2, sides], dim=1),
        visible_fraction=visible[keep],
        owner=where[0, 0].short(),
    )


def _mirrored(example: FrameExample) -> FrameExample:
    boxes = example.boxes.clone()
    boxes[:, 0] = 1 - boxes[:, 0]
    return example._replace(rgb=example.rgb.flip(2), boxes=boxes, owner=example.owner.flip(1))

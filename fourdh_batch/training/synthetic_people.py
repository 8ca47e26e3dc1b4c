"""People rendered by this package, with their exact truth."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.models.smpl import SmplBody
from fourdh_batch.synthetic.crops import BLOCK, Crops, CropStudio
from fourdh_batch.synthetic.mocap import Recording
from fourdh_batch.training.examples import Person

BLOCKS_IN_MEMORY = 4
RECORDED_SHARE = 0.5  # of the people that are trained on, where there is motion capture
NUM_PLACES, NUM_OUTFITS = 12, 96
EXTRA_COLUMNS = 2  # beside the three quarters that the backbone sees, for mirrored pictures


class SyntheticPeople:
    """See `data.PeopleSource`. Pictures end with the box, which was already drawn at random.

    Args:
        body: of the people, on the CPU.
        recordings: motion capture; none: the package's own motions alone.
        seed: of the people.
        crop_px: side of the pictures.
        recorded_share: of the people who take their pose from the motion capture.
    """

    def __init__(
        self,
        body: SmplBody,
        recordings: Sequence[Recording],
        *,
        seed: int,
        crop_px: int,
        recorded_share: float = RECORDED_SHARE,
    ) -> None:
        self._body = body
        self._recordings = recordings
        self._seed = seed
        self._crop_px = crop_px
        self._recorded_share = recorded_share
        self._studio: CropStudio | None = None
        self._blocks: OrderedDict[int, Crops] = OrderedDict()

    def person(self, number: int) -> Person:
        """See `data.PeopleSource`."""
        block, row = divmod(number, BLOCK)
        if block not in self._blocks:
            while len(self._blocks) >= BLOCKS_IN_MEMORY:
                self._blocks.popitem(last=False)
            self._blocks[block] = self._open().block(block)
        return _person(self._blocks[block], row)

    def _open(self) -> CropStudio:
        # In the process that makes the examples: it takes a second and some memory.
        if self._studio is None:
            self._studio = CropStudio(
                self._body,
                seed=self._seed,
                size_hw=(self._crop_px, self._crop_px * 3 // 4 + EXTRA_COLUMNS),
                recordings=self._recordings,
                recorded_share=self._recorded_share,
                num_places=NUM_PLACES,
                num_outfits=NUM_OUTFITS,
                supersampling=1,
            )
        return self._studio


def _person(crops: Crops, row: int) -> Person:
    side, width = crops.rgb.shape[1:3]
    margin = (side - width) // 2
    image = np.zeros((side, side, 3), dtype=np.uint8)
    image[:, margin : margin + width] = crops.rgb[row]
    keypoints_2d: NDArray[np.float32] = crops.keypoints_2d[row].copy()
    keypoints_2d[:, :2] = (keypoints_2d[:, :2] + 0.5) * side
    extent = np.ptp(keypoints_2d[keypoints_2d[:, 2] > 0, :2], axis=0)
    return Person(
        image=image,
        box_center_px=np.full(2, side / 2, dtype=np.float32),
        box_size_px=float(side),
        longer_side_px=float(extent.max()),
        keypoints_2d=keypoints_2d,
        keypoints_3d=crops.keypoints_3d[row],
        global_orient=crops.global_orient[row],
        body_pose=crops.body_pose[row],
        betas=crops.betas[row],
        has_pose=float(crops.has_pose[row]),
        has_betas=float(crops.has_betas[row]),
        is_framed=True,
    )

"""People rendered by this package, with their exact truth."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.geometry import CROP_PX
from fourdh_batch.models.smpl import SmplBody
from fourdh_batch.models.vit import IMAGE_HW
from fourdh_batch.synthetic.crops import BLOCK, Crops, CropStudio
from fourdh_batch.synthetic.mocap import load_recordings
from fourdh_batch.training.examples import Person

BLOCKS_IN_MEMORY = 4
RECORDED_SHARE = 0.5  # of the people take their pose from motion capture, where there is some
NUM_PLACES, NUM_OUTFITS = 12, 96
# What the backbone sees of a crop, and a column on each side for mirrored pictures.
WIDTH_PX = IMAGE_HW[1] + 2


class SyntheticPeople:
    """See `data.PeopleSource`. Pictures end with the box, which was already drawn at random.

    Args:
        body: of the people, on the CPU.
        path: folder of motion capture; empty: the package's own motions alone.
        seed: of the people.
    """

    def __init__(self, body: SmplBody, path: str, *, seed: int) -> None:
        self._body = body
        self._path = path
        self._seed = seed
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
                size_hw=(CROP_PX, WIDTH_PX),
                recordings=load_recordings(self._path) if self._path else (),
                recorded_share=RECORDED_SHARE,
                num_places=NUM_PLACES,
                num_outfits=NUM_OUTFITS,
                supersampling=1,
            )
        return self._studio


def _person(crops: Crops, row: int) -> Person:
    margin = (CROP_PX - WIDTH_PX) // 2
    image = np.zeros((CROP_PX, CROP_PX, 3), dtype=np.uint8)
    image[:, margin : margin + WIDTH_PX] = crops.rgb[row]
    keypoints_2d: NDArray[np.float32] = crops.keypoints_2d[row].copy()
    keypoints_2d[:, :2] = (keypoints_2d[:, :2] + 0.5) * CROP_PX
    extent = np.ptp(keypoints_2d[keypoints_2d[:, 2] > 0, :2], axis=0)
    return Person(
        image=image,
        box_center_px=np.full(2, CROP_PX / 2, dtype=np.float32),
        box_size_px=float(CROP_PX),
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

from __future__ import annotations

import numpy as np
import pytest

from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.synthetic.corpus import MIN_VISIBLE_FRACTION
from fourdh_batch.synthetic.frames import BLOCK, FrameStudio, LabelledFrames

SIZE_WH = (128, 96)


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(scope="module")
def studio(body: SmplBody) -> FrameStudio:
    return FrameStudio(body, seed=3, image_size_wh=SIZE_WH, num_places=1, num_outfits=8)


@pytest.fixture(scope="module")
def frames(studio: FrameStudio) -> LabelledFrames:
    return studio.block(1)


def test_frames_have_all_of_their_truth(frames: LabelledFrames) -> None:
    count = len(frames.frame_row)
    assert frames.index.tolist() == list(range(BLOCK, 2 * BLOCK))
    assert frames.rgb.shape == (BLOCK, SIZE_WH[1], SIZE_WH[0], 3)
    assert frames.rgb.dtype == np.uint8
    assert np.ptp(frames.rgb.reshape(BLOCK, -1), axis=1).min() > 30
    assert count > BLOCK  # two and a half people per frame
    assert (np.diff(frames.frame_row) >= 0).all()
    assert frames.bbox_xyxy_px.shape == (count, 4)
    assert frames.visible_fraction.min() >= MIN_VISIBLE_FRACTION
    assert frames.visible_fraction.max() <= 1
    assert (frames.bbox_xyxy_px >= 0).all()
    assert (frames.bbox_xyxy_px <= np.array(SIZE_WH * 2) - 1).all()


def test_a_box_holds_what_is_seen_of_its_person_and_ends_there(frames: LabelledFrames) -> None:
    whole = 0
    for n, (row, box) in enumerate(zip(frames.frame_row, frames.bbox_xyxy_px, strict=True)):
        assert not (np.delete(frames.owner, row, axis=0) == n).any()
        y, x = np.nonzero(frames.owner[row] == n)
        seen = np.array([x.min(), y.min(), x.max(), y.max()])
        assert (seen[:2] >= box[:2] - 1).all()
        assert (seen[2:] <= box[2:] + 1).all()
        if frames.visible_fraction[n] > 0.999:
            whole += 1
            np.testing.assert_allclose(
                seen, box, atol=2.5
            )  # ends of limbs are thinner than a pixel
    assert whole >= 5


def test_a_frame_is_the_same_wherever_one_starts(body: SmplBody, frames: LabelledFrames) -> None:
    other = FrameStudio(body, seed=3, image_size_wh=SIZE_WH, num_places=1, num_outfits=8)
    again = other.block(1)
    for name in ("rgb", "frame_row", "bbox_xyxy_px", "visible_fraction", "owner"):
        np.testing.assert_array_equal(getattr(again, name), getattr(frames, name), err_msg=name)


def test_hidden_people_are_less_visible(frames: LabelledFrames) -> None:
    """The share of the box that its person's pixels fill falls with what is said to be seen."""
    box = frames.bbox_xyxy_px
    area = np.prod(box[:, 2:] - box[:, :2] + 1, axis=1)
    pixels = np.bincount(frames.owner[frames.owner >= 0], minlength=len(box))
    filled = pixels / area
    hidden = frames.visible_fraction < 0.5
    assert hidden.any()
    assert filled[hidden].mean() < 0.7 * filled[~hidden].mean()

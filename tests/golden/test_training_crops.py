"""Training crops against the published code on a picture of noise (`augment.npz`).

Tolerances: coordinates are rounded in float32. Where a part of the body is cropped, the place of
the crop is rounded differently, which can move a pixel by one grey level (0.018 normalised).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fourdh_batch.geometry import axis_angle_to_rotmat
from fourdh_batch.training.augment import Changes, make_example
from fourdh_batch.training.examples import Person
from tests.conftest import DATA

ONE_LEVEL = 1.3 / 255 / 0.224
BOX_CENTER, BOX_SIZE, LONGER_SIDE = (45.0, 40.0), 60.0, 50.0
CASES = range(6)


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(DATA / "hmr2" / "augment.npz")


@pytest.mark.parametrize("case", CASES)
def test_example_equals_the_published_one(golden: Any, case: int) -> None:
    def of(name: str) -> Any:
        return golden[f"case{case}_{name}"]

    rotations = axis_angle_to_rotmat(of("pose").reshape(24, 3))
    person = Person(
        image=golden["image"],
        box_center_px=np.array(BOX_CENTER, dtype=np.float32),
        box_size_px=BOX_SIZE,
        longer_side_px=LONGER_SIDE,
        keypoints_2d=of("keypoints_2d"),
        keypoints_3d=of("keypoints_3d"),
        global_orient=rotations[:1],
        body_pose=rotations[1:],
        betas=of("betas"),
        has_pose=1.0,
        has_betas=1.0,
    )
    scale, rotation, is_flipped, part, x, y = of("changes").tolist()
    changes = Changes(
        scale=scale,
        rotation_deg=rotation,
        translation=(x, y),
        color=tuple(of("color").tolist()),
        is_flipped=bool(is_flipped),
        extreme_crop=None if part < 0 else part,
    )
    example = make_example(person, changes)
    np.testing.assert_allclose(
        example.crop[:, ::8, ::8], of("out_crop"), rtol=0, atol=0 if part < 0 else ONE_LEVEL
    )
    for name in ("keypoints_2d", "keypoints_3d"):
        np.testing.assert_allclose(getattr(example, name), of(f"out_{name}"), rtol=0, atol=5e-7)
    for name, joints in (("global_orient", 1), ("body_pose", 23)):
        expected = axis_angle_to_rotmat(of(f"out_{name}").reshape(joints, 3))
        np.testing.assert_allclose(getattr(example, name), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(example.betas, of("betas"))
    if part < 0:
        assert float(example.relative_size) == pytest.approx(scale * BOX_SIZE / LONGER_SIDE)

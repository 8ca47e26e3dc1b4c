"""Depth maps of an independent float32 CPU rasteriser that follows the rules PHALP relies on.

`tests/data/rasterizer/depth.npz`: a closed mesh of 2560 vertices in three shapes, seen by the
256 pixel crop camera (focal length 5000); the third one lies beyond the far plane.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fourdh_batch.rasterizer import FAR_M, rasterize, rasterize_depth

GOLDEN = Path(__file__).parents[1] / "data" / "rasterizer" / "depth.npz"
CROP = {
    "focal_px": 5000.0,
    # the reference counts pixel i from i to i + 1: its 128 is our 127.5
    "principal_point_px": (127.5, 127.5),
    "image_size_hw": (256, 256),
}


def test_depth_equals_the_reference_rasteriser() -> None:
    with np.load(GOLDEN) as golden:
        vertices = torch.from_numpy(golden["vertices"] + golden["cam_t"][:, None])
        faces = torch.from_numpy(golden["faces"]).long()
        expected = torch.from_numpy(golden["depth"])
    depth = rasterize_depth(vertices, faces, **CROP)
    covered = (expected < FAR_M) | (depth < FAR_M)
    assert covered.sum(dim=(1, 2)).tolist() == [13375, 10163, 0]
    # float32 there, float64 here: a pixel on a silhouette may differ
    close = (depth - expected).abs()[covered] <= 2e-4
    assert close.double().mean() >= 0.998
    assert torch.equal(depth, rasterize(vertices, faces, **CROP).depth)

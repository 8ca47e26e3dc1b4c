"""Whole sequences of the published tracker, with our own pose predictor and texture encoder.

Nothing is handed in but detections and weights: three people crossing (seqA), eight with births,
deaths, spurious boxes and a cut (seqB), and people who hide for 50 and 51 frames (seqC).

Source: docs/PHALP.md, sections 5 to 12 and 16.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fourdh_batch.models.appearance import TextureMemory, untrained_texture_encoder
from fourdh_batch.tracking.location import camera_of
from fourdh_batch.tracking.tracker import PhalpTracker, TrackedFrame, TrackerSettings
from fourdh_batch.types import FrameDetections
from tests.golden.phalp_recipe import SMALL_SEED, TEXTURE_ENCODER_SHAPES, weights
from tests.golden.test_pose_predictor import make_predictor
from tests.golden.test_tracking_sequences import lists_of, predecessors, reference_lists
from tests.texture_maps import uv_maps
from tests.tracking_scenes import load, recorded_frames

SEQUENCES = ["seqA", "seqB", "seqC"]


def frames_of(z: dict[str, NDArray]) -> list[FrameDetections]:
    corners = np.concatenate([z["in_bbox"][:, :2], z["in_bbox"][:, :2] + z["in_bbox"][:, 2:]], 1)
    frames = recorded_frames(
        {
            **z,
            "in_image_size_wh": z["in_image_size"][::-1],
            "in_bbox_xyxy": corners.astype(np.float32),
            "in_size": z["in_scale"].max(1),
            "in_camera": z["in_loca"][:, 90:93],
        }
    )
    rows = [slice(*z["in_frame_ptr"][t : t + 2]) for t in range(len(frames))]
    return [
        replace(frame, appearance=uv_maps(z["in_uv_rgb_q"][part], z["in_uv_mask"][part]))
        for frame, part in zip(frames, rows, strict=True)
    ]


def whole_tracker(*, compat: bool) -> tuple[PhalpTracker, TextureMemory]:
    encoder = untrained_texture_encoder()
    tensors = weights(TEXTURE_ENCODER_SHAPES, SMALL_SEED)
    encoder.load_state_dict({k.removeprefix("encoding_head."): t for k, t in tensors.items()})
    memory = TextureMemory(encoder)
    tracker = PhalpTracker(
        TrackerSettings(compat=compat), pose_predictor=make_predictor("small"), texture=memory
    )
    return tracker, memory


@pytest.mark.parametrize("name", SEQUENCES)
def test_compat_equals_the_published_tracker(name: str) -> None:
    z = load(f"full_{name}")
    tracker, memory = whole_tracker(compat=True)
    got: list[TrackedFrame] = []
    for t, frame in enumerate(frames_of(z)):
        tracked = tracker.update(frame)
        got.append(tracked)
        detections, rows = slice(*z["in_frame_ptr"][t : t + 2]), slice(*z["trk_ptr"][t : t + 2])
        assert np.array_equal(tracked.detection_track_id, z["det_track_id"][detections]), t
        state = tracker._tracks  # `state()` would pack all maps, in every frame
        assert np.array_equal(state.track_id, z["trk_id"][rows])
        assert np.array_equal(state.hits, z["trk_hits"][rows])
        assert np.array_equal(np.where(state.hits >= 5, 2, 1), z["trk_state"][rows])
        assert np.array_equal(t - state.last_seen, z["trk_tsu"][rows])
        assert np.array_equal(t - state.first_frame + 1, z["trk_age"][rows])

        expected = tracker.predict(t + 1)
        assert expected.pose == pytest.approx(z["trk_pose"][rows], abs=1e-4), t
        loca = z["trk_loca"][rows]
        place = expected.location.location
        camera = camera_of(place) / loca[:, 92:93]  # tx and ty in depths
        # Absolute: coordinates pass through 0, and cameras come as float32 crop cameras.
        assert place[:, :2] == pytest.approx(loca[:, 88:90], rel=1e-5, abs=1e-6)
        assert camera == pytest.approx(loca[:, 90:93] / loca[:, 92:93], rel=1e-5, abs=1e-6)
        maps = memory.maps(z["trk_id"][rows].tolist())
        assert maps.mean((2, 3)).numpy() == pytest.approx(z["trk_uv_mean"][rows], abs=1e-5)
    lists = lists_of(got, z["in_frame_ptr"])
    assert lists == reference_lists(z)
    seen = [[track for track, unseen, _ in rows if unseen == 0] for rows in lists]
    assert np.concatenate(seen).tolist() == z["outd_tracked_ids"].tolist()
    assert np.cumsum([0, *map(len, seen)]).tolist() == z["outd_ptr"].tolist()


@pytest.mark.parametrize(
    "name", ["seqA", *(pytest.param(name, marks=pytest.mark.slow) for name in ("seqB", "seqC"))]
)
def test_the_default_links_the_same_detections(name: str) -> None:
    """Own slots move predicted poses, by up to the clip of the pose term; no link depends on it."""
    z = load(f"full_{name}")
    tracker, _ = whole_tracker(compat=False)
    ids = np.concatenate([tracker.update(frame).detection_track_id for frame in frames_of(z)])
    assert predecessors(ids) == predecessors(z["det_track_id"])

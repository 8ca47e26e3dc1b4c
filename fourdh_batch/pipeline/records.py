"""What travels between the processes of a job. Imports no model library."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.types import F64, I64, U8, Detections, People

UNTRAINED = "untrained"
"""`hmr.weights` that mean seeded random weights, and what the tables then say."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkResult:
    """What one chunk gives: everything the tracker and the tables need, no pixels.

    Attributes:
        video_id, frame_index, pts_s, shot_scores: as in the chunk; (T,).
        image_size_wh: pixels.
        detections: all N boxes, also the dropped ones.
        drop_reason: (N,) text: empty where the box was kept, else ``low_score``, ``too_small``.
        people: the M kept boxes, reconstructed, in the order of `detections`.
        texture: (M, 4, 256, 256) uint8 texture maps of the people (see `models/texture.py`) for
            the tracker, which drops them; None where looks do not count.
        appearance: (M, 256) float16 compact vectors of the same, kept in `detections` where asked
            for (`tracker.store_appearance`); else None.
    """

    video_id: str
    frame_index: I64
    pts_s: F64
    shot_scores: F64 | None
    image_size_wh: tuple[int, int]
    detections: Detections
    drop_reason: NDArray[np.str_]
    people: People
    texture: U8 | None = None
    appearance: NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        kept = int(np.sum(self.drop_reason == ""))
        if kept != len(self.people):
            raise ValueError(f"video {self.video_id}: {kept} boxes kept, {len(self.people)} bodies")
        for name in ("texture", "appearance"):
            looks = getattr(self, name)
            if looks is not None and len(looks) != kept:
                raise ValueError(f"video {self.video_id}: {kept} boxes kept, {len(looks)} {name}s")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Which models and settings make the rows; known without loading any of them.

    Attributes:
        fingerprint: changes whenever rows may change.
        weights: ``untrained`` or the short digest of the HMR weights.
        weights_origin: ``official``, ``imported``, ``trained`` or ``untrained``;
            ``given`` where the bodies came from files of another pose engine.
        body: ``open`` or the short digest of the SMPL file.
        detector: short name and digest.
        cues: what the tracker's cost is made of.
    """

    fingerprint: str
    weights: str
    weights_origin: str
    body: str
    detector: str
    cues: str

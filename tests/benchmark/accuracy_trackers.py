"""What PHALP' is compared with in `accuracy`: itself without a cue, and overlap alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from fourdh_batch.evaluate.matching import Boxes
from fourdh_batch.geometry import box_iou
from fourdh_batch.pipeline.following import TrackerModels
from fourdh_batch.pipeline.records import ChunkResult
from fourdh_batch.tracking.assign import Assignment
from fourdh_batch.tracking.tracker import PhalpTracker, Prediction
from fourdh_batch.types import F32, F64, I64, FrameDetections

ALL_CUES = "all cues"
WITHOUT = ("pose", "location", "texture", "prediction", "boxes", "log cost")
MIN_IOU = 0.3  # of a pair, as in SORT
SORT_MAX_AGE = 1  # frames that a track of SORT survives unseen (its T_Lost)


class OneCueLess(PhalpTracker):
    """The tracker with one cue taken out of its cost; ghosts are still placed where predicted.

    Attributes:
        without: ``pose``, ``location``: that factor of the cost is the same for all pairs;
            ``prediction``: poses and places are expected as they were last seen; ``boxes``: see
            `TrackerConfig.box_weight`; ``log cost``: costs are added, as published.
    """

    without = ""

    def _associate(
        self,
        frame: FrameDetections,
        prediction: Prediction,
        expected_bbox: F32,
        row: I64,
        location: F64,
        pose: F32,
    ) -> Assignment:
        if self.without == "pose":
            prediction = replace(prediction, pose=np.zeros_like(prediction.pose))
            pose = np.zeros_like(pose)
        elif self.without == "location":
            told = prediction.location
            told = replace(told, location=np.zeros_like(told.location))
            prediction, location = replace(prediction, location=told), np.zeros_like(location)
        elif self.without == "prediction":
            tracks = self._tracks
            told = replace(prediction.location, location=tracks.location[:, -1])
            prediction = replace(prediction, location=told, pose=tracks.pose[:, -1])
            expected_bbox = tracks.bbox_xyxy_px
        return super()._associate(frame, prediction, expected_bbox, row, location, pose)


class OneCueLessModels(TrackerModels):
    """Hands out such trackers; `without` is set between videos."""

    without = ""

    def new_tracker(self) -> PhalpTracker:
        """See `TrackerModels`."""
        settings = self._settings
        if self.without == "boxes":
            settings = replace(settings, box_weight=0.0)
        elif self.without == "log cost":
            settings = replace(settings, log_cost=False)
        tracker = OneCueLess(
            settings,
            pose_predictor=self.predictor,
            texture=None if self.without == "texture" else self._new_texture_term(),
        )
        tracker.without = self.without
        return tracker


def track_by_overlap(results: Sequence[ChunkResult], *, n_init: int, max_age: int) -> Boxes:
    """Identities by the overlap with each track's last box, which stays where it was.

    As in PHALP' `n_init` detections in a row confirm a track, earlier ones count then, and it
    survives `max_age` frames unseen.
    """
    tracks: list[_Track] = []
    every: list[_Track] = []
    for result in results:
        kept = result.drop_reason == ""
        frame_row, bbox = result.detections.frame_row[kept], result.detections.bbox_xyxy_px[kept]
        for row, frame in enumerate(result.frame_index.tolist()):
            found = bbox[frame_row == row].astype(np.float64)
            last = np.array([track.boxes[-1] for track in tracks]).reshape(-1, 4)
            iou = box_iou(last, found)
            iou[iou < MIN_IOU] = 0
            by_track = dict(zip(*linear_sum_assignment(iou, maximize=True), strict=True))
            by_track = {t: d for t, d in by_track.items() if iou[t, d] > 0}
            for t, track in enumerate(tracks):
                if t in by_track:
                    track.see(frame, found[by_track[t]])
            tracks = [
                track
                for track in tracks
                if frame == track.frames[-1]
                or (len(track.frames) >= n_init and frame - track.frames[-1] <= max_age)
            ]
            for d in sorted(set(range(len(found))) - set(by_track.values())):
                tracks.append(_Track())
                tracks[-1].see(frame, found[d])
                every.append(tracks[-1])
    confirmed = [track for track in every if len(track.frames) >= n_init]
    frames = [np.array(track.frames) for track in confirmed]
    return Boxes(
        np.concatenate([np.zeros(0, np.int64), *frames]),
        np.repeat(np.arange(len(frames)), [len(f) for f in frames]),
        np.concatenate([np.zeros((0, 4)), *(np.array(track.boxes) for track in confirmed)]),
    )


class _Track:
    def __init__(self) -> None:
        self.frames: list[int] = []
        self.boxes: list[F64] = []

    def see(self, frame: int, box: F64) -> None:
        self.frames.append(frame)
        self.boxes.append(box)

"""Tracks against truth: ID switches, MOTA, IDF1, HOTA. The door to TrackEval.

Two protocols answer two questions. `phalp` is the one of the published tables of PHALP and
4DHumans on PoseTrack: boxes match from an IoU of 0.01 on, only frames with annotated people count,
and HOTA is the plain mean of the videos' HOTAs. `iou50` asks for boxes that fit: IoU 0.5, every
frame, HOTA of all videos taken together as TrackEval does. Predicted rows without a detection
(`state` predicted, the tracker's ghosts) count in neither; leave them out before.

Two things differ from the published tables. They left out videos without a result; here such a
video is all misses. They took MOTA and IDs from py-motmetrics, which breaks ties between
identities differently: 19 IDs here were 17 there on one noisy case.

Sources: Bernardin and Stiefelhagen, CLEAR MOT; Ristani et al., Performance Measures (IDF1);
Luiten et al., HOTA; all as TrackEval computes them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from fourdh_batch.errors import ConfigError, SchemaError
from fourdh_batch.evaluate.matching import Boxes, by_frame
from fourdh_batch.geometry import box_iou

INSTALL = "pip install --no-deps trackeval==1.3.0"


@dataclass(frozen=True, slots=True)
class Protocol:
    """What counts, and how videos are put together.

    Attributes:
        min_iou: from which two boxes may be the same person's, for IDs, MOTA and IDF1. HOTA has
            its own 19 thresholds.
        annotated_frames_only: frames without a true box do not count.
        mean_of_videos: HOTA, DetA and AssA of all videos are unweighted means of those of videos
            with people.
    """

    min_iou: float
    annotated_frames_only: bool
    mean_of_videos: bool


PROTOCOLS = {
    "phalp": Protocol(0.01, annotated_frames_only=True, mean_of_videos=True),
    "iou50": Protocol(0.5, annotated_frames_only=False, mean_of_videos=False),
}


@dataclass(frozen=True, slots=True)
class TrackingScores:
    """Scores of one video or of all; shares are in [0, 1], MOTA may be negative.

    Attributes:
        hota, det_a, ass_a: means over HOTA's thresholds 0.05 to 0.95; 0 where nobody is there.
        mota, idf1: see the sources; 0 of a video where nobody is there.
        id_switches: `IDs` of the published tables.
        misses, false_positives, matches: boxes, at the protocol's IoU.
        num_truth_boxes, num_predicted_boxes, num_truth_tracks: that count in the protocol.
    """

    hota: float
    det_a: float
    ass_a: float
    mota: float
    idf1: float
    id_switches: int
    misses: int
    false_positives: int
    matches: int
    num_truth_boxes: int
    num_predicted_boxes: int
    num_truth_tracks: int

    def to_dict(self) -> dict[str, float | int]:
        """Names and numbers, for JSON."""
        return asdict(self)


def tracking_scores(
    videos: Mapping[str, tuple[Boxes, Boxes]], protocol: str
) -> tuple[dict[str, TrackingScores], TrackingScores]:
    """Scores of each video and of all.

    Args:
        videos: per name the truth and the prediction; a video that was not tracked has
            `Boxes.empty()`.
        protocol: key of `PROTOCOLS`.

    Raises:
        ConfigError: TrackEval is not installed.
        SchemaError: an identity stands twice in one frame.
        ValueError: unknown protocol, or no video.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {list(PROTOCOLS)}, got {protocol!r}")
    if not videos:
        raise ValueError("expected at least one video")
    wanted = PROTOCOLS[protocol]
    metrics = _metrics(wanted.min_iou)
    data = {name: _trackeval_data(name, *pair, wanted) for name, pair in videos.items()}
    # TrackEval divides by numbers of boxes of a frame, and knows that they may be 0.
    results = {
        kind: {name: metric.eval_sequence(sequence) for name, sequence in data.items()}
        for kind, metric in metrics.items()
    }
    scores = {
        name: _scores({kind: results[kind][name] for kind in metrics}, [data[name]])
        for name in videos
    }
    combined = {kind: metrics[kind].combine_sequences(results[kind]) for kind in metrics}
    overall = _scores(combined, list(data.values()))
    if wanted.mean_of_videos:
        # A video without an annotated frame has none that counts.
        counting = [one for one in scores.values() if one.num_truth_boxes]
        means = {
            field: float(np.mean([getattr(one, field) for one in counting])) if counting else 0.0
            for field in ("hota", "det_a", "ass_a")
        }
        overall = TrackingScores(**{**overall.to_dict(), **means})  # type: ignore[arg-type]
    return scores, overall


@cache
def _library() -> Any:
    # With optional parts missing the import prints a line on standard output, where `--json`
    # prints its object.
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import trackeval.metrics
    except ImportError as error:
        raise ConfigError(
            f"tracking is scored by TrackEval, which cannot be imported ({error}): {INSTALL} "
            "(without its dependencies: opencv-python among them would overwrite "
            "opencv-python-headless)"
        ) from error
    return trackeval.metrics


def _metrics(min_iou: float) -> dict[str, Any]:
    library = _library()
    settings = {"THRESHOLD": min_iou, "PRINT_CONFIG": False}
    return {
        "hota": library.HOTA(),
        "clear": library.CLEAR(dict(settings)),
        "identity": library.Identity(dict(settings)),
    }


def _trackeval_data(
    name: str, truth: Boxes, predicted: Boxes, protocol: Protocol
) -> dict[str, Any]:
    """A video as TrackEval's metrics take it: identities from 0 without gaps, IoU per frame."""
    for what, boxes in (("truth", truth), ("prediction", predicted)):
        keys = np.stack((boxes.frame_index, boxes.track_id), axis=1)
        unique, count = np.unique(keys, axis=0, return_counts=True)
        if (count > 1).any():
            frame, track = unique[count > 1][0].tolist()
            raise SchemaError(
                f"video {name}, frame {frame}: expected track {track} once, the {what} has it "
                f"{count.max()} times"
            )
    if protocol.annotated_frames_only:
        predicted = predicted.take(np.isin(predicted.frame_index, truth.frame_index))
    truth_ids, truth_rank = np.unique(truth.track_id, return_inverse=True)
    found_ids, found_rank = np.unique(predicted.track_id, return_inverse=True)
    there, found, similarity = [], [], []
    for truth_rows, found_rows in by_frame(truth.frame_index, predicted.frame_index):
        there.append(truth_rank[truth_rows])
        found.append(found_rank[found_rows])
        similarity.append(
            box_iou(truth.bbox_xyxy_px[truth_rows], predicted.bbox_xyxy_px[found_rows])
        )
    return {
        "num_timesteps": len(there),
        "num_gt_dets": len(truth),
        "num_tracker_dets": len(predicted),
        "num_gt_ids": len(truth_ids),
        "num_tracker_ids": len(found_ids),
        "gt_ids": there,
        "tracker_ids": found,
        "similarity_scores": similarity,
    }


def _scores(result: Mapping[str, Any], data: list[dict[str, Any]]) -> TrackingScores:
    hota, clear, identity = result["hota"], result["clear"], result["identity"]
    return TrackingScores(
        hota=float(np.mean(hota["HOTA"])),
        det_a=float(np.mean(hota["DetA"])),
        ass_a=float(np.mean(hota["AssA"])),
        mota=float(clear["MOTA"]),
        idf1=float(identity["IDF1"]),
        id_switches=int(clear["IDSW"]),
        misses=int(clear["CLR_FN"]),
        false_positives=int(clear["CLR_FP"]),
        matches=int(clear["CLR_TP"]),
        num_truth_boxes=sum(one["num_gt_dets"] for one in data),
        num_predicted_boxes=sum(one["num_tracker_dets"] for one in data),
        num_truth_tracks=sum(one["num_gt_ids"] for one in data),
    )

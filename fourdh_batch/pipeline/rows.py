"""From tracker decisions to table rows, in frame order, with bounded memory.

A row can only be written when nothing later can change it. A detection of a tentative track waits
until the track is confirmed or dies (a few frames); the predicted row of a missed frame waits
until the track is seen again or is given up (at most `max_age` frames). So a few chunks are held
back, whatever the length of the video, and chunks leave in order.

Dimension letters: `T` frames of a chunk, `N` its detections, `M` its people.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.geometry import full_image_camera, full_image_focal, project_full_image
from fourdh_batch.pipeline.records import ChunkResult, ModelCard
from fourdh_batch.tables.schema import make_table
from fourdh_batch.tracking.track import DetectionRefs
from fourdh_batch.tracking.tracker import TrackedFrame
from fourdh_batch.types import F32, I64, People

Keypoints = Callable[[F32, F32, F32], F32]
"""(global_orient, body_pose, betas) of M people -> (M, 44, 3) metres in the model frame."""

_PENDING, _TRACKED, _UNCONFIRMED, _INVALID = range(4)
_REASON_OF_FATE = np.array(["", "", "unconfirmed", "invalid_pose"])
_OPEN, _KEEP, _DROP = range(3)


@dataclass(frozen=True, slots=True)
class Rows:
    """Arrow tables of one chunk: every frame in them is final."""

    tracks: Any
    detections: Any


@dataclass(slots=True, eq=False)
class _Ghosts:
    """The unseen tracks of one frame; each is kept if its track is seen again."""

    frame_row: int
    tracked: TrackedFrame
    rows: I64  # rows of `tracked`
    fate: NDArray[np.int8] = field(init=False)

    def __post_init__(self) -> None:
        self.fate = np.full(len(self.rows), _OPEN, dtype=np.int8)

    @property
    def track_id(self) -> I64:
        return self.tracked.track_id[self.rows]


@dataclass(slots=True, eq=False)
class _HeldChunk:
    result: ChunkResult
    shot_id: I64  # (T,)
    first_person: I64  # (T + 1,) offsets of each frame's people
    fate: I64  # (M,)
    track_id: I64  # (M,)
    hits: I64  # (M,)
    ghosts: list[_Ghosts] = field(default_factory=list)
    num_frames_tracked: int = 0

    @property
    def is_settled(self) -> bool:
        return (
            self.num_frames_tracked == len(self.result.frame_index)
            and bool(np.all(self.fate != _PENDING))
            and all(bool(np.all(ghosts.fate != _OPEN)) for ghosts in self.ghosts)
        )


class RowBuilder:
    """Turns one video's tracked frames into rows.

    Args:
        dataset, video_id: as in the tables.
        card: the models, for the columns that name them.
        keypoints: the body model, for people that were predicted rather than seen.
        keep_predicted: write rows for frames in which a track was missed and later seen again.
            Frames after a track's last detection never get rows: nothing says the person was
            still there.
    """

    def __init__(
        self,
        *,
        dataset: str,
        video_id: str,
        card: ModelCard,
        keypoints: Keypoints,
        keep_predicted: bool = True,
    ) -> None:
        self._names = {"dataset": dataset, "video_id": video_id}
        self._card = card
        self._keypoints = keypoints
        self._keep_predicted = keep_predicted
        self._held: deque[_HeldChunk] = deque()
        self._chunk_of_frame: dict[int, _HeldChunk] = {}
        self._open_ghosts: list[_Ghosts] = []
        self.track_len: Counter[int] = Counter()
        self.num_detections = 0

    def hold(self, result: ChunkResult) -> None:
        """Take in a chunk; its frames are then reported one by one by `tracked`."""
        person_frame = result.detections.frame_row[result.drop_reason == ""]
        num_frames, num_people = len(result.frame_index), len(result.people)
        chunk = _HeldChunk(
            result=result,
            shot_id=np.zeros(num_frames, dtype=np.int64),
            first_person=np.searchsorted(person_frame, np.arange(num_frames + 1)),
            fate=np.full(num_people, _PENDING, dtype=np.int64),
            track_id=np.zeros(num_people, dtype=np.int64),
            hits=np.zeros(num_people, dtype=np.int64),
        )
        self._held.append(chunk)
        self._chunk_of_frame.update(dict.fromkeys(result.frame_index.tolist(), chunk))
        self.num_detections += len(result.detections)

    def people_of(self, frame_index: int) -> tuple[F32, F32, People]:
        """Boxes, scores and bodies of a held frame, as the tracker wants them."""
        chunk, start, stop = self._span(frame_index)
        result = chunk.result
        kept = np.flatnonzero(result.drop_reason == "")[start:stop]
        return (
            result.detections.bbox_xyxy_px[kept],
            result.detections.score[kept],
            result.people.take(slice(start, stop)),
        )

    def tracked(self, frame: TrackedFrame, *, shot_id: int) -> None:
        """What the tracker said of the next held frame."""
        chunk, start, _ = self._span(frame.frame_index)
        frame_row = int(np.searchsorted(chunk.result.frame_index, frame.frame_index))
        chunk.shot_id[frame_row] = shot_id
        chunk.num_frames_tracked += 1
        chunk.fate[start + frame.invalid_row] = _INVALID

        seen = np.flatnonzero(frame.detection_row >= 0)
        people = start + frame.detection_row[seen]
        chunk.fate[people] = _TRACKED
        chunk.track_id[people] = frame.track_id[seen]
        chunk.hits[people] = frame.hits[seen]

        hits_now = dict(zip(frame.track_id.tolist(), frame.hits.tolist(), strict=True))
        for held, person, track_id in self._resolve(frame.backfill):  # newest first per track
            hits_now[track_id] -= 1
            held.fate[person] = _TRACKED
            held.track_id[person] = track_id
            held.hits[person] = hits_now[track_id]
        self._discard(frame.discarded)

        if self._open_ghosts:
            self._settle_ghosts(seen_id=frame.track_id[seen], live_id=frame.track_id)
        ghost = np.flatnonzero(frame.detection_row < 0)
        if self._keep_predicted and len(ghost):
            ghosts = _Ghosts(frame_row, frame, ghost)
            chunk.ghosts.append(ghosts)
            self._open_ghosts.append(ghosts)

    def finish(self, tail: DetectionRefs) -> None:
        """The video has ended; nothing is open any more."""
        self._discard(tail)
        none = np.zeros(0, dtype=np.int64)
        self._settle_ghosts(seen_id=none, live_id=none)

    def settled(self) -> Iterator[Rows]:
        """Rows of the chunks that nothing can change any more, in frame order."""
        while self._held and self._held[0].is_settled:
            chunk = self._held.popleft()
            for frame_index in chunk.result.frame_index.tolist():
                del self._chunk_of_frame[frame_index]
            yield Rows(self._tracks_table(chunk), self._detections_table(chunk))

    @property
    def num_held(self) -> int:
        """Chunks that are not settled yet."""
        return len(self._held)

    def _span(self, frame_index: int) -> tuple[_HeldChunk, int, int]:
        chunk = self._chunk_of_frame[frame_index]
        row = int(np.searchsorted(chunk.result.frame_index, frame_index))
        return chunk, int(chunk.first_person[row]), int(chunk.first_person[row + 1])

    def _resolve(self, refs: DetectionRefs) -> Iterator[tuple[_HeldChunk, int, int]]:
        for track_id, frame_index, row in zip(
            refs.track_id.tolist(),
            refs.frame_index.tolist(),
            refs.detection_row.tolist(),
            strict=True,
        ):
            chunk, start, _ = self._span(frame_index)
            yield chunk, start + row, track_id

    def _discard(self, refs: DetectionRefs) -> None:
        for chunk, person, _ in self._resolve(refs):
            chunk.fate[person] = _UNCONFIRMED

    def _settle_ghosts(self, *, seen_id: I64, live_id: I64) -> None:
        """Keep the ghosts of tracks seen again, drop those of tracks that were given up."""
        for ghosts in self._open_ghosts:
            is_open = ghosts.fate == _OPEN
            ghosts.fate[is_open & np.isin(ghosts.track_id, seen_id)] = _KEEP
            ghosts.fate[is_open & ~np.isin(ghosts.track_id, live_id)] = _DROP
        self._open_ghosts = [g for g in self._open_ghosts if np.any(g.fate == _OPEN)]

    def _tracks_table(self, chunk: _HeldChunk) -> Any:
        result = chunk.result
        detections, people = result.detections, result.people
        kept = np.flatnonzero(result.drop_reason == "")
        rows = np.flatnonzero(chunk.fate == _TRACKED)
        detected = people.take(rows)
        frame_row = detections.frame_row[kept][rows]
        num_detected = len(rows)

        ghosts = [(g, g.rows[g.fate == _KEEP]) for g in chunk.ghosts]
        ghosts = [(g, keep) for g, keep in ghosts if len(keep)]

        def ghost_values(name: str, like: NDArray[Any]) -> NDArray[Any]:
            parts = [getattr(g.tracked, name)[keep] for g, keep in ghosts]
            return np.concatenate([like[:0], *parts]) if parts else like[:0]

        global_orient = ghost_values("global_orient", people.global_orient)
        body_pose = ghost_values("body_pose", people.body_pose)
        betas = ghost_values("betas", people.betas)
        num_predicted = len(betas)
        ghost_frame_row = np.concatenate(
            [np.zeros(0, np.int64), *(np.full(len(keep), g.frame_row) for g, keep in ghosts)]
        )
        keypoints_3d_m = np.concatenate(
            [
                detected.keypoints_3d_m,
                # One at a time: in a batch the last bit would depend on the chunk.
                *(
                    self._keypoints(
                        global_orient[k : k + 1], body_pose[k : k + 1], betas[k : k + 1]
                    )
                    for k in range(num_predicted)
                ),
            ]
        )
        cam_t_m = np.concatenate(
            [
                full_image_camera(
                    detected.pred_cam,
                    detected.box_center_px,
                    detected.box_size_px,
                    result.image_size_wh,
                ),
                # The tracker's camera looks at the frame padded to a square and scaled to 256 px;
                # with the focal length scaled back the translation is the same.
                ghost_values("camera", np.zeros((0, 3), np.float32)),
            ]
        ).astype(np.float32)
        width, height = result.image_size_wh
        focal_px = full_image_focal(result.image_size_wh)
        center_px = np.array([width / 2, height / 2], dtype=np.float32)

        def unknown(values: F32) -> F32:
            """Values of the detected rows, null for the predicted ones."""
            filler = np.full((num_predicted, *values.shape[1:]), np.nan, dtype=np.float32)
            return np.concatenate([values, filler])

        track_id = np.concatenate(
            [chunk.track_id[rows], ghost_values("track_id", np.zeros(0, np.int64))]
        )
        all_frame_rows = np.concatenate([frame_row, ghost_frame_row])
        columns: dict[str, Any] = {
            "shot_id": chunk.shot_id[all_frame_rows],
            "frame_index": result.frame_index[all_frame_rows],
            "pts_s": result.pts_s[all_frame_rows],
            "track_id": track_id,
            "frames_since_seen": np.concatenate(
                [
                    np.zeros(num_detected, np.int64),
                    ghost_values("frames_since_seen", np.zeros(0, np.int64)),
                ]
            ),
            "bbox_xyxy_px": np.concatenate(
                [
                    detections.bbox_xyxy_px[kept[rows]],
                    ghost_values("bbox_xyxy_px", np.zeros((0, 4), np.float32)),
                ]
            ),
            "score": unknown(detections.score[kept[rows]]),
            "global_orient": np.concatenate([detected.global_orient, global_orient]),
            "body_pose": np.concatenate([detected.body_pose, body_pose]),
            "betas": np.concatenate([detected.betas, betas]),
            "pred_cam": unknown(detected.pred_cam),
            "box_center_px": unknown(detected.box_center_px),
            "box_size_px": unknown(detected.box_size_px),
            "cam_t_m": cam_t_m,
            "keypoints_3d_m": keypoints_3d_m,
            "keypoints_2d_px": project_full_image(keypoints_3d_m, cam_t_m, focal_px, center_px),
            "hits": np.concatenate([chunk.hits[rows], ghost_values("hits", np.zeros(0, np.int64))]),
        }
        order = np.lexsort((track_id, all_frame_rows))
        columns = {name: values[order] for name, values in columns.items()}
        is_detected = order < num_detected
        columns["state"] = np.where(is_detected, "detected", "predicted").tolist()
        columns["mask_source"] = [detections.mask_source if d else None for d in is_detected]
        self.track_len.update(columns["track_id"].tolist())
        return make_table(
            "tracks",
            {
                **self._names,
                **columns,
                "focal_px": np.float32(focal_px),
                "principal_point_px": center_px,
                "image_size_px": np.array([width, height]),
                "track_len": np.int64(0),  # known at the end of the video, filled when publishing
                "weights": self._card.weights_origin,
                "body_model": self._card.body,
                "model_fingerprint": self._card.fingerprint,
            },
            num_rows=len(order),
        )

    def _detections_table(self, chunk: _HeldChunk) -> Any:
        result = chunk.result
        detections = result.detections
        num = len(detections)
        kept = np.flatnonzero(result.drop_reason == "")
        reason = result.drop_reason.astype("<U16")
        reason[kept] = _REASON_OF_FATE[chunk.fate]
        track_id = np.zeros(num, dtype=np.int64)
        track_id[kept] = chunk.track_id
        first = np.searchsorted(detections.frame_row, np.arange(len(result.frame_index)))
        masks = detections.masks
        return make_table(
            "detections",
            {
                **self._names,
                "frame_index": result.frame_index[detections.frame_row],
                "pts_s": result.pts_s[detections.frame_row],
                "detection_index": np.arange(num) - first[detections.frame_row],
                "bbox_xyxy_px": detections.bbox_xyxy_px,
                "score": detections.score,
                "mask_rle": None if masks is None else [mask.counts for mask in masks],
                "mask_source": detections.mask_source,
                "drop_reason": [text or None for text in reason.tolist()],
                "track_id": [number or None for number in track_id.tolist()],
                "detector": self._card.detector,
                "model_fingerprint": self._card.fingerprint,
            },
            num_rows=num,
        )

"""From tracker decisions to table rows, in frame order, with bounded memory.

A row can only be written when nothing later can change it. A detection of a tentative track waits
until the track is confirmed or dies (a few frames); the predicted row of a missed frame waits
until the track is seen again or is given up (at most `max_age` frames) and, where a pose
predictor completes it, until the detections are known that it is told from (at most 95 frames, see
`tracking/completion.py`). So a few chunks are held back, whatever the length of the video, and
chunks leave in order.

Dimension letters: `T` frames of a chunk, `N` its detections, `M` its people, `G` ghosts: tracks
that were not seen in a frame.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.geometry import (
    full_image_camera,
    full_image_focal,
    phalp_camera,
    project_full_image,
)
from fourdh_batch.pipeline.records import ChunkResult, ModelCard
from fourdh_batch.tables.frames import FrameRuns
from fourdh_batch.tables.schema import make_table
from fourdh_batch.tracking.completion import CompletedPoses, PoseCompleter, PoseCompletion
from fourdh_batch.tracking.location import locate, moved_box
from fourdh_batch.tracking.pose import is_sound, pose_vectors, split_pose_vectors
from fourdh_batch.tracking.track import DetectionRefs
from fourdh_batch.tracking.tracker import TrackedFrame
from fourdh_batch.types import F32, I64, Bool, Detections, People, RleMask

Keypoints = Callable[[F32, F32, F32], F32]
"""(global_orient, body_pose, betas) of M people -> (M, 44, 3) metres in the model frame."""

_PENDING, _TRACKED, _UNCONFIRMED, _INVALID = range(4)
_REASON_OF_FATE = np.array(["", "", "unconfirmed", "invalid_pose"])
_OPEN, _INCOMPLETE, _KEEP, _DROP = range(4)
MAX_DEPTH_CHANGE = 4.0  # nobody comes four times nearer, or goes as far, in a gap
# What detections keep of a person; keypoints_3d_m follows from it.
_PERSON_COLUMNS = (
    "global_orient",
    "body_pose",
    "betas",
    "pred_cam",
    "box_center_px",
    "box_size_px",
)
_CHUNK_ARRAYS = ("shot_id", "is_shot_start", "fate", "track_id", "hits")


@dataclass(frozen=True, slots=True)
class Rows:
    """Arrow tables of one chunk: every frame in them is final."""

    tracks: Any
    detections: Any


@dataclass(frozen=True, slots=True, eq=False)
class _Ghosts:
    """The unseen tracks of one frame; each is kept if its track is seen again.

    Attributes:
        track_id, frames_since_seen, hits, bbox_xyxy_px, camera, global_orient, body_pose, betas:
            (G, ...) as in `TrackedFrame`; those of the pose and the place are overwritten where
            a pose predictor completes the frame.
        seen_box_px, seen_camera: (G, 4) and (G, 3), when the track was last seen.
        fate: (G,) open until the track is seen again or given up; incomplete until its pose is
            completed.
    """

    track_id: I64
    frames_since_seen: I64
    hits: I64
    bbox_xyxy_px: F32
    camera: F32
    global_orient: F32
    body_pose: F32
    betas: F32
    seen_box_px: F32
    seen_camera: F32
    fate: I64


@dataclass(slots=True, eq=False)
class _HeldChunk:
    result: ChunkResult
    shot_id: I64  # (T,)
    is_shot_start: Bool  # (T,)
    first_person: I64  # (T + 1,) offsets of each frame's people
    fate: I64  # (M,)
    track_id: I64  # (M,)
    hits: I64  # (M,)
    ghosts: dict[int, _Ghosts] = field(default_factory=dict)  # by row of the frame
    num_frames_tracked: int = 0

    @classmethod
    def of(cls, result: ChunkResult) -> _HeldChunk:
        """A chunk of which the tracker has seen nothing yet."""
        person_frame = result.detections.frame_row[result.drop_reason == ""]
        num_frames, num_people = len(result.frame_index), len(result.people)
        return cls(
            result=result,
            shot_id=np.zeros(num_frames, dtype=np.int64),
            is_shot_start=np.zeros(num_frames, dtype=np.bool_),
            first_person=np.searchsorted(person_frame, np.arange(num_frames + 1)),
            fate=np.full(num_people, _PENDING, dtype=np.int64),
            track_id=np.zeros(num_people, dtype=np.int64),
            hits=np.zeros(num_people, dtype=np.int64),
        )

    @property
    def is_settled(self) -> bool:
        return (
            self.num_frames_tracked == len(self.result.frame_index)
            and bool(np.all(self.fate != _PENDING))
            and all(bool(np.all(ghosts.fate >= _KEEP)) for ghosts in self.ghosts.values())
        )

    def pose_vectors(self, people: I64) -> F32:
        """(R, 229) pose vectors of the people at these rows."""
        chosen = self.result.people.take(people)
        camera = phalp_camera(
            chosen.pred_cam, chosen.box_center_px, chosen.box_size_px, self.result.image_size_wh
        )
        return pose_vectors(chosen, camera)


class RowBuilder:
    """Turns one video's tracked frames into rows.

    Args:
        dataset, video_id: as in the tables.
        card: the models, for the columns that name them.
        keypoints: the body model, for people that were predicted rather than seen.
        completer: completes the poses of missed frames from the detections before and after them;
            None: they get what the tracker expected at the time. So does a row whose completion
            is no body in front of the camera.
        keep_predicted: write rows for frames in which a track was missed and later seen again.
            Frames after a track's last detection never get rows: nothing says the person was
            still there (docs/PHALP.md, section 15, Q18). Nor do gaps with a cut in them.
        keep_reconstructions: keep what the tracker is fed with in `detections`, for tracking
            again without looking at the video.
    """

    def __init__(
        self,
        *,
        dataset: str,
        video_id: str,
        card: ModelCard,
        keypoints: Keypoints,
        completer: PoseCompleter | None = None,
        keep_predicted: bool = True,
        keep_reconstructions: bool = False,
    ) -> None:
        self._names = {"dataset": dataset, "video_id": video_id}
        self._card = card
        self._keypoints = keypoints
        self._keep_predicted = keep_predicted
        self._completion = PoseCompletion(completer) if completer and keep_predicted else None
        self._frames = FrameRuns() if keep_reconstructions else None
        self._held: deque[_HeldChunk] = deque()
        self._chunk_of_frame: dict[int, _HeldChunk] = {}
        self._open_ghosts: list[_Ghosts] = []
        self._last_seen: dict[int, F32] = {}  # track: box (4) and camera (3)
        self._last_shot_id = -1
        self._shot_start = 0  # first frame of the present shot
        self.track_len: Counter[int] = Counter()
        self.num_detections = 0

    def hold(self, result: ChunkResult) -> None:
        """Take in a chunk; its frames are then reported one by one by `tracked`.

        Texture maps are not kept.
        """
        self._hold(_HeldChunk.of(replace(result, texture=None)))
        self.num_detections += len(result.detections)

    def _hold(self, chunk: _HeldChunk) -> None:
        self._held.append(chunk)
        self._chunk_of_frame.update(dict.fromkeys(chunk.result.frame_index.tolist(), chunk))

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
        chunk.is_shot_start[frame_row] = 0 <= self._last_shot_id < shot_id
        self._last_shot_id = shot_id
        if chunk.is_shot_start[frame_row]:
            self._shot_start = frame.frame_index
            self._drop_open_ghosts()
        chunk.num_frames_tracked += 1
        chunk.fate[start + frame.invalid_row] = _INVALID
        if self._frames is not None:
            pts_s = float(chunk.result.pts_s[frame_row])
            self._frames.add(frame.frame_index, pts_s, shot_id, chunk.result.image_size_wh)

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
        last_seen = frame.frame_index - frame.frames_since_seen
        ghost = np.flatnonzero((frame.detection_row < 0) & (last_seen >= self._shot_start))
        if self._keep_predicted and len(ghost):
            chunk.ghosts[frame_row] = ghosts = self._ghosts(frame, ghost)
            self._open_ghosts.append(ghosts)
        if self._completion is not None:
            self._complete_until(self._completion, frame, seen, chunk.pose_vectors(people))

    def finish(self, tail: DetectionRefs) -> None:
        """The video has ended; nothing is open any more."""
        self._discard(tail)
        none = np.zeros(0, dtype=np.int64)
        self._settle_ghosts(seen_id=none, live_id=none)
        if self._completion is not None:
            for completed in self._completion.finish():
                self._fill_in(completed)

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

    def _drop_open_ghosts(self) -> None:
        """A cut: whoever is missed now is not expected in a picture from elsewhere."""
        for ghosts in self._open_ghosts:
            ghosts.fate[ghosts.fate == _OPEN] = _DROP
        self._open_ghosts = []

    def _settle_ghosts(self, *, seen_id: I64, live_id: I64) -> None:
        """Keep the ghosts of tracks seen again, drop those of tracks that were given up."""
        for ghosts in self._open_ghosts:
            is_open = ghosts.fate == _OPEN
            ghosts.fate[is_open & np.isin(ghosts.track_id, seen_id)] = (
                _KEEP if self._completion is None else _INCOMPLETE
            )
            ghosts.fate[is_open & ~np.isin(ghosts.track_id, live_id)] = _DROP
        self._open_ghosts = [g for g in self._open_ghosts if np.any(g.fate == _OPEN)]

    def _ghosts(self, frame: TrackedFrame, rows: I64) -> _Ghosts:
        track_id = frame.track_id[rows]
        box, camera = frame.bbox_xyxy_px[rows], frame.camera[rows]
        seen = np.concatenate([box, camera], 1)
        for row, number in enumerate(track_id.tolist()):
            seen[row] = self._last_seen.get(number, seen[row])
        return _Ghosts(
            track_id=track_id,
            frames_since_seen=frame.frames_since_seen[rows],
            hits=frame.hits[rows],
            bbox_xyxy_px=box,
            camera=camera,
            global_orient=frame.global_orient[rows],
            body_pose=frame.body_pose[rows],
            betas=frame.betas[rows],
            seen_box_px=seen[:, :4],
            seen_camera=seen[:, 4:],
            fate=np.full(len(rows), _OPEN, dtype=np.int64),
        )

    def _complete_until(
        self, completion: PoseCompletion, frame: TrackedFrame, seen: I64, pose: F32
    ) -> None:
        """Tell the completion of a frame, and take what is complete now.

        Args:
            completion: of this video.
            frame: the frame.
            seen: (R,) rows of the tracks that were seen.
            pose: (R, 229) their pose vectors.
        """
        past = list(self._resolve(frame.backfill))
        frames = frame.backfill.frame_index.tolist()
        for k in np.argsort(frame.backfill.frame_index, kind="stable").tolist():
            held, person, track_id = past[k]
            one = held.pose_vectors(np.array([person]))
            completion.see(frames[k], np.array([track_id]), one)
        completion.see(frame.frame_index, frame.track_id[seen], pose)
        completion.miss(frame.frame_index, frame.track_id[frame.detection_row < 0])
        for completed in completion.settle(frame.frame_index, frame.track_id):
            self._fill_in(completed)

        place = np.concatenate([frame.bbox_xyxy_px, frame.camera], 1)
        before = self._last_seen
        self._last_seen = {
            number: place[row] if detection >= 0 else before[number]
            for row, (number, detection) in enumerate(
                zip(frame.track_id.tolist(), frame.detection_row.tolist(), strict=True)
            )
        }

    def _fill_in(self, completed: CompletedPoses) -> None:
        """Overwrite what was expected of missed frames, where the completion is a body.

        Of a gap with a cut in it no row is wanted, and its chunks may have gone.
        """
        sound = is_sound(completed.pose)
        *body, camera = split_pose_vectors(completed.pose)
        for k, frame_index in enumerate(completed.frame_index.tolist()):
            chunk = self._chunk_of_frame.get(frame_index)
            if chunk is None:
                continue
            frame_row = int(np.searchsorted(chunk.result.frame_index, frame_index))
            ghosts = chunk.ghosts.get(frame_row)
            if ghosts is None:
                continue
            row = int(np.argmax(ghosts.track_id == completed.track_id))
            if ghosts.track_id[row] != completed.track_id or ghosts.fate[row] != _INCOMPLETE:
                continue
            ghosts.fate[row] = _KEEP
            nearer = ghosts.seen_camera[row, 2] / max(float(camera[k, 2]), 1.0)
            if not sound[k] or not 1 / MAX_DEPTH_CHANGE < nearer < MAX_DEPTH_CHANGE:
                continue
            ghosts.global_orient[row], ghosts.body_pose[row], ghosts.betas[row] = (
                part[k] for part in body
            )
            ghosts.camera[row] = camera[k]
            ghosts.bbox_xyxy_px[row] = moved_box(
                ghosts.seen_box_px[row : row + 1],
                locate(ghosts.seen_camera[row : row + 1]),
                locate(camera[k : k + 1]),
                chunk.result.image_size_wh,
            )[0]

    @property
    def frame_runs(self) -> str | None:
        """All frames so far for `videos.frame_runs`; None unless reconstructions are kept."""
        return None if self._frames is None else self._frames.to_json()

    def state(self) -> dict[str, Any]:
        """Everything remembered: nested dicts and lists of plain arrays, numbers, text and bytes.

        Only between frames, after `settled` has been emptied or not.
        """
        return {
            "held": [_chunk_state(chunk) for chunk in self._held],
            "completion": None if self._completion is None else self._completion.state(),
            "last_seen_id": np.array(list(self._last_seen), np.int64),
            "last_seen": np.array(list(self._last_seen.values()), np.float32).reshape(-1, 7),
            "last_shot_id": self._last_shot_id,
            "shot_start": self._shot_start,
            "track_len": np.array(list(self.track_len.items()), np.int64).reshape(-1, 2),
            "num_detections": self.num_detections,
            "frame_runs": self.frame_runs,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, in a builder of the same settings.

        Raises:
            ValueError: the settings differ.
        """
        for name, mine in (("completion", self._completion), ("frame_runs", self._frames)):
            if (state[name] is None) != (mine is None):
                raise ValueError(f"rows: {name}: the state was saved under other settings")
        self._held.clear()
        self._chunk_of_frame.clear()
        for saved in state["held"]:
            self._hold(_chunk_of_state(saved))
        ghosts = [g for chunk in self._held for g in chunk.ghosts.values()]
        self._open_ghosts = [g for g in ghosts if np.any(g.fate == _OPEN)]
        if self._completion is not None:
            self._completion.restore(state["completion"])
        self._last_seen = dict(zip(state["last_seen_id"].tolist(), state["last_seen"], strict=True))
        self._last_shot_id = state["last_shot_id"]
        self._shot_start = state["shot_start"]
        self.track_len = Counter(dict(state["track_len"].tolist()))
        self.num_detections = state["num_detections"]
        if self._frames is not None:
            self._frames = FrameRuns.from_json(state["frame_runs"])

    def _tracks_table(self, chunk: _HeldChunk) -> Any:
        result = chunk.result
        detections, people = result.detections, result.people
        kept = np.flatnonzero(result.drop_reason == "")
        rows = np.flatnonzero(chunk.fate == _TRACKED)
        detected = people.take(rows)
        frame_row = detections.frame_row[kept][rows]
        num_detected = len(rows)

        ghosts = [(row, g, g.fate == _KEEP) for row, g in chunk.ghosts.items()]

        def ghost_values(name: str, like: NDArray[Any]) -> NDArray[Any]:
            parts = [getattr(g, name)[keep] for _, g, keep in ghosts]
            return np.concatenate([like[:0], *parts])

        global_orient = ghost_values("global_orient", people.global_orient)
        body_pose = ghost_values("body_pose", people.body_pose)
        betas = ghost_values("betas", people.betas)
        num_predicted = len(betas)
        ghost_frame_row = np.concatenate(
            [np.zeros(0, np.int64), *(np.full(int(keep.sum()), row) for row, _, keep in ghosts)]
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
                **({} if self._frames is None else _reconstructions(chunk, kept)),
            },
            num_rows=num,
        )


def _reconstructions(chunk: _HeldChunk, kept: I64) -> dict[str, Any]:
    """Columns of `detections` from which people can be tracked again.

    A body that is not finite is left out as a whole: the tracker refuses it anyway. Looks may be
    missing (NaN) where nothing is seen of a sound body.
    """
    result, people = chunk.result, chunk.result.people
    values: dict[str, NDArray[Any]] = {name: getattr(people, name) for name in _PERSON_COLUMNS}
    finite = np.ones(len(people), dtype=np.bool_)
    for array in values.values():
        finite &= np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    if result.appearance is not None:
        values["appearance"] = result.appearance
    columns: dict[str, Any] = {}
    for name, array in values.items():
        columns[name] = np.full((len(result.detections), *array.shape[1:]), np.nan, np.float32)
        columns[name][kept[finite]] = array[finite]
    frame_row = result.detections.frame_row
    return columns | {
        "image_size_px": np.array(result.image_size_wh),
        "shot_id": chunk.shot_id[frame_row],
        "is_shot_start": chunk.is_shot_start[frame_row],
    }


# --- the state of a video in the middle ---------------------------------------------------------


def _chunk_state(chunk: _HeldChunk) -> dict[str, Any]:
    result, detections = chunk.result, chunk.result.detections
    masks = detections.masks
    counts = [] if masks is None else [mask.counts for mask in masks]
    ghosts = list(chunk.ghosts.values())
    return {
        "video_id": result.video_id,
        "frame_index": result.frame_index,
        "pts_s": result.pts_s,
        "shot_scores": result.shot_scores,
        "image_size_wh": list(result.image_size_wh),
        "drop_reason": result.drop_reason.tolist(),
        "appearance": result.appearance,
        "people": {f.name: getattr(result.people, f.name) for f in fields(People)},
        "detections": {
            "frame_row": detections.frame_row,
            "bbox_xyxy_px": detections.bbox_xyxy_px,
            "score": detections.score,
            "mask_source": detections.mask_source,
            "mask_size_hw": np.array(
                [mask.size_hw for mask in masks or ()], dtype=np.int64
            ).reshape(-1, 2),
            "mask_length": np.array([len(text) for text in counts], dtype=np.int64),
            "mask_counts": b"".join(counts),
        },
        **{name: getattr(chunk, name).copy() for name in _CHUNK_ARRAYS},
        "num_frames_tracked": chunk.num_frames_tracked,
        "ghost_frame_row": np.repeat(
            np.array(list(chunk.ghosts), np.int64), [len(g.fate) for g in ghosts]
        ),
        "ghosts": {
            f.name: np.concatenate([getattr(g, f.name) for g in ghosts]) for f in fields(_Ghosts)
        }
        if ghosts
        else None,
    }


def _chunk_of_state(state: Mapping[str, Any]) -> _HeldChunk:
    saved = dict(state["detections"])
    size_hw, length = saved.pop("mask_size_hw").tolist(), saved.pop("mask_length")
    text, stop = saved.pop("mask_counts"), np.cumsum(length).tolist()
    masks = [
        RleMask((height, width), text[end - num : end])
        for (height, width), num, end in zip(size_hw, length.tolist(), stop, strict=True)
    ]
    width, height = state["image_size_wh"]
    chunk = _HeldChunk.of(
        ChunkResult(
            video_id=state["video_id"],
            frame_index=state["frame_index"],
            pts_s=state["pts_s"],
            shot_scores=state["shot_scores"],
            image_size_wh=(width, height),
            detections=Detections(
                **saved, masks=masks if saved["mask_source"] == "detector" else None
            ),
            drop_reason=np.array(state["drop_reason"], dtype=np.str_),
            people=People(**state["people"]),
            appearance=state["appearance"],
        )
    )
    for name in _CHUNK_ARRAYS:
        setattr(chunk, name, state[name].copy())
    chunk.num_frames_tracked = state["num_frames_tracked"]
    frame_row = state["ghost_frame_row"]
    for row in np.unique(frame_row).tolist():
        chunk.ghosts[row] = _Ghosts(
            **{name: values[frame_row == row] for name, values in state["ghosts"].items()}
        )
    return chunk

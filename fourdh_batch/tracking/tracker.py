"""PHALP': one person, one identity, through a whole video, frame by frame.

`PhalpTracker` follows people by where they are (location and depth), by their pose and, where it
is handed a `TextureTerm`, by how they look. Nothing here knows of files.

It follows docs/PHALP.md, except where that advises to mend the reference
(section 15): every pose is predicted for its own time (Q1), detections without a usable camera or
with broken numbers never enter the association (Q5), a pair without a cost is refused (Q6),
distances are taken directly (Q10), no track is confirmed before its detections allow it (Q15), the
place and pose expected of a person who is out of sight are given instead of stale ones (Q16), and
tracks born in the same frame are numbered by detection (Q28). `TrackerSettings.compat` takes Q1
and Q28 back, which is what equal numbers need. Identities have gaps, as tentative tracks use them
up (Q13).

Dimension letters: `K` tracks, `M` detections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.geometry import phalp_camera
from fourdh_batch.tracking.assign import Assignment, assign
from fourdh_batch.tracking.cost import (
    box_factor,
    cost_terms,
    cost_without_texture,
    texture_factor,
)
from fourdh_batch.tracking.location import (
    HISTORY_LENGTH,
    PredictedLocation,
    camera_of,
    copied_location,
    locate,
    moved_box,
    predict_location,
)
from fourdh_batch.tracking.pose import MAX_MAGNITUDE, pose_vectors, split_pose_vectors
from fourdh_batch.tracking.track import DetectionRefs, Tracks
from fourdh_batch.types import (
    F32,
    F64,
    I64,
    Bool,
    FrameDetections,
)

MAX_BOX_WEIGHT = 20.0  # beyond it the costs of overlapping pairs drown in the solver's rounding
TEXTURE_STATE = "texture."  # prefix of what the texture term remembers, in a tracker's state


@dataclass(frozen=True, slots=True)
class TrackerSettings:
    """Constants of the tracker; the defaults are those of 4D-Humans (section 1).

    Attributes:
        gate: a pair that costs more is never a match (hungarian_th, sections 8 and 9).
        n_init: detections in a row that confirm a track, at most `HISTORY_LENGTH` (section 10).
        max_age: frames that a confirmed track survives unseen; it can be matched in the frame
            after them (max_age_track, section 10).
        box_weight: see `cost.box_factor`; 0 leaves boxes out, as the reference does.
        log_cost: the assignment whose costs have the smallest product instead of the smallest sum,
            as the reference has it; a track without a match counts as the gate in both. A cost is
            a product of cues: in a sum one pair that hardly fits outweighs all that fit well, and
            they are torn apart to make it possible.
        compat: read predicted poses at the times at which the reference does, and number tracks
            born in the same frame as it does (section 15, Q1, Q2, Q28).
    """

    gate: float = 100.0
    n_init: int = 5
    max_age: int = 50
    box_weight: float = 0.0
    log_cost: bool = False
    compat: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.n_init <= HISTORY_LENGTH:
            raise ValueError(f"n_init: expected 1 to {HISTORY_LENGTH}, got {self.n_init}")
        if self.max_age < 0:
            raise ValueError(f"max_age: expected 0 or more frames, got {self.max_age}")
        if not 1 <= self.gate < np.inf:
            raise ValueError(f"gate: expected a finite number of at least 1, got {self.gate}")
        if not 0 <= self.box_weight <= MAX_BOX_WEIGHT:
            raise ValueError(f"box_weight: expected 0 to {MAX_BOX_WEIGHT:g}, got {self.box_weight}")
        if self.compat and self.box_weight:
            raise ValueError("box_weight: the reference knows no boxes; expected 0 with compat")
        if self.compat and self.log_cost:
            raise ValueError("log_cost: the reference adds costs; expected false with compat")


class PosePredictor(Protocol):
    """Tells the pose of tracks at a later frame from the poses they had."""

    def __call__(self, pose: F32, frame_index: I64, slot: I64) -> F32:
        """Predict K tracks at once.

        Args:
            pose: (K, HISTORY_LENGTH, 229) remembered pose vectors, oldest first.
            frame_index: (K, HISTORY_LENGTH) their frames.
            slot: (K,) frame to predict, counted from the first remembered one (frame_index[:, 0]);
                may lie beyond what the predictor can express, which then takes its last slot.

        Returns:
            (K, 229) pose vectors.
        """


class TextureTerm(Protocol):
    """Keeps how the tracks of a video look and compares that with detections."""

    def distances(self, frame: FrameDetections, track_id: I64, detection_row: I64) -> F64:
        """(P,) texture distances, 0 or more, of the pairs (track_id[i], detection_row[i])."""

    def bounds(self, frame: FrameDetections, track_id: I64, detection_row: I64) -> F64:
        """(P,) numbers that are taken to be above the distances; best where they cost less."""

    def observe(self, frame: FrameDetections, track_id: I64, live_track_id: I64) -> None:
        """Learn from a frame that has been associated.

        Args:
            frame: the frame.
            track_id: (M,) track of each detection, old or new; -1 for a refused detection.
            live_track_id: tracks that are still followed; the others never come back.
        """

    def reset(self) -> None:
        """Forget all tracks."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything remembered, as plain arrays."""

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave."""


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What is expected of all live tracks at a frame.

    Attributes:
        track_id: (K,) tracks, in the order of their birth.
        location: their locations.
        pose: (K, 229) their pose vectors.
    """

    track_id: I64
    location: PredictedLocation
    pose: F32

    def take(self, rows: NDArray[Any]) -> Prediction:
        """The predictions at these rows."""
        return Prediction(self.track_id[rows], self.location.take(rows), self.pose[rows])


@dataclass(frozen=True, slots=True, eq=False)
class TrackedFrame:
    """Everything that the tracker has to say about one frame.

    The first K arrays hold all confirmed tracks in the order of their birth, whether they were
    seen in this frame or not. Of a track that was seen they give its detection, of one that was
    not (a *ghost*) what the tracker expects.

    Attributes:
        frame_index: the frame.
        track_id: (K,) identities, from 1.
        detection_row: (K,) row of the detection in this frame's input; -1 for a ghost.
        frames_since_seen: (K,) 0 where seen now.
        hits: (K,) detections so far.
        age: (K,) frames since the first detection, both included.
        bbox_xyxy_px: (K, 4) the detection's box; for a ghost its last box, moved and scaled by
            the predicted camera.
        camera: (K, 3) (tx, ty, tz) in the virtual 256 camera.
        global_orient: (K, 1, 3, 3).
        body_pose: (K, 23, 3, 3).
        betas: (K, 10).
        backfill: earlier detections of tracks that were confirmed by this frame, newest first.
        discarded: earlier detections of tracks that ended without ever being confirmed.
        detection_track_id: (M,) track of every detection, confirmed or still tentative; -1 for a
            detection that was refused because its numbers are unusable.
    """

    frame_index: int
    track_id: I64
    detection_row: I64
    frames_since_seen: I64
    hits: I64
    age: I64
    bbox_xyxy_px: F32
    camera: F32
    global_orient: F32
    body_pose: F32
    betas: F32
    backfill: DetectionRefs
    discarded: DetectionRefs
    detection_track_id: I64

    @property
    def invalid_row(self) -> I64:
        """Rows of the detections that were refused."""
        return np.flatnonzero(self.detection_track_id == -1)


class PhalpTracker:
    """Follows the people of one video at a time.

    Frames may be missing, for example where a file is damaged. Ages, predictions and `max_age`
    count frames all the same; but nobody looked into a lost frame, so a tentative track is not
    ended by it.

    Args:
        settings: see `TrackerSettings`.
        pose_predictor: None: a pose stays as it was last seen.
        texture: None: looks do not count.
    """

    def __init__(
        self,
        settings: TrackerSettings | None = None,
        *,
        pose_predictor: PosePredictor | None = None,
        texture: TextureTerm | None = None,
    ) -> None:
        self.settings = settings or TrackerSettings()
        self._pose_predictor = pose_predictor
        self._texture = texture
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next frame may be any frame of any video."""
        self._tracks = Tracks.none()
        self._next_id = 1
        self._last_frame: int | None = None
        self._unseen_slot = 0
        self._shot_start = 0  # first frame of the present shot
        if self._texture is not None:
            self._texture.reset()

    def finish(self) -> DetectionRefs:
        """End the video.

        Returns:
            The detections of tracks that are still tentative and now never will be confirmed.
        """
        tentative = np.flatnonzero(self._tracks.hits < self.settings.n_init)
        tail = self._tracks.past_detections(tentative)
        self.reset()
        return tail

    def predict(self, frame_index: int) -> Prediction:
        """What is expected of the live tracks at a frame after the last one; changes nothing."""
        tracks, moving = self._tracks, self._moving()
        if self._pose_predictor is None or not len(moving):
            return self._expect(frame_index, tracks.pose[moving, -1])
        return self._expect(frame_index, self._pose_predictor(*self._question(frame_index, moving)))

    def update(self, frame: FrameDetections) -> TrackedFrame:
        """Associate one frame.

        Raises:
            ValueError: the frame does not come after the one before.
        """
        return update_together([self], [frame])[0]

    def _begin(self, frame_index: int) -> DetectionRefs:
        """A new frame has come; gives back the detections of tentative tracks that end here."""
        if self._last_frame is not None and frame_index <= self._last_frame:
            raise ValueError(f"frame {frame_index}: expected a frame after {self._last_frame}")
        # Only lost frames make a track older than this before it had its last chance.
        return self._drop(frame_index - self._tracks.last_seen > self.settings.max_age + 1)

    def _moving(self) -> I64:
        """Rows of the tracks of which more than a single detection is known."""
        return np.flatnonzero(self._tracks.hits > 1)

    def _question(self, frame_index: int, moving: I64) -> tuple[F32, I64, I64]:
        """What the pose predictor is asked for the tracks at these rows (section 5.5)."""
        tracks = self._tracks
        history = tracks.frame_index[moving]
        slot = frame_index - history[:, 0]
        if self.settings.compat and len(moving):
            # The reference reads all tracks seen in the last frame at the slot of the first of
            # them, and all others at that of the first unseen one.
            is_seen = tracks.last_seen[moving] == self._last_frame
            first = int(np.argmax(is_seen))
            slot = np.where(is_seen, history[first, -1] - history[first, 0] + 1, self._unseen_slot)
        return tracks.pose[moving], history, slot

    def _expect(self, frame_index: int, predicted_pose: F32) -> Prediction:
        """Locations and poses of all live tracks; the poses of those that move are given."""
        tracks = self._tracks
        location = predict_location(tracks.location, tracks.frame_index, frame_index)
        fresh = np.flatnonzero(tracks.hits == 1)
        copied = copied_location(tracks.location[fresh, -1])
        location.location[fresh] = copied.location
        location.spread[fresh] = copied.spread
        pose = tracks.pose[:, -1].copy()
        pose[self._moving()] = predicted_pose
        return Prediction(tracks.track_id, location, pose)

    def _follow(
        self, frame: FrameDetections, prediction: Prediction, discarded: DetectionRefs
    ) -> TrackedFrame:
        """Associate a frame of which `prediction` says what is expected."""
        now = self._last_frame = frame.frame_index
        if frame.is_shot_start:
            self._shot_start = now
        n_init, max_age = self.settings.n_init, self.settings.max_age

        row = np.flatnonzero(_usable(frame))
        people = frame.people.take(row)
        camera = phalp_camera(
            people.pred_cam, people.box_center_px, people.box_size_px, frame.image_size_wh
        )
        location, pose = locate(camera), pose_vectors(people, camera)
        bbox = frame.bbox_xyxy_px[row]

        tracks = self._tracks
        expected_bbox = moved_box(
            tracks.bbox_xyxy_px,
            tracks.location[:, -1],
            prediction.location.location,
            frame.image_size_wh,
        )
        match = self._associate(frame, prediction, expected_bbox, row, location, pose)
        seen, by, new = match.track, match.detection, match.unmatched_detection
        tracks.observe(
            seen, now, row[by], location[by], pose[by], bbox[by], is_shot_start=frame.is_shot_start
        )
        backfill = tracks.past_detections(seen[tracks.hits[seen] == n_init], newest=1)
        detection_track_id = np.full(len(frame.people), -1, np.int64)
        detection_track_id[row[by]] = tracks.track_id[seen]

        unseen_for = now - tracks.last_seen
        if self.settings.compat and len(seen) < len(tracks):
            # In the order in which the reference walks through them (section 15, Q2), and with
            # those that end now (Q23).
            first = next(iter(set(range(len(tracks))) - set(seen.tolist())))
            span = tracks.last_seen[first] - tracks.frame_index[first, 0]
            self._unseen_slot = int(span + unseen_for[first] + 1)
        ended = (unseen_for > 0) & ((tracks.hits < n_init) | (unseen_for > max_age))
        discarded = DetectionRefs.join([discarded, self._drop(ended)])
        prediction, expected_bbox = prediction.take(~ended), expected_bbox[~ended]

        born = np.arange(self._next_id, self._next_id + len(new))
        self._next_id += len(new)
        detection_track_id[row[new]] = born
        self._tracks = self._tracks.followed_by(
            Tracks.born(born, now, row[new], location[new], pose[new], bbox[new])
        )
        if self._texture is not None:
            self._texture.observe(frame, detection_track_id, self._tracks.track_id)
        return self._report(
            frame, prediction, expected_bbox, backfill, discarded, detection_track_id
        )

    def _idle(self, frame: FrameDetections, discarded: DetectionRefs) -> TrackedFrame:
        """What `_follow` says where nobody is followed and nobody was found."""
        self._last_frame = frame.frame_index
        none = np.zeros(0, np.int64)
        if self._texture is not None:
            self._texture.observe(frame, none, none)
        global_orient, body_pose, betas, camera = split_pose_vectors(self._tracks.pose[:, -1])
        return TrackedFrame(
            frame_index=frame.frame_index,
            track_id=none,
            detection_row=none,
            frames_since_seen=none,
            hits=none,
            age=none,
            bbox_xyxy_px=self._tracks.bbox_xyxy_px,
            camera=camera,
            global_orient=global_orient,
            body_pose=body_pose,
            betas=betas,
            backfill=DetectionRefs(none, none, none),
            discarded=discarded,
            detection_track_id=none,
        )

    def _drop(self, ended: Bool) -> DetectionRefs:
        """End tracks; gives back the detections of those that were tentative."""
        tentative = np.flatnonzero(ended & (self._tracks.hits < self.settings.n_init))
        refs = self._tracks.past_detections(tentative)
        if ended.any():
            self._tracks = self._tracks.take(~ended)
        return refs

    def _associate(
        self,
        frame: FrameDetections,
        prediction: Prediction,
        expected_bbox: F32,
        row: I64,
        location: F64,
        pose: F32,
    ) -> Assignment:
        """The cheapest assignment; `row` are the rows of the detections in the frame.

        Looks are compared only where the assignment depends on them. Texture can only add to a
        cost, so an assignment that is cheapest while some costs are still too low, but whose own
        are all complete, is cheapest (section 17.7). A track and a detection that can have nobody
        but each other need not be compared if even a bound of their distance keeps them together;
        compat does without such bounds.
        """
        gate, solver_order = self.settings.gate, self.settings.compat
        cost = cost_without_texture(
            cost_terms(prediction.location, prediction.pose, location, pose)
        )
        in_boxes = np.ones_like(cost)
        if self.settings.box_weight:
            # A box before a cut says nothing about those behind it. From one frame to the next
            # places are less certain than that a box hardly moves.
            last_seen, last_bbox = self._tracks.last_seen, self._tracks.bbox_xyxy_px
            told = last_seen >= self._shot_start
            is_lost = last_seen < frame.frame_index - 1
            bbox = np.where(is_lost[:, None], expected_bbox, last_bbox)
            in_boxes[told] = box_factor(
                bbox[told], frame.bbox_xyxy_px[row], self.settings.box_weight
            )

        def cheapest() -> Assignment:
            # The gate is for the published cost, boxes only choose between pairs within it.
            weighed = np.where(cost <= gate, cost * in_boxes, np.inf)
            if self.settings.log_cost:
                return assign(np.log(weighed), np.log(gate))
            return assign(weighed, gate, solver_order=solver_order)

        if self._texture is None:
            return cheapest()

        is_open = cost <= gate  # pairs whose cost lacks its texture and may need it
        track_id, texture = prediction.track_id, self._texture

        def complete(track: I64, detection: I64) -> None:
            distance = texture.distances(frame, track_id[track], row[detection])
            cost[track, detection] *= texture_factor(distance)
            is_open[track, detection] = False

        if not solver_order:
            alone = is_open & (is_open.sum(1, keepdims=True) == 1) & (is_open.sum(0) == 1)
            track, detection = np.nonzero(alone)
            if len(track):
                bound = texture.bounds(frame, track_id[track], row[detection])
                sure = cost[track, detection] * texture_factor(bound) <= gate
                is_open[track[sure], detection[sure]] = False
        while True:
            match = cheapest()
            needed = is_open[match.track, match.detection]
            if needed.any():
                complete(match.track[needed], match.detection[needed])
            elif solver_order and len(match.unmatched_detection) > 1 and is_open.any():
                # Which refused pairs the solver fills in, and so the order of new tracks, depends
                # on the whole matrix (section 15, Q28).
                complete(*np.nonzero(is_open))
            else:
                return match

    def _report(
        self,
        frame: FrameDetections,
        prediction: Prediction,
        expected_bbox: F32,
        backfill: DetectionRefs,
        discarded: DetectionRefs,
        detection_track_id: I64,
    ) -> TrackedFrame:
        """The rows of a frame; `prediction` belongs to the first tracks, before those born now."""
        now, tracks = frame.frame_index, self._tracks
        confirmed = np.flatnonzero(tracks.hits >= self.settings.n_init)
        unseen_for = now - tracks.last_seen[confirmed]
        is_ghost = unseen_for > 0
        ghost = confirmed[is_ghost]

        location, pose = tracks.location[confirmed, -1], tracks.pose[confirmed, -1]
        bbox = tracks.bbox_xyxy_px[confirmed]
        bbox[is_ghost] = expected_bbox[ghost]
        location[is_ghost] = prediction.location.location[ghost]
        pose[is_ghost] = prediction.pose[ghost]
        global_orient, body_pose, betas, _ = split_pose_vectors(pose)
        return TrackedFrame(
            frame_index=now,
            track_id=tracks.track_id[confirmed],
            detection_row=np.where(is_ghost, -1, tracks.detection_row[confirmed, -1]),
            frames_since_seen=unseen_for,
            hits=tracks.hits[confirmed],
            age=now - tracks.first_frame[confirmed] + 1,
            bbox_xyxy_px=bbox,
            camera=camera_of(location).astype(np.float32),
            global_orient=global_orient,
            body_pose=body_pose,
            betas=betas,
            backfill=backfill,
            discarded=discarded,
            detection_track_id=detection_track_id,
        )

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything remembered, as plain arrays."""
        last_frame = [] if self._last_frame is None else [self._last_frame]
        texture = {} if self._texture is None else self._texture.state()
        return {
            **{field.name: getattr(self._tracks, field.name).copy() for field in fields(Tracks)},
            "next_id": np.array(self._next_id, np.int64),
            "last_frame": np.array(last_frame, np.int64),
            "unseen_slot": np.array(self._unseen_slot, np.int64),
            "shot_start": np.array(self._shot_start, np.int64),
            **{f"{TEXTURE_STATE}{name}": values for name, values in texture.items()},
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave, in a tracker of the same settings.

        Raises:
            ValueError: an array is missing, or there is one too many.
        """
        names = {field.name for field in fields(Tracks)}
        expected = names | {"next_id", "last_frame", "unseen_slot", "shot_start"}
        texture = {name for name in state if name.startswith(TEXTURE_STATE)}
        if set(state) - texture != expected or bool(texture) > (self._texture is not None):
            raise ValueError(f"tracker state: expected {sorted(expected)}, got {sorted(state)}")
        self._tracks = Tracks(**{name: state[name].copy() for name in names})
        self._next_id = int(state["next_id"])
        self._last_frame = int(state["last_frame"][0]) if len(state["last_frame"]) else None
        self._unseen_slot = int(state["unseen_slot"])
        self._shot_start = int(state["shot_start"])
        if self._texture is not None:
            self._texture.restore({n.removeprefix(TEXTURE_STATE): state[n] for n in texture})


def update_together(
    trackers: Sequence[PhalpTracker], frames: Sequence[FrameDetections]
) -> list[TrackedFrame]:
    """Associate one frame of each of several videos, with a single call of the pose predictor.

    Args:
        trackers: one per video; all were handed the same pose predictor.
        frames: the next frame of each.

    Raises:
        ValueError: a frame does not come after the one before.
    """
    discarded = [t._begin(f.frame_index) for t, f in zip(trackers, frames, strict=True)]
    moving = [tracker._moving() for tracker in trackers]
    ends = np.cumsum([len(rows) for rows in moving])[:-1]
    predictor = trackers[0]._pose_predictor if trackers else None
    if predictor is None or not sum(map(len, moving)):
        poses = [t._tracks.pose[rows, -1] for t, rows in zip(trackers, moving, strict=True)]
    else:
        questions = [
            tracker._question(frame.frame_index, rows)
            for tracker, frame, rows in zip(trackers, frames, moving, strict=True)
        ]
        pose, history, slot = (np.concatenate(parts) for parts in zip(*questions, strict=True))
        poses = np.split(predictor(pose, history, slot), ends)
    return [
        tracker._follow(frame, tracker._expect(frame.frame_index, pose), refs)
        if len(tracker._tracks) or len(frame.people)
        else tracker._idle(frame, refs)
        for tracker, frame, pose, refs in zip(trackers, frames, poses, discarded, strict=True)
    ]


def _usable(frame: FrameDetections) -> Bool:
    """(M,) whether a detection can be compared: a real box, a camera in front, sane numbers."""
    people, bbox = frame.people, frame.bbox_xyxy_px
    usable = (bbox[:, 2:] > bbox[:, :2]).all(1)
    usable &= (people.pred_cam[:, 0] > 0) & (people.box_size_px > 0)
    for values in (
        bbox,
        frame.score,
        people.pred_cam,
        people.box_center_px,
        people.box_size_px,
        people.global_orient,
        people.body_pose,
        people.betas,
    ):
        usable &= (np.abs(values) <= MAX_MAGNITUDE).all(axis=tuple(range(1, values.ndim)))
    return usable

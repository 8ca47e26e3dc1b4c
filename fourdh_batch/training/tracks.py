"""Tracks, of our tables or made here, as masked examples for the pose predictor.

Dimension letters: `T` rows of a track, `L` slots of the predictor.

Three ways to hide poses: some at random, as published; a stretch between seen poses, which is what
amodal completion asks for; all but a few in a row, which is what the tracker asks for.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from fourdh_batch.errors import TrainingError
from fourdh_batch.geometry import phalp_camera
from fourdh_batch.models.poses_given import camera_of_square
from fourdh_batch.models.predictor import NUM_POSE_VECTOR
from fourdh_batch.models.smpl import SmplBody
from fourdh_batch.synthetic.mocap import load_recordings
from fourdh_batch.synthetic.tracks import PlannedTrack, PlannedTracks
from fourdh_batch.tables.reader import read_tracks, smpl_arrays
from fourdh_batch.tracking.pose import pose_vectors
from fourdh_batch.types import F32, I64, NUM_BODY_JOINTS, NUM_KEYPOINTS, Bool, People

HISTORY = 7  # poses that the tracker remembers
MAX_STRETCH = 50  # frames; the tracker's `max_age`
TEST_GAPS = (5, 10, 20)  # frames, of evaluation
MIN_AROUND_GAP = 2  # rows on each side of a gap
LONGEST_TEST = max(TEST_GAPS) + 2 * MIN_AROUND_GAP  # rows
HELD_OUT_STEP = 10
# Of people made here so many examples in a row share so many clips: making these takes about as
# long as training on those.
BLOCK_EXAMPLES, BLOCK_CLIPS = 2048, 32
BLOCKS_IN_MEMORY = 2
CLIP_FRAMES = 130
COLUMNS = (
    *("dataset", "video_id", "shot_id", "track_id", "frame_index"),
    *("global_orient", "body_pose", "betas", "pred_cam"),
    *("box_center_px", "box_size_px", "image_size_px"),
)


@dataclass(frozen=True, slots=True, eq=False)
class TrackPoses:
    """The detected rows of one track in one shot.

    Attributes:
        video: dataset and id of its video.
        frame_index: (T,) increasing.
        pose: (T, 229) pose vectors, the truth.
        shown: (T, 229) what an estimator would say of them; of tables, which hold estimates, the
            same.
    """

    video: tuple[str, str]
    frame_index: I64
    pose: F32
    shown: F32


class MaskedTrack(NamedTuple):
    """One example.

    Attributes:
        pose: (L, 229) float32 truth, 0 where there is none.
        shown: (L, 229) float32 likewise, what the predictor is given where it sees.
        is_seen: (L,) bool, what the predictor sees.
        is_wanted: (L,) bool, what it has to tell.
        gap: () int64, frames of the gap in evaluation, 0 for the next frame; -1 in training.
    """

    pose: F32
    shown: F32
    is_seen: Bool
    is_wanted: Bool
    gap: I64


class TrackBatch(NamedTuple):
    """K examples; the fields of `MaskedTrack` with an axis more."""

    pose: Tensor
    shown: Tensor
    is_seen: Tensor
    is_wanted: Tensor
    gap: Tensor


def collate_tracks(examples: Sequence[MaskedTrack]) -> TrackBatch:
    """Examples side by side."""
    columns = zip(*examples, strict=True)
    return TrackBatch(*(torch.from_numpy(np.stack(column)) for column in columns))


def read_track_poses(root: str, *, min_rows: int) -> list[TrackPoses]:
    """All tracks of an output root, about 1 kB a row in memory.

    Args:
        root: of the tables.
        min_rows: shorter ones are left out.

    Raises:
        FileNotFoundError: nothing was committed there.
        TrainingError: no track is long enough.
    """
    detected = [("state", "==", "detected")]
    rows = read_tracks(root, columns=COLUMNS, filters=detected)
    rows = rows[rows["pred_cam"].notna()].sort_values(
        ["dataset", "video_id", "shot_id", "track_id", "frame_index"], ignore_index=True
    )
    if rows.empty:
        raise TrainingError(f"{root}: expected detected rows with cameras, got none")
    arrays = smpl_arrays(rows)
    size_px = rows["box_size_px"].to_numpy(np.float32)
    people = People(
        global_orient=arrays["global_orient"],
        body_pose=arrays["body_pose"],
        betas=arrays["betas"],
        pred_cam=arrays["pred_cam"],
        box_center_px=arrays["box_center_px"],
        box_size_px=size_px,
        keypoints_3d_m=np.zeros((len(rows), NUM_KEYPOINTS, 3), np.float32),
    )
    camera = phalp_camera(people.pred_cam, people.box_center_px, size_px, arrays["image_size_px"])
    pose = pose_vectors(people, camera)
    frames = rows["frame_index"].to_numpy(np.int64)
    keys = rows[["dataset", "video_id", "shot_id", "track_id"]]
    starts = np.flatnonzero((keys != keys.shift()).any(axis=1))
    video = list(zip(keys["dataset"], keys["video_id"], strict=True))
    tracks = [
        TrackPoses(video[first], frames[first:last], pose[first:last], pose[first:last])
        for first, last in zip(starts, [*starts[1:], len(rows)], strict=True)
        if last - first >= min_rows
    ]
    if not tracks:
        raise TrainingError(f"{root}: expected tracks of {min_rows} rows or more, got none")
    return tracks


def is_held_out(video: tuple[str, str]) -> bool:
    """Whether a video (dataset, id) of a root that is in both lists is held out: about one in
    `HELD_OUT_STEP`, whichever others there are."""
    return zlib.crc32("\0".join(video).encode("utf-8", "surrogatepass")) % HELD_OUT_STEP == 0


class TrackSource(Protocol):
    """Where examples take their tracks."""

    def draw(self, number: int, random: np.random.Generator) -> TrackPoses:
        """A track for the example of any number from 0 on; follows from both, in any process."""


class ListedTracks:
    """See `TrackSource`: each track as often as any other."""

    def __init__(self, tracks: Sequence[TrackPoses]) -> None:
        self._tracks = tracks

    def draw(self, number: int, random: np.random.Generator) -> TrackPoses:
        """See `TrackSource`."""
        return self._tracks[int(random.integers(len(self._tracks)))]


class SyntheticTracks:
    """See `TrackSource`: people of drawn plans, never the same again.

    Args:
        body: of the people, on the CPU.
        path: folder of motion capture that everybody plays; empty: the package's own motions.
        seed: of everything.
        jitter_deg: standard deviation about each axis by which shown rotations are wrong.
        min_rows: shorter tracks are left out.
        block_clips: clips that `BLOCK_EXAMPLES` examples in a row share.
    """

    def __init__(
        self,
        body: SmplBody,
        path: str,
        *,
        seed: int,
        jitter_deg: float,
        min_rows: int,
        block_clips: int = BLOCK_CLIPS,
    ) -> None:
        self._planned = PlannedTracks(
            body,
            seed=seed,
            recordings=load_recordings(path) if path else (),
            num_frames=CLIP_FRAMES,
        )
        self._seed = seed
        self._jitter_deg = jitter_deg
        self._min_rows = min_rows
        self._block_clips = block_clips
        self._blocks: OrderedDict[int, list[TrackPoses]] = OrderedDict()

    def draw(self, number: int, random: np.random.Generator) -> TrackPoses:
        """See `TrackSource`."""
        tracks = self.block(number // BLOCK_EXAMPLES)
        return tracks[int(random.integers(len(tracks)))]

    def block(self, number: int) -> list[TrackPoses]:
        """The tracks of one block of clips.

        Raises:
            TrainingError: none is long enough.
        """
        if number not in self._blocks:
            while len(self._blocks) >= BLOCKS_IN_MEMORY:
                self._blocks.popitem(last=False)
            clips = range(number * self._block_clips, (number + 1) * self._block_clips)
            random = np.random.default_rng((self._seed, number))
            made = [self._poses(clip, t, random) for clip in clips for t in self._long(clip)]
            if not made:
                raise TrainingError(f"expected tracks of {self._min_rows} rows or more, got none")
            self._blocks[number] = made
        return self._blocks[number]

    def _long(self, clip: int) -> list[PlannedTrack]:
        tracks = self._planned.clip(clip)
        return [track for track in tracks if len(track.frame_index) >= self._min_rows]

    def _poses(self, clip: int, track: PlannedTrack, random: np.random.Generator) -> TrackPoses:
        num = len(track.frame_index)
        size_wh = np.array(track.image_size_wh, dtype=np.float64)
        center, side = np.tile(size_wh / 2, (num, 1)), np.ones(num)  # any square tells the same
        focal = np.full(num, track.focal_px)
        pred_cam = camera_of_square(track.cam_t_m, focal, center, center, side)
        people = People(
            global_orient=track.global_orient,
            body_pose=track.body_pose,
            betas=track.betas,
            pred_cam=pred_cam.astype(np.float32),
            box_center_px=center.astype(np.float32),
            box_size_px=side.astype(np.float32),
            keypoints_3d_m=np.zeros((num, NUM_KEYPOINTS, 3), np.float32),
        )
        camera = phalp_camera(people.pred_cam, center, side, size_wh)
        pose = pose_vectors(people, camera)
        return TrackPoses(
            ("", str(clip)), track.frame_index, pose, jittered(pose, self._jitter_deg, random)
        )


def jittered(pose: F32, jitter_deg: float, random: np.random.Generator) -> F32:
    """(T, 229) pose vectors whose rotations are wrong by so much about each axis, on average."""
    if jitter_deg == 0:
        return pose
    num = 9 * (1 + NUM_BODY_JOINTS)
    wrong = random.normal(0, np.radians(jitter_deg), (len(pose) * (1 + NUM_BODY_JOINTS), 3))
    turned = pose[:, :num].reshape(-1, 3, 3) @ Rotation.from_rotvec(wrong).as_matrix()
    shown = pose.copy()
    shown[:, :num] = turned.reshape(len(pose), -1)
    return shown


class MaskedTracks:
    """Numbered examples for training.

    Args:
        sources: to draw from.
        weights: shares of the sources, relative to each other.
        frame_length: slots L.
        mask_share: of the poses of an example that are hidden at random.
        stretch_share: of the examples, in which a stretch, or all but a few, are hidden instead.
        seed: of everything.
    """

    def __init__(
        self,
        sources: Sequence[TrackSource],
        weights: Sequence[float],
        *,
        frame_length: int,
        mask_share: float,
        stretch_share: float,
        seed: int,
    ) -> None:
        self._sources = sources
        self._shares = np.array(weights) / sum(weights)
        self._length = frame_length
        self._mask_share = mask_share
        self._stretch_share = stretch_share
        self._seed = seed

    def __getitem__(self, number: int) -> MaskedTrack:
        random = np.random.default_rng((self._seed, number))
        source = int(random.choice(len(self._sources), p=self._shares))
        track = self._sources[source].draw(number, random)
        first = int(random.integers(max(len(track.pose) - self._length // 2, 1)))
        slot = track.frame_index[first:] - track.frame_index[first]
        slot = slot[slot < self._length]
        hidden = self._hidden(random, slot)
        seen = ~hidden
        if random.random() < self._stretch_share / 2:  # the tracker's question
            seen, hidden = _history(random, slot)
        return _masked(track, first, slot, seen, hidden, self._length, gap=-1)

    def _hidden(self, random: np.random.Generator, slot: I64) -> Bool:
        """(T,) rows to be told."""
        hidden = np.zeros(len(slot), dtype=np.bool_)
        share = self._stretch_share / 2 / max(1 - self._stretch_share / 2, 1e-9)
        if random.random() < share and len(slot) >= 3:
            length = int(random.integers(1, MAX_STRETCH + 1))
            start = int(slot[1 + random.integers(len(slot) - 2)])
            hidden = (slot >= start) & (slot < start + length)
            hidden[-1] = False
        else:
            count = max(int(len(slot) * self._mask_share), 1) if len(slot) > 1 else 0
            hidden[random.permutation(len(slot))[:count]] = True
        return hidden


class GapTracks:
    """Numbered examples for evaluation: gaps of `TEST_GAPS` frames, and the frame after a history.

    Args:
        tracks: to draw from, each as often as any other; those that are too short are left out.
        frame_length, seed: as of `MaskedTracks`.

    Raises:
        TrainingError: all are too short.
    """

    def __init__(self, tracks: Sequence[TrackPoses], *, frame_length: int, seed: int) -> None:
        self._length = frame_length
        self._seed = seed
        self._tracks = [t for t in tracks if len(self._starts(t, LONGEST_TEST))]
        if not self._tracks:
            most = max((int(self._num_rows(track).max()) for track in tracks), default=0)
            raise TrainingError(
                f"held out: expected a track with {LONGEST_TEST} rows within {frame_length} "
                f"frames, as gaps of {max(TEST_GAPS)} need, the longest has {most}"
            )

    def __getitem__(self, number: int) -> MaskedTrack:
        random = np.random.default_rng((self._seed, number))
        track = self._tracks[int(random.integers(len(self._tracks)))]
        gap = (0, *TEST_GAPS)[number % (1 + len(TEST_GAPS))]
        starts = self._starts(track, LONGEST_TEST if gap else HISTORY + 1)
        if gap:  # with all that can be seen around it
            frame = track.frame_index
            whole = starts[frame[starts] + self._length <= frame[-1] + 1]
            starts = whole if len(whole) else starts[:1]
        first = int(starts[random.integers(len(starts))])
        slot = track.frame_index[first:] - track.frame_index[first]
        slot = slot[slot < self._length]
        rows = np.arange(len(slot))
        if gap == 0:
            seen, wanted = rows < HISTORY, rows == HISTORY
        else:
            room = len(slot) - gap - 2 * MIN_AROUND_GAP
            start = MIN_AROUND_GAP + int(random.integers(room + 1))
            wanted = (rows >= start) & (rows < start + gap)
            seen = ~wanted
        return _masked(track, first, slot, seen, wanted, self._length, gap=gap)

    def _starts(self, track: TrackPoses, needed: int) -> I64:
        """Rows from which on the slots show so many rows."""
        return np.flatnonzero(self._num_rows(track) >= needed)

    def _num_rows(self, track: TrackPoses) -> I64:
        """(T,) rows that the slots from each row on show."""
        frame = track.frame_index
        return np.searchsorted(frame, frame + self._length) - np.arange(len(frame))


def _history(random: np.random.Generator, slot: I64) -> tuple[Bool, Bool]:
    """(T,) a few rows in a row that are seen, and what comes after them."""
    rows = np.arange(len(slot))
    count = min(int(random.integers(1, HISTORY + 1)), max(len(slot) - 1, 1))
    seen = rows < count
    until = slot[count - 1] + random.integers(1, MAX_STRETCH + 1)
    return seen, ~seen & (slot <= max(until, slot[min(count, len(slot) - 1)]))


def _masked(
    track: TrackPoses,
    first: int,
    slot: I64,
    is_seen: Bool,
    is_wanted: Bool,
    length: int,
    *,
    gap: int,
) -> MaskedTrack:
    pose = np.zeros((length, NUM_POSE_VECTOR), dtype=np.float32)
    shown = np.zeros_like(pose)
    rows = slice(first, first + len(slot))
    pose[slot], shown[slot] = track.pose[rows], track.shown[rows]
    seen, wanted = np.zeros(length, dtype=np.bool_), np.zeros(length, dtype=np.bool_)
    seen[slot], wanted[slot] = is_seen, is_wanted
    return MaskedTrack(pose, shown, seen, wanted, np.int64(gap))  # type: ignore[arg-type]

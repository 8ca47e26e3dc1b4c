"""The tables of a run against truth: bodies, tracks and boxes, per video and together.

Truth has the columns of `tracks` (as the synthetic corpus writes it) or of any of them: identities
and boxes are scored always, bodies where it has them. A row of the truth with `state` predicted is
a person who is there but cannot be seen: nobody need find it, and whoever finds it is not wrong.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fourdh_batch.errors import ConfigError, SchemaError, StorageError
from fourdh_batch.evaluate.detection import (
    AveragePrecision,
    FrameBoxes,
    FrameMatches,
    average_precision,
    match_frame,
)
from fourdh_batch.evaluate.matching import Boxes, by_frame, drop_hidden, match_boxes
from fourdh_batch.evaluate.pose import (
    EVALUATION_KEYPOINTS,
    PCK_THRESHOLDS,
    PELVIS_KEYPOINT,
    acceleration_error_mm,
    mpjpe_mm,
    pa_mpjpe_mm,
    pck_distances,
    pve_mm,
)
from fourdh_batch.evaluate.tracking import PROTOCOLS, TrackingScores, tracking_scores
from fourdh_batch.storage import open_read, redact_uri
from fourdh_batch.tables.reader import read_arrow, smpl_arrays
from fourdh_batch.tables.schema import arrow_schema, video_ids_of
from fourdh_batch.types import F32, F64, I64, NUM_KEYPOINTS, Bool

if TYPE_CHECKING:  # imports torch
    from fourdh_batch.models.smpl import SmplBody

logger = logging.getLogger(__name__)

OK, MISSING = "ok", "missing"
VIDEOS_AT_ONCE = 32  # read together; their rows lie in memory
BODIES_AT_ONCE = 64  # posed together
NAMED_VIDEOS = 5  # in messages
FPS_DIGITS = 2  # more would tell videos apart whose times are rounded

BOX_COLUMNS = ("video_id", "frame_index", "track_id", "bbox_xyxy_px")
STATE_COLUMNS = ("state", "shot_id")
STATES = ("detected", "predicted")
POSE_COLUMNS = ("keypoints_3d_m", "keypoints_2d_px")
BODY_COLUMNS = ("global_orient", "body_pose", "betas", "body_model")

TRUTH_COLUMNS = (*BOX_COLUMNS, *STATE_COLUMNS, *POSE_COLUMNS, *BODY_COLUMNS)

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class PoseScores:
    """Bodies of matched people; None where the truth has none, or nobody was matched.

    Attributes:
        num_people: matched rows.
        matched: share of the true rows that they are; None for completed rows.
        mpjpe_mm, pa_mpjpe_mm, pve_mm: means over the matched rows, mm.
        acceleration_mm_per_frame2: mean over true tracks' triples of successive matched frames, of
            keypoints with the pelvis in the origin.
        fps: the frame rate that this unit means; None where videos differ.
        pck: per threshold, of the projected keypoints; sizes are those of the true boxes.
    """

    num_people: int
    matched: float | None
    mpjpe_mm: float | None
    pa_mpjpe_mm: float | None
    pve_mm: float | None
    acceleration_mm_per_frame2: float | None
    fps: float | None
    pck: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one video or of all.

    Attributes:
        pose: detected rows against people who can be seen.
        completed: rows with `state` predicted (the tracker's guesses at missed frames) against
            whoever is there, seen or not.
        tracking: per protocol of `tracking.PROTOCOLS`.
        boxes: of the detector.
    """

    pose: PoseScores
    completed: PoseScores
    tracking: dict[str, TrackingScores]
    boxes: AveragePrecision


@dataclass(frozen=True, slots=True)
class Report:
    """What `evaluate` found.

    Attributes:
        predictions, truth: where they were read from.
        per_video: by video id.
        status: by video id, ``ok`` or ``missing``: in the truth, but not in the predictions or
            failed there; all of its people are misses.
        overall: all videos together.
        without_truth: videos of the predictions that could not be scored.
        boxes_of: the table whose boxes are scored: detections, or tracks where there is none.
        notes: what was left out and why.
    """

    predictions: str
    truth: str
    per_video: dict[str, Scores]
    status: dict[str, str]
    overall: Scores
    without_truth: list[str]
    boxes_of: str
    notes: list[str]

    @property
    def missing(self) -> list[str]:
        """Videos of the truth without a result."""
        return [name for name, status in self.status.items() if status == MISSING]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; NaN is None."""
        return {
            "predictions": self.predictions,
            "truth": self.truth,
            "num_videos": len(self.per_video),
            "missing": self.missing,
            "without_truth": self.without_truth,
            "boxes_of": self.boxes_of,
            "notes": self.notes,
            "overall": _plain(asdict(self.overall)),
            "per_video": [
                {"video_id": name, "status": self.status[name], **_plain(asdict(scores))}
                for name, scores in self.per_video.items()
            ],
        }

    def to_table(self) -> Any:
        """One row per video as a `pyarrow.Table`; columns such as `tracking.iou50.hota`."""
        rows = [_flat(row) for row in self.to_dict()["per_video"]]
        columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
        return pa.table(
            {
                name: column.cast(pa.float64()) if pa.types.is_null(column.type) else column
                for name, column in columns.items()
            }
        )


def evaluate(
    predictions: str,
    truth: str,
    *,
    dataset: str | None = None,
    protocols: Sequence[str] = tuple(PROTOCOLS),
    body: SmplBody | None = None,
    on_step: OnStep = lambda what, done, total: None,
) -> Report:
    """Score the tables of a run.

    Args:
        predictions: output root of a run, or of a release.
        truth: a Parquet file with columns of `tracks`, or another output root.
        dataset: of the predictions, where they hold several.
        protocols: keys of `tracking.PROTOCOLS`.
        body: for PVE; counts where it is the one that both sides were made with. None: no PVE.
        on_step: told what is done, of how much.

    Raises:
        ConfigError: no video is in both, or a video id stands for several of the predictions.
        SchemaError: the truth lacks a column.
        FileNotFoundError: there is nothing at one of the addresses.
    """
    notes: list[str] = []
    samples: dict[str, _Samples] = {}
    with _Truth(truth, notes) as true_people:
        wanted = true_people.videos
        if not wanted:
            raise ConfigError(f"{redact_uri(truth)}: expected rows of true people, got none")
        done, others = _finished_videos(predictions, dataset, wanted)
        if not done:
            raise ConfigError(
                f"no common video: {redact_uri(predictions)} has {_some(others)} done, "
                f"{redact_uri(truth)} has {_some(wanted)}"
            )
        boxes_of = _boxes_of(predictions, dataset)
        columns = _compared_columns(true_people.columns)
        num_done = 0
        for start in range(0, len(wanted), VIDEOS_AT_ONCE):
            names = wanted[start : start + VIDEOS_AT_ONCE]
            found = [name for name in names if name in done]
            truth_of = _by_video(true_people.rows(names), names)
            tracks = _by_video(_read(predictions, "tracks", dataset, found, columns), names)
            boxes = _by_video(_read_boxes(predictions, boxes_of, dataset, found), names)
            for name in names:
                fps = done.get(name) or _fps(tracks[name])
                samples[name] = _score_video(
                    truth_of[name], tracks[name], boxes[name], body, fps, notes
                )
                num_done += 1
                on_step("videos", num_done, len(wanted))
    scored = {name: tracking_scores(_tracks_of(samples), name) for name in protocols}
    per_video = {
        name: one.scores({key: videos[name] for key, (videos, _) in scored.items()})
        for name, one in samples.items()
    }
    overall = _together(samples.values()).scores({key: all_ for key, (_, all_) in scored.items()})
    return Report(
        predictions=redact_uri(predictions),
        truth=redact_uri(truth),
        per_video=per_video,
        status={name: OK if name in done else MISSING for name in wanted},
        overall=overall,
        without_truth=sorted(others - done.keys()),
        boxes_of=boxes_of,
        notes=list(dict.fromkeys(notes)),
    )


# --- reading -----------------------------------------------------------------------------------


class _Truth:
    """True people, read for some videos at a time.

    Args:
        uri: a Parquet file or an output root.
        notes: gets what cannot be scored for want of columns.

    Attributes:
        columns: those of ours that it has.
        videos: with people, and those that it names besides, sorted.
    """

    def __init__(self, uri: str, notes: list[str]) -> None:
        self._uri = uri
        self._file: Any = open_read(uri) if uri.endswith(".parquet") else None
        self._videos_of_group: list[set[str]] = []
        self._kept: tuple[list[int], Any] | None = None  # row groups, and what is in them
        try:
            self.videos = sorted(self._open_file() if self._file else self._open_root())
            self._check_columns(notes)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def rows(self, names: Sequence[str]) -> Any:
        """The rows of these videos, in the types of `tracks`.

        Raises:
            SchemaError: something in them is no truth.
        """
        if self._file:
            wanted = set(names)
            groups = [i for i, ids in enumerate(self._videos_of_group) if ids & wanted]
            if self._kept is None or self._kept[0] != groups:
                self._kept = None  # two are never in memory
                self._kept = groups, self._read_groups(groups, self.columns)
            table = self._kept[1]  # a row group of many videos is not read for every few of them
            table = table.filter(pc.is_in(table["video_id"], pa.array(names, pa.string())))
        else:
            table = read_arrow(self._uri, "tracks", columns=self.columns, video_id=list(names))
        _check_truth(redact_uri(self._uri), table)
        return table

    def _open_file(self) -> set[str]:
        try:
            self._parquet = pq.ParquetFile(self._file)
        except pa.ArrowInvalid as error:
            raise SchemaError(f"{redact_uri(self._uri)}: expected Parquet, got {error}") from error
        there = self._parquet.schema_arrow.names
        if twice := sorted(name for name in TRUTH_COLUMNS if there.count(name) > 1):
            raise SchemaError(f"{redact_uri(self._uri)}: {twice[0]}: expected one such column")
        self.columns = [name for name in TRUTH_COLUMNS if name in there]
        videos = set(video_ids_of(self._parquet.schema_arrow))
        if "video_id" in self.columns:
            for group in range(self._parquet.num_row_groups):
                ids = set(self._read_groups([group], ["video_id"])["video_id"].unique().to_pylist())
                self._videos_of_group.append(ids)
                videos |= ids
        return videos

    def _open_root(self) -> set[str]:
        self.columns = list(TRUTH_COLUMNS)
        columns = ["dataset", "video_id", "status"]
        videos = read_arrow(self._uri, "videos", columns=columns).to_pandas()
        videos = videos[videos["status"].isin(["ok", "partial"])]
        if videos.duplicated("video_id").any():
            names = ", ".join(sorted(set(videos["dataset"])))
            raise ConfigError(
                f"{redact_uri(self._uri)}: expected one truth of a video, got several datasets: "
                f"{names}"
            )
        return set(videos["video_id"])

    def _check_columns(self, notes: list[str]) -> None:
        if missing := sorted(set(BOX_COLUMNS) - set(self.columns)):
            raise SchemaError(
                f"{redact_uri(self._uri)}: expected the columns {', '.join(BOX_COLUMNS)} of "
                f"`tracks`, missing {', '.join(missing)}"
            )
        for what, columns in (("bodies", POSE_COLUMNS), ("PVE", BODY_COLUMNS)):
            if missing := sorted(set(columns) - set(self.columns)):
                notes.append(f"{what}: not scored, the truth has no {', '.join(missing)}")

    def _read_groups(self, groups: list[int], columns: list[str]) -> Any:
        try:
            table = self._parquet.read_row_groups(groups, columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            # Of the store or the disk, not of what is there.
            if isinstance(error, OSError) and (
                isinstance(error, StorageError) or error.errno is not None
            ):
                raise
            raise SchemaError(f"{redact_uri(self._uri)}: expected Parquet, got {error}") from error
        for name in table.column_names:
            if table[name].null_count:
                raise SchemaError(f"{redact_uri(self._uri)}: {name}: expected no null, got some")
        return _plain_types(self._uri, table)


def _check_truth(where: str, table: Any) -> None:
    """Raises: SchemaError: unknown states, numbers that are not finite, boxes without an extent."""
    if "state" in table.column_names:
        got = set(pc.unique(table["state"]).to_pylist())
        if unknown := sorted(got - set(STATES)):
            raise SchemaError(f"{where}: state: expected {' or '.join(STATES)}, got {unknown[0]!r}")
    for name in table.column_names:
        array = smpl_arrays(table.select([name])).get(name)
        if array is not None and not np.isfinite(array).all():
            raise SchemaError(f"{where}: {name}: expected finite numbers, got others")
    box = smpl_arrays(table.select(["bbox_xyxy_px"]))["bbox_xyxy_px"]
    is_box = (box[:, 2:] > box[:, :2]).all(axis=1)
    if not is_box.all():
        row = int(np.argmin(is_box))
        raise SchemaError(
            f"{where}: video {table['video_id'][row]}, frame {table['frame_index'][row]}: "
            f"expected a box with an extent, got {box[row].tolist()}"
        )


def _plain_types(uri: str, table: Any) -> Any:
    """Texts and whole numbers in the types of `tracks`, however they are encoded.

    Raises:
        SchemaError: a column holds something else, such as fractions or numbers as text.
    """
    for i, column in enumerate(table.schema):
        wanted = arrow_schema("tracks").field(column.name).type
        if column.type == wanted or not (pa.types.is_string(wanted) or pa.types.is_int64(wanted)):
            continue
        is_dictionary = pa.types.is_dictionary(column.type)
        got = column.type.value_type if is_dictionary else column.type
        is_text = pa.types.is_string(got) or pa.types.is_large_string(got)
        try:
            if not (pa.types.is_integer(got) if pa.types.is_int64(wanted) else is_text):
                raise pa.ArrowInvalid(str(column.type))
            table = table.set_column(i, column.name, table[column.name].cast(wanted))
        except pa.ArrowInvalid as error:
            raise SchemaError(
                f"{redact_uri(uri)}: {column.name}: expected {wanted}, got {error}"
            ) from error
    return table


def _finished_videos(
    root: str, dataset: str | None, wanted: Sequence[str]
) -> tuple[dict[str, float | None], set[str]]:
    """Those of the wanted videos with a result, with their frame rate where it was told, and all
    with a result."""
    columns = ["dataset", "video_id", "status", "fps"]
    rows = read_arrow(root, "videos", columns=columns, dataset=dataset).to_pandas()
    rows = rows[rows["status"].isin(["ok", "partial"])]
    several = rows[rows["video_id"].isin(wanted)].duplicated("video_id")
    if several.any():
        names = sorted(set(rows["dataset"]))
        raise ConfigError(f"{redact_uri(root)}: several datasets, name one: {', '.join(names)}")
    fps = {
        name: round(rate, FPS_DIGITS) if rate > 0 else None  # null is NaN
        for name, rate in zip(rows["video_id"], rows["fps"].astype(float), strict=True)
    }
    return {name: fps[name] for name in wanted if name in fps}, set(fps)


def _boxes_of(root: str, dataset: str | None) -> str:
    try:
        read_arrow(root, "detections", columns=["video_id"], dataset=dataset, video_id=[])
    except FileNotFoundError:
        return "tracks"
    return "detections"


def _compared_columns(true_columns: Sequence[str]) -> list[str]:
    """Of the predictions: what is compared with the truth, and what is always needed."""
    compared = [name for name in (*POSE_COLUMNS, *BODY_COLUMNS) if name in true_columns]
    return [*BOX_COLUMNS, *STATE_COLUMNS, "pts_s", *compared]


def _read(
    root: str, table: str, dataset: str | None, videos: Sequence[str], columns: Sequence[str]
) -> Any:
    return read_arrow(root, table, columns=columns, dataset=dataset, video_id=list(videos))


def _read_boxes(root: str, table: str, dataset: str | None, videos: Sequence[str]) -> Any:
    rows = _read(root, table, dataset, videos, ["video_id", "frame_index", "bbox_xyxy_px", "score"])
    return rows.filter(pc.is_valid(rows["score"]))


def _by_video(rows: Any, names: Iterable[str]) -> dict[str, Any]:
    """The rows of each name, also where there are none."""
    order = pc.sort_indices(rows, sort_keys=[("video_id", "ascending")])
    rows = rows.take(order)
    ids = rows["video_id"].combine_chunks().dictionary_encode()
    code = ids.indices.to_numpy()
    starts = [0, *(np.flatnonzero(code[1:] != code[:-1]) + 1).tolist(), len(code)]
    spans = {ids[a].as_py(): (a, b) for a, b in pairwise(starts) if b > a}
    empty = (0, 0)
    return {
        name: rows.slice(a, b - a)
        for name, (a, b) in ((name, spans.get(name, empty)) for name in names)
    }


# --- one video ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _People:
    """Rows of `tracks` of one video as arrays; None for columns that are not there."""

    boxes: Boxes
    shot_id: I64
    is_seen: Bool
    keypoints_3d_m: F32 | None
    keypoints_2d_px: F32 | None
    body: Mapping[str, F32] | None
    body_models: frozenset[str]

    @classmethod
    def of(cls, rows: Any) -> _People:
        arrays = smpl_arrays(rows)
        names = set(rows.column_names)
        seen = np.ones(rows.num_rows, dtype=np.bool_)
        shot = np.zeros(rows.num_rows, dtype=np.int64)
        if "state" in names:
            seen = np.asarray(pc.not_equal(rows["state"], "predicted").to_numpy(), np.bool_)
        if "shot_id" in names:
            shot = rows["shot_id"].to_numpy().astype(np.int64)
        has_pose, has_body = names >= set(POSE_COLUMNS), names >= set(BODY_COLUMNS)
        return cls(
            boxes=Boxes(
                rows["frame_index"].to_numpy().astype(np.int64),
                rows["track_id"].to_numpy().astype(np.int64),
                arrays["bbox_xyxy_px"].astype(np.float64),
            ),
            shot_id=shot,
            is_seen=seen,
            keypoints_3d_m=arrays["keypoints_3d_m"] if has_pose else None,
            keypoints_2d_px=arrays["keypoints_2d_px"] if has_pose else None,
            body={name: arrays[name] for name in BODY_COLUMNS[:3]} if has_body else None,
            body_models=frozenset(pc.unique(rows["body_model"]).to_pylist() if has_body else ()),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _PoseSamples:
    """Errors of matched rows, before any mean; `within`: shares of the row's keypoints that are
    within each threshold of PCK, which weigh the same in every row, for all of them count."""

    num_people: int = 0
    num_truth: int | None = 0
    mpjpe_mm: F64 = field(default_factory=lambda: np.zeros(0))
    pa_mpjpe_mm: F64 = field(default_factory=lambda: np.zeros(0))
    pve_mm: F64 = field(default_factory=lambda: np.zeros(0))
    acceleration_mm: F64 = field(default_factory=lambda: np.zeros(0))
    within: F64 = field(default_factory=lambda: np.zeros((0, len(PCK_THRESHOLDS))))
    fps: frozenset[float] = frozenset()

    def scores(self) -> PoseScores:
        return PoseScores(
            num_people=self.num_people,
            matched=self.num_people / self.num_truth if self.num_truth else None,
            mpjpe_mm=_mean(self.mpjpe_mm),
            pa_mpjpe_mm=_mean(self.pa_mpjpe_mm),
            pve_mm=_mean(self.pve_mm),
            acceleration_mm_per_frame2=_mean(self.acceleration_mm),
            fps=next(iter(self.fps)) if len(self.fps) == 1 else None,
            pck={
                f"{threshold:g}": _mean(share)
                for threshold, share in zip(PCK_THRESHOLDS, self.within.T, strict=True)
            },
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Samples:
    """One video, or all, before any mean."""

    pose: _PoseSamples
    completed: _PoseSamples
    tracks: tuple[Boxes, Boxes]
    frames: list[FrameMatches]

    def scores(self, tracking: dict[str, TrackingScores]) -> Scores:
        return Scores(
            pose=self.pose.scores(),
            completed=self.completed.scores(),
            tracking=tracking,
            boxes=average_precision(self.frames),
        )


def _score_video(
    true_rows: Any,
    track_rows: Any,
    box_rows: Any,
    body: SmplBody | None,
    fps: float | None,
    notes: list[str],
) -> _Samples:
    truth, predicted = _People.of(true_rows), _People.of(track_rows)
    seen_rows = np.flatnonzero(predicted.is_seen)
    guessed_rows = np.flatnonzero(~predicted.is_seen)
    there, found, _ = match_boxes(truth.boxes, predicted.boxes.take(seen_rows))
    is_visible = truth.is_seen[there]
    pose = _pose_samples(
        *(truth, there[is_visible], predicted, seen_rows[found[is_visible]]),
        *(body, fps, notes),
        num_truth=int(truth.is_seen.sum()),
    )
    there, found, _ = match_boxes(truth.boxes, predicted.boxes.take(guessed_rows))
    completed = _pose_samples(
        *(truth, there, predicted, guessed_rows[found]), *(body, fps, notes), num_truth=None
    )
    visible, counts = drop_hidden(truth.boxes, truth.is_seen, predicted.boxes.take(seen_rows))
    return _Samples(
        pose=pose,
        completed=completed,
        tracks=(visible, predicted.boxes.take(seen_rows).take(counts)),
        frames=_frames(truth, box_rows),
    )


def _pose_samples(
    truth: _People,
    there: I64,
    predicted: _People,
    found: I64,
    body: SmplBody | None,
    fps: float | None,
    notes: list[str],
    *,
    num_truth: int | None,
) -> _PoseSamples:
    if truth.keypoints_3d_m is None or truth.keypoints_2d_px is None or len(there) == 0:
        return _PoseSamples(num_people=len(there), num_truth=num_truth)
    assert predicted.keypoints_3d_m is not None  # read because the truth has them
    assert predicted.keypoints_2d_px is not None
    true_m, found_m = truth.keypoints_3d_m[there], predicted.keypoints_3d_m[found]
    box = truth.boxes.bbox_xyxy_px[there]
    longer_side_px = (box[:, 2:] - box[:, :2]).max(axis=1)
    distances = pck_distances(
        predicted.keypoints_2d_px[found],
        truth.keypoints_2d_px[there],
        np.ones((len(there), NUM_KEYPOINTS)),
        longer_side_px,
    )
    return _PoseSamples(
        num_people=len(there),
        num_truth=num_truth,
        mpjpe_mm=mpjpe_mm(found_m, true_m),
        pa_mpjpe_mm=pa_mpjpe_mm(found_m, true_m),
        pve_mm=_vertex_errors(truth, there, predicted, found, body, notes),
        acceleration_mm=_accelerations(
            truth.boxes.take(there), truth.shot_id[there], true_m, found_m
        ),
        within=np.stack([(distances < t).mean(axis=1) for t in PCK_THRESHOLDS], axis=1),
        fps=frozenset() if fps is None else frozenset({fps}),
    )


def _accelerations(people: Boxes, shot_id: I64, true_m: F32, found_m: F32) -> F64:
    """Of each true person over the frames in which it was matched, within a shot."""
    frame_index = people.frame_index + 3 * shot_id  # a cut is a gap
    chosen = list(EVALUATION_KEYPOINTS)
    true_m = (true_m - true_m[:, [PELVIS_KEYPOINT]])[:, chosen]
    found_m = (found_m - found_m[:, [PELVIS_KEYPOINT]])[:, chosen]
    errors = [np.zeros(0)]
    for (rows,) in by_frame(people.track_id):  # by person
        rows = rows[np.argsort(frame_index[rows])]
        error = acceleration_error_mm(found_m[rows], true_m[rows], frame_index[rows])
        errors.append(error[np.isfinite(error)])
    return np.concatenate(errors)


def _vertex_errors(
    truth: _People,
    there: I64,
    predicted: _People,
    found: I64,
    body: SmplBody | None,
    notes: list[str],
) -> F64:
    if body is None or truth.body is None or predicted.body is None:
        return np.zeros(0)
    used = truth.body_models | predicted.body_models
    given = f"{body.name}:{body.digest[:16]}"
    if used != {given}:
        notes.append(
            f"PVE: not scored, the body given is {given}, the tables were made with "
            f"{', '.join(sorted(used))}"
        )
        return np.zeros(0)
    errors = [np.zeros(0)]
    for start in range(0, len(there), BODIES_AT_ONCE):
        rows = slice(start, start + BODIES_AT_ONCE)
        sides = [
            _posed(body, {name: values[chosen[rows]] for name, values in person.body.items()})
            for person, chosen in ((predicted, found), (truth, there))
            if person.body is not None
        ]
        (found_vertices, found_pelvis), (true_vertices, true_pelvis) = sides
        errors.append(pve_mm(found_vertices, true_vertices, found_pelvis, true_pelvis))
    return np.concatenate(errors)


def _posed(body: SmplBody, arrays: Mapping[str, F32]) -> tuple[F32, F32]:
    """(N, V, 3) vertices and (N, 3) pelvis."""
    import torch

    with torch.inference_mode():
        posed = body(*(torch.from_numpy(arrays[name]) for name in BODY_COLUMNS[:3]))
    pelvis = posed.keypoints_3d[:, PELVIS_KEYPOINT]
    return posed.vertices.numpy(), pelvis.numpy()


def _frames(truth: _People, box_rows: Any) -> list[FrameMatches]:
    """What average precision is made of."""
    frame_index = box_rows["frame_index"].to_numpy().astype(np.int64)
    found = smpl_arrays(box_rows)["bbox_xyxy_px"].astype(np.float64)
    score = box_rows["score"].to_numpy().astype(np.float64)
    return [
        match_frame(
            FrameBoxes(
                truth_xyxy=truth.boxes.bbox_xyxy_px[there],
                ignored=~truth.is_seen[there],
                found_xyxy=found[rows],
                score=score[rows],
            )
        )
        for there, rows in by_frame(truth.boxes.frame_index, frame_index)
    ]


def _fps(rows: Any) -> float | None:
    """Frames per second of a video, from the times of its rows; None of fewer than two frames.

    For tables that do not tell it: times in whole ms, as of Matroska, make 30.3 of 30.
    """
    frame, first = np.unique(rows["frame_index"].to_numpy(), return_index=True)
    if len(frame) < 2:
        return None
    step_s = np.median(np.diff(rows["pts_s"].to_numpy()[first]) / np.diff(frame))
    return round(1 / float(step_s), FPS_DIGITS) if step_s > 0 else None


# --- all videos --------------------------------------------------------------------------------


def _tracks_of(samples: Mapping[str, _Samples]) -> dict[str, tuple[Boxes, Boxes]]:
    return {name: one.tracks for name, one in samples.items()}


def _together(samples: Iterable[_Samples]) -> _Samples:
    """The rows of all videos as if of one; tracks stay apart."""
    all_ = list(samples)
    return _Samples(
        pose=_joined([one.pose for one in all_]),
        completed=_joined([one.completed for one in all_]),
        tracks=(Boxes.empty(), Boxes.empty()),
        frames=[frame for one in all_ for frame in one.frames],
    )


def _joined(samples: Sequence[_PoseSamples]) -> _PoseSamples:
    counts = [one.num_truth for one in samples]
    return _PoseSamples(
        num_people=sum(one.num_people for one in samples),
        num_truth=None if None in counts else sum(n for n in counts if n is not None),
        mpjpe_mm=np.concatenate([one.mpjpe_mm for one in samples]),
        pa_mpjpe_mm=np.concatenate([one.pa_mpjpe_mm for one in samples]),
        pve_mm=np.concatenate([one.pve_mm for one in samples]),
        acceleration_mm=np.concatenate([one.acceleration_mm for one in samples]),
        within=np.concatenate([one.within for one in samples]),
        fps=frozenset[float]().union(*(one.fps for one in samples)),
    )


def _mean(values: F64) -> float | None:
    return float(values.mean()) if len(values) else None


def _plain(value: Any) -> Any:
    """NaN as None, all through."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMED_VIDEOS} more" if len(names) > NAMED_VIDEOS else ""
    return (", ".join(names[:NAMED_VIDEOS]) or "none") + more

"""Boxes that somebody else found or drew: AVA csv, MOT text, PoseTrack json, Parquet.

`ava`: one csv without header: video_id, second, x1, y1, x2, y2 (0 to 1), action_id, score or
person_id. Rows of one box with several actions count once, with their best score. Placed on the
frame that is nearest in presentation time.

`mot`: a folder, or a path with ``{video_id}``, of text files: frame (from 1), id, left, top (the
corner counts from 1), width, height, confidence, more. Ids and classes are not looked at.

`posetrack`: one json, or a folder or path with ``{video_id}``: images, and annotations with
bbox = left, top, width, height. Category 1 only. The frame is the number in the image's file name,
from 0.

`parquet`: a file or a folder of parts: video_id (or video), frame_index, bbox_xyxy_px [4], score,
optionally mask_rle. The `detections` table of this package is one.

A file without scores gives every box 1. A video that does not occur has no boxes; `has_video`
tells. One csv or json is read once into sorted arrays; of Parquet only the row groups that can
hold a video are read for it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fourdh_batch.errors import BadBoxesError, ConfigError
from fourdh_batch.masks import run_lengths
from fourdh_batch.models.detector import ordered_detections, settings_digest
from fourdh_batch.storage import fingerprint_file, list_files, open_read
from fourdh_batch.types import F32, F64, I64, Bool, Detections, FrameChunk, RleMask

FORMATS = ("ava", "mot", "posetrack", "parquet")
VIDEO_ID = "{video_id}"
# Where a folder keeps a video's boxes, in the order tried: flat results, then the layout of the
# MOT challenge.
MOT_PLACES = ("{video_id}.txt", "{video_id}/det/det.txt", "{video_id}/gt/gt.txt")
POSETRACK_PLACES = ("{video_id}.json",)
AVA_COLUMNS = ("video_id", "second", "x1", "y1", "x2", "y2", "action_id", "score or person_id")
MOT_COLUMNS = ("frame", "id", "left", "top", "width", "height", "confidence")
AVA_EMPTY_COLUMNS = 2  # a key frame without anybody
AVA_MAX_COORDINATE = 1.5  # published boxes stay within [0, 1]; pixels are far beyond
POSETRACK_PERSON = 1
POSETRACK_FRAMES_PER_VIDEO = 10_000  # ids are 1, video, then four digits of the frame
CSV_HEAD_BYTES = 1 << 16  # looked at to tell the layout
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
VIDEOS_IN_MEMORY = 16  # looked-up videos that are kept; chunks of a few videos alternate
# Half the time a frame stands where a chunk has one frame only: that of 30 frames per second.
LONE_FRAME_HALF_S = 1 / 60
# Containers such as Matroska round times to milliseconds; see `nearest_rows`.
EDGE_SLACK_S = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class VideoBoxes:
    """Boxes of one video, in the order of the file.

    Attributes:
        position: (N,) 0-based frame index, or seconds for AVA.
        bbox_xyxy: (N, 4) pixels, or 0 to 1 for AVA.
        score: (N,).
        mask_counts: COCO's compressed run lengths of every box; None where there are none.
    """

    position: F64
    bbox_xyxy: F32
    score: F32
    mask_counts: Sequence[bytes] | None = None

    def take(self, rows: I64) -> VideoBoxes:
        """The boxes at these rows."""
        counts = self.mask_counts
        return VideoBoxes(
            self.position[rows],
            self.bbox_xyxy[rows],
            self.score[rows],
            None if counts is None else [counts[i] for i in rows.tolist()],
        )


class BoxSource(Protocol):
    """Where boxes come from, one per layout of files."""

    @property
    def digest(self) -> str: ...

    @property
    def gives_masks(self) -> bool: ...

    def boxes(self, video_id: str) -> VideoBoxes | None:
        """The boxes of a video, None where the source does not know it."""
        ...


class GivenDetector:
    """A detector that hands out boxes from files.

    Args:
        path: see the table above; `{video_id}` in it stands for the video's id.
        format: one of `FORMATS`, or ``auto``: by ending and content.
        fixed_score: score of every box instead of the file's, in [0, 1].
        time_offset_s: AVA only: time in the file at which the video begins.

    Raises:
        ConfigError: nothing there, or a file for all videos is not of its format.
    """

    def __init__(
        self,
        path: str,
        *,
        format: str = "auto",
        fixed_score: float | None = None,
        time_offset_s: float = 0.0,
    ) -> None:
        kind = recognise_format(path) if format == "auto" else format
        if kind not in FORMATS:
            raise ConfigError(f"boxes_format: expected auto or one of {FORMATS}, got {format!r}")
        if fixed_score is not None and not 0 <= fixed_score <= 1:
            raise ConfigError(f"boxes_score: expected 0 to 1, got {fixed_score}")
        self.name = f"boxes_{kind}"
        self._in_seconds = kind == "ava"
        self._time_offset_s = time_offset_s
        self._source = _open_source(kind, path, fixed_score)
        self.gives_masks = self._source.gives_masks
        self.digest = settings_digest(
            self._source.digest, format=kind, score=fixed_score, time_offset_s=time_offset_s
        )
        self._lookup = lru_cache(maxsize=VIDEOS_IN_MEMORY)(self._source.boxes)

    def has_video(self, video_id: str) -> bool:
        """Whether the source knows this video (it may still have no box in it)."""
        return self._lookup(video_id) is not None

    def detect(self, chunk: FrameChunk) -> Detections:
        """See `Detector.detect`.

        Raises:
            BadBoxesError: the boxes of this video cannot be used, or its id cannot be part of a
                path.
        """
        width, height = chunk.image_size_wh
        boxes = self._lookup(chunk.video_id)
        if boxes is None:
            boxes = no_boxes(with_masks=self.gives_masks)
        if self._in_seconds:
            row = nearest_rows(chunk.pts_s, boxes.position - self._time_offset_s)
        else:
            row = np.searchsorted(chunk.frame_index, boxes.position)
            row[row == chunk.num_frames] = 0
            row[chunk.frame_index[row] != boxes.position] = -1
        here = np.flatnonzero(row >= 0)
        found = boxes.take(here)
        scale = np.array([width, height] * 2 if self._in_seconds else [1] * 4, dtype=np.float32)
        return ordered_detections(
            row[here],
            found.bbox_xyxy * scale,
            found.score,
            self._masks(found, chunk.video_id, (height, width)),
        )

    def _masks(
        self, boxes: VideoBoxes, video_id: str, size_hw: tuple[int, int]
    ) -> list[RleMask] | None:
        if boxes.mask_counts is None:
            return None
        masks = [RleMask(size_hw=size_hw, counts=counts) for counts in boxes.mask_counts]
        for mask, position in zip(masks, boxes.position.tolist(), strict=True):
            try:
                run_lengths(mask)
            except ValueError as error:
                raise BadBoxesError(
                    f"mask_rle does not fit the frame: {error}",
                    video=video_id,
                    frame_index=int(position),
                    stage="detect",
                ) from error
        return masks


def nearest_rows(pts_s: F64, time_s: F64) -> I64:
    """Row of the frame nearest in time, -1 where that lies outside the chunk.

    A frame owns the time half-way to its neighbours. The frames before and after the chunk are
    not seen; they are taken to be as far away as the neighbours inside, plus `EDGE_SLACK_S`, so
    that with rounded times a key frame between two chunks is never lost (it may then be given to
    the last frame of one and the first of the next).

    Args:
        pts_s: (T,) increasing presentation times.
        time_s: (N,) wanted times.
    """
    if len(pts_s) > 1:
        before, after = (pts_s[1] - pts_s[0]) / 2, (pts_s[-1] - pts_s[-2]) / 2
    else:
        before = after = LONE_FRAME_HALF_S
    middles = (pts_s[1:] + pts_s[:-1]) / 2
    row = np.searchsorted(middles, time_s, side="right")
    first, last = pts_s[0] - before - EDGE_SLACK_S, pts_s[-1] + after + EDGE_SLACK_S
    row[(time_s < first) | (time_s > last)] = -1
    return row


def no_boxes(*, with_masks: bool = False) -> VideoBoxes:
    """A video without a box."""
    return VideoBoxes(
        position=np.zeros(0),
        bbox_xyxy=np.zeros((0, 4), dtype=np.float32),
        score=np.zeros(0, dtype=np.float32),
        mask_counts=[] if with_masks else None,
    )


# --- sources -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ParsedFile:
    """What a text file says, nothing checked yet.

    Attributes:
        video_ids: videos named in it; one empty name where it names none.
        video_code: (N,) index of each box's video in `video_ids`.
        boxes: N boxes.
        where: file and place in it of a box, for messages.
    """

    video_ids: list[str]
    video_code: I64
    boxes: VideoBoxes
    where: Callable[[int], str]


def _open_source(kind: str, path: str, fixed_score: float | None) -> BoxSource:
    if kind == "parquet":
        return ParquetBoxes(path, fixed_score)
    parse = {"ava": parse_ava, "mot": parse_mot, "posetrack": parse_posetrack}[kind]
    if VIDEO_ID in path and kind != "ava":
        return FilePerVideo([path], parse, fixed_score)
    if kind == "ava" or (kind == "posetrack" and path.lower().endswith(".json")):
        return OneFile(path, parse, fixed_score)
    if path.lower().endswith((".txt", ".csv")):
        raise ConfigError(
            f"boxes {path!r}: a MOT file does not name its video; pass its folder, or the path "
            f"with {VIDEO_ID} in place of the video's id"
        )
    places = MOT_PLACES if kind == "mot" else POSETRACK_PLACES
    return FilePerVideo([f"{path.rstrip('/')}/{place}" for place in places], parse, fixed_score)


class OneFile:
    """Boxes of many videos in one file, read once and kept sorted by video."""

    gives_masks = False

    def __init__(
        self, path: str, parse: Callable[[bytes, str], ParsedFile], fixed_score: float | None
    ) -> None:
        data = _read(path)
        self.digest = hashlib.sha256(data).hexdigest()
        self._fixed_score = fixed_score
        self._parsed = parsed = parse(data, path)
        self._order = np.argsort(parsed.video_code, kind="stable")
        codes = parsed.video_code[self._order]
        bounds = np.searchsorted(codes, np.arange(len(parsed.video_ids) + 1))
        self._bounds = dict(zip(parsed.video_ids, pairwise(bounds.tolist()), strict=True))

    def boxes(self, video_id: str) -> VideoBoxes | None:
        """See `BoxSource.boxes`."""
        if video_id not in self._bounds:
            return None
        rows = self._order[slice(*self._bounds[video_id])]
        return check_boxes(
            self._parsed.boxes.take(rows),
            lambda row: self._parsed.where(int(rows[row])),
            fixed_score=self._fixed_score,
            video_id=video_id,
        )


class FilePerVideo:
    """Boxes in one file per video, found by its id.

    Args:
        places: addresses with `{video_id}`, tried in turn.
        parse: reads such a file.
        fixed_score: see `GivenDetector`.
    """

    gives_masks = False

    def __init__(
        self,
        places: Sequence[str],
        parse: Callable[[bytes, str], ParsedFile],
        fixed_score: float | None,
    ) -> None:
        self._places = places
        self._parse = parse
        self._fixed_score = fixed_score
        folder = places[0][: places[0].index(VIDEO_ID)].rpartition("/")[0] or "."
        ending = "." + places[0].rpartition(".")[2].lower()
        files = _list(folder, ending)
        contents = sorted((name, fingerprint_file(uri)[1]) for name, uri in files)
        self.digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def boxes(self, video_id: str) -> VideoBoxes | None:
        """See `BoxSource.boxes`."""
        if not is_safe_id(video_id):
            raise BadBoxesError(
                f"the id {video_id!r} cannot be part of a path to its boxes: expected names "
                "joined by '/', none of them empty, '.' or '..', no wildcards",
                video=video_id,
                stage="detect",
            )
        for place in self._places:
            uri = place.replace(VIDEO_ID, video_id)
            try:
                with open_read(uri) as file:
                    data = file.read()
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                parsed = self._parse(data, uri)
                if len(parsed.video_ids) > 1:
                    raise ConfigError(f"{uri}: expected one video, got {parsed.video_ids}")
            except ConfigError as error:  # one bad file does not stop the other videos
                raise BadBoxesError(str(error), video=video_id, stage="detect") from error
            return check_boxes(
                parsed.boxes, parsed.where, fixed_score=self._fixed_score, video_id=video_id
            )
        return None


class ParquetBoxes:
    """Boxes in Parquet, for example the `detections` table: a file, or a folder of parts.

    Args:
        path: file or folder; names that begin with `_` or `.` are not part of a table.
        fixed_score: see `GivenDetector`.
    """

    def __init__(self, path: str, fixed_score: float | None) -> None:
        self._fixed_score = fixed_score
        self._parts: list[tuple[str, Any]] = []
        contents: list[tuple[str, str]] = []
        for name, uri in _list(path, ".parquet"):
            if name.startswith("_") or "/_" in name:
                continue
            try:
                with open_read(uri) as file:
                    metadata = pq.read_metadata(file)
            except pa.ArrowInvalid as error:
                raise ConfigError(f"boxes {uri}: not a Parquet file: {error}") from error
            self._key = _parquet_key(metadata, uri)
            self._parts.append((uri, metadata))
            contents.append((name, fingerprint_file(uri)[1]))
        if not self._parts:
            raise ConfigError(f"boxes {path!r}: no .parquet file in this folder")
        # The detections table has the column also where its detector gave no masks.
        self.gives_masks = any(_has_values(metadata, "mask_rle") for _, metadata in self._parts)
        self._columns = [self._key, "frame_index", "bbox_xyxy_px", "score"]
        if self.gives_masks:
            self._columns.append("mask_rle")
        self.digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def boxes(self, video_id: str) -> VideoBoxes | None:
        """See `BoxSource.boxes`."""
        found: list[VideoBoxes] = []
        for uri, metadata in self._parts:
            groups = [
                group
                for group in range(metadata.num_row_groups)
                if _may_hold(metadata.row_group(group), self._key, video_id)
            ]
            if not groups:
                continue
            with open_read(uri) as file:
                table = pq.ParquetFile(file, metadata=metadata).read_row_groups(
                    groups, columns=self._columns
                )
            table = table.filter(pc.equal(table[self._key], video_id))
            if len(table):
                found.append(self._boxes_of(table, video_id, uri))
        if not found:
            return None
        counts = [part.mask_counts for part in found if part.mask_counts is not None]
        return VideoBoxes(
            position=np.concatenate([part.position for part in found]),
            bbox_xyxy=np.concatenate([part.bbox_xyxy for part in found]),
            score=np.concatenate([part.score for part in found]),
            mask_counts=list(chain.from_iterable(counts)) if self.gives_masks else None,
        )

    def _boxes_of(self, table: Any, video_id: str, uri: str) -> VideoBoxes:
        for column in self._columns:
            if table[column].null_count:
                raise BadBoxesError(
                    f"{uri}: expected no null in {column}", video=video_id, stage="detect"
                )
        lengths = pc.list_value_length(table["bbox_xyxy_px"]).to_numpy()
        if np.any(lengths != 4):
            raise BadBoxesError(
                f"{uri}: expected 4 numbers per box, got {set(lengths.tolist())}",
                video=video_id,
                stage="detect",
            )
        corners = pc.list_flatten(table["bbox_xyxy_px"]).to_numpy().reshape(-1, 4)
        boxes = VideoBoxes(
            position=table["frame_index"].to_numpy().astype(np.float64),
            bbox_xyxy=corners.astype(np.float32),
            score=table["score"].to_numpy().astype(np.float32),
            mask_counts=(
                table["mask_rle"].cast(pa.binary()).to_pylist() if self.gives_masks else None
            ),
        )
        return check_boxes(
            boxes,
            lambda row: f"{uri}, frame {boxes.position[row]:.0f}",
            fixed_score=self._fixed_score,
            video_id=video_id,
        )


def _parquet_key(metadata: Any, uri: str) -> str:
    """Name of the column with the video's id.

    Raises:
        ConfigError: a column is missing.
    """
    names = set(metadata.schema.to_arrow_schema().names)
    for key in ("video_id", "video"):
        if {key, "frame_index", "bbox_xyxy_px", "score"} <= names:
            return key
    raise ConfigError(
        f"boxes {uri}: expected columns video_id (or video), frame_index, bbox_xyxy_px, score and "
        f"optionally mask_rle, got {sorted(names)}"
    )


def _statistics(row_group: Any, column: str) -> Any:
    """Parquet's statistics of a plain column, None where there are none."""
    chunks = (row_group.column(index) for index in range(row_group.num_columns))
    return next((chunk.statistics for chunk in chunks if chunk.path_in_schema == column), None)


def _may_hold(row_group: Any, column: str, value: str) -> bool:
    """Whether the statistics of a row group leave room for a value of a string column."""
    statistics = _statistics(row_group, column)
    if statistics is None or not statistics.has_min_max:
        return True
    return bool(statistics.min <= value <= statistics.max)


def _has_values(metadata: Any, column: str) -> bool:
    """Whether a column exists and is not null throughout, as far as the statistics tell."""
    if column not in metadata.schema.to_arrow_schema().names:
        return False
    for index in range(metadata.num_row_groups):
        row_group = metadata.row_group(index)
        statistics = _statistics(row_group, column)
        if statistics is None or statistics.null_count != row_group.num_rows:
            return True
    return False


def check_boxes(
    boxes: VideoBoxes,
    where: Callable[[int], str],
    *,
    fixed_score: float | None,
    video_id: str,
) -> VideoBoxes:
    """The boxes of a video, with the fixed score where there is one.

    Raises:
        BadBoxesError: a box is not finite or its corners are the wrong way round, a position is
            before the start, or a score is outside [0, 1]; names the first.
    """
    if fixed_score is not None:
        boxes = replace(boxes, score=np.full(len(boxes.score), fixed_score, dtype=np.float32))
    box, score = boxes.bbox_xyxy, boxes.score
    position = boxes.position
    is_ordered = (box[:, 2] >= box[:, 0]) & (box[:, 3] >= box[:, 1])
    checks: list[tuple[Bool, NDArray[Any], str]] = [
        (
            np.isfinite(position) & (position >= 0),
            position,
            "a frame or time that is not before the start",
        ),
        (np.isfinite(box.sum(axis=1)), box, "finite corners"),
        (is_ordered, box, "left <= right and top <= bottom"),
        (
            (score >= 0) & (score <= 1),
            score,
            "a score from 0 to 1 (boxes_score replaces the file's scores)",
        ),
    ]
    for is_good, values, expected in checks:
        if not is_good.all():
            row = int(np.argmin(is_good))
            raise BadBoxesError(
                f"{where(row)}: expected {expected}, got {values[row].tolist()}",
                video=video_id,
                stage="detect",
            )
    return boxes


# --- text files --------------------------------------------------------------------------------


def parse_ava(data: bytes, uri: str) -> ParsedFile:
    """Boxes of an AVA csv, each once, with the best score of its rows.

    The last column holds scores where any of its values has a decimal point, else people's ids.

    Raises:
        ConfigError: a line that is not of this layout.
    """
    table, lines = _read_csv(data, uri, AVA_COLUMNS, at_least=6, skipped=AVA_EMPTY_COLUMNS)
    names = pc.dictionary_encode(table["video_id"].combine_chunks())
    video_ids = names.dictionary.to_pylist()
    video_code = names.indices.to_numpy().astype(np.int64)
    second = _numbers(table, "second", uri, lines)
    box = np.stack([_numbers(table, name, uri, lines) for name in AVA_COLUMNS[2:6]], axis=1)
    too_large = np.abs(box).max(axis=1, initial=0) > AVA_MAX_COORDINATE
    if too_large.any():
        row = int(np.argmax(too_large))
        raise ConfigError(
            f"{uri}, line {lines[row]}: expected corners from 0 to 1, got {box[row].tolist()}"
        )
    score = person = np.ones(len(second))
    last = AVA_COLUMNS[7]
    if last in table.column_names:
        values = _numbers(table, last, uri, lines)
        has_point = pc.any(pc.match_substring(table[last], ".")).as_py()
        score, person = (values, person) if has_point else (score, values)

    # Rows that differ in action and score only are one box.
    keys = np.column_stack([person, box, second, video_code])
    order = np.lexsort(keys.T)  # stable: the first row of a box comes first
    is_new = np.any(np.diff(keys[order], axis=0, prepend=np.nan) != 0, axis=1)
    starts = np.flatnonzero(is_new)
    best = np.maximum.reduceat(score[order], starts) if len(starts) else score
    in_file = np.argsort(order[starts])
    kept, best = order[starts][in_file], best[in_file]
    return ParsedFile(
        video_ids,
        video_code[kept],
        VideoBoxes(second[kept], box[kept].astype(np.float32), best.astype(np.float32)),
        lambda row: f"{uri}, line {lines[kept[row]]}",
    )


def parse_mot(data: bytes, uri: str) -> ParsedFile:
    """Boxes of one video in MOT's text format; frames and corners count from 1.

    Raises:
        ConfigError: a line that is not of this layout.
    """
    table, lines = _read_csv(data, uri, MOT_COLUMNS, at_least=6)
    frame = _numbers(table, "frame", uri, lines)
    is_whole = frame == np.floor(frame)
    if not is_whole.all():
        row = int(np.argmin(is_whole))
        raise ConfigError(f"{uri}, line {lines[row]}: expected a whole frame, got {frame[row]}")
    x, y, w, h = (_numbers(table, name, uri, lines) for name in MOT_COLUMNS[2:6])
    score = np.ones(len(frame))
    if "confidence" in table.column_names:
        score = _numbers(table, "confidence", uri, lines)
    box = np.column_stack([x - 1, y - 1, x - 1 + w, y - 1 + h])
    return ParsedFile(
        [""],
        np.zeros(len(frame), dtype=np.int64),
        VideoBoxes(frame - 1, box.astype(np.float32), score.astype(np.float32)),
        lambda row: f"{uri}, line {lines[row]}",
    )


def parse_posetrack(data: bytes, uri: str) -> ParsedFile:
    """Boxes of a PoseTrack (COCO) json of one or several videos.

    A video is called like the folder in `file_name`, or else `vid_id`. The frame is the number
    that `file_name` ends with, or else the last four digits of `frame_id` or `id`.

    Raises:
        ConfigError: not json, or an entry lacks what is needed.
    """
    try:
        content = json.loads(data)
        images, annotations = content["images"], content["annotations"]
        places = {image["id"]: posetrack_place(image) for image in images}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{uri}: expected json with images (id, file_name) and annotations, got {error!r}"
        ) from error
    video_ids = sorted({video for video, _ in places.values()})
    code_of = {video: code for code, video in enumerate(video_ids)}

    entries: list[int] = []
    codes: list[int] = []
    rows: list[tuple[float, ...]] = []
    for entry, annotation in enumerate(annotations):
        try:
            if annotation.get("category_id", POSETRACK_PERSON) != POSETRACK_PERSON:
                continue
            video, frame = places[annotation["image_id"]]
            x, y, w, h = annotation["bbox"]
            rows.append((frame, x, y, x + w, y + h, annotation.get("score", 1)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{uri}, annotation {entry}: expected image_id of an image and bbox of 4 numbers, "
                f"got {error!r}"
            ) from error
        entries.append(entry)
        codes.append(code_of[video])
    try:
        values = np.array(rows, dtype=np.float64).reshape(-1, 6)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{uri}: expected numbers in bbox and score, got {error}") from error
    return ParsedFile(
        video_ids,
        np.array(codes, dtype=np.int64),
        VideoBoxes(
            values[:, 0], values[:, 1:5].astype(np.float32), values[:, 5].astype(np.float32)
        ),
        lambda row: f"{uri}, annotation {entries[row]}",
    )


def posetrack_place(image: dict[str, Any]) -> tuple[str, int]:
    """Video and 0-based frame of an entry of `images`."""
    name = PurePosixPath(image.get("file_name", ""))
    video = name.parent.name or str(image.get("vid_id", ""))
    digits = re.search(r"\d+$", name.stem)
    if digits:
        return video, int(digits.group())
    return video, int(image.get("frame_id", image["id"])) % POSETRACK_FRAMES_PER_VIDEO


def _read_csv(
    data: bytes, uri: str, names: Sequence[str], *, at_least: int, skipped: int = -1
) -> tuple[Any, I64]:
    """The named leading columns of a csv without header, as text, and the line of every row.

    Args:
        names: of the leading columns; a file may have more or fewer.
        at_least: columns that a file must have.
        skipped: rows with so many columns are passed over.

    Raises:
        ConfigError: a line has another number of columns, or is not UTF-8.
    """
    head = data[:CSV_HEAD_BYTES].split(b"\n")
    num_columns = max(line.count(b",") + 1 for line in head)
    if not data.strip():
        num_columns = len(names)
        data = b"," * (num_columns - 1)  # a file without boxes: one empty line, dropped below
    if num_columns < at_least:
        raise ConfigError(
            f"{uri}: expected at least {at_least} columns ({', '.join(names)}), got {num_columns}"
        )
    all_names = [*names, *(f"column {i + 1}" for i in range(len(names), num_columns))]
    all_names = all_names[:num_columns]
    passed_over: list[int] = []
    wrong: list[str] = []

    def on_other_width(row: Any) -> str:
        if row.actual_columns != skipped and not wrong:
            wrong.append(
                f"{uri}, line {row.number}: expected {num_columns} columns, "
                f"got {row.actual_columns}: {row.text[:80]!r}"
            )
        passed_over.append(row.number)
        return "skip"

    try:
        table = pacsv.read_csv(
            io.BytesIO(data),
            read_options=pacsv.ReadOptions(use_threads=False, column_names=all_names),
            parse_options=pacsv.ParseOptions(
                ignore_empty_lines=False, invalid_row_handler=on_other_width
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(all_names, pa.string()),
                include_columns=all_names[: len(names)],
            ),
        )
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{uri}: {error}") from error
    if wrong:
        raise ConfigError(wrong[0])
    lines = np.arange(1, len(table) + len(passed_over) + 1)
    lines = np.delete(lines, np.array(passed_over, dtype=np.int64) - 1)
    is_filled = np.zeros(len(table), dtype=np.bool_)  # an empty line gives empty values
    for column in table.columns:
        is_filled |= pc.not_equal(column, "").to_numpy()
    return table.filter(pa.array(is_filled)), lines[is_filled]


def _numbers(table: Any, column: str, uri: str, lines: I64) -> F64:
    """A column of a csv as float64.

    Raises:
        ConfigError: a value is not a number; names the first.
    """
    text = pc.utf8_trim_whitespace(table[column])
    try:
        return np.asarray(text.cast(pa.float64()).to_numpy())
    except pa.ArrowInvalid as error:
        numbers = pc.match_substring_regex(text, NUMBER).to_numpy()
        row = int(np.argmin(numbers))
        raise ConfigError(
            f"{uri}, line {lines[row]}: expected a number in column {column}, "
            f"got {text[row].as_py()!r}"
        ) from error


# --- finding files -----------------------------------------------------------------------------


def is_safe_id(video_id: str) -> bool:
    """Whether an id, put into a path, can only name something below it."""
    return (
        video_id.isprintable()
        and not any(part in ("", ".", "..") for part in video_id.split("/"))
        and not set(video_id) & set("\\*?[]{}")
    )


def recognise_format(path: str) -> str:
    """The format behind a path, by ending and content.

    Raises:
        ConfigError: nothing there, or nothing that is recognised.
    """
    if VIDEO_ID in path:
        names = [path]
    else:
        files = _list(path, "")
        if [name for name, _ in files] == [PurePosixPath(path).name]:
            return _recognise_content(path)
        names = [name for name, _ in files]
    for ending, kind in ((".parquet", "parquet"), (".txt", "mot"), (".json", "posetrack")):
        if any(name.lower().endswith(ending) for name in names):
            return kind
    raise ConfigError(
        f"boxes {path!r}: expected .parquet, .txt (MOT) or .json (PoseTrack) files, "
        f"got {names[:3]}; or pass boxes_format"
    )


def _recognise_content(path: str) -> str:
    with open_read(path) as file:
        head = file.read(CSV_HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.lstrip().startswith(b"{"):
        return "posetrack"
    fields = head.strip().split(b"\n")[0].split(b",")
    corners = [field for field in fields[2:6] if re.fullmatch(NUMBER.encode(), field.strip())]
    if len(corners) == 4:
        return "ava" if all(abs(float(c)) <= AVA_MAX_COORDINATE for c in corners) else "mot"
    if len(fields) == AVA_EMPTY_COLUMNS:
        return "ava"
    raise ConfigError(
        f"boxes {path!r}: expected Parquet, json, or lines of an AVA csv "
        f"({', '.join(AVA_COLUMNS)}), got {head[:80]!r}; or pass boxes_format"
    )


def _list(path: str, ending: str) -> list[tuple[str, str]]:
    """(name below the path, address) of its files; of a single file just that."""
    try:
        return [(name, uri) for name, uri, _ in list_files(path, [ending])]
    except FileNotFoundError as error:
        raise ConfigError(f"boxes {path!r}: no such file or folder") from error


def _read(path: str) -> bytes:
    try:
        with open_read(path) as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"boxes {path!r}: no such file") from error

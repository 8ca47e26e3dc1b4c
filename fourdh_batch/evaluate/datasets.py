"""The user's own copies of the published benchmarks, in the formats of the published evaluation.

`N` people, `T` frames of a sequence. Nothing here executes what it reads: arrays of objects and
EMDB's pickles go through the restricted unpickler. All addresses may be remote.

Sources: 4D-Humans' evaluation data and code (npz of 3DPW, Human3.6M, LSP-Extended, COCO and
PoseTrack); the annotations of PoseTrack 2018; the data set overview of EMDB; the csv of AVA.
"""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fourdh_batch.errors import DAMAGED_NPZ, CheckpointError, ConfigError
from fourdh_batch.evaluate.matching import Boxes
from fourdh_batch.geometry import axis_angle_to_rotmat
from fourdh_batch.models.detector_given import posetrack_place
from fourdh_batch.models.unpickle import load_restricted_pickle
from fourdh_batch.storage import Store, open_read, redact_uri
from fourdh_batch.types import F32, F64, I64, NUM_BETAS, NUM_BODY_JOINTS, NUM_KEYPOINTS, Bool

NUM_ACTIONS = 80  # of AVA
NUM_OPENPOSE = 25  # `body_keypoints_*`; the others are `extra_keypoints_*`
# OpenPose's neck, shoulders, arms, hips, legs and feet: no data set has them in space.
NO_TRUTH_IN_SPACE = tuple(range(1, 15))


_TOO_MUCH = (OverflowError, RecursionError)  # of numbers; of brackets


@dataclass(frozen=True, slots=True, eq=False)
class PeopleSet:
    """People in still images.

    Attributes:
        source: where it was read from.
        image: N names, relative to the data set's folder of images.
        center_px: (N, 2) of the person's box.
        size_px: (N, 2) width and height of the box, before it grows to the aspect of the crop.
            Some data sets bring one number for both.
        keypoints_2d_px: (N, 44, 3) x, y, confidence; 0 where not annotated.
        keypoints_3d_m: (N, 44, 4) x, y, z in camera axes, confidence; 0 where not annotated.
    """

    source: str
    image: list[str]
    center_px: F32
    size_px: F32
    keypoints_2d_px: F32
    keypoints_3d_m: F32

    def __len__(self) -> int:
        return len(self.image)


def load_people(uri: str) -> PeopleSet:
    """One of the published `.npz` of `hmr2_evaluation_data`.

    Fields: `imgname` (N,), `center` (N, 2) px, `scale` (N,), (N, 1) or (N, 2) px (not divided by
    200), and those that there are of `body_keypoints_2d` (N, 25, 3), `extra_keypoints_2d`
    (N, 19, 3), `body_keypoints_3d` (N, 25, 4), `extra_keypoints_3d` (N, 19, 4). All other fields
    are left unread.

    Raises:
        ConfigError: a field is missing or has another shape.
        FileNotFoundError: there is no such file.
    """
    with _Npz(uri) as npz:
        names = npz.read("imgname")
        if names.ndim != 1 or names.dtype.kind not in "USO":
            raise ConfigError(
                f"{npz.name}: imgname: expected (N,) names, got {names.shape} {names.dtype}"
            )
        image = [_text(name) for name in names.tolist()]
        n = len(image)
        center = npz.floats("center", (n, 2))
        scale = npz.read("scale")
        if scale.shape not in ((n,), (n, 1), (n, 2)):
            raise ConfigError(f"{npz.name}: scale: expected ({n},) or ({n}, 2), got {scale.shape}")
        try:
            size = np.broadcast_to(scale.reshape(n, -1 if n else 1), (n, 2)).astype(np.float32)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{npz.name}: scale: expected numbers, got {error}") from error
        if not np.isfinite(center).all():
            raise ConfigError(f"{npz.name}: center: expected finite numbers, got NaN or infinity")
        if n and not (np.isfinite(size).all() and (size > 0).all()):
            raise ConfigError(f"{npz.name}: scale: expected more than 0 px, got {size.min()}")
        return PeopleSet(
            source=npz.name,
            image=image,
            center_px=center,
            size_px=size,
            keypoints_2d_px=npz.keypoints("2d", n, 3),
            keypoints_3d_m=_without_guesses(npz.keypoints("3d", n, 4)),
        )


def _without_guesses(keypoints_3d: F32) -> F32:
    keypoints_3d[:, NO_TRUTH_IN_SPACE, 3] = 0
    return keypoints_3d


# --- PoseTrack ---------------------------------------------------------------------------------


def load_posetrack(uri: str) -> dict[str, Boxes]:
    """True boxes and identities of PoseTrack 2018.

    Args:
        uri: a `.json` of one video, or a folder of them.

    Returns:
        By video: the name of the folder in `images[].file_name`. Frames are the numbers that
        `file_name` ends with. Annotations without a box or without a `track_id` do not count.

    Raises:
        ConfigError: nothing there, or not of this layout.
    """
    videos: dict[str, list[tuple[int, int, list[float]]]] = {}
    for name, data in _files(uri, ".json"):
        try:
            content = json.loads(data)
            places = {image["id"]: posetrack_place(image) for image in content["images"]}
            for person in content["annotations"]:
                video, frame = places[person["image_id"]]
                if not person.get("bbox") or person.get("track_id") is None:
                    continue
                x, y, w, h = map(float, person["bbox"])
                if not math.isfinite(x + y + w + h):
                    raise ValueError(f"bbox {person['bbox']}")
                place = (int(np.int64(frame)), int(np.int64(person["track_id"])))
                videos.setdefault(video, []).append((*place, [x, y, x + w, y + h]))
        except (ValueError, KeyError, TypeError, AttributeError, *_TOO_MUCH) as error:
            raise ConfigError(
                f"{name}: expected json with images (id, file_name) and annotations (image_id, "
                f"track_id, bbox), got {error!r}"
            ) from error
    if not videos:
        raise ConfigError(f"{redact_uri(uri)}: expected annotated people in .json files, got none")
    boxes = {}
    for video, rows in videos.items():
        frames, tracks, corners = zip(*rows, strict=True)
        boxes[video] = Boxes(
            np.array(frames, np.int64), np.array(tracks, np.int64), np.array(corners, np.float64)
        )
    return boxes


# --- EMDB --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class EmdbSequence:
    """One person in one video of EMDB.

    Attributes:
        name: e.g. ``P1_14_outdoor_climb``.
        gender: ``female``, ``male`` or ``neutral``: the SMPL file that the truth is meant for.
        is_emdb1: part of the set on which poses in camera axes are compared.
        images: folder of the frames, named by five digits from ``00000.jpg`` on.
        is_good: (T,) the person can be seen and has a box.
        bbox_xyxy_px: (T, 4).
        global_orient: (T, 1, 3, 3) in camera axes.
        body_pose: (T, 23, 3, 3).
        betas: (10,).
    """

    name: str
    gender: str
    is_emdb1: bool
    images: str
    is_good: Bool
    bbox_xyxy_px: F32
    global_orient: F32
    body_pose: F32
    betas: F32


def load_emdb(root: str) -> Iterator[EmdbSequence]:
    """The sequences below a folder of EMDB, one after another, by name.

    Raises:
        ConfigError: there is none, or a file is not of this layout.
        CheckpointError: a file is no pickle of plain data.
    """
    keys = [key for key, _ in Store(root).list() if key.endswith("_data.pkl")]
    if not keys:
        raise ConfigError(f"{redact_uri(root)}: expected P0/.../*_data.pkl of EMDB, got none")
    for key in keys:
        name = f"{redact_uri(root)}/{key}"
        with Store(root).open_read(key) as file:
            content = load_restricted_pickle(io.BytesIO(file.read()))
        try:
            yield _emdb_sequence(cast(Any, content), f"{root.rstrip('/')}/{key.rpartition('/')[0]}")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"{name}: expected the fields of EMDB, got {error!r}") from error


def _emdb_sequence(content: Any, folder: str) -> EmdbSequence:
    smpl, num = content["smpl"], int(content["n_frames"])
    to_camera = np.asarray(content["camera"]["extrinsics"], np.float64)[:, :3, :3]
    root = axis_angle_to_rotmat(np.asarray(smpl["poses_root"], np.float64).reshape(num, 3))
    pose = np.asarray(smpl["poses_body"], np.float64).reshape(num, NUM_BODY_JOINTS, 3)
    box = np.asarray(content["bboxes"]["bboxes"], np.float32).reshape(num, 4)
    is_good = np.array(content["good_frames_mask"], np.bool_).reshape(num)
    is_good[np.asarray(content["bboxes"]["invalid_idxs"], np.int64)] = False
    is_good &= np.isfinite(box).all(axis=1) & (box[:, 2:] > box[:, :2]).all(axis=1)
    global_orient = to_camera @ root
    betas = np.asarray(smpl["betas"], np.float32).reshape(-1)[:NUM_BETAS]
    for what, array in (("root", global_orient), ("body", pose)):
        if not (np.isfinite(array[is_good]).all() and np.isfinite(betas).all()):
            raise ValueError(f"{what} or betas of a good frame are not finite")
    return EmdbSequence(
        name=str(content["name"]),
        gender=str(content["gender"]),
        is_emdb1=bool(content["emdb1"]),
        images=f"{folder}/images",
        is_good=is_good,
        bbox_xyxy_px=box,
        global_orient=global_orient[:, None].astype(np.float32),
        body_pose=axis_angle_to_rotmat(pose).astype(np.float32),
        betas=betas,
    )


# --- AVA ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ActionBoxes:
    """Rows of an AVA csv: one action of one person in one second.

    Attributes:
        frame: (M,) `video,second`, the second with four digits.
        bbox_xyxy: (M, 4) from 0 to 1 of width and height.
        action_id: (M,) 1 to 80; 0 of a frame, or a person in it, without a label.
        score: (M,) of predictions; 1 of truth.
    """

    frame: NDArray[np.str_]
    bbox_xyxy: F64
    action_id: I64
    score: F64

    def take(self, rows: NDArray[Any]) -> ActionBoxes:
        """Some rows, by a mask or by indices."""
        return ActionBoxes(
            self.frame[rows], self.bbox_xyxy[rows], self.action_id[rows], self.score[rows]
        )


def load_ava_actions(uri: str, *, scored: bool) -> ActionBoxes:
    """Labels or predictions of AVA: video, second, x1, y1, x2, y2, action and, scored, a score.

    A line may end after the second (nobody there) or have no action (nobody labelled them).

    Raises:
        ConfigError: a line that is not of this layout.
    """
    frames: list[str] = []
    rows: list[list[float]] = []
    for line, row in _csv_rows(uri):
        try:
            frames.append(_ava_frame(row))
            if len(row) == 2 or (not scored and row[6] == ""):
                rows.append([0.0] * 6)
            else:
                action, score = int(row[6]), float(row[7]) if scored else 1.0
                values = [*map(float, row[2:6]), score]
                if not (1 <= action <= NUM_ACTIONS and all(map(math.isfinite, values))):
                    raise ValueError("out of range")
                rows.append([*values[:4], action, score])
        except (ValueError, IndexError) as error:
            raise ConfigError(
                f"{redact_uri(uri)}, line {line}: expected video, second, x1, y1, x2, y2, action"
                f"{', score' if scored else ''}, got {','.join(row)!r}"
            ) from error
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return ActionBoxes(
        np.array(frames, dtype=np.str_), table[:, :4], table[:, 4].astype(np.int64), table[:, 5]
    )


def load_ava_excluded(uri: str) -> set[str]:
    """Frames that do not count, as in `ActionBoxes.frame`, of a csv of video, second.

    Raises:
        ConfigError: a line that is not of this layout.
    """
    frames = set()
    for line, row in _csv_rows(uri):
        try:
            frames.add(_ava_frame(row))
        except (ValueError, IndexError) as error:
            raise ConfigError(
                f"{redact_uri(uri)}, line {line}: expected video, second, got {','.join(row)!r}"
            ) from error
    return frames


def _ava_frame(row: list[str]) -> str:
    return f"{row[0]},{int(row[1]):04d}"


def _csv_rows(uri: str) -> Iterator[tuple[int, list[str]]]:
    with open_read(uri) as file:
        try:
            text = file.read().decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{redact_uri(uri)}: expected csv in UTF-8, got {error}") from error
    lines = enumerate(csv.reader(io.StringIO(text)), start=1)
    try:
        yield from ((line, row) for line, row in lines if row)
    except csv.Error as error:
        raise ConfigError(f"{redact_uri(uri)}: expected csv, got {error}") from error


# --- files -------------------------------------------------------------------------------------


def _files(uri: str, ending: str) -> Iterator[tuple[str, bytes]]:
    """A file, or the files of a folder with this ending; names and contents."""
    if uri.endswith(ending):
        with open_read(uri) as file:
            yield redact_uri(uri), file.read()
        return
    store = Store(uri)
    for key, _ in store.list():
        if key.endswith(ending):
            yield f"{redact_uri(uri)}/{key}", store.read_bytes(key)


class _Npz:
    """Some arrays of an npz; the others are never decoded."""

    def __init__(self, uri: str) -> None:
        self.name = redact_uri(uri)
        self._file = open_read(uri)
        try:
            self._zip = zipfile.ZipFile(self._file)
        except zipfile.BadZipFile as error:
            self._file.close()
            raise ConfigError(f"{self.name}: expected an .npz, got {error}") from error

    def __enter__(self) -> _Npz:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
        self._file.close()

    def __contains__(self, field: str) -> bool:
        return f"{field}.npy" in self._zip.namelist()

    def read(self, field: str) -> NDArray[Any]:
        """An array; one of objects (published files hold some) as the plain values in it."""
        if field not in self:
            names = sorted(name.removesuffix(".npy") for name in self._zip.namelist())
            raise ConfigError(f"{self.name}: expected the field {field!r}, got {names}")
        try:
            stream = io.BytesIO(self._zip.read(f"{field}.npy"))
            version = np.lib.format.read_magic(stream)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            _, _, dtype = read_header(stream)
            if dtype.hasobject:
                return np.asarray(load_restricted_pickle(stream))
            stream.seek(0)
            return np.asarray(np.load(stream, allow_pickle=False))
        except (*DAMAGED_NPZ, ValueError, KeyError, EOFError, CheckpointError) as error:
            raise ConfigError(
                f"{self.name}: {field}: expected an array of numbers or text, got {error}"
            ) from error

    def floats(self, field: str, shape: tuple[int, ...]) -> F32:
        """An array of this shape.

        Raises:
            ConfigError: it has another.
        """
        array = self.read(field)
        if array.shape != shape or array.dtype.kind not in "fiu":
            raise ConfigError(
                f"{self.name}: {field}: expected {shape} numbers, got {array.shape} {array.dtype}"
            )
        return array.astype(np.float32)

    def keypoints(self, kind: str, num: int, width: int) -> F32:
        """(num, 44, width); zeros for the half that the file lacks."""
        halves = {
            f"body_keypoints_{kind}": NUM_OPENPOSE,
            f"extra_keypoints_{kind}": NUM_KEYPOINTS - NUM_OPENPOSE,
        }
        return np.concatenate(
            [
                self.floats(field, (num, count, width))
                if field in self
                else np.zeros((num, count, width), np.float32)
                for field, count in halves.items()
            ],
            axis=1,
        )


def _text(name: object) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)

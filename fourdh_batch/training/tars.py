"""People of WebDataset tars in the published training layout of HMR 2.0.

A sample is some files of one name: `KEY.jpg` (or jpeg, png) and `KEY.data.pyd`, a pickle of a list
of people, read by the restricted unpickler. Other files, such as `KEY.detection.npz`, are not
needed. Of a person: `keypoints_2d` (44, 3) px, `keypoints_3d` (44, 4) m, `center` (2) px, `scale`
(2) in 200 px, `body_pose` (72) axis-angle with the root first, `betas` (10), `has_body_pose`,
`has_betas`, and sometimes `extra_info.fitting_loss.reprojection_loss`.

Source: data sets and data filters of the published training code.
"""

from __future__ import annotations

import io
import logging
import re
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, cast

import cv2
import numpy as np

from fourdh_batch.errors import CheckpointError, TrainingError
from fourdh_batch.evaluate.pose import PELVIS_KEYPOINT
from fourdh_batch.geometry import SCALE_UNIT_PX, axis_angle_to_rotmat, crop_square
from fourdh_batch.models.unpickle import load_restricted_pickle
from fourdh_batch.storage import list_files, open_read
from fourdh_batch.training.examples import Person
from fourdh_batch.training.pose_histogram import PoseHistogram
from fourdh_batch.types import F32, NUM_BETAS, NUM_KEYPOINTS, U8

logger = logging.getLogger(__name__)

LANES = 8  # tars open at once; consecutive numbers go round them
VISIT = 1000  # people that are taken from a tar before the next is drawn
MAX_ATTEMPTS = 100  # unusable tars or pictures in a row
MAX_IMAGE_BYTES = 64 * 2**20

# The published filters.
MIN_CONFIDENCE = 0.3  # keypoints below count as unknown
MIN_KEYPOINTS = 5  # people need so many known keypoints
MAX_REPROJECTION_LOSS = 31_000.0  # of the fit that the parameters come from
MAX_BETA = 3.0
# Of AIC; the published code skips them.
CORRUPT_KEYS = frozenset(
    f"{folder}/{key}"
    for folder in ("aic-train", "aic-train-vitpose")
    for key in (
        "0a047f0124ae48f8eee15a9506ce1449ee1ba669",
        "1a703aa174450c02fbc9cfbf578a5435ef403689",
        "0394e6dc4df78042929b891dbc24f0fd7ffb6b6d",
        "5c032b9626e410441544c7669123ecc4ae077058",
        "ca018a7b4c5f53494006ebeeff9b4c0917a55f07",
        "4a77adb695bef75a5d34c04d589baf646fe2ba35",
        "a0689017b1065c664daef4ae2d14ea03d543217e",
        "39596a45cbd21bed4a5f9c2342505532f8ec5cbb",
        "3d33283b40610d87db660b62982f797d50a7366b",
    )
)
_IMAGES = ("jpg", "jpeg", "png")
_NO_RECORD = (ValueError, TypeError, AttributeError)
_COUNTING = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True, eq=False)
class _Labelled:
    """A person whose picture is still in the tar; fields as of `Person`."""

    offset: int
    num_bytes: int
    center_px: F32
    size_px: F32
    keypoints_2d: F32
    keypoints_3d: F32
    pose: F32  # (72,) axis-angle
    betas: F32
    has_pose: float
    has_betas: float


class TarPeople:
    """See `data.PeopleSource`.

    Args:
        path: a tar, a folder or prefix of tars, or names with a counting part `{000000..000312}`.
        seed: of the order.
        histogram: of plausible poses; None: every pose passes.

    Raises:
        FileNotFoundError: there is no tar.
    """

    def __init__(self, path: str, *, seed: int, histogram: PoseHistogram | None = None) -> None:
        self._uris = tar_uris(path)
        self._seed = seed
        self._histogram = histogram
        self._tars: OrderedDict[int, tuple[BinaryIO, list[_Labelled]]] = OrderedDict()

    def person(self, number: int) -> Person:
        """See `data.PeopleSource`.

        Raises:
            TrainingError: tar after tar, or picture after picture, is of no use.
        """
        place, lane = divmod(number, LANES)
        visit, at = divmod(place, VISIT)
        draw = partial(np.random.default_rng, (self._seed, lane, visit))
        file, people = self._people(draw())
        order = draw().permutation(len(people))
        for attempt in range(MAX_ATTEMPTS):
            labelled = people[int(order[(at + attempt) % len(people)])]
            image = _image(file, labelled)
            if image is not None:
                return _person(image, labelled)
            logger.warning("a picture of %s cannot be decoded", getattr(file, "name", "a tar"))
        raise TrainingError(f"{MAX_ATTEMPTS} pictures in a row cannot be decoded")

    def __del__(self) -> None:
        for file, _ in getattr(self, "_tars", {}).values():
            file.close()

    def _people(self, random: np.random.Generator) -> tuple[BinaryIO, list[_Labelled]]:
        """An opened tar and the people of it that pass, one or more."""
        for _ in range(min(MAX_ATTEMPTS, 10 * len(self._uris))):
            row = int(random.integers(len(self._uris)))
            if row not in self._tars:
                while len(self._tars) >= LANES:
                    self._tars.popitem(last=False)[1][0].close()
                file = open_read(self._uris[row])
                self._tars[row] = file, []  # so that it is closed whatever comes
                self._tars[row] = file, self._index(file, self._uris[row])
            self._tars.move_to_end(row)
            if self._tars[row][1]:
                return self._tars[row]
        raise TrainingError(f"{self._uris[0]} and others: nobody passes the filters")

    def _index(self, file: BinaryIO, uri: str) -> list[_Labelled]:
        people: list[_Labelled] = []
        try:
            for key, fields in _samples(file):
                image = next((fields[name] for name in _IMAGES if name in fields), None)
                if image is None or "data.pyd" not in fields or key in CORRUPT_KEYS:
                    continue
                records = load_restricted_pickle(io.BytesIO(_read(file, *fields["data.pyd"])))
                for record in cast(Sequence[Mapping[str, Any]], records):
                    labelled = _filtered(record, image, self._histogram)
                    if labelled:
                        people.append(labelled)
        except (CheckpointError, tarfile.TarError, LookupError, *_NO_RECORD) as error:
            raise TrainingError(f"{uri}: not in the training layout: {error}") from error
        return people


def tar_uris(path: str) -> list[str]:
    """Addresses of tars; see `TarPeople`.

    Raises:
        FileNotFoundError: there is no tar.
        ValueError: a counting part counts down.
    """
    match = _COUNTING.search(path)
    if match:
        first, last = int(match[1]), int(match[2])
        if last < first:
            raise ValueError(f"{path}: expected a range that counts up")
        width = len(match[1])
        head, tail = path[: match.start()], path[match.end() :]
        return [f"{head}{n:0{width}d}{tail}" for n in range(first, last + 1)]
    found = sorted(uri for _, uri, _ in list_files(path, (".tar",)))
    if not found:
        raise FileNotFoundError(f"{path}: no .tar there")
    return found


def _samples(file: BinaryIO) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Key and fields of every sample in a tar: offset and length by extension."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            if member.isreg() and dot:
                fields = samples.setdefault(f"{folder}{slash}{stem}", {})
                fields[extension.lower()] = member.offset_data, member.size
    return list(samples.items())


def _filtered(
    record: Mapping[str, Any], image: tuple[int, int], histogram: PoseHistogram | None
) -> _Labelled | None:
    """A person after the published filters, in their order; None where the person is left out."""
    keypoints_2d = _known(_array(record, "keypoints_2d", NUM_KEYPOINTS, 3))
    keypoints_2d[keypoints_2d[:, 2] < MIN_CONFIDENCE, 2] = 0
    betas, pose = _array(record, "betas", NUM_BETAS), _array(record, "body_pose", 72)
    has_betas = _flag(record["has_betas"]) and bool((np.abs(betas) <= MAX_BETA).all())
    is_pose = bool(np.isfinite(pose).all())
    has_pose = _flag(record["has_body_pose"]) and is_pose
    has_pose = has_pose and (histogram is None or histogram.allows(pose[3:]))
    has_both = has_betas and has_pose
    if (keypoints_2d[:, 2] > 0).sum() < MIN_KEYPOINTS:
        return None
    losses = (record.get("extra_info") or {}).get("fitting_loss") or {}
    loss = losses.get("reprojection_loss")
    if loss is not None and not float(loss) < MAX_REPROJECTION_LOSS:
        return None
    size = _array(record, "scale", 2) * SCALE_UNIT_PX
    center = _array(record, "center", 2)
    if not (np.isfinite(center).all() and (size >= 1).all() and np.isfinite(size).all()):
        return None
    if not (center + size / 2 > center - size / 2).all():  # so far away that nothing is left
        return None
    keypoints_3d = _array(record, "keypoints_3d", NUM_KEYPOINTS, 4)
    if not np.isfinite(keypoints_3d[PELVIS_KEYPOINT]).all():  # which they are counted from
        keypoints_3d = np.zeros_like(keypoints_3d)
    return _Labelled(
        *image,
        center_px=center,
        size_px=size,
        keypoints_2d=keypoints_2d,
        keypoints_3d=_known(keypoints_3d),
        pose=pose if is_pose else np.zeros_like(pose),
        # Without known betas the target is the mean shape, and it counts.
        betas=betas if has_both else np.zeros_like(betas),
        has_pose=float(has_both),
        has_betas=1.0,
    )


def _person(image: U8, labelled: _Labelled) -> Person:
    half = labelled.size_px / 2
    center, size = crop_square(
        np.concatenate((labelled.center_px - half, labelled.center_px + half))
    )
    rotations = axis_angle_to_rotmat(labelled.pose.reshape(-1, 3)).astype(np.float32)
    return Person(
        image=image,
        box_center_px=center,
        box_size_px=float(size),
        longer_side_px=float(labelled.size_px.max()),
        keypoints_2d=labelled.keypoints_2d,
        keypoints_3d=labelled.keypoints_3d,
        global_orient=rotations[:1],
        body_pose=rotations[1:],
        betas=labelled.betas,
        has_pose=labelled.has_pose,
        has_betas=labelled.has_betas,
    )


def _image(file: BinaryIO, labelled: _Labelled) -> U8 | None:
    if labelled.num_bytes > MAX_IMAGE_BYTES:
        return None
    data = np.frombuffer(_read(file, labelled.offset, labelled.num_bytes), np.uint8)
    try:
        bgr = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    return None if bgr is None else cast(U8, bgr[:, :, ::-1])


def _read(file: BinaryIO, offset: int, num_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(num_bytes)


def _known(keypoints: F32) -> F32:
    """A copy in which keypoints with a number that is not finite are zero, confidence included."""
    return np.where(np.isfinite(keypoints).all(axis=1, keepdims=True), keypoints, np.float32(0))


def _flag(value: object) -> bool:
    """As published: NaN and what is below 0 say no."""
    return bool((np.asarray(value) > 0).all())


def _array(record: Mapping[str, Any], name: str, *shape: int) -> F32:
    array = np.asarray(record[name], dtype=np.float32)
    if name == "scale" and array.size == 1:
        array = np.repeat(array.reshape(1), 2)
    if array.shape != shape:
        raise ValueError(f"{name}: expected {shape}, got {array.shape}")
    return array

"""The paper's tables: HMR 2.0 on the published benchmarks, tracks on PoseTrack, actions on AVA.

Crops come from the data sets' own boxes, as in the published evaluation: no detector, no blur.
What the user does not give is reported as not given; nothing stands for it.

`N` people, `K` = 44 keypoints.

Source of the paper's figures: Goel et al., Humans in 4D, ICCV 2023. Only figures that could be
checked against a second source stand here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import cast

import cv2
import numpy as np
import torch
from torch import Tensor

from fourdh_batch.config import EvaluateConfig
from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.evaluate.actions import action_scores
from fourdh_batch.evaluate.datasets import (
    EmdbSequence,
    PeopleSet,
    load_ava_actions,
    load_ava_excluded,
    load_emdb,
    load_people,
    load_posetrack,
)
from fourdh_batch.evaluate.matching import Boxes
from fourdh_batch.evaluate.pose import (
    EVALUATION_KEYPOINTS,
    PCK_MIN_CONFIDENCE,
    PCK_THRESHOLDS,
    PELVIS_KEYPOINT,
    mpjpe_mm,
    pa_mpjpe_mm,
    pck,
    pck_distances,
    pve_mm,
)
from fourdh_batch.evaluate.tracking import PROTOCOLS, tracking_scores
from fourdh_batch.geometry import crop_square, crop_to_image, cxcywh_to_xyxy
from fourdh_batch.models.hmr2 import Hmr2
from fourdh_batch.models.smpl import NUM_JOINTS, SmplBody
from fourdh_batch.storage import is_local, open_read, redact_uri
from fourdh_batch.tables.reader import read_arrow, smpl_arrays
from fourdh_batch.types import F32, U8
from fourdh_batch.video.crops import crop_batch

CUDA_BATCH_SIZE = 64
CPU_BATCH_SIZE = 8

OnStep = Callable[[str, int, int], None]
LoadBody = Callable[[str], SmplBody]

# The paper's tables 1 to 4.
POSE_3D, POSE_2D = "Table 1: 3D pose", "Table 2: 2D pose"
TRACKING, ACTIONS = "Table 3: tracking", "Table 4: action recognition"
POSE_EMDB = "3D pose, not in the paper"
NOT_GIVEN = "not given"
# SMPL joints; EMDB's evaluation puts the point between the hips into the origin.
LEFT_HIP, RIGHT_HIP = 1, 2


@dataclass(frozen=True, slots=True)
class Figure:
    """One cell of a table, with the paper's beside it.

    Attributes:
        section: `POSE_3D`, `POSE_2D`, `TRACKING`, `ACTIONS` or `POSE_EMDB`.
        dataset, measure: as in the paper.
        ours: None where it was not measured; see `note`.
        paper: by the paper's name of the model; empty where the paper has none or it could not be
            checked.
        note: why there is no figure, or what it rests on.
    """

    section: str
    dataset: str
    measure: str
    ours: float | None
    paper: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Stills:
    """A data set of still images."""

    section: str
    dataset: str
    file: str  # of the published evaluation data
    images: str  # setting
    paper: dict[str, dict[str, float]]  # by measure


_STILLS = (
    _Stills(
        *(POSE_3D, "3DPW", "3dpw_test.npz", "images_3dpw"),
        {
            "MPJPE mm": {"HMR 2.0b": 81.3, "HMR 2.0a": 70.0},
            "PA-MPJPE mm": {"HMR 2.0b": 54.3, "HMR 2.0a": 44.5},
        },
    ),
    _Stills(
        *(POSE_3D, "Human3.6M", "h36m_val_p2.npz", "images_h36m"),
        {
            "MPJPE mm": {"HMR 2.0b": 50.0, "HMR 2.0a": 44.8},
            "PA-MPJPE mm": {"HMR 2.0b": 32.4, "HMR 2.0a": 33.6},
        },
    ),
    _Stills(
        *(POSE_2D, "LSP-Extended", "hr-lspet_train.npz", "images_lsp"),
        {"PCK@0.05": {"HMR 2.0b": 0.53}, "PCK@0.1": {"HMR 2.0b": 0.82, "HMR 2.0a": 0.72}},
    ),
    _Stills(
        *(POSE_2D, "COCO", "coco_val.npz", "images_coco"),
        {
            "PCK@0.05": {"HMR 2.0b": 0.86, "HMR 2.0a": 0.79},
            "PCK@0.1": {"HMR 2.0b": 0.96, "HMR 2.0a": 0.95},
        },
    ),
    _Stills(
        *(POSE_2D, "PoseTrack", "posetrack_2018_val.npz", "images_posetrack"),
        {
            "PCK@0.05": {"HMR 2.0b": 0.90, "HMR 2.0a": 0.86},
            "PCK@0.1": {"HMR 2.0b": 0.98, "HMR 2.0a": 0.97},
        },
    ),
)
_EMDB_MEASURES = ("MPJPE mm", "PA-MPJPE mm", "PVE mm")
_TRACKER = "4DHumans + ViTDet"
_TRACKING_PAPER = {"IDs": 367.0, "MOTA": 61.9, "IDF1": 79.3}


def evaluate_benchmarks(
    given: EvaluateConfig,
    *,
    load_model: Callable[[], Hmr2],
    load_body: LoadBody,
    batch_size: int = 0,
    on_step: OnStep = lambda what, done, total: None,
) -> list[Figure]:
    """Every figure of the paper's tables, measured where its data are given.

    Args:
        given: the user's copies.
        load_model: called once, if any data set of pictures is given.
        load_body: reads a SMPL file; for EMDB.
        batch_size: crops at once; 0: by device.
        on_step: told what is done, of how much.

    Raises:
        ConfigError: a data set is given in part, or is not of the published layout.
        FileNotFoundError: something that is given is not there.
    """
    _check_given(given)
    model: list[Hmr2] = []

    def hmr2() -> Hmr2:
        if not model:
            model.append(load_model())
        return model[0]

    figures: list[Figure] = []
    for stills in _STILLS:
        images = getattr(given, stills.images)
        if not images:
            note = f"{NOT_GIVEN} (evaluate.{stills.images})"
            figures += _figures(stills, dict.fromkeys(stills.paper), note)
            continue
        people = load_people(f"{given.metadata.rstrip('/')}/{stills.file}")
        measured = _measure_stills(hmr2(), people, images, stills, batch_size, on_step)
        figures += _figures(stills, measured, f"{len(people)} people")
    figures += _tracking_figures(given)
    figures += _action_figures(given)
    figures += _emdb_figures(given, hmr2, load_body, batch_size, on_step)
    return figures


def _check_given(given: EvaluateConfig) -> None:
    problems = []
    with_images = [s.images for s in _STILLS if getattr(given, s.images)]
    if with_images and not given.metadata:
        problems.append(f"evaluate.metadata: needed with evaluate.{with_images[0]}")
    if given.emdb and not (given.smpl_female and given.smpl_male):
        problems.append("evaluate.smpl_female, evaluate.smpl_male: needed with evaluate.emdb")
    for one, other in (
        ("posetrack_annotations", "posetrack_tables"),
        ("posetrack_tables", "posetrack_annotations"),
        ("ava_truth", "ava_found"),
        ("ava_found", "ava_truth"),
        ("ava_excluded", "ava_truth"),
    ):
        if getattr(given, one) and not getattr(given, other):
            problems.append(f"evaluate.{other}: needed with evaluate.{one}")
    if problems:
        raise ConfigError("missing settings:\n  " + "\n  ".join(problems))


def _figures(stills: _Stills, measured: Mapping[str, float | None], note: str) -> Iterator[Figure]:
    for measure, value in measured.items():
        paper = stills.paper[measure]
        yield Figure(stills.section, stills.dataset, measure, value, paper, note)


# --- still images ------------------------------------------------------------------------------


def _measure_stills(
    model: Hmr2,
    people: PeopleSet,
    images: str,
    stills: _Stills,
    batch_size: int,
    on_step: OnStep,
) -> dict[str, float | None]:
    if len(people) == 0:
        raise ConfigError(f"{people.source}: expected people, got none")
    compared = [*EVALUATION_KEYPOINTS, PELVIS_KEYPOINT]
    if stills.section == POSE_3D:
        space, truth = "space", people.keypoints_3d_m[:, compared].reshape(-1, 4)
        has_some = people.keypoints_3d_m[:, EVALUATION_KEYPOINTS, 3].any()
    else:
        is_sure = people.keypoints_2d_px[..., 2] > PCK_MIN_CONFIDENCE
        space, truth, has_some = "the picture", people.keypoints_2d_px[is_sure], is_sure.any()
    if not has_some:
        raise ConfigError(
            f"{people.source}: expected keypoints in {space}, got none with confidence"
        )
    if not np.isfinite(truth).all():
        raise ConfigError(f"{people.source}: expected finite keypoints in {space}, got others")
    names = [_join(images, name) for name in people.image]
    bbox_xyxy = cxcywh_to_xyxy(np.concatenate((people.center_px, people.size_px), axis=1))
    predicted = predict(model, names, bbox_xyxy, batch_size=batch_size, on_step=on_step)
    if stills.section == POSE_3D:
        truth = people.keypoints_3d_m[..., :3]
        found = predicted.keypoints_3d_m
        return {
            "MPJPE mm": float(mpjpe_mm(found, truth).mean()),
            "PA-MPJPE mm": float(pa_mpjpe_mm(found, truth).mean()),
        }
    shares = pck(
        pck_distances(
            predicted.keypoints_2d_px,
            people.keypoints_2d_px[..., :2],
            people.keypoints_2d_px[..., 2],
            people.size_px.max(axis=1),
        )
    )
    return {
        f"PCK@{threshold:g}": float(share)
        for threshold, share in zip(PCK_THRESHOLDS, shares.mean, strict=True)
    }


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """Bodies of N crops.

    Attributes:
        keypoints_3d_m: (N, 44, 3) metres, camera not added.
        keypoints_2d_px: (N, 44, 2) pixels of the picture.
        global_orient, body_pose, betas: (N, 1, 3, 3), (N, 23, 3, 3), (N, 10).
    """

    keypoints_3d_m: F32
    keypoints_2d_px: F32
    global_orient: F32
    body_pose: F32
    betas: F32


def predict(
    model: Hmr2,
    images: list[str],
    bbox_xyxy_px: F32,
    *,
    batch_size: int = 0,
    on_step: OnStep = lambda what, done, total: None,
) -> Predicted:
    """HMR 2.0 on boxes of still images.

    Args:
        model: on its device.
        images: N addresses; those of one picture one after another are read once.
        bbox_xyxy_px: (N, 4) boxes before they grow to the aspect of the crop.
        batch_size: crops at once; 0: by device.
        on_step: told what is done, of how much.

    Raises:
        FileNotFoundError: there is no such image.
        ConfigError: an image cannot be read.
        CheckpointError: what the model gives is not finite.
    """
    device = next(model.parameters()).device
    size = batch_size or (CPU_BATCH_SIZE if device.type == "cpu" else CUDA_BATCH_SIZE)
    center, side = crop_square(bbox_xyxy_px)
    rows: list[list[Tensor]] = []
    for start in range(0, len(images), size):
        stop = min(start + size, len(images))
        crops = torch.cat(list(_crops(images[start:stop], center[start:stop], side[start:stop])))
        with torch.inference_mode():
            out = model(crops.to(device))
        kept = (out.keypoints_3d, out.keypoints_2d, out.global_orient, out.body_pose, out.betas)
        if not all(torch.isfinite(tensor).all() for tensor in kept):
            raise CheckpointError(
                f"{redact_uri(images[start])} to {redact_uri(images[stop - 1])}: expected finite "
                "bodies, the model gave NaN or infinity; see hmr.weights, hmr.precision"
            )
        rows.append([tensor.cpu() for tensor in kept])
        on_step("people", stop, len(images))
    points, crop_points, *body = (torch.cat(part).numpy() for part in zip(*rows, strict=True))
    return Predicted(points, crop_to_image(crop_points, center, side), *body)


def _crops(images: list[str], center: F32, side: F32) -> Iterator[Tensor]:
    name, frame = "", torch.zeros(0)
    for i, image in enumerate(images):
        if image != name:
            name, frame = image, torch.from_numpy(_read_image(image))[None]
        yield crop_batch(
            frame,
            torch.zeros(1, dtype=torch.int64),
            torch.from_numpy(center[i : i + 1]),
            torch.from_numpy(side[i : i + 1]),
        )


def _read_image(uri: str) -> U8:
    """(H, W, 3) RGB as stored: a rotation in the EXIF header is not applied, as published."""
    with open_read(uri) as file:
        data = np.frombuffer(file.read(), np.uint8)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        bgr = cv2.imdecode(data, flags) if len(data) else None
    except cv2.error:  # more pixels than OpenCV allows
        bgr = None
    if bgr is None:
        raise ConfigError(f"{redact_uri(uri)}: expected an image, OpenCV cannot read it")
    return np.ascontiguousarray(bgr[..., ::-1]).astype(np.uint8, copy=False)


def _join(folder: str, name: str) -> str:
    """An image below the data set's folder, never outside of it.

    Raises:
        ConfigError: the name leads elsewhere.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or (is_local(folder) and "://" in name):
        raise ConfigError(f"image {name!r}: expected a name below {redact_uri(folder)}")
    return f"{folder.rstrip('/')}/{PurePosixPath(name)}"


# --- EMDB --------------------------------------------------------------------------------------


def _emdb_figures(
    given: EvaluateConfig,
    hmr2: Callable[[], Hmr2],
    load_body: LoadBody,
    batch_size: int,
    on_step: OnStep,
) -> Iterator[Figure]:
    if not given.emdb:
        for measure in _EMDB_MEASURES:
            yield Figure(POSE_EMDB, "EMDB 1", measure, None, note=f"{NOT_GIVEN} (evaluate.emdb)")
        return
    bodies = {"female": load_body(given.smpl_female), "male": load_body(given.smpl_male)}
    model = hmr2()
    bodies["neutral"] = cast(SmplBody, model.body)
    for body in bodies.values():
        # Of the open body, say: as many vertices as SMPL has, each somewhere else.
        if not np.array_equal(body.faces, bodies["neutral"].faces):
            raise ConfigError(
                "hmr.body: expected the neutral body of evaluate.smpl_female and "
                f"evaluate.smpl_male, got another surface ({bodies['neutral'].name}, theirs is "
                f"{body.name}), whose vertices are not theirs"
            )
    errors: list[np.ndarray] = []
    for sequence in load_emdb(given.emdb):
        if sequence.is_emdb1 and sequence.is_good.any():
            errors.append(_emdb_errors(model, sequence, bodies, batch_size, on_step))
    if not errors:
        raise ConfigError(f"{redact_uri(given.emdb)}: expected sequences of EMDB 1, got none")
    mean = np.concatenate(errors).mean(axis=0)
    note = f"{sum(map(len, errors))} frames of {len(errors)} videos"
    for measure, value in zip(_EMDB_MEASURES, mean, strict=True):
        yield Figure(POSE_EMDB, "EMDB 1", measure, float(value), note=note)


def _emdb_errors(
    model: Hmr2,
    sequence: EmdbSequence,
    bodies: Mapping[str, SmplBody],
    batch_size: int,
    on_step: OnStep,
) -> np.ndarray:
    """(T, 3) MPJPE and PA-MPJPE of the 24 joints, PVE; mm, of the good frames."""
    if sequence.gender not in bodies:
        raise ConfigError(
            f"{sequence.name}: expected gender {sorted(bodies)}, got {sequence.gender!r}"
        )
    frames = np.flatnonzero(sequence.is_good)
    predicted = predict(
        model,
        [f"{sequence.images}/{frame:05d}.jpg" for frame in frames],
        sequence.bbox_xyxy_px[frames],
        batch_size=batch_size,
        on_step=on_step,
    )
    betas = np.broadcast_to(sequence.betas, (len(frames), len(sequence.betas)))
    true = (sequence.global_orient[frames], sequence.body_pose[frames], betas)
    found = (predicted.global_orient, predicted.body_pose, predicted.betas)
    step = batch_size or CUDA_BATCH_SIZE
    errors = []
    for start in range(0, len(frames), step):
        part = slice(start, start + step)
        true_joints, true_surface = _posed(bodies[sequence.gender], *(a[part] for a in true))
        joints, surface = _posed(bodies["neutral"], *(a[part] for a in found))
        joint_list = range(NUM_JOINTS)
        errors.append(
            np.stack(
                (
                    mpjpe_mm(joints, true_joints, keypoints=joint_list, pelvis=NUM_JOINTS),
                    pa_mpjpe_mm(joints, true_joints, keypoints=joint_list),
                    pve_mm(surface, true_surface, joints[:, -1], true_joints[:, -1]),
                ),
                axis=1,
            )
        )
    return np.concatenate(errors)


def _posed(body: SmplBody, global_orient: F32, body_pose: F32, betas: F32) -> tuple[F32, F32]:
    """(N, 25, 3) SMPL's joints and the point between the hips, (N, V, 3) vertices."""
    device = body.v_template.device
    with torch.inference_mode():
        out = body(
            *(
                torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(device)
                for array in (global_orient, body_pose, betas)
            )
        )
    joints = out.joints.cpu().numpy()
    middle = (joints[:, [LEFT_HIP]] + joints[:, [RIGHT_HIP]]) / 2
    return np.concatenate((joints, middle), axis=1), out.vertices.cpu().numpy()


# --- tracks and actions ------------------------------------------------------------------------


def _tracking_figures(given: EvaluateConfig) -> Iterator[Figure]:
    measures = ("HOTA", "IDs", "MOTA", "IDF1")
    if not given.posetrack_tables:
        for measure in measures:
            yield Figure(
                *(TRACKING, "PoseTrack", measure, None, _tracker_paper(measure)),
                f"{NOT_GIVEN} (evaluate.posetrack_annotations, evaluate.posetrack_tables)",
            )
        return
    truth = load_posetrack(given.posetrack_annotations)
    found = _read_boxes(given.posetrack_tables, truth)
    missing = sorted(set(truth) - set(found))
    if not found:
        raise ConfigError(
            f"{redact_uri(given.posetrack_tables)}: expected videos named like the folders of "
            f"PoseTrack, such as {missing[0]}, got none of them"
        )
    note = f"{len(truth)} videos"
    if missing:
        note += f", {len(missing)} without a result count as misses: {', '.join(missing[:5])}"
    for protocol in PROTOCOLS:
        # PoseTrack labels some frames only: no other frame counts, whatever the protocol.
        videos = {
            name: (true, _annotated(found.get(name, Boxes.empty()), true))
            for name, true in truth.items()
        }
        _, all_ = tracking_scores(videos, protocol)
        values = (100 * all_.hota, float(all_.id_switches), 100 * all_.mota, 100 * all_.idf1)
        published = protocol == "phalp"
        for measure, value in zip(measures, values, strict=True):
            name = measure if published else f"{measure} at IoU 0.5"
            paper = _tracker_paper(measure) if published else {}
            yield Figure(TRACKING, "PoseTrack", name, value, paper, note)


def _tracker_paper(measure: str) -> dict[str, float]:
    return {_TRACKER: _TRACKING_PAPER[measure]} if measure in _TRACKING_PAPER else {}


def _annotated(boxes: Boxes, truth: Boxes) -> Boxes:
    return boxes.take(np.isin(boxes.frame_index, truth.frame_index))


def _read_boxes(root: str, wanted: Iterable[str]) -> dict[str, Boxes]:
    """Detected rows of `tracks`, of the wanted videos that have a result."""
    names = list(wanted)
    done = read_arrow(root, "videos", columns=["video_id", "status"], video_id=names).to_pandas()
    finished = done[done["status"].isin(["ok", "partial"])]["video_id"]
    if finished.duplicated().any():
        twice = finished[finished.duplicated()].iloc[0]
        raise ConfigError(
            f"{redact_uri(root)}: expected video {twice} once, got it in several datasets"
        )
    columns = ["video_id", "frame_index", "track_id", "state", "bbox_xyxy_px"]
    rows = read_arrow(root, "tracks", columns=columns, video_id=names)
    bbox = smpl_arrays(rows)["bbox_xyxy_px"].astype(np.float64)
    frame = rows.select(columns[:4]).to_pandas()
    boxes = Boxes(
        frame["frame_index"].to_numpy(np.int64), frame["track_id"].to_numpy(np.int64), bbox
    )
    is_seen = (frame["state"] == "detected").to_numpy()
    video = frame["video_id"].where(is_seen)  # no text where not
    rows_of = video.groupby(video).indices
    none = np.zeros(0, np.int64)
    return {name: boxes.take(rows_of.get(name, none)) for name in finished}


def _action_figures(given: EvaluateConfig) -> Iterator[Figure]:
    if not given.ava_found:
        note = f"{NOT_GIVEN} (evaluate.ava_truth, evaluate.ava_found: predictions of actions)"
        yield Figure(ACTIONS, "AVA", "mAP", None, note=note)
        return
    excluded = load_ava_excluded(given.ava_excluded) if given.ava_excluded else set()
    scores = action_scores(
        load_ava_actions(given.ava_truth, scored=False),
        load_ava_actions(given.ava_found, scored=True),
        excluded,
    )
    note = "excluded seconds left out" if given.ava_excluded else "no second is left out"
    kinds = {f"mAP {kind.replace('_', ' ')}": value for kind, value in scores.by_kind.items()}
    for measure, value in ({"mAP": scores.mean_ap} | kinds).items():
        if math.isnan(value):
            yield Figure(ACTIONS, "AVA", measure, None, note="no such action in the truth")
        else:
            yield Figure(ACTIONS, "AVA", measure, 100 * value, note=note)

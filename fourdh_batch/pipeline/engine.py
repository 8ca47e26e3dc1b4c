"""The GPU half of the pipeline: chunks of frames in, boxes and bodies out.

Stateless from call to call, so chunks of any videos may come in any order and share batches.
What a chunk gives is the same whatever its companions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import cast

import torch

from fourdh_batch.config import JobConfig, require
from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.models.appearance import AppearanceProjection, load_texture_encoder
from fourdh_batch.models.build import HMR2_SIZES, load_hmr2, weights_origin
from fourdh_batch.models.detector import DETECTORS, Detector, build_detector, drop_reasons
from fourdh_batch.models.hmr2 import Hmr2
from fourdh_batch.models.minis import DETECTOR_WORDS, HMR2, MINI, shipped, shipped_detector
from fourdh_batch.models.smpl import NUM_FACES, SmplBody, load_body
from fourdh_batch.models.texture import Atlas, TextureSampler, body_atlas, load_atlas
from fourdh_batch.pipeline.following import checked_predictor_digest, cues
from fourdh_batch.pipeline.reconstruct import Reconstructor
from fourdh_batch.pipeline.records import UNTRAINED, ChunkResult, ModelCard
from fourdh_batch.storage import open_read
from fourdh_batch.tables.manifest import CODE_VERSION, fingerprint_of
from fourdh_batch.tables.schema import TABLES, schema_version
from fourdh_batch.types import FrameChunk

logger = logging.getLogger(__name__)

GIVEN = "boxes"
TRANSFORMERS = "transformers"


class Engine:
    """Detect, crop, reconstruct.

    Args:
        detector: person boxes.
        reconstructor: HMR 2.0 over batches of crops.
        score_threshold, min_width_px, min_height_px: which boxes are kept (score
            strictly above, sides not below; docs/PHALP.md, section 1).
    """

    def __init__(
        self,
        detector: Detector,
        reconstructor: Reconstructor,
        *,
        score_threshold: float,
        min_width_px: float,
        min_height_px: float,
    ) -> None:
        self.detector = detector
        self.reconstructor = reconstructor
        self._score_threshold = score_threshold
        self._min_width_px = min_width_px
        self._min_height_px = min_height_px

    def run(self, chunks: Sequence[FrameChunk]) -> list[ChunkResult]:
        """Results in the order of the chunks; crops of all chunks share batches."""
        found = [self.detector.detect(chunk) for chunk in chunks]
        reasons = [
            drop_reasons(
                detections,
                score_threshold=self._score_threshold,
                min_width_px=self._min_width_px,
                min_height_px=self._min_height_px,
            )
            for detections in found
        ]
        kept = [reason == "" for reason in reasons]
        bodies = self.reconstructor.reconstruct(
            chunks,
            [
                (detections.frame_row[keep], detections.bbox_xyxy_px[keep])
                for detections, keep in zip(found, kept, strict=True)
            ],
            [
                None if detections.masks is None else list(compress(detections.masks, keep))
                for detections, keep in zip(found, kept, strict=True)
            ],
        )
        return [
            ChunkResult(
                video_id=chunk.video_id,
                frame_index=chunk.frame_index,
                pts_s=chunk.pts_s,
                shot_scores=chunk.shot_scores,
                image_size_wh=chunk.image_size_wh,
                detections=detections,
                drop_reason=reason,
                people=body.people,
                texture=body.texture,
                appearance=body.appearance,
            )
            for chunk, detections, reason, body in zip(chunks, found, reasons, bodies, strict=True)
        ]


def build_model(config: JobConfig) -> Hmr2:
    """HMR 2.0 with its body, on the device that the settings name.

    Raises:
        ConfigError, CheckpointError: a name is unknown, a file is missing or does not fit.
    """
    require(config, "hmr.weights")
    hmr = config.hmr
    device = _device(config)
    if device.type == "cpu":
        torch.set_num_threads(hmr.cpu_threads)
    body = _load_body(config)
    model = load_hmr2(
        hmr.weights, body, device=device, precision=hmr.precision, size=hmr.size or None
    )
    _warn_of_minis(config, body)
    if model.weights_origin == UNTRAINED:
        logger.warning("weights: untrained. The bodies in the output mean nothing.")
    elif model.weights_origin != "trained" and body.name == "open":
        logger.warning(
            "body: open. Poses of HMR weights fit it, shapes do not: betas mean SMPL's shape "
            "space. Give hmr.body=SMPL_NEUTRAL.pkl hmr.extra_regressor=SMPL_to_J19.pkl"
        )
    return model


def _warn_of_minis(config: JobConfig, body: SmplBody) -> None:
    """The small models of this package were trained on its open body and in its atlas."""
    hmr, tracker = config.hmr, config.tracker
    if hmr.weights == MINI and body.name != "open":
        logger.warning(
            "hmr.weights=mini with hmr.body=%s: the small model knows the open body alone, whose "
            "shape space is another. Leave hmr.body out, or give weights for it",
            hmr.body,
        )
    if tracker.texture_weights == MINI and (tracker.atlas or body.name != "open"):
        other = f"tracker.atlas={tracker.atlas}" if tracker.atlas else f"hmr.body={hmr.body}"
        logger.warning(
            "tracker.texture_weights=mini with %s: the small model knows the open body's atlas "
            "alone. Leave that out, or give weights for it",
            other,
        )


def _device(config: JobConfig) -> torch.device:
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if config.hmr.device == "auto" else config.hmr.device)


def build_engine(config: JobConfig) -> Engine:
    """Load every model that the settings name.

    Raises:
        ConfigError, CheckpointError: a name is unknown, a file is missing or does not fit.
    """
    hmr = config.hmr
    model, device = build_model(config), _device(config)
    body = cast(SmplBody, model.body)
    detector = build_detector(
        config.detector.name,
        path=config.detector.path or None,
        device=str(device),
        score_threshold=config.detector.score_threshold,
        batch_size=config.detector.batch_size,
        input_size=config.detector.input_size or None,
        num_threads=hmr.cpu_threads,
        boxes_format=config.detector.boxes_format,
        boxes_time_offset_s=config.detector.boxes_time_offset_s,
    )
    sampler, projection = _looks(config, body, device)
    return Engine(
        detector,
        Reconstructor(
            model,
            batch_size=hmr.batch_size or None,
            device=device,
            sampler=sampler,
            embed=projection,
        ),
        score_threshold=config.detector.score_threshold,
        min_width_px=config.detector.min_width_px,
        min_height_px=config.detector.min_height_px,
    )


def _looks(
    config: JobConfig, body: SmplBody, device: torch.device
) -> tuple[TextureSampler | None, AppearanceProjection | None]:
    """What takes texture maps off people, and what makes compact vectors of them."""
    wanted = config.tracker
    if not wanted.texture_weights:
        return None, None
    sampler = TextureSampler(body.faces, _load_atlas(config, body)).to(device)
    if not wanted.store_appearance:
        return sampler, None
    encoder = load_texture_encoder(wanted.texture_weights, device=device)
    return sampler, AppearanceProjection(encoder)


def _load_atlas(config: JobConfig, body: SmplBody) -> Atlas:
    folder = config.tracker.atlas
    return load_atlas(folder, num_faces=NUM_FACES) if folder else body_atlas(body)


def model_card(config: JobConfig) -> ModelCard:
    """Digest of everything but the input that decides what the rows hold; checks it on the way.

    Files are read, the body and the tracker's small networks are loaded, but no large one is built:
    a rerun with nothing to do stays cheap, and a wrong name or a missing file is found before any
    process is started.

    Raises:
        ConfigError, CheckpointError: a setting is wrong, a file that it names is not there.
    """
    hmr, wanted = config.hmr, config.detector
    require(config, "hmr.weights", "detector.path")
    problems = []
    if hmr.size and hmr.size not in HMR2_SIZES:
        problems.append(f"hmr.size: expected one of {', '.join(HMR2_SIZES)}, got {hmr.size!r}")
    if wanted.name not in DETECTORS:
        problems.append(
            f"detector.name: expected one of {', '.join(DETECTORS)}, got {wanted.name!r}"
        )
    elif wanted.path in DETECTOR_WORDS and wanted.name not in (TRANSFORMERS, GIVEN):
        problems.append(
            f"detector.name: expected {TRANSFORMERS} with detector.path={wanted.path}, "
            f"got {wanted.name!r}"
        )
    if problems:
        raise ConfigError("wrong settings:\n  " + "\n  ".join(problems))
    digest = _digest_path(str(shipped(hmr.weights, HMR2)), "hmr.weights")
    origin = weights_origin(hmr.weights)
    body = _load_body(config)
    if wanted.name == GIVEN:
        detector = build_given(config).digest
    else:
        is_folder = wanted.name == TRANSFORMERS  # of which the package has small ones
        path = str(shipped_detector(wanted.path)) if is_folder else wanted.path
        detector = _digest_path(path, "detector.path")
    settings = {
        "code": CODE_VERSION,
        "schemas": {name: schema_version(name) for name in TABLES},
        "weights": digest,
        "size": hmr.size,
        "precision": hmr.precision,
        "device": hmr.device,
        "batch_size": hmr.batch_size,
        "cpu_threads": hmr.cpu_threads,
        "max_megapixels": config.video.max_megapixels,
        "body": body.digest,
        "detector": {**asdict(wanted), "path": detector},
        "shots": config.video.detect_shots,
        "tracker": {**asdict(config.tracker), **_tracker_digests(config, body)},
    }
    return ModelCard(
        fingerprint=fingerprint_of(settings),
        weights=UNTRAINED if origin == UNTRAINED else digest,
        weights_origin=origin,
        body=f"{body.name}:{body.digest[:16]}",
        detector=f"{wanted.name}:{detector[:16]}",
        cues=cues(config.tracker, texture="texture" if config.tracker.texture_weights else ""),
    )


def _tracker_digests(config: JobConfig, body: SmplBody) -> dict[str, str]:
    """Digests in the place of the paths among the tracker's settings; checks the files."""
    wanted, digests = config.tracker, {}
    if wanted.texture_weights:
        digests["texture_weights"] = load_texture_encoder(wanted.texture_weights).weights_digest
        digests["atlas"] = _load_atlas(config, body).digest
    if wanted.predictor_weights:
        digests["predictor_weights"] = checked_predictor_digest(config)
    return digests


def build_given(config: JobConfig) -> Detector:
    """The detector that hands out the boxes of a file."""
    return build_detector(
        GIVEN,
        path=config.detector.path,
        boxes_format=config.detector.boxes_format,
        boxes_time_offset_s=config.detector.boxes_time_offset_s,
    )


def _load_body(config: JobConfig) -> SmplBody:
    hmr = config.hmr
    try:
        return load_body(hmr.body or None, extra_regressor=hmr.extra_regressor or None)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"hmr.body={hmr.body} hmr.extra_regressor={hmr.extra_regressor}: "
            f"no such file: {error.filename}"
        ) from None


def _digest_path(path: str, setting: str) -> str:
    """Short digest of a file, or of all files of a local directory; a hub id stands for itself."""
    digest = blake2b(digest_size=8)
    local = Path(path)
    if local.is_dir():
        for file in sorted(p for p in local.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(local)}\0{_digest_path(str(file), setting)}".encode())
        return digest.hexdigest()
    try:
        with open_read(path) as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    except FileNotFoundError:
        if setting == "detector.path" and not local.is_absolute() and path.count("/") == 1:
            return path  # organisation/model on a hub, pinned by the library's own cache
        raise CheckpointError(f"{setting}={path}: no such file") from None
    return digest.hexdigest()

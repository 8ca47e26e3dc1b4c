"""What a tracking process holds: body model, pose predictor and texture encoder, and trackers.

Everything is loaded, with torch, when it is first needed: a process that tracks by location and
last pose alone stays light.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from fourdh_batch.config import JobConfig, TrackerConfig
from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.tracking.appearance import CompactMemory
from fourdh_batch.tracking.completion import MAX_SLOTS
from fourdh_batch.tracking.tracker import PhalpTracker, TextureTerm, TrackerSettings
from fourdh_batch.types import F32

if TYPE_CHECKING:
    import torch

    from fourdh_batch.models.appearance import TextureEncoder
    from fourdh_batch.models.predictor import PosePredictor
    from fourdh_batch.models.smpl import SmplBody


class TrackerModels:
    """The models behind the trackers of one process, shared by all its videos.

    Args:
        config: settings of the job.
        compact: looks come as the compact vectors of `detections`, not as texture maps.
    """

    def __init__(self, config: JobConfig, *, compact: bool = False) -> None:
        self._config = config
        self._compact = compact

    def new_tracker(self) -> PhalpTracker:
        """A tracker for one video, with the cues that the settings name."""
        return PhalpTracker(
            self._settings,
            pose_predictor=self.predictor,
            texture=self._new_texture_term(),
        )

    @property
    def _settings(self) -> TrackerSettings:
        wanted = self._config.tracker
        return TrackerSettings(
            gate=wanted.gate,
            n_init=wanted.n_init,
            box_weight=wanted.box_weight,
            log_cost=wanted.log_cost,
            max_age=wanted.max_age,
            compat=wanted.compat,
        )

    def _new_texture_term(self) -> TextureTerm | None:
        if self._compact:
            return CompactMemory()
        if self._encoder is None:
            return None
        from fourdh_batch.models.appearance import TextureMemory

        return TextureMemory(self._encoder)

    @cached_property
    def predictor(self) -> PosePredictor | None:
        """Predicts poses and completes missed ones; None: a pose stays as last seen."""
        weights = self._config.tracker.predictor_weights
        if not weights:
            return None
        from fourdh_batch.models.build_phalp import load_pose_predictor

        return load_pose_predictor(weights, device=self._device)

    @cached_property
    def _encoder(self) -> TextureEncoder | None:
        weights = self._config.tracker.texture_weights
        if not weights:
            return None
        from fourdh_batch.models.appearance import load_texture_encoder

        return load_texture_encoder(weights, device=self._device)

    @cached_property
    def _device(self) -> torch.device:
        import torch

        wanted = self._config.tracker.device
        has_gpu = torch.cuda.is_available()  # Ray hides the GPUs from a process without a share
        if wanted.startswith("cuda") and not has_gpu:
            raise ConfigError(
                f"tracker.device={wanted}: expected a GPU for the tracking process, got none; give "
                "it a share with cluster.gpus_per_tracker, or tracker.device=auto"
            )
        device = torch.device(("cuda" if has_gpu else "cpu") if wanted == "auto" else wanted)
        if device.type == "cpu":
            # As for the models: the number of threads may change the last bit of a result.
            torch.set_num_threads(self._config.hmr.cpu_threads)
        return device

    @cached_property
    def _body(self) -> SmplBody:
        from fourdh_batch.models.smpl import load_body

        hmr = self._config.hmr
        return load_body(hmr.body or None, extra_regressor=hmr.extra_regressor or None)

    def keypoints(self, global_orient: F32, body_pose: F32, betas: F32) -> F32:
        """(M, 44, 3) metres in the model frame, of M people; on the CPU."""
        import torch

        pose = (torch.from_numpy(x) for x in (global_orient, body_pose, betas))
        with torch.inference_mode():
            result: F32 = self._body.keypoints_3d(*pose).numpy()
        return result


def cues(wanted: TrackerConfig, *, texture: str) -> str:
    """What the tracker's cost is made of, in words.

    Args:
        wanted: settings of the tracker.
        texture: the looks that it compares; "": none.
    """
    return " + ".join(
        [
            "location (ridge)",
            "pose (predicted)" if wanted.predictor_weights else "pose (last seen)",
            texture or "no texture",
            *(["boxes"] if wanted.box_weight else []),
            *(["log cost"] if wanted.log_cost else []),
        ]
    )


def checked_predictor_digest(config: JobConfig) -> str:
    """Digest of the pose predictor that the settings name, "" for none.

    Raises:
        CheckpointError: it cannot be loaded, or has too few frames to complete missed ones.
    """
    weights = config.tracker.predictor_weights
    if not weights:
        return ""
    from fourdh_batch.models.build_phalp import load_pose_predictor

    predictor = load_pose_predictor(weights)
    if predictor.frame_length <= MAX_SLOTS:
        raise CheckpointError(
            f"tracker.predictor_weights={weights}: expected more than {MAX_SLOTS} frames, as "
            f"completing missed ones needs, got {predictor.frame_length}"
        )
    return predictor.weights_digest

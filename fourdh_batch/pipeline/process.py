"""`process_video()`: one video, in this process, tables out. For notebooks and tests.

The same steps as a job, without Ray and without storage; the rows are those of a job.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fourdh_batch.config import JobConfig, load_config
from fourdh_batch.errors import VideoError
from fourdh_batch.pipeline.engine import Engine, build_engine, model_card
from fourdh_batch.pipeline.following import TrackerModels
from fourdh_batch.pipeline.plan import Video
from fourdh_batch.pipeline.records import ModelCard
from fourdh_batch.pipeline.shard import VideoEnd, VideoOutcome, VideoTracking, run_video
from fourdh_batch.storage import fingerprint_file
from fourdh_batch.tables.writer import MemorySpool
from fourdh_batch.types import DecodeSummary


@dataclass(frozen=True, slots=True)
class Models:
    """Loaded models with the settings that made them; see `load_models`."""

    engine: Engine
    tracker: TrackerModels
    card: ModelCard
    config: JobConfig


@dataclass(frozen=True, slots=True)
class VideoTables:
    """What one video gave.

    Attributes:
        tracks, detections, videos, failures: rows as in the tables of the same names.
        outcome: status and counts.
    """

    tracks: pd.DataFrame
    detections: pd.DataFrame
    videos: pd.DataFrame
    failures: pd.DataFrame
    outcome: VideoOutcome


def load_models(*words: str, yaml: str | Path | None = None) -> Models:
    """Load the models that a job with these settings would use.

    Args:
        words: settings as on the command line, e.g. `hmr.weights=hmr2.safetensors`.
        yaml: a job's settings file.
    Raises:
        ConfigError, CheckpointError: a setting is wrong, a file missing or unfit.
    """
    config = load_config(yaml, words)
    card = model_card(config)  # finds what is wrong before anything is loaded
    return Models(build_engine(config), TrackerModels(config), card, config)


def process_video(
    path: str | Path, *, models: Models, video_id: str | None = None, dataset: str | None = None
) -> VideoTables:
    """Reconstruct and track every person of one video.

    Args:
        path: a local path or any fsspec address.
        models: from `load_models`.
        video_id: for the tables; the file's name if None.
        dataset: for the tables; that of the settings if None.
    Returns:
        Tables, also for a damaged video (see `failures` and `outcome.status`).
    Raises:
        FileNotFoundError: there is no such file.
    """
    num_bytes, fingerprint = fingerprint_file(str(path))
    video = Video(video_id or Path(path).name, str(path), num_bytes, fingerprint)
    spool = MemorySpool(video.video_id)
    tracking = _Alone(
        video,
        shard_id="",
        dataset=dataset or models.config.dataset,
        config=models.config,
        card=models.card,
        spool=spool,
        models=models.tracker,
    )
    run_video(video, models.engine, tracking, models.config)
    assert tracking.outcome is not None
    tables: dict[str, Any] = spool.tables()
    frames = {name: table.to_pandas() for name, table in tables.items()}
    return VideoTables(**frames, outcome=tracking.outcome)


class _Alone(VideoTracking):
    """One video that is no part of a unit."""

    outcome: VideoOutcome | None = None

    def end(self, how: DecodeSummary | VideoEnd | VideoError) -> None:
        self.outcome = self.fail(how) if isinstance(how, VideoError) else self.finish(how)

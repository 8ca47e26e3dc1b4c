"""Every person in a video corpus, in 3D, with an identity over time, in a table.

    import fourdh_batch as fb

    models = fb.load_models("hmr.weights=hmr2.safetensors", "detector.path=rtmdet.onnx")
    tables = fb.process_video("clip.mp4", models=models)
    tracks = fb.read_tracks("s3://bucket/tables", video_id="clip.mp4")
    arrays = fb.smpl_arrays(tracks)

Names are loaded when first used, so that reading tables does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fourdh_batch.models.build import load_hmr2
    from fourdh_batch.models.smpl import load_body
    from fourdh_batch.pipeline.process import load_models, process_video
    from fourdh_batch.tables.reader import read_table, read_tracks, smpl_arrays
    from fourdh_batch.tables.smoothing import smooth_tracks
    from fourdh_batch.tracking.tracker import PhalpTracker
    from fourdh_batch.types import KEYPOINT_NAMES

_HOME = {
    "KEYPOINT_NAMES": "types",
    "PhalpTracker": "tracking.tracker",
    "load_body": "models.smpl",
    "load_hmr2": "models.build",
    "load_models": "pipeline.process",
    "process_video": "pipeline.process",
    "read_table": "tables.reader",
    "read_tracks": "tables.reader",
    "smooth_tracks": "tables.smoothing",
    "smpl_arrays": "tables.reader",
}

__all__ = [
    "KEYPOINT_NAMES",
    "PhalpTracker",
    "__version__",
    "load_body",
    "load_hmr2",
    "load_models",
    "process_video",
    "read_table",
    "read_tracks",
    "smooth_tracks",
    "smpl_arrays",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

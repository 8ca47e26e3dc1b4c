"""What a job tells Prometheus, through Ray's metrics endpoint on every node.

Names begin with `ray_fourdh_` there; `infra/` has a Grafana dashboard over them. Rates are made by
the reader: the share of time that models are busy is the rate of `fourdh_model_busy_seconds` per
model process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge

from fourdh_batch.pipeline.records import ChunkResult

_TAGS = ("dataset",)


class ModelMetrics:
    """Of one model process."""

    def __init__(self, dataset: str) -> None:
        def count(name: str, description: str) -> Counter:
            counter = Counter(f"fourdh_{name}", description, _TAGS)
            counter.set_default_tags({"dataset": dataset})
            return counter

        self._frames = count("frames", "frames that have gone through the models")
        self._crops = count("crops", "people reconstructed")
        self._busy = count("model_busy_seconds", "seconds spent in the models")
        self._step = count("model_step_seconds", "seconds in models and waiting for trackers")

    def chunk(self, num_frames: int, events: Sequence[Any], seconds: float) -> None:
        """A chunk is through."""
        crops = sum(len(event.people) for event in events if isinstance(event, ChunkResult))
        for counter, value in (
            (self._frames, num_frames),
            (self._crops, crops),
            (self._step, seconds),
        ):
            if value > 0:
                counter.inc(value)

    def busy(self, seconds: float) -> None:
        """The models worked so long."""
        if seconds > 0:
            self._busy.inc(seconds)


class SchedulerMetrics:
    """Of the driver."""

    def __init__(self, dataset: str) -> None:
        tags = {"dataset": dataset}
        self._gauges: dict[str, Gauge] = {}
        for name, description in (
            ("units_queued", "units that wait for a model process"),
            ("units_running", "units in a model process"),
            ("models_ready", "model processes that are loaded"),
            ("models_starting", "model processes that are starting or wait for a node"),
            ("shards_publishing", "shards that are being merged and written"),
            ("videos_left", "videos that have not ended"),
        ):
            self._gauges[name] = Gauge(f"fourdh_{name}", description, _TAGS)
            self._gauges[name].set_default_tags(tags)
        self._retries = Counter("fourdh_retries", "units run again", (*_TAGS, "verdict"))
        self._videos = Counter("fourdh_videos", "videos that have ended", (*_TAGS, "status"))
        for counter in (self._retries, self._videos):
            counter.set_default_tags(tags)

    def show(self, **values: int) -> None:
        """Set gauges by name."""
        for name, value in values.items():
            self._gauges[name].set(value)

    def retry(self, verdict: str) -> None:
        """A unit has to run again."""
        self._retries.inc(1, {"verdict": verdict})

    def video(self, status: str) -> None:
        """A video has ended."""
        self._videos.inc(1, {"status": status})

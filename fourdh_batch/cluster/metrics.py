"""What a job tells Prometheus, through Ray's metrics endpoint on every node.

There the names begin with `ray_fourdh_`, and those of counters end with `_total`. All have the
label `dataset`. docs/OBSERVABILITY.md explains them, infra/grafana/fourdh.json shows them. Counters
count from the start of a process and are meant for rates: what a run has done is in its record.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.util.metrics import Counter, Gauge

from fourdh_batch.config import JobConfig
from fourdh_batch.logs import set_up_worker

COUNTERS: Mapping[str, str] = {
    # of a model process
    "frames": "frames that have gone through the models",
    "crops": "people reconstructed",
    "chunks": "chunks that have gone through the models",
    "model_calls": "calls of the models; each takes all chunks that wait",
    "model_busy_seconds": "seconds in the models",
    "unit_seconds": "seconds of units by stage: decode, models, tracker",
    # of a tracking process
    "tracker_busy_seconds": "seconds of tracking and of writing its rows",
    # of the driver
    "videos": "videos that have ended, by status",
    "shards": "shards that have ended, by result: published, failed",
    "published_bytes": "bytes of published objects",
    "track_rows": "published rows of tracks",
    "retries": "units that ended with an error, by verdict: whose fault it was",
    "model_deaths": "model processes that have died, or did not start",
    # of every process
    "storage_retries": "calls of the store that failed and were made again",
}
GAUGES: Mapping[str, str] = {
    # of a model process
    "tracker_backlog_chunks": "chunks handed to trackers that are not tracked yet",
    # of the driver
    "units_queued": "units that wait for a model process",
    "units_running": "units in a model process",
    "models_wanted": "model processes that the job has use for",
    "models_ready": "model processes that are loaded",
    "models_starting": "model processes that are starting or wait for a node",
    "trackers": "tracking processes",
    "shards_publishing": "shards that are being merged and written",
    "videos_left": "videos that have not ended",
}
LABELS: Mapping[str, str] = {
    "unit_seconds": "stage",
    "videos": "status",
    "shards": "result",
    "retries": "verdict",
}
DECODE, MODELS, TRACKER = "decode", "models", "tracker"  # what a unit waits for
PUBLISHED, FAILED = "published", "failed"
BACKLOG = "tracker_backlog_chunks"
_ALMOST_NOTHING = 5e-324  # added to a float, it changes nothing


class Metrics:
    """Metrics of this process; each comes to be when it is first used."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset
        self._made: dict[str, Any] = {}
        self._levels: dict[str, float] = {}
        self._lock = threading.Lock()

    def count(self, name: str, value: float = 1, label: str = "") -> None:
        """Add to a counter of `COUNTERS`; with its label where it is in `LABELS`."""
        if value > 0:
            self._metric(name).inc(value, {LABELS[name]: label} if name in LABELS else None)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to a counter."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.count(name, time.perf_counter() - start)

    def begin(self, name: str, labels: Iterable[str] = ("",)) -> None:
        """Have a counter at the endpoint before it counts, for a rate knows no first event."""
        for label in labels:
            self.count(name, _ALMOST_NOTHING, label)

    def show(self, **values: float) -> None:
        """Set gauges of `GAUGES`. Those not set for 20 s leave the endpoint."""
        for name, value in values.items():
            self._metric(name).set(value)

    def change(self, name: str, by: float) -> None:
        """Raise or lower a gauge that several threads share."""
        with self._lock:
            level = self._levels[name] = self._levels.get(name, 0) + by
        self.show(**{name: level})

    def count_storage_retries(self, *, until_now: bool = False) -> None:
        """Count what the store's door logs of them in this process, or stop doing so."""
        door = logging.getLogger("fourdh_batch.storage")
        for old in [h for h in door.handlers if isinstance(h, _RetryCounter)]:
            door.removeHandler(old)
        if not until_now:
            door.addHandler(_RetryCounter(self))

    def _metric(self, name: str) -> Any:
        with self._lock:
            if name not in self._made:
                kind, texts = (Counter, COUNTERS) if name in COUNTERS else (Gauge, GAUGES)
                tags = ("dataset", LABELS[name]) if name in LABELS else ("dataset",)
                metric = kind(f"fourdh_{name}", texts[name], tags)
                self._made[name] = metric.set_default_tags({"dataset": self._dataset})
            return self._made[name]


def begin_process(config: JobConfig) -> Metrics:
    """What comes first in every process that Ray starts for a job: its log, its metrics."""
    set_up_worker(config.log.format)
    metrics = Metrics(config.dataset)
    metrics.count_storage_retries()
    return metrics


class Laps:
    """Where the time of a unit goes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._at = time.perf_counter()

    def end(self, stage: str) -> None:
        """The time since the last call, or since the beginning, was spent in this stage."""
        now = time.perf_counter()
        self._metrics.count("unit_seconds", now - self._at, stage)
        self._at = now


class _RetryCounter(logging.Handler):
    # `storage` stands below Ray in the order of imports, so it cannot count itself.
    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics

    def emit(self, record: logging.LogRecord) -> None:
        if "attempt %d of %d" in str(record.msg):
            self._metrics.count("storage_retries")

"""What a run would do and take, said without doing it: `fourdh plan`.

Frames come from the manifest or from the headers of a sample of the files; hours and bytes from
what earlier runs of the same models measured, else from assumptions that are named as such.
Nothing is written, unless what was probed is to be remembered.
"""

from __future__ import annotations

import heapq
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

from fourdh_batch.config import JobConfig
from fourdh_batch.errors import FourdhError
from fourdh_batch.pipeline.corpus import Video, stream_corpus
from fourdh_batch.pipeline.increment import Increment, ShardWork
from fourdh_batch.pipeline.probes import ProbeCache
from fourdh_batch.storage import Store
from fourdh_batch.video.probe import Header, read_headers_in_parallel

logger = logging.getLogger(__name__)

MAX_HEADERS = 2000  # a sample of so many tells the frames of a corpus within a few percent
MAX_SHARDS = 24
RUNS_LOOKED_AT, RUNS_USED = 50, 5

# Assumed where nothing better is known; the plan then says so.
ASSUMED_FRAMES_PER_S = 100.0  # of one GPU, not measured: what a detector may do beside the HMR
ASSUMED_ROWS_PER_FRAME = 2.0  # people in a frame of a film
ASSUMED_BYTES_PER_ROW = 2000.0  # of all tables, per row of `tracks`
ASSUMED_BYTES_PER_FRAME = 10_000.0  # of a video file: 2 Mbit/s at 25 frames/s
ASSUMED_FRAMES = 250.0  # of a video of which not even the size is known: ten seconds
ASSUMED_FPS = 25.0

OnStep = Callable[[str, int, int], None]  # what, done, of how many (0: unknown)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a frame takes.

    Attributes:
        source: ``measured`` or ``assumed``.
        runs: ids of the runs that measured it.
        device: what they ran on; "" where assumed.
        seconds_per_frame: of one model process.
        rows_per_frame: rows of `tracks`.
        bytes_per_row: bytes of all tables per row of `tracks`.
    """

    source: str = "assumed"
    runs: tuple[str, ...] = ()
    device: str = ""
    seconds_per_frame: float = 1 / ASSUMED_FRAMES_PER_S
    rows_per_frame: float = ASSUMED_ROWS_PER_FRAME
    bytes_per_row: float = ASSUMED_BYTES_PER_ROW


@dataclass(slots=True)
class _Amount:
    """Work of a shard, or of all."""

    videos: int = 0
    kept: int = 0
    num_bytes: int = 0
    frames: float = 0.0  # of videos whose frames are known
    known: int = 0
    known_bytes: int = 0
    guessed: int = 0  # videos of which only the size is known
    guessed_bytes: int = 0
    blank: int = 0  # videos of which nothing is known

    def add(self, other: _Amount) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def estimate(self, per_byte: float, per_video: float) -> float:
        """Frames, with those that are guessed."""
        return self.frames + self.guessed_bytes * per_byte + self.blank * per_video


@dataclass(slots=True)
class DryRun:
    """What a run would do.

    Attributes:
        models: ``given``; ``last run``: no weights are given, those of the last run are assumed;
            ``unknown``: neither.
        rates: what the estimates are made with.
        changes: per kind, the videos that are not up to date; see `increment.Change`.
        frames_known, frames_guessed: frames to do, of videos whose header or manifest tells them,
            and of the others, by their size.
        shards: of the first shards to do: id, videos, how many of them are kept, MiB and frames.
    """

    models: str
    rates: Rates
    num_videos: int = 0
    num_shards: int = 0
    shards_up_to_date: int = 0
    shards_todo: int = 0
    shards_removed: int = 0
    videos_todo: int = 0
    videos_kept: int = 0
    videos_missing: int = 0
    changes: dict[str, int] = field(default_factory=dict)
    bytes_in: int = 0
    frames_known: int = 0
    frames_guessed: int = 0
    videos_guessed: int = 0
    gpu_hour_cost: float = 0.0
    shards: list[dict[str, Any]] = field(default_factory=list)

    @property
    def frames(self) -> int:
        return self.frames_known + self.frames_guessed

    @property
    def people_rows(self) -> int:
        """Rows of `tracks` to expect."""
        return round(self.frames * self.rates.rows_per_frame)

    @property
    def hours(self) -> float:
        """Of one model process, which is one GPU where the rates are of a GPU."""
        return self.frames * self.rates.seconds_per_frame / 3600

    @property
    def cost(self) -> float | None:
        """In the currency of `plan.gpu_hour_cost`; None without one, and for runs on CPU."""
        on_cpu = self.rates.device == "cpu"
        return self.hours * self.gpu_hour_cost if self.gpu_hour_cost and not on_cpu else None

    @property
    def bytes_out(self) -> int:
        """Of all tables."""
        return round(self.people_rows * self.rates.bytes_per_row)

    def to_dict(self) -> dict[str, Any]:
        """All of it by name, as JSON holds it."""
        names = ("frames", "people_rows", "hours", "cost", "bytes_out")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


def dry_run(
    config: JobConfig,
    *,
    max_headers: int = MAX_HEADERS,
    max_shards: int = MAX_SHARDS,
    remember: bool = False,
    on_step: OnStep = lambda what, done, total: None,
) -> DryRun:
    """Hold the corpus against the output and estimate the rest.

    Args:
        config: settings of the job.
        max_headers: files whose header is read, where the manifest has no `num_frames`; if there
            are more, an even sample of so many.
        max_shards: described one by one.
        remember: keep what was probed below the output, for the next plan and run.
        on_step: told how far it is.
    Raises:
        ManifestError, ConfigError: as a run would.
    """
    store = Store(config.output)
    runs = list(_runs(store))
    models, card = _models(config, runs)
    result = DryRun(models, _rates(config, card, runs), gpu_hour_cost=config.plan.gpu_hour_cost)
    with ProbeCache(store, config.dataset) as cache:
        videos = _counted(stream_corpus(config, cache=cache), on_step)
        with Increment(
            store, config, str(card.get("fingerprint", "")), videos, record=False
        ) as plan:
            result.num_videos, result.num_shards = plan.num_videos, plan.num_shards
            result.shards_up_to_date = plan.num_shards_before
            result.shards_todo = plan.todo_shards
            result.videos_todo, result.bytes_in = plan.todo_videos, plan.todo_bytes
            result.videos_missing, result.changes = plan.num_missing, dict(plan.num_changes)
            if config.plan.remove_missing:
                result.shards_removed = sum(1 for _ in plan.removed())
            _ask_headers(plan, cache, max_headers, on_step)
            _add_frames(result, plan, cache, max_shards)
        if remember:
            cache.save(forget_unseen=not config.plan.limit)
    return result


def _counted(videos: Iterable[Video], on_step: OnStep) -> Iterator[Video]:
    for number, video in enumerate(videos, start=1):
        if number % 100 == 0:
            on_step("videos", number, 0)
        yield video


# --- frames ------------------------------------------------------------------------------------


def _todo(work: ShardWork) -> Iterator[Video]:
    return (video for video in work.shard.videos if video.video_id not in work.keep)


def _ask_headers(plan: Increment, cache: ProbeCache, max_headers: int, on_step: OnStep) -> None:
    """Have the cache know the headers of the files to do, or of an even sample of them."""
    unknown = (
        (blake2b(video.video_id.encode(), digest_size=8).digest(), video)
        for work in plan.work()
        for video in _todo(work)
        if not _said(video).num_frames and cache.header(video.content_fingerprint) is None
    )
    sample = heapq.nsmallest(max_headers, unknown, key=lambda item: item[0])
    asked = ((video.content_fingerprint, video.uri) for _, video in sample)
    for done, (fingerprint, header) in enumerate(read_headers_in_parallel(asked), start=1):
        cache.add_header(fingerprint, header)
        on_step("headers", done, len(sample))


def _add_frames(result: DryRun, plan: Increment, cache: ProbeCache, max_shards: int) -> None:
    total = _Amount()
    first: list[tuple[str, _Amount]] = []
    for work in plan.work():
        amount = _Amount(videos=len(work.shard.videos), kept=len(work.keep))
        for video in _todo(work):
            amount.num_bytes += video.num_bytes
            said = _said(video)
            if not said.num_frames:
                said = cache.header(video.content_fingerprint) or said
            frames = _frames(video, said)
            if frames is not None:
                amount.frames += frames
                amount.known += 1
                amount.known_bytes += video.num_bytes
            elif video.num_bytes:
                amount.guessed += 1
                amount.guessed_bytes += video.num_bytes
            else:
                amount.blank += 1
        total.add(amount)
        if len(first) < max_shards:
            first.append((work.shard.shard_id, amount))
    per_byte = 1 / ASSUMED_BYTES_PER_FRAME
    if total.known_bytes and total.frames:
        per_byte = total.frames / total.known_bytes
    per_video = total.frames / total.known if total.known else ASSUMED_FRAMES
    result.videos_kept = total.kept
    result.frames_known = round(total.frames)
    result.frames_guessed = round(total.estimate(per_byte, per_video) - total.frames)
    result.videos_guessed = total.guessed + total.blank
    result.shards = [
        {
            "shard": shard_id,
            "videos": amount.videos,
            "kept": amount.kept,
            "mib": round(amount.num_bytes / (1 << 20), 1),
            "frames": round(amount.estimate(per_byte, per_video)),
        }
        for shard_id, amount in first
    ]


def _said(video: Video) -> Header:
    """Frames and rate that the manifest tells."""
    if '"num_frames"' not in video.extra:
        return Header()
    extra = json.loads(video.extra)
    num_frames, fps = _positive(extra.get("num_frames")), _positive(extra.get("fps"))
    return Header(None if num_frames is None else int(num_frames), fps)


def _positive(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if 0 < number < 1e12 else None


def _frames(video: Video, header: Header) -> float | None:
    """Frames of the window of a video; None where unknown, or where the header must be lying."""
    num_frames: float | None = header.num_frames
    if num_frames is not None and 0 < video.num_bytes < num_frames:
        return None  # no frame is smaller than a byte
    if header.problem:
        return 0.0  # it will not open in a run either
    if video.start_s is None and video.end_s is None:
        return num_frames
    fps = header.fps or ASSUMED_FPS
    end_s = video.end_s
    if num_frames is not None:
        end_s = min(num_frames / fps, num_frames / fps if end_s is None else end_s)
    return None if end_s is None else max(0.0, end_s - (video.start_s or 0.0)) * fps


# --- models and rates --------------------------------------------------------------------------


def _models(config: JobConfig, runs: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The model card of the run that is planned, and where it is from."""
    if config.hmr.weights and config.detector.path:
        from fourdh_batch.pipeline.engine import model_card  # loads the model libraries

        card = model_card(config)
        names = ("fingerprint", "weights", "detector")
        return "given", {name: getattr(card, name) for name in names}
    for run in runs:
        if run.get("dataset", config.dataset) == config.dataset:
            return "last run", run["models"]
    return "unknown", {}


def _runs(store: Store) -> Iterator[dict[str, Any]]:
    """Records of the newest runs, newest first; what is no such record is passed over."""
    keys = sorted((key for key, _ in store.list("_runs") if key.endswith(".json")), reverse=True)
    for key in keys[:RUNS_LOOKED_AT]:
        try:
            run = json.loads(store.read_bytes(key))
            if isinstance(run, dict) and isinstance(run["models"]["fingerprint"], str):
                yield run
        except (FourdhError, FileNotFoundError, ValueError, KeyError, TypeError) as error:
            logger.debug("%s is passed over: %r", key, error)


def _rates(config: JobConfig, card: dict[str, Any], runs: list[dict[str, Any]]) -> Rates:
    """From the newest runs with the same weights and detector on one kind of device."""
    device = "cpu" if config.hmr.device == "cpu" else ""
    used: list[tuple[str, dict[str, float]]] = []
    for run in runs:
        work = _work_of(run)
        same = all(run["models"].get(name) == card.get(name) for name in ("weights", "detector"))
        if work is None or not same:
            continue
        ran_on = str(run["work"].get("device", ""))
        if device not in ("", ran_on):
            continue
        device = ran_on
        used.append((str(run.get("run_id", "")), work))
        if len(used) == RUNS_USED:
            break
    if not used:
        return Rates()
    frames, seconds, rows, size = (
        sum(work[name] for _, work in used)
        for name in ("frames", "actor_seconds", "track_rows", "object_bytes")
    )
    return Rates(
        source="measured",
        runs=tuple(run_id for run_id, _ in used),
        device=device,
        seconds_per_frame=seconds / frames,
        rows_per_frame=rows / frames,
        bytes_per_row=size / rows if rows else ASSUMED_BYTES_PER_ROW,
    )


def _work_of(run: dict[str, Any]) -> dict[str, float] | None:
    """What a run measured; None where it did not, or tells nonsense."""
    try:
        names = ("frames", "actor_seconds", "track_rows", "object_bytes")
        work = {name: float(run["work"][name]) for name in names}
    except (KeyError, TypeError, ValueError):
        return None
    sound = work["frames"] > 0 and work["actor_seconds"] > 0
    return work if sound and all(0 <= number < 1e18 for number in work.values()) else None

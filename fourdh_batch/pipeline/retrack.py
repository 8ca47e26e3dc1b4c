"""Tracking again: from bodies that are already known to tables, without a video and a network.

The bodies come from another pose engine (`models/poses_given.py`) or from an earlier run of this
package. They go through the same tracker, rows and publishing as those of the main job, so the
tables, the plan, the commits and a rerun are the same, too.

Runs in processes of this machine: a video takes milliseconds per frame and no GPU, and reading is
most of it. torch is loaded where keypoints have to be made of the bodies.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fourdh_batch import __version__
from fourdh_batch.config import JobConfig, require, to_dict
from fourdh_batch.errors import (
    ConfigError,
    FourdhError,
    ManifestError,
    StorageError,
    VideoError,
)
from fourdh_batch.models.detector import drop_reasons
from fourdh_batch.models.poses_given import (
    LAYOUTS,
    GivenVideo,
    PoseSource,
    VideoPoses,
    columns_of,
    open_poses,
    rows_of_columns,
    settle,
)
from fourdh_batch.pipeline.following import TrackerModels
from fourdh_batch.pipeline.plan import Shard, Video, plan_shards
from fourdh_batch.pipeline.records import UNTRAINED, ChunkResult, ModelCard
from fourdh_batch.pipeline.shard import (
    FAILED,
    OK,
    PARTIAL,
    QUARANTINED,
    ShardReport,
    Spool,
    VideoOutcome,
    VideoTracking,
    finished_outcome,
    publish,
)
from fourdh_batch.storage import Store, open_read
from fourdh_batch.tables.frames import FrameRuns
from fourdh_batch.tables.manifest import (
    CODE_VERSION,
    COMMITS,
    LEASE_S,
    CommitRecord,
    Lease,
    commit_key,
    fingerprint_of,
    read_commits,
)
from fourdh_batch.tables.reader import read_arrow
from fourdh_batch.tables.schema import TABLES, schema_version
from fourdh_batch.tables.writer import VideoSpool, discard_work
from fourdh_batch.types import Detections, People

logger = logging.getLogger(__name__)

OURS = "ours"
ALL_LAYOUTS = ("auto", OURS, *LAYOUTS)
IMPORTED = "imported"  # what the tables say of weights that we know nothing about
READERS_VERSION = 1  # raised when the same files give other rows
PROGRESS_S = 0.5
BYTES_PER_DETECTION = 1_000  # about; only shares out the work of an earlier run
STORAGE_ATTEMPTS = 3
SETTINGS_HELP = """\
  layout='auto': what the input is: ours (output of an earlier run), parquet, npz, phalp, pare,
    pymafx, cliff; auto looks
  image_size='': WIDTHxHEIGHT of all videos, for files that do not tell (cliff)
  fps=0: frames per second of all videos, for files that do not tell; 0: 30 for times, unknown
    in `videos`
  looks=true: use the compact appearance vectors where the input has them
  workers=0: processes; 0: one per core
"""


@dataclass(frozen=True, slots=True)
class PoseSettings:
    """How the input of a retracking job is read.

    Attributes:
        layout: one of `ALL_LAYOUTS`.
        image_size: ``WIDTHxHEIGHT`` in pixels for files that do not tell; empty: unknown.
        fps: for files that do not tell; 0: unknown.
        looks: use compact appearance vectors where there are any.
        workers: processes; 0: one per core.
    """

    layout: str = "auto"
    image_size: str = ""
    fps: float = 0.0
    looks: bool = True
    workers: int = 0

    def __post_init__(self) -> None:
        if self.layout not in ALL_LAYOUTS:
            raise ConfigError(
                f"layout: expected one of {', '.join(ALL_LAYOUTS)}, got {self.layout!r}"
            )
        if not 0 <= self.fps < 10_000:
            raise ConfigError(f"fps: expected 0 to 10000, got {self.fps}")
        if self.workers < 0:
            raise ConfigError(f"workers: expected 0 or more, got {self.workers}")
        self.size_wh()

    def size_wh(self) -> tuple[int, int] | None:
        """Width and height, None where not given. Raises: ConfigError."""
        if not self.image_size:
            return None
        width, cross, height = self.image_size.lower().partition("x")
        if not (cross and width.isdecimal() and height.isdecimal() and int(width) * int(height)):
            raise ConfigError(
                f"image_size: expected WIDTHxHEIGHT such as 1280x720, got {self.image_size!r}"
            )
        return int(width), int(height)


def split_settings(words: Sequence[str]) -> tuple[PoseSettings, list[str]]:
    """The settings of this job among `key=value` words, and the words for `load_config`.

    Raises:
        ConfigError: a value is impossible.
    """
    given: dict[str, Any] = {}
    rest = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in PoseSettings.__slots__:
            rest.append(word)
            continue
        try:
            if key == "fps":
                given[key] = float(value)
            elif key == "workers":
                given[key] = int(value)
            elif key == "looks":
                given[key] = {"true": True, "false": False}[value.lower()]
            else:
                given[key] = value
        except (ValueError, KeyError) as error:
            kind = {"fps": "a number", "workers": "a whole number"}.get(key, "true or false")
            raise ConfigError(f"{key}: expected {kind}, got {value!r}") from error
    return PoseSettings(**given), rest


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a running job is; the fields of the main job's progress."""

    videos_done: int
    videos_total: int
    bytes_done: int
    bytes_total: int
    frames_done: int
    shards_done: int
    shards_total: int


@dataclass(slots=True)
class RetrackReport:
    """How a job ended; the fields of the main job's report.

    Attributes:
        shards: reports of the shards that this run published.
        num_shards_before: shards that were up to date already.
        videos_before: per status, the videos in those.
        failed_shards: shard and reason; nothing of these was published.
        seconds: wall time of the run.
    """

    run_id: str
    output: str
    card: ModelCard
    shards: list[ShardReport] = field(default_factory=list)
    num_shards_before: int = 0
    videos_before: dict[str, int] = field(default_factory=dict)
    failed_shards: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def outcomes(self) -> list[VideoOutcome]:
        return [outcome for shard in self.shards for outcome in shard.outcomes]

    def videos(self, status: str) -> int:
        """Videos of the input that ended with this status, now or before."""
        now = sum(outcome.status == status for outcome in self.outcomes)
        return now + self.videos_before.get(status, 0)

    @property
    def exit_code(self) -> int:
        """0 all done; 3 done, but some videos failed, in part or wholly; 1 shards are missing."""
        if self.failed_shards:
            return 1
        return 3 if any(self.videos(s) for s in (PARTIAL, FAILED, QUARANTINED)) else 0


# --- the job -----------------------------------------------------------------------------------


def retrack(
    config: JobConfig,
    settings: PoseSettings | None = None,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> RetrackReport:
    """Bring the tables under `config.output` up to date with the poses under `config.input`.

    Raises:
        ConfigError, ManifestError: before any work is done.
        OutputInUseError: another driver is writing to this output.
    """
    settings = settings or PoseSettings()
    require(config, "input", "output")
    started = time.monotonic()
    store = Store(config.output)
    if Store(config.input).root == store.root:
        raise ConfigError(f"output: expected another place than input, got {config.output}")
    layout = resolved_layout(config.input, settings)
    source = open_source(config.input, settings)
    _open_source_once.cache_clear()  # of an earlier call in this process; files may have changed
    given = source.videos()
    if config.plan.limit:
        given = given[: config.plan.limit]
    videos = [Video(v.video_id, v.uri, v.num_bytes, v.fingerprint) for v in given]
    card = planning_card(config, settings, layout)
    run_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"
    report = RetrackReport(run_id=run_id, output=config.output, card=card)
    with Lease(store) as lease:
        shards = plan_shards(
            store,
            config.dataset,
            videos,
            videos_per_shard=config.plan.videos_per_shard,
            mb_per_shard=config.plan.mb_per_shard,
        )
        commits = read_commits(store)
        todo = []
        for shard in shards:
            commit = commits.get(shard.shard_id)
            if commit is None or _must_redo(shard, commit, card, config):
                todo.append(shard)
                continue
            report.num_shards_before += 1
            discard_work(store, shard.shard_id)
            for record in commit.videos:
                count = report.videos_before.get(record.status, 0)
                report.videos_before[record.status] = count + 1
        _drop_or_refuse(store, config, shards, todo, commits)
        logger.info(
            "run %s: %d videos in %d shards, %d shards to do, layout %s",
            *(run_id, len(videos), len(shards), len(todo), layout),
        )
        if todo:
            report.card = card = full_card(card, config, source)
            _Run(config, settings, card, store, report, lease.renew, on_progress).run(todo)
        report.seconds = round(time.monotonic() - started, 3)
        _record_run(store, config, settings, report)
    return report


class _Run:
    """The shards that are not up to date, video by video."""

    def __init__(
        self,
        config: JobConfig,
        settings: PoseSettings,
        card: ModelCard,
        store: Store,
        report: RetrackReport,
        renew_lease: Callable[[], None],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._config = config
        self._settings = settings
        self._card = card
        self._store = store
        self._report = report
        self._renew_lease = renew_lease
        self._on_progress = on_progress
        self._outcomes: dict[str, dict[str, VideoOutcome]] = {}
        self._shards: dict[str, Shard] = {}
        self._renewed = self._shown = time.monotonic()

    def run(self, shards: Sequence[Shard]) -> None:
        self._shards = {shard.shard_id: shard for shard in shards}
        self._outcomes = {shard.shard_id: {} for shard in shards}
        units = [(shard, video) for shard in shards for video in shard.videos]
        workers = min(self._settings.workers or os.cpu_count() or 1, len(units))
        for shard, video, result in self._results(units, workers):
            if isinstance(result, Exception):
                self._fail_shard(shard, str(result))
            else:
                self._done(shard, video, result)
            self._tick()
        self._on_progress(self._progress())

    def _results(
        self, units: Sequence[tuple[Shard, Video]], workers: int
    ) -> Iterator[tuple[Shard, Video, VideoOutcome | StorageError]]:
        """Every unit with its outcome, in any order."""
        if workers <= 1:
            for shard, video in units:
                if shard.shard_id not in self._report.failed_shards:
                    yield shard, video, self._one(shard, video)
            return
        context = get_context("spawn")  # a fork would copy the threads of Arrow and torch
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            waiting = iter(units)
            running: dict[Future[VideoOutcome], tuple[Shard, Video]] = {}
            try:
                while True:
                    while len(running) < 2 * workers and (unit := next(waiting, None)):
                        future = pool.submit(
                            retrack_video, self._config, self._settings, self._card, *unit
                        )
                        running[future] = unit
                    if not running:
                        return
                    done, _ = wait(running, timeout=PROGRESS_S, return_when=FIRST_COMPLETED)
                    self._tick()
                    for future in done:
                        shard, video = running.pop(future)
                        try:
                            yield shard, video, future.result()
                        except StorageError as error:
                            yield shard, video, error
            except BrokenProcessPool as error:
                names = ", ".join(video.video_id for _, video in running.values())
                raise FourdhError(
                    f"a tracking process died (out of memory?) while one of these was read: "
                    f"{names}. The same command goes on; fewer workers need less memory"
                ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, shard: Shard, video: Video) -> VideoOutcome | StorageError:
        try:
            return retrack_video(self._config, self._settings, self._card, shard, video)
        except StorageError as error:
            return error

    def _done(self, shard: Shard, video: Video, outcome: VideoOutcome) -> None:
        if shard.shard_id in self._report.failed_shards:
            return
        outcomes = self._outcomes[shard.shard_id]
        outcomes[video.video_id] = outcome
        if outcome.problem:
            logger.warning(
                "shard %s, video %s: %s: %s",
                *(shard.shard_id, video.video_id, outcome.status, outcome.problem),
            )
        if len(outcomes) < len(shard.videos):
            return
        ordered = [outcomes[v.video_id] for v in shard.videos]
        for attempt in range(1, STORAGE_ATTEMPTS + 1):
            try:
                published = publish(self._store, self._config, self._card, shard, ordered)
            except StorageError as error:
                if attempt == STORAGE_ATTEMPTS:
                    self._fail_shard(shard, str(error))
                continue
            logger.info("%s", published.line())
            self._report.shards.append(published)
            return

    def _fail_shard(self, shard: Shard, reason: str) -> None:
        logger.error("shard %s: not published: %s", shard.shard_id, reason)
        self._report.failed_shards[shard.shard_id] = reason

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._renewed > LEASE_S / 3:
            self._renew_lease()
            self._renewed = now
        if now - self._shown > PROGRESS_S:
            self._shown = now
            self._on_progress(self._progress())

    def _progress(self) -> Progress:
        shards = self._shards.values()
        return Progress(
            videos_done=sum(map(len, self._outcomes.values())),
            videos_total=sum(len(s.videos) for s in shards),
            bytes_done=sum(
                v.num_bytes
                for s in shards
                for v in s.videos
                if v.video_id in self._outcomes[s.shard_id]
            ),
            bytes_total=sum(v.num_bytes for s in shards for v in s.videos),
            frames_done=sum(o.num_frames for d in self._outcomes.values() for o in d.values()),
            shards_done=len(self._report.shards),
            shards_total=len(self._shards),
        )


def _must_redo(shard: Shard, commit: CommitRecord, card: ModelCard, config: JobConfig) -> bool:
    """Whether a finished shard differs from what a run of today would make of it."""
    if config.plan.retry_quarantined and any(v.status == QUARANTINED for v in commit.videos):
        return True
    if commit.fingerprint == shard.fingerprint(card.fingerprint):
        return False
    done = {video.video_id: video.content_fingerprint for video in commit.videos}
    unchanged = commit.model_fingerprint == card.fingerprint and all(
        done.get(video.video_id) == video.fingerprint for video in shard.videos
    )
    return config.plan.remove_missing or not unchanged


def _drop_or_refuse(
    store: Store,
    config: JobConfig,
    shards: Sequence[Shard],
    todo: Sequence[Shard],
    commits: Mapping[str, CommitRecord],
) -> None:
    """What is finished but not in the input any more: let go where asked for, else kept."""
    if config.plan.remove_missing:
        planned = {shard.shard_id for shard in shards}
        for done in commits.values():
            if done.dataset == config.dataset and done.shard_id not in planned:
                store.delete(commit_key(done.shard_id))
                for record in done.objects.values():
                    store.delete(record.key)
        return
    for shard in todo:
        today = {video.video_id for video in shard.videos}
        commit = commits.get(shard.shard_id)
        lost = [v.video_id for v in commit.videos if v.video_id not in today] if commit else []
        if lost:
            raise ManifestError(
                f"this run would remove {len(lost)} finished videos that are not in the input, "
                f"for example {lost[0]!r}: they share a shard with videos that must be redone. "
                "Give the whole input, or plan.remove_missing=true to let them go"
            )


def _record_run(
    store: Store, config: JobConfig, settings: PoseSettings, report: RetrackReport
) -> None:
    """`_runs/<run_id>.json`: settings as run, versions, totals."""
    record = {
        "run_id": report.run_id,
        "version": __version__,
        "config": to_dict(config),
        "poses": asdict(settings),
        "models": asdict(report.card),
        "seconds": report.seconds,
        "shards_done": [shard.shard_id for shard in report.shards],
        "shards_up_to_date": report.num_shards_before,
        "shards_failed": report.failed_shards,
        "videos": {s: report.videos(s) for s in (OK, PARTIAL, FAILED, QUARANTINED)},
        "frames": sum(outcome.num_frames for outcome in report.outcomes),
        "people": sum(outcome.num_people for outcome in report.outcomes),
        "track_rows": sum(shard.num_track_rows for shard in report.shards),
    }
    store.write_bytes(f"_runs/{report.run_id}.json", json.dumps(record, indent=1).encode())


# --- one video ---------------------------------------------------------------------------------


def retrack_video(
    config: JobConfig, settings: PoseSettings, card: ModelCard, shard: Shard, video: Video
) -> VideoOutcome:
    """Read the poses of a video, track, and spool its rows; in any process.

    Raises:
        FourdhError: settings or storage; errors of the video become rows in `failures`.
    """
    spool = VideoSpool(Store(config.output), shard.shard_id, video.video_id)
    outcome = finished_outcome(spool, video, card)
    if outcome is not None:
        return outcome
    spool.discard()
    source = _open_source_once(config.input, settings)
    known: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    status = OK
    poses: VideoPoses | None = None
    error: VideoError | None = None
    try:
        poses = source.read(GivenVideo(video.video_id, video.uri, 0, video.fingerprint))
    except VideoError as broken:
        error = broken
    if isinstance(source, EarlierRun):
        known, history, status = source.told_before(video.video_id)
    elif poses is not None:
        known = {"fps": poses.fps}
        if len(poses.frame_row):
            width, height = poses.image_size_px[0].tolist()
            known |= {"width": width, "height": height}
    has_looks = settings.looks and poses is not None and poses.appearance is not None
    models = _models_once(_Hashable(config), has_looks)
    tracking = _KnownVideo(
        video,
        shard_id=shard.shard_id,
        dataset=shard.dataset,
        config=_without_shot_rule(config),
        card=card,
        spool=_WithKnown(spool, known),
        models=models,
    )
    if poses is None:
        assert error is not None
        return tracking.fail(error)
    tracking.begin_shots_at(poses.frame_index[poses.is_shot_start].tolist())
    for chunk in chunks_of(poses, video.video_id, config, models):
        tracking.add(chunk)
    return tracking.end(status, history)


def chunks_of(
    poses: VideoPoses, video_id: str, config: JobConfig, models: TrackerModels
) -> Iterator[ChunkResult]:
    """A video in chunks, as the engine would give them."""
    size = poses.image_size_px
    wanted = config.detector
    kept = np.flatnonzero(poses.drop_reason == "")
    starts = {0, *(np.flatnonzero((np.diff(size, axis=0) != 0).any(1)) + 1).tolist()}
    starts |= set(range(0, len(size), config.video.chunk_frames))
    edges = [*sorted(starts), len(size)] if len(size) else []
    for first, stop in pairwise(edges):
        row = slice(*np.searchsorted(poses.frame_row, [first, stop]).tolist())
        detections = Detections(
            frame_row=poses.frame_row[row] - first,
            bbox_xyxy_px=poses.bbox_xyxy_px[row],
            score=poses.score[row],
            masks=None if poses.masks is None else poses.masks[row],
            mask_source="box" if poses.masks is None else "detector",
        )
        reason = poses.drop_reason[row]
        filtered = drop_reasons(
            detections,
            score_threshold=wanted.score_threshold,
            min_width_px=wanted.min_width_px,
            min_height_px=wanted.min_height_px,
        )
        if not wanted.score_threshold:  # strictly greater than: a score of 0 is no reason here
            filtered = np.where(filtered == "low_score", "", filtered)
        reason = np.where(reason == "", filtered, reason)
        body = np.searchsorted(kept, np.arange(row.start, row.stop)[reason == ""])
        global_orient, body_pose = poses.global_orient[body], poses.body_pose[body]
        betas = poses.betas[body]
        looks = poses.appearance
        width, height = size[first].tolist()
        yield ChunkResult(
            video_id=video_id,
            frame_index=poses.frame_index[first:stop],
            pts_s=poses.pts_s[first:stop],
            shot_scores=None,
            image_size_wh=(width, height),
            detections=detections,
            drop_reason=reason,
            people=People(
                global_orient=global_orient,
                body_pose=body_pose,
                betas=betas,
                pred_cam=poses.pred_cam[body],
                box_center_px=poses.box_center_px[body],
                box_size_px=poses.box_size_px[body],
                keypoints_3d_m=(
                    _keypoints(models, config, global_orient, body_pose, betas)
                    if len(body)
                    else np.zeros((0, 44, 3), np.float32)
                ),
            ),
            appearance=None if looks is None else looks[body],
        )


def _keypoints(models: TrackerModels, config: JobConfig, *pose: Any) -> Any:
    import torch

    if torch.get_num_threads() != config.hmr.cpu_threads:
        # As for the models: the number of threads may change the last bit of a result.
        torch.set_num_threads(config.hmr.cpu_threads)
    return models.keypoints(*pose)


class _KnownVideo(VideoTracking):
    """A video that is not decoded: its cuts and its end are known."""

    def begin_shots_at(self, frames: Sequence[int]) -> None:
        self._cuts.update(frames)

    def end(self, status: str, failures: list[dict[str, Any]]) -> VideoOutcome:
        return self._close(status, None, failures)


class _WithKnown:
    """Adds to the row of `videos` what is known of the file, in the place of a decoder."""

    def __init__(self, spool: Spool, known: Mapping[str, Any]) -> None:
        self._spool = spool
        self._known = {name: value for name, value in known.items() if value is not None}

    def append(self, name: str, table: Any) -> None:
        if name == "videos":
            for column, value in self._known.items():
                at = table.schema.get_field_index(column)
                kind = table.schema.field(at)
                table = table.set_column(at, kind, pa.array([value], kind.type))
        self._spool.append(name, table)

    def finish(self, metadata: dict[str, Any]) -> None:
        self._spool.finish(metadata)


def _without_shot_rule(config: JobConfig) -> JobConfig:
    """There are no pictures to score: cuts come from the input."""
    return replace(config, video=replace(config.video, detect_shots=False))


class _Hashable:
    """Settings as the key of a cache."""

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self._text = json.dumps(to_dict(config), sort_keys=True)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self._text == other._text


@lru_cache(maxsize=2)
def _models_once(key: _Hashable, has_looks: bool) -> TrackerModels:
    """Texture maps are never at hand here, so their encoder is not wanted."""
    config = key.config
    tracker = replace(config.tracker, texture_weights="")
    return TrackerModels(replace(config, tracker=tracker), compact=has_looks)


# --- sources -----------------------------------------------------------------------------------


def resolved_layout(path: str, settings: PoseSettings) -> str:
    """`auto` as `ours` where the input is an output root, else as given."""
    if settings.layout != "auto":
        return settings.layout
    try:
        is_root = bool(Store(path).list(COMMITS))
    except (StorageError, OSError, ValueError):
        is_root = False
    return OURS if is_root else "auto"


def open_source(path: str, settings: PoseSettings) -> PoseSource:
    """Whatever the input is.

    Raises:
        ConfigError, ManifestError: nothing there.
    """
    if resolved_layout(path, settings) == OURS:
        return EarlierRun(path, image_size_px=settings.size_wh())
    return open_poses(
        path,
        layout=settings.layout,
        image_size_px=settings.size_wh(),
        fps=settings.fps or None,
    )


@lru_cache(maxsize=2)
def _open_source_once(path: str, settings: PoseSettings) -> PoseSource:
    return open_source(path, settings)


class EarlierRun:
    """The tables of an earlier run of this package.

    Taken are all boxes with their bodies from `detections` where the run kept them
    (`tracker.store_appearance`), else the detected rows of `tracks`: then boxes that were in no
    track cannot come back.

    Args:
        root: its output.
        image_size_px: where neither the rows nor `videos` tell.
    """

    def __init__(self, root: str, *, image_size_px: tuple[int, int] | None = None) -> None:
        self._root = root
        self._image_size_px = image_size_px
        try:
            self._videos = read_arrow(root, "videos")
        except FileNotFoundError as error:
            raise ManifestError(f"input {root}: no output of an earlier run: {error}") from error
        ids = self._videos["video_id"].to_pylist()
        self._row = {video_id: row for row, video_id in enumerate(ids)}
        if len(self._row) < len(ids):
            twice = next(name for name in ids if ids.count(name) > 1)
            raise ManifestError(
                f"input {root}: video {twice!r} stands in several datasets; track them one by one"
            )

    def videos(self) -> list[GivenVideo]:
        """See `PoseSource.videos`; `uri` is that of the video itself."""
        told = ("content_fingerprint", "model_fingerprint", "status", "frames_decoded")
        found = []
        for video_id in sorted(self._row):
            row = self._known(video_id)
            content = fingerprint_of({name: row[name] for name in (*told, "num_detections")})
            num_bytes = BYTES_PER_DETECTION * max(1, row["num_detections"])
            found.append(GivenVideo(video_id, row["uri"], num_bytes, content))
        return found

    def read(self, video: GivenVideo) -> VideoPoses:
        """See `PoseSource.read`."""
        video_id = video.video_id
        row = self._known(video_id)
        table = read_arrow(
            self._root, "detections", columns=_FROM_DETECTIONS, video_id=video_id
        ).sort_by([("frame_index", "ascending"), ("detection_index", "ascending")])
        where = f"{self._root}/detections"
        if table["pred_cam"].null_count == table.num_rows:
            where = f"{self._root}/tracks"
            table = read_arrow(
                self._root,
                "tracks",
                columns=_FROM_TRACKS,
                filters=[("state", "==", "detected")],
                video_id=video_id,
            )
        columns = columns_of(table, where, video_id)
        size = self._image_size_px
        if row["width"] and row["height"]:
            size = row["width"], row["height"]
        rows = rows_of_columns(_all_fields(columns), where, video_id, size or (1, 1))
        if row["frame_runs"]:
            listed = FrameRuns.from_json(row["frame_runs"]).frames()
            rows = replace(
                rows,
                frames=listed.frame_index,
                frame_pts_s=listed.pts_s,
                cuts=listed.frame_index[listed.is_shot_start],
            )
        else:
            rows = replace(rows, frames=_frames_decoded(row), cuts=_cuts_of_shots(table))
        return settle(replace(rows, fps=row["fps"]), video_id)

    def told_before(self, video_id: str) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
        """What the decoder told of a video: columns of `videos`, rows of `failures`, status."""
        row = self._known(video_id)
        failures = read_arrow(self._root, "failures", columns=_FAILURE, video_id=video_id)
        return {name: row[name] for name in _DECODER}, failures.to_pylist(), row["status"]

    def origin(self) -> tuple[str, str]:
        """Origin of the weights and name of the body behind the rows; "" where unknown.

        Raises:
            ConfigError: shards of different bodies.
        """
        weights: set[str] = set()
        bodies: set[str] = set()
        with_people = self._videos.filter(pc.greater(self._videos["num_tracks"], 0))
        fingerprints = pc.unique(with_people["model_fingerprint"]).to_pylist()
        for fingerprint in fingerprints:
            of_model = with_people.filter(pc.equal(with_people["model_fingerprint"], fingerprint))
            first = of_model["video_id"][0].as_py()
            rows = read_arrow(
                self._root, "tracks", columns=["weights", "body_model"], video_id=first
            )
            weights |= set(pc.unique(rows["weights"]).to_pylist())
            bodies |= set(pc.unique(rows["body_model"]).to_pylist())
        if len(bodies) > 1:
            raise ConfigError(f"input {self._root}: expected one body, got {sorted(bodies)}")
        if UNTRAINED in weights:
            return UNTRAINED, next(iter(bodies), "")
        return weights.pop() if len(weights) == 1 else IMPORTED, next(iter(bodies), "")

    def _known(self, video_id: str) -> dict[str, Any]:
        row: dict[str, Any] = self._videos.slice(self._row[video_id], 1).to_pylist()[0]
        return row


_BODY = (
    *("frame_index", "pts_s", "bbox_xyxy_px", "score", "global_orient", "body_pose", "betas"),
    *("pred_cam", "box_center_px", "box_size_px", "image_size_px", "shot_id"),
)
_FROM_TRACKS = list(_BODY)
_FROM_DETECTIONS = [
    *_BODY,
    *("detection_index", "mask_rle", "drop_reason", "appearance"),
]
_FAILURE = ["stage", "error_class", "code", "message", "frame_index", "attempts"]
_DECODER = (
    *("container", "codec", "pix_fmt", "width", "height", "fps", "time_base", "frames_declared"),
    *("frames_scanned", "duration_s", "rotation_deg", "damage", "decoder"),
)


def _all_fields(columns: dict[str, Any]) -> dict[str, Any]:
    """Columns that are null throughout, for a video without bodies."""
    n = len(columns["frame_index"])
    sizes = {"global_orient": 9, "body_pose": 207, "betas": 10, "pred_cam": 3}
    return {**{name: np.full((n, size), np.nan) for name, size in sizes.items()}, **columns}


def _frames_decoded(row: Mapping[str, Any]) -> Any:
    """Indices of the decoded frames, from their number and the lost spans."""
    num = int(row["frames_decoded"])
    lost = [
        (d["first_frame_index"], d["last_frame_index"])
        for d in json.loads(row["damage"] or "[]")
        if d["last_frame_index"] is not None
    ]
    total = num + sum(last - first + 1 for first, last in lost)
    frames = np.arange(total)
    for first, last in lost:
        frames = frames[(frames < first) | (frames > last)]
    return frames[:num]


def _cuts_of_shots(table: Any) -> Any:
    """Frames of the first row of every shot but the first."""
    known = table.filter(pc.is_valid(table["shot_id"]))
    frame, shot = known["frame_index"].to_numpy(), known["shot_id"].to_numpy()
    shots, first = np.unique(shot, return_index=True)
    return frame[first[shots > 0]].astype(np.int64)


# --- what the rows depend on -------------------------------------------------------------------


def planning_card(config: JobConfig, settings: PoseSettings, layout: str) -> ModelCard:
    """Digest of everything but the input that decides what the rows hold.

    Known without torch, so that a run that has nothing to do is quick; the names of body and
    weights are filled in by `full_card`.
    """
    hmr, tracker, wanted = config.hmr, config.tracker, config.detector
    predictor = tracker.predictor_weights
    digests = {
        "body": _digest(hmr.body, "hmr.body"),
        "extra_regressor": _digest(hmr.extra_regressor, "hmr.extra_regressor"),
        "predictor": predictor
        if predictor == UNTRAINED
        else _digest(predictor, "tracker.predictor_weights"),
    }
    poses = {"layout": layout, "image_size": settings.image_size, "fps": settings.fps}
    fingerprint = fingerprint_of(
        {
            "job": "retrack",
            "code": CODE_VERSION,
            "readers": READERS_VERSION,
            "schemas": {name: schema_version(name) for name in TABLES},
            **digests,
            "poses": {**poses, "looks": settings.looks},
            "filter": [wanted.score_threshold, wanted.min_width_px, wanted.min_height_px],
            "chunk_frames": config.video.chunk_frames,
            "cpu_threads": hmr.cpu_threads,
            "tracker": {
                **asdict(tracker),
                "predictor_weights": "",
                "texture_weights": "",
                "atlas": "",
            },
        }
    )
    pose = "predicted" if predictor else "last seen"
    if predictor == UNTRAINED:
        pose = f"{pose}, {UNTRAINED}"
    texture = "compact looks where given" if settings.looks else "no texture"
    return ModelCard(
        fingerprint=fingerprint,
        weights=IMPORTED,
        weights_origin=IMPORTED,
        body="",
        detector=f"poses:{layout}",
        cues=f"location (ridge) + pose ({pose}) + {texture}",
    )


def full_card(card: ModelCard, config: JobConfig, source: PoseSource) -> ModelCard:
    """The card with the names of body and weights; loads the body.

    Raises:
        ConfigError: the rows of an earlier run were made with another body.
    """
    from fourdh_batch.models.smpl import load_body

    hmr = config.hmr
    try:
        body = load_body(hmr.body or None, extra_regressor=hmr.extra_regressor or None)
    except FileNotFoundError as error:
        raise ConfigError(f"hmr.body={hmr.body}: no such file: {error.filename}") from None
    name = f"{body.name}:{body.digest[:16]}"
    weights = IMPORTED
    if isinstance(source, EarlierRun):
        weights, before = source.origin()
        if before and before != name:
            raise ConfigError(
                f"hmr.body: expected the body of the earlier run, {before}, got {name}; its betas "
                "mean nothing to another one"
            )
    elif body.name == "open":
        logger.warning(
            "body: open. Poses of SMPL fit it, shapes do not: betas mean SMPL's shape space. Give "
            "hmr.body=SMPL_NEUTRAL.pkl hmr.extra_regressor=SMPL_to_J19.pkl for right keypoints"
        )
    return replace(card, body=name, weights=weights or IMPORTED, weights_origin=weights or IMPORTED)


def _digest(path: str, setting: str) -> str:
    """Short digest of a file, "" for none."""
    if not path:
        return ""
    digest = blake2b(digest_size=8)
    try:
        with open_read(path) as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except FileNotFoundError:
        raise ConfigError(f"{setting}={path}: no such file") from None
    return digest.hexdigest()

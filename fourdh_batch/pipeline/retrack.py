"""Tracking again: from bodies that are already known to tables, without a video and a network.

The bodies come from another pose engine (`models/poses_given.py`) or from an earlier run of this
package. They go through the same tracker, rows and publishing as those of the main job, so the
tables, the plan, the commits and a rerun are the same, too.

Runs in processes of this machine: a video takes milliseconds per frame, and reading is most of it.
Nothing goes to a GPU unless `tracker.device` says cuda. torch is loaded where keypoints have to be
made of the bodies.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyarrow.compute as pc

from fourdh_batch.config import JobConfig, require
from fourdh_batch.errors import (
    ConfigError,
    FourdhError,
    LostRowsError,
    ManifestError,
    StorageError,
    VideoError,
    WorkerDiedError,
)
from fourdh_batch.logs import about, set_up_worker
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
from fourdh_batch.pipeline.following import TrackerModels, checked_predictor_digest, cues
from fourdh_batch.pipeline.job import (
    PROGRESS_S,
    STORAGE_ATTEMPTS,
    Ledger,
    OnProgress,
    RunReport,
    bring_up_to_date,
)
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.records import UNTRAINED, ChunkResult, ModelCard
from fourdh_batch.pipeline.shard import (
    OK,
    QUARANTINED,
    SavedWork,
    VideoEnd,
    VideoOutcome,
    VideoTracking,
    publish,
    record_failure,
)
from fourdh_batch.storage import Store, open_read, safe_key
from fourdh_batch.tables.frames import FrameRuns
from fourdh_batch.tables.manifest import CODE_VERSION, COMMITS, commit_key, fingerprint_of
from fourdh_batch.tables.reader import read_arrow
from fourdh_batch.tables.schema import TABLES, schema_version
from fourdh_batch.tables.writer import WORK, WorkSpool
from fourdh_batch.types import Detections, People

logger = logging.getLogger(__name__)

OURS = "ours"
ALL_LAYOUTS = ("auto", OURS, *LAYOUTS)
GIVEN = "given"  # what the tables say of weights that we know nothing about
READERS_VERSION = 2  # raised when the same files give other rows
BYTES_PER_DETECTION = 1_000  # about; only shares out the work of an earlier run


# --- the job -----------------------------------------------------------------------------------


def retrack(config: JobConfig, *, on_progress: OnProgress = lambda progress: None) -> RunReport:
    """Bring the tables under `config.output` up to date with the poses under `config.input`.

    Raises:
        ConfigError, ManifestError, CheckpointError: before any work is done.
        OutputInUseError: another driver is writing to this output.
    """
    require(config, "input", "output")
    if Store(config.input).root == Store(config.output).root:
        raise ConfigError(f"output: expected another place than input, got {config.output}")
    config = resolved(config)
    source = open_source(config)
    given = source.videos()
    if config.plan.limit:
        given = given[: config.plan.limit]
    videos = [Video(v.video_id, v.uri, v.num_bytes, v.fingerprint) for v in given]
    card = planning_card(config, source)

    def work(ledger: Ledger) -> None:
        ledger.report.card = full_card(card, config, source)
        _track_all(config, ledger)

    return bring_up_to_date(config, card, videos, work, on_progress=on_progress)


def resolved(config: JobConfig) -> JobConfig:
    """The settings with the layout named, and with the device that `auto` means here, the CPU.

    Otherwise every process would put a pose predictor on the same GPU, for work that hardly
    needs one.

    Raises:
        ConfigError: there is no such layout.
    """
    device = config.tracker.device
    return replace(
        config,
        poses=replace(config.poses, layout=resolved_layout(config)),
        tracker=replace(config.tracker, device="cpu" if device == "auto" else device),
    )


def _track_all(config: JobConfig, ledger: Ledger) -> None:
    """The shards that are not up to date, video by video."""
    card = ledger.report.card
    for shard, result in _results(config, card, ledger):
        if isinstance(result, StorageError):
            if not ledger.has_failed(shard):
                ledger.fail(shard, str(result))
        elif (outcomes := ledger.done(shard, result)) is not None:
            _publish(config, card, ledger, shard, outcomes)
        ledger.tick()
    ledger.close()


def _results(
    config: JobConfig, card: ModelCard, ledger: Ledger
) -> Iterator[tuple[Shard, VideoOutcome | StorageError]]:
    """Every video's outcome with its shard, in any order."""
    workers = min(config.poses.workers or os.cpu_count() or 1, ledger.num_videos_left)
    in_progress = {key.split("/")[1] for key, _ in ledger.store.list(WORK)}
    finished: deque[tuple[Shard, VideoOutcome]] = deque()

    def units() -> Iterator[tuple[Shard, Video]]:
        while work := ledger.next_shard():
            shard = work.shard
            if work.problem:
                ledger.fail(shard, work.problem)
                continue
            done: Mapping[str, VideoOutcome] = {}
            if safe_key(shard.shard_id) in in_progress:  # what an interrupted run has finished
                todo = tuple(v for v in shard.videos if v.video_id not in work.keep)
                done = SavedWork(ledger.store, replace(shard, videos=todo), card).outcomes
                finished.extend((shard, outcome) for outcome in done.values())
            if len(work.keep) == len(shard.videos):
                _publish(config, card, ledger, shard, [])
            for video in shard.videos:
                if video.video_id not in work.keep and video.video_id not in done:
                    yield shard, video

    if workers <= 1:
        retracker = Retracker(config, card)
        for shard, video in units():
            yield from _drain(finished)
            if not ledger.has_failed(shard):
                yield shard, _outcome_or_error(retracker, shard, video)
        yield from _drain(finished)
        return
    context = get_context("spawn")  # a fork would copy the threads of Arrow and torch
    with ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_start_worker,
        initargs=(config, card, ledger.report.run_id),
    ) as pool:
        waiting = units()
        running: dict[Future[VideoOutcome | StorageError], tuple[Shard, Video]] = {}
        try:
            while True:
                while len(running) < 2 * workers and (unit := next(waiting, None)):
                    if not ledger.has_failed(unit[0]):
                        running[pool.submit(_in_worker, *unit)] = unit
                yield from _drain(finished)
                if not running:
                    return
                done, _ = wait(running, timeout=PROGRESS_S, return_when=FIRST_COMPLETED)
                ledger.tick()
                for future in done:
                    result = future.result()  # raises with the unit still among those running
                    yield running.pop(future)[0], result
        except BrokenProcessPool as error:
            names = ", ".join(video.video_id for _, video in running.values())
            raise FourdhError(
                f"a tracking process died (out of memory?) while one of these was read: "
                f"{names}. The same command goes on; fewer poses.workers need less memory"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _drain(found: deque[tuple[Shard, VideoOutcome]]) -> Iterator[tuple[Shard, VideoOutcome]]:
    while found:
        yield found.popleft()


def _outcome_or_error(
    retracker: Retracker, shard: Shard, video: Video
) -> VideoOutcome | StorageError:
    """The video's outcome, also where it meets an error of our own code.

    Raises:
        FourdhError: settings, weights or schema.
    """
    try:
        with about(shard=shard.shard_id, video=video.video_id):
            try:
                return retracker.track(shard, video)
            except Exception as error:
                if isinstance(error, FourdhError) and not isinstance(error, VideoError):
                    raise
                return retracker.give_up(shard, video, error)
    except StorageError as error:
        return error


def _publish(
    config: JobConfig,
    card: ModelCard,
    ledger: Ledger,
    shard: Shard,
    outcomes: Sequence[VideoOutcome],
) -> None:
    for attempt in range(1, STORAGE_ATTEMPTS + 1):
        try:
            earlier = ledger.work_of(shard).commit
            published = publish(ledger.store, config, card, shard, outcomes, earlier)
        except LostRowsError as error:
            key = commit_key(shard.shard_id)
            ledger.fail(shard, f"{error}. Delete {key} and run again to track all its videos")
            return
        except StorageError as error:
            if attempt == STORAGE_ATTEMPTS:
                ledger.fail(shard, str(error))
            continue
        ledger.published(published)
        return


_retracker: Retracker | None = None  # of a worker process
_run_id = ""


def _start_worker(config: JobConfig, card: ModelCard, run_id: str) -> None:
    global _retracker, _run_id
    set_up_worker(config.log.format)
    _retracker, _run_id = Retracker(config, card), run_id


def _in_worker(shard: Shard, video: Video) -> VideoOutcome | StorageError:
    assert _retracker is not None
    with about(run=_run_id):
        return _outcome_or_error(_retracker, shard, video)


# --- one video ---------------------------------------------------------------------------------


class Retracker:
    """Tracks videos again, one after another; the models are loaded when first needed.

    Args:
        config: settings of the job, `resolved`.
        card: the models.
    """

    def __init__(self, config: JobConfig, card: ModelCard) -> None:
        # Texture maps are never at hand here, so their encoder is not wanted.
        tracker = replace(config.tracker, texture_weights="", atlas="")
        self._config = replace(config, tracker=tracker)
        self._card = card
        self._store = Store(config.output)
        self._models: dict[bool, TrackerModels] = {}

    @cached_property
    def _source(self) -> PoseSource:
        return open_source(self._config)

    def track(self, shard: Shard, video: Video) -> VideoOutcome:
        """Read the poses of a video, track, and spool its rows.

        Raises:
            FourdhError: settings or storage; errors of the video become rows in `failures`.
        """
        spool = WorkSpool(self._store, shard.shard_id)
        spool.begin(video.video_id)
        end, poses = VideoEnd(OK), None
        if isinstance(self._source, EarlierRun):
            end = self._source.end_of(video.video_id)
        error: VideoError | None = None
        try:
            poses = self._source.read(GivenVideo(video.video_id, video.uri, 0, video.fingerprint))
        except VideoError as broken:
            error = broken
        has_looks = self._config.poses.looks and poses is not None and poses.appearance is not None
        models = self._models_for(has_looks)
        tracking = VideoTracking(
            video,
            shard_id=shard.shard_id,
            dataset=shard.dataset,
            config=self._config,
            card=self._card,
            spool=spool,
            models=models,
            cuts=() if poses is None else poses.frame_index[poses.is_shot_start].tolist(),
        )
        if error is not None:
            outcome = tracking.fail(error, file=end.file)
        else:
            assert poses is not None
            for chunk in chunks_of(poses, video.video_id, self._config, models):
                tracking.add(chunk)
            if not isinstance(self._source, EarlierRun):
                end = VideoEnd(OK, _file_of(poses))
            outcome = tracking.finish(end)
        spool.save()
        return replace(outcome, spool=spool.name)

    def give_up(self, shard: Shard, video: Video, error: Exception) -> VideoOutcome:
        """Spool nothing but the failure of a video that ended unexpectedly.

        It counts as quarantined, as in the main job, so that `plan.retry_quarantined` takes it up.

        Raises:
            FourdhError: settings or storage.
        """
        logger.warning("video %s: unexpected error", video.video_id, exc_info=error)
        if not isinstance(error, VideoError):
            text = f"{type(error).__name__}: {error}"
            error = WorkerDiedError(text[:2000], video=video.video_id, stage="track")
        return record_failure(
            self._store,
            self._config,
            self._card,
            shard,
            video,
            error,
            status=QUARANTINED,
            attempts=1,
        )

    def _models_for(self, has_looks: bool) -> TrackerModels:
        if has_looks not in self._models:
            self._models[has_looks] = TrackerModels(self._config, compact=has_looks)
        return self._models[has_looks]


def _file_of(poses: VideoPoses) -> dict[str, Any]:
    """Columns of `videos` that files of poses tell."""
    if not len(poses.frame_row):
        return {"fps": poses.fps}
    width, height = poses.image_size_px[0].tolist()
    return {"fps": poses.fps, "width": width, "height": height}


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


# --- sources -----------------------------------------------------------------------------------


def resolved_layout(config: JobConfig) -> str:
    """`auto` as `ours` where the input is an output root, else as given.

    Raises:
        ConfigError: there is no such layout.
    """
    layout = config.poses.layout
    if layout not in ALL_LAYOUTS:
        raise ConfigError(f"poses.layout: expected one of {', '.join(ALL_LAYOUTS)}, got {layout!r}")
    if layout != "auto":
        return layout
    try:
        is_root = bool(Store(config.input).list(COMMITS))
    except (StorageError, OSError, ValueError):
        is_root = False
    return OURS if is_root else "auto"


def open_source(config: JobConfig) -> PoseSource:
    """Whatever the input is.

    Raises:
        ConfigError, ManifestError: nothing there.
    """
    poses = config.poses
    if resolved_layout(config) == OURS:
        return EarlierRun(config.input, image_size_px=poses.image_size_px)
    return open_poses(
        config.input,
        layout=poses.layout,
        image_size_px=poses.image_size_px,
        fps=poses.fps or None,
    )


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

    def end_of(self, video_id: str) -> VideoEnd:
        """How the decoder ended a video, and what it told of the file."""
        row = self._known(video_id)
        failures = read_arrow(self._root, "failures", columns=_FAILURE, video_id=video_id)
        return VideoEnd(row["status"], {name: row[name] for name in _DECODER}, failures.to_pylist())

    def origin(self) -> tuple[str, str]:
        """Origin of the weights and name of the body behind the rows.

        The origin is `GIVEN` where it is unknown or not the same everywhere, the body "".


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
        return weights.pop() if len(weights) == 1 else GIVEN, next(iter(bodies), "")

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


def planning_card(config: JobConfig, source: PoseSource) -> ModelCard:
    """Digest of everything but the input that decides what the rows hold.

    Known without torch where no pose predictor is given, so that a run that has nothing to do is
    quick; the name of the body is filled in by `full_card`.

    Raises:
        ConfigError, CheckpointError: a file is not there, or does not fit; rows of an earlier run
            were made with several bodies.
    """
    hmr, tracker, wanted, poses = config.hmr, config.tracker, config.detector, config.poses
    predictor = checked_predictor_digest(config)
    digests = {
        "body": _digest(hmr.body, "hmr.body"),
        "extra_regressor": _digest(hmr.extra_regressor, "hmr.extra_regressor"),
        "predictor": predictor,
    }
    fingerprint = fingerprint_of(
        {
            "job": "retrack",
            "code": CODE_VERSION,
            "readers": READERS_VERSION,
            "schemas": {name: schema_version(name) for name in TABLES},
            **digests,
            "poses": {**asdict(poses), "workers": 0},
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
    weights = source.origin()[0] if isinstance(source, EarlierRun) else GIVEN
    return ModelCard(
        fingerprint=fingerprint,
        weights=weights,
        weights_origin=weights,
        body="",
        detector=f"poses:{poses.layout}",
        cues=cues(tracker, texture="compact looks where given" if poses.looks else ""),
    )


def full_card(card: ModelCard, config: JobConfig, source: PoseSource) -> ModelCard:
    """The card with the name of the body, which is loaded for that.

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
    if isinstance(source, EarlierRun):
        _, before = source.origin()
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
    return replace(card, body=name)


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

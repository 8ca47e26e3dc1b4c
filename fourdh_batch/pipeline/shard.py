"""`process_shard()`: the whole method on the videos of one shard, in one process, without Ray.

The cluster moves the same pieces onto many machines and gives the same tables:
`read_chunks` (decoder) → `Engine.run` (models) → `VideoTracking` (tracker, rows) → `publish`.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fourdh_batch.config import JobConfig, to_dict
from fourdh_batch.errors import FourdhError, StorageError, VideoError
from fourdh_batch.pipeline.checkpoint import pack_state, unpack_state
from fourdh_batch.pipeline.following import TrackerModels
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.reading import read_chunks_isolated
from fourdh_batch.pipeline.records import ChunkResult, ModelCard
from fourdh_batch.pipeline.rows import RowBuilder, Rows
from fourdh_batch.storage import Store, redact_uri
from fourdh_batch.tables.manifest import CommitRecord, fingerprint_of
from fourdh_batch.tables.schema import make_table
from fourdh_batch.tables.writer import (
    PublishedShard,
    SavedSpool,
    VideoRows,
    WorkSpool,
    publish_shard,
    saved_spools,
)
from fourdh_batch.types import Damage, DecodeSummary, FrameDetections
from fourdh_batch.video.shots import ShotRule

if TYPE_CHECKING:
    from fourdh_batch.pipeline.engine import Engine

logger = logging.getLogger(__name__)

OK, PARTIAL, FAILED, QUARANTINED = STATUSES = "ok", "partial", "failed", "quarantined"
_MIB = 1 << 20

Looks = NDArray[Any]


class Spool(Protocol):
    """Where a video's rows wait until its shard is published."""

    def append(self, name: str, table: Any) -> None:
        """Add rows of a table, in order."""

    def finish(self, metadata: dict[str, Any]) -> None:
        """All rows are there."""


@dataclass(frozen=True, slots=True)
class VideoOutcome:
    """How one video ended.

    Attributes:
        status: ``ok``; ``partial``: damaged, what could be read is in the tables; ``failed``:
            nothing could be read; ``quarantined``: given up because it kills its worker.
        problem: what was wrong, empty for ``ok``.
        seconds: from its first chunk to its last row.
        spool: name of the `WorkSpool` that holds its rows.
    """

    video_id: str
    status: str
    num_frames: int = 0
    num_people: int = 0
    num_rows: int = 0
    problem: str = ""
    seconds: float = 0.0
    spool: str = ""


@dataclass(frozen=True, slots=True)
class VideoEnd:
    """How a video ended, and what is known of its file.

    Attributes:
        status: see `VideoOutcome`.
        file: columns of `videos` that describe the file; what is missing or None is null there.
        failures: rows of `failures`, without the columns that name the video.
    """

    status: str
    file: Mapping[str, Any] = field(default_factory=dict)
    failures: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What a shard gave; the line in the log.

    Attributes:
        statuses: videos by status, of those that were worked on.
        num_kept: videos whose rows were taken over from before.
        num_frames, num_people, num_track_rows: of the videos that were worked on.
        num_bytes: of all objects of the shard.
    """

    shard_id: str
    statuses: Mapping[str, int]
    num_kept: int
    num_frames: int
    num_people: int
    num_track_rows: int
    num_bytes: int

    @property
    def num_videos(self) -> int:
        """Videos that were worked on."""
        return sum(self.statuses.values())

    def line(self) -> str:
        """One line for the log."""
        counts = ", ".join(f"{n} {status}" for status, n in self.statuses.items())
        kept = f", {self.num_kept} kept" if self.num_kept else ""
        return (
            f"shard {self.shard_id}: {self.num_videos} videos ({counts or 'none to do'}){kept}, "
            f"{self.num_frames} frames, {self.num_people} people, "
            f"{self.num_track_rows} track rows, {self.num_bytes / _MIB:.1f} MiB"
        )


class VideoTracking:
    """The sequential half of one video: shots, tracker, rows. Chunks must come in order.

    Args:
        video, shard_id, dataset: what is tracked, and where its rows belong.
        config: settings of the job.
        card: the models.
        spool: takes the finished rows.
        models: of the tracking process.
        cuts: frames with which new shots begin, where they are known; else they are found, if the
            settings want that, by the shot scores of the chunks.
    """

    def __init__(
        self,
        video: Video,
        *,
        shard_id: str,
        dataset: str,
        config: JobConfig,
        card: ModelCard,
        spool: Spool,
        models: TrackerModels,
        cuts: Sequence[int] | None = None,
    ) -> None:
        self._video = video
        self._shard_id = shard_id
        self._dataset = dataset
        self._card = card
        self._spool = spool
        self._tracker = models.new_tracker()
        self._rows = RowBuilder(
            dataset=dataset,
            video_id=video.video_id,
            card=card,
            keypoints=models.keypoints,
            completer=models.predictor,
            keep_predicted=config.tracker.keep_predicted,
            keep_reconstructions=config.tracker.store_appearance,
        )
        self._shots = ShotRule() if config.video.detect_shots and cuts is None else None
        # Frames that wait for their shot: index, image size, looks of their people.
        self._undecided: deque[tuple[int, tuple[int, int], Looks | None]] = deque()
        self._cuts = set(cuts or ())
        self._shot_id = 0
        self._num_frames = 0
        self._num_rows = 0
        self._next_frame = 0
        self._lost_frames = False
        self._started = time.monotonic()

    def add(self, result: ChunkResult) -> None:
        """The next chunk; what it settles goes to the spool."""
        self._rows.hold(result)
        size = result.image_size_wh
        looks = result.texture if result.texture is not None else result.appearance
        frames = result.frame_index.tolist()
        for frame, people in zip(frames, people_of_frames(result), strict=True):
            self._undecided.append((frame, size, None if looks is None else looks[people]))
        if not self._num_frames and self._video.start_s is not None:
            self._next_frame = frames[0]
            # Frames lost at the very beginning of a window show in its first time alone.
            step_s = float(np.median(np.diff(result.pts_s))) if len(frames) > 1 else 0.0
            late_s = float(result.pts_s[0]) - self._video.start_s
            self._lost_frames = frames[0] > 0 and late_s > 1.5 * step_s
        self._num_frames += len(frames)
        self._lost_frames |= frames[-1] + 1 - self._next_frame != len(frames)
        self._next_frame = frames[-1] + 1
        if self._shots is None:
            self._track()
        else:
            assert result.shot_scores is not None, "chunks were read without shot scores"
            self._cuts.update(self._shots.push(result.frame_index, result.shot_scores))
            self._track(before=self._shots.decided_until)
        self._flush()

    def finish(self, end: DecodeSummary | VideoEnd) -> VideoOutcome:
        """The video has ended, as the decoder or another source says."""
        if isinstance(end, DecodeSummary):
            end = _end_of(end)
        return self._close(end)

    def fail(
        self,
        error: VideoError,
        *,
        status: str | None = None,
        attempts: int = 1,
        file: Mapping[str, Any] | None = None,
    ) -> VideoOutcome:
        """The video has ended with an error; frames handed out before it are kept.

        Args:
            error: what ended it.
            status: None: by whether there are frames.
            attempts: how often it was tried.
            file: see `VideoEnd`.
        """
        if status is None:
            status = PARTIAL if self._num_frames else FAILED
        failure = {
            "stage": error.stage,
            "error_class": type(error).__name__,
            "code": error.code,
            "message": _printable(error.message),
            "frame_index": error.frame_index,
            "attempts": attempts,
        }
        return self._close(VideoEnd(status, file or {}, [failure]))

    @property
    def video(self) -> Video:
        """As given."""
        return self._video

    @property
    def next_frame(self) -> int:
        """The frame that is wanted next."""
        return self._next_frame

    @property
    def can_resume(self) -> bool:
        """Whether a reader that starts in the middle would tell the same of this video.

        Not after damage: what was lost is told by the reader that met it.
        """
        return not self._lost_frames

    def state(self) -> bytes:
        """Everything but the rows already handed to the spool, for `restore` in another process."""
        return pack_state(
            {
                "tracker": self._tracker.state(),
                "rows": self._rows.state(),
                "shots": None if self._shots is None else self._shots.state(),
                "undecided": list(self._undecided),
                "cuts": sorted(self._cuts),
                "counts": [self._shot_id, self._num_frames, self._num_rows, self._next_frame],
                "seconds": time.monotonic() - self._started,
            }
        )

    def restore(self, data: bytes) -> None:
        """Go on from `state`; `next_frame` is wanted next.

        Raises:
            StorageError: the bytes are damaged.
        """
        state = unpack_state(data)
        self._tracker.restore(state["tracker"])
        self._rows.restore(state["rows"])
        if self._shots is not None:
            self._shots.restore(state["shots"])
        self._undecided = deque(
            (frame, tuple(size), looks) for frame, size, looks in state["undecided"]
        )
        self._cuts = set(state["cuts"])
        self._shot_id, self._num_frames, self._num_rows, self._next_frame = state["counts"]
        self._started = time.monotonic() - state["seconds"]

    def _close(self, end: VideoEnd) -> VideoOutcome:
        if self._shots is not None:
            self._cuts.update(self._shots.finish())
        self._track()
        self._rows.finish(self._tracker.finish())
        self._flush()
        assert self._rows.num_held == 0, f"video {self._video.video_id}: rows left unsettled"
        names = {
            "dataset": self._dataset,
            "video_id": self._video.video_id,
            "shard_id": self._shard_id,
            "content_fingerprint": self._video.fingerprint,
            "model_fingerprint": self._card.fingerprint,
        }
        row: dict[str, Any] = {
            **names,
            **_of_the_corpus(self._video),
            "window_start_s": self._video.start_s,
            "window_end_s": self._video.end_s,
            **end.file,
            "status": end.status,
            "frames_decoded": self._num_frames,
            "num_shots": self._shot_id + 1 if self._num_frames else 0,
            "num_tracks": len(self._rows.track_len),
            "num_detections": self._rows.num_detections,
            "frame_runs": self._rows.frame_runs,
        }
        self._spool.append("videos", make_table("videos", _drop_none(row), num_rows=1))
        for failure in end.failures:
            where = {**names, "uri": row["uri"]}
            columns = _drop_none({**where, "attempts": 1, **failure})
            self._spool.append("failures", make_table("failures", columns, num_rows=1))
        outcome = VideoOutcome(
            video_id=self._video.video_id,
            status=end.status,
            num_frames=self._num_frames,
            num_people=len(self._rows.track_len),
            num_rows=self._num_rows,
            problem="; ".join(f"{f['code']}: {f['message']}" for f in end.failures),
            seconds=round(time.monotonic() - self._started, 3),
        )
        self._spool.finish(
            {
                "fingerprint": video_fingerprint(self._video, self._card),
                "outcome": asdict(outcome),
                "track_len": {str(k): n for k, n in sorted(self._rows.track_len.items())},
            }
        )
        return outcome

    def _track(self, *, before: int | None = None) -> None:
        """Hand the tracker the frames whose shot is known, in order."""
        while self._undecided and (before is None or self._undecided[0][0] < before):
            frame_index, image_size_wh, looks = self._undecided.popleft()
            is_cut = frame_index in self._cuts
            if is_cut:
                self._cuts.remove(frame_index)
                self._shot_id += 1
            bbox_xyxy_px, score, people = self._rows.people_of(frame_index)
            tracked = self._tracker.update(
                FrameDetections(
                    frame_index=frame_index,
                    image_size_wh=image_size_wh,
                    bbox_xyxy_px=bbox_xyxy_px,
                    score=score,
                    people=people,
                    is_shot_start=is_cut,
                    appearance=looks,
                )
            )
            self._rows.tracked(tracked, shot_id=self._shot_id)

    def _flush(self) -> None:
        for rows in self._rows.settled():
            self._append(rows)

    def _append(self, rows: Rows) -> None:
        self._num_rows += rows.tracks.num_rows
        if rows.tracks.num_rows:
            self._spool.append("tracks", rows.tracks)
        if rows.detections.num_rows:
            self._spool.append("detections", rows.detections)


def people_of_frames(result: ChunkResult) -> list[slice]:
    """Which people of a chunk belong to each of its frames."""
    frame_row = result.detections.frame_row[result.drop_reason == ""]
    ends = np.searchsorted(frame_row, np.arange(len(result.frame_index) + 1)).tolist()
    return [slice(start, stop) for start, stop in pairwise(ends)]


def video_fingerprint(video: Video, card: ModelCard) -> str:
    """Changes exactly when the rows of this video may change."""
    return f"{video.fingerprint}:{card.fingerprint}"


class UnitTracking:
    """The sequential half of a unit: some videos of a shard, one after another, into one spool.

    What is finished, and the state of a long video in the middle, is saved every
    `cluster.checkpoint_frames` frames; an interruption costs what is behind that.

    Args:
        shard: of the videos.
        videos: to be tracked, in this order.
        config, card, models: as for `VideoTracking`.
        store: the output.
        saved: name of the spool that holds the state of the first video, if one does.
        save_each: save after every video, so that a death tells whose it was.
    """

    def __init__(
        self,
        shard: Shard,
        videos: Sequence[Video],
        config: JobConfig,
        card: ModelCard,
        models: TrackerModels,
        store: Store,
        *,
        saved: str = "",
        save_each: bool = False,
    ) -> None:
        self._shard = shard
        self._waiting = deque(videos)
        self._config = config
        self._card = card
        self._models = models
        self._spool = WorkSpool(store, shard.shard_id)
        self._save_each = save_each
        self._outcomes: list[VideoOutcome] = []
        self._unsaved_frames = self._num_saved = 0
        self._tracking: VideoTracking | None = None
        if saved:
            self._tracking = self._continued(store, saved)
        if self._tracking is None:
            self._begin_next()

    @property
    def next_frame(self) -> int:
        """The frame of the current video that is wanted next; 0 where it has not begun."""
        return 0 if self._tracking is None else self._tracking.next_frame

    def add(self, result: ChunkResult) -> None:
        """The next chunk of the current video."""
        tracking = self._current
        tracking.add(result)
        self._unsaved_frames += len(result.frame_index)
        if self._unsaved_frames >= self._config.cluster.checkpoint_frames and tracking.can_resume:
            self._save()

    def end(self, how: DecodeSummary | VideoEnd | VideoError) -> None:
        """The current video has ended, well or not; the next one begins."""
        tracking = self._current
        outcome = tracking.fail(how) if isinstance(how, VideoError) else tracking.finish(how)
        self._outcomes.append(replace(outcome, spool=self._spool.name))
        self._tracking = None
        if self._save_each or self._unsaved_frames >= self._config.cluster.checkpoint_frames:
            self._save()
        self._begin_next()

    def drop(self) -> None:
        """Forget the current video, which cannot be read now; the next one begins."""
        self._tracking = None
        self._begin_next()

    def close(self) -> list[VideoOutcome]:
        """Save what is finished, and only that.

        Returns:
            The outcomes of the finished videos.
        """
        if len(self._outcomes) > self._num_saved:  # else a saved state would be forgotten
            self._spool.save()
        return self._outcomes

    @property
    def _current(self) -> VideoTracking:
        if self._tracking is None:
            raise ValueError(f"shard {self._shard.shard_id}: no video of the unit is left")
        return self._tracking

    def _begin_next(self) -> None:
        if self._waiting:
            video = self._waiting.popleft()
            self._spool.begin(video.video_id)
            self._tracking = self._track(video)

    def _track(self, video: Video) -> VideoTracking:
        return VideoTracking(
            video,
            shard_id=self._shard.shard_id,
            dataset=self._shard.dataset,
            config=self._config,
            card=self._card,
            spool=self._spool,
            models=self._models,
        )

    def _continued(self, store: Store, saved: str) -> VideoTracking | None:
        """The first video from its saved state; None: it starts afresh."""
        video = self._waiting[0]
        try:
            earlier = SavedSpool(store, self._shard.shard_id, saved)
            if not _can_continue(earlier, video, self._card):
                return None
            tracking = self._track(video)
            tracking.restore(self._spool.take_up(earlier))
        except (FileNotFoundError, StorageError, ValueError) as error:
            logger.warning("video %s: starts anew: %s", video.video_id, error)
            self._spool = WorkSpool(store, self._shard.shard_id)
            return None
        self._waiting.popleft()
        logger.info("video %s: goes on at frame %d", video.video_id, tracking.next_frame)
        return tracking

    def _save(self) -> None:
        tracking = self._tracking
        if tracking is None:
            num_bytes = self._spool.save()
        else:
            num_bytes = self._spool.save(
                tracking.state(),
                fingerprint=video_fingerprint(tracking.video, self._card),
                position=tracking.next_frame,
            )
        self._unsaved_frames = 0
        self._num_saved = len(self._outcomes)
        logger.debug("shard %s: saved %d bytes", self._shard.shard_id, num_bytes)


def _can_continue(spool: SavedSpool, video: Video, card: ModelCard) -> bool:
    head = spool.unfinished
    return (
        head is not None
        and head["video_id"] == video.video_id
        and head["fingerprint"] == video_fingerprint(video, card)
    )


class SavedWork:
    """What earlier attempts at a shard, in this run or before, saved of its videos.

    Args:
        store, shard, card: what the rows must be of.
    Attributes:
        outcomes: by video id, of the videos that are finished.
        unfinished: by video id, the spool from which a video can go on.
        reached: by video id, the frame at which it would.
    """

    def __init__(self, store: Store, shard: Shard, card: ModelCard) -> None:
        self.outcomes: dict[str, VideoOutcome] = {}
        self.unfinished: dict[str, str] = {}
        self.reached: dict[str, int] = {}
        for spool in saved_spools(store, shard.shard_id):
            for video in shard.videos:
                metadata = spool.finished.get(video.video_id)
                if metadata and metadata["fingerprint"] == video_fingerprint(video, card):
                    outcome = VideoOutcome(**{**metadata["outcome"], "spool": spool.name})
                    if outcome.status != QUARANTINED:  # a new run tries again
                        self.outcomes[video.video_id] = outcome
                if _can_continue(spool, video, card) and spool.unfinished is not None:
                    position = int(spool.unfinished["position"])
                    if position > self.reached.get(video.video_id, 0):
                        self.reached[video.video_id] = position
                        self.unfinished[video.video_id] = spool.name


def process_shard(
    shard: Shard,
    engine: Engine,
    store: Store,
    config: JobConfig,
    card: ModelCard,
    *,
    on_frames: Callable[[int], None] = lambda num_frames: None,
) -> ShardReport:
    """All videos of a shard, then its objects and its commit record.

    Videos that an interrupted run has finished are not done again.

    Args:
        on_frames: told the number of frames after each chunk.
    Raises:
        FourdhError: settings, weights or storage; errors of a video become rows in `failures`.
    """
    models = TrackerModels(config)
    saved = SavedWork(store, shard, card)
    outcomes = list(saved.outcomes.values())
    left = [video for video in shard.videos if video.video_id not in saved.outcomes]
    left.sort(key=lambda video: video.video_id not in saved.unfinished)
    if left:
        resume = saved.unfinished.get(left[0].video_id, "")
        unit = UnitTracking(shard, left, config, card, models, store, saved=resume)
        for video in left:
            run_video(video, engine, unit, config, on_frames)
        outcomes += unit.close()
    report = publish(store, config, card, shard, outcomes)
    logger.info("%s", report.line())
    return report


class Tracking(Protocol):
    """`UnitTracking`, or what stands for it where one video is tracked alone."""

    @property
    def next_frame(self) -> int:
        """The frame that is wanted next."""

    def add(self, result: ChunkResult) -> None:
        """The next chunk."""

    def end(self, how: DecodeSummary | VideoEnd | VideoError) -> None:
        """The video has ended."""


def run_video(
    video: Video,
    engine: Engine,
    tracking: Tracking,
    config: JobConfig,
    on_frames: Callable[[int], None] = lambda num_frames: None,
) -> None:
    """One video through decoder, models and tracker, in this process."""
    try:
        for item in read_chunks_isolated(video, config.video, start=tracking.next_frame):
            if isinstance(item, DecodeSummary):
                tracking.end(item)
                return
            [result] = engine.run([item])
            tracking.add(result)
            on_frames(item.num_frames)
    except VideoError as error:
        tracking.end(error)
        return
    raise FourdhError(f"video {video.video_id}: the decoder ended without saying how")


def record_failure(
    store: Store,
    config: JobConfig,
    card: ModelCard,
    shard: Shard,
    video: Video,
    error: VideoError,
    *,
    status: str,
    attempts: int,
) -> VideoOutcome:
    """Give a video up: nothing but its row in `videos` and its row in `failures`."""
    # No network is needed for that, and there may be no GPU here.
    tracker = replace(config.tracker, texture_weights="", atlas="", predictor_weights="")
    config = replace(config, tracker=tracker)
    spool = WorkSpool(store, shard.shard_id)
    spool.begin(video.video_id)
    tracking = VideoTracking(
        video,
        shard_id=shard.shard_id,
        dataset=shard.dataset,
        config=config,
        card=card,
        spool=spool,
        models=TrackerModels(config),
    )
    outcome = tracking.fail(error, status=status, attempts=attempts)
    spool.save()
    return replace(outcome, spool=spool.name)


class _KeptVideo:
    """Rows of an earlier commit, with what the corpus of today says about the file."""

    def __init__(self, earlier: PublishedShard, video: Video) -> None:
        self._earlier = earlier
        self._video = video

    def read(self, name: str, video_id: str) -> Iterator[Any]:
        for rows in self._earlier.read(name, video_id):
            for column, value in _of_the_corpus(self._video).items():
                if column in rows.schema.names:
                    index = rows.schema.get_field_index(column)
                    kind = rows.schema.field(index)
                    values = pa.array([value] * rows.num_rows, kind.type)
                    rows = rows.set_column(index, kind, values)
            yield rows


def publish(
    store: Store,
    config: JobConfig,
    card: ModelCard,
    shard: Shard,
    outcomes: Sequence[VideoOutcome],
    earlier: CommitRecord | None = None,
) -> ShardReport:
    """Merge the rows of all videos of a shard into its objects; the commit record comes last.

    Args:
        outcomes: of the videos that were worked on.
        earlier: the commit from whose objects the rows of all others are taken over.
    """
    published = PublishedShard(store, earlier) if earlier is not None else None
    spools: dict[str, SavedSpool] = {}
    rows_of: dict[str, VideoRows] = {}
    spool_of = {outcome.video_id: outcome.spool for outcome in outcomes}
    for video in shard.videos:
        name = spool_of.get(video.video_id)
        if name is not None:
            if name not in spools:
                spools[name] = SavedSpool(store, shard.shard_id, name)
            rows_of[video.video_id] = spools[name]
        else:
            assert published is not None, f"video {video.video_id}: neither done nor kept"
            rows_of[video.video_id] = _KeptVideo(published, video)
    try:
        commit = publish_shard(
            store,
            shard_id=shard.shard_id,
            dataset=shard.dataset,
            videos=rows_of,
            fingerprint=shard.fingerprint(card.fingerprint),
            config_fingerprint=fingerprint_of(to_dict(config)),
            model_fingerprint=card.fingerprint,
            timings_s={outcome.video_id: outcome.seconds for outcome in outcomes},
        )
    finally:
        if published is not None:
            published.close()
    return report_of(shard, outcomes, commit)


def report_of(shard: Shard, outcomes: Sequence[VideoOutcome], commit: CommitRecord) -> ShardReport:
    """What a shard that is committed gave."""
    statuses = [outcome.status for outcome in outcomes]
    return ShardReport(
        shard_id=shard.shard_id,
        statuses={s: statuses.count(s) for s in STATUSES if s in statuses},
        num_kept=len(shard.videos) - len(outcomes),
        num_frames=sum(outcome.num_frames for outcome in outcomes),
        num_people=sum(outcome.num_people for outcome in outcomes),
        num_track_rows=sum(outcome.num_rows for outcome in outcomes),
        num_bytes=sum(record.num_bytes for record in commit.objects.values()),
    )


def _printable(text: str) -> str:
    """Text that UTF-8 can hold: names of files may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _of_the_corpus(video: Video) -> dict[str, Any]:
    """Columns of `videos` that come from the corpus alone, and may change without any work."""
    return {
        "uri": _printable(redact_uri(video.uri)),
        "manifest": video.extra or None,
    }


def _end_of(summary: DecodeSummary) -> VideoEnd:
    """What the decoder says of a video."""
    info = summary.info
    failures = [
        {
            "stage": "decode",
            "error_class": "Damage",
            "code": damage.code,
            "message": _damage_text(damage),
            "frame_index": damage.first_frame_index,
        }
        for damage in summary.damage
    ]
    file = {
        "container": info.container,
        "codec": info.codec,
        "pix_fmt": info.pix_fmt,
        "width": info.width,
        "height": info.height,
        "rotation_deg": info.rotation_deg,
        "fps": info.fps,
        "time_base": str(info.time_base),
        "duration_s": info.duration_s,
        "frames_declared": info.num_frames_declared,
        "frames_scanned": info.num_frames,
        "decoder": info.decoder,
        "damage": json.dumps([asdict(d) for d in summary.damage]) if summary.damage else None,
    }
    return VideoEnd(PARTIAL if failures else OK, file, failures)


def _damage_text(damage: Damage) -> str:
    until = "the end" if damage.last_frame_index is None else str(damage.last_frame_index)
    return f"frames {damage.first_frame_index} to {until} lost: {damage.message}"


def _drop_none(columns: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in columns.items() if value is not None}

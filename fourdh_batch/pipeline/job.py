"""What every job does around its work: plan minus commits, report, record. Imports no Ray.

`cluster/run.py` and `pipeline/retrack.py` differ in how a video comes to its rows, and in nothing
of this.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from fourdh_batch import __version__
from fourdh_batch.config import JobConfig, to_dict
from fourdh_batch.errors import ManifestError
from fourdh_batch.pipeline.plan import Shard, Video, plan_shards
from fourdh_batch.pipeline.records import ModelCard
from fourdh_batch.pipeline.shard import (
    FAILED,
    OK,
    PARTIAL,
    QUARANTINED,
    ShardReport,
    VideoOutcome,
)
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import LEASE_S, CommitRecord, Lease, commit_key, read_commits
from fourdh_batch.tables.writer import discard_work

logger = logging.getLogger(__name__)

STORAGE_ATTEMPTS = 3
PROGRESS_S = 0.5


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a running job is."""

    videos_done: int
    videos_total: int
    bytes_done: int
    bytes_total: int
    frames_done: int
    shards_done: int
    shards_total: int


OnProgress = Callable[[Progress], None]


@dataclass(slots=True)
class RunReport:
    """How a job ended.

    Attributes:
        outcomes: of the videos that this run worked on.
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
        """Videos of the corpus that ended with this status, now or before."""
        now = sum(outcome.status == status for outcome in self.outcomes)
        return now + self.videos_before.get(status, 0)

    @property
    def exit_code(self) -> int:
        """0 all done; 3 done, but some videos failed, in part or wholly; 1 shards are missing."""
        if self.failed_shards:
            return 1
        return 3 if any(self.videos(s) for s in (PARTIAL, FAILED, QUARANTINED)) else 0


class Ledger:
    """The books of one run over the shards that are not up to date.

    Args:
        store: the output.
        shards: what there is to do.
        report: filled in as shards are published or fail.
        renew_lease: called in time by `tick`.
        on_progress: called now and then by `tick`, and by `close`.

    Attributes:
        store, shards, report: as given.
    """

    def __init__(
        self,
        store: Store,
        shards: Sequence[Shard],
        report: RunReport,
        renew_lease: Callable[[], None],
        on_progress: OnProgress,
    ) -> None:
        self.store = store
        self.shards = shards
        self.report = report
        self._renew_lease = renew_lease
        self._on_progress = on_progress
        self._outcomes: dict[str, dict[str, VideoOutcome]] = {s.shard_id: {} for s in shards}
        self._renewed = self._shown = time.monotonic()

    def has_failed(self, shard: Shard) -> bool:
        """Whether a shard was given up."""
        return shard.shard_id in self.report.failed_shards

    def done(self, shard: Shard, outcome: VideoOutcome) -> list[VideoOutcome] | None:
        """A video has ended; once its shard is complete, the outcomes of all its videos."""
        if self.has_failed(shard):
            return None
        if outcome.problem:
            logger.warning(
                "shard %s, video %s: %s: %s",
                *(shard.shard_id, outcome.video_id, outcome.status, outcome.problem),
            )
        outcomes = self._outcomes[shard.shard_id]
        outcomes[outcome.video_id] = outcome
        if len(outcomes) < len(shard.videos):
            return None
        return [outcomes[video.video_id] for video in shard.videos]

    def published(self, report: ShardReport) -> None:
        """A shard is in the tables."""
        logger.info("%s", report.line())
        self.report.shards.append(report)

    def fail(self, shard: Shard, reason: str) -> None:
        """Give a shard up; the job goes on."""
        logger.error("shard %s: not published: %s", shard.shard_id, reason)
        self.report.failed_shards[shard.shard_id] = reason

    def tick(self, frames_running: Callable[[], int] = int) -> None:
        """Renew the lease and show progress where it is time.

        Args:
            frames_running: frames of the videos that have begun and not ended.
        """
        now = time.monotonic()
        if now - self._renewed > LEASE_S / 3:
            self._renew_lease()
            self._renewed = now
        if now - self._shown > PROGRESS_S:
            self._shown = now
            self._on_progress(self.progress(frames_running()))

    def close(self) -> None:
        """Show where the run has come to."""
        self._on_progress(self.progress())

    def progress(self, frames_running: int = 0) -> Progress:
        """Counts of now."""
        videos = [(s.shard_id, video) for s in self.shards for video in s.videos]
        outcomes = [outcome for of in self._outcomes.values() for outcome in of.values()]
        return Progress(
            videos_done=len(outcomes),
            videos_total=len(videos),
            bytes_done=sum(v.num_bytes for s, v in videos if v.video_id in self._outcomes[s]),
            bytes_total=sum(video.num_bytes for _, video in videos),
            frames_done=sum(outcome.num_frames for outcome in outcomes) + frames_running,
            shards_done=len(self.report.shards),
            shards_total=len(self.shards),
        )


def bring_up_to_date(
    config: JobConfig,
    card: ModelCard,
    videos: Sequence[Video],
    work: Callable[[Ledger], None],
    *,
    on_progress: OnProgress = lambda progress: None,
) -> RunReport:
    """Have `work` done on the shards that are not up to date, under the lease of the output.

    Args:
        config: settings of the job.
        card: the models; says with the videos what is up to date.
        videos: the corpus of today.
        work: brings all shards of the ledger to an end; not called where there are none.
        on_progress: told where the job is.
    Raises:
        ManifestError: finished videos would be lost; nothing was begun.
        OutputInUseError: another driver is writing to this output.
    """
    started = time.monotonic()
    store = Store(config.output)
    run_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"
    report = RunReport(run_id=run_id, output=config.output, card=card)
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
            discard_work(store, shard.shard_id)  # left by a driver killed just after its commit
            for video in commit.videos:
                count = report.videos_before.get(video.status, 0)
                report.videos_before[video.status] = count + 1
        if config.plan.remove_missing:
            planned = {shard.shard_id for shard in shards}
            for commit in commits.values():
                if commit.dataset == config.dataset and commit.shard_id not in planned:
                    _remove_shard(store, commit)
        else:
            _refuse_losses(todo, commits)
        logger.info(
            "run %s: %d videos in %d shards, %d shards to do, weights %s",
            *(run_id, len(videos), len(shards), len(todo), card.weights_origin),
        )
        if todo:
            work(Ledger(store, todo, report, lease.renew, on_progress))
        report.seconds = round(time.monotonic() - started, 3)
        _record_run(store, config, report)
    return report


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
    # Only videos are missing today (a smaller input, a limit): what is finished stays.
    return config.plan.remove_missing or not unchanged


def summary_of(report: RunReport) -> dict[str, object]:
    """Totals of a run, by name, as JSON holds them."""
    return {
        "videos": {s: report.videos(s) for s in (OK, PARTIAL, FAILED, QUARANTINED)},
        "frames": sum(outcome.num_frames for outcome in report.outcomes),
        "people": sum(outcome.num_people for outcome in report.outcomes),
        "track_rows": sum(shard.num_track_rows for shard in report.shards),
    }


def _refuse_losses(todo: Sequence[Shard], commits: Mapping[str, CommitRecord]) -> None:
    """A shard is published whole; one that is redone must not lose videos by oversight."""
    lost = []
    for shard in todo:
        today = {video.video_id for video in shard.videos}
        if commit := commits.get(shard.shard_id):
            lost += [v.video_id for v in commit.videos if v.video_id not in today]
    if lost:
        raise ManifestError(
            f"this run would remove {len(lost)} finished videos that are not in the input, "
            f"for example {lost[0]!r}: they share shards with videos that must be redone. Give the "
            "whole corpus, or plan.remove_missing=true to let them go"
        )


def _remove_shard(store: Store, commit: CommitRecord) -> None:
    """Take a shard none of whose videos is in the corpus any more out of the tables."""
    logger.info("shard %s: its %d videos are gone", commit.shard_id, len(commit.videos))
    store.delete(commit_key(commit.shard_id))
    for record in commit.objects.values():
        store.delete(record.key)


def _record_run(store: Store, config: JobConfig, report: RunReport) -> None:
    """`_runs/<run_id>.json`: settings as run, versions, totals."""
    record = {
        "run_id": report.run_id,
        "version": __version__,
        "config": to_dict(config),
        "models": asdict(report.card),
        "seconds": report.seconds,
        "shards_done": [shard.shard_id for shard in report.shards],
        "shards_up_to_date": report.num_shards_before,
        "shards_failed": report.failed_shards,
        **summary_of(report),
    }
    store.write_bytes(f"_runs/{report.run_id}.json", json.dumps(record, indent=1).encode())

"""A run that gives up one video after the other stops by itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fourdh_batch.cluster.run import MAX_GIVEN_UP_IN_A_ROW, _Scheduler
from fourdh_batch.config import load_config
from fourdh_batch.errors import FourdhError
from fourdh_batch.pipeline.increment import ShardWork
from fourdh_batch.pipeline.job import Ledger, Progress, RunReport
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.records import ModelCard
from fourdh_batch.pipeline.shard import QUARANTINED
from fourdh_batch.storage import Store

CARD = ModelCard("m", "w", "official", "open", "boxes", "location")


def test_so_many_videos_given_up_in_a_row_are_not_the_videos_fault(tmp_path: Path) -> None:
    videos = tuple(Video(f"{i}.mp4", f"/{i}.mp4", 10, "f") for i in range(MAX_GIVEN_UP_IN_A_ROW))
    shard = Shard("s", "d", videos)
    totals = Progress(0, len(videos), 0, 10 * len(videos), 0, 0, 1)
    report = RunReport("r", str(tmp_path), CARD)
    ledger = Ledger(Store(str(tmp_path)), [ShardWork(shard)], totals, report)
    scheduler = object.__new__(_Scheduler)  # its constructor needs a cluster, giving up does not
    scheduler._config = load_config(None, [f"output={tmp_path}"])
    scheduler._card, scheduler._ledger = CARD, ledger
    scheduler._attempts, scheduler._given_up_in_a_row = Counter(), 0
    cause = RuntimeError("out of luck")
    for video in videos[:-1]:
        assert scheduler._quarantine(shard, video, cause).status == QUARANTINED
    with pytest.raises(FourdhError, match=rf"stopped: {len(videos)} videos in a row .*out of luck"):
        scheduler._quarantine(shard, videos[-1], cause)

"""What holds for any sequence of corpora: nights on which videos come, change and go."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from uuid import uuid4

from hypothesis import given, settings
from hypothesis import strategies as st

from fourdh_batch.config import JobConfig, PlanConfig
from fourdh_batch.pipeline.corpus import Video
from fourdh_batch.pipeline.increment import Increment, ShardWork
from fourdh_batch.pipeline.plan import Shard, plan_shards
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import (
    CommitRecord,
    VideoRecord,
    commit_key,
    read_commits,
    write_commit,
)

PER_SHARD, MB_PER_SHARD = 4, 8
MIB = 1 << 20
MANY = settings(max_examples=15, deadline=None)

# A night is a corpus: for each video its size in MiB and the version of its content.
Night = dict[str, tuple[int, int]]
NIGHTS = st.lists(
    st.dictionaries(
        st.integers(0, 25).map(lambda n: f"v{n:02d}"),
        st.tuples(st.sampled_from([1, 3, 20]), st.integers(0, 1)),
        min_size=1,
        max_size=18,
    ),
    min_size=1,
    max_size=4,
)


@contextmanager
def new_store() -> Iterator[Store]:
    """In memory: a disk would be waited for a thousand times."""
    store = Store(f"memory://plan-{uuid4().hex}")
    yield store
    for key, _ in store.list():
        store.delete(key)


def videos_of(night: Night) -> list[Video]:
    return [Video(n, f"/x/{n}", size * MIB, f"{n}-{v}") for n, (size, v) in night.items()]


def planned(store: Store, videos: Iterable[Video], *, record: bool = True) -> list[Shard]:
    return plan_shards(
        store,
        "d",
        list(videos),
        videos_per_shard=PER_SHARD,
        mb_per_shard=MB_PER_SHARD,
        record=record,
    )


def increment(store: Store, videos: Iterable[Video], *, remove: bool) -> Increment:
    plan = PlanConfig(videos_per_shard=PER_SHARD, mb_per_shard=MB_PER_SHARD, remove_missing=remove)
    return Increment(store, JobConfig(dataset="d", plan=plan), "m", videos, record=True)


def commit(store: Store, work: ShardWork) -> None:
    shard = work.shard
    rows = {"tracks": 1}
    videos = tuple(VideoRecord(v.video_id, v.fingerprint, "ok", rows) for v in shard.videos)
    fingerprint = shard.fingerprint("m")
    write_commit(store, CommitRecord(shard.shard_id, "d", fingerprint, "c", "m", videos, {}, {}))


@MANY
@given(nights=NIGHTS, seed=st.integers(0, 99))
def test_every_plan_is_a_partition_that_moves_no_video(nights: list[Night], seed: int) -> None:
    with new_store() as store:
        placed: dict[str, str] = {}
        contents: dict[str, dict[str, str]] = {}
        corpus: dict[str, str] = {}
        for night in nights:
            videos = videos_of(night)
            dry = planned(store, videos, record=False)
            shards = planned(store, random.Random(seed).sample(videos, len(videos)))
            assert shards == dry  # whatever the order of the rows
            assert planned(store, videos) == shards
            members = [v.video_id for shard in shards for v in shard.videos]
            assert sorted(members) == sorted(night)
            for shard in shards:
                is_new = not {v.video_id for v in shard.videos} & placed.keys()
                size = sum(v.num_bytes for v in shard.videos)
                assert len(shard.videos) <= PER_SHARD
                # A video may have grown since it was placed.
                assert not is_new or len(shard.videos) == 1 or size <= MB_PER_SHARD * MIB
                for video in shard.videos:
                    assert placed.setdefault(video.video_id, shard.shard_id) == shard.shard_id
            today = {v.video_id: v.fingerprint for v in videos}
            touched = {n for n in {*corpus, *today} if corpus.get(n) != today.get(n)}
            now = {s.shard_id: {v.video_id: v.fingerprint for v in s.videos} for s in shards}
            for shard_id, before in contents.items():
                if not touched & before.keys() and now.get(shard_id) != before:
                    # only a video that comes back may join the shard that it once belonged to
                    assert touched & now[shard_id].keys()
            contents, corpus = now, today


@MANY
@given(nights=NIGHTS, is_killed=st.booleans(), seed=st.integers(0, 99))
def test_nights_leave_untouched_shards_alone_and_end_with_the_corpus_of_today(
    nights: list[Night], is_killed: bool, seed: int
) -> None:
    """Each night is planned, worked on and committed; where killed, some of it is not."""
    rng = random.Random(seed)
    with new_store() as store:
        done: dict[str, str] = {}
        for night in nights:
            videos = videos_of(night)
            with increment(store, iter(videos), remove=True) as plan:
                works, gone = list(plan.work()), list(plan.removed())
                changes = {change.video_id: change.kind for change in plan.changes()}
                assert sum(plan.num_changes.values()) == len(changes)
                assert plan.num_videos == len(night)
                all_shards = {shard.shard_id: shard for shard in planned(store, videos)}
                todo_shards = {work.shard.shard_id: work.shard for work in works}
                assert todo_shards.keys() | set(plan.up_to_date()) == all_shards.keys()
                assert todo_shards.items() <= all_shards.items()
            lost = done.keys() - night.keys()
            touched = {v.video_id for v in videos if done.get(v.video_id) != v.fingerprint} | lost
            assert changes.keys() == touched
            assert {n for n, kind in changes.items() if kind == "removed"} == lost
            for name in touched - lost:
                assert (changes[name] == "changed") == (name in done)
            for work in works:
                before = work.commit.videos if work.commit else ()
                mine = {v.video_id for v in (*work.shard.videos, *before)}
                assert {v.video_id for v in work.shard.videos} - work.keep == (
                    touched & {v.video_id for v in work.shard.videos}
                )
                assert mine & touched  # no shard is redone without a reason
            for work in works:
                if not (is_killed and rng.random() < 0.3):
                    commit(store, work)
            for record in gone:
                store.delete(commit_key(record.shard_id))
            done = {
                video.video_id: video.content_fingerprint
                for record in read_commits(store).values()
                for video in record.videos
            }
            assert is_killed or done == {v.video_id: v.fingerprint for v in videos}
        # The same corpus once more: what is left over is finished, then nothing is to do.
        with increment(store, iter(videos), remove=True) as plan:
            for work in plan.work():
                commit(store, work)
        with increment(store, (replace(v, uri="/moved") for v in videos), remove=False) as plan:
            assert (plan.todo_shards, plan.todo_videos, plan.num_changes) == (0, 0, {})
            assert (plan.num_shards_before, plan.num_missing) == (plan.num_shards, 0)

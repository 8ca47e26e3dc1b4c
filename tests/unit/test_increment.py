"""What is left to do, out of a plan and the commits of earlier runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fourdh_batch.config import JobConfig, PlanConfig
from fourdh_batch.errors import ManifestError, SchemaError, StorageError
from fourdh_batch.pipeline.increment import Change, Increment, ShardWork
from fourdh_batch.pipeline.plan import Shard, Video, assignments, plan_shards
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import (
    CommitRecord,
    VideoRecord,
    commit_key,
    void_commit,
    write_commit,
)


def corpus(names: str, **content: str) -> list[Video]:
    """One video per letter, 10 bytes each; content by name where it is another."""
    return [Video(n, f"/x/{n}", 10, content.get(n, f"fp-{n}")) for n in names]


def increment(
    root: Path,
    videos: Sequence[Video] | Iterator[Video],
    *,
    model: str = "m",
    record: bool = True,
    **plan: int,
) -> Increment:
    settings = PlanConfig(**({"videos_per_shard": 2} | plan))
    config = JobConfig(output=str(root), dataset="d", plan=settings)
    return Increment(Store(str(root)), config, model, videos, record=record)


def commit(
    root: Path, shard: Shard, *, model: str = "m", knows: bool = True, **status: str
) -> None:
    rows = {"tracks": 1} if knows else {}
    write_commit(
        Store(str(root)),
        CommitRecord(
            shard_id=shard.shard_id,
            dataset=shard.dataset,
            fingerprint=shard.fingerprint(model),
            config_fingerprint="c",
            model_fingerprint=model,
            videos=tuple(
                VideoRecord(
                    v.video_id,
                    v.fingerprint,
                    status.get(v.video_id, "ok"),
                    rows,
                    v.details if knows else None,
                )
                for v in shard.videos
            ),
            objects={},
            schema_versions={},
        ),
    )


def finish(root: Path, videos: Sequence[Video], **kw: object) -> None:
    """What a run does: all work is committed."""
    model = str(kw.get("model", "m"))
    with increment(root, videos, model=model) as todo:
        for work in todo.work():
            commit(root, work.shard, **{"model": model, **kw})  # type: ignore[arg-type]


def todo_of(work: ShardWork) -> tuple[str, str, bool]:
    """Videos to do, videos kept, whether there is a commit; a letter each."""
    names = {v.video_id for v in work.shard.videos}
    return "".join(sorted(names - work.keep)), "".join(sorted(work.keep)), work.commit is not None


def kinds(todo: Increment) -> dict[str, str]:
    return {c.video_id: c.kind for c in todo.changes()}


def test_a_first_run_has_everything_to_do_and_places_videos_as_plan_shards_does(
    tmp_path: Path,
) -> None:
    videos = corpus("edcba")
    with increment(tmp_path, iter(videos)) as todo:
        work = list(todo.work())
        assert [todo_of(w) for w in work] == [
            ("ab", "", False),
            ("cd", "", False),
            ("e", "", False),
        ]
        assert (todo.num_videos, todo.num_shards, todo.num_shards_before) == (5, 3, 0)
        assert (todo.todo_videos, todo.todo_shards, todo.todo_bytes) == (5, 3, 50)
        assert kinds(todo) == dict.fromkeys("abcde", "new")
        assert not list(todo.up_to_date())
        assert not list(todo.removed())
        assert todo.num_changes == {"new": 5}
    placed = plan_shards(
        Store(str(tmp_path)), "d", videos, videos_per_shard=9, mb_per_shard=1, record=False
    )
    assert placed == [w.shard for w in work]


def test_a_dry_run_writes_nothing_and_says_the_same(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with increment(root, corpus("abc"), record=False) as dry:
        before = [w.shard for w in dry.work()]
    assert not root.exists()
    with increment(root, corpus("abc")) as wet:
        assert [w.shard for w in wet.work()] == before


def test_a_finished_corpus_leaves_nothing_to_do(tmp_path: Path) -> None:
    finish(tmp_path, corpus("abc"), b="partial")
    with increment(tmp_path, corpus("cba")) as todo:
        assert not list(todo.work())
        assert not list(todo.changes())
        assert len(list(todo.up_to_date())) == todo.num_shards_before == todo.num_shards == 2
        assert todo.videos_before == {"ok": 2, "partial": 1}
        assert (todo.todo_videos, todo.todo_bytes) == (0, 0)


def test_a_changed_video_is_redone_and_its_neighbour_kept(tmp_path: Path) -> None:
    finish(tmp_path, corpus("abcd"))
    with increment(tmp_path, corpus("abcd", c="new")) as todo:
        [work] = todo.work()
        assert todo_of(work) == ("c", "d", True)
        assert list(todo.changes()) == [Change("c", work.shard.shard_id, "changed", "fp-c", "new")]
        assert (todo.todo_videos, todo.todo_shards, todo.todo_bytes) == (1, 1, 10)
        assert todo.num_shards_before == 1


def test_a_commit_that_cannot_be_read_now_costs_its_shard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(tmp_path, corpus("abcd"))
    with increment(tmp_path, corpus("abcd", a="new", c="new")) as todo:
        read = Store.read_bytes
        first = commit_key(next(todo.work()).shard.shard_id)

        def fails(store: Store, key: str) -> bytes:
            if key == first:
                raise StorageError(f"read {key}: failed 6 times")
            return read(store, key)

        monkeypatch.setattr(Store, "read_bytes", fails)
        lost, other = todo.work()
        assert lost.problem == f"read {first}: failed 6 times"
        assert not other.problem
        assert todo_of(other) == ("c", "d", True)


def test_a_commit_that_does_not_know_its_rows_keeps_nothing(tmp_path: Path) -> None:
    finish(tmp_path, corpus("ab"), knows=False)
    with increment(tmp_path, corpus("ab", a="new")) as todo:
        [work] = todo.work()
        assert todo_of(work) == ("ab", "", True)
        assert kinds(todo) == {"a": "changed"}


def test_other_models_redo_everything(tmp_path: Path) -> None:
    finish(tmp_path, corpus("abc"))
    with increment(tmp_path, corpus("abc"), model="n") as todo:
        assert [todo_of(w)[:2] for w in todo.work()] == [("ab", ""), ("c", "")]
        assert kinds(todo) == dict.fromkeys("abc", "models")
        assert {(c.before, c.after) for c in todo.changes()} == {("m", "n")}


def test_quarantined_videos_are_redone_only_where_asked_for(tmp_path: Path) -> None:
    finish(tmp_path, corpus("ab"), a="quarantined")
    with increment(tmp_path, corpus("ab")) as todo:
        assert not list(todo.work())
    with increment(tmp_path, corpus("ab"), retry_quarantined=True) as todo:
        [work] = todo.work()
        assert todo_of(work) == ("a", "b", True)
        assert kinds(todo) == {"a": "retried"}


def test_an_unfinished_plan_goes_on(tmp_path: Path) -> None:
    with increment(tmp_path, corpus("abcd")) as todo:
        first, _ = todo.work()
    commit(tmp_path, first.shard)
    with increment(tmp_path, corpus("abcde")) as todo:
        assert kinds(todo) == {"c": "unfinished", "d": "unfinished", "e": "new"}
        assert [todo_of(w)[0] for w in todo.work()] == ["cd", "e"]


def test_videos_that_are_missing_stay_and_go_only_where_asked_for(tmp_path: Path) -> None:
    finish(tmp_path, corpus("abcde"))
    with increment(tmp_path, corpus("abc")) as todo:
        assert not list(todo.work())
        assert not list(todo.changes())
        assert todo.num_missing == 2
        [gone] = todo.removed()
        assert [v.video_id for v in gone.videos] == ["e"]
    with increment(tmp_path, corpus("abc"), remove_missing=True) as todo:
        assert [todo_of(w) for w in todo.work()] == [("", "c", True)]
        assert kinds(todo) == {"d": "removed", "e": "removed"}
        assert todo.num_missing == todo.todo_videos == 0


def test_a_run_that_would_lose_finished_videos_is_refused_before_anything_is_recorded(
    tmp_path: Path,
) -> None:
    finish(tmp_path, corpus("ab"))
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(ManifestError, match=r"remove 1 finished videos.*for example 'b'"),
        increment(tmp_path, corpus("ac", a="new")),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before
    with increment(tmp_path, corpus("ac", a="new"), remove_missing=True) as todo:
        assert kinds(todo) == {"a": "changed", "b": "removed", "c": "new"}


def test_a_limit_takes_the_first_videos_and_leaves_the_others_in_the_tables(tmp_path: Path) -> None:
    finish(tmp_path, corpus("abcd"))
    with increment(tmp_path, corpus("dcba"), limit=2) as todo:
        assert (todo.num_videos, todo.num_missing) == (2, 2)
        assert not list(todo.work())


def test_other_datasets_of_the_same_output_are_left_alone(tmp_path: Path) -> None:
    other = Shard("0001-00000-ffffffff", "other", tuple(corpus("xy")))
    commit(tmp_path, other)
    with increment(tmp_path, corpus("ab"), remove_missing=True) as todo:
        assert not list(todo.removed())
        assert (todo.num_shards, todo.num_missing) == (1, 0)


def test_a_video_id_that_stands_twice_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ManifestError, match=r"'a' stands twice\n.*'c' stands twice"),
        increment(tmp_path, corpus("abacc")),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_damaged_commit_or_plan_stops_the_run(tmp_path: Path) -> None:
    finish(tmp_path, corpus("ab"))
    [key] = (tmp_path / "_commits").iterdir()
    body = key.read_bytes()
    key.write_bytes(b"{")
    with pytest.raises(SchemaError, match="expected JSON"), increment(tmp_path, corpus("ab")):
        pass
    key.write_bytes(body)
    [plan] = (tmp_path / "_plan" / "d").iterdir()
    plan.write_bytes(b"no parquet")
    with pytest.raises(SchemaError, match="recorded plan"), increment(tmp_path, corpus("ab")):
        pass


def test_a_copy_of_a_commit_counts_once(tmp_path: Path) -> None:
    finish(tmp_path, corpus("ab"))
    [key] = (tmp_path / "_commits").iterdir()
    key.with_name("0000-copy.json").write_bytes(key.read_bytes())
    with increment(tmp_path, corpus("ab")) as todo:
        assert (todo.num_shards_before, todo.todo_shards) == (1, 0)


def test_windows_details_and_odd_addresses_come_back_as_given(tmp_path: Path) -> None:
    videos = [
        Video("a", "/x/\udcff", 1, "f@1-", 1.0, None, '{"fold":"ü"}'),
        Video("b", "/x/\ud800", 2, "f@-2.5", None, 2.5),
    ]
    with increment(tmp_path, videos) as todo:
        [work] = todo.work()
        assert list(work.shard.videos) == videos
        commit(tmp_path, work.shard)
        # A commit that appears meanwhile is not looked for, and iterating twice is the same.
        assert [w.shard for w in todo.work()] == [work.shard]
    assert (tmp_path / commit_key(work.shard.shard_id)).exists()


@pytest.mark.parametrize("knows", [True, False])
def test_other_columns_of_the_manifest_redo_no_video_but_are_told(
    tmp_path: Path, knows: bool
) -> None:
    before = [replace(v, extra='{"fold":1}') for v in corpus("abcd")]
    finish(tmp_path, before, knows=knows)
    after = [replace(before[0], extra='{"fold":2}'), *before[1:3], replace(before[3], extra="")]
    with increment(tmp_path, after) as todo:
        if not knows:  # records of older versions do not tell
            assert not list(todo.work())
            return
        assert [todo_of(w) for w in todo.work()] == [("", "ab", True), ("", "cd", True)]
        assert kinds(todo) == {"a": "details", "d": "details"}
        assert (todo.todo_videos, todo.todo_bytes, todo.todo_shards) == (0, 0, 2)
        assert [(c.before, c.after) for c in todo.changes() if c.video_id == "d"] == [
            (before[3].details, "")
        ]


def test_a_file_that_cannot_be_read_today_keeps_its_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finish(tmp_path, corpus("ab"))
    with increment(tmp_path, corpus("ab", a="unreadable-StorageError")) as todo:
        assert (todo.num_changes, todo.todo_videos) == ({}, 0)
    assert "video a cannot be read now; its rows stay" in caplog.text
    finish(tmp_path, corpus("abc", c="unreadable-FileNotFoundError"))  # never read: a failure
    with increment(tmp_path, corpus("abc")) as todo:
        assert todo.num_changes == {"changed": 1}


def test_a_shard_that_was_being_replaced_is_redone_and_keeps_what_it_can(tmp_path: Path) -> None:
    finish(tmp_path, corpus("ab"))
    store = Store(str(tmp_path))
    [shard] = plan_shards(store, "d", corpus("ab"), videos_per_shard=2, mb_per_shard=9)
    void_commit(store, shard.shard_id)
    with increment(tmp_path, corpus("ab")) as todo:
        assert (todo.num_changes, todo.todo_shards, todo.todo_videos) == ({}, 1, 0)
        assert [todo_of(work) for work in todo.work()] == [("", "ab", True)]
    with increment(tmp_path, corpus("ab", b="new")) as todo:
        assert kinds(todo) == {"b": "changed"}
        assert [todo_of(work) for work in todo.work()] == [("b", "a", True)]


def test_videos_that_were_planned_and_went_before_they_were_done_are_forgotten(
    tmp_path: Path,
) -> None:
    with increment(tmp_path, corpus("abcd")) as todo:
        commit(tmp_path, next(todo.work()).shard)
    with increment(tmp_path, corpus("ab"), remove_missing=True) as todo:
        assert not list(todo.changes())
        todo.record_removals()
    assert [video for video, _ in assignments(Store(str(tmp_path)), "d")] == ["a", "b"]

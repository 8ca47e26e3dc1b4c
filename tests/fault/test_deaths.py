"""Processes that die, hang or raise in the middle of a job; the tables tell nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fourdh_batch.config import load_config
from tests.fault_tools import (
    Bench,
    Run,
    Tables,
    assert_same_tables,
    redo_limit,
    tables_of,
    undisturbed_tables,
    without,
)
from tests.media import BoxCorpus

# Units of three videos, so that each has neighbours; long.mp4 is saved in the middle.
pytestmark = pytest.mark.timeout(900)  # processes start slowly on a busy machine
COMMON = ["plan.videos_per_shard=5", "cluster.gpu_actors=1", "cluster.checkpoint_frames=48"]
VIDEOS = [f"{letter}.mp4" for letter in "abcdefghijk"]
NUM_FRAMES = 11 * 24 + 160


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> BoxCorpus:
    corpus = BoxCorpus(tmp_path_factory.mktemp("clips"))
    for seed, name in enumerate(VIDEOS):
        corpus.add(name, num_frames=24, seed=seed, miss=0.1)
    corpus.add("long.mp4", num_frames=160, seed=99, miss=0.2, cut_at=70)
    return corpus


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.fixture(scope="module")
def undisturbed(clips: BoxCorpus, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    tables = undisturbed_tables(words_of(clips, tmp_path_factory.mktemp("undisturbed")))
    assert len(tables["tracks"]) > 300
    return tables


def words_of(clips: BoxCorpus, out: Path, *more: str) -> list[str]:
    return [*clips.settings(out), *COMMON, *more]


def assert_bounded(bench: Bench, run: Run, words: list[str], *, deaths: int = 1) -> None:
    """What was redone is what was under way, and the report says so honestly."""
    limit = redo_limit(load_config(None, words), deaths=deaths)
    assert bench.num_redone() <= limit
    assert run.frames_run - run.frames <= limit
    # A death may swallow the last word of its process, never invent frames.
    assert run.frames_run <= bench.num_frames()


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        {"at": "models", "do": "kill", "video": "b.mp4"},
        {"at": "models", "do": "exit", "video": "long.mp4", "frame": 100},
        {"at": "track", "do": "kill", "video": "h.mp4"},
        {"at": "track", "do": "exit", "video": "long.mp4", "frame": 130},
        {"at": "decode", "do": "segv", "video": "e.mp4"},
        {"at": "models", "do": "raise", "video": "g.mp4"},
        {"at": "track", "do": "raise", "video": "d.mp4"},
        {"at": "publish", "do": "kill"},
        {"at": "commit", "do": "kill"},
        {"at": "committed", "do": "kill"},
    ],
    ids=lambda rule: f"{rule['do']}-{rule['at']}-{rule.get('video', '')}",
)
def test_one_death_costs_nothing_but_the_chunks_under_way(
    bench: Bench,
    clips: BoxCorpus,
    undisturbed: Tables,
    tmp_path: Path,
    rule: dict[str, Any],
) -> None:
    words = words_of(clips, tmp_path)
    bench.rules = [{**rule, "times": 1}]
    run = bench.run(words)
    assert bench.times_met(0) == 1
    assert (run.exit_code, run.statuses) == (0, {"ok": 12}), run.story
    assert_same_tables(tables_of(tmp_path), undisturbed)
    assert_bounded(bench, run, words)


@pytest.mark.slow
def test_many_deaths_in_one_job_leave_no_trace(
    bench: Bench, clips: BoxCorpus, undisturbed: Tables, tmp_path: Path
) -> None:
    # One fault per unit, so that nobody is suspected twice: [a b] [c d] [e] [f g] [h i] [j] ...
    words = words_of(clips, tmp_path, "cluster.videos_per_unit=2", "cluster.units_per_actor=1")
    faults = [
        {"at": "models", "do": "kill", "video": "b.mp4"},
        {"at": "track", "do": "raise", "video": "d.mp4"},
        {"at": "decode", "do": "segv", "video": "e.mp4"},
        {"at": "models", "do": "raise", "video": "g.mp4"},
        {"at": "track", "do": "kill", "video": "h.mp4"},
        # Twice the same video, but it has got further in between.
        {"at": "track", "do": "kill", "video": "long.mp4", "frame": 60},
        {"at": "models", "do": "exit", "video": "long.mp4", "frame": 130},
        {"at": "publish", "do": "kill"},
        {"at": "commit", "do": "kill"},
    ]
    bench.rules = [{**fault, "times": 1} for fault in faults]
    run = bench.run(words)
    assert [bench.times_met(number) for number in range(len(faults))] == [1] * len(faults)
    assert (run.exit_code, run.statuses) == (0, {"ok": 12}), run.story
    assert_same_tables(tables_of(tmp_path), undisturbed)
    assert_bounded(bench, run, words, deaths=len(faults) - 2)


@pytest.mark.slow
def test_videos_that_kill_or_hang_their_process_every_time_are_given_up_with_the_evidence(
    bench: Bench, clips: BoxCorpus, undisturbed: Tables, tmp_path: Path
) -> None:
    # Two killers side by side in one unit, and one in another.
    faults = [
        {"at": "models", "do": "exit", "video": "b.mp4"},
        {"at": "models", "do": "kill", "video": "c.mp4"},
        {"at": "decode", "do": "segv", "video": "f.mp4"},
        {"at": "decode", "do": "hang", "video": "i.mp4"},
        {"at": "track", "do": "kill", "video": "k.mp4"},
    ]
    evidence = {
        "b.mp4": ("reconstruct", "WorkerDiedError", "ActorDiedError"),
        "c.mp4": ("reconstruct", "WorkerDiedError", "ActorDiedError"),
        "f.mp4": ("decode", "WorkerDiedError", "the decoder died"),
        "i.mp4": ("decode", "DecodeStalledError", "no frames for 10 s"),
        "k.mp4": ("reconstruct", "WorkerDiedError", "ActorDiedError"),
    }
    assert_given_up(bench, words_of(clips, tmp_path), tmp_path, faults, evidence, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["models", "track"])
def test_a_video_that_always_meets_an_error_of_our_own_code_is_given_up(
    bench: Bench, clips: BoxCorpus, undisturbed: Tables, tmp_path: Path, at: str
) -> None:
    faults = [{"at": at, "do": "raise", "video": "c.mp4"}]
    evidence = {"c.mp4": ("reconstruct", "WorkerDiedError", "RuntimeError")}
    assert_given_up(bench, words_of(clips, tmp_path), tmp_path, faults, evidence, undisturbed)


def assert_given_up(
    bench: Bench,
    words: list[str],
    out: Path,
    faults: list[dict[str, Any]],
    evidence: dict[str, tuple[str, str, str]],
    undisturbed: Tables,
) -> None:
    """These videos are quarantined; all others are as ever, and the next run makes all good."""
    bench.rules = faults
    run = bench.run([*words, "video.stall_timeout_s=10"])
    given_up = len(evidence)
    assert (run.exit_code, run.failed_shards) == (3, {}), run.story
    assert run.statuses == {"ok": 12 - given_up, "quarantined": given_up}
    for number, fault in enumerate(faults):
        # Twice, or once where another's death had made it a suspect already; and after an error
        # the models are given each chunk of a batch by itself.
        calls = 2 if (fault["at"], fault["do"]) == ("models", "raise") else 1
        assert 1 <= bench.times_met(number) <= 2 * calls
    tables = tables_of(out)
    videos = tables["videos"].set_index("video_id")
    failures = tables["failures"].set_index("video_id")
    assert sorted(failures.index) == sorted(evidence)
    for video, (stage, kind, text) in evidence.items():
        assert videos.loc[video, "status"] == "quarantined"
        row = failures.loc[video]
        assert (row["stage"], row["error_class"], row["attempts"]) == (stage, kind, 2)
        assert text in str(row["message"])
    others, expected = tables, undisturbed
    for video in evidence:
        others, expected = without(others, video), without(expected, video)
    assert_same_tables(others, expected)

    bench.rules = []
    run = bench.run(words)
    assert (run.exit_code, run.frames_run) == (3, 0)  # they stay given up, until it is asked for
    run = bench.run([*words, "plan.retry_quarantined=true"])
    assert (run.exit_code, run.frames_run) == (0, given_up * 24), run.story
    assert_same_tables(tables_of(out), undisturbed)


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_and_its_video_done_elsewhere(
    bench: Bench, clips: BoxCorpus, undisturbed: Tables, tmp_path: Path
) -> None:
    words = words_of(clips, tmp_path, "cluster.progress_timeout_s=15")
    bench.rules = [{"at": "models", "do": "hang", "video": "e.mp4", "times": 1}]
    run = bench.run(words)
    assert (run.exit_code, run.statuses) == (0, {"ok": 12}), run.story
    assert run.said("no progress for")
    assert_same_tables(tables_of(tmp_path), undisturbed)


@pytest.mark.slow
def test_models_that_die_whatever_they_are_given_stop_the_job(
    bench: Bench, clips: BoxCorpus, undisturbed: Tables, tmp_path: Path
) -> None:
    bench.rules = [{"at": "models", "do": "exit"}]
    run = bench.run(words_of(clips, tmp_path))
    assert run.error == "FourdhError", run.story
    assert "died 10 times in a row before finishing anything" in run.message
    bench.rules = []
    run = bench.run(words_of(clips, tmp_path))
    assert (run.exit_code, run.statuses) == (0, {"ok": 12}), run.story
    assert_same_tables(tables_of(tmp_path), undisturbed)

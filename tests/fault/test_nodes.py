"""Nodes that die under a job, and nodes that join it, on a real cluster of several raylets."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourdh_batch.config import load_config
from tests.fault_tools import (
    Bench,
    Tables,
    assert_same_tables,
    redo_limit,
    tables_of,
    undisturbed_tables,
)
from tests.media import BoxCorpus

pytestmark = pytest.mark.timeout(900)  # processes start slowly on a busy machine
COMMON = ["plan.videos_per_shard=3", "cluster.checkpoint_frames=48"]
NUM_VIDEOS = 7


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> BoxCorpus:
    corpus = BoxCorpus(tmp_path_factory.mktemp("clips"))
    for seed in range(NUM_VIDEOS - 1):
        corpus.add(f"{seed}.mp4", num_frames=32, seed=seed, miss=0.1)
    corpus.add("long.mp4", num_frames=160, seed=99, miss=0.2)
    return corpus


@pytest.fixture(scope="module")
def undisturbed(clips: BoxCorpus, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    root = tmp_path_factory.mktemp("undisturbed")
    return undisturbed_tables([*clips.settings(root), *COMMON])


@pytest.mark.slow
def test_a_node_that_is_lost_with_everything_on_it_is_replaced_by_the_others(
    clips: BoxCorpus, undisturbed: Tables, tmp_path: Path
) -> None:
    words = [*clips.settings(tmp_path / "out"), *COMMON, "cluster.gpu_actors=2"]
    with Bench(tmp_path / "bench", nodes=[2, 2]) as bench:
        bench.rules = [{"at": "models", "do": "ask", "video": "long.mp4", "frame": 100, "times": 1}]
        run = bench.run(words)
    lost = bench.note(0)
    assert lost is not None
    assert (run.exit_code, run.statuses) == (0, {"ok": NUM_VIDEOS}), run.story
    assert_same_tables(tables_of(tmp_path / "out"), undisturbed)
    # Either node may have held one process or both.
    assert bench.num_redone() <= redo_limit(load_config(None, words), deaths=2)
    assert len({chunk.node_id for chunk in bench.passes()} - {lost}) == 1
    assert run.said("(nobody)")


@pytest.mark.slow
def test_the_nodes_of_its_decoders_may_die_without_a_video_being_suspected(
    clips: BoxCorpus, undisturbed: Tables, tmp_path: Path
) -> None:
    # One core each: the models take one node, the decoders have to live on another.
    words = [*clips.settings(tmp_path / "out"), *COMMON, "cluster.units_per_actor=1"]
    with Bench(tmp_path / "bench", nodes=[1, 1, 1, 1]) as bench:
        rule = {"at": "decode", "do": "ask", "video": "long.mp4", "frame": 100, "times": 1}
        bench.rules = [rule, rule]
        run = bench.run(words)
    assert len({bench.note(0), bench.note(1)} - {None}) == 2
    assert (run.exit_code, run.statuses) == (0, {"ok": NUM_VIDEOS}), run.story
    assert not run.said("(suspect)")
    assert_same_tables(tables_of(tmp_path / "out"), undisturbed)
    assert bench.num_redone() <= redo_limit(load_config(None, words), deaths=2)


@pytest.mark.slow
def test_a_node_that_joins_late_is_used(
    clips: BoxCorpus, undisturbed: Tables, tmp_path: Path
) -> None:
    # What waits is what another process can take: one unit at a time, and long enough for a node
    # and its processes to start on a busy machine.
    words = [*clips.settings(tmp_path / "out"), *COMMON, "cluster.gpu_actors=2"]
    words.append("cluster.units_per_actor=1")
    with Bench(tmp_path / "bench", nodes=[2]) as bench:
        bench.rules = [
            {"at": "models", "do": "tell", "cpus": 2, "times": 1},
            *({"at": "models", "do": "slow"} for _ in range(12)),
        ]
        run = bench.run(words)
        nodes = {chunk.node_id for chunk in bench.passes()}
        assert len(nodes) == 2
        assert bench.note(0) in nodes
    assert (run.exit_code, run.statuses) == (0, {"ok": NUM_VIDEOS}), run.story
    assert bench.num_redone() == 0
    assert_same_tables(tables_of(tmp_path / "out"), undisturbed)

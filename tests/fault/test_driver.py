"""The driver itself is killed, again and again; and a second one is refused."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fourdh_batch.config import load_config
from tests.fault_tools import (
    Faults,
    Tables,
    assert_same_tables,
    redo_limit,
    tables_of,
    undisturbed_tables,
)
from tests.media import BoxCorpus

pytestmark = pytest.mark.timeout(900)  # processes start slowly on a busy machine
COMMON = ["plan.videos_per_shard=3", "cluster.checkpoint_frames=48"]
NUM_VIDEOS = 6
NUM_KILLS = 20


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> BoxCorpus:
    corpus = BoxCorpus(tmp_path_factory.mktemp("clips"))
    for seed in range(NUM_VIDEOS - 1):
        corpus.add(f"{seed}.mp4", num_frames=32, seed=seed, miss=0.1)
    corpus.add("long.mp4", num_frames=200, seed=99, miss=0.2)
    return corpus


@pytest.fixture(scope="module")
def undisturbed(clips: BoxCorpus, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    root = tmp_path_factory.mktemp("undisturbed")
    return undisturbed_tables([*clips.settings(root), *COMMON])


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[Faults]:
    faults = Faults(tmp_path / "faults")
    yield faults
    faults.stop()


@pytest.mark.slow
def test_a_killed_driver_is_continued_and_a_second_one_refused(
    clips: BoxCorpus, undisturbed: Tables, faults: Faults, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [*clips.settings(out), *COMMON]
    moments = [
        {"at": "models", "do": "ask", "video": "long.mp4", "frame": 130, "times": 1},
        {"at": "commit", "do": "ask", "times": 1},
    ]
    for number, moment in enumerate(moments):
        faults.renew([moment])
        driver = faults.start(words)
        faults.wait_for(0, driver)
        if not number:
            second = faults.start(words)
            assert second.wait() == 1
            assert "in use by" in second.said
            assert f"process {driver.pid}" in second.said
        workers = [
            process
            for process in psutil.Process(driver.pid).children(recursive=True)
            if process.name().startswith("ray::") and "Agent" not in process.name()
        ]
        assert len(workers) > 2
        driver.kill()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, "processes of a killed driver go on"
    committed = list((out / "_commits").glob("*"))
    assert len(committed) < 2
    faults.renew([{"at": "publish", "do": "kill", "times": 1}])
    driver = faults.start(words)
    assert driver.wait() == 0, driver.said
    assert faults.times_met(0) == 1
    assert driver.summary["videos"]["ok"] == NUM_VIDEOS  # Ray's words do not stand in between
    assert_same_tables(tables_of(out), undisturbed)
    assert faults.num_redone() <= redo_limit(load_config(None, words), deaths=2)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_random_moments(
    clips: BoxCorpus, undisturbed: Tables, faults: Faults, tmp_path: Path
) -> None:
    dice = random.Random(20)
    num_kills, num_outputs = 0, 0
    moments: list[float] = []
    duration_s = 0.0
    while num_kills < NUM_KILLS or duration_s == 0.0:
        out = tmp_path / f"out{num_outputs}"
        num_outputs += 1
        words = [*clips.settings(out), *COMMON]
        limit = redo_limit(load_config(None, words))
        faults.rules = []
        kills_here = 0
        while True:
            driver = faults.start(words)
            started = time.monotonic()
            if duration_s and num_kills < NUM_KILLS and kills_here < 7:
                moment = dice.uniform(0, 1.1 * duration_s)
                while driver.exit_code is None and time.monotonic() - started < moment:
                    time.sleep(0.005)
                if driver.exit_code is None:
                    driver.kill()
                    moments.append(round(moment, 2))
                    num_kills += 1
                    kills_here += 1
                    continue
            assert driver.wait() == 0, driver.said
            duration_s = duration_s or time.monotonic() - started
            break
        assert_same_tables(tables_of(out), undisturbed)
        assert faults.num_redone() <= kills_here * limit
        print(f"output {num_outputs}: {kills_here} kills, {faults.num_redone()} frames redone")
    print(f"killed after {moments} s of {duration_s:.1f} s")
    assert len(moments) == NUM_KILLS

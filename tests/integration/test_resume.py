"""A video that is interrupted goes on from its saved state, and nobody can tell from the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fourdh_batch as fb
from fourdh_batch.cluster.run import run_job
from fourdh_batch.config import JobConfig, load_config
from fourdh_batch.pipeline.engine import build_engine, model_card
from fourdh_batch.pipeline.following import TrackerModels
from fourdh_batch.pipeline.plan import Shard, read_corpus
from fourdh_batch.pipeline.reading import read_chunks
from fourdh_batch.pipeline.records import ChunkResult, ModelCard
from fourdh_batch.pipeline.shard import SavedWork, UnitTracking
from fourdh_batch.storage import Store
from fourdh_batch.tables.writer import SavedSpool
from fourdh_batch.types import DecodeSummary
from tests.fault_tools import (
    Faults,
    assert_same_tables,
    tables_of,
    undisturbed_tables,
)
from tests.media import BoxCorpus, write_video
from tests.weights import untrained_hmr2_file, untrained_predictor_file, untrained_texture_file

PREDICTOR, TEXTURE = (
    f"tracker.predictor_weights={untrained_predictor_file()}",
    f"tracker.texture_weights={untrained_texture_file()}",
)
COMPARED = "tracks", "detections", "videos"


class Parts:
    """A short video, read and reconstructed once; tracked as often as wanted."""

    def __init__(self, folder: Path, num_frames: int, *words: str) -> None:
        corpus = BoxCorpus(folder / "in")
        corpus.add("v.mp4", num_frames=num_frames, seed=7, miss=0.2, cut_at=num_frames // 2)
        self.folder = folder
        self.config: JobConfig = load_config(None, [*corpus.settings(folder / "out"), *words])
        self.card: ModelCard = model_card(self.config)
        self.models = TrackerModels(self.config)
        [self.video] = read_corpus(self.config.input)
        engine = build_engine(self.config)
        self.results: list[ChunkResult] = []
        for item in read_chunks(self.video, self.config.video):
            if isinstance(item, DecodeSummary):
                self.summary = item
            else:
                self.results += engine.run([item])
        self.num_runs = 0
        self.undisturbed = self.track(frozenset())

    def unit(self, store: Store, saved: str = "") -> UnitTracking:
        """The video as a unit of its own, in parts of a few rows; saved when the test says."""
        unit = UnitTracking(
            self.shard, [self.video], self.config, self.card, self.models, store, saved=saved
        )
        unit._spool._part_bytes = 2000
        return unit

    @property
    def shard(self) -> Shard:
        return Shard("s", "d", (self.video,))

    def found(self, store: Store) -> str:
        """The spool from which the video can go on."""
        return SavedWork(store, self.shard, self.card).unfinished.get("v.mp4", "")

    def track(self, saves: frozenset[int], *, lose: int = 0) -> dict[str, Any]:
        """Tables of the video, interrupted behind the chunks `saves`.

        Args:
            lose: chunks that are done behind a saved state and lost.
        """
        self.num_runs += 1
        store = Store(str(self.folder / f"run{self.num_runs}"))
        unit = self.unit(store)
        for number, result in enumerate(self.results):
            unit.add(result)
            if number in saves:
                unit._save()
                for behind in self.results[number + 1 : number + 1 + lose]:
                    unit.add(behind)
                unit = self.unit(store, self.found(store))
                assert unit.next_frame == result.frame_index[-1] + 1
        unit.end(self.summary)
        [outcome] = unit.close()
        assert SavedWork(store, self.shard, self.card).outcomes == {"v.mp4": outcome}
        spool = SavedSpool(store, "s", outcome.spool)
        return {
            name: pd.concat([t.to_pandas() for t in spool.read(name, "v.mp4")]) for name in COMPARED
        }


def assert_same(a: dict[str, pd.DataFrame], b: dict[str, pd.DataFrame]) -> None:
    for name in COMPARED:
        pd.testing.assert_frame_equal(
            a[name].reset_index(drop=True), b[name].reset_index(drop=True), check_exact=True
        )


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Thirteen chunks, with predicted and completed poses."""
    return Parts(tmp_path_factory.mktemp("long"), 200, PREDICTOR, "tracker.store_appearance=true")


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(saves=st.frozensets(st.integers(0, 12), max_size=6), lose=st.integers(0, 3))
def test_a_video_saved_anywhere_goes_on_to_identical_rows(
    long: Parts, saves: frozenset[int], lose: int
) -> None:
    assert (long.undisturbed["tracks"].state == "predicted").sum() > 10
    assert_same(long.track(saves, lose=lose), long.undisturbed)


def test_looks_are_saved_too(tmp_path: Path) -> None:
    parts = Parts(tmp_path, 40, PREDICTOR, TEXTURE)
    assert_same(parts.track(frozenset({0, 1}), lose=1), parts.undisturbed)


def test_a_state_of_other_models_or_with_lost_rows_is_not_used(long: Parts, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    unit = long.unit(store)
    for result in long.results[:9]:
        unit.add(result)
    unit._save()
    name = long.found(store)
    others = replace(long.card, fingerprint="another")
    assert SavedWork(store, long.shard, others).unfinished == {}
    assert long.unit(store, name).next_frame == 9 * 16
    [part, *_] = tmp_path.rglob("*-detections-*.arrow")
    part.unlink()
    assert long.unit(store, name).next_frame == 0


def test_closing_a_unit_keeps_the_saved_state_of_its_long_video(
    long: Parts, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    unit = long.unit(store)
    for result in long.results[:5]:
        unit.add(result)
    unit._save()
    unit.add(long.results[5])
    assert unit.close() == []  # its model process has died
    assert long.unit(store, long.found(store)).next_frame == 5 * 16


@pytest.mark.parametrize("damage", [b"", b"\x00" * 30, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_state_means_starting_anew(long: Parts, tmp_path: Path, damage: bytes) -> None:
    store = Store(str(tmp_path))
    unit = long.unit(store)
    unit.add(long.results[0])
    unit._save()
    name = long.found(store)
    [saved] = tmp_path.rglob("*.index")
    whole = saved.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 64
    begun_wrong = (damage or bytes([whole[0] ^ 1])) + whole[max(1, len(damage)) :]
    for body in (damage, whole[:-20] + damage, begun_wrong, bytes(flipped)):
        saved.write_bytes(body)
        assert long.found(store) == ""
        assert long.unit(store, name).next_frame == 0


def test_a_killed_tracking_process_redoes_only_what_is_behind_its_saved_state(
    tmp_path: Path, local_ray: None
) -> None:
    mine = BoxCorpus(tmp_path / "in")
    mine.add("long.mp4", num_frames=480, seed=5, miss=0.2)
    slow = untrained_hmr2_file("mini")  # not too fast to be caught
    common = ["cluster.gpu_actors=1", f"hmr.weights={slow}", "hmr.size=mini"]
    undisturbed = [*mine.settings(tmp_path / "undisturbed"), *common]
    assert run_job(load_config(None, undisturbed)).exit_code == 0

    every, killed, done = 64, [], []

    def watch(progress: Any) -> None:
        if not killed and progress.frames_done >= 200:
            for process in psutil.Process().children(recursive=True):
                if process.name().startswith("ray::TrackerWorker"):
                    killed.append(progress.frames_done)
                    process.kill()
        elif killed and progress.frames_done:
            done.append(progress.frames_done)

    words = [*mine.settings(tmp_path / "out"), *common, f"cluster.checkpoint_frames={every}"]
    report = run_job(load_config(None, words), on_progress=watch)
    assert killed
    assert report.exit_code == 0
    # Chunks under way at the death are lost with those behind the saved state.
    in_flight = 16 * 5
    assert min(done) >= killed[0] - every - in_flight
    for name in ("tracks", "detections"):
        pd.testing.assert_frame_equal(
            fb.read_table(str(tmp_path / "out"), name),
            fb.read_table(str(tmp_path / "undisturbed"), name),
            check_exact=True,
        )


LONG_FRAMES = 20_000
KILLS = (4_000, 9_000, 14_000)  # frames at which tracker, models and driver die


def long_corpus(folder: Path) -> BoxCorpus:
    """One block walks for 20,000 frames; it is seen in 8 of 50, tracked over the gaps."""
    corpus = BoxCorpus(folder)
    frames = np.full((LONG_FRAMES, 64, 64, 3), 90, np.uint8)
    for t in range(LONG_FRAMES):
        x = abs((t // 4) % 80 - 40)
        frames[t, 8:60, x : x + 20] = (200, 180, 60)
        if t % 50 < 8:
            box = [float(x), 8.0, float(x + 20), 60.0]
            row = {"video_id": "long.mp4", "frame_index": t, "bbox_xyxy_px": box, "score": 0.9}
            corpus.rows.append(row)
    write_video(folder / "long.mp4", frames, gop=250)
    corpus.save()
    return corpus


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_thousand_frames_with_tracker_models_and_driver_killed(tmp_path: Path) -> None:
    corpus = long_corpus(tmp_path / "in")
    more = ["detector.min_width_px=5", "detector.min_height_px=20", "video.chunk_frames=64"]
    expected = undisturbed_tables([*corpus.settings(tmp_path / "undisturbed"), *more])
    assert (expected["tracks"].state == "predicted").sum() > 10_000

    words = [*corpus.settings(tmp_path / "out"), *more]
    faults = Faults(tmp_path / "faults")
    faults.rules = [
        {"at": at, "do": do, "frame": frame, "times": 1}
        for at, do, frame in zip(
            ("track", "models", "models"), ("kill", "kill", "ask"), KILLS, strict=True
        )
    ]
    try:
        driver = faults.start(words)
        faults.wait_for(2, driver)
        driver.kill()
        driver = faults.start(words)
        assert driver.wait() == 0, driver.said
    finally:
        faults.stop()
    assert [faults.times_met(number) for number in range(3)] == [1, 1, 1]
    assert_same_tables(tables_of(tmp_path / "out"), expected)
    cluster = load_config(None, words).cluster
    window = cluster.checkpoint_frames + (cluster.chunks_ahead + 2) * 64
    print(f"{faults.num_redone()} frames redone after three deaths")
    assert faults.num_redone() <= 3 * window
    assert faults.num_frames() == LONG_FRAMES + faults.num_redone()

"""What a run would take, said beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fourdh_batch.config import JobConfig, PlanConfig
from fourdh_batch.errors import ManifestError
from fourdh_batch.pipeline import dry_run as module
from fourdh_batch.pipeline.dry_run import (
    ASSUMED_BYTES_PER_FRAME,
    ASSUMED_FPS,
    ASSUMED_FRAMES,
    dry_run,
)
from fourdh_batch.pipeline.increment import Increment
from fourdh_batch.pipeline.probes import ProbeCache
from fourdh_batch.storage import Store
from fourdh_batch.tables.manifest import CommitRecord, VideoRecord, write_commit
from fourdh_batch.video.probe import Header
from tests.video_makers import make_video

FRAMES = 12


def config_of(source: Path, out: Path, **plan: Any) -> JobConfig:
    return JobConfig(input=str(source), output=str(out), dataset="d", plan=PlanConfig(**plan))


def manifest(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "m.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"uri": "gone.mp4", "fingerprint": "f", "num_bytes": 0} | r) for r in rows
        )
    )
    return path


def run_record(out: Path, run_id: str, **changes: Any) -> None:
    record = {
        "run_id": run_id,
        "dataset": "d",
        "models": {"fingerprint": "m", "weights": "w", "detector": "x"},
        "work": {
            "frames": 1000,
            "actor_seconds": 20.0,
            "track_rows": 3000,
            "object_bytes": 600_000,
            "device": "NVIDIA H100",
        },
    }
    (out / "_runs").mkdir(parents=True, exist_ok=True)
    (out / "_runs" / f"{run_id}.json").write_text(json.dumps(record | changes))


def finish(config: JobConfig, model: str = "m") -> None:
    store = Store(config.output)
    videos = module.stream_corpus(config)
    with Increment(store, config, model, videos, record=True) as plan:
        for work in plan.work():
            shard = work.shard
            records = tuple(
                VideoRecord(v.video_id, v.fingerprint, "ok", {"tracks": 1}) for v in shard.videos
            )
            fingerprint = shard.fingerprint(model)
            write_commit(
                store, CommitRecord(shard.shard_id, "d", fingerprint, "c", model, records, {}, {})
            )


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_frames_come_from_headers_and_what_does_not_open_has_none(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        make_video(tmp_path / "in" / f"{name}.mp4", FRAMES)
    (tmp_path / "in" / "c.mp4").write_bytes(b"no video")
    found = dry_run(config_of(tmp_path / "in", tmp_path / "out", videos_per_shard=2))
    assert (found.num_videos, found.shards_todo, found.videos_todo) == (3, 2, 3)
    assert (found.frames_known, found.frames_guessed, found.videos_guessed) == (2 * FRAMES, 0, 0)
    assert [(s["videos"], s["frames"]) for s in found.shards] == [(2, 2 * FRAMES), (1, 0)]
    assert (found.models, found.rates.source, found.cost) == ("unknown", "assumed", None)
    assert not (tmp_path / "out").exists()


def test_frames_of_a_manifest_spare_the_headers_and_windows_count(tmp_path: Path) -> None:
    source = manifest(
        tmp_path,
        {"video_id": "whole", "num_frames": 1000, "fps": 10},
        {"video_id": "part", "num_frames": "1000", "fps": "10", "start_s": 20, "end_s": 50},
        {"video_id": "over", "num_frames": 1000, "fps": 10, "start_s": 90, "end_s": 500},
        {"video_id": "past", "num_frames": 1000, "fps": 10, "start_s": 200},
        {"video_id": "by rate", "num_frames": 1000, "end_s": 4},
    )
    found = dry_run(config_of(source, tmp_path / "out"), max_headers=0)
    assert found.frames == found.frames_known == 1000 + 300 + 100 + 0 + 4 * ASSUMED_FPS


def test_frames_of_other_files_are_guessed_by_size(tmp_path: Path) -> None:
    source = manifest(
        tmp_path,
        {"video_id": "known", "num_frames": 100, "num_bytes": 50_000},
        {"video_id": "size", "num_bytes": 100_000},
        {"video_id": "nothing"},
        {"video_id": "a lie", "num_frames": 10**9, "num_bytes": 50_000},
    )
    found = dry_run(config_of(source, tmp_path / "out"), max_headers=0)
    assert (found.frames_known, found.frames_guessed) == (100, 200 + 100 + 100)
    assert found.videos_guessed == 3
    source = manifest(tmp_path, {"video_id": "size", "num_bytes": 100_000}, {"video_id": "none"})
    found = dry_run(config_of(source, tmp_path / "out"), max_headers=0)
    assert found.frames_guessed == 100_000 / ASSUMED_BYTES_PER_FRAME + ASSUMED_FRAMES


def test_of_many_files_an_even_sample_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"video_id": f"v{n}", "fingerprint": f"f{n}", "num_bytes": 1000} for n in range(40)]
    asked: list[str] = []

    def read_headers(uris: Any) -> Any:
        for key, _ in uris:
            asked.append(key)
            yield key, Header(50, 25.0, 8, 8)

    monkeypatch.setattr(module, "read_headers_in_parallel", read_headers)
    steps: list[tuple[str, int, int]] = []
    found = dry_run(
        config_of(manifest(tmp_path, *rows), tmp_path / "out"),
        max_headers=10,
        on_step=lambda *step: steps.append(step),
    )
    assert len(set(asked)) == 10
    assert max(int(key[1:]) for key in asked) > 20 > min(int(key[1:]) for key in asked)
    assert (found.frames_known, found.frames_guessed) == (500, 1500)
    assert steps[-1] == ("headers", 10, 10)


def test_rates_are_those_of_the_newest_runs_of_the_same_models(tmp_path: Path) -> None:
    out = tmp_path / "out"
    slow = {"frames": 1000, "actor_seconds": 80.0, "track_rows": 3000, "object_bytes": 900_000}
    run_record(out, "20260101T000000Z-a", work=slow | {"device": "NVIDIA H100"})
    run_record(out, "20260102T000000Z-b")
    run_record(
        out, "20260103T000000Z-c", work=slow | {"device": "cpu"}, models={"fingerprint": "?"}
    )
    run_record(out, "20260104T000000Z-d", work={"frames": 0})
    run_record(out, "20260105T000000Z-e", work=None)
    (out / "_runs" / "20260106T000000Z-f.json").write_bytes(b"{")
    (out / "_runs" / "20260107T000000Z-g.json").write_text("[1]")
    source = manifest(tmp_path, {"video_id": "a", "num_frames": 7200})
    found = dry_run(config_of(source, out, gpu_hour_cost=2.0))
    assert found.models == "last run"
    rates = found.rates
    assert (rates.source, rates.device) == ("measured", "NVIDIA H100")
    assert rates.runs == ("20260102T000000Z-b", "20260101T000000Z-a")
    assert rates.seconds_per_frame == pytest.approx(100 / 2000)
    assert found.people_rows == 7200 * 3
    assert found.hours == pytest.approx(0.1)
    assert found.cost == pytest.approx(0.2)
    assert found.bytes_out == 7200 * 3 * 250
    said = json.loads(json.dumps(found.to_dict()))
    assert said["rates"]["runs"] == list(rates.runs)
    assert said["cost"] == pytest.approx(0.2)


def test_a_finished_corpus_is_up_to_date_with_the_models_of_the_last_run(tmp_path: Path) -> None:
    rows = [{"video_id": n, "fingerprint": n, "num_frames": 10} for n in "abcd"]
    out = tmp_path / "out"
    config = config_of(manifest(tmp_path, *rows), out, videos_per_shard=2)
    finish(config)
    run_record(out, "20260102T000000Z-b")
    before = everything_below(out)
    found = dry_run(config)
    assert (found.shards_up_to_date, found.shards_todo, found.changes) == (2, 0, {})
    manifest(tmp_path, rows[0] | {"fingerprint": "A"}, *rows[1:3], rows[3] | {"video_id": "e"})
    found = dry_run(config_of(tmp_path / "m.jsonl", out, videos_per_shard=2))
    assert found.changes == {"changed": 1, "new": 1}
    assert (found.videos_todo, found.videos_kept, found.videos_missing) == (2, 1, 1)
    assert (found.frames, len(found.shards)) == (20, 2)
    assert everything_below(out) == before
    manifest(tmp_path, rows[0])
    found = dry_run(config_of(tmp_path / "m.jsonl", out, videos_per_shard=2, remove_missing=True))
    assert (found.shards_removed, found.changes) == (1, {"removed": 3})
    manifest(tmp_path, rows[0] | {"fingerprint": "A"})
    with pytest.raises(ManifestError, match="would remove 1 finished videos"):
        dry_run(config_of(tmp_path / "m.jsonl", out, videos_per_shard=2))


def test_what_was_probed_is_kept_only_where_asked_for(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    make_video(tmp_path / "in" / "a.mp4", FRAMES)
    config = config_of(tmp_path / "in", tmp_path / "out")
    dry_run(config, remember=True)
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["probes.parquet"]
    [video] = module.stream_corpus(config)
    with ProbeCache(Store(config.output), "d") as cache:
        header = cache.header(video.fingerprint)
    assert header is not None
    assert header.num_frames == FRAMES


def test_only_so_many_shards_are_described(tmp_path: Path) -> None:
    rows = [{"video_id": f"{n:02d}", "num_frames": n} for n in range(30)]
    config = config_of(manifest(tmp_path, *rows), tmp_path / "out", videos_per_shard=1)
    found = dry_run(config, max_shards=3, max_headers=0)
    mean = 15  # of the others, for 0 says nothing
    assert [shard["frames"] for shard in found.shards] == [mean, 1, 2]
    assert (found.shards_todo, found.frames_known) == (30, sum(range(30)))

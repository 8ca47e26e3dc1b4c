"""The training jobs from their command lines, and by Ray Train."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from fourdh_batch.cli import training_main
from fourdh_batch.config import (
    LoopConfig,
    SourceConfig,
    TrainDetectorConfig,
    TrainPredictorConfig,
    to_dict,
)
from fourdh_batch.errors import TrainingError
from fourdh_batch.models.appearance import load_texture_encoder
from fourdh_batch.models.build import load_hmr2
from fourdh_batch.models.build_phalp import load_pose_predictor
from fourdh_batch.models.smpl import load_body
from fourdh_batch.training.distributed import train_everywhere
from fourdh_batch.training.loop import RECORD, Task
from fourdh_batch.training.predictor import build_predictor_task
from tests.conftest import REPO
from tests.training_tables import publish_turning_people

pytest.importorskip("tensorboard", reason="training logs need the extra 'train'")


def job(name: str) -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = runpy.run_path(str(REPO / "jobs" / f"{name}.py"))["main"]
    return main


def test_hmr2_is_trained_on_rendered_people_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_turning_people(tmp_path, tmp_path / "tables", {"a": 20})
    words = [
        f"output={tmp_path / 'out'}",
        "size=tiny",
        f"sources=[{{kind: synthetic, weight: 3}}, {{kind: tables, path: {tmp_path / 'tables'}}}]",
        f"real_poses={tmp_path / 'tables'}",
        "loss.adversarial=0.0005",
        f"held_out=[{{kind: synthetic}}, {{kind: tables, path: {tmp_path / 'tables'}, name: ava}}]",
        "held_out_examples=4",
        *("loop.steps=2", "loop.batch_size=4", "loop.precision=fp32", "loop.device=cpu"),
        "loop.data_workers=1",
        "--json",
    ]
    assert job("train_hmr2")(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["steps"] == 2
    figures = {"pa_mpjpe_mm", "pa_mpjpe_mm_of_mean_body", "mpjpe_mm", "pck_0.05", "pck_0.1"}
    assert set(record["held_out"]) == {f"{n}/{f}" for n in ("synthetic", "ava") for f in figures}
    model = load_hmr2(tmp_path / "out" / record["weights"], load_body(), device="cpu")
    assert model.weights_digest == record["digest"]
    assert job("train_hmr2")([*words[:-1], "loop.log_every=5"]) == 0  # nothing left to do
    assert "after 2 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_predictor_is_trained_on_people_made_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"output={tmp_path / 'out'}",
        *("dim=16", "depth=1", "num_heads=2", "head_dim=8", "mlp_dim=32", "smpl_dim=32"),
        *("loop.steps=2", "loop.batch_size=4", "loop.device=cpu", "held_out_examples=4"),
        "--json",
    ]
    assert job("train_predictor")(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["held_out"]["gap_5_mpjpe_mm_slerp"] > 0
    predictor = load_pose_predictor(tmp_path / "out" / record["weights"])
    assert (predictor.weights_digest, predictor.weights_origin) == (record["digest"], "trained")
    assert predictor.network.size.smpl_dim == 32


@pytest.mark.slow
def test_appearance_is_trained_on_outfits_made_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"output={tmp_path / 'out'}",
        *("map_px=32", "num_views=4", "held_out_examples=4"),
        *("loop.steps=2", "loop.batch_size=4", "loop.device=cpu", "--json"),
    ]
    assert job("train_appearance")(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert 0 <= record["held_out"]["auc"] <= 1
    encoder = load_texture_encoder(tmp_path / "out" / record["weights"])
    assert (encoder.weights_digest, encoder.weights_origin) == (record["digest"], "trained")


@pytest.mark.slow
def test_a_detector_is_trained_and_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fourdh_batch.models.detector_transformers import TransformersDetector

    pytest.importorskip("transformers")
    words = [
        f"output={tmp_path / 'out'}",
        *("height=64", "width=96", "dim=16", "num_queries=9", "decoder_layers=1"),
        *("backbone_widths=[8, 8, 8, 8]", "num_places=1", "num_outfits=4", "reuse=1"),
        "held_out_examples=4",
        *("loop.steps=2", "loop.batch_size=4", "loop.device=cpu", "loop.cpu_threads=1"),
        "--json",
    ]
    assert job("train_detector")(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["held_out"]) == {
        *("ap", "ap50", "recall_half_visible", "precision", "mean_iou")
    }
    folder = tmp_path / "out" / record["weights"]
    detector = TransformersDetector(str(folder), device="cpu", min_score=0.2, batch_size=2)
    assert detector.name == "transformers_rt_detr"
    assert (folder / "model.safetensors").stat().st_size < 1_000_000  # float16
    assert job("train_detector")([*words[:-1], "loop.log_every=5"]) == 0  # nothing left to do
    assert "after 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("train_hmr2", [], "output: give output="),
        ("train_hmr2", ["output=x", "sources=[{kind: films}]"], "a kind of"),
        ("train_hmr2", ["output=x", "sources=[{kinds: tars}]"], "kinds"),
        ("train_hmr2", ["output=x", "held_out=[{}, {}]"], "different names"),
        ("train_hmr2", ["output=x", "loss.adversarial=1"], "poses for the discriminator"),
        ("train_predictor", ["output=x", "sources=[{kind: tars, path: y}]"], "a kind of"),
        ("train_predictor", ["output=x", "loop.decay=linear"], "constant or cosine"),
        ("train_appearance", ["output=x", "map_px=100"], "one of (256, 128"),
        ("train_appearance", [], "output: give output="),
        ("train_detector", [], "output: give output="),
        ("train_detector", ["output=x", "width=100"], "a multiple of 32"),
        ("train_detector", ["output=x", "loop.device=cuda:99"], "loop.device: expected 100 CUDA"),
    ],
)
def test_wrong_settings_are_told(
    name: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job(name)(words) == 2
    assert message in capsys.readouterr().err


def test_a_figure_of_nobody_is_told_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"weights": "detector", "steps": 2, "held_out": {"ap": 0.5, "precision": None}}

    def main(*words: str) -> int:
        return training_main(
            REPO / "jobs" / "train_detector.yaml",
            [f"output={tmp_path}", *words],
            description="",
            kind=TrainDetectorConfig,
            run=lambda config: (tmp_path / RECORD).write_text(json.dumps(record)),
        )

    assert main() == 0
    told = capsys.readouterr().out.splitlines()[1:]
    assert [line.split() for line in told] == [["ap", "0.5"], ["precision", "-"]]
    assert main("--json") == 0
    assert json.loads(capsys.readouterr().out) == record


def test_a_task_is_built_with_the_threads_of_the_training(tmp_path: Path) -> None:
    seen = []

    def build(device: str | torch.device) -> Task:
        seen.append((device, torch.get_num_threads()))
        raise TrainingError("no task")

    before = torch.get_num_threads()
    loop = LoopConfig(device="cpu", cpu_threads=before + 1)
    with pytest.raises(TrainingError, match="no task"):
        train_everywhere(build, loop, str(tmp_path), {})
    assert seen == [("cpu", before + 1)]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train_hmr2", ["size=tiny", "held_out=[{{path: {}}}]", "loop.data_workers=2"]),
        ("train_predictor", ["sources=[{{path: {}}}]"]),
        ("train_detector", ["motion={}", "loop.data_workers=2", "reuse=1"]),
    ],
)
def test_motion_capture_that_is_not_there_is_told_before_any_training(
    name: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "motion"
    words = [f"output={tmp_path / 'out'}", *(word.format(folder) for word in words)]
    assert job(name)(words) == 2
    assert capsys.readouterr().err == f"error: {folder}: no such file or folder\n"
    folder.mkdir()
    assert job(name)(words) == 1
    told = f"error: {folder}: expected .npz or .bvh files with poses, got none\n"
    assert capsys.readouterr().err == told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["train_hmr2", "train_predictor", "train_appearance", "train_detector"]
)
def test_help_has_examples_and_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert job(name)(["--help"]) == 0
    told = capsys.readouterr().out
    assert f"python jobs/{name}.py" in told
    assert "loop.learning_rate" in told
    for line in told.split("Settings;")[1].splitlines()[2:]:
        assert not line.endswith(": "), line


def test_the_published_recipe_is_a_possible_one() -> None:
    from fourdh_batch.config import TrainHmrConfig, load_config

    config = load_config(
        REPO / "jobs" / "train_hmr2_full.yaml", ["real_poses=cmu_mocap.npz"], TrainHmrConfig
    )
    assert sum(source.weight for source in config.sources) == pytest.approx(1)
    assert (config.loss.keypoints_3d, config.augment.rotation_deg) == (0.05, 30)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray reads its own old settings
@pytest.mark.usefixtures("local_ray")
def test_two_workers_of_which_one_dies_give_what_two_give(tmp_path: Path) -> None:
    """By Ray Train: gradients are averaged, and a lost process is started again."""
    publish_turning_people(tmp_path, tmp_path / "tables", {"a": 40, "e": 45})
    loop = LoopConfig(
        steps=4,
        batch_size=4,
        learning_rate=1e-3,
        device="cpu",
        cpu_threads=1,
        workers=2,
        address="local",
        checkpoint_every=2,
        max_failures=1,
    )
    config = TrainPredictorConfig(
        sources=(both := [SourceConfig(kind="tables", path=str(tmp_path / "tables"))]),
        held_out=both,
        held_out_examples=4,
        dim=16,
        depth=1,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        frame_length=50,
        loop=loop,
    )

    def build(device: str | torch.device, *, flag: str) -> Task:
        task: Any = build_predictor_task(config, device)
        whole_step, steps = task.step, []

        def step(batch: Any) -> Any:
            steps.append(len(steps))
            is_victim = torch.distributed.get_rank() == 1 and len(steps) == 4
            if flag and is_victim and not Path(flag).exists():
                Path(flag).touch()
                os._exit(1)
            return whole_step(batch)

        task.step = step
        return task  # type: ignore[no-any-return]

    records = []
    flag = tmp_path / "died"
    for name, death in (("whole", ""), ("killed", str(flag))):
        output = tmp_path / name
        settings = to_dict(replace(config, output=""))
        train_everywhere(partial(build, flag=death), loop, str(output), settings)
        records.append(json.loads((output / RECORD).read_text()))
    assert flag.exists()
    assert records[0]["digest"] == records[1]["digest"]
    assert records[0]["held_out"] == records[1]["held_out"]

"""The loop on a network small enough for a second: HMR 2.0 of size `tiny`, people of noise."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fourdh_batch.config import AugmentConfig, LoopConfig, LossConfig
from fourdh_batch.errors import CheckpointError, ConfigError, TrainingError
from fourdh_batch.evaluate.pose import pa_mpjpe_mm
from fourdh_batch.models.build import load_hmr2, untrained_hmr2
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.storage import Store
from fourdh_batch.training.checkpoint import (
    FOLDER,
    LATEST,
    latest_checkpoint,
    save_checkpoint,
)
from fourdh_batch.training.data import MixedExamples
from fourdh_batch.training.examples import Person
from fourdh_batch.training.hmr2 import HmrBatch, HmrTask, evaluate_hmr2
from fourdh_batch.training.loop import RECORD, learning_rate, seed_of, train, update
from fourdh_batch.training.real_poses import StoredPoses

pytest.importorskip("tensorboard", reason="training logs need the extra 'train'")

LOOP = LoopConfig(
    steps=6,
    batch_size=2,
    learning_rate=1e-3,
    seed=5,
    cpu_threads=1,
    device="cpu",
    log_every=1,
    evaluate_every=3,
    checkpoint_every=2,
)
LOSS = LossConfig()


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(autouse=True)
def _logs_of_a_second_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads logs by name: of one process and second the tenth before the ninth."""
    from tensorboard.summary.writer import event_file_writer as writer

    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(100))


class Noise:
    """Numbered people whose picture tells nothing."""

    def person(self, number: int) -> Person:
        random = np.random.default_rng(number)
        keypoints = np.ones((44, 4), dtype=np.float32)
        keypoints[:, :3] = random.standard_normal((44, 3))
        return Person(
            image=random.integers(0, 256, (32, 32, 3), dtype=np.uint8),
            box_center_px=np.array([16, 16], dtype=np.float32),
            box_size_px=32.0,
            longer_side_px=32.0,
            keypoints_2d=np.column_stack((16 + 4 * keypoints[:, :2], keypoints[:, 3])),
            keypoints_3d=keypoints,
            global_orient=np.eye(3, dtype=np.float32)[None],
            body_pose=np.repeat(np.eye(3, dtype=np.float32)[None], 23, axis=0),
            betas=random.standard_normal(10).astype(np.float32),
            has_pose=float(number % 2),
            has_betas=1.0,
        )


class Task(HmrTask):
    """Remembers its losses, and dies when told."""

    die_at = 0
    fails_to_evaluate = False
    finds_nobody = False
    num_evaluations = 0

    def evaluate(self, batches: Iterable[HmrBatch]) -> dict[str, float]:
        self.num_evaluations += 1
        if self.finds_nobody:
            return {"precision": math.nan, "recall": 0.0}
        if self.fails_to_evaluate:
            raise TrainingError("nobody is held out")
        return super().evaluate(batches)

    def step(self, batch: HmrBatch) -> dict[str, Tensor]:
        self.losses: list[float] = getattr(self, "losses", [])
        if self.die_at and len(self.losses) == self.die_at:
            raise KeyboardInterrupt
        figures = super().step(batch)
        self.losses.append(float(figures["loss"]))
        return figures


def make_task(
    body: SmplBody, loop: LoopConfig = LOOP, loss: LossConfig = LOSS, *, adversarial: bool = True
) -> Task:
    real = StoredPoses(
        np.repeat(np.eye(3, dtype=np.float32)[None], 5 * 23, axis=0).reshape(5, 23, 3, 3),
        np.zeros((5, 10), dtype=np.float32),
        seed=1,
    )
    return Task(
        untrained_hmr2("tiny", body, loop.seed, device="cpu"),
        loop=loop,
        loss=loss,
        examples=MixedExamples([Noise()], [1], seed=loop.seed, augment=AugmentConfig()),
        held_out={"noise": MixedExamples([Noise()], [1], seed=loop.seed, augment=None)},
        num_held_out=3,
        real=real if adversarial else None,
        drop_path=0.3,
    )


def settings(loop: LoopConfig) -> dict[str, Any]:
    return {"size": "tiny", "loop": asdict(loop)}


def run(task: Task, output: Path, loop: LoopConfig = LOOP) -> dict[str, float]:
    return train(task, loop, str(output), settings(loop))


def curve(output: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "logs"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_a_killed_training_goes_on_with_the_same_curve(body: SmplBody, tmp_path: Path) -> None:
    whole = make_task(body)
    figures = run(whole, tmp_path / "whole")
    killed = make_task(body)
    killed.die_at = 5
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path / "killed")
    assert latest_checkpoint(Store(str(tmp_path / "killed")))[0] == 4  # type: ignore[index]
    resumed = make_task(body)
    again = run(resumed, tmp_path / "killed")
    assert killed.losses == whole.losses[:5]
    assert resumed.losses == whole.losses[4:]  # to the last bit
    assert again == figures
    records = [json.loads((tmp_path / n / RECORD).read_text()) for n in ("whole", "killed")]
    assert records[0]["digest"] == records[1]["digest"]
    for name in ("train/loss", "train/loss_discriminator", "held_out/pa_mpjpe_mm"):
        assert curve(tmp_path / "killed", name) == curve(tmp_path / "whole", name)
    assert list(curve(tmp_path / "whole", "train/loss")) == [1, 2, 3, 4, 5, 6]
    assert len(list((tmp_path / "whole" / "checkpoints").glob("step-*"))) == 2


def test_entries_of_the_curve_are_means_of_the_same_steps_after_a_kill(
    body: SmplBody, tmp_path: Path
) -> None:
    loop = replace(LOOP, log_every=3)  # checkpoints after 2, 4 and 6 steps
    run(make_task(body, loop), tmp_path / "whole", loop)
    killed = make_task(body, loop)
    killed.die_at = 5
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path / "killed", loop)
    run(make_task(body, loop), tmp_path / "killed", loop)
    whole = curve(tmp_path / "whole", "train/loss")
    assert list(whole) == [3, 6]
    assert curve(tmp_path / "killed", "train/loss") == whole


def test_the_result_is_what_the_main_job_reads(body: SmplBody, tmp_path: Path) -> None:
    task = make_task(body)
    run(task, tmp_path)
    model = load_hmr2(tmp_path / "hmr2.safetensors", body, device="cpu")
    assert (model.size_name, model.weights_origin) == ("tiny", "trained")
    first = untrained_hmr2("tiny", body, LOOP.seed, device="cpu")
    changed = {
        name
        for name, tensor in model.backbone.state_dict().items()
        if not torch.equal(tensor, first.backbone.state_dict()[name])
    }
    assert changed == set(first.backbone.state_dict())
    checkpoint = tmp_path / "checkpoints" / "step-00000006" / "weights.safetensors"
    assert load_hmr2(checkpoint, body, device="cpu").weights_digest == model.weights_digest


def test_losses_fall_on_few_people(body: SmplBody, tmp_path: Path) -> None:
    loop = replace(LOOP, steps=30, evaluate_every=100, checkpoint_every=100, clip_norm=1.0)
    task = make_task(body, loop)

    class Few:
        def __getitem__(self, number: int) -> Any:
            return MixedExamples([Noise()], [1], seed=0, augment=None)[number % 2]

    task.examples._examples = Few()  # type: ignore[attr-defined]
    run(task, tmp_path, loop)
    assert np.mean(task.losses[-3:]) < 0.85 * np.mean(task.losses[:3])


def test_bf16_stays_near_fp32(body: SmplBody, tmp_path: Path) -> None:
    loop = replace(LOOP, steps=2)
    exact, rough = make_task(body), make_task(body, replace(loop, precision="bf16"))
    run(exact, tmp_path / "exact", loop)
    run(rough, tmp_path / "rough", replace(loop, precision="bf16"))
    assert rough.losses != exact.losses
    np.testing.assert_allclose(rough.losses, exact.losses, rtol=0.02)


def test_without_adversarial_loss_there_is_no_discriminator(body: SmplBody, tmp_path: Path) -> None:
    task = make_task(body, adversarial=False)
    assert set(task.modules) == {"backbone", "smpl_head"}
    run(task, tmp_path, replace(LOOP, steps=2))


@pytest.mark.parametrize("name", ["", *asdict(LOSS)])
def test_every_loss_that_has_a_weight_moves_the_network(body: SmplBody, name: str) -> None:
    weights = {other: float(other == name) for other in asdict(LOSS)}
    task = make_task(body, loss=LossConfig(**weights))
    batch = task.collate([task.examples[number] for number in range(2)])
    assert (float(task.step(batch)["gradient_norm"]) > 0) == bool(name)


def test_other_settings_on_the_same_output_are_refused(body: SmplBody, tmp_path: Path) -> None:
    run(make_task(body), tmp_path, replace(LOOP, steps=2))
    other = replace(LOOP, learning_rate=5e-4)
    with pytest.raises(ConfigError, match=r"loop\.learning_rate: 0\.001 before, 0\.0005 now"):
        run(make_task(body, other), tmp_path, other)
    with pytest.raises(ConfigError, match="2 steps are done"):
        run(make_task(body), tmp_path, replace(LOOP, steps=1))
    longer = make_task(body)
    run(longer, tmp_path, replace(LOOP, steps=3, log_every=7))
    assert len(longer.losses) == 1


def test_a_damaged_checkpoint_stops_the_training(body: SmplBody, tmp_path: Path) -> None:
    run(make_task(body), tmp_path, replace(LOOP, steps=2))
    moments = tmp_path / "checkpoints" / "step-00000002" / "optimizers.pt"
    moments.write_bytes(moments.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"optimizers\.pt"):
        run(make_task(body), tmp_path)
    (tmp_path / LATEST).write_text("{")
    with pytest.raises(CheckpointError, match="damaged record"):
        run(make_task(body), tmp_path)


def test_figures_of_nobody_are_null_in_the_record(body: SmplBody, tmp_path: Path) -> None:
    task = make_task(body)
    task.finds_nobody = True
    num_threads = torch.get_num_threads()
    run(task, tmp_path, replace(LOOP, steps=1, cpu_threads=num_threads + 1))
    record = (tmp_path / RECORD).read_text()
    assert json.loads(record)["held_out"] == {"precision": None, "recall": 0}
    assert "NaN" not in record
    assert torch.get_num_threads() == num_threads  # only the training had others


@pytest.mark.parametrize("evaluate_every", [2, 100])
def test_an_evaluation_that_fails_loses_no_steps(
    evaluate_every: int, body: SmplBody, tmp_path: Path
) -> None:
    loop = replace(LOOP, steps=2, evaluate_every=evaluate_every)
    task = make_task(body)
    task.fails_to_evaluate = True
    with pytest.raises(TrainingError, match="nobody is held out"):
        run(task, tmp_path, loop)
    again = make_task(body)
    figures = run(again, tmp_path, loop)  # of the last step, which was not evaluated
    assert not hasattr(again, "losses")
    assert json.loads((tmp_path / RECORD).read_text())["held_out"] == figures
    assert set(curve(tmp_path, "held_out/pa_mpjpe_mm")) == {2}


@pytest.mark.parametrize("is_local", [True, False])
def test_an_interrupted_evaluation_leaves_no_hole_in_the_curve(
    is_local: bool, body: SmplBody, tmp_path: Path
) -> None:
    loop = replace(LOOP, steps=4, evaluate_every=2)
    output = str(tmp_path / "killed") if is_local else f"memory://{tmp_path.name}"
    run(make_task(body), tmp_path / "whole", loop)
    killed = make_task(body)
    killed.fails_to_evaluate = True
    with pytest.raises(TrainingError, match="nobody is held out"):
        train(killed, loop, output, settings(loop))
    resumed = make_task(body)
    train(resumed, loop, output, settings(loop))
    assert len(resumed.losses) == 2
    if not is_local:  # what was written is read where it lies
        for key, _ in Store(output).list("logs"):
            (tmp_path / "killed" / key).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "killed" / key).write_bytes(Store(output).read_bytes(key))
    for name in ("train/loss", "held_out/pa_mpjpe_mm"):
        assert curve(tmp_path / "killed", name) == curve(tmp_path / "whole", name)
    again = make_task(body)
    again.fails_to_evaluate = True  # of a finished training: it is evaluated all the same
    with pytest.raises(TrainingError):
        train(again, loop, output, settings(loop))


@pytest.mark.parametrize("is_old", [True, False])
def test_an_evaluation_that_was_written_is_not_made_again(
    is_old: bool, body: SmplBody, tmp_path: Path
) -> None:
    loop = replace(LOOP, steps=4, evaluate_every=2)
    killed = make_task(body)
    killed.die_at = 2
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path, loop)
    if is_old:  # a record of before evaluations were noted in it
        record = json.loads((tmp_path / LATEST).read_text())
        del record["is_evaluated"]
        (tmp_path / LATEST).write_text(json.dumps(record))
    resumed = make_task(body)
    run(resumed, tmp_path, loop)
    assert (killed.num_evaluations, resumed.num_evaluations) == (1, 1)  # after 2 and 4 steps


@pytest.mark.parametrize("keep", [1, 2, 4, 5])
def test_the_newest_checkpoints_are_kept(keep: int, tmp_path: Path) -> None:
    module = torch.nn.Linear(1, 1)
    for step in range(1, 9):
        save_checkpoint(
            Store(str(tmp_path)),
            step,
            modules={"module": module},
            optimizers={"module": torch.optim.AdamW(module.parameters())},
            settings={},
            metadata={},
            keep=keep,
        )
        kept = sorted(path.name for path in (tmp_path / FOLDER).glob("step-*"))
        assert kept == [f"step-{n:08d}" for n in range(max(step - keep, 0) + 1, step + 1)]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    body: SmplBody, tmp_path: Path
) -> None:
    task = make_task(body)
    with torch.no_grad():
        task._model.smpl_head.decpose.bias[0] = math.nan
    before = task._model.backbone.pos_embed.clone()
    with pytest.raises(TrainingError, match="step 1: expected a finite loss, got nan"):
        run(task, tmp_path)
    assert torch.equal(task._model.backbone.pos_embed, before)


def test_a_gradient_that_is_not_finite_changes_no_weights() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.0, 2.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    for clip_norm in (0.0, 1.0):
        loss = weight.sqrt().sum()  # finite; infinitely steep at 0
        with pytest.raises(TrainingError, match="expected a gradient of finite norm, got inf"):
            update(optimizer, loss, [weight], clip_norm)
        assert weight.tolist() == [0, 2]
    assert not optimizer.state


@pytest.mark.parametrize(("clip_norm", "step"), [(0.0, 10.0), (2.0, 2.0), (20.0, 10.0)])
def test_a_long_gradient_is_shortened(clip_norm: float, step: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    loss = (weight * torch.tensor([6.0, 8.0])).sum()
    norm = update(torch.optim.SGD([weight], lr=1.0), loss, [weight], clip_norm)
    assert float(norm) == pytest.approx(10)  # before
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]) * step)


def test_the_learning_rate_rises_and_falls() -> None:
    loop = replace(LOOP, steps=110, learning_rate=2.0, warmup_steps=10)
    assert learning_rate(loop, 0) == pytest.approx(0.2)
    assert learning_rate(loop, 9) == learning_rate(loop, 109) == 2
    falling = replace(loop, decay="cosine")
    assert learning_rate(falling, 10) == 2
    assert learning_rate(falling, 60) == pytest.approx(1)
    assert learning_rate(falling, 109) == pytest.approx(0, abs=1e-3)


def test_seeds_of_neighbours_differ() -> None:
    seeds = {seed_of(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64


def test_pck_of_crops_is_relative_to_the_person(body: SmplBody) -> None:
    task = make_task(body)
    batch = task.collate([task.held_out["noise"][n] for n in range(2)])
    known = torch.ones(2, 44, 1)
    people = batch.people._replace(
        relative_size=torch.full((2,), 2.0),  # half as large as the crop
        keypoints_2d=torch.cat([torch.zeros(2, 44, 2), known], dim=2),
    )

    class Off(torch.nn.Module):
        def forward(self, crops: Any) -> Any:
            off = torch.tensor([0.04, 0.0]).expand(2, 44, 2)
            return SimpleNamespace(keypoints_2d=off, keypoints_3d=people.keypoints_3d[..., :3]), 0

    model = untrained_hmr2("tiny", body, 0, device="cpu")
    figures = evaluate_hmr2(Off(), model, [batch._replace(people=people)])
    assert (figures["pck_0.05"], figures["pck_0.1"]) == (0, 1)  # 0.08 of the person


def test_the_bar_is_the_mean_body_of_those_whose_parameters_are_known(body: SmplBody) -> None:
    task = make_task(body)
    batch = task.collate([task.held_out["noise"][n] for n in range(3)])
    bend = torch.tensor([[1, 0, 0], [0, 0, -1], [0, 1, 0]]).float()  # a right angle about x
    pose = torch.eye(3).repeat(3, 23, 1, 1)
    pose[0, 3], pose[1, 3], pose[2, 4] = bend, bend.T, bend  # two bend a knee either way
    betas = torch.zeros(3, 10)
    betas[0, 0], betas[1, 0], betas[2, 0] = 1.0, 3.0, 50.0
    keypoints_3d = batch.people.keypoints_3d.clone()
    keypoints_3d[2, 25, 3] = 0  # an ankle is not known: no error in space
    people = batch.people._replace(
        keypoints_3d=keypoints_3d,
        body_pose=pose,
        betas=betas,
        has_pose=torch.tensor([1.0, 1.0, 0.0]),
    )
    model = untrained_hmr2("tiny", body, 0, device="cpu")

    class Still(torch.nn.Module):
        def forward(self, crops: Any) -> Any:
            larger = torch.cat((2 * keypoints_3d[:2, :, :3], torch.zeros(1, 44, 3)))
            return SimpleNamespace(keypoints_2d=torch.zeros(3, 44, 2), keypoints_3d=larger), 0

    figures = evaluate_hmr2(Still(), model, [batch._replace(people=people)])
    straight = torch.eye(3).expand(1, 23, 3, 3)
    mean = body.keypoints_3d(torch.eye(3)[None, None], straight, torch.tensor([[2.0] + 9 * [0]]))
    truth = keypoints_3d[:2, :, :3].numpy()
    expected = pa_mpjpe_mm(np.repeat(mean.numpy(), 2, axis=0), truth).mean()
    assert figures["pa_mpjpe_mm_of_mean_body"] == pytest.approx(expected, rel=1e-4)
    assert figures["pa_mpjpe_mm"] == pytest.approx(0, abs=1e-2)


def test_every_example_has_two_real_bodies_of_its_own(body: SmplBody) -> None:
    betas = np.arange(80, dtype=np.float32).reshape(8, 10)
    poses = np.zeros((8, 23, 3, 3), np.float32)
    task = Task(
        untrained_hmr2("tiny", body, 0, device="cpu"),
        loop=LOOP,
        loss=LOSS,
        examples=MixedExamples([Noise()], [1], seed=0, augment=None),
        held_out={},
        num_held_out=1,
        real=StoredPoses(poses, betas, seed=1),
    )
    seen = [float(real[0]) for n in range(4) for _, real in task.examples[n][1]]
    assert sorted(seen) == betas[:, 0].tolist()

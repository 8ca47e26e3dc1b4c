"""What is trained on tables: people with frames of their videos, tracks for the pose predictor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourdh_batch.config import (
    LoopConfig,
    SourceConfig,
    TrainHmrConfig,
    TrainPredictorConfig,
    load_config,
    to_dict,
)
from fourdh_batch.errors import CheckpointError, ConfigError, TrainingError
from fourdh_batch.models.build_phalp import load_pose_predictor, untrained_pose_predictor
from fourdh_batch.models.predictor import NUM_POSE_VECTOR, PredictorSize
from fourdh_batch.storage import Store
from fourdh_batch.tables.reader import read_tracks
from fourdh_batch.training.checkpoint import load_checkpoint, save_checkpoint
from fourdh_batch.training.loop import train
from fourdh_batch.training.predictor import PredictorTask, _simple, build_predictor_task
from fourdh_batch.training.real_poses import load_real_poses
from fourdh_batch.training.sources import (
    paths_in_both,
    warn_of_shared_people,
    warn_of_shared_recordings,
)
from fourdh_batch.training.table_people import TablePeople
from fourdh_batch.training.tracks import (
    HISTORY,
    MIN_AROUND_GAP,
    TEST_GAPS,
    GapTracks,
    ListedTracks,
    MaskedTracks,
    TrackPoses,
    collate_tracks,
    is_held_out,
    read_track_poses,
)
from tests.training_tables import BOX, HEIGHT, WIDTH, publish_turning_people

LENGTH = 50


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    publish_turning_people(folder, folder / "tables", {"a": 40, "e": 45})
    return str(folder / "tables")


class TestPeople:
    def test_a_person_has_the_picture_of_its_frame(self, root: str) -> None:
        source = TablePeople(root, seed=0)
        people = [source.person(n) for n in range(40)]
        for person in people:
            assert person.image.shape == (HEIGHT, WIDTH, 3)
            assert person.box_center_px.tolist() == [20, 24]
            assert person.longer_side_px == BOX[3] - BOX[1]
            assert (person.has_pose, person.has_betas) == (1, 1)
            # The picture tells the frame, and so does the bend of the hip.
            frame = (float(person.image.mean()) - 20) / 3
            told = [0.5 * np.sin(0.1 * frame + video) for video in (0, 1)]
            bend = np.arctan2(person.body_pose[3, 2, 1], person.body_pose[3, 1, 1])
            assert min(abs(bend - t) for t in told) < 0.03
        again = TablePeople(root, seed=0).person(33)
        np.testing.assert_array_equal(again.image, people[33].image)
        np.testing.assert_array_equal(again.body_pose, people[33].body_pose)

    def test_a_video_that_is_gone_is_passed_over(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        publish_turning_people(tmp_path, tmp_path / "tables", {"a": 20, "b": 20})
        (tmp_path / "a.mp4").unlink()
        source = TablePeople(str(tmp_path / "tables"), seed=0)
        assert source.person(0).image.shape == (HEIGHT, WIDTH, 3)
        (tmp_path / "b.mp4").unlink()
        with pytest.raises(TrainingError, match="cannot be read"):
            TablePeople(str(tmp_path / "tables"), seed=0).person(0)
        assert "a.mp4" in caplog.text

    def test_rows_of_another_body_are_warned_of(
        self, root: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        made_with = set(read_tracks(root)["body_model"])
        assert len(made_with) == 1
        TablePeople(root, seed=0, body_model=made_with.pop())
        assert not caplog.text
        TablePeople(root, seed=0, body_model="open:1")
        assert "trained with open:1, of which the same betas are another shape" in caplog.text

    def test_rows_serve_as_real_poses(self, root: str) -> None:
        pose, betas = load_real_poses(root, seed=0)[0]
        np.testing.assert_allclose(pose[0], np.eye(3), atol=1e-6)
        assert not betas.any()

    def test_an_array_under_the_name_of_an_npz_is_refused(self, tmp_path: Path) -> None:
        with (tmp_path / "a.npz").open("wb") as file:
            np.save(file, np.zeros((3, 72)))
        with pytest.raises(CheckpointError, match=r"a\.npz: expected 'body_pose'.*a single array"):
            load_real_poses(str(tmp_path / "a.npz"), seed=0)


def part_of(track: TrackPoses, rows: Any) -> TrackPoses:
    columns = (track.frame_index, track.pose, track.shown)
    return TrackPoses(track.video, *(column[rows] for column in columns))


class TestTracks:
    def test_every_track_of_every_shot(self, root: str) -> None:
        tracks = read_track_poses(root, min_rows=2)
        assert [(t.video, len(t.pose)) for t in tracks] == [
            *((("ava", "a"), 40), (("ava", "a"), 40)),
            *((("ava", "e"), 45), (("ava", "e"), 45)),
        ]
        assert [is_held_out(t.video) for t in tracks] == [False, False, True, True]
        np.testing.assert_array_equal(tracks[0].frame_index, np.arange(40))
        assert tracks[0].pose.shape == (40, NUM_POSE_VECTOR)
        with pytest.raises(TrainingError, match="tracks of 100 rows"):
            read_track_poses(root, min_rows=100)

    def test_what_is_asked_for_is_not_shown(self, root: str) -> None:
        tracks = read_track_poses(root, min_rows=2)
        masked = MaskedTracks(
            [ListedTracks(tracks)],
            [1],
            frame_length=LENGTH,
            mask_share=0.4,
            stretch_share=0.5,
            seed=3,
        )
        examples = [masked[n] for n in range(200)]
        for example in examples:
            assert not (example.is_seen & example.is_wanted).any()
            assert example.is_seen.any()
            assert example.is_wanted.any()
            shown = example.is_seen | example.is_wanted
            assert (np.abs(example.pose[shown]).sum(axis=1) > 0).all()
        few = [e for e in examples if e.is_seen.sum() <= HISTORY]
        assert 0.1 < len(few) / 200 < 0.5  # the tracker's question: a quarter
        np.testing.assert_array_equal(masked[17].is_seen, examples[17].is_seen)

    def test_gaps_of_evaluation_have_seen_poses_around_them(self, root: str) -> None:
        gaps = GapTracks(read_track_poses(root, min_rows=2), frame_length=LENGTH, seed=0)
        for n in range(40):
            example = gaps[n]
            wanted = np.flatnonzero(example.is_wanted)
            assert int(example.gap) == (0, *TEST_GAPS)[n % 4]
            assert len(wanted) == max(int(example.gap), 1)
            assert example.is_seen[wanted[0] - 1]
            if example.gap:
                assert example.is_seen[wanted[-1] + 1]
            else:
                assert example.is_seen.sum() == HISTORY
                assert not example.is_seen[wanted[0] :].any()

    def test_gaps_need_rows_enough_among_the_slots(self, root: str) -> None:
        whole = read_track_poses(root, min_rows=2)[0]
        needed = max(TEST_GAPS) + 2 * MIN_AROUND_GAP
        short = part_of(whole, np.arange(needed - 1))
        with pytest.raises(TrainingError, match=r"24 rows within 50 frames.*the longest has 23"):
            GapTracks([short, short], frame_length=LENGTH, seed=0)
        sparse = replace(whole, frame_index=2 * whole.frame_index)
        with pytest.raises(TrainingError, match=r"24 rows within 40 frames.*the longest has 20"):
            GapTracks([sparse], frame_length=40, seed=0)
        late = replace(whole, frame_index=np.r_[0:12, 40 + 2 * np.arange(28)])
        gaps = GapTracks([short, late], frame_length=LENGTH, seed=0)
        for n in range(200):
            assert gaps[n].is_wanted.sum() == max(int(gaps[n].gap), 1)
            assert gaps[n].is_seen.sum() >= (2 * MIN_AROUND_GAP if gaps[n].gap else HISTORY)

    def test_interpolation_follows_a_steady_turn(self, root: str) -> None:
        example = GapTracks(read_track_poses(root, min_rows=2), frame_length=LENGTH, seed=0)[2]
        hold, slerp = _simple(example.pose, example.is_seen, example.is_wanted)
        truth = example.pose[example.is_wanted]
        np.testing.assert_allclose(slerp[:, :9], truth[:, :9], rtol=0, atol=1e-5)
        last = example.pose[np.flatnonzero(example.is_wanted)[0] - 1]
        np.testing.assert_array_equal(hold, np.broadcast_to(last, hold.shape))
        assert np.abs(hold[:, :9] - truth[:, :9]).max() > 0.1


def test_training_form_of_the_network_equals_the_fast_one() -> None:
    size = PredictorSize(dim=24, depth=2, num_heads=3, head_dim=16, mlp_dim=40, frame_length=20)
    network = untrained_pose_predictor(3, size=size).network
    random = torch.Generator().manual_seed(0)
    is_seen = torch.rand(3, 20, generator=random) < 0.4
    pose = torch.randn(3, 20, NUM_POSE_VECTOR, generator=random)
    with torch.no_grad():
        dense = network(pose, is_seen)
    for track in range(3):
        slot = is_seen[track].nonzero().T
        fast = network.tokens(
            pose[track][slot],
            slot,
            torch.zeros_like(slot, dtype=torch.bool),
            torch.arange(20)[None],
        )
        torch.testing.assert_close(fast[0], dense[track], rtol=0, atol=2e-5)


class TestTask:
    CONFIG = TrainPredictorConfig(
        dim=16,
        depth=1,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        smpl_dim=64,
        frame_length=LENGTH,
        held_out_examples=8,
        single_pose_steps=20,
        loop=LoopConfig(
            steps=4,
            batch_size=4,
            learning_rate=3e-3,
            device="cpu",
            cpu_threads=1,
            checkpoint_every=2,
            evaluate_every=100,
            log_every=1,
        ),
    )

    def make(self, root: str, **loop: Any) -> tuple[TrainPredictorConfig, PredictorTask]:
        both = [SourceConfig(kind="tables", path=root)]
        config = replace(
            self.CONFIG, sources=both, held_out=both, loop=replace(self.CONFIG.loop, **loop)
        )
        return config, build_predictor_task(config, "cpu")

    def test_resumes_exactly_and_writes_what_the_tracker_reads(
        self, root: str, tmp_path: Path
    ) -> None:
        pytest.importorskip("tensorboard", reason="training logs need the extra 'train'")
        config, task = self.make(root)
        figures = train(task, config.loop, str(tmp_path / "whole"), to_dict(config))
        half, first = self.make(root, steps=2)
        train(first, half.loop, str(tmp_path / "halves"), to_dict(half))
        config, second = self.make(root)
        assert train(second, config.loop, str(tmp_path / "halves"), to_dict(config)) == figures
        names = {f"gap_{gap}_mpjpe_mm{how}" for gap in TEST_GAPS for how in ("", "_hold", "_slerp")}
        assert set(figures) == names | {"next_mpjpe_mm", "next_mpjpe_mm_hold"}
        files = [tmp_path / name / "pose_predictor.safetensors" for name in ("whole", "halves")]
        loaded = [load_pose_predictor(file) for file in files]
        assert loaded[0].weights_digest == loaded[1].weights_digest
        assert loaded[0].weights_origin == "trained"
        batch = collate_tracks([task.held_out["tables"][n] for n in range(4)])
        seen = np.flatnonzero(batch.is_seen[1].numpy())
        told = loaded[0].complete(
            batch.pose[1].numpy(), batch.is_seen[1].numpy(), np.flatnonzero(batch.is_wanted[1])
        )
        assert len(told) == int(batch.gap[1])
        assert np.isfinite(told).all()
        assert len(seen) > HISTORY

    def test_sees_what_is_shown_and_has_to_tell_the_truth(self, root: str) -> None:
        _, task = self.make(root)
        examples = [task.held_out["tables"][n] for n in range(8)]
        batch = task.collate(examples)
        wrong = batch.shown.roll(3, dims=2)  # rotations no more; what is shown of hidden poses
        hidden = torch.where(batch.is_wanted[..., None], wrong, batch.shown)
        # Hidden ones are not looked at, neither as an input nor as the truth.
        with torch.inference_mode():
            figures = task.evaluate([batch])
            assert task.evaluate([batch._replace(shown=hidden)]) == figures
        loss = task.step(batch)["loss"]
        _, again = self.make(root)
        assert again.step(batch._replace(shown=hidden))["loss"] == loss
        # Of the seen ones what is shown counts, and nothing else.
        elsewhere = torch.where(batch.is_wanted[..., None], batch.pose, 0.5 * batch.pose)
        with torch.inference_mode():
            assert again.evaluate([batch._replace(pose=elsewhere)]) == again.evaluate([batch])

    def test_of_a_steady_turn_slerp_tells_most_and_the_last_pose_the_less_the_longer(
        self, root: str
    ) -> None:
        _, task = self.make(root)
        with torch.inference_mode():
            figures = task.evaluate([task.collate([task.held_out["tables"][n] for n in range(40)])])
        hold = [figures[f"gap_{gap}_mpjpe_mm_hold"] for gap in TEST_GAPS]
        assert 1 < figures["next_mpjpe_mm_hold"] < hold[0] < hold[1] < hold[2]
        slerp = [figures[f"gap_{gap}_mpjpe_mm_slerp"] for gap in TEST_GAPS]
        assert max(slerp) < 10, (hold, slerp)
        assert hold[0] > 20, (hold, slerp)

    def test_learns_to_tell_hidden_poses(self, root: str) -> None:
        config, task = self.make(root, steps=32)
        losses = []
        for step in range(config.loop.steps):
            batch = task.collate([task.examples[4 * (step % 4) + n] for n in range(4)])
            losses.append(float(task.step(batch)["loss"]))
        assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])

    @pytest.mark.parametrize(("videos", "message"), [("a", "of 1 .*none"), ("e", "every one")])
    def test_both_parts_of_a_root_need_videos(
        self, tmp_path: Path, videos: str, message: str
    ) -> None:
        publish_turning_people(tmp_path, tmp_path / "tables", dict.fromkeys(videos, 30))
        both = [SourceConfig(kind="tables", path=str(tmp_path / "tables"))]
        config = replace(self.CONFIG, sources=both, held_out=both)
        with pytest.raises(TrainingError, match=message):
            build_predictor_task(config, "cpu")

    def test_a_root_is_one_however_it_is_spelled(
        self, root: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads: list[str] = []

        def read(root: str, *, min_rows: int) -> list[TrackPoses]:
            reads.append(root)
            return read_track_poses(root, min_rows=min_rows)

        monkeypatch.setattr("fourdh_batch.training.predictor.read_track_poses", read)
        monkeypatch.chdir(Path(root).parent)
        for path in (f"{root}/", "tables", "../" + "/".join(Path(root).parts[-2:])):
            config = replace(
                self.CONFIG,
                single_pose_steps=0,
                sources=[SourceConfig(kind="tables", path=root)],
                held_out=[SourceConfig(kind="tables", path=path)],
            )
            assert paths_in_both(config, "tables") == [root]
            reads.clear()
            task = build_predictor_task(config, "cpu")
            assert len(reads) == 1
            assert {len(t.pose) for t in task.held_out["tables"]._tracks} == {45}  # type: ignore[attr-defined]

    def test_a_training_that_goes_on_keeps_its_normalisation(
        self, root: str, tmp_path: Path
    ) -> None:
        _, task = self.make(root)
        _, later = self.make(root)
        before = {name: value.clone() for name, value in state(task).items()}
        store = Store(str(tmp_path))
        optimizers = task.optimizers
        save_checkpoint(
            *(store, 1),
            modules=task.modules,
            optimizers=optimizers,
            settings={},
            metadata={},
            keep=1,
        )
        for value in state(later).values():
            value.mul_(3)
        load_checkpoint(store, 1, modules=later.modules, optimizers=later.optimizers)
        later.save(tmp_path / "weights.safetensors")
        loaded = load_pose_predictor(tmp_path / "weights.safetensors")
        for name, value in state(later).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        torch.testing.assert_close(loaded.mean.cpu(), before["mean"], rtol=0, atol=0)

    def test_one_folder_of_motion_capture_for_both_is_warned_of(
        self, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        sources = [SourceConfig(path=str(tmp_path)), SourceConfig()]
        held_out = [SourceConfig(path=f"file://{tmp_path}/"), SourceConfig()]
        warn_of_shared_recordings(replace(self.CONFIG, sources=sources, held_out=held_out[1:]))
        assert caplog.messages == []
        warn_of_shared_recordings(replace(self.CONFIG, sources=sources, held_out=held_out))
        (message,) = caplog.messages
        assert message.startswith(f"{tmp_path}: in sources= and in held_out=")

    def test_a_folder_of_motion_capture_in_the_other_is_warned_of(
        self, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        inside, beside = SourceConfig(path=f"{tmp_path}/a/b"), SourceConfig(path=f"{tmp_path}/ab")
        around = SourceConfig(path=f"{tmp_path}/a")
        for own, other, is_warned in (
            *((inside, around, True), (around, inside, True)),
            *((around, beside, False), (beside, inside, False)),
        ):
            caplog.clear()
            warn_of_shared_recordings(replace(self.CONFIG, sources=[own], held_out=[other]))
            assert bool(caplog.messages) == is_warned, (own.path, other.path)

    def test_people_of_both_are_warned_of(
        self, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        tables = SourceConfig(kind="tables", path=str(tmp_path))
        tars = SourceConfig(kind="tars", path="/data/{000000..000012}.tar")
        warn_of_shared_people(TrainHmrConfig(sources=[tables], held_out=[tars, SourceConfig()]))
        assert caplog.messages == []
        both = [replace(tables, path=f"{tmp_path}/"), tars]
        warn_of_shared_people(TrainHmrConfig(sources=[tables, tars], held_out=both))
        (message,) = caplog.messages
        assert message.startswith(f"{tmp_path}, {tars.path}: in sources= and in held_out=")


def state(task: PredictorTask) -> dict[str, torch.Tensor]:
    return task.modules["normalisation"].state_dict()


def test_frame_lengths_that_cannot_be_evaluated_are_refused() -> None:
    least = max(TEST_GAPS) + 2 * MIN_AROUND_GAP
    stride = PredictorSize(dim=8, depth=1, num_heads=1, head_dim=8, mlp_dim=8).conv_stride
    assert (least, stride) == (24, 5)  # what config.py has
    assert load_config(None, ["frame_length=25"], TrainPredictorConfig).frame_length == 25
    for length in (20, 27):
        with pytest.raises(ConfigError, match="frame_length: expected a multiple of 5 above 24"):
            load_config(None, [f"frame_length={length}"], TrainPredictorConfig)

"""The texture encoder's outfits, and its training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourdh_batch.config import LoopConfig, TrainAppearanceConfig, to_dict
from fourdh_batch.errors import TrainingError
from fourdh_batch.models.appearance import load_texture_encoder, untrained_texture_encoder
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.models.texture import ATLAS_PX
from fourdh_batch.synthetic.looks import LookStudio
from fourdh_batch.training.appearance import (
    TYPICAL_DISTANCE,
    AppearanceTask,
    area_under_curve,
    build_appearance_task,
    distances,
)
from fourdh_batch.training.looks import AGAIN, FIRST, OTHER, OutfitLooks
from fourdh_batch.training.loop import train

SIDE = 64
VIEWS = 8


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(scope="module")
def looks(body: SmplBody) -> OutfitLooks:
    return OutfitLooks(body, seed=3, map_px=SIDE, num_views=VIEWS, filled_share=0.0)


class TestLooks:
    def test_texels_take_their_colour_from_about_their_own_point(
        self, body: SmplBody, looks: OutfitLooks
    ) -> None:
        studio, template = looks.studio, body.v_template
        own = torch.full((SIDE * SIDE, 3), torch.nan)
        own[studio.texel] = (template[studio._corner] * studio._weight[..., None]).sum(dim=1)
        off = []
        for view in studio.views:
            is_person = view.weight.sum(dim=1) > 0
            assert is_person.float().mean() > 0.4
            taken = (template[view.corner] * view.weight[..., None]).sum(dim=1)[is_person]
            off.append((taken - own[view.texel][is_person]).norm(dim=1))
            assert 0.05 < len(view.texel) / len(studio.texel) < 0.7
        # Metres: an estimate is a few degrees off in every joint on the way to a limb.
        assert 0.01 < float(torch.cat(off).median()) < 0.15

    def test_maps_are_cut_to_what_both_views_show(self, looks: OutfitLooks) -> None:
        for number in range(6):
            maps, whole = looks[number]
            assert maps.shape == (3, 4, SIDE, SIDE)
            assert whole.shape == (2, 3, SIDE, SIDE)
            mask = maps[:, 3]
            assert set(mask.unique().tolist()) == {0.0, 1.0}
            assert (mask == mask[0]).all()
            assert (maps[:, :3] * (1 - mask[:, None]) == 0).all()
            assert (whole[:, :, mask[0] > 0] != 0).any(dim=1).all()
            assert (maps[FIRST] != maps[AGAIN]).any()

    def test_looks_at_one_outfit_are_nearer_in_colour_than_at_two(self, looks: OutfitLooks) -> None:
        """In light, place and noise that differ, most of them, not all."""
        nearer = []
        for number in range(40):
            maps = looks[number].maps[:, :3]
            same, different = ((maps[AGAIN] - maps[i]).abs().mean() for i in (FIRST, OTHER))
            nearer.append(bool(same < different))
        assert np.mean(nearer) > 0.6

    def test_an_example_follows_from_its_number(self, body: SmplBody, looks: OutfitLooks) -> None:
        again = OutfitLooks(body, seed=3, map_px=SIDE, num_views=VIEWS, filled_share=0.0)
        assert torch.equal(again[5].maps, looks[5].maps)
        assert not torch.equal(looks[4].maps, looks[5].maps)

    def test_filled_maps_have_their_mean_colour_where_nothing_is_seen(self, body: SmplBody) -> None:
        filled = OutfitLooks(body, seed=3, map_px=SIDE, num_views=2, filled_share=1.0)[0].maps
        assert (filled[:, 3] == 1).all()
        corner = filled[:, :3, -1, -1]  # no texel of the body
        np.testing.assert_allclose(filled[:, :3].mean(dim=(2, 3)), corner, rtol=0, atol=1e-5)

    def test_the_side_divides_that_of_the_atlas(self, body: SmplBody) -> None:
        with pytest.raises(ValueError, match="divisor of 256, got 100"):
            LookStudio(body, seed=0, map_px=100, num_views=1)


def test_area_under_the_curve_counts_pairs_in_order() -> None:
    same, different = np.array([1.0, 2.0, 4.0]), np.array([3.0, 4.0])
    assert area_under_curve(same, different) == pytest.approx((2 + 2 + 0.5) / 6)


class TestTask:
    CONFIG = TrainAppearanceConfig(
        map_px=32,
        num_views=VIEWS,
        held_out_examples=8,
        loop=LoopConfig(
            steps=4,
            batch_size=4,
            learning_rate=1e-3,
            device="cpu",
            cpu_threads=1,
            checkpoint_every=2,
            evaluate_every=100,
            log_every=1,
        ),
    )

    def make(self, **loop: Any) -> tuple[TrainAppearanceConfig, AppearanceTask]:
        config = replace(self.CONFIG, loop=replace(self.CONFIG.loop, **loop))
        task = build_appearance_task(config, "cpu")
        task.num_calibration = 4
        return config, task

    @pytest.mark.slow  # three trainings with their calibrations; other networks do it in make test
    def test_resumes_exactly_and_writes_what_the_tracker_reads(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard", reason="training logs need the extra 'train'")
        config, task = self.make()
        figures = train(task, config.loop, str(tmp_path / "whole"), to_dict(config))
        half, first = self.make(steps=2)
        train(first, half.loop, str(tmp_path / "halves"), to_dict(half))
        _, second = self.make()
        assert train(second, config.loop, str(tmp_path / "halves"), to_dict(config)) == figures
        assert set(figures) == {
            *("map_error_levels", "map_error_levels_of_mean_map"),
            *("auc", "auc_untrained", "auc_of_colours"),
            *("same_over_different", "same_over_different_untrained"),
        }
        files = [tmp_path / name / "appearance.safetensors" for name in ("whole", "halves")]
        one, other = (load_texture_encoder(file) for file in files)
        assert one.weights_digest == other.weights_digest
        assert one.weights_origin == "trained"
        # At full size two outfits are as far apart as the cost expects.
        assert task.full_size[0].maps.shape[-1] == ATLAS_PX
        apart = np.median(distances(one, task.full_size, task.num_calibration)[1])
        assert apart == pytest.approx(TYPICAL_DISTANCE, rel=1e-4)

    def test_learns_to_tell_outfits_apart(self) -> None:
        _, task = self.make(steps=24)
        losses = []
        for step in range(24):
            batch = task.collate([task.examples[4 * (step % 4) + n] for n in range(4)])
            losses.append({k: float(v) for k, v in task.step(batch).items()})
        first, last = (
            {name: np.mean([loss[name] for loss in part]) for name in losses[0]}
            for part in (losses[:4], losses[-4:])
        )
        assert last["loss_agreement"] < 0.6 * first["loss_agreement"]
        assert last["loss_map"] < 0.98 * first["loss_map"]

    def test_an_encoder_that_sees_nothing_is_not_written(self, tmp_path: Path) -> None:
        _, task = self.make()
        with torch.no_grad():
            for parameter in task.modules["encoder"].parameters():
                parameter.zero_()
        with pytest.raises(TrainingError, match="look different"):
            task.save(tmp_path / "none.safetensors")


def test_pairs_of_half_size_are_ordered_as_those_of_full_size(body: SmplBody) -> None:
    """What training at half size relies on; with weights that learned nothing."""
    full = OutfitLooks(body, seed=3, map_px=256, num_views=4, filled_share=0.0)
    encoder, found = untrained_texture_encoder(0), []
    for number in range(6):
        maps = full[number].maps
        small = maps[:, :, ::2, ::2]
        for size in (maps, small):
            embedding = encoder.embed(size)
            off = (embedding[[FIRST, OTHER]] - embedding[AGAIN]).square().sum(dim=1)
            found.append(off.tolist())
    large, small_ = np.array(found[0::2]).ravel(), np.array(found[1::2]).ravel()
    order = np.corrcoef(np.argsort(np.argsort(large)), np.argsort(np.argsort(small_)))[0, 1]
    assert order > 0.9

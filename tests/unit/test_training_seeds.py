"""Nobody who is evaluated on is trained on: every source has a seed of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fourdh_batch.config import (
    LossConfig,
    SourceConfig,
    TrainAppearanceConfig,
    TrainDetectorConfig,
    TrainHmrConfig,
    TrainPredictorConfig,
)
from fourdh_batch.models.predictor import NUM_POSE_VECTOR
from fourdh_batch.training import appearance, build, detector, predictor
from fourdh_batch.training.tracks import TrackPoses

TWICE = [SourceConfig(), SourceConfig()]
TWO = [SourceConfig(name="one"), SourceConfig(name="other")]


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """The seeds that this class of the module is made with."""
    seeds: list[int] = []
    original = getattr(module, name)

    class Recorded(original):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            seeds.append(options["seed"])
            super().__init__(*args, **options)

    monkeypatch.setattr(module, name, Recorded)
    return seeds


def test_of_hmr2(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = recorded(monkeypatch, build, "SyntheticPeople")
    build.build_hmr_task(
        TrainHmrConfig(init="mini", sources=TWICE, held_out=TWO, loss=LossConfig(adversarial=0)),
        "cpu",
    )
    assert len(set(seeds[:2])) == 2
    assert len(seeds) == 4
    assert not set(seeds[:2]) & set(seeds[2:])  # these are two views of the same people


def test_of_the_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    pose = np.zeros((40, NUM_POSE_VECTOR), np.float32)
    still = [TrackPoses(("", "0"), np.arange(40), pose, pose)]
    monkeypatch.setattr(predictor.SyntheticTracks, "block", lambda self, number: still)
    seeds = recorded(monkeypatch, predictor, "SyntheticTracks")
    config = TrainPredictorConfig(
        dim=8, depth=1, sources=TWICE, held_out=TWO, single_pose_steps=0, frame_length=25
    )
    predictor.build_predictor_task(config, "cpu")
    assert len(seeds) == len(set(seeds)) == 4


def test_of_the_texture_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = recorded(monkeypatch, appearance, "OutfitLooks")
    appearance.build_appearance_task(TrainAppearanceConfig(map_px=16, num_views=2), "cpu")
    assert len(seeds) == len(set(seeds)) == 3


def test_of_the_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    seeds = recorded(monkeypatch, detector, "FrameExamples")
    detector.build_detector_task(TrainDetectorConfig(), "cpu")
    assert len(seeds) == len(set(seeds)) == 2

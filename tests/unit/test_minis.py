"""The small trained models of the package: there, whole, small, and described."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fourdh_batch.config import load_config
from fourdh_batch.errors import ConfigError
from fourdh_batch.models.appearance import load_texture_encoder
from fourdh_batch.models.build import load_hmr2, weights_origin
from fourdh_batch.models.build_phalp import load_pose_predictor
from fourdh_batch.models.minis import (
    DETECTOR,
    FOLDER,
    HMR2,
    MINI,
    MINI_SEGMENTER,
    PREDICTOR,
    SEGMENTER,
    TEXTURE,
    shipped,
)
from fourdh_batch.models.smpl import load_body
from fourdh_batch.models.weights import check_weights
from fourdh_batch.pipeline.engine import build_model, model_card

MAX_BYTES = 30_000_000


def detector_digest(word: str) -> str:
    pytest.importorskip("transformers")
    from fourdh_batch.models.detector_transformers import _load, _weights_digest

    return _weights_digest(_load(word)[0])


DIGESTS: dict[str, Callable[[], str]] = {
    HMR2: lambda: load_hmr2(MINI, load_body(), device="cpu").weights_digest,
    TEXTURE: lambda: load_texture_encoder(MINI).weights_digest,
    PREDICTOR: lambda: load_pose_predictor(MINI).weights_digest,
    DETECTOR: lambda: detector_digest(MINI),
    SEGMENTER: lambda: detector_digest(MINI_SEGMENTER),
}


@pytest.mark.parametrize("name", DIGESTS)
def test_the_word_mini_loads_what_the_card_describes(name: str) -> None:
    digest = DIGESTS[name]()
    _, _, card = (FOLDER / "CARDS.md").read_text().partition(f"`{name}`")
    assert digest in card.partition("\n## ")[0]


def test_they_are_trained_and_together_below_30_mb() -> None:
    assert weights_origin(MINI) == "trained"
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < MAX_BYTES


def test_any_other_word_is_a_path() -> None:
    assert str(shipped("mini.safetensors", HMR2)) == "mini.safetensors"


def test_their_parts_can_be_checked_by_name() -> None:
    assert "mini: HMR 2.0 size mini, trained weights" in check_weights(MINI, part="hmr2")
    assert "mini: texture encoder, trained weights" in check_weights(MINI, part="texture")
    assert "mini: pose predictor, " in check_weights(MINI, part="predictor")
    with pytest.raises(ConfigError, match=r"mini: expected one of the parts .*, got none"):
        check_weights(MINI)


def test_the_detector_is_of_one_kind_whatever_lies_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def card(*words: str) -> str:
        return model_card(load_config(None, ["hmr.weights=mini", *words])).detector

    monkeypatch.chdir(tmp_path)
    name = "detector.name=transformers"
    for word, folder in ((MINI, DETECTOR), (MINI_SEGMENTER, SEGMENTER)):
        (tmp_path / word).mkdir()
        (tmp_path / word / "config.json").write_text("{}")
        found = card(name, f"detector.path={word}")
        assert found == card(name, f"detector.path={FOLDER / folder}")
        assert found != card(name, f"detector.path=./{word}")
        with pytest.raises(
            ConfigError, match=rf"expected transformers with detector\.path={word},"
        ):
            card(f"detector.path={word}")


def test_another_body_than_they_know_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = tmp_path / "smpl.npz"
    with np.load(FOLDER.parent / "open_body.npz") as stored:
        np.savez(body, **{**stored, "body_name": "smpl"})
    minis = ["hmr.weights=mini", "hmr.device=cpu", "tracker.texture_weights=mini"]
    with caplog.at_level(logging.WARNING):
        build_model(load_config(None, minis))
        assert caplog.messages == []
        build_model(load_config(None, [*minis, f"hmr.body={body}"]))
        build_model(load_config(None, [*minis, "tracker.atlas=/atlas"]))
    assert [message.partition(":")[0] for message in caplog.messages] == [
        f"hmr.weights=mini with hmr.body={body}",
        f"tracker.texture_weights=mini with hmr.body={body}",
        "tracker.texture_weights=mini with tracker.atlas=/atlas",
    ]

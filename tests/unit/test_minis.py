"""The small trained models of the package: there, whole, small, and described."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fourdh_batch.models.appearance import load_texture_encoder
from fourdh_batch.models.build import load_hmr2, weights_origin
from fourdh_batch.models.minis import FOLDER, HMR2, MINI, TEXTURE, shipped
from fourdh_batch.models.smpl import load_body

MAX_BYTES = 30_000_000
DIGESTS: dict[str, Callable[[], str]] = {
    HMR2: lambda: load_hmr2(MINI, load_body(), device="cpu").weights_digest,
    TEXTURE: lambda: load_texture_encoder(MINI).weights_digest,
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

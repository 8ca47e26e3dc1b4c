"""The GPU benchmark runs from end to end where there is no GPU."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPO

SCRIPT = REPO / "tests" / "benchmark" / "gpu_hmr2.py"
SECTIONS = {
    "parity",
    "precision errors",
    "companion effects",
    "crops",
    "head",
    "model",
    "end to end",
    "backbone",
}
QUICK = ["--device", "cpu", "--size", "tiny", "--rounds", "1", "--seconds", "0", "--no-compile"]


def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds the recipe's folder
    file = tmp_path / "figures.json"
    assert runpy.run_path(str(SCRIPT))["main"]([*QUICK, *words, "--json", str(file)]) == 0
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def test_all_sections_give_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = benchmark(monkeypatch, tmp_path, "--batch-sizes", "1", "2")
    assert set(figures) >= SECTIONS
    assert "failed" not in json.dumps(figures)
    assert figures["parity"]["tokens"] < 3e-5
    assert figures["crops"]["equal_to_cpu"] is True
    assert figures["precision errors"]["fp32"]["max_mm"] == 0
    errors = [figures["precision errors"][p]["mean_mm"] for p in ("fp16", "bf16")]
    assert 0 < errors[0] < errors[1]
    for section in ("crops", "head", "model", "end to end", "backbone"):
        rates = [f["crops_per_s"] for f in figures[section].values() if isinstance(f, dict)]
        assert rates
        assert min(rates) > 0


def test_published_code_is_timed_beside_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A checkout of which only the backbone's file is needed; here it is ours under their names.
    file = tmp_path / "hmr2" / "models" / "backbones" / "vit.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from timm.models.layers import drop_path, to_2tuple, trunc_normal_\n"
        "from fourdh_batch.models.vit import ViT\n"
        "class Published(ViT):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).transpose(1, 2).unflatten(2, (16, 12))\n"
        "def vit(cfg):\n"
        "    return Published(depth=2, dim=64, num_heads=4)\n"
    )
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    figures = benchmark(
        monkeypatch,
        tmp_path,
        *("--batch-sizes", "2", "--only", "published", "--reference", str(tmp_path)),
    )
    published = figures["published"]
    assert published["max_difference_of_tokens"] == 0
    assert {"published 1", "ours 1", "published 2", "ours 2"} < set(published)

"""`fourdh weights` for all three parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from fourdh_batch.cli import app
from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.models.appearance import load_texture_encoder, untrained_texture_encoder
from fourdh_batch.models.build import untrained_hmr2, weights_origin
from fourdh_batch.models.build_phalp import load_pose_predictor, untrained_pose_predictor
from fourdh_batch.models.predictor import PredictorSize
from fourdh_batch.models.smpl import load_body
from fourdh_batch.models.weights import PARTS, check_weights, import_weights, part_of

runner = CliRunner()
SIZE = PredictorSize(dim=24, depth=1, num_heads=2, head_dim=8, mlp_dim=16, frame_length=10)


def write_hmr2(path: Path) -> None:
    state = untrained_hmr2("tiny", load_body(), device="cpu").state_dict()
    torch.save({"state_dict": {**state, "discriminator.x": torch.zeros(2)}, "epoch": 35}, path)


def write_texture(path: Path) -> None:
    state = untrained_texture_encoder().state_dict()
    torch.save({"model": {f"HMAR.encoding_head.{name}": t for name, t in state.items()}}, path)


def write_predictor(path: Path) -> None:
    state = untrained_pose_predictor(size=SIZE).network.state_dict()
    torch.save({"state_dict": {f"encoder.{name}": t for name, t in state.items()}}, path)
    transformer = {
        "depth": SIZE.depth,
        "heads": SIZE.num_heads,
        "dim_head": SIZE.head_dim,
        "mlp_dim": SIZE.mlp_dim,
        "conv": {"pad": SIZE.conv_pad, "stride": SIZE.conv_stride},
    }
    tree = {"configs": {"frame_length": 10, "mask_type_test": "zero", "transformer": transformer}}
    path.with_suffix(".yaml").write_text(yaml.safe_dump(tree))
    np.save(path.with_name("mean_std.npy"), np.ones((2, 1, 226)))


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "hmr2": ("epoch=35-step=1000000.ckpt", write_hmr2),
    "texture": ("hmar_v2_weights.pth", write_texture),
    "predictor": ("pose_predictor.pth", write_predictor),
}


def weights(*words: object) -> Any:
    return runner.invoke(app, ["weights", *map(str, words)])


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_told_by_its_content_imported_and_checked(tmp_path: Path, part: str) -> None:
    name, write = WRITERS[part]
    source, target = tmp_path / name, tmp_path / "ours.safetensors"
    write(source)
    made = weights("import", source, target)
    assert (made.exit_code, made.output) == (0, f"{target}: {part}\n")
    assert part_of(source) == part_of(target) == part
    before, after = weights("check", source), weights("check", target)
    assert (before.exit_code, after.exit_code) == (0, 0)
    assert "imported weights" in before.output
    assert "official weights" in after.output
    # The same tensors: one digest.
    assert before.output.split()[-1] == after.output.split()[-1]
    if part == "hmr2":
        assert weights_origin(target) == "official"
    elif part == "texture":
        assert load_texture_encoder(target).weights_origin == "official"
    else:
        assert load_pose_predictor(target).network.size == SIZE


def test_the_predictors_other_files_can_be_named(tmp_path: Path) -> None:
    write_predictor(tmp_path / "pose_predictor.pth")
    (tmp_path / "pose_predictor.yaml").rename(tmp_path / "a.yaml")
    (tmp_path / "mean_std.npy").rename(tmp_path / "b.npy")
    words = ("import", tmp_path / "pose_predictor.pth", tmp_path / "p.safetensors")
    result = weights(*words)
    assert result.exit_code == 1
    assert "pose_predictor.yaml: no such file" in result.output
    named = ("--yaml", tmp_path / "a.yaml", "--mean-std", tmp_path / "b.npy")
    assert weights(*words, *named).exit_code == 0
    assert load_pose_predictor(tmp_path / "p.safetensors").network.size == SIZE


def test_a_part_that_was_named_is_taken_at_its_word(tmp_path: Path) -> None:
    write_texture(tmp_path / "t.pth")
    result = weights("check", tmp_path / "t.pth", "--part", "hmr2")
    assert result.exit_code == 1
    assert "expected an entry 'state_dict', got ['model']" in result.output
    result = weights("check", tmp_path / "t.pth", "--part", "head")
    assert result.exit_code == 2
    assert "part: expected one of hmr2, texture, predictor, got 'head'" in result.output


def test_words_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_texture(tmp_path / "t.pth")
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        import_weights(tmp_path / "t.pth", tmp_path / "t.pt")
    with pytest.raises(ConfigError, match="only with a pose predictor, got part 'texture'"):
        import_weights(tmp_path / "t.pth", tmp_path / "t.safetensors", config="x.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.pth"]


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"optimizer": {}}, tmp_path / "o.pth")
    with pytest.raises(CheckpointError, match=r"o\.pth: expected an entry.*got \['optimizer'\]"):
        part_of(tmp_path / "o.pth")
    torch.save({"state_dict": {"layer.weight": torch.zeros(2)}}, tmp_path / "s.ckpt")
    with pytest.raises(CheckpointError, match=r"s\.ckpt: expected the \d+ tensors of HMR 2\.0"):
        check_weights(tmp_path / "s.ckpt")
    for name in ("absent.pth", "absent.safetensors"):
        result = weights("check", tmp_path / name)
        assert result.exit_code == 1
        assert f"{name}: no such file" in result.output

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import pytest
import safetensors.torch
import torch
from torch import Tensor

from fourdh_batch.errors import CheckpointError
from fourdh_batch.models.build import (
    HMR2_SIZES,
    PARTS,
    build_hmr2,
    check_checkpoint,
    convert_official_checkpoint,
    expected_shapes,
    load_hmr2,
    save_hmr2,
    untrained_hmr2,
    weights_origin,
)
from fourdh_batch.models.checkpoint import read_lightning_state_dict, tensors_digest
from fourdh_batch.models.hmr2 import Hmr2
from fourdh_batch.models.smpl import SmplBody, load_body


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(scope="module")
def model(body: SmplBody) -> Hmr2:
    return untrained_hmr2("tiny", body, device="cpu")


@pytest.fixture
def weights(model: Hmr2) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if name.startswith(PARTS)}


def training_config() -> omegaconf.DictConfig:
    return omegaconf.OmegaConf.create(
        {"MODEL": {"IMAGE_SIZE": 256, "BACKBONE": {"TYPE": "vit"}}, "LIST": [1, 2.5, "x", None]}
    )


def lightning_checkpoint(weights: dict[str, Tensor], **changed: Any) -> dict[str, Any]:
    """What the published trainer leaves, as far as its source tells."""
    extra = {
        "discriminator.D_conv1.weight": torch.zeros(32, 9, 1, 1),
        "smpl.faces_tensor": torch.zeros(3, dtype=torch.int64),
        "initialized": torch.tensor(True),
    }
    return {
        "epoch": 35,
        "global_step": 1_000_000,
        "pytorch-lightning_version": "1.8.1",
        "state_dict": weights | extra,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"dirpath": Path("x"), "best": None}},
        "hparams_name": "kwargs",
        "hyper_parameters": {"cfg": training_config(), "init_renderer": False},
        **changed,
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def _write(content: Any) -> Path:
        path = tmp_path / "model.ckpt"
        torch.save(content, path)
        return path

    return _write


class RunsCode:
    """Pickles as a call."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def test_published_checkpoint_with_its_configuration_is_read(
    write: Callable[[Any], Path], weights: dict[str, Tensor], body: SmplBody, model: Hmr2
) -> None:
    path = write(lightning_checkpoint(weights))
    loaded = load_hmr2(path, body, device="cpu")
    assert (loaded.size_name, loaded.weights_origin) == ("tiny", "imported")
    assert loaded.weights_digest == model.weights_digest
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


def test_reading_a_configuration_runs_none_of_its_code(
    write: Callable[[Any], Path], weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(lightning_checkpoint(weights, namespace=argparse.Namespace(a=1)))

    def must_not_run(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("code of the configuration library ran")

    for name in ("__init__", "__setstate__"):
        monkeypatch.setattr(omegaconf.DictConfig, name, must_not_run)
    assert set(weights) < set(read_lightning_state_dict(path))


@pytest.mark.parametrize(
    ("hostile", "name"),
    [
        (RunsCode(os.system, "touch {}"), "posix.system"),
        (RunsCode(eval, "__import__('os').mkdir('{}')"), "builtins.eval"),
        (RunsCode(os.mkdir, "{}"), "posix.mkdir"),
        (RunsCode(getattr, os, "x"), "builtins.getattr"),
    ],
    ids=["system", "eval", "mkdir", "getattr"],
)
def test_checkpoint_that_would_run_code_is_refused(
    tmp_path: Path,
    write: Callable[[Any], Path],
    weights: dict[str, Tensor],
    body: SmplBody,
    hostile: RunsCode,
    name: str,
) -> None:
    proof = tmp_path / "proof"
    hostile.arguments = tuple(
        a.format(proof) if isinstance(a, str) else "os" for a in hostile.arguments
    )
    path = write(lightning_checkpoint(weights, optimizer_states=[hostile]))
    with pytest.raises(CheckpointError, match=rf"reference to {name}; refused"):
        load_hmr2(path, body)
    with pytest.raises(CheckpointError, match="refused"):
        convert_official_checkpoint(path, tmp_path / "out.safetensors")
    assert not proof.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_every_misfit_is_listed_with_expected_and_got(
    write: Callable[[Any], Path], weights: dict[str, Tensor], body: SmplBody
) -> None:
    del weights["backbone.last_norm.bias"]
    weights["smpl_head.decpose.weight"] = torch.zeros(144, 95)
    weights["backbone.cls_token"] = torch.zeros(1)
    weights["smpl_head.init_cam"] = torch.zeros(1, 3, dtype=torch.int64)
    path = write(lightning_checkpoint(weights))
    with pytest.raises(CheckpointError) as caught:
        load_hmr2(path, body)
    message = str(caught.value)
    assert f"{path}: expected the 75 tensors of HMR 2.0 size 'tiny', got 75" in message
    assert "missing: backbone.last_norm.bias" in message
    assert "unexpected: backbone.cls_token" in message
    assert "smpl_head.decpose.weight (expected (144, 96), got (144, 95))" in message
    assert "smpl_head.init_cam (expected floating point, got torch.int64)" in message
    with pytest.raises(
        CheckpointError, match=r"of HMR 2.0 size 'mini', got 75; .* and 5?[0-9]+ more"
    ):
        load_hmr2(path, body, size="mini")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, r"expected an entry 'state_dict', got \['model'\]"),
        ([1, 2], "expected a dictionary, got list"),
        ({"state_dict": {"backbone.x": 3}}, "expected tensors, got 'backbone.x': int"),
    ],
)
def test_other_checkpoints_are_refused(
    write: Callable[[Any], Path], body: SmplBody, content: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_hmr2(write(content), body)


def test_missing_and_damaged_files_are_refused(
    tmp_path: Path, write: Callable[[Any], Path], weights: dict[str, Tensor], body: SmplBody
) -> None:
    for suffix in (".ckpt", ".safetensors"):
        missing = tmp_path / f"missing{suffix}"
        with pytest.raises(CheckpointError, match="no such file"):
            load_hmr2(missing, body)
        for content in (b"", b"not a checkpoint" * 100):
            missing.write_bytes(content)
            with pytest.raises(CheckpointError, match=f"missing{suffix}: expected"):
                load_hmr2(missing, body)
    path = write(lightning_checkpoint(weights))
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(CheckpointError, match=r"model.ckpt: expected a checkpoint"):
        load_hmr2(path, body)


def test_converted_checkpoint_is_the_same_model_and_says_where_it_came_from(
    tmp_path: Path, write: Callable[[Any], Path], weights: dict[str, Tensor], body: SmplBody
) -> None:
    src, dst = write(lightning_checkpoint(weights)), tmp_path / "model.safetensors"
    digest = convert_official_checkpoint(src, dst)
    assert digest == tensors_digest(weights)
    loaded = load_hmr2(dst, body, device="cpu")
    assert (loaded.size_name, loaded.weights_origin) == ("tiny", "official")
    assert loaded.weights_digest == digest == load_hmr2(src, body).weights_digest
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []
    assert check_checkpoint(dst) == (
        f"{dst}: HMR 2.0 size tiny, official weights, 75 tensors, 277,530 numbers, digest {digest}"
    )
    assert "imported weights" in check_checkpoint(src)
    assert (weights_origin(dst), weights_origin(src)) == ("official", "imported")
    convert_official_checkpoint(src, dst, origin="imported")
    assert load_hmr2(dst, body).weights_origin == "imported"


def test_saved_model_is_read_back(tmp_path: Path, model: Hmr2, body: SmplBody) -> None:
    path = tmp_path / "model.safetensors"
    save_hmr2(model, path)
    loaded = load_hmr2(path, body, device="cpu", precision="bf16")
    assert (loaded.weights_origin, loaded.precision) == ("trained", "bf16")
    assert loaded.weights_digest == model.weights_digest
    with pytest.raises(ValueError, match="origin: expected one of"):
        save_hmr2(model, path, origin="mine")


def test_changed_weights_do_not_pass_for_the_named_ones(
    tmp_path: Path, weights: dict[str, Tensor], model: Hmr2, body: SmplBody
) -> None:
    path = tmp_path / "model.safetensors"
    metadata = {"size": "tiny", "origin": "official", "digest": model.weights_digest}
    weights["smpl_head.init_cam"] += 1
    safetensors.torch.save_file(weights, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=f"digest {model.weights_digest}, got"):
        load_hmr2(path, body)
    safetensors.torch.save_file(weights, path, metadata=metadata | {"size": "vit_g"})
    with pytest.raises(CheckpointError, match="'vit_g'"):
        load_hmr2(path, body)


def test_half_precision_weights_become_float32(weights: dict[str, Tensor], body: SmplBody) -> None:
    halved = {name: tensor.half() for name, tensor in weights.items()}
    loaded = build_hmr2("tiny", body, halved, origin="imported", device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_unknown_sizes_and_origins_are_refused(weights: dict[str, Tensor], body: SmplBody) -> None:
    with pytest.raises(
        ValueError, match=r"expected one of \['vit_h', 'mini', 'tiny'\], got 'huge'"
    ):
        untrained_hmr2("huge", body)
    with pytest.raises(ValueError, match="origin: expected one of"):
        build_hmr2("tiny", body, weights, origin="stolen")


@pytest.mark.parametrize("size", ["mini", "tiny"])
def test_untrained_model_stands_upright_before_the_camera(size: str, body: SmplBody) -> None:
    model = untrained_hmr2(size, body, device="cpu")
    assert model.weights_origin == "untrained"
    crops = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model(crops)
    upright = np.diag([1.0, -1.0, -1.0])
    np.testing.assert_allclose(
        output.global_orient, np.broadcast_to(upright, (2, 1, 3, 3)), atol=0.2
    )
    np.testing.assert_allclose(
        output.body_pose, np.broadcast_to(np.eye(3), (2, 23, 3, 3)), atol=0.2
    )
    np.testing.assert_allclose(output.pred_cam, [[0.9, 0, 0]] * 2, atol=0.1)
    nose, pelvis, ankle = (output.keypoints_2d[:, i] for i in (0, 8, 11))
    assert (nose[:, 1] < pelvis[:, 1]).all()
    assert (pelvis[:, 1] < ankle[:, 1]).all()
    assert (output.keypoints_2d.abs() < 0.6).all()
    # Two crops, two answers.
    assert not torch.equal(output.body_pose[0], output.body_pose[1])


def test_untrained_weights_depend_on_the_seed_only(body: SmplBody, model: Hmr2) -> None:
    assert untrained_hmr2("tiny", body).weights_digest == model.weights_digest
    assert untrained_hmr2("tiny", body, seed=1).weights_digest != model.weights_digest
    # Known answer: the same on every machine.
    assert model.weights_digest[:16] == "cf4c02e963414706"


def test_sizes_can_be_told_apart_by_their_shapes() -> None:
    shapes = [expected_shapes(size) for size in HMR2_SIZES]
    assert len({tuple(s.items()) for s in shapes}) == len(HMR2_SIZES)

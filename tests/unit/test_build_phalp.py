from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import pytest
import torch
import yaml
from torch import Tensor

from fourdh_batch.errors import CheckpointError
from fourdh_batch.models.build_phalp import (
    expected_shapes,
    import_pose_predictor,
    load_pose_predictor,
    save_pose_predictor,
    untrained_pose_predictor,
)
from fourdh_batch.models.checkpoint import read_safetensors, write_safetensors
from fourdh_batch.models.predictor import NUM_POSE_VECTOR, PosePredictor, PredictorSize

TINY = PredictorSize(
    dim=24,
    depth=2,
    num_heads=3,
    head_dim=16,
    mlp_dim=40,
    frame_length=10,
    conv_stride=5,
    conv_pad=1,
)
CONFIG: dict[str, Any] = {
    "configs": {
        "frame_length": 10,
        "in_feat": 24,
        "mask_type_test": "zero",
        "data_dir": "${paths.data_dir}",
        "transformer": {
            "depth": 2,
            "heads": 3,
            "dim_head": 16,
            "mlp_dim": 40,
            "dropout": 0.1,
            "conv": {"pad": 1, "stride": 5},
        },
    },
    "model": {"_target_": "some.Module", "cfg": "${configs}"},
}


@pytest.fixture(scope="module")
def predictor() -> PosePredictor:
    return untrained_pose_predictor(size=TINY)


@pytest.fixture
def state(predictor: PosePredictor) -> dict[str, Tensor]:
    """What the published trainer leaves, as far as its source tells."""
    never_read = {
        "class_token": torch.zeros(1, 1, 24),
        "pos_embedding": torch.zeros(20, 24),
        "pe": torch.zeros(20, 24),
        "transformer.layers.0.0.norm.weight": torch.zeros(24),
        "action_head_ava.0.0.bias": torch.zeros(60),
    }
    network = {f"encoder.{k}": v for k, v in (predictor.network.state_dict() | never_read).items()}
    return network | {"smpl.faces_tensor": torch.zeros(3, dtype=torch.int64)}


@pytest.fixture
def write(tmp_path: Path, state: dict[str, Tensor]) -> Callable[..., Path]:
    """Writes the three published files; gives the path of the checkpoint."""

    def _write(
        tensors: dict[str, Tensor] | None = None, config: Any = CONFIG, mean_std: Any = None
    ) -> Path:
        path = tmp_path / "pose_predictor.pth"
        hyper_parameters = {"cfg": omegaconf.OmegaConf.create({"frame_length": 10})}
        content = {
            "state_dict": state if tensors is None else tensors,
            "hyper_parameters": hyper_parameters,
        }
        torch.save(content, path)
        text = config if isinstance(config, str) else yaml.safe_dump(config)
        path.with_suffix(".yaml").write_text(text)
        mean_std = (
            np.stack([np.zeros((1, 226)), np.ones((1, 226))]) if mean_std is None else mean_std
        )
        np.save(tmp_path / "mean_std.npy", mean_std, allow_pickle=True)
        return path

    return _write


def predict(predictor: PosePredictor) -> Any:
    pose = np.random.default_rng(0).standard_normal((2, 7, NUM_POSE_VECTOR)).astype(np.float32)
    frames = np.array([[0, 1, 2, 3, 4, 5, 6], [4, 4, 4, 4, 5, 6, 9]])
    return predictor(pose, frames, np.array([7, 6]))


def without(*place: str) -> Any:
    """The published configuration with one entry missing."""
    config: Any = yaml.safe_load(yaml.safe_dump(CONFIG))
    node = config["configs"]
    for key in place[:-1]:
        node = node[key]
    del node[place[-1]]
    return config


def with_transformer(**changed: Any) -> Any:
    config: Any = yaml.safe_load(yaml.safe_dump(CONFIG))
    config["configs"]["transformer"] |= changed
    return config


def test_a_saved_predictor_answers_the_same(predictor: PosePredictor, tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    digest = save_pose_predictor(predictor, path)
    loaded = load_pose_predictor(path)
    assert loaded.weights_origin == "untrained"
    assert loaded.network.size == TINY
    assert digest == loaded.weights_digest == predictor.weights_digest
    np.testing.assert_array_equal(predict(loaded), predict(predictor))


def test_published_files_answer_the_same_before_and_after_the_import(
    predictor: PosePredictor, write: Callable[..., Path], tmp_path: Path
) -> None:
    path, ours = write(), tmp_path / "ours.safetensors"
    loaded = load_pose_predictor(path)
    assert loaded.weights_origin == "imported"
    np.testing.assert_array_equal(predict(loaded), predict(predictor))
    mean_std = tmp_path / "mean_std.npy"
    digest = import_pose_predictor(path, ours, config=path.with_suffix(".yaml"), mean_std=mean_std)
    imported = load_pose_predictor(ours)
    assert imported.weights_origin == "official"
    assert digest == imported.weights_digest == loaded.weights_digest
    np.testing.assert_array_equal(predict(imported), predict(predictor))


def test_mean_and_deviation_are_found_where_the_published_code_keeps_them(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(mean_std=np.full((2, 1, 226), 2.0))
    (tmp_path / "weights").mkdir()
    (tmp_path / "3D").mkdir()
    for name in (path.name, "pose_predictor.yaml"):
        (tmp_path / name).rename(tmp_path / "weights" / name)
    (tmp_path / "mean_std.npy").rename(tmp_path / "3D" / "mean_std.npy")
    loaded = load_pose_predictor(tmp_path / "weights" / path.name)
    expected = torch.tensor([2.0] * 226 + [0.0] * 3)
    torch.testing.assert_close(loaded.mean, expected)
    torch.testing.assert_close(loaded.std, expected + torch.tensor([0.0] * 226 + [1.0] * 3))


def test_q3_the_pose_encoder_survives_the_stripping_of_the_prefix(
    write: Callable[..., Path], state: dict[str, Tensor]
) -> None:
    state["encoder.pose_shape_encoder.0.bias"] = torch.full((229,), 0.25)
    loaded = load_pose_predictor(write(state))
    first = loaded.network.pose_shape_encoder[0]
    assert torch.equal(first.bias, state["encoder.pose_shape_encoder.0.bias"])
    assert torch.equal(first.weight, state["encoder.pose_shape_encoder.0.weight"])


def test_q3_a_checkpoint_stripped_too_often_is_refused(
    write: Callable[..., Path], state: dict[str, Tensor]
) -> None:
    lost = {f"encoder.{name.replace('encoder.', '')}": t for name, t in state.items()}
    with pytest.raises(CheckpointError, match=r"pose_shape_encoder\.0\.weight: expected 2 axes"):
        load_pose_predictor(write(lost))


def test_a_doubled_prefix_is_refused(write: Callable[..., Path], state: dict[str, Tensor]) -> None:
    state["encoder.encoder.mask_token"] = state["encoder.mask_token"]
    with pytest.raises(CheckpointError, match=r"unexpected: encoder\.mask_token"):
        load_pose_predictor(write(state))


@pytest.mark.parametrize("prefix", ["", "encoder.encoder."])
def test_other_prefixes_are_refused(
    write: Callable[..., Path], predictor: PosePredictor, prefix: str
) -> None:
    named = {f"{prefix}{name}": t for name, t in predictor.network.state_dict().items()}
    with pytest.raises(CheckpointError, match="no such tensor"):
        load_pose_predictor(write(named))


@pytest.mark.parametrize("name", expected_shapes(TINY))
def test_every_tensor_is_needed(
    write: Callable[..., Path], state: dict[str, Tensor], name: str
) -> None:
    del state[f"encoder.{name}"]
    with pytest.raises(CheckpointError, match="expected") as caught:
        load_pose_predictor(write(state))
    assert name in str(caught.value)


def test_unknown_tensors_and_other_shapes_are_listed(
    write: Callable[..., Path], state: dict[str, Tensor]
) -> None:
    state["encoder.joint_encoder.0.weight"] = torch.zeros(4, 4)
    state["encoder.smpl_head.0.fc2.bias"] = torch.zeros(7)
    state["encoder.loca_head.0.4.bias"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(CheckpointError) as caught:
        load_pose_predictor(write(state))
    message = str(caught.value)
    assert "unexpected: joint_encoder.0.weight" in message
    assert "smpl_head.0.fc2.bias (expected (1024,), got (7,))" in message
    assert "loca_head.0.4.bias (expected floating point, got torch.int64)" in message


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (("transformer", "heads"), r"configs\.transformer\.heads: expected a whole number"),
        (("transformer", "dim_head"), r"configs\.transformer\.dim_head"),
        (("transformer", "conv", "stride"), r"configs\.transformer\.conv\.stride"),
        (("transformer", "conv", "pad"), r"configs\.transformer\.conv\.pad"),
        (("transformer",), r"configs\.transformer\.heads"),
        (("mask_type_test",), r"configs\.mask_type_test: expected 'zero', got nothing"),
    ],
)
def test_nothing_is_guessed(
    write: Callable[..., Path], place: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(CheckpointError, match=expected):
        load_pose_predictor(write(config=without(*place)))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (with_transformer(heads=4), "heads x head width = 48, got 4 x 16"),
        (with_transformer(heads="${heads}"), "whole number, got '.{heads}'"),
        (with_transformer(heads=True), "whole number, got True"),
        (with_transformer(heads=-3, dim_head=-16), "num_heads: expected 1 or more, got -3"),
        (with_transformer(conv={"stride": 5, "pad": 2}), r"stride \+ 2 pad = 7, got 5 \+ 2 x 2"),
        (with_transformer(conv={"stride": 3, "pad": 2}), "multiple of the stride 3"),
        (with_transformer(depth=3), r"configs\.transformer\.depth = 2 .* got 3"),
        ("[not, a, tree]", r"configs\.transformer\.heads"),
        ("a: [", "expected plain YAML"),
        ("a: !!python/object/apply:os.getcwd []", "expected plain YAML"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused(
    write: Callable[..., Path], config: Any, expected: str
) -> None:
    with pytest.raises(CheckpointError, match=expected):
        load_pose_predictor(write(config=config))


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of a file was run",))


def test_a_hostile_pickle_in_mean_std_is_refused(write: Callable[..., Path]) -> None:
    objects = np.empty(2, object)
    objects[:] = [_Hostile(), _Hostile()]
    path = write(mean_std=objects)
    with pytest.raises(CheckpointError, match=r"mean_std\.npy"):
        load_pose_predictor(path)


def test_a_hostile_pickle_behind_the_header_is_refused(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write()
    with (tmp_path / "mean_std.npy").open("wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
        np.lib.format.write_array_header_1_0(file, header)
        pickle.dump(_Hostile(), file)
    with pytest.raises(CheckpointError, match="not plain data"):
        load_pose_predictor(path)


def test_a_pickled_pair_of_rows_is_read(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write()
    with (tmp_path / "mean_std.npy").open("wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
        np.lib.format.write_array_header_1_0(file, header)
        pickle.dump([np.full((1, 3), 5.0), np.full((1, 3), 2.0)], file)
    loaded = load_pose_predictor(path)
    assert loaded.mean.tolist() == [5.0] * 3 + [0.0] * 226
    assert loaded.std.tolist() == [2.0] * 3 + [1.0] * 226


def test_a_mean_saved_as_an_array_of_objects_is_read(write: Callable[..., Path]) -> None:
    mean, std = np.full((1, 226), 5.0), np.full((1, 226), 2.0)
    pair = np.empty(2, object)
    pair[:] = [mean, std]
    for saved in (np.array([mean, std], dtype=object), pair):
        loaded = load_pose_predictor(write(mean_std=saved))
        assert loaded.mean.tolist() == [5.0] * 226 + [0.0] * 3
        assert loaded.std.tolist() == [2.0] * 226 + [1.0] * 3


@pytest.mark.parametrize(
    ("mean_std", "expected"),
    [
        (np.zeros((3, 1, 226)), "mean and standard deviation of up to 229"),
        (np.zeros((2, 1, 230)), "mean and standard deviation of up to 229"),
        (np.zeros((2, 0)), "mean and standard deviation of up to 229"),
        (np.zeros(()), "npy of two rows"),
        (np.full((2, 1, 4), np.nan), "finite"),
        (np.full((2, 1, 4), -1.0), "deviations of 0 or more"),
        (np.array([["a"], ["b"]]), "npy of two rows"),
    ],
)
def test_a_mean_that_is_none_is_refused(
    write: Callable[..., Path], mean_std: Any, expected: str
) -> None:
    with pytest.raises(CheckpointError, match=expected):
        load_pose_predictor(write(mean_std=mean_std))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x09\x00xx", b"no array" * 9])
def test_a_damaged_mean_is_refused(
    write: Callable[..., Path], tmp_path: Path, content: bytes
) -> None:
    path = write()
    (tmp_path / "mean_std.npy").write_bytes(content)
    with pytest.raises(CheckpointError, match="npy of two rows"):
        load_pose_predictor(path)


@pytest.mark.parametrize("missing", ["pose_predictor.pth", "pose_predictor.yaml", "mean_std.npy"])
def test_a_missing_file_is_named(write: Callable[..., Path], missing: str) -> None:
    path = write()
    path.with_name(missing).unlink()
    with pytest.raises(CheckpointError, match=rf"{missing}: no such file"):
        load_pose_predictor(path)


def test_a_damaged_file_of_ours_is_refused(predictor: PosePredictor, tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    save_pose_predictor(predictor, path, origin="trained")
    tensors, metadata = read_safetensors(path)
    tensors["mean"][3] += 1
    write_safetensors(path, tensors, metadata)
    with pytest.raises(CheckpointError, match="expected weights of digest"):
        load_pose_predictor(path)
    for changed in ({"format": "pose_predictor 2"}, {"num_heads": "x"}, {"origin": "nobody"}):
        write_safetensors(path, tensors, metadata | changed)
        with pytest.raises(CheckpointError, match="written by a newer version"):
            load_pose_predictor(path)
    with pytest.raises(ValueError, match="origin"):
        save_pose_predictor(predictor, path, origin="nobody")


def test_heads_belong_to_the_digest(tmp_path: Path) -> None:
    other = PredictorSize(dim=24, depth=2, num_heads=6, head_dim=8, mlp_dim=40, frame_length=10)
    assert expected_shapes(other) == expected_shapes(TINY)
    digests = {untrained_pose_predictor(size=size).weights_digest for size in (TINY, other)}
    assert len(digests) == 2


def test_untrained_weights_follow_from_the_seed() -> None:
    one, same, other = (untrained_pose_predictor(seed) for seed in (0, 0, 1))
    assert one.weights_origin == "untrained"
    assert one.frame_length == 125
    assert one.weights_digest == same.weights_digest != other.weights_digest

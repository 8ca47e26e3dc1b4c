"""Reading body files, and what the body module promises besides its numbers."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from fourdh_batch.errors import CheckpointError
from fourdh_batch.models.smpl import (
    NUM_FACES,
    NUM_JOINTS,
    NUM_POSE_FEATURES,
    NUM_REGRESSED,
    NUM_VERTICES,
    SmplBody,
    load_body,
)
from fourdh_batch.types import NUM_BETAS

PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21]


def sparse_rows(rng: np.random.Generator, num_rows: int) -> np.ndarray[Any, Any]:
    """(num_rows, V) rows of eight positive numbers that sum to 1."""
    matrix = np.zeros((num_rows, NUM_VERTICES))
    for row in matrix:
        row[rng.choice(NUM_VERTICES, 8, replace=False)] = 1 / 8
    return matrix


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    """Arrays as an official file holds them: doubles, a sparse regressor, a wrapped root."""
    rng = np.random.default_rng(0)
    weights = rng.random((NUM_VERTICES, NUM_JOINTS)) ** 8
    return {
        "v_template": rng.normal(size=(NUM_VERTICES, 3)),
        "shapedirs": rng.normal(scale=0.01, size=(NUM_VERTICES, 3, 12)),
        "posedirs": np.zeros((NUM_VERTICES, 3, NUM_POSE_FEATURES), np.float32),
        "J_regressor": scipy.sparse.csc_matrix(sparse_rows(rng, NUM_JOINTS)),
        "weights": weights / weights.sum(axis=1, keepdims=True),
        "kintree_table": np.array([[2**32 - 1, *PARENTS[1:]], range(NUM_JOINTS)], np.uint32),
        "f": rng.integers(0, NUM_VERTICES, (NUM_FACES, 3), dtype=np.uint32),
        "bs_type": "lrotmin",
    }


@pytest.fixture(scope="module")
def extra() -> np.ndarray[Any, Any]:
    return sparse_rows(np.random.default_rng(1), NUM_REGRESSED)


@pytest.fixture
def as_npz(official: dict[str, Any], extra: np.ndarray[Any, Any]) -> dict[str, Any]:
    dense = {**official, "J_regressor": official["J_regressor"].toarray()}
    return {**dense, "joint_regressor_extra": extra}


def write_npz(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


def test_official_pickle_gives_the_same_body_as_an_npz(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    official: dict[str, Any],
    as_npz: dict[str, Any],
    extra: np.ndarray[Any, Any],
) -> None:
    """Python 2's protocol, chumpy objects around some arrays, regressor in a file of its own."""
    for name in ("chumpy", "chumpy.ch", "chumpy.reordering"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    ch = type("Ch", (), {"__module__": "chumpy.ch"})
    select = type("Select", (), {"__module__": "chumpy.reordering"})
    monkeypatch.setattr(sys.modules["chumpy.ch"], "Ch", ch, raising=False)
    monkeypatch.setattr(sys.modules["chumpy.reordering"], "Select", select, raising=False)
    template, shapes = select(), ch()
    template.__dict__.update(
        a=official["v_template"][::-1].copy(),
        idxs=np.arange(NUM_VERTICES * 3).reshape(NUM_VERTICES, 3)[::-1].ravel(),
        preferred_shape=(NUM_VERTICES, 3),
    )
    shapes.__dict__.update(x=official["shapedirs"])
    unused = ch()
    unused.__dict__.update(a=template, b=shapes)
    path = tmp_path / "SMPL_NEUTRAL.pkl"
    content = {**official, "v_template": template, "shapedirs": shapes, "J": unused}
    path.write_bytes(pickle.dumps(content, protocol=2))
    for name in ("chumpy.reordering", "chumpy.ch", "chumpy"):
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "SMPL_to_J19.pkl").write_bytes(pickle.dumps(extra, protocol=2))

    body = load_body(path, extra_regressor=tmp_path / "SMPL_to_J19.pkl")

    expected = load_body(write_npz(tmp_path / "body.npz", as_npz))
    assert body.name == expected.name == "smpl"
    assert body.digest == expected.digest
    assert body.parents.tolist() == PARENTS
    assert body.vt is None
    assert body.ft is None
    np.testing.assert_array_equal(body.faces, official["f"])
    np.testing.assert_array_equal(body.shapedirs, np.float32(official["shapedirs"][..., :10]))


def test_array_that_chumpy_would_have_to_compute_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, official: dict[str, Any]
) -> None:
    module = types.ModuleType("chumpy.ch_ops")
    monkeypatch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))
    monkeypatch.setitem(sys.modules, "chumpy.ch_ops", module)
    add = type("add", (), {"__module__": "chumpy.ch_ops"})
    monkeypatch.setattr(module, "add", add, raising=False)
    path = tmp_path / "SMPL_NEUTRAL.pkl"
    path.write_bytes(pickle.dumps({**official, "v_template": add()}, protocol=2))
    np.save(tmp_path / "extra.npy", np.zeros((NUM_REGRESSED, NUM_VERTICES)))
    with pytest.raises(CheckpointError, match=r"v_template: .* got chumpy\.ch_ops\.add"):
        load_body(path, extra_regressor=tmp_path / "extra.npy")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pkl"])
def test_extra_regressor_is_read_from_every_form(
    tmp_path: Path, as_npz: dict[str, Any], extra: np.ndarray[Any, Any], suffix: str
) -> None:
    del as_npz["joint_regressor_extra"]
    path = tmp_path / f"extra{suffix}"
    if suffix == ".npy":
        np.save(path, extra)
    elif suffix == ".npz":
        np.savez(path, joint_regressor_extra=extra)
    else:
        path.write_bytes(pickle.dumps(scipy.sparse.csr_matrix(extra)))
    body = load_body(write_npz(tmp_path / "body.npz", as_npz), extra_regressor=path)
    np.testing.assert_array_equal(body.joint_regressor_extra, extra.astype(np.float32))


def test_missing_extra_joints_say_which_file_to_pass(
    tmp_path: Path, as_npz: dict[str, Any]
) -> None:
    del as_npz["joint_regressor_extra"]
    path = write_npz(tmp_path / "body.npz", as_npz)
    with pytest.raises(CheckpointError, match=r"SMPL_to_J19\.pkl.*as extra_regressor"):
        load_body(path)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("v_template", None, "expected the key 'v_template', got"),
        ("v_template", np.zeros((6891, 3)), r"expected shape \(6890, 3\), got \(6891, 3\)"),
        ("v_template", np.full((6890, 3), np.nan), "finite"),
        ("shapedirs", np.zeros((6890, 3, 9)), r"expected shape .*10\), got \(6890, 3, 9\)"),
        ("weights", np.zeros((6890, 55)), r"weights: expected shape \(6890, 24\)"),
        ("weights", np.full((6890, 24), "a"), "expected numbers, got <U1"),
        ("f", np.full((13776, 3), 6890), r"f: expected numbers in 0\.\.6889, got 6890 to 6890"),
        ("kintree_table", np.zeros((2, 24), int), "expected a root"),
        ("kintree_table", np.array([[-1, 2, *PARENTS[2:]], range(24)]), "parents before"),
        ("joint_regressor_extra", np.zeros((9, 6890)), r"expected shape \(19, 6890\)"),
    ],
)
def test_wrong_arrays_are_refused(
    tmp_path: Path, as_npz: dict[str, Any], key: str, value: Any, problem: str
) -> None:
    as_npz[key] = value
    if value is None:
        del as_npz[key]
    path = write_npz(tmp_path / "body.npz", as_npz)
    with pytest.raises(CheckpointError, match=problem):
        load_body(path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("body.npz", b"no zip", "plain arrays"),
        ("body.pkl", pickle.dumps([1]), "expected a dict of arrays, got list"),
        ("body.pkl", b"cos\nsystem\n(S'true'\ntR.", "not plain data"),
        ("body.obj", b"", r"expected \.pkl or \.npz, got \.obj"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        load_body(path)


def test_objects_in_an_npz_are_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "body.npz", {"v_template": np.array([{}], dtype=object)})
    with pytest.raises(CheckpointError, match="plain arrays"):
        load_body(path)


def test_digest_tells_bodies_apart(tmp_path: Path, as_npz: dict[str, Any]) -> None:
    first = load_body(write_npz(tmp_path / "a.npz", as_npz))
    again = load_body(write_npz(tmp_path / "b.npz", {**as_npz, "comment": np.array("x")}))
    as_npz["joint_regressor_extra"] = as_npz["joint_regressor_extra"][::-1]
    other = load_body(write_npz(tmp_path / "c.npz", as_npz))
    assert first.digest == again.digest != other.digest
    assert len(first.digest) == 64


def test_parameters_never_come_from_a_checkpoint(tmp_path: Path, as_npz: dict[str, Any]) -> None:
    body = load_body(write_npz(tmp_path / "body.npz", as_npz))
    assert isinstance(body, SmplBody)
    assert body.state_dict() == {}
    assert list(body.parameters()) == []
    assert {buffer.dtype for buffer in body.buffers()} == {torch.float32, torch.int64}


def test_no_people_give_empty_results(tmp_path: Path, as_npz: dict[str, Any]) -> None:
    body = load_body(write_npz(tmp_path / "body.npz", as_npz))
    nobody = torch.zeros(0, 1, 3, 3), torch.zeros(0, 23, 3, 3), torch.zeros(0, NUM_BETAS)
    output = body(*nobody)
    assert output.vertices.shape == (0, 6890, 3)
    assert output.joints.shape == (0, 24, 3)
    assert output.keypoints_3d.shape == body.keypoints_3d(*nobody).shape == (0, 44, 3)


def test_importing_the_body_is_quiet_and_light() -> None:
    """No chumpy, no drawing library, no warning, no word."""
    code = (
        "import sys, fourdh_batch.models.smpl as _;"
        "print(sorted({'chumpy', 'cv2', 'matplotlib', 'trimesh', 'pyrender'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")

"""The restricted reader: plain data comes through whole, and nothing else gets to run."""

from __future__ import annotations

import base64
import collections
import gzip
import io
import os
import pickle
import pickletools
import random
import struct
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from fourdh_batch.errors import CheckpointError
from fourdh_batch.models import unpickle
from fourdh_batch.models.unpickle import (
    ChumpyFormula,
    Omitted,
    load_restricted_joblib,
    load_restricted_pickle,
)
from tests.pose_files import joblib_bytes

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def load(data: bytes) -> Any:
    return load_restricted_pickle(io.BytesIO(data))


def dump(value: object, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol=protocol)


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: object, state: object = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


# Plain data


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float64).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.arange(6, dtype=">i4").reshape(3, 2),
        np.array([2**32 - 1, 0], dtype=np.uint32),
        np.array([[True], [False]]),
        np.array(["lbs", "dqs"]),
        np.array([b"lbs", b""]),
        np.array(2.5),
        np.zeros((0, 3)),
        np.array([1 + 2j, 3]),
        np.arange(10)[::2],
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_arrays_come_through(array: np.ndarray[Any, Any], protocol: int) -> None:
    got = load(dump(array, protocol))
    np.testing.assert_array_equal(got, array.astype(array.dtype.newbyteorder("=")), strict=True)
    assert type(got) is np.ndarray
    assert got.flags.owndata
    assert got.flags.writeable


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_numbers_and_strings_come_through(protocol: int) -> None:
    value = {
        "list": [1, 2.5, None, True, "text", b"bytes", 10**30],
        "tuple": (np.float32(1.5), np.int64(-3), np.bool_(True)),
        "set": {1, 2},
        "frozen": frozenset({"a"}),
        "complex": 1 + 2j,
        "ordered": collections.OrderedDict(b=1, a=2),
        "bytearray": bytearray(b"xy"),
        "empty": b"",
        "dtype": np.dtype("<f4"),
        3: np.ones(2),
    }
    got = load(dump(value, protocol))
    np.testing.assert_array_equal(got.pop(3), value.pop(3))
    assert got == value
    assert type(got["ordered"]) is collections.OrderedDict
    assert type(got["tuple"][0]) is np.float32


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["csc", "csr", "coo"])
def test_sparse_matrices_come_through(kind: str, protocol: int) -> None:
    dense = np.array([[0, 1.5, 0], [2, 0, 0]])
    got = load(dump(getattr(scipy.sparse, f"{kind}_matrix")(dense), protocol))
    assert got.format == kind
    np.testing.assert_array_equal(got.toarray(), dense)


def test_shared_and_circular_parts_stay_shared() -> None:
    array = np.ones(3)
    loop: list[object] = [array, array]
    loop.append(loop)
    got = load(dump(loop))
    assert got[0] is got[1]
    assert got[2] is got


def test_nested_sharing_does_not_explode() -> None:
    value: object = np.ones(1)
    for _ in range(200):
        value = (value, value)
    got = load(dump(value))
    assert got[0] is got[1]


def test_path_and_file_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(dump({"a": 1}))
    with path.open("rb") as file:
        assert load_restricted_pickle(path) == load_restricted_pickle(file) == {"a": 1}
    assert load_restricted_pickle(str(path)) == {"a": 1}


# Python 2 and old libraries: bytes written by hand as Python 2 wrote them


def test_python_2_array_with_latin1_bytes_comes_through() -> None:
    raw = np.array([1.0, -2.5e300]).tobytes()
    state = (
        b"(I1\n(I2\ntcnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
        + b"T"
        + struct.pack("<i", len(raw))
        + raw
        + b"tb."
    )
    data = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR" + state
    np.testing.assert_array_equal(load(data), [1.0, -2.5e300], strict=False)


def test_python_2_scalar_set_and_unicode_come_through() -> None:
    scalar = (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'i4'\nI0\nI1\ntR(I3\nS'>'\nNNNI-1\n"
        b"I-1\nI0\ntbS'\\x00\\x00\\x01\\x00'\ntR"
    )
    data = b"(" + scalar + b"c__builtin__\nset\n((lI7\natRV\\u00e9\nS'caf\\xe9'\nt."
    number, members, text, old_text = load(data)
    assert (number, type(number)) == (256, np.int32)
    assert (members, text, old_text) == ({7}, "é", "café")


def test_old_sparse_module_path_comes_through() -> None:
    data = dump(scipy.sparse.csc_matrix(np.eye(3)), 2)
    assert b"scipy.sparse._csc\n" in data
    old = data.replace(b"cscipy.sparse._csc\n", b"cscipy.sparse.csc\n")
    np.testing.assert_array_equal(load(old).toarray(), np.eye(3))


# chumpy


@pytest.fixture
def chumpy(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """Classes that pickle under chumpy's names; they are gone again before anything is read."""
    made = {}
    for module, name in [
        ("chumpy.ch", "Ch"),
        ("chumpy.reordering", "Select"),
        ("chumpy.ch_ops", "add"),
    ]:
        fake = types.ModuleType(module)
        made[name] = type(name, (), {"__module__": module})
        setattr(fake, name, made[name])
        monkeypatch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))
        monkeypatch.setitem(sys.modules, module, fake)

    def dumped(protocol: int, wrap: Any) -> bytes:
        data = dump(wrap, protocol)
        for module in [m for m in sys.modules if m.split(".")[0] == "chumpy"]:
            monkeypatch.delitem(sys.modules, module)
        return data

    def build(name: str, **state: object) -> object:
        instance = made[name]()
        instance.__dict__.update(state)
        return instance

    yield types.SimpleNamespace(build=build, dump=dumped)
    assert "chumpy" not in sys.modules


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_chumpy_array_comes_through_as_its_array(chumpy: Any, protocol: int) -> None:
    value = np.arange(6.0).reshape(2, 3)
    stored = chumpy.build("Ch", x=value, _dirty_vars={"x"}, _itr=None, _status="new")
    got = load(chumpy.dump(protocol, {"shapedirs": stored, "again": stored}))
    np.testing.assert_array_equal(got["shapedirs"], value, strict=True)
    assert got["again"] is got["shapedirs"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_chumpy_select_comes_through_as_the_picked_values(chumpy: Any, protocol: int) -> None:
    source = chumpy.build("Ch", x=np.arange(12.0).reshape(4, 3))
    select = chumpy.build("Select", a=source, idxs=np.array([3, 4, 5, 0, 1, 2]))
    shaped = chumpy.build("Select", a=select, idxs=np.array([5, 4, 3, 2]), preferred_shape=(2, 2))
    got = load(chumpy.dump(protocol, [select, shaped]))
    np.testing.assert_array_equal(got[0], [3.0, 4.0, 5.0, 0.0, 1.0, 2.0])
    np.testing.assert_array_equal(got[1], [[2.0, 1.0], [0.0, 5.0]])


def test_chumpy_formula_stays_inert(chumpy: Any) -> None:
    formula = chumpy.build("add", a=np.ones(2), b=np.ones(2))
    select = chumpy.build("Select", a=formula, idxs=np.array([0]))
    got = load(chumpy.dump(2, [formula, select]))
    assert got[0] == ChumpyFormula("chumpy.ch_ops.add", ("a", "b"))
    assert got[1] == ChumpyFormula("chumpy.reordering.Select", ("a", "idxs"))


def test_chumpy_object_inside_itself_is_a_formula(chumpy: Any) -> None:
    circular = chumpy.build("Ch")
    circular.x = circular
    assert load(chumpy.dump(2, circular)) == ChumpyFormula("chumpy.ch.Ch", ("x",))


def test_chumpy_select_outside_its_array_is_refused(chumpy: Any) -> None:
    select = chumpy.build("Select", a=np.arange(3.0), idxs=np.array([7]))
    with pytest.raises(CheckpointError, match="IndexError"):
        load(chumpy.dump(2, select))


# Hostile pickles


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {mark}",), "posix.system|nt.system"),
        (eval, ("open('{mark}', 'w')",), "builtins.eval"),
        (exec, ("open('{mark}', 'w')",), "builtins.exec"),
        (open, ("{mark}", "w"), "(_io|io).open"),
        (getattr, ("text", "upper"), "builtins.getattr"),
        (__import__, ("os",), "builtins.__import__"),
        (type, ("X", (), {}), "builtins.type"),
        (list, (range(10**12),), "builtins.(list|range)"),
        (np.zeros, ((10**6,),), "numpy.zeros"),
        (np.memmap, ("{mark}", "u1", "w+", 0, (1,)), "numpy.memmap"),
        (np.load, ("{mark}",), "numpy.load"),
        (np.matrix, ([[1.0]],), "numpy.matrix"),
        (scipy.sparse.eye, (10**6,), "scipy.sparse.*eye"),
        (scipy.sparse.csr_array, (np.eye(2),), "scipy.sparse.*csr_array"),
        (pickle.loads, (b"N.",), "_?pickle.loads"),
        (types.SimpleNamespace, (), "types.SimpleNamespace"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_call_is_refused_by_name_and_not_run(
    tmp_path: Path, protocol: int, function: Any, arguments: tuple[Any, ...], name: str
) -> None:
    mark = tmp_path / "mark"
    filled = tuple(a.format(mark=mark) if isinstance(a, str) else a for a in arguments)
    with pytest.raises(CheckpointError, match=rf"asks for {name}, which is not plain data"):
        load(dump({"v_template": [Calls(function, *filled)]}, protocol))
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(ios\nsystem\n.",
        b"(cos\nsystem\nS'true'\no.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"\x80\x04\x8c\x05numpy\x8c\x0ccore.numeric\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x12dtype.__reduce_ex__\x93.",
        b"cnumpy.core._internal\n_reconstruct\n)R.",
        b"cnumpy._core._internal\n_ctypes\n)R.",
        b"cnumpy.core.multiarray\nfromfile\n)R.",
        b"cnumpy.core.records\nfromfile\n)R.",
        b"cfourdh_batch.models.unpickle\n_Array\n.",
        b"ctorch._utils\n_rebuild_tensor_v2\n.",
        b"chumpyx\nCh\n.",
    ],
)
def test_every_road_to_a_global_is_closed(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        load(data)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"P1\n.", "PERSID"),
        (b"I1\nQ.", "BINPERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"", "byte 0: expected an opcode"),
        (b"hello", "byte 5: expected an opcode"),
        (dump(np.ones(3))[:-1], "expected an opcode"),
        (dump(b"x" * 100, 4)[:-9], "ValueError"),
        (b"cnumpy\nndarray\n.", "class instead of a value"),
        (b"cnumpy\nndarray\n)R.", "_reconstruct"),
        (b"c__builtin__\nobject\n)R.", "_reconstructor"),
        (b"ccopy_reg\n_reconstructor\n(c__builtin__\nset\nc__builtin__\nobject\nNtR.", "set"),
        (b"c__builtin__\nbytearray\n(I100000000000\ntR.", "expected the bytes"),
        (b"c_codecs\nencode\n(S'abc'\nS'rot13'\ntR.", "latin1"),
    ],
)
def test_what_is_no_plain_data_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        load(data)


@pytest.mark.parametrize(
    "dtype", ["O", "V8", "M8[s]", "V2147483647", "S2147483647", "f8,f8", "(1000000,1000000)f8"]
)
def test_only_dtypes_of_plain_numbers_and_strings_are_admitted(dtype: str) -> None:
    with pytest.raises(CheckpointError, match=r"plain number|longer than"):
        load(dump(Calls(np.dtype, dtype, False, True)))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_an_array_without_axes_comes_out_as_the_dict_that_it_holds(protocol: int) -> None:
    losses = {"reprojection_loss": np.float32(3.5), "pose": np.ones(2)}
    loaded = load(dump({"fitting_loss": np.array(losses), "none": np.array({})}, protocol))
    assert loaded["none"] == {}
    assert loaded["fitting_loss"]["reprojection_loss"] == 3.5
    assert loaded["fitting_loss"]["pose"].tolist() == [1, 1]


def objects(*items: object) -> Any:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


@pytest.mark.parametrize("protocol", range(6))
def test_an_array_of_objects_comes_out_as_the_numbers_that_it_holds(protocol: int) -> None:
    mean, std = np.arange(6.0).reshape(1, 6), np.full((1, 6), 2, np.float32)
    for stored in (
        np.array([mean, std], dtype=object),  # (2, 1, 6) of Python's floats
        np.asfortranarray(np.array([mean, std], dtype=object)),
        objects(mean, std),  # (2,) of arrays
    ):
        array = load(dump(stored, protocol))
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, np.stack([mean, std]))
    assert load(dump(objects(1, True, np.float32(0.5)), protocol)).tolist() == [1.0, 1.0, 0.5]
    assert load(dump(objects(), protocol)).shape == (0,)


@pytest.mark.parametrize(
    "stored",
    [
        objects({}, None),
        objects("text", "text"),
        objects([1, 2], [3, 4]),
        objects(np.zeros(2), np.zeros(3)),
        objects(np.array(["a"]), np.array(["b"])),
        objects(objects(1, 2), objects(3, 4)),
        objects(2**80, 1),
        objects(Calls(os.getcwd), 1),
        objects(np.dtype("f8"), 1),
    ],
)
def test_an_array_of_anything_but_numbers_is_refused(stored: Any) -> None:
    with pytest.raises(CheckpointError, match=r"an array of objects|not plain data"):
        load(dump(stored))


@pytest.mark.parametrize(
    "state",
    [
        ((3,), [1.0, 2.0]),
        ((-1,), [1.0]),
        ((2**62, 2**62), []),
        ((1,), (1.0,)),
        ((1,), b"\0" * 8),
    ],
)
def test_an_array_of_objects_must_fit_its_shape(state: tuple[Any, Any]) -> None:
    shape, items = state
    stored = Calls(
        np.empty(0).__reduce__()[0],  # type: ignore[index]
        np.ndarray,
        (0,),
        b"b",
        state=(1, shape, np.dtype(object), False, items),
    )
    with pytest.raises(CheckpointError, match=r"expected a shape|without \d+ items"):
        load(dump(stored))


def test_an_array_of_objects_does_not_multiply_what_it_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unpickle, "MAX_PICKLE_BYTES", 2**20)
    shared = np.zeros(1000)
    with pytest.raises(CheckpointError, match="an array of objects of more than"):
        load(dump(objects(*[shared] * 1000)))


def test_bytes_of_objects_are_refused() -> None:
    dtype = np.dtype(object)
    for hostile in (
        Calls(np.float64(0).__reduce__()[0], dtype, b"\1" * 8),
        {"a": Calls(np.float64(0).__reduce__()[0], dtype)},
    ):
        with pytest.raises(CheckpointError, match=r"objects in the place|missing 1 required"):
            load(dump(hostile))


def test_records_are_refused() -> None:
    with pytest.raises(CheckpointError, match="'V12'"):
        load(dump(np.zeros(2, dtype=[("a", "f4"), ("b", "f8")])))


@pytest.mark.parametrize(
    "name", ["numpy\ndtype", "numpy\nndarray", "__builtin__\nset", "_codecs\nencode", "chumpy\nCh"]
)
@pytest.mark.parametrize("state", ["(S'x'\nI1\nd", "(N(S'__setstate__'\nNdt", "(N(S'x'\nI1\ndt"])
def test_state_that_would_change_the_reader_is_refused(name: str, state: str) -> None:
    before = {kind: dict(vars(kind)) for kind in (unpickle._Dtype, unpickle._Chumpy)}
    with pytest.raises(CheckpointError):
        load(f"c{name}\n{state}b.".encode())
    assert {kind: dict(vars(kind)) for kind in before} == before


# Bombs


def test_lengths_and_memo_indices_are_not_trusted() -> None:
    huge = struct.pack("<Q", 2**40)
    for data in (
        b"\x80\x04\x8e" + huge + b"x.",  # BINBYTES8
        b"\x80\x04\x8d" + huge + b"x.",  # BINUNICODE8
        b"\x80\x05\x96" + huge + b"x.",  # BYTEARRAY8
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # LONG_BINPUT
        b"N" + b"p2147483647\n.",  # PUT
    ):
        with pytest.raises(CheckpointError):
            load(data)


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20), (0, 5), (-1,), (3, 2)])
def test_array_whose_shape_does_not_fit_its_bytes_is_refused(shape: tuple[int, ...]) -> None:
    stored: Any = np.ones(3).__reduce__()
    version, _shape, dtype, is_fortran, raw = stored[2]
    state = (version, shape, dtype, is_fortran, raw)
    with pytest.raises(CheckpointError):
        load(dump(Calls(stored[0], *stored[1], state=state)))


def test_sparse_matrix_with_indices_outside_is_refused() -> None:
    matrix = scipy.sparse.csc_matrix(np.eye(3))
    matrix.indices = np.array([0, 1, 900], dtype=np.int32)
    with pytest.raises(CheckpointError, match="ValueError"):
        load(dump(matrix))


def test_files_above_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "MAX_PICKLE_BYTES", 100)
    assert load(dump([1] * 10)) == [1] * 10
    with pytest.raises(CheckpointError, match="at most 100 bytes"):
        load(dump(np.ones(100)))


def test_damaged_bytes_give_data_or_a_checkpoint_error() -> None:
    """Seeded damage: bytes changed, cut, repeated, and opcodes put in between."""
    value = {
        "array": np.arange(6.0).reshape(2, 3),
        "sparse": scipy.sparse.csc_matrix(np.eye(3)),
        "rest": [1, "text", b"bytes", {1}, np.float32(3), np.array(["a"]), np.dtype(">f4")],
    }
    sources = [dump(value, protocol) for protocol in PROTOCOLS]
    opcodes = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        data = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 3)):
            at, other = rng.randrange(len(data)), rng.randrange(len(data))
            damage = [bytes([rng.randrange(256)]), b"", rng.choice(opcodes), data[other:][:20]]
            data[at : at + rng.randrange(4)] = rng.choice(damage)
        try:
            load(bytes(data))
        except CheckpointError:
            refused += 1
    assert refused > 1000


def test_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "SMPL_NEUTRAL.pkl"
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match=r"SMPL_NEUTRAL\.pkl: asks for (posix|os)\.system"):
        load_restricted_pickle(path)


# joblib

# {"f": Fortran-ordered 2 x 3, "i": int16, "n": [np.float32(0.5), "x"], "z": (0, 3), "verts": 2 x 2}
# written by joblib 1.6.0 with compress=3.
WRITTEN_BY_JOBLIB = base64.b64decode(
    "eF59UctKw0AUzaStrS3FFusDxH27MAtx4UJopeDCQBZuXEmYpKkTTdKQhxpBqAtrhNl583N+hV9gnUnStFjwwsy9l7mP"
    "c85My8mXkNkLdCkaA92+m2iWqUlOaLuR6pr6vWUAbSs8Pfc8HF172HUNDz6h9wq8q+aHmm5h3wdaSbuAVp0R5rWsiFZ8"
    "gl0DZFEuzVg28UasmaILFo+CiL2Q2iJi1eL4FD7id7iCrlyi6AwURbmcM0svWQhAo3VsWZNH1baxCzE9yJCm+1RsmbeO"
    "bTiBqkWB4YPcCrU678ws55q72iALvvuZb+W5kPvOIJHzUopMIOWMMKmSOmnI4huQJkVDIFukTUXzeImb7KyjJnsx2edw"
    "Gks4cyT8zJO42OHADdNzNyUkqfrEMyQ7tAIz05Ju+Dq2MFeeLxyf/L9wWGZz+zBjUlL0BAZFz38pCPxLSJMcMgqdAuCK"
    "XsnRAlvlwfACf00DWSwG9IoBmyt6T5m2yxNKv4Yh8DM="
)


def joblib_value() -> dict[str, Any]:
    return {
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "i": np.array([1, -2], np.int16),
        "n": [np.float32(0.5), "x"],
        "z": np.zeros((0, 3)),
        "verts": np.ones((2, 2), np.float32),
    }


def load_joblib(data: bytes, **options: Any) -> Any:
    return load_restricted_joblib(io.BytesIO(data), **options)


@pytest.mark.parametrize(
    "data",
    [
        WRITTEN_BY_JOBLIB,
        joblib_bytes(joblib_value()),
        joblib_bytes(joblib_value(), compress=True),
        joblib_bytes(joblib_value(), alignment=None),
        gzip.compress(joblib_bytes(joblib_value())),
        *(pickle.dumps(joblib_value(), protocol) for protocol in (2, 3, 4, 5)),
    ],
    ids=["joblib", "plain", "zlib", "old", "gzip", "2", "3", "4", "5"],
)
def test_files_of_joblib_and_plain_pickles_come_through(data: bytes) -> None:
    got = load_joblib(data)
    for name, value in joblib_value().items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(got[name], value, strict=True)
        else:
            assert got[name] == value


def test_our_stand_in_for_joblib_writes_its_very_bytes() -> None:
    ours, real = joblib_bytes(joblib_value()), zlib.decompress(WRITTEN_BY_JOBLIB)
    assert len(ours) == len(real)
    assert ours[: ours.index(b"allow_mmap")] == real[: real.index(b"allow_mmap")]


@pytest.mark.parametrize("data", [WRITTEN_BY_JOBLIB, joblib_bytes(joblib_value())])
def test_unwanted_arrays_are_left_out(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    got = load_joblib(data, skip={"verts"})
    assert got["verts"] == Omitted("array")
    np.testing.assert_array_equal(got["i"], [1, -2])
    large = joblib_bytes({"verts": np.zeros(10_000), "a": np.ones(3)})
    monkeypatch.setattr(unpickle, "MAX_PICKLE_BYTES", 20_000)
    np.testing.assert_array_equal(load_joblib(large, skip={"verts"})["a"], np.ones(3))
    with pytest.raises(CheckpointError, match="at most 20000 bytes"):
        load_joblib(large)
    monkeypatch.setattr(unpickle, "MAX_SKIPPED_BYTES", 20_000)
    with pytest.raises(CheckpointError, match="left out"):
        load_joblib(large, skip={"verts"})


def test_objects_of_a_tolerated_package_are_not_run() -> None:
    import torch

    data = pickle.dumps({"t": [torch.ones(2)], "a": 1})
    with pytest.raises(CheckpointError, match=r"asks for torch"):
        load_joblib(data)
    got = load_joblib(data, inert=("torch",))
    assert got["a"] == 1
    assert isinstance(got["t"][0], Omitted)
    with pytest.raises(CheckpointError, match=r"asks for \w+\.system"):
        load_joblib(dump([Calls(os.system, "true")], 4), inert=("torch",))


@pytest.mark.parametrize(
    "value",
    [
        Calls(os.system, "true"),
        Calls(eval, "1"),
        Calls(getattr, {}, "clear"),
        Calls(np.load, "x"),
        Calls(bytearray, 10**12),
        Calls(np.zeros, 10**12),
    ],
    ids=["system", "eval", "getattr", "load", "bytearray", "zeros"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_joblib_file_may_not_call_anything(value: object, protocol: int) -> None:
    with pytest.raises(CheckpointError):
        load_joblib(dump({"a": value}, protocol))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"BZh9",
        b"\xfd7zXZ\x00",
        b"ZF0x",
        b"\x78\x9c" + b"junk",
        b"\x80\x04\x96" + (2**40).to_bytes(8, "little") + b"x.",
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",
        b"\x80\x04\x95" + (2**50).to_bytes(8, "little") + b"N.",
        b"\x80\x04r" + b"\xff\xff\xff\xff" + b".",
        b"\x80\x02Pname\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02(ios\nsystem\n.",
        b"\x80\x02}b.",
    ],
)
def test_a_damaged_joblib_file_is_refused_without_taking_memory(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        load_joblib(data)


@pytest.mark.parametrize("data", [WRITTEN_BY_JOBLIB, joblib_bytes(joblib_value())])
def test_a_joblib_file_cut_or_changed_anywhere_is_refused_or_plain(data: bytes) -> None:
    for stop in range(len(data) - 8):  # the last bytes of a zlib file are its checksum
        with pytest.raises(CheckpointError):
            load_joblib(data[:stop])
    rng = random.Random(3)
    for _ in range(400):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] = rng.randrange(256)
        try:
            load_joblib(bytes(changed))
        except CheckpointError:
            continue


def test_an_array_of_joblib_must_fit_its_bytes() -> None:
    good = joblib_bytes({"a": np.arange(4.0)})
    for wrong in (b"K\x05", b"K\xff"):  # another length
        data = good.replace(b"K\x04\x85", wrong + b"\x85")
        assert data != good
        with pytest.raises(CheckpointError):
            load_joblib(data)
    with pytest.raises(CheckpointError, match="objects in the place of plain numbers"):
        load_joblib(joblib_bytes({"a": np.array([None])}))

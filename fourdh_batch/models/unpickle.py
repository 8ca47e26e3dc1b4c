"""The only place that reads pickles, and nothing in a pickle gets to run.

Body models are published as pickles, many of them written by Python 2 with chumpy objects inside.
A pickle is a program for a small machine that may import and call anything. Here that machine
knows a fixed list of names, and each of them stands for a *sealed* class of this file: plain
Python that checks its arguments and builds a value. NumPy's and SciPy's own unpickling code, which
was never meant for hostile input, is not reached. Every other name ends the reading.

What comes out: numbers, strings, bytes, lists, tuples, dicts, sets, `numpy.ndarray`,
NumPy scalars and dtypes, `scipy.sparse` csc, csr and coo matrices. Arrays hold numbers or strings;
one of objects comes out as the numbers (or, without axes, the dict) that it holds, or is refused. A
chumpy object comes out as
the array that it holds, or as a `ChumpyFormula` where it would have to be computed.

Results of pose engines are written by joblib: a pickle in which the bytes of every array stand
between two opcodes, often compressed as a whole. `load_restricted_joblib` reads them (and plain
pickles) by the same rules, with joblib's own class behind one more sealed name; it can leave out
arrays that nobody needs, such as the vertices of every body.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, ClassVar, NoReturn, cast

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from fourdh_batch.errors import CheckpointError

MAX_PICKLE_BYTES = 512 * 2**20  # the largest published SMPL file has 247 MB
MAX_MEMO_INDEX = 2**22  # the unpickler's memo is an array as long as its highest index
MAX_STRING_CHARS = 2**16  # longest element of a string array
MAX_SKIPPED_BYTES = 2**36  # of arrays that are left out
BLOCK_BYTES = 2**20  # read at once, so that no announced length is allocated before it is there

# Kinds of plain numbers and strings; no records, no dates. `_OBJECT_SPEC` is for `_Array` alone.
_DTYPE_SPEC = re.compile(r"[<>=|]?(?:[biuf][1248]|f16|c(?:8|16)|\?|[bBhHiIlLqQefdFD]|([SaU])(\d+))")

_OBJECT_SPEC = "O8"
_NUMBERS = (bool, int, float, complex, np.number, np.bool_)

_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

# Arguments that are lines of text; pickletools would take them for ASCII with escapes.
_TEXT_LINES = {"STRING": 1, "GLOBAL": 2, "INST": 2}
_OPCODES = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}

UnpicklingError = pickle.UnpicklingError  # what `torch.load` raises, too

# What damaged or hostile bytes make the machine raise.
_FAILURES = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class ChumpyFormula:
    """A chumpy object that holds no array of its own; inert.

    Attributes:
        origin: its class, e.g. ``chumpy.ch_ops.add``.
        fields: the names under which it keeps its operands.
    """

    origin: str
    fields: tuple[str, ...]


def load_restricted_pickle(path_or_file: str | Path | BinaryIO) -> object:
    """Reads a pickle of plain data.

    Args:
        path_or_file: a path, or a binary file positioned at the start of the pickle.
    Returns:
        The object, with chumpy objects replaced by their arrays; see the top of this file.
    Raises:
        CheckpointError: the pickle asks for anything but plain data (the message has the name), is
            damaged, or is larger than `MAX_PICKLE_BYTES`.
        OSError: the file cannot be read.
    """
    if isinstance(path_or_file, (str, Path)):
        with Path(path_or_file).open("rb") as file:
            return _load(file, str(path_or_file))
    return _load(path_or_file, str(getattr(path_or_file, "name", "pickle")))


def _load(file: BinaryIO, name: str) -> object:
    data = file.read(MAX_PICKLE_BYTES + 1)
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{name}: expected at most {MAX_PICKLE_BYTES} bytes, got more")
    try:
        _check_opcodes(data)
        return _plain(_RestrictedUnpickler(io.BytesIO(data), encoding="latin1").load(), {})
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    except _FAILURES as error:
        raise CheckpointError(
            f"{name}: expected a pickle of plain arrays, got {type(error).__name__}: {error}"
        ) from error


def _check_opcodes(data: bytes) -> None:
    """Walks the opcodes without running them, so that no length field is trusted.

    The unpickler allocates what a length or a memo index announces before it looks at the data;
    the readers of `pickletools` only ever slice what is there.
    """
    stream = io.BytesIO(data)
    while True:
        position = stream.tell()
        opcode = _OPCODES.get(stream.read(1))
        if opcode is None:
            raise CheckpointError(f"byte {position}: expected an opcode of a pickle")
        if opcode.name in ("PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER"):
            raise CheckpointError(f"byte {position}: opcode {opcode.name} is not admitted")
        if opcode.name == "STOP":
            return
        if opcode.name in _TEXT_LINES:
            for _ in range(_TEXT_LINES[opcode.name]):
                stream.readline()
        elif opcode.arg is not None:
            argument = opcode.arg.reader(stream)
            if "PUT" in opcode.name and argument > MAX_MEMO_INDEX:
                raise CheckpointError(
                    f"byte {position}: memo index {argument} is above {MAX_MEMO_INDEX}"
                )


class _Sealed(type):
    """Metaclass: a pickle can set attributes on what it was given, but not on these."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise TypeError(f"{cls.__name__} cannot be changed by a pickle")


class _RefusedError(TypeError):
    """An admitted name was used in a way that no writer of plain data uses it."""


class _NdarrayMarker(metaclass=_Sealed):
    """Stands for `numpy.ndarray` as the first argument of `_reconstruct`; cannot be built."""

    def __init__(self) -> None:
        raise _RefusedError("numpy.ndarray is only admitted inside _reconstruct")


class _ObjectMarker(metaclass=_Sealed):
    """Stands for `object` as the second argument of `copyreg._reconstructor`."""

    def __init__(self) -> None:
        raise _RefusedError("object is only admitted inside copyreg._reconstructor")


class _Dtype(metaclass=_Sealed):
    """`numpy.dtype(spec, align, copy)` followed by a state that carries the byte order."""

    def __init__(self, spec: object, align: object = False, copy: object = True) -> None:
        match = _DTYPE_SPEC.fullmatch(spec) if isinstance(spec, str) else None
        if spec == _OBJECT_SPEC:
            self.dtype: np.dtype[Any] = np.dtype(object)
            return
        if match is None or not isinstance(spec, str):
            raise _RefusedError(f"dtype {spec!r} is not a plain number or string")
        if match.group(2) is not None and int(match.group(2)) > MAX_STRING_CHARS:
            raise _RefusedError(f"dtype {spec!r} is longer than {MAX_STRING_CHARS} characters")
        self.dtype = np.dtype("S" + match.group(2) if match.group(1) == "a" else spec)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _version, order, subarray, names, fields = state[:5]
        if not (subarray is None and names is None and fields is None):
            raise _RefusedError("dtypes with fields are not plain numbers")
        if order not in ("<", ">", "=", "|"):
            raise _RefusedError(f"byte order {order!r}")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(cast(Any, order))


class _Array(metaclass=_Sealed):
    """`numpy.core.multiarray._reconstruct(ndarray, (0,), 'b')` followed by the array's state."""

    value: NDArray[Any]
    objects: tuple[object, object] | None = None  # shape and items of an array of objects

    def __init__(self, kind: object, shape: object, typecode: object) -> None:
        if kind is not _NdarrayMarker:
            raise _RefusedError(f"_reconstruct of {kind!r}; only plain numpy.ndarray is admitted")

    def __setstate__(self, state: tuple[object, ...]) -> None:
        shape, dtype, is_fortran, data = state[-4:]
        if isinstance(dtype, _Dtype) and dtype.dtype.hasobject:
            self.objects = shape, data
            return
        order = "F" if is_fortran else "C"
        self.value = _array_from_bytes(data, dtype, shape, order)


class _FromBuffer(metaclass=_Sealed):
    """`numpy.core.numeric._frombuffer(buffer, dtype, shape, order)` of pickle protocol 5."""

    def __init__(self, data: object, dtype: object, shape: object, order: object = "C") -> None:
        self.value = _array_from_bytes(data, dtype, shape, order)


class _Scalar(metaclass=_Sealed):
    """`numpy.core.multiarray.scalar(dtype, data)`."""

    def __init__(self, dtype: object, data: object) -> None:
        self.value = _array_from_bytes(data, dtype, (), "C")[()]


class _Encode(metaclass=_Sealed):
    """`_codecs.encode(text, 'latin1')`, the way Python 3 writes bytes for Python 2."""

    def __new__(cls, text: object, codec: object = "latin1") -> Any:
        if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
            raise _RefusedError(f"_codecs.encode with {codec!r}; only latin1 is admitted")
        return text.encode("latin1")


class _Bytes(metaclass=_Sealed):
    """`bytes()`, the way Python 3 writes empty bytes for Python 2."""

    def __new__(cls) -> Any:
        return b""


class _ByteArray(metaclass=_Sealed):
    """`bytearray(data)`; of a number it would be a way to ask for memory."""

    def __new__(cls, data: object = b"", codec: object = "latin1") -> Any:
        return bytearray(_as_bytes(data))


class _JoblibArray(metaclass=_Sealed):
    """`joblib.numpy_pickle.NumpyArrayWrapper`: says what the bytes after it are."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise _RefusedError(f"an array of joblib with a state of {type(state).__name__}")
        if state.get("subclass") is not _NdarrayMarker:
            raise _RefusedError("an array of joblib that is no plain numpy.ndarray")
        self.state: dict[str, object] = state
        self.value: object = None  # it stays here: a pickle could do more to an array than to us

    def num_bytes(self) -> int:
        """Bytes of the values."""
        shape, dtype = self.state["shape"], self.state["dtype"]
        return math.prod(_checked_shape(shape)) * _plain_dtype(dtype).itemsize

    def array(self, data: bytes) -> NDArray[Any]:
        """The values."""
        return _array_from_bytes(
            data, self.state["dtype"], self.state["shape"], self.state["order"]
        )

    @property
    def is_aligned(self) -> bool:
        """Whether padding and its length stand before the values (joblib 1.2 and newer)."""
        return self.state.get("numpy_array_alignment_bytes") is not None


@dataclass(frozen=True)
class Omitted:
    """Stands for something in a joblib file that was not read; inert.

    Attributes:
        what: the class of an object that is not plain data, or ``array``.
    """

    what: str


class _Inert(metaclass=_Sealed):
    """Swallows the parts of an object that is neither wanted nor plain data."""

    origin: ClassVar[str]

    def __new__(cls, *parts: object) -> Any:
        return object.__new__(cls)

    def __init__(self, *parts: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _SparseMatrix(metaclass=_Sealed):
    """A csc, csr or coo matrix: the `__dict__` that SciPy stored."""

    state: dict[str, object]
    kind: ClassVar[str]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise _RefusedError(f"{self.kind}_matrix with a state of {type(state).__name__}")
        self.state = state


class _CscMatrix(_SparseMatrix):
    kind = "csc"


class _CsrMatrix(_SparseMatrix):
    kind = "csr"


class _CooMatrix(_SparseMatrix):
    kind = "coo"


class _Chumpy(metaclass=_Sealed):
    """Passive stand-in for an object of the chumpy library: keeps the state, computes nothing."""

    state: Mapping[str, object] = MappingProxyType({})
    origin: ClassVar[str]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise _RefusedError(f"{self.origin} with a state of {type(state).__name__}")
        self.state = state


class _Reconstructor(metaclass=_Sealed):
    """`copyreg._reconstructor(cls, object, None)` of protocols 0 and 1."""

    def __new__(cls, kind: object, base: object, state: object) -> Any:
        if base is not _ObjectMarker or state is not None:
            raise _RefusedError("copyreg._reconstructor is only admitted with object and None")
        if not (isinstance(kind, type) and issubclass(kind, (_SparseMatrix, _Chumpy))):
            raise _RefusedError(f"copyreg._reconstructor of {kind!r}")
        return kind.__new__(kind)


_ADMITTED: dict[str, object] = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _NdarrayMarker,
    "copyreg._reconstructor": _Reconstructor,
    "_codecs.encode": _Encode,
    "builtins.object": _ObjectMarker,
    "builtins.bytes": _Bytes,
    "builtins.bytearray": _ByteArray,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "collections.OrderedDict": collections.OrderedDict,
}
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_core}.multiarray._reconstruct"] = _Array
    _ADMITTED[f"{_core}.multiarray.scalar"] = _Scalar
    _ADMITTED[f"{_core}.numeric._frombuffer"] = _FromBuffer
for _sparse in (_CscMatrix, _CsrMatrix, _CooMatrix):
    for _module in (f"scipy.sparse.{_sparse.kind}", f"scipy.sparse._{_sparse.kind}"):
        _ADMITTED[f"{_module}.{_sparse.kind}_matrix"] = _sparse


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _admitted(module, name)


def _admitted(module: str, name: str) -> Any:
    """What stands for a global name.

    Raises:
        CheckpointError: the name is not on the list.
    """
    full_name = f"{_PYTHON_2_MODULES.get(module, module)}.{name}"
    if full_name in _ADMITTED:
        return _ADMITTED[full_name]
    if module == "chumpy" or module.startswith("chumpy."):
        return _Sealed(name, (_Chumpy,), {"origin": full_name})
    raise CheckpointError(f"asks for {full_name}, which is not plain data; nothing of it was run")


class _Inflated(io.RawIOBase):
    """What a zlib or gzip file holds, a block at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._machine = zlib.decompressobj(wbits=47)  # either header

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._machine.eof:
            packed = self._machine.unconsumed_tail or self._file.read(BLOCK_BYTES)
            data = self._machine.decompress(packed, len(buffer))
            buffer[: len(data)] = data
            if data:
                return len(data)
            if not packed:
                raise EOFError("the compressed data is cut off")
        return 0


class _Source:
    """A stream that is read in blocks, up to a total."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._kept = self._skipped = 0

    def read(self, size: int) -> bytes:
        self._kept += size
        if self._kept > MAX_PICKLE_BYTES:
            raise CheckpointError(f"expected at most {MAX_PICKLE_BYTES} bytes of values, got more")
        blocks = []
        while size > 0:
            block = self._file.read(min(size, BLOCK_BYTES))
            if not block:
                raise EOFError("the data is cut off")
            blocks.append(block)
            size -= len(block)
        return b"".join(blocks)

    def readline(self) -> bytes:
        line = self._file.readline(BLOCK_BYTES)
        self._kept += len(line)
        return line

    def skip(self, size: int) -> None:
        self._skipped += size
        if self._skipped > MAX_SKIPPED_BYTES:
            raise CheckpointError(f"expected at most {MAX_SKIPPED_BYTES} bytes left out, got more")
        while size > 0:
            block = self._file.read(min(size, BLOCK_BYTES))
            if not block:
                raise EOFError("the data is cut off")
            size -= len(block)


# The Python version of the unpickler: it hands over between opcodes, and never allocates what
# a length announces before the bytes are there (with `_Source`; but for BYTEARRAY8, see below).
_PythonUnpickler: Any = pickle._Unpickler


_REFUSED_OPCODES = b"".join(
    (
        *(pickle.PERSID, pickle.BINPERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4),
        *(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.INST, pickle.OBJ),
    )
)


class _JoblibUnpickler(_PythonUnpickler):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Any]] = {
        opcode: load
        for opcode, load in _PythonUnpickler.dispatch.items()
        if opcode not in _REFUSED_OPCODES
    }

    def __init__(self, source: _Source, skip: Collection[str], inert: Sequence[str]) -> None:
        super().__init__(source, encoding="latin1")
        self._source = source
        self._skip = skip
        self._inert = tuple(inert)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("joblib.numpy_pickle", "NumpyArrayWrapper"):
            return _JoblibArray
        if module.split(".")[0] in self._inert:
            return _Sealed(str(name), (_Inert,), {"origin": f"{module}.{name}"})
        return _admitted(module, name)

    def load_build(self) -> None:
        super().load_build()
        wrapper = self.stack[-1]
        if not isinstance(wrapper, _JoblibArray):
            return
        size = wrapper.num_bytes()
        if wrapper.is_aligned:
            self._source.read(self._source.read(1)[0])
        key = self.stack[-2] if len(self.stack) > 1 else None
        if isinstance(key, str) and key in self._skip:
            self._source.skip(size)
            wrapper.value = Omitted("array")
        else:
            wrapper.value = wrapper.array(self._source.read(size))

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def load_restricted_joblib(
    path_or_file: str | Path | BinaryIO,
    *,
    skip: Collection[str] = (),
    inert: Sequence[str] = (),
) -> object:
    """Reads plain data from a file of `joblib.dump`, plain or zlib-compressed, or a pickle.

    Args:
        path_or_file: a path, or a binary file positioned at the start.
        skip: keys of dictionaries; arrays of joblib under them are left out and do not count
            towards the size limit.
        inert: top-level packages, such as ``torch``, whose objects are not read but tolerated.
    Returns:
        The object; what was left out is an `Omitted`.
    Raises:
        CheckpointError: the file asks for anything but plain data (the message has the name), is
            damaged, compressed in another way, or holds more than `MAX_PICKLE_BYTES`.
        OSError: the file cannot be read.
    """
    if isinstance(path_or_file, (str, Path)):
        with Path(path_or_file).open("rb") as file:
            return load_restricted_joblib(file, skip=skip, inert=inert)
    name = str(getattr(path_or_file, "name", "pickle"))
    file = io.BufferedReader(cast(Any, path_or_file), BLOCK_BYTES)
    try:
        return _load_joblib(file, skip, inert)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    except (*_FAILURES, zlib.error) as error:
        raise CheckpointError(
            f"{name}: expected a pickle of plain arrays, got {type(error).__name__}: {error}"
        ) from error
    finally:
        file.detach()  # it is the caller's to close


def _load_joblib(file: io.BufferedReader, skip: Collection[str], inert: Sequence[str]) -> object:
    head = file.peek(8)[:8]
    if head[:1] == b"\x78" or head[:2] == b"\x1f\x8b":
        file = io.BufferedReader(_Inflated(cast(BinaryIO, file)), BLOCK_BYTES)
    elif head[:1] != b"\x80":
        raise CheckpointError(
            f"expected a pickle, plain or compressed by zlib or gzip, got {head!r}"
        )
    return _plain(_JoblibUnpickler(_Source(file), skip, inert).load(), {})


def _as_bytes(data: object) -> bytes:
    if isinstance(data, str):  # bytes of Python 2, read with latin1
        return data.encode("latin1")
    if isinstance(data, (bytes, bytearray)):
        return bytes(data)
    raise _RefusedError(f"expected the bytes of an array, got {type(data).__name__}")


def _array_from_bytes(data: object, dtype: object, shape: object, order: object) -> NDArray[Any]:
    """(*shape) array in native byte order that owns its memory; `shape` must fit `data`."""
    kind, shape = _plain_dtype(dtype), _checked_shape(shape)
    if order not in ("C", "F"):
        raise _RefusedError(f"array order {order!r}")
    raw = _as_bytes(data)
    count = len(raw) // kind.itemsize if kind.itemsize else 0
    flat = np.frombuffer(raw, dtype=kind, count=count)
    if count * kind.itemsize != len(raw):
        raise _RefusedError(f"{len(raw)} bytes are no whole number of {kind}")
    return flat.reshape(shape, order=cast(Any, order)).astype(kind.newbyteorder("="), copy=True)


def _plain_dtype(dtype: object) -> np.dtype[Any]:
    """The dtype of values that stand as bytes."""
    if not isinstance(dtype, _Dtype):
        raise _RefusedError(f"expected a dtype, got {type(dtype).__name__}")
    if dtype.dtype.hasobject:
        raise _RefusedError("objects in the place of plain numbers or strings")
    return dtype.dtype


def _checked_shape(shape: object) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise _RefusedError(f"expected a shape, got {shape!r}")
    return shape


def _array_of_objects(shape: object, items: object) -> NDArray[Any]:
    """The numbers of an array of objects, which holds numbers, or plain arrays of one shape.

    Returns:
        An array of `shape`, then the axes of those arrays.
    """
    shape = _checked_shape(shape)
    if not isinstance(items, list) or len(items) != math.prod(shape):
        raise _RefusedError(f"an array of objects without {math.prod(shape)} items")
    values: list[Any] = []
    for item in items:
        if isinstance(item, _Array) and item.objects is not None:
            raise _RefusedError("an array of objects inside another")
        value = item.value if isinstance(item, (_Array, _FromBuffer, _Scalar)) else item
        is_plain = isinstance(value, np.ndarray) and value.dtype.kind in "biufc"
        if not is_plain and not isinstance(value, _NUMBERS):
            raise _RefusedError(f"an array of objects that holds a {type(value).__name__}")
        values.append(value)
    shapes = {np.shape(value) for value in values}
    if len(shapes) > 1:
        raise _RefusedError(f"an array of objects of several shapes, such as {sorted(shapes)[:2]}")
    inner = shapes.pop() if shapes else ()
    if math.prod(inner) * len(values) * np.dtype(complex).itemsize > MAX_PICKLE_BYTES:
        raise _RefusedError(f"an array of objects of more than {MAX_PICKLE_BYTES} bytes")
    result: NDArray[Any] = np.array(values)
    if result.dtype.hasobject:
        raise _RefusedError("an array of objects with a number that is too large")
    return result.reshape((*shape, *inner))


def _plain(value: object, done: dict[int, tuple[object, object]]) -> object:
    """Replaces the stand-ins by what they stand for; shared and circular parts stay shared.

    Args:
        value: anything the unpickler returned.
        done: per id the original (kept alive, so that ids stay unique) and its replacement.
    """
    if id(value) in done:
        return done[id(value)][1]
    result: object
    if isinstance(value, dict):
        mapping = type(value)()
        done[id(value)] = value, mapping
        mapping.update((_plain(k, done), _plain(v, done)) for k, v in value.items())
        return mapping
    if isinstance(value, list):
        items: list[object] = []
        done[id(value)] = value, items
        items.extend(_plain(item, done) for item in value)
        return items
    if isinstance(value, (tuple, set, frozenset)):
        result = type(value)(_plain(item, done) for item in value)
    elif isinstance(value, _Array) and value.objects is not None:
        shape, held = value.objects
        if shape == () and isinstance(held, list) and len(held) == 1 and type(held[0]) is dict:
            result = _plain(held[0], done)  # NumPy's way of holding a dict
        else:
            result = _array_of_objects(shape, held)
    elif isinstance(value, (_Array, _FromBuffer, _Scalar)):
        result = value.value
    elif isinstance(value, _Dtype):
        result = value.dtype
    elif isinstance(value, _Inert):
        result = Omitted(value.origin)
    elif isinstance(value, _JoblibArray):
        result = value.value
    elif isinstance(value, _SparseMatrix):
        result = _sparse_matrix(value, done)
    elif isinstance(value, _Chumpy):
        result = _chumpy_array(value, done)
    elif isinstance(value, type):
        raise CheckpointError("holds a class instead of a value")
    else:
        result = value
    done[id(value)] = value, result
    return result


def _sparse_matrix(
    stored: _SparseMatrix, done: dict[int, tuple[object, object]]
) -> scipy.sparse.spmatrix[Any]:
    state: dict[str, Any] = {key: _plain(item, done) for key, item in stored.state.items()}
    rows, columns = state["_shape"]
    shape = int(rows), int(columns)
    if isinstance(stored, _CooMatrix):
        row, col = state["coords"] if "coords" in state else (state["row"], state["col"])
        return scipy.sparse.coo_matrix((state["data"], (row, col)), shape=shape)
    parts = (state["data"], state["indices"], state["indptr"])
    matrix: scipy.sparse.csc_matrix[Any] | scipy.sparse.csr_matrix[Any]
    if isinstance(stored, _CscMatrix):
        matrix = scipy.sparse.csc_matrix(parts, shape=shape)
    else:
        matrix = scipy.sparse.csr_matrix(parts, shape=shape)
    matrix.check_format(full_check=True)
    return matrix


def _chumpy_array(
    stored: _Chumpy, done: dict[int, tuple[object, object]]
) -> NDArray[Any] | ChumpyFormula:
    """The array that a chumpy object holds, or the name of what it would compute.

    A plain `Ch` has its array under `x`. A `Select` picks `idxs` of the flattened `a` and may then
    take a `preferred_shape`.
    """
    formula = ChumpyFormula(stored.origin, tuple(sorted(map(str, stored.state))))
    done[id(stored)] = stored, formula  # what an object that contains itself finds
    state = stored.state
    if stored.origin.endswith(".Select") and "a" in state and "idxs" in state:
        source, idxs = _plain(state["a"], done), np.asarray(_plain(state["idxs"], done))
        if not isinstance(source, np.ndarray) or idxs.dtype.kind not in "iu":
            return formula
        picked: NDArray[Any] = source.ravel()[idxs]
        shape = state.get("preferred_shape")
        return picked if shape is None else picked.reshape(cast(Any, _plain(shape, done)))
    value = _plain(state.get("x"), done)
    return np.asarray(value) if isinstance(value, (np.ndarray, np.generic)) else formula

"""The state of a video in the middle, as bytes: arrays, numbers and text in lists and dicts.

No pickle: a JSON outline whose leaves point into an `.npz` of plain arrays, compressed.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fourdh_batch.errors import StorageError

_ARRAY, _BYTES = "array", "bytes"
_OUTLINE = "outline"


def pack_state(state: Mapping[str, Any]) -> bytes:
    """Bytes of nested dicts with text as keys, lists, tuples (which become lists), arrays, numbers.

    Raises:
        TypeError: something else is inside.
    """
    arrays: dict[str, NDArray[Any]] = {}

    def keep(kind: str, array: Any) -> dict[str, Any]:
        name = f"a{len(arrays)}"
        arrays[name] = array
        return {kind: name}

    def outline(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                raise TypeError(f"expected plain arrays, got {value.dtype}")
            return keep(_ARRAY, value)
        if isinstance(value, bytes):
            return keep(_BYTES, np.frombuffer(value, np.uint8))
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Mapping):
            return {"dict": [[outline(key), outline(item)] for key, item in value.items()]}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [outline(item) for item in value]
        if value is None or isinstance(value, (str, int, float)):
            return value
        raise TypeError(f"expected arrays, numbers and text, got {type(value).__name__}")

    text = json.dumps(outline(state)).encode()
    stream = io.BytesIO()
    arrays[_OUTLINE] = np.frombuffer(text, np.uint8)
    np.savez(stream, allow_pickle=False, **arrays)
    size = len(stream.getvalue())
    packed: bytes = pa.compress(stream.getvalue(), codec="zstd", asbytes=True)
    return size.to_bytes(8, "little") + packed


def unpack_state(data: bytes) -> dict[str, Any]:
    """What `pack_state` was given.

    Raises:
        StorageError: the bytes are damaged.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        raw = pa.decompress(data[8:], decompressed_size=size, codec="zstd", asbytes=True)
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        text = json.loads(arrays[_OUTLINE].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, OverflowError) as error:
        raise StorageError(f"checkpoint: damaged: {error}") from error

    def build(node: Any) -> Any:
        if isinstance(node, list):
            return [build(item) for item in node]
        if not isinstance(node, dict):
            return node
        if _ARRAY in node:
            return arrays[node[_ARRAY]]
        if _BYTES in node:
            return arrays[node[_BYTES]].tobytes()
        return {build(key): build(item) for key, item in node["dict"]}

    state: dict[str, Any] = build(text)
    return state

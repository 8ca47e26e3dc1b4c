from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fourdh_batch.errors import StorageError
from fourdh_batch.pipeline.checkpoint import pack_state, unpack_state

dtypes = st.sampled_from(["<f4", "<f8", "<i8", "u1", "?", "<f2", "<U3"])
arrays = dtypes.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), arrays
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(), st.integers()), inner, max_size=3),
    ),
    max_leaves=8,
)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)


@given(st.dictionaries(st.text(), trees, max_size=3))
def test_a_state_comes_back_as_it_was(state: dict[str, Any]) -> None:
    assert_same(unpack_state(pack_state(state)), state)


def test_numbers_of_numpy_become_plain_and_tuples_lists() -> None:
    assert unpack_state(pack_state({"n": np.int64(3), "t": (1, 2)})) == {"n": 3, "t": [1, 2]}


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()])])
def test_what_is_no_plain_data_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="expected"):
        pack_state({"x": value})


@pytest.mark.parametrize("cut", [0, 4, 9, 40, -1])
def test_damaged_bytes_are_a_storage_error(cut: int) -> None:
    data = pack_state({"x": np.arange(100), "y": "text"})
    with pytest.raises(StorageError, match="damaged"):
        unpack_state(data[:cut])

"""Published tables to pandas or Arrow, and their columns back to arrays with shapes.

`pd.read_parquet("<root>/tracks")` is right, too. What is added here: only committed shards,
filters by dataset and video that open only the objects that hold them, older schema versions, and
a fresh start where an object is overwritten during the read (object stores then raise or hand out
the new one; none was seen to hand out a mix).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fourdh_batch.errors import SchemaError, StorageError
from fourdh_batch.storage import Store, redact_uri, safe_key
from fourdh_batch.tables.manifest import read_commits
from fourdh_batch.tables.schema import arrow_schema, schema_version, table_schema

READ_ATTEMPTS = 5
READ_BACKOFF_S = 0.5  # doubles; a shard's objects are overwritten within seconds
RELEASE_KEY = "_release.json"  # the manifest of a release, see `release.py`
# Lies in every table of a release until it is finished, and is no Parquet file: pandas, Arrow and
# DuckDB then refuse the whole table.
UNFINISHED = "UNFINISHED.parquet"


def read_arrow(
    root: str,
    name: str,
    *,
    columns: Sequence[str] | None = None,
    filters: Any = None,
    dataset: str | Sequence[str] | None = None,
    video_id: str | Sequence[str] | None = None,
    committed_only: bool = True,
) -> Any:
    """A table of an output root as a `pyarrow.Table`.

    Args:
        root: output root, local or remote.
        name: of the table.
        columns: to read, in this order; all by default.
        filters: as for `pd.read_parquet`: tuples such as `[("score", ">", 0.8)]`, or a
            `pyarrow.compute` expression.
        dataset, video_id: only rows of these; opens only the objects that hold them.
        committed_only: leave out shards without a commit record.
    Returns:
        Rows ordered by dataset, shard, and the schema's order within a shard.
    Raises:
        FileNotFoundError: nothing was ever committed (or lies) below this root.
        SchemaError: unknown table or column, or objects that do not fit the schema.
        StorageError: the objects could not be read, or kept changing.
    """
    schema = arrow_schema(name)
    unknown = sorted(set(columns or ()) - set(schema.names))
    if unknown:
        raise SchemaError(f"{name}: expected columns among {schema.names}, got {unknown}")
    datasets, videos = _as_list(dataset), _as_list(video_id)
    expression = _expression(schema, filters, datasets, videos)
    store = Store(root)
    for attempt in range(READ_ATTEMPTS):
        try:
            keys = (
                _committed_objects(store, name, datasets, videos)
                if committed_only
                else _all_objects(store, name, datasets)
            )
            table = _scan(store, schema, keys, columns, expression)
            break
        except _NothingThereError:
            raise
        except (OSError, pa.ArrowInvalid) as error:
            if attempt == READ_ATTEMPTS - 1:
                raise StorageError(f"{redact_uri(root)}: {name} not readable: {error}") from error
            time.sleep(READ_BACKOFF_S * 2**attempt)
    for field in table.schema:
        if not field.nullable and table.column(field.name).null_count:
            raise SchemaError(f"{name}.{field.name}: expected in every object, but some lack it")
    return table


def read_table(
    root: str,
    name: str,
    *,
    columns: Sequence[str] | None = None,
    filters: Any = None,
    dataset: str | Sequence[str] | None = None,
    video_id: str | Sequence[str] | None = None,
    committed_only: bool = True,
) -> pd.DataFrame:
    """A table of an output root as a data frame; see `read_arrow`."""
    table = read_arrow(
        root,
        name,
        columns=columns,
        filters=filters,
        dataset=dataset,
        video_id=video_id,
        committed_only=committed_only,
    )
    frame: pd.DataFrame = table.to_pandas()
    return frame


def read_tracks(
    root: str,
    *,
    columns: Sequence[str] | None = None,
    filters: Any = None,
    dataset: str | Sequence[str] | None = None,
    video_id: str | Sequence[str] | None = None,
    committed_only: bool = True,
) -> pd.DataFrame:
    """The `tracks` of an output root as a data frame; see `read_arrow`."""
    return read_table(
        root,
        "tracks",
        columns=columns,
        filters=filters,
        dataset=dataset,
        video_id=video_id,
        committed_only=committed_only,
    )


def smpl_arrays(rows: Any) -> dict[str, NDArray[Any]]:
    """Columns of `tracks` that have a shape, as arrays.

    Args:
        rows: M rows of `tracks`: a data frame, however read, or a `pyarrow.Table`.
    Returns:
        By column name, writable arrays (M, *shape): `global_orient` (M, 1, 3, 3), `body_pose`
        (M, 23, 3, 3), `betas` (M, 10), `cam_t_m` (M, 3), and so on for those that are there.
        Null is NaN.
    Raises:
        SchemaError: a column does not hold lists of the schema's length.
    """
    names = set(rows.column_names if isinstance(rows, pa.Table) else rows.columns)
    arrays: dict[str, NDArray[Any]] = {}
    for column in table_schema("tracks").columns:
        if not column.shape or column.name not in names:
            continue
        element = column.arrow_type.value_type
        try:
            values = rows[column.name]
            if not isinstance(values, pa.ChunkedArray):
                values = pa.array(values, type=pa.list_(element, column.size))
            if isinstance(values, pa.ChunkedArray):
                values = values.combine_chunks()
            if values.type != column.arrow_type:
                values = values.cast(pa.list_(element, column.size))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise SchemaError(
                f"tracks.{column.name}: expected lists of {column.size} {column.type}, got {error}"
            ) from error
        present = values.is_valid().to_numpy(zero_copy_only=False)
        flat = values.flatten().to_numpy(zero_copy_only=False)  # without the null rows
        shape = (len(values), *column.shape)
        if present.all():
            arrays[column.name] = flat.reshape(shape).copy()
        else:
            filled = np.full(shape, np.nan, dtype=flat.dtype)
            filled[present] = flat.reshape(-1, *column.shape)
            arrays[column.name] = filled
    return arrays


# --- which objects, which rows -----------------------------------------------------------------


class _NothingThereError(FileNotFoundError):
    """Not worth another attempt."""


def _as_list(value: str | Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    return [value] if isinstance(value, str) else list(value)


def _expression(
    schema: Any, filters: Any, datasets: list[str] | None, videos: list[str] | None
) -> Any:
    """All conditions as one expression, tried on no rows so that mistakes show at once."""
    parts = []
    if filters is not None:
        parts.append(
            filters if isinstance(filters, pc.Expression) else pq.filters_to_expression(filters)
        )
    for column, wanted in (("dataset", datasets), ("video_id", videos)):
        if wanted is not None:
            parts.append(pc.field(column).isin(pa.array(wanted, pa.string())))
    if not parts:
        return None
    expression = parts[0]
    for part in parts[1:]:
        expression = expression & part
    try:
        schema.empty_table().filter(expression)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise SchemaError(f"filters do not fit the table: {error}") from error
    return expression


def _committed_objects(
    store: Store, name: str, datasets: list[str] | None, videos: list[str] | None
) -> list[str]:
    commits = read_commits(store)
    sizes = dict(store.list(name))  # after the records: what they name is there already
    _refuse_unfinished(store, name, sizes)
    if not commits:
        raise _NothingThereError(
            errno.ENOENT,
            "no commit record: not an output root, or nothing is finished",
            redact_uri(store.root),
        )
    keys = []
    for record in commits.values():
        if datasets is not None and record.dataset not in datasets:
            continue
        if videos is not None and not {v.video_id for v in record.videos} & set(videos):
            continue
        if record.schema_versions[name] > schema_version(name):
            raise SchemaError(
                f"shard {record.shard_id}: expected {name} of version {schema_version(name)} or "
                f"older, got {record.schema_versions[name]}; it needs a newer fourdh_batch"
            )
        stored = record.objects[name]
        if sizes.get(stored.key) != stored.num_bytes:
            raise StorageError(
                f"shard {record.shard_id}: {stored.key}: expected {stored.num_bytes} bytes by its "
                f"commit record, got {sizes.get(stored.key)}; it is being overwritten, or an "
                "interrupted run has to be resumed"
            )
        if stored.num_rows:
            keys.append(stored.key)
    return sorted(keys)


def _refuse_unfinished(store: Store, name: str, stored: Mapping[str, int]) -> None:
    if f"{name}/{UNFINISHED}" in stored:
        raise _NothingThereError(
            errno.ENOENT,
            "this release is not finished; give the command that began it again",
            redact_uri(store.root),
        )


def _all_objects(store: Store, name: str, datasets: list[str] | None) -> list[str]:
    stored = dict(store.list(name))
    _refuse_unfinished(store, name, stored)
    keys = [
        key
        for key in stored
        if key.endswith(".parquet")
        and not any(part.startswith((".", "_")) for part in key.split("/"))
    ]
    if not keys:
        raise _NothingThereError(errno.ENOENT, f"no objects of {name}", redact_uri(store.root))
    if datasets is not None:
        folders = {safe_key(dataset) for dataset in datasets}
        keys = [key for key in keys if key.split("/")[1] in folders]
    return sorted(keys)


def _scan(
    store: Store, schema: Any, keys: list[str], columns: Sequence[str] | None, expression: Any
) -> Any:
    wanted = list(schema.names if columns is None else columns)
    if not keys:
        return schema.empty_table().select(wanted)
    remote, base = store.filesystem()
    filesystem = (
        pyarrow.fs.LocalFileSystem()
        if remote is None
        else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(remote))
    )
    paths = [f"{base}/{key}" for key in keys]
    objects = ds.dataset(paths, schema=schema, format="parquet", filesystem=filesystem)
    return objects.to_table(columns=wanted, filter=expression)

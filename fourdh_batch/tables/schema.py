"""`schemas/<table>.yaml` to Arrow schemas, to tables that are checked, and to `docs/TABLES.md`.

The YAML is the source of truth. Evolution is compatible only: a new version may add nullable
columns (each with the version that brought it, `since`), so every older file stays readable.

Columns with a shape are fixed-size lists of the flattened, C-ordered values; the shape stands in
the field's metadata. In what is handed to `make_table`, null is NaN in nullable float columns, a
masked value of a masked array, or None in a sequence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from fourdh_batch.errors import SchemaError

VIDEO_IDS = b"video_ids"  # in the metadata of a file, a JSON list
TABLES = ("tracks", "detections", "videos", "failures")

_TYPES: dict[str, Any] = {
    "string": pa.string(),
    "binary": pa.binary(),
    "bool": pa.bool_(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}
_DTYPES: dict[str, type[np.generic]] = {
    "int64": np.int64,
    "float32": np.float32,
    "float64": np.float64,
}


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Attributes:
        name: of the column.
        type: ``string``, ``binary``, ``bool``, ``int64``, ``float32`` or ``float64``.
        meaning: what it holds.
        source: the step that makes it.
        shape: of one value; () for a scalar.
        unit: physical unit, "" where it has none.
        frame: frame of reference, "" where it has none.
        nullable: whether a value may be missing.
        values: the only allowed strings; empty: any.
        since: schema version that brought it.
    """

    name: str
    type: str
    meaning: str
    source: str
    shape: tuple[int, ...] = ()
    unit: str = ""
    frame: str = ""
    nullable: bool = False
    values: tuple[str, ...] = ()
    since: int = 1

    @property
    def size(self) -> int:
        """Number of values of one row."""
        return math.prod(self.shape)

    @property
    def arrow_type(self) -> Any:
        scalar = _TYPES[self.type]
        if not self.shape:
            return scalar
        return pa.list_(pa.field("element", scalar, nullable=False), self.size)

    @property
    def arrow_field(self) -> Any:
        metadata = {"meaning": self.meaning, "source": self.source}
        if self.shape:
            metadata["shape"] = ",".join(map(str, self.shape))
        if self.unit:
            metadata["unit"] = self.unit
        if self.frame:
            metadata["frame"] = self.frame
        return pa.field(self.name, self.arrow_type, nullable=self.nullable, metadata=metadata)


@dataclass(frozen=True, slots=True)
class TableSchema:
    """One table: its columns, their version, and the columns that order its rows."""

    table: str
    version: int
    meaning: str
    order: tuple[str, ...]
    columns: tuple[Column, ...]


def _schema_folder() -> Path:
    in_wheel = Path(__file__).resolve().parents[1] / "_schemas"
    return in_wheel if in_wheel.is_dir() else Path(__file__).resolve().parents[2] / "schemas"


@cache
def table_schema(name: str) -> TableSchema:
    """The schema of a table.

    Raises:
        SchemaError: there is no such table.
    """
    if name not in TABLES:
        raise SchemaError(f"expected one of the tables {', '.join(TABLES)}, got {name!r}")
    raw = yaml.safe_load((_schema_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    columns = tuple(
        Column(**{**c, "shape": tuple(c.get("shape", ())), "values": tuple(c.get("values", ()))})
        for c in raw["columns"]
    )
    return TableSchema(raw["table"], raw["version"], raw["meaning"], tuple(raw["order"]), columns)


def schema_version(name: str) -> int:
    """Version of a table's schema."""
    return table_schema(name).version


@cache
def arrow_schema(name: str) -> Any:
    """The `pyarrow.Schema` of a table, with shapes, units and meanings in its metadata."""
    schema = table_schema(name)
    metadata = {"table": name, "schema_version": str(schema.version)}
    return pa.schema([column.arrow_field for column in schema.columns], metadata=metadata)


def make_table(
    name: str, columns: Mapping[str, Any | Sequence[Any]], *, num_rows: int | None = None
) -> Any:
    """A checked `pyarrow.Table` in the schema's column order.

    Args:
        name: of the table.
        columns: per column an array (N, *shape), a sequence of N values, or one value (a scalar,
            or an array of exactly the column's shape) for all rows. Nullable columns may be left
            out: they become null. Arrays of the right type are not copied.
        num_rows: N; needed only where no column has N values of its own.

    Raises:
        SchemaError: a column is missing, unknown, of the wrong shape or type, holds null, NaN or
            infinity where it must not, or a string that is not allowed.
    """
    schema = table_schema(name)
    unknown = sorted(set(columns) - {column.name for column in schema.columns})
    missing = [c.name for c in schema.columns if not c.nullable and c.name not in columns]
    if unknown or missing:
        raise SchemaError(f"{name}: unknown columns {unknown}, missing columns {missing}")
    if num_rows is None:
        num_rows = _num_rows(schema, columns)
    arrays = [
        pa.nulls(num_rows, column.arrow_type)
        if columns.get(column.name) is None
        else _make_array(f"{name}.{column.name}", column, columns[column.name], num_rows)
        for column in schema.columns
    ]
    table = pa.Table.from_arrays(arrays, schema=arrow_schema(name))
    _check_values(schema, table)
    return table


def with_video_ids(table: Any, video_ids: Sequence[str]) -> Any:
    """The table, with the ids of all its videos, those without a row among them, beside it."""
    told = json.dumps(list(video_ids)).encode()
    return table.replace_schema_metadata({**(table.schema.metadata or {}), VIDEO_IDS: told})


def video_ids_of(schema: Any) -> list[str]:
    """What `with_video_ids` told; empty where nothing was told.

    Raises:
        SchemaError: it is no list of texts.
    """
    text = (schema.metadata or {}).get(VIDEO_IDS, b"[]")
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    if not isinstance(told, list) or not all(isinstance(name, str) for name in told):
        raise SchemaError(f"metadata {VIDEO_IDS.decode()}: expected a list of ids, got {text!r}")
    return told


def check_table(name: str, table: Any) -> None:
    """Check columns, types, nulls, NaN and allowed values of a finished table.

    Raises:
        SchemaError: says what was expected and what came.
    """
    expected = {field.name: str(field) for field in arrow_schema(name)}
    got = {field.name: str(field) for field in table.schema}
    if got != expected:
        raise SchemaError(
            f"{name}: expected {sorted(set(expected.values()) - set(got.values()))}, "
            f"got {sorted(set(got.values()) - set(expected.values()))}"
        )
    if list(got) != list(expected):
        raise SchemaError(f"{name}: expected columns in the order {list(expected)}")
    _check_values(table_schema(name), table)


def _is_per_row(column: Column, value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == len(column.shape) + 1
    if isinstance(value, pa.Array | pa.ChunkedArray):
        return True
    return not column.shape and isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _num_rows(schema: TableSchema, columns: Mapping[str, Any]) -> int:
    for column in schema.columns:
        value = columns.get(column.name)
        if value is not None and _is_per_row(column, value):
            return len(value)
    raise SchemaError(f"{schema.table}: num_rows is needed where every column has a single value")


def _make_array(where: str, column: Column, value: Any, num_rows: int) -> Any:
    if isinstance(value, pa.Array | pa.ChunkedArray):
        if value.type != column.arrow_type or len(value) != num_rows:
            raise SchemaError(
                f"{where}: expected {num_rows} of {column.arrow_type}, "
                f"got {len(value)} of {value.type}"
            )
        return value
    if column.type in _DTYPES and (column.shape or isinstance(value, np.ndarray)):
        return _numeric_array(where, column, value, num_rows)
    per_row = _is_per_row(column, value)
    try:
        if not per_row:
            return pa.repeat(pa.scalar(value, type=column.arrow_type), num_rows)
        if len(value) != num_rows:
            raise SchemaError(f"{where}: expected {num_rows} values, got {len(value)}")
        return pa.array(value, type=column.arrow_type, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError, OverflowError) as error:
        raise SchemaError(f"{where}: expected {column.type}, got {error}") from error


def _numeric_array(where: str, column: Column, value: Any, num_rows: int) -> Any:
    dtype = np.dtype(_DTYPES[column.type])
    array = np.ma.asanyarray(value)
    expected = (num_rows, *column.shape)
    if array.shape == column.shape:
        array = np.broadcast_to(array, expected, subok=True)
    if array.shape != expected or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise SchemaError(f"{where}: expected {expected} {dtype}, got {array.shape} {array.dtype}")
    flat = np.ascontiguousarray(np.ma.getdata(array), dtype=dtype).reshape(-1)
    absent = np.ma.getmaskarray(array).reshape(-1)
    if column.nullable and dtype.kind == "f":
        absent = absent | np.isnan(flat)
    missing = None
    if absent.any():
        rows = absent.reshape(num_rows, -1)
        missing = rows.any(axis=1)
        if not np.array_equal(missing, rows.all(axis=1)):
            raise SchemaError(f"{where}: a row must be null in all of its values or in none")
    if not column.shape:
        return pa.array(flat, type=column.arrow_type, mask=missing)
    mask = None if missing is None else pa.array(missing)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=column.arrow_type, mask=mask)


def _check_values(schema: TableSchema, table: Any) -> None:
    """Nulls, NaN and infinity, and strings that are not allowed."""
    for column in schema.columns:
        where = f"{schema.table}.{column.name}"
        data = table.column(column.name)
        if data.null_count and not column.nullable:
            raise SchemaError(f"{where}: expected no null, got {data.null_count} in {len(data)}")
        if column.values:
            strange = set(pc.unique(data).to_pylist()) - {*column.values, None}
            if strange:
                raise SchemaError(
                    f"{where}: expected one of {list(column.values)}, got {sorted(strange)}"
                )
        if column.type.startswith("float"):
            flat = pc.list_flatten(data) if column.shape else data
            if not pc.all(pc.is_finite(flat), min_count=0).as_py():
                raise SchemaError(f"{where}: expected finite values, got NaN or infinity")


def tables_markdown() -> str:
    """`docs/TABLES.md`: every table and column, from the YAML."""
    lines = [
        "# Tables",
        "",
        "Made from `schemas/*.yaml` by",
        "",
        "```sh",
        "python -c 'import sys; from fourdh_batch.tables.schema import tables_markdown; "
        "sys.stdout.write(tables_markdown())' > docs/TABLES.md",
        "```",
        "",
        "Columns with a shape are fixed-size lists of the flattened values in C order "
        "(`fourdh_batch.smpl_arrays` gives them their shape back). Image axes: x right, y down, "
        "integer coordinates are pixel centres. Camera axes: x right, y down, z forward. "
        "A new version only adds nullable columns; files of older versions read with null there.",
    ]
    for name in TABLES:
        schema = table_schema(name)
        lines += [
            "",
            f"## {name} (version {schema.version})",
            "",
            f"{schema.meaning} Rows are ordered by {', '.join(schema.order)} within a file.",
            "",
            "| column | type | unit | frame of reference | null | meaning | source |",
            "|---|---|---|---|---|---|---|",
        ]
        for column in schema.columns:
            shape = f" [{', '.join(map(str, column.shape))}]" if column.shape else ""
            values = f" ({', '.join(column.values)})" if column.values else ""
            since = f" (since version {column.since})" if column.since > 1 else ""
            cells = [
                f"`{column.name}`",
                column.type + shape,
                column.unit,
                column.frame,
                "yes" if column.nullable else "",
                column.meaning + values + since,
                column.source,
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"

"""Every number of a report as one table: a row for each tap, mode and program; as CSV, Parquet or a DataFrame.

Columns have the names of the report's JSON: ``distance.noise.row`` is ``taps[].distance.noise.row`` there.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import types
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dsv4_convert.errors import UsageError
from dsv4_convert.parity.report.data import ParityReport, TapResult, plain

if TYPE_CHECKING:
    import pandas as pd

_INSTALL = "pip install 'dsv4-convert[frame]'"
#: The first columns. Everything else is a field of a tap's result.
_FIRST: dict[str, type] = {"program": str, "name": str, "layer": int, "tap": str}


def columns() -> dict[str, type]:
    """Name and type of every column: text, integers or floats. Lists, such as shapes, are text."""
    return _FIRST | {name: kind for name, kind in _fields(TapResult) if not name.startswith("key.")}


def rows(report: ParityReport) -> Iterator[dict[str, Any]]:
    """A row for every tap of a report, None for what was not measured."""
    for part in report.programs or (report,):
        program = None if part.program is None else part.program.program
        for tap in part.taps:
            first = {"program": program, "name": tap.name, "layer": tap.layer, "tap": tap.short}
            values = first | dict(_values(tap))
            yield {name: values.get(name) for name in columns()}


def to_csv(report: ParityReport) -> str:
    """The table as CSV, with a header; empty cells for what was not measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(report))
    return text.getvalue()


def to_parquet(report: ParityReport) -> bytes:
    """The table as a Parquet file. Raises :class:`UsageError` without pyarrow."""
    check_parquet()
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    table = list(rows(report))
    arrays = {name: pa.array([row[name] for row in table], kinds[kind]) for name, kind in columns().items()}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays), buffer)
    return bytes(buffer.getvalue())


def check_parquet() -> None:
    """Raise :class:`UsageError` without pyarrow."""
    _require("pyarrow", "a Parquet file")


def to_frame(report: ParityReport) -> pd.DataFrame:
    """The table as a DataFrame. Raises :class:`UsageError` without pandas."""
    _require("pandas", "a DataFrame")
    import pandas as pd

    kinds = {str: "string", int: "Int64", float: "float64"}
    table = list(rows(report))
    return pd.DataFrame(
        {name: pd.array([row[name] for row in table], dtype=kinds[kind]) for name, kind in columns().items()}
    )


def _require(package: str, what: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise UsageError(f"{what} needs the package {package}: {_INSTALL}")


def _fields(kind: Any) -> Iterator[tuple[str, type]]:
    """The fields of a dataclass and of those in it, by dotted names."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        (hint, *_) = [each for each in _members(hints[field.name]) if each is not type(None)]
        if dataclasses.is_dataclass(hint):
            yield from ((f"{field.name}.{name}", of) for name, of in _fields(hint))
        else:
            yield field.name, hint if hint in (int, float) else str


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _values(value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        of = getattr(value, field.name)
        if dataclasses.is_dataclass(of):
            yield from ((f"{field.name}.{name}", each) for name, each in _values(of))
        elif isinstance(of, tuple):
            yield field.name, json.dumps(plain(of))
        else:
            yield field.name, of

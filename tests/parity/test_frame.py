"""The table of a report's numbers: CSV, Parquet and DataFrame hold what the JSON holds."""

from __future__ import annotations

import csv
import io
import json
import math
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.errors import UsageError
from dsv4_convert.parity.report.data import ParityReport, TapResult
from dsv4_convert.parity.report.frame import columns, rows, to_csv, to_parquet
from dsv4_convert.spec.taps import TapKey

from ..cli.samples import samples
from .synthetic import choice, empty, real, report


@pytest.fixture
def some() -> ParityReport:
    infinite = real("layers.1.attn.q", math.inf, math.nan, 3.0)
    return report(
        [
            real("layers.0.attn.q", 0.25, 1.5, 3.0),
            infinite,
            choice("layers.1.ffn.gate.experts", 2),
            empty("layers.1.attn.q_norm"),
        ]
    )


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested JSON by dotted path; lists as text."""
    if isinstance(value, dict):
        return {name: leaf for key, item in value.items() for name, leaf in flat(item, f"{path}.{key}").items()}
    return {path.removeprefix("."): json.dumps(value) if isinstance(value, list) else value}


def test_every_field_of_a_tap_is_a_column() -> None:
    known: dict[Any, Any] = {TapKey: TapKey.parse("layers.3.attn.q")}
    leaves = {name for one in samples(TapResult, known) for name in flat(json.loads(json.dumps(one, default=_plain)))}
    assert leaves - {"key", "distance", "flips", "systematic"} <= set(columns())
    assert not [name for name in columns() if name.startswith("key")]


def _plain(value: Any) -> Any:
    return (
        {name: getattr(value, name) for name in value.__dataclass_fields__}
        if not isinstance(value, TapKey)
        else str(value)
    )


def test_the_rows_are_the_taps_of_the_json(some: ParityReport) -> None:
    of_json = [flat(tap) for tap in some.to_json("")["taps"]]
    for row, tap in zip(rows(some), of_json, strict=True):
        for name, value in tap.items():
            if value is not None:
                found = row[name]
                assert str(found) == value if isinstance(found, float) and not math.isfinite(found) else found == value


def test_csv_holds_every_digit(some: ParityReport) -> None:
    table = list(csv.DictReader(io.StringIO(to_csv(some))))
    assert list(table[0]) == list(columns())
    for line, row in zip(table, rows(some), strict=True):
        for name, kind in columns().items():
            assert line[name] == "" if row[name] is None else str(kind(line[name])) == str(row[name])


def test_a_frame_and_parquet_hold_the_same(some: ParityReport) -> None:
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = some.to_frame()
    assert list(frame.columns) == list(columns())
    assert frame["layer"].dtype == "Int64"
    assert frame["distance.noise.row"][0] == 1.5
    assert frame[frame["verdict"] == "tie"]["flips.tokens"].tolist() == [2]
    again = pd.read_parquet(io.BytesIO(to_parquet(some)))
    assert again["distance.noise.tap"][1] == math.inf
    for name in columns():
        for one, other in zip(frame[name], again[name], strict=True):
            assert (pd.isna(one) and pd.isna(other)) or one == other, name


def test_without_the_packages(some: ParityReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"DataFrame needs the package pandas: pip install 'dsv4-convert\[frame\]'"):
        some.to_frame()
    golden = Path(__file__).parents[2] / "golden" / "data" / "tiny"
    (tmp_path / "dsv4_manifest.json").write_text("{}")
    words = ["parity", str(tmp_path), "--golden", str(golden), "--parquet", str(tmp_path / "table")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert "pyarrow" in result.output

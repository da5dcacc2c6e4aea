"""The table of layers and taps: one number for each, in its colour, with a mark where it does not pass."""

from __future__ import annotations

import dataclasses
from collections import Counter

from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.html.data import kind, multiple
from dsv4_convert.parity.html.shades import shade
from dsv4_convert.parity.html.words import GLYPHS, short
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report import Report, TapResult
from dsv4_convert.taps import STATE, TAPS

_ORDER = {tap.name: place for place, tap in enumerate((*TAPS, *STATE))}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One tap of one layer: classes of the style sheet, and text. Both empty where there is none."""

    classes: str = ""
    text: str = ""
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """``columns``: layers, and under each its kind. ``rows``: tap, its meaning, its cells. ``failing``: of the columns
    in which taps fail, the name and how many do."""

    mode: Mode
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]
    failing: tuple[tuple[str, int], ...]


def tables(report: Report) -> list[Table]:
    """For each mode a table of the layers, then for each one of the model level; those that have something."""
    layers, outer = [], []
    for mode in report.modes:
        of_mode = [tap for tap in report.taps if tap.mode is mode]
        inside = [tap for tap in of_mode if tap.layer is not None]
        columns = sorted({tap.layer for tap in inside if tap.layer is not None})
        layers.append(_table(report, mode, inside, columns))
        outer.append(_table(report, mode, [tap for tap in of_mode if tap.layer is None], [None]))
    return [table for table in (*layers, *outer) if table.rows]


def _table(report: Report, mode: Mode, taps: list[TapResult], columns: list[int] | list[None]) -> Table:
    first = report.first_diverging
    wrong = {result.name for descent in report.descents for result in descent.wrong}
    cells = {(tap.short, tap.layer): _cell(tap, first=tap is first, wrong=tap.name in wrong) for tap in taps}
    failing = Counter(tap.layer for tap in taps if tap.verdict is Verdict.FAIL)
    meanings = {tap.short: tap.meaning for tap in taps}
    names = sorted(meanings, key=_ORDER.__getitem__)
    return Table(
        mode=mode,
        columns=tuple(_column(report, layer) for layer in columns),
        rows=tuple(
            (name, meanings[name], tuple(cells.get((name, layer), Cell()) for layer in columns)) for name in names
        ),
        failing=tuple((_column(report, layer)[0], count) for layer in columns if (count := failing[layer])),
    )


def _column(report: Report, layer: int | None) -> tuple[str, str]:
    if layer is None:
        return "model", ""
    return str(layer), "" if report.detail is None else kind(report.detail.prompt, layer)


def _cell(tap: TapResult, *, first: bool, wrong: bool) -> Cell:
    fails = tap.verdict is Verdict.FAIL
    number = multiple(tap)
    glyph = "" if tap.verdict is Verdict.PASS else GLYPHS[tap.verdict]
    classes = []
    if tap.verdict is Verdict.TIE:
        classes.append("tie")
    elif tap.verdict is Verdict.EMPTY:
        classes.append("empty")
    elif number is None:
        classes.append(shade(float("inf"), fails=True).name)
    else:
        classes.append(shade(number, fails=fails).name)
    if first:
        classes.append("first")
    if wrong and fails:
        classes.append("wrong")
    text = " ".join(part for part in (glyph, "" if number is None else short(number)) if part)
    return Cell(" ".join(classes), text or GLYPHS[tap.verdict], tap.reason if fails else "")

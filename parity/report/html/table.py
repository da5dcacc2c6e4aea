"""The table of layers and taps: one number for each, in its colour, with a mark where it does not pass."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import ParityReport, TapResult
from dsv4_convert.parity.report.html.data import kind
from dsv4_convert.parity.report.html.marks import GLYPHS, shade, short
from dsv4_convert.spec.taps import ALL_TAPS, TapKey

#: Layers that a table always shows.
_UNFOLDED = 8
_ORDER = {tap.name: place for place, tap in enumerate(ALL_TAPS)}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One tap of one layer: classes of the style sheet, text, and what a link to more about it ends with."""

    classes: str = ""
    text: str = ""
    link: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """``columns``: layers, and under each its kind. ``rows``: tap, its meaning, its cells. ``failing``: of the columns
    in which taps fail, the name and how many do."""

    mode: Mode
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]
    failing: tuple[tuple[str, int], ...]

    @property
    def passing(self) -> tuple[bool, ...]:
        """Whether each column has no failing tap."""
        failing = {name for name, _ in self.failing}
        return tuple(name not in failing for name, _ in self.columns)

    @property
    def folded(self) -> bool:
        """Whether the columns in which nothing fails are hidden at first."""
        return len(self.columns) > _UNFOLDED and 0 < len(self.failing) < len(self.columns)


def tables(report: ParityReport, links: Mapping[tuple[TapKey, Mode], str]) -> list[Table]:
    """For each mode a table of the layers, then for each one of the model level; those that have something.

    Args:
        report: the run.
        links: of taps about which the page says more, what a link to them ends with.
    """
    layers, outer = [], []
    for mode in report.modes:
        of_mode = [tap for tap in report.taps if tap.mode is mode]
        inside = [tap for tap in of_mode if tap.layer is not None]
        columns = sorted({tap.layer for tap in inside if tap.layer is not None})
        layers.append(_table(report, inside, columns, links))
        outer.append(_table(report, [tap for tap in of_mode if tap.layer is None], [None], links))
    return [table for table in (*layers, *outer) if table.rows]


def _table(
    report: ParityReport,
    taps: list[TapResult],
    columns: list[int] | list[None],
    links: Mapping[tuple[TapKey, Mode], str],
) -> Table:
    first = report.first_diverging
    cells = {}
    for tap in taps:
        cell = _cell(tap, first=tap is first, wrong=tap.key in report.wrong)
        cells[tap.short, tap.layer] = dataclasses.replace(cell, link=links.get((tap.key, tap.mode), ""))
    labels = {tap.layer: tap.key.label for tap in taps}
    failing = Counter(tap.layer for tap in taps if tap.verdict is Verdict.FAIL)
    meanings = {tap.short: tap.meaning for tap in taps}
    names = sorted(meanings, key=_ORDER.__getitem__)
    return Table(
        mode=taps[0].mode if taps else report.modes[0],
        columns=tuple((labels.get(layer, "model"), _kind(report, layer)) for layer in columns),
        rows=tuple(
            (name, meanings[name], tuple(cells.get((name, layer), Cell()) for layer in columns)) for name in names
        ),
        failing=tuple((labels[layer], count) for layer in columns if (count := failing[layer])),
    )


def _kind(report: ParityReport, layer: int | None) -> str:
    return "" if layer is None or report.detail is None else kind(report.detail.prompt, layer)


def _cell(tap: TapResult, *, first: bool, wrong: bool) -> Cell:
    fails = tap.verdict is Verdict.FAIL
    number = tap.multiple
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
    return Cell(" ".join(classes), text or GLYPHS[tap.verdict])

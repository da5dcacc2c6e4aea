"""A parity report in a terminal: one table per layer, the verdict last."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from parity.metrics import Verdict
from parity.report import Report, TapResult

_STYLE = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.TIE: "yellow", Verdict.EMPTY: "dim"}


def render(report: Report, console: Console, *, every_tap: bool = True) -> None:
    """Print the report; without ``every_tap`` only taps that do not simply pass."""
    shown = [tap for tap in report.taps if every_tap or tap.verdict is not Verdict.PASS]
    if shown:
        console.print(Group(*_tables(shown, report)))
    console.print(Text(report.sentence, style="bold green" if report.passed else "bold red"))


def _tables(taps: list[TapResult], report: Report) -> Iterator[RenderableType]:
    first = report.first_diverging
    for layer, group in groupby(taps, key=lambda tap: tap.layer):
        title = "model level" if layer is None else f"layer {layer}"
        table = Table(title=f"{title}, {report.mode}", title_justify="left", box=None, pad_edge=False, expand=False)
        table.add_column("tap", no_wrap=True)
        for column in ("max abs", "rel rms", "1-cos", "ulp"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for tap in group:
            short = tap.name if layer is None else tap.name.split(".", 2)[2]
            verdict = Text(tap.verdict.value, style=_STYLE[tap.verdict])
            if tap is first:
                verdict.append(" < first")
            table.add_row(short, *_numbers(tap), verdict)
        yield table


def _numbers(tap: TapResult) -> tuple[str, str, str, str]:
    if tap.distance is not None:
        d = tap.distance
        return f"{d.max_abs:.1e}", f"{d.relative_rms:.1e}", f"{max(0.0, 1 - d.cosine):.0e}", f"{d.max_ulp:.0f}"
    if tap.flips is not None:
        return f"{tap.flips.tokens}/{tap.flips.of}", "flips", f"{tap.flips.ties}", "ties"
    return "", "", "", ""

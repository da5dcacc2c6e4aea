"""A parity report in a terminal: one table per layer, the verdict last."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from parity.metrics import Verdict
from parity.report import Report, TapResult

_SEVERITY = (Verdict.FAIL, Verdict.TIE, Verdict.PASS, Verdict.EMPTY)
_STYLE = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.TIE: "yellow", Verdict.EMPTY: "dim"}


def render(report: Report, console: Console, *, every_tap: bool = True) -> None:
    """Print the report; without ``every_tap`` one line per layer, and only the taps that do not simply pass."""
    shown = [tap for tap in report.taps if every_tap or tap.verdict in (Verdict.FAIL, Verdict.TIE)]
    if not every_tap:
        console.print(_summary(report))
    if shown:
        console.print(Group(*_tables(shown, report)))
    console.print(Text(report.sentence, style="bold green" if report.passed else "bold red"))


def _summary(report: Report) -> Table:
    """One line per layer: how many taps, and the one that is farthest off."""
    table = Table(title=f"{report.mode}, worst tap of each layer", title_justify="left", box=None, pad_edge=False)
    for column, justify in (("layer", "left"), ("taps", "right"), ("worst tap", "left"), ("rel rms", "right")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("verdict", no_wrap=True)
    for layer, group in groupby(report.taps, key=lambda tap: tap.layer):
        taps = list(group)
        measured = [tap for tap in taps if tap.distance is not None]
        worst = max(measured, key=lambda tap: tap.distance.relative_rms if tap.distance else 0.0, default=None)
        verdict = min((tap.verdict for tap in taps), key=_SEVERITY.index)
        table.add_row(
            "model" if layer is None else str(layer),
            str(len(taps)),
            _short(worst) if worst is not None else "",
            f"{worst.distance.relative_rms:.1e}" if worst is not None and worst.distance is not None else "",
            Text(verdict.value, style=_STYLE[verdict]),
        )
    return table


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
            verdict = Text(tap.verdict.value, style=_STYLE[tap.verdict])
            if tap is first:
                verdict.append(" < first")
            table.add_row(_short(tap), *_numbers(tap), verdict)
        yield table


def _short(tap: TapResult) -> str:
    """The name within its layer."""
    return tap.name if tap.layer is None else tap.name.split(".", 2)[2]


def _numbers(tap: TapResult) -> tuple[str, str, str, str]:
    if tap.distance is not None:
        d = tap.distance
        ulp = f"{d.max_ulp:.0f}" if d.max_ulp < 1e5 else f"{d.max_ulp:.0e}"
        return f"{d.max_abs:.1e}", f"{d.relative_rms:.1e}", f"{max(0.0, 1 - d.cosine):.0e}", ulp
    if tap.flips is not None:
        return f"{tap.flips.tokens}/{tap.flips.of}", "flips", f"{tap.flips.ties}", "ties"
    return "", "", "", ""

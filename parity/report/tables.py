"""A parity report in a terminal: tables of taps, how the error grows, what the prompt reaches, the verdict last."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import groupby

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.logits import TOP, LogitsComparison
from dsv4_convert.parity.metrics import Verdict, shown
from dsv4_convert.parity.report.data import ErrorSplit, Gate, ParityReport, TapResult
from dsv4_convert.parity.report.words import (
    Decode,
    Summary,
    grown_numbers,
    layers_named,
    noise_floor,
    position_cells,
    reach,
    summarized,
    why,
)
from dsv4_convert.show.tables import fitted

_STYLE = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.TIE: "yellow", Verdict.EMPTY: "dim"}
#: Taps listed per layer, unless all are.
_FEW = 6
#: Failing layers listed above the verdict.
_LAYERS = 8
#: Columns that a narrow window drops, in this order.
_DISPENSABLE = ("mode", "1-cos", "ulp", "max abs", "experts", "taps", "gap", "inherited", "added", "rel rms")
#: Errors beyond their record that are listed.
_MOST = 12


class Verbosity(IntEnum):
    """How much is printed; each prints what the one before prints, and more."""

    HEADLINE = -1
    #: The verdict, after one line for each failing layer.
    VERDICT = 0
    #: One line for each layer, and tables of the taps that do not pass.
    TABLES = 1
    #: A table of all taps for each layer.
    EVERYTHING = 2


def render(
    report: ParityReport,
    console: Console,
    *,
    verbosity: int = Verbosity.VERDICT,
    explained: bool = False,
    decode: Decode = str,
) -> None:
    """Print the report: tables, and the verdict last.

    Args:
        report: the report.
        console: the console to print to.
        verbosity: how much to print.
        explained: print a paragraph for each tap instead of the tables.
        decode: makes a token id readable.
    """
    if explained:
        console.print(noise_floor(report))
        for tap in report.taps:
            console.print(Text(why(tap, report), style=_STYLE[tap.verdict] if tap.verdict is Verdict.FAIL else ""))
    elif verbosity >= Verbosity.TABLES:
        render_tables(report, console, every_tap=verbosity >= Verbosity.EVERYTHING, decode=decode)
    elif verbosity == Verbosity.VERDICT:
        programs = (report,) if report.model is None else (report, report.model)
        if failing := next(filter(None, map(_failing_layers, programs)), None):
            _print(console, failing)
    said = summarized(report)
    console.print(Text(said.headline, style="bold green" if report.passed else "bold red"))
    if verbosity > Verbosity.HEADLINE:
        for line in labelled(said, console.width):
            console.print(line)


def render_tables(report: ParityReport, console: Console, *, every_tap: bool = False, decode: Decode = str) -> None:
    """Print the tables alone: of all taps, or one line for each layer and the taps that do not pass."""
    taps = [tap for tap in report.taps if every_tap or tap.verdict in (Verdict.FAIL, Verdict.TIE)]
    if not every_tap:
        for mode in report.modes:
            _print(console, _summary(report, mode))
    for table in _tables(taps, report, len(taps) if every_tap else _FEW):
        _print(console, table)
    if report.model is not None:
        severe = [tap for tap in report.model.taps if tap.verdict in (Verdict.FAIL, Verdict.TIE)]
        for table in _tables(severe, report.model, _FEW):
            _print(console, table)
    if report.error_splits:
        _print(console, _growth(report.error_splits))
    if report.logits is not None:
        _print(console, _logits(report.logits, decode))
    for line in reach(report):
        console.print(Text(f"not reached, {line}", style="yellow"))
    for table in () if report.gate is None else _grown(report.gate):
        _print(console, table)


def labelled(said: Summary, width: int) -> Iterator[Text]:
    """The lines of a verdict under its headline, wrapped at words."""
    room = max(map(len, (label for label, _ in said.lines)), default=0) + 2
    for label, text in said.lines:
        first, *rest = textwrap.wrap(text, max(width - room, 20), break_on_hyphens=False) or [""]
        yield Text.assemble((label.ljust(room), "bold"), "\n".join([first, *(" " * room + line for line in rest)]))


def _failing_layers(report: ParityReport) -> Group | None:
    """One line for each of the first layers that fail; None if none does."""
    failing = [(mode, of) for mode in report.modes for of in report.by_layer(mode) if of.severe is Verdict.FAIL]
    if not failing:
        return None
    several = len(report.modes) > 1
    mode_column = [("mode", "left")] if several else []
    table = _table(("layer", "left"), *mode_column, ("fail", "right"), ("first tap", "left"), ("noise", "right"))
    for mode, of in failing[:_LAYERS]:
        first = next(tap for tap in of.taps if tap.verdict is Verdict.FAIL)
        table.add_row(
            of.label,
            *([mode.value] if several else []),
            f"{of.count(Verdict.FAIL)} of {len(of.taps)}",
            first.short,
            _numbers(first)[0],
        )
    if len(failing) <= _LAYERS:
        return Group(table)
    rest = [of.layer for _, of in failing[_LAYERS:]]
    return Group(table, Text(f"and {layers_named(report, rest)}; -v lists them"))


def _print(console: Console, titled: Group) -> None:
    """Print a table under its title, without the columns that a narrow window has no room for."""
    for part in titled.renderables:
        console.print(fitted(part, console, dispensable=_DISPENSABLE) if isinstance(part, Table) else part)


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    return table


def _titled(title: str, table: Table) -> Group:
    """A title may be wider than its table."""
    return Group(Text(title, style="italic"), table)


def _summary(report: ParityReport, mode: Mode) -> Group:
    """One line per layer: how many taps, and the one that is farthest off."""
    table = _table(
        ("layer", "left"),
        ("taps", "right"),
        ("worst tap", "left"),
        ("noise", "right"),
        ("rel rms", "right"),
        ("experts", "right"),
        ("verdict", "left"),
    )
    experts = {layer.layer: f"{layer.experts}/{layer.of}" for layer in report.prompt_coverage}
    for of in report.by_layer(mode):
        numbers = ("", "")
        if of.worst is not None and of.worst.distance is not None:
            numbers = (_multiple(of.worst.distance.noise.largest), f"{of.worst.distance.relative_rms:.1e}")
        table.add_row(
            of.label,
            str(len(of.taps)),
            of.worst.short if of.worst is not None else "",
            *numbers,
            experts.get(of.layer, "") if of.layer is not None else "",
            Text(of.severe.value, style=_STYLE[of.severe]),
        )
    return _titled(f"{report.arithmetic}, {mode}: worst tap of each layer", table)


def _tables(taps: Sequence[TapResult], report: ParityReport, limit: int) -> Iterator[Group]:
    """One table for each mode and layer, of at most ``limit`` taps."""
    first = report.first_diverging
    for (mode, title), group in groupby(taps, key=lambda tap: (tap.mode, tap.key.where)):
        listed = list(group)
        table = _table(
            ("tap", "left"),
            *((name, "right") for name in ("noise", "max abs", "rel rms", "1-cos", "ulp")),
            ("verdict", "left"),
        )
        for tap in listed[:limit]:
            text = Text(tap.verdict.value, style=_STYLE[tap.verdict])
            if tap is first:
                text.append(" < first")
            if tap.verdict is Verdict.FAIL and tap.key in report.wrong:
                text.append(", wrong by itself")
            table.add_row(tap.short, *_numbers(tap), text)
        if len(listed) > limit:
            table.add_row(f"and {len(listed) - limit} more that do not pass")
        compiled = ", compiled" if report.program is not None and report.program.program == "model" else ""
        yield _titled(f"{title}{compiled}, {report.arithmetic}, {mode}", table)


def _numbers(tap: TapResult) -> tuple[str, ...]:
    if tap.distance is not None:
        d = tap.distance
        ulp = f"{d.max_ulp:.0f}" if d.max_ulp < 1e5 else f"{d.max_ulp:.0e}"
        cosine = "–" if math.isnan(d.cosine) else f"{max(0.0, 1 - d.cosine):.0e}"
        return _multiple(d.noise.largest), f"{d.max_abs:.1e}", f"{d.relative_rms:.1e}", cosine, ulp
    if tap.flips is not None:
        return _multiple(tap.flips.noise), f"{tap.flips.tokens}/{tap.flips.of}", "flips", f"{tap.flips.ties}", "ties"
    return "", "", "", "", ""


def _multiple(value: float) -> str:
    return f"{shown(value)}x"


def _grown(gate: Gate) -> Iterator[Group]:
    """Errors beyond their record, in order of execution; a table for each mode."""
    for mode, group in groupby(gate.grown, key=lambda grown: grown.mode):
        table = _table(
            ("tap", "left"), ("measure", "left"), *((name, "right") for name in ("recorded", "allowed", "found"))
        )
        listed = list(group)
        for at, grown in enumerate(listed[:_MOST]):
            same = at > 0 and listed[at - 1].name == grown.name
            table.add_row("" if same else grown.name, grown.measure, *grown_numbers(grown))
        if len(listed) > _MOST:
            table.add_row(f"and {len(listed) - _MOST} more")
        yield _titled(f"within tolerance, but grown since it was recorded, {mode}", table)


def _growth(growth: Sequence[ErrorSplit]) -> Group:
    """Error of the streams that leave each layer: what came in, what the layer added."""
    table = _table(
        ("layer", "left"),
        *((name, "right") for name in ("inherited", "added", "noise", "total", "noise")),
    )
    for layer in growth:
        table.add_row(
            str(layer.layer),
            f"{layer.inherited:.1e}",
            f"{layer.added:.1e}",
            _multiple(layer.added_noise),
            f"{layer.total:.1e}",
            _multiple(layer.total_noise),
        )
    return _titled("error of the streams that leave each layer, relative rms", table)


def _logits(logits: LogitsComparison, decode: Decode) -> Group:
    table = _table(
        ("position", "left"),
        ("token", "left"),
        ("KL", "right"),
        ("golden", "left"),
        ("found", "left"),
        ("gap", "right"),
    )
    for position in logits.worst:
        table.add_row(*position_cells(position, decode))
    title = (
        f"next token at {logits.positions} positions: same first choice {logits.top1:.2%}, top {TOP} "
        f"{logits.topk:.2%}, KL mean {logits.kl_mean:.1e}, largest {logits.kl_max:.1e} nats"
    )
    return _titled(title, table)

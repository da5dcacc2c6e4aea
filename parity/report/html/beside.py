"""Two runs side by side, as a page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.changes import Became, Change, Measured, ReportedRun
from dsv4_convert.parity.report.html.marks import GLYPHS, shade, short
from dsv4_convert.parity.report.html.page import template
from dsv4_convert.parity.report.html.table import Cell
from dsv4_convert.show.text import for_html
from dsv4_convert.show.units import number_of

#: The changes that a reader looks for first; their lists are open.
_OPEN = (Became.FAILS_NOW, Became.GONE, Became.WORSE)


@dataclasses.dataclass(frozen=True)
class LayerPair:
    """The worst tap of a layer in either run: its name and its cell."""

    name: str
    mode: str
    before: tuple[str, Cell]
    after: tuple[str, Cell]


def page(before: ReportedRun, after: ReportedRun, found: Sequence[Change]) -> str:
    """Both runs as one HTML document: what became of each tap, and the worst tap of every layer."""
    of = {kind: [change for change in found if change.kind is kind] for kind in Became}
    counts = [f"{kind}: {number_of(len(those), 'tap')}" for kind, those in of.items() if those]
    html = template("beside.html.j2").render(
        title=f"{before.path.name} and {after.path.name} · dsv4 report",
        headline=", ".join(counts[:3]).capitalize(),
        worse=bool(of[Became.FAILS_NOW] or of[Became.GONE]),
        counts=[(kind.value, len(those)) for kind, those in of.items() if those],
        facts=_facts(before, after),
        names=(str(before.path), str(after.path)),
        groups=[
            (
                kind.value,
                kind in _OPEN,
                [(each.name, each.mode.value, _cell(each.before), _cell(each.after)) for each in those],
            )
            for kind, those in of.items()
            if those and kind is not Became.SAME
        ],
        layers=_layers(found),
    )
    return for_html(html)


def _facts(before: ReportedRun, after: ReportedRun) -> list[tuple[str, str, str, bool]]:
    """The facts of both runs by name, and whether they differ."""
    pairs = [
        (name, before.facts.get(name, "–"), after.facts.get(name, "–")) for name in {**before.facts, **after.facts}
    ]
    return [(name, one, other, one != other) for name, one, other in pairs]


def _layers(found: Sequence[Change]) -> list[LayerPair]:
    """The worst taps of the layers, in order."""
    places = sorted({(change.mode, -1 if change.layer is None else change.layer) for change in found}, key=_order)
    pairs = []
    for mode, layer in places:
        those = [each for each in found if (each.mode, -1 if each.layer is None else each.layer) == (mode, layer)]
        cells = (_worst([(each.short, side(each)) for each in those]) for side in (_before, _after))
        pairs.append(LayerPair("model" if layer < 0 else str(layer), mode.value, *cells))
    return pairs


def _order(place: tuple[Mode, int]) -> tuple[int, int]:
    return list(Mode).index(place[0]), place[1]


def _before(change: Change) -> Measured | None:
    return change.before


def _after(change: Change) -> Measured | None:
    return change.after


def _worst(measured: list[tuple[str, Measured | None]]) -> tuple[str, Cell]:
    """The tap that fails with the largest error, or else the one with the largest error."""
    there = [(name, one) for name, one in measured if one is not None]
    if not there:
        return "", _cell(None)
    name, worst = max(there, key=lambda each: (each[1].verdict is Verdict.FAIL, _size(each[1])))
    return name, _cell(worst)


def _size(measured: Measured) -> float:
    value = measured.multiple
    return -1.0 if value is None else math.inf if math.isnan(value) else value


def _cell(measured: Measured | None) -> Cell:
    if measured is None:
        return Cell("empty", "–")
    fails = measured.verdict is Verdict.FAIL
    mark = "" if measured.verdict is Verdict.PASS else GLYPHS[measured.verdict]
    if measured.multiple is None:
        return Cell(shade(math.inf, fails=True).name if fails else "", f"{mark} {measured.verdict}".strip())
    return Cell(shade(measured.multiple, fails=fails).name, f"{mark} {short(measured.multiple)}".strip())

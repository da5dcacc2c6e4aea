"""One page that holds everything: no script that runs, nothing from elsewhere, light and dark."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.advice import next_steps
from dsv4_convert.parity.explain import growth_numbers, missed, noise_floor, of_baseline, operation, verdict, why
from dsv4_convert.parity.html import figures
from dsv4_convert.parity.html.data import PageData, page_data
from dsv4_convert.parity.html.shades import SHADES
from dsv4_convert.parity.html.table import tables
from dsv4_convert.parity.html.words import GLYPHS, broken, coded, flat, short
from dsv4_convert.parity.logits import TOP
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report import Report, plain
from dsv4_convert.parity.secrets import without_secrets

#: Errors beyond their record that are listed; all of them are in the page's JSON.
_MOST = 60
_HERE = Path(__file__).parent
#: Of the figures' numbers; the report beside them has a version of its own.
SCHEMA_VERSION = 1

#: Decodes one token id, or says that it cannot.
Decode = Callable[[int], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a report does not know of its own run: the command line, and when it ended."""

    command: str
    date: datetime.datetime

    @classmethod
    def now(cls) -> Run:
        """This process, at this moment."""
        return cls(command=shlex.join(["dsv4", *sys.argv[1:]]), date=datetime.datetime.now().astimezone())


def page(report: Report, run: Run, decode: Decode = str) -> str:
    """The report as one HTML document; the same bytes for the same arguments.

    Without ``report.detail`` the figures that need it are left out, and the page says so.

    Args:
        report: of a run with ``detail=True``.
        run: where it came from.
        decode: makes a token id readable.
    """
    data = page_data(report)
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"short": short, "coded": coded, "broken": broken}
    document = {
        "schema_version": SCHEMA_VERSION,
        "command": without_secrets(run.command),
        "date": run.date.isoformat(timespec="seconds"),
        "report": report.to_json(verdict(report)),
        "figures": plain(dataclasses.asdict(_lean(data))),
    }
    headline, _, rest = verdict(report).partition(": ")[2].partition(". ")
    return environment.get_template("page.html.j2").render(
        report=report,
        run=run,
        data=data,
        Mode=Mode,
        TOP=TOP,
        glyphs=GLYPHS,
        shades=SHADES,
        maps=figures.MAPS,
        # The name of a tap is as it is.
        headline=headline if report.first_diverging is not None else headline[:1].upper() + headline[1:],
        rest=rest,
        steps=next_steps(report),
        noise_floor=noise_floor(report),
        facts=_facts(report),
        drawn=_drawn(data),
        tables=tables(report),
        reasons=[why(item.result, report) for item in data.failing],
        findings=[(descent, list(operation(descent))) for descent in report.descents if descent.wrong],
        clean=_clean(report),
        operations=report.golden.get("reference", {}).get("numerics") == "release",
        baseline=_baseline(report),
        missed=[missed(layer) for layer in report.unreached],
        worst=_worst(report, decode),
        provenance=_provenance(report, run),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        document=htmlsafe_json_dumps(
            document, separators=(",", ":"), allow_nan=False, ensure_ascii=False, sort_keys=False
        ),
    )


def _lean(data: PageData) -> PageData:
    """The figures' numbers without those that the report has already."""
    return dataclasses.replace(
        data,
        growth=(),
        failing=tuple(dataclasses.replace(item, result=None) for item in data.failing),  # type: ignore[arg-type]
    )


def _drawn(data: PageData) -> dict[str, Any]:
    """All figures, by what they show."""
    return {
        "depth": [figures.depth(depth, f"depth-{depth.mode}") for depth in data.depth],
        "course": None if data.course is None else figures.course(data.course, "course"),
        "growth": figures.growth(data.growth, "growth") if len(data.growth) > 1 else None,
        "maps": [figures.token_map(item, f"map-{item.mode}-{item.what}") for item in data.maps],
        "failing": [
            (figures.distribution(item, f"distribution-{place}"), figures.scatter(item, f"scatter-{place}"))
            if item.edges
            else None
            for place, item in enumerate(data.failing)
        ],
        "divergences": [figures.divergence(item, f"divergence-{item.mode}") for item in data.divergences],
    }


def _facts(report: Report) -> list[tuple[str, str]]:
    """The run in a few numbers."""
    measured = [tap.distance.noise.largest for tap in report.taps if tap.distance is not None]
    order = (Verdict.FAIL, Verdict.TIE, Verdict.PASS, Verdict.EMPTY)
    counts = [f"{GLYPHS[kind]} {report.count(kind)} {kind}" for kind in order if report.count(kind)]
    facts = [
        ("taps", " · ".join(counts) or "none"),
        ("layers", _layers(report.layers)),
        ("mode", " and ".join(report.modes)),
        ("numbers", report.arithmetic),
    ]
    if measured:
        worst = max(measured, key=lambda value: value if value == value else float("inf"))
        facts.append(("largest error", f"{short(worst)} × noise floor, {report.limits.row:g} allowed"))
    if report.detail is not None:
        prompt = report.detail.prompt
        many = f"{prompt.prompts} prompts of " if prompt.prompts > 1 else ""
        facts.append(
            ("tokens", f"{many}{prompt.tokens:,}" + (f", {prompt.decode} one by one" if prompt.decode else ""))
        )
    return facts


def _layers(layers: tuple[int, ...]) -> str:
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}–{layers[-1]}"
    return ", ".join(map(str, layers))


def _worst(report: Report, decode: Decode) -> list[dict[str, Any]]:
    """The positions whose next token is farthest off, readable."""
    if report.logits is None:
        return []
    return [
        {
            "at": "{}, {}".format(*position.at),
            "token": decode(position.token),
            "kl": position.kl,
            "golden": decode(position.golden),
            "found": decode(position.found),
            "same": position.golden == position.found,
            "gap": position.gap,
        }
        for position in report.logits.worst
    ]


def _baseline(report: Report) -> dict[str, Any] | None:
    """What the baseline says, what has grown beyond it, and the taps that only one side has."""
    gate = report.gate
    if gate is None:
        return None
    platforms = f" ({'; '.join(gate.platforms)})" if gate.platforms else ""
    absent = (("without a record", gate.unrecorded), ("recorded, but not compared", gate.missing))
    return {
        "compared": f"{gate.path}: {gate.compared} taps compared{platforms}.",
        "sentences": of_baseline(report),
        "grown": [(one.name, one.mode.value, one.measure, *growth_numbers(one)) for one in gate.grown[:_MOST]],
        "more": max(0, len(gate.grown) - _MOST),
        "raised": gate.updated,
        "absent": [(what, [f"{tap.name}, {tap.mode}" for tap in taps]) for what, taps in absent if taps],
    }


def _clean(report: Report) -> str:
    """The layers that ran again without any operation being wrong by itself."""
    clean = [descent.layer for descent in report.descents if not descent.wrong]
    layers = tuple(layer for layer in clean if layer is not None)
    parts = [f"layer{'s' if len(layers) > 1 else ''} {_layers(layers)}"] if layers else []
    return " and ".join([*parts, *(["the model level"] if None in clean else [])])


def _provenance(report: Report, run: Run) -> list[tuple[str, list[tuple[str, str]], bool]]:
    """Groups of lines, and whether they are folded: the files of a checkpoint can be many."""
    run_lines = [
        ("command", without_secrets(run.command)),
        ("date", run.date.isoformat(sep=" ", timespec="seconds")),
        ("modes", ", ".join(report.modes)),
        ("numbers", report.arithmetic),
        *((f"limit, {name}", f"{value:g} × noise floor") for name, value in dataclasses.asdict(report.limits).items()),
    ]
    groups = [("Run", run_lines, False), ("Machine", list(flat(report.platform)), False)]
    for title, facts in (("Checkpoint", report.checkpoint), ("Golden", report.golden)):
        lines = list(flat(facts))
        files = [line for line in lines if ".shards." in line[0] or ".files." in line[0]]
        groups.append((title, [line for line in lines if line not in files], False))
        if files:
            groups.append((f"{title}: {len(files)} files of its source", files, True))
    return groups

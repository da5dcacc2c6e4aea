"""One page that holds everything: nothing from elsewhere, light and dark, readable without its few lines of script."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.logits import TOP
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import SEVERITY, ParityReport, TapResult, plain
from dsv4_convert.parity.report.html import figures
from dsv4_convert.parity.report.html.data import PageData, page_data
from dsv4_convert.parity.report.html.marks import GLYPHS, SHADES, short
from dsv4_convert.parity.report.html.table import tables
from dsv4_convert.parity.report.words import (
    Decode,
    baseline_sentences,
    grown_numbers,
    layers_named,
    next_steps,
    noise_floor,
    operation,
    position_cells,
    programs,
    reach,
    summarized,
    verdict,
    why,
)
from dsv4_convert.parity.tolerances import Limits
from dsv4_convert.show.text import for_html, for_json
from dsv4_convert.show.units import duration
from dsv4_convert.show.urls import without_secrets
from dsv4_convert.spec.taps import TapKey

#: Errors beyond their record that are listed; all of them are in the page's JSON.
_MOST = 60
_HERE = Path(__file__).parent
#: Version of the figures' numbers; the report beside them has its own.
SCHEMA_VERSION = 1


#: Options of ``dsv4 parity`` that write a file or choose taps: left out of a command that looks at one tap, with their
#: values.
_NOT_AGAIN = ("--report", "--junit", "--json", "--layer", "--taps", "--baseline", "--reason")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The words of a run's command, when it ended, and how many seconds it took (None: not known)."""

    words: tuple[str, ...]
    date: datetime.datetime
    seconds: float | None = None

    @classmethod
    def now(cls, seconds: float | None = None) -> RunInfo:
        """This process, at this moment."""
        words = ("dsv4", *sys.argv[1:])
        return cls(words=words, date=datetime.datetime.now().astimezone(), seconds=seconds)

    @property
    def command(self) -> str:
        """The command as a shell takes it, without the secrets of URLs."""
        return without_secrets(shlex.join(self.words))

    def of_tap(self, tap: TapResult) -> str:
        """The command that compares one tap of this run again, with all of its numbers; without the secrets of URLs."""
        kept: list[str] = []
        words = iter(self.words)
        for word in words:
            option, joined, _ = word.partition("=")
            if option not in _NOT_AGAIN:
                kept.append(word)
            elif not joined:
                next(words, None)
        layer = [] if tap.layer is None else ["--layer", str(tap.layer)]
        return without_secrets(shlex.join([*kept, *layer, "--taps", tap.short, "-vv"]))


def page(report: ParityReport, run: RunInfo, decode: Decode = str) -> str:
    """The report as one HTML document; the same bytes for the same arguments.

    Without ``report.detail`` the figures that need it are left out, and the page says so.

    Args:
        report: of a run with ``detail=True``.
        run: where it came from.
        decode: makes a token id readable.
    """
    data = page_data(report)
    ids = _ids(report, data)
    document = {
        "schema_version": SCHEMA_VERSION,
        "command": run.command,
        "date": run.date.isoformat(timespec="seconds"),
        "report": _digits(report.to_json(verdict(report))),
        "figures": plain(_lean(data)),
    }
    said = summarized(report)
    headline = said.headline.partition(": ")[2]
    html = template("page.html.j2").render(
        report=report,
        run=run,
        data=data,
        Mode=Mode,
        TOP=TOP,
        glyphs=GLYPHS,
        maps=figures.MAPS,
        # Names of taps stay unchanged.
        headline=headline if report.first_diverging is not None else headline[:1].upper() + headline[1:],
        said=[line for line in said.lines if line[0] != "Next"],
        steps=next_steps(report),
        noise_floor=noise_floor(report),
        facts=_facts(report),
        drawn=_drawn(data, report.limits),
        tables=tables(report, ids),
        reasons=[why(item.result, report) for item in data.failing],
        findings=[(found, list(operation(found))) for found in report.localizations if found.wrong],
        clean=_clean(report),
        title=_title(report),
        ids=ids,
        numbers=[_numbers(item.result, report) for item in data.failing],
        again=[run.of_tap(item.result) for item in data.failing],
        unopened=report.count(Verdict.FAIL) - len(data.failing),
        operations=report.golden.get("reference", {}).get("numerics") == "release",
        baseline=_baseline(report),
        missed=reach(report),
        worst=[
            (*position_cells(position, decode), position.golden == position.found)
            for position in (() if report.logits is None else report.logits.worst)
        ],
        provenance=_provenance(report, run),
        script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
        document=Markup(
            for_json(
                htmlsafe_json_dumps(
                    document, separators=(",", ":"), allow_nan=False, ensure_ascii=False, sort_keys=False
                )
            )
        ),
    )
    return for_html(html)


def template(name: str) -> Template:
    """A template of this folder, which knows the style sheet and the shades."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"short": short, "duration": duration, "coded": _coded, "broken": _broken}
    environment.globals |= {"style": Markup((_HERE / "page.css").read_text(encoding="utf-8")), "shades": SHADES}
    return environment.get_template(name)


def _digits(value: Any) -> Any:
    """JSON with six digits of each number, and without what is null or empty in the entries of lists.

    A page of 61 layers has thousands of entries.
    """
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _digits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [
            {key: _digits(part) for key, part in item.items() if part not in (None, "")}
            if isinstance(item, dict)
            else _digits(item)
            for item in value
        ]
    return value


def _lean(data: PageData) -> PageData:
    """The figures' numbers without those that the report has already."""
    return dataclasses.replace(
        data,
        growth=(),
        failing=tuple(
            dataclasses.replace(item, result=None)  # type: ignore[arg-type]
            for item in data.failing
            if item.edges
        ),
    )


def _drawn(data: PageData, limits: Limits) -> dict[str, Any]:
    """All figures, by what they show."""
    return {
        "depth": [figures.depth(depth, f"depth-{depth.mode}", limits) for depth in data.depth],
        "course": None if data.course is None else figures.course(data.course, "course", limits),
        "growth": figures.growth(data.growth, "growth") if len(data.growth) > 1 else None,
        "maps": [figures.token_map(item, f"map-{item.mode}-{item.what}", limits) for item in data.maps],
        "failing": [
            (
                figures.distribution(item, f"distribution-{place}", limits),
                figures.scatter(item, f"scatter-{place}", limits),
                None if item.tokens is None else figures.token_map(item.tokens, f"tokens-{place}", limits),
            )
            if item.edges
            else None
            for place, item in enumerate(data.failing)
        ],
        "divergences": [figures.divergence(item, f"divergence-{item.mode}") for item in data.divergences],
    }


def _facts(report: ParityReport) -> list[tuple[str, str]]:
    """The run in a few numbers."""
    measured = [tap.distance.noise.largest for tap in report.taps if tap.distance is not None]
    counts = [f"{GLYPHS[kind]} {report.count(kind)} {kind}" for kind in SEVERITY if report.count(kind)]
    facts = [
        ("checkpoint", _side(report.checkpoint)),
        ("golden", _side(report.golden)),
        ("taps", " · ".join(counts) or "none"),
        ("compared", _dashed(report, report.layers)),
        ("mode", " and ".join(report.modes)),
        ("numbers", report.arithmetic),
    ]
    if measured:
        worst = max(measured, key=lambda value: value if value == value else float("inf"))
        facts.append(("largest error", f"{short(worst)} × noise floor, {report.limits.row:g} allowed"))
    if report.programs:
        facts.append(("programs", " ".join(programs(report))))
    if report.detail is not None:
        prompt = report.detail.prompt
        many = f"{prompt.prompts} prompts of " if prompt.prompts > 1 else ""
        facts.append(
            ("tokens", f"{many}{prompt.tokens:,}" + (f", {prompt.decode} one by one" if prompt.decode else ""))
        )
    return facts


def _side(facts: Mapping[str, Any]) -> str:
    """The name of a side of the comparison: the end of its path, or of its URL."""
    path = str(facts.get("path", "not a path"))
    return "/".join(path.rstrip("/").split("/")[-2:])


def _title(report: ParityReport) -> str:
    """The title of a browser's tab: the verdict, the tap, the checkpoint."""
    first = report.first_diverging
    return " · ".join(
        [
            "PASS" if report.passed else "FAIL" if first is None else f"FAIL {first.name}",
            f"{_side(report.checkpoint)} against {_side(report.golden)}",
            "dsv4 parity",
        ]
    )


def _ids(report: ParityReport, data: PageData) -> dict[tuple[TapKey, Mode], str]:
    """The anchors of the failing taps that can be opened."""
    return {
        (item.result.key, item.result.mode): item.result.name
        if item.result.mode is report.modes[0]
        else f"{item.result.name}.{item.result.mode}"
        for item in data.failing
    }


def _numbers(tap: TapResult, report: ParityReport) -> list[tuple[str, str]]:
    """The measures of one tap."""
    distance = tap.distance
    if distance is None:
        return []
    limits = dataclasses.asdict(report.limits)
    noise = [
        (f"noise, {name}", f"{short(value)} × the floor, {limits[name]:g} allowed")
        for name, value in dataclasses.asdict(distance.noise).items()
    ]
    return [
        *noise,
        ("rows beyond a limit", f"{distance.rows_outside} of {distance.rows}"),
        ("largest difference", f"{distance.max_abs:.3g}"),
        ("relative rms", f"{distance.relative_rms:.3g}"),
        ("1 - cosine", f"{1 - distance.cosine:.3g}"),
        ("float32 ulp", f"{distance.max_ulp:.3g}"),
        ("worst element", f"{list(distance.worst)}: golden {distance.golden:.6g}, found {distance.found:.6g}"),
    ]


def _baseline(report: ParityReport) -> dict[str, Any] | None:
    """The baseline's verdict, the errors that grew beyond it, and the taps that only one side has."""
    gate = report.gate
    if gate is None:
        return None
    platforms = f" ({'; '.join(gate.platforms)})" if gate.platforms else ""
    absent = (("without a record", gate.unrecorded), ("recorded, but not compared", gate.missing))
    return {
        "compared": f"{gate.path}: {gate.compared} taps compared{platforms}.",
        "sentences": baseline_sentences(report),
        "grown": [(one.name, one.mode.value, one.measure, *grown_numbers(one)) for one in gate.grown[:_MOST]],
        "more": max(0, len(gate.grown) - _MOST),
        "raised": gate.updated,
        "absent": [(what, [f"{tap.name}, {tap.mode}" for tap in taps]) for what, taps in absent if taps],
    }


def _clean(report: ParityReport) -> str:
    """The layers that ran again without any operation being wrong by itself."""
    return _dashed(report, (found.layer for found in report.localizations if not found.wrong))


def _provenance(report: ParityReport, run: RunInfo) -> list[tuple[str, list[tuple[str, str]], bool]]:
    """Groups of lines, and whether they are folded: the files of a checkpoint can be many."""
    run_lines = [
        ("command", run.command),
        ("date", run.date.isoformat(sep=" ", timespec="seconds")),
        ("modes", ", ".join(report.modes)),
        ("numbers", report.arithmetic),
        *((f"limit, {name}", f"{value:g} × noise floor") for name, value in dataclasses.asdict(report.limits).items()),
    ]
    groups = [("Run", run_lines, False), ("Machine", list(_flat(report.platform)), False)]
    for title, facts in (("Checkpoint", report.checkpoint), ("Golden", report.golden)):
        lines = list(_flat(facts))
        files = [line for line in lines if ".shards." in line[0] or ".files." in line[0]]
        groups.append((title, [line for line in lines if line not in files], False))
        if files:
            groups.append((f"{title}: {len(files)} files of its source", files, True))
    return groups


def _dashed(report: ParityReport, layers: Iterable[int | None]) -> str:
    return layers_named(report, layers).replace("-", "–")


def _coded(text: str) -> Markup:
    """Text with the parts between backticks as code; everything is escaped."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )


def _broken(name: str) -> Markup:
    """A dotted name that may continue on the next line after a dot."""
    return Markup(".<wbr>").join(name.split("."))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested JSON values as lines: ``reference.versions.torch``, and the value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        for number, item in enumerate(value):
            yield from _flat(item, f"{name}.{number}")
    elif value is not None and value != () and value != []:
        yield name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

"""A parity report for GitHub Actions: annotations as workflow commands, and the summary of the step in markdown.

Source: https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import ParityReport, TapResult
from dsv4_convert.parity.report.words import grown_by, grown_numbers, summarized, why
from dsv4_convert.show.text import for_markdown, for_markdown_code, workflow_command

#: GitHub shows ten errors of a step; the first is the verdict.
_ANNOTATIONS = 9
#: Rows of a table in the summary, which may have 1 MiB.
_ROWS = 20
_MARK = {Verdict.FAIL: "❌", Verdict.TIE: "≈", Verdict.PASS: "✅", Verdict.EMPTY: "∅"}


def commands(report: ParityReport) -> Iterator[str]:
    """One line each: the verdict, and the first taps that fail."""
    kind = "notice" if report.passed else "error"
    said = summarized(report)
    yield workflow_command(
        kind, "dsv4 parity", "\n".join([said.headline, *(f"{label}: {text}" for label, text in said.lines)])
    )
    if report.passed:
        return
    taps = [
        (f"{tap.name} ({tap.mode})", why(tap, of))
        for of in (report.programs or (report,))
        for tap in of.taps
        if tap.verdict is Verdict.FAIL
    ]
    if report.gate is not None and not report.gate.passed:
        for (mode, name), group in groupby(report.gate.grown, key=lambda grown: (grown.mode, grown.name)):
            taps.append((f"{name} ({mode})", f"{name}: {'; '.join(map(grown_by, group))}."))
    for title, message in taps[:_ANNOTATIONS]:
        yield workflow_command("error", title, message)


def summary(report: ParityReport) -> str:
    """What ``$GITHUB_STEP_SUMMARY`` gets."""
    said = summarized(report)
    lines = ["## dsv4 parity", "", f"{'✅' if report.passed else '❌'} {for_markdown(said.headline)}", ""]
    lines += [*(f"- **{label}** {for_markdown(text)}" for label, text in said.lines), ""]
    for mode in report.modes:
        lines += [f"### {for_markdown(report.arithmetic)}, {mode}", "", *_layers(report, mode), ""]
    failing = [tap for of in (report.programs or (report,)) for tap in of.taps if tap.verdict is Verdict.FAIL]
    if failing:
        lines += ["### Taps that fail", "", *_failing(failing), ""]
    if report.gate is not None and report.gate.grown:
        lines += [f"### Grown beyond {for_markdown_code(report.gate.path)}", "", *_grown(report), ""]
    golden, device = report.golden.get("path", ""), report.platform.get("device", "")
    about = [
        for_markdown_code(str(report.checkpoint.get("path", ""))),
        f"golden {for_markdown_code(str(golden))}",
        for_markdown(str(device)),
        for_markdown(report.versions),
    ]
    lines += [" · ".join(part for part in about if part), ""]
    return "\n".join(lines)


def _layers(report: ParityReport, mode: Mode) -> Iterator[str]:
    yield from _header(("layer", "taps", "fail", "ties", "worst tap", "noise floors", "verdict"))
    for of in report.by_layer(mode):
        yield _row(
            of.label,
            str(len(of.taps)),
            str(of.count(Verdict.FAIL)),
            str(of.count(Verdict.TIE)),
            "" if of.worst is None else for_markdown_code(of.worst.short),
            "" if of.worst is None or of.worst.distance is None else _number(of.worst.distance.noise.largest),
            f"{_MARK[of.severe]} {of.severe}",
        )


def _failing(failing: list[TapResult]) -> Iterator[str]:
    yield from _header(("tap", "mode", "what it is", "why"))
    for tap in failing[:_ROWS]:
        yield _row(for_markdown_code(tap.name), tap.mode.value, for_markdown(tap.meaning), for_markdown(tap.reason))
    if len(failing) > _ROWS:
        yield _row(f"and {len(failing) - _ROWS} more", "", "", "")


def _grown(report: ParityReport) -> Iterator[str]:
    assert report.gate is not None
    yield from _header(("tap", "mode", "measure", "recorded", "allowed", "found"))
    grown = report.gate.grown
    for one in grown[:_ROWS]:
        yield _row(for_markdown_code(one.name), one.mode.value, one.measure, *grown_numbers(one))
    if len(grown) > _ROWS:
        yield _row(f"and {len(grown) - _ROWS} more", *[""] * 5)


def _header(names: tuple[str, ...]) -> Iterator[str]:
    yield _row(*names)
    yield _row(*["---"] * len(names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.3g}"

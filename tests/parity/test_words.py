"""The verdict: a few lines, each fact once, the same in every output."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from dsv4_convert.golden.noise import Mode
from dsv4_convert.golden.prompt_coverage import LayerCoverage
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import Localization, ParityReport
from dsv4_convert.parity.report.github import commands, summary
from dsv4_convert.parity.report.html.page import RunInfo, page
from dsv4_convert.parity.report.junit import junit
from dsv4_convert.parity.report.tables import Verbosity, render
from dsv4_convert.parity.report.words import layers_named, reach, summarized
from dsv4_convert.parity.tolerances import LIMITS

from .synthetic import empty, real, report

LAYERS = 43
#: The longest names that a tap and its weights may have.
TAP, WEIGHT = "attn.indexer.compressor.entries", "attn.indexer.compressor.norm.weight"


def failing(layers: int = LAYERS, modes: tuple[Mode, ...] = (Mode.ISOLATED,)) -> ParityReport:
    """Every layer fails, the first by itself."""
    taps = [
        real(f"layers.{layer}.{TAP}", 6.7e6, 9e6, 8e6, mode=mode, verdict=Verdict.FAIL)
        for mode in modes
        for layer in range(layers)
    ]
    found = Localization(
        layer=0,
        teacher_forced=True,
        wrong=(taps[0],),
        weights=(f"layers.0.{WEIGHT}",),
        damaged=(f"layers.0.{WEIGHT}",),
        differing=None,
        experts=(),
    )
    return dataclasses.replace(report(taps), localizations=(found,))


def printed(of: ParityReport, verbosity: Verbosity = Verbosity.VERDICT) -> list[str]:
    written = io.StringIO()
    render(of, Console(file=written, width=80), verbosity=verbosity)
    return written.getvalue().splitlines()


@pytest.mark.parametrize("modes", [(Mode.ISOLATED,), tuple(Mode)])
def test_a_failing_run_of_many_layers_fits_a_screen(modes: tuple[Mode, ...]) -> None:
    lines = printed(failing(modes=modes))
    verdict = next(at for at, line in enumerate(lines) if line.startswith("FAIL: "))
    assert len(lines) - verdict <= 12
    assert verdict <= 11
    assert sum(line.startswith(("0 ", "1 ", "2 ")) for line in lines[:verdict]) == 3
    assert "layers 8-42; -v lists them" in lines[verdict - 1] or len(modes) > 1
    assert max(map(len, lines)) <= 80


def test_a_failing_verdict_says_each_thing_once() -> None:
    said = summarized(failing())
    assert [label for label, _ in said.lines] == ["Where", "Cause", "Evidence", "Next"]
    whole = str(said)
    for fact in (f"layers.0.{TAP}", "43 of 43", "9.0e6", "24 allowed", "wrong by itself", "compressed entries"):
        assert whole.count(fact) <= 1, fact
    # One number stands for the fault, in the verdict, the lines of layers and the tables.
    for verbosity in (Verbosity.VERDICT, Verbosity.TABLES, Verbosity.EVERYTHING):
        text = "\n".join(printed(failing(), verbosity))
        assert "9.0e6x" in text
        assert "6.7e" not in text
        assert "8.0e" not in text


def test_the_number_is_of_the_measure_that_fails() -> None:
    """The worst row is quoted, unless only another measure is beyond its limit."""
    over_the_tap = real("layers.0.attn.q", 13.0, 14.0, 15.0, verdict=Verdict.FAIL)
    at_an_element = real("layers.0.attn.q", 1.0, 2.0, 30.0, verdict=Verdict.FAIL)
    assert over_the_tap.reason == "13.0 times the noise floor over the whole tap, 12 allowed"
    assert at_an_element.reason == "30.0 times the noise floor at its worst element, 24 allowed"
    assert real("layers.0.attn.q", 13.0, 40.0, 90.0, verdict=Verdict.FAIL).reason == (
        "40.0 times the noise floor in its worst row, 24 allowed"
    )
    assert LIMITS["float32"].tap == 12


def test_the_same_words_everywhere() -> None:
    run = failing(2)
    said = summarized(run)
    annotation = next(iter(commands(run))).replace("%25", "%").replace("%0A", "\n")
    (suite, *_) = ElementTree.fromstring(junit(run))
    (properties,) = [entry.get("value", "") for entry in suite.iter("property") if entry.get("name") == "verdict"]
    html = page(run, RunInfo.now())
    markdown = summary(run).replace("\\", "")
    terminal = " ".join(" ".join(printed(run)).split())
    for label, text in said.lines:
        assert f"{label}: {text}" in annotation
        assert f"{label}: {text}" in properties
        assert f"**{label}** {text}" in markdown
        assert f"{label} {text}" in terminal
        assert text.partition(" ")[0] in html


def test_what_is_not_reached_is_one_line_for_many_layers() -> None:
    odd = [
        LayerCoverage(layer=layer, missed=("no block of 128 tokens is complete",), experts=200 + layer, of=256)
        for layer in range(3, 42, 2)
    ]
    run = dataclasses.replace(report([real("layers.0.attn.q", 1, 2, 2)]), prompt_coverage=tuple(odd))
    assert reach(run) == [
        "layers 3, 5, … 41: no block of 128 tokens is complete",
        "layers 3, 5, … 41: 203 to 241 of 256 experts are reached",
    ]
    assert sum("no block of 128" in line for line in printed(run)) == 1
    (alone,) = reach(dataclasses.replace(run, prompt_coverage=tuple(odd[:1])))[1:]
    assert alone == "layer 3: 203 of 256 experts are reached"
    staged = [dataclasses.replace(layer, missed=(), of=256 if layer.layer < 39 else 128) for layer in odd]
    staged = [dataclasses.replace(layer, experts=100) for layer in staged]
    of_stages = dataclasses.replace(run, prompt_coverage=tuple(staged), stages=range(39, 42))
    assert reach(of_stages) == [
        "layers 3, 5, … 37: 100 of 256 experts are reached",
        "stages mtp.0, 2: 100 of 128 experts are reached",
    ]
    assert layers_named(of_stages, range(37, 40)) == "layers 37-38 and stage mtp.0"
    assert reach(report([real("layers.0.attn.q", 1, 2, 2)])) == []


def test_a_passing_run_names_the_worst_tap_and_is_short() -> None:
    run = report([real(f"layers.{layer}.attn.q", 1, 2 + layer / 10, 2) for layer in range(LAYERS)])
    lines = printed(run)
    assert len(lines) <= 12
    assert "layers.42.attn.q: 6.2 times the noise floor in its worst row, 24 allowed." in " ".join(
        " ".join(lines).split()
    )
    (headline,) = printed(run, Verbosity.HEADLINE)
    assert headline == "PASS: all 43 taps agree, float32, isolated"


def test_a_foreign_implementation_gets_the_tap_that_still_agrees() -> None:
    """Nothing of it can be run by itself."""
    run = report(
        [
            real("layers.0.attn.q_norm", 1, 2, 2),
            empty("layers.0.attn.kv_norm"),
            real("layers.0.attn.q", 1, 50, 2, verdict=Verdict.FAIL),
        ]
    )
    lines = dict(summarized(run).lines)
    assert lines["Cause"].startswith("layers.0.attn.q_norm, the tap before it, agrees;")
    assert "attn.q" in lines["Next"]
    assert dict(summarized(dataclasses.replace(run, taps=run.taps[2:])).lines)["Cause"].startswith("No tap before it")


def test_a_cosine_that_does_not_exist_is_not_shown_as_perfect() -> None:
    tap = real("layers.0.attn.q", 1, 50, 2, verdict=Verdict.FAIL)
    assert tap.distance is not None
    zeros = dataclasses.replace(tap, distance=dataclasses.replace(tap.distance, cosine=float("nan")))
    (row,) = [line for line in printed(report([zeros]), Verbosity.EVERYTHING) if line.startswith("attn.q ")]
    assert " – " in row
    assert "0e+00" not in row


def test_a_report_in_a_notebook_and_as_a_page(tmp_path: Path) -> None:
    run = dataclasses.replace(failing(2), golden={"path": "<script>alert(1)</script>"})
    shown = run._repr_html_()
    for label, _ in summarized(run).lines:
        assert f"<th>{label}</th>" in shown
    empty_run = dataclasses.replace(run, taps=(), localizations=())
    assert "<script>" not in empty_run._repr_html_()
    run.save_html(str(tmp_path / "report.html"))
    assert summarized(run).headline.removeprefix("FAIL: ") in (tmp_path / "report.html").read_text(encoding="utf-8")

"""A parity report for programs: JUnit XML, GitHub's commands and summary."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from junitparser import Failure, JUnitXml, Skipped

from dsv4_convert.golden.archive import open_golden
from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.gate import BaselineRequest, gated
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.report.github import commands, summary
from dsv4_convert.parity.report.junit import junit
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.show.text import workflow_command

from .synthetic import choice, empty, real, report

Q, CHOSEN = "layers.1.attn.q", "layers.1.attn.indexer.chosen"


def _cases(text: str, path: Path) -> dict[tuple[str, str], list[object]]:
    """Results by class and name, as somebody else's reader has them; its own counts must be those that are stated."""
    path.write_text(text, encoding="utf-8")
    read = JUnitXml.fromfile(str(path))
    stated = read.tests, read.failures, read.skipped, read.errors
    read.update_statistics()
    assert stated == (read.tests, read.failures, read.skipped, read.errors)
    cases = [case for suite in read for case in suite]
    found = {(case.classname, case.name): list(case.result) for case in cases}
    assert len(found) == len(cases)  # no two of one name
    assert not any("time=" in line for line in text.splitlines() if "<testcase" in line)
    return found


@pytest.fixture
def failing() -> ParityReport:
    """A tap that fails, one with ties, an empty one, in both modes, and one of the model level."""
    taps = [
        real("embed", 0, 0, 0),
        real(Q, 1, 40, 2, verdict=Verdict.FAIL),
        choice(CHOSEN, 3),
        empty("layers.1.attn.compressor.pooled"),
    ]
    return report([*taps, *(dataclasses.replace(tap, mode=Mode.CUMULATIVE) for tap in taps)])


def test_junit_has_a_case_for_each_layer_and_tap(failing: ParityReport, tmp_path: Path) -> None:
    text = junit(failing)
    cases = _cases(text, tmp_path / "junit.xml")
    assert list(cases)[:4] == [
        ("isolated.model", "embed"),
        ("isolated.layers.1", "attn.q"),
        ("isolated.layers.1", "attn.indexer.chosen"),
        ("isolated.layers.1", "attn.compressor.pooled"),
    ]
    assert len(cases) == 8
    (failure,) = cases["isolated.layers.1", "attn.q"]
    assert isinstance(failure, Failure)
    assert (failure.type, failure.message) == ("row", "40.0 times the noise floor in its worst row, 24 allowed")
    assert "40.0 times in its worst row (24)" in str(failure.text)
    (skipped,) = cases["isolated.layers.1", "attn.compressor.pooled"]
    assert isinstance(skipped, Skipped)
    assert cases["isolated.layers.1", "attn.indexer.chosen"] == []
    assert "3 of 300 tokens choose otherwise" in text
    assert '<property name="golden" value="golden" />' in text


def test_junit_says_what_is_wrong_with_a_run_as_a_whole(golden: Path, tmp_path: Path) -> None:
    healthy = [real(Q, 1, 2, 2), choice(CHOSEN, 0)]
    wanted = BaselineRequest(path=tmp_path / "b.json", update=True)
    archive = open_golden(golden)
    gated(report(healthy), archive, wanted, partial=False)
    worse = report([real(Q, 4, 2, 2), real("layers.1.attn.kv_norm", 1, 2, 2)])
    run = gated(worse, archive, dataclasses.replace(wanted, update=False), partial=False)
    cases = _cases(junit(run), tmp_path / "junit.xml")
    (grown,) = cases["isolated.layers.1", "attn.q"]
    assert isinstance(grown, Failure)
    assert (grown.type, grown.message) == (
        "baseline",
        "4.00 times the noise floor over the whole tap, where 1.00 is recorded and 1.50 allowed",
    )
    assert ("run", "layers.1.attn.kv_norm, isolated") in cases
    assert ("run", f"{CHOSEN}, isolated") in cases
    assert _cases(junit(report([])), tmp_path / "junit.xml").keys() == {("run", "taps")}
    nothing = report([empty("layers.1.attn.compressor.pooled")])
    assert not nothing.passed
    (failure,) = _cases(junit(nothing), tmp_path / "junit.xml")["run", "taps"]
    assert isinstance(failure, Failure)
    missed = report([real(Q, 1, 2, 2)], missed=["no block is complete"], require_coverage=True)
    assert ("run", "reach of layer 1") in _cases(junit(missed), tmp_path / "junit.xml")


def test_junit_holds_what_xml_cannot(tmp_path: Path) -> None:
    strange = dataclasses.replace(
        report([real(Q, 1, 2, 2)]), checkpoint={"path": 'a\x00<b>&"\x1b[31m'}, golden={"path": "ü\ud800"}
    )
    assert len(_cases(junit(strange), tmp_path / "junit.xml")) == 1


def test_a_report_holds_no_secret_of_a_url(tmp_path: Path) -> None:
    url = "https://user:p@ssword@host/golden?X-Amz-Signature=signed"
    named = dataclasses.replace(
        report([real(Q, 1, 2, 2)]), golden={"path": url, "source": {"name": url}}, checkpoint={"path": url}
    )
    for text in (junit(named), summary(named), json.dumps(named.to_json(verdict(named)), ensure_ascii=False)):
        assert "https://…@host/golden?…" in text
        assert "ssword" not in text
        assert "signed" not in text


def _undone(command: str) -> tuple[str, dict[str, str], str]:
    """A workflow command as the runner reads it (actions/runner, ActionCommand.cs)."""
    match = re.fullmatch(r"::([a-z]+) ([^:]*)::(.*)", command)
    assert match is not None, command
    kind, listed, message = match.groups()
    properties = dict(part.split("=", 1) for part in listed.split(","))
    for escape, plain in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        properties = {key: value.replace(escape, plain) for key, value in properties.items()}
    for escape, plain in (("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
        message = message.replace(escape, plain)
    return kind, properties, message


def test_github_gets_the_verdict_and_the_taps_that_fail(failing: ParityReport) -> None:
    lines = list(commands(failing))
    first, second, third = map(_undone, lines)
    assert first[:2] == ("error", {"title": "dsv4 parity"})
    assert first[2].startswith("FAIL: layers.1.attn.q is the first tap that diverges")
    assert second[1] == {"title": "layers.1.attn.q (isolated)"}
    assert third[1] == {"title": "layers.1.attn.q (cumulative)"}
    assert _undone(*commands(report([real(Q, 1, 2, 2)])))[0] == "notice"
    many = [real(f"layers.{layer}.attn.q", 1, 40, 2, verdict=Verdict.FAIL) for layer in range(40)]
    assert len(list(commands(report(many)))) == 10


def test_what_a_command_says_survives_the_runner(failing: ParityReport) -> None:
    named = dataclasses.replace(failing.taps[1], reason="50% off: a,\nb %0A :: c\r")
    (_, line, *_) = commands(dataclasses.replace(failing, taps=(named,)))
    assert len(line.splitlines()) == 1
    assert "layers.1.attn.q (queries after the weightless norm per head), isolated: fail." in _undone(line)[2]
    (line, *_) = commands(dataclasses.replace(failing, taps=(named,)))
    assert "50% off: a,\nb %0A :: c\\r" in _undone(line)[2]

    strange = "50% a, b: c\nd %3A"
    assert _undone(workflow_command("error", strange, strange)) == ("error", {"title": strange}, strange)


def test_the_summary_is_markdown(failing: ParityReport) -> None:
    text = summary(dataclasses.replace(failing, golden={"path": "a|b"}))
    assert "## dsv4 parity\n\n❌ FAIL: layers.1.attn.q is the first" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    blocks = "\n".join(line if line.startswith("|") else "" for line in text.splitlines()).split("\n\n")
    for block in filter(None, (block.strip() for block in blocks)):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block
    assert "| 1 | 3 | 1 | 1 | `attn.q` | 40 | ❌ fail |" in rows
    assert "| `layers.1.attn.q` | isolated | queries after the weightless norm per head | 40.0 times the noise" in text

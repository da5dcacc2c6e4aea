"""A parity report as JUnit XML, which every CI system shows: one test case for each layer and tap.

A test suite for each mode, and one more for each mode of the compiled layers. A case's class is its mode and layer
(``isolated.layers.3``, ``isolated.model``, compiled ``model.isolated.layers.3``: some systems forget the suite), its
name the tap. A tap with ties passes and says so in its output; an empty one is skipped.
An error that grew beyond its baseline fails its tap. Problems of the run as a whole are cases of the class ``run``.
There are no times, since taps are not run one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from xml.etree import ElementTree as ET

from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import GrownError, ParityReport, TapResult
from dsv4_convert.parity.report.words import grown_by, layers_named, missed, verdict, why
from dsv4_convert.parity.unchecked import unchecked_sentences
from dsv4_convert.show.text import for_xml


def junit(report: ParityReport) -> str:
    """The report as a JUnit XML document."""
    root = ET.Element("testsuites", name="dsv4 parity")
    grown: dict[tuple[Mode, str], list[GrownError]] = {}
    for growth_of_tap in report.gate.grown if report.gate is not None and not report.gate.updated else ():
        grown.setdefault((growth_of_tap.mode, growth_of_tap.name), []).append(growth_of_tap)
    for mode in report.modes:
        cases = [_tap(tap, report, grown.get((mode, tap.name), ())) for tap in report.taps if tap.mode is mode]
        root.append(_suite(f"parity, {report.arithmetic}, {mode}", cases, _properties(report)))
    if report.model is not None:
        for mode in report.model.modes:
            cases = [_tap(tap, report.model, (), "model.") for tap in report.model.taps if tap.mode is mode]
            root.append(_suite(f"parity, {report.arithmetic}, {mode}, compiled", cases, _properties(report.model)))
    if whole := list(_whole(report)):
        root.append(_suite("parity, the run", whole, {}))
    for counted in ("tests", "failures", "skipped"):
        root.set(counted, str(sum(int(suite.get(counted, 0)) for suite in root)))
    root.set("errors", "0")
    ET.indent(root, " ")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _suite(name: str, cases: Iterable[ET.Element], properties: Mapping[str, str]) -> ET.Element:
    suite = ET.Element("testsuite", name=name)
    if properties:
        listed = ET.SubElement(suite, "properties")
        for key, value in properties.items():
            ET.SubElement(listed, "property", name=key, value=for_xml(value))
    suite.extend(cases)
    suite.set("tests", str(len(suite.findall("testcase"))))
    for counted, tag in (("failures", "failure"), ("skipped", "skipped")):
        suite.set(counted, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("errors", "0")
    return suite


def _properties(report: ParityReport) -> dict[str, str]:
    """The two sides of the comparison, and the machine."""
    return {
        "verdict": verdict(report),
        "checkpoint": str(report.checkpoint.get("path", "")),
        "golden": str(report.golden.get("path", "")),
        "golden digest": str(report.golden.get("digest", "")),
        "device": f"{report.platform.get('backend', '')} {report.platform.get('device', '')}".strip(),
        "versions": report.versions,
    }


def _tap(tap: TapResult, report: ParityReport, grown: Iterable[GrownError], program: str = "") -> ET.Element:
    case = _case(f"{program}{tap.mode}.{tap.key.prefix.rstrip('.') or 'model'}", tap.short)
    explanation = why(tap, report)
    if tap.verdict is Verdict.EMPTY:
        ET.SubElement(case, "skipped", message="the prompt makes no element of it")
    elif tap.verdict is Verdict.FAIL:
        _fail(case, " ".join(tap.exceeded(report.limits)), tap.reason, explanation)
    elif beyond := list(grown):
        sentences = [grown_by(measure) for measure in beyond]
        _fail(case, "baseline", sentences[0], "\n".join([*sentences, explanation]))
    elif tap.verdict is Verdict.TIE:
        ET.SubElement(case, "system-out").text = for_xml(explanation)
    return case


def _whole(report: ParityReport) -> Iterable[ET.Element]:
    """A failing case for everything that is wrong with the run and not with one of its taps."""
    if report.first_diverging is None and not report.agrees:  # no taps, or all of them empty
        yield _broken("taps", "empty", "nothing was compared")
    if report.require_coverage:
        for layer in report.uncovered:
            yield _broken(f"reach of {layers_named(report, [layer.layer])}", "reach", missed(report, layer))
        if report.unchecked is not None and report.unchecked.unproven:
            yield _broken("unused weights", "reach", " ".join(unchecked_sentences(report.unchecked)))
    gate = report.gate
    if gate is None or gate.passed:
        return
    for taps, what in ((gate.unrecorded, "no record in"), (gate.missing, "not compared, but recorded in")):
        for tap in taps:
            yield _broken(f"{tap.name}, {tap.mode}", "baseline", f"{what} {gate.path}")
    if not gate.compared and not gate.unrecorded:
        yield _broken("baseline", "baseline", f"nothing was compared with {gate.path}")


def _broken(name: str, kind: str, message: str) -> ET.Element:
    case = _case("run", name)
    _fail(case, kind, message, message)
    return case


def _case(owner: str, name: str) -> ET.Element:
    return ET.Element("testcase", classname=owner, name=name)


def _fail(case: ET.Element, kind: str, message: str, text: str) -> None:
    ET.SubElement(case, "failure", type=kind, message=for_xml(message)).text = for_xml(text)

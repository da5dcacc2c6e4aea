"""What to do next, from a parity report. Text between backticks is to be typed."""

from __future__ import annotations

from collections.abc import Iterator

from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report import Descent, Report

_MORE_TOKENS = (
    "The prompt does not reach everything, so that is not checked: record a golden with more tokens. The section on "
    "reach says what is missing."
)


def next_steps(report: Report) -> list[str]:
    """The next steps, the most useful one first; never none."""
    if report.first_diverging is not None:
        return list(_after_failure(report))
    if not report.agrees:
        return [
            "Nothing was compared: see with `dsv4 golden show` what the golden holds, and ask for taps and layers that "
            "its prompt reaches."
        ]
    if not report.passed:
        return list(_after_objections(report))
    return list(_after_success(report)) or ["Nothing: every layer, the logits and every expert were compared."]


def _after_failure(report: Report) -> Iterator[str]:
    first = report.first_diverging
    assert first is not None
    yield from _precisely(report)
    wrong = [descent for descent in report.descents if descent.wrong]
    for descent in wrong[:1]:
        yield from _after_descent(descent)
    if not wrong and Mode.ISOLATED in report.modes:
        yield (
            "No operation is wrong by itself, so errors add up: look at which operations of the layer amplify them, "
            "and whether weights and activations have the dtype that they should have."
        )
    if report.modes == (Mode.CUMULATIVE,) and all(descent.fed for descent in report.descents):
        yield "Repeat with `--mode both`: it says which layers add error and which only inherit it."
    if any(not descent.fed for descent in report.descents):
        yield "A compact golden names the first fault only: repeat after mending it, or compare with a whole golden."
    if first.layer is not None and len(report.layers) > 1 and Mode.ISOLATED in report.modes:
        yield f"While looking for it, `--layer {first.layer}` runs that layer alone."


def _precisely(report: Report) -> Iterator[str]:
    if report.platform.get("precision", "highest") != "highest":
        yield "Repeat with `--precision highest`: the limits are those of float32 products with all their bits."


def _after_objections(report: Report) -> Iterator[str]:
    """Everything is within tolerance, but not reached, or not as its baseline has it."""
    if not report.reached:
        yield _MORE_TOKENS
    gate = report.gate
    if gate is None or gate.passed:
        return
    if gate.grown:
        yield from _precisely(report)
        first = gate.grown[0].name
        yield (
            f"Find what made `{first}` less exact since it was recorded: its code, a version (the baseline's history "
            "and its commits say which were there), or flags of XLA. What comes after it may only inherit the error."
        )
        yield f"If that is meant, record it: `--baseline {gate.path} --update-baseline --reason WHY`."
    if gate.missing:
        yield (
            f"Find out why `{gate.missing[0].name}` was not compared although it is recorded. If it is gone for good, "
            f"take its lines out of `{gate.path}`."
        )
    if gate.unrecorded and not gate.update:
        where = "" if gate.compared else f" It has none of {'; '.join(gate.platforms)}."
        yield f"Record what has no record, and commit it: `--baseline {gate.path} --update-baseline`.{where}"


def _after_descent(descent: Descent) -> Iterator[str]:
    names = ", ".join(result.name for result in descent.wrong[:3])
    if descent.damaged:
        yield "Stored bytes changed after the conversion: `dsv4 verify` lists them. Convert again."
    if descent.differing:
        yield (
            f"Convert again with this version of dsv4. If the weight differs again, `dsv4 names "
            f"{descent.differing[0].path}` shows the rule that made it."
        )
    elif descent.weights and descent.differing is None:
        yield "Repeat with `--against SOURCE`, the published checkpoint: it compares the weights that are used there."
    else:
        yield f"Read the code of {names}, and the numbers of the configuration that it uses."


def _after_success(report: Report) -> Iterator[str]:
    if report.unreached:
        yield _MORE_TOKENS
    if report.logits is None:
        yield "Compare everything, logits included: leave out `--layer` and `--taps`."
    if report.modes == (Mode.ISOLATED,):
        yield "Every layer ran on the golden's own input: `--mode both` also shows how errors add up from the tokens."
    if report.count(Verdict.TIE):
        yield (
            "Ties need nothing: two candidates whose scores rounding can swap. What follows was computed with the "
            "golden's choice."
        )

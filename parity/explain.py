"""A parity report in words: the verdict, and why a tap passes or fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dsv4_convert.golden.archive import Form
from dsv4_convert.golden.noise import Mode
from dsv4_convert.golden.reach import LayerReach
from dsv4_convert.parity.metrics import Distance, Verdict
from dsv4_convert.parity.report import Descent, Gate, Grown, Report, TapResult
from dsv4_convert.taps import by_name

#: Weights, operations or experts that a sentence names before it counts the others.
_NAMED = 3
#: What an index points at, by the form in which the golden keeps the tap.
_PART = {
    Form.WHOLE: "element",
    Form.ROWS: "element of the rows that are kept exactly",
    Form.SKETCH: "number of the sketches (of a row: its rms, then its projection)",
}


def verdict(report: Report) -> str:
    """The outcome in a few sentences: what diverges first, which operation is wrong by itself, which weight is why."""
    first = report.first_diverging
    if first is not None:
        parts = [f"FAIL: {_first(first)} {_counts(report)}", *_added(report), *_operation(report, first)]
        return " ".join([*parts, *_untouched(report)])
    if not report.agrees:
        return " ".join(["FAIL: nothing was compared.", *_untouched(report)])
    how = f"{report.arithmetic}, {' and '.join(report.modes)}{_steps(report)}"
    agreement = f"all {len(report.taps)} taps agree{_aside(report)}, {how}{_largest(report)}"
    gate = report.gate
    if report.passed:
        return f"PASS: {agreement}." if gate is None else f"PASS: {agreement}. {_baseline(gate)}"
    objections = []
    if not report.reached:
        objections.append(f"the golden does not reach everything: {'; '.join(map(missed, report.unreached))}")
    if gate is not None and not gate.passed:
        objections += _worse(gate)
    if gate is not None:
        objections += _unchanged(report, gate)
    return f"FAIL: {agreement}, but {'; and '.join(objections)}."


def _steps(report: Report) -> str:
    """Which tokens were compared, where some came one by one."""
    if not report.decode:
        return ""
    one_by_one = f"the last {report.decode} tokens one by one" if report.decode > 1 else "the last token by itself"
    only = {None: "", "prefill": "of which only those before were compared", "decode": "which alone were compared"}
    return f", {one_by_one}{', ' if report.phase else ''}{only[report.phase]}"


def growth(grown: Grown) -> str:
    """How far an error is beyond its record."""
    if grown.measure == "tokens":
        return (
            f"{grown.found:.1%} of the tokens choose otherwise, where {grown.recorded:.1%} are recorded and "
            f"{grown.allowed:.1%} allowed"
        )
    where = {"tap": "over the whole tap", "row": "in its worst row", "element": "at its worst element"}[grown.measure]
    return (
        f"{grown.found:.2f} times the noise floor {where}, where {grown.recorded:.2f} is recorded and "
        f"{grown.allowed:.2f} allowed"
    )


def growth_numbers(grown: Grown) -> tuple[str, str, str]:
    """What is recorded, allowed and found, for a table."""
    show = "{:.1%}".format if grown.measure == "tokens" else "{:.2f}x".format
    return show(grown.recorded), show(grown.allowed), show(grown.found)


def of_baseline(report: Report) -> list[str]:
    """What a baseline says of a run; nothing without one."""
    gate = report.gate
    if gate is None:
        return []
    said = [_baseline(gate)] if gate.passed else [f"{objection}." for objection in _worse(gate)]
    return [
        *said,
        *([f"{sentence}." for sentence in _unchanged(report, gate)] if report.agrees else _untouched(report)),
    ]


def _worse(gate: Gate) -> Iterator[str]:
    """Why a run within tolerance does not pass its baseline."""
    if gate.grown:
        first = gate.grown[0]
        names = len({(grown.mode, grown.name) for grown in gate.grown})
        more = (
            f"{names} taps have errors beyond their record" if names > 1 else "one tap has an error beyond its record"
        )
        which = ", the first of them" if names > 1 else ":"
        yield f"{more}{which} {first.name} ({by_name(first.name)[0].meaning}), {first.mode}: {growth(first)}"
    if gate.missing:
        yield f"{len(gate.missing)} recorded taps were not compared, the first of them {gate.missing[0].name}"
    if gate.update:
        return  # what has no record would have been added, and why it was not is said elsewhere
    if gate.unrecorded and not gate.compared:
        where = "; ".join(gate.platforms)
        yield f"{gate.path} has no record of this: {where}; --update-baseline adds it"
    elif gate.unrecorded:
        first_name = gate.unrecorded[0].name
        yield f"{len(gate.unrecorded)} taps have no record, the first of them {first_name}; --update-baseline adds them"


def _unchanged(report: Report, gate: Gate) -> Iterator[str]:
    """That a baseline was not written although that was wanted, of a run within tolerance."""
    if not gate.update or gate.updated:
        return
    if not report.reached or gate.missing:
        yield f"{gate.path} is unchanged, since only a run that reaches and compares everything is recorded"
    else:
        yield f"{gate.path} is unchanged, since it only gets stricter unless --reason says why it may not"


def _baseline(gate: Gate) -> str:
    """What a baseline that is passed says, and what became of it."""
    aside = f", {gate.left_out} recorded ones were not wanted" if gate.left_out else ""
    if not gate.updated:
        return f"No error has grown beyond its record in {gate.path}: {gate.compared} taps{aside}."
    raised = len({(grown.mode, grown.name) for grown in gate.grown})
    changes = [
        f"{count} taps {what}"
        for count, what in ((gate.added, "added"), (gate.tightened, "tightened"), (raised, "raised"))
        if count
    ]
    because = f" ({gate.reason})" if gate.reason else ""
    return f"{gate.path}: {', '.join(changes) or 'nothing to change'}{because}{aside}."


def _untouched(report: Report) -> Iterator[str]:
    """A run that fails records nothing."""
    if report.gate is not None and report.gate.update:
        yield f"{report.gate.path} is unchanged: only what is within tolerance is recorded."


def missed(layer: LayerReach) -> str:
    """What the golden leaves unchecked in a layer."""
    experts = [f"{layer.experts} of {layer.of} experts are reached"] if layer.experts < layer.of else []
    return f"layer {layer.layer}: {'; '.join([*layer.missed, *experts])}"


def noise_floor(report: Report) -> str:
    """What errors are measured by, for a reader who sees it for the first time."""
    return (
        f"In {report.arithmetic} rounding moves the reference itself; how far, token by token, is the noise floor. "
        "Errors are multiples of it: over the whole tap, in its worst row (a token, or a compressed entry), at its "
        "worst element."
    )


def why(result: TapResult, report: Report) -> str:
    """Why one tap passes or fails, for a reader who does not know the measures."""
    head = f"{result.name} ({result.meaning}), {result.mode}: {result.verdict}."
    if result.verdict is Verdict.EMPTY:
        return f"{head} The prompt makes no element of it, so it says nothing."
    if result.flips is not None:
        return f"{head} {_choices(result, report)}"
    if result.distance is None:
        return f"{head} It cannot be compared: {result.reason}."
    return f"{head} {_real(result, result.distance, report)}"


def operation(descent: Descent) -> Iterator[str]:
    """What descending into a layer found: operations, weights, experts."""
    names = [result.name for result in descent.wrong]
    if not names:
        yield "Fed with the golden's own inputs, no operation is wrong by itself: the error was inherited, or adds up."
        return
    if descent.fed:
        yield f"Fed with the golden's own inputs, {_list(names)} {'is' if len(names) == 1 else 'are'} wrong by itself."
    else:
        yield "All that is computed before it agrees, so the operation itself is wrong."
    if descent.experts:
        who = (
            f"expert {descent.experts[0]}" if len(descent.experts) == 1 else f"one of experts {_list(descent.experts)}"
        )
        yield f"Exactly the tokens that were sent to {who} are wrong."
    if descent.damaged:
        yield f"The stored bytes of {_list(descent.damaged)} are not those that were converted: see dsv4 verify."
    if not descent.weights:
        yield "It uses no weights: look at the configuration and the code."
    elif descent.differing is None:
        yield f"It uses {_list(descent.weights)}; with --against SOURCE its weights are compared with the published."
    elif not descent.differing:
        yield f"Its weights ({_list(descent.weights)}) are those of the source: look at the configuration and the code."
    for difference in (descent.differing or ())[:_NAMED]:
        yield f"{difference.sentence}."
    if (more := len(descent.differing or ()) - _NAMED) > 0:
        yield f"{more} more weights differ."


def _first(first: TapResult) -> str:
    where = "at the model level" if first.layer is None else f"in layer {first.layer}"
    return f"{first.name} is the first tap that diverges, {where} ({first.meaning}): {first.reason}."


def _counts(report: Report) -> str:
    return f"{report.count(Verdict.FAIL)} of {len(report.taps)} taps fail{_aside(report)}."


def _aside(report: Report) -> str:
    """Ties and empty taps, in brackets."""
    ties, empty = report.count(Verdict.TIE), report.count(Verdict.EMPTY)
    notes = [text for count, text in ((ties, f"{ties} with ties"), (empty, f"{empty} empty")) if count]
    return f" ({', '.join(notes)})" if notes else ""


def _largest(report: Report) -> str:
    rows = [tap.distance.noise.largest for tap in report.taps if tap.distance is not None]
    return f", errors at most {max(rows):.1f} times the noise floor, {report.limits.row:g} allowed" if rows else ""


def _operation(report: Report, first: TapResult) -> Iterator[str]:
    """What the descent into the layer of the first diverging tap says, or the first that found an operation."""
    descents = sorted(report.descents, key=lambda descent: (not descent.wrong, descent.layer != first.layer))
    for descent in descents[:1]:
        yield from operation(descent)


def _added(report: Report) -> Iterator[str]:
    """Which layers add error, and which only inherit it, where both modes ran."""
    if len(report.modes) < len(Mode):
        return
    failing = {
        mode: {tap.layer for tap in report.taps if tap.verdict is Verdict.FAIL and tap.mode is mode} for mode in Mode
    }
    adds = sorted(layer for layer in failing[Mode.ISOLATED] if layer is not None)
    inherits = sorted(layer for layer in failing[Mode.CUMULATIVE] - failing[Mode.ISOLATED] if layer is not None)
    if adds:
        yield f"{_layers(adds)} {_verb('add', adds)} error."
        if inherits:
            yield f"{_layers(inherits)} {_verb('inherit', inherits)} it and {_verb('add', inherits)} none."
    elif inherits and report.growth:
        most = max(report.growth, key=lambda layer: layer.added_noise)
        yield f"No layer adds more than its noise; layer {most.layer} adds most, {_times(most.added_noise)} the floor."


def _verb(verb: str, subjects: list[int]) -> str:
    return verb if len(subjects) > 1 else f"{verb}s"


def _layers(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"Layer {layers[0]}"
    consecutive = layers == list(range(layers[0], layers[-1] + 1))
    return f"Layers {layers[0]}-{layers[-1]}" if consecutive else f"Layers {_list(layers, limit=8)}"


def _real(result: TapResult, distance: Distance, report: Report) -> str:
    noise, limits = distance.noise, report.limits
    floor = (
        f"The error is {_times(noise.tap)} the noise floor over the whole tap ({limits.tap:g} allowed), "
        f"{_times(noise.row)} in its worst row ({limits.row:g}), {_times(noise.element)} at its worst element "
        f"({limits.element:g})."
    )
    worst = (
        f"The worst {_PART[result.form]} is {list(distance.worst)}: golden {distance.golden:.7g}, found "
        f"{distance.found:.7g}; over the tap the error is {distance.relative_rms:.1e} of the values."
    )
    if result.verdict is Verdict.PASS:
        return f"{floor} {worst}"
    rows = f"{distance.rows_outside} of {distance.rows} rows are beyond a limit; rounding does not explain that."
    return f"{floor} {worst} {rows}"


def _choices(result: TapResult, report: Report) -> str:
    flips = result.flips
    assert flips is not None
    if not flips.tokens:
        return f"All {flips.of} tokens choose what the golden chose."
    scores = (
        f"At token {list(flips.worst)} the golden's scores of the swapped candidates are {flips.margin:.2e} apart, "
        f"{_times(flips.noise)} the noise of such scores; {report.limits.tie:g} times may be a tie."
    )
    if result.verdict is Verdict.TIE:
        return (
            f"{flips.tokens} of {flips.of} tokens choose otherwise, all of them between scores that rounding can swap. "
            f"{scores} What follows was computed with the golden's choice."
        )
    if flips.margin == float("inf"):
        scores = (
            f"At token {list(flips.worst)} no score can excuse it: chosen by table, not visible, or too many or few."
        )
    return f"{result.reason[0].upper()}{result.reason[1:]}; {flips.ties} more are ties. {scores}"


def _times(multiple: float) -> str:
    return f"{multiple:.1f} times" if multiple < 1000 else f"{multiple:.1e} times"


def _list(items: Iterable[object], *, limit: int = _NAMED) -> str:
    names = [str(item) for item in items]
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"

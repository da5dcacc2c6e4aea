"""A parity report in words: the verdict, why a tap passes or fails, and what to do next.

The terminal, JUnit, GitHub and the page all show these words. In the advice, text between backticks is to be typed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

from dsv4_convert.golden.archive import TapForm
from dsv4_convert.golden.noise import Mode
from dsv4_convert.golden.prompt_coverage import LayerCoverage
from dsv4_convert.parity.logits import Position
from dsv4_convert.parity.metrics import MEASURED, Distance, Verdict, beyond, shown
from dsv4_convert.parity.report.data import Gate, GrownError, Localization, ParityReport, ProgramFacts, TapResult
from dsv4_convert.parity.unchecked import closing_step, unchecked_sentences
from dsv4_convert.show.units import few_ranges, number_of
from dsv4_convert.spec.config import STAGE

#: Makes a token id readable, or says that it cannot.
Decode = Callable[[int], str]
#: Weights, operations or experts that a sentence names before it counts the others.
_NAMED = 3
#: The thing that an index points at, by the form in which the golden keeps the tap.
_PART = {
    TapForm.WHOLE: "element",
    TapForm.ROWS: "element of the rows that are kept exactly",
    TapForm.SKETCH: "number of the sketches (of a row: its rms, then its projection)",
}
_SAME_WEIGHTS = (
    "Compare with a golden of these weights: `dsv4 golden record` makes one of their source. If they should be those "
    "of the golden, convert them again."
)
_PROGRAMS = ("streamed", "model")
#: Ways to compute routed experts, and forms of weights, in words.
_EXPERTS = {
    ("grouped", "expanded"): "grouped (ragged_dot)",
    ("grouped", "source"): "grouped (a kernel that decodes tiles)",
    ("packed", "expanded"): "packed",
    ("packed", "source"): "packed",
}
_WEIGHTS = {"expanded": "expanded", "source": "encoded"}
_MORE_TOKENS = (
    "The prompt does not reach everything, so that is not checked: record a golden with more tokens. The section on "
    "reach says what is missing."
)


@dataclasses.dataclass(frozen=True)
class Summary:
    """The verdict of a run: a headline, and labelled lines, each of which says one thing once.

    A failing run has the lines Where, Cause, Evidence and Next.
    """

    headline: str
    lines: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """The verdict as one paragraph."""
        return " ".join([f"{self.headline}.", *(f"{label}: {text}" for label, text in self.lines)])


def verdict(report: ParityReport) -> str:
    """The verdict as one paragraph."""
    return str(summarized(report))


def summarized(report: ParityReport) -> Summary:
    """The verdict: the first tap that diverges, the operation that is wrong by itself, the weight that is the cause."""
    first = report.first_diverging
    if first is not None:
        return _failing(report, first)
    if report.model is not None and (parting := report.model.first_diverging) is not None:
        return _compiled(report, report.model, parting)
    if not report.agrees:
        return Summary(
            "FAIL: nothing was compared",
            (
                ("Where", f"{report.golden.get('path', 'the golden')}."),
                ("Cause", "No tap that was asked for has an element in this golden."),
                ("Evidence", f"{number_of(report.count(Verdict.EMPTY), 'empty tap')}, none with elements."),
                *_last_lines(report),
            ),
        )
    agree = "the only tap agrees" if len(report.taps) == 1 else f"all {len(report.taps)} taps agree"
    agreement = f"{agree}{_aside(report)}, {report.arithmetic}, {' and '.join(report.modes)}"
    agreement += _steps(report)
    if report.passed:
        return Summary(f"PASS: {agreement}", tuple(_passing(report)))
    return Summary(f"FAIL: {agreement}, but {' and '.join(_objections(report))}", tuple(_objecting(report)))


def _failing(report: ParityReport, first: TapResult) -> Summary:
    where = _capital(first.key.where)
    headline = (
        f"FAIL: {_other_weights(report)}{first.name} is the first tap that diverges; {report.count(Verdict.FAIL)} of "
        f"{number_of(len(report.taps), 'tap')} {'fails' if report.count(Verdict.FAIL) == 1 else 'fail'}{_aside(report)}"
    )
    return Summary(
        headline,
        (
            ("Where", " ".join([f"{where}, {first.meaning}; {report.arithmetic}, {first.mode}.", *_added(report)])),
            ("Cause", " ".join(_cause(report, first))),
            ("Evidence", " ".join(_evidence(first))),
            *_last_lines(report),
        ),
    )


def _other_weights(report: ParityReport) -> str:
    """The weights that are not those of the golden, for the beginning of the verdict."""
    other = report.other_weights
    if not other:
        return ""
    return f"other weights than the golden's, in {number_of(len(other), 'parameter')} ({_list(other)}); "


def _compiled(report: ParityReport, model: ParityReport, first: TapResult) -> Summary:
    """Compiled layers that are wrong although every operation of the streamed ones is right."""
    headline = (
        f"FAIL: each operation is right; the compiled layer is not: {first.name} is the first tap that parts from the "
        f"streamed layer; {model.count(Verdict.FAIL)} of {len(model.taps)} taps fail{_aside(model)}"
    )
    where = _capital(first.key.where)
    how = "" if model.program is None else f", through {ways(model.program)}"
    return Summary(
        headline,
        (
            ("Where", f"{where}, {first.meaning}{how}; {model.arithmetic}, {first.mode}."),
            ("Cause", " ".join(_cause(model, first))),
            ("Evidence", " ".join(_evidence(first))),
            *_last_lines(report),
        ),
    )


def programs(report: ParityReport) -> Iterator[str]:
    """The programs that were compared, where, and those that were not; nothing for another implementation."""
    for of in report.programs:
        assert of.program is not None
        agreement = "agrees" if of.agrees else "does not agree"
        first = of.first_diverging
        yield f"{_program(of.program)}: {agreement}{'' if first is None else f', first at {first.name}'}."
    compared = {of.program.program for of in report.programs if of.program is not None}
    for name in _PROGRAMS if compared else ():
        if name not in compared:
            yield f"{name}: not proven, since {report.unproven or 'it was left out'}."


def _program(facts: ProgramFacts) -> str:
    how = f", {ways(facts)}" if facts.program == "model" else ""
    return f"{facts.program} on {facts.platform}{how}"


def ways(facts: ProgramFacts) -> str:
    """How a compiled layer ran."""
    found = [f"{_EXPERTS[facts.experts, facts.weights]} experts", f"{_WEIGHTS[facts.weights]} weights"]
    found += ["scanned"] if facts.scanned else []
    found += [] if facts.chunk is None else [f"in chunks of {facts.chunk} tokens"]
    return ", ".join(found)


def _last_lines(report: ParityReport) -> Iterator[tuple[str, str]]:
    """The next step, layers that were not compared, the programs, and a baseline that was to be written and is not."""
    yield "Next", next_steps(report)[0]
    yield from _left_out(report)
    if report.programs:
        yield "Programs", " ".join(programs(report))
    if unchanged := " ".join(_unchanged(report)):
        yield "Baseline", unchanged


def _cause(report: ParityReport, first: TapResult) -> Iterator[str]:
    """The golden's own reason, then other weights, then the localization that found an operation, first layer first."""
    yield from _other_revision(report)
    if len(report.other_weights or ()) > _NAMED:
        yield _whose(report)
    ranked = sorted(report.localizations, key=lambda found: (not found.wrong, found.layer != first.layer))
    for found in ranked[:1]:
        yield from operation(found, first)
    if not ranked:
        same_mode = [tap for tap in report.taps if tap.mode is first.mode]
        before = [tap.name for tap in same_mode[: same_mode.index(first)] if tap.verdict is not Verdict.EMPTY]
        agrees = f"{before[-1]}, the tap before it, agrees" if before else "no tap before it was compared"
        yield f"{_capital(agrees)}; no operation was run by itself."


def _evidence(first: TapResult) -> Iterator[str]:
    """The numbers that fail: one for the error, the worst element, the share of rows."""
    if (distance := first.distance) is None:
        yield f"{_capital(first.reason)}."
        return
    yield f"{_capital(first.reason)}; {distance.rows_outside} of {number_of(distance.rows, 'row')} beyond a limit."
    yield (
        f"Worst {_PART[first.form]} {list(distance.worst)}: golden {distance.golden:.4g}, found {distance.found:.4g}."
    )


def _passing(report: ParityReport) -> Iterator[tuple[str, str]]:
    worst = report.worst
    if worst is not None and worst.distance is not None:
        measure, multiple, allowed = worst.distance.noise.nearest(report.limits)
        where = "" if len(report.modes) == 1 else f", {worst.mode}"
        yield "Worst", f"{worst.name}{where}: {beyond(measure, multiple, allowed)}."
    if (logits := report.logits) is not None:
        yield (
            "Logits",
            f"Same most likely next token at {logits.top1:.2%} of {number_of(logits.positions, 'position')}; KL "
            f"divergence at most {logits.kl_max:.1e} nats.",
        )
    yield from _left_out(report)
    if report.prompt_coverage:
        yield "Reach", " ".join(f"{line}." for line in reach(report)) or "Every operation and every expert."
    if report.programs:
        yield "Programs", " ".join(programs(report))
    if report.unchecked is not None and (said := " ".join(unchecked_sentences(report.unchecked))):
        yield "Unchecked", said
        if (step := closing_step(report.unchecked, str(report.checkpoint.get("path", "CHECKPOINT")))) is not None:
            yield "Next", step
    if report.gate is not None:
        yield "Baseline", _baseline(report.gate)


def _left_out(report: ParityReport) -> Iterator[tuple[str, str]]:
    """The layers that one of the two sides lacks."""
    if report.layers_left_out:
        yield (
            "Layers",
            f"Compared are {layers_named(report, report.layers)}, which golden and checkpoint both hold; not "
            f"{few_ranges(report.layers_left_out)}.",
        )


def _whose(report: ParityReport) -> str:
    """Where the weights of both sides come from."""
    theirs, ours = (side.get("source") for side in (report.golden, report.checkpoint))
    names = [source.get("name") if isinstance(source, Mapping) else source for source in (theirs, ours)]
    return (
        f"The golden was recorded from {names[0]}, the weights are of {names[1]}: another model, or a conversion that "
        "changed them."
    )


def _objections(report: ParityReport) -> Iterator[str]:
    """Why a run within tolerance does not pass, in a few words."""
    if report.other_weights:
        yield f"{_other_weights(report).removesuffix('; ')}, were not all used"
    if not report.covered:
        yield "the run does not reach everything"
    if report.gate is not None and not report.gate.passed:
        yield "its baseline is not met"


def _objecting(report: ParityReport) -> Iterator[tuple[str, str]]:
    where, causes, evidence = [], [], []
    if report.other_weights:
        where.append(str(report.checkpoint.get("path", "the checkpoint")))
        causes.append(_whose(report))
        evidence.append(f"Sampled values of {_list(report.other_weights)} differ.")
    if not report.covered and report.uncovered:
        where.append(f"the prompt of {report.golden.get('path', 'the golden')}")
        causes.append("The prompt has too few tokens, or too few different ones.")
        evidence += [f"{_capital(line)}." for line in reach(report)]
    if not report.covered and report.unchecked is not None and report.unchecked.unproven:
        where.append(str(report.checkpoint.get("path", "the checkpoint")))
        causes.append("The checkpoint has weights that no token of the prompt uses.")
        evidence += unchecked_sentences(report.unchecked)
    gate = report.gate
    if gate is not None and not gate.passed:
        where.append(f"{gate.path} ({'; '.join(gate.platforms)})" if gate.platforms else gate.path)
        causes.append(
            "Code, versions or flags of XLA changed since the baseline was recorded."
            if gate.grown
            else "The run and the baseline hold different taps."
        )
        evidence += [f"{_capital(sentence)}." for sentence in _worse(gate)]
    yield "Where", f"{_capital('; '.join(where))}."
    yield "Cause", " ".join(causes)
    yield "Evidence", " ".join(evidence)
    yield from _last_lines(report)


def reach(report: ParityReport) -> list[str]:
    """The unchecked parts of the layers, one line for all layers that miss the same."""
    layers: dict[str, list[int]] = {}
    for layer in report.uncovered:
        for what in layer.missed:
            layers.setdefault(what, []).append(layer.layer)
    lines = [f"{layers_named(report, numbers)}: {what}" for what, numbers in layers.items()]
    lacking = [layer for layer in report.uncovered if layer.experts < layer.of]
    for of in dict.fromkeys(layer.of for layer in lacking):
        reached = {layer.layer: layer.experts for layer in lacking if layer.of == of}
        fewest, most = min(reached.values()), max(reached.values())
        span = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        lines.append(f"{layers_named(report, reached)}: {span} of {of} experts are reached")
    return lines


def layers_named(report: ParityReport, layers: Iterable[int | None]) -> str:
    """``layer 3``, ``layers 3, 5, … 41``, ``layers 2-5 and stages mtp.0-2 and the model level``, which is None."""
    numbers = set(layers)
    stages = {layer - report.stages.start for layer in numbers.intersection(report.stages) if layer is not None}
    backbone = {layer for layer in numbers.difference(report.stages) if layer is not None}
    kinds = (("layer", "", backbone), ("stage", STAGE, stages))
    named = [f"{noun}{'' if len(of) == 1 else 's'} {prefix}{few_ranges(of)}" for noun, prefix, of in kinds if of]
    return " and ".join([*named, *["the model level"] * (None in numbers)])


def _other_revision(report: ParityReport) -> Iterator[str]:
    """The reason that the golden itself gives for a difference."""
    if known := report.golden.get("reference", {}).get("versions", {}).get("revision"):
        yield f"The golden is of code that computes otherwise: {known}. That may explain all that follows."


def _steps(report: ParityReport) -> str:
    """The compared tokens, for a golden with decoded tokens."""
    if not report.decode:
        return ""
    one_by_one = f"the last {report.decode} tokens one by one" if report.decode > 1 else "the last token by itself"
    only = {None: "", "prefill": "of which only those before were compared", "decode": "which alone were compared"}
    return f", {one_by_one}{', ' if report.phase else ''}{only[report.phase]}"


def grown_by(grown: GrownError) -> str:
    """How far an error is beyond its record."""
    if grown.measure == "tokens":
        return (
            f"{grown.found:.1%} of the tokens choose otherwise, where {grown.recorded:.1%} are recorded and "
            f"{grown.allowed:.1%} allowed"
        )
    return (
        f"{grown.found:.2f} times the noise floor {MEASURED[grown.measure]}, where {grown.recorded:.2f} is recorded "
        f"and {grown.allowed:.2f} allowed"
    )


def grown_numbers(grown: GrownError) -> tuple[str, str, str]:
    """What is recorded, allowed and found, for a table."""
    show = "{:.1%}".format if grown.measure == "tokens" else "{:.2f}x".format
    return show(grown.recorded), show(grown.allowed), show(grown.found)


def baseline_sentences(report: ParityReport) -> list[str]:
    """The baseline's verdict on a run; empty without a baseline."""
    gate = report.gate
    if gate is None:
        return []
    said = [_baseline(gate)] if gate.passed else [f"{objection}." for objection in _worse(gate)]
    return [*said, *_unchanged(report)]


def _worse(gate: Gate) -> Iterator[str]:
    """Why a run within tolerance does not pass its baseline."""
    if gate.grown:
        first = gate.grown[0]
        names = len({(grown.mode, grown.name) for grown in gate.grown})
        more = (
            f"{names} taps have errors beyond their record" if names > 1 else "one tap has an error beyond its record"
        )
        which = ", the first of them" if names > 1 else ":"
        yield f"{more}{which} {first.name} ({first.meaning}), {first.mode}: {grown_by(first)}"
    if gate.missing:
        were = "tap was" if len(gate.missing) == 1 else "taps were"
        yield f"{len(gate.missing)} recorded {were} not compared, the first of them {gate.missing[0].name}"
    if gate.update:
        return  # what has no record would have been added, and why it was not is said elsewhere
    if gate.unrecorded and not gate.compared:
        where = "; ".join(gate.platforms)
        yield f"{gate.path} has no record of this: {where}; --update-baseline adds it"
    elif gate.unrecorded:
        first_name = gate.unrecorded[0].name
        have = "tap has" if len(gate.unrecorded) == 1 else "taps have"
        yield (
            f"{len(gate.unrecorded)} {have} no record, the first of them {first_name}; --update-baseline adds what is "
            "new"
        )


def _unchanged(report: ParityReport) -> Iterator[str]:
    """Says why a requested baseline was not written."""
    gate = report.gate
    if gate is None or not gate.update or gate.updated:
        return
    if not report.agrees:
        yield f"{gate.path} is unchanged: only what is within tolerance is recorded."
    elif not report.covered or gate.missing:
        yield f"{gate.path} is unchanged, since only a run that reaches and compares everything is recorded."
    else:
        yield f"{gate.path} is unchanged, since it only gets stricter unless --reason says why it may not."


def _baseline(gate: Gate) -> str:
    """The verdict of a baseline that the run passes, and whether its file changed."""
    ones = "one was" if gate.left_out == 1 else "ones were"
    aside = f", {gate.left_out} recorded {ones} not wanted" if gate.left_out else ""
    if gate.lacking:
        aside += f", and it has no record of {number_of(gate.lacking, 'other tap')} of this golden"
    if not gate.updated:
        return f"No error has grown beyond its record in {gate.path}: {number_of(gate.compared, 'tap')}{aside}."
    raised = len({(grown.mode, grown.name) for grown in gate.grown})
    changes = [
        f"{number_of(count, 'tap')} {what}"
        for count, what in ((gate.added, "added"), (gate.tightened, "tightened"), (raised, "raised"))
        if count
    ]
    because = f" ({gate.reason})" if gate.reason else ""
    return f"{gate.path}: {', '.join(changes) or 'nothing to change'}{because}{aside}."


def missed(report: ParityReport, layer: LayerCoverage) -> str:
    """The part of a layer that the golden leaves unchecked."""
    experts = [f"{layer.experts} of {layer.of} experts are reached"] if layer.experts < layer.of else []
    return f"{layers_named(report, [layer.layer])}: {'; '.join([*layer.missed, *experts])}"


def noise_floor(report: ParityReport) -> str:
    """Explains the noise floor to a first-time reader."""
    return (
        f"In {report.arithmetic} rounding moves the reference itself; how far, token by token, is the noise floor. "
        "Errors are multiples of it: over the whole tap, in its worst row (a token, or a compressed entry), at its "
        "worst element."
    )


def why(result: TapResult, report: ParityReport) -> str:
    """Why one tap passes or fails, for a reader who does not know the measures."""
    head = f"{result.name} ({result.meaning}), {result.mode}: {result.verdict}."
    if result.verdict is Verdict.EMPTY:
        return f"{head} The prompt makes no element of it, so it says nothing."
    if result.flips is not None:
        return f"{head} {_choices(result, report)}"
    if result.distance is None:
        return f"{head} It cannot be compared: {result.reason}."
    return f"{head} {_real(result, result.distance, report)}"


def position_cells(position: Position, decode: Decode) -> tuple[str, ...]:
    """A position for a table: where, its token, KL, the most likely next token in the golden and in ours, their gap."""
    return (
        "{}, {}".format(*position.at),
        decode(position.token),
        f"{position.kl:.1e}",
        decode(position.golden),
        decode(position.found),
        f"{position.gap:.1e}",
    )


def operation(found: Localization, first: TapResult | None = None) -> Iterator[str]:
    """The findings of a localization: operations, weights, experts. ``first``, if given, was named just before."""
    names = [result.name for result in found.wrong]
    if not names:
        yield "Fed with the golden's own inputs, no operation is wrong by itself: the error was inherited, or adds up."
        return
    if found.teacher_forced and first is not None and names == [first.name]:
        yield "Fed with the golden's own inputs, it is wrong by itself."
    elif found.teacher_forced:
        alone = "is wrong by itself" if len(names) == 1 else "are wrong by themselves"
        yield f"Fed with the golden's own inputs, {_list(names)} {alone}."
    elif found.handed_on:
        yield "The layer that makes it computes it rightly, so something else is handed on."
    else:
        yield "All that is computed before it agrees, so the operation itself is wrong."
    for result in found.wrong[:_NAMED]:
        if result.explained is not None:
            yield result.explained.describe(result.name)
    if found.experts:
        who = f"expert {found.experts[0]}" if len(found.experts) == 1 else f"one of experts {_list(found.experts)}"
        yield f"Exactly the tokens that were sent to {who} are wrong."
    if found.damaged:
        yield f"The stored bytes of {_list(found.damaged)} are not those that were converted."
    uses, whose = ("It uses", "Its") if len(names) == 1 else ("They use", "Their")
    if not found.weights:
        yield f"{uses} no weights: look at the configuration and the code."
    elif found.differing is None:
        yield f"{uses} {_list(found.weights)}."
    elif not found.differing:
        weights = _list(found.weights)
        yield f"{whose} weights ({weights}) are those of the source: look at the configuration and the code."
    for difference in (found.differing or ())[:_NAMED]:
        yield f"{difference.sentence}."
    if (more := len(found.differing or ()) - _NAMED) > 0:
        yield f"{number_of(more, 'more weight')} {'differs' if more == 1 else 'differ'}."


def _aside(report: ParityReport) -> str:
    """Ties and empty taps, in brackets."""
    ties, empty = report.count(Verdict.TIE), report.count(Verdict.EMPTY)
    notes = [text for count, text in ((ties, f"{ties} with ties"), (empty, f"{empty} empty")) if count]
    return f" ({', '.join(notes)})" if notes else ""


def _added(report: ParityReport) -> Iterator[str]:
    """The layers that add error and those that only inherit it, if both modes ran."""
    if len(report.modes) < len(Mode):
        return
    failing = {
        mode: {tap.layer for tap in report.taps if tap.verdict is Verdict.FAIL and tap.mode is mode} for mode in Mode
    }
    adds = sorted(layer for layer in failing[Mode.ISOLATED] if layer is not None)
    inherits = sorted(layer for layer in failing[Mode.CUMULATIVE] - failing[Mode.ISOLATED] if layer is not None)
    if adds:
        yield f"{_capital(layers_named(report, adds))} {_verb('add', adds)} error."
        if inherits:
            named = _capital(layers_named(report, inherits))
            yield f"{named} {_verb('inherit', inherits)} it and {_verb('add', inherits)} none."
    elif inherits and report.error_splits:
        most = max(report.error_splits, key=lambda layer: layer.added_noise)
        yield f"No layer adds more than its noise; layer {most.layer} adds most, {_times(most.added_noise)} the floor."


def _verb(verb: str, subjects: list[int]) -> str:
    return verb if len(subjects) > 1 else f"{verb}s"


def _capital(text: str) -> str:
    """A sentence's first letter; names of taps and files stay as they are."""
    word = text.split(" ", 1)[0]
    return text if "." in word.rstrip(".") or "/" in word else text[:1].upper() + text[1:]


def _real(result: TapResult, distance: Distance, report: ParityReport) -> str:
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
    if result.systematic is not None:
        worst = f"{worst} {_capital(result.systematic.reason)}."
    if result.verdict is Verdict.PASS:
        return f"{floor} {worst}"
    rows = f"{distance.rows_outside} of {distance.rows} rows are beyond a limit; rounding does not explain that."
    return f"{floor} {worst} {rows}"


def _choices(result: TapResult, report: ParityReport) -> str:
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
            f"{scores} The taps after it were computed with the golden's choice."
        )
    if flips.margin == float("inf"):
        scores = (
            f"At token {list(flips.worst)} no score can excuse it: chosen by table, not visible, or too many or few."
        )
    return f"{result.reason[0].upper()}{result.reason[1:]}; {flips.ties} more are ties. {scores}"


def _times(multiple: float) -> str:
    return f"{shown(multiple)} times"


def _list(items: Iterable[object], *, limit: int = _NAMED) -> str:
    names = [str(item) for item in items]
    first = ", ".join(names[:limit])
    return first if len(names) <= limit else f"{first} and {len(names) - limit} more"


def next_steps(report: ParityReport) -> list[str]:
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


def _after_failure(report: ParityReport) -> Iterator[str]:
    first = report.first_diverging
    assert first is not None
    for _ in _other_revision(report):
        yield "Record the golden again with the `inference` folder of the newest revision, and compare with that."
    if len(report.other_weights or ()) > _NAMED:
        yield _SAME_WEIGHTS
    yield from _at_highest_precision(report)
    wrong = [found for found in report.localizations if found.wrong]
    for found in wrong[:1]:
        yield from _after_localization(found, str(report.checkpoint.get("path", "CHECKPOINT")))
    if not report.localizations:
        yield f"Read the code that computes `{first.short}` from what agrees before it."
    elif not wrong and Mode.ISOLATED in report.modes:
        yield (
            "No operation is wrong by itself, so errors add up: look at which operations of the layer amplify them, "
            "and whether weights and activations have the dtype that they should have."
        )
    if report.modes == (Mode.CUMULATIVE,) and all(found.teacher_forced for found in report.localizations):
        yield "Repeat with `--mode both`: it says which layers add error and which only inherit it."
    if report.other_weights is None and report.localizations:
        yield (
            "The golden does not know the values of its weights, so whether these are the same is open: record it "
            "again with this version of dsv4."
        )
    if any(not (found.teacher_forced or found.handed_on) for found in report.localizations):
        yield "A compact golden names the first fault only: repeat after fixing it, or compare with a whole golden."
    if first.layer is not None and len(report.layers) > 1 and Mode.ISOLATED in report.modes:
        yield f"While looking for it, `--layer {first.key.label}` runs that layer alone."


def _at_highest_precision(report: ParityReport) -> Iterator[str]:
    if report.platform.get("precision", "highest") != "highest":
        yield "Repeat with `--precision highest`: the limits are those of float32 products with all their bits."


def _after_objections(report: ParityReport) -> Iterator[str]:
    """All is within tolerance, but of other weights, not when compiled, not reached, or not as its baseline has it."""
    if report.other_weights:
        yield _SAME_WEIGHTS
    if report.model is not None and (parting := report.model.first_diverging) is not None:
        yield from _at_highest_precision(report)
        yield (
            f"Look at how the compiled layer computes `{parting.short}`: its weights are right, as the streamed layer "
            f"shows. `--program model --layer {parting.layer}` runs it alone."
        )
    if not report.covered and report.uncovered:
        yield _MORE_TOKENS
    if not report.covered and report.unchecked is not None and report.unchecked.unproven:
        if report.unchecked.differing:
            yield "Convert again with this version of dsv4."
        else:
            yield "Give `--against SOURCE`, with which the weights that no token uses are then compared, bit by bit."
    gate = report.gate
    if gate is None or gate.passed:
        return
    if gate.grown:
        yield from _at_highest_precision(report)
        first = gate.grown[0].name
        yield (
            f"Find what made `{first}` less exact since it was recorded: its code, a version (the baseline's history "
            "and its commits say which were there), or flags of XLA. Later taps may only inherit the error."
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


def _after_localization(found: Localization, checkpoint: str) -> Iterator[str]:
    names = ", ".join(result.name for result in found.wrong[:3])
    if found.damaged:
        yield f"Convert again; `dsv4 verify {checkpoint}` lists the files that changed."
    elif found.differing:
        yield (
            f"Convert again with this version of dsv4. If the weight differs again, `dsv4 names "
            f"{found.differing[0].path}` shows the rule that made it."
        )
    elif found.weights and found.differing is None:
        yield "Repeat with `--against SOURCE`, the published checkpoint: it compares the weights that are used there."
    else:
        yield f"Read the code of {names}, and the numbers of the configuration that it uses."


def _after_success(report: ParityReport) -> Iterator[str]:
    if report.uncovered:
        yield _MORE_TOKENS
    if report.unchecked is not None:
        step = closing_step(report.unchecked, str(report.checkpoint.get("path", "CHECKPOINT")))
        yield from () if step is None else (step,)
    if report.logits is None:
        yield "Compare everything, logits included: leave out `--layer` and `--taps`."
    if report.modes == (Mode.ISOLATED,):
        yield "Every layer ran on the golden's own input: `--mode both` also shows how errors add up from the tokens."
    if report.count(Verdict.TIE):
        yield (
            "Ties need nothing: two candidates whose scores rounding can swap. The taps after them were "
            "computed with the golden's choice."
        )

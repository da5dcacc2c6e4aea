"""The numbers that a page's figures show, out of a report: what is drawn is also what the page embeds as JSON.

A figure without numbers is None, or absent from its list.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsv4_convert.golden.layout import STREAMS
from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.detail import EDGES, Detail, Prompt, Sample
from dsv4_convert.parity.logits import Position
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import ErrorSplit, ParityReport, TapResult
from dsv4_convert.parity.tolerances import Limits
from dsv4_convert.spec.taps import TapKey

Array = np.ndarray[Any, Any]

#: The lines over depth, by tap.
LINES = {"attn.wo_b": "attention", "ffn": "experts", STREAMS.name: "streams"}
#: Columns of a map over tokens, and points over positions; a longer prompt is binned by its largest.
COLUMNS = 384
#: Blocks whose ends are marked in a map, at most.
BLOCKS = 64
#: Failing taps that can be opened; all of them are in the table and in the page's JSON.
SHOWN = 150


@dataclasses.dataclass(frozen=True)
class Line:
    """Multiples of the noise floor by layer, None where the layer was not compared, and the layers where it fails."""

    name: str
    tap: str
    multiples: tuple[float | None, ...]
    failing: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Depth:
    """Error over depth, in one mode. ``first``: the layer of the first tap that diverges, where there is one."""

    mode: Mode
    layers: tuple[int, ...]
    lines: tuple[Line, ...]
    first: int | None


@dataclasses.dataclass(frozen=True)
class Course:
    """The error through one layer, operation by operation. ``wrong``: wrong on the golden's own inputs."""

    mode: Mode
    where: str
    taps: tuple[str, ...]
    multiples: tuple[float, ...]
    verdicts: tuple[Verdict, ...]
    wrong: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TokenMap:
    """Multiples by layer and position, the largest of all prompts and of the positions ``starts[i]`` to
    ``starts[i + 1]``; None where nothing was compared. ``what``: ``streams``, ``worst``, or the name of one tap."""

    mode: Mode
    what: str
    layers: tuple[str, ...]
    starts: tuple[int, ...]
    multiples: tuple[tuple[float | None, ...], ...]
    window: int
    block: int | None
    decode: int


@dataclasses.dataclass(frozen=True)
class Failing:
    """A failing tap: its result, and what is drawn of its numbers, where some were kept."""

    result: TapResult
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    exact: int = 0
    infinite: int = 0
    found: tuple[float, ...] = ()
    golden: tuple[float, ...] = ()
    multiples: tuple[float, ...] = ()
    tokens: TokenMap | None = None


@dataclasses.dataclass(frozen=True)
class Divergence:
    """KL divergence by position, in nats: the largest of all prompts and of each bin. ``differs``: whether the most
    likely next token is another one somewhere in it."""

    mode: Mode
    positions: tuple[int, ...]
    kl: tuple[float, ...]
    differs: tuple[bool, ...]
    step: int
    top1: float


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How one layer's choices agree."""

    layer: str
    mode: Mode
    what: str
    how: str
    tokens: int
    equal: int
    ties: int
    failing: int
    noise: float
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class PageData:
    """Everything that the page draws."""

    depth: tuple[Depth, ...]
    course: Course | None
    growth: tuple[ErrorSplit, ...]
    maps: tuple[TokenMap, ...]
    failing: tuple[Failing, ...]
    agreements: tuple[Agreement, ...]
    divergences: tuple[Divergence, ...]


def page_data(report: ParityReport) -> PageData:
    """The numbers of all figures."""
    detail = report.detail
    return PageData(
        depth=tuple(depth for mode in report.modes if (depth := _depth(report, mode)) is not None),
        course=_course(report),
        growth=report.error_splits,
        maps=() if detail is None else tuple(_maps(report, detail)),
        failing=tuple(_failing(report)),
        agreements=tuple(_agreement(tap, detail) for tap in report.taps if tap.flips is not None),
        divergences=() if detail is None else tuple(_divergence(*item) for item in detail.positions.items() if item[1]),
    )


def kind(prompt: Prompt, layer: int) -> str:
    """The kind of a layer in two or three letters: its attention, and an asterisk for routing by table."""
    return prompt.config.abbreviate(layer) + ("*" if prompt.config.hashed(layer) else "")


def _depth(report: ParityReport, mode: Mode) -> Depth | None:
    taps = {(tap.layer, tap.short): tap for tap in report.taps if tap.mode is mode and tap.layer is not None}
    layers = tuple(sorted({tap.layer for tap in taps.values() if tap.layer is not None}))
    if len(layers) < 2:
        return None
    lines = []
    for short, name in LINES.items():
        there = [taps.get((layer, short)) for layer in layers]
        failing = tuple(
            layer
            for layer, tap in zip(layers, there, strict=True)
            if tap is not None and tap.verdict is Verdict.FAIL
        )  # fmt: skip
        multiples = tuple(None if tap is None else tap.multiple for tap in there)
        if any(value is not None for value in multiples):
            lines.append(Line(name, short, multiples, failing))
    first = next((tap.layer for tap in report.taps if tap.mode is mode and tap.verdict is Verdict.FAIL), None)
    return Depth(mode, layers, tuple(lines), first) if lines else None


def _course(report: ParityReport) -> Course | None:
    """Through the layer that diverges first, or else the one that comes closest to a limit."""
    measured = [tap for tap in report.taps if tap.multiple is not None]
    shown = report.first_diverging or max(measured, key=lambda tap: _share(tap, report.limits), default=None)
    if shown is None:
        return None
    taps = [tap for tap in measured if (tap.layer, tap.mode) == (shown.layer, shown.mode)]
    localizations = (localization for localization in report.localizations if localization.layer == shown.layer)
    wrong = tuple(result.short for localization in localizations for result in localization.wrong)
    return Course(
        mode=shown.mode,
        where="the model level" if shown.layer is None else shown.key.where,
        taps=tuple(tap.short for tap in taps),
        multiples=tuple(value for tap in taps if (value := tap.multiple) is not None),
        verdicts=tuple(tap.verdict for tap in taps),
        wrong=wrong,
    )


def _share(tap: TapResult, limits: Limits) -> float:
    return 0.0 if tap.distance is None else tap.distance.noise.largest_share(limits)


def _maps(report: ParityReport, detail: Detail) -> list[TokenMap]:
    maps = []
    for mode in report.modes:
        layers = sorted((layer for of, layer in detail.tokens if of is mode and layer is not None))
        rows: list[int | None] = [*layers, *([None] if (mode, None) in detail.tokens else [])]
        for what in ("worst", "streams"):
            of = {layer: getattr(detail.tokens[mode, layer], what) for layer in rows}
            drawn = _map(detail.prompt, mode, what, of)
            maps += [] if drawn is None else [drawn]
    return maps


def _map(prompt: Prompt, mode: Mode, what: str, errors: Mapping[int | None, Array]) -> TokenMap | None:
    """The map of errors ``[B, S]`` by layer; None if nothing was compared token by token."""
    known = [layer for layer in errors if not np.isnan(errors[layer]).all()]
    if not known:
        return None
    step = max(1, math.ceil(prompt.tokens / COLUMNS))
    return TokenMap(
        mode=mode,
        what=what,
        layers=tuple(TapKey.of(prompt.config, layer, STREAMS).label for layer in known),
        starts=(*range(0, prompt.tokens, step), prompt.tokens),
        multiples=tuple(_binned(errors[layer], step) for layer in known),
        window=prompt.config.sliding_window,
        block=_block(prompt, known),
        decode=prompt.decode,
    )


def _block(prompt: Prompt, layers: Sequence[int | None]) -> int | None:
    """Tokens of the longest block that any of the layers compresses, if there are few enough of them to be marked."""
    longest = max((prompt.config.ratio_of(layer) for layer in layers if layer is not None), default=0)
    return longest if longest and longest <= prompt.tokens <= BLOCKS * longest else None


def _binned(errors: Array, step: int) -> tuple[float | None, ...]:
    """``[B, S]`` to the largest of every bin, NaN to None."""
    largest = np.fmax.reduce(errors, axis=0)
    bins = np.fmax.reduceat(largest, np.arange(0, len(largest), step))
    return tuple(None if math.isnan(value) else rounded(value) for value in bins)


def rounded(value: float) -> float:
    """Four digits, which is more than a picture shows."""
    return float(f"{value:.4g}")


def _failing(report: ParityReport) -> list[Failing]:
    """The failing taps in order of execution, with what is drawn of those that have a sample."""
    detail = report.detail
    samples = {} if detail is None else {(sample.key, sample.mode): sample for sample in detail.samples}
    failing = [tap for tap in report.taps if tap.verdict is Verdict.FAIL][:SHOWN]
    return [
        Failing(tap)
        if detail is None or (sample := samples.get((tap.key, tap.mode))) is None
        else _drawn(tap, sample, detail.prompt)
        for tap in failing
    ]


def _drawn(result: TapResult, sample: Sample, prompt: Prompt) -> Failing:
    used = np.flatnonzero(sample.counts)
    low, high = (int(used[0]), int(used[-1])) if used.size else (0, 0)
    low, high = max(low, 1), min(max(high, low, 1), len(EDGES) - 1)
    counts = sample.counts[low : high + 1].copy()
    if used.size:  # what is beyond the outermost edges joins the outermost bins
        counts[0] += sample.counts[:low].sum()
        counts[-1] += sample.counts[high + 1 :].sum()
    return Failing(
        result=result,
        edges=tuple(rounded(edge) for edge in EDGES[low - 1 : high + 1]),
        counts=tuple(int(count) for count in counts),
        exact=sample.exact,
        infinite=sample.infinite,
        found=tuple(rounded(value) for value in sample.found),
        golden=tuple(rounded(value) for value in sample.golden),
        multiples=tuple(rounded(value) for value in sample.multiples),
        tokens=_map(prompt, sample.mode, str(sample.key), {sample.key.layer: sample.tokens}),
    )


#: A tap of chosen indices -> the module that chooses.
_CHOICES = {
    "ffn.gate.experts": "experts",
    "attn.indexer.chosen": "indexer",
    "input.chosen": "indexer",
    "attn.indexer.candidates": "candidate blocks",
    "input.candidates": "candidate blocks",
    "engram.ids": "rows of n-grams",
    "tokens": "drafted tokens",
}


def _agreement(tap: TapResult, detail: Detail | None) -> Agreement:
    assert tap.flips is not None
    assert tap.layer is not None
    hashed = tap.short == "ffn.gate.experts" and detail is not None and detail.prompt.config.hashed(tap.layer)
    how = "by score" if tap.key.tap.scores else "by hash" if tap.key.tap.origin is None else "of an earlier layer"
    return Agreement(
        layer=tap.key.label,
        mode=tap.mode,
        what=_CHOICES[tap.short],
        how="by table" if hashed else how,
        tokens=tap.flips.of,
        equal=tap.flips.of - tap.flips.tokens,
        ties=tap.flips.ties,
        failing=tap.flips.tokens - tap.flips.ties,
        noise=tap.flips.noise,
        verdict=tap.verdict,
    )


def _divergence(mode: Mode, positions: Sequence[Position]) -> Divergence:
    by_position: dict[int, list[Position]] = {}
    last = max(position.at[1] for position in positions)
    step = max(1, math.ceil((last + 1) / COLUMNS))
    for position in positions:
        by_position.setdefault(position.at[1] // step * step, []).append(position)
    order = sorted(by_position)
    return Divergence(
        mode=mode,
        positions=tuple(order),
        kl=tuple(_largest_kl(by_position[at]) for at in order),
        differs=tuple(any(p.golden != p.found for p in by_position[at]) for at in order),
        step=step,
        top1=float(np.mean([position.golden == position.found for position in positions])),
    )


def _largest_kl(positions: Sequence[Position]) -> float:
    values = [position.kl for position in positions]
    return math.nan if any(math.isnan(value) for value in values) else rounded(max(values))

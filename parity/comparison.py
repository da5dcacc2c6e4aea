"""Judging taps against a golden, one layer at a time, in order of execution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

import numpy as np

from dsv4_convert.errors import BadInput
from dsv4_convert.golden.archive import Golden, View
from dsv4_convert.golden.layout import (
    DTYPES,
    calls,
    carried,
    is_drafted,
    is_fed,
    rows_of,
    token_ids,
    tokens_of_row,
)
from dsv4_convert.golden.noise import Mode, row_sizes
from dsv4_convert.parity.choices import Scores, compare_choices
from dsv4_convert.parity.detail import ComparedPart, Detail
from dsv4_convert.parity.floor import Floor, floor_of
from dsv4_convert.parity.forward import Activations
from dsv4_convert.parity.metrics import Verdict, compare, mismatch, rows_beyond
from dsv4_convert.parity.report.data import TapResult
from dsv4_convert.parity.systematic import ExpertShares, Independence, Systematic, along_bias, systematic
from dsv4_convert.parity.tolerances import UNIT, limits_of, release_unit
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Kind, Rule, parameters
from dsv4_convert.spec.tap import AFTER, BEFORE, Values
from dsv4_convert.spec.taps import TapKey, tap_named, taps_of
from dsv4_convert.weights.parameters import Parameters

Array = np.ndarray[Any, Any]
#: Where the channels of a head have their errors in common, those of the shares of its keys.
_SHARES = "attn.context"
#: The last part of the path of a compressor's position bias.
_BIAS = ".ape"
_EXPERTS = "ffn.gate.experts"
_ROUTING = (_EXPERTS, "ffn.gate.weights")
#: The blocks of entries that a layer may choose from.
_CANDIDATES = tap_named("input.candidates")


class Phase(StrEnum):
    """The tokens of a golden that are compared, where some were given one by one."""

    PREFILL = "prefill"
    #: And the state that the first of them starts from.
    DECODE = "decode"


class Comparison:
    """Compares what a model in ``dtype`` gives with a golden and its noise floor of that dtype.

    ``phase``: the tokens that are compared, None for all. ``weights``: the model's, where they are known.
    """

    def __init__(
        self, golden: Golden, dtype: str, phase: Phase | None = None, *, weights: Parameters | None = None
    ) -> None:
        self.golden = golden
        self.dtype = dtype
        self.limits = limits_of(dtype, golden.numerics)
        self._phase = phase
        self._weights = weights
        self._config = golden.config

    def judge(
        self,
        activations: Activations,
        mode: Mode,
        keys: Iterable[TapKey],
        *,
        teacher_forced: bool = False,
        detail: Detail | None = None,
    ) -> list[TapResult]:
        """Results of the taps ``keys`` that are among the activations, in the order of ``keys``.

        ``teacher_forced``: every operation had the golden's own inputs, so a choice was made by the golden's scores.
        ``detail``: collects the numbers that figures need.

        Raises:
            UsageError: the golden does not carry the tap, or no noise floor of the dtype.
            BadInput: its bytes are not those that were recorded.
        """
        there = (key for key in keys if key in activations)
        there = (key for key in there if not self._is_later(key))
        return [self._one(key, activations, mode, teacher_forced=teacher_forced, detail=detail) for key in there]

    def compares(self, key: TapKey, mode: Mode) -> bool:
        """Whether judging a tap says anything: it has elements in the compared tokens, and the model computes it."""
        if is_fed(key, mode) or self._is_later(key):
            return False
        return bool(math.prod(self.golden.shape(key))) and self._rows(key) != []

    def choices(self, layer: int) -> Activations:
        """The golden's discrete choices in a layer; none if the layer was not recorded."""
        return {key: self.golden.read(key) for key in self._recorded(layer) if key.tap.values is Values.CHOICE}

    def everything(self, layer: int | None) -> Activations:
        """Every recorded tap of a layer, or of the model level."""
        return {key: self.golden.read(key) for key in self._recorded(layer)}

    def entering(self, layer: int | None) -> dict[str, Array]:
        """The recorded values that a layer, or the head (None), starts from in isolated mode."""
        return {name: self.golden.read(key) for name, key in carried(self._config, layer).items()}

    def floor(self, key: TapKey, views: Sequence[View], mode: Mode) -> Floor:
        """The noise floor of a tap that has elements, of which the golden keeps ``views``.

        Raises:
            BadInput: rounding does not explain it.
        """
        first = views[0]
        # The first number of a sketched row is its rms.
        sizes = row_sizes(first.values if first.sketched is None else first.values[..., :1])
        noise = self.golden.noise(key, self.dtype, mode)
        if problem := self.golden.noise_problem(key, self.dtype, mode, noise, sizes):
            raise BadInput(problem)
        if self.golden.numerics == "plain":
            return floor_of(sizes, noise, UNIT[self.dtype])
        least = release_unit(self._config, key.tap.name, mode)
        return floor_of(sizes, noise, least.row, least.tap)

    def rows_beyond(self, key: TapKey, found: Array, mode: Mode) -> Array:
        """The rows ``[B, S]`` of a tap of the golden's shape whose error is beyond a limit."""
        views = self.golden.views(key)
        floor = self.floor(key, views, mode)
        beyond = np.zeros(found.shape[:2], bool)
        for view in views:
            rows = slice(None) if view.rows is None else list(view.rows)
            beyond[:, rows] |= rows_beyond(view.of(found), view.values, floor.at(view.rows), self.limits)
        return beyond

    def judge_golden(self, other: Golden, key: TapKey) -> TapResult:
        """Judge a tap of another golden as if a model had computed it from the tokens.

        Raises:
            UsageError: the other one keeps less of it.
        """
        if other.compact != self.golden.compact or key.tap.values is Values.CHOICE:
            (result,) = self.judge({key: other.read(key)}, Mode.CUMULATIVE, [key])
            return result
        parts = [view.values for view in other.views(key)]
        return self._real(key, parts, self.golden.views(key), Mode.CUMULATIVE)

    def within_phase(self, key: TapKey, part: Array, view: View) -> tuple[Array, View]:
        """Restrict ``view`` of a tap, and the same part of ours, to the rows that are compared."""
        return _within(part, view, self._rows(key))

    def _recorded(self, layer: int | None) -> tuple[TapKey, ...]:
        return self.golden.taps(layer) if layer is None or layer in self.golden.layers else ()

    def _one(
        self, key: TapKey, activations: Activations, mode: Mode, *, teacher_forced: bool, detail: Detail | None
    ) -> TapResult:
        found = activations[key]
        if key.tap.values is Values.REAL:
            if reason := mismatch(found, self.golden.shape(key), DTYPES[key.tap.values]):
                return TapResult(key=key, mode=mode, verdict=Verdict.FAIL, reason=reason, shape=found.shape)
            views = self.golden.views(key)
            result = self._real(key, [view.of(found) for view in views], views, mode, detail)
            return self._judge_systematic(result, found, views, teacher_forced=teacher_forced)
        scores = self._scores(key, activations, mode, teacher_forced=teacher_forced)
        rows = self._rows(key)
        golden = self.golden.read(key)
        if rows is not None and found.shape == golden.shape:
            found, golden, scores = found[:, rows], golden[:, rows], None if scores is None else scores.at(rows)
        verdict, flips, reason = compare_choices(found, golden, scores, self.limits)
        if flips is not None and flips.worst and rows is not None:
            flips = dataclasses.replace(flips, worst=(flips.worst[0], rows[flips.worst[1]]))
        return TapResult(key=key, mode=mode, verdict=verdict, reason=reason, shape=found.shape, flips=flips)

    def _real(
        self, key: TapKey, parts: Sequence[Array], views: Sequence[View], mode: Mode, detail: Detail | None = None
    ) -> TapResult:
        """Compare a tap in every form that the golden has of it: the one that comes out worst counts."""
        shape = self.golden.shape(key)
        floor = self.floor(key, views, mode) if math.prod(shape) else None
        results = []
        compared = []
        for part, view in zip(parts, views, strict=True):
            form = view.form
            part, view = self.within_phase(key, part, view)
            at = None if floor is None else floor.at(view.rows)
            verdict, distance, reason = compare(part, view.values, at, self.limits)
            if detail is not None and distance is not None and at is not None:
                compared.append(ComparedPart(part, view.values, at, view.rows, form))
            if distance is not None and view.rows is not None:
                batch, row, *rest = distance.worst
                distance = dataclasses.replace(distance, worst=(batch, view.rows[row], *rest))
            results.append(
                TapResult(
                    key=key,
                    mode=mode,
                    verdict=verdict,
                    reason=reason,
                    shape=shape,
                    distance=distance,
                    form=form,
                )
            )
        worst = max(results, key=self._share)
        if detail is not None:
            detail.add(key, mode, compared, failing=worst.form if worst.verdict is Verdict.FAIL else None)
        return worst

    def _share(self, result: TapResult) -> float:
        return 0.0 if result.distance is None else result.distance.noise.largest_share(self.limits)

    def _judge_systematic(
        self, result: TapResult, found: Array, views: Sequence[View], *, teacher_forced: bool
    ) -> TapResult:
        """Measure the systematic error of a tap whose operation had the golden's inputs, or that ran from the tokens.

        In bfloat16 it decides. In float32 a scale that is wrong by the least amount is beyond the limits of size.
        """
        decides = self.dtype == "bfloat16" and self.golden.numerics == "plain"
        from_tokens = result.mode is Mode.CUMULATIVE
        if result.distance is None or result.key.tap.is_state or not (teacher_forced or (from_tokens and decides)):
            return result
        measured = self._systematic(result.key, views[0].of(found), views[0], inherited=not teacher_forced)
        result = dataclasses.replace(result, systematic=measured)
        if measured is None or not decides or measured.share <= 1 or result.verdict is Verdict.FAIL:
            return result
        return dataclasses.replace(result, verdict=Verdict.FAIL, reason=measured.reason)

    def _systematic(self, key: TapKey, part: Array, view: View, *, inherited: bool) -> Systematic | None:
        ratio = tokens_of_row(key, self._config)
        tokens = token_ids(self.golden.tokens, self._config, key.layer)[:, ratio - 1 :: ratio]
        if self._config.drafts_blocks(key.layer) and not is_drafted(key, self._config):
            tokens = self.golden.tokens[:, :-1]
        part, inside = self.within_phase(key, part, view)
        rows = slice(None) if inside.rows is None else list(inside.rows)
        routing = None
        if key.tap.name == "ffn.experts":
            routing = ExpertShares(
                *(self.golden.read(TapKey.of(self._config, key.layer, name))[:, rows] for name in _ROUTING)
            )
        weights = weights_of(key, self._config)
        rules = weights.values()
        widths = [shape[-1] for rule in rules if len(shape := rule.source_shape(self._config, key.layer)) > 1]
        independent = Independence(
            tokens=tokens[:, rows],
            width=1 if inherited or key.tap.name == _SHARES else min(widths, default=None),
            rounded_weights=any(rule.kind in (Kind.LINEAR, Kind.EXPERT) for rule in rules),
        )
        golden, sizes, letters = inside.values, None, tuple(key.tap.shape.split()[2:])
        if view.sketched is not None:  # the first number of a sketched row is its rms
            part, golden, sizes, letters = part[..., 1:], golden[..., 1:], golden[..., 0].astype(np.float64), ()
        return systematic(
            part,
            golden,
            row_sizes(golden) if sizes is None else sizes,
            letters,
            independent,
            routing,
            None if inherited else self._along_bias(key, weights, rows),
        )

    def _along_bias(self, key: TapKey, weights: Iterable[str], rows: slice | list[int]) -> Array | None:
        """Some rows of how pooled entries move with their position bias; None for other taps, and unknown weights."""
        path = next((path for path in weights if path.endswith(_BIAS)), None)
        if path is None or self._weights is None:
            return None
        stem = key.tap.name.rpartition(".")[0]
        values, gates = (
            self.golden.read(TapKey.of(self._config, key.layer, f"{stem}.{name}")) for name in ("wkv", "wgate")
        )
        return along_bias(values, gates, self._weights.read(path), self.golden.shape(key)[-1])[:, rows]

    def _is_later(self, key: TapKey) -> bool:
        """Whether a tap belongs to the decoding that is left out: the state before it, and drafts after the prompt."""
        return self._phase is Phase.PREFILL and (key.tap.is_state or is_drafted(key, self._config))

    def _rows(self, key: TapKey) -> list[int] | None:
        """The rows of a tap that are compared; None for all."""
        if self._phase is None or key.tap.is_state or is_drafted(key, self._config):
            return None
        tokens = self.golden.tokens.shape[1]
        first, last = calls(tokens, self.golden.decode)[0]
        start, stop = (first, last) if self._phase is Phase.PREFILL else (last, tokens)
        return [row for row in rows_of(key, self._config, start, stop) if row < self.golden.shape(key)[1]]

    def _scores(self, choice: TapKey, activations: Activations, mode: Mode, *, teacher_forced: bool) -> Scores | None:
        """The scores that a choice was made by; None if a table made it, or if there is nothing to choose from."""
        taps = taps_of(self._config, choice.layer)
        scores = next((tap for tap in taps if tap.name == choice.tap.scores), None)
        if scores is None:
            return None
        key = TapKey.of(self._config, choice.layer, scores)
        shape = self.golden.shape(key)
        if not math.prod(shape):
            return None
        views = self.golden.views(key)
        golden = views[0].values if self.golden.whole(key) else None
        # Scores that were not recorded were not replaced either: the choice was made by the model's own.
        ours = golden if teacher_forced and key in activations else activations.get(key)
        found = Scores(
            golden=golden,
            floor=self.floor(key, views, mode),
            ours=ours if ours is not None and ours.shape == shape else None,
            visible=_visible(self._config, key, shape),
        )
        if choice.tap.of_blocks:
            return found.of_blocks(self._config.entries_per_candidate)
        candidates = next((key for key in self._recorded(choice.layer) if key.tap is _CANDIDATES), None)
        if candidates is None or choice.tap.name == _EXPERTS:
            return found
        return found.inside(self.golden.read(candidates), self._config.entries_per_candidate)


def _within(part: Array, view: View, rows: Sequence[int] | None) -> tuple[Array, View]:
    """The rows of ``rows`` that the view has, of both."""
    if rows is None:
        return part, view
    kept = range(view.values.shape[1]) if view.rows is None else view.rows
    wanted = set(rows)
    places = [place for place, row in enumerate(kept) if row in wanted]
    inside = dataclasses.replace(view, values=view.values[:, places], rows=tuple(kept[place] for place in places))
    return part[:, places], inside


def weights_of(key: TapKey, config: Config) -> dict[str, Rule]:
    """The parameters that the operation of a tap uses itself, and their rows in the names table.

    A stage has no embedding and no output matrix of its own; there it uses the model's.
    """
    layers = () if key.layer is None else (key.layer,)
    rules = {path: rule for path, rule, owner in parameters(config, layers) if owner in (key.layer, None)}
    places = (key.prefix, "") if key.tap.where in (BEFORE, AFTER) else (key.prefix,)
    found = (next((place + weight for place in places if place + weight in rules), None) for weight in key.tap.weights)
    return {path: rules[path] for path in found if path is not None}


def _visible(config: Config, scores: TapKey, shape: tuple[int, ...]) -> Array | None:
    """Number of compressed entries that each query may choose from; None for a choice of experts."""
    if scores.layer is None or "T" not in scores.tap.shape.split():
        return None
    return np.broadcast_to((np.arange(shape[1]) + 1) // config.ratio_of(scores.layer), shape[:2])

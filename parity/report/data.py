"""The outcome of a parity run, as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from dsv4_convert.files.writing import write_atomically
from dsv4_convert.folders import PathLike
from dsv4_convert.golden.archive import TapForm
from dsv4_convert.golden.layout import is_fed
from dsv4_convert.golden.noise import Mode
from dsv4_convert.golden.prompt_coverage import LayerCoverage
from dsv4_convert.parity.blame import WeightDifference
from dsv4_convert.parity.choices import Flips
from dsv4_convert.parity.detail import Detail
from dsv4_convert.parity.logits import LogitsComparison
from dsv4_convert.parity.metrics import Distance, Verdict
from dsv4_convert.parity.systematic import Systematic
from dsv4_convert.parity.tolerances import Limits
from dsv4_convert.parity.unchecked import Unchecked
from dsv4_convert.show.notebook import table
from dsv4_convert.show.urls import all_without_secrets
from dsv4_convert.spec.taps import TapKey

SCHEMA_VERSION = 3
#: The correlation of errors with a trend from which the trend is said to be the error.
_NEARLY_ALL = 0.9
#: The most severe first.
SEVERITY = (Verdict.FAIL, Verdict.TIE, Verdict.PASS, Verdict.EMPTY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TapInMode:
    """A tap in one of the modes: the subject of a result, or a tap that only the run or only its baseline has."""

    key: TapKey
    mode: Mode

    @property
    def name(self) -> str:
        """The full name."""
        return str(self.key)

    @property
    def layer(self) -> int | None:
        """The layer, or that of a stage; None for the model level."""
        return self.key.layer

    @property
    def short(self) -> str:
        """The name within its layer."""
        return self.key.tap.name

    @property
    def meaning(self) -> str:
        """The tap's meaning, in words."""
        return self.key.tap.meaning


@dataclasses.dataclass(frozen=True, kw_only=True)
class TapResult(TapInMode):
    """One compared tap. ``distance`` for real numbers, ``flips`` for choices; neither where shapes differ.

    ``form``: the form of the tap that the numbers are about. A compact golden keeps a tap in two forms, and the one
    that came out worst is reported. The worst "element" of a sketch is a number of the sketch, whose first number is
    the rms of the row. ``systematic``: what its errors have in common, where that was measured.
    """

    verdict: Verdict
    reason: str
    shape: tuple[int, ...]
    distance: Distance | None = None
    flips: Flips | None = None
    form: TapForm = TapForm.WHOLE
    systematic: Systematic | None = None

    @property
    def passes(self) -> bool:
        """Whether it agrees, as a tie does."""
        return self.verdict in (Verdict.PASS, Verdict.TIE)

    @property
    def multiple(self) -> float | None:
        """The error in multiples of the noise floor, as one number; None if nothing was measured."""
        if self.distance is not None:
            return self.distance.noise.largest
        return None if self.flips is None else self.flips.noise

    @property
    def explained(self) -> Systematic | None:
        """The trend that its errors share, where that is why it fails, or nearly all of its error."""
        trend = self.systematic
        if trend is None or self.verdict is not Verdict.FAIL:
            return None
        return trend if self.reason == trend.reason or trend.correlation > _NEARLY_ALL else None

    def exceeded(self, limits: Limits) -> tuple[str, ...]:
        """The measures by which it fails: ``tap``, ``row``, ``element``, ``systematic``, ``choice`` or ``shape``."""
        if self.verdict is not Verdict.FAIL:
            return ()
        if self.distance is not None:
            return self.distance.noise.exceeded(limits) or ("systematic",)
        return ("shape",) if self.flips is None else ("choice",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Localization:
    """The wrong operations of a failing layer (None: the model level), and the weights and experts that they involve.

    ``teacher_forced``: the layer ran again with every operation on the golden's own inputs. A compact golden does not
    hold these inputs; then only the operation of the first failing tap is here, from the run itself.
    ``wrong``: the operations whose result differs even so, in order of execution: each is a fault of its own. Or inputs
    of the layer that are not what an earlier layer made, though that agrees (:attr:`handed_on`).
    ``weights``: the parameters that these operations use. ``damaged``: the weights whose stored bytes changed after the
    conversion. ``differing``: the weights that differ from the source; None if no source was given. ``experts``: the
    experts that all failing tokens of ``ffn.experts`` share with no passing one.
    """

    layer: int | None
    teacher_forced: bool
    wrong: tuple[TapResult, ...]
    weights: tuple[str, ...]
    damaged: tuple[str, ...]
    differing: tuple[WeightDifference, ...] | None
    experts: tuple[int, ...]

    @property
    def handed_on(self) -> bool:
        """Whether it is no operation that is wrong, but what an earlier layer hands on of what it made rightly."""
        return bool(self.wrong) and is_fed(self.wrong[0].key, Mode.ISOLATED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorSplit:
    """The error of the streams that leave a layer, as rms relative to the golden's, split into two.

    ``total`` (cumulative) is, element by element, the sum of ``inherited``, which the layer makes of the error that
    enters it, and ``added``, which it makes on the golden's own input. ``total_noise`` and ``added_noise`` are
    multiples of the noise floor.
    """

    layer: int
    inherited: float
    added: float
    total: float
    added_noise: float
    total_noise: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrownError(TapInMode):
    """An error within tolerance, but beyond its baseline.

    ``measure``: ``tap``, ``row`` or ``element``, in multiples of the noise floor, or of a choice ``tokens``, the share
    of tokens that chose otherwise.
    """

    measure: str
    recorded: float
    allowed: float
    found: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """A run against the baseline ``path``: what was recorded for these ``platforms`` (platform, dtype, mode, phase).

    ``compared``: taps that both have. ``grown``: what is beyond its band. ``unrecorded``: taps that the baseline does
    not have. ``missing``: those that only it has; ``left_out``: how many only it has because they, or their mode, were
    not wanted. ``lacking``: how many taps of the golden it has no record of, which were not wanted either.
    ``update``: it was to be written. ``updated``: it has the run's numbers now: ``added`` taps, ``tightened`` ones, and
    ``grown`` ones for a ``reason``.
    """

    path: str
    platforms: tuple[str, ...]
    compared: int
    grown: tuple[GrownError, ...]
    unrecorded: tuple[TapInMode, ...]
    missing: tuple[TapInMode, ...]
    left_out: int
    lacking: int = 0
    update: bool = False
    updated: bool = False
    added: int = 0
    tightened: int = 0
    reason: str | None = None

    @property
    def passed(self) -> bool:
        """Something was compared and nothing has grown or is absent; or the baseline was brought up to date."""
        return self.updated or bool(self.compared and not (self.grown or self.unrecorded or self.missing))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """The taps of one layer (None: the model level) in one mode.

    ``worst``: the measured one that is farthest off. ``severe``: the most severe verdict.
    """

    layer: int | None
    taps: tuple[TapResult, ...]
    worst: TapResult | None
    severe: Verdict

    @property
    def label(self) -> str:
        """The layer, stage or level in tables."""
        return self.taps[0].key.label

    def count(self, verdict: Verdict) -> int:
        """Number of taps with this verdict."""
        return sum(tap.verdict is verdict for tap in self.taps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramFacts:
    """A program that was compared.

    Attributes:
        program: ``streamed``, or ``model`` for the compiled layer.
        platform: where it ran.
        experts: how routed experts were computed: one by one, ``grouped`` or ``packed``.
        weights: ``expanded``, or ``source`` for published codes.
        layers: the layers that it ran.
        scanned: they were part of a loop over stacked weights.
        chunk: tokens of a call, where prompts came from the cache; None: at once.
    """

    program: str
    platform: str
    experts: str
    weights: str
    layers: tuple[int, ...]
    scanned: bool = False
    chunk: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityReport:
    """A whole run: taps in order of execution, isolated before cumulative, and the two sides that were compared.

    ``other_weights``: parameters whose values are not those that the golden was recorded from; None if the golden does
    not know its weights.
    ``stages``: the numbers among ``layers`` that are draft stages.
    ``layers_left_out``: layers that golden or checkpoint do not hold, in a run that was to compare all.
    ``decode``: how many of the last tokens came one by one. ``phase``: which of the two kinds was compared, None: both.
    ``checkpoint``, ``golden``: without the secrets of URLs, since a report is passed on.
    ``unchecked``: what the run says nothing about; None for activations of another implementation.
    ``detail``: numbers for figures, if asked for; not part of the JSON.
    ``program``: the program that computed; None for activations of another implementation. ``model``: the same
    comparison for the compiled layers, where both programs ran; its taps are not among ``taps``. ``unproven``: why the
    compiled layers did not run, where that was not asked for.
    """

    modes: tuple[Mode, ...]
    decode: int
    phase: str | None
    dtype: str
    limits: Limits
    layers: tuple[int, ...]
    taps: tuple[TapResult, ...]
    localizations: tuple[Localization, ...]
    error_splits: tuple[ErrorSplit, ...]
    prompt_coverage: tuple[LayerCoverage, ...]
    require_coverage: bool
    logits: LogitsComparison | None
    checkpoint: Mapping[str, Any]
    golden: Mapping[str, Any]
    platform: Mapping[str, Any]
    unchecked: Unchecked | None = None
    gate: Gate | None = None
    detail: Detail | None = None
    stages: range = range(0)
    layers_left_out: tuple[int, ...] = ()
    other_weights: tuple[str, ...] | None = None
    program: ProgramFacts | None = None
    model: ParityReport | None = None
    unproven: str | None = None

    def __post_init__(self) -> None:
        """Remove secrets once, for every presentation of the report."""
        for name in ("checkpoint", "golden"):
            object.__setattr__(self, name, all_without_secrets(getattr(self, name)))

    def count(self, verdict: Verdict) -> int:
        """Number of taps with this verdict."""
        return sum(tap.verdict is verdict for tap in self.taps)

    def by_layer(self, mode: Mode) -> Iterator[LayerSummary]:
        """The results of a mode, layer by layer, in order of execution."""
        for layer, group in groupby((tap for tap in self.taps if tap.mode is mode), key=lambda tap: tap.layer):
            taps = tuple(group)
            yield LayerSummary(
                layer=layer,
                taps=taps,
                worst=_farthest(taps),
                severe=min((tap.verdict for tap in taps), key=SEVERITY.index),
            )

    @property
    def arithmetic(self) -> str:
        """The dtype, and where activations are quantised on the way."""
        numerics = self.golden.get("reference", {}).get("numerics", "plain")
        return self.dtype if numerics == "plain" else f"{self.dtype} in {numerics} numerics"

    @property
    def versions(self) -> str:
        """The versions of the packages that computed, in one line."""
        return ", ".join(f"{name} {version}" for name, version in self.platform.get("versions", {}).items())

    @cached_property
    def wrong(self) -> frozenset[TapKey]:
        """The operations that a localization found wrong by themselves."""
        return frozenset(tap.key for found in self.localizations for tap in found.wrong)

    @property
    def first_diverging(self) -> TapResult | None:
        """The first failing tap in order of execution; isolated ones first, because they have inherited nothing."""
        return next((tap for tap in self.taps if tap.verdict is Verdict.FAIL), None)

    @property
    def first_wrong(self) -> TapResult | None:
        """The first operation that is wrong on the golden's own inputs, if there is one."""
        return next((tap for localization in self.localizations for tap in localization.wrong), None)

    @property
    def worst(self) -> TapResult | None:
        """The measured tap that is farthest off; None if nothing was measured."""
        return _farthest(self.taps)

    @property
    def uncovered(self) -> tuple[LayerCoverage, ...]:
        """The layers of which the golden leaves something unchecked."""
        return tuple(layer for layer in self.prompt_coverage if not layer.complete)

    @property
    def agrees(self) -> bool:
        """Nothing fails, and something was compared that the model was not given."""
        return not self.count(Verdict.FAIL) and any(tap.passes and not is_fed(tap.key, tap.mode) for tap in self.taps)

    @property
    def covered(self) -> bool:
        """The golden reaches everything, if that is required, and unused weights of a conversion are the source's."""
        unproven = self.unchecked is not None and self.unchecked.unproven
        return not (self.require_coverage and (self.uncovered or unproven))

    @property
    def passed(self) -> bool:
        """Everything agrees, in both programs, the weights are the golden's, it reaches all if that is required, and no
        error has grown."""
        programs = self.agrees and (self.model is None or self.model.agrees)
        right = programs and not self.other_weights
        return right and self.covered and (self.gate is None or self.gate.passed)

    @property
    def programs(self) -> tuple[ParityReport, ...]:
        """This report, and that of the compiled layers where they ran as well; none for another implementation."""
        return tuple(report for report in (self, self.model) if report is not None and report.program is not None)

    def save_html(self, path: PathLike) -> None:
        """Write the page that ``dsv4 parity --report`` writes. Raises :class:`ResourceError` if that fails."""
        from dsv4_convert.parity.report.html.page import RunInfo, page

        write_atomically(Path(path), page(self, RunInfo.now()).encode())

    def to_frame(self) -> Any:
        """Every number of every tap as a pandas DataFrame (:mod:`dsv4_convert.parity.report.frame`).

        Raises :class:`UsageError` without pandas.
        """
        from dsv4_convert.parity.report.frame import to_frame

        return to_frame(self)

    def _repr_html_(self) -> str:
        """The verdict, for a notebook."""
        from dsv4_convert.parity.report.words import summarized

        said = summarized(self)
        return table(said.headline, said.lines)

    def to_json(self, sentence: str) -> dict[str, Any]:
        """Stable, versioned JSON; numbers that JSON cannot hold (nan, inf) become strings."""
        first, wrong = self.first_diverging, self.first_wrong
        document = {
            "schema_version": SCHEMA_VERSION,
            "verdict": "pass" if self.passed else "fail",
            "sentence": sentence,
            "first_diverging": None if first is None else first.name,
            "first_wrong_operation": None if wrong is None else wrong.name,
            "modes": [mode.value for mode in self.modes],
            "decode": self.decode,
            "phase": self.phase,
            "dtype": self.dtype,
            "limits": self.limits,
            "layers": list(self.layers),
            "layers_left_out": list(self.layers_left_out),
            "other_weights": self.other_weights,
            "counts": {verdict.value: self.count(verdict) for verdict in Verdict},
            "taps": self.taps,
            "descents": self.localizations,
            "growth": self.error_splits,
            "require_reach": self.require_coverage,
            "reach": self.prompt_coverage,
            "unchecked": self.unchecked,
            "baseline": None if self.gate is None else {"passed": self.gate.passed, **plain(self.gate)},
            "logits": self.logits,
            "checkpoint": dict(self.checkpoint),
            "golden": dict(self.golden),
            "platform": dict(self.platform),
            "programs": [report._program_json() for report in self.programs],
            "unproven": self.unproven,
        }
        return {key: plain(value) for key, value in document.items()}

    def _program_json(self) -> dict[str, Any]:
        """A program, and whether its layers agree."""
        first, wrong = self.first_diverging, self.first_wrong
        assert self.program is not None
        return {
            **plain(self.program),
            "verdict": "pass" if self.agrees else "fail",
            "first_diverging": None if first is None else first.name,
            "first_wrong_operation": None if wrong is None else wrong.name,
            "counts": {verdict.value: self.count(verdict) for verdict in Verdict},
        }


def _farthest(taps: Iterable[TapResult]) -> TapResult | None:
    """The measured tap with the largest error."""
    measured = [tap for tap in taps if tap.distance is not None]
    return max(measured, key=lambda tap: tap.distance.noise.largest if tap.distance else 0.0, default=None)


#: Fields whose name in JSON is another one.
_IN_JSON = {"key": "name", "teacher_forced": "fed"}


def plain(value: Any) -> Any:
    """Nested values as JSON holds them: dataclasses to objects, tuples to lists, non-finite numbers to strings."""
    if isinstance(value, TapKey):
        return str(value)
    if dataclasses.is_dataclass(value):
        fields = (field.name for field in dataclasses.fields(value))
        return {_IN_JSON.get(name, name): plain(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

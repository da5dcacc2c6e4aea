"""The outcome of a parity run, as data.

Words are in :mod:`dsv4_convert.parity.explain`, tables in :mod:`dsv4_convert.parity.render`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from dsv4_convert.golden.archive import Form
from dsv4_convert.golden.noise import Mode
from dsv4_convert.golden.reach import LayerReach
from dsv4_convert.parity.blame import WeightDifference
from dsv4_convert.parity.choices import Flips
from dsv4_convert.parity.detail import Detail
from dsv4_convert.parity.logits import LogitsComparison
from dsv4_convert.parity.metrics import Distance, Verdict
from dsv4_convert.parity.secrets import all_without_secrets
from dsv4_convert.parity.tolerances import Limits
from dsv4_convert.taps import by_name

SCHEMA_VERSION = 3
#: The most severe first.
_SEVERITY = (Verdict.FAIL, Verdict.TIE, Verdict.PASS, Verdict.EMPTY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TapResult:
    """One compared tap. ``distance`` for real numbers, ``flips`` for choices; neither where shapes differ.

    ``form``: what of the tap the numbers are about. Of a compact golden it is the form that came out worst; the worst
    "element" of a sketch is a number of the sketch, the first one the rms of the row.
    """

    name: str
    mode: Mode
    verdict: Verdict
    reason: str
    shape: tuple[int, ...]
    distance: Distance | None = None
    flips: Flips | None = None
    form: Form = Form.WHOLE

    @property
    def layer(self) -> int | None:
        """The layer, None for the model level."""
        return by_name(self.name)[1]

    @property
    def short(self) -> str:
        """The name within its layer."""
        return by_name(self.name)[0].name

    @property
    def meaning(self) -> str:
        """What the tap is, in words."""
        return by_name(self.name)[0].meaning

    @property
    def passes(self) -> bool:
        """It agrees; a tie does, too."""
        return self.verdict in (Verdict.PASS, Verdict.TIE)

    def exceeded(self, limits: Limits) -> tuple[str, ...]:
        """By which measures it fails: ``tap``, ``row``, ``element``, ``choice`` or ``shape``."""
        if self.verdict is not Verdict.FAIL:
            return ()
        if self.distance is not None:
            return self.distance.noise.exceeded(limits)
        return ("shape",) if self.flips is None else ("choice",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descent:
    """A failing layer (None: the model level) run again with every operation fed with the golden's own inputs.

    ``fed``: whether it was. A compact golden does not hold these inputs, and then only the operation of the first
    failing tap is here, from the run itself.
    ``wrong``: the operations whose result differs even so, in order of execution: each of them is a fault of its own.
    ``weights``: the parameters that these operations use. ``damaged``: those of them whose stored bytes are not
    what was converted. ``differing``: those of them that differ from the source;
    None where no source was at hand. ``experts``: experts that all failing tokens of ``ffn.experts`` share with no
    passing one.
    """

    layer: int | None
    fed: bool
    wrong: tuple[TapResult, ...]
    weights: tuple[str, ...]
    damaged: tuple[str, ...]
    differing: tuple[WeightDifference, ...] | None
    experts: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
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
class Unrecorded:
    """A tap that only one side has: the run, or its baseline."""

    name: str
    mode: Mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grown:
    """An error within tolerance, but beyond what its baseline allows.

    ``measure``: ``tap``, ``row`` or ``element``, in multiples of the noise floor, or of a choice ``tokens``, the share
    of tokens that chose otherwise.
    """

    name: str
    mode: Mode
    measure: str
    recorded: float
    allowed: float
    found: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """A run against the baseline ``path``: what was recorded for these ``platforms`` (platform, dtype, mode, phase).

    ``compared``: taps that both have. ``grown``: what is beyond its band. ``unrecorded``: taps that the baseline does
    not have. ``missing``: those that only it has; ``left_out``: how many only it has because they, or their mode, were
    not wanted. ``update``: it was to be written. ``updated``: it has the run's numbers now: ``added`` taps,
    ``tightened`` ones, and ``grown`` ones for a ``reason``.
    """

    path: str
    platforms: tuple[str, ...]
    compared: int
    grown: tuple[Grown, ...]
    unrecorded: tuple[Unrecorded, ...]
    missing: tuple[Unrecorded, ...]
    left_out: int
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
class OfLayer:
    """The taps of one layer (None: the model level) in one mode.

    ``worst``: the measured one that is farthest off. ``severe``: the most severe verdict.
    """

    layer: int | None
    taps: tuple[TapResult, ...]
    worst: TapResult | None
    severe: Verdict

    def count(self, verdict: Verdict) -> int:
        """Number of taps with this verdict."""
        return sum(tap.verdict is verdict for tap in self.taps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run: taps in order of execution, isolated before cumulative, and what was compared with what.

    ``decode``: how many of the last tokens came one by one. ``phase``: which of the two kinds was compared, None: both.
    ``checkpoint``, ``golden``: without the secrets of URLs, since a report is passed on.
    ``detail``: what pictures need beyond it, if that was asked for; no part of the JSON.
    """

    modes: tuple[Mode, ...]
    decode: int
    phase: str | None
    dtype: str
    limits: Limits
    layers: tuple[int, ...]
    taps: tuple[TapResult, ...]
    descents: tuple[Descent, ...]
    growth: tuple[Growth, ...]
    reach: tuple[LayerReach, ...]
    require_reach: bool
    logits: LogitsComparison | None
    checkpoint: Mapping[str, Any]
    golden: Mapping[str, Any]
    platform: Mapping[str, Any]
    gate: Gate | None = None
    detail: Detail | None = None

    def __post_init__(self) -> None:
        """Once, for whatever is made of a report."""
        for name in ("checkpoint", "golden"):
            object.__setattr__(self, name, all_without_secrets(getattr(self, name)))

    def count(self, verdict: Verdict) -> int:
        """Number of taps with this verdict."""
        return sum(tap.verdict is verdict for tap in self.taps)

    def by_layer(self, mode: Mode) -> Iterator[OfLayer]:
        """What was compared in a mode, layer by layer, in order of execution."""
        for layer, group in groupby((tap for tap in self.taps if tap.mode is mode), key=lambda tap: tap.layer):
            taps = tuple(group)
            measured = [tap for tap in taps if tap.distance is not None]
            yield OfLayer(
                layer=layer,
                taps=taps,
                worst=max(measured, key=lambda tap: tap.distance.noise.largest if tap.distance else 0.0, default=None),
                severe=min((tap.verdict for tap in taps), key=_SEVERITY.index),
            )

    @property
    def arithmetic(self) -> str:
        """The dtype, and where activations are quantised on the way."""
        numerics = self.golden.get("reference", {}).get("numerics", "plain")
        return self.dtype if numerics == "plain" else f"{self.dtype} in {numerics} numerics"

    @property
    def first_diverging(self) -> TapResult | None:
        """The first failing tap in order of execution; isolated ones first, because they have inherited nothing."""
        return next((tap for tap in self.taps if tap.verdict is Verdict.FAIL), None)

    @property
    def first_wrong(self) -> TapResult | None:
        """The first operation that is wrong on the golden's own inputs, if there is one."""
        return next((tap for descent in self.descents for tap in descent.wrong), None)

    @property
    def unreached(self) -> tuple[LayerReach, ...]:
        """The layers of which the golden leaves something unchecked."""
        return tuple(layer for layer in self.reach if not layer.complete)

    @property
    def agrees(self) -> bool:
        """Nothing fails, and something was compared."""
        return not self.count(Verdict.FAIL) and bool(self.count(Verdict.PASS) + self.count(Verdict.TIE))

    @property
    def reached(self) -> bool:
        """The golden reaches everything, if that is required."""
        return not (self.require_reach and self.unreached)

    @property
    def passed(self) -> bool:
        """Everything agrees, the golden reaches everything if that is required, and no error has grown."""
        return self.agrees and self.reached and (self.gate is None or self.gate.passed)

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
            "limits": dataclasses.asdict(self.limits),
            "layers": list(self.layers),
            "counts": {verdict.value: self.count(verdict) for verdict in Verdict},
            "taps": [dataclasses.asdict(tap) for tap in self.taps],
            "descents": [dataclasses.asdict(descent) for descent in self.descents],
            "growth": [dataclasses.asdict(layer) for layer in self.growth],
            "require_reach": self.require_reach,
            "reach": [dataclasses.asdict(layer) for layer in self.reach],
            "baseline": None if self.gate is None else {"passed": self.gate.passed, **dataclasses.asdict(self.gate)},
            "logits": None if self.logits is None else dataclasses.asdict(self.logits),
            "checkpoint": dict(self.checkpoint),
            "golden": dict(self.golden),
            "platform": dict(self.platform),
        }
        return {key: plain(value) for key, value in document.items()}


def plain(value: Any) -> Any:
    """Nested values as JSON holds them: tuples to lists, non-finite numbers to strings."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

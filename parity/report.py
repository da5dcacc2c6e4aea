"""The outcome of a parity run, as data. Rendering is in :mod:`parity.render`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dsv4_convert.taps import by_name
from parity.choices import Flips
from parity.metrics import Distance, Verdict
from parity.tolerances import Mode, Tolerance

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TapResult:
    """One compared tap. ``distance`` for real numbers, ``flips`` for choices; neither where shapes differ."""

    name: str
    verdict: Verdict
    reason: str
    shape: tuple[int, ...]
    distance: Distance | None = None
    flips: Flips | None = None

    @property
    def layer(self) -> int | None:
        """The layer, None for the model level."""
        return by_name(self.name)[1]

    @property
    def meaning(self) -> str:
        """What the tap is, in words."""
        return by_name(self.name)[0].meaning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run: taps in order of execution, and what was compared with what."""

    mode: Mode
    tolerance: Tolerance
    layers: tuple[int, ...]
    taps: tuple[TapResult, ...]
    checkpoint: Mapping[str, Any]
    golden: Mapping[str, Any]
    platform: Mapping[str, Any]

    def count(self, verdict: Verdict) -> int:
        """Number of taps with this verdict."""
        return sum(tap.verdict is verdict for tap in self.taps)

    @property
    def first_diverging(self) -> TapResult | None:
        """The first failing tap in order of execution."""
        return next((tap for tap in self.taps if tap.verdict is Verdict.FAIL), None)

    @property
    def passed(self) -> bool:
        """Nothing fails, and something was compared."""
        return not self.count(Verdict.FAIL) and bool(self.count(Verdict.PASS) + self.count(Verdict.TIE))

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        ties = self.count(Verdict.TIE)
        empty = self.count(Verdict.EMPTY)
        notes = [f"{ties} with ties" for _ in range(bool(ties))] + [f"{empty} empty" for _ in range(bool(empty))]
        aside = f" ({', '.join(notes)})" if notes else ""
        first = self.first_diverging
        if first is not None:
            where = "the model level" if first.layer is None else f"layer {first.layer}"
            return (
                f"FAIL: {self.count(Verdict.FAIL)} of {len(self.taps)} taps diverge{aside}. The first is {first.name} "
                f"in {where}, {first.meaning}: {first.reason}."
            )
        if not self.passed:
            return "FAIL: nothing was compared."
        return (
            f"PASS: all {len(self.taps)} taps agree{aside}, {self.mode} mode, "
            f"atol {self.tolerance.atol:.2g}, rtol {self.tolerance.rtol:.2g}."
        )

    def to_json(self) -> dict[str, Any]:
        """Stable, versioned JSON; numbers that JSON cannot hold (nan, inf) become strings."""
        first = self.first_diverging
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": "pass" if self.passed else "fail",
            "sentence": self.sentence,
            "first_diverging": None if first is None else first.name,
            "mode": self.mode.value,
            "tolerance": dataclasses.asdict(self.tolerance),
            "layers": list(self.layers),
            "counts": {verdict.value: self.count(verdict) for verdict in Verdict},
            "taps": [_plain(dataclasses.asdict(tap)) for tap in self.taps],
            "checkpoint": dict(self.checkpoint),
            "golden": dict(self.golden),
            "platform": dict(self.platform),
        }


def _plain(value: Any) -> Any:
    """Nested dataclass values as JSON: tuples to lists, non-finite numbers to strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

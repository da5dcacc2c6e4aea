"""Reports of runs that never took place, for what only reads reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsv4_convert.golden.noise import Mode
from dsv4_convert.golden.prompt_coverage import LayerCoverage
from dsv4_convert.parity.choices import Flips
from dsv4_convert.parity.metrics import Distance, Multiples, Verdict, beyond
from dsv4_convert.parity.report.data import ParityReport, TapResult
from dsv4_convert.parity.tolerances import LIMITS
from dsv4_convert.spec.taps import TapKey

VERSIONS = {"dsv4": "0.1.0", "jax": "0.10.2"}


def real(name: str, *multiples: float, mode: Mode = Mode.ISOLATED, verdict: Verdict = Verdict.PASS) -> TapResult:
    """A tap of real numbers: its error over the tap, in its worst row, at its worst element."""
    tap, row, element = multiples
    distance = Distance(
        noise=Multiples(tap=tap, row=row, element=element),
        max_abs=1e-6,
        relative_rms=1e-7,
        cosine=1.0,
        max_ulp=2.0,
        allclose=1e-6,
        rows_outside=0,
        rows=300,
        worst=(0, 7, 3),
        found=0.5,
        golden=0.25,
    )
    reason = beyond(*distance.noise.nearest(LIMITS["float32"])) if verdict is Verdict.FAIL else ""
    return TapResult(
        key=TapKey.parse(name), mode=mode, verdict=verdict, reason=reason, shape=(1, 300, 32), distance=distance
    )


def choice(name: str, tokens: int, *, mode: Mode = Mode.ISOLATED) -> TapResult:
    """A choice in which some of 300 tokens are tied."""
    flips = Flips(tokens=tokens, of=300, ties=tokens, margin=1e-7, noise=0.5, worst=(0, 9) if tokens else ())
    verdict = Verdict.TIE if tokens else Verdict.PASS
    return TapResult(key=TapKey.parse(name), mode=mode, verdict=verdict, reason="", shape=(1, 300, 5), flips=flips)


def empty(name: str) -> TapResult:
    """A tap without elements."""
    return TapResult(key=TapKey.parse(name), mode=Mode.ISOLATED, verdict=Verdict.EMPTY, reason="", shape=(1, 0, 16))


def report(
    taps: Sequence[TapResult],
    *,
    platform: Mapping[str, Any] | None = None,
    missed: Sequence[str] = (),
    require_coverage: bool = False,
) -> ParityReport:
    """A run that had these results."""
    modes = tuple(mode for mode in Mode if any(tap.mode is mode for tap in taps)) or (Mode.ISOLATED,)
    layers = tuple(sorted({tap.layer for tap in taps if tap.layer is not None}))
    return ParityReport(
        modes=modes,
        decode=0,
        phase=None,
        dtype="float32",
        limits=LIMITS["float32"],
        layers=layers,
        taps=tuple(taps),
        localizations=(),
        error_splits=(),
        prompt_coverage=tuple(LayerCoverage(layer=layer, missed=tuple(missed), experts=6, of=6) for layer in layers),
        require_coverage=require_coverage,
        logits=None,
        checkpoint={"path": "orbax"},
        golden={"path": "golden", "digest": "0" * 64},
        platform={"backend": "cpu", "device": "cpu", "versions": VERSIONS, **(platform or {})},
    )

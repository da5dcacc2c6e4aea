"""Comparing two goldens: what was recorded differently, and where the second leaves the noise floor of the first.

This helps when a reference, its version or its machine changes: record the same checkpoint and prompt twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import Golden
from dsv4_convert.parity.comparison import Comparison
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import TapResult
from dsv4_convert.spec.taps import TapKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenDiff:
    """``recorded``: what the two say differently of themselves. ``only``: taps that one of them has. ``equal``: number
    of taps whose bytes are equal. ``differing``: the other ones, judged by the noise floor of the first."""

    recorded: tuple[str, ...]
    only: tuple[str, ...]
    equal: int
    differing: tuple[TapResult, ...]

    @property
    def beyond(self) -> tuple[TapResult, ...]:
        """The taps that differ beyond the noise floor."""
        return tuple(result for result in self.differing if result.verdict is Verdict.FAIL)

    def lines(self) -> Iterator[str]:
        """The findings in words."""
        yield from self.recorded
        yield from (f"only in one of them: {name}" for name in self.only)
        yield from (f"{result.name}: {result.reason}" for result in self.beyond)
        within = len(self.differing) - len(self.beyond)
        yield f"{self.equal} taps are equal, {within} differ within the noise floor, {len(self.beyond)} beyond it"

    def to_json(self) -> dict[str, Any]:
        """Stable, versioned JSON."""
        return {
            "schema_version": 1,
            "recorded": list(self.recorded),
            "only": list(self.only),
            "equal": self.equal,
            "within_noise": len(self.differing) - len(self.beyond),
            "beyond_noise": [result.name for result in self.beyond],
        }

    @property
    def agrees(self) -> bool:
        """Every tap that both have is equal, or within the noise; and there is one."""
        return not self.beyond and bool(self.equal + len(self.differing))


#: Fields of their requests that two goldens must share, in words.
_SAME = {
    "config": "architectures",
    "tokens": "tokens",
    "first_position": "positions",
    "decode": "numbers of tokens one by one",
}


def diff(first: Golden, second: Golden, progress: Callable[[str], None] = lambda _: None) -> GoldenDiff:
    """Compare every tap of ``second`` with that of ``first``; both ran from the tokens, so errors may have added up.

    The noise floor of ``first`` decides. Where only ``second`` can be the measure, they change places: ``first`` is
    whole and ``second`` compact, or only ``second`` carries a noise floor of float32. ``progress`` is called with each
    tap that differs, before it is judged.

    Raises:
        UsageError: other tokens or another architecture, so that nothing can be compared; or neither carries a noise
            floor of float32 and a tap differs.
        BadInput: an array is not the one that was recorded.
    """
    if _measures(second) > _measures(first):
        first, second = second, first
    one, other = first.manifest.request, second.manifest.request
    for field, what in _SAME.items():
        if getattr(one, field) != getattr(other, field):
            raise UsageError(f"{first.path} and {second.path}: recorded from other {what}; nothing to compare")
    if first.compact is not None and second.compact is not None and first.compact != second.compact:
        raise UsageError(f"{first.path} and {second.path}: compact goldens of other positions, numbers or seed")
    comparison = Comparison(first, "float32")
    theirs = set(second.keys)
    shared = [key for key in first.keys if key in theirs]
    unequal = [key for key in shared if first.sha256(key) != second.sha256(key)]

    def judge(key: TapKey) -> TapResult:
        progress(str(key))
        return comparison.judge_golden(second, key)

    judged = map(judge, unequal)
    # Whole and compact have different bytes even where they say the same.
    differing = [result for result in judged if not _equal(result)]
    return GoldenDiff(
        recorded=tuple(_recorded(first, second)),
        only=tuple(sorted({*first.names} ^ {*second.names})),
        equal=len(shared) - len(differing),
        differing=tuple(differing),
    )


def _measures(golden: Golden) -> tuple[bool, bool]:
    """How well a golden serves as the measure of another."""
    return golden.compact is not None, "float32" in golden.manifest.request.noise


def _equal(result: TapResult) -> bool:
    return result.distance is not None and result.distance.max_abs == 0


def _recorded(first: Golden, second: Golden) -> Iterator[str]:
    """Fields of reference and source that differ."""
    for part in ("reference", "source"):
        mine, its = (dataclasses.asdict(getattr(golden.manifest.request, part)) for golden in (first, second))
        for field, value in mine.items():
            if value != its[field]:
                yield f"{part}.{field}: {value}, {its[field]}"

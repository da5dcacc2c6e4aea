"""Two runs side by side: what became worse, what became better, and what only one of them compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.table import Table

from dsv4_convert.errors import BadInput, Dsv4Error, UsageError
from dsv4_convert.files.strict_json import enumerated, read_object
from dsv4_convert.golden.layout import is_fed
from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import SCHEMA_VERSION, TapInMode
from dsv4_convert.spec.taps import TapKey

#: An error that two runs of one program may have: other threads, another instruction set.
STEADY = 2.0
#: An error below this many noise floors is rounding, however it changes.
_ROUNDING = 1.0


class Became(StrEnum):
    """The changes of a tap between two runs, the worst first."""

    FAILS_NOW = "fails now"
    GONE = "no longer compared"
    WORSE = "worse"
    BETTER = "better"
    PASSES_NOW = "passes now"
    NEW = "compared for the first time"
    SAME = "the same"


@dataclasses.dataclass(frozen=True)
class Measured:
    """A tap in one run. ``multiple``: its error in noise floors, None for a choice or where there is none."""

    verdict: Verdict
    multiple: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change(TapInMode):
    """A tap in both runs; None in a run that did not compare it."""

    kind: Became
    before: Measured | None
    after: Measured | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run as its report tells it.

    Attributes:
        path: the report.
        of: golden and dtype, which two runs must share.
        taps: what was compared.
        facts: both sides, the verdict, and what computed, in words.
    """

    path: Path
    of: str
    taps: Mapping[tuple[TapKey, Mode], Measured]
    facts: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> ReportedRun:
        """Read what ``dsv4 parity --json FILE`` wrote.

        Raises:
            BadInput: not such a report, or that of a run which compared nothing.
        """
        document = read_object(path)
        if document.get("schema_version") != SCHEMA_VERSION or not isinstance(document.get("taps"), list):
            raise BadInput(
                f"{path}: expected what this version of `dsv4 parity --json FILE` writes (schema_version "
                f"{SCHEMA_VERSION} and taps), found schema_version {document.get('schema_version')!r}; run that "
                "comparison again"
            )
        try:
            taps = dict(map(_tap, document["taps"]))
            of = f"golden {document['golden']['digest']} in {document['dtype']}"
            facts = _facts(document)
        except (KeyError, TypeError, ValueError, AttributeError, Dsv4Error) as error:
            raise BadInput(f"{path}: an entry is damaged ({error}); run that comparison again") from error
        # Earlier versions listed what the golden gives a layer.
        computed = {(key, mode): measured for (key, mode), measured in taps.items() if not is_fed(key, mode)}
        if all(measured.verdict is Verdict.EMPTY for measured in computed.values()):
            raise BadInput(
                f"{path}: a run that compared nothing; run that comparison again, with taps that have elements"
            )
        return cls(path=path, of=of, taps=computed, facts=facts)


def changes(before: ReportedRun, after: ReportedRun) -> list[Change]:
    """Compare two runs, the worst changes first.

    An error is worse or better if it changes by more than :data:`STEADY` times and the larger one is more than a noise
    floor.

    Raises:
        UsageError: the runs are of two goldens, or of two dtypes.
    """
    if before.of != after.of:
        raise UsageError(
            f"{before.path} is of {before.of}, {after.path} of {after.of}; only errors of one golden and dtype can be "
            "compared"
        )
    old, new = before.taps, after.taps
    found = [
        Change(
            key=key,
            mode=mode,
            kind=_kind(old.get((key, mode)), new.get((key, mode))),
            before=old.get((key, mode)),
            after=new.get((key, mode)),
        )
        for key, mode in dict.fromkeys([*new, *old])
    ]
    order = list(Became)
    return sorted(found, key=lambda change: order.index(change.kind))


def table(found: list[Change]) -> Table:
    """The taps that changed."""
    drawn = Table("tap", "mode", "change", box=None, pad_edge=False)
    for column in ("before", "after"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for change in found:
        if change.kind is not Became.SAME:
            drawn.add_row(change.name, change.mode, change.kind, _shown(change.before), _shown(change.after))
    return drawn


def _shown(measured: Measured | None) -> str:
    if measured is None:
        return "–"
    return str(measured.verdict) if measured.multiple is None else f"{measured.multiple:.3g}x"


def _kind(before: Measured | None, after: Measured | None) -> Became:
    if before is None or after is None:
        if after is None:
            return Became.GONE
        return Became.FAILS_NOW if after.verdict is Verdict.FAIL else Became.NEW
    if (before.verdict is Verdict.FAIL) != (after.verdict is Verdict.FAIL):
        return Became.FAILS_NOW if after.verdict is Verdict.FAIL else Became.PASSES_NOW
    first, second = before.multiple, after.multiple
    if first is None or second is None or max(first, second) <= _ROUNDING:
        return Became.SAME
    if second > first * STEADY:
        return Became.WORSE
    return Became.BETTER if first > second * STEADY else Became.SAME


def _facts(document: Mapping[str, Any]) -> dict[str, str]:
    """A report in a few lines; what is absent is left out."""
    platform = document["platform"]
    versions = ", ".join(f"{name} {version}" for name, version in platform.get("versions", {}).items())
    facts = {
        "verdict": str(document["verdict"]).upper(),
        "checkpoint": str(document["checkpoint"].get("path", "")),
        "golden": str(document["golden"].get("path", "")),
        "modes": " and ".join(map(str, document["modes"])),
        "device": " ".join(dict.fromkeys(str(platform[name]) for name in ("backend", "device") if name in platform)),
        "precision": str(platform.get("precision", "")),
        "versions": versions,
    }
    return {name: text for name, text in facts.items() if text}


def _tap(entry: Mapping[str, Any]) -> tuple[tuple[TapKey, Mode], Measured]:
    return (TapKey.parse(entry["name"]), enumerated(entry["mode"], Mode, field="mode")), _measured(entry)


def _measured(entry: Mapping[str, Any]) -> Measured:
    distance = entry["distance"]
    multiples = [] if distance is None else [float(value) for value in distance["noise"].values()]
    largest = max((math.inf if math.isnan(value) else value for value in multiples), default=None)
    return Measured(enumerated(entry["verdict"], Verdict, field="verdict"), largest)

"""Judging a run by a baseline (:mod:`dsv4_convert.parity.baseline`): errors that grew, although within tolerance.

Tolerances hold for every healthy model on every machine, so they are wide. A baseline knows what *this* model's errors
were with this golden, on this platform, and so notices a computation that became a few times less exact.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import Golden, TapForm
from dsv4_convert.parity.baseline import (
    ALL,
    Baseline,
    BaselineKey,
    Numbers,
    open_baseline,
    rounded,
    tightened,
    write_baseline,
)
from dsv4_convert.parity.comparison import Comparison, Phase
from dsv4_convert.parity.report.data import Gate, GrownError, ParityReport, TapInMode, TapResult
from dsv4_convert.parity.tolerances import BANDS, BANDS_OF_FEW, FEW, Band
from dsv4_convert.spec.taps import TapKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineRequest:
    """How to use a baseline: its file, whether to update it, and why it may record larger errors."""

    path: Path
    update: bool = False
    reason: str | None = None


def baseline_request(path: Path | None, *, update: bool, reason: str | None) -> BaselineRequest | None:
    """The request that the options of a command make; None without a baseline.

    Raises:
        UsageError: an option without the one that it belongs to.
    """
    if path is None and update:
        raise UsageError("--update-baseline: expected --baseline FILE, the file to write")
    if reason is not None and not update:
        raise UsageError("--reason: belongs to --update-baseline, which it allows to record larger errors")
    if reason is not None and not reason.strip():
        raise UsageError("--reason: expected a few words, which are kept in the file")
    return None if path is None else BaselineRequest(path=path, update=update, reason=reason)


def gated(
    report: ParityReport,
    golden: Golden,
    request: BaselineRequest,
    *,
    partial: bool,
    write: bool = True,
    today: datetime.date | None = None,
) -> ParityReport:
    """The report with the result of its baseline; writes the file if that is requested and allowed.

    Args:
        report: the run.
        golden: what it was compared with.
        request: the file.
        partial: only some layers or taps were wanted, so that those that are absent say nothing.
        write: whether this process is the one that writes.
        today: for the history; None for the date in UTC.

    Raises:
        BadInput: the file is absent, damaged, or of another golden.
        ResourceError: it cannot be written.
    """
    baseline = open_baseline(request.path, golden, create=request.update)
    gate = dataclasses.replace(
        _judged(report, baseline, request.path, partial=partial),
        lacking=_lacking(report, golden, baseline) if partial else 0,
        update=request.update,
    )
    if request.update:
        gate, changed = _updated(report, gate, baseline, request.reason, today or _today())
        # Not touched where nothing changes, so that a file without the right to write serves as well.
        if write and gate.updated and changed.to_text() != baseline.to_text():
            write_baseline(request.path, changed)
    return dataclasses.replace(report, gate=gate)


def key_of(report: ParityReport, tap: TapResult) -> BaselineKey:
    """The baseline's key of a tap's numbers. CPUs count as one platform, accelerators by their kind."""
    backend = report.platform["backend"]
    platform = backend if backend == "cpu" else f"{backend} {report.platform['device']}"
    return BaselineKey(platform, report.dtype, tap.mode.value, report.phase or ALL)


def numbers_of(tap: TapResult) -> Numbers | None:
    """The errors of a tap by measure; None if it is empty or has another shape."""
    if tap.distance is not None:
        return dataclasses.asdict(tap.distance.noise)
    if tap.flips is not None:
        return {"tokens": tap.flips.tokens / tap.flips.of}
    return None


def bands_of(tap: TapResult) -> Mapping[str, Band]:
    """How far the numbers of a tap may move. With a compact golden the worst form may change as well."""
    if tap.distance is None:
        return BANDS
    elements = tap.distance.rows * math.prod(tap.shape[2:])
    return BANDS if elements >= FEW and tap.form is TapForm.WHOLE else BANDS_OF_FEW


def _measured(report: ParityReport) -> Iterator[tuple[BaselineKey, TapResult, Numbers]]:
    for tap in report.taps:
        if (numbers := numbers_of(tap)) is not None:
            yield key_of(report, tap), tap, numbers


def _judged(report: ParityReport, baseline: Baseline, path: Path, *, partial: bool) -> Gate:
    """Every tap against its record, and every record against the taps."""
    grown: list[GrownError] = []
    unrecorded: list[TapInMode] = []
    compared = 0
    seen: dict[BaselineKey, set[TapKey]] = {}
    for key, tap, numbers in _measured(report):
        seen.setdefault(key, set()).add(tap.key)
        record = baseline.measured.get(key, {}).get(tap.key)
        if record is None or record.keys() != numbers.keys():
            unrecorded.append(TapInMode(key=tap.key, mode=tap.mode))
            continue
        compared += 1
        if tap.passes:
            grown += _growth(tap, record, numbers)
    absent = [
        TapInMode(key=tap, mode=mode)
        for mode in report.modes
        for key, taps in seen.items()
        if key.mode == mode
        for tap in baseline.measured.get(key, {})
        if tap not in taps
    ]
    # Records of the same platform, dtype and phase in modes that did not run.
    alike = {key._replace(mode="") for key in seen}
    not_run = sum(
        len(taps)
        for key, taps in baseline.measured.items()
        if key.mode not in report.modes and key._replace(mode="") in alike
    )
    return Gate(
        path=str(path),
        platforms=tuple(dict.fromkeys(str(key) for key in seen)),
        compared=compared,
        grown=tuple(grown),
        unrecorded=tuple(unrecorded),
        missing=() if partial else tuple(absent),
        left_out=not_run + (len(absent) if partial else 0),
    )


def _lacking(report: ParityReport, golden: Golden, baseline: Baseline) -> int:
    """Taps of the golden that neither this run has nor the baseline, in the modes of this run."""
    phase = None if report.phase is None else Phase(report.phase)
    comparison = Comparison(golden, report.dtype, phase)
    keys = {tap.mode: key_of(report, tap) for tap in report.taps}
    ran = {(tap.mode, tap.key) for tap in report.taps}
    return sum(
        comparison.compares(tap, mode) and (mode, tap) not in ran and tap not in baseline.measured.get(key, {})
        for mode, key in keys.items()
        for tap in golden.keys
    )


def _growth(tap: TapResult, record: Numbers, numbers: Numbers) -> Iterator[GrownError]:
    bands = bands_of(tap)
    for measure, found in numbers.items():
        allowed = bands[measure].allowed(record[measure])
        if found > allowed:
            yield GrownError(
                key=tap.key,
                mode=tap.mode,
                measure=measure,
                recorded=record[measure],
                allowed=allowed,
                found=found,
            )


def _updated(
    report: ParityReport, gate: Gate, baseline: Baseline, reason: str | None, today: datetime.date
) -> tuple[Gate, Baseline]:
    """The stricter baseline, or the same one where that is refused: a failure, or a growth without a reason."""
    if not (report.agrees and report.covered) or gate.missing or (gate.grown and reason is None):
        return gate, baseline
    raised = {(tap.mode, tap.key) for tap in gate.grown}
    changed, added, tighter = baseline, 0, 0
    history: dict[BaselineKey, list[dict[str, Any]]] = {}
    taps: dict[BaselineKey, dict[TapKey, Numbers]] = {}
    for key, tap, numbers in _measured(report):
        old = baseline.measured.get(key, {}).get(tap.key)
        fresh = {measure: rounded(number) for measure, number in numbers.items()}
        if old is None or old.keys() != numbers.keys():
            added += 1
        elif (tap.mode, tap.key) in raised:
            history.setdefault(key, []).append({"tap": tap.name, "from": dict(old), "to": fresh})
        else:
            fresh = tightened(old, numbers)
            tighter += fresh != old
        taps.setdefault(key, {})[tap.key] = fresh
    for key, mine in taps.items():
        changed = changed.with_taps(key, mine)
    if history:
        entries = [_entry(key, grown, reason or "", report.platform, today) for key, grown in history.items()]
        changed = dataclasses.replace(changed, history=(*changed.history, *entries))
    return dataclasses.replace(
        gate, updated=True, added=added, tightened=tighter, reason=reason if history else None
    ), changed


def _entry(
    key: BaselineKey, grown: list[dict[str, Any]], reason: str, platform: Mapping[str, Any], today: datetime.date
) -> dict[str, Any]:
    return {
        "date": today.isoformat(),
        "reason": reason,
        **key._asdict(),
        "versions": dict(platform["versions"]),
        "grown": grown,
    }


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()

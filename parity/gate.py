"""Judging a run by a baseline (:mod:`dsv4_convert.parity.baseline`): what has grown, although it is within tolerance.

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
from dsv4_convert.golden.archive import Form, Golden
from dsv4_convert.parity.baseline import ALL, Baseline, Key, Numbers, open_baseline, rounded, tightened, write_baseline
from dsv4_convert.parity.report import Gate, Grown, Report, TapResult, Unrecorded
from dsv4_convert.parity.tolerances import BANDS, BANDS_OF_FEW, FEW, Band


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is wanted of a baseline: the file, and whether it is written, and why it may record larger errors."""

    path: Path
    update: bool = False
    reason: str | None = None


def request(path: Path | None, *, update: bool, reason: str | None) -> Request | None:
    """What the options of a command ask for; None where no baseline is given.

    Raises:
        UsageError: an option without the one that it belongs to.
    """
    if path is None and update:
        raise UsageError("--update-baseline: expected --baseline FILE, the file to write")
    if reason is not None and not update:
        raise UsageError("--reason: belongs to --update-baseline, which it allows to record larger errors")
    if reason is not None and not reason.strip():
        raise UsageError("--reason: expected a few words, which are kept in the file")
    return None if path is None else Request(path=path, update=update, reason=reason)


def gated(
    report: Report,
    golden: Golden,
    request: Request,
    *,
    partial: bool,
    write: bool = True,
    today: datetime.date | None = None,
) -> Report:
    """The report, with what its baseline says of it; the file is written where that is wanted and allowed.

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
    gate = dataclasses.replace(_judged(report, baseline, request.path, partial=partial), update=request.update)
    if request.update:
        gate, changed = _updated(report, gate, baseline, request.reason, today or _today())
        # Not touched where nothing changes, so that a file without the right to write serves as well.
        if write and gate.updated and changed.to_text() != baseline.to_text():
            write_baseline(request.path, changed)
    return dataclasses.replace(report, gate=gate)


def key_of(report: Report, tap: TapResult) -> Key:
    """Where the numbers of a tap belong. CPUs count as one platform, accelerators by their kind."""
    backend = report.platform["backend"]
    platform = backend if backend == "cpu" else f"{backend} {report.platform['device']}"
    return Key(platform, report.dtype, tap.mode.value, report.phase or ALL)


def numbers_of(tap: TapResult) -> Numbers | None:
    """What was measured of a tap; None where nothing was: it is empty, or its shape is another."""
    if tap.distance is not None:
        return dataclasses.asdict(tap.distance.noise)
    if tap.flips is not None:
        return {"tokens": tap.flips.tokens / tap.flips.of}
    return None


def bands_of(tap: TapResult) -> Mapping[str, Band]:
    """How far the numbers of a tap may move. Of a compact golden, which of its forms is worst may change too."""
    if tap.distance is None:
        return BANDS
    elements = tap.distance.rows * math.prod(tap.shape[2:])
    return BANDS if elements >= FEW and tap.form is Form.WHOLE else BANDS_OF_FEW


def _measured(report: Report) -> Iterator[tuple[Key, TapResult, Numbers]]:
    for tap in report.taps:
        if (numbers := numbers_of(tap)) is not None:
            yield key_of(report, tap), tap, numbers


def _judged(report: Report, baseline: Baseline, path: Path, *, partial: bool) -> Gate:
    """Every tap against its record, and every record against the taps."""
    grown: list[Grown] = []
    unrecorded: list[Unrecorded] = []
    compared = 0
    seen: dict[Key, set[str]] = {}
    for key, tap, numbers in _measured(report):
        seen.setdefault(key, set()).add(tap.name)
        record = baseline.measured.get(key, {}).get(tap.name)
        if record is None or record.keys() != numbers.keys():
            unrecorded.append(Unrecorded(name=tap.name, mode=tap.mode))
            continue
        compared += 1
        if tap.passes:
            grown += _growth(tap, record, numbers)
    absent = [
        Unrecorded(name=name, mode=mode)
        for mode in report.modes
        for key, names in seen.items()
        if key.mode == mode
        for name in baseline.measured.get(key, {})
        if name not in names
    ]
    # What the modes that did not run have of the same platform, dtype and phase.
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


def _growth(tap: TapResult, record: Numbers, numbers: Numbers) -> Iterator[Grown]:
    bands = bands_of(tap)
    for measure, found in numbers.items():
        allowed = bands[measure].allowed(record[measure])
        if found > allowed:
            yield Grown(
                name=tap.name,
                mode=tap.mode,
                measure=measure,
                recorded=record[measure],
                allowed=allowed,
                found=found,
            )


def _updated(
    report: Report, gate: Gate, baseline: Baseline, reason: str | None, today: datetime.date
) -> tuple[Gate, Baseline]:
    """The stricter baseline, or the same one where that is refused: a failure, or a growth without a reason."""
    if not (report.agrees and report.reached) or gate.missing or (gate.grown and reason is None):
        return gate, baseline
    raised = {(tap.mode, tap.name) for tap in gate.grown}
    changed, added, tighter = baseline, 0, 0
    history: dict[Key, list[dict[str, Any]]] = {}
    taps: dict[Key, dict[str, Numbers]] = {}
    for key, tap, numbers in _measured(report):
        old = baseline.measured.get(key, {}).get(tap.name)
        fresh = {measure: rounded(number) for measure, number in numbers.items()}
        if old is None or old.keys() != numbers.keys():
            added += 1
        elif (tap.mode, tap.name) in raised:
            history.setdefault(key, []).append({"tap": tap.name, "from": dict(old), "to": fresh})
        else:
            fresh = tightened(old, numbers)
            tighter += fresh != old
        taps.setdefault(key, {})[tap.name] = fresh
    for key, mine in taps.items():
        changed = changed.with_taps(key, mine)
    if history:
        entries = [_entry(key, grown, reason or "", report.platform, today) for key, grown in history.items()]
        changed = dataclasses.replace(changed, history=(*changed.history, *entries))
    return dataclasses.replace(
        gate, updated=True, added=added, tightened=tighter, reason=reason if history else None
    ), changed


def _entry(
    key: Key, grown: list[dict[str, Any]], reason: str, platform: Mapping[str, Any], today: datetime.date
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

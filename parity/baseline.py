"""A baseline: the errors of a healthy implementation, in a committed file that only gets stricter.

::

    {
     "schema_version": 1,
     "golden": "f7c3…",             the digest of the golden's manifest: errors are multiples of its noise floor
     "measured": [
      {"platform": "cpu", "dtype": "float32", "mode": "isolated", "phase": "all", "taps": {
       "layers.0.attn.wq_a": {"tap": 1.03, "row": 1.64, "element": 1.84},
       "layers.1.attn.indexer.chosen": {"tokens": 0.0267}
      }}
     ],
     "history": []                  every time that something was allowed to grow: when, why, from what to what
    }

One line per tap, sorted, every number rounded up to three digits: a second run on the same machine writes the same
bytes. :data:`dsv4_convert.parity.tolerances.BANDS` says how far a number may move before it is a growth.
:mod:`dsv4_convert.parity.gate` compares a run with it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any, NamedTuple

from dsv4_convert.errors import BadInput, Dsv4Error, ResourceError
from dsv4_convert.files.limits import nearest_folder
from dsv4_convert.files.strict_json import enumerated, read_object
from dsv4_convert.files.writing import write_atomically, writing
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.layout import is_fed
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.parity.metrics import Multiples
from dsv4_convert.parity.tolerances import BANDS, UNIT, limits_of
from dsv4_convert.spec.taps import TapKey

SCHEMA_VERSION = 1
#: The phase of a run that compared all tokens.
ALL = "all"
_PHASES = (ALL, "prefill", "decode")
_ROOT = ("schema_version", "golden", "measured", "history")
_REAL = tuple(field.name for field in dataclasses.fields(Multiples))
#: The measures that a tap may have: multiples of the noise floor, or for a choice the share of tokens with ties.
_FORMS = (_REAL, ("tokens",))

#: The errors of a tap, by measure.
Numbers = Mapping[str, float]


class BaselineKey(NamedTuple):
    """The circumstances that errors depend on, besides the golden: platform, dtype, mode, and phase."""

    platform: str
    dtype: str
    mode: str
    phase: str

    def __str__(self) -> str:
        where = f"{self.platform}, {self.dtype}, {self.mode}"
        return where if self.phase == ALL else f"{where}, {self.phase}"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """The content of a baseline file: numbers by key and tap, and its history as plain JSON values."""

    golden: str
    measured: Mapping[BaselineKey, Mapping[TapKey, Numbers]]
    history: tuple[Mapping[str, Any], ...] = ()

    def with_taps(self, key: BaselineKey, taps: Mapping[TapKey, Numbers]) -> Baseline:
        """The same with these numbers for these taps."""
        mine = {**self.measured.get(key, {}), **taps}
        return dataclasses.replace(self, measured={**self.measured, key: mine})

    def to_text(self) -> str:
        """The file, one line per tap; equal baselines give equal text."""
        lines = [
            "{",
            f' "schema_version": {SCHEMA_VERSION},',
            f' "golden": {json.dumps(self.golden)},',
            ' "measured": [',
        ]
        for at, (key, taps) in enumerate(sorted(self.measured.items())):
            head = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in key._asdict().items())
            lines.append(f'  {{{head}, "taps": {{')
            rows = [f"   {json.dumps(str(tap))}: {json.dumps(dict(taps[tap]))}" for tap in sorted(taps, key=_order)]
            lines.append(",\n".join(rows))
            lines.append("  }}" + ("," if at + 1 < len(self.measured) else ""))
        past = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in self.history)
        lines += [" ],", ' "history": [' + (f"\n{past}\n ]" if past else "]"), "}", ""]
        return "\n".join(lines)


def rounded(value: float) -> float:
    """Up to three significant digits, so that the number itself is never above what is written of it."""
    digits = Decimal(repr(float(value)))
    if not digits:
        return 0.0
    return float(digits.quantize(Decimal(1).scaleb(digits.adjusted() - 2), ROUND_CEILING))


def tightened(old: Numbers, new: Numbers) -> dict[str, float]:
    """The smaller of the two, measure by measure."""
    return {measure: min(value, rounded(new[measure])) for measure, value in old.items()}


def open_baseline(path: Path, golden: Golden, *, create: bool = False) -> Baseline:
    """Read a baseline of this golden; an empty one where the file is absent and ``create`` says so.

    Raises:
        BadInput: absent, damaged, of another golden, or a number that no run could have measured.
    """
    digest = golden.manifest.digest
    if not path.exists():
        if create:
            return Baseline(digest, {})
        raise BadInput(f"{path}: no such baseline; record one with --update-baseline")
    document = read_object(path)
    if (version := document.get("schema_version")) != SCHEMA_VERSION or isinstance(version, bool):
        raise BadInput(f"{path}: schema_version is {version!r}, this version of dsv4 reads {SCHEMA_VERSION}")
    if set(document) != set(_ROOT):
        raise BadInput(f"{path}: expected the entries {sorted(_ROOT)}, found {sorted(document)}")
    if document["golden"] != digest:
        raise BadInput(
            f"{path}: measured with the golden whose digest is {document['golden']!r}; {golden.path} is {digest}. "
            "Errors are multiples of a golden's own noise floor, so compare with that golden, or record another "
            "baseline file for this one with --update-baseline"
        )
    try:
        measured = dict(_entry(entry, golden) for entry in _list(document["measured"]))
        history = tuple(_mapping(entry) for entry in _list(document["history"]))
        if len(measured) != len(document["measured"]):
            raise ValueError("measured: two entries of the same platform, dtype, mode and phase")
    except (ValueError, Dsv4Error) as error:
        raise BadInput(f"{path}: {error}; take the file from version control again") from None
    return Baseline(digest, measured, history)


def check_writable(path: Path) -> None:
    """Refuse, before the work is done, a file that could not be written. Raises :class:`ResourceError`."""
    folder = nearest_folder(path.parent)
    if not folder.is_dir():
        raise ResourceError(f"{path}: the baseline cannot be written ({folder} is no folder)")
    if not os.access(folder, os.W_OK):
        raise ResourceError(f"{path}: the baseline cannot be written (no permission in {folder})")


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write the file whole or not at all. Raises :class:`ResourceError` if it cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, baseline.to_text().encode())


def _order(key: TapKey) -> tuple[float, str]:
    """By layer or stage, the model level last, then by name."""
    return (math.inf if key.layer is None else key.layer, str(key))


def _entry(value: object, golden: Golden) -> tuple[BaselineKey, dict[TapKey, Numbers]]:
    entry = _mapping(value)
    if set(entry) != {*BaselineKey._fields, "taps"}:
        raise ValueError(
            f"measured: expected {', '.join(BaselineKey._fields)} and taps, found {', '.join(sorted(entry))}"
        )
    key = BaselineKey(*(entry[field] for field in BaselineKey._fields))
    if not (isinstance(entry["platform"], str) and entry["platform"]):
        raise ValueError(f"measured: platform is {key.platform!r}, expected its name")
    for field, allowed in (("dtype", tuple(UNIT)), ("mode", tuple(MODES)), ("phase", _PHASES)):
        enumerated(entry[field], allowed, field=f"measured: {field}")
    known = {str(tap): tap for tap in golden.keys}
    most = dataclasses.asdict(limits_of(key.dtype, golden.numerics)) | {"tokens": 1.0}
    taps = {}
    for name, numbers in _mapping(entry["taps"]).items():
        if name not in known:
            raise ValueError(f"{key}: the golden has no tap {name!r}")
        if not is_fed(known[name], Mode(key.mode)):  # earlier versions recorded these zeros
            taps[known[name]] = _numbers(f"{key}: {name}", numbers, most)
    return key, taps


def _numbers(where: str, value: object, most: Numbers) -> Numbers:
    """The numbers of one tap, of which none is more than a run within tolerance has."""
    numbers = _mapping(value)
    if tuple(sorted(numbers)) not in [tuple(sorted(form)) for form in _FORMS]:
        expected = " or ".join(", ".join(form) for form in _FORMS)
        raise ValueError(f"{where}: expected {expected}, found {', '.join(sorted(numbers)) or 'nothing'}")
    for measure, number in numbers.items():
        good = isinstance(number, int | float) and not isinstance(number, bool)
        if not good or not math.isfinite(number) or number < 0:
            raise ValueError(f"{where}: {measure} is {number!r}, expected a number that is 0 or more")
        if number > most[measure]:
            raise ValueError(
                f"{where}: {measure} is {number!r}, beyond the tolerance of {most[measure]:g}; only less is recorded"
            )
    return {measure: float(numbers[measure]) for measure in BANDS if measure in numbers}


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, found {type(value).__name__}")
    return value

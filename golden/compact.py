"""Compact goldens: the kept part of each tap when whole taps would not fit a repository.

A compact golden keeps two parts of a tap ``[B, S, ...]``. Its *sketch* ``[B, S, 1 + numbers]`` has, for every row (one
token or one compressed entry), the rms and a random projection to a few numbers. The rows of a few chosen tokens are
kept exactly. Choices are kept whole, and so are taps whose rows are no longer than a sketch.

The projection multiplies a row of n elements with random signs over the square root of n. For any error of a row, the
expected square of each projected number's error is the error's mean square, and the error of the rms is at most its
root. So the numbers of a sketch err as much as the elements of its row do, and the same noise floor applies to them
(Johnson and Lindenstrauss 1984; Achlioptas 2003 for signs).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from dsv4_convert.errors import UsageError

Array = np.ndarray[Any, Any]

#: Numbers of a projection. An error is missed by a chance that falls with every number; the false alarms that
#: ``benchmarks/false_alarms.py`` looks for would rise with fewer.
NUMBERS = 16
MAX_NUMBERS = 1024
#: Elements that are projected at a time: 8 MiB in float64.
_ELEMENTS_AT_ONCE = 1 << 20

_SKETCH, _EXACT = ":sketch", ":exact"


def sketch_name(tap: str) -> str:
    """The stored name of a tap's sketch."""
    return tap + _SKETCH


def exact_name(tap: str) -> str:
    """The stored name of the rows of a tap that are kept exactly."""
    return tap + _EXACT


def is_kept_part(name: str) -> bool:
    """Whether a stored name belongs to a sketch or to exact rows."""
    return name.endswith((_SKETCH, _EXACT))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compact:
    """The kept part of each tap: tokens at ``positions`` (ascending) exactly, and a projection.

    ``numbers`` and ``seed`` determine the projection.
    """

    positions: tuple[int, ...]
    numbers: int = NUMBERS
    seed: int = 0

    @classmethod
    def of(cls, positions: Iterable[int], tokens: int, *, numbers: int = NUMBERS, seed: int = 0) -> Compact:
        """For a prompt of ``tokens`` tokens; a negative position counts from the end.

        Raises:
            UsageError: a position that the prompt does not have, or no or too many numbers.
        """
        wanted = list(positions)
        if outside := [at for at in wanted if not -tokens <= at < tokens]:
            raise UsageError(f"positions {outside}: the prompt has {tokens} tokens, so {-tokens} to {tokens - 1}")
        if not 1 <= numbers <= MAX_NUMBERS:
            raise UsageError(f"{numbers} numbers of a projection: expected 1 to {MAX_NUMBERS}")
        return cls(positions=tuple(sorted({at % tokens for at in wanted})), numbers=numbers, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the constructor's arguments."""
        return {"positions": list(self.positions), "numbers": self.numbers, "seed": self.seed}

    def whole(self, shape: Sequence[int]) -> bool:
        """Whether a real tap of this shape is kept whole: it is empty, or its rows are no longer than a sketch."""
        return not math.prod(shape) or math.prod(shape[2:]) <= 1 + self.numbers

    def rows(self, *, block: int) -> tuple[int, ...]:
        """The rows that are kept exactly, of a tap with one row for every ``block`` tokens.

        For compressed entries this is the last entry that each position sees, the entry of the last complete block.
        """
        return tuple(sorted({(position + 1) // block - 1 for position in self.positions} - {-1}))

    def sketch(self, array: Array) -> Array:
        """``[B, S, 1 + numbers]`` float32 of ``[B, S, ...]``: rms of every row, then its projection.

        Computed in float64. A row with an element that is not finite gives numbers that are not finite either.
        """
        rows = array.reshape(math.prod(array.shape[:2]), -1)
        count, size = rows.shape
        signs = _signs(self.seed, size, self.numbers)
        result = np.empty((count, 1 + self.numbers), np.float32)
        step = max(1, _ELEMENTS_AT_ONCE // max(size, 1))
        with np.errstate(invalid="ignore"):
            for start in range(0, count, step):
                part = rows[start : start + step].astype(np.float64)
                result[start : start + step, 0] = np.sqrt(np.mean(np.square(part), axis=1))
                result[start : start + step, 1:] = part @ signs / math.sqrt(size)
        return result.reshape(*array.shape[:2], -1)


@lru_cache(maxsize=4)  # the taps of a layer have rows of some dozen lengths, the longest of 17 MB of signs
def _signs(seed: int, size: int, numbers: int) -> Array:
    """``[size, numbers]`` of 1 and -1 in float64; the same on any machine and with any version of any library."""
    stream = hashlib.shake_256(f"dsv4 compact golden, seed {seed}, rows of {size}".encode())
    bits = np.unpackbits(np.frombuffer(stream.digest(-(-size * numbers // 8)), np.uint8), count=size * numbers)
    return 1.0 - 2.0 * bits.reshape(size, numbers)

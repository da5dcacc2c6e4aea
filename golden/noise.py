"""The noise floor of a golden: how far legal rounding moves the reference away from the recorded values.

A golden holds float32 values. The reference runs again with the golden's discrete choices, in two more dtypes. The run
in float64 shows how much of the golden itself is rounding: the floor of float32. The run in bfloat16, as users run it,
gives the floor of bfloat16. A golden in release numerics is in bfloat16 and has one floor, measured by the same code
with its sums in float64.

Each of these runs twice: *isolated*, with every layer on the golden's own input, rounded to that dtype; and
*cumulative*, from the tokens, on its own streams. The golden keeps the distance of each run per row (the first two axes
of a tap): the rms and the largest absolute value of the difference over the remaining axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Mode(StrEnum):
    """Where a layer's input comes from."""

    ISOLATED = "isolated"
    CUMULATIVE = "cumulative"


MODES: tuple[Mode, ...] = tuple(Mode)

#: dtype under test -> dtype in which the reference runs to measure its noise.
RUN_DTYPES: dict[str, str] = {"float32": "float64", "bfloat16": "bfloat16"}

#: The numbers that are kept per row.
RMS, PEAK = 0, 1

#: Elements that are compared at a time: 8 MiB in float64.
_ELEMENTS_AT_ONCE = 1 << 20

_SUFFIX = ":noise"


def noise_name(tap: str) -> str:
    """The stored name of the noise of a tap."""
    return tap + _SUFFIX


def is_noise(name: str) -> bool:
    """Whether a stored name belongs to a noise."""
    return name.endswith(_SUFFIX)


def noise_shape(shape: Sequence[int], dtypes: int) -> tuple[int, ...]:
    """``[dtypes, modes, rms and peak, rows of axis 0, rows of axis 1]`` for a tap of this shape."""
    return (dtypes, len(MODES), 2, *shape[:2])


def row_noise(run: Array, golden: Array) -> Array:
    """``[2, B, S]`` float32: rms and largest absolute value of ``run - golden`` in every row; computed in float64.

    Rows without elements have no noise.
    """
    shape = golden.shape[:2]
    if not golden.size:
        return np.zeros((2, *shape), np.float32)
    theirs, ours = (array.reshape(math.prod(shape), -1) for array in (run, golden))
    noise = np.empty((2, len(ours)), np.float32)
    step = max(1, _ELEMENTS_AT_ONCE // ours.shape[1])
    for start in range(0, len(ours), step):
        rows = slice(start, start + step)
        difference = np.abs(theirs[rows].astype(np.float64) - ours[rows])
        noise[RMS, rows] = np.sqrt(np.mean(np.square(difference), axis=1))
        noise[PEAK, rows] = difference.max(axis=1)
    return noise.reshape(2, *shape)


def row_sizes(golden: Array) -> Array:
    """The rms of every row of ``[B, S, ...]``, float64 ``[B, S]``; elements that are not finite count as 0."""
    sizes: Array = np.sqrt(np.mean(np.square(magnitude(golden).reshape(*golden.shape[:2], -1)), axis=-1))
    return sizes


def magnitude(values: Array) -> Array:
    """Absolute values in float64, 0 where a value is not finite."""
    return np.where(np.isfinite(values), np.abs(values.astype(np.float64)), 0.0)


@dataclasses.dataclass(frozen=True)
class RecordedTaps:
    """The taps of one layer, or of the model level, by name within it, and the noise of the real-valued ones."""

    taps: Mapping[str, Array]
    noise: Mapping[str, Array]

    def arrays(self, prefix: str) -> dict[str, Array]:
        """All arrays by stored name."""
        taps = {prefix + name: array for name, array in self.taps.items()}
        return taps | {noise_name(prefix + name): array for name, array in self.noise.items()}

"""Multiples of the noise floor on a logarithmic axis that also has a place for 0 and for what is no number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class Scale:
    """Decades ``low`` to ``high``; 0 lies below them, infinite and NaN above."""

    low: int
    high: int
    zero: bool
    infinite: bool

    @classmethod
    def over(cls, values: Iterable[float], *, least: tuple[float, float]) -> Scale:
        """The scale that holds all values, and at least from one to the other of ``least``."""
        numbers = list(values)
        finite = [abs(value) for value in numbers if math.isfinite(value) and value]
        smallest, largest = min([*finite, least[0]]), max([*finite, least[1]])
        return cls(
            low=math.floor(math.log10(smallest)),
            high=math.ceil(math.log10(largest)),
            zero=0.0 in numbers,
            infinite=any(not math.isfinite(value) for value in numbers),
        )

    def __call__(self, value: float) -> float:
        """Position of a value on a linear axis."""
        if not math.isfinite(value):
            return self.high + self._gap
        return math.log10(abs(value)) if value else self.low - self._gap

    @property
    def _gap(self) -> float:
        return max(0.5, (self.high - self.low) / 10)

    @property
    def ends(self) -> tuple[float, float]:
        """The limits of the axis."""
        room = 0.5 * self._gap
        bottom = self.low - (self._gap if self.zero else 0) - room
        return bottom, self.high + (self._gap if self.infinite else 0) + room

    def ticks(self, axes: Axes, axis: str) -> None:
        """Limits, ticks and their labels on ``x`` or ``y`` of ``axes``."""
        step = max(1, math.ceil((self.high - self.low) / 6))
        exponents = range(self.low, self.high + 1, step)
        places = [float(exponent) for exponent in exponents]
        labels = [power(exponent) for exponent in exponents]
        if self.zero:
            places, labels = [self(0.0), *places], ["0", *labels]
        if self.infinite:
            places, labels = [*places, self(math.inf)], [*labels, "∞"]
        if axis == "x":
            axes.set_xlim(*self.ends)
            axes.set_xticks(places, labels)
        else:
            axes.set_ylim(*self.ends)
            axes.set_yticks(places, labels)


def power(exponent: int) -> str:
    """``0.01`` to ``1000``, and powers of ten beyond."""
    if -2 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))

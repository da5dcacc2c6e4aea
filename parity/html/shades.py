"""The colours of the maps: five shades of blue within the limits, four from amber to brown beyond them.

Blue and amber differ for every kind of colour blindness, and each step in lightness as well. Within the limits the
colour is laid over the page, so it follows its theme.
"""

from __future__ import annotations

import dataclasses
import math

from dsv4_convert.parity.tolerances import LIMITS


@dataclasses.dataclass(frozen=True)
class Shade:
    """One step: a class of the style sheet, what it stands for, and its colour as red, green, blue and opacity."""

    name: str
    label: str
    rgba: tuple[int, int, int, float]

    @property
    def css(self) -> str:
        """The colour as a style sheet has it."""
        red, green, blue, opacity = self.rgba
        return f"rgb({red} {green} {blue} / {opacity:g})"


_BLUE = (30, 136, 205)
SHADES = (
    Shade("s0", "0", (*_BLUE, 0.05)),
    Shade("s1", "to 1", (*_BLUE, 0.15)),
    Shade("s2", "to 3", (*_BLUE, 0.28)),
    Shade("s3", "to 10", (*_BLUE, 0.44)),
    Shade("s4", f"to {LIMITS.row:g}", (*_BLUE, 0.62)),
    Shade("f1", "to 100", (255, 196, 61, 1.0)),
    Shade("f2", "to 10⁴", (242, 142, 43, 1.0)),
    Shade("f3", "to 10⁷", (190, 70, 10, 1.0)),
    Shade("f4", "beyond", (122, 30, 8, 1.0)),
)
_WITHIN = (0.0, 1.0, 3.0, 10.0)
_BEYOND = (1e2, 1e4, 1e7)


def shade(multiple: float, *, fails: bool) -> Shade:
    """The shade of a multiple of the noise floor, which a verdict has called within the limits or beyond them."""
    if fails:
        worse = len(_BEYOND) if math.isnan(multiple) else sum(multiple > edge for edge in _BEYOND)
        return SHADES[len(_WITHIN) + 1 + worse]
    return SHADES[sum(multiple > edge for edge in _WITHIN)]

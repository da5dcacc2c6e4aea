"""How the page shows a verdict and a multiple of the noise floor: a glyph, a short number, a shade.

There are five shades of blue within the limits and four from amber to brown beyond them. Blue and amber differ for all
kinds of colour blindness, and so does the lightness of each step. Within the limits the colour is translucent, so it
follows the page's theme.
"""

from __future__ import annotations

import dataclasses
import math

from dsv4_convert.parity.metrics import Verdict

#: A shape and a word beside every colour.
GLYPHS = {Verdict.PASS: "✓", Verdict.FAIL: "✕", Verdict.TIE: "≈", Verdict.EMPTY: "–"}


def short(multiple: float) -> str:
    """``0``, ``0.3``, ``2.8``, ``24``, ``140``, ``1e7``; ``∞`` for what is no number."""
    if not math.isfinite(multiple):
        return "∞"
    if multiple == 0:
        return "0"
    if multiple < 0.05:
        return f"{multiple:.0e}".replace("e-0", "e-")
    if multiple < 9.95:
        return f"{multiple:.1f}"
    return f"{multiple:.0f}" if multiple < 999.5 else f"{multiple:.0e}".replace("e+0", "e").replace("e+", "e")


@dataclasses.dataclass(frozen=True)
class Shade:
    """One step: its class in the style sheet, its meaning, and its colour as red, green, blue and opacity."""

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
    Shade("s4", "to the limit", (*_BLUE, 0.62)),
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

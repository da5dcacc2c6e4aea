"""Numbers and names as the page writes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup, escape

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


def coded(text: str) -> Markup:
    """Text with what stands between backticks as code; everything is escaped."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )


def broken(name: str) -> Markup:
    """A dotted name that may go on in the next line after a dot."""
    return Markup(".<wbr>").join(name.split("."))


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested JSON values as lines: ``reference.versions.torch``, and the value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        for number, item in enumerate(value):
            yield from flat(item, f"{name}.{number}")
    elif value is not None and value != () and value != []:
        yield name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

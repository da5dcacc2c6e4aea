"""The rooms of dsv4 and its two flows as a picture: ``python -m docs.mkdocs.picture`` writes docs/assets/rooms.svg."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

FILE = Path(__file__).parents[1] / "assets" / "rooms.svg"

#: Floors from top to bottom. A room imports from the floors below it: tests/test_dependencies.py holds every import
#: against this table.
FLOORS: tuple[dict[str, str], ...] = (
    {"cli": "parse, call, print"},
    {"parity": "compare, report", "inspection": "look at a path"},
    {"golden": "record, archive", "serve": "generate, speculate"},
    {
        "convert": "plan, chunks, run",
        "weights": "parameters: converted, published",
        "aot": "compile for a slice",
        "doctor": "look at the machine",
    },
    {"store": "Orbax: write, read, verify", "checkpoint": "Hugging Face: folder, Hub, bucket"},
    {"formats": "FP8, FP4, scales", "model": "Flax NNX, one block a file"},
    {"spec": "config, names, taps, coverage"},
    {"files": "workspace, atomic write, JSON"},
    {"show": "text escaped for where it goes, URLs without secrets, units, tables: every room uses it"},
)

#: The steps of each flow, in order, with their rooms.
FLOWS: dict[str, tuple[tuple[str, str], ...]] = {
    "A tensor, from shard to chunk": (
        ("checkpoint", "read its bytes"),
        ("formats", "decode codes and scales"),
        ("convert", "cut a chunk, count it"),
        ("store", "write and hash the chunk"),
        ("files", "publish the whole"),
    ),
    "A tap, from layer to report": (
        ("golden", "input, tap, noise floor"),
        ("weights", "parameters of the layer"),
        ("model", "run the layer, record taps"),
        ("parity", "compare, localize"),
        ("parity/report", "words, tables, page"),
    ),
}

_WIDTH, _MARGIN, _GAP, _HEIGHT = 960, 16, 8, 48
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2937; text-anchor: middle }
.room { font-weight: 600; font-size: 14px } .what { font-size: 11px; fill: #4b5563 }
.title { text-anchor: start; font-weight: 600 } rect { fill: #eef2ff; stroke: #6366f1; rx: 6 }
.step rect { fill: #ecfdf5; stroke: #059669 } path { stroke: #6b7280; fill: none; marker-end: url(#tip) }
@media (prefers-color-scheme: dark) {
  text { fill: #e5e7eb } .what { fill: #9ca3af } rect { fill: #1e1b4b } .step rect { fill: #064e3b }
}
"""


def draw() -> str:
    """The picture as SVG, readable in light and dark."""
    parts: list[str] = []
    top = _MARGIN
    for floor in FLOORS:
        parts += _row(list(floor.items()), top, "room")
        top += _HEIGHT + _GAP
    parts.append(_text("title", _MARGIN, top + 14, "Imports point downwards, from a floor to those below it."))
    top += 38
    for title, steps in FLOWS.items():
        parts.append(_text("title", _MARGIN, top + 8, title))
        parts += _row(steps, top + 20, "step", arrows=True)
        top += _HEIGHT + 48
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" role="img" '
        'aria-label="The rooms of dsv4, and the way of a tensor and of a tap through them">\n'
        f"<style>{_STYLE}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" style="fill: #6b7280; stroke: none"/></marker></defs>\n'
        f"{body}\n</svg>\n"
    )


def _row(cells: Sequence[tuple[str, str]], top: int, kind: str, *, arrows: bool = False) -> Iterator[str]:
    gap = 3 * _GAP if arrows else _GAP
    width = (_WIDTH - 2 * _MARGIN - (len(cells) - 1) * gap) / len(cells)
    for at, (name, what) in enumerate(cells):
        left = _MARGIN + at * (width + gap)
        middle = left + width / 2
        yield (
            f'<g class="{kind}"><rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_HEIGHT}"/>'
            f"{_text('room', middle, top + 22, name)}{_text('what', middle, top + 40, what)}</g>"
        )
        if arrows and at:
            yield f'<path d="M{left - gap + 4:.1f} {top + _HEIGHT / 2}H{left - 4:.1f}"/>'


def _text(kind: str, x: float, y: float, said: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}">{escape(said)}</text>'


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")

"""The layer schedule as a strip: a letter for each layer in rows of attention and more. Readable without colour."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.text import Text

from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.spec.v4.kinds import AttentionKind
from dsv4_convert.spec.v41.config import V41Config


class Glyph(NamedTuple):
    """A letter, its style, the layers that have it, and what the legend says of it."""

    letter: str
    style: str
    holds: Callable[[Any, int], bool]
    words: Callable[[Any], str]


def _of_kind(letter: str, style: str, kind: AttentionKind, words: Callable[[V4Config], str]) -> Glyph:
    return Glyph(letter, style, lambda config, layer: config.attention[layer] is kind, words)


def _of_ratio(letter: str, style: str, ratio: int, words: Callable[[V41Config], str]) -> Glyph:
    return Glyph(letter, style, lambda config, layer: config.ratio_of(layer) == ratio, words)


def _window(config: Config) -> str:
    return f"sliding window of {config.sliding_window} tokens alone"


#: Rows of an architecture: title, and the glyphs of which every layer has the first one that holds.
_ROWS: dict[type[Config], dict[str, tuple[Glyph, ...]]] = {
    V4Config: {
        "attention": (
            _of_kind("S", "blue", AttentionKind.SLIDING, _window),
            _of_kind(
                "C", "green", AttentionKind.CSA,
                lambda config: f"and CSA: an entry for {config.csa_ratio} tokens, {config.index_topk:,} chosen",
            ),
            _of_kind(
                "H", "magenta", AttentionKind.HCA,
                lambda config: f"and HCA: an entry for {config.hca_ratio} tokens, all of them",
            ),
        ),
        "routing": (
            Glyph("#", "yellow", V4Config.hashed, lambda config: "experts by the token's id (hash)"),
            Glyph("-", "", lambda config, layer: True, lambda config: "experts by learned scores"),
        ),
    },
    V41Config: {
        "attention": (
            _of_ratio("S", "blue", 0, _window),
            _of_ratio("P", "green", 2, lambda config: f"and an entry for 2 tokens, {config.index_topk:,} chosen"),
            _of_ratio("T", "magenta", 1, lambda config: f"and an entry for every token, {config.index_topk:,} chosen"),
        ),
        "makes": (
            Glyph("K", "yellow", V41Config.compresses, lambda config: "makes keys for itself and later layers"),
            Glyph("I", "cyan", V41Config.indexes, lambda config: "chooses keys for itself and later layers"),
            Glyph("-", "", lambda config, layer: True, lambda config: "makes nothing for other layers"),
        ),
        "engram": (
            Glyph("E", "red", V41Config.has_engram, lambda config: "looks up n-grams"),
            Glyph("-", "", lambda config, layer: True, lambda config: "has no n-gram table"),
        ),
    },
}  # fmt: skip
_MTP, _DSPARK = ("M", "cyan"), ("D", "cyan")
_NOTHING = ("-", "")
#: Style of an absent layer.
_ABSENT = "dim"
_MARGIN = 11

#: The glyphs of one layer, a letter and its style for each row.
_Column = tuple[tuple[str, str], ...]


def strip(config: Config, *, layers: tuple[int, ...] | None, width: int) -> Iterator[Text]:
    """The lines of the strip, wrapped at ``width`` columns, ten layers to a group; stages come after a bar.

    ``layers`` are the present layers, None for all; the absent ones are in lower case.
    """
    cells = [(_column(config, layer, layers), layer % 10 == 0, str(layer)) for layer in range(config.num_hidden_layers)]
    stage = (_stage(config), *(_NOTHING for _ in range(len(_rows(config)) - 1)))
    cells += [(stage, number == 0, "mtp") for number in range(config.num_mtp_stages)]
    groups: list[tuple[str, list[_Column]]] = []
    for column, first, label in cells:
        if first:
            groups.append((label, []))
        groups[-1][1].append(column)
    room = max(width - _MARGIN, 11)
    line: list[tuple[str, list[_Column]]] = []
    used = 0
    for label, columns in groups:
        if line and used + len(columns) + 1 > room:
            yield from _lines(config, line)
            line, used = [], 0
        line.append((label, columns))
        used += max(len(columns), len(label)) + 1
    yield from _lines(config, line)


def _rows(config: Config) -> dict[str, tuple[Glyph, ...]]:
    return _ROWS[type(config)]


def _stage(config: Config) -> tuple[str, str]:
    return _MTP if config.dspark is None else _DSPARK


def _drafts(config: Config) -> str:
    if config.dspark is None:
        return "of multi-token prediction"
    return f"of DSpark, which drafts {config.dspark.block_size} tokens at a time"


def _column(config: Config, layer: int, layers: tuple[int, ...] | None) -> _Column:
    found = [next(each for each in glyphs if each.holds(config, layer)) for glyphs in _rows(config).values()]
    if layers is not None and layer not in layers:
        return tuple((glyph.letter.lower(), _ABSENT) for glyph in found)
    return tuple((glyph.letter, glyph.style) for glyph in found)


def _lines(config: Config, groups: list[tuple[str, list[_Column]]]) -> Iterator[Text]:
    numbers, *rows = (Text(title.ljust(_MARGIN), style="dim") for title in ("layer", *_rows(config)))
    for label, columns in groups:
        wide = max(len(columns), len(label))
        numbers.append(label.ljust(wide) + " ")
        for row, cells in zip(rows, zip(*columns, strict=True), strict=True):
            for letter, style in cells:
                row.append(letter, style=style)
            row.append(" " * (wide - len(columns) + 1))
    for row in (numbers, *rows):
        row.rstrip()
        yield row


def legend(config: Config, *, layers: tuple[int, ...] | None) -> Iterator[str]:
    """The meaning of each letter, and its number of layers."""
    columns = [_column(config, layer, None) for layer in range(config.num_hidden_layers)]
    for place, glyphs in enumerate(_rows(config).values()):
        letters = [column[place][0] for column in columns]
        for glyph in glyphs:
            if number := letters.count(glyph.letter):
                yield f"{glyph.letter} {number:>3}  {glyph.words(config)}"
    if config.num_mtp_stages:
        yield f"{_stage(config)[0]} {config.num_mtp_stages:>3}  {_drafts(config)}"
    if layers is not None:
        yield f"  {config.num_hidden_layers - len(layers):>3}  in lower case are not here"

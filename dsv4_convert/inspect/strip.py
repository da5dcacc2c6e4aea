"""The layer schedule as a strip: one letter for each layer, a second row for routing. Readable without colour."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.config import as_v4
from dsv4_convert.spec.v4.kinds import AttentionKind

_ATTENTION = {
    AttentionKind.SLIDING: ("S", "blue"),
    AttentionKind.CSA: ("C", "green"),
    AttentionKind.HCA: ("H", "magenta"),
}
_MTP, _DSPARK = ("M", "cyan"), ("D", "cyan")
_HASH, _LEARNED = ("#", "yellow"), ("-", "")
#: Style of an absent layer.
_ABSENT = "dim"
_TITLES = ("layer", "attention", "routing")
_MARGIN = max(map(len, _TITLES)) + 2


def strip(config: Config, *, layers: tuple[int, ...] | None, width: int) -> Iterator[Text]:
    """The lines of the strip, wrapped at ``width`` columns, ten layers to a group; stages come after a bar.

    ``layers`` are the present layers, None for all; the absent ones are in lower case.
    """
    cells = [(*_cell(config, layer, layers), layer % 10 == 0, str(layer)) for layer in range(config.num_hidden_layers)]
    cells += [(_stage(config), _LEARNED, stage == 0, "mtp") for stage in range(config.num_mtp_stages)]
    groups: list[list[tuple[tuple[str, str], tuple[str, str], str]]] = []
    for attention, routing, first, label in cells:
        if first:
            groups.append([])
        groups[-1].append((attention, routing, label))
    room = max(width - _MARGIN, 11)
    line: list[list[tuple[tuple[str, str], tuple[str, str], str]]] = []
    used = 0
    for group in groups:
        if line and used + len(group) + 1 > room:
            yield from _lines(line)
            line, used = [], 0
        line.append(group)
        used += max(len(group), len(group[0][2])) + 1
    yield from _lines(line)


def _stage(config: Config) -> tuple[str, str]:
    return _MTP if config.dspark is None else _DSPARK


def _drafts(config: Config) -> str:
    if config.dspark is None:
        return "of multi-token prediction"
    return f"of DSpark, which drafts {config.dspark.block_size} tokens at a time"


def _cell(config: Config, layer: int, layers: tuple[int, ...] | None) -> tuple[tuple[str, str], tuple[str, str]]:
    letter, colour = _ATTENTION[as_v4(config).attention[layer]]
    routing = _HASH if config.hashed(layer) else _LEARNED
    if layers is not None and layer not in layers:
        return (letter.lower(), _ABSENT), (routing[0], _ABSENT)
    return (letter, colour), routing


def _lines(groups: list[list[tuple[tuple[str, str], tuple[str, str], str]]]) -> Iterator[Text]:
    rows = [Text(title.ljust(_MARGIN), style="dim") for title in _TITLES]
    for group in groups:
        label = group[0][2]
        wide = max(len(group), len(label))
        rows[0].append(label.ljust(wide) + " ")
        for row, at in ((rows[1], 0), (rows[2], 1)):
            for cell in group:
                glyph, style = cell[0] if at == 0 else cell[1]
                row.append(glyph, style=style)
            row.append(" " * (wide - len(group) + 1))
    for row in rows:
        row.rstrip()
        yield row


def legend(config: Config, *, layers: tuple[int, ...] | None) -> Iterator[str]:
    """The meaning of each letter, and its number of layers."""
    config = as_v4(config)
    number = {kind: config.attention.count(kind) for kind in AttentionKind}
    words = {
        AttentionKind.SLIDING: f"sliding window of {config.sliding_window} tokens alone",
        AttentionKind.CSA: f"and CSA: an entry for {config.csa_ratio} tokens, {config.index_topk:,} chosen",
        AttentionKind.HCA: f"and HCA: an entry for {config.hca_ratio} tokens, all of them",
    }
    hashed = sum(config.hash_routed)
    rows = [(_ATTENTION[kind][0], number[kind], text) for kind, text in words.items()]
    rows += [
        (_HASH[0], hashed, "experts by the token's id (hash)"),
        (_LEARNED[0], config.num_hidden_layers - hashed, "experts by learned scores"),
        (_stage(config)[0], config.num_mtp_stages, _drafts(config)),
    ]
    yield from (f"{glyph} {count:>3}  {text}" for glyph, count, text in rows if count)
    if layers is not None:
        yield f"  {config.num_hidden_layers - len(layers):>3}  in lower case are not here"

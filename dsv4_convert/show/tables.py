"""Tables that fit the window: narrow ones lose their less important columns instead of the ends of their words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_ENDLESS = 100_000


def fitted(table: Table, console: Console, *, dispensable: Sequence[str]) -> Table:
    """Leave out columns by their headers, the first of ``dispensable`` first, until the table fits the console.

    If it does not fit even so, its cells are folded; a word is cut, not dropped.
    """
    left = list(dispensable)
    while _width(table, console) > console.width and left:
        header = left.pop(0)
        table.columns[:] = [column for column in table.columns if column.header != header]
        for index, column in enumerate(table.columns):
            column._index = index  # rich takes the last one, which has no padding, by its number
    if _width(table, console) > console.width:
        for column in table.columns:
            column.no_wrap, column.overflow = False, "fold"
    return table


def _width(table: Table, console: Console) -> int:
    """Columns of a window that the table would take."""
    return console.measure(table, options=console.options.update(max_width=_ENDLESS)).maximum

"""A diagnosis for people."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsv4_convert.doctor.finding import Diagnosis, State
from dsv4_convert.show.tables import fitted

_STYLES = {State.OK: "green", State.WARN: "yellow", State.MISSING: "red"}

#: Columns from which on there is room for what each check is for.
_ROOMY = 70


def render(diagnosis: Diagnosis, console: Console) -> None:
    """A table of all checks, then what to do."""
    table = Table("check", "", "found", "for", box=None, pad_edge=False)
    for found in diagnosis.findings:
        table.add_row(found.check, Text(found.state, style=_STYLES[found.state]), found.found, found.commands)
    if console.width < _ROOMY:
        fitted(table, console, dispensable=("for",))
    table.columns[2].overflow = "fold"
    console.print(table, highlight=False)
    for found in diagnosis.findings:
        if found.way_out is not None:
            text = f"{found.check}: {found.way_out}"
            for line in textwrap.wrap(text, max(console.width, 30), subsequent_indent="  ", break_on_hyphens=False):
                console.print(line, highlight=False, soft_wrap=True)
    style, word = ("green", "work") if diagnosis.healthy else ("red", "do not work")
    console.print(Text.assemble("the core commands ", (word, f"bold {style}")), highlight=False)

"""``dsv4 report``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from dsv4_convert.cli.common import Json, console, reported, write_json
from dsv4_convert.cli.destination import check_destination, write_text
from dsv4_convert.cli.ending import wrote
from dsv4_convert.errors import CheckFailed
from dsv4_convert.show.units import number_of


@reported
def report(
    before: Annotated[Path, typer.Argument(help="Report that `dsv4 parity --json FILE` wrote.")],
    after: Annotated[Path, typer.Argument(help="Report of a later run.")],
    page: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Write both runs side by side as one HTML page."),
    ] = None,
    json: Json = None,
) -> None:
    """Compare two parity runs tap by tap: what fails now, and what became worse or better.

    An error has changed if it is more than twice as large, or less than half. Exits 1 if a tap fails that did not, or
    is no longer compared.

    Example: dsv4 report yesterday.json today.json --report changes.html
    """
    from dsv4_convert.parity.report.changes import Became, ReportedRun, changes, table
    from dsv4_convert.parity.report.data import plain

    check_destination("--report", page)
    runs = ReportedRun.read(before), ReportedRun.read(after)
    found = changes(*runs)
    counts = Counter(change.kind for change in found)
    write_json(
        {"schema_version": 1, "counts": {kind.value: counts[kind] for kind in Became}, "taps": plain(found)}, json
    )
    window = console(err=json == "-")
    if counts[Became.SAME] < len(found):
        window.print(table(found))
    said = ", ".join(f"{kind}: {number_of(counts[kind], 'tap')}" for kind in Became if counts[kind])
    window.print(said, highlight=False)
    if page is not None:
        from dsv4_convert.parity.report.html.beside import page as beside

        write_text("--report", page, beside(*runs, found))
        wrote("report", page)
    if counts[Became.FAILS_NOW] or counts[Became.GONE]:
        raise CheckFailed(f"{after}: taps fail, or are missing, that passed in {before}")

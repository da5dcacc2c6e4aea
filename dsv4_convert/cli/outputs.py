"""The outputs of ``dsv4 parity``: the terminal, a page for people, and files for programs."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_convert.cli.common import console, write_json
from dsv4_convert.cli.destination import append_text, check_destination, write_bytes, write_text
from dsv4_convert.cli.ending import seconds, wrote

if TYPE_CHECKING:
    from dsv4_convert.parity.report.data import ParityReport

Junit = Annotated[
    Path | None,
    typer.Option("--junit", metavar="FILE", help="Write JUnit XML to FILE: a test case for each layer and tap."),
]
Github = Annotated[
    bool,
    typer.Option(
        "--github",
        help="For GitHub Actions: annotations on stdout (on stderr with --json -; the runner reads both), and a "
        "summary in the file that $GITHUB_STEP_SUMMARY names.",
    ),
]
Csv = Annotated[
    Path | None,
    typer.Option("--csv", metavar="FILE", help="Write every number of every tap to FILE, a row for each tap."),
]
Parquet = Annotated[
    Path | None,
    typer.Option(
        "--parquet", metavar="FILE", help="The same table as Parquet. Needs: pip install 'dsv4-convert\\[frame]'."
    ),
]
Page = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Write the report as one HTML page: figures, tables and every number, readable without a network.",
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """What is wanted, as the options say it."""

    json: str | None
    junit: Path | None
    github: bool
    page: Path | None
    csv: Path | None = None
    parquet: Path | None = None

    def check(self) -> None:
        """Raises :class:`UsageError` for a file that could not be written, before the work is done."""
        check_destination("--junit", self.junit)
        check_destination("--report", self.page)
        check_destination("--csv", self.csv)
        check_destination("--parquet", self.parquet)
        if self.parquet is not None:
            from dsv4_convert.parity.report.frame import check_parquet

            check_parquet()

    def write(self, report: ParityReport, *, verbosity: int, explained: bool, decode: Callable[[int], str]) -> None:
        """Write a report wherever it is wanted. Raises :class:`ResourceError` for a file that cannot be written."""
        from dsv4_convert.parity.report.tables import render
        from dsv4_convert.parity.report.words import verdict

        write_json(report.to_json(verdict(report)), self.json)
        if self.junit is not None:
            from dsv4_convert.parity.report.junit import junit

            write_text("--junit", self.junit, junit(report))
            wrote("junit", self.junit)
        if self.page is not None:
            from dsv4_convert.parity.report.html.page import RunInfo, page

            write_text("--report", self.page, page(report, RunInfo.now(seconds()), decode))
            wrote("report", self.page)
        if self.csv is not None:
            from dsv4_convert.parity.report.frame import to_csv

            write_text("--csv", self.csv, to_csv(report))
            wrote("csv", self.csv)
        if self.parquet is not None:
            from dsv4_convert.parity.report.frame import to_parquet

            write_bytes("--parquet", self.parquet, to_parquet(report))
            wrote("parquet", self.parquet)
        render(report, console(err=self.json == "-"), verbosity=verbosity, explained=explained, decode=decode)
        if self.github:
            self._annotate(report)

    def _annotate(self, report: ParityReport) -> None:
        from dsv4_convert.parity.report.github import commands, summary

        for line in commands(report):
            print(line, file=sys.stderr if self.json == "-" else sys.stdout)
        if target := os.environ.get("GITHUB_STEP_SUMMARY"):
            append_text("$GITHUB_STEP_SUMMARY", target, summary(report))

"""A compile report as text and tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsv4_convert.aot.report import CompileReport, Memory
from dsv4_convert.model.mesh import describe_mesh
from dsv4_convert.show.tables import fitted

_GIB = 2**30


def render(report: CompileReport, console: Console) -> None:
    """Print the program, the memory of one device, and the collectives."""
    what = f"the next token of {report.batch} prompts, " if report.decode else f"{report.batch} prompts, "
    room = f"{report.tokens:,} tokens each" + (" in the cache" if report.decode else "")
    console.print(f"{report.layers} layers, {report.parameters / 1e9:.1f} B parameters, {report.weights / 1e9:.1f} GB")
    where = report.slice
    console.print(f"{where.name} ({where.layout}): {where.count} devices as {describe_mesh(report.mesh)}; {what}{room}")
    console.print(f"compiled in {report.seconds:.0f} s")
    if report.memory is not None:
        console.print(fitted(_memory(report.memory, where.chip.hbm), console, dispensable=("of its memory",)))
    each = report.operations / where.count
    console.print(f"{report.operations / 1e12:,.2f} TFLOP in all, {each / 1e12:,.3f} for each device")
    if report.collectives:
        console.print(fitted(_collectives(report), console, dispensable=("times",)))
    if report.fits:
        console.print(Text.assemble(("fits", "bold green"), f" {where.name}"))
    else:
        why = f": {report.refused}" if report.refused else ""
        console.print(Text.assemble(("does not fit", "bold red"), f" {where.name}{why}"))


def _memory(memory: Memory, hbm: int) -> Table:
    table = Table("one device", "GiB", "of its memory", box=None, title_justify="left")
    rows = {
        "arguments (weights, cache)": memory.arguments,
        "outputs": memory.outputs - memory.aliased,
        "temporaries": memory.temporaries,
        "program": memory.code,
        "all": memory.total,
        "there are": hbm,
    }
    for name, nbytes in rows.items():
        table.add_row(name, f"{nbytes / _GIB:,.2f}", f"{nbytes / hbm:.1%}")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _collectives(report: CompileReport) -> Table:
    table = Table("collective", "times", "GB to a device", box=None)
    for found in report.collectives:
        table.add_row(found.kind, f"{found.times:,}", f"{found.bytes / 1e9:,.2f}")
    for column in table.columns[1:]:
        column.justify = "right"
    return table

"""An inspection for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsv4_convert.inspection.parts import PartRow, Totals
from dsv4_convert.inspection.report import Inspection
from dsv4_convert.inspection.strip import legend, strip
from dsv4_convert.show.tables import fitted
from dsv4_convert.show.units import count, size
from dsv4_convert.spec.config import Config

_MARGIN = 11
#: Findings that are shown; ``--json`` has all of them.
_SHOWN = 12


def render(found: Inspection, console: Console) -> None:
    """Its kind, its architecture in one picture, its contents and its oddities."""

    def say(line: str | Text) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    def fact(name: str, text: str) -> None:
        for line in _filled(f"{name:<{_MARGIN}}{text}", console.width):
            say(line)

    say(Text.assemble((f"{found.place}: ", ""), (f"{found.what}", "bold")))
    fact("known by", found.known_by)
    for name, text in found.facts.items():
        fact(name, text)
    if found.config is not None:
        say("")
        for row in strip(found.config, layers=found.layers, width=console.width):
            say(row)
        for text in legend(found.config, layers=found.layers):
            for line in _filled(text, console.width, indent=7):
                say(Text(line, style="dim"))
        say("")
        for name, text in _numbers(found.config):
            fact(name, text)
        totals = found.totals
        if totals is not None:
            fact("parameters", _totals(totals))
    if found.rows:
        say("")
        console.print(
            fitted(_table(found.rows), console, dispensable=("share", "tensors", "parameters")), highlight=False
        )
    if found.arrays:
        say("")
        for name, nbytes in found.arrays.items():
            say(f"{name:<18} {size(nbytes):>9}")
    say("")
    if not found.odd:
        say(Text("nothing odd", style="green"))
    for problem in found.odd[:_SHOWN]:
        first, *more = problem.splitlines()
        for line in _filled(f"odd: {first}", console.width, indent=5):
            say(Text(line, style="yellow"))
        for part in more:
            say(part)
    if len(found.odd) > _SHOWN:
        say(f"… and {len(found.odd) - _SHOWN:,} more, all of them with --json")


def _filled(text: str, width: int, *, indent: int = _MARGIN) -> list[str]:
    return textwrap.wrap(
        text, max(width, 30), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def _numbers(config: Config) -> Iterator[tuple[str, str]]:
    """The key numbers of an architecture."""
    yield "width", f"{config.hidden_size:,} in {config.hc_mult} streams, vocabulary {config.vocab_size:,}"
    yield (
        "heads",
        (
            f"{config.num_attention_heads} of {config.head_dim}, of which {config.qk_rope_head_dim} rotated; "
            f"query rank {config.q_lora_rank:,}, output rank {config.o_lora_rank:,} in {config.o_groups} groups"
        ),
    )
    yield "indexer", f"{config.index_n_heads} heads of {config.index_head_dim}, top {config.index_topk:,}"
    yield from config.own_numbers()
    declared = f", declared {config.expert_dtype}" if config.expert_dtype is not None else ""
    yield (
        "experts",
        (
            f"{config.num_experts_per_tok} of {config.n_routed_experts} and a shared one, "
            f"each {config.moe_intermediate_size:,} wide{declared}"
        ),
    )
    yield "positions", f"{config.max_position_embeddings:,}"


def _totals(totals: Totals) -> str:
    beside = {"n-gram tables": totals.tables, "mtp": totals.mtp, "vision": totals.vision}
    more = "".join(f"; {name} {count(number)} more" for name, number in beside.items() if number)
    return f"{count(totals.total)} in all, {count(totals.active)} active for a token{more}"


def _table(rows: Sequence[PartRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("stored")
    table.add_column("dtype")
    for column in ("tensors", "parameters", "bytes", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    nbytes = sum(row.nbytes for row in rows)
    before = None
    for row in rows:
        part = "" if row.part is before else row.part.value
        before = row.part
        number = count(row.parameters) if row.parameters else ""
        table.add_row(part, row.dtype, f"{row.tensors:,}", number, size(row.nbytes), f"{_share(row.nbytes, nbytes)}")
    tensors, parameters = (sum(getattr(row, name) for row in rows) for name in ("tensors", "parameters"))
    table.add_row("all", "", f"{tensors:,}", count(parameters), size(nbytes), "", style="bold")
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""

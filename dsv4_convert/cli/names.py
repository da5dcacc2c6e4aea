"""``dsv4 names``."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_convert.cli.common import Json, reported, write_json

if TYPE_CHECKING:
    from dsv4_convert.names import Explanation, Rule


@reported
def names(
    name: Annotated[
        str | None, typer.Argument(help="A tensor name in any spelling, or a parameter path; none for the whole table.")
    ] = None,
    json: Json = None,
) -> None:
    """Print the table of names, or explain one name in every spelling.

    Example: dsv4 names layers.12.attn.wq_a.weight
    """
    from dsv4_convert import names as table

    if name is None:
        write_json([_row(rule) for rule in (*table.RULES, *table.STAGE_RULES)], json)
        if json != "-":
            _print_table(table)
        return
    reason = table.drop_reason(name)
    if reason is not None:
        write_json([{"name": name, "dropped": reason}], json)
        if json != "-":
            typer.echo(f"{name}: left out on purpose: {reason}")
        return
    found = table.explain(name)
    write_json([_explained(item) for item in found], json)
    if json != "-":
        for item in found:
            _print_one(item)


def _print_one(item: Explanation) -> None:
    rule = item.rule
    typer.secho(item.path, bold=True)
    for dialect, names in item.spellings.items():
        typer.echo(f"  {dialect.value:<13} {'  '.join(names)}")
    typer.echo(f"  {'shape':<13} [{rule.shape}] as stored, transform: {rule.transform.value}")
    where = f", in {rule.when.value} layers" if rule.per_layer else ", in every mtp stage" if rule.per_stage else ""
    typer.echo(f"  {'kind':<13} {rule.kind.value}{where}")


def _explained(item: Explanation) -> dict[str, object]:
    spellings = {dialect.value: list(names) for dialect, names in item.spellings.items()}
    return _row(item.rule) | {"path": item.path} | spellings


def _row(rule: Rule) -> dict[str, object]:
    return {
        "path": rule.path,
        "published": rule.published,
        "module": rule.module,
        "shape": rule.shape.split(),
        "kind": rule.kind.value,
        "transform": rule.transform.value,
        "layers": rule.when.value if rule.per_layer else None,
    }


def _print_table(names_table: ModuleType) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    model = [rule for rule in names_table.RULES if not rule.per_layer]
    layer = [rule for rule in names_table.RULES if rule.per_layer]
    tables = (
        ("model level", "", model),
        ("in every layer, below layers.N.", "layers.{}.", layer),
        ("in every mtp stage, below mtp.N.", "mtp.{}.", names_table.STAGE_RULES),
    )
    for title, prefix, rules in tables:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("published tensor", "shape", "kind", "transform", "layers"):
            table.add_column(column, no_wrap=True)
        for rule in rules:
            name = rule.published.removeprefix(prefix).replace("{}", "E")
            where = rule.when.value if rule.per_layer else ""
            table.add_row(name, rule.shape, rule.kind.value, rule.transform.value, where)
        console.print(table)
    console.print("The parameter has the tensor's name without .weight; experts are stacked to [E, ...].")
    for prefix, reason in names_table.DROPS.items():
        console.print(f"Left out: {prefix.replace('{}', 'N')}.*: {reason}.")

"""``dsv4 names``."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_convert.cli.common import Json, complete_names, console, echo, reported, write_json

if TYPE_CHECKING:
    from dsv4_convert.spec.names import Explanation, Rule


@reported
def names(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A tensor name in any spelling, or a parameter path; none for the whole table.",
            autocompletion=complete_names,
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Print the table of names, or explain one name in every spelling.

    Example: dsv4 names layers.12.attn.wq_a.weight
    """
    from dsv4_convert.spec import names as table

    if name is None:
        _write([_row(rule) for rule in (*table.RULES, *table.STAGE_RULES)], json)
        if json != "-":
            _print_table(table)
        return
    found = table.explain(name)
    _write([_explained(item) for item in found], json)
    if json != "-":
        for item in found:
            _print_one(item)


def _write(rows: list[dict[str, object]], target: str | None) -> None:
    write_json({"schema_version": 1, "names": rows}, target)


def _print_one(item: Explanation) -> None:
    rule = item.rule
    console().print(item.path, style="bold", highlight=False, soft_wrap=True)
    for dialect, names in item.spellings.items():
        for number, name in enumerate(names):
            echo(f"  {dialect.value if not number else '':<13} {name}")
    echo(f"  {'shape':<13} [{rule.shape}] as stored, transform: {rule.transform.value}")
    where = "layers" if rule.per_layer else "stages" if rule.per_stage else None
    echo(f"  {'kind':<13} {rule.kind.value}" + (f", in {rule.when.value} {where}" if where else ""))


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
        "stages": rule.when.value if rule.per_stage else None,
    }


def _print_table(names_table: ModuleType) -> None:
    from rich.table import Table

    from dsv4_convert.show.tables import fitted

    screen = console()
    model = [rule for rule in names_table.RULES if not rule.per_layer]
    layer = [rule for rule in names_table.RULES if rule.per_layer]
    tables = (
        ("model level", "", model),
        ("in every layer, below layers.N.", "layers.{}.", layer),
        ("in the draft stages, below mtp.N.", "mtp.{}.", names_table.STAGE_RULES),
    )
    for title, prefix, rules in tables:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("published tensor", "shape", "kind", "transform", "only in"):
            table.add_column(column, no_wrap=True)
        for rule in rules:
            name = rule.published.removeprefix(prefix).replace("{}", "E")
            where = rule.when.value if prefix else ""
            table.add_row(name, rule.shape, rule.kind.value, rule.transform.value, where)
        screen.print(fitted(table, screen, dispensable=("transform", "kind", "only in")))
    screen.print("The parameter has the tensor's name without .weight; experts are stacked to [E, ...].")

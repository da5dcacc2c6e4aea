"""``dsv4 names``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_convert.cli.common import Json, complete_names, console, echo, one_of, reported, write_json
from dsv4_convert.errors import UsageError

if TYPE_CHECKING:
    from dsv4_convert.spec.names import Explanation, NameTable, Rule


@reported
def names(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A tensor name in any spelling, or a parameter path; none for the whole table.",
            autocompletion=complete_names,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(**one_of("v4", "v4.1"), help="Whose names. Default: V4's table, and a name of either."),
    ] = None,
    json: Json = None,
) -> None:
    """Print the table of names, or explain one name in every spelling.

    Example: dsv4 names layers.12.attn.wq_a.weight
    """
    tables = _tables(model)
    if name is None:
        _write([_row(rule) for rule in tables[0].rules], json)
        if json != "-":
            _print_table(tables[0])
        return
    table = next((each for each in tables if each.find(name)), tables[0])
    found = table.explain(name)
    _write([_explained(item) for item in found], json)
    if json != "-":
        for item in found:
            _print_one(item)


def _tables(model: str | None) -> tuple[NameTable, ...]:
    """The table of a model, or those of all. Raises :class:`UsageError` for a model that nobody has."""
    from dsv4_convert.spec.architectures import ARCHITECTURES

    known = {kind.title.removeprefix("DeepSeek-").lower(): kind.names for kind in ARCHITECTURES}
    if model is None:
        return tuple(known.values())
    if model not in known:
        raise UsageError(f"--model {model}: expected {' or '.join(known)}")
    return (known[model],)


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
    echo(f"  {'kind':<13} {rule.kind.value}" + (f", in {rule.when.label} {where}" if where else ""))


def _explained(item: Explanation) -> dict[str, object]:
    spellings = {dialect.value: list(names) for dialect, names in item.spellings.items()}
    return _row(item.rule) | {"path": item.path} | spellings


def _row(rule: Rule) -> dict[str, object]:
    from dsv4_convert.spec.names import Dialect

    return {
        "path": rule.path,
        "published": rule.published,
        "module": rule.template(Dialect.MODULE),
        "shape": rule.shape.split(),
        "kind": rule.kind.value,
        "transform": rule.transform.value,
        "layers": rule.when.label if rule.per_layer else None,
        "stages": rule.when.label if rule.per_stage else None,
    }


def _print_table(names: NameTable) -> None:
    from rich.table import Table

    from dsv4_convert.show.tables import fitted
    from dsv4_convert.spec.names import Section

    screen = console()
    parts = (
        ("model level", "", Section.MODEL),
        ("in every layer, below layers.N.", "layers.{}.", Section.LAYERS),
        ("in the draft stages, below mtp.N.", "mtp.{}.", Section.STAGES),
        ("in the vision encoder", "", Section.VISION),
    )
    for title, prefix, section in parts:
        rules = names.of(section)
        if not rules:
            continue
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("published tensor", "shape", "kind", "transform", "only in"):
            table.add_column(column, no_wrap=True)
        for rule in rules:
            name = rule.published.removeprefix(prefix).replace("{}", "N" if section is Section.VISION else "E")
            where = rule.when.label if prefix else ""
            table.add_row(name, rule.shape, rule.kind.value, rule.transform.value, where)
        screen.print(fitted(table, screen, dispensable=("transform", "kind", "only in")))
    screen.print("The parameter has the tensor's name without .weight; experts are stacked to [E, ...].")

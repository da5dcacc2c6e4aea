"""``dsv4 diff``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_convert.cli.common import LAYERS_HELP, Json, Verbose, console, parse_layers, reported, write_json
from dsv4_convert.cli.status import status
from dsv4_convert.errors import CheckFailed
from dsv4_convert.show.units import few_ranges, number_of, ranges

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dsv4_convert.weights.difference import ChangedParameter, CheckpointDifference

_EITHER = "a folder, ORG/NAME or ORG/NAME@REVISION on the Hub, gs://bucket/path, or a checkpoint that dsv4 converted."
#: Rows and names that are printed without --verbose.
_FEW = 20


@reported
def diff(
    first: Annotated[str, typer.Argument(help=f"Checkpoint: {_EITHER}")],
    second: Annotated[str, typer.Argument(help="Another one, of either kind.")],
    layer: Annotated[str | None, typer.Option("--layers", "--layer", help=LAYERS_HELP)] = None,
    verbose: Verbose = 0,
    json: Json = None,
) -> None:
    """Compare two checkpoints parameter by parameter: what only one of them has, and what differs by how much.

    Each may be published or converted, so a release compares with its conversion, a fine-tuned copy with its base, or
    one revision with another. Parameters with equal bytes are told from those that are stored otherwise and decode to
    equal values. For the others it prints the share of changed values, the largest absolute difference, and the rms of
    the difference over the rms of FIRST. Exits 1 if a value differs, or only one of the two has it.

    Example: dsv4 diff ./DeepSeek-V4-Flash ./flash-orbax --layers 0-3

    Example: dsv4 diff deepseek-ai/DeepSeek-V4-Flash ./finetuned --json -
    """
    from dsv4_convert.weights.difference import compare_checkpoints

    with status("comparing") as say:
        say("opening")
        found = compare_checkpoints(first, second, layers=parse_layers(layer), progress=say.step)
    write_json(found.to_json(), json)
    _print(found, console(err=json == "-"), everything=verbose > 0)
    if not found.equal:
        raise CheckFailed(f"{first} and {second} differ")


def _print(found: CheckpointDifference, window: Console, *, everything: bool) -> None:
    limit = None if everything else _FEW

    def line(text: str) -> None:
        window.print(text, highlight=False, soft_wrap=True)

    for title, side in (("first ", found.first), ("second", found.second)):
        kind = side.kind if side.kind == side.storage else f"{side.kind} to {side.storage}"
        line(f"{title}  {side.path}: {kind}, {side.dialect} names")
    for problem in found.config:
        line(f"config  {problem}")
    for title, paths in (("only in the first", found.gone), ("only in the second", found.added)):
        if paths:
            line(f"{title}: {number_of(len(paths), 'parameter')}, {_where(paths)}")
            line("  " + ", ".join(paths[:limit]) + (", …" if limit and len(paths) > limit else ""))
    if found.changed:
        window.print(_table(found.changed[:limit]))
        if limit and len(found.changed) > limit:
            line(f"and {number_of(len(found.changed) - limit, 'parameter')} more; -v prints all")
    for (one, other), count in Counter(each.stored for each in found.stored_otherwise).items():
        how = f"stored as {one} and {other}" if one != other else f"stored as {one} with other codes or scales"
        line(f"equal values, {how}: {number_of(count, 'parameter')}")
    line(
        f"{number_of(found.equal_bytes, 'parameter')} equal byte by byte, {len(found.stored_otherwise):,} equal in "
        f"value and stored otherwise, {len(found.changed):,} changed, "
        f"{len(found.gone) + len(found.added):,} in one only"
    )


def _where(paths: Iterable[str]) -> str:
    """The layers that parameters belong to, in words."""
    from dsv4_convert.spec.names import layer_of

    layers = {layer_of(path) for path in paths}
    of_layers = [layer for layer in layers if layer is not None]
    parts = [f"of layers {ranges(of_layers)}"] if of_layers else []
    return " and ".join([*parts, *(["outside of the layers"] if None in layers else [])])


def _table(changed: Iterable[ChangedParameter]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("changed")
    for title in ("values", "max abs", "rel rms"):
        table.add_column(title, justify="right")
    table.add_column("stored")
    for one in changed:
        if one.shapes[0] != one.shapes[1]:
            table.add_row(one.path, "–", "–", "–", f"{list(one.shapes[0])}, then {list(one.shapes[1])}")
            continue
        some = one.experts is not None and len(one.experts) < one.shapes[0][0]
        experts = f" experts {few_ranges(one.experts or ())}" if some else ""
        stored = one.stored[0] if one.stored[0] == one.stored[1] else " → ".join(one.stored)
        share = f"{one.share:.1%}" if one.share >= 0.001 else f"{one.changed:,} of {one.elements:,}"
        table.add_row(one.path + experts, share, f"{one.max_abs:.2g}", f"{one.relative_rms:.2g}", stored)
    return table

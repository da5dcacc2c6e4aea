"""``dsv4 golden ...``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_convert.cli.common import (
    LAYERS_HELP,
    REVISION_HELP,
    SOURCES,
    Json,
    console,
    echo,
    one_of,
    parse_choice,
    parse_layers,
    reported,
    resumable,
    write_json,
)
from dsv4_convert.cli.status import byte_progress, note_fetched, status
from dsv4_convert.show.units import number_of, ranges, size

if TYPE_CHECKING:
    from rich.table import Table

    from dsv4_convert.golden.archive import Golden as Opened
    from dsv4_convert.golden.plan import RecordingPlan
    from dsv4_convert.golden.prompt_coverage import LayerCoverage
    from dsv4_convert.spec.tap import Tap


Golden = Annotated[str, typer.Argument(help="Golden: a folder, or a URL such as gs://… or https://….")]
_EXACT_HELP = "Tokens that a compact golden keeps exactly, such as 0,128,-1 (-1 is the last)."


@resumable
def record(
    source: Annotated[str, typer.Argument(help=f"Published checkpoint: {SOURCES}")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    tokens: Annotated[
        str | None, typer.Option(help="Token ids: 5,17,3 or a file (.json, .npy, or text with one prompt per line).")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text, encoded with the checkpoint's own tokenizer.")] = None,
    random: Annotated[
        str | None, typer.Option(metavar="[BATCHx]LENGTH", help="Random prompts, such as 300 or 3x129.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random prompts.")] = 0,
    first_position: Annotated[
        int, typer.Option(metavar="POSITION", help="Rotary position of the first token, without the tokens before it.")
    ] = 0,
    decode: Annotated[
        int,
        typer.Option(
            metavar="N", help="Decode the last N tokens of the prompt one by one, from the reference's cache."
        ),
    ] = 0,
    greedy: Annotated[
        bool,
        typer.Option(
            "--greedy", help="With --decode: N more tokens after the prompt, chosen by the reference, one pass each."
        ),
    ] = False,
    layers: Annotated[
        str | None, typer.Option("--layers", "--layer", help=LAYERS_HELP + " Only these are kept.")
    ] = None,
    stages: Annotated[
        bool,
        typer.Option("--stages", help="Keep the draft stages too, of mtp or DSpark, which run after all layers."),
    ] = False,
    reference: Annotated[
        str,
        typer.Option(
            **one_of("transformers", "release"), help="The implementation that runs. release: see --release-code."
        ),
    ] = "transformers",
    release_code: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Your copy of the `inference` folder of a DeepSeek-V4 or V4.1 repository; its model.py is executed, "
            "on the CPU.",
        ),
    ] = None,
    numerics: Annotated[
        str | None,
        typer.Option(
            **one_of("plain", "release"),
            help="Arithmetic of --release-code. release, the default: as published. plain: the same code in float32, "
            "without simulated quantisation.",
        ),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(
            help="Dtypes to measure the noise floor of, for parity in these dtypes. Each runs every layer twice more. "
            "Default: float32,bfloat16, or bfloat16 in release numerics."
        ),
    ] = None,
    compact: Annotated[
        bool,
        typer.Option("--compact", help="Keep sketches and a few exact tokens, at most 1% of the size."),
    ] = False,
    exact: Annotated[str, typer.Option("--exact", metavar="POSITIONS", help=_EXACT_HELP)] = "-1",
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    json: Json = None,
) -> None:
    """Run transformers' DeepSeek-V4 in float32 and keep every intermediate activation, and its noise floor.

    --reference release --release-code DIR runs DeepSeek's own inference code instead, of V4 or V4.1. It quantises
    activations, and parity then runs the model with the same numerics. With --numerics plain it computes in float32.

    One layer, and one of its routed experts, is in memory at a time. Needs: pip install 'dsv4-convert\\[reference]'.

    Example: dsv4 golden record ./DeepSeek-V4-Flash --out ./flash-golden --text "The sea" --layers 0-3
    """
    from dsv4_convert.checkpoint.locate import open_source
    from dsv4_convert.errors import UsageError
    from dsv4_convert.golden.compact import Compact
    from dsv4_convert.golden.recorder import RecordingOptions, layers_that_run, record_opened
    from dsv4_convert.golden.tokens import prompt_tokens

    if (parse_choice("--reference", reference, ("transformers", "release")) == "release") != (release_code is not None):
        raise UsageError("--reference release and --release-code DIR belong together: the folder holds the reference")
    chosen = parse_layers(layers)
    with status("recording") as say, ExitStack() as held:
        say("reading headers")
        opened = open_source(source, revision=revision, layers=layers_that_run(chosen, all_of_them=stages or greedy))
        checkpoint = held.enter_context(opened)
        vocabulary = checkpoint.architecture().vocab_size
        note_fetched(checkpoint, say)
        checkpoint.fetch_small_files()
        ids = prompt_tokens(checkpoint.root, vocabulary, tokens=tokens, text=text, random=random, seed=seed)
        done = record_opened(
            checkpoint,
            out,
            RecordingOptions(
                tokens=ids,
                text=None if text is None else [text],
                layers=chosen,
                stages=stages,
                first_position=first_position,
                decode=decode,
                greedy=greedy,
                noise=None if noise is None else [dtype.strip() for dtype in noise.split(",") if dtype.strip()],
                release_code=release_code,
                numerics=None if numerics is None else parse_choice("--numerics", numerics, ("plain", "release")),
                compact=Compact.of(_positions(exact), ids.shape[-1]) if compact else None,
            ),
            announce=lambda planned: say.print(*_plan(planned)),
            progress=say.step,
        )
    echo(
        f"{out}: {len(done.names)} taps of {len(done.layers)} layers, tokens {list(done.tokens.shape)}", err=json == "-"
    )
    write_json({"schema_version": 1, "path": str(out), "layers": list(done.layers), "taps": list(done.names)}, json)


def _plan(planned: RecordingPlan) -> Iterator[str]:
    """The plan in two lines."""
    share = planned.bytes_written / planned.bytes_whole
    of = f" ({share:.2%} of the whole)" if share < 1 else ""
    yield f"reads   {size(planned.bytes_read)}"
    yield f"writes  {size(planned.bytes_written)}{of}, with about {size(planned.memory)} of memory"


def _positions(text: str) -> list[int]:
    """``"0,17,-1"`` to numbers; nothing to none. Raises :class:`UsageError`."""
    from dsv4_convert.errors import UsageError

    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--exact {text}: expected positions of tokens such as 0,17,-1, or nothing") from None


@resumable
def compact(
    golden: Golden,
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    exact: Annotated[str, typer.Option("--exact", metavar="POSITIONS", help=_EXACT_HELP)] = "-1",
    json: Json = None,
) -> None:
    """Make a compact golden of a whole one: small enough for a repository, at most 1% of the size at full width.

    It keeps every choice, a norm and a random projection of each token of each tap, and the tokens of --exact whole.
    parity compares it from the tokens (--mode cumulative), with the same limits, and names the first operation that
    diverges.

    Example: dsv4 golden compact ./flash-golden --out ./flash-golden-small --exact 0,128,-1
    """
    from dsv4_convert.golden.archive import open_golden
    from dsv4_convert.golden.compact import Compact
    from dsv4_convert.golden.shrink import shrink

    with status("compacting") as say:
        say("opening")
        opened = open_golden(golden)
        kept = Compact.of(_positions(exact), opened.tokens.shape[1])
        made = shrink(opened, out, kept, say.step)
    before, after = opened.nbytes, made.nbytes
    echo(f"{out}: {size(after)}, {after / before:.2%} of {size(before)}", err=json == "-")
    write_json({"schema_version": 1, "path": str(out), "bytes": after, "bytes_whole": before}, json)


@reported
def show(
    golden: Golden,
    json: Json = None,
) -> None:
    """Show every tap of a golden with its shape, and the operations that its prompt leaves unchecked.

    Example: dsv4 golden show ./flash-golden
    """
    from dsv4_convert.golden.archive import open_golden
    from dsv4_convert.golden.prompt_coverage import prompt_coverage

    with status("golden") as say:
        say("opening")
        opened = open_golden(golden)
        reached = []
        for done, layer in enumerate(opened.layers):
            say.step(done, len(opened.layers), opened.config.step(layer))
            reached.append(prompt_coverage(opened, layer))
        odd = [problem for layer in (*opened.layers, None) for problem in opened.malformed_noise(layer)]
    document = {
        "schema_version": 1,
        "reference": dataclasses.asdict(opened.manifest.request.reference),
        "source": dataclasses.asdict(opened.manifest.request.source),
        "tokens": list(opened.tokens.shape),
        "first_position": opened.manifest.request.first_position,
        "decode": opened.decode,
        "layers": list(opened.layers),
        "noise": list(opened.manifest.request.noise),
        "compact": None if opened.compact is None else opened.compact.to_json(),
        "bytes": opened.nbytes,
        "taps": list(opened.names),
        "shapes": {name: list(opened.shape(name)) for name in opened.names},
        "reach": [dataclasses.asdict(layer) for layer in reached],
        "odd": odd,
    }
    if json != "-":
        _print_golden(opened, reached)
        for problem in odd:
            echo(f"{'odd':<14} {problem}")
    write_json(document, json)


def _print_golden(opened: Opened, reached: list[LayerCoverage]) -> None:
    """One line for each fact and each layer, then the table of taps."""
    from dsv4_convert.show.tables import fitted
    from dsv4_convert.spec.taps import TapKey

    request = opened.manifest.request
    reference, source = request.reference, request.source
    versions = ", ".join(f"{package} {version}" for package, version in reference.versions.items())
    lines = {
        "reference": f"{reference.name}, {reference.numerics} numerics in {reference.dtype}",
        "versions": versions,
        "source": source.name,
        "revision": source.revision or "not recorded",
        "tokens": str(list(opened.tokens.shape)),
        "first position": str(request.first_position),
        "decode": str(opened.decode),
        "layers": ranges(opened.layers),
        **{
            f"{kind} layers": ranges(layer for layer in opened.layers if opened.config.abbreviate(layer) == kind)
            for kind in dict.fromkeys(map(opened.config.abbreviate, opened.layers))
        },
        "noise": ", ".join(request.noise) or "none",
        "compact": "no" if opened.compact is None else f"exact at {ranges(opened.compact.positions)}",
        "taps": str(len(opened.names)),
        "bytes": f"{opened.nbytes:,}",
    }
    for name, text in lines.items():
        echo(f"{name:<14} {text}")
    for layer in reached:
        missed = "; ".join(layer.missed) or "every operation is reached"
        where = TapKey.of(opened.config, layer.layer, "ffn").where
        echo(f"{'reach':<14} {where}: {layer.experts} of {layer.of} experts; {missed}")
    screen = console()
    screen.print(fitted(_table_of_taps(opened), screen, dispensable=("axes", "in")), highlight=False)


def _table_of_taps(opened: Opened) -> Table:
    """A row for each tap; one for each kind of attention where they differ in its shape."""
    from rich.table import Table

    shapes: dict[Tap, dict[tuple[int, ...], str]] = {}
    for key in opened.keys:
        kind = key.tap.where.label if key.layer is None else f"{opened.config.abbreviate(key.layer)} layers"
        shapes.setdefault(key.tap, {}).setdefault(opened.shape(key), kind)
    table = Table(box=None, pad_edge=False)
    for column in ("tap", "shape", "axes", "in"):
        table.add_column(column, no_wrap=True)
    for tap in (each for each in (*opened.config.taps, *opened.config.state) if each in shapes):
        for shape, kind in shapes[tap].items():
            table.add_row(tap.name, str(list(shape)), tap.shape, kind if len(shapes[tap]) > 1 else tap.where.label)
    return table


@reported
def verify(
    golden: Golden,
    json: Json = None,
) -> None:
    """Hash every array of a golden again and compare with its manifest; exits 1 if anything differs.

    Example: dsv4 golden verify ./flash-golden
    """
    from dsv4_convert.errors import CheckFailed, listed
    from dsv4_convert.golden.archive import open_golden

    opened = open_golden(golden)
    with byte_progress("verifying") as progress:
        problems = opened.verify(progress)
    write_json({"schema_version": 1, "golden": str(opened.path), "problems": problems}, json)
    if problems:
        raise CheckFailed(f"{opened.path}: {number_of(len(problems), 'problem')}:\n{listed(problems)}")
    echo(f"{opened.path}: {len(opened.names)} taps, every byte as recorded", err=json == "-")


@reported
def diff(
    first: Annotated[str, typer.Argument(help="Golden whose noise floor decides: a folder or a URL.")],
    second: Annotated[str, typer.Argument(help="Golden of the same architecture and tokens.")],
    json: Json = None,
) -> None:
    """Compare two goldens tap by tap, such as those of two versions of a reference; exits 1 beyond the noise floor.

    Example: dsv4 golden diff ./golden-5.23 ./golden-5.24
    """
    from dsv4_convert.errors import CheckFailed
    from dsv4_convert.golden.archive import open_golden
    from dsv4_convert.parity.diff import diff as compare

    with status("comparing") as say:
        say("opening")
        found = compare(open_golden(first), open_golden(second), say)
    for line in found.lines():
        echo(line, err=json == "-")
    write_json(found.to_json(), json)
    if not found.agrees:
        raise CheckFailed(f"{first} and {second} differ beyond the noise floor")


@resumable
def make_checkpoint(
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    config: Annotated[
        Path | None,
        typer.Option(help="config.json of the architecture. Default: a small one with every kind of layer."),
    ] = None,
    model: Annotated[
        str, typer.Option(**one_of("v4", "v4.1"), help="Whose small architecture, without --config.")
    ] = "v4",
    form: Annotated[
        str,
        typer.Option(
            **one_of("fp4", "fp8", "bf16"), help="fp4: as released. fp8: as the Base releases. bf16: unquantised."
        ),
    ] = "fp4",
    layers: Annotated[str | None, typer.Option("--layers", "--layer", help=LAYERS_HELP)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    json: Json = None,
) -> None:
    """Make a checkpoint of random weights in the published format. The same seed gives the same bytes anywhere.

    Example: dsv4 golden make-checkpoint ./tiny
    """
    from dsv4_convert.golden.synthetic import make_checkpoint as make

    with byte_progress("writing") as progress:
        total = make(
            out, config=config, model=model, form=form, layers=parse_layers(layers), seed=seed, progress=progress
        )
    echo(f"{out}: {size(total)} of random weights", err=json == "-")
    write_json({"schema_version": 1, "path": str(out), "bytes": total, "form": form, "seed": seed}, json)

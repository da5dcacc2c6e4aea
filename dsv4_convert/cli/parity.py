"""``dsv4 parity``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from dsv4_convert.cli.common import (
    CHECKPOINT_HELP,
    GO_ON,
    LAYERS_HELP,
    SOURCES,
    Coordinator,
    Json,
    NumProcesses,
    Platform,
    ProcessId,
    Verbose,
    check_json,
    complete_taps,
    join_processes,
    one_of,
    own_stdout,
    parse_choice,
    parse_layers_and_stages,
    reported,
)
from dsv4_convert.cli.interrupt import announce
from dsv4_convert.cli.outputs import Csv, Github, Junit, Outputs, Page, Parquet
from dsv4_convert.cli.status import note_compilations, status


@reported
def parity(
    context: typer.Context,
    checkpoint: Annotated[str | None, typer.Argument(help=CHECKPOINT_HELP)] = None,
    recorded: Annotated[str | None, typer.Argument(metavar="golden", help="The same as --golden.")] = None,
    golden: Annotated[
        str | None,
        typer.Option(
            envvar="DSV4_GOLDEN",
            help="Golden to compare with (see dsv4 golden record): a folder, or a URL such as gs://….",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help=f"Instead of CHECKPOINT: a published one, decoded on the fly: {SOURCES}"),
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", "--layers", help=f"{LAYERS_HELP} A draft stage is mtp.0.")
    ] = None,
    taps: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare only taps that match, such as 'attn.*' or 'layers.3.ffn.gate.*'; may be repeated. Default: "
            "all.",
            autocompletion=complete_taps,
        ),
    ] = None,
    program: Annotated[
        str | None,
        typer.Option(
            **one_of("streamed", "model", "both"),
            help="streamed: a layer without its experts, then expert by expert. model: the compiled layer as the model "
            "runs it, with all of its experts. Default: both, or streamed where memory does not suffice.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            **one_of("expanded", "source"),
            help="Weights of the compiled layer: expanded, or published codes, which each use decodes. Default: the "
            "first of the two that fits.",
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            **one_of("grouped", "packed"),
            help="How the compiled layer computes experts: grouped (ragged_dot, or a kernel for published codes) or "
            "packed. Default: grouped on TPUs, and on GPUs with expanded weights; packed otherwise.",
        ),
    ] = None,
    scanned: Annotated[
        bool, typer.Option("--scanned", help="The compiled layer is part of a loop over stacked layers.")
    ] = False,
    chunk: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="The compiled layer gets prompts in chunks of so many tokens from the cache, as dsv4 generate runs "
            "them. Default: whole prompts.",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            **one_of("isolated", "cumulative", "both"),
            envvar="DSV4_MODE",
            help="isolated: every layer runs on the golden's own input. cumulative: the model runs from the tokens, so "
            "errors add up. both: runs both and splits the error of every layer into an inherited and an added part. "
            "Default: isolated, or cumulative with a compact golden.",
        ),
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option(
            **one_of("prefill", "decode"),
            help="For goldens recorded with --decode: compare only the prefill, or only the decoded tokens and the "
            "state that they start from. Default: both.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            **one_of("float32", "bfloat16"),
            help="Dtype of weights and activations; its noise floor is the measure. Default: float32, or bfloat16 with "
            "a golden of the release's own code.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help=f"Published checkpoint, to compare the weights of wrong operations with: {SOURCES}"),
    ] = None,
    require_coverage: Annotated[
        bool,
        typer.Option(
            "--require-reach",
            help="Fail if the golden leaves an operation or an expert unchecked, or does not use weights of the "
            "conversion (a draft stage, rows of the vocabulary); with --against these are compared with the source.",
        ),
    ] = False,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="DSV4_BASELINE",
            help="Fail if an error grew beyond its record in FILE, even within tolerance.",
        ),
    ] = None,
    update_baseline: Annotated[
        bool,
        typer.Option("--update-baseline", help="Write this run's errors to --baseline: new taps, and smaller errors."),
    ] = False,
    reason: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Why --update-baseline may record larger errors; kept in the file."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep finished layers in DIR, so that the same command goes on at its layer after an interruption, "
            "with the same report. Removed when the report is written.",
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say in words why each tap passes or fails.")] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json, or its folder, to show tokens as text. Default: the one in --against."),
    ] = None,
    verbose: Verbose = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the first line of the verdict.")] = False,
    platform: Platform = None,
    precision: Annotated[
        str,
        typer.Option(
            **one_of("highest", "high", "default"),
            help="float32 matmul precision; accelerators compute with fewer bits below highest. The limits assume "
            "highest.",
        ),
    ] = "highest",
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS=SIZE,…",
            help="How all devices share the dense parts of a layer, such as fsdp=2,tensor=4; axes are data, fsdp, "
            "expert, sequence, tensor. Default: a mesh that divides everything.",
        ),
    ] = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    json: Json = None,
    junit: Junit = None,
    github: Github = False,
    page: Page = None,
    csv: Csv = None,
    parquet: Parquet = None,
) -> None:
    """Run the JAX layers and compare every intermediate activation with a golden.

    Errors are multiples of the noise floor: how far rounding alone moves the reference. A layer that fails runs once
    more with every operation on the golden's own inputs, so the operation that is wrong is named, and with --against
    the tensor. Exits 1 if anything diverges. Only the weights that the prompt reaches are read.

    --golden, --mode and --baseline may also stand in the variables DSV4_GOLDEN, DSV4_MODE and DSV4_BASELINE, or as
    golden, mode and baseline in the table tool.dsv4 of pyproject.toml.

    With several devices the dense parts of a layer run on all of them. Several processes run the same command, each
    with its own --process-id. Each reads and computes its part, process 0 reports, and all exit alike.

    Example: dsv4 parity ./flash-orbax --golden ./flash-golden --layer 12 --against ./DeepSeek-V4-Flash
    """
    from dsv4_convert.files.limits import TO_COMPUTE, require_address_space

    require_address_space(TO_COMPUTE)
    from dsv4_convert.errors import CheckFailed
    from dsv4_convert.platforms import check_platform, keep_programs, select_platform

    layers = parse_layers_and_stages(layer)
    bits = parse_choice("--precision", precision, ("highest", "high", "default"))
    checkpoint, golden = _sides(context, checkpoint, recorded, golden, source=source)
    select_platform(platform)
    keep_programs()
    note_compilations()
    if state is not None:
        announce(GO_ON)
    from dsv4_convert.golden.noise import MODES, Mode
    from dsv4_convert.golden.tokens import token_decoder
    from dsv4_convert.parity.comparison import Phase
    from dsv4_convert.parity.finished import FinishedSteps
    from dsv4_convert.parity.gate import baseline_request
    from dsv4_convert.parity.programs import ModelOptions, Program
    from dsv4_convert.parity.run import ParityOptions, run_parity

    chosen = None if mode is None else parse_choice("--mode", mode, (*MODES, "both"))
    ran = None if program is None else parse_choice("--program", program, (*Program, "both"))
    model = ModelOptions(
        weights=None if weights is None else parse_choice("--weights", weights, ("expanded", "source")),
        experts=None if experts is None else parse_choice("--experts", experts, ("grouped", "packed")),
        scanned=scanned,
        chunk=chunk,
    )
    outputs = Outputs(json=json, junit=junit, github=github, page=page, csv=csv, parquet=parquet)
    gate = baseline_request(baseline, update=update_baseline, reason=reason)
    processes = join_processes(coordinator, num_processes, process_id)
    with processes.together():
        check_platform(platform)
        if processes.first:
            if coordinator is not None:
                check_json(json)
            outputs.check()
        folders = (Path(given) for given in (against, source) if given is not None and Path(given).is_dir())
        decode = token_decoder(tokenizer or next(folders, None), required=tokenizer is not None)
        with nullcontext() if state is None else FinishedSteps(state) as steps:
            with own_stdout(processes), status("parity") as say:
                options = ParityOptions(
                    layers=layers,
                    taps=taps or (),
                    modes=None if chosen is None else MODES if chosen == "both" else (Mode(chosen),),
                    phase=None if phase is None else Phase(parse_choice("--phase", phase, Phase)),
                    dtype=dtype,
                    precision=bits,
                    mesh=mesh,
                    state=steps,
                    require_coverage=require_coverage,
                    detail=processes.first and page is not None,
                    programs=None if ran is None else tuple(Program) if ran == "both" else (Program(ran),),
                    model=model,
                )
                report = run_parity(
                    checkpoint,
                    golden,
                    options,
                    source=source,
                    against=against,
                    baseline=gate,
                    processes=processes,
                    progress=say.step,
                )
            with processes.step("report"):
                if processes.first:
                    outputs.write(report, verbosity=-1 if quiet else verbose, explained=explain, decode=decode)
            if steps is not None:
                steps.clear()
    if not report.passed:
        raise typer.Exit(CheckFailed.exit_code)


def _sides(
    context: typer.Context, checkpoint: str | None, recorded: str | None, golden: str | None, *, source: str | None
) -> tuple[str | None, str]:
    """The two sides of the comparison, which are told apart by what lies there; nothing heavy is imported for it.

    Raises:
        UsageError: no golden, or two.
        BadInput: no golden or no converted checkpoint lies there.
    """
    from dsv4_convert.errors import BadInput, UsageError
    from dsv4_convert.folders import is_converted, is_golden, no_golden, not_converted

    if source is not None and recorded is None:  # dsv4 parity --source SOURCE GOLDEN
        checkpoint, recorded = None, checkpoint
    asked = context.get_parameter_source("golden")
    if recorded is not None and asked is not None and asked.name == "COMMANDLINE":
        raise UsageError(f"two goldens are given: {recorded} and --golden {golden}; leave one of them out")
    golden = recorded or golden
    if golden is None:
        raise UsageError(
            "a golden is needed: dsv4 parity CHECKPOINT GOLDEN, or --golden. `dsv4 golden record SOURCE --out GOLDEN "
            "--random 300` records one"
        )
    if checkpoint is not None and is_golden(Path(checkpoint)) and is_converted(Path(golden)):
        checkpoint, golden = golden, checkpoint
    if "://" not in golden and not is_golden(Path(golden)):
        raise BadInput(no_golden(golden))
    if checkpoint is not None and source is None and "://" not in checkpoint and not is_converted(Path(checkpoint)):
        raise BadInput(f"{checkpoint}: {not_converted(Path(checkpoint), checkpoint)}")
    return checkpoint, golden

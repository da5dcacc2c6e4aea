"""Does parity find what people get wrong? Every fault of both catalogues, planted in a small model, one table.

For each fault, the table shows four things. Does a tap fail in isolated parity? Does parity name the faulty layer and
operation (the first tap that diverges, and the first operation that is wrong on the golden's own inputs), and no other
layer? Which measures fail? How many noise floors is the error? With ``--compact`` the golden is a compact one that
keeps one token exactly, and the model runs from the tokens. With ``--dtype bfloat16``, where rounding is as large as
many a fault, every matrix is scaled a little as well; a change that is a legal rounding there must pass. Needs the
``reference`` extra.

``--program streamed`` plants the faults of weights, tables and code in the streamed layers; ``model`` those of the
compiled layer, on each of its paths; eight simulated devices share some.

``--model v4.1`` plants those of DeepSeek-V4.1, in a model with every kind of layer. The golden of the streamed layers
has activations of NeMo Automodel. Faults in what a layer hands on to others show in a run from the tokens.

Run: python -m benchmarks.faults [--model v4.1] [--program streamed|model|both] [--compact] [--dtype bfloat16]
[NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.parity.tolerances import UNIT
from tests.parity.faults import program, program_drafts, program_v41
from tests.parity.faults.catalogue import CATALOGUE, CATALOGUE_V41
from tests.parity.faults.fault import Fault, examine, patient
from tests.parity.faults.program import ProgramFault, Subject
from tests.parity.faults.scales import SCALES

#: Some paths of the compiled layer need eight devices; read when JAX starts.
_DEVICES = "--xla_force_host_platform_device_count=8"
_Planted = TypeVar("_Planted", Fault, ProgramFault)
_PROGRAMS = ("streamed", "model", "both")


def _multiple(report: ParityReport) -> str:
    first = report.first_diverging
    if first is None or first.distance is None:
        return "" if first is None or first.flips is None else f"{first.flips.tokens}/{first.flips.of} flips"
    return f"{first.distance.noise.row:.1e}"


def streamed(
    folder: Path, faults: list[Fault], *, compact: bool, dtype: str
) -> Iterator[tuple[Fault, str, ParityReport]]:
    """Each fault of the streamed layers, its kind, and the report."""
    patients = {}
    for name in dict.fromkeys(fault.model for fault in faults):
        (folder / name).mkdir()
        patients[name] = patient(folder / name, name, noise=[dtype])
        if compact:
            patients[name] = patients[name].compacted()
        healthy = ParityRun(patients[name].held, patients[name].golden, ParityOptions(dtype=dtype)).run()
        assert healthy.passed, verdict(healthy)
    for fault in faults:
        yield fault, fault.kind, examine(patients[fault.model], fault, dtype=dtype, **fault.options)


def compiled(subject: Subject, faults: list[ProgramFault]) -> Iterator[tuple[ProgramFault, str, ParityReport]]:
    """Each fault of the compiled layer, its path, and the report."""
    for path in subject.paths:
        if layers := {fault.layer for fault in faults if fault.path == path} - {None}:
            healthy = program.examine(subject, path, layers=sorted(layers))
            assert healthy.passed, f"{path}: {verdict(healthy)}"
    for fault in faults:
        yield fault, fault.path, program.examine(subject, fault.path, fault, **program.options_of(fault))


def _chosen(faults: Iterable[_Planted], names: list[str]) -> list[_Planted]:
    return [fault for fault in faults if not names or any(part in fault.name for part in names)]


def main() -> None:
    """Plant every fault, print the table and the counts as JSON."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; all faults if none is given")
    parser.add_argument(
        "--model", choices=("v4", "v4.1"), default="v4", help="the architecture whose faults are planted"
    )
    parser.add_argument("--program", choices=_PROGRAMS, default="both", help="the program that faults are planted in")
    parser.add_argument(
        "--compact", action="store_true", help="streamed: compare with a compact golden, from the tokens"
    )
    parser.add_argument(
        "--dtype", choices=tuple(UNIT), default="float32", help="streamed: dtype of weights and activations"
    )
    options = parser.parse_args()
    newer = options.model == "v4.1"
    if newer and (options.compact or options.dtype != "float32"):
        parser.error("--model v4.1: float32, with a whole golden")
    found = rightly = legal = 0
    kinds: Counter[str] = Counter()
    console, table = Console(width=160), Table(box=None)
    for column in ("fault", "in", "operation", "found", "named", "by", "noise floors"):
        table.add_column(column, overflow="fold")
    with tempfile.TemporaryDirectory() as folder:
        examined: list[Iterator[tuple[Fault | ProgramFault, str, ParityReport]]] = []
        if options.program != "model":
            catalogue = CATALOGUE_V41 if newer else CATALOGUE | (SCALES if options.dtype == "bfloat16" else {})
            faults = _chosen(catalogue.values(), options.names)
            examined.append(streamed(Path(folder), faults, compact=options.compact, dtype=options.dtype))
        if options.program != "streamed":
            subject = program_v41.subject if newer else program.subject
            planted = _chosen(program_v41.PROGRAM_V41 if newer else program.PROGRAM, options.names)
            examined.append(compiled(subject(Path(folder) / "program"), planted))
            drafting = program_drafts.subject(Path(folder) / "drafts", "v4.1 drafting" if newer else "drafting")
            of_stages = program_drafts.of_stages(drafting.weights.config.num_hidden_layers)
            examined.append(compiled(drafting, _chosen(of_stages, options.names)))
        for fault, kind, report in chain.from_iterable(examined):
            first = report.first_diverging  # that the golden knows other weights would be no finding
            if options.dtype == "bfloat16" and isinstance(fault, Fault) and fault.legal:
                right = report.passed
                named = f"legal: {fault.legal}" if right else "no: a legal rounding fails"
                legal += right
            else:
                right = fault.named_by(report)
                named = "yes" if right else f"no: {first.name if first is not None else 'nothing'}"
                found, rightly = found + (first is not None), rightly + right
            kinds[kind] += 1
            table.add_row(
                fault.name,
                kind,
                fault.full_tap,
                "no" if first is None else "yes",
                named,
                "" if first is None else ", ".join(first.exceeded(report.limits)),
                _multiple(report),
            )
            if not right:
                console.print(f"{fault.name}: {verdict(report)}", style="red")
            print(f"{kinds.total()} done", end="\r", flush=True)
    console.print(table)
    counts = {"found": found, "named_rightly": rightly, "legal_and_pass": legal}
    others = kinds.total() - rightly - legal
    print(json.dumps({"faults": kinds.total(), "kinds": kinds, **counts, "others": others}))


if __name__ == "__main__":
    main()

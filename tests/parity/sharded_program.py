"""Run by test_program.py on eight simulated devices: compiled layers and stages over meshes, healthy and with a fault.

``python -m tests.parity.sharded_program FOLDER``: the models are made there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import dsv4_convert.golden as golden_package
from dsv4_convert.golden.archive import open_golden
from dsv4_convert.golden.synthetic import tiny_v41_config, write_checkpoint
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.weights.published import PublishedWeights

from .faults import program, program_drafts, program_v41
from .faults.program import MESHES, ProgramFault, Subject, examine, options_of

COMMITTED = Path(golden_package.__file__).parent / "data" / "tiny-v4.1"


def check(model: Subject, fault: ProgramFault, layer: int) -> None:
    """The healthy ``layer`` agrees over the mesh of the fault's path, and the fault is named."""
    report = examine(model, fault.path, layers=[layer])
    assert report.passed, verdict(report)
    assert report.platform["mesh"] == MESHES[fault.path]
    print("agrees on", MESHES[fault.path])
    report = examine(model, fault.path, fault, **options_of(fault))
    assert report.first_wrong is not None, fault.name
    assert report.first_wrong.name == fault.full_tap, (fault.name, report.first_wrong.name)
    print("named:", fault.name)


def main() -> None:
    folder = Path(sys.argv[1])
    model = program.subject(folder / "v4")
    for path in MESHES:
        check(model, next(fault for fault in program.PROGRAM if fault.path == path), program.CSA)
    # An n-gram table lies over all eight devices by rows.
    write_checkpoint(folder / "v4.1", tiny_v41_config(), seed=0)
    small = Subject(PublishedWeights.open(folder / "v4.1"), open_golden(COMMITTED), program_v41.PATHS)
    (fault,) = (fault for fault in program_v41.PROGRAM_V41 if fault.name == "rows counted from the first device's")
    check(small, fault, program_v41.NGRAMS)
    drafts = program_drafts.of_stages(small.weights.config.num_hidden_layers)
    for name in ("the sum over the vocabulary's devices missing", "the sum over a stage's inner widths missing"):
        (fault,) = (fault for fault in drafts if fault.name == name)
        assert fault.layer is not None
        check(small, fault, fault.layer)


if __name__ == "__main__":
    main()

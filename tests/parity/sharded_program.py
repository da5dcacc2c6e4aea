"""Run by test_program.py on eight simulated devices: the compiled layer over meshes, healthy and with a fault.

``python -m tests.parity.sharded_program FOLDER``: the model is made there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dsv4_convert.parity.report.words import verdict

from .faults.program import CSA, MESHES, PROGRAM, examine, options_of, subject


def main() -> None:
    model = subject(Path(sys.argv[1]))
    for path, mesh in MESHES.items():
        report = examine(model, path, layers=[CSA])
        assert report.passed, verdict(report)
        assert report.platform["mesh"] == mesh
        print("agrees on", mesh)
        fault = next(fault for fault in PROGRAM if fault.path == path)
        report = examine(model, path, fault, **options_of(fault))
        assert report.first_wrong is not None, fault.name
        assert report.first_wrong.name == fault.full_tap, (fault.name, report.first_wrong.name)
        print("named:", fault.name)


if __name__ == "__main__":
    main()

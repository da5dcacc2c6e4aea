"""Programs compiled as users compile them: the other tests may run without LLVM's optimisations (noxfile.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "tiny"


def test_parity_with_the_committed_golden(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", tiny_config(), seed=0)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = ("parity", "--source", tmp_path / "tiny", "--golden", GOLDEN)
    code = "from dsv4_convert.cli import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: all" in done.stdout

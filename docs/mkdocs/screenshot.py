"""The picture of README: the first screen of the report of a planted fault, as headless Chromium shows it.

Run: python -m docs.mkdocs.screenshot (needs chromium)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "assets" / "report.png"


def main() -> None:
    """Make the fault of README, write its report, and take the picture."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no chromium and no google-chrome on the PATH; install one of them")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dsv4(folder, "golden", "make-checkpoint", "checkpoint")
        dsv4(folder, "convert", "hf-to-orbax", "checkpoint", "faulty")
        group = folder / "faulty" / "layers.1.attn.wo_a"
        for old, new in (("0.0.0", "swapped"), ("1.0.0", "0.0.0"), ("swapped", "1.0.0")):
            (group / old).rename(group / new)
        golden = ("--golden", str(ROOT / "golden" / "data" / "tiny"))
        dsv4(folder, "parity", "faulty", *golden, "--against", "checkpoint", "--report", "report.html", code=1)
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,470")
        subprocess.run([browser, *options, f"--screenshot={PICTURE}", f"file://{folder}/report.html"], check=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size // 1000} kB")


def dsv4(folder: Path, *words: str, code: int = 0) -> None:
    """Run a command in a folder. Raises :class:`RuntimeError` if it exits with another code."""
    found = subprocess.run([sys.executable, "-m", "dsv4_convert", *words], cwd=folder, check=False).returncode
    if found != code:
        raise RuntimeError(f"dsv4 {' '.join(words)}: exit code {found}, expected {code}")


if __name__ == "__main__":
    main()

"""The main job at V4-Flash's full width: make, convert, record and compare two layers; time and peak memory of each.

Two layers of the published config, one CSA with hash routing and one HCA with learned routing, of random weights in the
published format. Needs about 45 GB of disk and the ``reference`` extra.

Run: python -m benchmarks.full_width [--work DIR] [--tokens 64] [--config tests/data/configs/DeepSeek-V4-Flash.json]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import dsv4, gigabytes


def two_layers(config: Path) -> dict[str, object]:
    """The published config, cut to one CSA layer with hash routing and one HCA layer with learned routing."""
    raw = dict(json.loads(config.read_text(encoding="utf-8")))
    return raw | {"num_hidden_layers": 2, "compress_ratios": [4, 128, 0], "num_hash_layers": 1}


def main() -> None:
    """Run every step, print the table, write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("full-width"), help="folder for everything that is made")
    parser.add_argument("--config", type=Path, default=Path("tests/data/configs/DeepSeek-V4-Flash.json"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--keep", action="store_true", help="leave the folder in place")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=False)
    (work / "config.json").write_text(json.dumps(two_layers(options.config)), encoding="utf-8")
    hf, orbax, golden = (str(work / name) for name in ("hf", "orbax", "golden"))
    steps = [
        dsv4("golden", "make-checkpoint", hf, "--config", str(work / "config.json")),
        dsv4("convert", "hf-to-orbax", hf, orbax, "--dtype", options.dtype),
        dsv4("golden", "record", hf, "--out", golden, "--random", str(options.tokens)),
        dsv4("parity", orbax, "--golden", golden, "--layer", "0", "--quiet"),
        dsv4("parity", orbax, "--golden", golden, "--layer", "1", "--quiet"),
        dsv4("parity", orbax, "--golden", golden, "--quiet", "--mode", "both"),
        dsv4("parity", orbax, "--golden", golden, "--quiet", "--mode", "both", "--dtype", "bfloat16"),
        dsv4("parity", "--source", hf, "--golden", golden, "--quiet", "--layer", "0"),
    ]
    sizes = {name: gigabytes(work / name) for name in ("hf", "orbax", "golden")}
    table = Table(title=f"two layers at full width, {options.tokens} tokens; GB on disk: {sizes}", box=None)
    for column in ("command", "seconds", "peak_gib", "exit_code"):
        table.add_column(column)
    for step in steps:
        table.add_row(*map(str, step.values()))
    Console().print(table)
    print(json.dumps({"sizes_gb": sizes, "steps": steps}))
    if not options.keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()

"""Golden and parity at the real width of V4-Flash and V4-Pro: time and peak memory of each step, on either side.

Three layers of the published config, one for each kind that occurs: CSA with hash routing, CSA with learned routing,
HCA with learned routing; random weights in the published format. V4-Flash needs about 25 GB of disk, V4-Pro 65 GB, and
both the ``reference`` extra.

Run: python -m benchmarks.real_width [--config tests/data/configs/DeepSeek-V4-Pro.json] [--work DIR] [--tokens 256]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import dsv4, gigabytes

KINDS = ("CSA, hash", "CSA, learned", "HCA, learned")


def three_layers(config: Path) -> dict[str, object]:
    """The published config, cut to one layer of each of :data:`KINDS`."""
    raw = dict(json.loads(config.read_text(encoding="utf-8")))
    return raw | {"num_hidden_layers": 3, "compress_ratios": [4, 4, 128, 0], "num_hash_layers": 1}


def steps(work: Path, tokens: int, noise: str) -> Iterator[dict[str, object]]:
    """Run every step; a layer's conversion is deleted before the next, so that one at a time is on the disk."""
    hf, golden, compact = work / "hf", work / "golden", work / "compact"
    yield dsv4("golden", "make-checkpoint", hf, "--config", work / "config.json")
    yield dsv4("golden", "record", hf, "--out", golden, "--random", tokens, "--noise", noise)
    yield dsv4("golden", "compact", golden, "--out", compact)
    for layer in range(len(KINDS)):
        orbax = work / f"orbax-{layer}"
        yield dsv4("convert", "hf-to-orbax", hf, orbax, "--layers", layer, "--dtype", "source")
        yield dsv4("parity", orbax, "--golden", golden, "--layer", layer)
        shutil.rmtree(orbax)
        yield dsv4("parity", "--source", hf, "--golden", golden, "--layer", layer)
    yield dsv4("parity", "--source", hf, "--golden", golden, "--mode", "both")
    yield dsv4("parity", "--source", hf, "--golden", compact)


def main() -> None:
    """Run every step, print the table, write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("real-width"), help="folder for everything that is made")
    parser.add_argument("--config", type=Path, default=Path("tests/data/configs/DeepSeek-V4-Flash.json"))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--noise", default="float32,bfloat16", help="dtypes whose noise floor is recorded")
    parser.add_argument("--keep", action="store_true", help="leave the folder in place")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=False)
    (work / "config.json").write_text(json.dumps(three_layers(options.config)), encoding="utf-8")
    done = []
    for step in steps(work, options.tokens, options.noise):
        print(json.dumps(step), flush=True)
        done.append(step)
    sizes = {name: gigabytes(work / name) for name in ("hf", "golden", "compact")}
    table = Table(title=f"{options.config.stem}, {', '.join(KINDS)}, {options.tokens} tokens; GB: {sizes}", box=None)
    for column in ("command", "seconds", "peak_gib", "exit_code"):
        table.add_column(column)
    for step in done:
        table.add_row(*map(str, step.values()))
    Console().print(table)
    if not options.keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()

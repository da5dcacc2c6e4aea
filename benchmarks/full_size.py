"""Full-size V4-Flash, V4-Pro and V4.1-Flash as sparse files: the plan of the whole, and one layer of it converted.

Run: python -m benchmarks.full_size [--model DeepSeek-V4-Flash] [--layer 12] [--dtype bfloat16] [--work DIR]

The files have the published tensors, shapes and sizes (tests/data/inventory); the layer to convert and the tensors
beside the layers have random content; the others, and tables of n-grams, read as zeros. Needs 25 GB of disk for Flash
in bfloat16, 40 GB for Pro and 25 GB for V4.1 with --dtype source. Layers 1 and 14 of V4.1 have a table of 98 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import dsv4, gigabytes
from benchmarks.sparse import lay_out, tensors_of
from dsv4_convert.spec.names import layer_of, stage_of

DATA = Path("tests/data")
#: Model -> number of its shards, and its config.
MODELS = {
    "DeepSeek-V4-Flash": (46, "DeepSeek-V4-Flash"),
    "DeepSeek-V4-Pro": (64, "DeepSeek-V4-Pro"),
    "DeepSeek-V4.1-Flash": (48, "DeepSeek-V4.1-Flash.from_third_party_test"),
}


def main() -> None:
    """Lay out, plan, convert, verify; print a table and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="DeepSeek-V4-Flash")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compression", default="none", help="zstd: a layer with an n-gram table fits a small disk")
    parser.add_argument("--plan-only", action="store_true", help="neither fill nor convert")
    parser.add_argument("--work", type=Path, default=Path("full-size"), help="folder for everything that is made")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=False)
    source, out = work / options.model, work / "orbax"
    tensors = tensors_of(DATA / "inventory" / f"{options.model}.json")

    def filled(name: str) -> bool:
        if options.plan_only or name.split(".")[-3:-1] == ["engram", "embed"]:
            return False
        return stage_of(name) is None and layer_of(name) in (None, options.layer)

    shards, config = MODELS[options.model]
    lay_out(tensors, DATA / "configs" / f"{config}.json", source, shards=shards, filled=filled)
    convert = ("convert", "hf-to-orbax", source, out, "--dtype", options.dtype, "--compression", options.compression)
    # The whole does not fit this disk, which the plan would refuse after it is made: --json has it before.
    steps = [dsv4(*convert, "--dry-run", "--json", work / "plan.json")]
    if not options.plan_only:
        steps.append(dsv4(*convert, "--layers", options.layer))
        steps.append(dsv4("verify", out, "--against", source))
    files = len(list(source.glob("*.safetensors")))
    figures = {
        "model": options.model,
        "tensors": len(tensors),
        "apparent_gb": gigabytes(source),
        "written_gb": gigabytes(out),
        "steps": steps,
    }
    table = Table(title=f"{options.model}: {len(tensors):,} tensors, {gigabytes(source)} GB in {files} files")
    for column in ("command", "seconds", "peak_gib", "exit_code"):
        table.add_column(column)
    for step in steps:
        table.add_row(*map(str, step.values()))
    Console().print(table)
    print(json.dumps(figures))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()

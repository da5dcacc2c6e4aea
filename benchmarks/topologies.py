"""The whole models compiled for TPU slices that are not there: what a device needs, and how long it takes.

Every program in a process of its own, one after the other. Three hours of an ordinary machine at most; ``--only`` takes
some of the rows. Needs libtpu (``pip install 'dsv4-convert[tpu]'``) and no TPU.

Run: python -m benchmarks.topologies [--only Flash] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import dsv4

CONFIGS = Path(__file__).parent.parent / "tests" / "data" / "configs"
MODELS = {
    "Flash": "DeepSeek-V4-Flash.json",
    "Pro": "DeepSeek-V4-Pro.json",
    "V4.1": "DeepSeek-V4.1-Flash.from_third_party_test.json",
}
#: Columns of the table.
_WIDTH = 150
#: Temporaries of one device in MaxText's compilation of the model for v5p-512, as its PR 4153 has them.
MAXTEXT_TEMPORARIES = 94.9e9


@dataclasses.dataclass(frozen=True)
class Row:
    """One program."""

    model: str
    topology: str
    mesh: str | None = None
    layers: int | None = None
    decode: bool = False
    source: bool = False

    @property
    def arguments(self) -> list[object]:
        """Of ``dsv4 compile``."""
        given: list[object] = ["--config", CONFIGS / MODELS[self.model], "--topology", self.topology]
        given += ["--mesh", self.mesh] if self.mesh else []
        given += ["--layers", self.layers] if self.layers else []
        given += ["--weights", "source"] if self.source else []
        return [*given, "--decode"] if self.decode else given

    @property
    def name(self) -> str:
        """For ``--only``."""
        layers = f" {self.layers} layers" if self.layers else ""
        form = " source" if self.source else ""
        return f"{self.model}{layers}{form} {self.topology} {'decode' if self.decode else 'prefill'}"


ROWS = (
    *(Row("Flash", "v5p-512", layers=layers) for layers in (4, 16)),
    *(Row("Flash", name) for name in ("v5p-512", "v4-256", "v5e-256", "v6e-64", "tpu7x-64")),
    *(Row("Pro", name) for name in ("v5p-512", "v4-512", "v5e-256", "v6e-256", "tpu7x-128")),
    *(Row("Flash", name, decode=True) for name in ("v5p-32", "v6e-64")),
    Row("Pro", "v5p-128", decode=True),
    Row("Flash", "v6e-16", decode=True, source=True),
    Row("Pro", "v5e-256", "fsdp=4,expert=64", decode=True, source=True),
    *(Row("V4.1", name) for name in ("v5p-512", "v6e-128")),
    *(Row("V4.1", name, decode=True) for name in ("v5p-64", "v6e-128")),
    Row("V4.1", "v6e-32", decode=True, source=True),
)


def compiled(row: Row, tokens: int) -> dict[str, Any]:
    """The report of a row, with seconds and peak memory of its process; without libtpu its exit code alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        done = dsv4("compile", *row.arguments, "--tokens", tokens, "--json", file)
        return done | (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})


def main() -> None:
    """Compile every row, print the table, write the reports as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name has this in it, such as 'Pro v5p'")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path, default=Path("topologies.json"))
    options = parser.parse_args()
    table = Table("model", "slice", "devices", "mesh", "arguments", "outputs", "temporaries", "HBM", "fits", "compile")
    reports = []
    for row in ROWS:
        if options.only not in row.name:
            continue
        found = compiled(row, options.tokens)
        reports.append({"row": row.name, **found})
        options.json.write_text(json.dumps(reports, indent=1), encoding="utf-8")
        table.add_row(*_cells(row, found))
        print(*_cells(row, found), sep=" | ", flush=True)
    Console(width=_WIDTH).print(table)


def _cells(row: Row, found: dict[str, Any]) -> list[str]:
    model = row.name.replace(f" {row.topology}", "")
    memory = found.get("memory")
    if memory is None:
        return [model, row.topology, *[""] * 6, "no" if found.get("refused") else f"exit {found['exit_code']}", ""]
    sizes = [f"{memory[name] / 2**30:.2f}" for name in ("arguments", "outputs", "temporaries")]
    # A cache that is given away lies where it was: nothing new is needed for it.
    sizes[1] = f"{(memory['outputs'] - memory['aliased']) / 2**30:.2f}"
    mesh = ",".join(f"{name}={size}" for name, size in found["mesh"].items())
    fits = f"{memory['total'] / found['hbm']:.0%}" if found["fits"] else "no"
    seconds = f"{found['seconds']:.0f} s, {found['cpu_seconds']:.0f} of CPU, {found['peak_gib']:.1f} GiB"
    return [
        model,
        row.topology,
        str(found["slice"]["devices"]),
        mesh,
        *sizes,
        f"{found['hbm'] / 2**30:.2f}",
        fits,
        seconds,
    ]


if __name__ == "__main__":
    main()

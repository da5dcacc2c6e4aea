"""The commands that write, each with what it takes, what it leaves, and what might take half of it for whole."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import golden
from dsv4_convert.files.workspace import stage_of
from dsv4_convert.golden.synthetic import tiny_config, tiny_v41_config, write_checkpoint
from tests.kills.runs import Zygote, digests

REPOSITORY_NAME = "org/micro"
COMMIT = "1" * 40

#: The smallest model of the family: one layer, of each published storage form something.
MICRO: dict[str, Any] = {
    "num_hidden_layers": 1,
    "num_hash_layers": 0,
    "compress_ratios": [0],
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "num_nextn_predict_layers": 0,
}


#: The smallest V4.1 with a table of n-grams, which is converted in chunks of rows.
MICRO_V41: dict[str, Any] = {
    "n_routed_experts": 2,
    "num_hidden_layers": 1,
    "num_nextn_predict_layers": 1,
    "compress_ratios": [0, 0],
    "kv_source_layer_ids": [],
    "index_source_layer_ids": [],
    "candidate_source_layer_id": None,
    "engram_layer_ids": [0],
    "dspark_target_layer_ids": [0],
}


#: One with a layer of every kind, for recordings, which write layer by layer.
DEEP: dict[str, Any] = {**MICRO, "num_hidden_layers": 4, "num_hash_layers": 1, "compress_ratios": [0, 4, 128, 4, 0]}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A command that writes ``root / "out"``.

    Attributes:
        name: its name in the table.
        arguments: returns the command's arguments for (folder of the inputs, destination).
        acceptor: function of :mod:`.acceptors` for its output.
        leaving_out: prefixes of paths in the destination that are not compared.
        appears: the destination appears by a rename instead of growing in place.
    """

    name: str
    arguments: Callable[[Path, Path], Sequence[object]]
    acceptor: str
    leaving_out: str = ""
    appears: bool = True

    def out(self, root: Path) -> Path:
        """The destination."""
        return root / "out"

    def half(self, root: Path) -> list[Path]:
        """The folders that nothing may accept while the work is half done."""
        out = self.out(root)
        return [out, stage_of(out)] if self.appears else [out]

    def command(self, inputs: Path, root: Path) -> Sequence[object]:
        """What to run."""
        return self.arguments(inputs, self.out(root))

    def content(self, root: Path) -> dict[str, str] | None:
        """Digests of the destination; None if there is none."""
        out = self.out(root)
        return digests(out, leaving_out=self.leaving_out) if out.exists() else None


def _convert(*options: str, of: str = "hf") -> Callable[[Path, Path], Sequence[object]]:
    return lambda inputs, out: ["convert", "hf-to-orbax", inputs / of, out, "--workers", "1", *options]


def _export(*options: str, of: str = "source") -> Callable[[Path, Path], Sequence[object]]:
    return lambda inputs, out: ["convert", "orbax-to-hf", inputs / of, out, *options]


def _record(*options: str, source: str = "hf") -> Callable[[Path, Path], Sequence[object]]:
    return lambda inputs, out: ["golden", "record", inputs / source, "--out", out, "--random", "7", *options]


CONVERSIONS = (
    Subject("convert source", _convert("--dtype", "source"), "checkpoint"),
    Subject("convert bfloat16", _convert("--dtype", "bfloat16"), "checkpoint"),
    Subject("convert float32 zstd", _convert("--dtype", "float32", "--compression", "zstd"), "checkpoint"),
    Subject("convert maxtext", _convert("--layout", "maxtext-unscanned"), "checkpoint"),
    Subject("convert V4.1", _convert("--dtype", "source", of="v41"), "checkpoint"),
)
EXPORTS = (
    Subject("orbax-to-hf", _export(), "exported"),
    Subject("orbax-to-hf plain", _export(of="bfloat16"), "exported"),
)
DOWNLOADS = (
    Subject(
        "download",
        lambda inputs, out: ["download", REPOSITORY_NAME, "--local-dir", out],
        "downloaded",
        leaving_out=".cache",
        appears=False,
    ),
)
MAKERS = (
    Subject("make-checkpoint", lambda inputs, out: ["golden", "make-checkpoint", out, "--layers", "0"], "downloaded"),
)
RECORDINGS = (
    Subject("record", _record("--noise", "float32", source="deep"), "golden"),
    Subject("record compact", _record("--compact"), "golden"),
    Subject("golden compact", lambda inputs, out: ["golden", "compact", inputs / "golden", "--out", out], "golden"),
)


def _parity(inputs: Path, out: Path) -> Sequence[object]:
    """A report beside finished layers. Half a report has another name, which begins with a dot."""
    out.mkdir(exist_ok=True)
    sides = ["parity", inputs / "source", "--golden", inputs / "golden", "--program", "streamed"]
    return [*sides, "--state", out.with_name("state"), "--json", out / "report.json"]


REPORTS = (Subject("parity --state", _parity, "report", leaving_out=".report.json", appears=False),)


def make_inputs(folder: Path, zygote: Zygote, *, recorded: bool) -> None:
    """The checkpoint, its conversions and a golden below ``folder``: one of it if it can be recorded, or the demo's."""
    write_checkpoint(folder / "hf", tiny_config(**MICRO), mtp=False)
    write_checkpoint(folder / "v41", {**tiny_v41_config(**MICRO_V41), "vision_config": None}, mtp=False)
    for dtype in ("source", "bfloat16"):
        made = zygote.run(folder, ["convert", "hf-to-orbax", folder / "hf", folder / dtype, "--dtype", dtype])
        assert made.code == 0, made
    if not recorded:
        shutil.copytree(Path(golden.__file__).parent / "data" / "tiny", folder / "golden")
        return
    write_checkpoint(folder / "deep", tiny_config(**DEEP), mtp=False)
    made = zygote.run(folder, ["golden", "record", folder / "hf", "--out", folder / "golden", "--random", "7"])
    assert made.code == 0, made


def fresh(root: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    return root

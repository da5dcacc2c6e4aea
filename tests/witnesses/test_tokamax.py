"""tokamax's DeepSeek-V4 ops against a golden, by the worked example of docs/tokamax.md: healthy and with faults.

Needs tokamax, and DSV4_TOKAMAX_GOLDEN or what records a golden. Run by ``nox -s witnesses``.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from xml.etree import ElementTree as ET

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from dsv4_convert import Weights
from dsv4_convert.cli import app
from dsv4_convert.parity.activations import Expected, as_text
from dsv4_convert.parity.report.data import ParityReport

if TYPE_CHECKING:
    from docs.examples.tokamax_ops.ops import Layer, Op

pytestmark = [pytest.mark.witness, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "tokamax_ops"
PAGE = ROOT / "docs" / "tokamax.md"

#: By op and what is checked of it: which argument is changed, by place or name, and how. Every fault is one that people
#: make: an axis transposed, a table off by one, a bias in the wrong row, an epsilon of another config.
FAULTS: dict[str, tuple[str, int | str, Callable[[Any], Any]]] = {
    "mhc_pre": ("mhc_pre", 2, lambda scale: scale[::-1]),
    "mhc_post": ("mhc_post", 3, lambda comb: comb.swapaxes(1, 2)),
    "mhc_fused_post_pre": ("mhc_fused_post_pre", 3, lambda comb: comb.swapaxes(1, 2)),
    "deepseek_rope": ("deepseek_rope", "inverse", lambda inverse: not inverse),
    "deepseek_rope, qnorm_rope": ("deepseek_rope", "eps", lambda eps: eps / 1000),
    "deepseek_rope, rope_quant": ("deepseek_rope", 1, lambda positions: positions[::-1]),
    "proj_and_save_state": ("proj_and_save_state", 2, lambda ape: jnp.roll(ape, 1, axis=0)),
    "dsv4_compressor, CSA": ("dsv4_compressor", "cos_sin_cache", lambda table: jnp.roll(table, -1, axis=0)),
    "dsv4_compressor, HCA": ("dsv4_compressor", "rms_eps", lambda eps: 100 * eps),
    "dsv4_compressor, indexer": ("dsv4_compressor", 5, lambda weight: weight[::-1]),
    "lightning_indexer, decoding": ("lightning_indexer", 1, lambda weights: jnp.roll(weights, 1, axis=1)),
    "csa_gather": ("csa_gather", 2, lambda indices: indices[::-1]),
    "sparse_mla": ("sparse_mla", 7, lambda sink: 0 * sink - 1e9),
    "grouped_lowrank_proj": ("grouped_lowrank_proj", "inverse", lambda _: False),
    "grouped_lowrank_proj, quantize_activations": ("grouped_lowrank_proj", 3, lambda codes: codes[:, ::-1]),
    "router_topk": ("router_topk", 0, lambda scores: scores[::-1]),
    "ragged_dot": ("ragged_dot", 2, lambda sizes: jnp.roll(sizes, 1)),
}


class Prepared:
    """The checkpoint, its conversion and the golden, made as the page says; and what is checked with them."""

    def __init__(self, folder: Path) -> None:
        self.orbax, self.golden = folder / "orbax", folder / "golden"
        config = str(EXAMPLE / "config.json")
        commands = [
            ["golden", "make-checkpoint", str(folder / "hf"), "--config", config],
            ["convert", "hf-to-orbax", str(folder / "hf"), str(self.orbax)],
        ]
        if (recorded := os.environ.get("DSV4_TOKAMAX_GOLDEN")) is not None:  # where there is no PyTorch to record it
            self.golden = Path(recorded)
        else:
            commands.append(["golden", "record", str(folder / "hf"), "--out", str(self.golden), "--random", "262"])
        for command in commands:
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.output
        self.expected = Expected(self.golden)
        self.read = Weights.open(self.orbax).read

    def layers(self, op: Op) -> list[Layer]:
        from docs.examples.tokamax_ops.ops import Layer

        layers = (Layer(self.expected, self.read, number, "xla") for number in self.expected.layers)
        return [layer for layer in layers if layer.kind in op.kinds]

    def report(self, op: Op, layer: Layer, dtype: str) -> ParityReport:
        found = {tap: np.asarray(value)[None] for tap, value in op.run(layer, dtype).items()}
        return self.expected.report(found, layer=layer.number, dtype=dtype)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    assert version("tokamax") == "0.0.17"
    return Prepared(tmp_path_factory.mktemp("tokamax"))


def test_one_command_certifies_every_op(prepared: Prepared, tmp_path: Path) -> None:
    from docs.examples.tokamax_ops.ops import OPS

    command = ["-m", "pytest", "-p", "dsv4_convert.pytest_plugin", "-c", os.devnull, "--rootdir=.", str(EXAMPLE)]
    options = ["--dsv4-golden", str(prepared.golden), "-p", "no:cacheprovider", "--junit-xml=out.xml"]
    environment = os.environ | {
        "CHECKPOINT": str(prepared.orbax),
        "PYTHONPATH": str(ROOT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    ran = subprocess.run(
        [sys.executable, *command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    cases = list(ET.parse(tmp_path / "out.xml").iter("testcase"))
    assert {case.get("name") for case in cases} == {f"test_an_op[{name}]" for name in OPS}
    assert not [case for case in cases if len(case)]


def test_the_page_shows_what_is_measured(prepared: Prepared) -> None:
    """A row per op with the worst of its taps, in multiples of the noise floor, or its ties."""
    from docs.examples.tokamax_ops.ops import MISFITS, OPS

    rows = [[cell.strip() for cell in line.split("|")] for line in PAGE.read_text(encoding="utf-8").splitlines()]
    shown = {(row[1].strip("`"), row[4]): row[5] for row in rows if len(row) > 6 and row[1].strip("`") in OPS}
    assert shown.keys() == {(name, dtype) for name, op in OPS.items() for dtype in op.dtypes}
    assert all(f"`{name}`" in PAGE.read_text(encoding="utf-8") for name in MISFITS)
    for (name, dtype), figure in shown.items():
        op = OPS[name]
        taps = [tap for layer in prepared.layers(op) for tap in prepared.report(op, layer, dtype).taps]
        noise = max((tap.distance.noise.tap for tap in taps if tap.distance is not None), default=None)
        if noise is None:
            ties = sum(tap.flips.tokens for tap in taps if tap.flips is not None)
            assert figure == (f"{ties} ties" if ties else "equal"), name
        else:
            assert float(figure) == pytest.approx(noise, rel=0.3, abs=0.01), name


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_an_op_shows(prepared: Prepared, name: str) -> None:
    from docs.examples.tokamax_ops.ops import OPS, ops

    op, (function, place, change) = OPS[name], FAULTS[name]
    right = getattr(ops, function)

    def wrong(*arguments: Any, **options: Any) -> Any:
        given: Any = list(arguments)
        where = given if isinstance(place, int) else options
        where[place] = change(where.get(place) if isinstance(where, dict) else where[place])  # type: ignore[index]
        return right(*given, **options)

    with patch.object(ops, function, wrong):
        reports = [prepared.report(op, layer, dtype) for layer in prepared.layers(op) for dtype in op.dtypes]
    assert not all(op.agrees(report) for report in reports)


def test_every_op_has_a_fault() -> None:
    from docs.examples.tokamax_ops.ops import OPS

    assert FAULTS.keys() == OPS.keys()


def test_a_prompt_at_once_still_shows_the_indexer_the_block_of_the_token(prepared: Prepared) -> None:
    """Right is what transformers and the release do: entry b from token 4 b + 3 on, that of the complete block."""
    from docs.examples.tokamax_ops.ops import MISFITS

    op = MISFITS["lightning_indexer, prompt"]
    (layer,) = prepared.layers(op)
    report = prepared.report(op, layer, "bfloat16")
    assert not report.passed
    assert f"\n{as_text(report).splitlines()[0]}\n" in PAGE.read_text(encoding="utf-8")
    chosen = np.asarray(op.run(layer, "bfloat16")["attn.indexer.chosen"])
    assert 0 in chosen[0], "token 0 sees the entry of tokens 0 to 3"
    early = [token for token, entries in enumerate(chosen) if (entries >= (token + 1) // layer.ratio).any()]
    assert len(early) > 50
    assert all(set(entries[entries >= (token + 1) // 4]) <= {token // 4} for token, entries in enumerate(chosen))


def test_what_does_not_fit_still_does_not(prepared: Prepared) -> None:
    """Each of these is a sentence of the page. Where one fails, a newer tokamax can do more: check that, too."""
    from docs.examples.tokamax_ops.ops import OPS, ops

    for name in ("mhc_pre", "mhc_post", "mhc_fused_post_pre", "grouped_lowrank_proj"):
        layer = prepared.layers(OPS[name])[0]
        with pytest.raises(ValueError, match="float32"):
            OPS[name].run(layer, "float32")
    narrow = np.zeros((4, 16), np.float32)
    with pytest.raises(ValueError, match="multiple of 128"):
        ops.deepseek_rope(narrow, np.arange(4, dtype=np.int32), np.zeros((4, 8), np.float32), implementation="xla")
    (layer,) = prepared.layers(OPS["sparse_mla"])
    with patch("docs.examples.tokamax_ops.ops.BLOCK", 1), pytest.raises(ValueError, match="a positive multiple of 128"):
        OPS["sparse_mla"].run(layer, "bfloat16")
    assert "attention_sinks" not in inspect.signature(ops.masked_dense_mla).parameters
    assert "limit" not in inspect.signature(ops.ragged_dot).parameters

"""MaxText's activations against a golden: the example of docs/maxtext.md, and faults planted in MaxText's own code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_convert.convert import Layout, Storage, hf_to_orbax
from dsv4_convert.model.rope import frequencies
from dsv4_convert.spec.config import Config
from golden.synthetic import make_checkpoint
from parity.activations import Expected

from ..documentation import Block, Command, blocks, commands, unlike

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "maxtext"
PAGE = ROOT / "docs" / "maxtext.md"

#: MaxText warns of its own and Flax's deprecations, already when it is imported.
pytestmark = [pytest.mark.witness, pytest.mark.filterwarnings("ignore")]

#: Fault of ``maxtext_faults`` -> a layer that has it, and the tap that it has to be named at. Layer 0 is window-only
#: and routed by a table, layer 1 is CSA, layer 2 is HCA; both of these route by scores.
FAULTS: dict[str, tuple[int | None, str]] = {
    "streams_not_normed": (0, "hc_attn.pre"),
    "spreading_not_doubled": (0, "hc_attn.post"),
    "mixing_transposed": (0, "hc_attn.comb"),
    "mixing_not_iterated": (1, "hc_attn.comb"),
    "query_heads_not_normed": (0, "attn.q"),
    "half_split_rotation": (0, "attn.q_rope"),
    "one_base_for_all_layers": (2, "attn.q_rope"),
    "blocks_do_not_overlap": (1, "attn.compressor.pooled"),
    "no_position_in_block": (1, "attn.compressor.pooled"),
    "entries_at_the_end_of_their_block": (1, "attn.compressor.entries"),
    "indexer_without_relu": (1, "attn.indexer.scores"),
    "indexer_takes_the_lowest": (1, "attn.indexer.chosen"),
    "no_sink": (0, "attn.context"),
    "window_one_longer": (2, "attn.context"),
    "unfinished_blocks_seen": (2, "attn.context"),
    "inverse_rotation_forwards": (2, "attn.context_unrotated"),
    "groups_in_another_order": (0, "attn.wo_a"),
    "sigmoid_scores": (2, "ffn.gate.scores"),
    "experts_without_their_bias": (2, "ffn.gate.experts"),
    "experts_of_the_token_before": (0, "ffn.gate.experts"),
    "weights_with_their_bias": (1, "ffn.gate.weights"),
    "weights_not_scaled": (0, "ffn.gate.weights"),
    "routed_experts_not_clamped": (1, "ffn.experts"),
    "shared_expert_twice": (0, "ffn"),
    "head_not_summed": (None, "hc_head"),
}


def _pytest(block: Block) -> list[Command]:
    """The commands of a block that run pytest."""
    return [each for each in commands(block) if "pytest" in each.words] if block.language == "console" else []


@pytest.fixture(scope="module")
def orbax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the example, as the page makes it."""
    folder = tmp_path_factory.mktemp("maxtext")
    make_checkpoint(folder / "checkpoint", config=EXAMPLE / "config.json")
    hf_to_orbax(folder / "checkpoint", folder / "orbax", storage=Storage.FLOAT32, layout=Layout.MAXTEXT_UNSCANNED)
    return folder / "orbax"


@pytest.fixture(scope="module")
def golden() -> Expected:
    return Expected(EXAMPLE / "golden")


@pytest.fixture(scope="module")
def run() -> Any:
    """MaxText, which is imported only where a test needs it."""
    return importlib.import_module(".maxtext_run", __package__)


@pytest.fixture(scope="module")
def compute(run: Any, orbax: Path, golden: Expected) -> Callable[..., dict[str, Any]]:
    """The activations of one layer, patched as the page says, with a fault or without."""
    model = run.load(orbax, scanned=False, tokens=golden.tokens.shape[1])
    adapter, faults = run.example("adapter"), importlib.import_module(".maxtext_faults", __package__)

    def activations(layer: int | None, fault: str | None = None) -> dict[str, Any]:
        with run.corrected(golden.config), getattr(faults, fault)() if fault else nullcontext():
            return adapter.activations(model, layer, golden.input(layer), golden.tokens, golden.positions)

    return activations


@pytest.mark.parametrize(("layer", "missing"), [(0, "input"), (1, "input"), (2, "input"), (None, "hc_head.pre")])
def test_patched_all_taps_but_one_are_there_and_pass(
    compute: Callable[..., dict[str, Any]], golden: Expected, layer: int | None, missing: str
) -> None:
    report = golden.check(compute(layer), layer=layer)
    prefix = "" if layer is None else f"layers.{layer}."
    assert {*golden.names(layer)} - {tap.name for tap in report.taps} == {prefix + missing}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(compute: Callable[..., dict[str, Any]], golden: Expected, fault: str) -> None:
    layer, tap = FAULTS[fault]
    report = golden.report(compute(layer, fault), layer=layer)
    assert report.first_diverging is not None, "not found"
    assert report.first_diverging.short == tap


def test_the_patch_gives_the_published_table(run: Any) -> None:
    """At the width of V4-Flash MaxText's ramp and ours agree, and differ from no YaRN as the page says."""
    config = Config.from_file(ROOT / "tests" / "data" / "configs" / "DeepSeek-V4-Flash.json")
    plain = run.frequencies(config)
    with run.corrected(config):
        patched = run.frequencies(config)
    np.testing.assert_allclose(patched, frequencies(config, compressed=True), rtol=1e-6)
    np.testing.assert_allclose(plain, frequencies(dataclasses.replace(config, yarn=None), compressed=True), rtol=1e-6)
    lower = plain / patched
    assert (lower > 1 + 1e-6).tolist() == [pair > 15 for pair in range(32)]
    assert np.isclose(lower, 16, rtol=1e-6).tolist() == [pair >= 25 for pair in range(32)]


def test_every_fault_is_planted_and_on_the_page() -> None:
    code = ast.parse((Path(__file__).parent / "maxtext_faults.py").read_text(encoding="utf-8"))
    functions = {node.name: ast.get_docstring(node) for node in code.body if isinstance(node, ast.FunctionDef)}
    assert {name for name in functions if not name.startswith("_")} == {*FAULTS}
    page = PAGE.read_text(encoding="utf-8")
    assert f"{len(FAULTS)} more mistakes were planted" in page
    for fault, (layer, tap) in FAULTS.items():
        where = "head" if layer is None else layer
        assert f"| {str(functions[fault]).removesuffix('.')} | {where} | `{tap}` |" in page


@pytest.mark.parametrize(
    "example",
    [command for block in blocks(PAGE, ROOT) for command in _pytest(block)],
    ids=lambda example: example.where,
)
def test_the_page_shows_what_is_printed(example: Command, orbax: Path) -> None:
    first = example.words.index("pytest")
    given = dict(word.split("=", 1) for word in example.words[:first])
    environment = {**os.environ, **given, "CHECKPOINT": str(orbax), "NO_COLOR": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *example.words[first + 1 :]]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == (" failed" in example.shown), done.stdout + done.stderr
    missing = unlike(example.shown, done.stdout)
    assert missing is None, f"{done.stdout}\nand not what the page shows:\n{missing}"

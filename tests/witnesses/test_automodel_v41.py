"""NeMo Automodel 0.7.0's DeepSeek-V4.1, in PyTorch: names, weights, activations and logits.

Needs an environment of its own: tests/witnesses/automodel-requirements.txt. Run by ``nox -s witnesses``.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from dsv4_convert.golden.noise import MODES
from dsv4_convert.golden.synthetic import random_v41_architecture, tiny_v41_config, write_checkpoint
from dsv4_convert.model import Taps
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import TapKey, taps_of
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.restore import restore_model

from ..activations import differing
from ..parity.faults.fault import Held, uncompiled
from ..parity.v41 import recorded

pytestmark = [pytest.mark.witness, pytest.mark.filterwarnings("ignore")]

TOKENS = 40
#: Largest relative error of a tap, root mean square over root mean square. Measured: 1e-7 to 3e-6.
LIMIT = 1e-5
#: Taps that no module of Automodel ends with.
OUT_OF_REACH = {
    *("input", "input.pre", "input.entries", "input.keys", "input.chosen", "input.candidates"),
    *("engram.key", "engram.value", "engram.gate", "attn.q_rope", "attn.kv_rope", "attn.compressor.wkv"),
    *("attn.compressor.wgate", "attn.indexer.q_rope", "attn.indexer.scores", "attn.context", "ffn.gate.logits"),
    *("ffn.gate.scores", "ffn.gate.experts", "ffn.gate.weights", "ffn.experts", "ffn.shared_experts"),
    "hc_head.collapsed",
}


@pytest.fixture(scope="module", autouse=True)
def torch() -> Any:
    """torch without its compiler, which takes a minute for what runs once."""
    import torch

    assert version("nemo-automodel") == "0.7.0"
    torch.compiler.set_stance("force_eager")
    return torch


def ours(folder: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Every tap by dsv4's model."""

    def run(model: Any, ids: Any) -> dict[str, Any]:
        taps = Taps(lambda _: True)
        model(ids, taps=taps)
        return taps.values

    with jax.default_matmul_precision("highest"):
        found = nnx.jit(run)(restore_model(PublishedWeights.open(folder)), ids)
    return {name: np.asarray(value) for name, value in found.items()}


def tokens_of(raw: dict[str, Any]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, raw["text_config"]["vocab_size"], (2, TOKENS)).astype(np.int32)


@pytest.mark.parametrize(
    "seed", [None, *range(6), *(pytest.param(n, marks=pytest.mark.thorough) for n in range(6, 36))]
)
def test_every_tap_is_that_of_automodel(seed: int | None, tmp_path: Path) -> None:
    from .automodel_v41 import AutomodelV41

    raw = tiny_v41_config(index_n_heads=64) if seed is None else random_v41_architecture(seed)
    write_checkpoint(tmp_path / "hf", raw, seed=seed or 0)
    theirs = AutomodelV41(tmp_path / "hf")
    assert theirs.keys.missing_keys == theirs.keys.unexpected_keys == []
    ids = tokens_of(raw)
    found, expected = ours(tmp_path / "hf", ids), theirs.taps(ids)
    assert differing(found, expected, LIMIT) == []
    config = Config.from_hf(raw)
    layers = (None, *range(config.num_hidden_layers))
    all_taps = {str(TapKey(layer, tap)): tap.name for layer in layers for tap in taps_of(config, layer)}
    assert found.keys() == all_taps.keys()
    assert expected.keys() == {name for name, tap in all_taps.items() if tap not in OUT_OF_REACH}


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.thorough) for n in range(1, 31))])
def test_parity_with_what_automodel_computes_is_at_the_noise_floor(seed: int, tmp_path: Path) -> None:
    """Streamed layer by layer, in both modes; taps out of Automodel's reach are dsv4's own."""
    from .automodel_v41 import AutomodelV41

    raw = random_v41_architecture(seed)
    write_checkpoint(tmp_path / "hf", raw, seed=seed)
    ids = tokens_of(raw)
    held = Held.read_from(PublishedWeights.open(tmp_path / "hf"))
    golden = recorded(held, tmp_path / "golden", ids, known=AutomodelV41(tmp_path / "hf").taps(ids))
    with uncompiled():
        report = ParityRun(held, golden, ParityOptions(modes=MODES)).run()
    assert report.passed, verdict(report)
    assert report.count(Verdict.TIE) == 0
    worst = max((tap.distance.noise.row, tap.name) for tap in report.taps if tap.distance is not None)
    print(f"architecture {seed}: {len(report.taps)} taps, worst row {worst[0]:.1f} noise floors in {worst[1]}")


@pytest.mark.parametrize(
    ("name", "other", "tap"),
    [
        ("layers.1.engram.embed.scale", None, "layers.1.engram.streams"),
        ("layers.1.engram.q_weight", None, "layers.1.engram.streams"),
        (
            "layers.2.attn.compressor.wgate.weight",
            "layers.2.attn.compressor.wkv.weight",
            "layers.2.attn.compressor.pooled",
        ),
        ("layers.2.attn.wkv.scale", None, "layers.2.attn.wkv"),
        ("layers.4.attn.indexer.k_norm.weight", None, "layers.4.attn.indexer.k_norm"),
        ("layers.1.ffn.experts.0.w1.weight", "layers.1.ffn.experts.1.w1.weight", "layers.1.ffn"),
    ],
)
def test_a_wrong_tensor_shows_at_its_tap(name: str, other: str | None, tap: str, tmp_path: Path) -> None:
    from .automodel import published
    from .automodel_v41 import AutomodelV41

    raw = tiny_v41_config(index_n_heads=64)
    write_checkpoint(tmp_path / "hf", raw, seed=0)
    tensors = published(tmp_path / "hf")
    changed = tensors[other] if other else -1 * tensors[name].float() if "weight" in name else 2 * tensors[name].float()
    swapped = tensors | {name: changed} | ({other: tensors[name]} if other else {})
    ids = tokens_of(raw)
    wrong = differing(ours(tmp_path / "hf", ids), AutomodelV41(tmp_path / "hf", swapped).taps(ids), LIMIT)
    order = [str(TapKey(layer, row)) for layer in range(7) for row in taps_of(Config.from_hf(raw), layer)]
    assert min(wrong, key=lambda each: order.index(each) if each in order else len(order)) == tap


def test_its_draft_stages_compute_what_was_recorded(tmp_path: Path) -> None:
    """tests/model/test_dspark_v41.py compares dsv4's with the recording."""
    from safetensors.numpy import load_file

    from ..model.drafting_v41 import CONFIG, LENGTHS, RECORDED, SEED, inputs
    from .automodel_v41_drafts import DrafterV41

    write_checkpoint(tmp_path / "hf", CONFIG, seed=SEED)
    drafter = DrafterV41(tmp_path / "hf")
    assert drafter.keys.missing_keys == drafter.keys.unexpected_keys == []
    known = load_file(RECORDED)
    found = {f"{tokens}/{name}": value for tokens in LENGTHS for name, value in drafter.run(*inputs(tokens)).items()}
    assert found.keys() == known.keys()
    assert [name for name, value in found.items() if not np.allclose(value, known[name], atol=2e-5, rtol=2e-5)] == []

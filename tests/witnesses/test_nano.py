"""nano-deepseek-v4 0.2.0, a negative control: a model of its own kind from the same weights, which must not pass.

Installed beside NeMo Automodel. Run by ``nox -s witnesses``.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from dsv4_convert.golden.archive import open_golden
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.parity.activations import compare_activations

pytestmark = [pytest.mark.witness, pytest.mark.filterwarnings("ignore")]

GOLDEN = Path(__file__).parents[2] / "golden" / "data" / "tiny"


def test_another_model_is_told_apart_at_its_first_difference(tmp_path: Path) -> None:
    """Its weights load and its logits are of the right size. The mixing of streams is another one: ``post`` is
    sigmoid(x) + eps instead of 2 sigmoid(x), ``comb`` starts from sigmoids instead of a softmax."""
    import torch
    from nano_deepseek_v4.checkpoint import load_deepseek_official_checkpoint
    from nano_deepseek_v4.config import DeepSeekV4Config
    from nano_deepseek_v4.modeling import DeepSeekV4ForCausalLM

    assert version("nano-deepseek-v4") == "0.2.0"
    write_checkpoint(tmp_path / "hf", tiny_config(), seed=0)
    model = DeepSeekV4ForCausalLM(DeepSeekV4Config.from_official_json(tmp_path / "hf" / "config.json")).eval()
    assert load_deepseek_official_checkpoint(model, tmp_path / "hf").unexpected_keys == []

    golden, found = open_golden(GOLDEN), {}
    names = ("hc_attn.post", "hc_attn.comb", "hc_attn.collapsed")
    hook = model.model.layers[0].attn_hc.register_forward_hook(
        lambda module, given, output: found.update(zip(names, output, strict=True))
    )
    with torch.no_grad():
        logits = model(torch.tensor(golden.tokens).long()).logits.numpy()
    hook.remove()
    expected = golden.read("logits")
    error = np.sqrt(np.mean((logits - expected) ** 2) / np.mean(expected**2))
    assert 0.3 < error < 0.8

    report = compare_activations(found, golden, layer=0)
    assert [tap.name for tap in report.taps if not tap.passes] == ["layers.0.hc_attn.post", "layers.0.hc_attn.comb"]
    halved = golden.read("layers.0.hc_attn.post") / 2 + golden.config.hc_eps
    np.testing.assert_allclose(found["hc_attn.post"].numpy(), halved, atol=1e-6)

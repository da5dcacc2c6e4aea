"""The compiled layer of a parity run through TPU compilers: with taps and without, whole prompts and decoding."""

from __future__ import annotations

import pytest

from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import taps_of
from tests.aot.parity_layer import Job, compile_layer

#: Widths that a TPU's tiles like; a window-only layer, then twice a CSA and an HCA layer.
RAW = tiny_config(
    num_hidden_layers=5,
    num_hash_layers=1,
    compress_ratios=[0, 4, 128, 4, 128, 0],
    hidden_size=256,
    head_dim=128,
    moe_intermediate_size=256,
    n_routed_experts=8,
    q_lora_rank=128,
    o_lora_rank=128,
    quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
)
LAYER, PROMPTS, TOKENS = 3, 4, 256


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("where", "mesh", "decode", "recorded", "scanned", "encoded"),
    [
        ("v5p-8", {"fsdp": 2, "expert": 2}, False, True, False, False),
        ("v5p-8", {"fsdp": 2, "expert": 2}, False, False, False, False),
        ("v5p-8", {"fsdp": 2, "expert": 2}, True, True, True, False),
        ("v6e-4", {"expert": 2, "sequence": 2}, False, True, True, False),
        ("v6e-4", {"expert": 2, "sequence": 2}, False, False, True, False),
        ("v6e-4", {"data": 4}, True, True, False, True),
        ("v5p-8", {"expert": 4}, False, False, True, True),
    ],
)
def test_it_compiles_for_a_slice(
    where: str, mesh: dict[str, int], decode: bool, recorded: bool, scanned: bool, encoded: bool
) -> None:
    config = Config.from_hf(RAW)
    compiled = compile_layer(
        config,
        Job(
            layer=LAYER,
            where=where,
            mesh=mesh,
            prompts=PROMPTS,
            tokens=TOKENS,
            decode=decode,
            recorded=recorded,
            scanned=scanned,
            encoded=encoded,
        ),
    )
    left, values, after = compiled.out_info
    assert left.shape == (PROMPTS, 1 if decode else TOKENS, config.hc_mult, config.hidden_size)
    wanted = {tap.name for tap in taps_of(config, LAYER)} - {"attn.indexer.scores"}
    assert set(values) == (wanted if recorded else set())
    assert bool(after) == decode

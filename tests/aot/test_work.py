"""Counted operations, against torch's counter on transformers' model and against a plain count of what is seen."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4_convert.aot.program import first_layers
from dsv4_convert.aot.work import operations
from dsv4_convert.golden.synthetic import tiny_config, tiny_v41_config
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.kinds import AttentionKind

RAW = tiny_config(hidden_size=256, moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4)


def _config() -> Config:
    return dataclasses.replace(Config.from_hf(copy.deepcopy(RAW)), num_mtp_stages=0)


def test_one_token_is_what_torch_counts() -> None:
    """All matrix products of one token; torch has the mixing of the streams too, two 4 by 4 matrices a layer."""
    settings = DeepseekV4Config(**copy.deepcopy(RAW), attn_implementation="eager")
    settings._experts_implementation = "eager"  # the others are not counted
    model = DeepseekV4ForCausalLM(settings).eval()
    for name, table in model.named_buffers():
        if "tid2eid" in name:
            table.copy_(torch.stack([torch.randperm(16)[:4] for _ in range(len(table))]))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.tensor([[5]]))
    config = _config()
    mixing = 2 * config.num_hidden_layers * 2 * config.hc_mult**2 * config.hidden_size
    assert operations(config, tokens=1, decode=False) == counter.get_total_flops() - mixing


@pytest.mark.parametrize("tokens", [1, 40])
def test_v41_looks_up_its_tables_and_multiplies_with_the_rest(tokens: int) -> None:
    """A table of any size costs the same; the products of one token are counted from shapes here."""
    raw = tiny_v41_config()
    config = first_layers(Config.from_hf(raw), 7)
    larger = first_layers(Config.from_hf(tiny_v41_config(engram_vocab_size=5000)), 7)
    counted = operations(config, tokens=tokens, decode=False)
    assert counted == operations(larger, tokens=tokens, decode=False)
    assert counted == sum(operations(config, tokens=count, decode=True) for count in range(1, tokens + 1))
    text = raw["text_config"]
    rows = 3 * text["engram_n_heads"] * text["engram_head_dim"]
    without = first_layers(Config.from_hf(tiny_v41_config(engram_layer_ids=[])), 7)
    engrams = 2 * 2 * rows * (text["hc_mult"] + 1) * text["hidden_size"]
    assert counted == operations(without, tokens=tokens, decode=False) + tokens * engrams


@pytest.mark.parametrize("tokens", [1, 20, 150])
def test_attention_is_counted_by_what_is_seen(tokens: int) -> None:
    config = _config()
    steps = [operations(config, tokens=count, decode=True) for count in range(1, tokens + 1)]
    assert operations(config, tokens=tokens, decode=False) == sum(steps)
    keys = 0
    for kind in config.attention:
        keys += sum(1 for before in range(tokens) if tokens - 1 - before < config.sliding_window)
        if kind is not AttentionKind.SLIDING:
            closed = sum(1 for token in range(tokens) if (token + 1) % config.ratio(kind) == 0)
            keys += min(closed, config.index_topk) if kind is AttentionKind.CSA else closed
    csa = sum(kind is AttentionKind.CSA for kind in config.attention)
    indexed = csa * (tokens // 4) * 2 * config.index_n_heads * config.index_head_dim
    attended = keys * 4 * config.num_attention_heads * config.head_dim
    first = steps[0] - 4 * config.num_attention_heads * config.head_dim * len(config.attention)
    assert steps[-1] == first + attended + indexed

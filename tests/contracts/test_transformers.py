"""The parts of transformers' DeepSeek-V4 that recording relies on, and that no public interface promises."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import DeepseekV4Config, DynamicCache
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from dsv4_convert.golden.references.probes import LAYER_PROBES
from dsv4_convert.golden.synthetic import tiny_config

#: Modules that only some kinds of layer have.
INDEXER, COMPRESSOR = "self_attn.compressor.indexer", "self_attn.compressor"


@pytest.fixture(scope="module")
def config() -> DeepseekV4Config:
    return DeepseekV4Config.from_dict(tiny_config(), attn_implementation="eager", experts_implementation="eager")


def test_every_probe_has_its_module_in_a_layer_of_every_kind(config: DeepseekV4Config) -> None:
    paths = {probe.module for probe in LAYER_PROBES.values()}
    absent = {
        "sliding_attention": COMPRESSOR,
        "heavily_compressed_attention": INDEXER,
        "compressed_sparse_attention": "-",
    }
    assert set(config.layer_types) == set(absent)
    for layer, kind in enumerate(config.layer_types):
        with torch.device("meta"):
            modules = {name for name, _ in modeling.DeepseekV4DecoderLayer(config, layer).named_modules()}
        assert {path for path in paths if not path.startswith(absent[kind])} <= modules


def test_a_layer_passes_its_cache_on_by_one_of_two_names() -> None:
    names = {"past_key_values", "cache"} & set(inspect.signature(modeling.DeepseekV4Attention.forward).parameters)
    assert len(names) == 1


def test_attention_is_looked_up_in_its_file_when_it_is_called() -> None:
    """The probe replaces the function there."""
    assert "query" in inspect.signature(modeling.eager_attention_forward).parameters
    names = inspect.unwrap(modeling.DeepseekV4Attention.forward).__globals__
    assert names["eager_attention_forward"] is modeling.eager_attention_forward


def test_a_mask_is_made_by_position(config: DeepseekV4Config) -> None:
    """The fourth argument, the cache, has another name in each release."""
    cache = DynamicCache(config=config)
    cache.update(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 4, 1), 0)
    mask = create_sliding_window_causal_mask(config, torch.empty(1, 2, 1), None, cache, torch.arange(4, 6)[None])
    assert mask.shape == (1, 1, 2, 6)


def test_the_cache_keeps_what_state_is_read_from(config: DeepseekV4Config) -> None:
    parts = {"buffer_kv", "buffer_gate", "overlap_kv", "overlap_gate"}
    found: list[Any] = [
        layer
        for layer, kind in zip(DynamicCache(config=config).layers, config.layer_types, strict=True)
        if kind == "compressed_sparse_attention"
    ]
    assert found
    for layer in found:
        assert parts <= set(vars(layer))
        assert set(layer.buffer_kv) == {"compressor", "indexer"}


def test_what_stays_float32_is_listed_by_name() -> None:
    kept = modeling.DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict
    assert {"attn_hc", "ffn_hc", "hc_head", "sinks", "position_bias", "e_score_correction_bias"} <= set(kept)

"""Small models of DeepSeek-V4.1 for tests: their configs, weights and tokenizer, the same on every machine."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from random import Random
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_convert.model.architectures import model_of
from dsv4_convert.model.ops import Derived
from dsv4_convert.spec.names import parameters
from dsv4_convert.spec.v41.config import EngramConfig, V41Config
from dsv4_convert.spec.v41.ngrams import ngram_hash

Weights = dict[str, np.ndarray]
#: Fields of a published ``text_config`` that small models share with the release.
_FIXED = {
    "model_type": "deepseek_v41_text",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-20,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 1.0,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "max_position_embeddings": 1024,
    "engram_max_ngram_size": 4,
    "engram_pad_token_id": 2,
    "num_nextn_predict_layers": 0,
}


def raw_config(**changes: Any) -> dict[str, Any]:
    """A published config of six layers, one of every kind; the fields of ``text_config`` may change."""
    text = _FIXED | {
        "vocab_size": 96,
        "hidden_size": 32,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 12,
        "o_groups": 2,
        "o_lora_rank": 6,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "compress_ratios": [0, 2, 2, 1, 1, 1],
        "kv_source_layer_ids": [1, 3],
        "index_source_layer_ids": [1, 3, 5],
        "candidate_source_layer_id": 3,
        "candidate_topk_blocks": 3,
        "candidate_block_size": 4,
        # Fewer heads give exact zeros, and ties between them are broken in other ways elsewhere.
        "index_n_heads": 64,
        "index_head_dim": 16,
        "index_topk": 5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 64,
        },
        "engram_layer_ids": [0, 1],
        "engram_vocab_size": 100,
        "engram_n_heads": 3,
        "engram_head_dim": 8,
        **changes,
    }
    layers = text["engram_layer_ids"]
    text["engram_compressed_vocab_size"] = -(-text["vocab_size"] // 2)
    sizes = ("max_ngram_size", "vocab_size", "n_heads", "head_dim", "pad_token_id", "compressed_vocab_size")
    engram = EngramConfig(
        layer_ids=tuple(layers),
        num_embeddings=(1,) * len(layers),
        tables=tuple(range(len(layers))),
        published_layer_ids=tuple(layers),
        **{name: text[f"engram_{name}"] for name in sizes},
    )
    text["engram_num_embeddings"] = [sum(ngram_hash(engram, index).primes) for index in range(len(layers))]
    return {"model_type": "deepseek_v41", "image_token_id": 3, "text_config": text}


def random_config(seed: int) -> dict[str, Any]:
    """Another width, another order of layers, another number of everything."""
    draw = Random(seed)
    heads, rope = draw.choice((2, 4, 6)), draw.choice((2, 4, 8))
    experts, window = draw.randint(2, 9), draw.choice((3, 6, 17))
    ratios, sources, choosers = [0] * draw.randint(0, 2), [], []
    for ratio in draw.choice(([2, 1], [2, 2, 1], [1], [2], [1, 2, 1])):
        sources.append(len(ratios))
        choosers.append(len(ratios))
        ratios += [ratio]
        for _ in range(draw.randint(1, 3)):
            choosers += [len(ratios)] if draw.random() < 0.5 else []
            ratios += [ratio]
    size, topk = draw.choice((1, 3, 4)), draw.randint(2, 9)
    return raw_config(
        vocab_size=draw.choice((31, 64, 101)),
        hidden_size=draw.choice((32, 48)),
        moe_intermediate_size=draw.choice((24, 40)),
        num_hidden_layers=len(ratios),
        num_attention_heads=heads,
        head_dim=draw.choice((12, 16, 24)),
        qk_rope_head_dim=rope,
        q_lora_rank=draw.choice((8, 20)),
        o_groups=draw.choice([groups for groups in (1, 2) if heads % groups == 0]),
        o_lora_rank=draw.choice((4, 10)),
        n_routed_experts=experts,
        num_experts_per_tok=draw.randint(1, min(4, experts)),
        sliding_window=window,
        compress_ratios=ratios,
        kv_source_layer_ids=sources,
        index_source_layer_ids=choosers,
        candidate_source_layer_id=draw.choice((-1, sources[-1])),
        candidate_topk_blocks=-(-topk // size) + draw.randint(1, 3),
        candidate_block_size=size,
        index_head_dim=draw.choice((8, 16)),
        index_topk=topk,
        engram_layer_ids=sorted(draw.sample(range(len(ratios)), draw.randint(1, 2))),
        engram_max_ngram_size=draw.randint(2, 4),
        engram_vocab_size=draw.choice((50, 1000)),
        engram_n_heads=draw.randint(1, 4),
    )


def config_of(raw: dict[str, Any]) -> V41Config:
    """The architecture of a raw config."""
    config = V41Config.from_hf(raw)
    assert isinstance(config, V41Config)
    return config


def weights_of(config: V41Config, seed: int) -> Weights:
    """Every parameter by its path, as the model has it, float32: no norm is 1, no bias and no sink 0."""
    found = {}
    for path, rule, layer in parameters(config):
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        shape = rule.target_shape(config, layer)
        value = rng.standard_normal(shape)
        if len(shape) < 2:
            value = 1 + value / 5 if "norm" in path else value
        elif not path.endswith(("q_weight", "k_weight", "embed")):
            value /= np.sqrt(shape[-1] if "hc_" in path else shape[-2])
        found[path] = value.astype(np.float32)
    return found


def tokenizer_json(vocab_size: int) -> dict[str, Any]:
    """A tokenizer whose tokens 2k and 2k + 1 differ in case only."""
    words = {f"{'Ww'[token % 2]}{token // 2}": token for token in range(vocab_size)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "W0"}
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", **dict.fromkeys(parts), "added_tokens": [], "model": model}


def token_map_of(config: V41Config) -> np.ndarray:
    """What :func:`tokenizer_json` maps to."""
    return (np.arange(config.vocab_size) // 2).astype(np.int32)


def model_with(config: V41Config, weights: Weights, *, scanned: bool = False) -> tuple[Any, Any]:
    """Graph and state of the model with these weights."""
    from dsv4_convert.spec.segments import paths_of

    graph, state = nnx.split(nnx.eval_shape(lambda: model_of(config, scanned=scanned)))
    flat = {}
    for key, variable in nnx.to_flat_state(state):
        paths = paths_of(config, key)
        derived = isinstance(variable, Derived)
        values = [token_map_of(config) if derived else weights[path] for path in paths]
        stacked = key[:2] == ("layers", "segments")
        flat[key] = variable.replace(jnp.asarray(np.stack(values) if stacked else values[0]))
    return graph, nnx.from_flat_state(flat)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """``tokenizer.json`` in a folder."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocab_size)), encoding="utf-8")

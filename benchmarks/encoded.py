"""Weights as published codes against the same expanded to bfloat16: memory of a program, and time of its steps.

A model of a few layers with random weights, as wide as the machine holds: a decode step and a prefill, encoded and
expanded in turn within one run, and what XLA plans for either: bytes of arguments (the weights) and of temporaries.
Then the weights of a published config, in bytes, from its shapes alone.

``--against float32`` compares with float32 weights.

Run: python -m benchmarks.encoded [--width 1024] [--experts 64] [--tokens 128] [--against bfloat16|float32]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from benchmarks.measure import table_of
from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.model import Cache
from dsv4_convert.model.architectures import model_of
from dsv4_convert.model.encoded import Encoded, in_source_form
from dsv4_convert.model.model import Decoder
from dsv4_convert.spec.config import Config

_FORMS = ("encoded", "expanded")


def toy(width: int, experts: int, form: str) -> Config:
    """Two layers, one with each kind of compression, that route six experts as V4-Flash does."""
    raw = tiny_config(
        hidden_size=width,
        moe_intermediate_size=width // 2,
        n_routed_experts=experts,
        num_experts_per_tok=6,
        num_hidden_layers=2,
        num_hash_layers=0,
        compress_ratios=[4, 128, 0],
        num_attention_heads=16,
        head_dim=128,
        q_lora_rank=width // 4,
        o_groups=4,
        o_lora_rank=width // 4,
        index_head_dim=128,
        sliding_window=128,
        num_nextn_predict_layers=0,
    )
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return Config.from_hf(raw | {"quantization_config": block, "expert_dtype": form})


def shapes(config: Config, dtype: Any, *, encoded: bool, scanned: bool = False) -> tuple[Any, Any]:
    """Graph and abstract weights, all that no release quantises in ``dtype``."""

    def make() -> Decoder:
        model = in_source_form(model_of(config, scanned=scanned), config, dtype)
        if encoded:
            return model
        graph, state = nnx.split(model)
        flat = {key: variable.replace(_numbers(variable.get_value())) for key, variable in nnx.to_flat_state(state)}
        return nnx.merge(graph, nnx.from_flat_state(flat))

    return nnx.split(nnx.eval_shape(make))


def _numbers(value: Any) -> jax.Array:
    return value[...] if isinstance(value, Encoded) else value


def filled(abstract: Any) -> tuple[Any, Any]:
    """Random codes and scales for abstract encoded weights; and the same weights expanded."""
    rng = np.random.default_rng(0)

    def fill(value: Any) -> Any:
        if isinstance(value, Encoded):
            low, high = (122, 125) if value.packed else (116, 119)
            scales = jnp.asarray(rng.integers(low, high, value.scales.shape), value.scales.dtype)
            codes = rng.integers(0, 256, value.codes.shape, np.uint8)
            codes = codes if value.packed else codes & 0xBF
            return Encoded(jnp.asarray(codes), scales, value.block, value.packed, value.dtype)
        return jnp.asarray(rng.normal(size=value.shape) * 0.05, value.dtype)

    encoded = {key: variable.replace(fill(variable.get_value())) for key, variable in nnx.to_flat_state(abstract)}
    expanded = {key: variable.replace(_numbers(variable.get_value())) for key, variable in encoded.items()}
    return nnx.from_flat_state(encoded), nnx.from_flat_state(expanded)


def weight_bytes(abstract: Any) -> int:
    """Of all weights."""
    return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(abstract))


def contest(config: Config, tokens: int, dtype: Any, runs: int) -> list[dict[str, object]]:
    """One row for each form and number of tokens of a call."""
    graph, abstract = shapes(config, dtype, encoded=True)
    weights = dict(zip(_FORMS, filled(abstract), strict=True))
    rows = []
    for count in (1, tokens):
        ids = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (1, count)), jnp.int32)

        def call(state: Any, ids: jax.Array) -> jax.Array:
            cache = Cache.empty(config, 1, 2 * tokens, dtype=dtype)
            return nnx.merge(graph, state).extend(ids, cache, last_only=True)[0]

        programs = {form: jax.jit(call).lower(weights[form], ids).compile() for form in _FORMS}
        seconds: dict[str, list[float]] = {form: [] for form in _FORMS}
        for turn in range(runs + 1):
            for form in _FORMS:
                taken = _seconds(programs[form], weights[form], ids)
                seconds[form] += [taken] if turn else []
        expanded = statistics.median(seconds["expanded"])
        for form in _FORMS:
            memory = programs[form].memory_analysis()
            assert memory is not None
            rows.append(
                {
                    "weights": form if form == "encoded" else f"{form} {np.dtype(dtype)}",
                    "tokens": count,
                    "argument_mb": round(memory.argument_size_in_bytes / 1e6, 1),
                    "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 1),
                    "milliseconds": round(1e3 * statistics.median(seconds[form]), 1),
                    "of_expanded": round(statistics.median(seconds[form]) / expanded, 2),
                }
            )
    return rows


def _seconds(program: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def main() -> None:
    """Run, print the tables, write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of the prefill")
    parser.add_argument("--form", choices=["fp4", "fp8"], default="fp4", help="of the experts")
    parser.add_argument("--against", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--config", type=Path, default=Path("tests/data/configs/DeepSeek-V4-Flash.json"))
    options = parser.parse_args()

    config = Config.from_hf(json.loads(options.config.read_text(encoding="utf-8")))
    backbone = config.without_stages()
    whole = {
        f"{form}{drafts}": weight_bytes(shapes(of, jnp.bfloat16, encoded=form == "encoded", scanned=True)[1])
        for drafts, of in (("", backbone), ("_with_mtp", config))
        for form in _FORMS
    }
    rows = contest(
        toy(options.width, options.experts, options.form), options.tokens, jnp.dtype(options.against), options.runs
    )
    console = Console()
    console.print(table_of(f"width {options.width}, {options.experts} {options.form} experts, two layers", rows))
    for drafts in ("", "_with_mtp"):
        encoded, expanded = (whole[form + drafts] for form in _FORMS)
        console.print(f"{options.config.stem}{drafts}: {encoded:,} bytes encoded, {expanded:,} in bfloat16")
    print(json.dumps({"rows": rows, "bytes": whole}))


if __name__ == "__main__":
    main()

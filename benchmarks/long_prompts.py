"""Long prompts: how the memory of the forward pass grows, and one comparison where the indexer has to choose.

1. The memory that XLA plans for temporaries of one layer's attention half at V4-Flash's full width, for each kind of
   layer and 1k to 8k tokens, beside the size of the scores of all heads at once. This part compiles and runs nothing.
2. A model with V4-Flash's choice (512 entries) at a small width: golden and parity over 8,192 tokens, so that the
   indexer chooses 512 of 2,048 entries. Needs the ``reference`` extra.

Run: python -m benchmarks.long_prompts [--work DIR] [--tokens 8192]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.measure import dsv4
from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.model import Block, Taps
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.config import V4Config, as_v4
from dsv4_convert.spec.v4.kinds import AttentionKind

FLASH = Path("tests/data/configs/DeepSeek-V4-Flash.json")
LENGTHS = (1024, 2048, 4096, 8192)


def temporaries(config: V4Config, kind: AttentionKind, tokens: int) -> int:
    """Bytes of temporaries in the compiled attention half of a layer for one prompt."""
    block = nnx.eval_shape(lambda: Block(config, kind, hashed=False, with_experts=False))
    graph, state = nnx.split(block)

    def attend(state: Any, streams: jax.Array, positions: jax.Array) -> jax.Array:
        return nnx.merge(graph, state).attend(streams, positions, positions, Taps())[0]

    streams = jax.eval_shape(lambda: jnp.zeros((1, tokens, config.hc_mult, config.hidden_size)))
    positions = jax.eval_shape(lambda: jnp.zeros((1, tokens), jnp.int32))
    analysis = jax.jit(attend).lower(state, streams, positions).compile().memory_analysis()
    assert analysis is not None
    return int(analysis.temp_size_in_bytes)


def memory(console: Console) -> None:
    """The first part."""
    config = as_v4(Config.from_file(FLASH))
    table = Table(title="Temporaries of the attention half, V4-Flash's width, float32, MB", box=None)
    for column in ("layer", *(f"{length:,}" for length in LENGTHS), "last doubling", "scores at once, 8,192"):
        table.add_column(column, justify="right")
    for kind in AttentionKind:
        found = [temporaries(config, kind, length) for length in LENGTHS]
        last = LENGTHS[-1]
        entries = last // config.ratio(kind) if config.ratio(kind) else 0
        at_once = 4 * config.num_attention_heads * last * (last + entries)
        row = [f"{size / 1e6:,.0f}" for size in found]
        table.add_row(kind.value, *row, f"x{found[-1] / found[-2]:.2f}", f"{at_once / 1e6:,.0f}")
    console.print(table)


def comparison(console: Console, work: Path, tokens: int) -> None:
    """The second part."""
    raw = tiny_config(
        index_topk=512, sliding_window=128, max_position_embeddings=1 << 20, num_hidden_layers=3,
        compress_ratios=[0, 4, 128, 0],
    )  # fmt: skip
    work.mkdir(parents=True)
    (work / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    table = Table(title=f"{tokens:,} tokens, small width, 512 of {tokens // 4:,} entries chosen", box=None)
    for column in ("command", "seconds", "peak_gib", "exit_code"):
        table.add_column(column)
    for step in (
        ("golden", "make-checkpoint", work / "hf", "--config", work / "config.json"),
        ("golden", "record", work / "hf", "--out", work / "golden", "--random", tokens, "--noise", "float32"),
        ("golden", "show", work / "golden"),
        ("parity", "--source", work / "hf", "--golden", work / "golden", "--mode", "both"),
    ):
        done = dsv4(*step)
        table.add_row(*map(str, done.values()))
    console.print(table)
    shutil.rmtree(work)


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("long-prompts"), help="folder for what is made")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    console = Console(width=140)
    memory(console)
    comparison(console, options.work, options.tokens)


if __name__ == "__main__":
    main()

"""CSA attention that gathers the chosen entries, against a mask over all of them (``before`` and ``after``).

1. V4-Flash's width, one chunk of queries on this machine: seconds by the number of entries for each chosen one. From
   this follows ``GATHER_FROM`` in dsv4_convert/model/attention.py.
2. V4-Flash's width, by XLA's cost analysis: floating-point operations and bytes of one query, in attention alone and
   with the indexer's scores and choice, by the length of the prompt. Nothing runs.
3. A small width, whole prompts of 2k to 64k tokens on this machine: seconds of attention alone.
4. With ``--tpu`` (``pip install 'dsv4-convert[tpu]'``, no TPU needed): temporaries of attention over whole prompts,
   V4-Flash's width, bfloat16, in the program that the real compiler makes for a v5p.

Run: python -m benchmarks.sparse_attention [--parts 1,2,3] [--tpu]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from dsv4_convert.aot.topology import Slice
from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.model import attention
from dsv4_convert.model.attention import Earlier, Entries
from dsv4_convert.model.indexer import Indexer
from dsv4_convert.model.numerics import PLAIN
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.config import V4Config, as_v4

FLASH = Path("tests/data/configs/DeepSeek-V4-Flash.json")
LENGTHS = (2048, 8192, 16384, 32768, 65536)
FACTORS = (1, 2, 3, 4, 8)
#: ``GATHER_FROM`` that leaves the mask in place, and the one that is used.
BEFORE, AFTER = math.inf, attention.GATHER_FROM
#: The architecture of the third part.
SMALL = tiny_config(index_topk=64, sliding_window=128, max_position_embeddings=1 << 20)


def from_cache(
    config: V4Config, queries: int, entries: int, dtype: Any = jnp.float32
) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """Attention of some queries after a long prompt, and the shapes of its arguments."""
    heads, width, window = config.num_attention_heads, config.head_dim, config.sliding_window
    chosen = min(config.index_topk, entries)

    def arguments() -> tuple[Any, ...]:
        values = jnp.zeros((1, entries, width), dtype)
        past = Entries(
            values, jnp.zeros((1, queries), jnp.int32), jnp.zeros((1, queries, chosen), jnp.int32), jnp.zeros(1, int)
        )
        earlier = Earlier(jnp.zeros((1, window - 1, width), dtype), jnp.zeros(1, jnp.int32))
        q, kv = jnp.zeros((1, queries, heads, width), dtype), jnp.zeros((1, queries, width), dtype)
        return q, kv, earlier, past, jnp.zeros(heads)

    return partial(attention._context, window=window, numerics=PLAIN), jax.eval_shape(arguments)


def filled(arguments: Any, entries: int) -> Any:
    """Random arguments of these shapes; choices are random entries."""
    key = jax.random.key(0)

    def one(part: jax.ShapeDtypeStruct) -> jax.Array:
        if part.dtype == jnp.int32:
            return jax.random.randint(key, part.shape, 0, entries).sort(axis=-1)
        return jax.random.normal(key, part.shape, part.dtype)

    return jax.tree.map(one, arguments)


def seconds(function: Callable[..., Any], arguments: Any, *, repeats: int = 3) -> float:
    """The best of some runs of the compiled function."""
    run = jax.jit(function)
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def under(factor: float, run: Callable[[], Any]) -> Any:
    """The result of ``run`` with this ``GATHER_FROM``."""
    with patch.object(attention, "GATHER_FROM", factor):
        jax.clear_caches()
        return run()


def factor(console: Console) -> None:
    """The first part."""
    config = as_v4(Config.from_file(FLASH))
    table = _table("Attention of 128 queries, V4-Flash's width, float32, seconds on this machine", "entries per chosen")
    for many in FACTORS:
        entries = many * config.index_topk
        function, shapes = from_cache(config, 128, entries)
        given = filled(shapes, entries)
        found = [under(limit, partial(seconds, function, given)) for limit in (BEFORE, 0)]
        table.add_row(str(many), *(f"{value:.2f}" for value in found), f"{found[0] / found[1]:.1f}")
    console.print(table)


def cost(function: Callable[..., Any], shapes: Any, queries: int) -> tuple[float, float]:
    """Operations and bytes of one query, by XLA's analysis of a program without loops."""
    analysis: Any = jax.jit(function).lower(*shapes).compile().cost_analysis()
    return analysis["flops"] / queries, analysis["bytes accessed"] / queries


def analysis(console: Console) -> None:
    """The second part. Sixteen queries are one chunk, because the analysis counts a loop's body once."""
    config, queries = as_v4(Config.from_file(FLASH)), 16
    table = Table(title="One query of a CSA layer, V4-Flash's width, XLA's cost analysis", box=None)
    for column in ("tokens", "MFLOP before", "after", "MB before", "after", "indexer MFLOP", "MB"):
        table.add_column(column, justify="right")
    for length in LENGTHS:
        entries = length // config.csa_ratio
        function, shapes = from_cache(config, queries, entries)
        found = [under(limit, partial(cost, function, shapes, queries)) for limit in (BEFORE, AFTER)]
        scored = cost(*_scoring(config, queries, entries), queries)
        operations = [f"{value[0] / 1e6:,.0f}" for value in found]
        moved = [f"{value[1] / 1e6:,.1f}" for value in found]
        table.add_row(f"{length:,}", *operations, *moved, f"{scored[0] / 1e6:,.0f}", f"{scored[1] / 1e6:,.1f}")
    console.print(table)


def _scoring(config: V4Config, queries: int, entries: int) -> tuple[Callable[..., Any], Any]:
    """The indexer's scores and choice for some queries, and the shapes of its arguments."""
    indexer = nnx.eval_shape(lambda: Indexer(config, PLAIN))
    heads, width = config.index_n_heads, config.index_head_dim
    shapes = ((1, entries, width), (1, queries, heads, width), (1, queries, heads))
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return indexer._score_and_choose, (*given, jax.ShapeDtypeStruct((1, queries), jnp.int32))


def small(console: Console) -> None:
    """The third part: all queries of a prompt, each with 64 chosen entries among those of the whole prompt."""
    config = as_v4(Config.from_hf(SMALL))
    title = f"Attention over whole prompts, {config.num_attention_heads} heads of {config.head_dim}, 64 chosen, seconds"
    table = _table(title, "tokens")
    for length in LENGTHS:
        entries = length // config.csa_ratio
        function, shapes = from_cache(config, length, entries)
        given = filled(shapes, entries)
        found = [under(limit, partial(seconds, function, given, repeats=2)) for limit in (BEFORE, AFTER)]
        table.add_row(f"{length:,}", *(f"{value:.2f}" for value in found), f"{found[0] / found[1]:.1f}")
    console.print(table)


def temporaries(config: V4Config, tokens: int, device: Any) -> int:
    """Bytes of temporaries of attention over a whole prompt, in the program for a device."""
    function, shapes = from_cache(config, tokens, tokens // config.csa_ratio, jnp.bfloat16)
    place = SingleDeviceSharding(device)
    given = jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=place), shapes)
    lowered = jax.jit(function).trace(*given).lower(lowering_platforms=("tpu",))
    found = lowered.compile().memory_analysis()
    assert found is not None
    return int(found.temp_size_in_bytes)


def compiled(console: Console) -> None:
    """The fourth part."""
    config = as_v4(Config.from_file(FLASH))
    device = Slice.parse("v5p-8").devices()[0]
    table = Table(title="Temporaries of a CSA layer's attention, V4-Flash's width, bfloat16, v5p, MB", box=None)
    for column in ("tokens", "before", "after"):
        table.add_column(column, justify="right")
    for length in LENGTHS:
        found = [under(limit, partial(temporaries, config, length, device)) for limit in (BEFORE, AFTER)]
        table.add_row(f"{length:,}", *(f"{value / 1e6:,.0f}" for value in found))
    console.print(table)


def _table(title: str, first: str) -> Table:
    table = Table(title=title, box=None)
    for column in (first, "before", "after", "times faster"):
        table.add_column(column, justify="right")
    return table


def main() -> None:
    """The parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="1,2,3", help="numbers of the parts on this machine")
    parser.add_argument("--tpu", action="store_true", help="the fourth part")
    options = parser.parse_args()
    console = Console(width=140)
    for number, part in enumerate((factor, analysis, small), 1):
        if str(number) in options.parts.split(","):
            part(console)
    if options.tpu:
        compiled(console)


if __name__ == "__main__":
    main()

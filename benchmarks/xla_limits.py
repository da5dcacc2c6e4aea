"""The smallest programs that show what XLA on CPU does slowly, and what the model does instead.

Each pair computes the same thing. The figures are the reasons for ``dsv4_convert/model/encoded.py`` (``Member``,
``product``), ``ops.py`` (``einsum_f32``), ``hyper_connection.py`` (``_collapse``) and ``attention.py`` (``attend``).

Run: python -m benchmarks.xla_limits
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from dsv4_convert.model.encoded import Member, product
from dsv4_convert.model.ops import linear

WIDTH, INNER, EXPERTS, RUNS = 4096, 2048, 40, 7


def _random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32))


def _dot(spec: str) -> Callable[[Any, Any], jax.Array]:
    return lambda a, b: jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)


def _each(multiply: Callable[[Any, Any, Any], jax.Array]) -> Callable[[Any, Any], jax.Array]:
    """The sum of the products of rows with each matrix of a stack."""

    def run(x: Any, stack: Any) -> jax.Array:
        zeros = jnp.zeros((x.shape[0], stack.shape[2]), jnp.float32)
        return jax.lax.fori_loop(0, len(stack), lambda at, total: total + multiply(x, stack, at), zeros)

    return run


def pairs() -> list[tuple[str, Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]:
    """What is shown, the slow program, the fast one, and the arguments of both."""
    stack, single = _random(EXPERTS, WIDTH, INNER), _random(WIDTH, INNER)
    few, some = _random(8, WIDTH), _random(64, WIDTH)
    grouped, groups = _random(64, 8, WIDTH), _random(8, WIDTH, 1024)
    narrow, narrow_stack = single.astype(jnp.bfloat16), stack[:8].astype(jnp.bfloat16)
    streams, weights = _random(1, 2048, 4, WIDTH), _random(1, 2048, 4)
    queries, keys = _random(512, 64, 512), _random(640, 512)
    return [
        (
            "8 rows times a matrix: out of a stack, or an argument of its own",
            lambda x, stack, single, at: x @ stack[at],
            lambda x, stack, single, at: x @ single,
            (few, stack, single, jnp.int32(3)),
        ),
        (
            "8 rows times a matrix out of a stack: whole, or block by block",
            lambda x, stack, at: x @ stack[at],
            lambda x, stack, at: Member(stack, at).product(x, jnp.float32),
            (few, stack, jnp.int32(3)),
        ),
        (
            "64 rows times a matrix, bfloat16 into float32: converted first, or by XLA's own kernel",
            lambda x, w: x.astype(jnp.float32) @ w.astype(jnp.float32),
            linear,
            (some.astype(jnp.bfloat16), narrow),
        ),
        (
            "8 rows times each matrix of a bfloat16 stack, in a loop: whole, or block by block in a branch",
            _each(lambda x, stack, at: x @ stack[at]),
            _each(lambda x, stack, at: Member(stack, at).product(x, x.dtype)),
            (few.astype(jnp.bfloat16), narrow_stack),
        ),
        (
            "64 rows in 8 groups, each with a matrix of its own: batched, or one by one",
            _dot("sgi,gio->sgo"),
            lambda x, w: product(x, w, jnp.float32),
            (grouped, groups),
        ),
        (
            "weighted sum over a middle axis of 4: as sum, or as contraction",
            lambda p, x: jnp.sum(p[..., None] * x, axis=2),
            _dot("bsn,bsnd->bsd"),
            (weights, streams),
        ),
        (
            "scores of 64 heads with one key: heads before queries, or behind",
            _dot("shc,xc->hsx"),
            _dot("shc,xc->shx"),
            (queries, keys),
        ),
    ]


def seconds(run: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - start


def main() -> None:
    """Time each pair in turns and print the medians."""
    table = Table(title="XLA on CPU, float32 where nothing else is said", title_justify="left", box=None)
    for column in ("what", "slow, ms", "fast, ms", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, slow, fast, arguments in pairs():
        programs = [jax.jit(slow), jax.jit(fast)]
        for program in programs:
            jax.block_until_ready(program(*arguments))
        times = [[seconds(program, arguments) for program in programs] for _ in range(RUNS)]
        medians = [statistics.median(row[side] for row in times) for side in (0, 1)]
        table.add_row(what, *(f"{1e3 * value:.2f}" for value in medians), f"{medians[0] / medians[1]:.1f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

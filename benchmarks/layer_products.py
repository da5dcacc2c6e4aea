"""The products of a layer with its matrices, and nothing else: XLA's on CPU, torch's, and reading the matrices once.

The smallest program that shows how fast a layer can be beside transformers' (``benchmarks/layer_speed.py``): a layer of
V4-Flash's width with fewer experts, every expert with as many rows as on average. Both sides multiply the bytes of the
same matrices, each in its own orientation. The three take turns; the least processor time and the median are shown.
Needs the ``reference`` extra.

Run: python -m benchmarks.layer_products [--kind CSA,hash] [--experts 64] [--tokens 64,512,2048] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from rich.console import Console

from benchmarks.layer_speed import KINDS, one_layer
from benchmarks.measure import in_turns, table_of
from dsv4_convert.model.encoded import Member, product
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Transform, parameters


def matrices(config: Config, dtype: torch.dtype) -> list[torch.Tensor]:
    """The matrices of a layer as random stacks ``[..., in, out]``: of experts, of groups, or of one."""
    shapes = [
        rule.target_shape(config, layer)
        for _, rule, layer in parameters(config)
        if layer is not None and rule.transform is not Transform.NONE
    ]
    stacks = []
    for shape in shapes:
        stack = torch.empty(shape if len(shape) > 2 else (1, *shape), dtype=dtype)
        for matrix in stack:
            matrix.normal_()
        stacks.append(stack)
    return stacks


def rows_for(config: Config, stacks: list[torch.Tensor], tokens: int) -> list[torch.Tensor]:
    """The rows that meet each matrix of a stack: all tokens, of an expert a share."""
    experts = config.n_routed_experts
    share = max(1, tokens * config.num_experts_per_tok // experts)
    return [torch.randn(share if len(stack) == experts else tokens, stack.shape[1]).to(stack.dtype) for stack in stacks]


def theirs(stacks: list[torch.Tensor], rows: list[torch.Tensor]) -> Callable[[], Any]:
    """torch's products; a matrix is ``[out, in]`` there."""
    turned = [stack.view(len(stack), stack.shape[2], stack.shape[1]) for stack in stacks]

    def run() -> None:
        with torch.no_grad():
            for x, stack in zip(rows, turned, strict=True):
                for matrix in stack:
                    torch.nn.functional.linear(x, matrix)

    return run


def ours(stacks: list[torch.Tensor], rows: list[torch.Tensor]) -> Callable[[], Any]:
    """The model's products, in one program; those of a stack are added, so that all are computed."""

    @jax.jit
    def run(rows: list[jax.Array], stacks: list[jax.Array]) -> list[jax.Array]:
        return [_each(x, stack) for x, stack in zip(rows, stacks, strict=True)]

    arguments = [list(map(jax.dlpack.from_dlpack, side)) for side in (rows, stacks)]
    return lambda: jax.block_until_ready(run(*arguments))


def _each(x: jax.Array, stack: jax.Array) -> jax.Array:
    if len(stack) == 1:
        return product(x, stack[0], x.dtype)
    zeros = jnp.zeros((x.shape[0], stack.shape[2]), jnp.float32)
    return jax.lax.fori_loop(0, len(stack), lambda at, total: total + Member(stack, at).product(x, x.dtype), zeros)


def read(stacks: list[torch.Tensor]) -> None:
    """Every byte once."""
    for stack in stacks:
        stack.view(torch.int32).max()


def contest(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every dtype and length."""
    config = Config.from_hf(one_layer(options.kind.replace(",", ", "), options.experts)).without_stages()
    for dtype in options.dtype.split(","):
        stacks = matrices(config, getattr(torch, dtype))
        nbytes = sum(stack.nbytes for stack in stacks)
        for tokens in map(int, options.tokens.split(",")):
            rows = rows_for(config, stacks, tokens)
            sides: dict[str, Callable[[], Any]] = {
                "torch": theirs(stacks, rows),
                "XLA": ours(stacks, rows),
                "read": partial(read, stacks),
            }
            for side in sides.values():
                side()
            elapsed, processor = in_turns(sides, options.runs)
            seconds = {name: statistics.median(values) for name, values in elapsed.items()}
            least = {name: min(values) for name, values in processor.items()}
            yield {
                "dtype": dtype,
                "tokens": tokens,
                "GB": round(nbytes / 1e9, 2),
                **{f"{name}, s": round(value, 3) for name, value in seconds.items()},
                **{f"{name}, processor s": round(value, 3) for name, value in least.items()},
                "ratio": round(seconds["XLA"] / seconds["torch"], 2),
                "of processor time": round(least["XLA"] / least["torch"], 2),
            }


def main() -> None:
    """Run the contests and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="CSA,hash", choices=[kind.replace(", ", ",") for kind in KINDS])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", default="64,512,2048")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for row in contest(options):
        print(json.dumps(row), flush=True)
        rows.append(row)
    title = f"a layer's products alone, {options.kind}, {options.experts} experts"
    Console(width=160).print(table_of(title, rows))


if __name__ == "__main__":
    main()

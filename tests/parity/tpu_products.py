"""Float32 products as a TPU makes them, out of products of bfloat16 parts; simulated on CPU.

A float32 number is the sum of three bfloat16 numbers, high, middle and low. ``highest`` adds the six products of parts
whose order is at most that of high times low, ``high`` the three up to high times middle, ``default`` high times high.
Sums are float32. Source: XLA's ``BF16_BF16_F32_X6`` and ``_X3``, and JAX's documentation of ``Precision``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp

from dsv4_convert.parity import compiled, forward
from dsv4_convert.weights import experts

from .faults.program import traced_again

#: Precision -> the parts of both operands that are multiplied, smallest products first.
PASSES = {
    "highest": ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)),
    "high": ((1, 0), (0, 1), (0, 0)),
    "default": ((0, 0),),
}


def parts(x: jax.Array) -> list[jax.Array]:
    """High, middle and low: bfloat16 numbers, held as float32, whose sum is ``x``."""
    found = []
    for _ in range(3):
        found.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - found[-1]
    return found


def in_passes(product: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """A product of two arrays, made of products of their parts."""

    def made(a: jax.Array, b: jax.Array, **options: Any) -> jax.Array:
        if not a.dtype == b.dtype == jnp.float32:
            return product(a, b, **options)
        of_a, of_b = parts(a), parts(b)
        products = [product(of_a[i], of_b[j], **options) for i, j in PASSES[precision]]
        return sum(products[1:], products[0])

    return made


@contextmanager
def tpu_products(precision: str) -> Iterator[list[str]]:
    """Programs that are traced in here make their float32 products so. Yields the products that were made."""
    einsum, ragged_dot = jnp.einsum, jax.lax.ragged_dot
    made: list[str] = []

    def simulated(spec: str, a: jax.Array, b: jax.Array, **options: Any) -> Any:
        made.append(spec)
        return in_passes(lambda a, b, **rest: einsum(spec, a, b, **rest), precision)(a, b, **options)

    def grouped(a: jax.Array, b: jax.Array, sizes: jax.Array, **options: Any) -> Any:
        made.append("ragged_dot")
        return in_passes(lambda a, b, **rest: ragged_dot(a, b, sizes, **rest), precision)(a, b, **options)

    with ExitStack() as stack:
        stack.enter_context(patch.object(jnp, "einsum", simulated))
        stack.enter_context(patch.object(jax.lax, "ragged_dot", grouped))
        for module, names in (
            (compiled, ("run_layer", "_embed", "_compiled_head")),
            (forward, ("_to_experts", "_from_experts")),
        ):
            for name in names:
                stack.enter_context(patch.object(module, name, traced_again(getattr(module, name))))
        expert = traced_again(experts._expert(), static=(5, 6))
        stack.enter_context(patch.object(experts, "_expert", lambda: expert))
        yield made

"""Operations that every block uses: declaring a parameter, products in float32, and a loop over chunks of queries.

Shape letters: ``B`` batch, ``S`` tokens, ``N`` chunks, ``Q`` tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from dsv4_convert.model.axes import named

#: The product of rows and a matrix.
MATMUL = "...i,io->...o"


class Buffer(nnx.Variable[jax.Array]):
    """Checkpoint state without gradients: the hash table and the router's correction bias."""


class Derived(Buffer):
    """State that no tensor of a checkpoint holds, but another of its files: the engrams' token map."""


def parameter(axes: str, *shape: int) -> nnx.Param[jax.Array]:
    """A weight of the checkpoint with its logical axes (:mod:`dsv4_convert.model.axes`); zero until it is restored."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=named(axes))


def buffer(axes: str, *shape: int, dtype: DTypeLike = jnp.float32) -> Buffer:
    """A :class:`Buffer` with its logical axes; zero until it is restored."""
    return Buffer(jnp.zeros(shape, dtype), axes=named(axes))


def derived(axes: str, *shape: int, dtype: DTypeLike) -> Derived:
    """A :class:`Derived` with its logical axes; zero until it is restored."""
    return Derived(jnp.zeros(shape, dtype), axes=named(axes))


def precision(*operands: Array) -> Any:
    """The precision that keeps all bits of float32 operands; any precision keeps those of bfloat16.

    ``jax.default_matmul_precision`` may ask for less.
    """
    if not any(operand.dtype == jnp.float32 for operand in operands):
        return jax.lax.Precision.DEFAULT
    return jax.config.jax_default_matmul_precision or jax.lax.Precision.HIGHEST  # type: ignore[attr-defined]


def einsum_f32(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """``einsum`` of two operands whose products and sums are float32, whatever the operands' dtypes."""
    if a.dtype == b.dtype == jnp.float32:
        return _einsum(spec, a, b)
    # Functions made here would have their checks of shapes made anew by the tests at every product.
    alone = spec == MATMUL and a.dtype == b.dtype and jax.sharding.get_abstract_mesh().empty
    on_cpu = _matmul_on_cpu if alone else partial(_einsum_as_f32, spec)
    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=partial(_einsum, spec))


def _einsum(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.einsum(spec, a, b, precision=precision(a, b), preferred_element_type=jnp.float32)


def _einsum_as_f32(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same products. XLA on CPU has kernels of bfloat16 into float32 for some shapes only."""
    return _einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32))


def _matmul_on_cpu(x: Float[Array, "*batch inner"], w: Float[Array, "inner outer"]) -> Float[Array, "*batch outer"]:
    """``x @ w`` in a form that XLA has a kernel for: two rows at least, and no transposition around it."""
    rows = x.reshape(-1, x.shape[-1])
    padded = jnp.pad(rows, ((0, 1), (0, 0))) if len(rows) == 1 else rows
    product = in_branch(partial(_einsum, MATMUL), (len(padded), w.shape[1]), padded, w)
    return product[: len(rows)].reshape(*x.shape[:-1], w.shape[1])


def in_branch(
    function: Callable[..., Array], shape: tuple[int, ...], x: Float[Array, "..."], *operands: Any
) -> Float[Array, "..."]:
    """``function(x, *operands)``, a float32 array of this ``shape``, in a branch of its own.

    XLA does not merge a branch with what surrounds it, and moves nothing out of a loop from it. On a mesh there is no
    branch, as the devices would have to agree on it.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return function(x, *operands)
    return jax.lax.cond(never(x), lambda *_: jnp.zeros(shape, jnp.float32), function, x, *operands)


def never(x: Float[Array, "..."]) -> Bool[Array, ""]:
    """False, which the compiler cannot know, and cannot compute before ``x``."""
    return jnp.any(x.reshape(-1)[:1] > jnp.inf)


def round_then_f32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Convert ``x`` to float32 and keep its rounding to the dtype that it has now.

    ``reduce_precision`` repeats that rounding, since XLA may drop a conversion to bfloat16 that one back follows.
    """
    form = jnp.finfo(x.dtype)  # type: ignore[no-untyped-call]
    return jax.lax.reduce_precision(x.astype(jnp.float32), form.nexp, form.nmant)


def round_to(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Round ``x`` to ``dtype``, and keep XLA from dropping that rounding (:func:`round_then_f32`)."""
    return round_then_f32(x.astype(dtype)).astype(dtype)


def linear(x: Float[Array, "*batch inner"], w: Float[Array, "inner outer"]) -> Float[Array, "*batch outer"]:
    """``x @ w`` in the dtype of ``x``, accumulated in float32."""
    return einsum_f32(MATMUL, x, w.astype(x.dtype)).astype(x.dtype)


def map_query_chunks(function: Callable[..., Any], longest: int, *rows: Shaped[Array, "B S ..."]) -> Any:
    """``function(first, *chunk)`` on one chunk of tokens after the other; its results ``[B, Q, ...]`` concatenated.

    Memory then grows with the prompt and not with its square. Chunks have equal lengths of at most ``longest``;
    ``first`` is the index of a chunk's first token, and the last chunk may be padded with zeros.
    """
    tokens = rows[0].shape[1]
    chunks = -(-tokens // longest)
    if chunks == 1:
        return function(jnp.zeros((), jnp.int32), *rows)
    length = -(-tokens // chunks)
    split = [_split(part, chunks, length) for part in rows]
    results = jax.lax.map(lambda chunk: function(*chunk), (length * jnp.arange(chunks, dtype=jnp.int32), *split))
    return jax.tree.map(lambda part: _joined(part)[:, :tokens], results)


def _split(rows: Shaped[Array, "B S *rest"], chunks: int, length: int) -> Shaped[Array, "N B Q *rest"]:
    batch, tokens, *rest = rows.shape
    padded = jnp.pad(rows, ((0, 0), (0, chunks * length - tokens), *((0, 0) for _ in rest)))
    return jnp.moveaxis(padded.reshape(batch, chunks, length, *rest), 1, 0)


def _joined(rows: Shaped[Array, "N B Q *rest"]) -> Shaped[Array, "B Y *rest"]:
    chunks, batch, length, *rest = rows.shape
    return jnp.moveaxis(rows, 0, 1).reshape(batch, chunks * length, *rest)

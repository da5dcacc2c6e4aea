"""Matrices as the codes and scales that a release publishes, decoded where they are used.

Shape letters: ``I`` inputs, ``O`` outputs of a matrix; ``P`` rows of its codes, ``I`` of FP8 and ``I / 2`` of packed
FP4; ``R`` and ``C`` blocks along its inputs and outputs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import EllipsisType
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt8

from dsv4_convert.errors import UsageError
from dsv4_convert.model.axes import Axes, padded, partition
from dsv4_convert.model.ops import MATMUL, Derived, einsum_f32, in_branch, never, round_to
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Kind, Rule, Transform
from dsv4_convert.spec.segments import paths_of

_Module = TypeVar("_Module", bound=nnx.Module)

#: Rows that :func:`product` multiplies one by one with codes; more rows pay for decoding the matrix.
FEW_ROWS = 8
#: Terms that :func:`_by_codes` adds before it multiplies with a scale: as many inputs share one in any format.
_TERMS = 8
#: Numbers of a block of :class:`Member`: few megabytes.
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Member:
    """The matrix ``[I, O]`` at ``index`` of a stack ``[E, I, O]``, which leaves it block by block as it is multiplied.

    XLA on CPU copies a matrix out of its stack before it multiplies. A whole matrix goes to memory and back on the way,
    a block stays in the processor's cache (``benchmarks/xla_limits.py``).
    """

    stack: Float[Array, "E I O"]
    index: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.stack.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stack."""
        return self.stack.dtype

    def product(self, x: Float[Array, "*rows I"], dtype: DTypeLike) -> Float[Array, "*rows O"]:
        """The product of rows and the matrix, rounded to ``dtype``, in float32."""
        inputs, outputs = self.shape
        block = inputs
        while block * outputs > _BLOCK and block % 2 == 0:
            block //= 2

        def of_rows(x: Array, stack: Array, index: Array, first: Array | int) -> Array:
            w = jax.lax.dynamic_slice(stack, (index, first, 0), (1, block, outputs))[0]
            rows = jax.lax.dynamic_slice_in_dim(x, first, block, x.ndim - 1)
            return einsum_f32(MATMUL, rows, w.astype(dtype))

        def of_block(first: Array | int) -> Array:
            return in_branch(of_rows, (*x.shape[:-1], outputs), x, self.stack, self.index, first)

        def add(number: Array, total: Array) -> Array:
            return total + of_block(number * block)

        return jax.lax.fori_loop(1, inputs // block, add, of_block(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """A quantised matrix ``[I, O]``, or a stack of them ``[..., I, O]``; indexing decodes.

    ``w[...]`` decodes all of it, ``w[2]`` one matrix, or one smaller stack, of a stack. A decoded number is
    ``code * scale`` in float32, rounded to ``dtype``. That is exact for power-of-two scales wherever the product is a
    normal float32; XLA on CPU flushes subnormal products to zero, as in any arithmetic.

    A pytree of its two arrays: a layer's codes are sliced out of stacked layers, laid over a mesh and passed to
    programs like any weight.

    Attributes:
        codes: bytes: FP8 (e4m3) ``[..., I, O]``, or packed FP4 (e2m1) ``[..., I / 2, O]``, whose low half is the even
            input. The dtype is uint8 because XLA on CPU widens a whole stack of an eight-bit float dtype before it
            slices one matrix.
        scales: ``[..., ceil(I / block[0]), ceil(O / block[1])]``: E8M0 bytes as uint8, or float32.
        block: inputs and outputs that share a scale.
        packed: codes are FP4.
        dtype: of decoded numbers.
    """

    codes: Any
    scales: Any
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})
    packed: bool = dataclasses.field(metadata={"static": True})
    dtype: np.dtype[Any] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded matrix or stack."""
        *stack, rows, outputs = self.codes.shape
        return (*stack, 2 * rows if self.packed else rows, outputs)

    def __getitem__(self, index: EllipsisType | int | Int[Array, ""]) -> Float[Array, "..."]:
        """Decode all, or one entry of the first axis."""
        if index is not ... and len(self.shape) < 3:
            raise IndexError("rows of an encoded matrix cannot be decoded one by one")
        return decoded(self.codes[index], self.scales[index], self.block, packed=self.packed, dtype=self.dtype)


#: A matrix in any form that :func:`product` takes.
Matrix: TypeAlias = Array | Encoded | Member


def empty(shape: tuple[int, ...], *, packed: bool, float_scales: bool, block: tuple[int, int], dtype: Any) -> Encoded:
    """An :class:`Encoded` of zeros whose decoded ``shape`` is ``[..., I, O]``."""
    *stack, inputs, outputs = shape
    codes = jnp.zeros((*stack, inputs // 2 if packed else inputs, outputs), jnp.uint8)
    blocks = (-(-inputs // block[0]), -(-outputs // block[1]))
    scales = jnp.zeros((*stack, *blocks), jnp.float32 if float_scales else jnp.uint8)
    return Encoded(codes, scales, block, packed, np.dtype(dtype))


def block_of(rule: Rule, *, packed: bool, outputs: int) -> tuple[int, int]:
    """``[in, out]`` elements of a parameter with ``outputs`` outputs that share a scale.

    No block straddles two groups of a matrix that is cut into groups.
    """
    down, along = rule.block(packed=packed)
    if rule.transform is Transform.NONE:
        return down, along
    return along, math.gcd(down, outputs) if rule.transform is Transform.GROUPED else down


def partitions(value: Any, axes: Axes, sizes: Mapping[str, int], *, what: str) -> Any:
    """How a parameter lies on a mesh (:func:`~dsv4_convert.model.axes.partition`): a spec, or an :class:`Encoded`.

    Args:
        value: an array or an :class:`Encoded`, or the shapes of one.
        axes, sizes, what: logical axes of the parameter, the mesh's axes, and its name.

    Raises:
        UsageError: as ``partition``, or a mesh axis cuts through a block that shares a scale.
    """
    spec = partition(axes, value.shape, sizes, what=what)
    if not isinstance(value, Encoded):
        return spec
    for axis, size, block, split in zip(axes[-2:], value.shape[-2:], value.block, spec[-2:], strict=True):
        over = {name: sizes[name] for name in ((split,) if isinstance(split, str) else split or ())}
        if over and size % (block * math.prod(over.values())):
            named = ", ".join(f"{name}={count}" for name, count in over.items())
            raise UsageError(
                f"{what}: its axis {axis} has {size} in blocks of {block} that share a scale, which the mesh axes "
                f"{named} do not divide; keep the weights expanded, or make that axis of the mesh smaller"
            )
    return dataclasses.replace(value, codes=spec, scales=spec)


def on_mesh(value: Any, axes: Axes, mesh: Mesh, *, what: str) -> Any:
    """Shape, dtype and sharding of a parameter on a mesh (:func:`partitions`); of an :class:`Encoded` those of its
    parts.

    The shape is larger than that of ``value`` where the mesh does not divide an axis that may be padded
    (:data:`~dsv4_convert.model.axes.PADDED`).
    """

    def larger(part: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(padded(axes, part.shape, mesh.shape), part.dtype)

    def placed(part: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=NamedSharding(mesh, spec))

    parts = jax.tree.map(larger, value)
    return jax.tree.map(placed, parts, partitions(parts, axes, mesh.shape, what=what))


def after(value: Float[Array, "..."], encoded: Encoded) -> Encoded:
    """Return ``encoded`` such that it is decoded only after ``value`` is computed.

    Decoded weights depend on no activation, so a compiler may decode all layers before the first one runs. XLA on CPU
    does so and ignores barriers: there the scales depend on a condition that the compiler cannot know to be false.
    """

    def on_cpu(value: Array, scales: Array) -> Array:
        return jnp.where(never(value), jnp.zeros_like(scales), scales)

    def default(value: Array, scales: Array) -> Array:
        tied: Array = jax.lax.optimization_barrier((value, scales))[1]
        return tied

    scales = jax.lax.platform_dependent(value, encoded.scales, cpu=on_cpu, default=default)
    return dataclasses.replace(encoded, scales=scales)


def decoded(
    codes: UInt8[Array, "*stack P O"],
    scales: Shaped[Array, "*stack R C"],
    block: tuple[int, int],
    *,
    packed: bool,
    dtype: Any,
) -> Float[Array, "*stack I O"]:
    """The numbers that codes and scales stand for (:class:`Encoded`)."""
    *stack, rows, outputs = codes.shape
    inputs = 2 * rows if packed else rows
    blocks = scales.shape[-2:]
    # Pad to whole blocks. In every release the last blocks are whole already.
    short = [(0, 0)] * len(stack) + [
        (0, blocks[0] * block[0] // (1 + packed) - rows),
        (0, blocks[1] * block[1] - outputs),
    ]
    codes = jnp.pad(codes, short) if any(after for _, after in short) else codes
    values = jnp.stack(_halves(codes), axis=-2) if packed else _e4m3(codes)
    values = values.reshape(*stack, blocks[0], block[0], blocks[1], block[1])
    for factor in factors(scales):
        values = values * factor[..., :, None, :, None]
    values = values.reshape(*stack, blocks[0] * block[0], blocks[1] * block[1])[..., :inputs, :outputs]
    # A product with a power of two needs no rounding.
    return round_to(values, dtype) if scales.dtype == jnp.float32 else values.astype(dtype)


def product(x: Float[Array, "*rows inner"], w: Float[Matrix, "*stack inner outer"], dtype: DTypeLike) -> Array:
    """``x @ w`` in float32, the weight rounded to ``dtype``; a stack's axis is the last of the rows' axes.

    XLA on CPU writes a decoded matrix to memory before it multiplies, which takes ten times as long as the product of a
    row. So a few rows are multiplied with the codes themselves there. That gives the same sum in another order, unless
    decoding rounds. The matrices of a stack are multiplied one by one there, which takes half the time of a batched
    product or less. On a mesh all are decoded, in the parts that the devices hold.
    """
    if isinstance(w, Member):
        return w.product(x, dtype)
    if not jax.sharding.get_abstract_mesh().empty:
        return _expanded(x, w, dtype=dtype)
    *stack, inputs, outputs = w.shape
    on_cpu: Callable[..., Array] = _one_by_one if stack else _expanded
    if isinstance(w, Encoded):
        rows = math.prod(x.shape[: x.ndim - len(stack) - 1])
        rounds = w.scales.dtype == jnp.float32 and np.dtype(dtype) != np.float32
        whole = not (inputs % w.block[0] or outputs % w.block[1])
        if rows <= FEW_ROWS and whole and not rounds:
            on_cpu = _from_codes
        elif not stack:
            on_cpu = _decoded_first
    if on_cpu is _expanded:
        return _expanded(x, w, dtype=dtype)
    ways = {"cpu": partial(on_cpu, dtype=dtype), "default": partial(_expanded, dtype=dtype)}
    return jax.lax.platform_dependent(x, w, **ways)


def member(stack: Float[Array | Encoded, "E I O"], index: Int[Array, ""]) -> Float[Matrix, "I O"]:
    """A matrix of a stack, not decoded yet if the stack is encoded."""
    if not isinstance(stack, Encoded):
        return Member(stack, index)
    return dataclasses.replace(stack, codes=stack.codes[index], scales=stack.scales[index])


def _expanded(x: Array, w: Array | Encoded, *, dtype: DTypeLike) -> Array:
    return einsum_f32(MATMUL if len(w.shape) == 2 else "...gi,gio->...go", x, w[...].astype(dtype))


def _decoded_first(x: Array, w: Encoded, *, dtype: DTypeLike) -> Array:
    """Merged with what cuts the matrix out of a stack, XLA on CPU would take four times as long to decode it."""
    return in_branch(partial(_expanded, dtype=dtype), (*x.shape[:-1], w.shape[-1]), x, w)


def _one_by_one(x: Array, w: Array | Encoded, *, dtype: DTypeLike) -> Array:
    def of_matrix(index: Array) -> Array:
        own = jax.lax.dynamic_index_in_dim(x, index, x.ndim - 2, keepdims=False)
        return product(own, member(w, index), dtype)

    return jnp.moveaxis(jax.lax.map(of_matrix, jnp.arange(w.shape[0])), 0, -2)


def _from_codes(x: Array, w: Encoded, *, dtype: DTypeLike) -> Array:
    """The product of a few rows; the codes' numbers fit ``dtype``."""
    *stack, inputs, outputs = w.shape
    one_by_one = x.astype(jnp.float32).reshape(-1, *stack, inputs)
    rows = len(one_by_one)
    sums = jax.lax.map(lambda row: _by_codes(row, w), one_by_one) if rows > 1 else _by_codes(one_by_one[0], w)
    return sums.reshape(*x.shape[:-1], outputs)


def _by_codes(x: Float[Array, "*stack I"], w: Encoded) -> Float[Array, "*stack O"]:
    """The product of one row: sums of a few terms each, times their scales; then the sum of all of them.

    The last sum is a matmul with ones, which keeps XLA from computing the terms output by output inside it. Each matrix
    of a stack has ones of its own: else XLA writes the terms of all of them transposed.
    """
    *stack, inputs, outputs = w.shape
    parts = inputs // _TERMS
    codes = w.codes.reshape(*stack, parts, -1, outputs)
    # XLA would decode once for all rows, and write that to memory, did the codes not seem to depend on the row.
    unknown = never(x).astype(jnp.uint8)
    rows = [codes[..., at, :] ^ unknown for at in range(codes.shape[-2])]
    values = [value for row in rows for value in (_halves(row) if w.packed else (_e4m3_on_cpu(row),))]
    given = x.reshape(*stack, parts, _TERMS)
    terms = functools.reduce(jnp.add, [given[..., at, None] * value for at, value in enumerate(values)])
    blocked = terms.reshape(*stack, inputs // w.block[0], -1, outputs // w.block[1], w.block[1])
    for factor in factors(w.scales):
        blocked = blocked * factor[..., :, None, :, None]
    terms = blocked.reshape(terms.shape)
    return einsum_f32("...p,...po->...o", jnp.ones((*stack, parts), jnp.float32), terms)


def numbers(codes: UInt8[Array, "*stack P O"], *, packed: bool) -> tuple[Float[Array, "*stack P O"], ...]:
    """The numbers that codes stand for without their scales; of packed FP4 those of even inputs, then of odd ones."""
    return _halves(codes) if packed else (_e4m3(codes),)


def _halves(codes: UInt8[Array, "*stack P O"]) -> tuple[Float[Array, "*stack P O"], Float[Array, "*stack P O"]]:
    """The numbers of both halves of packed bytes, the low one first."""
    wide = codes.astype(jnp.int32)  # a TPU's core cannot shift bytes
    return _e2m1(wide & 15), _e2m1(wide >> 4)


def _e2m1(wide: Int[Array, "*stack P O"]) -> Float[Array, "*stack P O"]:
    """0, 0.5, 1, 1.5, 2, 3, 4, 6 by the low three bits, the sign by the fourth."""
    magnitude = wide & 7
    # Two bits of exponent and one of mantissa, in their places in a float32; 0 and 0.5 are below the normal numbers.
    normal = jax.lax.bitcast_convert_type((magnitude << 22) + (126 << 23), jnp.float32)
    value = jnp.where(magnitude < 2, 0.5 * magnitude.astype(jnp.float32), normal)
    return jnp.where(wide < 8, value, -value)


def _e4m3(codes: UInt8[Array, "*stack P O"]) -> Float[Array, "*stack P O"]:
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def _e4m3_on_cpu(codes: UInt8[Array, "*stack P O"]) -> Float[Array, "*stack P O"]:
    """The same by way of float16, whose subnormal numbers a processor converts at full speed; XLA does not use that."""
    wide = codes.astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type((wide & 0x80) << 8 | (wide & 0x7F) << 7, jnp.float16)
    return jnp.where(wide & 0x7F == 0x7F, jnp.nan, half.astype(jnp.float32) * 256)


def factors(scales: Shaped[Array, "*stack R C"]) -> tuple[Float[Array, "*stack R C"], ...]:
    """Factors whose product is the scale: of ``2^(b - 127)`` there are two, as a float32 of 2^-127 is subnormal."""
    if scales.dtype == jnp.float32:
        return (scales,)
    byte = scales.astype(jnp.int32)
    bits = jnp.where(byte == 255, 0x7FC00000, jnp.maximum(byte, 1) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32), jnp.where(byte == 0, jnp.float32(0.5), jnp.float32(1))


def in_source_form(module: _Module, config: Config, dtype: DTypeLike, *, prefix: str = "") -> _Module:
    """The module with zeros in the shapes and dtypes of weights that stay as published; for ``nnx.eval_shape``.

    ``nnx.eval_shape(lambda: in_source_form(Model(config, scanned=True), config, jnp.bfloat16))`` is a model whose
    quantised matrices are :class:`Encoded`, without any data. Where the config declares
    ``expert_dtype: fp8``, scales are float32, as in the Base releases, and without the field experts are FP4, as in the
    first revision of V4-Flash. A config that declares no quantisation has no matrices to encode.

    Args:
        module: a ``Model``, or a ``Block`` of it with the ``prefix`` of its paths (``layers.3.``).
        config: its config.
        dtype: of decoded matrices, and of the weights that no release quantises.
        prefix: what comes before the module's own names.
    """
    graph, state = nnx.split(module)
    flat = {}
    for key, variable in nnx.to_flat_state(state):
        flat[key] = variable
        if not isinstance(variable, Derived):
            rule = config.names.rule_of(prefix + paths_of(config, key)[0])
            flat[key] = variable.replace(_zeros(variable.shape, variable.dtype, rule, config, dtype))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _zeros(shape: tuple[int, ...], own: Any, rule: Rule, config: Config, dtype: DTypeLike) -> Any:
    if config.weight_block_size is None or rule.kind not in (Kind.LINEAR, Kind.EXPERT):
        return jnp.zeros(shape, dtype if rule.kind.follows_dtype else own)
    float_scales = config.expert_dtype == "fp8"
    packed = rule.kind is Kind.EXPERT and not float_scales
    block = block_of(rule, packed=packed, outputs=shape[-1])
    return empty(shape, packed=packed, float_scales=float_scales, block=block, dtype=dtype)

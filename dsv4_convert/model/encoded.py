"""Matrices as the codes and scales that a release publishes, decoded where they are used.

Shape letters: ``I`` inputs, ``O`` outputs of a matrix; ``P`` rows of its codes, ``I`` of FP8 and ``I / 2`` of packed
FP4; ``R`` and ``C`` blocks along its inputs and outputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import EllipsisType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt8

from dsv4_convert.errors import UsageError
from dsv4_convert.model.axes import Axes, partition
from dsv4_convert.model.numerics import round_to
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Kind, Rule, Transform
from dsv4_convert.spec.segments import paths_of

_Module = TypeVar("_Module", bound=nnx.Module)


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

    def rows(self, index: Int[Array, "*batch J"]) -> Float[Array, "*batch J O"]:
        """Decode some rows of a matrix whose rows have scales of their own."""
        if self.block[0] != 1 or self.packed or len(self.shape) != 2:
            raise IndexError("only rows with scales of their own can be decoded one by one")
        return decoded(self.codes[index], self.scales[index], self.block, packed=False, dtype=self.dtype)


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


def after(value: Float[Array, "..."], encoded: Encoded) -> Encoded:
    """Return ``encoded`` such that it is decoded only after ``value`` is computed.

    Decoded weights depend on no activation, so a compiler may decode all layers before the first one runs. XLA on CPU
    does so and ignores barriers: there the scales depend on a condition that the compiler cannot know to be false.
    """

    def on_cpu(value: Array, scales: Array) -> Array:
        return jnp.where(value.reshape(-1)[0] > jnp.inf, jnp.zeros_like(scales), scales)

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
    values = _e2m1(codes) if packed else _e4m3(codes)
    values = values.reshape(*stack, blocks[0], block[0], blocks[1], block[1])
    for factor in [scales] if scales.dtype == jnp.float32 else _powers(scales):
        values = values * factor[..., :, None, :, None]
    values = values.reshape(*stack, blocks[0] * block[0], blocks[1] * block[1])[..., :inputs, :outputs]
    # A product with a power of two needs no rounding.
    return round_to(values, dtype) if scales.dtype == jnp.float32 else values.astype(dtype)


def _e2m1(codes: UInt8[Array, "*stack P O"]) -> Float[Array, "*stack P 2 O"]:
    """0, 0.5, 1, 1.5, 2, 3, 4, 6 by the low three bits of each half of a byte, the sign by the fourth."""
    pairs = codes.astype(jnp.int32)
    half = jnp.stack([pairs & 15, pairs >> 4], axis=-2)
    magnitude = half & 7
    # Two bits of exponent and one of mantissa, in their places in a float32; 0 and 0.5 are below the normal numbers.
    normal = jax.lax.bitcast_convert_type((magnitude << 22) + (126 << 23), jnp.float32)
    value = jnp.where(magnitude < 2, 0.5 * magnitude.astype(jnp.float32), normal)
    return jnp.where(half < 8, value, -value)


def _e4m3(codes: UInt8[Array, "*stack P O"]) -> Float[Array, "*stack P O"]:
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def _powers(scales: UInt8[Array, "*stack R C"]) -> tuple[Float[Array, "*stack R C"], Float[Array, "*stack R C"]]:
    """Two factors whose product is ``2^(b - 127)``, NaN for 255; one factor cannot be 2^-127, a subnormal float32."""
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

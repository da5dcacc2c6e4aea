"""Where a model rounds intermediate values: only to the dtype of activations, or as DeepSeek's inference code does.

``PLAIN`` rounds results to the dtype of the activations and nothing else. A release model was trained to be quantised,
and its inference code quantises, or simulates quantisation:

* inputs of matrices that are stored in FP8 or FP4: FP8 in groups of 128 channels (not ``wo_a``, which runs in
  bfloat16);
* keys and compressed entries: FP8 in groups of 64, the rotated channels excepted;
* queries and entries of the indexer: a Hadamard rotation, then FP4 in groups of 32;
* compressors and router compute in float32; query heads are normalised, and the indexer scores, in bfloat16;
* attention takes keys in blocks of 64, rounds probabilities relative to the largest score so far, and divides by their
  sum after the sum over values;
* an expert's weight is multiplied in before its last matrix, and the outputs are added in float32.

On several GPUs that code also rounds each rank's part of ``wo_b``'s product and of the indexer's scores to bfloat16
before their sum. That is not modelled: results do not depend on a mesh.

Every scale is a power of two, found from the bits of a float32, so all of it is exact and equal on every platform.
Source: published inference code, ``kernel.py`` and ``model.py`` of its current revision.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv4_convert.errors import UsageError
from dsv4_convert.model.encoded import Matrix, product
from dsv4_convert.model.norm import unit_rms
from dsv4_convert.model.ops import round_then_f32, round_to
from dsv4_convert.spec.config import Config

#: Channels that share a scale in a key and in an indexer's vector.
_KEY, _INDEX = 64, 32
_FP8_MAX, _FP4_MAX = 448.0, 6.0
#: Smallest largest value of a group, so that no scale is zero.
_FP8_LEAST, _FP4_LEAST = 1e-4, 6 * 2.0**-126
#: Exponent of the smallest normal number, and bits of mantissa behind the point.
_FP8_FORM, _FP4_FORM = (-6, 3), (0, 1)
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The operations that release numerics round differently. ``quantized``: matrices are stored in FP8 or FP4."""

    release: bool = False
    quantized: bool = False

    #: Channels that share a scale in the input of a quantised matrix.
    input_group: ClassVar[int] = 128

    @classmethod
    def of_release(cls, config: Config) -> Numerics:
        """The numerics of DeepSeek's inference code for this model.

        Raises:
            UsageError: the groups that share a scale do not divide a width.
        """
        quantized = config.weight_block_size is not None
        inputs = {
            "hidden_size": config.hidden_size,
            "q_lora_rank": config.q_lora_rank,
            "o_groups * o_lora_rank": config.o_groups * config.o_lora_rank,
            "moe_intermediate_size": config.moe_intermediate_size,
        }
        group = cls.input_group
        wrong = [f"{name} {width}: a multiple of {group}" for name, width in inputs.items() if width % group]
        if wrong := [*(wrong if quantized else []), *cls._unsuitable(config)]:
            raise UsageError(f"release numerics quantise in groups, which needs {'; '.join(wrong)}")
        return cls(True, quantized)

    @classmethod
    def _unsuitable(cls, config: Config) -> list[str]:
        """Widths of keys and of the indexer that its groups do not divide."""
        wrong = []
        nope = config.head_dim - config.qk_rope_head_dim
        if nope % _KEY:
            wrong.append(f"head_dim - qk_rope_head_dim {nope}: a multiple of {_KEY}")
        if config.index_head_dim % _INDEX or config.index_head_dim & (config.index_head_dim - 1):
            wrong.append(f"index_head_dim {config.index_head_dim}: a power of two from {_INDEX} on")
        return wrong

    def weight_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """The dtype of weights where activations have ``dtype``: float32 holds decoded codes with any scale exactly."""
        return jnp.float32 if self.quantized else dtype

    def linear(self, x: Float[Array, "*batch inner"], w: Float[Matrix, "inner outer"]) -> Float[Array, "*batch outer"]:
        """Product with a matrix that a release stores in FP8 or FP4."""
        given, dtype = (self.input(x), w.dtype) if self.quantized else (x, x.dtype)
        return product(given, w, dtype).astype(x.dtype)

    def input(self, x: Float[Array, "*batch inner"]) -> Float[Array, "*batch inner"]:
        """Round the input of a matrix that a release stores in FP8 or FP4."""
        if self.quantized:
            return fp8_rounded(x, self.input_group)
        return round_to(x, x.dtype) if self.release else x

    def wide(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Convert the input of a compressor or a router, which a release computes in float32."""
        return round_then_f32(x) if self.release else x

    def query(self, q: Float[Array, "B S H C"], eps: float) -> Float[Array, "B S H C"]:
        """``q / rms(q)`` per head; a release rounds every step to the dtype of ``q``."""
        if not self.release:
            return unit_rms(q, eps)
        square = jnp.square(round_then_f32(q)).astype(q.dtype)
        mean = jnp.mean(round_then_f32(square), axis=-1, keepdims=True).astype(q.dtype)
        scale = jax.lax.rsqrt(round_then_f32((round_then_f32(mean) + eps).astype(q.dtype))).astype(q.dtype)
        return (round_then_f32(q) * round_then_f32(scale)).astype(q.dtype)

    def entry(self, entries: Float[Array, "B T C"], rotated: int) -> Float[Array, "B T C"]:
        """Round compressed entries; the last ``rotated`` channels are rotated."""
        return self.key(entries, rotated)

    def key(self, kv: Float[Array, "B X C"], rotated: int) -> Float[Array, "B X C"]:
        """Round a key to FP8, its last ``rotated`` channels excepted."""
        if not self.release:
            return kv
        nope, rope = jnp.split(kv, [kv.shape[-1] - rotated], axis=-1)
        return jnp.concatenate([fp8_rounded(nope, _KEY), rope], axis=-1)

    def sum_of_experts(self, total: Float[Array, "*batch D"], dtype: DTypeLike) -> Float[Array, "*batch D"]:
        """Round the float32 sum of the routed experts before the shared expert's output is added."""
        return total if self.release else total.astype(dtype)

    def indexed(self, x: Float[Array, "... Ci"]) -> Float[Array, "... Ci"]:
        """Rotate and round a query or entry of the indexer before it is scored."""
        return fp4_rounded(hadamard(x), _INDEX) if self.release else x


PLAIN = Numerics()


def fp8_rounded(x: Float[Array, "... width"], group: int) -> Float[Array, "... width"]:
    """Round to FP8 (e4m3) values with one power-of-two scale per ``group`` channels; the dtype stays."""
    return _rounded(x, group, _FP8_MAX, _FP8_LEAST, *_FP8_FORM)


def fp4_rounded(x: Float[Array, "... width"], group: int) -> Float[Array, "... width"]:
    """Round to FP4 (e2m1) values with one power-of-two scale per ``group`` channels; the dtype stays."""
    return _rounded(x, group, _FP4_MAX, _FP4_LEAST, *_FP4_FORM)


def hadamard(x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """Product with the orthonormal Hadamard matrix in Sylvester's order; float32 inside, the dtype of ``x`` out.

    Sums and differences of neighbours come first, because their order decides how sums are rounded.
    """
    width = x.shape[-1]
    values, half = round_then_f32(x), 1
    while half < width:
        pairs = values.reshape(*x.shape[:-1], width // (2 * half), 2, half)
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        values = jnp.stack([upper + lower, upper - lower], axis=-2).reshape(x.shape)
        half *= 2
    return (values * width**-0.5).astype(x.dtype)


def fp4_rounded_by_fp8(x: Float[Array, "... width"], group: int) -> Float[Array, "... width"]:
    """Round to FP4 (e2m1) values with one FP8 (e4m3) scale per ``group`` channels; the dtype stays.

    Such a scale is no power of two, so nothing is divided by it: platforms round quotients differently. Values are
    compared with the middles between FP4 values times the scale, which float32 holds exactly.
    """
    groups = round_then_f32(x).reshape(*x.shape[:-1], x.shape[-1] // group, group)
    magnitude = jnp.abs(groups)
    scale = _sixth_in_fp8(jnp.max(magnitude, axis=-1, keepdims=True))
    rounded = jnp.zeros_like(groups)
    for number, (below, above) in enumerate(itertools.pairwise(_FP4_VALUES)):
        middle = (below + above) / 2 * scale
        # A middle goes to the value with the even code.
        reached = magnitude >= middle if number % 2 else magnitude > middle
        rounded = jnp.where(reached, above, rounded)
    return jnp.copysign(rounded * scale, groups).reshape(x.shape).astype(x.dtype)


def _sixth_in_fp8(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The FP8 (e4m3) value nearest to ``x / 6``, the even one of two; not zero, and not above the largest."""
    x = jnp.clip(x, _FP4_MAX * 2.0**-9, _FP4_MAX * _FP8_MAX)
    smallest, mantissa = _FP8_FORM
    near = x * jnp.float32(1 / _FP4_MAX)
    exponent = (jax.lax.bitcast_convert_type(near, jnp.int32) >> 23) - 127
    step = _from_exponent(jnp.maximum(exponent, smallest) - mantissa)
    multiple = jnp.round(near / step)
    # The quotient was rounded; what remains of x is exact.
    rest, half = x - _FP4_MAX * step * multiple, _FP4_MAX / 2 * step
    odd = multiple % 2 == 1
    multiple += jnp.where((rest > half) | ((rest == half) & odd), 1.0, 0.0)
    multiple -= jnp.where((rest < -half) | ((rest == -half) & odd), 1.0, 0.0)
    return multiple * step


def _rounded(
    x: Float[Array, "... width"], group: int, most: float, least: float, smallest: int, mantissa: int
) -> Float[Array, "... width"]:
    groups = round_then_f32(x).reshape(*x.shape[:-1], x.shape[-1] // group, group)
    largest = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1, keepdims=True), least)
    scale = _power_of_two(largest * jnp.float32(1 / most))
    scaled = jnp.clip(groups / scale, -most, most)
    # The values of one binade are multiples of one step; subnormal values are multiples of the smallest binade's.
    exponent = (jax.lax.bitcast_convert_type(scaled, jnp.int32) >> 23) & 0xFF
    step = _from_exponent(jnp.maximum(exponent - 127, smallest) - mantissa)
    return (jnp.round(scaled / step) * step * scale).reshape(x.shape).astype(x.dtype)


def _power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The smallest power of two that is not below ``x``, from the bits of a positive normal float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return _from_exponent((bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0))


def _from_exponent(exponent: Array) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)

"""Where a model rounds on the way: as the mathematics alone asks for, or as DeepSeek's own inference code does.

``PLAIN`` rounds results to the dtype of the activations and nothing else. A release model was trained to be quantised,
and its inference code simulates that where it does not do it:

* inputs of matrices that are stored in FP8 or FP4: FP8 in groups of 128 channels (not ``wo_a``, which runs in
  bfloat16);
* keys and compressed entries: FP8 in groups of 64, the rotated channels excepted;
* queries and entries of the indexer: a Hadamard rotation, then FP4 in groups of 32;
* compressors and router compute in float32; query heads are normalised, and the indexer scores, in bfloat16;
* attention divides by the sum of probabilities after the sum over values; an expert's weight is multiplied in before
  its last matrix, and the outputs are added in float32.

Every scale is a power of two, found from the bits of a float32, so all of it is exact and equal on every platform.
Source: published inference code, ``kernel.py`` and ``model.py`` of its current revision.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv4_convert.errors import UsageError
from dsv4_convert.model.norm import unit_rms
from dsv4_convert.model.parameters import contract, linear
from dsv4_convert.spec.config import Config

#: Channels that share a scale: of the input of a quantised matrix, of a key, of an indexer's vector.
_INPUT, _KEY, _INDEX = 128, 64, 32
_FP8_MAX, _FP4_MAX = 448.0, 6.0
#: Smallest largest value of a group, so that no scale is zero.
_FP8_LEAST, _FP4_LEAST = 1e-4, 6 * 2.0**-126
#: Exponent of the smallest normal number, and bits of mantissa behind the point.
_FP8_FORM, _FP4_FORM = (-6, 3), (0, 1)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The places where the two ways differ. ``quantized``: whether matrices are stored in FP8 or FP4."""

    release: bool = False
    quantized: bool = False

    @classmethod
    def of_release(cls, config: Config) -> Numerics:
        """Those of DeepSeek's inference code for this model.

        Raises:
            UsageError: widths that its groups do not divide.
        """
        quantized = config.weight_block_size is not None
        nope = config.head_dim - config.qk_rope_head_dim
        inputs = {
            "hidden_size": config.hidden_size,
            "q_lora_rank": config.q_lora_rank,
            "o_groups * o_lora_rank": config.o_groups * config.o_lora_rank,
            "moe_intermediate_size": config.moe_intermediate_size,
        }
        wrong = [f"{name} {width}: a multiple of {_INPUT}" for name, width in inputs.items() if width % _INPUT]
        wrong = wrong if quantized else []
        if nope % _KEY:
            wrong.append(f"head_dim - qk_rope_head_dim {nope}: a multiple of {_KEY}")
        if config.index_head_dim % _INDEX or config.index_head_dim & (config.index_head_dim - 1):
            wrong.append(f"index_head_dim {config.index_head_dim}: a power of two from {_INDEX} on")
        if wrong:
            raise UsageError(f"release numerics quantise in groups, which needs {'; '.join(wrong)}")
        return cls(True, quantized)

    def held(self, dtype: DTypeLike) -> DTypeLike:
        """The dtype of weights beside activations in ``dtype``: float32 holds what codes with any scale stand for."""
        return jnp.float32 if self.quantized else dtype

    def linear(self, x: Float[Array, "*batch inner"], w: Float[Array, "inner outer"]) -> Float[Array, "*batch outer"]:
        """Product with a matrix that a release stores in FP8 or FP4."""
        return linear(x, w) if not self.quantized else contract("...i,io->...o", self.input(x), w).astype(x.dtype)

    def input(self, x: Float[Array, "*batch inner"]) -> Float[Array, "*batch inner"]:
        """What such a matrix is multiplied with."""
        if self.quantized:
            return fp8_rounded(x, _INPUT)
        return once(x) if self.release else x

    def wide(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Input of a compressor or a router."""
        return widened(x) if self.release else x

    def query(self, q: Float[Array, "B S H C"], eps: float) -> Float[Array, "B S H C"]:
        """``q / rms(q)`` per head; a release rounds every step to the dtype of ``q``."""
        if not self.release:
            return unit_rms(q, eps)
        square = jnp.square(widened(q)).astype(q.dtype)
        mean = jnp.mean(widened(square), axis=-1, keepdims=True).astype(q.dtype)
        scale = jax.lax.rsqrt(widened((widened(mean) + eps).astype(q.dtype))).astype(q.dtype)
        return (widened(q) * widened(scale)).astype(q.dtype)

    def key(self, kv: Float[Array, "B X C"], rotated: int) -> Float[Array, "B X C"]:
        """A key, or compressed entry, as it is attended to; its last ``rotated`` channels are left alone."""
        if not self.release:
            return kv
        kept, turned = jnp.split(kv, [kv.shape[-1] - rotated], axis=-1)
        return jnp.concatenate([fp8_rounded(kept, _KEY), turned], axis=-1)

    def sum_of_experts(self, total: Float[Array, "*batch D"], dtype: DTypeLike) -> Float[Array, "*batch D"]:
        """The float32 sum as it is added to the shared expert's output."""
        return total if self.release else total.astype(dtype)

    def indexed(self, x: Float[Array, "... Ci"]) -> Float[Array, "... Ci"]:
        """A query or entry of the indexer as it is scored with."""
        return fp4_rounded(hadamard(x), _INDEX) if self.release else x


PLAIN = Numerics()


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x`` as float32, rounded to the dtype that it has now.

    Said twice, because XLA may leave out a conversion to bfloat16 that is followed by one back.
    """
    form = jnp.finfo(x.dtype)  # type: ignore[no-untyped-call]
    return jax.lax.reduce_precision(x.astype(jnp.float32), form.nexp, form.nmant)


def once(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x``, whose rounding to its dtype cannot be left out: see :func:`widened`."""
    return widened(x).astype(x.dtype)


def fp8_rounded(x: Float[Array, "... width"], group: int) -> Float[Array, "... width"]:
    """The nearest values that FP8 (e4m3) has with one power of two as scale per ``group`` channels; the dtype stays."""
    return _rounded(x, group, _FP8_MAX, _FP8_LEAST, *_FP8_FORM)


def fp4_rounded(x: Float[Array, "... width"], group: int) -> Float[Array, "... width"]:
    """The nearest values that FP4 (e2m1) has with one power of two as scale per ``group`` channels; the dtype stays."""
    return _rounded(x, group, _FP4_MAX, _FP4_LEAST, *_FP4_FORM)


def hadamard(x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """Product with the orthonormal Hadamard matrix in Sylvester's order; float32 inside, the dtype of ``x`` out.

    In steps of sums and differences, neighbours first, because their order decides how the sums are rounded.
    """
    width = x.shape[-1]
    values, half = widened(x), 1
    while half < width:
        pairs = values.reshape(*x.shape[:-1], width // (2 * half), 2, half)
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        values = jnp.stack([upper + lower, upper - lower], axis=-2).reshape(x.shape)
        half *= 2
    return (values * width**-0.5).astype(x.dtype)


def _rounded(
    x: Float[Array, "... width"], group: int, most: float, least: float, smallest: int, mantissa: int
) -> Float[Array, "... width"]:
    groups = widened(x).reshape(*x.shape[:-1], x.shape[-1] // group, group)
    largest = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1, keepdims=True), least)
    scale = _power_of_two(largest * jnp.float32(1 / most))
    scaled = jnp.clip(groups / scale, -most, most)
    # Numbers of one binade are multiples of one step, and below the smallest normal one of its step.
    exponent = (jax.lax.bitcast_convert_type(scaled, jnp.int32) >> 23) & 0xFF
    step = _from_exponent(jnp.maximum(exponent - 127, smallest) - mantissa)
    return (jnp.round(scaled / step) * step * scale).reshape(x.shape).astype(x.dtype)


def _power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The smallest power of two that is not below ``x``, from the bits of a positive normal float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return _from_exponent((bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0))


def _from_exponent(exponent: Array) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)

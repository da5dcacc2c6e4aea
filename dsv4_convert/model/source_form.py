"""A model whose quantised matrices are held as a release publishes them: its shapes, from a config alone."""

from __future__ import annotations

from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dsv4_convert.model.encoded import FP4_BLOCK, FP8_BLOCK, empty, grouped_block
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Kind, Rule, Transform, rule_of
from dsv4_convert.spec.segments import paths_of

_Module = TypeVar("_Module", bound=nnx.Module)


def in_source_form(module: _Module, config: Config, dtype: DTypeLike, *, prefix: str = "") -> _Module:
    """The module with zeros of the shapes and dtypes that weights in source form take; for ``nnx.eval_shape``.

    ``nnx.eval_shape(lambda: in_source_form(Model(config, scanned=True), config, jnp.bfloat16))`` is a model whose
    quantised matrices are :class:`~dsv4_convert.model.encoded.Encoded`, without any data. Where the config declares
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
        rule = rule_of(prefix + paths_of(config, key)[0])
        flat[key] = variable.replace(_zeros(variable.shape, variable.dtype, rule, config, dtype))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _zeros(shape: tuple[int, ...], own: Any, rule: Rule, config: Config, dtype: DTypeLike) -> Any:
    if config.weight_block_size is None or rule.kind not in (Kind.LINEAR, Kind.EXPERT):
        return jnp.zeros(shape, dtype if rule.kind.follows_dtype else own)
    float_scales = config.expert_dtype == "fp8"
    packed = rule.kind is Kind.EXPERT and not float_scales
    block = FP4_BLOCK if packed else grouped_block(shape[-1]) if rule.transform is Transform.GROUPED else FP8_BLOCK
    return empty(shape, packed=packed, float_scales=float_scales, block=block, dtype=dtype)

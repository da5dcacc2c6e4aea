"""The forward pass of a whole model as a program for a mesh, without weights: only shapes, dtypes and shardings.

Shape letters: ``B`` prompts, ``S`` tokens of each, ``V`` vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dsv4_convert.errors import UsageError
from dsv4_convert.model import Cache
from dsv4_convert.model.architectures import model_of
from dsv4_convert.model.axes import RULES, named, partition
from dsv4_convert.model.encoded import Encoded, in_source_form, on_mesh
from dsv4_convert.model.mesh import describe_mesh
from dsv4_convert.model.model import Decoder
from dsv4_convert.model.ops import Derived
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.segments import paths_of

State = nnx.State[Any, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One program to compile.

    Attributes:
        tokens: tokens of each prompt; with ``decode`` the capacity of the cache.
        batch: number of prompts.
        decode: compute one more token of each prompt from the cache instead of whole prompts.
        dtype: dtype of activations and of the weights that follow it.
        source: keep quantised matrices as codes and scales.
    """

    tokens: int
    batch: int
    decode: bool = False
    dtype: np.dtype[Any] = dataclasses.field(default_factory=lambda: np.dtype(jnp.bfloat16))
    source: bool = False


def prompts_of(sizes: Mapping[str, int]) -> int:
    """One prompt for each part that a mesh of these ``sizes`` splits prompts into."""
    return math.prod(sizes.get(name, 1) for name in RULES["batch"])


def first_layers(config: Config, count: int) -> Config:
    """The architecture with its first ``count`` layers only, and without mtp stages.

    Raises:
        UsageError: it has fewer.
    """
    if not 1 <= count <= config.num_hidden_layers:
        raise UsageError(f"{count} layers: the model has {config.num_hidden_layers}")
    return config.of_layers(range(count))


def weights(config: Config, mesh: Mesh, job: Job) -> tuple[nnx.GraphDef[Decoder], State]:
    """The scanned model, and shape, dtype and sharding of every weight.

    Raises:
        UsageError: a mesh axis does not divide a weight.
    """

    def model() -> Decoder:
        plain = model_of(config, scanned=True)
        return in_source_form(plain, config, job.dtype) if job.source else plain

    graph, state = nnx.split(nnx.eval_shape(model))
    placed = {}
    for key, variable in nnx.to_flat_state(state):
        path = paths_of(config, key)[0]
        value = variable.get_value()
        stays = isinstance(value, Encoded) or isinstance(variable, Derived)
        if not stays and config.names.rule_of(path).kind.follows_dtype:
            value = jax.ShapeDtypeStruct(value.shape, job.dtype)
        placed[key] = variable.replace(on_mesh(value, variable.axes, mesh, what=path))
    return graph, nnx.from_flat_state(placed)


def lowered(config: Config, mesh: Mesh, job: Job) -> jax.stages.Lowered:
    """The program before it is compiled: logits of all tokens of whole prompts, or of the next ones.

    Raises:
        UsageError: a mesh axis does not divide what it splits, or more tokens than the model has positions.
    """
    _check(config, mesh, job)
    graph, state = weights(config, mesh, job)
    ids = _placed(mesh, "batch tokens", (job.batch, 1 if job.decode else job.tokens), jnp.int32)
    # The abstract mesh, since the devices do not exist.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if not job.decode:

            def forward(state: State, ids: jax.Array) -> jax.Array:
                return nnx.merge(graph, state)(ids, dtype=job.dtype)

            return jax.jit(forward).trace(state, ids).lower(lowering_platforms=("tpu",))

        parts, form = cache(config, mesh, job)

        def step(state: State, ids: jax.Array, parts: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
            logits, after = nnx.merge(graph, state).extend(ids, jax.tree.unflatten(form, parts))
            return logits, jax.tree.leaves(after)

        return jax.jit(step, donate_argnums=2).trace(state, ids, parts).lower(lowering_platforms=("tpu",))


def cache(config: Config, mesh: Mesh, job: Job) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    """The arrays of the cache, split over prompts as the batch is, and their tree."""
    forms = []

    def arrays() -> list[jax.Array]:
        empty = Cache.empty(config, job.batch, job.tokens, dtype=job.dtype, scanned=True)
        forms.append(jax.tree.structure(empty))
        return jax.tree.leaves(empty)

    shapes = jax.eval_shape(arrays)
    # Layers are stacked; the numbers of tokens per prompt are not.
    axes = ["layer batch" if len(part.shape) > 1 else "batch" for part in shapes]
    return [_placed(mesh, own, part.shape, part.dtype) for own, part in zip(axes, shapes, strict=True)], forms[0]


def argument_bytes(config: Config, mesh: Mesh, job: Job) -> int:
    """Bytes of weights and cache on one device."""
    _, state = weights(config, mesh, job)
    parts = jax.tree.leaves((state, cache(config, mesh, job)[0] if job.decode else None))
    return sum(math.prod(part.sharding.shard_shape(part.shape)) * part.dtype.itemsize for part in parts)


def _check(config: Config, mesh: Mesh, job: Job) -> None:
    if job.tokens > config.max_position_embeddings:
        raise UsageError(f"{job.tokens} tokens: max_position_embeddings is {config.max_position_embeddings}")
    if job.decode and mesh.shape.get("sequence", 1) > 1:
        raise UsageError(
            f"mesh {describe_mesh(mesh.shape)}: the axis sequence splits the tokens of a prompt, and decoding has one; "
            "leave it out"
        )


def _placed(mesh: Mesh, axes: str, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array whose first dimensions have these logical axes; the others are not split."""
    first = named(axes)
    spec = partition(first, shape[: len(first)], mesh.shape, what=f"{shape[0]} prompts" if axes == "batch" else "input")
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

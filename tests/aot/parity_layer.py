"""The compiled layer of a parity run, made by the compiler of a slice that is not there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_convert.aot import Slice
from dsv4_convert.model import PLAIN
from dsv4_convert.model.cache import Past, empty_layer
from dsv4_convert.model.encoded import in_source_form, partitions
from dsv4_convert.model.layers import Layers
from dsv4_convert.model.mesh import make_mesh
from dsv4_convert.parity.compiled import LayerProgram, run_layer
from dsv4_convert.parity.programs import stack_of
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.segments import paths_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is compiled: a layer, how it runs, and for which devices.

    ``tokens``: of each prompt, or room in the cache where one token is decoded. ``recorded``: the taps are results.
    """

    layer: int
    where: str
    mesh: dict[str, int]
    prompts: int
    tokens: int
    decode: bool = False
    recorded: bool = True
    scanned: bool = False
    encoded: bool = False


def compile_layer(config: Config, job: Job) -> jax.stages.Compiled:
    """``run_layer`` of ``parity/compiled.py`` as a program, whose results are streams, taps and the new state."""
    over = make_mesh(job.mesh, Slice.parse(job.where).devices())
    program, state = _program(config, over, job)
    tokens = 1 if job.decode else job.tokens
    batch = PartitionSpec(tuple(name for name in ("data", "fsdp", "expert") if name in job.mesh))
    streams = _on(over, (job.prompts, tokens, config.hc_mult, config.hidden_size), jnp.float32, batch)
    ids = _on(over, (job.prompts, tokens), jnp.int32, batch)
    chosen = _on(over, (job.prompts, tokens, config.num_experts_per_tok), jnp.int32, batch)
    parts, form = _cache(config, job) if job.decode else ([], None)
    before = [_on(over, part.shape, part.dtype, batch) for part in parts]
    count = _on(over, (job.prompts,), jnp.int32, batch)

    def run(state: Any, streams: Any, ids: Any, chosen: Any, count: Any, before: Any) -> Any:
        past = Past(jax.tree.unflatten(form, before), count, count) if job.decode else None
        left, values, after = run_layer(program, state, streams, ids, ids, {"ffn.gate.experts": chosen}, past)
        return left, values, jax.tree.leaves(after)

    with jax.sharding.use_abstract_mesh(over.abstract_mesh):
        traced = jax.jit(run).trace(state, streams, ids, chosen, count, before)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def _program(config: Config, mesh: Mesh, job: Job) -> tuple[LayerProgram, Any]:
    """The program of the layer, and the shapes and shardings of its weights."""
    stack = config.of_layers(stack_of(config, job.layer, scanned=job.scanned))

    def make() -> Layers:
        layers = Layers(stack, PLAIN, scanned=job.scanned)
        return in_source_form(layers, stack, jnp.float32) if job.encoded else layers

    graph, state = nnx.split(nnx.eval_shape(make))
    placed = {}
    for key, variable in nnx.to_flat_state(state):
        specs = partitions(variable.get_value(), variable.axes, mesh.shape, what=paths_of(stack, key)[0])
        placed[key] = variable.replace(
            jax.tree.map(lambda part, spec: _on(mesh, part.shape, part.dtype, spec), variable.get_value(), specs)
        )
    return LayerProgram(graph, stack.num_hidden_layers, job.tokens, job.recorded), nnx.from_flat_state(placed)


def _on(mesh: Mesh, shape: Sequence[int], dtype: Any, spec: PartitionSpec | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, spec or PartitionSpec()))


def _cache(config: Config, job: Job) -> tuple[list[Any], Any]:
    """Shapes of the layer's state, and their tree."""
    forms = []

    def arrays() -> list[Any]:
        empty = empty_layer(config, config.layer_kind(job.layer), job.prompts, job.tokens, jnp.float32)
        forms.append(jax.tree.structure(empty))
        return jax.tree.leaves(empty)

    return jax.eval_shape(arrays), forms[0]

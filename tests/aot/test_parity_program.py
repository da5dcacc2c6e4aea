"""The compiled layer of a parity run through TPU compilers: with taps and without, whole prompts and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_convert.aot import Slice
from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.model import PLAIN
from dsv4_convert.model.cache import Past, empty_layer
from dsv4_convert.model.encoded import in_source_form, partitions
from dsv4_convert.model.experts import ExpertPath
from dsv4_convert.model.layers import Layers
from dsv4_convert.model.mesh import make_mesh
from dsv4_convert.parity.compiled import LayerProgram, blocks_of, run_layer
from dsv4_convert.parity.programs import stack_of
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.segments import paths_of
from dsv4_convert.spec.taps import taps_of

#: Widths that a TPU's tiles like; a window-only layer, then twice a CSA and an HCA layer.
RAW = tiny_config(
    num_hidden_layers=5,
    num_hash_layers=1,
    compress_ratios=[0, 4, 128, 4, 128, 0],
    hidden_size=256,
    head_dim=128,
    moe_intermediate_size=256,
    n_routed_experts=8,
    q_lora_rank=128,
    o_lora_rank=128,
    quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
)
LAYER, PROMPTS, TOKENS = 3, 4, 256


def _program(
    config: Config, mesh: Mesh, *, recorded: bool, scanned: bool, encoded: bool, experts: ExpertPath | None
) -> tuple[LayerProgram, Any]:
    """The program of the layer, and the shapes and shardings of its weights."""
    stack = config.of_layers(stack_of(config, LAYER, scanned=scanned))

    def make() -> Layers:
        layers = Layers(stack, PLAIN, scanned=scanned)
        return in_source_form(layers, stack, jnp.float32) if encoded else layers

    layers = nnx.eval_shape(make)
    for block in blocks_of(layers):
        block.ffn.experts.path = experts
    graph, state = nnx.split(layers)
    placed = {}
    for key, variable in nnx.to_flat_state(state):
        specs = partitions(variable.get_value(), variable.axes, mesh.shape, what=paths_of(stack, key)[0])
        placed[key] = variable.replace(
            jax.tree.map(lambda part, spec: _on(mesh, part.shape, part.dtype, spec), variable.get_value(), specs)
        )
    return LayerProgram(graph, stack.num_hidden_layers, TOKENS, recorded), nnx.from_flat_state(placed)


def _on(mesh: Mesh, shape: Sequence[int], dtype: Any, spec: PartitionSpec | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, spec or PartitionSpec()))


def _state(config: Config) -> tuple[list[Any], Any]:
    """Shapes of the layer's state, and their tree."""
    forms = []

    def arrays() -> list[Any]:
        empty = empty_layer(config, config.layer_kind(LAYER), PROMPTS, TOKENS, jnp.float32)
        forms.append(jax.tree.structure(empty))
        return jax.tree.leaves(empty)

    return jax.eval_shape(arrays), forms[0]


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("where", "mesh", "decode", "recorded", "scanned", "encoded"),
    [
        ("v5p-8", {"fsdp": 2, "expert": 2}, False, True, False, False),
        ("v5p-8", {"fsdp": 2, "expert": 2}, False, False, False, False),
        ("v5p-8", {"fsdp": 2, "expert": 2}, True, True, True, False),
        ("v6e-4", {"expert": 2, "sequence": 2}, False, True, True, False),
        ("v6e-4", {"expert": 2, "sequence": 2}, False, False, True, False),
        ("v6e-4", {"data": 4}, True, True, False, True),
        ("v5p-8", {"expert": 4}, False, False, True, True),
    ],
)
def test_it_compiles_for_a_slice(
    where: str, mesh: dict[str, int], decode: bool, recorded: bool, scanned: bool, encoded: bool
) -> None:
    config = Config.from_hf(RAW)
    over = make_mesh(mesh, Slice.parse(where).devices())
    program, state = _program(config, over, recorded=recorded, scanned=scanned, encoded=encoded, experts=None)
    tokens = 1 if decode else TOKENS
    batch = PartitionSpec(tuple(name for name in ("data", "fsdp", "expert") if name in mesh))
    streams = _on(over, (PROMPTS, tokens, config.hc_mult, config.hidden_size), jnp.float32, batch)
    ids = _on(over, (PROMPTS, tokens), jnp.int32, batch)
    chosen = _on(over, (PROMPTS, tokens, config.num_experts_per_tok), jnp.int32, batch)
    parts, form = _state(config) if decode else ([], None)
    before = [_on(over, part.shape, part.dtype, batch) for part in parts]
    count = _on(over, (PROMPTS,), jnp.int32, batch)

    def run(state: Any, streams: Any, ids: Any, chosen: Any, count: Any, before: Any) -> Any:
        past = Past(jax.tree.unflatten(form, before), count, count) if decode else None
        left, values, after = run_layer(program, state, streams, ids, ids, {"ffn.gate.experts": chosen}, past)
        return left, values, jax.tree.leaves(after)

    with jax.sharding.use_abstract_mesh(over.abstract_mesh):
        traced = jax.jit(run).trace(state, streams, ids, chosen, count, before)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    left, values, after = compiled.out_info
    assert left.shape == streams.shape
    wanted = {tap.name for tap in taps_of(config, LAYER)} - {"attn.indexer.scores"}
    assert set(values) == (wanted if recorded else set())
    assert len(after) == len(parts)

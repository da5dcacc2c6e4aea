"""Run by test_sharding.py on eight simulated devices: the sharded, scanned model and its draft against the plain one.

``python -m tests.model.sharded v4 N``: V4, or V4.1, on the mesh N of :data:`MESHES`.
"""

from __future__ import annotations

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv4_convert.golden.synthetic import dspark_config, tiny_v41_config
from dsv4_convert.model import Cache
from dsv4_convert.model.architectures import model_of
from dsv4_convert.model.axes import Axes
from dsv4_convert.model.cache import Past, empty_stages
from dsv4_convert.model.dspark import Drafted
from dsv4_convert.model.encoded import on_mesh
from dsv4_convert.model.mesh import make_mesh
from dsv4_convert.model.model import Decoder
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.segments import segments
from tests.model.weights import random_model

TOKENS, ROOM = 48, 56
MESHES = ({"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "expert": 2, "sequence": 2})

#: A first and a last draft stage. The tokens of their block are as many as two devices can share.
_DRAFTS = {"dspark_block_size": 6, "dspark_target_layer_ids": [5, 6], "num_nextn_predict_layers": 2}
#: Two layers of most kinds, so that something is stacked, and how often each pattern repeats.
_KINDS = [0, 0, 4, 128, 4, 128, 4]
CONFIGS = {
    "v4": (
        Config.from_hf(dspark_config(num_hidden_layers=7, compress_ratios=[*_KINDS, 0, 0], num_hash_layers=3,
                                     **_DRAFTS)),
        [2, 1, 2],
    ),
    "v4.1": (
        Config.from_hf(tiny_v41_config(num_hidden_layers=8, compress_ratios=[0, 0, 2, 2, 2, 1, 1, 1, 0, 0],
                                       kv_source_layer_ids=[2, 5], index_source_layer_ids=[2, 5, 6, 7],
                                       candidate_source_layer_id=5, engram_layer_ids=[1, 5], **_DRAFTS)),
        [1, 1, 1, 2, 1, 2],
    ),
}  # fmt: skip


def scanned(config: Config, state: nnx.State) -> tuple[nnx.GraphDef, dict]:
    """The same weights, stacked."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: model_of(config, scanned=True)))
    plain = {key: variable[...] for key, variable in nnx.to_flat_state(state)}
    flat = {}
    for key, variable in nnx.to_flat_state(abstract):
        if key[:2] == ("layers", "segments"):
            layers = segments(config)[key[2]].layers(key[3])
            value = jnp.stack([plain["layers", layer, *key[4:]] for layer in layers])
        else:
            value = plain[key]
        flat[key] = variable.replace(value)
    return graph, flat


def laid_over(value: jax.Array, axes: Axes, mesh: Mesh, *, what: str) -> jax.Array:
    """An array on a mesh. Its padding is NaN: a model that reads it has NaN for logits."""
    on = on_mesh(value, axes, mesh, what=what)
    more = [(0, large - own) for large, own in zip(on.shape, value.shape, strict=True)]
    return jax.device_put(jnp.pad(value, more, constant_values=np.nan) if any(map(max, more)) else value, on.sharding)


def main() -> None:
    assert len(jax.devices()) == 8
    model, number = sys.argv[1:]
    config, repeats = CONFIGS[model]
    assert [part.repeats for part in segments(config)] == repeats
    graph, state = random_model(config)
    graphs, flat = scanned(config, state)
    rng = np.random.default_rng(0)

    def drafting(model: Decoder, ids: jax.Array) -> tuple[jax.Array, Drafted]:
        """The logits, and a draft after the last token."""
        reading, nothing = model.reading_drafts(), jnp.zeros(len(ids), jnp.int32)
        past = Past(empty_stages(config, len(ids), jnp.float32), nothing, nothing + ids.shape[1])
        logits = model(ids, taps=reading)
        return logits, model.propose(reading, jnp.roll(ids, -1, axis=1), nothing, past)[0]

    def whole(state: nnx.State, ids: jax.Array) -> tuple[jax.Array, Drafted]:
        return drafting(nnx.merge(graph, state), ids)

    def run(state: nnx.State, ids: jax.Array) -> tuple[jax.Array, Drafted]:
        return drafting(nnx.merge(graphs, state), ids)

    def step(state: nnx.State, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return nnx.merge(graphs, state).extend(ids, cache)

    ids = jnp.asarray(rng.integers(0, config.vocab_size, (4, TOKENS)), jnp.int32)
    expected, draft = jax.tree.map(np.asarray, jax.jit(whole)(state, ids))
    unsharded = jax.jit(lambda state, ids: nnx.merge(graphs, state)(ids))(nnx.from_flat_state(flat), ids)
    assert np.array_equal(unsharded, expected), "scanned layers are not the layers one by one"
    sizes = MESHES[int(number)]
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        placed = nnx.from_flat_state(
            {
                key: variable.replace(laid_over(variable[...], variable.axes, mesh, what=str(key)))
                for key, variable in flat.items()
            }
        )
        found, drafted = jax.jit(run)(placed, ids)
        apart = math.prod(sizes.get(name, 1) for name in ("data", "fsdp", "expert", "sequence", "tensor"))
        assert found.addressable_shards[0].data.size * apart == found.size, (sizes, found.sharding)
        np.testing.assert_allclose(found, expected, atol=3e-6, err_msg=str(sizes))
        assert np.array_equal(drafted.tokens, draft.tokens)
        for part, of_one in zip(drafted[1:], draft[1:], strict=True):
            np.testing.assert_allclose(part, of_one, atol=1e-5, err_msg=f"a draft on {sizes}")
        if "sequence" not in sizes:
            extend = jax.jit(step, donate_argnums=2)
            cache = Cache.empty(config, len(ids), ROOM, scanned=True)
            first, cache = extend(placed, ids[:, : TOKENS - 1], cache)
            last, cache = extend(placed, ids[:, TOKENS - 1 :], cache)
            together = np.concatenate([first, last], axis=1)
            np.testing.assert_allclose(together, expected, atol=3e-6, err_msg=f"decoding on {sizes}")
    print(model, "agrees on", sizes)


if __name__ == "__main__":
    main()

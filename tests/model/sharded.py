"""Run by test_sharding.py on eight simulated devices: the sharded, scanned model against the plain one.

``python -m tests.model.sharded N``: on the mesh N of :data:`MESHES`.
"""

from __future__ import annotations

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from dsv4_convert.config import Config
from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.model import Cache, Model
from dsv4_convert.model.axes import partition
from dsv4_convert.model.mesh import make_mesh
from dsv4_convert.model.segments import segments
from tests.model.weights import random_model

TOKENS, ROOM = 48, 56
MESHES = ({"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "expert": 2, "sequence": 2})


def scanned(config: Config, state: nnx.State) -> tuple[nnx.GraphDef, dict]:
    """The same weights, stacked."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Model(config, scanned=True)))
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


def main() -> None:
    assert len(jax.devices()) == 8
    # Two layers of most kinds, so that something is stacked.
    kinds = [0, 0, 4, 128, 4, 128, 4]
    changes = {"num_hidden_layers": len(kinds), "compress_ratios": [*kinds, 0], "num_hash_layers": 3}
    config = Config.from_hf(tiny_config(**changes))
    assert [part.repeats for part in segments(config)] == [2, 1, 2]
    graph, state = random_model(config)
    graphs, flat = scanned(config, state)
    rng = np.random.default_rng(0)

    def whole(state: nnx.State, ids: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(ids)

    def run(state: nnx.State, ids: jax.Array) -> jax.Array:
        return nnx.merge(graphs, state)(ids)

    def step(state: nnx.State, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return nnx.merge(graphs, state).extend(ids, cache)

    ids = jnp.asarray(rng.integers(0, config.vocab_size, (4, TOKENS)), jnp.int32)
    expected = np.asarray(jax.jit(whole)(state, ids))
    unsharded = jax.jit(run)(nnx.from_flat_state(flat), ids)
    assert np.array_equal(unsharded, expected), "scanned layers are not the layers one by one"
    sizes = MESHES[int(sys.argv[1])]
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        placed = nnx.from_flat_state(
            {
                key: variable.replace(
                    jax.device_put(
                        variable[...],
                        NamedSharding(mesh, partition(variable.axes, variable.shape, sizes, what=str(key))),
                    )
                )
                for key, variable in flat.items()
            }
        )
        found = jax.jit(run)(placed, ids)
        apart = math.prod(sizes.get(name, 1) for name in ("data", "fsdp", "expert", "sequence", "tensor"))
        assert found.addressable_shards[0].data.size * apart == found.size, (sizes, found.sharding)
        np.testing.assert_allclose(found, expected, atol=3e-6, err_msg=str(sizes))
        if "sequence" not in sizes:
            extend = jax.jit(step, donate_argnums=2)
            cache = Cache.empty(config, len(ids), ROOM, scanned=True)
            first, cache = extend(placed, ids[:, : TOKENS - 1], cache)
            last, cache = extend(placed, ids[:, TOKENS - 1 :], cache)
            together = np.concatenate([first, last], axis=1)
            np.testing.assert_allclose(together, expected, atol=3e-6, err_msg=f"decoding on {sizes}")
    print("agrees on", sizes)


if __name__ == "__main__":
    main()

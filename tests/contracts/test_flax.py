"""The parts of Flax's NNX that the model, its restoring and its programs rely on."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@jax.tree_util.register_dataclass
@dataclass
class Pair:
    """Held by a variable instead of an array, as encoded weights are."""

    left: jax.Array
    right: jax.Array


class Buffer(nnx.Variable[jax.Array]):
    """A kind of variable of our own."""


class Block(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.arange(6.0).reshape(2, 3))
        self.table = Buffer(jnp.arange(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...] + self.table[...].sum()


class Stack(nnx.Module):
    def __init__(self) -> None:
        self.layers = nnx.List([Block(), Block()])


def test_variables_have_paths_of_attribute_names_and_list_positions() -> None:
    flat = dict(nnx.to_flat_state(nnx.state(Stack())))
    assert set(flat) == {("layers", index, name) for index in (0, 1) for name in ("kernel", "table")}
    assert isinstance(flat["layers", 0, "kernel"], nnx.Param)
    assert isinstance(flat["layers", 1, "table"], Buffer)


def test_a_module_without_memory_is_filled_by_path() -> None:
    shapes = nnx.eval_shape(Stack)
    flat = dict(nnx.to_flat_state(nnx.state(shapes)))
    assert all(isinstance(variable.get_value(), jax.ShapeDtypeStruct) for variable in flat.values())
    filled = {path: variable.replace(jnp.ones(variable.shape, variable.dtype)) for path, variable in flat.items()}
    stack = nnx.merge(nnx.graphdef(shapes), nnx.from_flat_state(filled))
    np.testing.assert_array_equal(stack.layers[1](jnp.ones((1, 2))), [[4, 4, 4]])


def test_a_split_module_passes_through_jit_and_scan() -> None:
    graph, state = nnx.split(Block())
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    np.testing.assert_array_equal(run(state, jnp.ones((1, 2))), [[4, 6, 8]])
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    total, _ = jax.lax.scan(
        lambda sum, one: (sum + nnx.merge(graph, one)(jnp.ones((1, 2))), None), jnp.zeros((1, 3)), stacked
    )
    np.testing.assert_array_equal(total, [[8, 12, 16]])


def test_a_variable_holds_what_is_not_an_array() -> None:
    block = Block()
    block.kernel.set_value(Pair(jnp.zeros(2), jnp.ones(3)))
    graph, state = nnx.split(block)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state)) == [(2,), (2,), (3,)]
    assert isinstance(nnx.merge(graph, state).kernel.get_value(), Pair)

"""The parts of JAX that may move: what lies outside of jax.numpy, and what XLA must not simplify away."""

from __future__ import annotations

from inspect import signature

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils, multihost_utils, topologies
from jax.sharding import AxisType, Mesh, PartitionSpec

from dsv4_convert.formats import decode_fp4
from dsv4_convert.weights.parameters import stacked


def mesh() -> Mesh:
    devices = mesh_utils.create_device_mesh((1, 1), jax.devices()[:1])
    return Mesh(devices, ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)


def test_a_sharded_function_asks_for_the_mesh_around_it() -> None:
    assert jax.sharding.get_abstract_mesh().empty

    def run(x: jax.Array) -> jax.Array:
        part = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
        every = jax.lax.all_gather(part, "fsdp", axis=0, tiled=True)
        every = jax.lax.all_to_all(every, "expert", split_axis=0, concat_axis=0, tiled=True)
        return jax.lax.psum(every, "expert") + jax.lax.axis_index("fsdp")

    def program(x: jax.Array) -> jax.Array:
        around = jax.sharding.get_abstract_mesh()
        assert dict(around.shape) == {"fsdp": 1, "expert": 1}
        spec = PartitionSpec("fsdp", None)
        return jax.shard_map(run, mesh=around, in_specs=spec, out_specs=spec, check_vma=False)(x)

    x = jnp.arange(6.0).reshape(2, 3)
    with jax.set_mesh(mesh()):
        np.testing.assert_array_equal(jax.jit(program)(x), x)
    with jax.sharding.use_abstract_mesh(mesh().abstract_mesh):
        assert jax.jit(program).trace(jax.ShapeDtypeStruct(x.shape, x.dtype)).jaxpr


def test_a_compiled_program_says_what_memory_it_takes() -> None:
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32))
    (argument,) = jax.tree.leaves(lowered.args_info[0])
    assert (argument.shape, argument.dtype) == ((64, 64), jnp.float32)
    compiled = lowered.compile()
    assert "HloModule" in str(compiled.as_text())
    stats = compiled.memory_analysis()
    assert stats.argument_size_in_bytes == stats.output_size_in_bytes == 4 * 64 * 64
    assert {"alias_size_in_bytes", "temp_size_in_bytes", "generated_code_size_in_bytes"} <= set(dir(stats))


def test_rounding_to_bfloat16_and_back_happens() -> None:
    """XLA may drop a pair of conversions; it leaves ``reduce_precision`` alone."""
    x = jnp.float32(1 + 2**-12)
    form = jnp.finfo(jnp.bfloat16)
    assert jax.jit(lambda x: jax.lax.reduce_precision(x, form.nexp, form.nmant))(x) == 1


def test_top_k_takes_the_first_of_equal_scores_and_bits_change_their_type() -> None:
    _, chosen = jax.jit(lambda x: jax.lax.top_k(x, 2))(jnp.array([1.0, 3.0, 3.0, 3.0]))
    assert chosen.tolist() == [1, 2]
    codes = jnp.array([0x38, 0xB8], jnp.uint8)
    assert jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32).tolist() == [1, -1]


def test_what_several_processes_and_other_chips_need_is_there() -> None:
    assert {"coordinator_address", "num_processes", "process_id"} <= set(
        signature(jax.distributed.initialize).parameters
    )
    assert callable(multihost_utils.process_allgather)
    assert {"topology_name", "platform"} <= set(signature(topologies.get_topology_desc).parameters)
    here = jax.sharding.NamedSharding(mesh(), PartitionSpec("fsdp"))
    assert jax.make_array_from_callback((2,), here, lambda region: np.arange(2)[region]).tolist() == [0, 1]
    parts = [jnp.arange(2)]
    assert jax.make_array_from_single_device_arrays((2,), here, parts, dtype=jnp.int32).tolist() == [0, 1]
    assert issubclass(jax.errors.JaxRuntimeError, RuntimeError)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoded_weights_reach_a_cpu_without_a_copy(dtype: str) -> None:
    packed, scale = np.ones((512, 512), np.uint8), np.full((512, 32), 127, np.uint8)
    for _ in range(4):  # one may begin at such an address by chance
        decoded = decode_fp4(packed, scale, dtype=jnp.dtype(dtype))
        assert jax.device_put(decoded).unsafe_buffer_pointer() == decoded.ctypes.data
        stack = stacked(2, lambda at: decode_fp4(packed, scale, dtype=jnp.dtype(dtype)))
        assert jax.device_put(stack).unsafe_buffer_pointer() == stack.ctypes.data

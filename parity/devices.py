"""The devices of a parity run: one, or a mesh over all devices of all processes.

On a mesh the dense parts of a layer are one program over all of it, whose weights lie as the model's axes say. Its
other operands and its results are whole on every process, so that each of them can go on, and judge, as if it were
alone. Everything between two programs runs in steps (:class:`dsv4_convert.store.Processes`), so that nobody waits in a
program for a process that has failed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_convert.errors import ResourceError
from dsv4_convert.model.axes import RULES, named, partition
from dsv4_convert.model.mesh import make_mesh, suitable_mesh
from dsv4_convert.spec.config import Config
from dsv4_convert.store import ALONE, Processes
from dsv4_convert.store.layout import Region
from dsv4_convert.weights.restore import read_sharded

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Devices:
    """One device without a ``mesh``, or all of a mesh, seen from one of the ``processes`` that share it."""

    mesh: Mesh | None = None
    processes: Processes = ALONE

    @classmethod
    def all(cls, config: Config, processes: Processes, sizes: dict[str, int] | None = None) -> Devices:
        """All devices that JAX has, as a mesh of the ``sizes`` given or one that suits the model; just the one.

        Raises:
            UsageError: the sizes do not multiply to the number of devices.
        """
        devices = jax.devices()
        if sizes is None and len(devices) == 1:
            return cls()
        return cls(make_mesh(sizes or suitable_mesh(config, len(devices)), devices), processes)

    def describe(self) -> dict[str, Any]:
        """The devices as the report states them; empty for a single device."""
        if self.mesh is None:
            return {}
        return {"devices": self.mesh.size, "mesh": dict(self.mesh.shape), "processes": self.processes.count}

    def step(self, name: str) -> Any:
        """A context: what all processes do before the next program."""
        return self.processes.step(name)

    def mine(self, items: Sequence[Any]) -> Sequence[Any]:
        """The items that this process handles."""
        return items[self.processes.index :: self.processes.count]

    def sum(self, part: Array) -> Array:
        """The sum of what each process has, added in the order of the processes."""
        if self.processes.count == 1:
            return part
        from jax.experimental.multihost_utils import process_allgather

        with self._in_company():
            parts = np.asarray(process_allgather(part))
        total = parts[0].copy()
        for other in parts[1:]:
            total += other
        return total

    def put(self, value: Array) -> jax.Array:
        """An array that every device has whole."""
        if self.mesh is None:
            return jnp.asarray(value)
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.make_array_from_callback(value.shape, sharding, lambda region: value[region])

    def read(
        self, axes: str, shape: tuple[int, ...], dtype: np.dtype[Any], read: Callable[[Region], Array], what: str
    ) -> jax.Array:
        """An array with these logical axes; of a mesh's every process reads the regions of its own devices.

        Raises:
            UsageError: the mesh does not divide an axis that it splits; ``what`` names the array.
        """
        if self.mesh is None:
            return jnp.asarray(read(tuple(map(slice, shape))))
        spec = partition(named(axes), shape, self.mesh.shape, what=what)
        return read_sharded(shape, dtype, NamedSharding(self.mesh, spec), read)

    def multiple(self, count: int, axis: str) -> int:
        """The largest number up to ``count`` that the devices which share a logical axis divide; theirs, if none is."""
        over = self._over(axis)
        return max(count // over, 1) * over

    def _over(self, axis: str) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape.get(name, 1) for name in RULES[axis])

    def run(self, program: Callable[..., Any], static: Any, weights: Any, *operands: Any) -> Any:
        """``program(static, weights, *operands)``; on a mesh, over all of it.

        Every array of operands and results has a first axis of prompts. On a mesh they are arrays of this process, and
        prompts are repeated until their number divides.
        """
        if self.mesh is None:
            return program(static, weights, *operands)
        prompts = next(iter(jax.tree.leaves(operands))).shape[0]
        over = self._over("batch")
        repeated = np.arange(-(-prompts // over) * over) % prompts

        def everywhere(value: Any) -> jax.Array:
            return self.put(np.asarray(value)[repeated])

        with self._in_company(), jax.set_mesh(self.mesh):
            results = _on_mesh(program, self.mesh)(static, weights, *jax.tree.map(everywhere, operands))
            return jax.tree.map(lambda value: np.asarray(value)[:prompts], results)

    @contextmanager
    def _in_company(self) -> Iterator[None]:
        """A program that needs all processes. Raises :class:`ResourceError` if one of them is gone."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if self.processes.count == 1:
                raise
            raise ResourceError(
                f"a program over {self.processes.count} processes ended; did one of them stop? {error}"
            ) from error


@lru_cache
def _on_mesh(program: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The program with results that are whole on every device."""
    return jax.jit(program, static_argnums=0, out_shardings=NamedSharding(mesh, PartitionSpec()))

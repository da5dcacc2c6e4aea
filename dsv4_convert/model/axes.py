"""Logical axes of every parameter and activation, and the one table that lays them over the axes of a device mesh.

A parameter names its axes where it is declared; an activation has those of its tap's shape letters. The model is the
same with and without a mesh: it asks for the ambient one (``jax.set_mesh``), and without one nothing here does
anything. What is left open here, XLA decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dsv4_convert.errors import UsageError
from dsv4_convert.spec.taps import shape_of

#: The axes that a mesh may have, and what is split along each.
MESH_AXES: Mapping[str, str] = {
    "data": "prompts",
    "fsdp": "prompts, and every matrix along one of its sides",
    "expert": "prompts, and the routed experts",
    "sequence": "tokens of a prompt",
    "tensor": "heads, inner widths and the vocabulary",
}

#: Logical axis -> the mesh axes that split it. The others are whole on every device.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "tokens": ("sequence",),
    "width": ("fsdp",),
    "rank": ("fsdp",),
    "group_in": ("fsdp",),
    "experts": ("expert",),
    "heads": ("tensor",),
    "index_heads": ("tensor",),
    "groups": ("tensor",),
    "inner": ("tensor",),
    "vocab": ("tensor",),
    # Whole: of a matrix one side is enough, and the rest is small.
    "layer": (),
    "whole_width": (),
    "whole_rank": (),
    "group_out": (),
    "key": (),
    "entry": (),
    "block": (),
    "mix": (),
    "streams": (),
    "expert_score": (),
    "choice": (),
    "token": (),
}

#: Shape letter of a tap (:mod:`dsv4_convert.spec.taps`) -> logical axis. An activation's width is whole on every device.
LETTERS: Mapping[str, str] = {
    "B": "batch",
    "S": "tokens",
    "H": "heads",
    "Hi": "index_heads",
    "G": "groups",
    "V": "vocab",
}

Axes = tuple[str | None, ...]


def named(axes: str) -> Axes:
    """Logical axes from their names, separated by spaces. Raises :class:`ValueError` for an unknown one."""
    found = tuple(axes.split())
    if unknown := [axis for axis in found if axis not in RULES]:
        raise ValueError(f"{axes!r}: no rule for the axis {unknown[0]}")
    return found


def partition(
    axes: Axes,
    shape: Sequence[int],
    sizes: Mapping[str, int],
    *,
    what: str,
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> PartitionSpec:
    """How an array with these logical axes lies on a mesh whose axes have these ``sizes``.

    Mesh axes that are absent, or of size 1, split nothing.

    Raises:
        UsageError: two axes of the array fall on one mesh axis, or a mesh axis does not divide one; ``what`` names the
            array.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{what}: {len(axes)} logical axes for the shape {tuple(shape)}")
    taken: dict[str, str] = {}
    parts: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        split = tuple(name for name in (rules[axis] if axis else ()) if sizes.get(name, 1) > 1)
        for name in split:
            if name in taken:
                raise UsageError(f"{what}: its axes {taken[name]} and {axis} both fall on the mesh axis {name}")
            taken[name] = str(axis)
        if size % math.prod(sizes[name] for name in split):
            over = ", ".join(f"{name}={sizes[name]}" for name in split)
            raise UsageError(f"{what}: its axis {axis} has {size}, which the mesh axes {over} do not divide")
        parts.append(split or None)
    return PartitionSpec(*parts)


def constrain(value: jax.Array, axes: Axes, what: str) -> jax.Array:
    """``value``, laid over the ambient mesh by its logical axes; itself where there is none.

    Raises:
        UsageError: as :func:`partition`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return value
    spec = partition(axes, value.shape, mesh.shape, what=what)
    return jax.lax.with_sharding_constraint(value, spec)


def constrain_tap(name: str, value: jax.Array) -> jax.Array:
    """An activation by the name of its tap; those of no tap are left to XLA."""
    shape = shape_of(name)
    return value if shape is None else constrain(value, tuple(LETTERS.get(letter) for letter in shape), name)


def on_shards(function: Callable[..., Any], takes: Sequence[str], gives: str, *arguments: Any) -> Any:
    """``function(*arguments)`` on every device's part of them; just that where there is no mesh.

    Args:
        function: of arrays, or None; inside it the functions below speak of other devices.
        takes: logical axes of each argument, ``-`` for one that is whole.
        gives: logical axes of the result.
        arguments: whole arrays, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arguments)

    def spec(axes: str) -> PartitionSpec:
        return PartitionSpec(*(_over(axis, mesh.shape) or None if axis != "-" else None for axis in axes.split()))

    given = [index for index, argument in enumerate(arguments) if argument is not None]

    def run(*parts: Any) -> Any:
        by_index = dict(zip(given, parts, strict=True))
        return function(*map(by_index.get, range(len(arguments))))

    specs = tuple(spec(takes[index]) for index in given)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=spec(gives), check_vma=False)
    return sharded(*(arguments[index] for index in given))


def place(axis: str) -> jax.Array | int:
    """Which part of a logical axis this device has, inside :func:`on_shards`."""
    names = _manual(axis)
    return jax.lax.axis_index(names) if names else 0


def gathered(part: Any, axis: str) -> Any:
    """The first axis of every array from all devices that share a logical axis, one behind the other."""
    names = _manual(axis)
    return jax.lax.all_gather(part, names, axis=0, tiled=True) if names else part


def scattered(total: jax.Array, axis: str) -> jax.Array:
    """The sum over the devices that share a logical axis, of which each keeps its part of the first axis."""
    names = _manual(axis)
    return jax.lax.psum_scatter(total, names, scatter_dimension=0, tiled=True) if names else total


def exchanged(part: jax.Array, axis: str, split: int, joined: int) -> jax.Array:
    """An array whose dimension ``joined`` is split over a logical axis, with its dimension ``split`` split instead."""
    names = _manual(axis)
    return jax.lax.all_to_all(part, names, split, joined, tiled=True) if names else part


def splits(axis: str) -> bool:
    """Whether a logical axis is split over devices, inside :func:`on_shards`."""
    return bool(_manual(axis))


def summed(part: jax.Array, axis: str) -> jax.Array:
    """The sum over the devices that share a logical axis."""
    names = _manual(axis)
    return jax.lax.psum(part, names) if names else part


def _manual(axis: str) -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in _over(axis, mesh.shape) if name in mesh.manual_axes)


def _over(axis: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(name for name in RULES[axis] if sizes.get(name, 1) > 1)

"""Logical axes of every parameter and activation, and the one table that lays them over the axes of a device mesh.

A parameter names its axes where it is declared. Activations have the axes of their shape letters, in the table of taps
and in the signatures of functions that :func:`shard_map` decorates. The model is the same with and without a mesh: the
functions here ask for the ambient one (``jax.set_mesh``) and do nothing without it. XLA decides the layout of all other
arrays.
"""

from __future__ import annotations

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv4_convert.errors import UsageError
from dsv4_convert.spec.taps import shape_of

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")

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
    # The rows of an n-gram table, which is larger than all else together: over every axis that splits weights.
    "ngram": ("fsdp", "expert", "tensor"),
    # Whole: splitting one side of a matrix is enough, and the other arrays are small.
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

#: Logical axes that need not be divided: on a mesh the array has rows of padding after its own (:func:`padded`).
PADDED = frozenset({"ngram"})

#: Shape letter of an activation (:mod:`dsv4_convert.spec.taps`) -> logical axis. Its width is whole on every device.
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


def padded(axes: Axes, shape: Sequence[int], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that an array of this ``shape`` has on a mesh: larger along axes in :data:`PADDED` only."""
    return tuple(
        size + -size % math.prod(sizes[name] for name in _mesh_axes(axis, sizes)) if axis in PADDED else size
        for axis, size in zip(axes, shape, strict=True)
    )


def constrain(value: jax.Array, axes: Axes, what: str) -> jax.Array:
    """Shard ``value`` over the ambient mesh by its logical axes; without a mesh, return it unchanged.

    Raises:
        UsageError: as :func:`partition`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return value
    spec = partition(axes, value.shape, mesh.shape, what=what)
    return jax.lax.with_sharding_constraint(value, spec)


def constrain_tap(name: str, value: jax.Array) -> jax.Array:
    """:func:`constrain` an activation by the name of its tap; XLA decides about activations without a tap."""
    shape = shape_of(name)
    return value if shape is None else constrain(value, tuple(LETTERS.get(letter) for letter in shape), name)


def shard_map(**letters: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator: run a function on every device's part of its arrays, which the letters of its signature describe.

    ``Float[Array, "B S D"]`` is split along the logical axes of ``B`` and ``S`` (:data:`LETTERS`); an axis whose letter
    has no logical axis is whole on every device. Arguments that are no arrays reach every device as they are. Without
    a mesh the function is called as it stands.

    Args:
        letters: logical axes of more letters, such as ``E="experts"``.
    """
    axes = {**LETTERS, **letters}

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def sharded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            mesh = jax.sharding.get_abstract_mesh()
            if mesh.empty:
                return function(*args, **kwargs)
            hints = typing.get_type_hints(function)
            given = signature.bind(*args, **kwargs).arguments
            arrays = {name: value for name, value in given.items() if _array_type(hints.get(name))}
            options = {name: value for name, value in given.items() if name not in arrays}

            def run(*parts: Any) -> Any:
                return function(**dict(zip(arrays, parts, strict=True)), **options)  # type: ignore[call-arg]

            specs = tuple(_specs(hints[name], value, axes, mesh.shape) for name, value in arrays.items())
            result = _specs(hints["return"], ..., axes, mesh.shape)
            return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)(*arrays.values())

        return sharded

    return decorate


def _array_type(hint: Any) -> Any:
    """The array, or NamedTuple of arrays, that an annotation describes; None for others."""
    parts = (hint, *typing.get_args(hint))
    return next((part for part in parts if hasattr(part, "dim_str") or hasattr(part, "_fields")), None)


def _specs(hint: Any, value: Any, axes: Mapping[str, str], sizes: Mapping[str, int]) -> Any:
    """The partition of a value with this annotation: a spec, None for None, a NamedTuple of specs for a NamedTuple."""
    if value is None:
        return None
    array = _array_type(hint)
    if hasattr(array, "_fields"):
        fields = typing.get_type_hints(array)
        return array(*(_specs(fields[name], getattr(value, name), axes, sizes) for name in array._fields))
    parts = (_mesh_axes(axes[letter], sizes) if letter in axes else () for letter in array.dim_str.split())
    return PartitionSpec(*(part or None for part in parts))


def axis_index(axis: str) -> jax.Array | int:
    """Index of this device's part of a logical axis, inside :func:`shard_map`."""
    names = _manual(axis)
    return jax.lax.axis_index(names) if names else 0


def all_gather(part: _T, axis: str) -> _T:
    """Every array from all devices that share a logical axis, concatenated along its first axis."""
    names = _manual(axis)
    return jax.lax.all_gather(part, names, axis=0, tiled=True) if names else part


def psum(part: jax.Array, axis: str) -> jax.Array:
    """The sum over the devices that share a logical axis."""
    names = _manual(axis)
    return jax.lax.psum(part, names) if names else part


def psum_scatter(part: jax.Array, axis: str) -> jax.Array:
    """:func:`psum`, of which each device keeps its part of the first axis."""
    names = _manual(axis)
    return jax.lax.psum_scatter(part, names, scatter_dimension=0, tiled=True) if names else part


def gather_prompts(part: jax.Array, axis: str) -> jax.Array:
    """The prompts, along the first axis, of all devices that share a logical axis."""
    names = _of_prompts(axis)
    return jax.lax.all_gather(part, names, axis=0, tiled=True) if names else part


def sum_to_prompts(part: jax.Array, axis: str) -> jax.Array:
    """The sum over the devices that share a logical axis, each of which keeps its own prompts: undoes
    :func:`gather_prompts`."""
    names = _of_prompts(axis)
    if names:
        part = jax.lax.psum_scatter(part, names, scatter_dimension=0, tiled=True)
    others = tuple(name for name in _manual(axis) if name not in names)
    return jax.lax.psum(part, others) if others else part


def all_to_all(part: jax.Array, axis: str, *, split_axis: int, concat_axis: int) -> jax.Array:
    """Split ``split_axis`` over the devices that share a logical axis, and make ``concat_axis`` whole in exchange."""
    names = _manual(axis)
    return jax.lax.all_to_all(part, names, split_axis, concat_axis, tiled=True) if names else part


def own_rows(table: jax.Array, index: jax.Array, axis: str) -> jax.Array:
    """Rows of a table whose rows are split along a logical axis; zero where another device has the row."""
    if not is_sharded(axis):
        return table[index]
    own = index - axis_index(axis) * table.shape[0]
    here = (own >= 0) & (own < table.shape[0])
    return jnp.where(here[..., None], table[jnp.where(here, own, 0)], 0)


def is_sharded(axis: str) -> bool:
    """Whether a logical axis is split over devices, inside :func:`shard_map`."""
    return bool(_manual(axis))


def _manual(axis: str) -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in _mesh_axes(axis, mesh.shape) if name in mesh.manual_axes)


def _of_prompts(axis: str) -> tuple[str, ...]:
    """The mesh axes that split both a logical axis and the prompts."""
    return tuple(name for name in _manual(axis) if name in RULES["batch"])


def _mesh_axes(axis: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that split a logical axis."""
    return tuple(name for name in RULES[axis] if sizes.get(name, 1) > 1)

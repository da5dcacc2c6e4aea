"""The device mesh that a user describes, as ``fsdp=2,tensor=4``, or that suits a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dsv4_convert.errors import UsageError, did_you_mean
from dsv4_convert.model.axes import MESH_AXES, PADDED, RULES
from dsv4_convert.spec.config import Config


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of mesh axes: ``"fsdp=2,tensor=4"`` to ``{"fsdp": 2, "tensor": 4}``, in the order given.

    Raises:
        UsageError: not of that form, an axis that is unknown or named twice, or a size below 1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (word.strip() for word in part.partition("="))
        if not equals or not (size.isascii() and size.isdecimal()) or not int(size):
            raise UsageError(f"mesh {text!r}: {part.strip()!r} is not AXIS=SIZE; expected such as fsdp=2,tensor=4")
        if name not in MESH_AXES:
            raise UsageError(
                f"mesh {text!r}: no axis {name!r}; expected some of {', '.join(MESH_AXES)}"
                + did_you_mean(name, MESH_AXES)
            )
        if name in sizes:
            raise UsageError(f"mesh {text!r}: the axis {name} occurs twice")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """A mesh over all ``devices``, nearest to each other along the last axis; its axes are Auto, for XLA to use.

    Args:
        sizes: as of :func:`parse_mesh`.
        devices: ``jax.devices()``, or the devices of a topology that is not attached.

    Raises:
        UsageError: the sizes do not multiply to the number of devices.
    """
    described = describe_mesh(sizes)
    if (product := math.prod(sizes.values())) != len(devices):
        raise UsageError(f"mesh {described}: makes {product} devices, and there are {len(devices)}")
    try:
        placed = mesh_utils.create_device_mesh(
            tuple(sizes.values()), np.asarray(devices).reshape(-1).tolist(), allow_split_physical_axes=True
        )
    except (NotImplementedError, ValueError) as error:
        raise UsageError(f"mesh {described}: cannot be laid over these devices: {error}") from error
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def describe_mesh(sizes: Mapping[str, int]) -> str:
    """The sizes as :func:`parse_mesh` reads them."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def suitable_mesh(config: Config, count: int) -> dict[str, int]:
    """Sizes of a mesh over ``count`` devices that divides every matrix of a model; any number of devices has one.

    The axis ``tensor`` gets the most devices that can share heads, inner widths and the vocabulary. ``fsdp`` gets the
    most of the remaining ones that can share the model's width, and ``data`` gets the rest.
    """
    sizes: dict[str, int] = {}
    left = count
    for name in ("tensor", "fsdp"):
        size = max(size for size in range(1, left + 1) if left % size == 0 and divides(name, size, config))
        sizes[name] = size
        left //= size
    found = {"data": left, "fsdp": sizes["fsdp"], "tensor": sizes["tensor"]}
    return {name: size for name, size in found.items() if size > 1} or {"data": 1}


#: Logical axes that no weight has.
_OF_PROMPTS = ("batch", "tokens")


def divides(name: str, size: int, config: Config) -> bool:
    """Whether a mesh axis of this size divides all logical axes of weights that it splits."""
    lengths = {
        "width": config.hidden_size,
        "rank": config.q_lora_rank,
        "group_in": config.num_attention_heads * config.head_dim // config.o_groups,
        "heads": config.num_attention_heads,
        "index_heads": config.index_n_heads,
        "groups": config.o_groups,
        "inner": config.moe_intermediate_size,
        "vocab": config.vocab_size,
        "experts": math.gcd(*map(config.experts_of, (None, *config.stage_layers))),
    }
    split = [axis for axis, over in RULES.items() if name in over and axis not in PADDED.union(_OF_PROMPTS)]
    return all(lengths[axis] % size == 0 for axis in split)

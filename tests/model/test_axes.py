"""Every parameter and activation has logical axes, one table lays them over a mesh, and what cannot be is said."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Float

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.synthetic import random_architecture, tiny_config
from dsv4_convert.model import Model
from dsv4_convert.model.axes import LETTERS, MESH_AXES, RULES, named, partition, shard_map
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.segments import segments
from dsv4_convert.spec.v4.taps import STATE, TAPS

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def test_every_rule_speaks_of_axes_that_a_mesh_may_have() -> None:
    assert {name for split in RULES.values() for name in split} == set(MESH_AXES)
    assert set(LETTERS.values()) <= set(RULES)
    assert set(LETTERS) <= {letter for tap in (*TAPS, *STATE) for letter in tap.shape.split()}


@pytest.mark.parametrize("scanned", [False, True])
def test_no_array_has_two_axes_on_one_mesh_axis(scanned: bool) -> None:
    """With all mesh axes in use, as on a large slice, on sizes that divide everything."""
    config = Config.from_hf(tiny_config() | {"num_nextn_predict_layers": 0})
    _, state = nnx.split(nnx.eval_shape(lambda: Model(config, scanned=scanned)))
    sizes = dict.fromkeys(MESH_AXES, 2)
    found = {
        ".".join(map(str, key)): partition(variable.axes, variable.shape, sizes, what=str(key))
        for key, variable in nnx.to_flat_state(state)
    }
    assert found["embed"] == PartitionSpec(("tensor",), ("fsdp",))
    layer = "layers.segments.3.0" if scanned else "layers.3"
    lead = (None,) if scanned else ()
    assert found[f"{layer}.ffn.experts.w2"] == PartitionSpec(*lead, ("expert",), ("tensor",), ("fsdp",))
    assert found[f"{layer}.attn.wo_a"] == PartitionSpec(*lead, ("tensor",), ("fsdp",), None)
    assert found[f"{layer}.attn_norm"] == PartitionSpec(*lead, None)
    for tap in TAPS:
        axes = tuple(LETTERS.get(letter) for letter in tap.shape.split())
        partition(axes, (8,) * len(axes), sizes, what=tap.name)


def test_what_cannot_be_laid_over_a_mesh_is_named() -> None:
    with pytest.raises(UsageError, match="w1: its axis experts has 6, which the mesh axes expert=4 do not divide"):
        partition(named("experts width"), (6, 8), {"expert": 4}, what="w1")
    with pytest.raises(UsageError, match="x: its axes batch and width both fall on the mesh axis fsdp"):
        partition(named("batch width"), (8, 8), {"fsdp": 2}, what="x")
    with pytest.raises(ValueError, match="no rule for the axis widht"):
        named("widht inner")
    with pytest.raises(ValueError, match="1 logical axes for the shape"):
        partition(named("width"), (8, 8), {}, what="x")
    assert partition(named("experts width"), (6, 8), {"expert": 1}, what="w1") == PartitionSpec(None, None)


@pytest.mark.parametrize("seed", range(6))
def test_segments_are_the_layers_in_order(seed: int) -> None:
    config = Config.from_hf(random_architecture(seed))
    kinds = []
    for segment in segments(config):
        at = [segment.layers(place) for place in range(len(segment.pattern))]
        kinds += [
            (layer, kind)
            for layers in zip(*at, strict=True)
            for layer, kind in zip(layers, segment.pattern, strict=True)
        ]
    expected = list(enumerate(zip(config.attention, config.hash_routed, strict=True)))
    assert kinds == expected


def test_segments_of_the_releases_do_not_grow_with_their_layers() -> None:
    flash, pro = (Config.from_file(CONFIGS / f"DeepSeek-V4-{name}.json") for name in ("Flash", "Pro"))
    assert [(len(part.pattern), part.repeats) for part in segments(flash)] == [(1, 2), (1, 1), (2, 20)]
    assert [(len(part.pattern), part.repeats) for part in segments(pro)] == [(1, 2), (1, 1), (2, 29)]


def test_scanned_layers_record_and_replace_the_taps_of_each_layer() -> None:
    """Six layers, of which the last four are a loop: taps have the names and shapes that they have without one."""
    from dsv4_convert.model import Taps

    config = Config.from_hf(tiny_config(num_hidden_layers=6, compress_ratios=[0, 0, 4, 128, 4, 128, 0]))
    tokens = jax.ShapeDtypeStruct((1, 4), np.int32)

    def run(tokens: jax.Array, scanned: bool, overrides: dict[str, jax.Array]) -> dict[str, jax.Array]:
        taps = Taps(lambda name: not name.startswith("layers.4.attn."), overrides)
        Model(config, scanned=scanned)(tokens, taps=taps)
        return taps.values

    found, expected = (jax.eval_shape(lambda tokens, s=s: run(tokens, s, {}), tokens) for s in (True, False))
    assert list(found) == list(expected)
    assert found == expected
    norm = jnp.zeros((1, 4, config.hidden_size))
    with pytest.raises(ValueError, match=r"attn_norm: scanned layers share a program"):
        jax.eval_shape(lambda tokens: run(tokens, True, {"layers.2.attn_norm": norm}), tokens)
    both = {"layers.2.attn_norm": norm, "layers.4.attn_norm": norm}
    assert jax.eval_shape(lambda tokens: run(tokens, True, both), tokens) == expected


class Pair(NamedTuple):
    """Arrays that one argument brings together."""

    rows: Float[Array, "B S"]
    table: Float[Array, "K C"]
    mask: Float[Array, "B S"] | None


#: Shapes that :func:`_scaled` was called with.
SEEN: list[tuple[int, ...]] = []


@shard_map(E="experts")
def _scaled(
    x: Float[Array, "B S D"], pair: Pair, stack: Float[Array, "E D"] | None, *, factor: float
) -> Float[Array, "B S D"]:
    SEEN[:] = [part.shape for part in (x, pair.rows, pair.table, *(() if stack is None else (stack,)))]
    return x * factor


@pytest.mark.parametrize("stacked", [True, False])
def test_a_device_has_the_part_that_the_letters_of_a_signature_name(stacked: bool) -> None:
    """2 x 2 devices share the prompts, 2 their tokens and 2 the experts; other letters are whole."""
    mesh = AbstractMesh((2, 2, 2), ("data", "sequence", "expert"), axis_types=(AxisType.Auto,) * 3)
    x, table, stack = (jnp.zeros(shape) for shape in ((8, 6, 5), (4, 7), (6, 5)))
    pair = Pair(x[..., 0], table, None)
    arguments = (x, pair, stack if stacked else None)
    assert jax.eval_shape(partial(_scaled, factor=2.0), *arguments).shape == x.shape
    assert SEEN[:3] == [x.shape, pair.rows.shape, table.shape]
    with jax.sharding.use_abstract_mesh(mesh):
        assert jax.eval_shape(partial(_scaled, factor=2.0), *arguments).shape == x.shape
    assert [(2, 3, 5), (2, 3), (4, 7), *([(3, 5)] if stacked else [])] == SEEN

"""Every parameter and activation has logical axes, one table lays them over a mesh, and what cannot be is said."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from dsv4_convert.config import Config
from dsv4_convert.errors import UsageError
from dsv4_convert.golden.synthetic import random_architecture, tiny_config
from dsv4_convert.model import Model
from dsv4_convert.model.axes import LETTERS, MESH_AXES, RULES, named, partition
from dsv4_convert.model.segments import segments
from dsv4_convert.taps import STATE, TAPS

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


def test_scanned_layers_record_no_taps() -> None:
    from dsv4_convert.model import Taps

    config = Config.from_hf(tiny_config())
    tokens = jax.ShapeDtypeStruct((1, 4), np.int32)

    def run(tokens: jax.Array, wanted: str) -> jax.Array:
        return Model(config, scanned=True)(tokens, taps=Taps(lambda name: name == wanted))

    with pytest.raises(ValueError, match="taps of scanned layers cannot be recorded"):
        jax.eval_shape(lambda tokens: run(tokens, "layers.2.attn_norm"), tokens)
    assert jax.eval_shape(lambda tokens: run(tokens, "logits"), tokens).shape == (1, 4, config.vocab_size)

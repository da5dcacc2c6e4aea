"""All layers in order, with one program for each layer or one for all layers of a kind.

Shape letters: ``B`` batch, ``S`` tokens, ``N`` streams, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv4_convert.model.block import Block
from dsv4_convert.model.cache import Past
from dsv4_convert.model.encoded import Encoded, after
from dsv4_convert.model.numerics import Numerics
from dsv4_convert.model.recording import Taps
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.segments import segments
from dsv4_convert.spec.v4.config import as_v4


def listed(config: Config, numerics: Numerics) -> list[Block]:
    """One block for each layer of the backbone: a program of the model contains the operations of every layer."""
    known = as_v4(config)
    kinds = map(known.layer_kind, range(known.num_hidden_layers))
    return [Block(known, kind, hashed=hashed, numerics=numerics) for kind, hashed in kinds]


def through(
    layers: Sequence[Block] | ScannedLayers,
    streams: Float[Array, "B S N D"],
    token_ids: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    taps: Taps,
    past: Past[tuple[Any, ...]] | None = None,
) -> tuple[Float[Array, "B S N D"], tuple[Any, ...]]:
    """The streams after all layers; with a ``past`` of every layer's state, the new states too."""
    if isinstance(layers, ScannedLayers):
        return layers(streams, token_ids, positions, taps, past)
    states = []
    for layer, block in enumerate(layers):
        own = None if past is None else past.of(past.cache[layer])
        streams, state = _when_there(streams, block)(
            streams, token_ids, positions, taps.within(f"layers.{layer}."), own
        )
        states.append(state)
    return streams, tuple(states)


def _when_there(streams: Float[Array, "B S N D"], block: Block) -> Block:
    """The block, with encoded matrices that are decoded after its input is computed; stacks of experts stay encoded."""
    graph, state = nnx.split(block)
    flat = {
        key: variable.replace(after(streams, variable.get_value()))
        for key, variable in nnx.to_flat_state(state)
        if isinstance(variable.get_value(), Encoded) and key[:2] != ("ffn", "experts")
    }
    return nnx.merge(graph, nnx.from_flat_state(dict(nnx.to_flat_state(state)) | flat)) if flat else block


class ScannedLayers(nnx.Module):
    """All layers as loops over stacked weights: a program does not grow with the number of layers.

    ``segments[i][j]`` stacks the weights of all layers at place ``j`` of segment ``i``'s pattern, ``[layer, ...]``.
    State is stacked in the same way. Taps have the names of their layers, as without a loop.
    """

    def __init__(self, config: Config, numerics: Numerics) -> None:
        self.config = config
        self.segments = nnx.List(
            [
                nnx.List(
                    [
                        _stacked(Block(as_v4(config), kind, hashed=hashed, numerics=numerics), segment.repeats)
                        for kind, hashed in segment.pattern
                    ]
                )
                for segment in segments(config)
            ]
        )

    def __call__(
        self,
        streams: Float[Array, "B S N D"],
        token_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        taps: Taps,
        past: Past[tuple[Any, ...]] | None = None,
    ) -> tuple[Float[Array, "B S N D"], tuple[Any, ...]]:
        """:func:`through` them.

        Raises:
            ValueError: a tap is replaced in some of the layers that share a program, but not in all.
        """
        states = []
        for index, segment in enumerate(segments(self.config)):
            prefixes = [
                [f"layers.{layer}." for layer in segment.layers(place)] for place in range(len(segment.pattern))
            ]
            graphs, weights = zip(*map(nnx.split, self.segments[index]), strict=True)

            def step(
                streams: Array, of_layer: Any, prefixes: Any = prefixes, graphs: Any = graphs
            ) -> tuple[Array, Any]:
                left, values = [], []
                for graph, own, weight, state, replaced in zip(graphs, prefixes, *of_layer, strict=True):
                    before = None if past is None else past.of(state)
                    block = _when_there(streams, nnx.merge(graph, weight))
                    recording = taps.one_of(own, replaced)
                    streams, new = block(streams, token_ids, positions, recording, before)
                    left.append(new)
                    values.append(recording.values)
                return streams, (tuple(left), values)

            before = tuple(None for _ in prefixes) if past is None else past.cache[index]
            replaced = tuple(map(taps.overrides_of, prefixes))
            streams, (left, values) = jax.lax.scan(step, streams, (weights, before, replaced))
            states.append(left)
            for repeat in range(segment.repeats):
                for own, recorded in zip(prefixes, values, strict=True):
                    for name, stacked in recorded.items():
                        taps.record(own[repeat] + name.removeprefix(own[0]), stacked[repeat])
        return streams, tuple(states)


class Layers(nnx.Module):
    """The layers of a model by themselves, as it has them."""

    def __init__(self, config: Config, numerics: Numerics, *, scanned: bool) -> None:
        self.layers = ScannedLayers(config, numerics) if scanned else nnx.List(listed(config, numerics))


def _stacked(block: Block, count: int) -> Block:
    """A block whose parameters stack ``count`` layers."""
    graph, state = nnx.split(block)
    flat = {
        key: variable.replace(
            jax.tree.map(lambda part: jnp.zeros((count, *part.shape), part.dtype), variable.get_value()),
            axes=("layer", *variable.axes),
        )
        for key, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat))

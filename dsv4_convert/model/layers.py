"""All layers in order, with one program for each layer or one for all layers of a kind.

Shape letters: ``B`` batch, ``S`` tokens, ``N`` streams, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from dsv4_convert.model.block import Block, DecoderBlock, MTPBlock
from dsv4_convert.model.cache import Past
from dsv4_convert.model.dspark import V4DSparkBlock
from dsv4_convert.model.encoded import Encoded, after
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.v41.block import V41Block
from dsv4_convert.model.v41.dspark import V41DSparkBlock
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.segments import segments
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.spec.v4.kinds import AttentionKind
from dsv4_convert.spec.v41.config import V41Config

#: Parameters whose encoded stacks are decoded one matrix, or one row, at a time.
_DECODED_IN_PARTS = frozenset({("ffn", "experts", part) for part in ("w1", "w2", "w3")} | {("engram", "embed")})


def block_of(config: Config, kind: Any, *, with_experts: bool = True, numerics: Numerics = PLAIN) -> DecoderBlock:
    """A layer of one of the config's kinds (``config.layer_kind``)."""
    return _BLOCKS[type(config)](config, kind, with_experts=with_experts, numerics=numerics)


def _v4_block(config: V4Config, kind: tuple[AttentionKind, bool], **options: Any) -> Block:
    attention, hashed = kind
    return Block(config, attention, hashed=hashed, **options)


_BLOCKS: dict[type[Config], Callable[..., DecoderBlock]] = {V4Config: _v4_block, V41Config: V41Block}


def stage_of(config: Config, stage: int, *, with_experts: bool = True, numerics: Numerics = PLAIN) -> DecoderBlock:
    """A stage after the backbone, of multi-token prediction or of DSpark."""
    return _STAGES[type(config)](config, stage, numerics, with_experts=with_experts)


def _v4_stage(config: V4Config, stage: int, numerics: Numerics, *, with_experts: bool) -> DecoderBlock:
    if config.dspark is None:
        return MTPBlock(config, numerics, with_experts=with_experts)
    return V4DSparkBlock(config, stage, numerics, with_experts=with_experts)


_STAGES: dict[type[Config], Callable[..., DecoderBlock]] = {V4Config: _v4_stage, V41Config: V41DSparkBlock}


def layers_of(config: Config, numerics: Numerics, *, scanned: bool) -> nnx.List[DecoderBlock] | ScannedLayers:
    """All layers of the backbone: one block for each, or with ``scanned`` stacks of those of one kind."""
    if scanned:
        return ScannedLayers(config, numerics)
    kinds = map(config.layer_kind, range(config.num_hidden_layers))
    return nnx.List([block_of(config, kind, numerics=numerics) for kind in kinds])


def through(
    layers: Sequence[DecoderBlock] | ScannedLayers,
    carry: Any,
    token_ids: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    taps: Taps,
    past: Past[tuple[Any, ...]] | None = None,
) -> tuple[Any, tuple[Any, ...]]:
    """The carry after all layers; with a ``past`` of every layer's state, the new states too."""
    if isinstance(layers, ScannedLayers):
        return layers(carry, token_ids, positions, taps, past)
    states = []
    for layer, block in enumerate(layers):
        own = None if past is None else past.of(past.cache[layer])
        block = _when_there(carry, block)
        carry, state = block(carry, token_ids, positions, taps.within(f"layers.{layer}."), own)
        states.append(state)
    return carry, tuple(states)


def _when_there(carry: Any, block: DecoderBlock) -> DecoderBlock:
    """The block, with encoded matrices that are decoded after its input is computed.

    What is decoded in parts stays encoded.
    """
    graph, state = nnx.split(block)
    streams = jax.tree.leaves(carry)[0]
    flat = {
        key: variable.replace(after(streams, variable.get_value()))
        for key, variable in nnx.to_flat_state(state)
        if isinstance(variable.get_value(), Encoded) and key not in _DECODED_IN_PARTS
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
                    [_stacked(block_of(config, kind, numerics=numerics), segment.repeats) for kind in segment.pattern]
                )
                for segment in segments(config)
            ]
        )

    def __call__(
        self,
        carry: Any,
        token_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        taps: Taps,
        past: Past[tuple[Any, ...]] | None = None,
    ) -> tuple[Any, tuple[Any, ...]]:
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

            def step(carry: Any, of_layer: Any, prefixes: Any = prefixes, graphs: Any = graphs) -> tuple[Any, Any]:
                left, values = [], []
                for graph, own, weight, state, replaced in zip(graphs, prefixes, *of_layer, strict=True):
                    before = None if past is None else past.of(state)
                    block = _when_there(carry, nnx.merge(graph, weight))
                    recording = taps.one_of(own, replaced)
                    carry, new = block(carry, token_ids, positions, recording, before)
                    left.append(new)
                    values.append(recording.values)
                return carry, (tuple(left), values)

            before = tuple(None for _ in prefixes) if past is None else past.cache[index]
            replaced = tuple(map(taps.overrides_of, prefixes))
            carry, (left, values) = _looped(step, carry, (weights, before, replaced), segment.repeats)
            states.append(left)
            for repeat in range(segment.repeats):
                for own, recorded in zip(prefixes, values, strict=True):
                    for name, stacked in recorded.items():
                        taps.record(own[repeat] + name.removeprefix(own[0]), stacked[repeat])
        return carry, tuple(states)


class Layers(nnx.Module):
    """The layers of a model by themselves, as it has them."""

    def __init__(self, config: Config, numerics: Numerics, *, scanned: bool) -> None:
        self.config = config
        self.layers = layers_of(config, numerics, scanned=scanned)


def _looped(step: Callable[..., tuple[Any, Any]], carry: Any, of_layers: Any, repeats: int) -> tuple[Any, Any]:
    """``jax.lax.scan``; a single layer is no loop, so that it may hand on a carry of another form than it gets."""
    if repeats > 1:
        return jax.lax.scan(step, carry, of_layers)
    carry, left = step(carry, jax.tree.map(lambda stacked: stacked[0], of_layers))
    return carry, jax.tree.map(lambda part: part[None], left)


def _stacked(block: DecoderBlock, count: int) -> DecoderBlock:
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

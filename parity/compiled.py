"""Running a layer as the model runs it: one compiled program, with all of its experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_convert.golden.layout import DTYPES, STREAMS, carried, tap_shape
from dsv4_convert.model.architectures import decoder_of
from dsv4_convert.model.cache import LayerCache, Past, empty_layer
from dsv4_convert.model.layers import Layers, ScannedLayers, through
from dsv4_convert.model.model import Decoder, embed
from dsv4_convert.model.recording import Taps
from dsv4_convert.parity.calls import calls_of, calls_of_draft
from dsv4_convert.parity.forward import Activations, Array, Entering, Forward, activations, to_logits
from dsv4_convert.parity.programs import ModelOptions, stack_of
from dsv4_convert.spec.taps import TapKey
from dsv4_convert.weights.restore import restore_layers, restore_stage

_EMBED_AXES = "vocab width"
#: The tap that changes the program when it is recorded or replaced: without it, scores are not all in memory at once.
_SCORES = "attn.indexer.scores"


class LayerProgram(NamedTuple):
    """The static part of a layer's compiled program, besides shapes.

    ``layers``: how many the program has; the last one is the layer. ``capacity``: tokens that a cache has room for.
    ``recorded``: the layer's taps are results, too.
    """

    graph: nnx.GraphDef[Any]
    layers: int
    capacity: int
    recorded: bool = True


class CompiledForward(Forward):
    """The model over one batch of prompts, each layer as :class:`~dsv4_convert.model.Model` runs it.

    Index scores are neither recorded nor replaced, since the model then would take another branch.
    """

    def __init__(self, *arguments: Any, model: ModelOptions, decode: int = 0, **options: Any) -> None:
        """``model``: with a form of weights (:func:`dsv4_convert.parity.programs.planned`). Else as ``Forward``."""
        super().__init__(*arguments, decode=decode, **options)
        self._model = model
        self._calls = calls_of(len(self._tokens), self._tokens.shape[1], decode, model.chunk)
        self._draft_calls = calls_of_draft(len(self._tokens), self._tokens.shape[1], decode, model.chunk)
        self._compiled: tuple[int, tuple[LayerProgram, nnx.State[Any, Any]]] | None = None

    def embed(self) -> tuple[Activations, Entering]:
        """The embedding from the whole table, and what enters layer 0."""
        config = self._weights.config
        with self._devices.step("read the embedding"):
            table = self._devices.read(
                _EMBED_AXES,
                (config.vocab_size, config.hidden_size),
                self._weight_dtype,
                lambda region: self._weights.read_region("embed", region, self._weight_dtype),
                "embed",
            )
        streams, values = self._devices.run(_embed, (config.hc_mult, self._dtype), table, self._tokens)
        return activations(config, None, values), self._entering_first(streams)

    def layer(
        self, layer: int, entering: Entering, overrides: Mapping[TapKey, Array] | None = None
    ) -> tuple[Activations, Entering]:
        """Run one layer or stage. ``overrides`` replace the activations that it goes on with."""
        kept = {
            key: value
            for key, value in (overrides or {}).items()
            if key.stage is not None or key.tap.name not in (_SCORES, STREAMS.name)
        }
        return super().layer(layer, {**self._of_neighbours(layer), **entering}, kept)

    def _of_neighbours(self, layer: int) -> dict[str, Array]:
        """Zeros for the inputs of the other layers in a scanned layer's program, since those layers do not count."""
        config, (batch, tokens) = self._weights.config, self._tokens.shape
        if layer in config.stage_layers:
            return {}
        stack = stack_of(config, layer, scanned=self._model.scanned)
        taps = {name: key for other in stack[:-1] for name, key in carried(config, other).items()}
        return {
            name: np.zeros(tap_shape(key, config, batch=batch, tokens=tokens), DTYPES[key.tap.values])
            for name, key in taps.items()
        }

    def _head_step(self) -> int:
        return self._weights.config.vocab_size

    def _head_program(self) -> Callable[..., Any]:
        return _compiled_head

    def _call(self, layer: int, operands: tuple[Any, ...]) -> tuple[Any, dict[str, Any], Any]:
        config = self._weights.config
        run: Callable[..., Any] = run_stage if layer in config.stage_layers else run_layer
        run = run_draft if config.drafts_blocks(layer) else run
        program, state = self._program(layer)
        found: tuple[Any, dict[str, Any], Any] = self._devices.run(run, program, state, *operands)
        return found

    def _stage_head(self, layer: int, leaving: Entering, overrides: Mapping[TapKey, Array]) -> Activations:
        return {}  # a stage's program has its head in it

    def _attention(self, layer: int) -> Any:
        program, state = self._program(layer)
        module = nnx.merge(program.graph, state)
        if isinstance(module, Decoder):
            return module.mtp[0].attn
        layers = module.layers
        if not isinstance(layers, ScannedLayers):
            return layers[-1].attn
        (segment,) = layers.segments
        return jax.tree.map(lambda stacked: stacked[-1], segment[-1]).attn

    def _program(self, layer: int) -> tuple[LayerProgram, nnx.State[Any, Any]]:
        """The program and weights of a layer; cached until another layer is requested."""
        if self._compiled is None or self._compiled[0] != layer:
            self._compiled = None  # give the memory back first
            with self._devices.step(f"read all of layer {layer}"):
                module, count = self._restored(layer)
            for block in blocks_of(module):
                block.ffn.experts.path = self._model.experts
            graph, state = nnx.split(module)
            self._compiled = (layer, (LayerProgram(graph, count, self._tokens.shape[1]), state))
        return self._compiled[1]

    def _restored(self, layer: int) -> tuple[Any, int]:
        """The module that has a layer with its weights, and how many layers or stages it has."""
        config, model = self._weights.config, self._model
        options: dict[str, Any] = {
            "dtype": self._weight_dtype,
            "numerics": self._numerics,
            "mesh": self._devices.mesh,
            "encoded": model.weights == "source",
        }
        if layer in config.stage_layers:
            return restore_stage(self._weights, layer, **options), 1
        stack = stack_of(config, layer, scanned=model.scanned)
        return restore_layers(self._weights, stack, scanned=model.scanned, **options), len(stack)


def blocks_of(layers: Layers | Decoder) -> list[Any]:
    """The blocks of some layers, stacked ones where they are scanned; or of a model's stages."""
    if isinstance(layers, Decoder):
        return list(layers.mtp)
    if isinstance(layers.layers, ScannedLayers):
        return [block for segment in layers.layers.segments for block in segment]
    return list(layers.layers)


@partial(jax.jit, static_argnums=0)
def run_layer(
    program: LayerProgram,
    state: nnx.State[Any, Any],
    carry: Any,
    token_ids: jax.Array,
    positions: jax.Array,
    overrides: dict[str, jax.Array],
    past: Past[Any] | None,
) -> tuple[Any, dict[str, jax.Array], Any]:
    """A layer by the model's own functions: the carry that leaves it, its taps, and its new state.

    A scanned layer is the last of its loop, and gets its own inputs all the same.
    """
    module = nnx.merge(program.graph, state)
    layers, config = module.layers, module.config
    own = f"layers.{program.layers - 1}."
    decoder = decoder_of(config)
    given = decoder.taps_of(carry)
    inputs = {key.tap.name: given[name] for name, key in carried(config, program.layers - 1).items()}
    replaced = {own + name: value for name, value in overrides.items()}
    if isinstance(layers, ScannedLayers):
        # Layers at one place of the pattern share a program, and so the names that are replaced in it. Zeros for the
        # others, so that none can pass for the layer.
        (segment,) = layers.segments
        others = range(len(segment) - 1, program.layers - 1, len(segment))
        replaced = {own + name: value for name, value in inputs.items()} | replaced
        replaced |= {
            name.replace(own, f"layers.{other}."): jnp.zeros_like(value)
            for other in others
            for name, value in replaced.items()
        }
    taps = Taps(
        (lambda name: name.startswith(own) and not name.endswith(_SCORES)) if program.recorded else None, replaced
    )
    left, states = through(layers, carry, token_ids, positions, taps, _past_of_all(program, layers, past))
    values = {name.removeprefix(own): value for name, value in taps.values.items()}
    if program.recorded:
        # A scanned layer recorded what its neighbour left; and what leaves the loop must be what it left itself.
        values |= inputs | {STREAMS.name: decoder.taps_of(left)[STREAMS.name]}
    if past is None:
        return left, values, None
    if isinstance(layers, ScannedLayers):
        return left, values, jax.tree.map(lambda stacked: stacked[-1], states[-1][-1])
    return left, values, states[-1]


@partial(jax.jit, static_argnums=0)
def run_stage(
    program: LayerProgram,
    state: nnx.State[Any, Any],
    streams: jax.Array,
    next_ids: jax.Array,
    positions: jax.Array,
    overrides: dict[str, jax.Array],
    past: Past[LayerCache] | None,
) -> tuple[jax.Array, dict[str, jax.Array], LayerCache | None]:
    """A stage by the model's own function: the streams that leave it, its taps, of which the logits are always there,
    and its new state."""
    model: Decoder = nnx.merge(program.graph, state)
    own = model.config.prefix(0)
    left = own + STREAMS.name
    taps = Taps(lambda name: program.recorded or name == left, {own + name: value for name, value in overrides.items()})
    logits, after = model.draft(streams, next_ids, positions, taps=taps, past=past)
    values = {name.removeprefix(own): value for name, value in taps.values.items()}
    return values[STREAMS.name], {"logits": logits} | values, after


@partial(jax.jit, static_argnums=0)
def run_draft(
    program: LayerProgram,
    state: nnx.State[Any, Any],
    entering: Any,
    ids: jax.Array,
    positions: jax.Array,
    overrides: dict[str, jax.Array],
    past: Past[Any],
) -> tuple[Any, dict[str, jax.Array], Any]:
    """A DSpark stage by the model's own function: what it hands on of the block, its taps, and its new state."""
    model: Decoder = nnx.merge(program.graph, state)
    taps = Taps(lambda name: program.recorded, overrides)
    (left, _), _, after = model.draft_stage(0, entering, ids, positions, past, taps)
    return left, taps.values, after


def _past_of_all(program: LayerProgram, layers: Any, past: Past[Any] | None) -> Past[tuple[Any, ...]] | None:
    """The past of every layer of the program, in the form that ``through`` expects: the same for all."""
    if past is None:
        return None
    if not isinstance(layers, ScannedLayers):
        return past.of((past.cache,))
    (segment,) = layers.segments
    window, config = past.cache.window, layers.config
    repeats = program.layers // len(segment)
    # Only the layer's own state matters; those of another kind get an empty one.
    states = [
        empty_layer(config, kind, len(window), program.capacity, window.dtype, block.attn.numerics)
        for kind, block in zip(map(config.layer_kind, range(len(segment) - 1)), segment, strict=False)
    ]
    stacked = [jax.tree.map(lambda part: jnp.stack([part] * repeats), state) for state in (*states, past.cache)]
    return past.of((tuple(stacked),))


@partial(jax.jit, static_argnums=0)
def _embed(
    static: tuple[int, np.dtype[Any]], table: jax.Array, token_ids: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The model's embedding; ``static``: number of streams, and the activations' dtype."""
    taps = Taps(lambda name: True)
    return embed(table, token_ids, static[0], static[1], taps), taps.values


_compiled_head = jax.jit(to_logits, static_argnums=0)

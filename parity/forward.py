"""Running the JAX model layer by layer, with one layer's weights in memory and of its routed experts one at a time.

Several processes share the devices of a mesh, and the experts; see :mod:`dsv4_convert.parity.devices`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_convert.golden.layout import carried, of_entries, tap_shape, token_ids
from dsv4_convert.model.architectures import decoder_of
from dsv4_convert.model.block import DecoderBlock, Routed
from dsv4_convert.model.cache import Past, empty_layer
from dsv4_convert.model.dspark import DSparkBlock
from dsv4_convert.model.model import HEAD_AXES, embed
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.recording import Taps
from dsv4_convert.parity.calls import Call, calls_of, calls_of_draft
from dsv4_convert.parity.devices import Devices
from dsv4_convert.parity.state import state_after
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.tap import AFTER
from dsv4_convert.spec.taps import TapKey
from dsv4_convert.store.layout import Region
from dsv4_convert.weights.experts import MATRICES, ExpertCache, routed_sum
from dsv4_convert.weights.parameters import Parameters
from dsv4_convert.weights.restore import restore_block

Array = np.ndarray[Any, Any]
_FLOAT32 = np.dtype(np.float32)
#: Columns of the output head that are in memory at a time; at V4-Pro's width 235 MB in float32.
HEAD_WORDS = 8192
_LOGITS = "logits"
#: The tap of the first DSpark stage that the others start from.
_CONTEXT = "main_norm"
#: Rows of a table that are chosen by what is in them.
_ROWS = "engram.ids"
#: Activations by tap, in float32 or int32 whatever the model computes in.
Activations = dict[TapKey, Array]
#: The values that enter or leave a layer, by the names of :func:`dsv4_convert.golden.layout.carried`.
Entering = Mapping[str, Any]


class Forward:
    """The model over one batch of prompts of equal length, with weights and activations in one dtype.

    Parameters that the release keeps in float32 stay so, whatever the dtype. Every method returns the activations, and
    what the next one needs. Layers of one kind share one compiled program.
    """

    def __init__(
        self,
        weights: Parameters,
        tokens: Array,
        dtype: np.dtype[Any] = _FLOAT32,
        *,
        first_position: int = 0,
        decode: int = 0,
        numerics: Numerics = PLAIN,
        devices: Devices | None = None,
    ) -> None:
        """``first_position`` is that of the first token in the rotary tables; the last ``decode`` tokens come one by
        one, from the layer's cache."""
        self._weights = weights
        self._decoder = decoder_of(weights.config)
        self._devices = devices or Devices()
        self._dtype = dtype
        self._numerics = numerics
        self._weight_dtype = np.dtype(numerics.weight_dtype(dtype))
        self._expert_cache = ExpertCache(self._read_expert)
        self._resident: tuple[int, tuple[nnx.GraphDef[DecoderBlock], nnx.State[Any, Any]]] | None = None
        self._tokens = jnp.asarray(tokens, jnp.int32)
        self._first_position, self._decode = first_position, decode
        self._calls = calls_of(len(tokens), tokens.shape[1], decode)
        self._draft_calls = calls_of_draft(len(tokens), tokens.shape[1], decode)

    def embed(self) -> tuple[Activations, Entering]:
        """The embedding, and what enters layer 0. Reads the rows of the prompt's tokens only."""
        config, taps, ids = self._weights.config, Taps(_everything), np.asarray(self._tokens)
        used, where = np.unique(ids, return_inverse=True)
        rows = jnp.asarray(self._weights.read_rows("embed", used, self._dtype))
        streams = embed(rows, jnp.asarray(where.reshape(ids.shape)), config.hc_mult, self._dtype, taps)
        return activations(config, None, taps.values), self._entering_first(streams)

    def _entering_first(self, streams: jax.Array) -> Entering:
        return self._decoder.taps_of(self._decoder.enter(streams))

    def layer(
        self, layer: int, entering: Entering, overrides: Mapping[TapKey, Array] | None = None
    ) -> tuple[Activations, Entering]:
        """Run one layer or stage: its activations, and what leaves it. ``overrides`` replace what it goes on with.

        A stage that has a head has its logits, and what is chosen by them, among its activations.
        """
        found, leaving = self._calls_of(layer, entering, overrides or {})
        if self._weights.config.has_head(layer):
            found |= self._stage_head(layer, leaving, overrides or {})
        return found, leaving

    def _stage_head(self, layer: int, leaving: Entering, overrides: Mapping[TapKey, Array]) -> Activations:
        config = self._weights.config
        found = self.head({name: leaving[name] for name in carried(config, None)}, overrides, stage=layer)
        if not config.drafts_blocks(layer):
            return found
        x, logits = (
            overrides.get(key, found[key])
            for key in (TapKey.of(config, layer, name) for name in (self._decoder.collapsed, _LOGITS))
        )
        anchor = token_ids(np.asarray(self._tokens), config, layer)[:, 0]
        replace = {key.tap.name: jnp.asarray(value) for key, value in overrides.items()}
        operands = (jnp.asarray(x, self._dtype), jnp.asarray(logits), jnp.asarray(anchor), replace)
        return found | activations(config, layer, self._devices.run(_choose, *self._block(layer), *operands))

    def _calls_of(
        self, layer: int, entering: Entering, overrides: Mapping[TapKey, Array]
    ) -> tuple[Activations, Entering]:
        """One layer or stage, call by call."""
        config = self._weights.config
        ids = jnp.asarray(token_ids(np.asarray(self._tokens), config, layer))
        batch, tokens = self._tokens.shape
        drafts = config.drafts_blocks(layer)
        calls = self._draft_calls if drafts else self._calls
        cache = None
        if drafts or calls[0].cached:
            cache = empty_layer(config, config.layer_kind(layer), batch, tokens, self._dtype, self._numerics)
        # The state follows from taps that can be replaced themselves.
        given = {key: value for key, value in overrides.items() if not key.tap.is_state}
        whole: Activations = {}
        leaving: dict[str, Array] = {}
        state: dict[str, Array] = {}
        for call in calls:
            replace = {key.tap.name: jnp.asarray(call.part(value, key, config)) for key, value in given.items()}
            past = None if cache is None else Past(cache, jnp.asarray(call.start), jnp.asarray(call.count))
            positions = self._first_position + jnp.asarray(call.tokens, jnp.int32)
            carry = self._decoder.entering_of(call.enter(entering, layer, config), self._dtype)
            own_ids = ids if drafts else call.take(ids)
            left, values, cache = self._call(layer, (carry, own_ids, positions, replace, past))
            found = activations(config, layer, values)
            if cache is None:
                return found, self._decoder.taps_of(left)
            if not whole:
                whole = {key: self._empty(key, value) for key, value in found.items()}
            for key, value in found.items():
                call.put(value, whole[key], key, config)
            self._leave(layer, call, self._decoder.taps_of(left), leaving)
            if self._decode and (call.start + call.count == tokens - self._decode).all() and not state:
                state = state_after(self._attention(layer), cache, tokens - self._decode)
        return whole | activations(config, layer, state), self._leaving(layer, leaving, entering, whole)

    def _empty(self, key: TapKey, part: Array) -> Array:
        """Room for all rows of a tap, of which ``part`` has some."""
        rows = tap_shape(key, self._weights.config, batch=len(part), tokens=self._tokens.shape[1])[1]
        return np.empty((part.shape[0], rows, *part.shape[2:]), part.dtype)

    def _leave(self, layer: int, call: Call, part: Mapping[str, Any], whole: dict[str, Array]) -> None:
        """Add what leaves a layer in one call to what has left it. A cache has all entries so far."""
        for name, value in part.items():
            key, array = TapKey.of(self._weights.config, layer, name), np.asarray(value)
            if of_entries(key):
                whole[name] = array
            else:
                call.put(array, whole.setdefault(name, self._empty(key, array)), key, self._weights.config)

    def _leaving(self, layer: int, left: dict[str, Array], entering: Entering, found: Activations) -> dict[str, Array]:
        """The values that the next layer or stage starts from; a DSpark stage hands on the context too."""
        config = self._weights.config
        if not config.drafts_blocks(layer):
            return left
        made = TapKey.of(config, layer, _CONTEXT)
        return {**left, _CONTEXT: found[made] if made in found else entering[_CONTEXT]}

    def _call(self, layer: int, operands: tuple[Any, ...]) -> tuple[Any, dict[str, Any], Any]:
        """A layer on the tokens of one call: the carry that leaves it, its taps by name, and its new state.

        ``operands``: the carry that enters, token ids, positions, overrides by name, and the state before.
        """
        graph, state = self._block(layer)
        _, ids, _, replace, past = operands
        rows = self._rows(layer, ids, replace, past)
        carry, routed, first, cache = self._devices.run(_to_experts, graph, state, rows, *operands)
        output = self._experts(layer, routed)
        left, second = self._devices.run(_from_experts, graph, state, carry, routed, output, replace)
        return left, {**first, **second}, cache

    def _rows(self, layer: int, ids: jax.Array, replace: Mapping[str, jax.Array], past: Any) -> jax.Array | None:
        """The rows of its table that a layer or stage looks up, ``[B, S, ...]``; None if it has none."""
        config = self._weights.config
        if (table := config.table_of(layer)) is None:
            return None
        wanted = replace.get(_ROWS)
        if wanted is None:
            wanted = self._devices.run(_wanted_rows, *self._block(layer), ids, past)
        last = config.names.rule_of(table).target_shape(config, layer)[0] - 1  # a wrong row may be none of the table
        return jnp.asarray(self._weights.read_rows(table, np.clip(np.asarray(wanted), 0, last), self._dtype))

    def _attention(self, layer: int) -> Any:
        return nnx.merge(*self._block(layer)).attn

    def head(
        self, entering: Entering, overrides: Mapping[TapKey, Array] | None = None, *, stage: int | None = None
    ) -> Activations:
        """Head collapse, final norm and logits; the output matrix is in memory a few thousand words at a time.

        ``stage``: the layer number of a stage, which has its own collapse and norm; None: the model level.
        """
        config = self._weights.config
        own = "" if stage is None else config.prefix(stage)
        with self._devices.step("read the model level"):
            paths = (*self._decoder.head_weights, "norm")
            fixed = tuple(self._devices.put(self._weights.read(own + path)) for path in paths)
        given = {
            key.tap.name: jnp.asarray(value)
            for key, value in (overrides or {}).items()
            if key.tap.where is AFTER and key.tap.name != _LOGITS
        }
        left = self._decoder.leave(self._decoder.carry_of(entering, self._dtype))
        logits = []
        step = self._head_step()
        for start in range(0, config.vocab_size, step):
            stop = min(start + step, config.vocab_size)
            with self._devices.step("read the output head"):
                words = self._devices.read(
                    HEAD_AXES, (config.hidden_size, stop - start), _FLOAT32, partial(self._words, start), "head"
                )
            # The operations before the matrix are small, so they run again for every piece.
            values = self._devices.run(self._head_program(), config, (*fixed, words), left, given)
            logits.append(np.asarray(values[_LOGITS]))
        return activations(config, stage, values | {_LOGITS: np.concatenate(logits, axis=-1)})

    def _head_program(self) -> Callable[..., Any]:
        return to_logits

    def _head_step(self) -> int:
        """Columns of the output head that are in memory at a time."""
        return self._devices.multiple(HEAD_WORDS, "vocab")

    def _words(self, start: int, region: Region) -> Array:
        """A part of the output head's columns from ``start`` on."""
        rows, columns = region
        return self._weights.read_region("head", (rows, slice(start + (columns.start or 0), start + columns.stop)))

    def _block(self, layer: int) -> tuple[nnx.GraphDef[DecoderBlock], nnx.State[Any, Any]]:
        """One layer's weights without its experts; cached until another layer is requested."""
        if self._resident is None or self._resident[0] != layer:
            self._resident = None  # give the memory back first
            with self._devices.step(f"read layer {layer}"):
                block = restore_block(
                    self._weights,
                    layer,
                    with_experts=False,
                    dtype=self._weight_dtype,
                    numerics=self._numerics,
                    mesh=self._devices.mesh,
                )
            self._resident = (layer, nnx.split(block))
        return self._resident[1]

    def _experts(self, layer: int, routed: Routed) -> jax.Array:
        """The routed experts' weighted sum; each expert that a token chose is read once, by one of the processes."""
        with self._devices.step(f"experts of layer {layer}"):
            part = self._own_experts(layer, routed)
        total = jnp.asarray(self._devices.sum(part))
        return self._numerics.sum_of_experts(total, self._dtype).reshape(routed.x.shape)

    def _own_experts(self, layer: int, routed: Routed) -> Array:
        """The part of the sum that this process computes, float32 ``[B * S, D]``."""
        config = self._weights.config
        return routed_sum(
            routed,
            np.ones(routed.x.shape[:2], bool),
            lambda experts: self._expert_cache.each(layer, self._devices.mine(experts)),
            last=config.experts_of(layer) - 1,
            limit=config.swiglu_limit,
            numerics=self._numerics,
        )

    def _read_expert(self, layer: int, expert: int) -> tuple[Array, ...]:
        stack = f"{self._weights.config.prefix(layer)}ffn.experts."
        return tuple(self._weights.read_expert(stack + name, expert, self._weight_dtype) for name in MATRICES)


def _everything(name: str) -> bool:
    return True


@partial(jax.jit, static_argnums=0)
def _to_experts(
    graph: nnx.GraphDef[DecoderBlock],
    state: nnx.State[Any, Any],
    rows: jax.Array | None,
    carry: Any,
    token_ids: jax.Array,
    positions: jax.Array,
    overrides: dict[str, jax.Array],
    past: Past[Any] | None,
) -> tuple[Any, Routed, dict[str, jax.Array], Any]:
    """The attention half, and the expert half up to the routing. ``rows``: those that the block looks up."""
    block = nnx.merge(graph, state)
    taps = Taps(_everything, overrides)
    after = None
    if isinstance(block, DSparkBlock):
        assert past is not None
        carry, context = decoder_of(block.config).enter_stage(block, carry, rows, taps)
        places = block.places(positions, past)
        past, after = block.remember(context, positions, past, taps)
        positions = places
    elif rows is not None:
        carry = block.join(carry, rows, taps)
    carry, cache = block.attend(carry, token_ids, positions, taps, past)
    return carry, block.route(carry, token_ids, taps), taps.values, after or cache


@partial(jax.jit, static_argnums=0)
def _wanted_rows(
    graph: nnx.GraphDef[DecoderBlock], state: nnx.State[Any, Any], token_ids: jax.Array, past: Past[Any] | None
) -> jax.Array:
    return nnx.merge(graph, state).wanted_rows(token_ids, past)


@partial(jax.jit, static_argnums=0)
def _from_experts(
    graph: nnx.GraphDef[DecoderBlock],
    state: nnx.State[Any, Any],
    carry: Any,
    routed: Routed,
    experts: jax.Array,
    overrides: dict[str, jax.Array],
) -> tuple[Any, dict[str, jax.Array]]:
    """The expert half from the routed experts' output on."""
    taps = Taps(_everything, overrides)
    return nnx.merge(graph, state).combine(carry, routed, experts, taps), taps.values


@partial(jax.jit, static_argnums=0)
def _choose(
    graph: nnx.GraphDef[DecoderBlock],
    state: nnx.State[Any, Any],
    x: jax.Array,
    logits: jax.Array,
    anchor: jax.Array,
    overrides: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """The taps of DSpark's last stage after the logits."""
    taps = Taps(_everything, overrides)
    block = nnx.merge(graph, state)
    assert isinstance(block, DSparkBlock)
    block.choose(x, logits, anchor, taps)
    return taps.values


def to_logits(
    config: Config, weights: tuple[jax.Array, ...], entering: Any, overrides: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The taps of the model level after the layers, for some words."""
    taps = Taps(_everything, overrides)
    decoder_of(config).project(entering, weights, config, taps)
    return taps.values


def activations(config: Config, layer: int | None, values: Mapping[str, Any]) -> Activations:
    """Recorded values, by name within the layer, as NumPy arrays; bfloat16 becomes float32."""
    arrays = {TapKey.of(config, layer, name): np.asarray(value) for name, value in values.items()}
    return {key: array if array.dtype.kind in "if" else array.astype(np.float32) for key, array in arrays.items()}

"""A model of which only what every token needs is in memory; routed experts come from the disk as tokens choose them.

Shape letters: ``B`` prompts, ``S`` tokens of a call, ``V`` vocabulary, ``N`` streams, ``D`` width.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.folders import is_published
from dsv4_convert.model import PLAIN, Cache, Numerics, Taps
from dsv4_convert.model.architectures import release_numerics
from dsv4_convert.model.block import DecoderBlock, Routed
from dsv4_convert.model.cache import LayerCache, Past
from dsv4_convert.model.encoded import Encoded
from dsv4_convert.model.model import Model, embed
from dsv4_convert.show.units import size
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import parameters
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.weights.codes import PARTS, Codes
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.experts import MATRICES, ExpertCache, Requests, routed_sum
from dsv4_convert.weights.parameters import Parameters, dtype_of
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.restore import available_bytes, restore_block

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_HEAD = (*Model.head_weights, "norm", "head")
#: Share of the available memory that is used unless a limit is given; files that were read fill the rest.
_SHARE = 0.75
#: Experts in memory beside the cache: those that threads turn into the model's layout, and those that are computed.
_UNDER_WAY = 4


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes beyond the interpreter with its imports.

    Attributes:
        resident: weights that every token needs.
        state: the cache of keys and entries.
        work: matrices that a prompt decodes, and experts under way.
        expert: one expert.
        limit: all that may be used.
    """

    resident: int
    state: int
    work: int
    expert: int
    limit: int

    def __str__(self) -> str:
        return (
            f"{size(self.resident)} of weights that every token needs, {size(self.state)} for the tokens' keys, "
            f"{size(self.work)} to compute in, and {self.cached_experts:,} routed experts of {size(self.expert)} each"
        )

    @property
    def cached_experts(self) -> int:
        """How many experts are kept. Raises :class:`ResourceError` if there is no room for one."""
        fixed = self.resident + self.state + self.work
        count = (self.limit - fixed) // self.expert
        if count < 1:
            raise ResourceError(
                f"a limit of {size(self.limit)}, and {size(fixed + self.expert)} are needed: {size(self.resident)} of "
                f"weights that every token needs, {size(self.state)} for the tokens' keys, {size(self.work)} to "
                f"compute in, and {size(self.expert)} for one routed expert; raise --max-memory, free memory, or give "
                "fewer prompts and tokens"
            )
        return count


@dataclasses.dataclass
class Pace:
    """How generation went, apart from the prompts: of the calls for one token of each of them.

    Attributes:
        tokens: calls for one more token.
        seconds: that they took.
        bytes_read: bytes of experts that were read for them.
        hit_rate: share of the experts asked for that were in memory.
    """

    tokens: int
    seconds: float
    bytes_read: int
    hit_rate: float

    def __str__(self) -> str:
        per_token = f"{self.seconds / self.tokens:.2f} s and {size(self.bytes_read / self.tokens)} read a token"
        return f"{per_token}, {self.hit_rate:.0%} of the experts in memory"


class ModelFromDisk:
    """DeepSeek-V4 for :class:`~dsv4_convert.serve.generate.Generator`, with its routed experts on the disk.

    Weights that are stored as codes stay codes, in memory too. Every layer is two programs, up to the routing and from
    the experts' sum on; between them the chosen experts are read, unless they are in the cache, and computed one after
    the other, while the next are read. The experts of padding are not read.
    """

    #: Tokens of a prompt in one call: more than in memory, as a call reads nearly all experts however many it has.
    chunk = 512
    #: As of :class:`~dsv4_convert.model.model.Decoder`.
    why_no_drafts: str | None = "with experts from the disk no draft stage is in memory"

    def __init__(
        self, weights: Parameters, dtype: np.dtype[Any], *, numerics: Numerics = PLAIN, plan: MemoryPlan
    ) -> None:
        """Reads what every token needs. Raises :class:`ResourceError` if the ``plan`` has no room for it."""
        self.config, self.numerics, self.plan = weights.config, numerics, plan
        self._weights, self._dtype = weights, dtype
        self._weight_dtype = np.dtype(numerics.weight_dtype(dtype))
        #: Called after every layer of a call, with the number of layers done and in all.
        self.on_layer: Callable[[int, int], None] = lambda done, total: None
        self.reset_pace()
        self._experts = ExpertCache(self._read_expert, capacity=plan.cached_experts)
        self._codes = {
            path: Codes.of(weights, path, rule.target_shape(self.config, layer))
            for path, rule, layer in parameters(self.config.without_stages())
            if rule.per_expert
        }
        # float32, in which the product is: converting the matrix for every token would take that memory each time.
        self._head = tuple(jnp.asarray(weights.read(path, self._weight_dtype), jnp.float32) for path in _HEAD)
        self._layers = [
            nnx.split(
                restore_block(
                    weights, layer, with_experts=False, dtype=self._weight_dtype, numerics=numerics, encoded=True
                )
            )
            for layer in range(self.config.num_hidden_layers)
        ]

    def reset_pace(self) -> None:
        """Measure :attr:`pace` from here on."""
        self._calls, self._seconds, self._of_tokens = 0, 0.0, Requests()

    @property
    def pace(self) -> Pace | None:
        """How the calls for one token went so far; None before the first."""
        asked, read = self._of_tokens.asked, self._of_tokens.read
        if not self._calls:
            return None
        return Pace(self._calls, self._seconds, read * self.plan.expert, max(0.0, 1 - read / max(asked, 1)))

    def extend(
        self,
        tokens: Int[np.ndarray[Any, Any], "B S"],
        cache: Cache,
        count: Int[np.ndarray[Any, Any], " B"],
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of each prompt's last token, and the cache with these tokens (:meth:`Model.extend`)."""
        cache.refuse_overflow(count)
        begun, before = time.perf_counter(), dataclasses.replace(self._experts.requests)
        config = self.config
        used, where = np.unique(tokens, return_inverse=True)
        rows = jnp.asarray(self._weights.read_rows("embed", used, self._dtype))
        ids, added = jnp.asarray(tokens, jnp.int32), jnp.asarray(count, jnp.int32)
        positions = (cache.first + cache.tokens)[:, None] + jnp.arange(ids.shape[1])
        streams = _embedded(rows, jnp.asarray(where.reshape(tokens.shape)), config.hc_mult, self._dtype)
        present = np.arange(tokens.shape[1]) < np.asarray(count)[:, None]
        states = []
        for layer, (graph, state) in enumerate(self._layers):
            streams, routed, after = _to_experts(
                graph, state, streams, ids, positions, (cache.tokens, added), cache.layers[layer]
            )
            states.append(after)
            total = routed_sum(
                routed,
                present,
                partial(self._experts.each, layer),
                last=config.n_routed_experts - 1,
                limit=config.swiglu_limit,
                numerics=self.numerics,
            )
            streams = _from_experts(graph, state, streams, routed, total)
            self.on_layer(layer + 1, config.num_hidden_layers)
        logits = jax.block_until_ready(_logits(config, self._head, streams, added))
        if tokens.shape[1] == 1:
            self._calls, self._seconds = self._calls + 1, self._seconds + time.perf_counter() - begun
            self._of_tokens.asked += self._experts.requests.asked - before.asked
            self._of_tokens.read += self._experts.requests.read - before.read
        return logits, dataclasses.replace(cache, layers=tuple(states), tokens=cache.tokens + added)

    def _read_expert(self, layer: int, expert: int) -> tuple[Any, ...]:
        """The matrices of an expert, as codes where they are stored as such."""
        matrices = tuple(self._matrix(f"layers.{layer}.ffn.experts.{name}", expert) for name in MATRICES)
        return jax.device_put(matrices) if isinstance(matrices[0], Encoded) else matrices

    def _matrix(self, path: str, expert: int) -> Encoded | np.ndarray[Any, Any]:
        codes = self._codes[path]
        if codes is None:
            return self._weights.read_expert(path, expert, self._weight_dtype)
        read, scales = (codes.read_entry(part, expert) for part in PARTS)
        return Encoded(read, scales, codes.block, codes.packed, self._weight_dtype)


def open_from_disk(
    checkpoint: str, dtype: np.dtype[Any], *, release: bool, prompts: int, room: int, limit: int | None = None
) -> ModelFromDisk:
    """The model of a converted checkpoint or a published folder, for ``room`` tokens of each of the ``prompts``.

    Args:
        checkpoint: its path.
        dtype: dtype of activations.
        release: round intermediate values as DeepSeek's inference code does.
        prompts, room: how many prompts there are, and the tokens of the longest with its new ones.
        limit: bytes of memory; None for three quarters of what this machine has left.

    Raises:
        BadInput: there is none.
        ResourceError: the limit is too small.
        UsageError: layers are missing; widths do not suit release numerics; not DeepSeek-V4.
    """
    published = is_published(Path(checkpoint))
    weights: Parameters = PublishedWeights.open(checkpoint) if published else Weights.open(checkpoint)
    weights.check_layers(tuple(range(weights.config.num_hidden_layers)))
    if not isinstance(weights.config, V4Config):
        raise UsageError(f"{checkpoint}: {weights.config.title} runs with all weights in memory only")
    numerics = release_numerics(weights.config) if release else PLAIN
    plan = plan_memory(weights, dtype, numerics=numerics, prompts=prompts, room=room, limit=limit)
    return ModelFromDisk(weights, dtype, numerics=numerics, plan=plan)


def plan_memory(
    weights: Parameters,
    dtype: np.dtype[Any],
    *,
    numerics: Numerics = PLAIN,
    prompts: int,
    room: int,
    limit: int | None = None,
) -> MemoryPlan:
    """The memory of a :class:`ModelFromDisk` for ``room`` tokens of each of the prompts; reads no weight.

    ``limit``: bytes that may be used; None for three quarters of what this machine has left.
    """
    config = weights.config
    dtype, activations = np.dtype(numerics.weight_dtype(dtype)), dtype
    resident, largest, expert = 0, 0, 0
    for path, rule, layer in parameters(config.without_stages()):
        if path == "embed" or (rule.per_expert and layer):
            continue
        shape = rule.target_shape(config, layer)
        codes = Codes.of(weights, path, shape)
        width = np.dtype(np.float32) if path == "head" else dtype_of(rule, dtype)
        nbytes = int(np.prod(shape)) * width.itemsize if codes is None else codes.nbytes
        if rule.per_expert:
            expert += nbytes // config.n_routed_experts
            continue
        resident += nbytes
        largest = max(largest, int(np.prod(shape)) * 4 if codes is not None else 0)
    state = jax.eval_shape(
        lambda: jax.tree.leaves(Cache.empty(config, prompts, room, dtype=activations, numerics=numerics))
    )
    nbytes = sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in state)
    decoded = 3 * 4 * config.hidden_size * config.moe_intermediate_size
    if limit is None:
        limit = int(_SHARE * (available_bytes() or 0))
    return MemoryPlan(resident, nbytes, 2 * largest + decoded + _UNDER_WAY * expert, expert, limit)


@partial(jax.jit, static_argnums=(2, 3))
def _embedded(
    rows: Float[Array, "U D"], where: Int[Array, "B S"], streams: int, dtype: np.dtype[Any]
) -> Float[Array, "B S N D"]:
    return embed(rows, where, streams, dtype, Taps())


@partial(jax.jit, static_argnums=0, donate_argnums=6)
def _to_experts(
    graph: nnx.GraphDef[DecoderBlock],
    state: nnx.State[Any, Any],
    streams: Float[Array, "B S N D"],
    ids: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    counts: tuple[Int[Array, " B"], Int[Array, " B"]],
    cache: LayerCache,
) -> tuple[Float[Array, "B S N D"], Routed, LayerCache]:
    """The attention half, and the expert half up to the routing. ``counts``: tokens before and in this call."""
    block = nnx.merge(graph, state)
    streams, after = block.attend(streams, ids, positions, Taps(), Past(cache, *counts))
    assert after is not None
    return streams, block.route(streams, ids, Taps()), after


@partial(jax.jit, static_argnums=0)
def _from_experts(
    graph: nnx.GraphDef[DecoderBlock],
    state: nnx.State[Any, Any],
    streams: Float[Array, "B S N D"],
    routed: Routed,
    total: Float[Array, "BS D"],
) -> Float[Array, "B S N D"]:
    """The expert half from the sum of the routed experts on."""
    block = nnx.merge(graph, state)
    output = block.ffn.shared_experts.numerics.sum_of_experts(total, routed.x.dtype).reshape(routed.x.shape)
    return block.combine(streams, routed, output, Taps())


@partial(jax.jit, static_argnums=0)
def _logits(
    config: Config, weights: tuple[Array, ...], streams: Float[Array, "B S N D"], count: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """Logits of each prompt's last token."""
    last = jnp.take_along_axis(streams, jnp.maximum(count - 1, 0)[:, None, None, None], axis=1)
    return Model.project(last, weights, config, Taps())[:, 0]

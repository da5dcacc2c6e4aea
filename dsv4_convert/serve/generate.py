"""Generation for a batch of prompts of any lengths, token by token from the cache or with drafted tokens.

Shape letters: ``B`` prompts, ``S`` tokens of a call, ``V`` vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_convert.errors import UsageError
from dsv4_convert.model import Cache
from dsv4_convert.model.model import Decoder
from dsv4_convert.serve.from_disk import ModelFromDisk
from dsv4_convert.serve.speculate import DecodingState, Drafts, prefill, verify

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

#: Tokens of a prompt in one call; the last call of a prompt is padded to as many.
_CHUNK = 128
#: Called with the prompt's index and its new token.
OnToken = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the logits.

    Attributes:
        temperature: divisor of the logits; 0 takes the first choice (greedy).
        top_k: number of likeliest tokens to draw from; 0 for all.
        top_p: draw from the likeliest tokens that together have this probability, at least one.
        seed: seed of the draws. The same seed, prompts and weights give the same tokens on one machine.

    Raises:
        UsageError: a value that means nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature {self.temperature}: expected 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k}: expected 0 (all tokens) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p}: expected a share of probability above 0, 1 at most")


class Generator:
    """A model with its compiled steps; each is compiled once for a number of prompts and a room for their tokens.

    The model is in memory, or has its routed experts on the disk (:mod:`dsv4_convert.serve.from_disk`).
    """

    def __init__(self, model: Decoder | ModelFromDisk, dtype: Any = jnp.float32, *, speculative: bool = False) -> None:
        """``dtype``: dtype of activations and cache.

        With ``speculative`` the model's draft stages draft tokens (:mod:`dsv4_convert.serve.speculate`). That does not
        change the tokens, except where rounding decides between two: a pass has another shape.

        Raises:
            UsageError: the model has no stage to draft with.
        """
        if speculative and model.why_no_drafts is not None:
            raise UsageError(f"speculative decoding: {model.why_no_drafts}")
        self._config, self._numerics = model.config, model.numerics
        self._dtype = dtype
        self._speculative = speculative
        if isinstance(model, ModelFromDisk):
            self._step, self._chunk = model.extend, model.chunk
        else:
            self._graph, self._state = nnx.split(model)
            self._step, self._chunk = partial(_extend, self._graph, self._state), _CHUNK
        #: Drafts of the last call, and how many were accepted.
        self.drafts = Drafts(0, 0)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: int,
        sampling: Sampling | None = None,
        stop: Collection[int] = (),
        on_token: OnToken = lambda prompt, token: None,
    ) -> list[list[int]]:
        """The ``new_tokens`` tokens that follow each prompt, or fewer where one of ``stop`` ends it.

        Raises:
            UsageError: no prompt, an empty one, ids outside the vocabulary, more tokens than the model's limit, or
                speculative decoding with a temperature.
        """
        sampling = sampling or Sampling()
        lengths = np.array([len(prompt) for prompt in prompts])
        self._check(prompts, lengths, new_tokens)
        if self._speculative and sampling.temperature:
            raise UsageError("speculative decoding takes the first choice of every token; leave the temperature at 0")
        texts = _Texts(len(prompts), new_tokens, stop, on_token)
        if self._speculative:
            self._speculate(prompts, lengths, texts)
        else:
            self._step_by_step(prompts, lengths, texts, sampling)
        return texts.found

    def _step_by_step(
        self, prompts: Sequence[Sequence[int]], lengths: np.ndarray[Any, Any], texts: _Texts, sampling: Sampling
    ) -> None:
        key = jax.random.key(sampling.seed)
        room = int(lengths.max()) + texts.limit
        cache = Cache.empty(self._config, len(prompts), room, dtype=self._dtype, numerics=self._numerics)
        last = jnp.zeros((len(prompts), self._config.vocab_size), jnp.float32)
        for tokens, _, count in _chunks(prompts, lengths, self._chunk):
            logits, cache = self._step(tokens, cache, count)
            last = jnp.where((count > 0)[:, None], logits, last)  # a shorter prompt has ended before
        while texts.running.any():
            key, draw = jax.random.split(key)
            chosen = np.asarray(_drawn(last, draw, sampling.temperature, sampling.top_k, sampling.top_p))
            for row in map(int, np.flatnonzero(texts.running)):
                texts.add(row, [int(chosen[row])])
            if texts.running.any():
                last, cache = self._step(chosen[:, None], cache, texts.running.astype(np.int32))

    def _speculate(self, prompts: Sequence[Sequence[int]], lengths: np.ndarray[Any, Any], texts: _Texts) -> None:
        batch = len(prompts)
        room = int(lengths.max()) + texts.limit
        decoding = DecodingState.empty(self._config, batch, room, self._dtype, self._numerics)
        # Each token is read together with the token after it, so the last one is left to the first pass.
        for tokens, following, count in _chunks(prompts, lengths - 1, self._chunk):
            decoding = prefill(self._graph, self._state, decoding, *map(jnp.asarray, (tokens, following, count)))
        certain = [[prompt[-1]] for prompt in prompts]
        most = self._config.draft_tokens
        drafts: list[list[int]] = [[] for _ in prompts]
        drafted = accepted = 0
        while texts.running.any():
            given = np.zeros((batch, 2 * most + 1), np.int32)
            counts = np.zeros((2, batch), np.int32)
            for row in map(int, np.flatnonzero(texts.running)):
                ahead = drafts[row][: texts.limit - len(texts.found[row])]
                known = [*certain[row], *ahead]
                given[row, : len(known)] = known
                counts[:, row] = len(certain[row]), len(ahead)
            decoding, *results = verify(self._graph, self._state, decoding, *map(jnp.asarray, (given, *counts)))
            chosen, accepted_now, proposed = map(np.asarray, results)
            drafted, accepted = drafted + int(counts[1].sum()), accepted + int(accepted_now.sum())
            drafts = proposed.tolist()
            for row in map(int, np.flatnonzero(texts.running)):
                certain[row] = chosen[row, : 1 + accepted_now[row]].tolist()
                texts.add(row, certain[row])
        self.drafts = Drafts(drafted, accepted)

    def _check(self, prompts: Sequence[Sequence[int]], lengths: np.ndarray[Any, Any], new_tokens: int) -> None:
        config = self._config
        if not len(prompts) or not lengths.all():
            raise UsageError("a prompt without tokens: at least one token is needed to go on from")
        if new_tokens < 0:
            raise UsageError(f"{new_tokens} new tokens: expected none or more")
        wrong = [token for prompt in prompts for token in prompt if not 0 <= token < config.vocab_size]
        if wrong:
            raise UsageError(f"{len(wrong)} ids outside the vocabulary of {config.vocab_size}, such as {wrong[0]}")
        most = int(lengths.max()) + new_tokens
        if most > config.max_position_embeddings:
            raise UsageError(
                f"{lengths.max()} tokens and {new_tokens} new ones are {most}, but max_position_embeddings is "
                f"{config.max_position_embeddings}"
            )


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """The tokens that follow each prompt, without a cache of your own; float32 activations.

    A :class:`Generator` keeps what is compiled for the next call, and has more options.

    Raises:
        UsageError: as :class:`Generator`.

    Examples:
        >>> model = restore_model(Weights.open("orbax"))
        >>> len(generate(model, [[3, 1, 4]], new_tokens=2)[0])
        2
    """
    return Generator(model)(prompts, new_tokens=new_tokens, sampling=sampling, stop=stop)


class _Texts:
    """The new tokens of every prompt, and which prompts continue."""

    def __init__(self, prompts: int, limit: int, stop: Collection[int], on_token: OnToken) -> None:
        self.limit = limit
        self.found: list[list[int]] = [[] for _ in range(prompts)]
        self.running = np.full(prompts, limit > 0)
        self._stop = stop
        self._on_token = on_token

    def add(self, row: int, tokens: Sequence[int]) -> None:
        """Append tokens to a prompt until one ends it."""
        for token in tokens:
            if self.running[row]:
                self.found[row].append(token)
                self._on_token(row, token)
                self.running[row] = token not in self._stop and len(self.found[row]) < self.limit


def _chunks(
    prompts: Sequence[Sequence[int]], lengths: np.ndarray[Any, Any], most: int
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """The first ``lengths`` tokens of the prompts in chunks of one shape, at most ``most`` tokens of each.

    Yields tokens, the tokens after them, and counts.
    """
    longest = int(lengths.max())
    chunk = min(most, -(-longest // 8) * 8)
    for start in range(0, longest, chunk or 1):
        tokens, following = np.zeros((2, len(prompts), chunk), np.int32)
        count = np.clip(lengths - start, 0, chunk).astype(np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : count[row]] = prompt[start : start + count[row]]
            after = prompt[start + 1 : start + 1 + count[row]]
            following[row, : len(after)] = after
        yield tokens, following, count


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _extend(
    graph: nnx.GraphDef[Decoder],
    state: nnx.State[Any, Any],
    tokens: Int[Array, "B S"],
    cache: Cache,
    count: Int[Array, " B"],
) -> tuple[Float[Array, "B V"], Cache]:
    logits, cache = nnx.merge(graph, state).extend(tokens, cache, count=count, last_only=True)
    return logits[:, 0], cache


@partial(jax.jit, static_argnums=(2, 3, 4))
def _drawn(
    logits: Float[Array, "B V"], key: jax.Array, temperature: float, top_k: int, top_p: float
) -> Int[Array, " B"]:
    """One token for each row of logits."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    ordered, tokens = jax.lax.top_k(logits / temperature, min(top_k or logits.shape[1], logits.shape[1]))
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    drawn = jax.random.categorical(key, jnp.where(before < top_p, ordered, -jnp.inf), axis=-1)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)

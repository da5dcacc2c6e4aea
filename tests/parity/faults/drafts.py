"""Faults of DSpark's stages: the context of the first, the attention of all of them, the heads of the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

import dsv4_convert.parity.forward as forward_module
from dsv4_convert.golden.layout import token_ids
from dsv4_convert.model import dspark
from dsv4_convert.model import model as backbone
from dsv4_convert.model.attention import attend
from dsv4_convert.model.cache import Past
from dsv4_convert.model.dspark import BlockAttention, Drafted, DSparkBlock
from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.rope import frequencies
from dsv4_convert.model.rope import rotate as _rotate

from .decoding import _where
from .fault import DRAFTS, Fault
from .weights import _change, _copy, _swap

Code = Mapping[tuple[Any, str], Any]
FIRST, MIDDLE, LAST = DRAFTS
#: The width and the rank of the Markov head of the model that they are planted in.
_WIDTH, _RANK = 64, 64


def _context(
    *,
    of: Callable[[Any], Any] = lambda features: jnp.mean(features, axis=3),
    norm: Callable[..., Any] = rms_norm,
) -> Code:
    """The context with one of its steps replaced."""

    def context(self: Any, features: Any, taps: Any) -> Any:
        means = of(taps("targets", features))
        means = taps("main", means.reshape(*means.shape[:2], -1))
        projected = taps("main_proj", self.numerics.linear(means, self.main_proj.get_value()))
        return taps("main_norm", norm(projected, self.main_norm[...], self.config.rms_norm_eps))

    return {(DSparkBlock, "context"): context}


def _keys(*, norm: Callable[..., Any] = rms_norm, turn: Callable[..., Any] = _rotate, compressed: bool = False) -> Code:
    """The keys of the known tokens with one of their steps replaced."""

    def keys(self: Any, x: Any, positions: Any, taps: Any) -> Any:
        kv = taps("wkv", self.numerics.linear(x, self.wkv.get_value()))
        kv = taps("kv_norm", norm(kv, self.kv_norm[...], self.config.rms_norm_eps))
        return taps("kv_rope", turn(kv, positions, frequencies(self.config, compressed=compressed)))

    return {(BlockAttention, "keys"): keys}


_REMEMBER, _PLACES = DSparkBlock.remember, DSparkBlock.places


def _remember(change: Callable[[Any, Any, Any], tuple[Any, Any, Any]]) -> Code:
    """The block remembers another context, other positions or another past."""

    def remember(self: Any, context: Any, positions: Any, past: Any, taps: Any) -> Any:
        return _REMEMBER(self, *change(context, positions, past), taps)

    return {(DSparkBlock, "remember"): remember}


def _one_fewer(context: Any, positions: Any, past: Any) -> tuple[Any, Any, Any]:
    return context, positions, Past(past.cache, past.before, past.count - 1, past.keep)


def _unit(context: Any, positions: Any, past: Any) -> tuple[Any, Any, Any]:
    return context * jnp.sqrt(jnp.mean(context**2, axis=-1, keepdims=True)), positions, past


def _places(change: Callable[[Any], Any]) -> Code:
    return {(DSparkBlock, "places"): lambda self, positions, past: change(_PLACES(self, positions, past))}


def _seen(visible: Callable[[int, int], Any]) -> Code:
    """The block sees otherwise: ``visible(window, block)`` gives ``[block, window + block]``."""

    def context(q: Any, kv: Any, earlier: Any, sink: Any, *, numerics: Any) -> Any:
        window, block = earlier.keys.shape[1], kv.shape[1]
        known = jnp.arange(window) - window >= -earlier.tokens[:, None]
        inside = jnp.concatenate([known, jnp.ones((len(q), block), bool)], axis=1)
        seen = inside[:, None] & visible(window, block)[None]
        return attend(q, (jnp.concatenate([earlier.keys, kv], axis=1),), seen, sink)

    return {(dspark, "_block_context"): context}


def _causal(window: int, block: int) -> Any:
    return jnp.concatenate([jnp.ones((block, window), bool), jnp.tril(jnp.ones((block, block), bool))], axis=1)


def _sliding(window: int, block: int) -> Any:
    return jnp.arange(window + block)[None] > jnp.arange(block)[:, None]


def _blind(window: int, block: int) -> Any:
    return jnp.concatenate([jnp.ones((block, window), bool), jnp.zeros((block, block), bool)], axis=1)


def _itself_alone(window: int, block: int) -> Any:
    return jnp.concatenate([jnp.ones((block, window), bool), jnp.eye(block, dtype=bool)], axis=1)


def _choose(
    *,
    before: Callable[[Any], Any] = lambda before: before,
    add: Callable[[Any, Any], Any] = lambda logits, bias: logits + bias,
    pick: Callable[[Any, Any], Any] = lambda logits, scores: jnp.argmax(scores, axis=-1),
    confide: Callable[..., Any] = lambda head, x, embedded: head(x, embedded),
) -> Code:
    """The choice of the tokens with one of its steps replaced. It follows the golden's tokens, or its own."""

    def choose(self: Any, x: Any, logits: Any, anchor: Any, taps: Any) -> Any:
        given, known = taps.override("tokens"), anchor[:, None]
        for at in range(logits.shape[1] - 1):
            scores = add(logits[:, : at + 1], self.markov_head(self.markov_head.embed(before(known))))
            chosen = pick(logits[:, : at + 1], scores)[:, -1] if given is None else given[:, at, 0]
            known = jnp.concatenate([known, chosen[:, None]], axis=1)
        embedded = taps("markov_head.embed", self.markov_head.embed(before(known)))
        scores = taps("draft_logits", add(logits, taps("markov_head", self.markov_head(embedded))))
        tokens = taps("tokens", pick(logits, scores)[..., None].astype(jnp.int32))
        return Drafted(tokens[..., 0], scores, taps("confidence", confide(self.confidence_head, x, embedded)))

    return {(DSparkBlock, "choose"): choose}


def _all_after_the_anchor(before: Any) -> Any:
    return jnp.broadcast_to(before[:, :1], before.shape)


def _after_noise(before: Any) -> Any:
    return before.at[:, 1:].set(95)


def _second_best(logits: Any, scores: Any) -> Any:
    return jnp.argsort(scores, axis=-1)[..., -2]


def _normed(head: Any, x: Any, embedded: Any) -> Any:
    return head(rms_norm(x, jnp.ones(x.shape[-1]), 1e-6), embedded)


def _without_the_token(head: Any, x: Any, embedded: Any) -> Any:
    return head(x, 0 * embedded)


def _probability(head: Any, x: Any, embedded: Any) -> Any:
    return 1 / (1 + jnp.exp(-head(x, embedded)))


def _ids(change: Callable[[Any, Any], Any]) -> Code:
    """Another block: ``change`` gets the prompt and the right block."""

    def ids(tokens: Any, config: Any, layer: Any) -> Any:
        return change(tokens, token_ids(tokens, config, layer))

    return {(forward_module, "token_ids"): ids}


def _first_alone(rows: Any, streams: int, taps: Any) -> Any:
    rows = taps("embed", rows)
    return jnp.pad(rows[:, :, None], ((0, 0), (0, 0), (0, streams - 1), (0, 0)))


def _draft(layer: int, name: str, tap: str, **what: Any) -> Fault:
    return Fault(name=f"mtp.{layer - FIRST}: {name}", layer=layer, tap=tap, model="drafting", **what)


def _of_all(layer: int) -> Iterator[Fault]:
    """Faults that any of the stages may have."""
    own, other = f"mtp.{layer - FIRST}", f"mtp.{(layer - FIRST + 1) % len(DRAFTS)}"
    for name, tap, code in (
        ("keys of the known tokens not normed", "attn.main.kv_norm", _keys(norm=lambda x, *_: x)),
        ("known tokens a position late", "attn.main.kv_rope",
         _keys(turn=lambda x, positions, table: _rotate(x, positions + 1, table))),
        ("known tokens not rotated", "attn.main.kv_rope", _keys(turn=lambda x, *_: x)),
        ("the compressed layers' table for the known tokens", "attn.main.kv_rope", _keys(compressed=True)),
        ("last known token missing", "attn.context", _remember(_one_fewer)),
        ("context scaled by its size", "attn.main.wkv", _remember(_unit)),
        ("block a position late", "attn.q_rope", _places(lambda places: places + 1)),
        ("all of the block at one position", "attn.q_rope", _places(lambda places: 0 * places + places[:, :1])),
        ("block causal", "attn.context", _seen(_causal)),
        ("window moves with the query", "attn.context", _seen(_sliding)),
        ("block does not see itself", "attn.context", _seen(_blind)),
        ("a token of the block sees itself alone", "attn.context", _seen(_itself_alone)),
    ):  # fmt: skip
        yield _draft(layer, name, tap, code=code)
    for name, tap, arrays in (
        ("keys of another stage", "attn.main.wkv", _copy(f"{own}.attn.wkv", f"{other}.attn.wkv")),
        ("queries of another stage", "attn.wq_a", _copy(f"{own}.attn.wq_a", f"{other}.attn.wq_a")),
        ("sinks left at zero", "attn.context", _change(f"{own}.attn.attn_sink", np.zeros_like)),
        ("hyper-connections exchanged", "hc_attn.pre", _swap(f"{own}.hc_attn_fn", f"{own}.hc_ffn_fn")),
        ("router bias dropped", "ffn.gate.scores", _change(f"{own}.ffn.gate.bias", np.zeros_like)),
        ("experts rolled in w1", "ffn.experts", _change(f"{own}.ffn.experts.w1", lambda a: np.roll(a, 1, 0))),
    ):
        yield _draft(layer, name, tap, arrays=arrays)
    yield _draft(layer, "window one too short", "attn.context", config={"sliding_window": 5})
    yield _draft(layer, "rope base of the compressed layers", "attn.main.kv_rope", config={"rope_theta": 160000.0})
    yield _draft(
        layer,
        "experts missing a scale",
        "ffn.experts",
        tensor=_where(rf"mtp\.{layer - FIRST}\.ffn\.experts\.\d+\.w2\.scale", lambda a: np.full_like(a, 127)),
    )


_HEAD = ("hc_head_fn", "hc_head_base", "hc_head_scale")

_OF_FIRST: tuple[Fault, ...] = (
    _draft(FIRST, "targets in another order", "main",
           code=_context(of=lambda features: jnp.mean(features[:, :, ::-1], axis=3))),
    _draft(FIRST, "sum of the streams", "main", code=_context(of=lambda features: jnp.sum(features, axis=3))),
    _draft(FIRST, "first stream alone", "main", code=_context(of=lambda features: features[:, :, :, 0])),
    _draft(FIRST, "last target twice", "main",
           code=_context(of=lambda features: jnp.mean(features[:, :, [1, 1]], axis=3))),
    _draft(FIRST, "context not normed", "main_norm", code=_context(norm=lambda x, *_: x)),
    _draft(FIRST, "rows of main_proj in another order", "main_proj",
           arrays=_change("mtp.0.main_proj", lambda a: np.roll(a, _WIDTH, axis=0))),
    _draft(FIRST, "main_proj missing its scale", "main_proj",
           tensor=_where(r"mtp\.0\.main_proj\.scale", lambda a: np.full_like(a, 127))),
    _draft(FIRST, "main_norm is the model's norm", "main_norm", arrays=_copy("mtp.0.main_norm", "norm")),
    _draft(FIRST, "another noise token", "embed", code=_ids(lambda tokens, block: np.where(block == 95, 3, block))),
    _draft(FIRST, "block begins with the token before the last", "embed",
           code=_ids(lambda tokens, block: np.concatenate([tokens[:, -2:-1], block[:, 1:]], axis=1))),
    _draft(FIRST, "block all noise", "embed", code=_ids(lambda tokens, block: np.full_like(block, 95))),
    _draft(FIRST, "block all anchor", "embed", code=_ids(lambda tokens, block: np.repeat(block[:, :1], 5, axis=1))),
    _draft(FIRST, "embedding in the first stream alone", "input", code={(backbone, "copied"): _first_alone}),
)  # fmt: skip

_OF_LAST: tuple[Fault, ...] = (
    _draft(LAST, "the model's collapse", "hc_head.pre", arrays=lambda arrays: [
        arrays.update({f"mtp.2.{part}": arrays[part]}) for part in _HEAD]),
    _draft(LAST, "collapse without its base", "hc_head.pre", arrays=_change("mtp.2.hc_head_base", np.zeros_like)),
    _draft(LAST, "the model's norm", "norm", arrays=_copy("mtp.2.norm", "norm")),
    _draft(LAST, "Markov tables exchanged", "markov_head.embed", arrays=lambda arrays: arrays.update({
        "mtp.2.markov_head.markov_w1": arrays["mtp.2.markov_head.markov_w2"].T,
        "mtp.2.markov_head.markov_w2": arrays["mtp.2.markov_head.markov_w1"].T})),
    _draft(LAST, "Markov rows of the token after", "markov_head.embed",
           arrays=_change("mtp.2.markov_head.markov_w1", lambda a: np.roll(a, 1, axis=0))),
    _draft(LAST, "Markov logits of the token after", "markov_head",
           arrays=_change("mtp.2.markov_head.markov_w2", lambda a: np.roll(a, 1, axis=1))),
    _draft(LAST, "every token chosen after the anchor", "markov_head.embed",
           code=_choose(before=_all_after_the_anchor)),
    _draft(LAST, "every token chosen after noise", "markov_head.embed", code=_choose(before=_after_noise)),
    _draft(LAST, "Markov logits left out", "draft_logits", code=_choose(add=lambda logits, bias: logits)),
    _draft(LAST, "Markov logits subtracted", "draft_logits", code=_choose(add=lambda logits, bias: logits - bias)),
    _draft(LAST, "Markov logits of the next place", "draft_logits",
           code=_choose(add=lambda logits, bias: logits + jnp.roll(bias, 1, axis=1))),
    _draft(LAST, "tokens chosen without the Markov head", "tokens",
           code=_choose(pick=lambda logits, scores: jnp.argmax(logits, axis=-1))),
    _draft(LAST, "second best tokens", "tokens", code=_choose(pick=_second_best)),
    _draft(LAST, "confidence of the normed streams", "confidence", code=_choose(confide=_normed)),
    _draft(LAST, "confidence without the token before", "confidence", code=_choose(confide=_without_the_token)),
    _draft(LAST, "confidence as a probability", "confidence", code=_choose(confide=_probability)),
    _draft(LAST, "rows of the confidence head in another order", "confidence",
           arrays=_change("mtp.2.confidence_head.proj", lambda a: np.roll(a, _RANK, axis=0))),
)  # fmt: skip

#: The faults of the first and the last stage that the second one has, too.
REPEATED: tuple[Fault, ...] = (*_of_all(FIRST), *_of_all(LAST))
DRAFT_FAULTS: tuple[Fault, ...] = (*_OF_FIRST, *_of_all(MIDDLE), *_OF_LAST, *REPEATED)

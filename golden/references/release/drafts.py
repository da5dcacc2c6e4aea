"""A DSpark stage of DeepSeek's inference code, called as its ``forward_spec`` calls it: hooks, and the calls.

The first call has known tokens from the prompt's beginning, of which the stage keeps keys. Every further call has one
known token more, and runs the block; the draft is that of the last one. The code has its known tokens' keys and those
of the block made by the same modules, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dsv4_convert.golden.references.release.code import Code
from dsv4_convert.golden.references.release.interface import Entering
from dsv4_convert.golden.references.release.probes import (
    INPUTS,
    OUTPUTS,
    Choices,
    Visit,
    hooked,
    watching_block,
    watching_head,
    whole,
)

TOKENS = "tokens"
#: Taps of the stage's first call alone.
BEGINS = frozenset({"main", "main_proj", "main_norm", "embed"})
#: Beginning of the taps of which every call makes the rows of its tokens. All others are those of the last call.
KNOWN = "attn.main."
#: Taps that the same module makes twice in a call: of the known tokens, and then of the block.
_TWICE = ("attn.wkv", "attn.kv_norm")


class Draft:
    """One stage, whose ``block`` has its weights."""

    def __init__(self, code: Code, block: Any, anchor: Tensor, calls: list[tuple[int, int]]) -> None:
        """``anchor``: the first token ``[B]`` of the block; ``calls``: the known tokens ``start:stop`` of each call."""
        self._code, self._block, self._anchor = code, block, anchor
        self._last_start = calls[-1][0]
        self._first, self._last = hasattr(block, "main_proj"), hasattr(block, "markov_head")
        self._streams: Tensor | None = None
        self._context: Tensor | None = None

    def forward(self, entering: Entering, tokens: slice, visit: Visit) -> None:
        """A call on known tokens. What leaves the stage leaves its last call.

        ``entering``: streams of the target layers ``[B, M, L, N, D]``; or those of the stage before, and the context.
        """
        if tokens.start == 0:
            self._streams, self._context = self._begun(entering)
        assert self._context is not None
        left: Tensor = self._block(self._streams, tokens.start, self._anchor, self._context[:, tokens])
        if self._last and self._is_last(tokens.start):
            _, logits, _ = self._block.forward_head(left, self._anchor)
            visit("draft_logits", logits)

    def _begun(self, entering: Entering) -> tuple[Tensor, Tensor]:
        """The block's streams and the context, ``[B, M, D]``."""
        if "context" in entering:
            return entering["streams"], entering["context"]
        streams, context = self._block.forward_embed(entering["targets"].mean(dim=3).flatten(2), self._anchor)
        return streams, context

    def _is_last(self, start: int) -> bool:
        return start == self._last_start

    @contextmanager
    def watching(self, visit: Visit, choices: Choices, start: int) -> Iterator[None]:
        """Visit every tap of one call; make the given choices."""
        block, module = self._block, self._code.module
        seen: set[str] = set()

        def split(name: str, value: Tensor) -> None:
            known = name in _TWICE and name not in seen
            seen.add(name)
            visit(f"{KNOWN}{name.removeprefix('attn.')}" if known else name, value)

        quantize = module.act_quant

        def watched_quantize(x: Tensor, *others: Any, **named: Any) -> Any:
            result = quantize(x, *others, **named)
            in_place = others[3] if len(others) > 3 else named.get("inplace", False)
            if in_place and "known" not in seen:
                seen.add("known")
                visit(f"{KNOWN}kv_rope", whole(x))
            return result

        slot = block.attn.window_size
        with ExitStack() as stack:
            stack.enter_context(
                watching_block(self._code, block, split, choices, outputs=OUTPUTS, inputs=INPUTS, slot=slot)
            )
            stack.enter_context(patch.object(module, "act_quant", watched_quantize))
            if self._first:
                stack.enter_context(
                    hooked(
                        block.main_proj,
                        before=lambda arguments: visit("main", arguments[0]),
                        after=lambda result: visit("main_proj", result),
                    )
                )
                stack.enter_context(hooked(block.main_norm, after=lambda result: visit("main_norm", result)))
                stack.enter_context(_watched(block, "embed", lambda result: visit("embed", result)))
            if self._last and self._is_last(start):
                stack.enter_context(self._head(visit, choices.get(TOKENS)))
            yield

    @contextmanager
    def _head(self, visit: Visit, chosen: Any) -> Iterator[None]:
        """Visit the taps of the head; the draft goes on with the ``chosen`` tokens ``[B, Q, 1]``, if there are any."""
        block, module, sample = self._block, self._code.module, self._code.module.sample
        steps: list[tuple[Tensor, Tensor]] = []
        tokens: list[Tensor] = []

        def of_token(result: Any) -> None:
            logits, embedded = result
            steps.append((embedded, logits))
            if len(steps) == block.block_size:
                for name, parts in zip(("markov_head.embed", "markov_head"), zip(*steps, strict=True), strict=True):
                    visit(name, torch.stack(list(parts), dim=1))

        def sampled(logits: Tensor, *others: Any) -> Tensor:
            best: Tensor = sample(logits, 0)
            tokens.append(best)
            if len(tokens) == block.block_size:
                visit(TOKENS, torch.stack(tokens, dim=1).unsqueeze(-1))
            return best if chosen is None else torch.from_numpy(chosen[:, len(tokens) - 1, 0]).to(best.dtype)

        with ExitStack() as stack:
            stack.enter_context(_watched(block, "hc_head", lambda result: visit("hc_head", result), visit))
            stack.enter_context(hooked(block.norm, after=lambda result: visit("norm", result)))
            stack.enter_context(_watched(block, "head", lambda result: visit("logits", result)))
            stack.enter_context(hooked(block.markov_head, after=of_token))
            stack.enter_context(hooked(block.confidence_head, after=lambda result: visit("confidence", result)))
            stack.enter_context(patch.object(module, "sample", sampled))
            yield


@contextmanager
def _watched(block: Any, name: str, see: Callable[[Tensor], None], inside: Visit | None = None) -> Iterator[None]:
    """Call ``see`` with the results of a function of the block; ``inside`` visits the weights of a collapse."""
    function = getattr(block, name)

    def watched(*arguments: Any, **named: Any) -> Any:
        with ExitStack() as stack:
            if inside is not None:
                stack.enter_context(watching_head(inside))
            result = function(*arguments, **named)
        see(result)
        return result

    with patch.object(block, name, watched):
        yield

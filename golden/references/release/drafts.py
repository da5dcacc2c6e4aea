"""A DSpark stage of DeepSeek's inference code, called as its ``forward_spec`` calls it: hooks, and the calls.

The first call has known tokens from the prompt's beginning, of which the stage keeps keys. Every further call has one
known token more, and runs the block; the draft is that of the last one. The code has its known tokens' keys and those
of the block made by the same modules, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor

from dsv4_convert.golden.references.release.code import Code
from dsv4_convert.golden.references.release.probes import (
    Choices,
    Collapse,
    Visit,
    hooked,
    watching_function,
    whole,
)

TOKENS = "tokens"
#: Taps of the stage's first call alone.
BEGINS = frozenset({"main", "main_proj", "main_norm", "embed"})
#: Beginning of the taps of which every call makes the rows of its tokens. All others are those of the last call.
KNOWN = "attn.main."
#: Taps that the same module makes twice in a call: of the known tokens, and then of the block.
_TWICE = ("attn.wkv", "attn.kv_norm")
#: Visits the taps of one forward of a block: ``(code, block, visitor, choices, place of its keys)``.
Watching: TypeAlias = Callable[[Code, Any, Visit, Choices, int | None], AbstractContextManager[None]]


class Draft:
    """One stage, whose ``block`` has its weights.

    A layer of V4 gets and gives streams. A subclass says what else another architecture hands on.
    """

    def __init__(self, code: Code, block: Any, ids: Tensor, watching: Watching) -> None:
        """``ids``: the prompt ``[B, S]``, whose last token begins the block."""
        self.block = block
        self.code, self._watching, self._anchor = code, watching, ids[:, -1]
        self._known = ids.shape[1] - 1
        self._first, self._last = hasattr(block, "main_proj"), hasattr(block, "markov_head")
        self._carry: tuple[Tensor, ...] = ()
        self._context = torch.empty(0)

    def begun(self, streams: Tensor) -> tuple[Tensor, ...]:
        """The carry of the first stage: the streams of the block, and what its code has beside them."""
        return (streams,)

    def refined(self, carry: tuple[Tensor, ...], start: int, context: Tensor, visit: Visit) -> tuple[Tensor, ...]:
        """The carry that leaves the stage's layer."""
        return (self.block(*carry, start, self._anchor, context),)

    def forward(self, entering: Mapping[str, Tensor], tokens: slice, visit: Visit) -> None:
        """A call with some of the known tokens.

        ``entering``: ``targets`` ``[B, M, L, N, D]``; or what the stage before hands on, and ``context``.
        """
        if tokens.start == 0 and self._first:
            hidden = entering["targets"].mean(dim=3).flatten(2)
            streams, self._context = self.block.forward_embed(hidden, self._anchor)
            self._carry = self.begun(streams)
        elif tokens.start == 0:
            self._context = entering["context"]
            self._carry = tuple(value for name, value in entering.items() if name != "context")
        left = self.refined(self._carry, tokens.start, self._context[:, tokens], visit)
        if self._last and tokens.stop == self._known:
            _, logits, _ = self.block.forward_head(*left, self._anchor)
            visit("draft_logits", logits)

    @contextmanager
    def watching(self, visit: Visit, choices: Choices, start: int, *, last: int) -> Iterator[None]:
        """Visit every tap of the call that begins with token ``start``; make the given choices. ``last``: its start."""
        block, module = self.block, self.code.module
        seen: set[str] = set()

        def split(name: str, value: Tensor) -> None:
            known = name in _TWICE and name not in seen
            seen.add(name)
            visit(f"{KNOWN}{name.removeprefix('attn.')}" if known else name, value)

        def quantized(arguments: tuple[Any, ...], _: Any) -> None:
            in_place = len(arguments) > 4 and arguments[4]
            if in_place and "known" not in seen:
                seen.add("known")
                visit(f"{KNOWN}kv_rope", whole(arguments[0]))

        slot = block.attn.window_size
        with ExitStack() as stack:
            stack.enter_context(self._watching(self.code, block, split, choices, slot))
            stack.enter_context(watching_function(module, "act_quant", quantized))
            if self._first:
                stack.enter_context(hooked(block.main_proj, before=lambda arguments: visit("main", arguments[0])))
                for name in ("main_proj", "main_norm"):
                    stack.enter_context(hooked(getattr(block, name), after=partial(visit, name)))
                stack.enter_context(watching_function(block, "embed", partial(_result, visit, "embed")))
            if self._last and start == last:
                stack.enter_context(self._head(visit, choices.get(TOKENS)))
            yield

    @contextmanager
    def _head(self, visit: Visit, chosen: Any) -> Iterator[None]:
        """Visit the taps of the head; the draft goes on with the ``chosen`` tokens ``[B, Q, 1]``, if there are any."""
        block, module, sample = self.block, self.code.module, self.code.module.sample
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
            if hasattr(block, "hc_head"):
                stack.enter_context(_inside(block, "hc_head", Collapse(visit)))
                stack.enter_context(watching_function(block, "hc_head", partial(_result, visit, "hc_head")))
            stack.enter_context(watching_function(block, "head", partial(_result, visit, "logits")))
            for name, tap in (("norm", "norm"), ("confidence_head", "confidence")):
                stack.enter_context(hooked(getattr(block, name), after=partial(visit, tap)))
            stack.enter_context(hooked(block.markov_head, after=of_token))
            stack.enter_context(patch.object(module, "sample", sampled))
            yield


def _result(visit: Visit, tap: str, _: tuple[Any, ...], result: Tensor) -> None:
    visit(tap, result)


@contextmanager
def _inside(block: Any, name: str, mode: Any) -> Iterator[None]:
    """A mode of torch is active while a function of the block runs."""
    function = getattr(block, name)

    def watched(*arguments: Any, **named: Any) -> Any:
        with mode:
            return function(*arguments, **named)

    with patch.object(block, name, watched):
        yield

"""Hooks that visit the taps of DeepSeek's inference code; :mod:`v4` and :mod:`v41` say which taps are where.

Nothing in the code is changed: hooks see what modules get and give, and functions and methods are watched from outside.
A visitor gets the very tensor that the code goes on with, so it may look at it, or put something else into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dsv4_convert.golden.references.release.code import Code

Array = np.ndarray[Any, Any]
#: Called with a tap's name and its tensor, in order of execution.
Visit: TypeAlias = Callable[[str, Tensor], None]
Choices: TypeAlias = Mapping[str, Array]
#: Tap (name within the layer, or of the model level) -> dtype and shape that it must have.
Expected: TypeAlias = Mapping[str, tuple[np.dtype[np.generic], tuple[int, ...]]]

EXPERTS, WEIGHTS, CHOSEN = "ffn.gate.experts", "ffn.gate.weights", "attn.indexer.chosen"

#: Tap -> the module of a block that returns it, or whose first argument it is; of any architecture.
OUTPUTS = {
    "attn_norm": "attn_norm",
    **{f"attn.{part}": f"attn.{part}" for part in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_b")},
    **{f"attn.compressor.{part}": f"attn.compressor.{part}" for part in ("wkv", "wgate", "norm")},
    "attn.indexer.weights_proj": "attn.indexer.weights_proj",
    "ffn_norm": "ffn_norm",
    "ffn.shared_experts": "ffn.shared_experts",
    "ffn": "ffn",
}
INPUTS = {
    "attn.compressor.pooled": "attn.compressor.norm",
    "attn.wo_a": "attn.wo_b",
}
#: Modules within which calls of torch's functions are taps.
_INSIDE = ("attn.indexer", "attn.indexer.compressor", "ffn.gate", "engram")


@contextmanager
def watching_block(
    code: Code,
    block: Any,
    visit: Visit,
    choices: Choices,
    *,
    outputs: Mapping[str, str],
    inputs: Mapping[str, str],
    slot: int | None,
) -> Iterator[None]:
    """Visit the taps of one forward of a block that are in the same places in every architecture.

    Args:
        code, block: what is watched.
        visit: the visitor.
        choices: discrete choices that are made instead of the block's own.
        outputs, inputs: the taps that modules give, or get as their first argument.
        slot: None for a whole prompt. For one more token: the place of its key in the cache, which the attention gets.
    """
    modules = dict(block.named_modules())
    with ExitStack() as stack:
        for tap, path in inputs.items():
            if path in modules:
                stack.enter_context(hooked(modules[path], before=partial(_first, partial(visit, tap))))
        for tap, path in outputs.items():
            if path in modules:
                stack.enter_context(hooked(modules[path], after=partial(_given, partial(visit, tap))))
        stack.enter_context(_mixing(code, block, visit))
        stack.enter_context(_attention(code, visit, slot))
        functions = stack.enter_context(_Functions(visit, choices))
        for path in _INSIDE:
            if path in modules:
                stack.enter_context(functions.within(modules[path], path))
        stack.enter_context(hooked(modules["ffn.gate"], after=partial(_routing, visit)))
        stack.enter_context(hooked(modules["ffn.shared_experts"], after=functions.expect_shared))
        if "attn.indexer" in modules:
            behind = None if slot is None else block.attn.window_size
            stack.enter_context(hooked(modules["attn.indexer"], after=partial(_chosen, visit, behind)))
        yield


@contextmanager
def watching_function(module: Any, name: str, seen: Callable[[tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Call ``seen`` with the arguments and the result of every call that the code makes of a function of its own."""
    function = getattr(module, name)

    def watched(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        seen(arguments, result)
        return result

    with patch.object(module, name, watched):
        yield


@contextmanager
def exact_functions() -> Iterator[None]:
    """While active, torch's sums and functions compute in float64 and round once, to the dtype that they have now."""
    with _Exact():
        yield


def _first(visit: Callable[[Tensor], None], arguments: tuple[Any, ...]) -> None:
    visit(arguments[0])


def _given(visit: Callable[[Tensor], None], result: Any) -> None:
    if result is not None:  # a compressor gives nothing when no block is complete
        visit(result)


def _routing(visit: Visit, result: Any) -> None:
    weights, experts = result
    visit(WEIGHTS, weights)
    visit(EXPERTS, experts)


def _chosen(visit: Visit, behind: int | None, result: Tensor) -> None:
    # Entries stand behind so many keys: in a prompt as many as there are queries, in the cache those of a window.
    visit(CHOSEN, ascending(torch.where(result < 0, -1, result - (result.shape[1] if behind is None else behind))))


def ascending(chosen: Tensor) -> Tensor:
    """Choices in ascending order, -1 (none) last."""
    none = torch.iinfo(chosen.dtype).max
    ordered = torch.where(chosen < 0, none, chosen).sort(dim=-1).values
    return torch.where(ordered == none, -1, ordered)


@contextmanager
def hooked(
    module: nn.Module,
    *,
    before: Callable[[tuple[Any, ...]], None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> Iterator[None]:
    """Call ``before`` with the arguments, and ``after`` with the result, of every forward of ``module``."""

    # A hook that returned something would replace what the module gets or gives.
    def see_arguments(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if before is not None:
            before(arguments)

    def see_result(_: nn.Module, arguments: Any, result: Any) -> None:
        if after is not None:
            after(result)

    handles = [module.register_forward_pre_hook(see_arguments), module.register_forward_hook(see_result)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _mixing(code: Code, block: Any, visit: Visit) -> Iterator[None]:
    """Both hyper-connections of a block: the first call of each part belongs to attention, the second to experts.

    A stage of V4.1 collapses its streams for the head by the same method.
    """
    halves = ["hc_attn", "hc_ffn", "hc_head"]
    hc_pre, hc_post, sinkhorn = block.hc_pre, block.hc_post, code.module.hc_split_sinkhorn

    def watched_sinkhorn(*arguments: Any) -> Any:
        result = sinkhorn(*arguments)
        for part, value in zip(("pre", "post", "comb"), result, strict=True):
            visit(f"{halves[0]}.{part}", value)
        return result

    def watched_pre(*arguments: Any) -> Any:
        if halves[0] == "hc_attn":
            visit("input", arguments[0])
        result = hc_pre(*arguments)
        visit(f"{halves.pop(0)}.collapsed", result[0] if isinstance(result, tuple) else result)
        return result

    def watched_post(*arguments: Any) -> Any:
        result = hc_post(*arguments)
        visit("hc_attn.streams" if "hc_ffn" in halves else "hc_ffn.streams", result)
        return result

    with (
        patch.object(block, "hc_pre", watched_pre),
        patch.object(block, "hc_post", watched_post),
        patch.object(code.module, "hc_split_sinkhorn", watched_sinkhorn),
    ):
        yield


@contextmanager
def _attention(code: Code, visit: Visit, slot: int | None) -> Iterator[None]:
    """Visit inputs and result of the attention kernel, and tensors rotated in place: queries first, context last."""
    module = code.module
    rotate, attend = module.apply_rotary_emb, module.sparse_attn
    started = False

    def watched_rotate(x: Tensor, freqs: Tensor, inverse: bool = False) -> Any:
        nonlocal started
        if not started and x.ndim == 4:  # queries have heads; DSpark's stages rotate the keys of known tokens first
            visit("attn.q", whole(x))
            started = True
        result = rotate(x, freqs, inverse)
        if inverse:
            visit("attn.context_unrotated", whole(x))
        return result

    def watched_attend(q: Tensor, kv: Tensor, *others: Any) -> Tensor:
        visit("attn.q_rope", q)
        first = slot or 0
        visit("attn.kv_rope", kv[:, first : first + q.shape[1]])
        result: Tensor = attend(q, kv, *others)
        visit("attn.context", result)
        return result

    with (
        patch.object(module, "apply_rotary_emb", watched_rotate),
        patch.object(module, "sparse_attn", watched_attend),
    ):
        yield


def whole(rotated: Tensor) -> Tensor:
    """The vectors whose last channels are ``rotated``: it is a slice of them."""
    base = rotated._base
    return rotated if base is None else base


class _Functions(TorchFunctionMode):
    """Taps that are arguments or results of torch's functions, by the module in whose forward they are called."""

    def __init__(self, visit: Visit, choices: Choices) -> None:
        super().__init__()
        self._visit = visit
        self._choices = choices
        self._inside: list[str] = []
        self._shared: Tensor | None = None

    @contextmanager
    def within(self, module: nn.Module, path: str) -> Iterator[None]:
        """Know, until the block ends, when ``module`` runs."""

        def leave(_: Any) -> None:
            self._inside.remove(path)

        with hooked(module, before=lambda _: self._inside.append(path), after=leave):
            yield

    def expect_shared(self, result: Tensor) -> None:
        """The shared expert's output, which is added to what the routed experts gave."""
        self._shared = result

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inside = self._inside[-1] if self._inside else None
        if inside == "ffn.gate" and func is F.softplus:
            self._visit("ffn.gate.logits", args[0])
        if inside == "ffn.gate" and func in (torch.topk, Tensor.topk):
            self._visit("ffn.gate.scores", args[0])
        if func is Tensor.add_ and self._shared is not None and args[1] is self._shared:
            self._visit("ffn.experts", args[0])
        result = func(*args, **kwargs)
        if inside == "attn.indexer" and func in (torch.sum, Tensor.sum):
            self._visit("attn.indexer.scores", result)
        if inside == "engram" and func in (torch.sigmoid, Tensor.sigmoid):
            self._visit("engram.gate", result)
        if func in (torch.topk, Tensor.topk):
            return self._chosen(inside, result)
        return result

    def _chosen(self, inside: str | None, result: Any) -> Any:
        choice = self._choices.get({"ffn.gate": EXPERTS, "attn.indexer": CHOSEN}.get(inside or "", ""))
        if choice is None:
            return result
        indices = torch.from_numpy(choice.astype(np.int64)).reshape(result.indices.shape)
        # None is an entry that no query sees, which the code itself makes none of.
        return torch.return_types.topk((result.values, torch.where(indices < 0, 1 << 30, indices)))


class Collapse(TorchFunctionMode):
    """The first argument of the one ``unsqueeze`` in a head's collapse."""

    def __init__(self, visit: Visit) -> None:
        super().__init__()
        self._visit = visit

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.unsqueeze:
            self._visit("hc_head.pre", args[0])
        return func(*args, **(kwargs or {}))


#: Functions whose last bits depend on the order of a sum, or on who implements them.
_INEXACT = frozenset(
    {
        F.linear, torch.einsum, torch.matmul, Tensor.matmul, torch.sum, Tensor.sum, torch.mean, Tensor.mean,
        torch.rsqrt, Tensor.rsqrt, torch.softmax, Tensor.softmax, torch.exp, Tensor.exp, F.softplus, F.silu,
        torch.sigmoid, Tensor.sigmoid,
    }
)  # fmt: skip


class _Exact(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        floats = [part.dtype for part in args if isinstance(part, Tensor) and part.is_floating_point()]
        if func not in _INEXACT or not floats:
            return func(*args, **kwargs)
        return func(*map(_widened, args), **kwargs).to(floats[0])


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

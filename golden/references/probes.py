"""Where each tap is found in transformers' DeepSeek-V4 modules, and the hooks that take it from there.

Written for ``transformers/models/deepseek_v4/modeling_deepseek_v4.py`` of transformers 5.23. Observing changes nothing:
hooks look at values and return none, and what no module returns is seen by watching the calls that a module makes.
Every expected tap must turn up exactly once and in the shape of the table, so a reference that computes differently
than these probes assume is an error, never a wrong golden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from dsv4_convert.errors import Dsv4Error, listed

Array = np.ndarray[Any, Any]
Shape: TypeAlias = tuple[int, ...]
#: Tap (name within the layer, or of the model level) -> dtype and shape that it must have.
Expected: TypeAlias = Mapping[str, tuple[np.dtype[np.generic], Shape]]
#: From the reference's arrangement of a value to the tap's; gets the tap's shape too.
Layout: TypeAlias = Callable[[Tensor, Shape], Tensor]


def _same(value: Tensor, shape: Shape) -> Tensor:
    return value


def _heads_first(value: Tensor, shape: Shape) -> Tensor:
    """``[B, H, S, C] -> [B, S, H, C]``."""
    return value.transpose(1, 2)


def _window_keys(value: Tensor, shape: Shape, *, before: int = 0) -> Tensor:
    """``[B, 1, X, C] -> [B, S, C]``: in the joint key, kept ones come before the S new ones, entries after them."""
    return value[:, 0, before : before + shape[1]]


def _newest(value: Tensor, shape: Shape) -> Tensor:
    """``[B, X, C] -> [B, T, C]``: entries of earlier calls come before the T new ones."""
    return value[:, value.shape[1] - shape[1] :]


def _newest_of_one_head(value: Tensor, shape: Shape) -> Tensor:
    """``[B, 1, X, C] -> [B, T, C]``."""
    return _newest(value[:, 0], shape)


def _split_channels(value: Tensor, shape: Shape) -> Tensor:
    """``[B, S, ...] -> [B, S, H, C]``, channels in the order that they have."""
    return value.reshape(*value.shape[:2], *shape[2:])


def _split_tokens(value: Tensor, shape: Shape) -> Tensor:
    """``[B * S, X] -> [B, S, X]``."""
    return value.reshape(*shape[:2], value.shape[-1])


def _ascending(value: Tensor, shape: Shape) -> Tensor:
    """Chosen entries ascending, -1 (none) last."""
    none = torch.iinfo(value.dtype).max
    ordered = torch.where(value < 0, none, value).sort(dim=-1).values
    return torch.where(ordered == none, -1, ordered)


@dataclasses.dataclass(frozen=True)
class Output:
    """What a module returns, or one part of it."""

    module: str
    part: int | None = None
    layout: Layout = _same


@dataclasses.dataclass(frozen=True)
class Input:
    """A positional argument of a module's forward."""

    module: str
    position: int = 0
    layout: Layout = _same


@dataclasses.dataclass(frozen=True)
class FirstArgument:
    """The first argument of the one call of ``function`` that a module's forward makes."""

    module: str
    function: Callable[..., Any]
    layout: Layout = _same


@dataclasses.dataclass(frozen=True)
class Attention:
    """A value at the attention function: its ``query`` or ``key`` argument, or its result (``context``)."""

    module: str
    value: str
    layout: Layout = _same


Probe: TypeAlias = Output | Input | FirstArgument | Attention


def _hyper_connection(tap: str, module: str) -> dict[str, Probe]:
    return {
        f"{tap}.pre": FirstArgument(module, Tensor.unsqueeze),
        f"{tap}.post": Output(module, 0),
        f"{tap}.comb": Output(module, 1),
        f"{tap}.collapsed": Output(module, 2),
    }


def _compressor(tap: str, module: str, entries: Probe) -> dict[str, Probe]:
    return {
        f"{tap}.wkv": Output(f"{module}.kv_proj"),
        f"{tap}.wgate": Output(f"{module}.gate_proj"),
        f"{tap}.pooled": Input(f"{module}.kv_norm"),
        f"{tap}.norm": Output(f"{module}.kv_norm"),
        f"{tap}.entries": entries,
    }


_ATTN, _COMPRESSOR, _INDEXER = "self_attn", "self_attn.compressor", "self_attn.compressor.indexer"

#: Taps of a layer, by module path within ``DeepseekV4DecoderLayer``.
LAYER_PROBES: dict[str, Probe] = {
    "input": Input(""),
    **_hyper_connection("hc_attn", "attn_hc"),
    "attn_norm": Output("input_layernorm"),
    "attn.wq_a": Output(f"{_ATTN}.q_a_proj"),
    "attn.q_norm": Output(f"{_ATTN}.q_a_norm"),
    "attn.wq_b": Output(f"{_ATTN}.q_b_proj", layout=_split_channels),
    "attn.q": Output(f"{_ATTN}.q_b_norm", layout=_heads_first),
    "attn.q_rope": Attention(_ATTN, "query", _heads_first),
    "attn.wkv": Output(f"{_ATTN}.kv_proj"),
    "attn.kv_norm": Output(f"{_ATTN}.kv_norm"),
    "attn.kv_rope": Attention(_ATTN, "key", _window_keys),
    **_compressor("attn.compressor", _COMPRESSOR, Output(_COMPRESSOR, 0, _newest_of_one_head)),
    **_compressor("attn.indexer.compressor", _INDEXER, Input(f"{_INDEXER}.scorer", 1, _newest)),
    "attn.indexer.q_rope": Input(f"{_INDEXER}.scorer", 0),
    "attn.indexer.weights_proj": Output(f"{_INDEXER}.scorer.weights_proj"),
    "attn.indexer.scores": Output(f"{_INDEXER}.scorer"),
    "attn.indexer.chosen": Output(_INDEXER, layout=_ascending),
    "attn.context": Attention(_ATTN, "context"),
    "attn.context_unrotated": Input(f"{_ATTN}.o_a_proj", layout=_split_channels),
    "attn.wo_a": Output(f"{_ATTN}.o_a_proj"),
    "attn.wo_b": Output(f"{_ATTN}.o_b_proj"),
    "hc_attn.streams": Input("ffn_hc"),
    **_hyper_connection("hc_ffn", "ffn_hc"),
    "ffn_norm": Output("post_attention_layernorm"),
    "ffn.gate.logits": Output("mlp.gate", 0, _split_tokens),
    "ffn.gate.scores": FirstArgument("mlp.gate", torch.topk, _split_tokens),
    "ffn.gate.experts": Output("mlp.gate", 2, _split_tokens),
    "ffn.gate.weights": Output("mlp.gate", 1, _split_tokens),
    "ffn.experts": Output("mlp.experts", layout=_split_tokens),
    "ffn.shared_experts": Output("mlp.shared_experts"),
    "ffn": Output("mlp"),
    "hc_ffn.streams": Output(""),
}


def layer_probes(before: int) -> Mapping[str, Probe]:
    """:data:`LAYER_PROBES` of a call that continues a prompt, with ``before`` keys kept of the tokens before."""
    key = Attention(_ATTN, "key", partial(_window_keys, before=before))
    return LAYER_PROBES if not before else LAYER_PROBES | {"attn.kv_rope": key}


#: Taps after the layers, by module path within ``DeepseekV4Model``; ``lm_head`` stands beside that.
HEAD_PROBES: dict[str, Probe] = {
    "hc_head.pre": FirstArgument("hc_head", Tensor.unsqueeze),
    "hc_head": Output("hc_head"),
    "norm": Output("norm"),
    "logits": Output("lm_head"),
}


#: Taps that are put into order when both are there.
_ORDERED = ("ffn.gate.experts", "ffn.gate.weights")


@contextmanager
def recording(
    root: nn.Module,
    probes: Mapping[str, Probe],
    expected: Expected,
    reduce: Callable[[str, Tensor], Array] | None = None,
) -> Iterator[dict[str, Array]]:
    """Record the expected taps of one forward of ``root``; the dictionary is filled, in order, when the block ends.

    With ``reduce`` every tap of real numbers is what that makes of it, at once, so that no tap is kept in memory.

    Raises:
        Dsv4Error: a tap did not turn up, turned up twice, or has another shape or dtype.
    """
    seen: dict[str, Tensor] = {}
    reduced: dict[str, Array] = {}
    problems: list[str] = []

    def keep(tap: str, layout: Layout, value: object) -> None:
        if tap in seen or tap in reduced:
            problems.append(f"{tap}: computed more than once")
        if not isinstance(value, Tensor):
            problems.append(f"{tap}: expected a tensor, found {type(value).__name__}")
            return
        shape = expected[tap][1]
        try:
            arranged = layout(value, shape)
        except (RuntimeError, IndexError, TypeError):  # how torch refuses a rearrangement
            seen[tap] = value  # for the comparison of shapes below
            return
        if reduce is not None and tap not in _ORDERED and arranged.is_floating_point() and arranged.shape == shape:
            reduced[tap] = reduce(tap, arranged)
        else:
            # A copy, so that nothing that the reference does later in place can reach it.
            seen[tap] = arranged.clone(memory_format=torch.contiguous_format)

    taps: dict[str, Array] = {}
    with ExitStack() as stack:
        for tap in expected:
            try:
                module = root.get_submodule(probes[tap].module)
            except AttributeError:
                problems.append(f"{tap}: there is no module {probes[tap].module}")
                continue
            stack.enter_context(_attached(module, probes[tap], partial(keep, tap, probes[tap].layout)))
        yield taps
    _order_experts(seen)
    for tap, (dtype, shape) in expected.items():
        if tap in reduced:
            taps[tap] = reduced[tap]
            continue
        value = seen.get(tap)
        if value is None and 0 in shape:  # the reference skips what would be empty: no block is complete
            value = torch.empty(shape)
        if value is None:
            problems.append(f"{tap}: not computed")
        elif value.shape != shape or value.is_floating_point() != (dtype.kind == "f"):
            problems.append(f"{tap}: expected {dtype} {list(shape)}, found {value.dtype} {list(value.shape)}")
        elif reduce is not None and dtype.kind == "f":
            taps[tap] = reduce(tap, value)
        else:
            taps[tap] = (value.double() if dtype.kind == "f" else value).numpy().astype(dtype, copy=False)
    if problems:
        raise Dsv4Error(
            "transformers computes DeepSeek-V4 in another way than the recorder knows; install the version that it was "
            f"written for (`pip install 'dsv4-convert[reference]'`). Taps that differ:\n{listed(problems)}"
        )


def _order_experts(seen: dict[str, Tensor]) -> None:
    """Chosen experts ascending per token, and their weights in the same order."""
    experts, weights = (seen.get(tap) for tap in _ORDERED)
    if experts is not None and weights is not None and experts.shape == weights.shape:
        ordered, order = experts.sort(dim=-1, stable=True)
        seen |= zip(_ORDERED, (ordered, weights.gather(-1, order)), strict=True)


@contextmanager
def _attached(module: nn.Module, probe: Probe, keep: Callable[[object], None]) -> Iterator[None]:
    """Hand the probe's value to ``keep`` whenever ``module`` computes it, until the block ends."""
    match probe:
        case Input(position=position):

            def see_input(_: nn.Module, args: tuple[Any, ...]) -> None:
                keep(_part(args, position))

            handles = [module.register_forward_pre_hook(see_input)]
        case Output(part=part):

            def see_output(_: nn.Module, args: object, output: Any) -> None:
                keep(output if part is None else _part(output, part))

            handles = [module.register_forward_hook(see_output)]
        case FirstArgument(function=function):
            with _Watch(function, keep).of(module):
                yield
            return
        case Attention(value=value):
            with _attention_seen(module, value, keep):
                yield
            return
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _part(values: object, index: int) -> object:
    """One of several values; None where there are not that many."""
    return values[index] if isinstance(values, tuple) and index < len(values) else None


class WithinForward(TorchFunctionMode):
    """A mode that is active while one module's forward runs."""

    @contextmanager
    def of(self, module: nn.Module) -> Iterator[None]:
        """Attach the mode to ``module`` until the block ends."""
        handles = [
            module.register_forward_pre_hook(lambda *_: self._begin()),
            # Also when the forward fails: the mode must not outlive it.
            module.register_forward_hook(lambda *_: self._end(), always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # A hook that returns something would replace what the module gets or gives.
    def _begin(self) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]

    def _end(self) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Watch(WithinForward):
    """Hands over the first argument of every call of one torch function."""

    def __init__(self, function: Callable[..., Any], keep: Callable[[object], None]) -> None:
        super().__init__()
        self._function = function
        self._keep = keep

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == self._function:
            self._keep(_part(args, 0))
        return func(*args, **(kwargs or {}))


@contextmanager
def _attention_seen(attention: nn.Module, value: str, keep: Callable[[object], None]) -> Iterator[None]:
    """Watch the calls that ``attention`` makes of the modeling file's eager attention function."""
    original = modeling.eager_attention_forward

    def watched(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(module, query, key, *args, **kwargs)
        if module is attention:
            keep({"query": query, "key": key, "context": _part(result, 0)}[value])
        return result

    modeling.eager_attention_forward = watched
    try:
        yield
    finally:
        modeling.eager_attention_forward = original

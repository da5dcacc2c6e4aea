"""Running transformers' modules in another dtype than float32, with the golden's discrete choices.

bfloat16 modules are the ones of ``from_pretrained(dtype=torch.bfloat16)``: the parts that transformers keeps in float32
stay so. No user runs float64. The modules cast to float32 in many places, and these casts are redirected while they
run. Rotary tables are the exception: their float32 is part of the model's definition, not rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from dsv4_convert.golden.references.probes import WithinForward
from dsv4_convert.golden.references.widening import Widen

Array = np.ndarray[Any, Any]

TORCH = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

#: Choice -> the module whose ``topk`` makes it. Hash routing chooses by table, the same in every dtype.
CHOICES = {"attn.indexer.chosen": "self_attn.compressor.indexer", "ffn.gate.experts": "mlp.gate"}

_KEPT = re.compile(
    "|".join(rf"((^|\.){name}($|\.))" for name in modeling.DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict)
)


def as_array(tensor: Tensor) -> Array:
    """A tensor as an array of the same dtype, bfloat16 included."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def as_tensor(array: Array) -> Tensor:
    """Inverse of :func:`as_array`."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def change_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of a part of the model in place."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if not tensor.is_floating_point() or name.endswith("inv_freq"):
            continue
        kept = dtype == torch.bfloat16 and _KEPT.search(name) is not None
        tensor.data = tensor.data.to(torch.float32 if kept else dtype)


@contextmanager
def widened(rotary: nn.Module) -> Iterator[None]:
    """While active, whatever is asked to become float32 becomes float64, but for what ``rotary`` computes."""
    mode = Widen()
    handles = [
        rotary.register_forward_pre_hook(lambda *_: mode.pause(True)),
        rotary.register_forward_hook(lambda *_: mode.pause(False), always_call=True),
    ]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def choosing(root: nn.Module, choices: Mapping[str, Array]) -> Iterator[None]:
    """While active, ``topk`` inside the modules of :data:`CHOICES` gives the indices of ``choices`` ``[B, S, k]``."""
    with ExitStack() as stack:
        for tap, indices in choices.items():
            mode = _Choose(torch.from_numpy(indices.astype(np.int64)))
            stack.enter_context(mode.of(root.get_submodule(CHOICES[tap])))
        yield


class _Choose(WithinForward):
    def __init__(self, indices: Tensor) -> None:
        super().__init__()
        self._indices = indices

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk):
            return torch.return_types.topk((result.values, self._indices.reshape(result.indices.shape)))
        return result

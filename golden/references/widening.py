"""Running a reference in float64, though it casts to float32 in many places: the casts are redirected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Widen(TorchFunctionMode):
    """While active, whatever is asked to become float32 becomes float64."""

    def __init__(self) -> None:
        super().__init__()
        self._paused = False

    def pause(self, paused: bool) -> None:
        """Stop redirecting, or go on."""
        self._paused = paused

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if func is Tensor.float:
            func = Tensor.double
        return func(*map(_wide, args), **{key: _wide(value) for key, value in kwargs.items()})


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value

"""The type checker of the model's shapes: beartype, once for each function.

jaxtyping decorates a function that is made inside another one whenever the outer one runs. The check is the same every
time, and beartype takes milliseconds to write it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype

_CHECKS: dict[tuple[str, str, str], Callable[..., Any]] = {}


def checked(signature: Callable[..., Any]) -> Callable[..., Any]:
    """``beartype(signature)``. jaxtyping gives a function without a body that has the name and the annotations."""
    key = (signature.__module__, signature.__qualname__, str(signature.__annotations__))
    if key not in _CHECKS:
        _CHECKS[key] = beartype(signature)
    return _CHECKS[key]

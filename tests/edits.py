"""Planting a fault in the source of a function: some text in the place of other text."""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any


def edited(owner: Any, function: str, old: str, new: str) -> Any:
    """A function or property of ``owner`` whose source has ``new`` in the place of ``old``, which it has once."""
    original = inspect.getattr_static(owner, function)
    plain: Any = original.fget if isinstance(original, property) else getattr(original, "__func__", original)
    plain = inspect.unwrap(plain)
    source = textwrap.dedent(inspect.getsource(plain))
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {function}"
    module = sys.modules[plain.__module__]
    made: dict[str, Any] = {}
    code = compile(source.replace(old, new), module.__file__ or "", "exec", dont_inherit=True)
    exec(code, dict(vars(module)), made)
    return made[function]

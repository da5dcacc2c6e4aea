"""Whether something is being compiled, told to whoever shows progress: the first use of a program takes longer."""

from __future__ import annotations

from collections.abc import Callable

#: What is shown meanwhile.
COMPILING = "compiling, once"

_LISTENERS: list[Callable[[str], None]] = []


def listen(listener: Callable[[str], None]) -> None:
    """Have a function called with :data:`COMPILING` before something is compiled, and with an empty text after it."""
    _LISTENERS.append(listener)


def tell(*, begins: bool) -> None:
    """Say that something begins to be compiled, or has been."""
    for listener in _LISTENERS:
        listener(COMPILING if begins else "")

"""Made-up values of any annotated type, so that the JSON of a result can be looked at without computing one."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

_PLAIN: dict[Any, Any] = {
    int: 1,
    float: 0.5,
    bool: True,
    str: "text",
    range: range(3, 4),
    Any: "anything",
    type(None): None,
}


def samples(kind: Any, known: Mapping[Any, Any]) -> list[Any]:
    """At least one value of a type, and for a union one of each of its members.

    ``known`` has values of types that cannot be made up.
    """
    if kind in known:
        return [known[kind]]
    if kind in _PLAIN:
        return [_PLAIN[kind]]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        of = {field.name: samples(hints[field.name], known) for field in dataclasses.fields(kind) if field.init}
        return [
            kind(**{name: values[number % len(values)] for name, values in of.items()})
            for number in range(max(map(len, of.values())))
        ]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [next(iter(kind))]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return [value for member in arguments for value in samples(member, known)]
    if origin is typing.Literal:
        return list(arguments[:1])
    if origin is tuple and arguments[-1:] != (...,):
        return [tuple(samples(argument, known)[0] for argument in arguments)]
    if origin in (tuple, list):
        return [origin(samples(arguments[0], known))]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return [{"key": value} for value in samples(arguments[1], known)]
    if origin is Callable:
        return [lambda *given: True]
    raise TypeError(f"no sample of {kind}")

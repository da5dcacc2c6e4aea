"""Damage to a file that knows what JSON and a safetensors header are, so that it reaches what lies behind the parser.

:func:`mutate` is deterministic in its random generator. Half of what it does is to the tree: a value replaced by an odd
one, a key removed, renamed or given twice, a part copied elsewhere. The other half is to the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

#: Values that a careless reader takes for something else, as they stand in JSON.
ODD = (
    *("null", "true", "false", "0", "1", "-1", "-0", "2", "3", "4096", "4503599627370497", "1.0", "0.5", "1e400"),
    *("NaN", "Infinity", "-Infinity", "9223372036854775807", "9223372036854775808", "18446744073709551616"),
    *("1" + "0" * 400, "9" * 5000, '""', '"a"', '"1"', '"../x"', '"/etc/passwd"', '"a\\u0000b"', '"\\ud800"'),
    *('"\\u202e"', '"\\u001b[31m"', '"\\n"', '"%s"' % ("n" * 5000), "[]", "{}", "[0]", "[[0]]", "[1,2]", '{"a":1}'),
    *("[4294967296,4294967296]", "[0,4611686018427387904,4]", "[" * 3000 + "]" * 3000),
)
_BYTES = (
    b"",
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\",
    b"-",
    b"9",
    b"e9",
    b"\n",
)
_PICKLE = b"\x80\x04cposix\nsystem\n\x8c\x04true\x85R."
_HEADER_LENGTH = 8


class Raw(str):
    """JSON text that is put in as it is."""


class Pairs(list[tuple[str, Any]]):
    """An object whose keys may occur twice."""


def mutate(data: bytes, random: Random) -> bytes:
    """A damaged copy of ``data``."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = (_mutate_tree(data, random) if random.random() < 0.6 else None) or _mutate_bytes(data, random)
    return data


def header_of(data: bytes) -> tuple[bytes, bytes] | None:
    """JSON header and tensor bytes of what may be a safetensors file."""
    length = int.from_bytes(data[:_HEADER_LENGTH], "little")
    if data[_HEADER_LENGTH : _HEADER_LENGTH + 1] != b"{" or length > len(data) - _HEADER_LENGTH:
        return None
    return data[_HEADER_LENGTH : _HEADER_LENGTH + length], data[_HEADER_LENGTH + length :]


def _mutate_tree(data: bytes, random: Random) -> bytes | None:
    """None where nothing can be parsed."""
    if (parts := header_of(data)) is not None:
        text = _mutate_document(parts[0], random)
        return None if text is None else len(text).to_bytes(_HEADER_LENGTH, "little") + text + parts[1]
    whole = _mutate_document(data, random)
    if whole is not None:
        return whole
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    line = _mutate_document(lines[at], random)
    return None if line is None else b"\n".join([*lines[:at], line, *lines[at + 1 :]])


def _mutate_document(text: bytes, random: Random) -> bytes | None:
    try:
        tree = json.loads(text, object_pairs_hook=Pairs, parse_constant=Raw, parse_int=Raw, parse_float=Raw)
    except (ValueError, RecursionError):
        return None
    places = list(_places(tree))
    if not places:
        return random.choice(ODD).encode()
    holder, at = random.choice(places)
    key, value = holder[at] if isinstance(holder, Pairs) else (None, holder[at])

    def put(new: Any) -> None:
        holder[at] = (key, new) if isinstance(holder, Pairs) else new

    match random.randrange(7):
        case 0:
            del holder[at]
        case 1:
            other, there = random.choice(places)
            found = other[there][1] if isinstance(other, Pairs) else other[there]
            if found is not holder and not _within(holder, found):
                put(found)
        case 2 if isinstance(holder, Pairs):
            holder.insert(
                random.randrange(len(holder) + 1), (str(key), random.choice((value, Raw(random.choice(ODD)))))
            )
        case 3 if isinstance(holder, Pairs):
            holder[at] = (random.choice(("", "a", "../x", "\0", "\ud800", "__metadata__", str(key) * 2)), value)
        case 4 if isinstance(value, Raw) and len(value) < 4000 and value.lstrip("-").isdecimal():
            put(Raw(str(int(value) + random.choice((-1, 1, 2, 128, 1 << 32)))))
        case 5 if isinstance(holder, list) and not isinstance(holder, Pairs):
            holder.insert(at, value)
        case _:
            put(Raw(random.choice(ODD)))
    try:
        return "".join(_written(tree)).encode("utf-8", "surrogatepass")
    except RecursionError:
        return None


def _places(node: Any) -> Iterator[tuple[Any, int]]:
    """Every (holder, index) of a tree."""
    if isinstance(node, list):
        for at, entry in enumerate(node):
            yield node, at
            yield from _places(entry[1] if isinstance(node, Pairs) else entry)


def _within(needle: Any, tree: Any) -> bool:
    return any(holder is needle for holder, _ in _places(tree))


def _written(node: Any) -> Iterator[str]:
    match node:
        case Raw():
            yield str(node)
        case Pairs():
            yield "{"
            for count, (key, value) in enumerate(node):
                yield f"{',' if count else ''}{json.dumps(key, ensure_ascii=False)}:"
                yield from _written(value)
            yield "}"
        case list():
            yield "["
            for count, value in enumerate(node):
                yield "," if count else ""
                yield from _written(value)
            yield "]"
        case _:
            yield json.dumps(node, ensure_ascii=False)


def _mutate_bytes(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    length = random.choice((1, 1, 2, 8, 64))
    match random.randrange(7):
        case 0 if at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[at : at + length] + data[at:]
        case 4:
            return data[:at] + random.choice((*map(str.encode, ODD), _PICKLE)) + data[at:]
        case 5:
            return data[:at] + random.randbytes(length) + data[at + length :]
        case _:
            return data[:at] + random.choice(_BYTES) + data[at:]

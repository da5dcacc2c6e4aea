"""JSON without the freedoms that let two readers understand one file differently."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dsv4_convert.errors import BadInput
from dsv4_convert.files.reading import foreign_content, read_start, stat_regular

W = TypeVar("W", bound=str)

#: The largest published index is 14 MB; a config.json has a few KB.
MAX_JSON_BYTES = 100_000_000
#: No document of ours comes near; what writes or digests one again ends at some more.
_MAX_DEPTH = 200
#: A lone surrogate can come from an escape alone, as bytes that are not UTF-8 are refused.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file of at most 100 MB whose root is an object.

    Raises:
        BadInput: missing, not a regular file, too large, or refused by :func:`parse_object`.
    """
    size = stat_regular(path).st_size
    if size > MAX_JSON_BYTES:
        raise BadInput(f"{path}: {size:,} bytes, where at most {MAX_JSON_BYTES:,} are expected of a JSON file")
    text = read_start(path, MAX_JSON_BYTES)
    is_json = text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"["))
    if not is_json and (found := foreign_content(text[:512])) is not None:
        raise BadInput(f"{path}: expected a JSON object, found {found}")
    return parse_object(text, where=str(path))


def parse_object(
    text: bytes, *, where: str, parse_int: Callable[[str], int] | None = None, infinite: bool = False
) -> dict[str, Any]:
    """Parse UTF-8 JSON whose root is an object. Raises :class:`BadInput`: it is none, or as :func:`parse_value`."""
    parsed = parse_value(text, where=where, parse_int=parse_int, infinite=infinite)
    if not isinstance(parsed, dict):
        raise BadInput(f"{where}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def parse_value(
    text: bytes, *, where: str, parse_int: Callable[[str], int] | None = None, infinite: bool = False
) -> Any:
    """Parse UTF-8 JSON.

    Refused beyond what the standard library refuses: duplicate keys (readers disagree on which one counts),
    ``NaN`` and ``Infinity`` (not JSON) and numbers beyond float64 unless ``infinite``, half of a surrogate pair, more
    than 200 levels, and anything but UTF-8.

    Raises:
        BadInput: naming ``where`` and what was found.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise BadInput(
                f"{where}: the key {shown(twice)} appears twice; expected once, because readers disagree on which one "
                "counts; download the file again, or report it to whoever wrote it"
            )
        return found

    def no_constant(name: str) -> NoReturn:
        raise BadInput(f"{where}: {name} is not a JSON number; replace it by a finite one")

    def finite(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise BadInput(f"{where}: the number {shown(digits)} is beyond float64; replace it by a smaller one")
        return number

    try:
        parsed = json.loads(
            text.decode(),
            object_pairs_hook=unique,
            parse_constant=None if infinite else no_constant,
            parse_float=None if infinite else finite,
            parse_int=parse_int,
        )
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not UTF-8 (byte {error.start}); the file is damaged, download it again") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON ({error}); the file is damaged, download it again") from None
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:  # an integer of thousands of digits, or one that parse_int refuses
        raise BadInput(f"{where}: {error}") from None
    if _is_deep(parsed):
        raise _too_deep(where)
    if _SURROGATE.search(text) and not _is_unicode(parsed):
        raise BadInput(f"{where}: not valid Unicode: half of a surrogate pair; the file is damaged, download it again")
    return parsed


def _is_deep(document: object) -> bool:
    level: list[Any] = [document] if isinstance(document, dict | list) else []
    for _ in range(_MAX_DEPTH):
        below = (value for one in level for value in (one.values() if isinstance(one, dict) else one))
        level = [value for value in below if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def _too_deep(where: str) -> BadInput:
    return BadInput(f"{where}: JSON nested too deeply; the file is damaged or hostile")


def _is_unicode(document: object) -> bool:
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def enumerated(value: object, allowed: Iterable[W], *, field: str) -> W:
    """The word among ``allowed`` that ``value`` is, letter by letter. Members of an enumeration are words.

    Every enumerated value of a file is decoded here: an unknown one must not be taken for the default.

    Raises:
        ValueError: naming the field, what was found, and what is allowed; the caller adds the file.
    """
    words = list(allowed)
    for word in words:
        if isinstance(value, str) and value == word:
            return word
    found = shown(value) if isinstance(value, str) else shown(repr(value))
    raise ValueError(f"{field} is {found}, expected one of {', '.join(words)}")


def shown(text: str, *, limit: int = 80) -> str:
    """A name from a file, safe to print: quoted, escaped, cut after ``limit`` characters."""
    return ascii(text if len(text) <= limit else f"{text[:limit]}...")

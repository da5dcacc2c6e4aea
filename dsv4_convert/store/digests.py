"""Digests of stored bytes: BLAKE3, which one core computes several times as fast as SHA-256.

A digest is text that says how it was made: ``blake3:`` and 64 hexadecimal digits. Earlier versions of dsv4 wrote
SHA-256, as the digits alone; such a digest is compared with SHA-256 as before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TypeAlias

from blake3 import blake3

Data: TypeAlias = bytes | memoryview

_BLAKE3 = "blake3:"
_FORM = re.compile(rf"(?:{_BLAKE3})?[0-9a-f]{{64}}")


class Hasher:
    """Makes one digest of data that come in pieces. Threads may run while a piece is hashed."""

    def __init__(self, like: str | None = None) -> None:
        """``like`` is a digest that the new one will be compared with, and has its function; None is BLAKE3."""
        self._prefix = _BLAKE3 if like is None or like.startswith(_BLAKE3) else ""
        self._hash = blake3() if self._prefix else hashlib.sha256()

    def update(self, data: Data) -> None:
        """Go on with a piece."""
        self._hash.update(data)

    def digest(self) -> str:
        """The digest of all pieces so far."""
        return self._prefix + self._hash.hexdigest()


def digest_of(data: Data, *, like: str | None = None) -> str:
    """The digest of data; ``like`` as for :class:`Hasher`."""
    hasher = Hasher(like)
    hasher.update(data)
    return hasher.digest()


def digest_of_digests(parts: Sequence[str], *, like: str | None = None) -> str:
    """The digest of the raw 32 bytes of each part, by the function of ``like`` or else of the parts."""
    raw = b"".join(bytes.fromhex(part.removeprefix(_BLAKE3)) for part in parts)
    return digest_of(raw, like=like or next(iter(parts), None))


def is_digest(text: str) -> bool:
    """Whether ``text`` has the form of a digest."""
    return _FORM.fullmatch(text) is not None

"""The manifest that lies in every checkpoint: what each leaf is, where it came from, and the digest of every byte.

Orbax notices neither a flipped bit nor a wrong shape or dtype, so the truth about a checkpoint is kept here. The file
is JSON with one line per leaf, and carries the digest of its own content, so that a damaged manifest is noticed too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4_convert.errors import BadInput, listed
from dsv4_convert.files.strict_json import parse_object
from dsv4_convert.store.digests import digest_of, digest_of_digests, is_digest
from dsv4_convert.store.layout import (
    DTYPES,
    ArrayLayout,
    is_file_name,
    path_problems,
)

#: Version 1, of which all digests are SHA-256, is read too.
SCHEMA_VERSION = 2

_TOP_KEYS = ("schema_version", "metadata", "files", "leaves", "manifest_digest")
_LEAF_KEYS = ("shape", "dtype", "chunk_shape", "digest", "chunk_digests", "sources", "rule")


@dataclass(frozen=True, kw_only=True)
class LeafRecord:
    """One leaf in the manifest.

    Attributes:
        layout: shape, dtype and chunk shape.
        chunk_digests: digest of every chunk's canonical bytes, in C order of the chunk grid.
        sources: names of the leaf's source tensors, in the caller's order.
        rule: the caller's name for the rule that made it.
    """

    layout: ArrayLayout
    chunk_digests: tuple[str, ...]
    sources: tuple[str, ...] = ()
    rule: str = ""

    @property
    def digest(self) -> str:
        """Digest of the whole leaf, made of the digests of its chunks."""
        return digest_of_digests(self.chunk_digests)

    def to_json(self) -> dict[str, Any]:
        """The record as it stands in the manifest."""
        return {
            "shape": list(self.layout.shape),
            "dtype": self.layout.dtype.name,
            "chunk_shape": list(self.layout.chunk_shape),
            "digest": self.digest,
            "chunk_digests": list(self.chunk_digests),
            "sources": list(self.sources),
            "rule": self.rule,
        }

    @classmethod
    def from_json(cls, document: object) -> LeafRecord:
        """Strict inverse of :meth:`to_json`.

        Raises:
            ValueError: a key is missing, unknown or of the wrong type, or the digests do not fit together.
        """
        entry = _with_keys(document, _LEAF_KEYS)
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise ValueError(f"dtype {entry['dtype']!r} is not one of {', '.join(DTYPES)}")
        if not isinstance(entry["rule"], str):
            raise ValueError(f"rule is {entry['rule']!r}, expected a string")
        record = cls(
            layout=ArrayLayout(
                shape=_integers(entry, "shape"),
                dtype=DTYPES[entry["dtype"]],
                chunk_shape=_integers(entry, "chunk_shape"),
            ),
            chunk_digests=tuple(_digest(item, "chunk digest") for item in _strings(entry, "chunk_digests")),
            sources=_strings(entry, "sources"),
            rule=entry["rule"],
        )
        if len(record.chunk_digests) != record.layout.chunk_count:
            raise ValueError(f"{len(record.chunk_digests)} chunk digests for {record.layout.chunk_count} chunks")
        digest = _digest(entry["digest"], "digest")
        if digest != (found := record.digest):
            raise ValueError(f"digest is {digest!r}, but the chunk digests give {found}")
        return record


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole manifest.

    Attributes:
        leaves: record of every leaf by its dotted path; written in the order of the paths.
        files: digest of every other file of the checkpoint by name (the caller's and Orbax's own metadata).
        metadata: JSON of the caller: where the checkpoint came from, by which version, and so on.
    """

    leaves: Mapping[str, LeafRecord]
    files: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The manifest as a file: the same content gives the same bytes."""
        head = {
            "schema_version": SCHEMA_VERSION,
            "metadata": dict(self.metadata),
            "files": dict(sorted(self.files.items())),
        }
        leaves = {path: record.to_json() for path, record in sorted(self.leaves.items())}
        lines = [f"{json.dumps(key)}: {_canonical(value)}" for key, value in head.items()]
        rows = ",\n".join(f"  {json.dumps(path)}: {_canonical(entry)}" for path, entry in leaves.items())
        lines.append(f'"leaves": {{\n{rows}\n}}')
        lines.append(f'"manifest_digest": "{_own_digest({**head, "leaves": leaves})}"')
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Manifest:
        """Strict inverse of :meth:`to_bytes`; ``where`` names the file in messages.

        Raises:
            BadInput: not JSON, another schema version, unknown or missing or ill-typed entries, unsafe names, digests
                that do not fit. All problems of the leaves are reported together.
        """
        document = parse_versioned(data, where=where)
        try:
            top = _with_keys(document, _TOP_KEYS)
            leaves, files, metadata = (_mapping(top, key) for key in ("leaves", "files", "metadata"))
        except ValueError as error:
            raise BadInput(f"{where}: {error}") from error
        problems = path_problems(tuple(leaves))
        records: dict[str, LeafRecord] = {}
        for path, entry in leaves.items():
            try:
                records[path] = LeafRecord.from_json(entry)
            except ValueError as error:
                problems.append(f"{path}: {error}")
        for name, digest in files.items():
            try:
                _digest(digest, f"digest of file {name!r}")
            except ValueError as error:
                problems.append(str(error))
            if not is_file_name(name):
                problems.append(f"{name!r} is not a plain file name")
        own = top.pop("manifest_digest")
        if not problems and own != (found := _own_digest(top, like=str(own))):
            problems.append(f"manifest_digest is {own!r}, but the content gives {found}")
        if problems:
            raise BadInput(f"{where}: the manifest is damaged or was edited:\n{listed(problems)}")
        return cls(leaves=records, files=files, metadata=metadata)


def parse_versioned(data: bytes, *, where: str) -> dict[str, Any]:
    """The JSON object of a manifest, or of a file beside it, in a version that is read here.

    Raises:
        BadInput: not a JSON object, or of another schema version.
    """
    document = parse_object(data, where=where)
    version = document.get("schema_version")
    if version not in (1, SCHEMA_VERSION) or type(version) is not int:
        raise BadInput(
            f"{where}: schema_version is {version!r}, this version of dsv4 reads 1 and {SCHEMA_VERSION}. "
            "Read it with the version of dsv4 that wrote it, or convert again."
        )
    return document


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def _own_digest(document: Mapping[str, object], *, like: str | None = None) -> str:
    """The digest of the document without ``manifest_digest``, as compact JSON with sorted keys."""
    return digest_of(_canonical(document).encode(), like=like)


def _with_keys(document: object, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ValueError(f"{type(document).__name__} instead of an object")
    if differing := sorted(set(document) ^ set(keys)):
        raise ValueError(f"missing or unknown keys: {', '.join(differing)}")
    return document


def _mapping(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {type(value).__name__}, expected an object")
    return value


def _integers(document: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = document[key]
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise ValueError(f"{key} is {value!r}, expected a list of integers")
    return tuple(value)


def _strings(document: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = document[key]
    if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
        raise ValueError(f"{key} is not a list of strings")
    return tuple(value)


def _digest(value: object, what: str) -> str:
    if not isinstance(value, str) or not is_digest(value):
        raise ValueError(f"{what} is {value!r}, expected 64 lower-case hexadecimal digits, after blake3: or alone")
    return value

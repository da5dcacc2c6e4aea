"""``dsv4_sources.json``: what became of every tensor of the source, in a file beside the manifest.

The manifest says of every stored leaf what it is; this file says the same from the other side: of every source tensor
its shard, dtype, shape and digest, and the leaves that it fills or the reason why it fills none. The manifest holds
the digest of this file. One line per tensor, in the order of the shards and of the bytes in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4_convert.checkpoint.dtypes import DTYPES
from dsv4_convert.errors import BadInput
from dsv4_convert.files.strict_json import enumerated, shown
from dsv4_convert.spec.names import stage_of
from dsv4_convert.store import Store
from dsv4_convert.store.manifest import SCHEMA_VERSION, parse_versioned

SOURCES_FILE = "dsv4_sources.json"


@dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """One tensor of the source.

    Attributes:
        shard: name of the safetensors file.
        dtype: safetensors spelling.
        shape: as stored, so two FP4 elements count as one byte.
        digest: of the stored bytes (:mod:`dsv4_convert.store.digests`); None for a tensor that was not read.
        targets: paths of the leaves that it fills; empty for a tensor that was left out.
        dropped: why it was left out; None for one that fills a leaf.
    """

    shard: str
    dtype: str
    shape: tuple[int, ...]
    digest: str | None = None
    targets: tuple[str, ...] = ()
    dropped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of the source: bytes, and the SHA-256 that the Hub states for it (None for a local folder)."""

    size: int
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The whole file: shards by name and tensors by name, both in the order of the source."""

    shards: Mapping[str, Shard]
    tensors: Mapping[str, SourceTensor]

    def to_bytes(self) -> bytes:
        """The file; the same content gives the same bytes."""
        head = {"schema_version": SCHEMA_VERSION, "shards": {name: vars(shard) for name, shard in self.shards.items()}}
        lines = [f"{json.dumps(key)}: {_compact(value)}" for key, value in head.items()]
        rows = ",\n".join(f"  {json.dumps(name)}: {_compact(_told(tensor))}" for name, tensor in self.tensors.items())
        lines.append(f'"tensors": {{\n{rows}\n}}')
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Sources:
        """Inverse of :meth:`to_bytes`.

        Raises:
            BadInput: not such a file, or of another schema version.
        """
        document = parse_versioned(data, where=where)
        digest_key = "digest" if document["schema_version"] == SCHEMA_VERSION else "sha256"
        try:
            shards, tensors = (_entries(document, key) for key in ("shards", "tensors"))
            return cls(
                shards={name: _heard_shard(name, entry) for name, entry in shards.items()},
                tensors={name: _heard(name, entry, digest_key) for name, entry in tensors.items()},
            )
        except ValueError as error:
            raise BadInput(f"{where}: not an account of source tensors: {error}; convert again") from error


def read_sources(store: Store) -> Sources:
    """The account of a converted checkpoint, compared with its digest.

    Raises:
        BadInput: the file is absent or damaged.
    """
    if SOURCES_FILE not in store.manifest.files:
        raise BadInput(f"{store.folder}: has no {SOURCES_FILE}: written by an earlier version of dsv4; convert again")
    return Sources.from_bytes(store.read_file(SOURCES_FILE), where=str(store.folder / SOURCES_FILE))


def stored_layers(store: Store) -> list[int] | None:
    """The layers that a conversion requested. None means all layers and stages, if the checkpoint has stages.

    A checkpoint without stages may be one of all layers: its source had none, or it comes from a dsv4 that left them
    out.
    """
    return None if any(stage_of(path) is not None for path in store.paths) else list(store.conversion.layers)


def targets_of(leaves: Iterable[tuple[str, Iterable[str]]]) -> dict[str, tuple[str, ...]]:
    """From (leaf, its source tensors) to the leaves of every source tensor, in the order of the leaves."""
    found: dict[str, list[str]] = {}
    for path, names in leaves:
        for name in names:
            found.setdefault(name, []).append(path)
    return {name: tuple(paths) for name, paths in found.items()}


def _told(tensor: SourceTensor) -> dict[str, Any]:
    """Without what is empty, as most of the lines have a hundred thousand siblings."""
    return {key: value for key, value in vars(tensor).items() if value not in (None, ())}


def _entries(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    entries = document.get(key)
    if not isinstance(entries, dict):
        raise ValueError(f"{key} is {shown(str(entries))}")
    return entries


def _heard_shard(name: str, entry: object) -> Shard:
    """Strict inverse of what is written of a shard. Raises :class:`ValueError`."""
    match entry:
        case {"size": int(size), "sha256": None | str() as sha256, **more} if not more and type(size) is int:
            return Shard(size=size, sha256=sha256)
    raise ValueError(f"{shown(name)} is {shown(str(entry))}")


def _heard(name: str, entry: object, digest_key: str) -> SourceTensor:
    """Strict inverse of :func:`_told`. Raises :class:`ValueError`."""
    given = entry if isinstance(entry, dict) else {}
    whole = {"shape": [], digest_key: None, "targets": [], "dropped": None, **given}
    digest = whole.pop(digest_key)
    match whole:
        case {
            "shard": str(shard),
            "dtype": str(dtype),
            "shape": [*shape],
            "targets": [*targets],
            "dropped": None | str() as dropped,
            **more,
        } if (
            not more
            and all(type(extent) is int and extent >= 0 for extent in shape)
            and all(isinstance(target, str) for target in targets)
            and (digest is None or isinstance(digest, str))
        ):
            enumerated(dtype, DTYPES, field=f"{shown(name)}: dtype")
            return SourceTensor(
                shard=shard, dtype=dtype, shape=tuple(shape), digest=digest, targets=tuple(targets), dropped=dropped
            )
    raise ValueError(f"{shown(name)} is {shown(str(entry))}")


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)

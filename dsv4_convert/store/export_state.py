"""The finished shards of an unfinished export: ``export.json`` in its stage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4_convert.errors import BadInput
from dsv4_convert.files.strict_json import parse_object, shown
from dsv4_convert.files.writing import write_atomically

#: Name of the file.
EXPORT_STATE = "export.json"


@dataclasses.dataclass(frozen=True)
class Written:
    """One finished shard.

    Attributes:
        identical: number of tensors equal to the source's.
        quantized: number of changed values, by weight that was quantised again.
    """

    identical: int
    quantized: Mapping[str, int]


def read_export_state(state: Path) -> tuple[dict[str, Any], dict[str, Written]]:
    """The settings of an interrupted export, and the shards that it has finished.

    Raises:
        BadInput: the file is damaged.
    """
    try:
        found = parse_object(state.read_bytes(), where="state")
        of, shards = found.get("of"), found.get("shards")
        if isinstance(of, dict) and isinstance(shards, dict) and len(found) == 2:
            return of, {shard: _heard(shard, entry) for shard, entry in shards.items()}
        raise ValueError(f"expected `of` and `shards`, found {shown(str(found))}")
    except (BadInput, ValueError) as error:
        raise BadInput(f"{state}: the state of an export is damaged ({error}). Start again with --restart.") from error


def _heard(shard: str, entry: Any) -> Written:
    if isinstance(entry, dict) and entry.keys() == {"identical", "quantized"}:
        identical, quantized = entry["identical"], entry["quantized"]
        if isinstance(quantized, dict) and all(type(count) is int for count in (identical, *quantized.values())):
            return Written(identical, quantized)
    raise ValueError(f"{shown(shard)} is {shown(str(entry))}")


def write_export_state(state: Path, of: Mapping[str, Any], shards: Mapping[str, Written]) -> None:
    """Record what :func:`read_export_state` reads. Raises :class:`ResourceError` if the disk is full or failing."""
    entries = {shard: dataclasses.asdict(written) for shard, written in shards.items()}
    write_atomically(state, json.dumps({"of": dict(of), "shards": entries}).encode())

"""``model.safetensors.index.json``: which shard holds which tensor."""

from __future__ import annotations

import re
from pathlib import Path

from dsv4_convert.errors import BadInput, listed
from dsv4_convert.files.strict_json import read_object, shown
from dsv4_convert.folders import CONFIG_FILE

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = CONFIG_FILE
SHARD_SUFFIX = ".safetensors"

#: A shard is a plain file name in the checkpoint's own folder: no separator, no drive, no URL, no way out.
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")


def is_shard_name(name: str) -> bool:
    """Whether a file name is one that an index may give to a shard."""
    return _SHARD_NAME.fullmatch(name) is not None


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> name of the shard that holds it.

    ``metadata.total_size`` is not read: writers disagree on what it counts, and the headers are the truth.

    Raises:
        BadInput: not a JSON object, no usable ``weight_map``, or shard names that are not plain file names.
    """
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "none" if weight_map is None else f"{type(weight_map).__name__} {shown(str(weight_map))}"
        raise BadInput(
            f"{path}: expected a non-empty object `weight_map` (tensor -> shard), found {found}; "
            "download that file again"
        )
    given = dict.fromkeys(value if isinstance(value, str) else repr(value) for value in weight_map.values())
    problems = [
        f"{shown(shard)}, given for {shown(_first_with(weight_map, shard))}"
        for shard in given
        if not is_shard_name(shard)
    ]
    if problems:
        raise BadInput(
            f"{path}: a shard has to be a plain file name like model-00001-of-00046{SHARD_SUFFIX}, without folders; "
            f"do not use this checkpoint before somebody has looked at these names:\n{listed(problems)}"
        )
    return weight_map


def _first_with(weight_map: dict[str, object], shard: str) -> str:
    return next(name for name, value in weight_map.items() if shard in (value, repr(value)))

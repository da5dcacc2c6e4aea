"""Defaults of options out of the ``[tool.dsv4]`` table of the nearest pyproject.toml."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4_convert.errors import UsageError, did_you_mean

_FILE = "pyproject.toml"
#: Entries of the table, and whether one is a path, which is relative to the file.
_ENTRIES = {"golden": True, "baseline": True, "mode": False}


def project_defaults() -> Mapping[str, Any]:
    """Defaults by command, as click's ``default_map`` has them; empty without a table.

    Raises:
        UsageError: a file that is no TOML, or an entry that is no option.
    """
    here = Path.cwd()
    file = next((folder / _FILE for folder in (here, *here.parents) if os.path.isfile(folder / _FILE)), None)
    if file is None:
        return {}
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {}).get("dsv4", {})
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read for [tool.dsv4]: {error}") from None
    given: dict[str, str] = {}
    for name, value in table.items() if isinstance(table, dict) else ():
        if name not in _ENTRIES or not isinstance(value, str):
            raise UsageError(
                f"{file}: [tool.dsv4] {name} = {value!r}: expected text for one of {', '.join(_ENTRIES)}"
                f"{did_you_mean(name, _ENTRIES)}"
            )
        given[name] = str(file.parent / value) if _ENTRIES[name] and "://" not in value else value
    return {"parity": given} if given else {}

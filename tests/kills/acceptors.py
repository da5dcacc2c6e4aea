"""Readers that might take a half-done destination for a whole one. Each runs in a process that ends afterwards.

Each function returns the names of the readers that accepted a half-done destination.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv4_convert.errors import BadInput


def _accepting(
    what: str, attempt: Callable[[str], Any], folders: Sequence[str], refusals: tuple[type[BaseException], ...]
) -> list[str]:
    """The folders with which an attempt does not end in a refusal."""
    found = []
    for folder in folders:
        try:
            attempt(folder)
        except refusals:
            continue
        found.append(f"{what} of {folder}")
    return found


def checkpoint(*folders: str) -> list[str]:
    """A converted checkpoint, by dsv4 and by a plain Orbax."""
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]

    from dsv4_convert.store import open_store

    found = _accepting("open_store", open_store, folders, (BadInput,))
    return found + _accepting("Orbax", ocp.PyTreeCheckpointer().restore, folders, (ValueError, OSError, KeyError))


def exported(*folders: str) -> list[str]:
    """A Hugging Face folder, by dsv4 and by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = _accepting("open_checkpoint", _whole_checkpoint, folders, (BadInput,))
    found += _accepting("AutoConfig", AutoConfig.from_pretrained, folders, (OSError, ValueError))
    return found + _accepting("AutoModel", AutoModelForCausalLM.from_pretrained, folders, (OSError, ValueError))


def golden(*folders: str) -> list[str]:
    """A golden. One that is whole but for its last rename is no half of one."""
    from dsv4_convert.golden.archive import open_golden

    def half(folder: str) -> None:
        if not open_golden(folder).verify():
            raise BadInput("whole")

    return _accepting("open_golden", half, folders, (BadInput,))


def report(*folders: str) -> list[str]:
    """The report of a parity run, as JSON."""

    def read(folder: str) -> None:
        json.loads((Path(folder) / "report.json").read_bytes())

    return _accepting("JSON", read, folders, (OSError, ValueError))


def downloaded(*folders: str) -> list[str]:
    """A folder of a download, as a checkpoint."""
    return _accepting("open_checkpoint", _whole_checkpoint, folders, (BadInput,))


def _whole_checkpoint(folder: str) -> None:
    """Open and plan, as conversion does before it begins."""
    from dsv4_convert.checkpoint import open_checkpoint
    from dsv4_convert.convert import Storage, plan

    with open_checkpoint(Path(folder)) as opened:
        plan(opened, opened.architecture(), Storage.SOURCE)

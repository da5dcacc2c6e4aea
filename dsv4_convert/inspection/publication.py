"""A finished golden or conversion as it is published: its files, and the card that says where it comes from."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.manifest import MANIFEST_NAME
from dsv4_convert.inspection.look import Say, inspect
from dsv4_convert.inspection.report import Inspection, What
from dsv4_convert.show.text import for_markdown
from dsv4_convert.show.units import count, size
from dsv4_convert.store import open_store
from dsv4_convert.store.layout import MANIFEST_FILE

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Publication:
    """``kind``: of repository that it belongs in. ``files``: their bytes by path; nothing else in the folder is sent.
    ``facts``: where it comes from. ``source``: its repository on the Hub, where that is known."""

    kind: Literal["model", "dataset"]
    folder: Path
    files: Mapping[str, int]
    facts: Mapping[str, str]
    source: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def card(self, repository: str) -> str:
        """README.md of ``repository``: a header for the Hub, the facts, and how to use it."""
        golden = self.kind == "dataset"
        header = ["tags:", "- dsv4", "- deepseek-v4", f"- {'golden' if golden else 'orbax'}"]
        if not golden:
            base = [] if self.source is None else [f"base_model: {self.source}"]
            header = ["library_name: jax", *base, *header]
        rows = [f"| {for_markdown(name)} | {for_markdown(text)} |" for name, text in self.facts.items()]
        what = (
            "A golden of dsv4: activations of a reference, to compare implementations with."
            if golden
            else ("A checkpoint for JAX, converted by dsv4.")
        )
        use = (
            f"dsv4 parity CHECKPOINT --golden hf://datasets/{repository}"
            if golden
            else f"hf download {repository} --local-dir ./orbax\ndsv4 verify ./orbax"
        )
        head = "\n".join(header)
        table = "\n".join(["| | |", "| --- | --- |", *rows])
        return f"---\n{head}\n---\n\n# {for_markdown(repository)}\n\n{what}\n\n{table}\n\n```sh\n{use}\n```\n"


def publication(place: str, *, say: Say = lambda _: None) -> Publication:
    """What is to be published of a local folder.

    Raises:
        UsageError: it is no folder, or neither a golden nor a finished conversion.
        BadInput: it is damaged.
    """
    if "://" in place or not Path(place).is_dir():
        raise UsageError(f"{place}: expected a local folder with a golden or a converted checkpoint")
    found = inspect(place, say=say)
    if found.what is What.GOLDEN:
        golden = open_golden(place)
        return _published("dataset", found, sorted(_of_golden(golden)), golden.manifest.request.source.name)
    if found.what is not What.CONVERTED:
        raise UsageError(f"{place}: {found.what}; dsv4 push takes a golden or a converted checkpoint")
    store = open_store(place)
    names = {MANIFEST_FILE, *store.manifest.files}
    names |= {file.relative_to(place).as_posix() for path in store.paths for file in _below(Path(place) / path)}
    return _published("model", found, sorted(names), str(store.conversion.source.get("name")))


def _of_golden(golden: Golden) -> set[str]:
    return {MANIFEST_NAME, *(entry.file for entry in golden.manifest.taps.values())}


def _below(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def _published(kind: Literal["model", "dataset"], found: Inspection, names: list[str], source: str) -> Publication:
    folder = Path(found.place)
    totals = found.totals
    facts = {"dsv4": importlib.metadata.version("dsv4-convert"), **found.facts}
    if totals is not None:
        facts["parameters"] = f"{count(totals.total)}, of which {count(totals.active)} for a token"
    files = {name: (folder / name).stat().st_size for name in names}
    facts["files"] = f"{len(files):,}, {size(sum(files.values()))}"
    return Publication(
        kind=kind, folder=folder, files=files, facts=facts, source=source if _REPOSITORY.fullmatch(source) else None
    )

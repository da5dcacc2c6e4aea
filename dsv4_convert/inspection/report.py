"""The result of an inspection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dsv4_convert.inspection.parts import PartRow, Totals
from dsv4_convert.show.notebook import table
from dsv4_convert.show.units import size
from dsv4_convert.spec.config import Config

#: Version of the JSON form.
SCHEMA_VERSION = 1


class What(StrEnum):
    """The things that dsv4 knows."""

    REPOSITORY = "Hub repository"
    CHECKPOINT = "Hugging Face checkpoint"
    CONVERTED = "Orbax checkpoint of dsv4"
    CONVERTING = "unfinished conversion of dsv4"
    GOLDEN = "golden"
    EXPORTING = "unfinished export of dsv4"
    RECORDING = "unfinished recording of a golden"
    CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One inspected path.

    Attributes:
        place: path, URL or repository, as it was given.
        known_by: what told that it is this.
        facts: where it comes from and how it is stored, in words, by what they say.
        config: its architecture; None where it is not known.
        layers: those that are there; None for all of them.
        rows: what is stored, by part of the model and dtype; of a golden nothing.
        arrays: of a golden, bytes by what is kept.
        odd: everything that is not as it should be, or not complete; in words.
    """

    what: What
    place: str
    known_by: str
    facts: Mapping[str, str]
    config: Config | None = None
    layers: tuple[int, ...] | None = None
    rows: tuple[PartRow, ...] = ()
    arrays: Mapping[str, int] = field(default_factory=dict)
    odd: tuple[str, ...] = ()

    @property
    def totals(self) -> Totals | None:
        """How large the architecture is."""
        return None if self.config is None else Totals.of(self.config)

    def _repr_html_(self) -> str:
        """What it is, for a notebook."""
        stored = [(row.part.value, f"{row.dtype}, {size(row.nbytes)}") for row in self.rows]
        odd = [("odd", problem) for problem in self.odd]
        return table(f"{self.place}: {self.what}", [*self.facts.items(), *stored, *odd])

    def to_json(self) -> dict[str, Any]:
        """Stable, versioned JSON."""
        totals = self.totals
        return {
            "schema_version": SCHEMA_VERSION,
            "what": self.what.name.lower(),
            "place": self.place,
            "known_by": self.known_by,
            "facts": dict(self.facts),
            "config": None if self.config is None else self.config.to_json(),
            "layers": None if self.layers is None else list(self.layers),
            "parameters": None if totals is None else dataclasses.asdict(totals),
            "stored": [
                {
                    "part": row.part.value,
                    "dtype": row.dtype,
                    "tensors": row.tensors,
                    "parameters": row.parameters,
                    "bytes": row.nbytes,
                }
                for row in self.rows
            ],
            "arrays": dict(self.arrays),
            "odd": list(self.odd),
        }

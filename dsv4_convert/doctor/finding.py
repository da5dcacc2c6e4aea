"""The result of one check."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

#: Version of the JSON form.
SCHEMA_VERSION = 1


class State(StrEnum):
    """How a check went."""

    OK = "ok"
    #: Works, though not as well as it could, or not for everything.
    WARN = "warn"
    #: The commands concerned do not work.
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check.

    Attributes:
        check: what was looked at.
        found: what there is, in words.
        commands: what it is for.
        way_out: what to do; None where nothing is to be done.
        core: whether nothing works without it.
    """

    check: str
    state: State
    found: str
    commands: str = "all"
    way_out: str | None = None
    core: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """All checks, in the order in which they are shown."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether the core commands work."""
        return not any(found.core and found.state is State.MISSING for found in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Stable, versioned JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "healthy": self.healthy,
            "checks": [dataclasses.asdict(found) for found in self.findings],
        }

"""What compiling a model for a slice found out."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsv4_convert.aot.hlo import Collective
from dsv4_convert.aot.topology import Slice

#: Of the JSON form.
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device.

    Attributes:
        arguments: weights, tokens and cache.
        outputs: logits and cache; ``aliased`` of them lie where an argument was.
        temporaries: all else at its peak.
        code: the program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """What the device needs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One program.

    Attributes:
        layers, parameters: of the model.
        slice: what it was compiled for.
        mesh: sizes of the mesh's axes.
        batch, tokens, decode, dtype, source: what it runs.
        weights: bytes of all weights, over all devices.
        memory: of one device; None where the compiler found it too small for the temporaries alone.
        refused: the compiler's reason for that.
        operations: floating-point operations of one run on all devices, without what is computed twice.
        collectives: of one run, on one device.
        seconds: to compile.
    """

    layers: int
    parameters: int
    slice: Slice
    mesh: dict[str, int]
    batch: int
    tokens: int
    decode: bool
    dtype: str
    source: bool
    weights: int
    memory: Memory | None
    refused: str | None
    operations: int
    collectives: tuple[Collective, ...]
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether a device's memory is enough."""
        return self.memory is not None and self.memory.total <= self.slice.chip.hbm

    def to_json(self) -> dict[str, Any]:
        """The stable form for machines."""
        data = dataclasses.asdict(self) | {
            "schema_version": SCHEMA_VERSION,
            "fits": self.fits,
            "hbm": self.slice.chip.hbm,
        }
        data["slice"] = {
            "name": self.slice.name,
            "layout": self.slice.layout,
            "chips": self.slice.chips,
            "devices": self.slice.count,
        }
        if self.memory is not None:
            data["memory"]["total"] = self.memory.total
        return data

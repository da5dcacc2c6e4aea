"""The result of compiling a model for a slice."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from dsv4_convert.aot.hlo import Collective
from dsv4_convert.aot.topology import Slice

#: Version of the JSON form.
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device.

    Attributes:
        arguments: weights, tokens and cache.
        outputs: logits and cache; ``aliased`` bytes of these reuse an argument's memory.
        temporaries: everything else, at its peak.
        code: the program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> Memory:
        """What the compiler says of a program for a TPU."""
        stats = compiled.memory_analysis()
        assert stats is not None  # of every program for a TPU
        return cls(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            code=stats.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """Bytes that the device needs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileReport:
    """One compiled program.

    Attributes:
        layers, parameters: size of the model.
        slice: the slice that it was compiled for.
        mesh: sizes of the mesh's axes.
        batch, tokens, decode, dtype, source: the :class:`~dsv4_convert.aot.program.Job`.
        weights: bytes of all weights, over all devices.
        memory: memory of one device; None where the temporaries alone exceed it.
        refused: the compiler's reason for that.
        operations: floating-point operations of one run on all devices; repeated computations count once.
        collectives: collectives of one run, on one device.
        seconds: compile time.
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
        """Whether the program fits a device's memory."""
        return self.memory is not None and self.memory.total <= self.slice.chip.hbm

    def to_json(self) -> dict[str, Any]:
        """The stable JSON form."""
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

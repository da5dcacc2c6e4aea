"""TPU slices by name: how many devices, laid out how, with how much memory each.

Names are those of Google Cloud, such as ``v5p-512``, where the number counts TensorCores (v4, v5p, tpu7x) or chips
(v5e, v6e); or the shape itself, such as ``v5p:4x8x8``, in chips.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dsv4_convert.errors import ResourceError, UsageError, did_you_mean

_GIB = 2**30
#: What libtpu would else ask the network for, as if this were a machine with a TPU; which one does not matter.
#: And it would let one process at a time have the TPU that is not there.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPU.

    Attributes:
        hbm: bytes of one JAX device that a program may use, as its compiler has it.
        dimensions: of a slice's torus.
        cores: what one chip counts in the name of a slice.
        most: chips of the largest slice, of those whose number is a power of two.
        devices: JAX devices of one chip.
        options: how libtpu is asked for it.
    """

    hbm: int
    dimensions: int
    cores: int
    most: int
    devices: int = 1
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


#: Memory: the limit that libtpu 0.0.42's compiler gives when a program is too large for it.
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(int(30.75 * _GIB), 3, 2, 4096, options={"chip_config_name": "megacore"}),
    "v5e": Chip(int(15.75 * _GIB), 2, 1, 256),
    "v5p": Chip(int(95.74 * _GIB), 3, 2, 4096),
    "v6e": Chip(int(31.25 * _GIB), 2, 1, 256),
    "tpu7x": Chip(int(94.75 * _GIB), 3, 2, 4096, devices=2),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU chips."""

    generation: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """Its generation."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """How many chips."""
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """How many JAX devices."""
        return self.chips * self.chip.devices

    @property
    def name(self) -> str:
        """Its name in Google Cloud, such as ``v5p-512``."""
        return f"{self.generation}-{self.chips * self.chip.cores}"

    @property
    def layout(self) -> str:
        """Its shape as libtpu has it, such as ``v5p:4x8x8``."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @classmethod
    def parse(cls, text: str) -> Slice:
        """The slice of a name or a shape.

        Raises:
            UsageError: an unknown generation, or a number of chips that no slice has.
        """
        match = re.fullmatch(r"(\w+?)(?:-(\d+)|:(\d+(?:x\d+)*))", text.strip().lower())
        if match is None or match[1] not in CHIPS:
            raise UsageError(
                f"topology {text!r}: expected a name such as v5p-512, or a shape such as v5p:4x8x8, of one of "
                f"{', '.join(CHIPS)}{_close(text)}"
            )
        generation, number, shape = match.groups()
        chip = CHIPS[generation]
        if shape is not None:
            sides = tuple(map(int, shape.split("x")))
            if len(sides) != chip.dimensions or any(
                side % least for side, least in zip(sides, (2, 2, 1), strict=False)
            ):
                raise UsageError(
                    f"topology {text!r}: a {generation} slice has {chip.dimensions} dimensions, the first two even"
                )
            return cls(generation, sides)
        chips, rest = divmod(int(number), chip.cores)
        if rest or chips < 4 or chips & (chips - 1):
            raise UsageError(
                f"topology {text!r}: {chip.cores} are one chip, and expected are 4, 8, 16, … chips, such as "
                f"{generation}-{4 * chip.cores}; give any other slice by its shape"
            )
        return cls(generation, _shape(chips, chip.dimensions))

    @classmethod
    def all(cls, generation: str) -> Iterator[Slice]:
        """Those with a name, smallest first. Raises :class:`UsageError` for an unknown generation."""
        if generation not in CHIPS:
            raise UsageError(
                f"no TPU {generation!r}: expected one of {', '.join(CHIPS)}{did_you_mean(generation, CHIPS)}"
            )
        chip, chips = CHIPS[generation], 4
        while chips <= chip.most:
            yield cls(generation, _shape(chips, chip.dimensions))
            chips *= 2

    def devices(self) -> list[Any]:
        """Its devices, which programs can be compiled for and not be run on.

        Raises:
            ResourceError: libtpu is not installed.
            UsageError: libtpu knows no such slice.
        """
        os.environ |= {name: value for name, value in _NO_TPU_HERE.items() if name not in os.environ}
        import jax
        from jax.errors import JaxRuntimeError
        from jax.experimental import topologies

        jax.config.update("jax_platforms", "cpu")  # nothing runs, so no TPU is looked for either
        try:
            found = topologies.get_topology_desc(self.layout, platform="tpu", **self.chip.options)
        except JaxRuntimeError as error:
            raise UsageError(f"topology {self.layout}: {error}") from error
        except RuntimeError as error:
            raise ResourceError(
                "the compiler for TPUs is not installed; pip install 'dsv4-convert[tpu]' brings it "
                "(libtpu, which needs no TPU)"
            ) from error
        return list(found.devices)


def _close(text: str) -> str:
    """What may have been meant by a name that is none: the generation that is alike, with the same number."""
    match = re.fullmatch(r"(\w+)([-:].+)", text.strip().lower())
    if match is None or match[1] in CHIPS:
        return ""
    return did_you_mean(match[0], [known + match[2] for known in CHIPS])


def _shape(chips: int, dimensions: int) -> tuple[int, ...]:
    """The most even shape of so many chips, shortest side first; four chips lie flat."""
    if dimensions == 3 and chips == 4:
        return 2, 2, 1
    sides = [1] * dimensions
    while math.prod(sides) < chips:
        sides[sides.index(min(sides))] *= 2
    return tuple(sorted(sides))

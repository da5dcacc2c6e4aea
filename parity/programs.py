"""The programs that a parity run can prove, and which of them fits this machine.

``streamed`` holds one layer without its experts, and one expert at a time. ``model`` is a layer as ``Model`` runs it:
the same functions in one compiled program, with all of its experts.
"""

from __future__ import annotations

import dataclasses
import math
from enum import StrEnum
from typing import Any

import jax
import numpy as np

from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.golden.archive import Golden
from dsv4_convert.model.experts import ExpertPath, expert_path
from dsv4_convert.parity.devices import Devices
from dsv4_convert.parity.report.data import ProgramFacts
from dsv4_convert.show.units import size
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.segments import segments
from dsv4_convert.weights.parameters import FLOAT32, Parameters
from dsv4_convert.weights.restore import available_bytes, layers_bytes, stage_bytes


class Program(StrEnum):
    """A way to run a layer."""

    STREAMED = "streamed"
    MODEL = "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How the program ``model`` runs a layer.

    Attributes:
        weights: ``expanded``, or ``source`` for published codes, which each use decodes; None for the first of the two
            that fits.
        experts: ``grouped`` or ``packed`` (:mod:`dsv4_convert.model.experts`); None for the platform's own.
        scanned: the layer is part of a loop over stacked weights, two repeats of its segment's pattern.
        chunk: prompts come in chunks of so many tokens from the cache, as ``dsv4 generate`` runs them; None: at once.
    """

    weights: str | None = None
    experts: ExpertPath | None = None
    scanned: bool = False
    chunk: int | None = None

    def __post_init__(self) -> None:
        """Raises :class:`UsageError` for chunks of no tokens."""
        if self.chunk is not None and self.chunk < 1:
            raise UsageError(f"chunks of {self.chunk} tokens: expected at least 1")

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of weights that may be tried, the first one that fits is taken."""
        return ("expanded", "source") if self.weights is None else (self.weights,)

    def facts(self, layers: tuple[int, ...]) -> ProgramFacts:
        """The program as a report states it, which compared ``layers``."""
        encoded = self.weights == "source"
        return ProgramFacts(
            program=Program.MODEL.value,
            platform=jax.default_backend(),
            weights=self.weights or "expanded",
            experts=self.experts or expert_path(jax.default_backend(), encoded=encoded),
            scanned=self.scanned,
            chunk=self.chunk,
            layers=layers,
        )


def streamed_facts(layers: tuple[int, ...]) -> ProgramFacts:
    """The streamed program as a report states it, which compared ``layers``."""
    return ProgramFacts(
        program=Program.STREAMED.value,
        platform=jax.default_backend(),
        weights="expanded",
        experts="one by one",
        layers=layers,
    )


def stack_of(config: Config, layer: int, *, scanned: bool) -> tuple[int, ...]:
    """The layers of the program that runs ``layer``, which is the last of them.

    That is the layer alone; or, ``scanned``, two repeats of its segment's pattern, turned so that it ends with the
    layer, where the pattern repeats.
    """
    segment = next(part for part in reversed(segments(config)) if part.first <= layer)
    length = len(segment.pattern)
    if not scanned or segment.repeats == 1:
        return (layer,)
    place, repeat = (layer - segment.first) % length, (layer - segment.first) // length
    other = repeat - 1 if repeat else 1
    places = [(place + 1 + turn) % length for turn in range(length)]
    return tuple(segment.layers(at)[of] for of in (other, repeat) for at in places)


def planned(
    weights: Parameters,
    golden: Golden,
    layers: tuple[int, ...],
    dtype: np.dtype[Any],
    options: ModelOptions,
    devices: Devices,
) -> ModelOptions:
    """The options with the form of weights that this machine has memory for.

    Raises:
        ResourceError: neither form fits. The message says what it takes.
        UsageError: the weights have no codes, though these are asked for.
    """
    free = available_bytes(devices.mesh)
    reasons = []
    for form in options.forms:
        try:
            needed = _needed(weights, golden, layers, dtype, dataclasses.replace(options, weights=form), devices)
        except UsageError as refused:
            if options.weights is not None:
                raise
            reasons.append(str(refused))
            continue
        fits = devices.sum(np.array([free is None or needed <= free], np.int32))
        if fits.sum() == devices.processes.count:  # the same answer in all of them
            return dataclasses.replace(options, weights=form)
        there = "less is free" if free is None else f"{size(free)} are free"
        reasons.append(f"a layer with {form} weights and its activations take {size(needed)}, {there}")
    raise ResourceError("; ".join(reasons))


def _needed(
    weights: Parameters,
    golden: Golden,
    layers: tuple[int, ...],
    dtype: np.dtype[Any],
    options: ModelOptions,
    devices: Devices,
) -> int:
    """Bytes of the largest layer's weights, and of its activations: on the device, here, and the golden's."""
    config = weights.config
    stages = [layer for layer in layers if layer in config.stage_layers]
    stacks = {
        config.layer_kind(layer): stack_of(config, layer, scanned=options.scanned)
        for layer in layers
        if layer not in stages
    }
    placed: dict[str, Any] = {"dtype": dtype, "mesh": devices.mesh, "encoded": options.weights == "source"}
    of_weights = [layers_bytes(weights, stack, scanned=options.scanned, **placed) for stack in stacks.values()]
    of_weights += [stage_bytes(weights, layer, **placed) for layer in stages]
    model_level = config.vocab_size * config.hidden_size * FLOAT32.itemsize
    recorded = [golden.taps(layer) for layer in layers if layer in golden.layers]
    taps = max((sum(math.prod(golden.shape(key)) for key in keys) for keys in recorded), default=0)
    return max([*of_weights, model_level]) + 3 * FLOAT32.itemsize * taps

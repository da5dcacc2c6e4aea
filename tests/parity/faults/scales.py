"""Faults as small as bfloat16's rounding: every matrix of the model, and of one routed expert, times 1 + 2^-7."""

from __future__ import annotations

import numpy as np

from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import parameters
from dsv4_convert.spec.v4.taps import TAPS

from .fault import WIDE, Arrays, Fault

FACTOR = np.float32(1 + 2.0**-7)
#: The expert that is scaled alone.
EXPERT = 3


def _scale(name: str, layer: int | None, path: str, expert: int | None) -> Fault:
    def plant(arrays: Arrays) -> None:
        arrays[path] = arrays[path].copy()
        arrays[path][() if expert is None else expert] *= FACTOR

    parameter = path if layer is None else path.split(".", 2)[2]
    tap, *others = (tap.name for tap in TAPS if parameter in tap.weights)
    return Fault(name=name, layer=layer, tap=tap, or_taps=tuple(others), arrays=plant, model="wide")


def _scales() -> dict[str, Fault]:
    config = Config.from_hf(WIDE)
    faults = {}
    for path, rule, layer in parameters(config, range(config.num_hidden_layers)):
        if len(rule.source_shape(config, layer)) < 2 or path.endswith("tid2eid"):
            continue
        for expert in (None, EXPERT) if rule.per_expert else (None,):
            name = f"{path} times 1 + 2^-7" if expert is None else f"{path}, expert {expert}, times 1 + 2^-7"
            faults[name] = _scale(name, layer, path, expert)
    return faults


SCALES: dict[str, Fault] = _scales()

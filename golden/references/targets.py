"""The streams of DSpark's target layers, which its first stage reads: they travel beside those that enter a layer.

In the state between two layers, streams have the name of the run that they belong to. The streams of a target layer
stay under ``RUN/targets.LAYER`` until the stages begin.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4_convert.spec.config import Config

Array = np.ndarray[Any, Any]
#: Arrays by the run that they belong to, and by ``RUN/name``.
State = dict[str, Array]


def kept(before: State, left: State, config: Config, layer: int) -> State:
    """The state after a layer: what it left, and the streams of the target layers so far."""
    if config.dspark is None or layer in config.stage_layers:
        return left
    own = {_name(run, layer): streams for run, streams in left.items()} if layer in config.draft_sources else {}
    return left | {name: value for name, value in before.items() if "/" in name} | own


def gathered(state: State, run: str, config: Config) -> Array:
    """The streams ``[B, S, L, N, D]`` of all target layers in a run."""
    return np.stack([state[_name(run, layer)] for layer in config.draft_sources], axis=2)


def _name(run: str, layer: int) -> str:
    return f"{run}/targets.{layer}"

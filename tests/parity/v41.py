"""Goldens of small V4.1 models: Automodel's activations where it recorded them, and dsv4's own everywhere else.

The layers that made the others agree with Automodel's in tests/model/test_v41_recorded.py. The noise floor is that of a
run in float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.layout import carried, is_fed, origin_of, parts
from dsv4_convert.golden.manifest import RecordedSource, RecordingRequest, Reference
from dsv4_convert.golden.noise import MODES, Mode, noise_name, row_noise
from dsv4_convert.golden.writer import golden_writer
from dsv4_convert.parity.forward import Activations, Forward
from dsv4_convert.spec.tap import Values
from dsv4_convert.spec.taps import TapKey
from dsv4_convert.weights.parameters import Parameters

from .faults.fault import Held, uncompiled

Array = np.ndarray[Any, Any]
DATA = Path(__file__).parents[1] / "data" / "v41" / "automodel.safetensors"


def automodel(name: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """The config of a recorded architecture, and what Automodel computed, with the prompt under ``tokens``."""
    with safe_open(DATA, "np") as file:
        own = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118
        return json.loads(file.metadata()[name]), {key.split("/", 1)[1]: file.get_tensor(key) for key in own}


def recorded(
    weights: Held,
    out: Path,
    tokens: Array,
    *,
    decode: int = 0,
    known: Mapping[str, Array] | None = None,
    layers: tuple[int, ...] | None = None,
) -> Golden:
    """A golden of these weights in ``out``. ``known``: activations of another implementation, by full name."""
    config = weights.config
    wanted = tuple(range(config.num_hidden_layers)) if layers is None else layers
    request = RecordingRequest(
        reference=Reference(
            name="automodel",
            versions={"nemo-automodel": "0.7.0"},
            numerics="plain",
            dtype="float32",
            attention_implementation="eager",
            experts_implementation="torch",
        ),
        source=RecordedSource(name="small", revision=None, files={}),
        config=config,
        tokens=tuple(tuple(map(int, row)) for row in tokens),
        text=None,
        layers=wanted,
        noise=("float32",),
        decode=decode,
    )
    with uncompiled():
        whole = _run(weights, tokens, np.float32, decode)
        theirs = {TapKey.parse(name, config): value for name, value in (known or {}).items()}
        whole |= {key: value.reshape(whole[key].shape).astype(whole[key].dtype) for key, value in theirs.items()}
        _follow(whole, config)
        with _float64():
            runs = {
                Mode.CUMULATIVE: _run(weights, tokens, np.float64, decode, choices=whole),
                Mode.ISOLATED: _run(weights, tokens, np.float64, decode, choices=whole, inputs=whole),
            }
    taps = {str(key): value for key, value in whole.items()}
    arrays = request.arrays()
    with golden_writer(out, request) as writer:
        for part in parts(config, wanted):
            own = {}
            for name in (name for name, array in arrays.items() if array.layer == part):
                own[name] = _noise(runs, whole, name) if name.endswith(noise_name("")) else taps[name]
            writer.write(part, {name: np.ascontiguousarray(array) for name, array in own.items()})
        return writer.publish()


def _noise(runs: Mapping[Mode, Activations], golden: Activations, name: str) -> Array:
    key = next(key for key in golden if noise_name(str(key)) == name)
    nothing = np.zeros((2, *golden[key].shape[:2]), np.float32)
    return np.stack([nothing if is_fed(key, mode) else row_noise(runs[mode][key], golden[key]) for mode in MODES])[None]


def _run(
    weights: Parameters,
    tokens: Array,
    dtype: Any,
    decode: int,
    *,
    choices: Activations | None = None,
    inputs: Activations | None = None,
) -> Activations:
    """All taps: with the ``choices`` of a golden, and with every layer's inputs from it, or from the layer before."""
    config = weights.config
    forward = Forward(weights, tokens, np.dtype(dtype), decode=decode)
    found, carry = forward.embed()
    for layer in (*range(config.num_hidden_layers), None):
        overrides = {
            key: value
            for key, value in (choices or {}).items()
            if key.layer == layer and key.tap.values is Values.CHOICE
        }
        given = carry if inputs is None else {name: inputs[key] for name, key in carried(config, layer).items()}
        if layer is None:
            return found | forward.head(given)
        made, carry = forward.layer(layer, given, overrides)
        found |= made
    raise AssertionError


def _follow(golden: Activations, config: Any) -> None:
    """The inputs of a layer are taps of an earlier one, whoever computed them."""
    for layer in range(1, config.num_hidden_layers):
        for key in carried(config, layer).values():
            golden[key] = golden[origin_of(config, key)]


@contextmanager
def _float64() -> Iterator[None]:
    """Where the model says float32, it computes in float64."""
    with jax.enable_x64(True), patch.object(jnp, "float32", jnp.float64):
        yield

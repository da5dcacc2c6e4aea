"""The program of each process of tests/parity/test_many.py: ``python -m tests.parity.many OUT GOLDEN …``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsv4_convert.golden.noise import Mode
from dsv4_convert.model.mesh import parse_mesh
from dsv4_convert.parity import forward
from dsv4_convert.parity.devices import Devices
from dsv4_convert.parity.programs import Program
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, run_parity
from dsv4_convert.spec.taps import TapKey
from dsv4_convert.store import ALONE
from dsv4_convert.store.orbax_processes import join
from dsv4_convert.weights.converted import Weights

#: A CSA layer with learned routing, which has every operation but the hash table's. One, because programs take seconds.
LAYERS = (3,)
OPTIONS = ParityOptions(layers=LAYERS, modes=[Mode.ISOLATED], programs=[Program.STREAMED])


def found(report: ParityReport) -> dict[str, Any]:
    """The results that must not depend on the devices."""
    document = report.to_json(verdict(report))
    return {
        "verdict": document["verdict"],
        "taps": [(tap.name, tap.mode.value, tap.verdict.value) for tap in report.taps],
        "first": [document["first_diverging"], document["first_wrong_operation"]],
        "localizations": [
            (layer["layer"], [tap["name"] for tap in layer["wrong"]], layer["weights"], layer["experts"])
            for layer in document["descents"]
        ],
    }


def same_taps(checkpoint: Path) -> None:
    """Every tap on a mesh is that on one device, also token by token from the cache; prompts are repeated."""
    weights = Weights.open(checkpoint)
    tokens = np.random.default_rng(3).integers(0, weights.config.vocab_size, (3, 23)).astype(np.int32)
    meshes = [Devices(), Devices.all(weights.config, ALONE, parse_mesh("expert=2,fsdp=2,tensor=2"))]
    models = [forward.Forward(weights, tokens, decode=1, devices=devices) for devices in meshes]
    (embedded, streams), _ = (model.embed() for model in models)
    assert embedded[TapKey.parse("embed")].shape == (3, 23, weights.config.hidden_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "HEAD_WORDS", 41)
        for one, many in (
            *((models[0].layer(layer, streams)[0], models[1].layer(layer, streams)[0]) for layer in (1,)),
            tuple(model.head(streams) for model in models),
        ):
            assert one.keys() == many.keys()
            for key in one:
                np.testing.assert_allclose(many[key], one[key], rtol=1e-4, atol=1e-4, err_msg=str(key))


def main(given: argparse.Namespace) -> None:
    """Run parity on every checkpoint, and write what came of it and how many expert matrices were read for it."""
    processes = ALONE
    if given.coordinator is not None:
        processes = join(given.coordinator, given.num_processes, given.process_id)
    read = 0
    read_expert = Weights.read_expert

    def counted(self: Weights, *arguments: Any) -> np.ndarray[Any, Any]:
        nonlocal read
        read += 1
        return read_expert(self, *arguments)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "read_expert", counted)
        for checkpoint in given.checkpoints:
            read = 0
            report = run_parity(checkpoint, given.golden, OPTIONS, processes=processes)
            results.append({**found(report), "read": read, "platform": dict(report.platform)})
    if given.taps:
        same_taps(given.checkpoints[0])
    Path(f"{given.out}.{jax.process_index()}").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("golden", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--taps", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    main(parser.parse_args())

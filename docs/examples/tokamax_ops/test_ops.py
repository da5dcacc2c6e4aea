"""`pytest --dsv4-golden GOLDEN`, with the weights in $CHECKPOINT and what is checked in $TOKAMAX_IMPLEMENTATION."""

import os
from pathlib import Path

import numpy as np
import pytest

from dsv4_convert import Weights
from dsv4_convert.parity.activations import as_text

from .ops import OPS, Layer


@pytest.fixture(scope="module")
def read():
    return Weights.open(Path(os.environ["CHECKPOINT"])).read


@pytest.mark.parametrize("name", OPS)
def test_an_op(dsv4_golden, read, name):
    op = OPS[name]
    implementation = os.environ.get("TOKAMAX_IMPLEMENTATION", "xla")
    layers = [Layer(dsv4_golden, read, number, implementation) for number in dsv4_golden.layers]
    layers = [layer for layer in layers if layer.kind in op.kinds]
    assert layers, f"{name}: the golden has no layer of {op.kinds}"
    for layer in layers:
        for dtype in op.dtypes:
            found = {tap: np.asarray(value)[None] for tap, value in op.run(layer, dtype).items()}
            report = dsv4_golden.report(found, layer=layer.number, dtype=dtype)
            assert op.agrees(report), as_text(report)

"""How high are the noise floors of healthy goldens? The bounds in ``golden/rounding.py`` are derived from the largest.

Records random architectures, as the false alarms do, and prints every floor's largest multiple of the unit that
``golden/rounding.py`` defines.

Run: python -m benchmarks.floors [--cases 200] [--first 0]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.noise import MODES, RMS, row_sizes
from dsv4_convert.golden.rounding import unit_of
from dsv4_convert.spec.tap import Values
from tests.parity.healthy import healthy


def multiples(golden: Golden) -> dict[str, list[float]]:
    """By dtype, the largest over all taps: of a tap, of a row, and of the rows' relative noise."""
    largest: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for key in golden.keys:
        shape = golden.shape(key)
        if key.tap.values is not Values.REAL or not math.prod(shape):
            continue
        sizes = row_sizes(golden.read(key))
        there = sizes > 0
        if not there.any():
            continue
        for dtype in golden.manifest.request.noise:
            for mode in MODES:
                noise = golden.noise(key, dtype, mode)[RMS].astype(np.float64)
                relative = noise[there] / sizes[there] if math.prod(shape[2:]) >= 4 else np.zeros(1)
                found = (_rms(noise) / _rms(sizes), noise.max() / sizes.max(), _rms(relative))
                unit = unit_of(golden.config, key, dtype, mode, golden.numerics)
                largest[dtype] = [max(old, float(new) / unit) for old, new in zip(largest[dtype], found, strict=True)]
    return largest


def main() -> None:
    """Record the cases one after the other, and print the largest floors as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    largest: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for case in range(options.first, options.first + options.cases):
        with tempfile.TemporaryDirectory() as folder:
            golden = healthy(case, Path(folder)).golden
            assert golden.verify() == []
            for dtype, found in multiples(golden).items():
                largest[dtype] = list(map(max, largest[dtype], found))
    print(json.dumps({"cases": options.cases, "tap, row, relative, in units": largest}))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


if __name__ == "__main__":
    main()

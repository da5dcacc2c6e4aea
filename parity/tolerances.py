"""How far a tap may lie from its golden. The only place where a tolerance is written.

float32 on CPU. A tap passes where every element satisfies ``|found - golden| <= atol + rtol * |golden|``.

* ``isolated``: a layer runs on the golden's own input, so what is compared is one layer's rounding. Two float32
  evaluations of a layer that sum in different orders differ by some 1e-6 of the largest term; 1e-5 leaves room for the
  order of summation and for nothing else. It is also the bar that reference tests of other JAX ports name for their
  strictest block.
* ``cumulative``: rounding adds up from layer to layer; 1e-4 on every tap and on the logits.

The rounding error of a sum of n independent terms grows with the square root of n. The figures hold as they are up to a
model width of 512; beyond that they grow with the square root of the width: 2.8 times at V4-Flash's 4096, where two
healthy evaluations of random weights were seen 1.8e-5 apart (``benchmarks/full_width.py``).
"""

from __future__ import annotations

import dataclasses
import math
from enum import StrEnum

from dsv4_convert.config import Config


class Mode(StrEnum):
    """Where a layer's input comes from."""

    ISOLATED = "isolated"
    CUMULATIVE = "cumulative"


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """``|found - golden| <= atol + rtol * |golden|``."""

    atol: float
    rtol: float


TOLERANCES: dict[Mode, Tolerance] = {
    Mode.ISOLATED: Tolerance(atol=1e-5, rtol=1e-5),
    Mode.CUMULATIVE: Tolerance(atol=1e-4, rtol=1e-4),
}

#: Model width up to which :data:`TOLERANCES` hold as they are.
_WIDTH = 512


def tolerance(mode: Mode, config: Config) -> Tolerance:
    """The tolerance of a run."""
    base = TOLERANCES[mode]
    growth = math.sqrt(max(1.0, config.hidden_size / _WIDTH))
    return Tolerance(atol=base.atol * growth, rtol=base.rtol * growth)

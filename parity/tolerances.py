"""How far a tap may lie from its golden, per mode. The only place where a tolerance is written.

float32 on CPU. A tap passes where every element satisfies ``|found - golden| <= atol + rtol * |golden|``.

* ``isolated``: a layer runs on the golden's own input, so what is compared is one layer's rounding. Two float32
  evaluations of a layer that sum in different orders differ by some 1e-6 of the largest term; 1e-5 leaves room for the
  order of summation and for nothing else. It is also the bar that reference tests of other JAX ports name for their
  strictest block.
* ``cumulative``: rounding adds up from layer to layer; 1e-4 on every tap and on the logits.
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum


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

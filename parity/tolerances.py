"""How far a tap may lie from its golden, in multiples of the noise floor. The only place where a tolerance is written.

A golden carries its noise floor (:mod:`golden.noise`): per token, how far legal rounding moves the reference itself. An
error is quoted as a multiple of that floor, in three ways, and each has one limit, the same for every tap, dtype, mode
and width:

* ``tap``: rms of the error over the whole tap, over rms of the floor. Finds an error that is everywhere and small.
* ``row``: the same within the worst row, which is one token or one compressed entry. Finds a wrong token.
* ``element``: the largest error of an element, over the largest error of the reference in that row. Finds a single
  wrong channel.

Derivation. Two healthy implementations differ in the order of summation, in where they round to the dtype, and in
their exp, cos and rsqrt, so their errors are of one size but not equal. Over 200 random architectures, prompts of 1 to
301 tokens, isolated and cumulative, 79,000 taps that are not empty in each dtype, the multiples of a healthy model had
these quantiles (``python -m benchmarks.false_alarms``):

    ========  =======  ======  =====  =======  =======
    dtype     measure  median    99%    99.9%  largest
    ========  =======  ======  =====  =======  =======
    float32   tap        1.03   1.98     2.54     5.68
    float32   row        1.64   3.50     4.73    11.42
    float32   element    1.84   3.67     4.90    11.81
    bfloat16  tap        0.76   1.04     1.28     2.29
    bfloat16  row        1.00   2.67     4.22     6.27
    bfloat16  element    1.05   2.94     4.36     8.25
    bfloat16  tie        0.49   1.61     2.52     2.80
    ========  =======  ======  =====  =======  =======

The limits are twice the largest. What a fault does is of another order: in float32 the mildest of the catalogue in
``tests/parity/faults`` is 170, 1,400 and 1,800 times the floor (``python -m benchmarks.faults``).

A tie: two candidates may swap if the golden's scores of them are closer than ``tie`` times the largest error of the
reference's scores in that row. Each of the two scores may err by that much to either side, and healthy elements by a
few times as much.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest multiple of the noise floor that passes, for each of the ways in which it is measured."""

    tap: float
    row: float
    element: float
    tie: float


LIMITS = Limits(tap=12.0, row=24.0, element=24.0, tie=6.0)

#: Unit roundoff: the largest relative error of rounding to a dtype. No floor is lower than rounding the result once.
UNIT: dict[str, float] = {"float32": 2.0**-24, "bfloat16": 2.0**-8}

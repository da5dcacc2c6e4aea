"""How far a tap may lie from its golden, in multiples of the noise floor. The only place where a tolerance is written.

A golden carries its noise floor (:mod:`golden.noise`): per token, how far legal rounding moves the reference itself. An
error is quoted as a multiple of that floor, in three ways, and each has one limit, the same for every tap, dtype, mode
and width:

* ``tap``: rms of the error over the whole tap, over rms of the floor. Finds an error that is everywhere and small.
* ``row``: the same within the worst row, which is one token or one compressed entry. Finds a wrong token.
* ``element``: the largest error of an element, over the largest error of the reference in that row. Finds a single
  wrong channel.

Derivation. Two healthy implementations differ in the order of summation, in where they round to the dtype, and in
their exp, cos and rsqrt, so their errors are of one size but not equal. Over random architectures, prompts of 1 to 301
tokens, float32 and bfloat16, isolated and cumulative (``python -m benchmarks.false_alarms`` prints the distribution),
the multiples of a healthy model had these quantiles:

    ==========  ======  =====  =======  =======
    multiple    median    99%    99.9%  largest
    ==========  ======  =====  =======  =======
    tap            0.9    2.0      2.6      3.2
    row            1.3    3.6      4.6      6.9
    element        1.7    3.7      4.7      6.0
    ==========  ======  =====  =======  =======

The limits leave a factor of more than two above the largest. What a fault does is of another order: the mildest of the
catalogue in ``tests/parity/faults.py`` are reported at more than fifty times the floor.

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


LIMITS = Limits(tap=8.0, row=16.0, element=16.0, tie=8.0)

#: Unit roundoff: the largest relative error of rounding to a dtype. No floor is lower than rounding the result once.
UNIT: dict[str, float] = {"float32": 2.0**-24, "bfloat16": 2.0**-8}

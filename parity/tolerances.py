"""How far a tap may lie from its golden, in multiples of the noise floor. The only place where a tolerance is written.

A golden carries its noise floor (:mod:`dsv4_convert.golden.noise`): per token, how far legal rounding moves the
reference itself. An error is quoted as a multiple of that floor, in three ways, and each has one limit for a dtype, the
same for every tap, mode and width:

* ``tap``: rms of the error over the whole tap, over rms of the floor. Finds an error that is everywhere and small.
* ``row``: the same within the worst row, which is one token or one compressed entry. Finds a wrong token.
* ``element``: the largest error of an element, over the largest error of the reference in that row. Finds a single
  wrong channel.

Derivation. Two healthy implementations differ in the order of summation, in where they round to the dtype, and in
their exp, cos and rsqrt, so their errors are of one size but not equal. ``python -m benchmarks.false_alarms`` compared
healthy models of 200 random architectures on prompts of 1 to 301 tokens, isolated and cumulative: 79,000 taps with
elements in each dtype. Their errors, in noise floors, had these quantiles:

    ========  =======  ======  =====  =======  =======
    dtype     measure  median    99%    99.9%  largest
    ========  =======  ======  =====  =======  =======
    float32   tap        1.03   1.98     2.54     5.68
    float32   row        1.64   3.50     4.73    11.42
    float32   element    1.84   3.67     4.90    11.81
    bfloat16  tap        0.76   1.04     1.28     2.29
    bfloat16  row        1.00   2.67     4.22     6.64
    bfloat16  element    1.05   2.94     4.36     8.25
    bfloat16  tie        0.49   1.61     2.52     2.80
    ========  =======  ======  =====  =======  =======

The limits are twice the largest of the dtype, rounded up; bfloat16 sets that of ties for both. In float32 faults are
of another order: the mildest fault of the catalogue in ``tests/parity/faults`` is 170, 1,400 and 1,800 times the floor
(``python -m benchmarks.faults``). In bfloat16 many a fault is as large as rounding. There the limits are half as wide,
and :data:`SYSTEMATIC` finds what is still smaller.

A tie: two candidates may swap if the golden's scores of them are closer than ``tie`` times the largest error of the
reference's scores in that row. Each of the two scores may err by that much to either side, and healthy elements by a
few times as much.
"""

from __future__ import annotations

import dataclasses
import math

from dsv4_convert.golden.noise import Mode
from dsv4_convert.spec.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest multiple of the noise floor that passes, for each of the ways in which it is measured."""

    tap: float
    row: float
    element: float
    tie: float


#: By the dtype of weights and activations. Release numerics have floors that are stated, not measured (below). These
#: were set for limits as wide as float32's, and healthy errors are at most 4.7, 2.3 and 9.2 of them
#: (``python -m benchmarks.release``).
LIMITS: dict[str, Limits] = {
    "float32": Limits(tap=12.0, row=24.0, element=24.0, tie=6.0),
    "bfloat16": Limits(tap=5.0, row=14.0, element=17.0, tie=6.0),
    "release": Limits(tap=12.0, row=24.0, element=24.0, tie=6.0),
}


def limits_of(dtype: str, numerics: str) -> Limits:
    """The limits of a comparison in ``dtype`` with a golden of ``numerics``, ``plain`` or ``release``."""
    return LIMITS[dtype if numerics == "plain" else numerics]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SystematicLimits:
    """How far errors may be correlated with a trend (:mod:`dsv4_convert.parity.systematic`).

    ``chance`` over the square root of the number of errors is what independent errors may have in common, and ``share``
    what the errors of any number may. ``least`` is the relative error below which errors do not count, and
    ``rounded_weights`` the size of a trend that the rounding of weights may have.
    """

    share: float
    chance: float
    least: float
    rounded_weights: float

    def allowed(self, count: int) -> float:
        """The largest correlation that passes, of so many errors."""
        return self.share + self.chance / math.sqrt(max(count, 1))


#: Derivation. In 200 random healthy architectures in bfloat16, isolated, cumulative and compact, nothing failed. The
#: largest correlation was 0.88 of what is allowed (``python -m benchmarks.false_alarms`` prints it). Two causes are no
#: chance.
#:
#: * The scales of a Base release leave the weights of a tile a few mantissas, which all round alike to bfloat16. Whole
#:   matrices, and experts behind a clamp, changed by up to 0.0031. One rounding changes a weight by at most 2^-8, so
#:   where weights are rounded, a smaller trend does not count.
#: * Values that a clamp makes equal round alike: their correlation was 0.08 over 19,200 elements, for which ``share``
#:   has room.
#:
#: In float32 trends only explain: wrong scales are far beyond the limits of size.
SYSTEMATIC = SystematicLimits(share=0.1, chance=12.0, least=2.0**-12, rounded_weights=2.0**-8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
    """How far a measure may lie above its recorded value: ``times`` it, and always up to ``least``."""

    times: float
    least: float

    def allowed(self, recorded: float) -> float:
        """The largest value that does not count as grown."""
        return max(self.times * recorded, self.least)


#: Bands of a baseline (:mod:`dsv4_convert.parity.gate`): for each measure of a tap, and of a choice for ``tokens``, the
#: share of its tokens that chose otherwise, all of them ties.
#:
#: Derivation. ``python -m benchmarks.gate`` makes one machine compute as others do, in 16 ways: one thread or core, a
#: mesh of two devices, levels of XLA's optimisation, SSE4.2 (which has no fused multiply-add), AVX, AVX2 and AVX-512,
#: three widths of vectors, other code for fusions, fast math. Each runs the committed golden in both modes and dtypes.
#: The largest error of a tap over its smallest was at most:
#:
#:     ==================  ====  ====  =======  ======
#:     elements of a tap    tap   row  element  tokens
#:     ==================  ====  ====  =======  ======
#:     a hundred or more   1.15  2.10     2.04    1.44
#:     fewer               1.55  1.68     2.33
#:     ==================  ====  ====  =======  ======
#:
#: ``times`` is a quarter more, rounded up to a half. An error far below the floor says that the tap is computed with
#: more digits than its dtype has, or copied: such errors moved by less than 0.01, and ``least`` is where rounding to
#: the dtype begins to show. A tap of few elements may be exact by luck, so its ``least`` is the error that 99 of 100
#: healthy taps stay below (see above).
BANDS: dict[str, Band] = {
    "tap": Band(times=1.5, least=0.1),
    "row": Band(times=3.0, least=0.25),
    "element": Band(times=3.0, least=0.5),
    "tokens": Band(times=2.0, least=0.02),
}
FEW = 100
BANDS_OF_FEW: dict[str, Band] = {
    "tap": Band(times=2.0, least=2.0),
    "row": Band(times=3.0, least=4.0),
    "element": Band(times=3.0, least=4.0),
    "tokens": BANDS["tokens"],
}

#: Unit roundoff: the largest relative error of rounding to a dtype. No floor is lower than rounding the result once.
UNIT: dict[str, float] = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Least:
    """Least relative noise of a tap as a whole, and of one of its rows."""

    tap: float
    row: float


#: In release numerics operations are compared one by one, on equal inputs, and both sides round at the same places: of
#: ten thousand values about one is not equal to the last bit. It moves by up to 2^-7 of itself, and what an expert's
#: inner value does to its row when it becomes another FP8 number is of that size, too. So a row may move by a value or
#: two, while the tap as a whole hardly moves: rounding once too often everywhere is beyond its limit.
_RELEASE = Least(tap=2.0**-14, row=2.0**-10)
#: Values that end in FP4 move by up to half of themselves.
_RELEASE_FP4 = Least(tap=2.0**-10, row=2.0**-5)
#: From the tokens on, roundings multiply: keys become other FP8 numbers, here and there.
_RELEASE_CUMULATIVE = Least(tap=2.0**-8, row=2.0**-5)


def release_unit(config: Config, tap: str, mode: Mode) -> Least:
    """The least noise of a tap, by its name within its layer, in release numerics, where it replaces :data:`UNIT`."""
    if mode is Mode.CUMULATIVE:
        return _RELEASE_CUMULATIVE
    return _RELEASE_FP4 if tap in config.fp4_taps else _RELEASE

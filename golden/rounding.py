"""The largest noise floor that rounding explains: a golden whose floors lie above it would let wrong models pass.

A run in a dtype of unit roundoff u rounds every intermediate value once (u), and sums in float32 or better, whose
error grows with the square root of the number n of terms (Higham and Mary 2019). So one layer moves a tap by a few
times its *unit* u + 2^-24 sqrt(n), relative to the tap's rms, where n = N D is the longest sum of a layer: that over
all streams. In cumulative mode each layer adds its own error to what entered it, so the unit is multiplied by the
number of layers.

``benchmarks/floors.py`` records 200 random healthy architectures, with prompts of 1 to 301 tokens, in both modes. Their
largest floors, in these units:

    ========  ==============  =====================  =================
    dtype     tap over its    worst row over the     rms of the rows'
              rms             largest row            relative noise
    ========  ==============  =====================  =================
    float32   1.0             1.8                    1.0
    bfloat16  4.3             12.2                   4.5
    ========  ==============  =====================  =================

The bounds are four times the largest. A tap of few elements, and a row of few, may be close to zero by luck, so that a
healthy floor is large beside it: such a tap has the bound of a row, and such rows none of their relative noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.golden.noise import PEAK, RMS, Mode
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import TapKey

Array = np.ndarray[Any, Any]

#: The largest floor of a tap, and of one of its rows, in units.
_TAP, _ROW = 16.0, 64.0
#: Fewer elements than these may be close to zero together, by luck.
_FEW, _FEW_IN_A_ROW = 100, 4
#: Slack of sums that were rounded to float32: relative, and absolute for denormal numbers.
_SLACK, _TINY = 1e-5, 1e-37
_FLOAT32 = 2.0**-24
#: Unit roundoff of the formats that release numerics round activations to, in which keys are cached.
_FP8, _FP4 = 2.0**-4, 2.0**-2


def unit_of(config: Config, key: TapKey, dtype: str, mode: Mode, numerics: str) -> float:
    """How far one layer's rounding, or that of all layers up to the tap, moves the tap, relative to its rms."""
    unit = float(ml_dtypes.finfo(dtype).eps) / 2  # type: ignore[no-untyped-call]
    if numerics == "release":
        # From the tokens on, keys become other FP8 numbers; and FP4 is what the indexer's taps end in.
        in_fp4 = key.tap.name.startswith("attn.indexer.") or key.tap.name in config.fp4_taps
        unit = _FP4 if in_fp4 else _FP8 if mode is Mode.CUMULATIVE else unit
    unit += _FLOAT32 * math.sqrt(config.hc_mult * config.hidden_size)
    if mode is Mode.ISOLATED:
        return unit
    return unit * (config.num_hidden_layers if key.layer is None else key.layer + 1)


def malformed_noise(noise: Array, elements: int) -> str | None:
    """Why numbers are no rms and largest value of any difference; None if they may be.

    Args:
        noise: ``[..., 2, B, S]``, rms and peak of every row.
        elements: number of elements in a row.
    """
    if not np.isfinite(noise).all():
        return f"a noise floor of {noise[~np.isfinite(noise)].flat[0]}"
    if (noise < 0).any():
        return f"a noise floor of {noise.min():.3g}, which is negative"
    rms, peak = (noise[..., part, :, :].astype(np.float64) for part in (RMS, PEAK))
    if (rms > peak * (1 + _SLACK) + _TINY).any() or (peak > rms * math.sqrt(elements) * (1 + _SLACK) + _TINY).any():
        return f"a noise floor whose rms and largest value do not belong to the same {elements} elements"
    return None


def excessive_noise(noise: Array, sizes: Array, elements: int, unit: float) -> str | None:
    """Why rounding does not explain a floor; None if it does.

    Args:
        noise: ``[2, B, S]`` of one dtype and mode, well-formed.
        sizes: ``[B, S]`` rms of the tap's rows.
        elements: number of elements in a row.
        unit: see :func:`unit_of`.
    """
    return next(_excesses(noise[RMS].astype(np.float64), sizes, elements, unit), None)


def _excesses(noise: Array, sizes: Array, elements: int, unit: float) -> Iterator[str]:
    few = noise.size * elements < _FEW
    if few and not sizes.any():
        return
    tap = min((_ROW if few else _TAP) * unit, 1.0)
    whole, size = (float(np.sqrt(np.mean(np.square(values)))) for values in (noise, sizes))
    if whole > tap * size:
        yield _sentence("over the whole tap", whole, tap, size)
    row = min(_ROW * unit, 1.0)
    if noise.max() > row * sizes.max():
        yield _sentence("in a row", noise.max(), row, sizes.max())
    there = sizes > 0
    if elements >= _FEW_IN_A_ROW and there.any():
        relative = float(np.sqrt(np.mean(np.square(noise[there] / sizes[there]))))
        if relative > tap:
            yield _sentence("relative to its rows", relative, tap, 1.0)


def _sentence(where: str, found: float, bound: float, size: float) -> str:
    return (
        f"a noise floor of {found:.3g} {where}, where rounding explains at most {bound * size:.3g} "
        f"({bound:.2g} of the values)"
    )

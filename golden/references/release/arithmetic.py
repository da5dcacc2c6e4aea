"""How DeepSeek's code computes a golden, and how it computes again to measure what rounding does.

Release numerics are the code's own: weights as published, activations in bfloat16 and quantised on the way. Their noise
is the change when sums and functions are float64.

Plain numerics are its mathematics: decoded weights, no simulated quantisation, float32. Their noise is the change in
float64, which shows how much of the golden is rounding, and in bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from dsv4_convert.golden.references.release import kernels
from dsv4_convert.golden.references.release.probes import exact_functions
from dsv4_convert.golden.references.widening import Widen


@dataclasses.dataclass(frozen=True)
class Run:
    """One way in which a layer is computed.

    Attributes:
        dtype: of activations and caches.
        weights: of all weights; None: those that the code asks for.
        around: what is active while the layer runs.
    """

    dtype: torch.dtype
    weights: torch.dtype | None
    around: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def wide(self) -> torch.dtype:
        """The dtype of what the code keeps in float32 whatever the activations are."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The runs that make a golden of one numerics.

    Attributes:
        numerics: their name.
        dtype: the golden's, by name.
        quantized: whether weights are codes, and activations are quantised.
        golden: the run that is kept.
        noise: the runs that measure the noise floor, by the dtype under test.
        by_operation: whether the isolated mode isolates operations, each of which gets the golden's own values; or
            layers.
    """

    numerics: str
    dtype: str
    quantized: bool
    golden: Run
    noise: Mapping[str, Run]
    by_operation: bool

    @property
    def functions(self) -> Mapping[str, Callable[..., Any]]:
        """The kernels that the code gets."""
        return kernels.RELEASE if self.quantized else kernels.PLAIN


@contextmanager
def _exact() -> Iterator[None]:
    with kernels.exact_sums(), exact_functions():
        yield


@contextmanager
def _float64() -> Iterator[None]:
    with kernels.exact_sums(), Widen():
        yield


_RELEASED = Run(torch.bfloat16, None)
#: Arithmetic by the name of its numerics.
ARITHMETICS: Mapping[str, Arithmetic] = {
    "release": Arithmetic(
        numerics="release",
        dtype="bfloat16",
        quantized=True,
        golden=_RELEASED,
        noise={"bfloat16": dataclasses.replace(_RELEASED, around=_exact)},
        by_operation=True,
    ),
    "plain": Arithmetic(
        numerics="plain",
        dtype="float32",
        quantized=False,
        golden=Run(torch.float32, torch.float32),
        noise={"float32": Run(torch.float64, torch.float64, _float64), "bfloat16": _RELEASED},
        by_operation=False,
    ),
}

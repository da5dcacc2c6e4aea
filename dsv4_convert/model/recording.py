"""Recording (and replacing) intermediate activations while a model function is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
from jax import Array

from dsv4_convert.model.axes import constrain_tap


class Taps:
    """What the model calls at every tap (:mod:`dsv4_convert.spec.taps`). On a mesh the value is laid out by the tap's axes.

    The value passes through an optimisation barrier whether it is recorded or not. So the compiler sees the same
    boundaries in both cases, and the results with and without recording are bit-equal.

    ``forced`` replaces values: the model goes on with the given array instead of its own, which is still the one that
    is recorded. That is how a golden's discrete choice is followed, and how one operation is isolated.
    """

    def __init__(
        self, wanted: Callable[[str], bool] | None = None, forced: Mapping[str, Array] | None = None, prefix: str = ""
    ) -> None:
        self._wanted = wanted
        self._forced = forced or {}
        self._prefix = prefix
        #: Recorded activations by full name, in order of execution.
        self.values: dict[str, Array] = {}

    def within(self, prefix: str) -> Taps:
        """The same recording, for names below ``prefix`` (``layers.3.``)."""
        inner = Taps(self._wanted, self._forced, self._prefix + prefix)
        inner.values = self.values
        return inner

    def uses(self, name: str) -> bool:
        """Whether ``name`` is recorded or replaced. If not, the model need not have its value in one piece."""
        full = self._prefix + name
        return full in self._forced or (self._wanted is not None and self._wanted(full))

    def __call__(self, name: str, value: Array) -> Array:
        """Record ``value`` under ``name`` if it is wanted; return what the model goes on with."""
        full = self._prefix + name
        value = jax.lax.optimization_barrier(constrain_tap(full, value))
        if self._wanted is not None and self._wanted(full):
            self.values[full] = value
        if full not in self._forced:
            return value
        forced = self._forced[full]
        if forced.shape != value.shape:
            raise ValueError(f"{full}: forced value has shape {forced.shape}, the model computes {value.shape}")
        return forced.astype(value.dtype)

"""Recording (and replacing) intermediate activations while a model function is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
from jax import Array

from dsv4_convert.model.axes import constrain_tap


class Taps:
    """Called by the model with every named activation (:mod:`dsv4_convert.spec.taps`), which it records or replaces.

    The value passes through an optimisation barrier whether it is recorded or not. So the compiler sees the same
    boundaries in both cases, and the results with and without recording are bit-equal. On a mesh the value is laid out
    by the axes of its tap.

    ``overrides`` replaces values: the model continues with the given array, and its own is still recorded. Parity
    follows a golden's discrete choices, and isolates one operation, in this way.
    """

    def __init__(
        self,
        wanted: Callable[[str], bool] | None = None,
        overrides: Mapping[str, Array] | None = None,
        prefix: str = "",
    ) -> None:
        self._wanted = wanted
        self._overrides = overrides or {}
        self._prefix = prefix
        #: Recorded activations by full name, in order of execution.
        self.values: dict[str, Array] = {}

    def within(self, prefix: str) -> Taps:
        """The same recording, for names below ``prefix`` (``layers.3.``)."""
        inner = Taps(self._wanted, self._overrides, self._prefix + prefix)
        inner.values = self.values
        return inner

    def uses(self, name: str) -> bool:
        """Whether ``name`` is recorded or replaced. If not, the model may compute its value in chunks."""
        full = self._prefix + name
        return full in self._overrides or (self._wanted is not None and self._wanted(full))

    def __call__(self, name: str, value: Array) -> Array:
        """Record ``value`` under ``name`` if it is wanted; return the value that the model continues with."""
        full = self._prefix + name
        value = jax.lax.optimization_barrier(constrain_tap(full, value))
        if self._wanted is not None and self._wanted(full):
            self.values[full] = value
        if full not in self._overrides:
            return value
        override = self._overrides[full]
        if override.shape != value.shape:
            raise ValueError(f"{full}: the override has shape {override.shape}, the model computes {value.shape}")
        return override.astype(value.dtype)

"""Recording (and replacing) intermediate activations while a model function is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
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

    def overrides_of(self, prefixes: Sequence[str]) -> dict[str, Array]:
        """The replaced values below ``prefixes`` by their name below it, stacked in the order of the prefixes.

        Raises:
            ValueError: a value is replaced below some of the prefixes only.
        """
        full = [self._prefix + prefix for prefix in prefixes]
        names = dict.fromkeys(
            name.removeprefix(prefix) for prefix in full for name in self._overrides if name.startswith(prefix)
        )
        if partly := [name for name in names if any(prefix + name not in self._overrides for prefix in full)]:
            raise ValueError(
                f"{partly[0]}: scanned layers share a program, so all of {list(prefixes)} need an override"
            )
        return {name: jnp.stack([self._overrides[prefix + name] for prefix in full]) for name in names}

    def one_of(self, prefixes: Sequence[str], overrides: Mapping[str, Array]) -> Taps:
        """The recording below one of the ``prefixes``, whichever that is: a name is wanted if any of them wants it.

        ``overrides``: of that one, by name. Values are recorded under the first prefix.
        """
        first, *_ = full = [self._prefix + prefix for prefix in prefixes]
        wanted = self._wanted
        replaced = {first + name: value for name, value in overrides.items()}
        if wanted is None:
            return Taps(None, replaced, first)
        return Taps(lambda name: any(wanted(prefix + name.removeprefix(first)) for prefix in full), replaced, first)

    def record(self, name: str, value: Array) -> None:
        """Record a value that has been through its tap already, if it is wanted."""
        if self._wanted is not None and self._wanted(self._prefix + name):
            self.values[self._prefix + name] = value

    def uses(self, name: str) -> bool:
        """Whether ``name`` is recorded or replaced. If not, the model may compute its value in chunks."""
        full = self._prefix + name
        return full in self._overrides or (self._wanted is not None and self._wanted(full))

    def override(self, name: str) -> Array | None:
        """The value that replaces that of ``name``; None if none does."""
        return self._overrides.get(self._prefix + name)

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

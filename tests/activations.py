"""Comparing dsv4's activations with those of another implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsv4_convert.spec.tap import Values
from dsv4_convert.spec.taps import TapKey

Array = np.ndarray[Any, Any]


def differing(found: Mapping[str, Array], expected: Mapping[str, Array], limit: float) -> list[str]:
    """The taps of both that are not the same, by full name, in the order of ``found``.

    Choices have to be equal. ``limit``: relative error of the others, root mean square over root mean square.
    """
    return [name for name in found if name in expected and not _same(name, found[name], expected[name], limit)]


def _same(name: str, found: Array, expected: Array, limit: float) -> bool:
    if TapKey.parse(name).tap.values is Values.CHOICE:
        return np.array_equal(found, expected)
    wide = expected.reshape(found.shape).astype(np.float64)
    return bool(np.sqrt(np.mean((found - wide) ** 2)) <= limit * np.sqrt(np.mean(wide**2)))

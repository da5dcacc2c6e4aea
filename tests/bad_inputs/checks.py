"""Checks of the output that commands make of an odd but legal input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsv4_convert.store import Store, open_store

from .case import Place

Array = np.ndarray[Any, Any]


def _digests(store: Store) -> dict[str, str]:
    return {path: record.digest for path, record in store.manifest.leaves.items()}


def equals_healthy(place: Place) -> None:
    """Every byte is that of the healthy model's conversion."""
    found, healthy = _digests(open_store(place.dest)), _digests(open_store(place.bench.orbax(place.model)))
    assert found == healthy, sorted(path for path in {*found, *healthy} if found.get(path) != healthy.get(path))


def backbone_equals_healthy(place: Place) -> None:
    """As :func:`equals_healthy`, where the stages after the backbone are left out."""
    found = _digests(open_store(place.dest))
    healthy = {
        path: digest
        for path, digest in _digests(open_store(place.bench.orbax(place.model))).items()
        if not path.startswith("mtp.")
    }
    assert found == healthy


def stored(leaf: str, expected: Callable[[Place], Array]) -> Callable[[Place], None]:
    """A leaf has these numbers, bit for bit; NaN has no place here."""

    def check(place: Place) -> None:
        found, wanted = open_store(place.dest).read(leaf), expected(place)
        assert found.shape == wanted.shape, (found.shape, wanted.shape)
        assert found.tobytes() == wanted.astype(found.dtype).tobytes(), f"{leaf}: {found} instead of {wanted}"

    return check


def both(*checks: Callable[[Place], None]) -> Callable[[Place], None]:
    """All of them."""

    def check(place: Place) -> None:
        for one in checks:
            one(place)

    return check

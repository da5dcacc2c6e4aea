"""A conversion as the manifest of its checkpoint describes it: what every reader of one has to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.errors import BadInput
from dsv4_convert.files.strict_json import enumerated, shown
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Dialect


class Storage(StrEnum):
    """The values of ``--dtype``.

    Examples:
        >>> plan, summary = hf_to_orbax(Path("checkpoint"), "as-published", storage=Storage.SOURCE)
    """

    #: Half the size of float32, and exact for FP4 and FP8 weights with power-of-two scales.
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    #: The published bytes and scales as they are, in the published orientation: leaves ``.weight`` and ``.scale``.
    SOURCE = "source"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of converted weights; not defined for ``source``."""
        return {Storage.BFLOAT16: np.dtype(ml_dtypes.bfloat16), Storage.FLOAT32: np.dtype(np.float32)}[self]


class Layout(StrEnum):
    """The values of ``--layout``: whose parameter tree the store has."""

    #: The paths of :mod:`dsv4_convert.spec.names`.
    DSV4 = "dsv4"
    #: MaxText's tree, its layers stacked for ``scan_layers=True``.
    MAXTEXT = "maxtext"
    #: MaxText's tree for ``scan_layers=False``.
    MAXTEXT_UNSCANNED = "maxtext-unscanned"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """The subject and the form of a conversion.

    Attributes:
        config: the architecture.
        layers: the converted layers, ascending.
        source: the published checkpoint: its name, and what tells one revision from another.
        dropped: number of source tensors that were left out, by reason.
    """

    config: Config
    layers: tuple[int, ...]
    storage: Storage
    layout: Layout
    dialect: Dialect
    source: Mapping[str, Any]
    dropped: Mapping[str, int]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, where: str) -> Conversion:
        """Decode the metadata of a manifest; ``where`` names the file in messages.

        Raises:
            BadInput: not a conversion by dsv4, or an entry is missing, unknown or out of range.
        """
        if metadata.get("format") != "dsv4":
            raise BadInput(f"{where}: not a model that dsv4 converted (its manifest lacks format: dsv4)")
        try:
            config = Config.from_json(metadata.get("config"))
            return cls(
                config=config,
                layers=_layers(metadata.get("layers"), config.num_hidden_layers),
                storage=enumerated(metadata.get("storage"), Storage, field="storage"),
                layout=enumerated(metadata.get("layout"), Layout, field="layout"),
                dialect=enumerated(metadata.get("dialect"), Dialect, field="dialect"),
                source=_object(metadata, "source"),
                dropped=_counts(_object(metadata, "tensors"), "dropped"),
            )
        except (BadInput, ValueError) as error:
            raise BadInput(
                f"{where}: {error}; read it with the version of dsv4 that wrote it, or convert again"
            ) from None


def _object(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {shown(repr(value))}, expected an object")
    return value


def _counts(document: Mapping[str, Any], key: str) -> dict[str, int]:
    counts = _object(document, key)
    if not all(type(count) is int and count >= 0 for count in counts.values()):
        raise ValueError(f"{key} is {shown(repr(counts))}, expected a number of tensors for each reason")
    return counts


def _layers(value: object, count: int) -> tuple[int, ...]:
    layers = value if isinstance(value, list) else []
    if not layers or not all(type(layer) is int and 0 <= layer < count for layer in layers):
        raise ValueError(f"layers is {shown(repr(value))}, expected numbers below {count}")
    if layers != sorted(set(layers)):
        raise ValueError(f"layers is {shown(repr(value))}, expected ascending numbers")
    return tuple(layers)

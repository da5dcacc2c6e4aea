"""The kinds of layers of DeepSeek-V4.1."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Candidates(StrEnum):
    """The part of a layer in the two levels of the indexer's choice."""

    #: It chooses blocks of entries for itself and for the layers after it.
    SOURCE = "source"
    #: It chooses entries inside the blocks that the source chose.
    USER = "user"


class LayerKind(NamedTuple):
    """All that decides the operations of a layer.

    Attributes:
        ratio: tokens per compressed entry; 0 for a layer that attends to its window only.
        compresses: it makes the compressed keys and index keys that it and later layers attend to.
        indexes: it chooses entries for itself and later layers.
        candidates: its part in the choice of blocks; None without one.
        engram: the number of its engram among those of the model; None without one.
    """

    ratio: int
    compresses: bool
    indexes: bool
    candidates: Candidates | None
    engram: int | None

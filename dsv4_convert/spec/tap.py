"""The vocabulary of a table of taps: the named intermediate activations of an architecture.

The rows stand in :mod:`dsv4_convert.spec.v4.taps` and :mod:`dsv4_convert.spec.v41.taps`, in the order of execution, so
that "the first diverging tap" is the first diverging row. Names follow the parameters: ``attn.wq_a`` is the output of
the projection ``attn.wq_a``, ``attn.q_norm`` the output of that norm. A name means one tap: architectures that share
one have the same row. :mod:`dsv4_convert.spec.taps` has the keys that golden and reports speak of.

Shape letters: ``B`` batch, ``S`` query tokens, ``T`` compressed entries, ``N`` streams, ``D`` model width, ``R`` query
rank, ``H`` heads, ``C`` head width, ``W`` compressor width (2C in CSA layers, whose entries overlap), ``Hi`` and ``Ci``
heads and head width of the indexer, ``k`` chosen entries, ``G`` output groups, ``O`` output rank per group,
``E`` experts, ``K`` experts per token, ``V`` vocabulary. Other letters belong to one architecture, whose config knows
their sizes (``tap_sizes``). The state after a prompt has three more: ``w`` keys that the
next token's window reaches, ``p`` tokens of the incomplete block, ``r`` tokens of the last complete block.

DSpark's stages draft one block of tokens, which follows the prompt: its first token is the prompt's last one. There
``S`` are the tokens of the block, and ``M`` the known tokens before it. ``L`` target layers, ``Rm`` rank of the Markov
head, ``1`` drafted token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import StrEnum
from typing import Any


class Values(StrEnum):
    """How a tap is compared."""

    #: Real numbers, under a tolerance.
    REAL = "real"
    #: Chosen indices, compared as a set per token; stored ascending, -1 (none) last.
    CHOICE = "choice"


@dataclasses.dataclass(frozen=True, eq=False)
class Where:
    """The layers and stages that have a tap, in words and as a condition on config and layer number.

    ``of_model``: the model level has it. A stage may have either end of the model for itself: embeddings, and a head.
    """

    label: str
    of_layer: Callable[[Any, int], bool]
    of_model: bool = False

    def holds(self, config: Any, layer: int | None) -> bool:
        """Whether ``layer``, which may be that of a stage (None: the model level), has the tap."""
        return self.of_model if layer is None else self.of_layer(config, layer)


BEFORE = Where("model, before the layers", lambda config, layer: config.embeds(layer), of_model=True)
AFTER = Where("model, after the layers", lambda config, layer: config.has_head(layer), of_model=True)
LAYER = Where("every layer", lambda config, layer: True)


@dataclasses.dataclass(frozen=True, eq=False)
class TapOrigin:
    """The tap of an earlier layer whose values a layer starts from: its name, and that layer by config and layer.

    A layer number of -1 stands for the embedding. ``stacked``: it starts from several layers' values, which go with
    that of the last one.
    """

    tap: str
    of_layer: Callable[[Any, int], int]
    stacked: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Tap:
    """One row: name within its layer, shape letters, meaning. There is one object per row, so identity is equality."""

    name: str
    shape: str
    meaning: str
    where: Where = LAYER
    values: Values = Values.REAL
    #: For a choice: the tap that holds the scores it was chosen by.
    scores: str | None = None
    #: For a choice among blocks of these candidates (``config.entries_per_candidate``), each as good as its best one.
    of_blocks: bool = False
    #: Parameters that its operation uses itself, named as in its layer; those that a layer lacks do not count.
    weights: tuple[str, ...] = ()
    #: For an input of a layer: where its values come from.
    origin: TapOrigin | None = None

    @property
    def is_state(self) -> bool:
        """Whether it belongs to the state that a layer keeps between calls."""
        return self.name.startswith("cache.")

"""Faults of the names table: a row that names another tensor, or another transform."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from dsv4_convert.spec.names import Rule, Transform
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.spec.v4.names import NAMES

from .fault import CSA, Fault

_PREFIX = "layers.{}."


@contextmanager
def _changed(change: Callable[[Rule], Rule]) -> Iterator[None]:
    """The table with rows replaced, wherever it is read."""
    table = dataclasses.replace(NAMES, rules=tuple(map(change, NAMES.rules)))
    with patch.object(V4Config, "names", table):
        yield


def _swapped(one: str, other: str) -> Callable[[], Any]:
    """Two rows with each other's tensor."""
    rows = {rule.path: rule for rule in NAMES.rules}
    partner = {_PREFIX + one: rows[_PREFIX + other], _PREFIX + other: rows[_PREFIX + one]}

    def change(rule: Rule) -> Rule:
        if rule.path not in partner:
            return rule
        return dataclasses.replace(rule, published=partner[rule.path].published)

    return lambda: _changed(change)


def _untransposed(path: str) -> Callable[[], Any]:
    """A square matrix whose row says that it is stored as the model has it."""

    def change(rule: Rule) -> Rule:
        return dataclasses.replace(rule, transform=Transform.NONE) if rule.path == _PREFIX + path else rule

    return lambda: _changed(change)


TABLES: tuple[Fault, ...] = (
    Fault(name="table: w1 and w3 of the experts", layer=0, tap="ffn.experts", also=(1, 2, 3),
          table=_swapped("ffn.experts.w1", "ffn.experts.w3")),
    Fault(name="table: wkv and wgate of the compressor", layer=CSA, tap="attn.compressor.wkv", also=(2, 3),
          table=_swapped("attn.compressor.wkv", "attn.compressor.wgate")),
    Fault(name="table: wkv and wgate of the indexer's compressor", layer=CSA, tap="attn.indexer.compressor.wkv",
          also=(3,), table=_swapped("attn.indexer.compressor.wkv", "attn.indexer.compressor.wgate")),
    Fault(name="table: hyper-connections of both halves", layer=0, tap="hc_attn.pre", also=(1, 2, 3),
          table=_swapped("hc_attn_base", "hc_ffn_base")),
    Fault(name="table: attn_norm and ffn_norm", layer=0, tap="attn_norm", also=(1, 2, 3),
          table=_swapped("attn_norm", "ffn_norm")),
    Fault(name="table: shared expert's w1 not transposed", layer=0, tap="ffn.shared_experts", also=(1, 2, 3),
          table=_untransposed("ffn.shared_experts.w1")),
    Fault(name="table: wq_a not transposed", layer=0, tap="attn.wq_a", also=(1, 2, 3),
          table=_untransposed("attn.wq_a")),
)  # fmt: skip

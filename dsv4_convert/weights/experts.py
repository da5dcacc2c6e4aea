"""Routed experts out of a checkpoint as they are chosen: read by threads ahead of their use, the last used kept.

An expert is whatever the caller's ``read`` makes of one: its matrices decoded, or as codes.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from dsv4_convert.weights.parameters import Array

if TYPE_CHECKING:
    from dsv4_convert.model.block import Routed
    from dsv4_convert.model.numerics import Numerics

T = TypeVar("T")
#: The matrices of an expert.
MATRICES = ("w1", "w2", "w3")
#: Experts that are read at once.
_AHEAD = 4
#: Calls of :func:`routed_sum` whose results are not added yet.
_PENDING = 2


@dataclasses.dataclass
class Requests:
    """How many experts were asked for, and how many were read for that."""

    asked: int = 0
    read: int = 0


class ExpertCache(Generic[T]):
    """Experts by layer and number; those used last stay. One thread asks, others read."""

    def __init__(self, read: Callable[[int, int], T], *, capacity: int = 2) -> None:
        """``read`` makes an expert of a layer, in any thread; ``capacity`` experts are in memory at most.

        That is besides those which the caller still holds.
        """
        if capacity < 1:
            raise ValueError(f"a cache of {capacity} experts: expected one at least")
        self.requests = Requests()
        self._read, self._capacity = read, capacity
        self._ahead = min(_AHEAD, capacity)
        self._experts: OrderedDict[tuple[int, int], Future[T]] = OrderedDict()
        self._pool = ThreadPoolExecutor(self._ahead, thread_name_prefix="dsv4-experts")

    def each(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, T]]:
        """Experts of a layer in the order given; while one is used, the next are read.

        Raises what ``read`` raises.
        """
        for place, expert in enumerate(experts):
            self._ask(layer, experts[place:])
            self.requests.asked += 1
            try:
                found = self._experts[layer, expert].result()
            except BaseException:
                self._experts.pop((layer, expert), None)
                raise
            self._experts.move_to_end((layer, expert))
            yield expert, found

    def _ask(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read the first of the experts that are not here, in the place of those used longest ago."""
        soon = [(layer, expert) for expert in experts[: self._ahead]]
        later = {(layer, expert) for expert in experts}
        for key in soon:
            if key in self._experts:
                continue
            if len(self._experts) >= self._capacity:
                unused = (old for old in self._experts if old not in later)
                self._experts.pop(next(unused, None) or next(old for old in self._experts if old not in soon)).cancel()
            self._experts[key] = self._pool.submit(self._read, *key)
            self.requests.read += 1


def routed_sum(
    routed: Routed,
    used: Array,
    each: Callable[[list[int]], Iterator[tuple[int, Sequence[Any]]]],
    *,
    last: int,
    limit: float,
    numerics: Numerics,
) -> Array:
    """The routed experts' weighted sum, float32 ``[B * S, D]``, of the experts that ``each`` gives.

    Args:
        routed: input and routing of the experts, ``[B, S, …]``.
        used: which tokens are computed, bool ``[B, S]``; the sum of the others is 0.
        each: for the chosen experts in ascending order, an iterator over experts with their matrices, arrays or codes.
        last: the last expert. One that does not exist is the nearest that does, as XLA's gather has it; the choice
            itself is reported.
        limit: of the clamped SwiGLU.
        numerics: the model's.
    """
    x = np.asarray(routed.x)
    flat, tokens_used = x.reshape(-1, x.shape[-1]), used.reshape(-1, 1)
    experts = np.clip(np.asarray(routed.routing.experts), 0, last).reshape(len(flat), -1)
    shares = np.asarray(routed.routing.weights).reshape(len(flat), -1)
    total = np.zeros(flat.shape, np.float32)
    pending: deque[tuple[Array, Any]] = deque()

    def add() -> None:
        tokens, output = pending.popleft()
        np.add.at(total, tokens, np.asarray(output)[: len(tokens)])

    for expert, matrices in each(np.unique(experts[tokens_used[:, 0]]).tolist()):
        tokens, slots = np.nonzero((experts == expert) & tokens_used)
        rows = _padded_rows(len(tokens), matrices)
        padded, share = np.zeros((rows, flat.shape[1]), flat.dtype), np.zeros(rows, np.float32)
        padded[: len(tokens)], share[: len(tokens)] = flat[tokens], shares[tokens, slots]
        pending.append((tokens, _expert()(padded, share, *matrices, limit, numerics)))
        if len(pending) >= _PENDING:
            add()
    while pending:
        add()
    return total


def _padded_rows(count: int, matrices: Sequence[Any]) -> int:
    """The next power of two, so that few programs serve every number of rows.

    Two at least for arrays, as XLA on CPU sums the product of a single row in sequence, at a third of the accuracy.
    """
    return max(2 if isinstance(matrices[0], np.ndarray) else 1, 1 << (count - 1).bit_length())


@cache
def _expert() -> Callable[..., Any]:
    """The program of one expert."""
    import jax

    from dsv4_convert.model.experts import weighted

    return jax.jit(weighted, static_argnums=(5, 6))

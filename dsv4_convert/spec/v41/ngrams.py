"""How V4.1 hashes n-grams of tokens to the rows of its engram tables."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np

from dsv4_convert.spec.v41.config import EngramConfig

#: Seed of the multipliers of an engram, times its layer.
_SEED = 10007


@dataclasses.dataclass(frozen=True)
class NgramHash:
    """The numbers of one engram's hash.

    Attributes:
        multipliers: one for each token of the longest n-gram, the last token first.
        primes: rows of each part of the table: for 2-grams of every head, then for 3-grams, and so on.
        offsets: the row at which each part begins.
    """

    multipliers: tuple[int, ...]
    primes: tuple[int, ...]
    offsets: tuple[int, ...]


@functools.cache
def ngram_hash(engram: EngramConfig, index: int) -> NgramHash:
    """The hash of the engram number ``index`` of the config.

    Multipliers are odd random numbers of the layer's own, below the largest int64 by any mapped id. Primes are searched
    from ``vocab_size`` on, from the start again for every length of n-gram; none is used twice, in any engram.
    """
    table = engram.tables[index]
    largest = np.iinfo(np.int64).max // engram.compressed_vocab_size // 2
    drawn = np.random.default_rng(_SEED * engram.published_layer_ids[table]).integers(
        0, max(1, largest), engram.max_ngram_size, dtype=np.int64
    )
    taken: dict[int, None] = {}
    for _ in range((table + 1) * (engram.max_ngram_size - 1)):
        fresh = (number for number in itertools.count(engram.vocab_size) if number not in taken and _is_prime(number))
        taken |= dict.fromkeys(itertools.islice(fresh, engram.n_heads))
    primes = tuple(taken)[table * engram.columns :]
    offsets = (0, *itertools.accumulate(primes[:-1]))
    return NgramHash(tuple(2 * int(number) + 1 for number in drawn), primes, offsets)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))

"""How V4.1 hashes n-grams of tokens to the rows of its engram tables."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from dsv4_convert.spec.config import Count

#: Seed of the multipliers of an engram, times its layer.
_SEED = 10007
#: Numbers that are searched for primes at once.
_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngramConfig:
    """The n-gram tables: the published fields ``engram_…``.

    A model with some of the layers has some of the tables. How a table is hashed depends on its place in the published
    model, so ``tables`` are the numbers of those that are there, and ``published_layer_ids`` the layers of all.
    """

    layer_ids: tuple[Count, ...]
    num_embeddings: tuple[int, ...]
    tables: tuple[Count, ...]
    published_layer_ids: tuple[Count, ...]
    max_ngram_size: int
    vocab_size: int
    n_heads: int
    head_dim: int
    pad_token_id: Count
    compressed_vocab_size: int

    @property
    def columns(self) -> int:
        """Rows that are looked up for one token: one per n-gram size and head."""
        return (self.max_ngram_size - 1) * self.n_heads


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

    Multipliers are odd random numbers of the layer's own, below the largest int64 by any mapped id. Primes are those
    from ``vocab_size`` on, each used once: for the 2-grams of every head of the first engram, then for its 3-grams, and
    so on through all engrams.
    """
    import numpy as np  # the shell's completion reads configs without it

    table = engram.tables[index]
    largest = np.iinfo(np.int64).max // engram.compressed_vocab_size // 2
    drawn = np.random.default_rng(_SEED * engram.published_layer_ids[table]).integers(
        0, max(1, largest), engram.max_ngram_size, dtype=np.int64
    )
    first = table * engram.columns
    primes = tuple(itertools.islice(_primes(engram.vocab_size), first, first + engram.columns))
    offsets = (0, *itertools.accumulate(primes[:-1]))
    return NgramHash(tuple(2 * int(number) + 1 for number in drawn), primes, offsets)


def misstated_rows(engram: EngramConfig) -> Iterator[str]:
    """The tables that do not have a row for each remainder of their primes, each as a problem of the field."""
    for index, stated in enumerate(engram.num_embeddings):
        columns, table = engram.columns, engram.tables[index]
        # Primes are distinct, so wild sizes are refused before there is a search for many of them.
        least = columns * (engram.vocab_size + table * columns) + columns * (columns - 1) // 2
        expected = sum(ngram_hash(engram, index).primes) if least <= stated else None
        if stated != expected:
            wanted = f"at least {least:,}" if expected is None else f"{expected:,}"
            yield (
                f"engram_num_embeddings: expected {wanted} rows in the table of layer {engram.layer_ids[index]}, the "
                f"sum of its {columns} primes from engram_vocab_size {engram.vocab_size:,} on, found {stated:,}"
            )


def _primes(first: int) -> Iterator[int]:
    """All primes from ``first`` on."""
    import numpy as np

    for start in itertools.count(max(first, 2), _BLOCK):
        prime = np.ones(_BLOCK, bool)
        for divisor in range(2, math.isqrt(start + _BLOCK) + 1):
            multiple = max(divisor * divisor, -(-start // divisor) * divisor)
            prime[multiple - start :: divisor] = False
        yield from (start + np.flatnonzero(prime)).tolist()

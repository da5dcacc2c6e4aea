"""A small stand-in for V4.1's `inference/engram.py`: n-grams of mapped tokens, hashed to rows of tables."""

from __future__ import annotations

import itertools
import math
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class EngramLayout:
    """Where the parts of the tables are: `primes[table][size of n-gram][head]` rows each."""

    layer_ids: tuple[int, ...]
    num_embeddings: tuple[int, ...]
    primes: tuple[tuple[tuple[int, ...], ...], ...]
    head_dim: int
    max_ngram_size: int

    @classmethod
    def from_args(cls, args: Any) -> EngramLayout | None:
        if not args.engram_layer_ids:
            return None
        taken: set[int] = set()
        tables = []
        for _ in args.engram_layer_ids:
            sizes = []
            for _ in range(2, args.engram_max_ngram_size + 1):
                primes = []
                for number in itertools.count(args.engram_vocab_size):
                    if len(primes) == args.engram_n_heads:
                        break
                    if number not in taken and all(number % divisor for divisor in range(2, math.isqrt(number) + 1)):
                        primes.append(number)
                        taken.add(number)
                sizes.append(tuple(primes))
            tables.append(tuple(sizes))
        ids, rows = tuple(args.engram_layer_ids), tuple(args.engram_num_embeddings)
        return cls(ids, rows, tuple(tables), args.engram_head_dim, args.engram_max_ngram_size)


def _plain(text: str) -> str:
    """The text without case and accents."""
    letters = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).lower().strip()


class NgramHashState(nn.Module):
    """The rows that the n-grams ending with each token are hashed to; the tokens seen are remembered."""

    def __init__(self, args: Any, layout: EngramLayout, tokenizer: Any) -> None:
        super().__init__()
        self.layout = layout
        ids: dict[str, int] = {}
        texts = (
            tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False) for token in range(len(tokenizer))
        )
        self.token_map = torch.tensor([ids.setdefault(_plain(text), len(ids)) for text in texts])
        assert len(ids) == args.engram_compressed_vocab_size
        self.pad = int(self.token_map[args.engram_pad_id])
        bound = np.iinfo(np.int64).max // len(ids) // 2
        self.multipliers = torch.stack(
            [
                2 * torch.from_numpy(np.random.default_rng(10007 * layer).integers(0, bound, layout.max_ngram_size)) + 1
                for layer in layout.layer_ids
            ]
        )
        self.seen = torch.zeros(args.max_batch_size, args.max_seq_len, dtype=torch.int64)

    def forward(self, input_ids: Tensor, start_pos: int) -> Tensor:
        """Rows [b, s, tables, columns]."""
        batch, tokens = input_ids.shape
        self.seen[:batch, start_pos : start_pos + tokens] = self.token_map[input_ids]
        positions = torch.arange(start_pos, start_pos + tokens)
        joined, found = torch.zeros(batch, tokens, 1, dtype=torch.int64), []
        for back in range(self.layout.max_ngram_size):
            earlier = self.seen[:batch, (positions - back).clamp(min=0)]
            token = torch.where(positions < back, self.pad, earlier)
            joined = joined ^ (token[..., None] * self.multipliers[:, back])
            if back:
                primes = torch.tensor([table[back - 1] for table in self.layout.primes])
                found.append(joined[..., None] % primes)
        flat = torch.tensor([[prime for size in table for prime in size] for table in self.layout.primes])
        return torch.cat(found, dim=-1) + flat.cumsum(dim=-1) - flat

"""Queries in runs, one run after the other, so that memory grows with the prompt and not with its square.

Shape letters: ``B`` batch, ``S`` tokens, ``R`` runs, ``Q`` tokens of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def by_runs(function: Callable[..., Any], longest: int, *rows: Shaped[Array, "B S ..."]) -> Any:
    """``function(first, *run)`` on every run of tokens, its results ``[B, Q, ...]`` put together to ``[B, S, ...]``.

    Runs are of equal length, ``longest`` at most. ``first`` is the index of a run's first token; the last run may be
    padded with zeros.
    """
    tokens = rows[0].shape[1]
    runs = -(-tokens // longest)
    if runs == 1:
        return function(jnp.zeros((), jnp.int32), *rows)
    length = -(-tokens // runs)
    split = [_split(part, runs, length) for part in rows]
    found = jax.lax.map(lambda run: function(*run), (length * jnp.arange(runs, dtype=jnp.int32), *split))
    return jax.tree.map(lambda part: _joined(part)[:, :tokens], found)


def _split(rows: Shaped[Array, "B S *rest"], runs: int, length: int) -> Shaped[Array, "R B Q *rest"]:
    batch, tokens, *rest = rows.shape
    padded = jnp.pad(rows, ((0, 0), (0, runs * length - tokens), *((0, 0) for _ in rest)))
    return jnp.moveaxis(padded.reshape(batch, runs, length, *rest), 1, 0)


def _joined(rows: Shaped[Array, "R B Q *rest"]) -> Shaped[Array, "B Y *rest"]:
    runs, batch, length, *rest = rows.shape
    return jnp.moveaxis(rows, 0, 1).reshape(batch, runs * length, *rest)

"""Which arrays a golden holds, in which shapes: follows from the architecture, the layers and the number of tokens.

Names, order and shape letters come from :mod:`dsv4_convert.taps` alone; this module puts numbers to the letters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dsv4_convert.config import Attention, Config
from dsv4_convert.taps import Tap, Values, Where, full_name, taps_of
from golden.compact import Compact, exact_name, sketch_name
from golden.noise import noise_name, noise_shape

#: Stored dtype of a tap by how it is compared.
DTYPES: dict[Values, np.dtype[np.generic]] = {
    Values.REAL: np.dtype(np.float32),
    Values.CHOICE: np.dtype(np.int32),
}


class StoredShape(NamedTuple):
    """What a stored array has to be; ``layer`` is None at the model level."""

    layer: int | None
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


INPUT = "input"
STREAMS = "hc_ffn.streams"


def tap_shape(tap: Tap, config: Config, layer: int | None, *, batch: int, tokens: int) -> tuple[int, ...]:
    """The numbers behind ``tap.shape`` for ``batch`` prompts of ``tokens`` tokens; model-level taps have no layer."""
    kind = config.attention[layer] if layer is not None else Attention.SLIDING
    ratio = config.ratio(kind)
    entries = tokens // ratio if ratio else 0  # a block that is not complete makes no entry
    sizes = {
        "B": batch,
        "S": tokens,
        "T": entries,
        "N": config.hc_mult,
        "D": config.hidden_size,
        "R": config.q_lora_rank,
        "H": config.num_attention_heads,
        "C": config.head_dim,
        "W": config.head_dim * (2 if kind is Attention.CSA else 1),
        "Hi": config.index_n_heads,
        "Ci": config.index_head_dim,
        "2Ci": 2 * config.index_head_dim,
        "k": min(config.index_topk, entries),
        "G": config.o_groups,
        "O": config.o_lora_rank,
        "E": config.n_routed_experts,
        "K": config.num_experts_per_tok,
        "V": config.vocab_size,
    }
    return tuple(sizes[letter] for letter in tap.shape.split())


def expected_taps(config: Config, layers: Sequence[int]) -> Iterator[tuple[str, Tap, int | None]]:
    """Every tap of a golden of these layers, in order of execution: full name, tap, layer.

    The head can run only when the last layer did, so its taps are there exactly when that layer is among ``layers``.
    """
    model = taps_of(config, None)
    for tap in model:
        if tap.where is Where.BEFORE:
            yield full_name(tap, None), tap, None
    for layer in layers:
        for tap in taps_of(config, layer):
            yield full_name(tap, layer), tap, layer
    if config.num_hidden_layers - 1 in layers:
        for tap in model:
            if tap.where is Where.AFTER:
                yield full_name(tap, None), tap, None


def stored_arrays(
    config: Config,
    layers: Sequence[int],
    noise: Sequence[str],
    compact: Compact | None = None,
    *,
    batch: int,
    tokens: int,
) -> dict[str, StoredShape]:
    """Every array of a golden by its stored name: the taps in order of execution, each followed by its noise.

    ``noise`` are the dtypes whose noise floor is there; choices have none. With ``compact`` a tap may be a sketch and
    some rows (:mod:`golden.compact`) instead of itself.
    """
    arrays = {}
    for name, tap, layer in expected_taps(config, layers):
        shape = tap_shape(tap, config, layer, batch=batch, tokens=tokens)
        dtype = DTYPES[tap.values]
        if compact is None or kept_whole(tap, shape, compact):
            arrays[name] = StoredShape(layer, dtype, shape)
        else:
            arrays[sketch_name(name)] = StoredShape(layer, dtype, (*shape[:2], 1 + compact.numbers))
            if rows := exact_rows(tap, config, layer, compact):
                arrays[exact_name(name)] = StoredShape(layer, dtype, (shape[0], len(rows), *shape[2:]))
        if noise and tap.values is Values.REAL:
            arrays[noise_name(name)] = StoredShape(layer, dtype, noise_shape(shape, len(noise)))
    return arrays


def kept_whole(tap: Tap, shape: Sequence[int], compact: Compact) -> bool:
    """Whether a compact golden keeps a tap of this shape as it is."""
    return tap.values is Values.CHOICE or compact.whole(shape)


def exact_rows(tap: Tap, config: Config, layer: int | None, compact: Compact) -> tuple[int, ...]:
    """The rows of axis 1 that a compact golden keeps exactly of a tap that it does not keep whole."""
    of_entries = layer is not None and tap.shape.split()[1] == "T"
    return compact.rows(block=config.ratio(config.attention[layer]) if of_entries and layer is not None else 1)


def expected_aliases(layers: Sequence[int], arrays: Iterable[str]) -> dict[str, str]:
    """Arrays that are the same as another one, and so are stored once: a layer's input is the streams before it.

    ``arrays`` are the stored names of all arrays.
    """
    there = set(arrays)
    aliases = {}
    for layer in layers:
        for spell in (str, sketch_name, exact_name):
            mine, its = spell(f"layers.{layer}.{INPUT}"), spell(f"layers.{layer - 1}.{STREAMS}")
            if mine in there and its in there:
                aliases[mine] = its
    return aliases

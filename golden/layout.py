"""The arrays of a golden and their shapes, derived from architecture, layers and number of tokens.

Names, order and shape letters come from :mod:`dsv4_convert.spec.taps` alone; this module puts numbers to the letters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsv4_convert.golden.compact import Compact, exact_name, sketch_name
from dsv4_convert.golden.noise import Mode, noise_name, noise_shape
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.tap import AFTER, BEFORE, LAYER, Tap, Values
from dsv4_convert.spec.taps import TapKey, state_of, tap_named, taps_of

Array = np.ndarray[Any, Any]

#: Stored dtype of a tap by how it is compared.
DTYPES: dict[Values, np.dtype[np.generic]] = {
    Values.REAL: np.dtype(np.float32),
    Values.CHOICE: np.dtype(np.int32),
}


class StoredShape(NamedTuple):
    """Expected layer (None at the model level), dtype and shape of a stored array."""

    layer: int | None
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


INPUT, STREAMS, TOKENS = tap_named("input"), tap_named("hc_ffn.streams"), tap_named("tokens")


def entering(config: Config, layer: int) -> tuple[TapKey, ...]:
    """The taps that a layer or stage starts from, streams first."""
    keys = (TapKey.of(config, layer, tap) for tap in taps_of(config, layer))
    return tuple(key for key in keys if _enters(key))


def origin_of(config: Config, key: TapKey) -> TapKey:
    """The tap of an earlier layer that has the values of one of :func:`entering`."""
    assert key.tap.origin is not None
    assert key.layer is not None
    return TapKey.of(config, key.tap.origin.of_layer(config, key.layer), key.tap.origin.tap)


def entering_head(config: Config) -> dict[str, TapKey]:
    """The taps that leave the last layer for the head, by the name with which they would enter one more layer."""
    after = config.num_hidden_layers
    carried = [tap for tap in config.taps if tap.origin is not None and tap.where is LAYER]
    return {tap.name: origin_of(config, TapKey(after, tap)) for tap in carried}


def carried(config: Config, layer: int | None) -> dict[str, TapKey]:
    """The taps that a layer or stage starts from, or the head (None), by the names by which they are carried to it.

    That is the name of the tap in the layer that made it, whatever layer that is.
    """
    if layer is None:
        return {key.tap.name: key for key in entering_head(config).values()}
    keys = [(key, key.tap.origin) for key in entering(config, layer)]
    return {key.tap.name if origin.stacked else origin.tap: key for key, origin in keys if origin is not None}


def is_fed(key: TapKey, mode: Mode) -> bool:
    """Whether a model is given the golden's own value of a tap, so that comparing the two says nothing."""
    return mode is Mode.ISOLATED and _enters(key)


def known_tokens(tokens: int) -> int:
    """How many tokens of a prompt DSpark knows: all but the last one, with which the drafted block begins."""
    return max(tokens - 1, 0)


def _enters(key: TapKey) -> bool:
    """Whether a layer or stage starts from a tap. A stage makes itself what every layer starts from."""
    return key.tap.origin is not None and (key.stage is None or key.tap.where is not LAYER)


def token_ids(tokens: Array, config: Config, layer: int | None) -> Array:
    """The ids ``[B, S]`` that a layer is given with its streams: the prompt's; in a stage those after them.

    The n-th mtp stage has the ids of n tokens further on, as it drafts the token after these. Behind the prompt's end
    there is token 0, which no earlier position sees. DSpark's stages have a block: the prompt's last token, and noise.
    """
    if layer is None or layer not in config.stage_layers:
        return tokens
    if config.dspark is not None:
        noise = config.dspark.block_size - 1
        return np.pad(tokens[:, -1:], ((0, 0), (0, noise)), constant_values=config.dspark.noise_token_id)
    ahead = min(layer - config.num_hidden_layers + 1, tokens.shape[1])
    return np.pad(tokens[:, ahead:], ((0, 0), (0, ahead)))


def calls(tokens: int, decode: int) -> list[tuple[int, int]]:
    """The tokens ``start:stop`` of each call: all but the last ``decode`` at once, then these one by one."""
    prefill = tokens - decode
    return [(0, prefill), *((token, token + 1) for token in range(prefill, tokens))]


def tap_shape(key: TapKey, config: Config, *, batch: int, tokens: int, decode: int = 0) -> tuple[int, ...]:
    """The sizes of a tap for ``batch`` prompts of ``tokens`` tokens.

    A tap of the state has its shape at the end of the prefill, before the ``decode`` tokens.
    """
    ratio = 0 if key.layer is None else config.ratio_of(key.layer)
    entries = tokens // ratio if ratio else 0  # an incomplete block makes no entry
    sizes = {
        "B": batch,
        "S": tokens,
        "T": entries,
        "N": config.hc_mult,
        "D": config.hidden_size,
        "R": config.q_lora_rank,
        "H": config.num_attention_heads,
        "C": config.head_dim,
        "W": 0 if key.layer is None else config.compressor_width(key.layer),
        "Hi": config.index_n_heads,
        "Ci": config.index_head_dim,
        "2Ci": 2 * config.index_head_dim,
        "k": min(config.index_topk, entries),
        "G": config.o_groups,
        "O": config.o_lora_rank,
        "E": config.experts_of(key.layer),
        "K": config.chosen_experts_of(key.layer),
        "V": config.vocab_size,
        "1": 1,
        "w": min(config.sliding_window - 1, tokens - decode),
        "p": (tokens - decode) % ratio if ratio else 0,
        "r": ratio if tokens - decode >= ratio else 0,
        **config.tap_sizes(entries),
    }
    if config.dspark is not None and config.drafts_blocks(key.layer):
        targets = len(config.dspark.target_layer_ids)
        sizes |= {"S": config.dspark.block_size, "M": known_tokens(tokens), "Rm": config.dspark.markov_rank}
        sizes |= {"L": targets, "LD": targets * config.hidden_size, "w": min(sizes["w"], sizes["M"])}
    return tuple(sizes[letter] for letter in key.tap.shape.split())


def rows_of(key: TapKey, config: Config, start: int, stop: int) -> range:
    """The rows of axis 1 that tokens ``start:stop`` make of a tap; not defined for the state."""
    if is_drafted(key, config):
        assert config.dspark is not None
        return range(config.dspark.block_size)
    ratio = tokens_of_row(key, config)
    return range(start // ratio, stop // ratio)


def is_drafted(key: TapKey, config: Config) -> bool:
    """Whether the rows of axis 1 are tokens of a drafted block, which every call makes anew."""
    return config.drafts_blocks(key.layer) and key.tap.shape.split()[1] == "S"


def of_entries(key: TapKey) -> bool:
    """Whether the rows of a tap are compressed entries."""
    return key.tap.shape.split()[1] == "T"


def tokens_of_row(key: TapKey, config: Config) -> int:
    """The number of tokens that make a row of axis 1: 1, or those of a compressed entry; not defined for the state."""
    if not of_entries(key) or key.layer is None:
        return 1
    return config.ratio_of(key.layer)


def part_shape(key: TapKey, config: Config, *, batch: int, start: int, stop: int) -> tuple[int, ...]:
    """The shape of the part of a tap that a call on tokens ``start:stop`` makes: its rows, and all entries so far."""
    shape = tap_shape(key, config, batch=batch, tokens=stop)
    return (shape[0], len(rows_of(key, config, start, stop)), *shape[2:])


def part_of(whole: Array, rows: range, shape: Sequence[int]) -> Array:
    """The part of a tap that one call makes: some rows, and of the other axes as much as there is by then."""
    return whole[:, rows.start : rows.stop, *(slice(size) for size in shape[2:])]


def joined(parts: Sequence[Array], shape: Sequence[int]) -> Array:
    """The parts of a tap, one after the other. An entry that was not there yet has score 0, and is not chosen (-1)."""

    if len(parts) == 1:  # all of it; not copied, since a tap may be large
        return parts[0]

    def padded(part: Array) -> Array:
        missing = [size - have for size, have in zip(shape[2:], part.shape[2:], strict=True)]
        nothing = 0 if part.dtype.kind == "f" else -1
        return np.pad(part, [(0, 0), (0, 0), *((0, count) for count in missing)], constant_values=nothing)

    return np.concatenate([padded(part) for part in parts], axis=1)


def expected_taps(config: Config, layers: Sequence[int], *, decode: int = 0) -> Iterator[TapKey]:
    """Every tap of a golden of these layers and stages, in order of execution.

    With tokens to ``decode`` one by one, each layer's state before the first of them comes after its taps. The head can
    run only when the last layer did, so its taps are there exactly when that layer is among ``layers``.
    """
    ends = taps_of(config, None)
    yield from (TapKey(None, tap) for tap in ends if tap.where is BEFORE)
    for part in parts(config, layers):
        if part is not None:
            taps = (*taps_of(config, part), *(state_of(config, part) if decode else ()))
        else:
            taps = ends if config.num_hidden_layers - 1 in layers else ()
        yield from (TapKey.of(config, part, tap) for tap in taps if part is not None or tap.where is AFTER)


def parts(config: Config, layers: Sequence[int]) -> tuple[int | None, ...]:
    """Layers, the model level (None) and stages, in the order in which a golden has them: the head before a stage."""
    backbone = tuple(layer for layer in layers if layer not in config.stage_layers)
    return (*backbone, None, *(layer for layer in layers if layer in config.stage_layers))


def stored_arrays(
    config: Config,
    layers: Sequence[int],
    noise: Sequence[str],
    compact: Compact | None = None,
    *,
    batch: int,
    tokens: int,
    decode: int = 0,
) -> dict[str, StoredShape]:
    """Every array of a golden by its stored name: the taps in order of execution, each followed by its noise.

    ``noise`` are the dtypes whose noise floor is there; choices have none. With ``compact`` a tap may be a sketch and
    some rows (:mod:`dsv4_convert.golden.compact`) instead of itself.
    """
    arrays = {}
    for key in expected_taps(config, layers, decode=decode):
        shape = tap_shape(key, config, batch=batch, tokens=tokens, decode=decode)
        name, layer, dtype = str(key), key.layer, DTYPES[key.tap.values]
        if compact is None or kept_whole(key.tap, shape, compact):
            arrays[name] = StoredShape(layer, dtype, shape)
        else:
            arrays[sketch_name(name)] = StoredShape(layer, dtype, (*shape[:2], 1 + compact.numbers))
            if rows := exact_rows(key, config, compact, shape[1]):
                arrays[exact_name(name)] = StoredShape(layer, dtype, (shape[0], len(rows), *shape[2:]))
        if noise and key.tap.values is Values.REAL:
            arrays[noise_name(name)] = StoredShape(layer, dtype, noise_shape(shape, len(noise)))
    return arrays


def kept_whole(tap: Tap, shape: Sequence[int], compact: Compact) -> bool:
    """Whether a compact golden keeps a tap of this shape whole."""
    return tap.values is Values.CHOICE or compact.whole(shape)


def exact_rows(key: TapKey, config: Config, compact: Compact, count: int) -> tuple[int, ...]:
    """The rows of axis 1, of ``count``, that a compact golden keeps exactly of a tap not kept whole.

    The state has none, and neither has a drafted block, whose tokens the prompt does not have.
    """
    if key.tap.is_state or is_drafted(key, config):
        return ()
    return tuple(row for row in compact.rows(block=tokens_of_row(key, config)) if row < count)


def expected_aliases(config: Config, layers: Sequence[int], arrays: Iterable[str]) -> dict[str, str]:
    """Arrays that are the same as another one, and so are stored once, each with the name of the stored one.

    The input of a layer is a tap of an earlier layer. Without that layer, the first one that starts from it has it.
    ``arrays`` are the stored names of all arrays.
    """
    there = set(arrays)
    inputs = [key for layer in layers for key in entering(config, layer)]
    aliases = {}
    for spell in (str, sketch_name, exact_name):
        holders: dict[str, str] = {}
        for key in inputs:
            if key.tap.origin is None or key.tap.origin.stacked:
                continue
            mine, its = spell(str(key)), spell(str(origin_of(config, key)))
            holder = its if its in there else holders.setdefault(its, mine)
            if mine in there and holder != mine:
                aliases[mine] = holder
    return aliases

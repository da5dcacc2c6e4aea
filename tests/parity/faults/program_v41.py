"""Faults of V4.1's compiled layer, by the path that they are in: V4's in what both share, and more in its own parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from dsv4_convert.model import attention as windowed
from dsv4_convert.model import cache, encoded, experts, grouped_codes, layers
from dsv4_convert.model import model as backbone
from dsv4_convert.model.indexer import EntryScorer
from dsv4_convert.model.v41 import attention, block, compressor, engram, indexer
from dsv4_convert.parity.programs import ModelOptions

from . import program
from .fault import V41_MODEL
from .program import PROGRAM, REVERSED, SCAN, ProgramFault, Subject, planted
from .v41 import CANDIDATES, CHOOSER, LATE_READER, NGRAMS, READER, SOURCE, WINDOW

#: The layers of the streamed faults, then once more a reader and a layer that chooses inside the candidates: a scanned
#: model loops over these four.
CONFIG = V41_MODEL | {
    "text_config": V41_MODEL["text_config"]
    | {
        "num_hidden_layers": 9,
        "compress_ratios": [0, 0, 2, 2, 1, 1, 1, 1, 1, 0, 0, 0],
        "index_source_layer_ids": [2, 4, 6, 8],
    }
}
SECOND_CHOOSER = 8
#: Tokens of a chunk: an odd number, so that a chunk ends inside a pair.
CHUNK = 15
PATHS: Mapping[str, ModelOptions] = program.paths(CHUNK) | {"shared": ModelOptions(weights="expanded")}
_CODE = Path(__file__).parents[2] / "golden" / "release_code_v41"


def subject(folder: Path) -> Subject:
    """The model, whose golden is of the stand-in for the published code."""
    made = program.subject(folder, CONFIG, CHUNK, release_code=_CODE, numerics="plain")
    return dataclasses.replace(made, paths=PATHS)


_CHOSEN, _NOMINATED, _KEYS = "attn.indexer.chosen", "attn.indexer.candidates", "attn.indexer.keys"
_CONTEXT, _POOLED = "attn.context", "attn.compressor.pooled"
_IDS, _KEY = "engram.ids", "engram.key"
_SCORE, _GIVEN = "self._summed_scores(keys, q, weights)", "given = () if inside is None else (inside,)"
_SEEN = "q, weights, complete, *given)"
_CALL, _COMPRESS = (attention.SharedAttention, "__call__"), (attention.SharedAttention, "_compress")
_POOL = (compressor.LatentCompressor, "__call__")
_WEIGHTS = "(weights,"
_CARRY = "return Carry(streams, mixing.pre, shared), cache"
_HANDED_ON = "shared = shared if shared.{0} is None else shared._replace({0}=shared.{0}[:, ::-1])\n    " + _CARRY
_READ = "entries, chosen = shared.entries, shared.chosen"

#: The same code as V4's, in a layer of the same place.
_LIKE_V4 = tuple(
    dataclasses.replace(fault, layer={program.SLIDING: WINDOW, program.CSA: SOURCE, None: None}[fault.layer])
    for fault in PROGRAM
    if fault.owner in (encoded, experts, grouped_codes, windowed, EntryScorer, backbone)
)

PROGRAM_V41: tuple[ProgramFault, ...] = (
    *_LIKE_V4,
    *planted("indexer", SOURCE, _CHOSEN, indexer.SharedIndexer, "_score_and_choose",
             ("one entry too many seen", _SEEN, "q, weights, complete + 1, *given)"),
             ("one entry too few seen", _SEEN, "q, weights, jnp.maximum(complete - 1, 0), *given)"),
             ("weights of the next query", _SCORE, "self._summed_scores(keys, q, jnp.roll(weights, 1, axis=1))"),
             ("keys in the other order", _SCORE, "self._summed_scores(keys[:, ::-1], q, weights)"),
             ("heads without their weights", _SCORE, "self._summed_scores(keys, q, jnp.ones_like(weights))")),
    *planted("indexer", CHOOSER, _CHOSEN, indexer.SharedIndexer, "_score_and_choose",
             ("candidates ignored where scores are not recorded", _GIVEN, "given = ()"),
             ("candidates of the query before", _GIVEN,
              "given = () if inside is None else (jnp.roll(inside, 1, axis=1),)"),
             ("candidates of a chunk's first query", "*rest)", "*rest[:1], rest[1][:, :1] + 0 * rest[1])")),
    *planted("indexer", CANDIDATES, _NOMINATED, indexer.SharedIndexer, "_score_and_choose",
             ("blocks of the entry that follows", _SEEN, "q, weights, complete + 1, *given)"),
             ("blocks by the scores of other entries", _SCORE, "self._summed_scores(keys[:, ::-1], q, weights)")),
    *planted("cache", WINDOW, _CONTEXT, cache.Past, "kept",
             ("padding kept in the cache", "return self.count if", f"return 0 * self.count + {CHUNK} if")),
    *planted("cache", SOURCE, _POOLED, *_POOL,
             ("a pair begins with the chunk", "first = ratio - 1 - before % ratio", "first = ratio - 1 - 0 * before"),
             ("the value of the token before forgotten", "Pending(latest(values,", "Pending(0 * latest(values,"),
             ("the gate of the token before forgotten", "latest(gates, past.kept, ratio - 1))",
              "0 * latest(gates, past.kept, ratio - 1))"),
             ("value and gate of the token before swapped",
              "Pending(latest(values, past.kept, ratio - 1), latest(gates,",
              "Pending(latest(gates, past.kept, ratio - 1), latest(values,")),
    *planted("cache", SOURCE, _KEYS, *_POOL,
             ("a pair's position counted twice", "positions[:, :1] - before[:, None] + block",
              "positions[:, :1] + block"),
             ("pairs counted from the chunk", "block = before[:, None] // ratio +", "block = 0 * before[:, None] +")),
    *planted("cache", SOURCE, _CHOSEN, *_POOL,
             ("an entry kept only if a token follows", "<= seen[:, None]", "< seen[:, None]")),
    *planted("cache", SOURCE, _CHOSEN, *_COMPRESS,
             ("index keys in the next slot", "written(at.cache.keys, keys, latents.block,",
              "written(at.cache.keys, keys, latents.block + 1,"),
             ("index keys of this chunk forgotten", "return Shared(entries, keys), SourceCache",
              "return Shared(entries, at.cache.keys), SourceCache")),
    *planted("cache", SOURCE, _CONTEXT, *_COMPRESS,
             ("entries in the next slot", "written(at.cache.entries, entries, latents.block,",
              "written(at.cache.entries, entries, latents.block + 1,"),
             ("entries of this chunk forgotten", "return Shared(entries, keys), SourceCache",
              "return Shared(at.cache.entries, keys), SourceCache")),
    *planted("cache", SOURCE, _CHOSEN, *_CALL,
             ("entries counted from the chunk", "past.before[:, None]\n", "0 * past.before[:, None]\n")),
    *planted("cache", CANDIDATES, _NOMINATED, *_COMPRESS,
             ("index keys of single tokens in the next slot", "written(at.cache.keys, keys, latents.block,",
              "written(at.cache.keys, keys, latents.block + 1,")),
    *planted("cache", CANDIDATES, _KEYS, *_POOL,
             ("a single token's position counted twice", "positions[:, :1] - before[:, None] + block",
              "positions[:, :1] + block")),
    *planted("cache", NGRAMS, _IDS, engram.Engram, "__call__",
             ("the first tokens of a chunk kept for n-grams",
              "latest(history, past.kept, len(self.hash.multipliers) - 1)",
              "history[:, : len(self.hash.multipliers) - 1]"),
             ("the tokens kept for n-grams shifted", "latest(history, past.kept,",
              "latest(history, jnp.maximum(past.kept - 1, 0),")),
    *planted("cache", NGRAMS, _IDS, engram.Engram, "wanted_rows",
             ("n-grams begin with the chunk", "recent = None if past is None else past.cache.recent", "recent = None")),
    *planted("scanned", SECOND_CHOOSER, "hc_ffn.streams", layers.ScannedLayers, "__call__",
             ("layers in the other order, last repeat", SCAN, REVERSED)),
    *planted("scanned", CHOOSER, "hc_attn.pre", layers.ScannedLayers, "__call__",
             ("weights of the next layer", SCAN, SCAN.replace(
                 _WEIGHTS, "(jax.tree.map(lambda part: jnp.roll(part, 1, axis=0), weights),")),
             ("the first layer's weights for all", SCAN, SCAN.replace(
                 _WEIGHTS, "(jax.tree.map(lambda part: jnp.stack([part[0]] * len(part)), weights),")),
             ("stacked weights rounded to bfloat16", SCAN, SCAN.replace(
                 _WEIGHTS, "(jax.tree.map(lambda part: part.astype(jnp.bfloat16).astype(part.dtype), weights),"))),
    *planted("scanned", LATE_READER, _CONTEXT, layers.ScannedLayers, "__call__",
             ("states left in the other order", "states.append(left)",
              "states.append(jax.tree.map(lambda part: part[::-1], left))")),
    *planted("shared", NGRAMS, "hc_attn.collapsed", block.V41Block, "attend",
             ("pre of the same half in the attention", "self._attention_input(streams, pre, taps)",
              "self._attention_input(streams, mixing.pre, taps)")),
    *planted("shared", SOURCE, "hc_ffn.collapsed", block.V41Block, "route",
             ("pre of the same half in the experts", "self._expert_input(carry.streams, carry.pre, taps)",
              "self._expert_input(carry.streams, mixing.pre, taps)")),
    *planted("shared", READER, _CONTEXT, *_CALL,
             ("a reader's choice of the query before", _READ,
              "entries, chosen = shared.entries, jnp.roll(shared.chosen, 1, axis=1)"),
             ("a reader's entries are those one later", _READ,
              "entries, chosen = jnp.roll(shared.entries, -1, axis=1), shared.chosen"),
             ("a reader sees all entries", _READ,
              "entries, chosen = shared.entries, None")),
    *planted("shared", CHOOSER, _CHOSEN, *_CALL,
             ("index keys of the next entry", "q_low_rank, shared.keys,",
              "q_low_rank, jnp.roll(shared.keys, -1, axis=1),")),
    *(dataclasses.replace(fault, handed_on=True) for fault in (
        *planted("shared", NGRAMS, "input.pre", block.V41Block, "combine",
                 ("the attention's pre handed on by the experts", "routed.mixing.pre", "carry.pre")),
        *planted("shared", READER, "input.entries", block.V41Block, "attend",
                 ("entries handed on in another order", _CARRY, _HANDED_ON.format("entries"))),
        *planted("shared", READER, "input.chosen", block.V41Block, "attend",
                 ("choices handed on to other queries", _CARRY, _HANDED_ON.format("chosen"))),
    )),
    *planted("experts, fsdp, tensor", NGRAMS, _KEY, engram, "rows_of",
             ("rows of another device's table added", 'own_rows(part, chunk, "ngram")', "part[chunk % part.shape[0]]"),
             ("rows summed twice", 'sum_to_prompts(own_rows', '2 * sum_to_prompts(own_rows')),
    *planted("experts, fsdp, tensor", NGRAMS, _KEY, engram, "own_rows",
             ("rows counted from the first device's", "axis_index(axis) * table", "0 * axis_index(axis) * table"),
             ("rows of earlier devices found from the end", "(own >= 0) & (own < table.shape[0])",
              "own < table.shape[0]")),
    *planted("experts, fsdp, tensor", NGRAMS, _KEY, engram, "sum_to_prompts",
             ("rows not summed over the heads' devices", "return jax.lax.psum(part, others) if others else part",
              "return part")),
    *planted("experts, fsdp, tensor", NGRAMS, _KEY, engram, "gather_prompts",
             ("the devices' prompts in another order", "all_gather(part, names,", "all_gather(part, names[::-1],")),
    *planted("experts, fsdp, tensor", CHOOSER, _CHOSEN, indexer.SharedIndexer, "_score_and_choose",
             ("candidates ignored, sharded", _GIVEN, "given = ()")),
    *planted("experts, sequence, tensor", SECOND_CHOOSER, "hc_ffn.streams", layers.ScannedLayers, "__call__",
             ("layers in the other order, sharded", SCAN, REVERSED)),
)  # fmt: skip

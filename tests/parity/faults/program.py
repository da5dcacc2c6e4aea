"""Faults of the compiled layer, by the path that they are in: edits of the model's own source, a line each.

Each is planted in the program ``model`` alone. The streamed layer, which loops over experts in Python, does not have
the grouped, packed, scanned and sharded paths at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import numpy as np

from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.noise import Mode
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.model import attention, cache, compressor, encoded, experts, grouped_codes, indexer, layers
from dsv4_convert.model import model as backbone
from dsv4_convert.parity import compiled
from dsv4_convert.parity.devices import Devices
from dsv4_convert.parity.programs import ModelOptions
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.spec.config import Config, prefix_of
from dsv4_convert.store import ALONE
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.parameters import Parameters

from ...edits import edited
from .fault import names

#: A window-only layer routed by table, then twice a CSA and an HCA layer, which a scanned model loops over.
CONFIG = tiny_config(num_hidden_layers=5, num_hash_layers=1, compress_ratios=[0, 4, 128, 4, 128, 0])
SLIDING, CSA, HCA, SECOND_CSA = range(4)
#: Prompts and tokens: a chunk of each begins and ends inside a window and a block.
PROMPTS, TOKENS, CHUNK = 2, 140, 48


def paths(chunk: int) -> dict[str, ModelOptions]:
    """How each path runs; the cached ones take so many tokens at a time."""
    return {
        "packed": ModelOptions(weights="expanded"),
        "grouped": ModelOptions(weights="expanded", experts="grouped"),
        "codes": ModelOptions(weights="source"),
        "grouped codes": ModelOptions(weights="source", experts="grouped"),
        "indexer": ModelOptions(weights="expanded"),
        "cache": ModelOptions(weights="expanded", chunk=chunk),
        "scanned": ModelOptions(weights="expanded", scanned=True, chunk=chunk),
        "experts, fsdp, tensor": ModelOptions(weights="expanded", experts="grouped"),
        "experts, sequence, tensor": ModelOptions(weights="expanded", scanned=True),
    }


PATHS: Mapping[str, ModelOptions] = paths(CHUNK)
#: The mesh of eight devices of some paths.
MESHES: Mapping[str, dict[str, int]] = {
    "experts, fsdp, tensor": {"expert": 2, "fsdp": 2, "tensor": 2},
    "experts, sequence, tensor": {"expert": 2, "sequence": 2, "tensor": 2},
}


@dataclasses.dataclass(frozen=True)
class ProgramFault:
    """``old`` becomes ``new`` in the source of ``owner.function``; ``tap`` of ``layer`` must be named.

    ``handed_on``: the layer before computes rightly and hands on something else, which shows from the tokens only.
    ``stage``: the number of the draft stage that ``layer`` is.
    """

    name: str
    path: str
    layer: int | None
    tap: str
    owner: Any
    function: str
    old: str
    new: str
    handed_on: bool = False
    stage: int | None = None

    @property
    def full_tap(self) -> str:
        """The full name of the tap that must be named."""
        return prefix_of(self.layer, self.stage) + self.tap

    def named_by(self, report: ParityReport) -> bool:
        """Whether divergence, localization and verdict name the operation, and other layers are clean."""
        return names(report, self.layer, (self.tap,))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A healthy model: its weights in published form, its golden, and how each path runs it."""

    weights: Parameters
    golden: Golden
    paths: Mapping[str, ModelOptions]


def subject(folder: Path, raw: Mapping[str, Any] = CONFIG, chunk: int = CHUNK, **options: Any) -> Subject:
    """Make it in ``folder``, or open it there. ``options``: of the recording."""
    if not (folder / "golden").exists():
        write_checkpoint(folder / "hf", raw, seed=0)
        hf_to_orbax(folder / "hf", folder / "orbax", storage=Storage.SOURCE)
        vocabulary = Config.from_hf(raw).vocab_size
        ids = np.random.default_rng(8).integers(0, vocabulary, (PROMPTS, TOKENS)).astype(np.int32)
        record(folder / "hf", folder / "golden", RecordingOptions(tokens=ids, noise=["float32"], **options))
    return Subject(Weights.open(folder / "orbax"), open_golden(folder / "golden"), paths(chunk))


def examine(subject: Subject, path: str, fault: ProgramFault | None = None, **options: Any) -> ParityReport:
    """The report of the compiled layers on a path, with a fault in them."""
    with _planted(fault):
        mesh = MESHES.get(path)
        devices = None if mesh is None else Devices.all(subject.weights.config, ALONE, mesh)
        given = ParityOptions(**options)
        return ParityRun(subject.weights, subject.golden, given, devices=devices, model=subject.paths[path]).run()


def options_of(fault: ProgramFault) -> dict[str, Any]:
    """The smallest run that has the fault: its layer, or the model level from the tokens on."""
    if fault.layer is None:
        return {"taps": [fault.tap, "hc_head*"], "modes": [Mode.ISOLATED]}  # the head runs where it fails
    if fault.handed_on:
        return {"layers": range(fault.layer + 1), "modes": [Mode.CUMULATIVE]}
    return {"layers": [fault.layer]}


@contextmanager
def _planted(fault: ProgramFault | None) -> Iterator[None]:
    if fault is None:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(
            patch.object(fault.owner, fault.function, edited(fault.owner, fault.function, fault.old, fault.new))
        )
        for name in ("run_layer", "run_draft", "_embed"):
            stack.enter_context(patch.object(compiled, name, traced_again(getattr(compiled, name))))
        yield


def traced_again(program: Any, static: int | tuple[int, ...] = 0) -> Any:
    """The same program as a function of its own, since one that was compiled before does not have a patch."""
    return jax.jit(lambda *operands: program.__wrapped__(*operands), static_argnums=static)


def planted(path: str, layer: int | None, tap: str, owner: Any, function: str, *edits: tuple[str, str, str]) -> Any:
    """Faults of one function: a name, and the text that takes the place of another, for each."""
    return [ProgramFault(name, path, layer, tap, owner, function, old, new) for name, old, new in edits]


_EXPERTS, _CHOSEN, _CONTEXT = "ffn.experts", "attn.indexer.chosen", "attn.context"
_POOLED, _ENTRIES = "attn.compressor.pooled", "attn.compressor.entries"
_STREAMS = "hc_ffn.streams"
SCAN = "_looped(step, carry, (weights, before, replaced), segment.repeats)"
REVERSED = "jax.lax.scan(step, carry, (weights, before, replaced), reverse=True)"

PROGRAM: tuple[ProgramFault, ...] = (
    *planted("grouped", SLIDING, _EXPERTS, experts, "grouped",
            ("a group's size off by one", "clip(ends, first, first + tile) -", "clip(ends - 1, first, first + tile) -"),
            ("the last rows dropped", "row < ends[-1], pick", "row < ends[-1] - 8, pick"),
            ("rows not sorted by expert", "pick = order[jnp.minimum(row, tokens * chosen - 1)]",
             "pick = jnp.minimum(row, tokens * chosen - 1)"),
            ("outputs added to the next token", "pick // chosen, tokens)].add",
             "(pick // chosen + 1) % tokens, tokens)].add"),
            ("weights of the next row", "reshape(-1)[pick]", "reshape(-1)[(pick + 1) % (tokens * chosen)]")),
    *planted("grouped", CSA, _EXPERTS, experts, "grouped",
            ("gate and up swapped", "for stack in (w1, w3)", "for stack in (w3, w1)"),
            ("a token's second expert overwrites its first", '.add(output, mode="drop")', '.set(output, mode="drop")')),
    *planted("packed", SLIDING, _EXPERTS, experts, "packed",
            ("an expert's rows begin one late", "* tile + jnp.arange(tile)", "* tile + 1 + jnp.arange(tile)"),
            ("rows of the next expert added", "row < first_row[expert + 1],", "row < first_row[expert + 1] + 1,"),
            ("an expert's last row dropped", "row < first_row[expert + 1],", "row < first_row[expert + 1] - 1,"),
            ("weights in the order of tokens", "flat_weights[pick],", "flat_weights[row % (tokens * chosen)],"),
            ("gate and up swapped", "for w in (w1, w2, w3))", "for w in (w3, w2, w1))"),
            ("every output added twice", ", tokens)].add(output)", ", tokens)].add(2 * output)"),
            ("matrices of the next expert", "member(w, expert)", "member(w, (expert + 1) % stack)")),
    *planted("codes", SLIDING, _EXPERTS, experts, "packed",
            ("the last tile dropped", "< first_tile[stack], body", "< first_tile[stack] - 1, body"),
            ("rows of a padded tile added", "row < first_row[expert + 1],", "row < first_row[expert + 1] + tile,"),
            ("tiles begin one row late", "(index - first_tile[expert]) * tile +",
             "(index - first_tile[expert]) * tile + 1 +"),
            ("small tiles begin at the expert's first row", "next_row += count * tile", "next_row += 0 * tile")),
    *planted("codes", CSA, _EXPERTS, encoded, "_e2m1",
            ("the sign of FP4 lost", "wide < 8, value", "wide < 16, value"),
            ("half as zero", "0.5 * magnitude", "0.0 * magnitude")),
    *planted("codes", CSA, _EXPERTS, encoded, "_halves",
            ("nibbles in the other order", "_e2m1(wide & 15), _e2m1(wide >> 4)",
             "_e2m1(wide >> 4), _e2m1(wide & 15)")),
    *planted("codes", CSA, "attn.wq_a", encoded, "factors",
            ("exponents off by one", "jnp.maximum(byte, 1) << 23", "(jnp.maximum(byte, 1) + 1) << 23")),
    *planted("grouped codes", SLIDING, _EXPERTS, grouped_codes, "_run",
            ("a group's size off by one, in the kernel", "row < bounds[own + 1]", "row < bounds[own + 1] - 1"),
            ("rows of the expert before written over", "(row >= bounds[own]) & (row", "(row >= 0) & (row"),
            ("the last visit dropped", "grid=(parts, visits.there)", "grid=(parts, visits.there - 1)"),
            ("an expert's tile not decoded anew", "(visit == 0) | (own != expert[jnp.maximum(visit - 1, 0)])",
             "visit == 0"),
            ("rows of a tile counted one late", "tile[visit] * tiles.rows +", "tile[visit] * tiles.rows + 1 +"),
            ("tiles of the expert before", "return expert[visit], 0, part",
             "return expert[jnp.maximum(visit - 1, 0)], 0, part")),
    *planted("grouped codes", CSA, _EXPERTS, grouped_codes, "_decode",
            ("nibbles in the other order, in the kernel", "pl.ds(half,", "pl.ds(1 - half,"),
            ("odd inputs after the even ones", "pl.ds(half, len(values), stride=ratio)",
             "pl.ds(half * len(values), len(values))"),
            ("the scale of the neighbouring output", "factors(scales[first:last, columns])",
             "factors(jnp.roll(scales[first:last, columns], 1, axis=1))")),
    *planted("grouped codes", CSA, _EXPERTS, grouped_codes, "_visits",
            ("the last tile of an expert dropped", "pl.cdiv(bounds[1:], tile_rows)",
             "bounds[1:] // tile_rows"),
            ("tiles counted from the first row", "tile = first[expert] + visit", "tile = visit")),
    *planted("indexer", CSA, _CHOSEN, indexer.Indexer, "_score_and_choose",
            ("one entry too many seen", "self.longest_chunk, q, weights, complete)",
             "self.longest_chunk, q, weights, complete + 1)"),
            ("one entry too few seen", "self.longest_chunk, q, weights, complete)",
             "self.longest_chunk, q, weights, jnp.maximum(complete - 1, 0))"),
            ("entries of the whole chunk seen", "self._choose(scores, complete)",
             "self._choose(scores, complete[:, -1:] + 0 * complete)"),
            ("weights of the next query", "self._summed_scores(keys, q, weights)",
             "self._summed_scores(keys, q, jnp.roll(weights, 1, axis=1))"),
            ("keys in the other order", "self._summed_scores(keys, q, weights)",
             "self._summed_scores(keys[:, ::-1], q, weights)"),
            ("heads without their weights", "self._summed_scores(keys, q, weights)",
             "self._summed_scores(keys, q, jnp.ones_like(weights))")),
    *planted("cache", SLIDING, _CONTEXT, attention, "latest",
            ("a cached row shifted", "dynamic_slice_in_dim(rows, count, keep)",
             "dynamic_slice_in_dim(rows, jnp.maximum(count - 1, 0), keep)")),
    *planted("cache", SLIDING, _CONTEXT, attention, "_context",
            ("keys from before the prompt seen", ">= -earlier.tokens[:, None]",
             ">= -window * jnp.ones_like(earlier.tokens[:, None])"),
            ("the oldest cached key not seen", ">= -earlier.tokens[:, None]", ">= 1 - earlier.tokens[:, None]")),
    *planted("cache", SLIDING, _CONTEXT, cache.Past, "kept",
            ("padding kept in the cache", "return self.count if", f"return 0 * self.count + {CHUNK} if")),
    *planted("cache", CSA, _POOLED, compressor.Compressor, "_continued",
            ("the block before forgotten", "before >= self.ratio if lead", "before < 0 if lead"),
            ("rows of the block begin one late", "kept - before % self.ratio - lead",
             "kept + 1 - before % self.ratio - lead")),
    *planted("cache", CSA, _ENTRIES, compressor.Compressor, "_continued",
            ("an entry's position counted twice", "positions[:, :1] - before[:, None] + block",
             "positions[:, :1] + block")),
    *planted("cache", HCA, _CONTEXT, compressor.Compressor, "_continued",
            ("an entry in the next slot", "(state.entries, fresh, block,", "(state.entries, fresh, block + 1,")),
    *planted("cache", CSA, _CHOSEN, compressor.Compressor, "_continued",
            ("an entry kept only if a token follows", "<= (before + count)[:, None]",
             "< (before + count)[:, None]")),
    *planted("scanned", CSA, _STREAMS, layers.ScannedLayers, "__call__",
            ("layers in the other order", SCAN, REVERSED)),
    *planted("scanned", CSA, "hc_attn.pre", layers.ScannedLayers, "__call__",
            ("weights of the next layer", SCAN, SCAN.replace(
                "(weights,", "(jax.tree.map(lambda part: jnp.roll(part, 1, axis=0), weights),")),
            ("the first layer's weights for all", SCAN, SCAN.replace(
                "(weights,", "(jax.tree.map(lambda part: jnp.stack([part[0]] * len(part)), weights),")),
            ("stacked weights rounded to bfloat16", SCAN, SCAN.replace(
                "(weights,", "(jax.tree.map(lambda part: part.astype(jnp.bfloat16).astype(part.dtype), weights),"))),
    *planted("scanned", CSA, _POOLED, layers.ScannedLayers, "__call__",
            ("states left in the other order", "states.append(left)",
             "states.append(jax.tree.map(lambda part: part[::-1], left))")),
    *planted("scanned", SECOND_CSA, _STREAMS, layers.ScannedLayers, "__call__",
            ("layers in the other order, last repeat", SCAN,
             REVERSED)),
    *planted("experts, fsdp, tensor", SLIDING, _EXPERTS, experts, "_sum_of_experts",
            ("the sum over inner widths missing", 'psum(total.reshape(x.shape), "inner")', "total.reshape(x.shape)"),
            ("the sum over inner widths doubled", 'psum(total.reshape(x.shape), "inner")',
             'psum(psum(total.reshape(x.shape), "inner"), "inner")'),
            ("experts not counted from the device's first", 'axis_index("experts") * w1',
             '0 * axis_index("experts") * w1'),
            ("experts counted from the next device's first", 'axis_index("experts") * w1',
             '(axis_index("experts") + 1) * w1'),
            ("routing weights of the device's own tokens", 'all_gather((x, experts, weights), "experts")',
             '(*all_gather((x, experts), "experts"), jnp.concatenate([weights, weights]))')),
    *planted("experts, fsdp, tensor", CSA, _CHOSEN, indexer.EntryScorer, "_summed_scores",
            ("the sum over indexer heads missing", 'psum(self._scores(q, keys, weights), "index_heads")',
             "self._scores(q, keys, weights)")),
    *planted("experts, fsdp, tensor", None, "embed", backbone, "_rows_of",
            ("rows of another device's vocabulary added", 'own_rows(table, all_gather(token_ids, "width"), "vocab")',
             'table[all_gather(token_ids, "width") % table.shape[0]]')),
    *planted("experts, sequence, tensor", SLIDING, _CONTEXT, attention, "_context",
            ("a device's queries at the first one's place", 'axis_index("tokens") * q', '0 * axis_index("tokens") * q'),
            ("a device's queries at the next one's place", 'axis_index("tokens") * q',
             '(axis_index("tokens") + 1) % 2 * q'),
            ("a device's queries one token late", 'axis_index("tokens") * q.shape[1]',
             'axis_index("tokens") * (q.shape[1] + 1)')),
    *planted("experts, sequence, tensor", SLIDING, _EXPERTS, experts, "_sum_of_experts",
            ("the sum over inner widths missing, scanned", 'psum(total.reshape(x.shape), "inner")',
             "total.reshape(x.shape)"),
            ("experts not counted from the device's first, scanned", 'axis_index("experts") * w1',
             '0 * axis_index("experts") * w1')),
    *planted("experts, sequence, tensor", CSA, _STREAMS, layers.ScannedLayers, "__call__",
            ("layers in the other order, sharded", SCAN, REVERSED)),
)  # fmt: skip

"""Faults of DSpark's compiled stages, by the path that they are in: edits of source that both architectures share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv4_convert.model import dspark, encoded, experts
from dsv4_convert.model import model as backbone
from dsv4_convert.parity.programs import ModelOptions

from .fault import patient
from .program import ProgramFault, Subject, paths, planted

FIRST, MIDDLE, LAST = range(3)
#: The paths of a layer that a stage has, too: it is never scanned. The cached one takes so few tokens at a time that
#: the block sees those of earlier calls.
PATHS: Mapping[str, ModelOptions] = {
    path: paths(7)[path] for path in ("packed", "grouped", "codes", "cache", "experts, fsdp, tensor")
}

_STAGE, _REMEMBER = (backbone.Decoder, "draft_stage"), (dspark.DSparkBlock, "remember")
_SUM = 'psum(total.reshape(x.shape), "inner")'
_LOOK_UP = 'own_rows(table, all_gather(token_ids, "width"), "vocab")'


def subject(folder: Path, model: str) -> Subject:
    """One of the models that draft, made in ``folder``."""
    made = patient(folder, model)
    return Subject(made.source(), made.golden, PATHS)


def of_stages(first: int) -> tuple[ProgramFault, ...]:
    """The faults, in a model whose first stage has this layer number."""
    return tuple(dataclasses.replace(fault, layer=first + (fault.stage or 0)) for fault in _FAULTS)


def _in(
    path: str, stage: int, tap: str, owner: Any, function: str, *edits: tuple[str, str, str]
) -> Iterator[ProgramFault]:
    for fault in planted(path, stage, tap, owner, function, *edits):
        yield dataclasses.replace(fault, stage=stage)


_FAULTS: tuple[ProgramFault, ...] = (
    *_in("packed", FIRST, "embed", *_STAGE,
         ("the block embeds the tokens one later", "_rows_of(self.embed[...], ids)",
          "_rows_of(self.embed[...], jnp.roll(ids, -1, axis=1))")),
    *_in("packed", MIDDLE, "attn.main.wkv", *_STAGE,
         ("a stage reads the context reversed", "block.refine(carry, ids, context,",
          "block.refine(carry, ids, context[:, ::-1],")),
    *_in("packed", LAST, "norm", *_STAGE,
         ("the model's norm in a stage", "output(x, block.norm[...]", "output(x, self.norm[...]")),
    *_in("packed", LAST, "markov_head.embed", *_STAGE,
         ("tokens chosen after noise", "logits, ids[:, 0]", "logits, ids[:, 1]")),
    *_in("packed", MIDDLE, "ffn.experts", experts, "packed",
         ("a stage's rows begin one late", "* tile + jnp.arange(tile)", "* tile + 1 + jnp.arange(tile)")),
    *_in("grouped", LAST, "ffn.experts", experts, "grouped",
         ("gate and up of a stage swapped", "for stack in (w1, w3)", "for stack in (w3, w1)")),
    *_in("codes", FIRST, "main_proj", encoded, "factors",
         ("a stage's exponents off by one", "jnp.maximum(byte, 1) << 23", "(jnp.maximum(byte, 1) + 1) << 23")),
    *_in("codes", MIDDLE, "ffn.experts", encoded, "_halves",
         ("a stage's nibbles in the other order", "_e2m1(wide & 15), _e2m1(wide >> 4)",
          "_e2m1(wide >> 4), _e2m1(wide & 15)")),
    *_in("cache", FIRST, "attn.context", *_REMEMBER,
         ("known tokens of earlier calls forgotten", "[past.cache.window, keys]", "[0 * past.cache.window, keys]"),
         ("the kept window begins one late", "latest(rows, past.kept, size - 1)",
          "latest(rows, jnp.maximum(past.kept - 1, 0), size - 1)"),
         ("padding in the window that the block sees", "latest(rows, jnp.maximum(past.count - 1, 0), size)",
          "latest(rows, 0 * past.count + keys.shape[1] - 1, size)")),
    *_in("cache", LAST, "attn.q_rope", dspark.DSparkBlock, "places",
         ("the block's positions counted from the call", "past.count[:, None]", "0 * past.count[:, None]")),
    *_in("experts, fsdp, tensor", FIRST, "embed", backbone, "_rows_of",
         ("the sum over the vocabulary's devices missing", f"psum({_LOOK_UP}, \"vocab\")", _LOOK_UP),
         ("rows summed twice over the vocabulary's devices", f"psum({_LOOK_UP}, \"vocab\")",
          f"psum(psum({_LOOK_UP}, \"vocab\"), \"vocab\")"),
         ("rows of another device's ids", 'all_gather(token_ids, "width")',
          'jnp.roll(all_gather(token_ids, "width"), 1, axis=1)')),
    *_in("experts, fsdp, tensor", LAST, "ffn.experts", experts, "_sum_of_experts",
         ("the sum over a stage's inner widths missing", _SUM, "total.reshape(x.shape)"),
         ("the sum over a stage's inner widths doubled", _SUM, f"psum({_SUM}, \"inner\")"),
         ("a stage's experts counted from the next device's first", 'axis_index("experts") * w1',
          '(axis_index("experts") + 1) * w1')),
    *_in("experts, fsdp, tensor", MIDDLE, "attn.context", dspark, "_block_context",
         ("sinks of a stage left at zero", "seen, sink)", "seen, 0 * sink)")),
)  # fmt: skip

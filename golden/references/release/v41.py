"""DeepSeek-V4.1's code: blocks share a compressed past by way of one object, and some begin with an engram.

The recorder puts into that object what earlier layers made, before each call of a block, so blocks can run one at a
time. An n-gram table is never in memory: the code gets a table of the rows that the prompt looks up.

While a pair of tokens is incomplete, the published code decodes with another layer's index keys
(``shared_attn.index_k``). Here every layer that makes keys reads its own, as in a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.references.release.arithmetic import Run
from dsv4_convert.golden.references.release.code import Code, Required
from dsv4_convert.golden.references.release.drafts import Draft
from dsv4_convert.golden.references.release.interface import Entering, Interface, PromptCalls, StoredAs, ToLogits
from dsv4_convert.golden.references.release.probes import (
    INPUTS,
    OUTPUTS,
    Choices,
    Visit,
    ascending,
    hooked,
    watching_block,
    watching_function,
)
from dsv4_convert.golden.references.release.weights import CodeWeights
from dsv4_convert.spec.v41.config import V41Config
from dsv4_convert.spec.v41.kinds import Candidates
from dsv4_convert.weights.token_map import TOKENIZER_FILE, token_map

_OUTPUTS = OUTPUTS | {
    "attn.indexer.wk": "attn.indexer.wk",
    "attn.indexer.k_norm": "attn.indexer.k_norm",
    "engram.streams": "engram",
}
_CANDIDATES = "attn.indexer.candidates"
#: Channels of an entry that share a scale, which tells it from a key of the indexer.
_ENTRY_GROUP = 16


class _Tokenizer:
    """A tokenizer as the code asks for it."""

    def __init__(self, backend: Any) -> None:
        self.backend_tokenizer = backend

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))


class _Draft(Draft):
    """A stage of V4.1. Its ``input.pre`` are the weights that collapse the streams that enter its layer."""

    def begun(self, streams: Tensor) -> tuple[Tensor, ...]:
        """The streams of the block, of which the first half takes the first one."""
        return streams, self.code.module.make_identity_pre_mix(streams, streams.shape[2])

    def refined(self, carry: tuple[Tensor, ...], start: int, context: Tensor, visit: Visit) -> tuple[Tensor, ...]:
        """The carry that leaves the stage's layer."""
        streams, pre = carry
        visit("input.pre", pre)
        left: tuple[Tensor, Tensor] = self.block(streams, start, pre, context)
        return left


def _watching(code: Code, block: Any, visit: Visit, choices: Choices, slot: int | None) -> AbstractContextManager[None]:
    return watching_block(code, block, visit, choices, outputs=_OUTPUTS, inputs=INPUTS, slot=slot)


class V41Interface(Interface):
    """The code of DeepSeek-V4.1, for text."""

    required = Required(
        "DeepSeek-V4.1",
        ("ModelArgs", "Transformer", "Block", "Block.hc_pre", "Block.hc_post", "ParallelHead", "RMSNorm",
         "apply_rotary_emb", "make_identity_pre_mix", "select_candidate_blocks", "shared_attn",
         "ParallelEngramEmbedding", "EngramLayout.from_args", "NgramHashState"),
        files=("engram.py",),
    )  # fmt: skip
    decoding: ClassVar[Mapping[str, str]] = {
        "decoding": "layers that make index keys read their own, also while a pair of tokens is incomplete"
    }
    wide = frozenset({"input.pre", "pre"})

    def __init__(self, code: Code, config: V41Config, prompt: PromptCalls, storage: StoredAs) -> None:
        """Hashes the prompt's n-grams, where a layer with an engram runs.

        Raises:
            UsageError: the code cannot run this prompt.
            BadInput: the checkpoint's tokenizer is missing, or another model's.
        """
        super().__init__(code, config, prompt, storage)
        ratio = max((config.ratio_of(layer) for layer in prompt.layers), default=0)
        if (first := prompt.calls[0][1]) < ratio:
            raise UsageError(
                f"a prefill of {first} token: the published code compresses {ratio} tokens to an entry, and begins "
                f"with {ratio} or more"
            )
        self._layout = code.module.EngramLayout.from_args(self.args)
        #: The rows that each token looks up in each table ``[B, S, tables, J]``.
        self._rows = self._hashed() if any(map(config.has_engram, prompt.layers)) else None

    @staticmethod
    def values(config: V41Config, prompt: PromptCalls, storage: StoredAs) -> dict[str, Any]:
        """The arguments of the code. Tables have one row, until they have those that are looked up."""
        values = Interface.values(config, prompt, storage) | {
            "kv_source_layers": config.kv_source_layer_ids,
            "index_source_layers": config.index_source_layer_ids,
        }
        if (source := config.candidate_source_layer_id) is not None:
            values |= {
                "candidate_source_layer": source,
                "candidate_topk_blocks": config.candidate_topk_blocks,
                "candidate_block_size": config.candidate_block_size,
            }
        if (engram := config.engram) is not None:
            values |= {
                "engram_layer_ids": engram.layer_ids,
                "engram_num_embeddings": (1,) * len(engram.layer_ids),
                "engram_max_ngram_size": engram.max_ngram_size,
                "engram_vocab_size": engram.vocab_size,
                "engram_n_heads": engram.n_heads,
                "engram_head_dim": engram.head_dim,
                "engram_pad_id": engram.pad_token_id,
                "engram_compressed_vocab_size": engram.compressed_vocab_size,
            }
        if draft := Interface.values_of_draft(config, prompt):
            values |= draft | {
                "dspark_n_routed_experts": config.dspark_n_routed_experts,
                "dspark_n_activated_experts": config.dspark_num_experts_per_tok,
            }
        return values

    @staticmethod
    def of_stages(config: V41Config) -> tuple[str, ...]:
        """The block of a stage, and what it calls."""
        return ("DSparkBlock", "DSparkBlock.forward_embed", "DSparkBlock.forward_head", "sample")

    def draft(self, layer: int, weights: CodeWeights, run: Run, logits: ToLogits) -> Draft:
        """A stage, which hands on the weights that collapse its streams."""
        return _Draft(self.code, self.draft_block(layer, weights, run, logits), self.prompt.ids, _watching)

    @staticmethod
    def without_layers() -> dict[str, Any]:
        """The arguments of a model that is only set up."""
        return Interface.without_layers() | {"engram_layer_ids": ()}

    def entered(self, streams: Tensor) -> dict[str, Tensor]:
        """The streams, and the weights that collapse them: all of the first one."""
        first = self.code.module.make_identity_pre_mix(streams, self.config.hc_mult)
        return {**super().entered(streams), "hc_ffn.pre": first}

    def _hashed(self) -> Tensor:
        from tokenizers import Tokenizer

        file = self.prompt.root / TOKENIZER_FILE
        token_map(self.prompt.root, self.config)  # refuses what is not this model's tokenizer
        tokenizer = _Tokenizer(Tokenizer.from_file(str(file)))
        if (largest := int(self.prompt.ids.max())) >= len(tokenizer):
            raise UsageError(
                f"token {largest}: {file} has {len(tokenizer)} tokens, and the published code maps no others"
            )
        state = self.code.module.NgramHashState(self.args, self._layout, tokenizer)
        rows = [state(self.prompt.ids[:, start:stop], start) for start, stop in self.prompt.calls]
        return torch.cat(rows, dim=1)

    def block(self, layer: int, weights: CodeWeights, run: Run) -> Any:
        """A ``Block``; its table, if any, has the rows that the prompt looks up."""
        block = self.code.module.Block(layer, self.args, self._layout)
        if block.engram is None:
            return self.filled(block, layer, weights, run)
        block.engram.embed = self._table(layer, block.engram.layer_hash_index, weights, run)
        return self.filled(block, layer, weights, run, besides=[block.engram.embed])

    def _table(self, layer: int, index: int, weights: CodeWeights, run: Run) -> Any:
        """A table of the rows that are looked up, which takes the numbers that they have in the whole table."""
        assert self._rows is not None
        used = np.unique(self._rows[:, :, index].numpy())
        table = self.code.module.ParallelEngramEmbedding(len(used), self.config.engram.head_dim)
        name = f"{self.config.prefix(layer)}engram.embed."
        table.weight = nn.Parameter(weights.rows(name + "weight", used), requires_grad=False)
        scale = weights.rows(name + "scale", used) if weights.has(name + "scale") else torch.ones_like(table.scale)
        table.scale = nn.Parameter(scale, requires_grad=False)
        numbers = torch.from_numpy(used)
        table.register_forward_pre_hook(lambda _, given: torch.searchsorted(numbers, given[0].contiguous()))
        # The code looks rows up in bfloat16, which holds them exactly.
        table.register_forward_hook(lambda _, __, found: found.to(run.dtype))
        return table

    def forward(self, layer: int, block: Any, entering: Entering, tokens: slice) -> None:
        """The engram, if any, and the block, with what earlier layers made for it."""
        shared, attention = self.code.module.shared_attn, block.attn
        shared.compress_kv = entering.get("input.entries")
        owns_keys = self.config.compresses(layer)
        shared.index_k = attention.indexer.k_cache if owns_keys else entering.get("input.keys")
        chosen, candidates = entering.get("input.chosen"), entering.get("input.candidates")
        if chosen is not None:
            behind = tokens.stop if tokens.start == 0 else attention.window_size
            shared.topk_idxs = torch.where(chosen < 0, -1, chosen + behind).int()
        if candidates is not None:
            shared.candidates = self._inside(candidates, tokens.stop // self.config.ratio_of(layer))
        streams = entering["input"]
        if block.engram is not None:
            assert self._rows is not None
            streams = block.engram(streams, self._rows[:, tokens, block.engram.layer_hash_index])
        block(streams, tokens.start, entering["input.pre"], None)

    def _inside(self, blocks: Tensor, entries: int) -> Tensor:
        """The entries in candidate blocks ``[B, S, c]``, as a mask ``[B, S, T]``."""
        size = self.config.candidate_block_size
        count = -(-entries // size)
        # Blocks that are none go behind the last one.
        places = torch.where(blocks < 0, count, blocks).long()
        mask = torch.zeros(*blocks.shape[:2], count + 1, dtype=torch.bool).scatter_(-1, places, True)
        return mask[..., :count].repeat_interleave(size, dim=-1)[..., :entries]

    def _blocks(self, mask: Tensor) -> Tensor:
        """The blocks ``[B, S, c]`` of a mask over entries."""
        size, most = self.config.candidate_block_size, self.config.candidate_topk_blocks
        padded = nn.functional.pad(mask, (0, -mask.shape[-1] % size))
        inside = padded.reshape(*mask.shape[:2], -1, size).any(dim=-1)
        blocks = torch.where(inside, torch.arange(inside.shape[-1]), -1)
        return ascending(blocks)[..., : min(most, blocks.shape[-1])]

    @contextmanager
    def watching(self, layer: int, block: Any, visit: Visit, choices: Choices, start: int) -> Iterator[None]:
        """Visit every tap of one call of a block."""
        module, width = self.code.module, self.config.hc_mult * self.config.hidden_size

        def quantized(arguments: tuple[Any, ...], _: Any) -> None:
            value, size = arguments[0], arguments[1]
            if value.ndim == 4:  # the indexer's queries
                visit("attn.indexer.q_rope", value)
            else:
                visit("attn.compressor.entries" if size == _ENTRY_GROUP else "attn.indexer.keys", value)

        def projected(result: Tensor) -> None:
            visit("engram.key", result[..., :width])
            visit("engram.value", result[..., width:])

        with ExitStack() as stack:
            stack.enter_context(_watching(self.code, block, visit, choices, self.slot(start)))
            stack.enter_context(watching_function(module, "fp4_act_quant", quantized))
            if self.config.layer_kind(layer).candidates is Candidates.SOURCE:
                stack.enter_context(self._nominating(visit, choices.get(_CANDIDATES)))
            if block.engram is not None:
                ids = hooked(block.engram, before=lambda given: visit("engram.ids", given[1].int()))
                stack.enter_context(ids)
                stack.enter_context(hooked(block.engram.wkv, after=projected))
            yield

    @contextmanager
    def _nominating(self, visit: Visit, given: Any | None) -> Iterator[None]:
        """Visit the candidate blocks; those that are ``given`` are nominated instead of the code's own."""
        nominate = self.code.module.select_candidate_blocks

        def watched(scores: Tensor, *others: Any) -> Tensor:
            mask: Tensor = (
                nominate(scores, *others) if given is None else self._inside(torch.from_numpy(given), scores.shape[-1])
            )
            visit(_CANDIDATES, self._blocks(mask))
            return mask

        with patch.object(self.code.module, "select_candidate_blocks", watched):
            yield

    def window(self, block: Any) -> Tensor:
        """The ring of keys."""
        cache: Tensor = block.attn.window_kv_cache
        return cache

    def head(self, prefix: str, weights: CodeWeights, run: Run) -> Callable[[Entering, ToLogits, Visit], None]:
        """The collapse by the last half's weights, the norm and the logits."""
        return partial(self._to_logits, self.norm(prefix, weights, run))

    def try_head(self, entering: Entering, visit: Visit) -> None:
        """Run the head on what enters it."""
        word = torch.zeros(1, self.config.hidden_size, dtype=torch.float32)
        self._to_logits(self.norm(), entering, partial(self.code.logits, weight=word), visit)

    def _to_logits(self, norm: nn.Module, entering: Entering, logits: ToLogits, visit: Visit) -> None:
        # The method asks nothing of its block.
        collapsed = self.code.module.Block.hc_pre(None, entering["input"], entering["input.pre"])
        visit("hc_head.collapsed", collapsed)
        normed = norm(collapsed)
        visit("norm", normed)
        visit("logits", logits(normed))

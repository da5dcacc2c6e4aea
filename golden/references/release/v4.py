"""DeepSeek-V4's code: a block gets streams and token ids, and the head weighs the streams by parameters of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsv4_convert.golden.layout import token_ids
from dsv4_convert.golden.references.release.arithmetic import Run
from dsv4_convert.golden.references.release.code import Code, Required
from dsv4_convert.golden.references.release.drafts import Draft
from dsv4_convert.golden.references.release.interface import Entering, Interface, PromptCalls, StoredAs, ToLogits
from dsv4_convert.golden.references.release.probes import (
    INPUTS,
    OUTPUTS,
    Choices,
    Collapse,
    Visit,
    watching_block,
    watching_function,
)
from dsv4_convert.golden.references.release.weights import CodeWeights
from dsv4_convert.spec.v4.config import V4Config

_OUTPUTS = OUTPUTS | {
    **{f"attn.indexer.compressor.{part}": f"attn.indexer.compressor.{part}" for part in ("wkv", "wgate", "norm")},
    "attn.compressor.entries": "attn.compressor",
    "attn.indexer.compressor.entries": "attn.indexer.compressor",
    **{part: part for part in ("enorm", "hnorm", "e_proj", "h_proj")},
}
_INPUTS = INPUTS | {
    "embed": "enorm",
    "attn.indexer.compressor.pooled": "attn.indexer.compressor.norm",
}


class V4Interface(Interface):
    """The code of DeepSeek-V4: Flash, Pro, their Base and dated releases."""

    required = Required(
        "DeepSeek-V4",
        ("ModelArgs", "Transformer", "Block", "Block.hc_pre", "Block.hc_post", "ParallelHead", "RMSNorm",
         "apply_rotary_emb"),
    )  # fmt: skip

    @staticmethod
    def values(config: V4Config, prompt: PromptCalls, storage: StoredAs) -> dict[str, Any]:
        """The arguments of the code."""
        values = {
            "n_hash_layers": sum(config.hash_routed),
            "scale_dtype": "fp32" if storage.float_scales else "fp8",
        }
        return Interface.values(config, prompt, storage) | values | Interface.values_of_draft(config, prompt)

    @staticmethod
    def of_stages(config: V4Config) -> tuple[str, ...]:
        """The blocks of either kind of stage, and what DSpark's call."""
        if config.dspark is None:
            return ("MTPBlock",)
        return ("DSparkBlock", "DSparkBlock.forward_embed", "DSparkBlock.forward_head", "DSparkBlock.hc_head", "sample")

    def draft(self, layer: int, weights: CodeWeights, run: Run, logits: ToLogits) -> Draft:
        """A ``DSparkBlock``. Its embedding and its output head are the model's own."""
        return Draft(self.code, self.draft_block(layer, weights, run, logits), self.prompt.ids, _watching)

    def block(self, layer: int, weights: CodeWeights, run: Run) -> Any:
        """A ``Block``, or the ``MTPBlock`` of a stage."""
        stage = layer in self.config.stage_layers
        block = (self.code.module.MTPBlock if stage else self.code.module.Block)(layer, self.args)
        self.filled(block, layer, weights, run)
        if stage:  # both are the model's own; the head, which evaluates one position only, is run for all of them
            block.embed = partial(weights.embedded, dtype=run.dtype)
            block.head = lambda streams, *mixing: streams
        return block

    def forward(self, layer: int, block: Any, entering: Entering, tokens: slice) -> None:
        """Streams and ids in; in a stage the ids of the tokens after."""
        (streams,) = entering.values()
        ids = token_ids(self.prompt.ids.numpy(), self.config, layer)
        block(streams, tokens.start, torch.from_numpy(ids[:, tokens]))

    @contextmanager
    def watching(self, layer: int, block: Any, visit: Visit, choices: Choices, start: int) -> Iterator[None]:
        """Visit every tap of one call of a block."""

        def quantized(arguments: tuple[Any, ...], _: Any) -> None:
            if arguments[0].ndim == 4:  # the indexer's queries; its entries have no heads
                visit("attn.indexer.q_rope", arguments[0])

        with (
            _watching(self.code, block, visit, choices, self.slot(start)),
            watching_function(self.code.module, "fp4_act_quant", quantized),
        ):
            yield

    def window(self, block: Any) -> Tensor:
        """The ring, which is followed by the compressed entries."""
        cache: Tensor = block.attn.kv_cache
        return cache[:, : block.attn.window_size]

    def head(self, prefix: str, weights: CodeWeights, run: Run) -> Callable[[Entering, ToLogits, Visit], None]:
        """The collapse, the norm and the logits; a stage has parameters of its own for the first two."""
        mixing = [weights.floats(prefix + name, run.wide) for name in ("hc_head_fn", "hc_head_scale", "hc_head_base")]
        return partial(self._to_logits, self.norm(prefix, weights, run), mixing)

    def try_head(self, entering: Entering, visit: Visit) -> None:
        """Run the head on what enters it, with parameters of zeros."""
        streams, width = self.config.hc_mult, self.config.hidden_size
        mixing = [torch.zeros(*shape, dtype=torch.float32) for shape in ((streams, streams * width), (1,), (streams,))]
        word = torch.zeros(1, width, dtype=torch.float32)
        self._to_logits(self.norm(), mixing, entering, partial(self.code.logits, weight=word), visit)

    def _to_logits(
        self, norm: nn.Module, mixing: Sequence[Tensor], entering: Entering, logits: ToLogits, visit: Visit
    ) -> None:
        with Collapse(visit):
            collapsed = self._collapse()(entering["input"], *mixing)
        visit("hc_head", collapsed)
        normed = norm(collapsed)
        visit("norm", normed)
        visit("logits", logits(normed))

    def _collapse(self) -> Callable[..., Tensor]:
        """``(streams, fn, scale, base)`` to one stream: a method of the head, and since V4-Flash-0731 of a block."""
        module, args = self.code.module, self.args
        if hasattr(module.ParallelHead, "hc_head"):
            method: Callable[..., Tensor] = module.ParallelHead(1, args.dim, args.norm_eps, args.hc_eps).hc_head
        else:
            method = module.Block(0, args).hc_head
        return method


def _watching(code: Code, block: Any, visit: Visit, choices: Choices, slot: int | None) -> AbstractContextManager[None]:
    return watching_block(code, block, visit, choices, outputs=_OUTPUTS, inputs=_INPUTS, slot=slot)

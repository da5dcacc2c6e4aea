"""How the code of one architecture is called: its arguments, blocks and head, and what a layer starts from."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from dsv4_convert.golden.references.release.arithmetic import Run
from dsv4_convert.golden.references.release.code import Code, Required
from dsv4_convert.golden.references.release.drafts import Draft
from dsv4_convert.golden.references.release.probes import Choices, Visit
from dsv4_convert.golden.references.release.weights import CodeWeights

Array = np.ndarray[Any, Any]
#: Tap -> its value, which enters a layer or the head.
Entering: TypeAlias = Mapping[str, Tensor]
#: Normed streams to logits.
ToLogits: TypeAlias = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class PromptCalls:
    """The tokens of a recording.

    Attributes:
        ids: ``[B, S]``.
        calls: the tokens ``start:stop`` of each call.
        root: the checkpoint's folder, which has its tokenizer.
        layers: the layers that run.
    """

    ids: Tensor
    calls: Sequence[tuple[int, int]]
    root: Path
    layers: Sequence[int]


@dataclasses.dataclass(frozen=True)
class StoredAs:
    """How weights are given to the code: FP8 or decoded, experts in FP4 or like the others, scales in float32."""

    fp8: bool
    fp4_experts: bool
    float_scales: bool


class Interface(ABC):
    """The code of one architecture, set up for a prompt.

    Attributes:
        required: what the code has.
        decoding: where one token after the other is not computed as published, for the manifest.
    """

    required: ClassVar[Required]
    decoding: ClassVar[Mapping[str, str]] = {}
    #: Names of taps that the code keeps in float32 whatever the activations are.
    wide: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, code: Code, config: Any, prompt: PromptCalls, storage: StoredAs) -> None:
        """No weight is read. Raises :class:`BadInput` for code of another model."""
        self.code, self.config, self.prompt = code, config, prompt
        self.args = code.arguments(self.values(config, prompt, storage))
        # A model without layers sets what the code keeps in global variables, such as the dtype of matrices.
        code.module.Transformer(dataclasses.replace(self.args, **self.without_layers()))

    @staticmethod
    def values(config: Any, prompt: PromptCalls, storage: StoredAs) -> dict[str, Any]:
        """The arguments that every architecture has."""
        yarn = config.yarn
        return {
            "max_batch_size": prompt.ids.shape[0],
            "max_seq_len": prompt.ids.shape[1],
            "dtype": "fp8" if storage.fp8 else "bf16",
            "expert_dtype": "fp4" if storage.fp4_experts else None,
            "vocab_size": config.vocab_size,
            "dim": config.hidden_size,
            "moe_inter_dim": config.moe_intermediate_size,
            "n_layers": config.num_hidden_layers,
            "n_heads": config.num_attention_heads,
            "n_routed_experts": config.n_routed_experts,
            "n_activated_experts": config.num_experts_per_tok,
            "route_scale": config.routed_scaling_factor,
            "swiglu_limit": config.swiglu_limit,
            "q_lora_rank": config.q_lora_rank,
            "head_dim": config.head_dim,
            "rope_head_dim": config.qk_rope_head_dim,
            "norm_eps": config.rms_norm_eps,
            "o_groups": config.o_groups,
            "o_lora_rank": config.o_lora_rank,
            "window_size": config.sliding_window,
            "compress_ratios": tuple(config.ratio_of(layer) for layer in range(config.stage_layers.stop)),
            "compress_rope_theta": config.compress_rope_theta,
            "original_seq_len": 0 if yarn is None else yarn.original_max_position_embeddings,
            "rope_theta": config.rope_theta,
            "rope_factor": 1 if yarn is None else yarn.factor,
            "beta_fast": 32 if yarn is None else yarn.beta_fast,
            "beta_slow": 1 if yarn is None else yarn.beta_slow,
            "index_n_heads": config.index_n_heads,
            "index_head_dim": config.index_head_dim,
            "index_topk": config.index_topk,
            "hc_mult": config.hc_mult,
            "hc_sinkhorn_iters": config.hc_sinkhorn_iters,
            "hc_eps": config.hc_eps,
        }

    @staticmethod
    def values_of_draft(config: Any, prompt: PromptCalls) -> dict[str, Any]:
        """The arguments that DSpark's stages have more, if any of them runs. A block needs room behind the prompt."""
        if config.dspark is None or not set(prompt.layers) & set(config.stage_layers):
            return {}
        values = {f"dspark_{name}": value for name, value in dataclasses.asdict(config.dspark).items()}
        room = prompt.ids.shape[1] + config.dspark.block_size
        return values | {"n_mtp_layers": config.num_mtp_stages, "max_seq_len": room, "temperature": 0.0}

    @staticmethod
    def without_layers() -> dict[str, Any]:
        """The arguments of a model that is only set up."""
        return {"n_layers": 0, "n_mtp_layers": 0}

    def entered(self, streams: Tensor) -> dict[str, Tensor]:
        """The values that enter layer 0, by the taps that they would be of a layer before."""
        return {"hc_ffn.streams": streams}

    @staticmethod
    def of_stages(config: Any) -> tuple[str, ...]:
        """The names that the code of this model's draft stages defines."""
        return ()

    def draft(self, layer: int, weights: CodeWeights, run: Run, logits: ToLogits) -> Draft:
        """A DSpark stage with its weights. ``logits``: the model's output head."""
        raise NotImplementedError

    def draft_block(self, layer: int, weights: CodeWeights, run: Run, logits: ToLogits) -> Any:
        """The code's ``DSparkBlock`` with its weights. Its embedding and its output head are the model's own."""
        block = self.filled(self.code.module.DSparkBlock(layer, self.args), layer, weights, run)
        block.embed = partial(weights.embedded, dtype=run.dtype)
        block.head = lambda normed, full_logits: logits(normed)
        return block

    @abstractmethod
    def block(self, layer: int, weights: CodeWeights, run: Run) -> Any:
        """The code's block of a layer or stage with its weights."""

    @abstractmethod
    def forward(self, layer: int, block: Any, entering: Entering, tokens: slice) -> None:
        """A call of the block of ``layer`` on some tokens; its taps are visited."""

    @abstractmethod
    def watching(
        self, layer: int, block: Any, visit: Visit, choices: Choices, start: int
    ) -> AbstractContextManager[None]:
        """Visit every tap of the call of a block that begins with token ``start``; make the given choices."""

    @abstractmethod
    def window(self, block: Any) -> Tensor:
        """The ring of a block's last keys; more may stand behind it."""

    @abstractmethod
    def head(self, prefix: str, weights: CodeWeights, run: Run) -> Callable[[Entering, ToLogits, Visit], None]:
        """The operations after the last layer, or a stage, whose parameters begin with ``prefix``.

        It is called with what leaves them, a function that makes logits, and a visitor.
        """

    @abstractmethod
    def try_head(self, entering: Entering, visit: Visit) -> None:
        """Run the head with parameters of zeros, and an output matrix of one row of zeros."""

    def norm(self, prefix: str = "", weights: CodeWeights | None = None, run: Run | None = None) -> nn.Module:
        """The norm before the output head; without its weight if no ``weights`` are given."""
        norm: nn.Module = self.code.module.RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        if weights is not None and run is not None:
            weights.fill(norm, f"{prefix}norm.", run.weights, besides=())
        return norm

    def slot(self, start: int) -> int | None:
        """The place in the ring of the key of token ``start``; None in a prompt."""
        window: int = self.config.sliding_window
        return start % window if start else None

    def filled(
        self, block: Any, layer: int, weights: CodeWeights, run: Run, *, besides: Iterable[nn.Module] = ()
    ) -> Any:
        """``block`` with its weights; of the routed experts each while it runs."""
        prefix = self.config.prefix(layer)
        for expert, module in enumerate(block.ffn.experts):
            weights.stream(module, f"{prefix}ffn.experts.{expert}.", run.weights)
        weights.fill(block, prefix, run.weights, besides=(block.ffn.experts, *besides))
        for name, cache in caches(block).items():
            if cache.dtype == torch.float32:
                owner, _, key = name.rpartition(".")
                setattr(block.get_submodule(owner), key, cache.to(run.wide))
        return block.eval()


def caches(block: nn.Module) -> dict[str, Tensor]:
    """All that a block keeps between calls; rotary tables do not change."""
    return {name: buffer for name, buffer in block.named_buffers() if not name.endswith("freqs_cis")}

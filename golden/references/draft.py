"""A DSpark stage out of transformers' modules: transformers has none, but has every part of one.

Its decoder layer runs on the block of drafted tokens. An object stands in for its cache, and puts the keys of the known
tokens before those of the block. There is no mask: every token of the block sees all keys. The known tokens' keys are
made by the attention's own projection, norm and rotary table, of the projected means of the target layers' streams. The
heads are plain linear layers, in the order of the published inference code's ``forward_head``. mlx-vlm's drafter, which
shares no code with transformers', computes the same (``tests/golden/test_drafts.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from dsv4_convert.golden.references.probes import HEAD_PROBES, Input, Output, Probe
from dsv4_convert.spec.v4.config import V4Config

#: Taps of the known tokens' keys, and the places in :class:`DraftStage` that they pass.
_MAIN = {f"attn.main.{name}": f"main_{name}" for name in ("wkv", "kv_norm", "kv_rope")}
#: Taps of the last stage, likewise.
_HEADS = {
    "markov_head.embed": "markov_embed", "markov_head": "markov_logits", "draft_logits": "draft_logits",
    "tokens": "tokens", "confidence": "confidence",
}  # fmt: skip


class Before:
    """Stands in for a cache that has the keys of the known tokens."""

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys

    def update(self, keys: Tensor, values: Tensor, *others: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """All keys, which are the values too."""
        joined = torch.cat([self._keys, keys], dim=2)
        return joined, joined


class DraftStage(nn.Module):
    """One stage. Modules that pass on what they get are the places of taps.

    Attributes:
        chosen: tokens ``[B, Q, 1]`` that the draft goes on with; None: its own.
        context: what the last forward had of the known tokens, ``[B, M, D]``.
        keys: their rotated keys, ``[B, M, C]``.
    """

    def __init__(self, hf: DeepseekV4Config, layer: int, config: V4Config) -> None:
        super().__init__()
        assert config.dspark is not None
        width, rank = config.hidden_size, config.dspark.markov_rank
        self.first, self.last = config.embeds(layer), config.has_head(layer)
        self.streams, self.window = config.hc_mult, config.sliding_window
        self.block = modeling.DeepseekV4DecoderLayer(hf, layer)
        self.embed = nn.Identity()
        places = (*_MAIN.values(), *(_HEADS.values() if self.last else ()))
        self.places = nn.ModuleDict({place: nn.Identity() for place in places})
        if self.first:
            self.main_proj = nn.Linear(width * len(config.dspark.target_layer_ids), width, bias=False)
            self.main_norm = modeling.DeepseekV4RMSNorm(width, eps=config.rms_norm_eps)
        if self.last:
            self.norm = modeling.DeepseekV4RMSNorm(width, eps=config.rms_norm_eps)
            self.hc_head = modeling.DeepseekV4HyperHead(hf)
            self.lm_head = nn.Identity()
            table, head = nn.Embedding(config.vocab_size, rank), nn.Linear(rank, config.vocab_size, bias=False)
            self.markov_head = nn.ModuleDict({"markov_w1": table, "markov_w2": head})
            self.confidence_head = nn.ModuleDict({"proj": nn.Linear(width + rank, 1, bias=False)})
        self.chosen: Tensor | None = None
        self.context: Tensor | None = None
        self.keys: Tensor | None = None

    def forward(
        self,
        entering: Tensor,
        context: Tensor | None,
        embedded: Tensor,
        angles: tuple[Tensor, Tensor],
        options: Mapping[str, Any],
        cache: str,
    ) -> Tensor:
        """The streams ``[B, Q, N, D]`` that leave the stage.

        Args:
            entering: streams of the target layers ``[B, M, L, N, D]``, or those that leave the stage before.
            context: None in the first stage, which makes it.
            embedded: embeddings ``[B, Q, D]`` of the block, which the first stage reads.
            angles: cosine and sine of the known tokens' positions.
            options: arguments of the decoder layer, for the block.
            cache: the keyword by which it gets its cache.
        """
        if context is None:
            context = self.main_norm(self.main_proj(entering.mean(dim=3).flatten(2)))
            entering = self.embed(embedded).unsqueeze(2).expand(-1, -1, self.streams, -1).contiguous()
        self.context, self.keys = context, self._keys(context, angles)
        seen = self.keys[:, -self.window :].unsqueeze(1)
        leaving: Tensor = self.block(entering, **options, **{cache: Before(seen)})
        return leaving

    def _keys(self, context: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """The keys of the known tokens. A module's ``forward`` is called where a hook awaits its call for the block."""
        attention = self.block.self_attn
        keys = self.places["main_wkv"](attention.kv_proj.forward(context))
        keys = self.places["main_kv_norm"](attention.kv_norm.forward(keys))
        rotated: Tensor = self.places["main_kv_rope"](modeling.apply_rotary_pos_emb(keys.unsqueeze(1), *angles)[:, 0])
        return rotated

    def draft(self, streams: Tensor, anchor: Tensor, logits_of: Callable[[Tensor], Tensor]) -> None:
        """Choose the tokens of the block; ``logits_of`` is the model's output head."""
        x = self.hc_head(streams)
        logits = self.lm_head(logits_of(self.norm(x)))
        table, head = self.markov_head["markov_w1"], self.markov_head["markov_w2"]
        token, steps = anchor, []
        for at in range(streams.shape[1]):
            embedded = table(token)
            bias = head(embedded)
            scores = logits[:, at] + bias
            best = scores.argmax(dim=-1)
            steps.append((embedded, bias, scores, best.unsqueeze(-1)))
            token = best if self.chosen is None else self.chosen[:, at, 0]
        embedded, bias, scores, tokens = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
        for place, value in zip(list(_HEADS.values())[:4], (embedded, bias, scores, tokens), strict=True):
            self.places[place](value)
        confidence = self.confidence_head["proj"](torch.cat([x, embedded], dim=-1))
        self.places["confidence"](confidence.squeeze(-1))


def probes(layer: Mapping[str, Probe], *, first: bool, last: bool) -> dict[str, Probe]:
    """The places of a stage's taps; ``layer`` has those of its layer's."""
    within = {
        tap: dataclasses.replace(probe, module=f"block.{probe.module}".rstrip(".")) for tap, probe in layer.items()
    }
    begins: dict[str, Probe] = {"streams": Input(""), "context": Input("", 1)}
    if first:
        begins = {"targets": Input(""), "main": Input("main_proj"), "embed": Output("embed")}
        begins |= {name: Output(name) for name in ("main_proj", "main_norm")}
    known = {tap: Output(f"places.{place}") for tap, place in _MAIN.items()}
    ends = HEAD_PROBES | {tap: Output(f"places.{place}") for tap, place in _HEADS.items()} if last else {}
    return {**begins, **known, **within, **ends}

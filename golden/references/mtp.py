"""The stage after the backbone (multi-token prediction) in plain torch: the published inference code's mathematics.

Float32 throughout, without the quantisation of activations that the published code simulates. Nothing is shared with
:mod:`dsv4_convert.model`; weights have the published names and the published orientation ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from dsv4_convert.spec.config import Config


class StageReference:
    """``mtp.N`` of one checkpoint. Every step is kept in ``taps`` under the name that the model gives it."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor], stage: int = 0) -> None:
        """``weights``: unquantised tensors of the checkpoint by published name, those of the stage and of both ends."""
        self._config = config
        self._own = {
            name.removeprefix(f"mtp.{stage}.").removesuffix(".weight"): tensor.float()
            for name, tensor in weights.items()
            if name.startswith(f"mtp.{stage}.")
        }
        self._embed, self._head = weights["embed.weight"].float(), weights["head.weight"].float()
        self.taps: dict[str, Tensor] = {}

    def __call__(self, streams: Tensor, next_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[B, S, V]`` of streams ``[B, S, N, D]``, the ids ``[B, S]`` after them and positions ``[B, S]``."""
        own = self._own
        token = self._tap("enorm", self._norm(self._embed[next_ids], "enorm"))
        before = self._tap("hnorm", self._norm(streams, "hnorm"))
        token = self._tap("e_proj", token @ own["e_proj"].T)
        before = self._tap("h_proj", before @ own["h_proj"].T)
        h = self._tap("input", token.unsqueeze(2) + before)

        x, post, comb = self._enter(h, "hc_attn")
        h = self._leave(self._attention(self._tap("attn_norm", self._norm(x, "attn_norm")), positions), h, post, comb)
        self._tap("hc_attn.streams", h)
        x, post, comb = self._enter(h, "hc_ffn")
        h = self._leave(self._experts(self._tap("ffn_norm", self._norm(x, "ffn_norm"))), h, post, comb)
        self._tap("hc_ffn.streams", h)

        mixes = self._mixes(h, own["hc_head_fn"])
        pre = self._tap("hc_head.pre", torch.sigmoid(mixes * own["hc_head_scale"] + own["hc_head_base"]) + self._eps)
        x = self._tap("hc_head", (pre.unsqueeze(-1) * h).sum(dim=2))
        return self._tap("logits", self._tap("norm", self._norm(x, "norm")) @ self._head.T)

    @property
    def _eps(self) -> float:
        return self._config.hc_eps

    def _tap(self, name: str, value: Tensor) -> Tensor:
        self.taps[name] = value
        return value

    def _rms(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._config.rms_norm_eps)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return self._rms(x) * self._own[name]

    def _mixes(self, h: Tensor, fn: Tensor) -> Tensor:
        flat = h.flatten(2)
        return flat @ fn.T * torch.rsqrt(flat.square().mean(-1, keepdim=True) + self._config.rms_norm_eps)

    def _enter(self, h: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The collapsed input of a half, and how its output is spread and the streams are mixed."""
        n = self._config.hc_mult
        scale, base = self._own[f"{name}_scale"], self._own[f"{name}_base"]
        first, second, third = self._mixes(h, self._own[f"{name}_fn"]).tensor_split([n, 2 * n], dim=-1)
        pre = torch.sigmoid(first * scale[0] + base[:n]) + self._eps
        post = 2 * torch.sigmoid(second * scale[1] + base[n : 2 * n])
        comb = _cut(third * scale[2] + base[2 * n :], n, n).softmax(-1) + self._eps
        comb = comb / (comb.sum(-2, keepdim=True) + self._eps)
        for _ in range(self._config.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + self._eps)
            comb = comb / (comb.sum(-2, keepdim=True) + self._eps)
        self._tap(f"{name}.pre", pre)
        self._tap(f"{name}.post", post)
        self._tap(f"{name}.comb", comb)
        return self._tap(f"{name}.collapsed", (pre.unsqueeze(-1) * h).sum(dim=2)), post, comb

    def _leave(self, output: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        mixed = (comb.unsqueeze(-1) * h.unsqueeze(3)).sum(dim=2)  # over the stream that it comes from
        return post.unsqueeze(-1) * output.unsqueeze(2) + mixed

    def _attention(self, x: Tensor, positions: Tensor) -> Tensor:
        """Window only: one key head that is the value too, a sink per head, and the rotation taken back at the end."""
        config, own = self._config, self._own
        heads, width = config.num_attention_heads, config.head_dim
        turns = self._turns(positions)
        low = self._tap("attn.q_norm", self._norm(self._tap("attn.wq_a", x @ own["attn.wq_a"].T), "attn.q_norm"))
        q = self._tap("attn.wq_b", _cut(low @ own["attn.wq_b"].T, heads, width))
        q = self._tap("attn.q_rope", _turned(self._tap("attn.q", self._rms(q)), turns.unsqueeze(2)))
        kv = self._tap("attn.kv_norm", self._norm(self._tap("attn.wkv", x @ own["attn.wkv"].T), "attn.kv_norm"))
        kv = self._tap("attn.kv_rope", _turned(kv, turns))

        at = torch.arange(x.shape[1])
        distance = at.unsqueeze(1) - at
        seen = (distance >= 0) & (distance < config.sliding_window)
        scores = torch.einsum("bshc,btc->bhst", q, kv) * width**-0.5
        scores = scores.masked_fill(~seen, float("-inf"))
        sink = own["attn.attn_sink"].view(1, heads, 1, 1).expand(*scores.shape[:3], 1)
        shares = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        context = self._tap("attn.context", torch.einsum("bhst,btc->bshc", shares, kv))
        context = self._tap("attn.context_unrotated", _turned(context, turns.conj().unsqueeze(2)))

        groups = _cut(context.flatten(2), config.o_groups, -1)
        matrices = own["attn.wo_a"].view(config.o_groups, config.o_lora_rank, -1)
        low = self._tap("attn.wo_a", torch.einsum("bsgi,goi->bsgo", groups, matrices))
        return self._tap("attn.wo_b", low.flatten(2) @ own["attn.wo_b"].T)

    def _turns(self, positions: Tensor) -> Tensor:
        """Unit complex numbers ``[B, S, rope/2]``: base ``rope_theta``, no YaRN."""
        rope = self._config.qk_rope_head_dim
        frequencies = self._config.rope_theta ** -(torch.arange(0, rope, 2, dtype=torch.float64) / rope)
        angles = positions.unsqueeze(-1).double() * frequencies
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def _experts(self, x: Tensor) -> Tensor:
        """Chosen by sqrt(softplus) scores and bias; weighted by the scores alone; beside them the shared expert."""
        config, own = self._config, self._own
        logits = self._tap("ffn.gate.logits", x @ own["ffn.gate"].T)
        scores = softplus(logits).sqrt()
        biased = self._tap("ffn.gate.scores", scores + own["ffn.gate.bias"])
        chosen = self._tap("ffn.gate.experts", biased.topk(config.num_experts_per_tok, dim=-1).indices)
        weights = scores.gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * config.routed_scaling_factor
        self._tap("ffn.gate.weights", weights)
        routed = torch.zeros_like(x)
        for expert in range(config.n_routed_experts):
            share = (weights * (chosen == expert)).sum(-1, keepdim=True)
            routed += share * self._expert(x, f"ffn.experts.{expert}")
        self._tap("ffn.experts", routed)
        shared = self._tap("ffn.shared_experts", self._expert(x, "ffn.shared_experts"))
        return self._tap("ffn", routed + shared)

    def _expert(self, x: Tensor, name: str) -> Tensor:
        own, limit = self._own, self._config.swiglu_limit
        gate = (x @ own[f"{name}.w1"].T).clamp(max=limit)
        up = (x @ own[f"{name}.w3"].T).clamp(-limit, limit)
        return (silu(gate) * up) @ own[f"{name}.w2"].T


def _cut(x: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several."""
    return x.reshape(*x.shape[:-1], *sizes)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """The trailing dimensions as interleaved complex numbers, each turned."""
    width = 2 * turns.shape[-1]
    still, last = x[..., :-width], x[..., -width:]
    pairs = torch.view_as_complex(_cut(last, -1, 2).contiguous()) * turns
    return torch.cat([still, torch.view_as_real(pairs).flatten(-2)], dim=-1)

"""A small stand-in for V4.1's `inference/model.py`: the same names, written for the tests from a specification.

It evaluates a prompt in one call (start_pos 0) and then one token at a time, from its caches, on one device, and knows
text only. Parameters are left uninitialised, whoever loads the module fills them. `kernel` comes from the loader.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from engram import EngramLayout, NgramHashState
from kernel import act_quant, fp4_act_quant, fp4_gemm, fp8_gemm, hc_split_sinkhorn, sparse_attn
from torch import Tensor, nn

FP4, FP8, E8M0 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e8m0fnu
GROUP = 32  # inputs, and weights of a row, that share a scale; also the side of an FP8 weight's tile
ENTRY_GROUP = 16
SCALES = "ue8m0"
default_dtype: torch.dtype = FP8  # of weights; Transformer.__init__ sets it


@dataclass
class ModelArgs:
    """The fields of inference/config.json that text takes; sizes default to DeepSeek-V4.1-Flash."""

    max_batch_size: int = 4
    max_seq_len: int = 4096
    dtype: str = "fp8"  # bf16 | fp8
    expert_dtype: str | None = "fp4"  # None (as dtype) | fp4
    vocab_size: int = 129280
    dim: int = 5120
    moe_inter_dim: int = 2304
    n_layers: int = 40
    n_mtp_layers: int = 3
    n_heads: int = 64
    n_routed_experts: int = 384
    n_activated_experts: int = 6
    route_scale: float = 1.5
    swiglu_limit: float = 10.0
    q_lora_rank: int = 1280
    head_dim: int = 512
    rope_head_dim: int = 64
    norm_eps: float = 1e-20
    o_groups: int = 8
    o_lora_rank: int = 1024
    window_size: int = 128
    compress_ratios: Sequence[int] = (0, 0, *(2,) * 18, *(1,) * 20, 0, 0, 0)
    kv_source_layers: Sequence[int] = (2, 8, 14, 20)
    index_source_layers: Sequence[int] = (2, 8, 14, 20, 24, 28, 32, 36)
    compress_rope_theta: float = 160000.0
    original_seq_len: int = 65536
    rope_theta: float = 10000.0
    rope_factor: float = 16.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    index_n_heads: int = 32
    index_head_dim: int = 128
    index_topk: int = 512
    candidate_source_layer: int = -1
    candidate_topk_blocks: int = 0
    candidate_block_size: int = 0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    engram_layer_ids: Sequence[int] = ()
    engram_num_embeddings: Sequence[int] = ()
    engram_max_ngram_size: int = 4
    engram_vocab_size: int = 16000000
    engram_n_heads: int = 8
    engram_head_dim: int = 256
    engram_pad_id: int = 2
    engram_compressed_vocab_size: int = 99092
    temperature: float = 1.0
    dspark_block_size: int = 0
    dspark_noise_token_id: int = 128799
    dspark_target_layer_ids: Sequence[int] = ()
    dspark_markov_rank: int = 256
    dspark_n_routed_experts: int = 128
    dspark_n_activated_experts: int = 3

    def experts(self, layer_id: int) -> tuple[int, int]:
        """Experts of a layer or stage, and those that a token takes."""
        if layer_id < self.n_layers:
            return self.n_routed_experts, self.n_activated_experts
        return self.dspark_n_routed_experts, self.dspark_n_activated_experts


def _parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, by the kernel that the weight's dtype asks for."""
    if weight.dtype not in (FP4, FP8):
        return F.linear(x, weight)
    codes, scales = act_quant(x, GROUP, SCALES, E8M0)
    if weight.dtype == FP4:
        return fp4_gemm(codes, scales, weight, weight.scale, E8M0, act_block_size=GROUP)
    return fp8_gemm(codes, scales, weight, weight.scale, E8M0, block_size=GROUP)


class Linear(nn.Module):
    """A linear map, [out, in], whose weight may be FP8 or packed FP4 with scales beside it."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dtype = dtype or default_dtype
        self.weight = _parameter(out_features, in_features // 2 if dtype == FP4 else in_features, dtype=dtype)
        rows = out_features if dtype == FP4 else math.ceil(out_features / GROUP)
        quantized = dtype in (FP4, FP8)
        self.register_parameter("scale", _parameter(rows, in_features // GROUP, dtype=E8M0) if quantized else None)
        if quantized:
            self.weight.scale = self.scale  # linear() is given the weight alone

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """RMS normalisation in float32 with one cast back."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(dim)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class ParallelEngramEmbedding(nn.Module):
    """A table of FP8 rows, decoded where they are looked up (whole: there is one device)."""

    def __init__(self, num_embeddings: int, dim: int) -> None:
        super().__init__()
        self.weight = _parameter(num_embeddings, dim, dtype=FP8)
        self.scale = _parameter(num_embeddings, dim // GROUP, dtype=E8M0)

    def forward(self, indices: Tensor) -> Tensor:
        codes, scales = F.embedding(indices, self.weight), F.embedding(indices, self.scale)
        return (codes.float().unflatten(-1, (-1, GROUP)) * scales.float()[..., None]).flatten(-2).to(torch.bfloat16)


class Engram(nn.Module):
    """Adds a gated value of a table of n-grams to every stream."""

    def __init__(self, args: ModelArgs, layer_id: int, layout: EngramLayout) -> None:
        super().__init__()
        self.layer_hash_index = layout.layer_ids.index(layer_id)
        self.eps, self.streams = args.norm_eps, args.hc_mult
        self.embed = ParallelEngramEmbedding(layout.num_embeddings[self.layer_hash_index], layout.head_dim)
        columns = (args.engram_max_ngram_size - 1) * args.engram_n_heads
        self.wkv = Linear(columns * layout.head_dim, args.dim * (args.hc_mult + 1))
        self.q_weight = _parameter(args.hc_mult, args.dim)
        self.k_weight = _parameter(args.hc_mult, args.dim)

    def forward(self, x: Tensor, hash_ids: Tensor) -> Tensor:
        *keys, value = self.wkv(self.embed(hash_ids).flatten(-2)).chunk(self.streams + 1, dim=-1)
        key, h = torch.stack(keys, dim=2).float(), x.float()
        scale = torch.rsqrt(h.square().mean(-1) + self.eps) * torch.rsqrt(key.square().mean(-1) + self.eps)
        weight = self.q_weight.float() * self.k_weight.float()
        match = (h * weight * key).sum(-1) * scale * x.shape[-1] ** -0.5
        gate = torch.sigmoid(torch.copysign(match.abs().clamp(min=1e-6).sqrt(), match))
        return (h + gate[..., None] * value.float()[:, :, None]).to(x.dtype)


def _rotations(args: ModelArgs, ratio: int) -> Tensor:
    """Unit complex numbers [seqlen, rope_head_dim / 2]; stretched as YaRN does in layers with a compressed past."""
    dim, base = args.rope_head_dim, args.compress_rope_theta if ratio else args.rope_theta
    freqs = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if ratio and args.original_seq_len:
        turns = (args.original_seq_len / (times * 2 * math.pi) for times in (args.beta_fast, args.beta_slow))
        low, high = (dim * math.log(turn) / (2 * math.log(base)) for turn in turns)
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        slow = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
        freqs = freqs / args.rope_factor * slow + freqs * (1 - slow)
    angles = torch.outer(torch.arange(args.max_seq_len, dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor, inverse: bool = False) -> Tensor:
    """Rotate neighbouring pairs of x [b, s, (h,) d] in place by freqs_cis [s, d / 2]."""
    turn = freqs_cis.conj() if inverse else freqs_cis
    if x.ndim == 4:
        turn = turn.unsqueeze(1)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return x.copy_(torch.view_as_real(pairs * turn).flatten(-2))


class Compressor(nn.Module):
    """Pools blocks of tokens into one latent each, which is neither rotated nor rounded."""

    def __init__(self, args: ModelArgs, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        dtype = torch.float32 if ratio > 1 else torch.bfloat16
        self.wkv = Linear(args.dim, args.head_dim, dtype=dtype)
        self.norm = RMSNorm(args.head_dim, args.norm_eps)
        if ratio > 1:
            self.wgate = Linear(args.dim, args.head_dim, dtype=dtype)
            rows = torch.zeros(args.max_batch_size, ratio, args.head_dim, dtype=torch.float32)
            self.register_buffer("kv_state", rows, persistent=False)
            self.register_buffer("score_state", rows - math.inf, persistent=False)

    def forward(self, x: Tensor, start_pos: int) -> Tensor | None:
        if self.ratio == 1:
            return self.norm(self.wkv(x))
        values, gates = self.wkv(x.float()), self.wgate(x.float())
        batch, tokens, ratio = len(x), x.shape[1], self.ratio
        whole = tokens - tokens % ratio if start_pos == 0 else 0
        for state, rows in ((self.kv_state, values), (self.score_state, gates)):
            first = start_pos % ratio
            state[:batch, first : first + tokens - whole] = rows[:, whole:]
        if start_pos and (start_pos + 1) % ratio:
            return None
        if start_pos:
            values, gates, whole = self.kv_state[:batch], self.score_state[:batch], ratio
        values, gates = (rows[:, :whole].unflatten(1, (-1, ratio)) for rows in (values, gates))
        return self.norm((values * gates.softmax(dim=2)).sum(dim=2).to(x.dtype))


class Indexer(nn.Module):
    """Chooses, for every query, entries of the shared compressed past."""

    def __init__(self, args: ModelArgs, layer_id: int) -> None:
        super().__init__()
        self.args, self.ratio = args, args.compress_ratios[layer_id]
        self.nominates = layer_id == args.candidate_source_layer
        self.obeys = 0 <= args.candidate_source_layer < layer_id
        self.wq_b = Linear(args.q_lora_rank, args.index_n_heads * args.index_head_dim)
        self.weights_proj = Linear(args.dim, args.index_n_heads, dtype=torch.bfloat16)
        if layer_id in args.kv_source_layers:
            self.wk = Linear(args.head_dim, args.index_head_dim, dtype=torch.bfloat16)
            self.k_norm = RMSNorm(args.index_head_dim, args.norm_eps)
            entries = args.max_seq_len // self.ratio
            keys = torch.zeros(args.max_batch_size, entries, args.index_head_dim)
            self.register_buffer("k_cache", keys, persistent=False)

    def forward(
        self, x: Tensor, qr: Tensor, latent: Tensor | None, freqs: Tensor, start_pos: int, offset: int
    ) -> Tensor:
        """Places [b, s, k] of the chosen entries, counted from `offset`; -1 for none."""
        args, rd, end = self.args, self.args.rope_head_dim, start_pos + x.shape[1]
        first = start_pos // self.ratio
        if latent is not None:
            k = self.k_norm(self.wk(latent))
            apply_rotary_emb(k[..., -rd:], freqs[first * self.ratio :: self.ratio][: k.shape[1]])
            fp4_act_quant(k, GROUP, True)
            self.k_cache[: len(x), first : first + k.shape[1]] = k
            shared_attn.index_k = self.k_cache
        q = self.wq_b(qr).unflatten(-1, (args.index_n_heads, args.index_head_dim))
        apply_rotary_emb(q[..., -rd:], freqs[start_pos:end])
        fp4_act_quant(q, GROUP, True)
        weights = self.weights_proj(x) * (args.index_head_dim**-0.5 * args.index_n_heads**-0.5)
        keys = shared_attn.index_k[: len(x), : end // self.ratio]
        scores = (torch.einsum("bshd,btd->bsht", q, keys).relu() * weights.unsqueeze(-1)).sum(dim=2)
        visible = (torch.arange(start_pos, end) + 1).unsqueeze(-1) // self.ratio
        scores = scores.masked_fill(torch.arange(end // self.ratio) >= visible, -math.inf)
        if self.nominates:
            shared_attn.candidates = select_candidate_blocks(
                scores, visible, args.candidate_topk_blocks, args.candidate_block_size
            )
        if self.obeys:
            scores = scores.masked_fill(~shared_attn.candidates, -math.inf)
        chosen = scores.topk(min(args.index_topk, end // self.ratio), dim=-1).indices.sort(dim=-1).values
        return torch.where(chosen < visible, chosen + offset, -1).int()


def select_candidate_blocks(scores: Tensor, visible: Tensor, topk_blocks: int, block_size: int) -> Tensor:
    """The entries [b, s, T] in the best blocks of each query, that of its newest entry among them."""
    padded = F.pad(scores, (0, -scores.shape[-1] % block_size), value=-math.inf)
    best = padded.unflatten(-1, (-1, block_size)).amax(dim=-1)
    best = best.masked_fill(torch.arange(best.shape[-1]) == (visible - 1) // block_size, math.inf)
    found = best.topk(min(topk_blocks, best.shape[-1]), dim=-1)
    inside = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, found.indices, found.values > -math.inf)
    return inside.repeat_interleave(block_size, dim=-1)[..., : scores.shape[-1]]


class Attention(nn.Module):
    """Attention with one key that is also the value: over a window and the chosen entries of a shared past."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.args, self.ratio, self.window_size = args, args.compress_ratios[layer_id], args.window_size
        width = args.n_heads * args.head_dim
        self.attn_sink = _parameter(args.n_heads, dtype=torch.float32)
        self.wq_a = Linear(args.dim, args.q_lora_rank)
        self.q_norm = RMSNorm(args.q_lora_rank, args.norm_eps)
        self.wq_b = Linear(args.q_lora_rank, width)
        self.wkv = Linear(args.dim, args.head_dim)
        self.kv_norm = RMSNorm(args.head_dim, args.norm_eps)
        self.wo_a = Linear(width // args.o_groups, args.o_groups * args.o_lora_rank, dtype=torch.bfloat16)
        self.wo_b = Linear(args.o_groups * args.o_lora_rank, args.dim)
        self.compressor = Compressor(args, self.ratio) if layer_id in args.kv_source_layers else None
        self.indexer = Indexer(args, layer_id) if layer_id in args.index_source_layers else None
        ring = torch.zeros(args.max_batch_size, args.window_size, args.head_dim)
        self.register_buffer("window_kv_cache", ring, persistent=False)
        if self.compressor is not None:
            past = torch.zeros(args.max_batch_size, args.max_seq_len // self.ratio, args.head_dim)
            self.register_buffer("compress_kv_cache", past, persistent=False)
        self.register_buffer("freqs_cis", _rotations(args, self.ratio), persistent=False)

    def _window(self, kv: Tensor, start_pos: int) -> tuple[Tensor, Tensor]:
        """Keys, and where those of each query's window are among them; -1 for none."""
        tokens, window = kv.shape[1], self.window_size
        last = torch.arange(max(tokens - window, 0), tokens)
        self.window_kv_cache[: len(kv), (start_pos + last) % window] = kv[:, last]
        position = torch.arange(start_pos, start_pos + tokens).unsqueeze(1)
        slots = min(tokens, window) if start_pos == 0 else window
        places = (position - window + 1).clamp(min=0) + torch.arange(slots)
        places, later = places if start_pos == 0 else places % window, places > position
        return (kv if start_pos == 0 else self.window_kv_cache[: len(kv)]), places.masked_fill(later, -1)

    def _past(self, x: Tensor, qr: Tensor, start_pos: int, offset: int) -> tuple[Tensor, Tensor]:
        """The shared entries, and those that each query attends to."""
        first, entries = start_pos // self.ratio, (start_pos + x.shape[1]) // self.ratio
        latent = None if self.compressor is None else self.compressor(x, start_pos)
        if self.indexer is not None:
            shared_attn.topk_idxs = torch.empty(*x.shape[:2], 0, dtype=torch.int32)
            if entries:
                shared_attn.topk_idxs = self.indexer(x, qr, latent, self.freqs_cis, start_pos, offset)
        if self.compressor is not None:
            shared_attn.compress_kv = self.compress_kv_cache
        if latent is not None:
            turns = self.freqs_cis[first * self.ratio :: self.ratio][: latent.shape[1]]
            apply_rotary_emb(latent[..., -self.args.rope_head_dim :], turns)
            fp4_act_quant(latent, ENTRY_GROUP, True, scale_dtype=FP8)
            self.compress_kv_cache[: len(x), first : first + latent.shape[1]] = latent
        return shared_attn.compress_kv[: len(x), :entries], shared_attn.topk_idxs

    def forward(self, x: Tensor, start_pos: int) -> Tensor:
        args, rd, (batch, tokens, _) = self.args, self.args.rope_head_dim, x.shape
        freqs = self.freqs_cis[start_pos : start_pos + tokens]
        qr = self.q_norm(self.wq_a(x))
        q = self.wq_b(qr).unflatten(-1, (args.n_heads, args.head_dim))
        apply_rotary_emb(q[..., -rd:], freqs)
        kv = self.kv_norm(self.wkv(x))
        apply_rotary_emb(kv[..., -rd:], freqs)
        act_quant(kv, GROUP, SCALES, E8M0, True)
        kv, places = self._window(kv, start_pos)
        places = places.expand(batch, -1, -1)
        if self.ratio:
            entries, chosen = self._past(x, qr, start_pos, kv.shape[1])
            kv, places = torch.cat([kv, entries], dim=1), torch.cat([places, chosen], dim=-1)
        o = sparse_attn(q, kv, self.attn_sink, places.int().contiguous(), args.head_dim**-0.5)
        apply_rotary_emb(o[..., -rd:], freqs, True)
        o = o.reshape(batch, tokens, args.o_groups, -1)
        o = torch.einsum("bsgd,grd->bsgr", o, self.wo_a.weight.view(args.o_groups, args.o_lora_rank, -1))
        return self.wo_b(o.flatten(2))


class Gate(nn.Module):
    """Chooses experts by score plus bias. The weights have no bias."""

    def __init__(self, args: ModelArgs, layer_id: int) -> None:
        super().__init__()
        experts, self.topk = args.experts(layer_id)
        self.route_scale = args.route_scale
        self.weight = _parameter(experts, args.dim)
        self.bias = _parameter(experts, dtype=torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.softplus(F.linear(x.float(), self.weight.float())).sqrt()
        indices = (scores + self.bias).topk(self.topk, dim=-1)[1]
        weights = scores.gather(1, indices)
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.route_scale, indices


class Expert(nn.Module):
    """A SwiGLU with clamped inputs; the routing weight goes in before the last product."""

    def __init__(self, args: ModelArgs, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.w1 = Linear(args.dim, args.moe_inter_dim, dtype)
        self.w2 = Linear(args.moe_inter_dim, args.dim, dtype)
        self.w3 = Linear(args.dim, args.moe_inter_dim, dtype)
        self.limit = args.swiglu_limit

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        gate, up = self.w1(x).float().clamp(max=self.limit), self.w3(x).float().clamp(-self.limit, self.limit)
        y = F.silu(gate) * up
        return self.w2((y if weights is None else y * weights).to(x.dtype))


class MoE(nn.Module):
    """Routed experts and the shared one, summed in float32."""

    def __init__(self, args: ModelArgs, layer_id: int) -> None:
        super().__init__()
        dtype = FP4 if args.expert_dtype == "fp4" else None
        self.gate = Gate(args, layer_id)
        self.experts = nn.ModuleList(Expert(args, dtype) for _ in range(args.experts(layer_id)[0]))
        self.shared_experts = Expert(args)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, indices = self.gate(tokens)
        y = torch.zeros_like(tokens, dtype=torch.float32)
        for index in indices.unique(sorted=True).tolist():
            row, slot = torch.where(indices == index)
            y[row] += self.experts[index](tokens[row], weights[row, slot, None])
        y += self.shared_experts(tokens)
        return y.to(x.dtype).view_as(x)


class Block(nn.Module):
    """One layer. Each half collapses the streams by the weights that the half before it made."""

    attention_cls: type[Attention] = Attention

    def __init__(self, layer_id: int, args: ModelArgs, engram_layout: EngramLayout | None = None) -> None:
        super().__init__()
        self.args = args
        self.attn = self.attention_cls(layer_id, args)
        self.ffn = MoE(args, layer_id)
        has_engram = engram_layout is not None and layer_id in engram_layout.layer_ids
        self.engram = Engram(args, layer_id, engram_layout) if has_engram else None
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        n = args.hc_mult
        for half in ("attn", "ffn"):
            for part, shape in (("fn", ((2 + n) * n, n * args.dim)), ("base", ((2 + n) * n,)), ("scale", (3,))):
                self.register_parameter(f"hc_{half}_{part}", _parameter(*shape, dtype=torch.float32))

    def _mixes(self, x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> Any:
        args, flat = self.args, x.flatten(2).float()
        mixes = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + args.norm_eps)
        return hc_split_sinkhorn(mixes, scale, base, args.hc_mult, args.hc_sinkhorn_iters, args.hc_eps)

    def hc_pre(self, x: Tensor, pre_mix: Tensor) -> Tensor:
        return (pre_mix.unsqueeze(-1) * x.float()).sum(dim=2).to(x.dtype)

    def hc_post(self, x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        mixed = (comb.unsqueeze(-1) * residual.float().unsqueeze(3)).sum(dim=2)
        return (post.unsqueeze(-1) * x.float().unsqueeze(2) + mixed).to(x.dtype)

    def forward(
        self, x: Tensor, start_pos: int, pre_mix: Tensor, image_mask: None, *attn_args: Tensor
    ) -> tuple[Tensor, Tensor]:
        next_mix, post, comb = self._mixes(x, self.hc_attn_fn, self.hc_attn_scale, self.hc_attn_base)
        y = self.attn(self.attn_norm(self.hc_pre(x, pre_mix)), start_pos, *attn_args)
        x, pre_mix = self.hc_post(y, x, post, comb), next_mix
        next_mix, post, comb = self._mixes(x, self.hc_ffn_fn, self.hc_ffn_scale, self.hc_ffn_base)
        y = self.ffn(self.ffn_norm(self.hc_pre(x, pre_mix)))
        return self.hc_post(y, x, post, comb), next_mix


class ParallelHead(nn.Module):
    """Logits, in float32; of the last position unless all are asked for."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = _parameter(vocab_size, dim, dtype=torch.float32)

    def forward(self, x: Tensor, full_logits: bool = False) -> Tensor:
        return F.linear((x if full_logits else x[:, -1]).float(), self.weight)


def sample(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The most likely token; of a temperature above 0, a random one."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.distributions.Categorical(logits=logits / temperature).sample()


class DSparkAttention(Attention):
    """Attention of a drafted block over itself and over a ring of keys of the known tokens, made of `main_x`."""

    def _rotated_keys(self, x: Tensor, start: int) -> Tensor:
        keys = self.kv_norm(self.wkv(x))
        apply_rotary_emb(keys[..., -self.args.rope_head_dim :], self.freqs_cis[start : start + x.shape[1]])
        act_quant(keys, GROUP, SCALES, E8M0, True)
        return keys

    def forward(self, x: Tensor, start_pos: int, main_x: Tensor) -> Tensor:
        args, rd, window = self.args, self.args.rope_head_dim, self.window_size
        batch, known = len(x), start_pos + main_x.shape[1]
        keys = self._rotated_keys(main_x, start_pos)
        last = torch.arange(max(start_pos, known - window), known)
        self.window_kv_cache[:batch, last % window] = keys[:, last - start_pos]
        if start_pos == 0:
            return x
        block = x.shape[1]
        q = self.wq_b(self.q_norm(self.wq_a(x))).unflatten(-1, (args.n_heads, args.head_dim))
        freqs = self.freqs_cis[known : known + block]
        apply_rotary_emb(q[..., -rd:], freqs)
        kv = torch.cat([self.window_kv_cache[:batch], self._rotated_keys(x, known)], dim=1)
        places = torch.cat([torch.arange(min(known, window)), window + torch.arange(block)])
        places = places.int().expand(batch, block, -1).contiguous()
        o = sparse_attn(q, kv, self.attn_sink, places, args.head_dim**-0.5)
        apply_rotary_emb(o[..., -rd:], freqs, True)
        o = o.reshape(batch, block, args.o_groups, -1)
        o = torch.einsum("bsgd,grd->bsgr", o, self.wo_a.weight.view(args.o_groups, args.o_lora_rank, -1))
        return self.wo_b(o.flatten(2))


class DSparkMarkovHead(nn.Module):
    """Logits that depend on the token before alone."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, rank, _weight=torch.empty(vocab_size, rank))
        self.head = ParallelHead(vocab_size, rank)

    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        row = self.embed(token_ids)
        return self.head(row, full_logits=True), row


class DSparkConfidenceHead(nn.Module):
    """The logit of a draft being accepted, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = Linear(width, 1, dtype=torch.float32)

    def forward(self, hidden: Tensor, row: Tensor) -> Tensor:
        return self.proj(torch.cat([hidden, row], dim=-1).float())[..., 0]


class DSparkBlock(Block):
    """A draft stage. The first one also makes what all of them know; the last one also chooses the tokens."""

    attention_cls = DSparkAttention

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__(layer_id, args)
        self.block_size = args.dspark_block_size
        self.embed: Any = None
        self.head: Any = None
        if layer_id == args.n_layers:
            self.main_proj = Linear(args.dim * len(args.dspark_target_layer_ids), args.dim)
            self.main_norm = RMSNorm(args.dim, args.norm_eps)
        if layer_id == args.n_layers + args.n_mtp_layers - 1:
            self.norm = RMSNorm(args.dim, args.norm_eps)
            self.markov_head = DSparkMarkovHead(args.vocab_size, args.dspark_markov_rank)
            self.confidence_head = DSparkConfidenceHead(args.dim + args.dspark_markov_rank)

    def forward(self, x: Tensor, start_pos: int, pre_mix: Tensor, main_x: Tensor) -> tuple[Tensor, Tensor]:
        if start_pos == 0:
            return self.attn(x, start_pos, main_x), pre_mix
        return super().forward(x, start_pos, pre_mix, None, main_x)

    def forward_embed(self, main_hidden: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The streams of the block, which begins with `input_ids` [b]; and what is known of the tokens before."""
        ids = torch.full((len(input_ids), self.block_size), self.args.dspark_noise_token_id)
        ids[:, 0] = input_ids
        x = self.embed(ids).unsqueeze(2).repeat(1, 1, self.args.hc_mult, 1)
        return x, self.main_norm(self.main_proj(main_hidden))

    def forward_head(self, x: Tensor, pre_mix: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The ids with which the block began and those that it drafts, their logits, and its confidence."""
        hidden = self.hc_pre(x, pre_mix)
        logits = self.head(self.norm(hidden), full_logits=True)
        drafted, rows = [input_ids], []
        for at in range(self.block_size):
            bias, row = self.markov_head(drafted[-1])
            logits[:, at] += bias
            rows.append(row)
            drafted.append(sample(logits[:, at], self.args.temperature))
        return torch.stack(drafted, dim=1), logits, self.confidence_head(hidden, torch.stack(rows, dim=1))


def make_identity_pre_mix(x: Tensor, hc_mult: int) -> Tensor:
    """The first layer's input is the first stream."""
    return F.one_hot(torch.zeros(x.shape[:2], dtype=torch.int64), hc_mult).float()


class _Shared:
    """The values that attention layers hand on."""

    compress_kv: Tensor
    index_k: Tensor
    topk_idxs: Tensor
    candidates: Tensor


shared_attn = _Shared()


class Transformer(nn.Module):
    """The whole model."""

    def __init__(self, args: ModelArgs, tokenizer: Any = None) -> None:
        global default_dtype
        default_dtype = FP8 if args.dtype == "fp8" else torch.bfloat16
        super().__init__()
        self.args = args
        layout = EngramLayout.from_args(args)
        self.engram_hash = None if layout is None else NgramHashState(args, layout, tokenizer)
        self.embed = nn.Embedding(args.vocab_size, args.dim, _weight=torch.empty(args.vocab_size, args.dim))
        self.layers = nn.ModuleList(Block(layer, args, layout) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.head = ParallelHead(args.vocab_size, args.dim)
        stages = range(args.n_layers, args.n_layers + args.n_mtp_layers) if args.dspark_block_size else ()
        self.mtp = nn.ModuleList(DSparkBlock(layer, args) for layer in stages)
        for block in self.mtp:
            block.embed, block.head = self.embed, self.head

    def forward(self, input_ids: Tensor, start_pos: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """The next token, the logits [b, vocab] of the last one, and what the draft stages read."""
        rows = None if self.engram_hash is None else self.engram_hash(input_ids, start_pos)
        h = self.embed(input_ids).unsqueeze(2).repeat(1, 1, self.args.hc_mult, 1)
        pre_mix = make_identity_pre_mix(h, self.args.hc_mult)
        read = []
        for number, layer in enumerate(self.layers):
            if layer.engram is not None:
                h = layer.engram(h, rows[:, :, layer.engram.layer_hash_index])
            if number in self.args.dspark_target_layer_ids:
                read.append(h.mean(dim=2))
            h, pre_mix = layer(h, start_pos, pre_mix, None)
        logits = self.head(self.norm(layer.hc_pre(h, pre_mix)))
        return logits.argmax(dim=-1), logits, torch.cat(read, dim=-1) if read else None

    def forward_spec(
        self, input_ids: Tensor, main_hidden: Tensor, start_pos: int = 0
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """A draft after `input_ids` [b], which follow the tokens of `main_hidden`; none in the first call."""
        h, main_x = self.mtp[0].forward_embed(main_hidden, input_ids)
        pre_mix = make_identity_pre_mix(h, self.args.hc_mult)
        for block in self.mtp:
            h, pre_mix = block(h, start_pos, pre_mix, main_x)
        return None if start_pos == 0 else self.mtp[-1].forward_head(h, pre_mix, input_ids)

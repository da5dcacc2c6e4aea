"""A small stand-in for the release's `inference/model.py`: the same names, written for the tests from a specification.

It evaluates a prompt in one call (start_pos 0) and then one token at a time, from its caches, on one device.
Parameters are left uninitialised, whoever loads the module fills them. `kernel` and `fast_hadamard_transform` come from
the loader.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kernel import act_quant, fp4_act_quant, fp4_gemm, fp8_gemm, hc_split_sinkhorn, sparse_attn
from torch import Tensor, nn

FP4, FP8, E8M0 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e8m0fnu
LINEAR_GROUP = 128  # inputs of a quantised linear that share a scale; also the side of an FP8 weight's tile
FP4_GROUP = 32
KV_GROUP = 64

# Set by Transformer.__init__ from its arguments.
default_dtype: torch.dtype = torch.bfloat16
scale_fmt: str | None = None
scale_dtype: torch.dtype = torch.float32


@dataclass
class ModelArgs:
    """The fields of inference/config.json; sizes default to DeepSeek-V4-Flash."""

    max_batch_size: int = 4
    max_seq_len: int = 4096
    dtype: str = "fp8"  # bf16 | fp8
    scale_fmt: str | None = "ue8m0"
    expert_dtype: str | None = None  # None (as dtype) | fp4
    scale_dtype: str = "fp8"  # fp32 | fp8
    vocab_size: int = 129280
    dim: int = 4096
    moe_inter_dim: int = 2048
    n_layers: int = 43
    n_hash_layers: int = 3
    n_mtp_layers: int = 1
    n_heads: int = 64
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    n_activated_experts: int = 6
    score_func: str = "sqrtsoftplus"
    route_scale: float = 1.5
    swiglu_limit: float = 10.0
    q_lora_rank: int = 1024
    head_dim: int = 512
    rope_head_dim: int = 64
    norm_eps: float = 1e-6
    o_groups: int = 8
    o_lora_rank: int = 1024
    window_size: int = 128
    compress_ratios: Sequence[int] = (0, 0, *(4, 128) * 20, 4, 0)
    compress_rope_theta: float = 160000.0
    original_seq_len: int = 65536
    rope_theta: float = 10000.0
    rope_factor: float = 16.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6


def _parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, by the kernel that the weight's dtype asks for."""
    if weight.dtype not in (FP4, FP8):
        return F.linear(x, weight)
    gemm = fp4_gemm if weight.dtype == FP4 else fp8_gemm
    codes, scales = act_quant(x, LINEAR_GROUP, scale_fmt, scale_dtype)
    return gemm(codes, scales, weight, weight.scale, scale_dtype)


class Linear(nn.Module):
    """A linear map, [out, in], whose weight may be FP8 or packed FP4 with scales beside it."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        dtype = dtype or default_dtype
        self.weight = _parameter(out_features, in_features // 2 if dtype == FP4 else in_features, dtype=dtype)
        scale = None
        if dtype == FP4:
            scale = _parameter(out_features, in_features // FP4_GROUP, dtype=E8M0)
        elif dtype == FP8:
            tiles = (math.ceil(size / LINEAR_GROUP) for size in (out_features, in_features))
            scale = _parameter(*tiles, dtype=E8M0)
        self.register_parameter("scale", scale)
        if scale is not None:
            self.weight.scale = scale  # linear() is given the weight alone
        self.register_parameter("bias", _parameter(out_features) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """RMS normalisation in float32 with one cast back."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(dim, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


def precompute_freqs_cis(
    dim: int,
    seqlen: int,
    original_seq_len: int,
    base: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
) -> Tensor:
    """Unit complex numbers [seqlen, dim / 2]; stretched as YaRN does unless original_seq_len is 0."""
    freqs = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if original_seq_len > 0:

        def index_turning(times: float) -> float:
            """The (fractional) index of the frequency that turns so many times over the original length."""
            return dim * math.log(original_seq_len / (times * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(index_turning(beta_fast)), 0)
        high = min(math.ceil(index_turning(beta_slow)), dim - 1)
        index = torch.arange(dim // 2, dtype=torch.float32)
        slow = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
        freqs = freqs / factor * slow + freqs * (1 - slow)
    angles = torch.outer(torch.arange(seqlen, dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor, inverse: bool = False) -> Tensor:
    """Rotate neighbouring pairs of x [b, s, (h,) d] in place by freqs_cis [s, d / 2]."""
    turn = freqs_cis.conj() if inverse else freqs_cis
    if x.ndim == 4:
        turn = turn.unsqueeze(1)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return x.copy_(torch.view_as_real(pairs * turn).flatten(-2))


def rotate_activation(x: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of the last axis."""
    from fast_hadamard_transform import hadamard_transform

    return hadamard_transform(x, scale=x.size(-1) ** -0.5)


def _complete_blocks(start: int, seqlen: int, ratio: int) -> Tensor:
    """[s, 1]: how many entries each position sees, the one of its own block included once that is complete."""
    return torch.arange(start + 1, start + seqlen + 1).unsqueeze(1) // ratio


def _window_indices(start: int, seqlen: int, window: int) -> Tensor:
    """Where the keys of each position's window are, oldest first, then -1.

    In a prompt [s, min(s, window)], among its keys; of one more token [1, window], in the ring of the last keys.
    """
    position = torch.arange(start, start + seqlen).unsqueeze(1)
    slots = min(seqlen, window) if start == 0 else window
    indices = (position - window + 1).clamp(min=0) + torch.arange(slots)
    return (indices if start == 0 else indices % window).masked_fill(indices > position, -1)


class Compressor(nn.Module):
    """Pools blocks of tokens into one entry each. With a ratio of 4 an entry looks at the block before it as well."""

    def __init__(self, args: ModelArgs, compress_ratio: int, head_dim: int, rotate: bool = False) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rope_head_dim = args.rope_head_dim
        self.compress_ratio = compress_ratio
        self.overlap = compress_ratio == 4
        self.rotate = rotate
        width = head_dim * (2 if self.overlap else 1)
        self.ape = _parameter(compress_ratio, width, dtype=torch.float32)
        self.wkv = Linear(args.dim, width, dtype=torch.float32)
        self.wgate = Linear(args.dim, width, dtype=torch.float32)
        self.norm = RMSNorm(head_dim, args.norm_eps)
        self.kv_cache: Tensor | None = None  # both from the owner
        self.freqs_cis: Tensor | None = None
        # Rows of the block that is not complete, and before them, if blocks overlap, those of the last complete one.
        rows = (args.max_batch_size, compress_ratio * (2 if self.overlap else 1), width)
        self.register_buffer("kv_state", torch.zeros(rows, dtype=torch.float32), persistent=False)
        self.register_buffer("score_state", torch.full(rows, -math.inf, dtype=torch.float32), persistent=False)

    def _with_block_before(self, rows: Tensor, fill: float) -> Tensor:
        """[b, T, r, 2d] -> [b, T, 2r, d]: the block before's first half, then the block's own second half."""
        ahead, own = rows.split(self.head_dim, dim=-1)
        before = F.pad(ahead[:, :-1], (0, 0, 0, 0, 1, 0), value=fill)
        return torch.cat([before, own], dim=2)

    def _prompt(self, values: Tensor, gates: Tensor) -> Tensor | None:
        """The pooled blocks [b, T, d] of a prompt; what later tokens need of it is kept."""
        batch, seqlen, _ = values.shape
        ratio = self.compress_ratio
        entries = seqlen // ratio
        used = entries * ratio
        own = ratio if self.overlap else 0
        gates = gates + self.ape.repeat(entries + 1, 1)[:seqlen]
        for state, rows in ((self.kv_state, values), (self.score_state, gates)):
            state[:batch, own : own + seqlen - used] = rows[:, used:]
            if self.overlap and entries:
                state[:batch, :ratio] = rows[:, used - ratio : used]
        if entries == 0:
            return None
        values, gates = (rows[:, :used].unflatten(1, (entries, ratio)) for rows in (values, gates))
        if self.overlap:
            values = self._with_block_before(values, 0.0)
            gates = self._with_block_before(gates, -math.inf)
        return (values * gates.softmax(dim=2)).sum(dim=2)

    def _token(self, values: Tensor, gates: Tensor, start_pos: int) -> Tensor | None:
        """The pooled block [b, 1, d] that one more token completes, or None if it completes none."""
        batch, ratio, d = len(values), self.compress_ratio, self.head_dim
        place = start_pos % ratio
        own = ratio if self.overlap else 0
        self.kv_state[:batch, own + place] = values[:, 0]
        self.score_state[:batch, own + place] = gates[:, 0] + self.ape[place]
        if place + 1 < ratio:
            return None
        states = (self.kv_state[:batch], self.score_state[:batch])
        if not self.overlap:
            rows, scores = states
            return (rows * scores.softmax(dim=1)).sum(dim=1, keepdim=True)
        rows, scores = (torch.cat([state[:, :ratio, :d], state[:, ratio:, d:]], dim=1) for state in states)
        for state in states:
            state[:, :ratio] = state[:, ratio:].clone()
        return (rows * scores.softmax(dim=1)).sum(dim=1, keepdim=True)

    def forward(self, x: Tensor, start_pos: int) -> Tensor | None:
        """The entries [b, T, d] of the blocks that become complete, or None where there is none."""
        ratio, rd = self.compress_ratio, self.rope_head_dim
        wide = x.float()
        values, gates = self.wkv(wide), self.wgate(wide)
        kv = self._prompt(values, gates) if start_pos == 0 else self._token(values, gates, start_pos)
        if kv is None:
            return None
        first = start_pos // ratio
        kv = self.norm(kv.to(x.dtype))
        apply_rotary_emb(kv[..., -rd:], self.freqs_cis[first * ratio :: ratio][: kv.size(1)])
        if self.rotate:
            kv = rotate_activation(kv)
            fp4_act_quant(kv, FP4_GROUP, True)
        else:
            act_quant(kv[..., :-rd], KV_GROUP, scale_fmt, scale_dtype, True)
        if self.kv_cache is not None:
            self.kv_cache[: kv.size(0), first : first + kv.size(1)] = kv
        return kv


class Indexer(nn.Module):
    """Chooses, for every query, the compressed entries it attends to."""

    def __init__(self, args: ModelArgs, compress_ratio: int = 4) -> None:
        super().__init__()
        self.n_heads = args.index_n_heads
        self.head_dim = args.index_head_dim
        self.rope_head_dim = args.rope_head_dim
        self.index_topk = args.index_topk
        self.compress_ratio = compress_ratio
        self.scale = self.head_dim**-0.5 * self.n_heads**-0.5
        self.wq_b = Linear(args.q_lora_rank, self.n_heads * self.head_dim)
        self.weights_proj = Linear(args.dim, self.n_heads, dtype=torch.bfloat16)
        self.compressor = Compressor(args, compress_ratio, self.head_dim, rotate=True)
        entries = args.max_seq_len // compress_ratio
        self.register_buffer("kv_cache", torch.zeros(args.max_batch_size, entries, self.head_dim), persistent=False)
        self.freqs_cis: Tensor | None = None  # from the owner

    def forward(self, x: Tensor, qr: Tensor, start_pos: int, offset: int) -> Tensor:
        """Places [b, s, k] of the chosen entries, counted from `offset`; -1 for those the query does not see."""
        batch, seqlen, _ = x.shape
        self.compressor.kv_cache = self.kv_cache
        self.compressor.freqs_cis = self.freqs_cis
        self.compressor(x, start_pos)
        entries = (start_pos + seqlen) // self.compress_ratio
        keys = self.kv_cache[:batch, :entries]
        q = self.wq_b(qr).unflatten(-1, (self.n_heads, self.head_dim))
        apply_rotary_emb(q[..., -self.rope_head_dim :], self.freqs_cis[start_pos : start_pos + seqlen])
        q = rotate_activation(q)
        fp4_act_quant(q, FP4_GROUP, True)
        weights = self.weights_proj(x) * self.scale
        if entries == 0:
            return torch.empty(batch, seqlen, 0, dtype=torch.int64)

        scores = torch.einsum("bshd,btd->bsht", q, keys).relu()
        scores = (scores * weights.unsqueeze(-1)).sum(dim=2)
        visible = _complete_blocks(start_pos, seqlen, self.compress_ratio)
        scores = scores.masked_fill(torch.arange(entries) >= visible, -math.inf)
        chosen = scores.topk(min(self.index_topk, entries), dim=-1)[1]
        return torch.where(chosen < visible, chosen + offset, -1)


class Attention(nn.Module):
    """Attention with one key that is also the value: over a window and, by the layer's ratio, compressed entries."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.n_heads = args.n_heads
        self.head_dim = args.head_dim
        self.rope_head_dim = args.rope_head_dim
        self.o_groups = args.o_groups
        self.o_lora_rank = args.o_lora_rank
        self.window_size = args.window_size
        self.compress_ratio = args.compress_ratios[layer_id]
        self.eps = args.norm_eps
        self.softmax_scale = self.head_dim**-0.5

        self.attn_sink = _parameter(self.n_heads, dtype=torch.float32)
        self.wq_a = Linear(args.dim, args.q_lora_rank)
        self.q_norm = RMSNorm(args.q_lora_rank, self.eps)
        self.wq_b = Linear(args.q_lora_rank, self.n_heads * self.head_dim)
        self.wkv = Linear(args.dim, self.head_dim)
        self.kv_norm = RMSNorm(self.head_dim, self.eps)
        group_width = self.n_heads * self.head_dim // self.o_groups
        self.wo_a = Linear(group_width, self.o_groups * self.o_lora_rank, dtype=torch.bfloat16)
        self.wo_b = Linear(self.o_groups * self.o_lora_rank, args.dim)

        ratio = self.compress_ratio
        self.compressor = Compressor(args, ratio, self.head_dim) if ratio else None
        self.indexer = Indexer(args, ratio) if ratio == 4 else None
        entries = args.max_seq_len // ratio if ratio else 0
        # A ring of the last keys, and behind it the compressed entries.
        keys = self.window_size + entries
        self.register_buffer("kv_cache", torch.zeros(args.max_batch_size, keys, self.head_dim), persistent=False)
        freqs_cis = precompute_freqs_cis(
            self.rope_head_dim,
            args.max_seq_len,
            args.original_seq_len if ratio else 0,
            args.compress_rope_theta if ratio else args.rope_theta,
            args.rope_factor,
            args.beta_fast,
            args.beta_slow,
        )
        self.register_buffer("freqs_cis", freqs_cis, persistent=False)

    def _entry_indices(self, x: Tensor, qr: Tensor, start_pos: int, offset: int) -> Tensor:
        """Places [b, s, k] of the entries to attend to, -1 for none."""
        batch, seqlen, _ = x.shape
        if self.indexer is not None:
            self.indexer.freqs_cis = self.freqs_cis
            return self.indexer(x, qr, start_pos, offset)
        entry = torch.arange((start_pos + seqlen) // self.compress_ratio)
        visible = _complete_blocks(start_pos, seqlen, self.compress_ratio)
        return torch.where(entry < visible, entry + offset, -1).expand(batch, -1, -1)

    def forward(self, x: Tensor, start_pos: int) -> Tensor:
        batch, seqlen, _ = x.shape
        rd, window = self.rope_head_dim, self.window_size
        freqs = self.freqs_cis[start_pos : start_pos + seqlen]

        qr = self.q_norm(self.wq_a(x))
        q = self.wq_b(qr).unflatten(-1, (self.n_heads, self.head_dim))
        q *= torch.rsqrt(q.square().mean(-1, keepdim=True) + self.eps)
        apply_rotary_emb(q[..., -rd:], freqs)

        kv = self.kv_norm(self.wkv(x))
        apply_rotary_emb(kv[..., -rd:], freqs)
        act_quant(kv[..., :-rd], KV_GROUP, scale_fmt, scale_dtype, True)

        last = torch.arange(max(seqlen - window, 0), seqlen)
        self.kv_cache[:batch, (start_pos + last) % window] = kv[:, last]
        indices = _window_indices(start_pos, seqlen, window).expand(batch, -1, -1)
        if self.compressor is not None:
            offset = seqlen if start_pos == 0 else window
            indices = torch.cat([indices, self._entry_indices(x, qr, start_pos, offset)], dim=-1)
            self.compressor.kv_cache = self.kv_cache[:, window:]
            self.compressor.freqs_cis = self.freqs_cis
            entries = self.compressor(x, start_pos)
            if entries is not None and start_pos == 0:
                kv = torch.cat([kv, entries], dim=1)
        if start_pos > 0:
            kv = self.kv_cache[:batch]

        o = sparse_attn(q, kv, self.attn_sink, indices.int().contiguous(), self.softmax_scale)
        apply_rotary_emb(o[..., -rd:], freqs, True)
        o = o.reshape(batch, seqlen, self.o_groups, -1)
        o = torch.einsum("bsgd,grd->bsgr", o, self.wo_a.weight.view(self.o_groups, self.o_lora_rank, -1))
        return self.wo_b(o.flatten(2))


class Gate(nn.Module):
    """Chooses experts: by score plus bias or, in the first layers, by the token's id. The weights have no bias."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        if args.score_func != "sqrtsoftplus":
            raise NotImplementedError(f"score_func {args.score_func!r}")
        self.topk = args.n_activated_experts
        self.route_scale = args.route_scale
        self.hash = layer_id < args.n_hash_layers
        self.weight = _parameter(args.n_routed_experts, args.dim)
        if self.hash:
            self.tid2eid = _parameter(args.vocab_size, self.topk, dtype=torch.int32)
            self.register_parameter("bias", None)
        else:
            self.bias = _parameter(args.n_routed_experts, dtype=torch.float32)

    def forward(self, x: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts [M, k] for x [M, D] and input_ids [M]."""
        scores = F.softplus(F.linear(x.float(), self.weight.float())).sqrt()
        indices = self.tid2eid[input_ids].long() if self.hash else (scores + self.bias).topk(self.topk, dim=-1)[1]
        weights = scores.gather(1, indices)
        weights = weights / weights.sum(dim=-1, keepdim=True) * self.route_scale
        return weights, indices


class Expert(nn.Module):
    """A SwiGLU with clamped inputs; the routing weight goes in before the last product."""

    def __init__(self, dim: int, inter_dim: int, dtype: torch.dtype | None = None, swiglu_limit: float = 0) -> None:
        super().__init__()
        self.w1 = Linear(dim, inter_dim, dtype=dtype)
        self.w2 = Linear(inter_dim, dim, dtype=dtype)
        self.w3 = Linear(dim, inter_dim, dtype=dtype)
        self.swiglu_limit = swiglu_limit

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        gate, up = self.w1(x).float(), self.w3(x).float()
        if self.swiglu_limit > 0:
            gate = gate.clamp(max=self.swiglu_limit)
            up = up.clamp(-self.swiglu_limit, self.swiglu_limit)
        y = F.silu(gate) * up
        if weights is not None:
            y = y * weights
        return self.w2(y.to(x.dtype))


class MoE(nn.Module):
    """Routed experts and the shared one, summed in float32."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        inter_dim, limit = args.moe_inter_dim, args.swiglu_limit
        dtype = FP4 if args.expert_dtype == "fp4" else None
        self.gate = Gate(layer_id, args)
        self.experts = nn.ModuleList(Expert(args.dim, inter_dim, dtype, limit) for _ in range(args.n_routed_experts))
        self.shared_experts = Expert(args.dim, inter_dim * args.n_shared_experts, swiglu_limit=limit)

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, indices = self.gate(tokens, input_ids.flatten())
        y = torch.zeros_like(tokens, dtype=torch.float32)
        for index in indices.unique(sorted=True).tolist():
            row, slot = torch.where(indices == index)
            # A token's id may name an expert twice, so that a row comes up twice.
            y.index_add_(0, row, self.experts[index](tokens[row], weights[row, slot, None]).float())
        y += self.shared_experts(tokens)
        return y.to(x.dtype).view_as(x)


def _stream_mixes(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    """fn of the flattened streams [b, s, n * d], over their root mean square; all in float32."""
    flat = x.flatten(2).float()
    return F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def _weighted_streams(x: Tensor, pre: Tensor) -> Tensor:
    """The streams [b, s, n, d] summed with the weights [b, s, n], in float32."""
    return (pre.unsqueeze(-1) * x.float()).sum(dim=2).to(x.dtype)


class Block(nn.Module):
    """One layer: attention and experts, each between a mix of the streams into one and back."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.norm_eps = args.norm_eps
        self.hc_mult = n = args.hc_mult
        self.hc_sinkhorn_iters = args.hc_sinkhorn_iters
        self.hc_eps = args.hc_eps
        self.attn = Attention(layer_id, args)
        self.ffn = MoE(layer_id, args)
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        mixes = (2 + n) * n
        self.hc_attn_fn = _parameter(mixes, n * args.dim, dtype=torch.float32)
        self.hc_ffn_fn = _parameter(mixes, n * args.dim, dtype=torch.float32)
        self.hc_attn_base = _parameter(mixes, dtype=torch.float32)
        self.hc_ffn_base = _parameter(mixes, dtype=torch.float32)
        self.hc_attn_scale = _parameter(3, dtype=torch.float32)
        self.hc_ffn_scale = _parameter(3, dtype=torch.float32)

    def hc_pre(self, x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sublayer's input [b, s, d] and what hc_post needs, from the streams [b, s, n, d]."""
        mixes = _stream_mixes(x, fn, self.norm_eps)
        pre, post, comb = hc_split_sinkhorn(mixes, scale, base, self.hc_mult, self.hc_sinkhorn_iters, self.hc_eps)
        return _weighted_streams(x, pre), post, comb

    def hc_post(self, x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """The new streams: post[k] * x plus the sum over j of comb[j, k] * residual[j]."""
        mixed = (comb.unsqueeze(-1) * residual.float().unsqueeze(3)).sum(dim=2)
        return (post.unsqueeze(-1) * x.float().unsqueeze(2) + mixed).to(x.dtype)

    def forward(self, x: Tensor, start_pos: int, input_ids: Tensor) -> Tensor:
        y, post, comb = self.hc_pre(x, self.hc_attn_fn, self.hc_attn_scale, self.hc_attn_base)
        y = self.attn(self.attn_norm(y), start_pos)
        x = self.hc_post(y, x, post, comb)
        y, post, comb = self.hc_pre(x, self.hc_ffn_fn, self.hc_ffn_scale, self.hc_ffn_base)
        y = self.ffn(self.ffn_norm(y), input_ids)
        return self.hc_post(y, x, post, comb)


class ParallelEmbedding(nn.Module):
    """The embedding table (whole: there is one device)."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = _parameter(vocab_size, dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight)


class ParallelHead(nn.Module):
    """Streams to logits, in float32 and for the last position only."""

    def __init__(self, vocab_size: int, dim: int, norm_eps: float = 1e-6, hc_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.hc_eps = hc_eps
        self.weight = _parameter(vocab_size, dim, dtype=torch.float32)

    def get_logits(self, x: Tensor) -> Tensor:
        """Logits [b, vocab] of the last position of x [b, s, d]."""
        return F.linear(x[:, -1].float(), self.weight)

    def hc_head(self, x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> Tensor:
        """The streams [b, s, n, d] as one."""
        pre = torch.sigmoid(_stream_mixes(x, fn, self.norm_eps) * scale + base) + self.hc_eps
        return _weighted_streams(x, pre)

    def forward(self, x: Tensor, hc_fn: Tensor, hc_scale: Tensor, hc_base: Tensor, norm: nn.Module) -> Tensor:
        return self.get_logits(norm(self.hc_head(x, hc_fn, hc_scale, hc_base)))


class MTPBlock(Block):
    """A layer after the last one, which drafts the token after the next. Embedding and head are those of the model."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__(layer_id, args)
        n = args.hc_mult
        self.e_proj = Linear(args.dim, args.dim)
        self.h_proj = Linear(args.dim, args.dim)
        self.enorm = RMSNorm(args.dim, args.norm_eps)
        self.hnorm = RMSNorm(args.dim, args.norm_eps)
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.hc_head_fn = _parameter(n, n * args.dim, dtype=torch.float32)
        self.hc_head_base = _parameter(n, dtype=torch.float32)
        self.hc_head_scale = _parameter(1, dtype=torch.float32)
        self.embed: ParallelEmbedding | None = None
        self.head: ParallelHead | None = None

    def forward(self, x: Tensor, start_pos: int, input_ids: Tensor) -> Tensor:
        """Logits [b, vocab] after the last of the streams [b, s, n, d] and the ids [b, s] of the tokens after them."""
        token = self.e_proj(self.enorm(self.embed(input_ids))).unsqueeze(2)
        x = super().forward(token + self.h_proj(self.hnorm(x)), start_pos, input_ids)
        return self.head(x, self.hc_head_fn, self.hc_head_scale, self.hc_head_base, self.norm)


class Transformer(nn.Module):
    """The model. `mtp` stays empty: nothing calls it on the way to the logits."""

    def __init__(self, args: ModelArgs) -> None:
        global default_dtype, scale_fmt, scale_dtype
        default_dtype = FP8 if args.dtype == "fp8" else torch.bfloat16
        scale_fmt = args.scale_fmt
        scale_dtype = E8M0 if args.scale_dtype == "fp8" else torch.float32
        super().__init__()
        self.max_seq_len = args.max_seq_len
        self.hc_mult = n = args.hc_mult
        self.embed = ParallelEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(layer_id, args) for layer_id in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.head = ParallelHead(args.vocab_size, args.dim, args.norm_eps, args.hc_eps)
        self.mtp = nn.ModuleList()
        self.hc_head_fn = _parameter(n, n * args.dim, dtype=torch.float32)
        self.hc_head_base = _parameter(n, dtype=torch.float32)
        self.hc_head_scale = _parameter(1, dtype=torch.float32)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, start_pos: int = 0) -> Tensor:
        """Logits [b, vocab] after the last token of input_ids [b, s]."""
        h = self.embed(input_ids).unsqueeze(2).repeat(1, 1, self.hc_mult, 1)
        for layer in self.layers:
            h = layer(h, start_pos, input_ids)
        return self.head(h, self.hc_head_fn, self.hc_head_scale, self.hc_head_base, self.norm)

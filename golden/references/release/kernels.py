"""CPU stand-ins for the GPU kernels that DeepSeek's inference code imports from ``kernel`` and a Hadamard package.

They have the names, arguments and results of the published ``inference/kernel.py`` of V4 and V4.1, whose groups of
channels have other sizes. They compute and round as its current revisions do (published with V4-Flash-0731 and V4.1):
simulated FP8 really rounds to FP8. Sums are float32, or float64 within :func:`exact_sums`; the difference shows how
much another order of summation may change. :data:`PLAIN` simulates no quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_FP8_MAX, _FP4_MAX = 448.0, 6.0
#: Smallest largest value of a group, so that no scale is zero; the last one is of scales in FP8.
_FP8_LEAST, _FP4_LEAST, _FP4_BY_FP8_LEAST = 1e-4, 6 * 2.0**-126, 6 * 2.0**-9
#: Weights in FP4 that share one scale.
_FP4_GROUP = 32
#: Groups of FP4 weights whose products are in memory at a time.
_FP4_BLOCKS = 16
#: Keys that the attention kernel takes at a time; all of them with exact sums, since the block is the kernel's choice.
_KEYS = 64

#: The values of FP4 (e2m1), by code.
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
#: The two values of a byte, the low half first.
_FP4_PAIRS = torch.stack([FP4_VALUES.repeat(16), FP4_VALUES.repeat_interleave(16)], dim=1)

_sum_dtype = torch.float32


@contextmanager
def exact_sums() -> Iterator[None]:
    """While active, sums of products are float64 before they are rounded to the dtype of the result."""
    global _sum_dtype
    before, _sum_dtype = _sum_dtype, torch.float64
    try:
        yield
    finally:
        _sum_dtype = before


def power_of_two_scale(largest: Tensor, limit: float) -> Tensor:
    """The smallest power of two that is not below ``largest / limit``; float32 in and out.

    The quotient is a product with the rounded reciprocal, and the exponent comes from its bits, as in the kernels.
    """
    bits = (largest * torch.tensor(1 / limit, dtype=torch.float32)).view(torch.int32)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()
    return (exponent << 23).view(torch.float32)


def act_quant(
    x: Tensor,
    block_size: int = 128,
    scale_fmt: str | None = None,
    scale_dtype: torch.dtype = torch.float32,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """FP8 codes and scales of groups of ``block_size`` channels; or, in place, the values that they stand for."""
    groups = _groups(x, block_size)
    largest = groups.abs().amax(dim=-1, keepdim=True).clamp(min=_FP8_LEAST)
    scale = power_of_two_scale(largest, _FP8_MAX) if scale_fmt is not None else largest * (1 / _FP8_MAX)
    codes = (groups / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    if inplace:
        return x.copy_((codes.float() * scale).flatten(-2))
    return codes.flatten(-2), scale.squeeze(-1).to(scale_dtype)


def fp4_act_quant(
    x: Tensor, block_size: int = 32, inplace: bool = False, scale_dtype: torch.dtype = torch.float8_e8m0fnu
) -> Tensor | tuple[Tensor, Tensor]:
    """FP4 codes, two to a byte, and scales; or, in place, the values that they stand for.

    A scale is a power of two, or with ``scale_dtype`` FP8 the FP8 number nearest to a sixth of the largest value.
    """
    groups = _groups(x, block_size)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    if scale_dtype == torch.float8_e4m3fn:
        sixth = largest.clamp(min=_FP4_BY_FP8_LEAST) / _FP4_MAX
        scale = sixth.clamp(max=_FP8_MAX).to(scale_dtype).float()
    else:
        scale = power_of_two_scale(largest.clamp(min=_FP4_LEAST), _FP4_MAX)
    codes = _fp4_codes((groups / scale).clamp(-_FP4_MAX, _FP4_MAX))
    if inplace:
        return x.copy_((FP4_VALUES[codes] * scale).flatten(-2))
    low, high = codes.to(torch.uint8).reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return (low | high << 4).view(torch.float4_e2m1fn_x2), scale.squeeze(-1).to(scale_dtype)


def fp8_gemm(
    a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor, scale_dtype: torch.dtype = torch.float32, block_size: int = 128
) -> Tensor:
    """``[..., K] x [N, K] -> [..., N]``: FP8 inputs with a scale per block, FP8 weights with a scale per tile."""
    rows, inputs = a.reshape(-1, a.shape[-1]), a_s.reshape(-1, a_s.shape[-1]).to(_sum_dtype)
    scale = b_s.to(_sum_dtype).repeat_interleave(block_size, dim=0)[: len(b)]
    total = torch.zeros(len(rows), len(b), dtype=_sum_dtype)
    for block, start in enumerate(range(0, b.shape[1], block_size)):
        part = slice(start, start + block_size)
        product = rows[:, part].to(_sum_dtype) @ b[:, part].to(_sum_dtype).T
        total += product * (inputs[:, block, None] * scale[:, block])
    return total.to(torch.get_default_dtype()).reshape(*a.shape[:-1], len(b))


def fp4_gemm(
    a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor, scale_dtype: torch.dtype = torch.float32, act_block_size: int = 128
) -> Tensor:
    """``[..., K] x [N, K] -> [..., N]``: FP8 inputs with a scale per block, FP4 weights, packed, with one per 32."""
    rows, outputs, blocks = a.numel() // a.shape[-1], len(b), b_s.shape[1]
    pairs = nn.functional.embedding(b.view(torch.uint8).int(), _FP4_PAIRS)
    weights = pairs.reshape(outputs, blocks, _FP4_GROUP).permute(1, 2, 0)  # [blocks, 32, N]
    codes = a.to(_sum_dtype).reshape(rows, blocks, _FP4_GROUP).transpose(0, 1)  # [blocks, M, 32]
    inputs = a_s.to(_sum_dtype).reshape(rows, -1).repeat_interleave(act_block_size // _FP4_GROUP, dim=1)[:, :blocks].T
    scale = b_s.to(_sum_dtype).T
    total = torch.zeros(rows, outputs, dtype=_sum_dtype)
    for start in range(0, blocks, _FP4_BLOCKS):
        part = slice(start, start + _FP4_BLOCKS)
        products = torch.bmm(codes[part], weights[part].to(_sum_dtype))
        total += (products * inputs[part, :, None] * scale[part, None]).sum(dim=0)
    return total.to(torch.get_default_dtype()).reshape(*a.shape[:-1], outputs)


def sparse_attn(q: Tensor, kv: Tensor, attn_sink: Tensor, topk_idxs: Tensor, softmax_scale: float) -> Tensor:
    """Attention ``[B, S, H, C]`` over the keys ``[B, X, C]``, also values, whose indices are given; -1 is none.

    Block by block with a running maximum, as the kernel does: the probabilities of a block are rounded to the dtype of
    the keys before the sum over values, and divided by their sum after it. The sink adds to that sum only.
    """
    peak = torch.full((*q.shape[:3], 1), -torch.inf, dtype=_sum_dtype)
    total, context = torch.zeros_like(peak), torch.zeros(q.shape, dtype=_sum_dtype)
    queries = q.to(_sum_dtype)
    batch = torch.arange(len(kv))[:, None, None]
    step = _KEYS if _sum_dtype is torch.float32 else topk_idxs.shape[2]
    for start in range(0, topk_idxs.shape[2], step):
        index = topk_idxs[:, :, start : start + step].long()
        keys = kv[batch, index.clamp(min=0)].to(_sum_dtype)
        scores = torch.einsum("bshc,bsxc->bshx", queries, keys) * softmax_scale
        scores = torch.where((index < 0)[:, :, None], -torch.inf, scores)
        before, peak = peak, torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
        # Before the first key there is nothing to rescale.
        shrink = torch.where(before == -torch.inf, 0.0, torch.exp(before - peak))
        weights = torch.where(scores == -torch.inf, 0.0, torch.exp(scores - peak))
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        rounded = weights.to(kv.dtype).to(_sum_dtype)
        context = context * shrink + torch.einsum("bshx,bsxc->bshc", rounded, keys)
    total += torch.exp(attn_sink.to(_sum_dtype)[:, None] - peak)
    return (context / total).to(q.dtype)


def hc_split_sinkhorn(
    mixes: Tensor, hc_scale: Tensor, hc_base: Tensor, hc_mult: int = 4, sinkhorn_iters: int = 20, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The mixing weights of a hyper-connection, float32: pre and post ``[B, S, N]``, comb ``[B, S, N, N]``."""
    n = hc_mult
    mixes, scale, base = (part.to(_sum_dtype) for part in (mixes, hc_scale, hc_base))
    pre = torch.sigmoid(mixes[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(mixes[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (mixes[..., 2 * n :] * scale[2] + base[2 * n :]).reshape(*mixes.shape[:-1], n, n)
    comb = logits.softmax(dim=-1) + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(sinkhorn_iters - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return pre.float(), post.float(), comb.float()


def hadamard_transform(x: Tensor, scale: float = 1.0) -> Tensor:
    """Product with the Hadamard matrix in Sylvester's order, times ``scale``; float32 inside, the dtype of ``x`` out.

    Neighbours are added and subtracted first, then pairs of neighbours, and so on.
    """
    width = x.shape[-1]
    if width & (width - 1):
        raise ValueError(f"a Hadamard matrix of {width} rows: expected a power of two")
    values, half = x.float(), 1
    while half < width:
        upper, lower = values.reshape(*x.shape[:-1], -1, 2, half).unbind(-2)
        values = torch.stack([upper + lower, upper - lower], dim=-2).flatten(-3)
        half *= 2
    return (values * scale).to(x.dtype)


def unrounded(x: Tensor, *others: Any, **more: Any) -> Tensor:
    """Stands in for a function that only rounds, or rotates before rounding."""
    return x


def _groups(x: Tensor, size: int) -> Tensor:
    """``[..., groups, size]`` in float32."""
    if x.shape[-1] % size:
        raise ValueError(f"{x.shape[-1]} channels in groups of {size}: expected a multiple")
    return x.float().reshape(*x.shape[:-1], -1, size)


def _fp4_codes(values: Tensor) -> Tensor:
    """Codes of the nearest FP4 values; halfway between two, of the one with an even code."""
    levels = FP4_VALUES[:8]
    middles = (levels[1:] + levels[:-1]) / 2
    size = values.abs()
    below, above = torch.bucketize(size, middles), torch.bucketize(size, middles, right=True)
    even = torch.where(below % 2 == 0, below, above)  # the two differ in the middle between two levels only
    return even + 8 * torch.signbit(values).int()


#: The functions that the code imports, by name: as released, and without simulated quantisation. Then the code
#: computes the plain mathematics; it must not have quantised weights, whose products need quantised inputs.
RELEASE: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (act_quant, fp4_act_quant, fp8_gemm, fp4_gemm, sparse_attn, hc_split_sinkhorn, hadamard_transform)
}
PLAIN: dict[str, Callable[..., Any]] = {
    **RELEASE,
    "act_quant": unrounded,
    "fp4_act_quant": unrounded,
    "hadamard_transform": unrounded,
}

"""Logits as distributions, against torch's own divergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from dsv4_convert.golden.archive import View
from dsv4_convert.parity.logits import TOP, compare_logits


def test_against_torch() -> None:
    random = np.random.default_rng(0)
    golden = random.standard_normal((2, 7, 50)).astype(np.float32)
    found = golden + 0.3 * random.standard_normal(golden.shape).astype(np.float32)
    tokens = random.integers(0, 50, (2, 7))
    result = compare_logits(found, View(golden), tokens)
    ours, theirs = (functional.log_softmax(torch.from_numpy(a).double(), dim=-1) for a in (found, golden))
    kl = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    assert result.kl_mean == pytest.approx(float(kl.mean()))
    assert result.kl_max == pytest.approx(float(kl.max()))
    worst = result.worst[0]
    assert kl[worst.at] == kl.max()
    assert worst.token == tokens[worst.at]
    assert result.top1 == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))
    best, mine = theirs.topk(TOP).indices, ours.topk(TOP).indices
    shared = (best[..., :, None] == mine[..., None, :]).any(-1).double().mean()
    assert result.topk == pytest.approx(float(shared))
    assert [position.kl for position in result.worst] == pytest.approx(sorted(kl.flatten().tolist())[::-1][:5])


def test_equal_logits_and_nan() -> None:
    golden = np.random.default_rng(1).standard_normal((1, 3, 4)).astype(np.float32)
    same = compare_logits(golden, View(golden), np.zeros((1, 3), np.int32))
    assert (same.kl_mean, same.top1, same.topk) == (0, 1, 1)
    broken = golden.copy()
    broken[0, 1, 0] = np.nan
    result = compare_logits(broken, View(golden), np.zeros((1, 3), np.int32))
    assert np.isnan(result.kl_mean)
    assert result.worst[0].at == (0, 1), "a NaN is the worst of all"

"""Our layer against a golden of dsv4: `pytest --dsv4-golden GOLDEN`, with the checkpoint in $CHECKPOINT."""

import os
from functools import partial
from pathlib import Path

import jax
import pytest

from dsv4_convert import Weights

from .layer import layer, load

#: Our names of what we compute on the way, and those of dsv4 (`dsv4 golden show` lists them).
TAPS = {
    "comb_attn": "hc_attn.comb",
    "pre_attn_norm": "attn_norm",
    "q_norm": "attn.q_norm",
    "q_head_norm": "attn.q",
    "q_rope": "attn.q_rope",
    "kv_norm": "attn.kv_norm",
    "kv_rope": "attn.kv_rope",
    "context": "attn.context",
    "context_unrope": "attn.context_unrotated",
    "o_down": "attn.wo_a",
    "o_up": "attn.wo_b",
    "after_attn": "hc_attn.streams",
    "pre_mlp_norm": "ffn_norm",
    "router": "ffn.gate.logits",
    "chosen": "ffn.gate.experts",
    "weights": "ffn.gate.weights",
    "routed": "ffn.experts",
    "shared": "ffn.shared_experts",
    "out": "hc_ffn.streams",
}


@pytest.fixture(scope="module")
def read():
    """Float32 matrices of the model, as [in, out]. A project has its own loader; this is the one of dsv4."""
    return Weights.open(Path(os.environ["CHECKPOINT"])).read


def test_layer_0(dsv4_golden, read):
    cfg = dsv4_golden.config
    run = jax.jit(partial(layer, cfg=cfg))
    with jax.default_matmul_precision("highest"):
        _, seen = run(load(read, cfg, 0), dsv4_golden.input(0), dsv4_golden.tokens, dsv4_golden.positions)
    dsv4_golden.check({TAPS[name]: value for name, value in seen.items()}, layer=0)

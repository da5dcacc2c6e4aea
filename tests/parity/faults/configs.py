"""Faults of the configuration: a number that was read wrong, defaulted, or forgotten."""

from __future__ import annotations

import dataclasses

from dsv4_convert.spec.config import Config

from .fault import CLAMPED, CSA, HCA, LEARNED_CSA, MAIN, MIXED, NORMED, PROJECTED, SLIDING, Fault

_YARN = Config.from_hf(MAIN).yarn
assert _YARN is not None

CONFIGS: tuple[Fault, ...] = (
    Fault(name="rope base of the compressed layers for the sliding ones", layer=SLIDING, tap="attn.q_rope",
          config={"rope_theta": 160000.0}),
    Fault(name="rope base of the sliding layers for the compressed ones", layer=CSA, tap="attn.q_rope",
          config={"compress_rope_theta": 10000.0}),
    Fault(name="YaRN missing", layer=HCA, tap="attn.q_rope", config={"yarn": None}),
    Fault(name="YaRN factor wrong", layer=LEARNED_CSA, tap="attn.q_rope",
          config={"yarn": dataclasses.replace(_YARN, factor=4.0)}),
    Fault(name="YaRN's original length wrong", layer=CSA, tap="attn.q_rope",
          config={"yarn": dataclasses.replace(_YARN, original_max_position_embeddings=4096)}),
    Fault(name="window one too long", layer=SLIDING, tap="attn.context", config={"sliding_window": 17}),
    Fault(name="window one too short", layer=HCA, tap="attn.context", config={"sliding_window": 15}),
    Fault(name="hc_eps missing", layer=SLIDING, tap="hc_attn.pre", config={"hc_eps": 0.0}),
    Fault(name="hc_eps is rms_norm_eps", layer=HCA, tap="hc_attn.pre", config={"hc_eps": 1e-3}),
    Fault(name="rms_norm_eps wrong", layer=CSA, tap="hc_attn.pre", config={"rms_norm_eps": 1e-6},
          or_taps=(*PROJECTED, *NORMED)),
    Fault(name="Sinkhorn one iteration short", layer=SLIDING, tap="hc_attn.comb", config={"hc_sinkhorn_iters": 2},
          or_taps=MIXED),
    Fault(name="Sinkhorn one iteration more", layer=HCA, tap="hc_attn.comb", config={"hc_sinkhorn_iters": 4},
          or_taps=MIXED),
    Fault(name="route scale missing", layer=LEARNED_CSA, tap="ffn.gate.weights", config={"routed_scaling_factor": 1.0}),
    Fault(name="SwiGLU limit missing", layer=CSA, tap="ffn.experts", config={"swiglu_limit": 1e9}, or_taps=CLAMPED),
    Fault(name="SwiGLU limit of another model", layer=HCA, tap="ffn.experts", config={"swiglu_limit": 0.9},
          or_taps=CLAMPED),
)  # fmt: skip

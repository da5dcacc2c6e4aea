"""Faults of the draft stages of DeepSeek-V4.1: those of the dated V4's that it can have, and its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv4_convert.model.v41 import attention, block
from dsv4_convert.model.v41 import model as backbone
from dsv4_convert.model.v41.block import Carry
from dsv4_convert.model.v41.dspark import V41DSparkBlock
from dsv4_convert.spec.v41.config import V41Config

from ...edits import edited
from .drafts import DRAFT_FAULTS, FIRST, LAST, MIDDLE, REPEATED
from .fault import Arrays, Fault
from .weights import _copy

#: Faults of the parameters of a stage's collapse, which V4.1 has not.
_OF_V4 = frozenset({"mtp.2: the model's collapse", "mtp.2: collapse without its base"})


def _as_v41(fault: Fault) -> Fault:
    return dataclasses.replace(fault, name=f"v4.1, {fault.name}", model="v4.1 drafting")


def _edit(name: str, layer: int, tap: str, where: tuple[Any, str], old: str, new: str, **more: Any) -> Fault:
    code = {where: edited(*where, old, new)}
    return _as_v41(Fault(name=f"mtp.{layer - FIRST}: {name}", layer=layer, tap=tap, code=code, **more))


def _of(name: str, layer: int, tap: str, **what: Any) -> Fault:
    return _as_v41(Fault(name=f"mtp.{layer - FIRST}: {name}", layer=layer, tap=tap, **what))


def _entering(change: Callable[[Carry], Carry]) -> Mapping[tuple[Any, str], Any]:
    """A stage goes on with something else than what enters it."""
    entering = V41DSparkBlock.entering
    return {(V41DSparkBlock, "entering"): staticmethod(lambda carry, taps: change(entering(carry, taps)))}


def _first_stream(carry: Carry) -> Carry:
    return carry._replace(pre=jnp.zeros_like(carry.pre).at[..., 0].set(1))


def _experts_of_a_layer(arrays: Arrays) -> None:
    own = arrays["mtp.1.ffn.experts.w1"]
    arrays["mtp.1.ffn.experts.w1"] = arrays["layers.1.ffn.experts.w1"][: len(own)]


_ATTEND, _COMBINE = (block.V41Block, "attend"), (block.V41Block, "combine")
_QUERIES = "self._queries(q_low_rank, taps)"

OWN: tuple[Fault, ...] = (
    _edit("the first half takes the mean of the streams", FIRST, "input.pre", (backbone.V41Model, "enter"),
          ".at[..., 0].set(1)", " + 0.25"),
    _edit("pre of the same half in the attention", MIDDLE, "hc_attn.collapsed", _ATTEND,
          "self._attention_input(streams, pre, taps)", "self._attention_input(streams, mixing.pre, taps)"),
    _edit("pre of the same half before the experts", LAST, "hc_ffn.collapsed", (block.V41Block, "route"),
          "self._expert_input(carry.streams, carry.pre, taps)", "self._expert_input(carry.streams, mixing.pre, taps)"),
    _of("every stage begins with the first stream", MIDDLE, "input.pre", code=_entering(_first_stream)),
    _of("streams of the stage before in another order", LAST, "input",
        code=_entering(lambda carry: carry._replace(streams=carry.streams[:, :, ::-1]))),
    _edit("the attention's pre handed on by the experts", MIDDLE, "pre", _COMBINE, "routed.mixing.pre", "carry.pre",
          runs=FIRST),
    _edit("the mean of the streams before the head", LAST, "hc_head.collapsed", (backbone.V41Model, "collapse"),
          "carry.pre,", "0 * carry.pre + 0.25,"),
    _edit("queries normed per head, as V4's", FIRST, "attn.q_rope", (attention.SharedAttention, "__call__"), _QUERIES,
          f"(lambda q: q / jnp.sqrt(jnp.mean(q**2, axis=-1, keepdims=True)))({_QUERIES})"),
    _of("experts of a layer", MIDDLE, "ffn.experts", arrays=_experts_of_a_layer),
    _of("the image tokens' router bias", LAST, "ffn.gate.scores",
        arrays=_copy("mtp.2.ffn.gate.bias", "mtp.2.ffn.gate.bias_vl")),
    _of("one Sinkhorn iteration fewer", MIDDLE, "hc_attn.comb", config={"hc_sinkhorn_iters": 2}),
    _of("base of a hyper-connection left at zero", LAST, "hc_ffn.pre",
        arrays=lambda arrays: arrays.update({"mtp.2.hc_ffn_base": np.zeros_like(arrays["mtp.2.hc_ffn_base"])})),
)  # fmt: skip

DRAFT_FAULTS_V41: tuple[Fault, ...] = (
    *OWN,
    *(_as_v41(fault) for fault in DRAFT_FAULTS if fault.name not in _OF_V4 and fault not in REPEATED),
)

#: The taps of a target layer that the stages must not read: what leaves it, as V4's stages do, and, where there is one,
#: what enters its engram.
WRONG_TARGETS: tuple[Callable[[V41Config, int], str], ...] = (
    lambda config, layer: "hc_ffn.streams",
    lambda config, layer: "input",
)

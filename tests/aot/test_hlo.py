"""Collectives of a compiled program: read from a text written by hand, and from one of XLA's own."""

from __future__ import annotations

import json

from dsv4_convert.aot.hlo import Collective, collectives

from ..processes import end, start

#: As libtpu's compiler writes it: a loop of 3 in a loop of 20, one without a known end, and an operation that starts.
PROGRAM = """
HloModule jit_step, is_scheduled=true

FileNames
1 "layers.py"

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner_cond.2 (p: (s32[], f32[8])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(3), metadata={stack_frame_id=77}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.7), direction=LT, metadata={op_name="jit(step)/while/cond/lt"}
}

%inner.2 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %reduce-scatter.1 = f32[4,8]{1,0:T(4,128)} reduce-scatter(%x), dimensions={0}, to_apply=%add
}

%open_cond (p: (s32[], s32[])) -> pred[] {
  %limit = s32[] get-tuple-element(%p), index=1
  ROOT %lt.2 = pred[] compare(%i, %limit), direction=LT
}

%open (p: (s32[], s32[])) -> (s32[], s32[]) {
  %all-to-all.1 = bf16[16]{0} all-to-all(%x), dimensions={0}
}

%cond.1 (p: (s32[], f32[8], /*index=2*/s32[])) -> pred[] {
  %constant.9 = s32[] constant(20)
  ROOT %lt.3 = pred[] compare(%i, %constant.9), direction=LT
}

%body.1 (p: (s32[], f32[8], /*index=2*/s32[])) -> (s32[], f32[8], s32[]) {
  %all-gather.1 = bf16[1,8,4096]{2,1,0:T(8,128)(2,1)} all-gather(%w), channel_id=16, dimensions={1}
  %while.2 = (s32[]{:T(128)}, f32[8]) while(%tuple.2), condition=%inner_cond.2, body=%inner.2
  %while.3 = (s32[], s32[]) while(%tuple.3), condition=%open_cond, body=%open
  %fusion.1 = f32[8] fusion(%all-gather.1), kind=kLoop, calls=%fused.1
}

%fused.1 (q: f32[8]) -> f32[8] {
  ROOT %neg = f32[8] negate(%q)
}

ENTRY %main.4_spmd (x: f32[8]) -> f32[8] {
  %all-gather-start.2 = (bf16[8]{0}, bf16[64]{0}) all-gather-start(%x), channel_id=3
  %all-gather-done.2 = bf16[64]{0} all-gather-done(%all-gather-start.2)
  %while.1 = (s32[], f32[8], /*index=2*/s32[]) while(%tuple.1), condition=%cond.1, body=%body.1, metadata={a="b"}
}
"""


def test_loops_count_as_often_as_they_run() -> None:
    assert collectives(PROGRAM) == (
        Collective("all-gather", 1 + 20, 64 * 2 + 20 * 8 * 4096 * 2),
        Collective("reduce-scatter", 20 * 3, 20 * 3 * 4 * 8 * 4),
        Collective("all-to-all", 20, 20 * 16 * 2),
    )
    assert collectives("") == ()


def test_of_a_real_program() -> None:
    """Compiled for eight simulated devices: one sum over all of them, and five in a loop."""
    script = """
import json, jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from dsv4_convert.aot.hlo import collectives
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
def run(x):
    def step(total, _):
        return jnp.sin(jax.lax.psum(total, "x")), None
    total, _ = jax.lax.scan(step, x, None, length=5)
    return jax.lax.all_gather(total, "x")
program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("x"), out_specs=P(None), check_vma=False))
text = program.lower(jnp.ones((8, 16))).compile().as_text()
print(json.dumps([[found.kind, found.times, found.bytes] for found in collectives(text)]))
"""
    ended = end(start(["-c", script], devices=8))
    assert ended.code == 0, ended.err[-3000:]
    assert json.loads(ended.out) == [["all-gather", 1, 8 * 16 * 4], ["all-reduce", 5, 5 * 16 * 4]]

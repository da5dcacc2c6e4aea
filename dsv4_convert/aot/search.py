"""Compiling a model for one slice, and looking for the smallest slice that it fits on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import jax

from dsv4_convert.aot.hlo import collectives
from dsv4_convert.aot.program import Job, argument_bytes, first_layers, lowered, prompts_of
from dsv4_convert.aot.report import CompileReport, Memory
from dsv4_convert.aot.topology import Slice
from dsv4_convert.aot.work import operations
from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.model.mesh import divides, make_mesh, parse_mesh
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import parameters

__all__ = ["compile_model", "parse_mesh", "smallest_slice"]

#: Start of the compiler's message when the temporaries exceed a device's memory.
_FULL = "RESOURCE_EXHAUSTED"
#: The experts are split into this many parts at most; further devices split the width.
_EXPERT_PARTS = 32
#: Called with the name of the slice that is compiled next.
Progress = Callable[[str], None]


def compile_model(
    config: Config,
    where: Slice,
    *,
    tokens: int,
    batch: int | None = None,
    decode: bool = False,
    source: bool = False,
    mesh: Mapping[str, int] | None = None,
    layers: int | None = None,
) -> CompileReport:
    """Compile the forward pass in bfloat16 for a slice, which need not be attached.

    Args:
        config: the model.
        where: the slice.
        tokens: tokens of each prompt; with ``decode`` the capacity of the cache.
        batch: number of prompts; None for one in each part that the mesh splits prompts into.
        decode: compute one more token of each prompt, from the cache.
        source: keep quantised matrices as the published codes and scales.
        mesh: sizes of the mesh's axes; None for :func:`usual_mesh`.
        layers: number of leading layers; None for all.

    Raises:
        UsageError: a mesh, batch or number of tokens that does not suit the model, or an unknown slice.
        ResourceError: the compiler for TPUs is not installed.
    """
    config = first_layers(config, layers or config.num_hidden_layers)
    devices = where.devices()
    sizes = dict(mesh or usual_mesh(config, where.count))
    over = make_mesh(sizes, devices)
    job = Job(tokens=tokens, batch=batch or prompts_of(sizes), decode=decode, source=source)
    program = lowered(config, over, job)
    memory, refused, text = None, None, ""
    start = time.perf_counter()
    try:
        compiled = program.compile()
        memory, text = Memory.of(compiled), compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        if _FULL not in str(error):
            raise
        refused = str(error).removeprefix(_FULL).strip(": ").splitlines()[0]
    seconds = time.perf_counter() - start
    rows = parameters(config, range(config.num_hidden_layers))
    # The first argument of every program.
    state = jax.tree.leaves(program.args_info[0][0])
    return CompileReport(
        layers=config.num_hidden_layers,
        parameters=sum(math.prod(rule.target_shape(config, layer)) for _, rule, layer in rows),
        slice=where,
        mesh=sizes,
        batch=job.batch,
        tokens=tokens,
        decode=decode,
        dtype=job.dtype.name,
        source=source,
        weights=sum(math.prod(weight.shape) * weight.dtype.itemsize for weight in state),
        memory=memory,
        refused=refused,
        operations=job.batch * operations(config, tokens=tokens, decode=decode),
        collectives=collectives(text),
        seconds=seconds,
    )


def usual_mesh(config: Config, count: int) -> dict[str, int]:
    """A mesh that splits the experts over as many devices as may share them, and the width over the rest.

    Raises:
        UsageError: the model's numbers and that of the devices have too little in common.
    """
    expert = max(
        part for part in range(1, _EXPERT_PARTS + 1) if not count % part and not config.n_routed_experts % part
    )
    fsdp = count // expert
    if not divides("fsdp", fsdp, config):
        raise UsageError(f"{count} devices: no mesh suits them by itself; describe one, such as fsdp=8,expert=32")
    return {"fsdp": fsdp, "expert": expert}


def smallest_slice(
    config: Config,
    generation: str,
    *,
    tokens: int,
    batch: int | None = None,
    decode: bool = False,
    source: bool = False,
    progress: Progress = lambda _: None,
) -> CompileReport:
    """The smallest slice of a generation that the model fits on, with its usual mesh.

    Slices too small for weights and cache are not compiled for.

    Raises:
        ResourceError: no slice is large enough, or the compiler is not installed.
        UsageError: an unknown generation.
    """
    config = first_layers(config, config.num_hidden_layers)
    for where in Slice.all(generation):
        devices = where.devices()
        over = make_mesh(usual_mesh(config, where.count), devices)
        job = Job(tokens=tokens, batch=batch or prompts_of(over.shape), decode=decode, source=source)
        if argument_bytes(config, over, job) > where.chip.hbm:
            continue
        progress(where.name)
        report = compile_model(config, where, tokens=tokens, batch=batch, decode=decode, source=source)
        if report.fits:
            return report
    raise ResourceError(f"no slice of {generation} up to {where.name} has room for it; take fewer tokens or prompts")

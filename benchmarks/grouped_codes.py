"""Routed experts of one layer at V4-Flash's width, compiled for TPUs: codes in the kernel, in the tile loop, expanded.

Arguments, temporaries and bytes accessed of one chip, by the compiler's own analysis. The program computes nothing
but the experts. The compiler does not see into the kernel: its bytes are those that the kernel declares, for all
experts chosen. It counts a loop once: the bytes of the tile loop are for one tile of each of the two sizes, so they say
little. Needs libtpu (``pip install 'dsv4-convert[tpu]'``) and no TPU.

Run: python -m benchmarks.grouped_codes [--tokens 128] [--experts 256] [--only v5p-8]
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_convert.aot import Slice
from dsv4_convert.model.encoded import empty
from dsv4_convert.model.experts import ACCELERATOR_TILES, grouped, packed
from dsv4_convert.model.router import Routing

WIDTH, INNER, CHOSEN, LIMIT = 4096, 2048, 6, 10.0
PATHS = {
    "codes, kernel": partial(grouped, limit=LIMIT),
    "codes, tile loop": partial(packed, limit=LIMIT, tiles=ACCELERATOR_TILES),
    "bfloat16, ragged_dot": partial(grouped, limit=LIMIT),
}


def analysed(path: str, where: str, tokens: int, experts: int) -> dict[str, Any]:
    """Bytes of the program of a path on one chip of a slice."""
    mesh = Mesh(np.array(Slice.parse(where).devices()[:1]), ("chip",))

    def stack(inputs: int, outputs: int) -> Any:
        if path.startswith("bfloat16"):
            return jnp.zeros((experts, inputs, outputs), jnp.bfloat16)
        return empty(
            (experts, inputs, outputs), packed=True, float_scales=False, block=(32, 1), dtype=jnp.dtype(jnp.bfloat16)
        )

    def operands() -> Any:
        routing = Routing(jnp.zeros((tokens, CHOSEN), jnp.int32), jnp.zeros((tokens, CHOSEN), jnp.float32))
        return jnp.zeros((tokens, WIDTH), jnp.bfloat16), routing, *(stack(*shape) for shape in shapes)

    def on(part: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    shapes = ((WIDTH, INNER), (INNER, WIDTH), (WIDTH, INNER))
    given = jax.tree.map(on, jax.eval_shape(operands))
    compiled = jax.jit(PATHS[path]).trace(*given).lower(lowering_platforms=("tpu",)).compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    assert costs is not None
    return {
        "path": path,
        "slice": where,
        "argument_mb": round(memory.argument_size_in_bytes / 1e6, 1),
        "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 1),
        "accessed_mb": round(costs["bytes accessed"] / 1e6, 1),
    }


def main() -> None:
    """Compile all, printing each row when it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--only", choices=("v5p-8", "v6e-4"))
    options = parser.parse_args()
    for where in ("v5p-8", "v6e-4") if options.only is None else (options.only,):
        for path in PATHS:
            print(json.dumps(analysed(path, where, options.tokens, options.experts)), flush=True)


if __name__ == "__main__":
    main()

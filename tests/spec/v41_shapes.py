"""Every tensor of the published DeepSeek-V4.1-Flash, built from its shapes without the tables of dsv4.

Names and shapes are those of the modules of the published inference code; dtypes are what that code says of storage,
and BF16 for every other weight. The number of tensors and of bytes that the repository states confirms all of it.

Run: python -m tests.spec.v41_shapes > tests/data/inventory/DeepSeek-V4.1-Flash.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator

MODEL = "DeepSeek-V4.1-Flash"
#: Totals that the repository states.
TENSORS, BYTES = 96_085, 510_286_023_000

WIDTH, VOCABULARY, STREAMS = 5120, 129280, 4
HEADS, HEAD, QUERY_RANK, GROUPS, GROUP_RANK = 64, 512, 1280, 8, 1024
EXPERTS, DRAFT_EXPERTS, EXPERT_WIDTH = 384, 128, 2304
INDEX_HEADS, INDEX_HEAD = 32, 128
LAYERS, STAGES, TARGETS, MARKOV = 40, 3, 3, 256
#: KV source -> whether it pools pairs of tokens.
KV_SOURCES = {2: True, 8: True, 14: True, 20: False}
INDEX_SOURCES = (2, 8, 14, 20, 24, 28, 32, 36)
ENGRAMS = {1: 384_006_168, 14: 384_016_682}
ENGRAM_ROW, ENGRAM_COLUMNS = 256, 24
BLOCKS, SEEN, SEEN_INNER, PATCH, DOWNSAMPLE = 32, 1024, 2816, 14, 3

Tensor = tuple[str, str, tuple[int, ...]]


def _bf16(name: str, *shape: int) -> Iterator[Tensor]:
    yield name, "BF16", shape


def _f32(name: str, *shape: int) -> Iterator[Tensor]:
    yield name, "F32", shape


def _fp8(name: str, outputs: int, inputs: int) -> Iterator[Tensor]:
    """A matrix whose tiles of 32x32 share a scale."""
    yield f"{name}.weight", "F8_E4M3", (outputs, inputs)
    yield f"{name}.scale", "F8_E8M0", (-(-outputs // 32), -(-inputs // 32))


def _fp4(name: str, outputs: int, inputs: int) -> Iterator[Tensor]:
    """Two codes in a byte, 32 inputs share a scale."""
    yield f"{name}.weight", "I8", (outputs, inputs // 2)
    yield f"{name}.scale", "F8_E8M0", (outputs, inputs // 32)


def _block(prefix: str, experts: list[str]) -> Iterator[Tensor]:
    """The tensors that a layer and a draft stage share; ``experts`` are their numbers as names spell them."""
    for half in ("attn", "ffn"):
        yield from _bf16(f"{prefix}.{half}_norm.weight", WIDTH)
        yield from _f32(f"{prefix}.hc_{half}_fn", (2 + STREAMS) * STREAMS, STREAMS * WIDTH)
        yield from _f32(f"{prefix}.hc_{half}_base", (2 + STREAMS) * STREAMS)
        yield from _f32(f"{prefix}.hc_{half}_scale", 3)
    attention = f"{prefix}.attn"
    yield from _f32(f"{attention}.attn_sink", HEADS)
    yield from _fp8(f"{attention}.wq_a", QUERY_RANK, WIDTH)
    yield from _bf16(f"{attention}.q_norm.weight", QUERY_RANK)
    yield from _fp8(f"{attention}.wq_b", HEADS * HEAD, QUERY_RANK)
    yield from _fp8(f"{attention}.wkv", HEAD, WIDTH)
    yield from _bf16(f"{attention}.kv_norm.weight", HEAD)
    yield from _fp8(f"{attention}.wo_a", GROUPS * GROUP_RANK, HEADS * HEAD // GROUPS)
    yield from _fp8(f"{attention}.wo_b", WIDTH, GROUPS * GROUP_RANK)
    number = EXPERTS if experts == ["{e}"] else len(experts)
    yield from _bf16(f"{prefix}.ffn.gate.weight", number, WIDTH)
    yield from _f32(f"{prefix}.ffn.gate.bias", number)
    yield from _f32(f"{prefix}.ffn.gate.bias_vl", number)
    for name, linear in [("shared_experts", _fp8), *((f"experts.{expert}", _fp4) for expert in experts)]:
        yield from linear(f"{prefix}.ffn.{name}.w1", EXPERT_WIDTH, WIDTH)
        yield from linear(f"{prefix}.ffn.{name}.w2", WIDTH, EXPERT_WIDTH)
        yield from linear(f"{prefix}.ffn.{name}.w3", EXPERT_WIDTH, WIDTH)


def _layer(layer: int) -> Iterator[Tensor]:
    prefix = f"layers.{layer}"
    if layer in ENGRAMS:
        yield f"{prefix}.engram.embed.weight", "F8_E4M3", (ENGRAMS[layer], ENGRAM_ROW)
        yield f"{prefix}.engram.embed.scale", "F8_E8M0", (ENGRAMS[layer], ENGRAM_ROW // 32)
        yield from _fp8(f"{prefix}.engram.wkv", (STREAMS + 1) * WIDTH, ENGRAM_COLUMNS * ENGRAM_ROW)
        yield from _bf16(f"{prefix}.engram.q_weight", STREAMS, WIDTH)
        yield from _bf16(f"{prefix}.engram.k_weight", STREAMS, WIDTH)
    if layer in KV_SOURCES:
        yield from _bf16(f"{prefix}.attn.compressor.wkv.weight", HEAD, WIDTH)
        if KV_SOURCES[layer]:
            yield from _bf16(f"{prefix}.attn.compressor.wgate.weight", HEAD, WIDTH)
        yield from _bf16(f"{prefix}.attn.compressor.norm.weight", HEAD)
        yield from _bf16(f"{prefix}.attn.indexer.wk.weight", INDEX_HEAD, HEAD)
        yield from _bf16(f"{prefix}.attn.indexer.k_norm.weight", INDEX_HEAD)
    if layer in INDEX_SOURCES:
        yield from _fp8(f"{prefix}.attn.indexer.wq_b", INDEX_HEADS * INDEX_HEAD, QUERY_RANK)
        yield from _bf16(f"{prefix}.attn.indexer.weights_proj.weight", INDEX_HEADS, WIDTH)
    yield from _block(prefix, ["{e}"])


def _drafts() -> Iterator[Tensor]:
    for stage in range(STAGES):
        yield from _block(f"mtp.{stage}", [str(expert) for expert in range(DRAFT_EXPERTS)])
    yield from _fp8("mtp.0.main_proj", WIDTH, TARGETS * WIDTH)
    yield from _bf16("mtp.0.main_norm.weight", WIDTH)
    last = f"mtp.{STAGES - 1}"
    yield from _bf16(f"{last}.norm.weight", WIDTH)
    yield from _bf16(f"{last}.markov_head.embed.weight", VOCABULARY, MARKOV)
    yield from _bf16(f"{last}.markov_head.head.weight", VOCABULARY, MARKOV)
    yield from _bf16(f"{last}.confidence_head.proj.weight", 1, WIDTH + MARKOV)


def _linear(name: str, outputs: int, inputs: int) -> Iterator[Tensor]:
    yield from _bf16(f"{name}.weight", outputs, inputs)
    yield from _bf16(f"{name}.bias", outputs)


def _vision() -> Iterator[Tensor]:
    yield from _linear("vision.patch_embed.proj", SEEN, 3 * PATCH**2)
    for block in range(BLOCKS):
        prefix = f"vision.blocks.{block}"
        yield from _bf16(f"{prefix}.norm1.weight", SEEN)
        yield from _linear(f"{prefix}.attn.wqkv", 3 * SEEN, SEEN)
        yield from _linear(f"{prefix}.attn.wo", SEEN, SEEN)
        yield from _bf16(f"{prefix}.norm2.weight", SEEN)
        yield from _bf16(f"{prefix}.mlp.w1.weight", 2 * SEEN_INNER, SEEN)
        yield from _bf16(f"{prefix}.mlp.w2.weight", SEEN, SEEN_INNER)
    yield from _bf16("vision.norm.weight", SEEN)
    yield from _linear("aligner.w1", WIDTH, DOWNSAMPLE**2 * SEEN)
    yield from _linear("aligner.w2", WIDTH, WIDTH)
    for part in ("start", "end", "newline"):
        yield from _bf16(f"image_{part}", WIDTH)


def tensors() -> Iterator[Tensor]:
    """Name, dtype and stored shape of every tensor; ``{e}`` stands for the routed experts of a layer."""
    yield from _bf16("embed.weight", VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        yield from _layer(layer)
    yield from _bf16("norm.weight", WIDTH)
    yield from _bf16("head.weight", VOCABULARY, WIDTH)
    yield from _drafts()
    yield from _vision()


def inventory() -> dict[str, object]:
    """The same in the form of the other inventories."""
    return {
        "model": MODEL,
        "n_experts": EXPERTS,
        "summary": {"tensors": TENSORS, "bytes": BYTES},
        "tensors": {name: [dtype, list(shape)] for name, dtype, shape in tensors()},
    }


if __name__ == "__main__":
    print(json.dumps(inventory()), end="")

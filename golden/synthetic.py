"""Random checkpoints in the published format: the same bytes for the same seed, on any machine.

Used by the demo, the tests and the benchmarks, from a few kilobytes to a layer of V4-Flash's width. Values come from
the raw stream of a counter-based bit generator, keyed by seed and tensor name, and become numbers by integer arithmetic
and exact scaling only, so that no library version or processor changes a bit.

The weights are distinct and not degenerate: no norm weight is 1, no bias or sink is 0, the hash tables are random. So
a swapped or forgotten tensor shows. Their spread keeps activations near 1 through the layers.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal

import ml_dtypes
import numpy as np

from dsv4_convert.checkpoint import TensorEntry, write_index, write_safetensors
from dsv4_convert.checkpoint.index import INDEX_NAME
from dsv4_convert.errors import UsageError
from dsv4_convert.files.strict_json import read_object
from dsv4_convert.files.workspace import Workspace
from dsv4_convert.files.writing import write_atomically, writing
from dsv4_convert.spec.architectures import BY_MODEL_TYPE
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Kind, Rule, Section, check_layers, parameters
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.spec.v41.ngrams import EngramConfig, ngram_hash

Array = np.ndarray[Any, Any]
Form = Literal["fp4", "fp8", "bf16"]
#: Called with (bytes done, bytes in total, name of the shard).
Progress = Callable[[int, int, str], None]

#: Every name in the folder of an unfinished checkpoint.
_OWN = re.compile(r"config\.json|tokenizer\.json|model\.safetensors\.index\.json|model-\d+-of-\d+\.safetensors")
#: Numbers that are made at once; even, so that no raw word of the stream is cut in two.
_SLAB = 1 << 22
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
#: Values of the e2m1 codes 0 to 7 have this mean square; the sign does not change it.
_FP4_RMS = math.sqrt(sum(v * v for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8)
#: FP8 codes are drawn with any sign and mantissa and an exponent field below this: subnormals and zeros of both signs
#: occur, NaN codes do not.
_FP8_EXPONENTS = 10
_FP8_RMS = math.sqrt(
    sum(((m / 8 + (e > 0)) * 2.0 ** (max(e, 1) - 7)) ** 2 for e in range(_FP8_EXPONENTS) for m in range(8))
    / (8 * _FP8_EXPONENTS)
)


def tiny_config(**changes: Any) -> dict[str, Any]:
    """The raw ``config.json`` of the demo: four layers, every kind of attention, both ways of routing.

    Windows fill, blocks close, the indexer has to choose, the clamp bites and YaRN shows within 300 tokens.
    """
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": 96,
        "hidden_size": 32,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_hash_layers": 2,
        "sliding_window": 16,
        "compress_ratios": [0, 4, 128, 4, 0],
        "index_n_heads": 8,
        "index_head_dim": 8,
        "index_topk": 5,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        # Large and unequal, where the releases have 1e-6 twice: a forgotten or swapped eps has to show.
        "hc_eps": 2e-3,
        "rms_norm_eps": 1e-3,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 1.0,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 1024,
        "num_nextn_predict_layers": 1,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        **changes,
    }


def dspark_config(**changes: Any) -> dict[str, Any]:
    """:func:`tiny_config` as a dated release has it: three stages draft blocks of five tokens."""
    dated = {
        "compress_ratios": [0, 4, 128, 4, 0, 0, 0],
        "dspark_block_size": 5,
        "dspark_noise_token_id": 95,
        "dspark_target_layer_ids": [1, 2, 3],
        "dspark_markov_rank": 8,
    }
    return tiny_config(**{**dated, **changes})


def tiny_v41_config(**changes: Any) -> dict[str, Any]:
    """The raw ``config.json`` of a small DeepSeek-V4.1 with every kind of layer; ``changes`` are of its text model.

    A window-only layer without and with an engram, then for both ratios a layer that makes keys and one that reads
    them; the last layer chooses inside candidate blocks. Three stages draft, and there is a small vision encoder.
    """
    text = {
        "model_type": "deepseek_v41_text",
        **{name: value for name, value in tiny_config().items() if name in _SAME_IN_V41},
        "hidden_size": 64,
        "num_hidden_layers": 7,
        "head_dim": 32,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
        "compress_ratios": [0, 0, 2, 2, 1, 1, 1, 0, 0, 0],
        "kv_source_layer_ids": [2, 4],
        "index_source_layer_ids": [2, 4, 6],
        "index_head_dim": 32,
        "candidate_source_layer_id": 4,
        "candidate_topk_blocks": 4,
        "candidate_block_size": 4,
        "engram_layer_ids": [1, 4],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 40,
        "engram_n_heads": 2,
        "engram_head_dim": 64,
        "engram_pad_token_id": 2,
        "num_nextn_predict_layers": 3,
        "dspark_block_size": 5,
        "dspark_noise_token_id": 90,
        "dspark_target_layer_ids": [4, 5, 6],
        "dspark_markov_rank": 8,
        "dspark_n_routed_experts": 4,
        "dspark_num_experts_per_tok": 2,
        **changes,
    }
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "image_token_id": text["vocab_size"] - 1,
        "text_config": {**_tables(text), **text},
        "vision_config": {
            "model_type": "deepseek_v41_vision",
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "patch_size": 2,
            "rope_theta": 10000,
            "downsample_ratio": 3,
            "max_image_tokens": 16,
            "min_pixels": 64,
            "max_wh_ratio": None,
        },
    }


#: Fields of :func:`tiny_config` that a small V4.1 has with the same value.
_SAME_IN_V41 = frozenset((
    "vocab_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads", "qk_rope_head_dim",
    "o_groups", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "sliding_window", "index_n_heads",
    "index_topk", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "routed_scaling_factor", "swiglu_limit",
    "rope_theta", "compress_rope_theta", "rope_scaling", "max_position_embeddings", "scoring_func", "topk_method",
    "norm_topk_prob", "hidden_act", "attention_bias",
))  # fmt: skip


def _tables(text: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that follow from the tokenizer and from the search for primes: mapped ids, and rows of each table."""
    layers = tuple(text["engram_layer_ids"])
    mapped = len({_plain(word) for word in _words(text["vocab_size"])})
    if not layers:
        return {"engram_num_embeddings": [], "engram_compressed_vocab_size": mapped}
    engram = EngramConfig(
        layer_ids=layers,
        published_layer_ids=layers,
        tables=tuple(range(len(layers))),
        num_embeddings=(1,) * len(layers),
        compressed_vocab_size=mapped,
        **{
            name: text[f"engram_{name}"]
            for name in ("max_ngram_size", "vocab_size", "n_heads", "head_dim", "pad_token_id")
        },
    )
    rows = [sum(ngram_hash(engram, table).primes) for table in engram.tables]
    return {"engram_num_embeddings": rows, "engram_compressed_vocab_size": mapped}


def tokenizer(tokens: int) -> dict[str, Any]:
    """The ``tokenizer.json`` of ``tokens`` words, of which some differ by case or accent only."""
    words = _words(tokens)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: token for token, word in enumerate(words)}, "unk_token": "<s>"},
    }


def _words(tokens: int) -> list[str]:
    """Three special tokens, then every word in small letters, in capitals, and with an accent."""
    words = ["<s>", "</s>", "<pad>"]
    number = 0
    while len(words) < tokens:
        word, rest = "e", number
        while rest:
            word, rest = word + chr(ord("a") + rest % 26), rest // 26
        words += [word, word.upper(), f"é{word[1:]}"]
        number += 1
    return words[:tokens]


def _plain(word: str) -> str:
    return word.lower().replace("é", "e")


#: The model that ``--model`` names -> the raw config of a small one.
MODELS: Mapping[str, Callable[[], dict[str, Any]]] = {"v4": tiny_config, "v4.1": tiny_v41_config}


def random_architecture(seed: int) -> dict[str, Any]:
    """The raw ``config.json`` of a random small model; every field that has a choice is drawn."""
    draw = Random(seed)
    layers = draw.randint(1, 4)
    heads = draw.choice((1, 2, 4, 8))
    experts = draw.choice((2, 4, 7, 12))
    index_width = draw.choice((16, 24, 32))
    head_width = draw.choice((16, 32, 48))
    hashed = draw.randint(0, layers)
    rope = draw.choice([width for width in (2, 4, 8, 16) if width <= min(head_width, index_width)])
    return tiny_config(
        vocab_size=draw.choice((11, 64, 101, 257)),
        hidden_size=draw.choice((32, 64, 96, 160)),
        moe_intermediate_size=draw.choice((32, 64, 160)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=head_width,
        qk_rope_head_dim=rope,
        q_lora_rank=draw.choice((8, 24, 48, 136)),
        o_groups=draw.choice([groups for groups in (1, 2, 4) if heads % groups == 0]),
        o_lora_rank=draw.choice((8, 16, 40)),
        n_routed_experts=experts,
        num_experts_per_tok=draw.randint(1, min(4, experts)),
        num_hash_layers=hashed,
        sliding_window=draw.choice((1, 2, 7, 16, 64, 128, 160)),
        compress_ratios=[draw.choice((0, 4, 4, 128)) for _ in range(layers)] + [0],
        index_n_heads=draw.choice((8, 12, 16)),
        index_head_dim=index_width,
        index_topk=draw.choice((1, 3, 8, 512)),
        hc_mult=draw.choice((2, 4)),
        hc_sinkhorn_iters=draw.choice((1, 3, 20)),
        hc_eps=draw.choice((1e-6, 2e-3)),
        rms_norm_eps=draw.choice((1e-6, 1e-3)),
        routed_scaling_factor=draw.choice((1.0, 1.5, 2.5)),
        swiglu_limit=draw.choice((0.5, 1.0, 10.0)),
        rope_scaling=draw.choice((None, tiny_config()["rope_scaling"], _published_yarn())),
    )


def random_v41_architecture(seed: int) -> dict[str, Any]:
    """The raw ``config.json`` of a small DeepSeek-V4.1 with other widths, another order of layers and other counts.

    It has as many indexer heads as no small model needs: with few of them, exact zeros tie, and a tie is broken
    differently by every implementation.
    """
    draw = Random(seed)
    heads, experts = draw.choice((2, 4, 6)), draw.randint(3, 9)
    ratios, sources, choosers = [0] * draw.randint(0, 2), [], []
    for ratio in draw.choice(([2, 1], [2, 2, 1], [1], [2], [1, 2, 1])):
        sources.append(len(ratios))
        choosers.append(len(ratios))
        ratios.append(ratio)
        for _ in range(draw.randint(1, 3)):
            choosers += [len(ratios)] if draw.random() < 0.5 else []
            ratios.append(ratio)
    size, topk = draw.choice((1, 3, 4)), draw.randint(2, 9)
    return tiny_v41_config(
        vocab_size=draw.choice((31, 64, 101)),
        hidden_size=draw.choice((32, 64, 96)),
        moe_intermediate_size=draw.choice((32, 64)),
        num_hidden_layers=len(ratios),
        num_attention_heads=heads,
        head_dim=draw.choice((16, 32, 64)),
        qk_rope_head_dim=draw.choice((2, 4, 8)),
        q_lora_rank=draw.choice((8, 24, 40)),
        o_groups=draw.choice([groups for groups in (1, 2) if heads % groups == 0]),
        o_lora_rank=draw.choice((8, 20)),
        n_routed_experts=experts,
        num_experts_per_tok=draw.randint(2, min(4, experts)),
        sliding_window=draw.choice((3, 6, 17)),
        compress_ratios=[*ratios, 0],
        kv_source_layer_ids=sources,
        index_source_layer_ids=choosers,
        index_n_heads=64,
        index_head_dim=draw.choice((8, 16)),
        index_topk=topk,
        candidate_source_layer_id=draw.choice((-1, sources[-1], sources[-1])),
        candidate_topk_blocks=-(-topk // size) + draw.randint(1, 3),
        candidate_block_size=size,
        engram_layer_ids=sorted(draw.sample(range(len(ratios)), draw.randint(1, 2))),
        engram_max_ngram_size=draw.randint(2, 4),
        engram_vocab_size=draw.choice((50, 1000)),
        engram_n_heads=draw.randint(1, 4),
        engram_head_dim=draw.choice((32, 64)),
        num_nextn_predict_layers=1,
        dspark_target_layer_ids=[len(ratios) - 1],
        dspark_noise_token_id=5,
    )


def _published_yarn() -> dict[str, Any]:
    return {**tiny_config()["rope_scaling"], "original_max_position_embeddings": 65536}


def make_checkpoint(
    dest: Path,
    *,
    config: Path | None = None,
    model: str = "v4",
    form: str = "fp4",
    layers: Iterable[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> int:
    """:func:`write_checkpoint` for a config file, or for the small one of :data:`MODELS`.

    Raises:
        BadInput: the config file is missing, no JSON, or not one that dsv4 knows.
        UsageError: an unknown model or form; or as :func:`write_checkpoint`.
        ResourceError: as :func:`write_checkpoint`.
    """
    if model not in MODELS:
        raise UsageError(f"--model {model}: expected {' or '.join(MODELS)}")
    raw = MODELS[model]() if config is None else read_object(config)
    if form not in ("fp4", "fp8", "bf16"):
        raise UsageError(f"--form {form}: expected fp4, fp8 or bf16")
    return write_checkpoint(dest, raw, seed=seed, form=form, layers=layers, progress=progress)  # type: ignore[arg-type]


def write_checkpoint(
    dest: Path,
    raw: Mapping[str, Any],
    *,
    seed: int = 0,
    form: Form = "fp4",
    layers: Iterable[int] | None = None,
    mtp: bool = True,
    progress: Progress | None = None,
) -> int:
    """Write a checkpoint of random weights; returns the bytes of its tensors. One of V4.1 has a tokenizer too.

    Args:
        dest: folder to create; must not exist.
        raw: ``config.json`` in the published spelling.
        seed: seed of the random weights.
        form: ``fp4``: FP8 linears and FP4 experts with E8M0 scales, as released. ``fp8``: all FP8 with float32 scales
            that are no powers of two, as the Base releases. ``bf16``: unquantised.
        layers: write only the shards of these layers and of the model level, with an index that lists only these.
        mtp: also write the stages after the backbone, and the vision encoder.
        progress: called after every shard.

    Raises:
        UsageError: the destination exists, a layer does not, or the stage of another command is beside the destination.
        ResourceError: it cannot be written, or another process does so.
    """
    if dest.exists():
        raise UsageError(f"{dest}: exists already; choose another folder or remove it")
    raw = dict(raw)
    if form != "bf16":
        raw["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": list(BY_MODEL_TYPE.get(raw["model_type"], V4Config).fp8_tile),
        }
        raw["expert_dtype"] = form
    else:
        raw.pop("quantization_config", None)
        raw.pop("expert_dtype", None)
    config = Config.from_hf(raw)
    chosen = check_layers(config, layers)
    shards = [list(shard) for shard in _shards(config, chosen, form, seed, mtp=mtp)]
    total = sum(size for shard in shards for _, size in shard)
    with Workspace(dest, _OWN) as workspace:
        stage = workspace.stage
        weight_map: dict[str, str] = {}
        done = 0
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(stage / file, [entry for entry, _ in shard])
            weight_map |= {entry.name: file for entry, _ in shard}
            done += sum(size for _, size in shard)
            if progress is not None:
                progress(done, total, file)
        write_index(stage, weight_map, total)
        beside = {"config.json": raw}
        if config.maps_tokens:
            beside["tokenizer.json"] = tokenizer(config.vocab_size)
        for name, document in beside.items():
            write_atomically(stage / name, f"{json.dumps(document, indent=2)}\n".encode())
        names = {*beside, INDEX_NAME, *weight_map.values()}
        with writing(stage):
            for entry in stage.iterdir():  # of an interrupted run with other arguments
                if entry.name not in names:
                    entry.unlink()
        workspace.publish()
    return total


def _shards(
    config: Config, layers: tuple[int, ...], form: Form, seed: int, *, mtp: bool
) -> Iterator[Iterator[tuple[TensorEntry, int]]]:
    """As published: the embedding, one shard per layer, the head, one shard per stage, the vision encoder."""
    by_shard: dict[int | str | None, list[tuple[Rule, int | None]]] = {}
    for path, rule, layer in parameters(config) if mtp else parameters(config, layers):
        key = rule.section if rule.section is Section.VISION else path if path == "embed" else layer
        by_shard.setdefault(key, []).append((rule, layer))

    def entries(rows: list[tuple[Rule, int | None]]) -> Iterator[tuple[TensorEntry, int]]:
        for rule, layer in rows:
            for expert in range(config.experts_of(layer)) if rule.per_expert else (None,):
                name = rule.published.format(*rule.numbers(config, layer, expert))
                yield from _tensors(name, rule, rule.source_shape(config, layer), config, form, seed)

    for key in ("embed", *layers, None, *(config.stage_layers if mtp else ()), Section.VISION):
        if key in by_shard:
            yield entries(by_shard[key])


def _tensors(
    name: str, rule: Rule, shape: tuple[int, ...], config: Config, form: Form, seed: int
) -> Iterator[tuple[TensorEntry, int]]:
    """One parameter as the checkpoint holds it: a tensor, or codes and scales; with the bytes of each."""

    def entry(name: str, dtype: str, shape: tuple[int, ...], itemsize: int, make: Callable[[], Array]) -> Any:
        return TensorEntry(name, dtype, shape, lambda: make().tobytes()), math.prod(shape) * itemsize

    stream, kind = partial(_Stream, seed), rule.kind
    # Rows of a table are looked up; those of a matrix are multiplied with, so that their length adds up.
    length = 1 if rule.is_table else shape[-1]
    if kind is Kind.INTEGER:
        yield entry(name, "I64", shape, 8, lambda: stream(name).table(shape, config.n_routed_experts))
    elif kind is Kind.FLOAT32:
        yield entry(name, "F32", shape, 4, lambda: _float32(stream(name), name, shape))
    elif kind is Kind.NORM:
        yield entry(name, "BF16", shape, 2, lambda: (1 + 0.3 * stream(name).bell(shape)).astype(_BFLOAT16))
    elif kind is Kind.PLAIN or form == "bf16":
        slabs = partial(_bell_slabs, seed, name, math.prod(shape), np.float32(1 / math.sqrt(length)))
        yield TensorEntry(name, "BF16", shape, slabs), 2 * math.prod(shape)
    else:
        scale_name = name.removesuffix(".weight") + ".scale"
        packed = kind is Kind.EXPERT and form == "fp4"
        tile, rms = rule.block(packed=packed), _FP4_RMS if packed else _FP8_RMS
        tiles = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
        exponent = round(math.log2(1 / (rms * math.sqrt(length))))
        if packed:
            halved = (shape[0], -(-shape[1] // 2))
            yield entry(name, "I8", halved, 1, lambda: stream(name).raw(halved))
        else:
            yield TensorEntry(name, "F8_E4M3", shape, partial(_fp8_slabs, seed, name, shape, rule)), math.prod(shape)
        if form == "fp4":
            yield entry(scale_name, "F8_E8M0", tiles, 1, lambda: stream(scale_name).exponents(tiles, exponent))
        else:
            yield entry(scale_name, "F32", tiles, 4, lambda: stream(scale_name).scales(tiles, exponent))


def _fp8_slabs(seed: int, name: str, shape: tuple[int, ...], rule: Rule) -> Iterator[bytes]:
    """FP8 codes; those of a table of n-grams in pieces, because it is the largest tensor of a model."""
    stream, count = _Stream(seed, name), math.prod(shape)
    slab = _SLAB if rule.path.endswith("engram.embed") else max(1, count)
    for start in range(0, count, slab):
        yield stream.fp8((min(slab, count - start),)).tobytes()


def _bell_slabs(seed: int, name: str, count: int, spread: np.float32) -> Iterator[bytes]:
    """``count`` bell-shaped bfloat16 numbers in pieces, because an embedding at full width is large."""
    stream = _Stream(seed, name)
    for start in range(0, count, _SLAB):
        yield (spread * stream.bell((min(_SLAB, count - start),))).astype(_BFLOAT16).tobytes()


def _float32(stream: _Stream, name: str, shape: tuple[int, ...]) -> Array:
    """The tensors that every release keeps in F32, each with a spread that lets it matter."""
    last = name.rsplit(".", 1)[-1]
    if last.endswith("_scale"):
        return (0.5 + stream.unit(shape)).astype(np.float32)
    if last.endswith("_fn"):
        return (stream.bell(shape) * np.float32(1 / math.sqrt(shape[-1]))).astype(np.float32)
    spread = {"attn_sink": 1.0, "ape": 0.5, "bias": 0.1, "bias_vl": 0.1}.get(last, 0.5)
    return (stream.bell(shape) * np.float32(spread)).astype(np.float32)


class _Stream:
    """Random numbers of one tensor. Only the raw words of the generator are used: they never change by version."""

    def __init__(self, seed: int, name: str) -> None:
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16]
        self._generator = np.random.Philox(key=int.from_bytes(key, "little"))

    def raw(self, shape: tuple[int, ...]) -> Array:
        """Uniform bytes."""
        count = math.prod(shape)
        words = self._generator.random_raw(-(-count // 8)).astype("<u8", copy=False)
        return words.view(np.uint8)[:count].reshape(shape)

    def bell(self, shape: tuple[int, ...]) -> Array:
        """Float32 of mean 0 and variance 1, bell-shaped: the sum of four uniform bytes."""
        total = self.raw((*shape, 4)).sum(axis=-1, dtype=np.int32) - 510
        return total.astype(np.float32) * np.float32(1 / 147.8)

    def unit(self, shape: tuple[int, ...]) -> Array:
        """Float32 in [0, 1), multiples of 1/65536."""
        low, high = self.raw(shape), self.raw(shape)
        return (low.astype(np.float32) + high.astype(np.float32) * 256) / np.float32(65536)

    def fp8(self, shape: tuple[int, ...]) -> Array:
        """e4m3 codes: any sign and mantissa, exponent fields below ``_FP8_EXPONENTS``."""
        bits = self.raw(shape)
        exponent = (self.raw(shape).astype(np.uint16) * _FP8_EXPONENTS >> 8).astype(np.uint8)
        return (bits & 0x87) | (exponent << 3)

    def exponents(self, shape: tuple[int, ...], exponent: int) -> Array:
        """E8M0 bytes around 2^exponent, one step up or down."""
        return (127 + exponent - 1 + self.raw(shape) % 3).astype(np.uint8)

    def scales(self, shape: tuple[int, ...], exponent: int) -> Array:
        """Float32 scales around 2^exponent that are no powers of two."""
        return ((1 + (self.raw(shape).astype(np.float32) + 1) / 512) * np.float32(2.0**exponent)).astype(np.float32)

    def table(self, shape: tuple[int, ...], experts: int) -> Array:
        """int64 ``[tokens, K]``: K distinct experts per row."""
        rows, chosen = shape
        table = np.empty(shape, np.int64)
        step = max(1, (1 << 22) // experts)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            words = self._generator.random_raw((stop - start) * experts).reshape(stop - start, experts)
            table[start:stop] = np.argsort(words, axis=1, kind="stable")[:, :chosen]
        return table

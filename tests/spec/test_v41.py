"""DeepSeek-V4.1's config and table of names, against the published totals and a list of tensors of their own making."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dsv4_convert.checkpoint.header import stored_forms, stored_nbytes
from dsv4_convert.checkpoint.locate import open_source
from dsv4_convert.errors import BadInput
from dsv4_convert.golden.synthetic import tiny_v41_config, write_checkpoint
from dsv4_convert.inspection.parts import Totals
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Stored, compare, resolve
from dsv4_convert.spec.names import Dialect, Section, located, parameters
from dsv4_convert.spec.v41.config import Candidates, LayerKind, V41Config
from dsv4_convert.spec.v41.ngrams import ngram_hash

from . import v41_shapes

DATA = Path(__file__).parents[1] / "data"
RAW: dict[str, Any] = json.loads((DATA / "configs" / "DeepSeek-V4.1-Flash.from_third_party_test.json").read_text())


@pytest.fixture(scope="module")
def config() -> V41Config:
    read = Config.from_hf(RAW)
    assert isinstance(read, V41Config)
    return read


@pytest.fixture(scope="module")
def stored() -> dict[str, Stored]:
    return {
        name.replace("{e}", str(expert)): Stored(dtype, shape)
        for name, dtype, shape in v41_shapes.tensors()
        for expert in range(v41_shapes.EXPERTS if "{e}" in name else 1)
    }


def test_the_shapes_add_up_to_the_published_totals(stored: dict[str, Stored]) -> None:
    assert len(stored) == v41_shapes.TENSORS
    assert sum(stored_nbytes(tensor.dtype, tensor.shape) for tensor in stored.values()) == v41_shapes.BYTES
    file = DATA / "inventory" / "DeepSeek-V4.1-Flash.json"
    assert json.loads(file.read_text()) == v41_shapes.inventory(), f"python -m tests.spec.v41_shapes > {file}"


def test_every_tensor_has_one_use_and_every_parameter_its_tensors(config: V41Config, stored: dict[str, Stored]) -> None:
    resolution = resolve(stored, config)
    used = Counter(name for leaf in resolution.leaves for source in leaf.sources for name in source.names)
    assert used == Counter(list(stored))
    assert {leaf.path for leaf in resolution.leaves} == {path for path, _, _ in parameters(config)}
    assert resolution.dialect is Dialect.PUBLISHED
    for leaf in resolution.leaves:
        assert located(config, leaf.path) == (leaf.rule, leaf.layer)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Stored], Config]:
    """A small model of seven layers: 2 and 4 are KV sources, 6 chooses too, 1 and 4 have engrams."""
    folder = tmp_path_factory.mktemp("v41") / "hf"
    write_checkpoint(folder, tiny_v41_config())
    with open_source(folder) as checkpoint:
        return dict(stored_forms(checkpoint.tensors)), checkpoint.architecture()


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("layers.2.attn.compressor.wgate.weight", None, "missing (fills layers.2.attn.compressor.wgate)"),
        ("layers.1.engram.embed.scale", None, "codes without their scale tensor"),
        ("vision.blocks.1.mlp.w2.weight", None, "missing (fills vision.blocks.1.mlp.w2)"),
        ("mtp.2.markov_head.embed.weight", None, "missing (fills mtp.2.markov_head.markov_w1)"),
        ("image_newline", None, "missing (fills image_newline)"),
        ("layers.4.attn.compressor.wgate.weight", Stored("BF16", (32, 64)),
         "exists in KV source of ratio 2 layers only, layer 4 is ratio 1, KV source"),
        ("layers.3.attn.indexer.wk.weight", Stored("BF16", (32, 32)),
         "exists in KV source layers only, layer 3 is ratio 2"),
        ("layers.2.engram.q_weight", Stored("BF16", (4, 64)), "exists in engram layers only"),
        ("mtp.1.norm.weight", Stored("BF16", (64,)), "exists in last stages only, and this is stage 1 of DSpark"),
        ("mtp.3.attn_norm.weight", Stored("BF16", (64,)), "the config has 3 DSpark stages"),
        ("mtp.0.ffn.experts.4.w1.weight", Stored("I8", (32, 32)), "the config has only 4 experts"),
        ("vision.blocks.2.norm1.weight", Stored("BF16", (32,)), "the config has 2 vision blocks"),
        ("layers.0.attn.wq_b.scale", Stored("F8_E8M0", (1, 1)), "expected F8_E8M0 or F32 [2, 1]"),
        ("layers.1.engram.embed.scale", Stored("F8_E8M0", (10, 2)), "expected F8_E8M0 or F32 [304, 2]"),
        ("hc_head_fn", Stored("F32", (4, 256)), "unknown tensor"),
    ],
)  # fmt: skip
def test_a_tensor_out_of_place_is_named(
    small: tuple[dict[str, Stored], Config], name: str, tensor: Stored | None, problem: str
) -> None:
    stored, config = small
    assert not compare(stored, config)[1]
    changed = {**stored, name: tensor} if tensor is not None else {key: stored[key] for key in stored if key != name}
    _, problems = compare(changed, config)
    assert any(found.startswith(name.removesuffix(".scale")) and problem in found for found in problems), problems


def test_some_layers_need_neither_drafts_nor_vision(config: V41Config, stored: dict[str, Stored]) -> None:
    resolution = resolve(stored, config, layers=[1, 20])
    assert {leaf.rule.section for leaf in resolution.leaves} == {Section.MODEL, Section.LAYERS}
    assert {leaf.layer for leaf in resolution.leaves} == {None, 1, 20}


def test_the_config_is_the_published_one(config: V41Config) -> None:
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    kinds = Counter(config.layer_kind(layer) for layer in range(40))
    window, reads = (
        LayerKind(0, False, False, None, None),
        {ratio: LayerKind(ratio, False, False, None, None) for ratio in (1, 2)},
    )
    assert kinds[window] == 1
    assert (kinds[reads[2]], kinds[reads[1]]) == (15, 15)
    assert config.layer_kind(1) == window._replace(engram=0)
    assert config.layer_kind(14) == LayerKind(2, True, True, None, 1)
    assert config.layer_kind(20) == LayerKind(1, True, True, Candidates.SOURCE, None)
    assert config.layer_kind(36) == LayerKind(1, False, True, Candidates.USER, None)
    assert [config.kv_source(layer) for layer in (1, 2, 7, 13, 19, 39)] == [None, 2, 2, 8, 14, 20]
    assert [config.index_source(layer) for layer in (7, 23, 27, 39)] == [2, 20, 24, 36]
    assert (config.experts_of(39), config.experts_of(40)) == (384, 128)
    assert config.yarn is not None
    assert config.weight_block_size == (32, 32)
    assert config.expert_dtype == "fp4"


def test_the_sizes_of_the_tables_are_sums_of_primes(config: V41Config) -> None:
    """The published rows of the two tables follow from the search for primes: a check of both."""
    assert config.engram is not None
    for table, rows in enumerate(config.engram.num_embeddings):
        assert sum(ngram_hash(config.engram, table).primes) == rows


def test_the_parameters_are_those_of_the_model_card(config: V41Config) -> None:
    totals = Totals.of(config)
    assert round(totals.total / 1e9) == 552
    assert totals.tables == 256 * (384_006_168 + 384_016_682)


def _text(**changes: Any) -> dict[str, Any]:
    raw = copy.deepcopy(RAW)
    for name, value in changes.items():
        if value is None:
            raw["text_config"].pop(name)
        else:
            raw["text_config"][name] = value
    return raw


@pytest.mark.parametrize(
    ("raw", "problems"),
    [
        (_text(hidden_size=None, hc_eps=0, router_temperature=1),
         ["text_config.hidden_size: expected a positive integer", "text_config.hc_eps", "router_temperature: unknown"]),
        (_text(compress_ratios=[0, 0] + [4] * 38), ["compress_ratios: expected entries out of [0, 1, 2], found 4"]),
        (_text(compress_ratios=[0, 0] + [2] * 18 + [1] * 20 + [0, 1, 0]), ["expected 0 for each of 3 draft stages"]),
        (_text(kv_source_layer_ids=[8, 2]), ["kv_source_layer_ids: expected ascending backbone layers"]),
        (_text(kv_source_layer_ids=[2, 8, 14]), ["layer 20 has 1, of the KV source before it layer 14 has 2"]),
        (_text(kv_source_layer_ids=[8, 14, 20], index_source_layer_ids=[8, 14, 20]),
         ["layer 2 has 2, of the KV source before it there is none"]),
        (_text(index_source_layer_ids=[2, 8, 20]), ["index_source_layer_ids: lacks layer 14, a KV source"]),
        (_text(index_source_layer_ids=[1, 2, 8, 14, 20]), ["layer 1 has compress_ratios 0"]),
        (_text(candidate_source_layer_id=21), ["layer 21 is no index source"]),
        (_text(candidate_source_layer_id=14), ["layer 20 makes other keys"]),
        (_text(engram_layer_ids=[1]), ["expected a table per layer"]),
        (_text(engram_max_ngram_size=1), ["an n-gram has at least 2 tokens"]),
        (_text(engram_num_embeddings=[384_006_168, 384_016_681]),
         ["engram_num_embeddings: expected 384,016,682 rows in the table of layer 14, the sum of its 24 primes from "
          "engram_vocab_size 16,000,000 on, found 384,016,681"]),
        (_text(engram_n_heads=2**30), ["expected at least", "rows in the table of layer 1", "found 384,006,168"]),
        (_text(num_nextn_predict_layers=0, compress_ratios=[0, 0] + [2] * 18 + [1] * 20),
         ["num_nextn_predict_layers and the dspark fields contradict"]),
        (_text(dspark_target_layer_ids=[39, 40]), ["dspark_target_layer_ids: expected ascending backbone layers"]),
        (_text(dspark_num_experts_per_tok=129), ["dspark_num_experts_per_tok must not exceed"]),
        ({**RAW, "quantization_config": {**RAW["quantization_config"], "weight_block_size": [128, 128]}},
         ["weight_block_size: only [32, 32] is supported"]),
        ({**RAW, "vision_config": {**RAW["vision_config"], "patch_size": 0, "depth": 3}},
         ["vision_config.patch_size: expected a positive", "vision_config.depth: unknown field"]),
        ({**RAW, "text_config": 3}, ["text_config: expected an object, found 3"]),
    ],
)  # fmt: skip
def test_all_problems_of_a_config_are_told_at_once(raw: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(BadInput, match=r"not a DeepSeek-V4\.1 architecture that dsv4 knows") as caught:
        Config.from_hf(raw)
    for problem in problems:
        assert problem in str(caught.value)


def test_a_model_without_drafts_engrams_and_vision_has_no_such_tensors() -> None:
    raw = tiny_v41_config(
        engram_layer_ids=[], num_nextn_predict_layers=0, compress_ratios=[0, 0, 2, 2, 1, 1, 1],
        candidate_source_layer_id=None,
    )  # fmt: skip
    dspark = [name for name in raw["text_config"] if name.startswith("dspark_")]
    raw["text_config"] = {name: value for name, value in raw["text_config"].items() if name not in dspark}
    raw["vision_config"] = None
    config = Config.from_hf(raw)
    assert isinstance(config, V41Config)
    assert (config.engram, config.dspark, config.vision) == (None, None, None)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    paths = [path for path, _, _ in parameters(config)]
    assert not [path for path in paths if "engram" in path or "bias_vl" in path or path.startswith(("mtp", "vision"))]


@pytest.mark.parametrize("damage", [
    {"architecture": "deepseek_v9"}, {"compress_ratios": [0]}, {"kv_source_layer_ids": [99]}, {"engram": {}},
    {"dspark": 3}, {"compress_ratios": [0, 0, 2.0, 2, 1, 1, 1]}, {"vocab_size": True},
])  # fmt: skip
def test_a_damaged_stored_config_is_refused(damage: dict[str, Any]) -> None:
    whole = Config.from_hf(tiny_v41_config()).to_json()
    assert Config.from_json(whole)
    with pytest.raises(BadInput, match="stored dsv4 config"):
        Config.from_json({**whole, **damage})


def test_layers_that_are_taken_stay_of_their_kind(config: V41Config) -> None:
    first = config.of_layers(range(9))
    assert (first.kv_source_layer_ids, first.num_mtp_stages, first.dspark) == ((2, 8), 0, None)
    assert first.engram is not None
    assert first.engram.num_embeddings == (384_006_168,)
    for layer in (2, 5, 24):
        assert config.of_layers([layer]).layer_kind(0) == config.layer_kind(layer)


def test_a_changed_size_reaches_every_shape() -> None:
    """Sizes of a small model are all different where they can be, so no symbol can stand for another."""
    config = Config.from_hf(tiny_v41_config())
    widened = dataclasses.replace(config, hidden_size=96)
    before = {path: math.prod(rule.target_shape(config, layer)) for path, rule, layer in parameters(config)}
    after = {path: math.prod(rule.target_shape(widened, layer)) for path, rule, layer in parameters(widened)}
    grown = {path for path in before if after[path] != before[path]}
    assert {"embed", "layers.1.engram.wkv", "aligner.w1.weight", "mtp.0.main_proj"} <= grown
    assert not grown & {
        "layers.1.engram.embed",
        "layers.2.attn.indexer.wk",
        "mtp.2.markov_head.markov_w2",
        "vision.norm",
    }

"""The names table: exact on every published inventory, invertible, and loud about anything else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_convert.aot.program import first_layers
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.spec import names
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Stored, resolve
from dsv4_convert.spec.names import Dialect, Section, template
from dsv4_convert.spec.v4.names import DRAFT_HEAD, MTP, NAMES, STAGE_RULES

DATA = Path(__file__).parents[1] / "data"
#: Inventory -> the config that describes it, and how many tensors the release has.
RELEASES = {
    "DeepSeek-V4-Flash": ("DeepSeek-V4-Flash", 69_187),
    "DeepSeek-V4-Flash-Base": ("DeepSeek-V4-Flash-Base", 69_187),
    "DeepSeek-V4-Flash-0731": ("DeepSeek-V4-Flash-0731", 72_317),
    "DeepSeek-V4-Pro": ("DeepSeek-V4-Pro", 145_116),
    "DeepSeek-V4-Pro-0813": ("DeepSeek-V4-Pro-0813.from_public_notes", 149_782),
}


def _inventory(release: str) -> tuple[dict[str, Stored], Config]:
    config, count = RELEASES[release]
    document = json.loads((DATA / "inventory" / f"{release}.json").read_text())
    stored = {
        name.replace("{e}", str(expert)): Stored(dtype, tuple(shape))
        for name, (dtype, shape) in document["tensors"].items()
        for expert in range(document["n_experts"] if "{e}" in name else 1)
    }
    assert len(stored) == document["summary"]["tensors"] == count
    return stored, Config.from_file(DATA / "configs" / f"{config}.json")


@pytest.fixture(scope="module")
def flash() -> tuple[dict[str, Stored], Config]:
    return _inventory("DeepSeek-V4-Flash")


@pytest.fixture(scope="module")
def short(flash: tuple[dict[str, Stored], Config]) -> tuple[dict[str, Stored], Config]:
    """Its first ten layers, of every kind, and its stage: a name is judged by its own layer."""
    stored, config = flash
    kept = {name: tensor for name, tensor in stored.items() if (names.layer_of(name) or 0) < 10}
    return kept, dataclasses.replace(first_layers(config, 10), num_mtp_stages=config.num_mtp_stages)


@pytest.mark.parametrize("release", RELEASES)
def test_every_tensor_of_every_release_has_exactly_one_use(release: str) -> None:
    stored, config = _inventory(release)
    resolution = resolve(stored, config)
    uses = [
        name for leaf in resolution.leaves for s in leaf.sources for name in (s.weight, s.scale) if name is not None
    ]
    assert len(uses) == len(set(uses))
    assert set(uses) == set(stored)
    assert resolution.dialect is Dialect.PUBLISHED
    paths = [leaf.path for leaf in resolution.leaves]
    assert len(paths) == len(set(paths)) == len(list(names.parameters(resolution.config)))
    dated = release.endswith(("0731", "0813"))
    assert resolution.config.num_mtp_stages == (3 if dated else 1)
    assert (resolution.config.dspark is not None) == dated
    assert sum(name.startswith("mtp.") for name in stored) > 1500


def test_published_tensors_of_transformers_model_are_all_named(flash: tuple[dict[str, Stored], Config]) -> None:
    """Module names against the state dict of the real model, built without memory; shapes included."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV4Config

    raw = json.loads((DATA / "configs" / "DeepSeek-V4-Flash.json").read_text())
    raw.pop("quantization_config")
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(DeepseekV4Config(**raw)).state_dict()
    stored = {
        name: Stored("I64" if tensor.dtype is torch.int64 else "F32", tuple(tensor.shape))
        for name, tensor in state.items()
    }
    resolution = resolve(stored, flash[1], dialect=Dialect.MODULE)
    assert {source.weight for leaf in resolution.leaves for source in leaf.sources} == set(stored)


def test_saved_names_are_those_of_save_pretrained(tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, DeepseekV4Config

    from dsv4_convert.golden.synthetic import tiny_config

    raw = tiny_config(torch_dtype="float32")
    AutoModelForCausalLM.from_config(DeepseekV4Config(**raw)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        stored = {
            name: Stored(file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
            for name in file.keys()  # noqa: SIM118
        }
    resolution = resolve(stored, Config.from_file(tmp_path / "config.json"))
    assert resolution.dialect is Dialect.TRANSFORMERS


@pytest.mark.parametrize("release", ["DeepSeek-V4-Flash", "DeepSeek-V4-Flash-0731"])
def test_a_rule_for_every_name_and_back(release: str) -> None:
    """From a tensor to its parameter and from the parameter to the tensor, in every dialect."""
    config = Config.from_file(DATA / "configs" / f"{release}.json")
    for path, rule, layer in names.parameters(config):
        (explained,) = NAMES.explain(path)
        assert explained.path == path
        for dialect in Dialect:
            weight = explained.spellings[dialect][0].replace(".E.", ".7.")
            (use,) = NAMES.lookup(weight, dialect)
            number = None if use.number is None else rule.section.first(config) + use.number
            assert (use.rule, number, use.is_scale) == (rule, layer, False)
            assert use.expert == (7 if rule.per_expert else None)
            assert path in [item.path for item in NAMES.explain(weight)]


def test_no_two_rules_share_a_name_except_fused_gate_and_up() -> None:
    for dialect in Dialect:
        for key, entries in NAMES._index[dialect].items():
            assert len(entries) == (2 if key.endswith("gate_up_proj") else 1), key


@pytest.mark.parametrize(
    "name",
    [
        "layers.3.attn.wq_a.weight_scale_inv",
        "layers.3.attn.wq_a.weight.scale",
        "layers.3.attn.wq_a",
        "layers.03.attn.wq_a.weight",
        "layers.３.attn.wq_a.weight",
        "layers.-1.attn.wq_a.weight",
        "layers.attn.wq_a.weight",
        "model.layers.3.attn.wq_a.weight",
        "xlayers.3.attn.wq_a.weight",
        "layers.3.attn.wq_a.weight ",
        "embed.weight.0",
        "mtp",
        "mtp.0.markov_head",
        "mtp.0.main_proj.weight.scale",
        "mtp.0.main_norm.scale",
        "",
    ],
)
def test_near_misses_are_unknown(name: str) -> None:
    assert not NAMES.lookup(name, Dialect.PUBLISHED)


@given(st.text(alphabet="layers.0123456789wmtp_ａ٣\n", max_size=40))
def test_template_splits_without_loss(name: str) -> None:
    key, numbers = template(name)
    assert key.format(*numbers) == name
    assert key.count("{}") == len(numbers)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layers.7.attn.wkv.weight": None}, "layers.7.attn.wkv.weight: missing"),
        ({"layers.7.ffn.experts.99.w2.weight": None}, "layers.7.ffn.experts.99.w2.weight: missing"),
        ({"layers.7.attn.wkv.scale": None}, "layers.7.attn.wkv.weight: F8_E4M3 codes without their scale"),
        ({"layers.7.ffn.experts.9.w1.scale": None}, "layers.7.ffn.experts.9.w1.weight: I8 codes without"),
        ({"layers.7.attn.wkx.weight": Stored("BF16", (1,))}, "wkx.weight: unknown tensor BF16 [1]"),
        ({"layers.10.attn_norm.weight": Stored("BF16", (4096,))}, "only 10 layers"),
        ({"layers.9.ffn.experts.256.w1.weight": Stored("I8", (2048, 2048))}, "only 256 experts"),
        ({"layers.3.attn.indexer.wq_b.weight": Stored("BF16", (8192, 1024))}, "exists in CSA layers only"),
        ({"layers.0.ffn.gate.bias": Stored("F32", (256,))}, "exists in score-routed layers only"),
        ({"layers.7.attn_norm.scale": Stored("F32", (1,))}, "layers.7.attn_norm.scale: unknown tensor"),
        ({"layers.2.attn.compressor.wkv.scale": Stored("F8_E8M0", (8, 32))}, "unknown tensor"),
        ({"layers.7.hc_attn_fn": Stored("BF16", (24, 16384))}, "expected F32 without a scale, found BF16"),
        ({"layers.0.ffn.gate.tid2eid": Stored("BF16", (129280, 6))}, "expected I32 or I64"),
        ({"layers.7.attn.wkv.weight": Stored("I8", (512, 2048))}, "expected F8_E4M3 with a scale, found I8"),
        ({"layers.7.attn.wkv.weight": Stored("F8_E4M3", (4096, 512))}, "expected shape [512, 4096]"),
        ({"layers.7.attn.wkv.scale": Stored("F8_E8M0", (32, 4))}, "expected F8_E8M0 or F32 [4, 32]"),
        ({"layers.7.attn.wkv.scale": Stored("U8", (4, 32))}, "expected F8_E8M0 or F32 [4, 32]"),
        (
            {
                "layers.7.ffn.experts.3.w1.weight": Stored("F8_E4M3", (2048, 4096)),
                "layers.7.ffn.experts.3.w1.scale": Stored("F8_E8M0", (16, 32)),
            },
            "declares fp4 experts",
        ),
        ({"mtp.0.e_proj.weight": None}, "mtp.0.e_proj.weight: missing (fills mtp.0.e_proj)"),
        ({"mtp.0.ffn.experts.99.w2.weight": None}, "mtp.0.ffn.experts.99.w2.weight: missing"),
        ({"mtp.0.hnorm.weight": Stored("BF16", (1,))}, "mtp.0.hnorm.weight: expected shape [4096], found BF16 [1]"),
        ({"mtp.0.h_proj.weight": Stored("I8", (4096, 2048))}, "mtp.0.h_proj.weight: expected F8_E4M3 with a scale"),
        ({"mtp.0.hc_head_fn": Stored("BF16", (4, 16384))}, "mtp.0.hc_head_fn: expected F32 without a scale"),
        ({"mtp.0.ffn.gate.tid2eid": Stored("I64", (129280, 6))}, "mtp.0.ffn.gate.tid2eid: unknown tensor"),
        ({"mtp.0.attn.compressor.ape": Stored("F32", (4, 1024))}, "mtp.0.attn.compressor.ape: unknown tensor"),
        ({"mtp.0.embed.weight": Stored("BF16", (1,))}, "mtp.0.embed.weight: unknown tensor"),
        ({"mtp.1.enorm.weight": Stored("BF16", (4096,))}, "mtp.1.enorm.weight: the config has 1 mtp stages"),
        ({"mtp.0.ffn.experts.256.w1.weight": Stored("I8", (2048, 2048))}, "only 256 experts"),
        ({"vision.patch.weight": Stored("BF16", (1,))}, "vision.patch.weight: unknown tensor"),
        ({"image_start": Stored("BF16", (4096,))}, "image_start: the config has no vision encoder"),
        ({"vision.blocks.0.norm1.weight": Stored("BF16", (1,))}, "norm1.weight: the config has no vision blocks"),
        ({"layers.3.ffn.gate.bias_vl": Stored("F32", (256,))}, "exists in all, with a vision encoder layers only"),
        ({"layers.1.engram.wkv": Stored("BF16", (1,))}, "V4.1 engram memory is not supported"),
    ],
)
def test_refuses_what_does_not_fit_and_names_it(
    short: tuple[dict[str, Stored], Config], change: dict[str, Stored | None], complaint: str
) -> None:
    """``change`` replaces tensors, or removes those that it maps to None."""
    healthy, config = short
    stored = {name: tensor for name, tensor in {**healthy, **change}.items() if tensor is not None}
    with pytest.raises(BadInput) as caught:
        resolve(stored, config, where="folder")
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("folder: ")


def test_stages_are_all_there_or_none(flash: tuple[dict[str, Stored], Config]) -> None:
    """A checkpoint without mtp tensors is whole; its config then counts no stage."""
    stored = {name: tensor for name, tensor in flash[0].items() if names.stage_of(name) is None}
    resolution = resolve(stored, flash[1])
    assert resolution.config == flash[1].without_stages()
    assert not any(leaf.path.startswith("mtp.") for leaf in resolution.leaves)
    with pytest.raises(BadInput, match=r"mtp\.0\.attn\.wkv\.weight: the config has no mtp stages"):
        resolve(flash[0], resolution.config)
    one = {name: tensor for name, tensor in flash[0].items() if not name.startswith("mtp.0.attn.")}
    with pytest.raises(BadInput, match=r"mtp\.0\.attn\.wkv\.weight: missing"):
        resolve(one, flash[1])


@pytest.mark.parametrize("dialect", Dialect)
def test_stages_have_the_published_names_in_every_dialect(dialect: Dialect) -> None:
    for name, scaled in (("mtp.0.e_proj", True), ("mtp.0.ffn.experts.3.w2", True), ("mtp.0.norm", False)):
        (use,) = NAMES.lookup(f"{name}.weight", dialect)
        assert (use.rule.section, use.number, use.fused) == (Section.STAGES, 0, False)
        assert bool(NAMES.lookup(f"{name}.scale", dialect)) == scaled


def test_the_rows_of_a_stage_are_those_of_a_window_only_score_routed_layer(
    flash: tuple[dict[str, Stored], Config],
) -> None:
    """Flash's own tensors of mtp.0, without the extra ones, are those of a layer without compressor and hash table."""
    of_stage = {name.removeprefix("mtp.0.") for name in flash[0] if name.startswith("mtp.0.")}
    of_layer = {name.removeprefix("layers.3.") for name in flash[0] if name.startswith("layers.3.")}
    own = {name for name in of_stage if name not in of_layer}
    assert of_layer - of_stage == {name for name in of_layer if "compressor" in name}
    whens = (MTP, DRAFT_HEAD)
    extra = [rule.published.removeprefix("mtp.{}.") for rule in STAGE_RULES if rule.when in whens]
    assert own == {*extra, "e_proj.scale", "h_proj.scale"}


@pytest.fixture(scope="module")
def dated() -> tuple[dict[str, Stored], Config]:
    """V4-Flash-0731 without most of its layers; its DSpark stages are whole."""
    stored, config = _inventory("DeepSeek-V4-Flash-0731")
    kept = {name: tensor for name, tensor in stored.items() if (names.layer_of(name) or 0) < 10}
    targets = dataclasses.replace(config.dspark, target_layer_ids=(7, 8, 9)) if config.dspark else None
    short = dataclasses.replace(first_layers(config, 10), num_mtp_stages=config.num_mtp_stages, dspark=targets)
    return kept, short


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mtp.0.main_proj.weight": None}, "mtp.0.main_proj.weight: missing (fills mtp.0.main_proj)"),
        ({"mtp.0.main_proj.scale": None}, "mtp.0.main_proj.weight: F8_E4M3 codes without their scale"),
        ({"mtp.0.main_norm.weight": None}, "mtp.0.main_norm.weight: missing"),
        ({"mtp.2.markov_head.markov_w2.weight": None}, "mtp.2.markov_head.markov_w2.weight: missing"),
        ({"mtp.2.confidence_head.proj.weight": None}, "mtp.2.confidence_head.proj.weight: missing"),
        ({"mtp.1.ffn.experts.255.w3.weight": None}, "mtp.1.ffn.experts.255.w3.weight: missing"),
        ({"mtp.2.norm.weight": None}, "mtp.2.norm.weight: missing"),
        (
            {"mtp.2.markov_head.markov_w1.weight": Stored("BF16", (129280, 512))},
            "mtp.2.markov_head.markov_w1.weight: expected shape [129280, 256], found BF16 [129280, 512]",
        ),
        (
            {"mtp.0.main_proj.weight": Stored("F8_E4M3", (4096, 8192))},
            "mtp.0.main_proj.weight: expected shape [4096, 12288]",
        ),
        (
            {"mtp.2.confidence_head.proj.weight": Stored("BF16", (1, 4096))},
            "mtp.2.confidence_head.proj.weight: expected shape [1, 4352]",
        ),
        (
            {"mtp.1.main_norm.weight": Stored("BF16", (4096,))},
            "mtp.1.main_norm.weight: exists in first DSpark stages only, and this is stage 1 of DSpark",
        ),
        (
            {"mtp.0.markov_head.markov_w1.weight": Stored("BF16", (129280, 256))},
            "mtp.0.markov_head.markov_w1.weight: exists in last DSpark stages only",
        ),
        (
            {"mtp.0.norm.weight": Stored("BF16", (4096,))},
            "mtp.0.norm.weight: exists in mtp and last DSpark stages only",
        ),
        ({"mtp.0.e_proj.weight": Stored("F8_E4M3", (4096, 4096))}, "mtp.0.e_proj.weight: exists in mtp stages only"),
        ({"mtp.3.attn_norm.weight": Stored("BF16", (4096,))}, "mtp.3.attn_norm.weight: the config has 3 DSpark stages"),
        ({"mtp.2.markov_head.bias": Stored("BF16", (1,))}, "mtp.2.markov_head.bias: unknown tensor"),
    ],
)
def test_refuses_a_dspark_draft_that_does_not_fit(
    dated: tuple[dict[str, Stored], Config], change: dict[str, Stored | None], complaint: str
) -> None:
    healthy, config = dated
    resolve(healthy, config)
    stored = {name: tensor for name, tensor in {**healthy, **change}.items() if tensor is not None}
    with pytest.raises(BadInput) as caught:
        resolve(stored, config, where="folder")
    assert complaint in str(caught.value)


def test_a_draft_is_of_the_kind_that_the_config_says(dated: tuple[dict[str, Stored], Config]) -> None:
    """MTP tensors under a config of DSpark, and the reverse, are told apart by name."""
    stored, config = dated
    with pytest.raises(BadInput, match=r"mtp\.0\.main_proj\.weight: exists in first DSpark stages only.* 0 of mtp"):
        resolve(stored, dataclasses.replace(config, dspark=None))
    with pytest.raises(BadInput, match=r"mtp\.0\.e_proj\.weight: exists in mtp stages only"):
        resolve({**stored, "mtp.0.e_proj.weight": Stored("F8_E4M3", (4096, 4096))}, config)


def test_problems_are_collected_and_counted(flash: tuple[dict[str, Stored], Config]) -> None:
    stored = {name: tensor for name, tensor in flash[0].items() if not name.startswith("layers.5.")}
    with pytest.raises(BadInput) as caught:
        resolve(stored, flash[1])
    weights = [name for name in flash[0] if name.startswith("layers.5.") and not name.endswith(".scale")]
    assert f"{len(weights)} problems" in str(caught.value)
    assert f"… and {len(weights) - 20} more" in str(caught.value)


def test_chosen_layers_need_only_their_tensors(flash: tuple[dict[str, Stored], Config]) -> None:
    stored = {name: tensor for name, tensor in flash[0].items() if names.layer_of(name) in (None, 2, 3)}
    resolution = resolve(stored, flash[1], layers=[2, 3])
    assert {leaf.layer for leaf in resolution.leaves} == {None, 2, 3}
    assert not any(leaf.path.startswith("mtp.") for leaf in resolution.leaves)
    with pytest.raises(UsageError, match="layers 0 to 42"):
        resolve(stored, flash[1], layers=[43])


def test_an_unknown_checkpoint_is_said_to_be_one() -> None:
    with pytest.raises(BadInput, match="none of the 1 tensor names"):
        NAMES.detect_dialect(["transformer.h.0.attn.weight"])


def test_explain_suggests_close_names() -> None:
    with pytest.raises(UsageError, match=r"layers\.N\.attn\.wq_a"):
        NAMES.explain("layers.3.attn.wq_c.weight")

"""MaxText's tree, against a transcription of MaxText's own sources that knows nothing of our table.

The trees below were written by hand from the module definitions of MaxText 0.2.5
(``models/deepseek4.py``, ``layers/attention_compressed.py``, ``mhc.py``, ``moe.py``, ``normalizations.py``,
``embeddings.py``): name and shape of every variable, for the published Flash. The formulas in ``expected_array`` are
those of its conversion hooks (``checkpoint_conversion/utils/param_mapping.py``), said in NumPy.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from dsv4_convert.checkpoint import open_checkpoint
from dsv4_convert.convert import Layout, Storage, hf_to_orbax
from dsv4_convert.convert.against import compare_with_source
from dsv4_convert.convert.to_hf import orbax_to_hf
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.formats.weight import decode_weight
from dsv4_convert.golden.synthetic import dspark_config, tiny_config, write_checkpoint
from dsv4_convert.spec import maxtext, maxtext_config
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import parameters
from dsv4_convert.spec.v4.kinds import AttentionKind
from dsv4_convert.store import open_store, verify
from dsv4_convert.weights.converted import Weights

DATA = Path(__file__).parents[1] / "data" / "configs"
FLASH = Config.from_file(DATA / "DeepSeek-V4-Flash.json")

MODEL = {
    "params.token_embedder.embedding": (129280, 4096),
    "params.decoder.decoder_norm.scale": (4096,),
    "params.decoder.logits_dense.kernel": (4096, 129280),
    "params.decoder.hc_head.hc_fn": (16384, 4),
    "params.decoder.hc_head.hc_base": (4,),
    "params.decoder.hc_head.hc_scale": (1,),
}
MHC = {
    "mhc_norm.scale": (16384,),
    "pre_alpha": (16384, 4),
    "post_alpha": (16384, 4),
    "res_alpha": (16384, 16),
    "pre_beta": (4,),
    "post_beta": (4,),
    "res_beta": (4, 4),
    "pre_alpha_scale": (1,),
    "post_alpha_scale": (1,),
    "res_alpha_scale": (1,),
}
LAYER = {
    **{f"params.mhc_attention.{name}": shape for name, shape in MHC.items()},
    **{f"params.mhc_mlp.{name}": shape for name, shape in MHC.items()},
    "params.pre_self_attention_layer_norm.scale": (4096,),
    "params.post_self_attention_layer_norm.scale": (4096,),
    "params.self_attention.wq_a.kernel": (4096, 1024),
    "params.self_attention.q_norm.scale": (1024,),
    "params.self_attention.wq_b.kernel": (1024, 64, 512),
    "params.self_attention.wkv.kernel": (4096, 1, 512),
    "params.self_attention.kv_norm.scale": (512,),
    "params.self_attention.sinks": (64,),
    "params.self_attention.o_a_proj.kernel": (8, 4096, 1024),
    "params.self_attention.o_b_proj.kernel": (8192, 4096),
    "params.mlp.MoeBlock_0.gate.kernel": (4096, 256),
    "params.mlp.MoeBlock_0.wi_0": (256, 4096, 2048),
    "params.mlp.MoeBlock_0.wi_1": (256, 4096, 2048),
    "params.mlp.MoeBlock_0.wo": (256, 2048, 4096),
    "params.mlp.shared_experts.wi_0.kernel": (4096, 2048),
    "params.mlp.shared_experts.wi_1.kernel": (4096, 2048),
    "params.mlp.shared_experts.wo.kernel": (2048, 4096),
}
#: Variables of other classes than nnx.Param, under the name of the class: scanned along axis 0, and in three places.
HASHED = {"Tid2EidVar.mlp.MoeBlock_0.tid2eid": (129280, 6)}
LEARNED = {"MoEBiasVar.mlp.MoeBlock_0.gate.bias": (256,)}
HCA = {
    "params.self_attention.hca_compressor.kv_proj.kernel": (4096, 512),
    "params.self_attention.hca_compressor.gate_proj.kernel": (4096, 512),
    "params.self_attention.hca_compressor.position_bias": (128, 512),
    "params.self_attention.hca_compressor.kv_norm.scale": (512,),
}
CSA = {
    "params.self_attention.csa_compressor.kv_proj.kernel": (4096, 1024),
    "params.self_attention.csa_compressor.gate_proj.kernel": (4096, 1024),
    "params.self_attention.csa_compressor.position_bias": (4, 1024),
    "params.self_attention.csa_compressor.kv_norm.scale": (512,),
    "params.self_attention.csa_compressor.indexer.q_proj.kernel": (1024, 8192),
    "params.self_attention.csa_compressor.indexer.kv_proj.kernel": (4096, 256),
    "params.self_attention.csa_compressor.indexer.gate_proj.kernel": (4096, 256),
    "params.self_attention.csa_compressor.indexer.position_bias": (4, 256),
    "params.self_attention.csa_compressor.indexer.kv_norm.scale": (128,),
    "params.self_attention.csa_compressor.indexer.weights_proj.kernel": (4096, 64),
}
#: compress_ratios of MaxText's deepseek4-284b.yml.
RATIOS = [0, 0, *([4, 128] * 20), 4]


def placed(name: str, where: str) -> list[str]:
    kind, rest = name.split(".", 1)
    roots = ["params.params"] if kind == "params" else ["params.params", f"params.{kind}", "nnx_aux.model"]
    return [f"{root}.decoder.{where}.{rest}" for root in roots]


def expected_tree(*, scanned: bool) -> dict[str, tuple[int, ...]]:
    tree = {f"params.{name}": shape for name, shape in MODEL.items()}
    for layer in range(3 if scanned else 43):
        variables = LAYER | (HASHED if layer < 3 else LEARNED) | {0: {}, 4: CSA, 128: HCA}[RATIOS[layer]]
        for name, shape in variables.items():
            tree |= dict.fromkeys(placed(name, f"layers_{layer}"), shape)
    for half, compressor in enumerate((HCA, CSA) if scanned else ()):
        for name, shape in (LAYER | LEARNED | compressor).items():
            stacked = (*shape[:1], 20, *shape[1:]) if name.startswith("params.") else (20, *shape)
            tree |= dict.fromkeys(placed(name, f"scanned_blocks.layers_{half}"), stacked)
    return tree


@pytest.mark.parametrize("scanned", [True, False])
def test_the_tree_of_flash(scanned: bool) -> None:
    found = {target.path: target.shape for target in maxtext.targets(FLASH, scanned=scanned)}
    expected = expected_tree(scanned=scanned)
    assert found == expected


def recorded(model: str, *, scanned: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, class and shape of every variable of MaxText's abstract NNX model, of 0.2.5 as of commit e591f30cb.

    They came from ``model_creation_utils.create_nnx_abstract_model``, random states left out; all are float32. ``tiny``
    has the sizes of the checkpoint of these tests. ``tests/witnesses`` compares them with an installed MaxText.
    """
    path = DATA.parent / "maxtext" / f"{model}-{'scanned' if scanned else 'unscanned'}.txt"
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: (kind, tuple(map(int, shape.split(",")))) for name, kind, shape in lines}


@pytest.mark.parametrize("model", ["DeepSeek-V4-Flash", "DeepSeek-V4-Pro"])
@pytest.mark.parametrize("scanned", [True, False])
def test_the_tree_that_maxtext_itself_makes(model: str, scanned: bool) -> None:
    expected = recorded(model, scanned=scanned)
    found = {
        target.path: (target.row.variable or "Param", target.shape)
        for target in maxtext.targets(Config.from_file(DATA / f"{model}.json"), scanned=scanned)
    }
    assert found == {
        f"{root}.{name}": (kind, shape)
        for name, (kind, shape) in expected.items()
        for root in ("params.params", *([f"params.{kind}", "nnx_aux.model"] if kind != "Param" else []))
    }


@pytest.mark.parametrize("model", ["DeepSeek-V4-Flash", "DeepSeek-V4-Pro"])
@pytest.mark.parametrize("scanned", [True, False])
def test_every_parameter_is_used_and_every_row_once(model: str, scanned: bool) -> None:
    config = Config.from_file(DATA / f"{model}.json")
    rows: dict[str, list[tuple[int, int] | None]] = {}
    for target in maxtext.targets(config, scanned=scanned):
        for path in target.paths:
            rows.setdefault(path, []).append(target.rows)
    everything = {path: rule.source_shape(config, layer) for path, rule, layer in parameters(config)}
    everything = {path: shape for path, shape in everything.items() if not path.startswith("mtp.")}
    assert rows.keys() == everything.keys()
    for path, runs in rows.items():
        if path.endswith(("gate.bias", "tid2eid")):
            assert runs == [None] * 3  # among the weights, in its own collection, and in a full state
        elif runs != [None]:
            ordered = sorted(run for run in runs if run is not None)
            assert len(ordered) == len(runs) == 3
            assert [start for start, _ in ordered] == [0, *(stop for _, stop in ordered[:-1])], path
            assert ordered[-1][1] == everything[path][0], path


def scannable(**changes: object) -> dict[str, object]:
    """Seven layers as MaxText scans them: three that stand alone, then HCA and CSA in turn."""
    return tiny_config(num_hidden_layers=7, compress_ratios=[0, 0, 4, 128, 4, 128, 4, 0], num_hash_layers=3, **changes)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maxtext") / "hf"
    write_checkpoint(folder, scannable(o_lora_rank=128, hidden_size=64), seed=11)
    return folder


def expected_array(published: Callable[[str], np.ndarray], config: Config, name: str, layer: int) -> np.ndarray:
    """One variable of one layer, by MaxText's own conversion hooks, from the published tensors ``[out, in]``."""
    rest = name
    tail = rest.rpartition(".")[2]
    prefix = f"layers.{layer}."
    if "mhc_" in rest:
        half = "hc_attn" if "mhc_attention" in rest else "hc_ffn"
        streams = config.hc_mult
        part = {"pre": 0, "post": 1, "res": 2}.get(tail.split("_")[0], 0)
        rows = slice(*[(0, streams), (streams, 2 * streams), (2 * streams, None)][part])
        if tail == "scale":
            return np.ones(streams * config.hidden_size)
        if tail.endswith("_scale"):
            return published(f"{prefix}{half}_scale")[part].reshape(1)
        if tail.endswith("_alpha"):
            return published(f"{prefix}{half}_fn")[rows].T
        base = published(f"{prefix}{half}_base")[rows]
        return base.reshape(streams, streams) if part == 2 else base
    heads, width = config.num_attention_heads, config.head_dim
    kernels: dict[str, Callable[[], np.ndarray]] = {
        "pre_self_attention_layer_norm.scale": lambda: published(prefix + "attn_norm.weight"),
        "post_self_attention_layer_norm.scale": lambda: published(prefix + "ffn_norm.weight"),
        "self_attention.wq_a.kernel": lambda: published(prefix + "attn.wq_a.weight").T,
        "self_attention.q_norm.scale": lambda: published(prefix + "attn.q_norm.weight"),
        "self_attention.wq_b.kernel": lambda: published(prefix + "attn.wq_b.weight").T.reshape(-1, heads, width),
        "self_attention.wkv.kernel": lambda: published(prefix + "attn.wkv.weight").T.reshape(-1, 1, width),
        "self_attention.kv_norm.scale": lambda: published(prefix + "attn.kv_norm.weight"),
        "self_attention.sinks": lambda: published(prefix + "attn.attn_sink"),
        "self_attention.o_a_proj.kernel": lambda: (
            published(prefix + "attn.wo_a.weight").reshape(config.o_groups, config.o_lora_rank, -1).transpose(0, 2, 1)
        ),
        "self_attention.o_b_proj.kernel": lambda: published(prefix + "attn.wo_b.weight").T,
        "mlp.MoeBlock_0.gate.kernel": lambda: published(prefix + "ffn.gate.weight").T,
        "mlp.MoeBlock_0.gate.bias": lambda: published(prefix + "ffn.gate.bias"),
        "mlp.MoeBlock_0.tid2eid": lambda: published(prefix + "ffn.gate.tid2eid"),
        **{
            f"mlp.shared_experts.{theirs}.kernel": lambda ours=ours: (
                published(f"{prefix}ffn.shared_experts.{ours}.weight").T
            )
            for theirs, ours in (("wi_0", "w1"), ("wi_1", "w3"), ("wo", "w2"))
        },
        **{
            f"mlp.MoeBlock_0.{theirs}": lambda ours=ours: np.stack(
                [published(f"{prefix}ffn.experts.{e}.{ours}.weight").T for e in range(config.n_routed_experts)]
            )
            for theirs, ours in (("wi_0", "w1"), ("wi_1", "w3"), ("wo", "w2"))
        },
    }
    for compressor in ("csa_compressor", "hca_compressor"):
        for theirs, ours in ((compressor, "attn.compressor"), (f"{compressor}.indexer", "attn.indexer.compressor")):
            at = f"self_attention.{theirs}"
            kernels |= {
                f"{at}.kv_proj.kernel": lambda ours=ours: published(f"{prefix}{ours}.wkv.weight").T,
                f"{at}.gate_proj.kernel": lambda ours=ours: published(f"{prefix}{ours}.wgate.weight").T,
                f"{at}.position_bias": lambda ours=ours: published(f"{prefix}{ours}.ape"),
                f"{at}.kv_norm.scale": lambda ours=ours: published(f"{prefix}{ours}.norm.weight"),
            }
        at = f"self_attention.{compressor}.indexer"
        kernels[f"{at}.q_proj.kernel"] = lambda: published(prefix + "attn.indexer.wq_b.weight").T
        kernels[f"{at}.weights_proj.kernel"] = lambda: published(prefix + "attn.indexer.weights_proj.weight").T
    return kernels[rest]()


@pytest.mark.parametrize("layout", [Layout.MAXTEXT, Layout.MAXTEXT_UNSCANNED])
def test_every_value_is_where_maxtext_puts_it(hf: Path, tmp_path: Path, layout: Layout) -> None:
    hf_to_orbax(hf, tmp_path / "orbax", storage=Storage.FLOAT32, layout=layout)
    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "orbax")
    assert set(tree) == {"params", "nnx_aux"}
    assert set(tree["params"]) == {"params", "MoEBiasVar", "Tid2EidVar"}
    store = open_store(tmp_path / "orbax")
    seen = 0
    with open_checkpoint(hf) as checkpoint:
        config = Config.from_hf(checkpoint.config)

        def published(name: str) -> np.ndarray:
            scale = name.removesuffix("weight") + "scale"
            stored = checkpoint.read(name)
            if name.endswith("tid2eid"):
                return stored
            scales = checkpoint.read(scale) if name.endswith(".weight") and scale in checkpoint.tensors else None
            return decode_weight(stored, scales, block=(128, 128), dtype=np.dtype(np.float32))

        for path in store.paths:
            rest = path.split(".")[2:]
            node = tree
            for part in path.split("."):
                node = node[part]
            if rest[0] == "token_embedder":
                expected = published("embed.weight")
            elif rest[1] in ("decoder_norm", "logits_dense", "hc_head"):
                name = {"scale": "norm.weight", "kernel": "head.weight"}.get(rest[-1], f"hc_head_{rest[-1][3:]}")
                expected = published(name).T if rest[-1] in ("kernel", "hc_fn") else published(name)
            elif rest[1] == "scanned_blocks":
                half, name = int(rest[2][-1]), ".".join(rest[3:])
                layers = [expected_array(published, config, name, layer) for layer in range(3 + half, 7, 2)]
                expected = np.stack(layers, axis=0 if name.endswith("gate.bias") else 1)
            else:
                name = ".".join(rest[2:])
                expected = expected_array(published, config, name, int(rest[1].removeprefix("layers_")))
            found = np.asarray(node)
            assert found.shape == expected.shape, path
            assert np.array_equal(found.astype(np.float64), expected.astype(np.float64)), path
            assert found.dtype.kind == "f" or found.dtype.name == "bfloat16", path
            seen += 1
    assert seen == len(list(maxtext.targets(config, scanned=layout is Layout.MAXTEXT)))
    assert verify(store) == []
    assert compare_with_source(store, hf) == []


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_calls_of_maxtexts_loaders_find_every_variable(hf: Path, tmp_path: Path, scanned: bool) -> None:
    """No call complains of what a checkpoint lacks: MaxText goes on with zeros, or with arrays it has deleted."""
    layout = Layout.MAXTEXT if scanned else Layout.MAXTEXT_UNSCANNED
    hf_to_orbax(hf, tmp_path / "orbax", storage=Storage.FLOAT32, layout=layout)
    variables = recorded("tiny", scanned=scanned)
    kinds = {name: kind for name, (kind, _) in variables.items()}
    blank = {name: jnp.full(shape, jnp.nan) for name, (_, shape) in variables.items()}
    by_class = {kind: {name: blank[name] for name in blank if kinds[name] == kind} for kind in set(kinds.values())}
    weights, others = by_class["Param"], by_class["MoEBiasVar"] | by_class["Tid2EidVar"]
    # MaxText's defaults, although the store is neither.
    loader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))

    # from_pretrained: decoding, the logit checker, post-training
    wanted = {"params": {"params": nested(blank)}}
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    loaded = loader.restore(tmp_path / "orbax", item=wanted, transforms={}, restore_args=arguments)
    found = [flat(loaded["params"]["params"])]

    # load_parameters_path: training; a collection for every class, Param's being params
    collections = {"params" if kind == "Param" else kind: nested(named) for kind, named in by_class.items()}
    wanted = {"params": collections}
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    loaded = loader.restore(tmp_path / "orbax", item=wanted, transforms={}, restore_args=arguments)
    found.append({name: leaf for tree in loaded["params"].values() for name, leaf in flat(tree).items()})

    # load_full_state_path: training; the step stands for what only a training run has
    wanted = {
        "params": {"params": nested(weights)},
        "nnx_aux": {"model": nested(others)},
        "step": jnp.full((), jnp.nan),
    }
    options = ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True)
    loaded = loader.restore(tmp_path / "orbax", args=options)
    found.append(flat(loaded["params"]["params"]) | flat(loaded["nnx_aux"]["model"]))
    assert np.isnan(loaded["step"])  # a leaf that the checkpoint lacks stays what it was

    store = open_store(tmp_path / "orbax")
    for given in found:
        assert given.keys() == variables.keys()
        for name, (_, shape) in variables.items():
            stored = store.read(f"params.params.{name}").astype(np.float32)
            assert stored.any(), name
            assert given[name].shape == shape, name
            assert np.array_equal(np.asarray(given[name]), stored), name


def nested(leaves: Mapping[str, jax.Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


def test_what_maxtext_cannot_have_is_refused(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="reads numbers, not --dtype source"):
        hf_to_orbax(hf, tmp_path / "a", storage=Storage.SOURCE, layout=Layout.MAXTEXT)
    with pytest.raises(UsageError, match="has all layers"):
        hf_to_orbax(hf, tmp_path / "a", layers=[1], layout=Layout.MAXTEXT)
    write_checkpoint(tmp_path / "other", tiny_config(num_hash_layers=1))
    with pytest.raises(UsageError, match=r"do not alternate like that\. Use --layout maxtext-unscanned"):
        hf_to_orbax(tmp_path / "other", tmp_path / "a", layout=Layout.MAXTEXT)
    hf_to_orbax(tmp_path / "other", tmp_path / "b", layout=Layout.MAXTEXT_UNSCANNED)
    with pytest.raises(BadInput, match="has the layout of maxtext-unscanned"):
        Weights.open(tmp_path / "b")
    with pytest.raises(UsageError, match="has the layout of maxtext-unscanned"):
        orbax_to_hf(tmp_path / "b", tmp_path / "c")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_hidden_layers"] == 4


@pytest.mark.parametrize("layout", [Layout.MAXTEXT, Layout.MAXTEXT_UNSCANNED])
@pytest.mark.parametrize(("config", "tensors"), [(tiny_config(), 75), (dspark_config(), 205)], ids=["mtp", "DSpark"])
def test_draft_stages_are_left_out_with_the_reason(
    tmp_path: Path, layout: Layout, config: dict[str, Any], tensors: int
) -> None:
    write_checkpoint(tmp_path / "hf", config)
    planned, _ = hf_to_orbax(tmp_path / "hf", tmp_path / "orbax", layout=layout)
    assert set(planned.dropped.values()) == {"draft stage, for which MaxText's tree has no place"}
    assert all(name.startswith("mtp.") for name in planned.dropped)
    assert len(planned.dropped) == tensors
    assert compare_with_source(open_store(tmp_path / "orbax"), tmp_path / "hf") == []


#: MaxText 0.2.5's ``configs/models/deepseek4-284b.yml``, all of it but ``log_moe_bias_norms``, which is its default.
SHIPPED: dict[str, object] = {
    "base_emb_dim": 4096,
    "base_num_query_heads": 64,
    "base_num_kv_heads": 1,
    "base_num_decoder_layers": 43,
    "base_mlp_dim": 2048,
    "base_moe_mlp_dim": 2048,
    "vocab_size": 129280,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "enable_dropout": False,
    "logits_via_embedding": False,
    "normalization_layer_epsilon": 1e-6,
    "decoder_block": "deepseek4",
    "mhc_expansion_rate": 4,
    "first_num_hash_layers": 3,
    "indexer_head_dim": 128,
    "indexer_n_heads": 64,
    "indexer_topk": 512,
    "compress_ratios": RATIOS,
    "mlp_activations": ["silu", "linear"],
    "num_experts": 256,
    "num_experts_per_tok": 6,
    "mlp_activations_limit": 10,
    "shared_experts": 1,
    "routed_score_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_bias": True,
    "routed_bias_update_rate": 0.001,
    "load_balance_loss_weight": 0.0001,
    "routed_scaling_factor": 1.5,
    "attention_type": "compressed",
    "use_indexer": True,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window_size": 128,
    "rope_type": "default",
    "rope_max_timescale": 10000,
    "compressed_rope_max_timescale": 160000,
    "max_position_embeddings": 1048576,
    "original_max_position_embeddings": 65536,
}
#: What it leaves to ``base.yml``, where the default is this.
DEFAULTS: dict[str, object] = {"sinkhorn_iterations": 20}


def test_the_config_of_flash_is_the_one_that_maxtext_ships() -> None:
    assert yaml.safe_load(maxtext_config.model_file(FLASH, scanned=True)) == SHIPPED | DEFAULTS


@pytest.mark.parametrize("scanned", [True, False])
def test_flags_and_file_say_the_same(scanned: bool) -> None:
    pro = Config.from_file(DATA / "DeepSeek-V4-Pro.json")
    content = maxtext_config.model_file(pro, scanned=scanned)
    program, flag, module, *flags = shlex.split(maxtext_config.command(pro, "gs://bucket/pro", scanned=scanned))
    assert (program, flag, module) == ("python3", "-m", "maxtext.trainers.pre_train.train")
    given = {name: yaml.safe_load(value) for name, _, value in (flag.partition("=") for flag in flags)}
    assert given == yaml.safe_load(content) | {
        "model_name": "deepseek4-284b",
        "override_model_config": True,
        "scan_layers": scanned,
        "attention": "dot_product",
        "load_parameters_path": "gs://bucket/pro",
    }
    # The comment has them for those who cannot read the terminal any more.
    comment = next(line for line in content.decode().splitlines() if "model_name=" in line)
    assert shlex.split(comment.removeprefix("# ")) == flags[:-1]


def test_what_maxtext_has_no_field_for_is_refused_with_all_reasons() -> None:
    tiny = Config.from_hf(scannable())
    late = (False, *tiny.hash_routed[1:])
    odd = dataclasses.replace(tiny, csa_ratio=8, hca_ratio=2, rope_theta=0.5, hash_routed=late)
    with pytest.raises(UsageError, match="cannot express this model; use --layout dsv4") as caught:
        list(maxtext.targets(odd, scanned=False))
    for reason in ("not the first ones", "CSA layer has the ratio 4", "HCA layer has a ratio above 4", "are 0.5 and"):
        assert reason in str(caught.value)
    wide = dataclasses.replace(tiny, hca_ratio=64)
    assert list(maxtext.targets(wide, scanned=False))
    with pytest.raises(UsageError, match=r"ratio 128.*Use --layout maxtext-unscanned"):
        list(maxtext.targets(wide, scanned=True))


def test_what_maxtext_computes_otherwise() -> None:
    assert maxtext_config.differences(FLASH) == [
        "no YaRN on layers with a compressor (DeepSeekV4RotaryEmbedding)",
        "no clamp of the shared expert at 10 (MlpBlock)",
    ]
    short = dataclasses.replace(FLASH, yarn=None, hc_eps=2e-3)
    windows = dataclasses.replace(FLASH, attention=(AttentionKind.SLIDING,) * FLASH.num_hidden_layers)
    assert "YaRN" not in maxtext_config.warning(short)
    assert "hc_eps" in maxtext_config.warning(short)
    assert "YaRN" not in maxtext_config.warning(windows)


@pytest.mark.parametrize("layout", list(Layout))
def test_the_file_is_written_beside_the_checkpoint(hf: Path, tmp_path: Path, layout: Layout) -> None:
    planned, _ = hf_to_orbax(hf, tmp_path / "orbax", layout=layout)
    file = tmp_path / "orbax" / "maxtext.yml"
    if layout is Layout.DSV4:
        assert not file.exists()
    else:
        assert file.read_bytes() == maxtext_config.model_file(planned.config, scanned=layout is Layout.MAXTEXT)
        assert "maxtext.yml" in open_store(tmp_path / "orbax").manifest.files

"""The parameter tree of MaxText's DeepSeek-V4, as a second reading of the names table.

Every row says where a parameter of :mod:`dsv4_convert.spec.names` stands in MaxText, and in which shape. Most matrices
have the orientation that they have here (``[in, out]``, experts stacked), so a row is a renaming and a reshape; the
parameters of a hyper-connection are transposed and cut into three. Read from MaxText 0.2.5:
``models/deepseek4.py``, ``layers/{attention_compressed,mhc,moe,nnx_decoders,normalizations}.py`` for names and shapes,
``checkpoint_conversion/utils/param_mapping.py`` for what corresponds to what,
``utils/model_creation_utils.py`` and ``common/{checkpointing,train_state_nnx}.py`` for where a loader looks. Commit
e591f30cb (2026-08-22) has the same tree.

Two variables are not weights (``nnx.Param``) but have classes of their own, and each of MaxText's loaders looks for
them in another place. The checkpoint has them in all three:

===========================  =======================================  ==================================
loader                       looks for them below                     e591f30cb
===========================  =======================================  ==================================
``from_pretrained``          ``params.params``, beside the weights    the same
``load_parameters_path``     ``params.MoEBiasVar``, ``.Tid2EidVar``   nowhere; they stay zero, no error
``load_full_state_path``     ``nnx_aux.model``                        the same
===========================  =======================================  ==================================

The first is the one of decoding, post-training and the logit checker, the others are those of training.

* The routing bias is a ``MoEBiasVar``.
* The hash table is a ``Tid2EidVar`` of float32: MaxText differentiates the whole tree, so it wants no integers. Expert
  numbers are exact in float32.

``mhc_norm.scale`` has no counterpart: the release's normalisation before the mixing has no weight, so it is ones.

Scanned (``scan_layers=True``): the hash-routed layers stand alone, all others alternate HCA and CSA and are stacked in
``scanned_blocks.layers_0`` and ``layers_1``: weights along axis 1 (``param_scan_axis``), all else along axis 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dsv4_convert.spec.config import Config
from dsv4_convert.spec.maxtext_config import check, expressible
from dsv4_convert.spec.names import Rule
from dsv4_convert.spec.v4.kinds import AttentionKind
from dsv4_convert.spec.v4.names import RULES, sizes

#: The axis along which the weights of scanned layers are stacked, and that of all other variables.
SCAN_AXIS, OTHER_SCAN_AXIS = 1, 0

#: Where a checkpoint has the weights, and where a full state has the variables of other classes.
WEIGHTS, OTHERS = "params.params", "nnx_aux.model"


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of MaxText.

    Attributes:
        path: of ours, as in :data:`dsv4_convert.spec.names.RULES`; None for a constant one.
        target: dotted path in the tree, below the layer for a parameter of a layer.
        shape: symbols of :func:`dsv4_convert.spec.names.sizes`, of one layer.
        variable: its class in MaxText, which is also the name of a collection; None for a weight, an ``nnx.Param``.
        rows: of the published tensor, as symbols of first and last; None for all.
        transposed: ``[in, out]``, where the parameter of ours has the published ``[out, in]``.
        dtype: where it is not that of the storage or of the source.
        when: the path whose layers have it, for a constant one.
    """

    path: str | None
    target: str
    shape: str
    variable: str | None = None
    rows: tuple[str, str] | None = None
    transposed: bool = False
    dtype: str | None = None
    when: str | None = None

    @property
    def roots(self) -> tuple[str, ...]:
        """Every place of the checkpoint that has it."""
        return (WEIGHTS,) if self.variable is None else (WEIGHTS, f"params.{self.variable}", OTHERS)


def _hyper_connection(path: str, target: str) -> tuple[Row, ...]:
    """``fn``, ``base`` and ``scale`` hold pre, post and residual mixing one after the other."""
    cuts = {"pre": ("0", "N"), "post": ("N", "2N"), "res": ("2N", "M")}
    places = {"pre": ("0", "1"), "post": ("1", "2"), "res": ("2", "3")}
    found = [Row(None, f"{target}.mhc_norm.scale", "ND", when=f"{path}_fn")]
    for part, rows in cuts.items():
        width = "NN" if part == "res" else "N"
        found += [
            Row(f"{path}_fn", f"{target}.{part}_alpha", f"ND {width}", rows=rows, transposed=True),
            Row(f"{path}_base", f"{target}.{part}_beta", "N N" if part == "res" else "N", rows=rows),
            Row(f"{path}_scale", f"{target}.{part}_alpha_scale", "1", rows=places[part]),
        ]
    return tuple(found)


def _compressor(ours: str, target: str, width: str, normed: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}.ape", f"{target}.position_bias", f"r {width}"),
        Row(f"{ours}.wkv", f"{target}.kv_proj.kernel", f"D {width}"),
        Row(f"{ours}.wgate", f"{target}.gate_proj.kernel", f"D {width}"),
        Row(f"{ours}.norm", f"{target}.kv_norm.scale", normed),
    )


_ATTENTION, _MOE = "self_attention", "mlp.MoeBlock_0"

#: Parameters beside the layers.
MODEL: tuple[Row, ...] = (
    Row("embed", "token_embedder.embedding", "V D"),
    Row("norm", "decoder.decoder_norm.scale", "D"),
    Row("head", "decoder.logits_dense.kernel", "D V"),
    Row("hc_head_fn", "decoder.hc_head.hc_fn", "ND N", transposed=True),
    Row("hc_head_base", "decoder.hc_head.hc_base", "N"),
    Row("hc_head_scale", "decoder.hc_head.hc_scale", "1"),
)

#: Parameters of a layer; ``{compressor}`` is that of its kind.
LAYER: tuple[Row, ...] = (
    *_hyper_connection("hc_attn", "mhc_attention"),
    Row("attn_norm", "pre_self_attention_layer_norm.scale", "D"),
    Row("attn.wq_a", f"{_ATTENTION}.wq_a.kernel", "D R"),
    Row("attn.q_norm", f"{_ATTENTION}.q_norm.scale", "R"),
    Row("attn.wq_b", f"{_ATTENTION}.wq_b.kernel", "R H C"),
    Row("attn.wkv", f"{_ATTENTION}.wkv.kernel", "D 1 C"),
    Row("attn.kv_norm", f"{_ATTENTION}.kv_norm.scale", "C"),
    Row("attn.attn_sink", f"{_ATTENTION}.sinks", "H"),
    *_compressor("attn.compressor", f"{_ATTENTION}.{{compressor}}", "oC", "C"),
    Row("attn.indexer.wq_b", f"{_ATTENTION}.{{compressor}}.indexer.q_proj.kernel", "R HiCi"),
    Row("attn.indexer.weights_proj", f"{_ATTENTION}.{{compressor}}.indexer.weights_proj.kernel", "D Hi"),
    *_compressor("attn.indexer.compressor", f"{_ATTENTION}.{{compressor}}.indexer", "2Ci", "Ci"),
    Row("attn.wo_a", f"{_ATTENTION}.o_a_proj.kernel", "G HC/G O"),
    Row("attn.wo_b", f"{_ATTENTION}.o_b_proj.kernel", "GO D"),
    *_hyper_connection("hc_ffn", "mhc_mlp"),
    Row("ffn_norm", "post_self_attention_layer_norm.scale", "D"),
    Row("ffn.gate.weight", f"{_MOE}.gate.kernel", "D E"),
    Row("ffn.gate.bias", f"{_MOE}.gate.bias", "E", variable="MoEBiasVar"),
    Row("ffn.gate.tid2eid", f"{_MOE}.tid2eid", "V K", variable="Tid2EidVar", dtype="float32"),
    Row("ffn.experts.w1", f"{_MOE}.wi_0", "E D I"),
    Row("ffn.experts.w2", f"{_MOE}.wo", "E I D"),
    Row("ffn.experts.w3", f"{_MOE}.wi_1", "E D I"),
    Row("ffn.shared_experts.w1", "mlp.shared_experts.wi_0.kernel", "D I"),
    Row("ffn.shared_experts.w2", "mlp.shared_experts.wo.kernel", "I D"),
    Row("ffn.shared_experts.w3", "mlp.shared_experts.wi_1.kernel", "D I"),
)

_COMPRESSOR = {AttentionKind.CSA: "csa_compressor", AttentionKind.HCA: "hca_compressor", AttentionKind.SLIDING: ""}


@dataclasses.dataclass(frozen=True)
class Target:
    """One leaf of MaxText's tree.

    Attributes:
        path: dotted path, from the root of the checkpoint.
        shape: of the whole leaf.
        row: what it is.
        paths: the parameters of ours that fill it: one, or one for each scanned layer; none for ones.
        rows: first and last row of the published tensor that it holds; None for all.
        scan_axis: the axis of the layers; None for a leaf of one layer or of none.
    """

    path: str
    shape: tuple[int, ...]
    row: Row
    paths: tuple[str, ...]
    rows: tuple[int, int] | None
    scan_axis: int | None = None


def targets(config: Config, *, scanned: bool) -> Iterator[Target]:
    """Every leaf of the tree; a variable that is not a weight is there three times, with the same content.

    Raises:
        UsageError: MaxText cannot express this model, or cannot scan its layers.
    """
    check(config, scanned=scanned)
    known = expressible(config)
    for row in MODEL:
        yield _target(row, f"{WEIGHTS}.{row.target}", config, (None,))
    groups: list[tuple[str, tuple[int, ...]]] = []
    prefix = sum(known.hash_routed) if scanned else config.num_hidden_layers
    groups += [(f"layers_{layer}", (layer,)) for layer in range(prefix)]
    if scanned:
        last = config.num_hidden_layers
        groups += [(f"scanned_blocks.layers_{half}", tuple(range(prefix + half, last, 2))) for half in (0, 1)]
    for name, layers in groups:
        kind = known.attention[layers[0]]
        for row in LAYER:
            rule = _RULE[f"layers.{{}}.{row.path or row.when}"]
            if rule.when.holds(config, layers[0]):
                target = row.target.format(compressor=_COMPRESSOR[kind])
                for root in row.roots:
                    yield _target(row, f"{root}.decoder.{name}.{target}", config, layers, stacked="scanned" in name)


_RULE: dict[str, Rule] = {rule.path: rule for rule in RULES}


def _target(row: Row, path: str, config: Config, layers: tuple[int | None, ...], *, stacked: bool = False) -> Target:
    known = _sizes(config, layers[0])
    shape = tuple(known[symbol] for symbol in row.shape.split())
    axis = (SCAN_AXIS if row.variable is None else OTHER_SCAN_AXIS) if stacked else None
    if axis is not None:
        shape = (*shape[:axis], len(layers), *shape[axis:])
    if row.path is None:
        paths: tuple[str, ...] = ()
    elif layers[0] is None:
        paths = (row.path,)
    else:
        paths = tuple(f"layers.{layer}.{row.path}" for layer in layers)
    rows = None if row.rows is None else (known[row.rows[0]], known[row.rows[1]])
    return Target(path, shape, row, paths, rows, axis)


def _sizes(config: Config, layer: int | None) -> dict[str, int]:
    """The symbols of the names table, and a few more."""
    known = sizes(config, layer)
    streams = config.hc_mult
    return known | {
        "0": 0,
        "2": 2,
        "2N": 2 * streams,
        "NN": streams * streams,
        "G": config.o_groups,
        "O": config.o_lora_rank,
    }

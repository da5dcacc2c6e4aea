"""MaxText's DeepSeek-V4 layers, one at a time, and what they compute on the way by the names of dsv4's taps.

MaxText's code runs as it is. :func:`watched` wraps the calls of a layer's modules, keeps what they return, and copies
none of their mathematics; :data:`TAPS` says which tap each of them is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from maxtext.kernels.attention import csa_streamindex
from maxtext.layers import embeddings, linears, mhc, moe

#: Beside the calls of all modules: functions and methods whose results are taps.
FUNCTIONS: tuple[tuple[Any, str], ...] = (
    (mhc.ManifoldConstrainedHyperConnections, "mapping"),
    (mhc.ManifoldConstrainedHyperConnections, "res_mapping"),
    (moe.RoutedMoE, "get_topk"),
    (linears, "_compute_dot_general_nnx"),
    (embeddings, "_apply_rotary_pos_emb"),
    (csa_streamindex, "csa_indexer_scores_jax"),
)

_ROTATED, _ROUTING = "._apply_rotary_pos_emb", "mlp.MoeBlock_0"


def _hyper_connection(theirs: str, norm: str, ours: str, branch: str) -> dict[str, str]:
    return {
        f"{theirs}.mapping": f"{ours}.pre",
        f"{theirs}.mapping#2": f"{ours}.post",
        f"{theirs}.res_mapping": f"{ours}.comb",
        f"{norm} of": f"{ours}.collapsed",
        norm: branch,
        theirs: f"{ours}.streams",
    }


def _compressor(theirs: str, ours: str) -> dict[str, str]:
    return {
        f"{theirs}.kv_proj": f"{ours}.wkv",
        f"{theirs}.gate_proj": f"{ours}.wgate",
        f"{theirs}.kv_norm of": f"{ours}.pooled",
        f"{theirs}.kv_norm": f"{ours}.norm",
        f"{theirs}{_ROTATED}": f"{ours}.entries",
    }


#: Names of :func:`watched` -> taps. ``#2`` is the second call, ``of`` the argument instead of the result, ``[1]`` the
#: second of several results. A layer has the rows of its kind of attention.
TAPS: dict[str, str] = {
    **_hyper_connection("mhc_attention", "pre_self_attention_layer_norm", "hc_attn", "attn_norm"),
    "self_attention.wq_a": "attn.wq_a",
    "self_attention.q_norm": "attn.q_norm",
    "self_attention.wq_b": "attn.wq_b",
    "self_attention.q_up_norm": "attn.q",
    f"self_attention{_ROTATED}": "attn.q_rope",
    "self_attention.wkv": "attn.wkv",
    "self_attention.kv_norm": "attn.kv_norm",
    f"self_attention{_ROTATED}#2": "attn.kv_rope",
    **_compressor("self_attention.csa_compressor", "attn.compressor"),
    **_compressor("self_attention.hca_compressor", "attn.compressor"),
    **_compressor("self_attention.csa_compressor.indexer", "attn.indexer.compressor"),
    f"self_attention.csa_compressor.indexer{_ROTATED}#2": "attn.indexer.q_rope",
    "self_attention.csa_compressor.indexer.weights_proj": "attn.indexer.weights_proj",
    "self_attention.csa_compressor.indexer.csa_indexer_scores_jax": "attn.indexer.scores",
    "self_attention.csa_compressor.indexer": "attn.indexer.chosen",
    "self_attention.attention_op": "attn.context",
    f"self_attention{_ROTATED}#3": "attn.context_unrotated",
    "self_attention.o_a_proj": "attn.wo_a",
    "self_attention.o_b_proj": "attn.wo_b",
    # MaxText applies this norm to the streams first, and does not use the result.
    **_hyper_connection("mhc_mlp", "post_self_attention_layer_norm#2", "hc_ffn", "ffn_norm"),
    f"{_ROUTING}.gate._compute_dot_general_nnx": "ffn.gate.logits",
    f"{_ROUTING}.gate": "ffn.gate.scores",
    f"{_ROUTING}.get_topk[1]": "ffn.gate.experts",
    f"{_ROUTING}.get_topk": "ffn.gate.weights",
    _ROUTING: "ffn.experts",
    "mlp.shared_experts": "ffn.shared_experts",
    "mlp": "ffn",
    "token_embedder": "embed",
    "decoder.hc_head": "hc_head",
    "decoder.decoder_norm": "norm",
    "decoder.logits_dense": "logits",
}

#: Where MaxText has another order of axes, or an axis for its one head of keys.
AXES: dict[str, Callable[[Array], Array]] = {
    "attn.wkv": lambda x: x[:, :, 0],
    "attn.kv_norm": lambda x: x[:, :, 0],
    "attn.kv_rope": lambda x: x[:, :, 0],
    "attn.indexer.q_rope": lambda x: x.transpose(0, 2, 1, 3),
}


def activations(model: nnx.Module, layer: int | None, streams: Any, tokens: Any, positions: Any) -> dict[str, Array]:
    """Run one layer of MaxText's model (``scan_layers=False``), or its embedding and head, and keep what they compute.

    Args:
        model: as ``from_pretrained`` gives it.
        layer: its number; None for embedding and head.
        streams: ``[B, S, N, D]``, those that enter the layer or the head.
        tokens: ``[B, S]``.
        positions: ``[B, S]``.

    Returns:
        Arrays by tap name within the layer.
    """

    @nnx.jit
    def run(model: nnx.Module, streams: Array, tokens: Array, positions: Array) -> dict[str, Array]:
        decoder = model.decoder
        module = model if layer is None else getattr(decoder, f"layers_{layer}")
        with watched(module) as seen:
            if layer is None:
                model.token_embedder(tokens, model_mode="train")
                decoder.apply_output_head(model.token_embedder, decoder.hc_head(streams), True, "train")
            else:
                module(streams, jnp.ones_like(tokens), positions, True, "train", decoder_input_tokens=tokens)
        return {name: seen[name] for name in TAPS if name in seen}

    with jax.set_mesh(model.mesh):
        seen = run(model, *map(jnp.asarray, (streams, tokens, positions)))
    found = {TAPS[name]: value for name, value in seen.items()}
    if layer is not None and model.config.first_num_hash_layers > layer:
        del found["ffn.gate.scores"]  # a table chooses
    return {tap: AXES[tap](value) if tap in AXES else value for tap, value in found.items()}


@contextmanager
def watched(module: nnx.Module) -> Iterator[dict[str, Array]]:
    """Keep the results of every call below a module while the context is open.

    The path of a module is its name. A method has its module's path before its name, a function the path of its caller.
    """
    modules = list(nnx.iter_modules(module))
    paths = {id(each): ".".join(map(str, path)) for path, each in modules}
    seen: dict[str, Array] = {}
    calls: Counter[str] = Counter()
    running: list[str] = []  # the modules whose calls have not returned, the innermost last

    def keep(name: str, result: Any, *argument: Any) -> None:
        calls[name] += 1
        name += f"#{calls[name]}" if calls[name] > 1 else ""
        results = result if isinstance(result, tuple) else (result,)
        found = {f"{name}[{index}]" if index else name: value for index, value in enumerate(results)}
        found |= {f"{name} of": value for value in argument}
        seen.update({key: value for key, value in found.items() if isinstance(value, Array)})

    def watch(original: Callable[..., Any], function: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(args[0]))
            if function != "__call__":
                result = original(*args, **kwargs)
                keep(f"{running[-1] if path is None else path}.{function}", result)
            elif path is None:  # a module that is not below this one
                result = original(*args, **kwargs)
            else:
                running.append(path)
                result = original(*args, **kwargs)
                running.pop()
                keep(path, result, *args[1:2])
            return result

        return call

    # The rotary embedding is one module in three places, so its function is watched instead.
    kinds = {type(each) for _, each in modules} - {embeddings.DeepSeekV4RotaryEmbedding}
    owners = [*((kind, "__call__") for kind in kinds), *FUNCTIONS]
    wrapped = [watch(getattr(owner, function), function) for owner, function in owners]
    with ExitStack() as stack:
        for (owner, function), call in zip(owners, wrapped, strict=True):
            stack.enter_context(mock.patch.object(owner, function, call))
        yield seen

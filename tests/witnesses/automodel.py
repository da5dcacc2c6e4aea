"""NeMo Automodel's DeepSeek-V4 on a CPU: a published checkpoint through its own adapter, and its activations by tap.

Taps come from forward hooks on its modules and from two functions that it calls between them; nothing of it is changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.deepseek_v4 import layers as modules
from nemo_automodel.components.models.deepseek_v4.config import DeepseekV4Config
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]

#: Modules of a layer, and the taps that their output is; several where they return a tuple.
OUTPUTS = {
    "attn_hc": ("hc_attn.pre", "hc_attn.post", "hc_attn.comb"),
    "input_layernorm": ("attn_norm",),
    "self_attn.wq_a": ("attn.wq_a",),
    "self_attn.q_norm": ("attn.q_norm",),
    "self_attn.wq_b": ("attn.wq_b",),
    "self_attn.wkv": ("attn.wkv",),
    "self_attn.kv_norm": ("attn.kv_norm",),
    "self_attn.compressor.wkv": ("attn.compressor.wkv",),
    "self_attn.compressor.wgate": ("attn.compressor.wgate",),
    "self_attn.compressor.kv_norm": ("attn.compressor.norm",),
    "self_attn.compressor": ("attn.compressor.entries", "attn.indexer.chosen"),
    "self_attn.compressor.indexer.wkv": ("attn.indexer.compressor.wkv",),
    "self_attn.compressor.indexer.wgate": ("attn.indexer.compressor.wgate",),
    "self_attn.compressor.indexer.kv_norm": ("attn.indexer.compressor.norm",),
    "self_attn.compressor.indexer.weights_proj": ("attn.indexer.weights_proj",),
    "self_attn.wo_a": ("attn.wo_a",),
    "self_attn.wo_b": ("attn.wo_b",),
    "ffn_hc": ("hc_ffn.pre", "hc_ffn.post", "hc_ffn.comb"),
    "post_attention_layernorm": ("ffn_norm",),
    "mlp.gate": ("ffn.gate.weights", "ffn.gate.experts"),
    "mlp.experts": ("ffn.experts",),
    "mlp.shared_experts": ("ffn.shared_experts",),
    "mlp": ("ffn",),
    "": ("hc_ffn.streams",),
}
#: Modules of a layer, and the tap that their input is.
INPUTS = {
    "input_layernorm": "hc_attn.collapsed",
    "self_attn.compressor.kv_norm": "attn.compressor.pooled",
    "self_attn.compressor.indexer.kv_norm": "attn.indexer.compressor.pooled",
    "self_attn.wo_a": "attn.context_unrotated",
    "ffn_hc": "hc_attn.streams",
    "post_attention_layernorm": "hc_ffn.collapsed",
}
#: Modules before and after the layers.
MODEL = {"embed_tokens": "embed", "hc_head": "hc_head", "norm": "norm"}
#: Modules of an mtp stage, besides those of a layer, and the tap that their output is.
STAGE = {part: (part,) for part in ("enorm", "hnorm", "e_proj", "h_proj", "hc_head", "norm")}


class Automodel:
    """The model in float32 and evaluation mode, filled by its own adapter.

    Attributes:
        model: Automodel's ``DeepseekV4ForCausalLM``.
        keys: what ``load_state_dict`` said: missing and unexpected keys.
    """

    def __init__(self, folder: Path, tensors: Tensors | None = None) -> None:
        """From a published checkpoint; ``tensors`` replaces the content of its shards."""
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        del raw["torch_dtype"]
        backend = BackendConfig(attn="eager", linear="torch", experts="torch", dispatcher="torch")
        self.model = DeepseekV4ForCausalLM.from_config(DeepseekV4Config(**raw, dtype="float32"), backend=backend).eval()
        state = self.model.state_dict_adapter.from_hf(dict(published(folder) if tensors is None else tensors))
        self.keys = self.model.load_state_dict(state, strict=False)
        self.config = self.model.config

    def exported(self) -> Tensors:
        """The weights under their published names, by its own adapter."""
        return self.model.state_dict_adapter.to_hf(self.model.state_dict())

    @torch.no_grad()
    def run(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits, and the streams that leave the last layer."""
        tokens = torch.tensor(ids).long()
        hidden, streams = self.model.model(tokens, return_hc_hidden=True)
        return self.model.lm_head(hidden).numpy(), streams.numpy()

    @torch.no_grad()
    def draft(self, streams: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits of the MTP stage, and the ids of the next tokens that it took: those of ``ids``, then 0."""
        tokens = torch.tensor(ids).long()
        window = self.config.sliding_window
        batch, length = ids.shape
        mask = modules.build_causal_padding_mask(
            None, length, torch.float32, torch.device("cpu"), batch, sliding_window=window
        )
        (hidden,) = self.model.mtp(
            hidden_states=torch.tensor(streams),
            input_ids=tokens,
            embed_fn=self.model.model.embed_tokens,
            position_ids=torch.arange(length).expand(batch, length),
            attention_mask=mask,
        )
        following = np.concatenate([ids[:, 1:], np.zeros_like(ids[:, :1])], axis=1)
        return self.model.lm_head(hidden).numpy(), following

    def taps(self, ids: np.ndarray, shape: Callable[[str], tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Activations by full tap name, in the shapes that ``shape`` gives."""
        found: dict[str, torch.Tensor] = {}
        with recording(self.model, found):
            found["logits"] = torch.tensor(self.run(ids)[0])
        return {name: value.numpy().reshape(shape(name)) for name, value in found.items()}

    def stage_taps(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Activations of the MTP stage by full tap name, and the ids of the next tokens that it took."""
        found: dict[str, torch.Tensor] = {}
        streams = self.run(ids)[1]
        with recording(self.model, found):
            logits, following = self.draft(streams, ids)
        found |= {"mtp.0.streams": torch.tensor(streams), "mtp.0.logits": torch.tensor(logits)}
        return {name: value.numpy() for name, value in found.items() if name.startswith("mtp.")}, following


def published(folder: Path) -> Tensors:
    """Every tensor of a checkpoint, as stored."""
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


@contextmanager
def recording(model: torch.nn.Module, found: Tensors) -> Iterator[None]:
    """Puts activations into ``found``, by full tap name, while the model runs."""
    handles = []
    current = ""

    def enter(prefix: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal current
            current = prefix

        return hook

    def keep(name: str, value: torch.Tensor | None) -> None:
        if value is not None:
            found[name] = value.detach()

    def outputs(names: tuple[str, ...]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            values = output if isinstance(output, tuple) else (output,)
            for name, value in zip(names, values, strict=False):
                keep(name, value)

        return hook

    def inputs(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: Any) -> None:
            keep(name, arguments[0])

        return hook

    def scored(q: torch.Tensor, entries: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        scores = index_scores(q, entries, *rest, **options)
        keep(f"{current}attn.indexer.q_rope", q)
        keep(f"{current}attn.indexer.compressor.entries", entries)
        keep(f"{current}attn.indexer.scores", scores)
        return scores

    def attended(module: torch.nn.Module, q: torch.Tensor, kv: torch.Tensor, *rest: Any, **options: Any) -> Any:
        context, shares = attention(module, q, kv, *rest, **options)
        keep(f"{current}attn.q_rope", q.transpose(1, 2))
        keep(f"{current}attn.kv_rope", kv[:, 0, : q.shape[2]])
        keep(f"{current}attn.context", context)
        return context, shares

    index_scores, attention = modules.dsv4_indexer_scores, modules.eager_attention_with_sink
    blocks = {f"layers.{number}.": (layer, INPUTS, OUTPUTS) for number, layer in model.model.layers.items()}
    for number, stage in enumerate(model.mtp.layers):
        blocks[f"mtp.{number}."] = (stage, INPUTS | {"enorm": "embed", "attn_hc": "input"}, OUTPUTS | STAGE)
    for prefix, (layer, before, after) in blocks.items():
        parts = dict(layer.named_modules())
        handles.append(layer.register_forward_pre_hook(enter(prefix)))
        for path, name in before.items():
            if path in parts:
                handles.append(parts[path].register_forward_pre_hook(inputs(prefix + name)))
        for path, names in after.items():
            if path in parts:
                handles.append(parts[path].register_forward_hook(outputs(tuple(prefix + name for name in names))))
    for path, name in MODEL.items():
        handles.append(getattr(model.model, path).register_forward_hook(outputs((name,))))
    with patch.multiple(modules, dsv4_indexer_scores=scored, eager_attention_with_sink=attended):
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

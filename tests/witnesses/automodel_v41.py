"""NeMo Automodel's DeepSeek-V4.1 on a CPU: a published checkpoint through its own adapter, and its activations by tap.

Taps come from forward hooks on its modules. Nothing of it is changed, except that the rounding of what it caches is
switched off, so that it computes in float32 throughout.

``python -m tests.witnesses.automodel_v41`` records what tests/model/test_v41_recorded.py compares with, in an
environment that has it (tests/witnesses/automodel-requirements.txt).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.deepseek_v41 import attention as modules
from nemo_automodel.components.models.deepseek_v41.config import DeepseekV41Config
from nemo_automodel.components.models.deepseek_v41.model import DeepseekV41ForCausalLM
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from dsv4_convert.golden.synthetic import random_v41_architecture, tiny_v41_config, write_checkpoint

from .automodel import Tensors, published

#: Modules of a layer, and the taps that their output is; several where they return a tuple.
OUTPUTS = {
    "attn_hc": ("hc_attn.pre", "hc_attn.post", "hc_attn.comb"),
    "attn_norm": ("attn_norm",),
    "attn.wq_a": ("attn.wq_a",),
    "attn.q_norm": ("attn.q_norm",),
    "attn.wq_b": ("attn.wq_b",),
    "attn.wkv": ("attn.wkv",),
    "attn.kv_norm": ("attn.kv_norm",),
    "attn.compressor": ("attn.compressor.norm",),
    "attn.indexer.wk": ("attn.indexer.wk",),
    "attn.indexer.k_norm": ("attn.indexer.k_norm",),
    "attn.indexer.weights_proj": ("attn.indexer.weights_proj",),
    "attn.wo_a": ("attn.wo_a",),
    "attn.wo_b": ("attn.wo_b",),
    "ffn_hc": ("hc_ffn.pre", "hc_ffn.post", "hc_ffn.comb"),
    "ffn_norm": ("ffn_norm",),
    "ffn": ("ffn",),
    "engram": ("engram.streams",),
    "": ("hc_ffn.streams",),
}
#: Modules of a layer, and the tap that their input is.
INPUTS = {
    "attn_norm": "hc_attn.collapsed",
    "attn.compressor.norm": "attn.compressor.pooled",
    "attn.wo_a": "attn.context_unrotated",
    "ffn_hc": "hc_attn.streams",
    "ffn_norm": "hc_ffn.collapsed",
}
#: Modules before and after the layers.
MODEL = {"embed_tokens": "embed", "norm": "norm"}
#: Configs that are recorded, tokens of their prompts, and the taps that are kept of every layer.
RECORDED: dict[str, dict[str, Any]] = {
    "every kind of layer": tiny_v41_config(index_n_heads=64, sliding_window=6, engram_pad_token_id=10),
    **{f"architecture {seed}": random_v41_architecture(seed) for seed in (0, 9)},
}
TOKENS = 40
KEPT = (
    *("engram.ids", "hc_attn.pre", "attn.compressor.norm", "attn.indexer.k_norm", "attn.indexer.chosen"),
    *("attn.indexer.candidates", "attn.wo_b", "hc_ffn.pre"),
)
DATA = Path(__file__).parents[1] / "data" / "v41" / "automodel.safetensors"


class AutomodelV41:
    """The model in float32 and evaluation mode, filled by its own adapter.

    Attributes:
        keys: what ``load_state_dict`` said: missing and unexpected keys.
    """

    def __init__(self, folder: Path, tensors: Tensors | None = None) -> None:
        """From a published checkpoint; ``tensors`` replaces the content of its shards."""
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        raw |= {"dtype": "float32", "text_config": raw["text_config"] | {"dtype": "float32"}}
        config = DeepseekV41Config(**raw)
        backend = BackendConfig(
            attn="eager", linear="torch", experts="torch", dispatcher="torch", rms_norm="torch_fp32"
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        self.model = DeepseekV41ForCausalLM.from_config(config, backend=backend, tokenizer=tokenizer).eval()
        given = published(folder) if tensors is None else tensors
        backbone = {name: tensor for name, tensor in given.items() if not name.startswith("mtp.")}
        state = self.model.state_dict_adapter.from_hf(backbone)
        self.keys = self.model.load_state_dict(state, strict=False)
        self.block = config.text_config.candidate_block_size

    @torch.no_grad()
    def run(self, ids: np.ndarray) -> np.ndarray:
        """Logits of every token."""
        with patch.object(modules, "quantize_cache", lambda values, **_: values):
            logits: np.ndarray = self.model(torch.tensor(ids).long()).logits.numpy()
        return logits

    def taps(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Activations by full tap name."""
        found: Tensors = {}
        with recording(self.model, found, self.block):
            found["logits"] = torch.tensor(self.run(ids))
        return {name: value.numpy() for name, value in found.items()}


@contextmanager
def recording(model: torch.nn.Module, found: Tensors, block: int) -> Iterator[None]:
    """Puts activations into ``found``, by full tap name, while the model runs."""
    handles = []

    def outputs(names: tuple[str, ...]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            values = output if isinstance(output, tuple) else (output,)
            found.update({name: value.detach() for name, value in zip(names, values, strict=False)})

        return hook

    def inputs(name: str) -> Callable[..., None]:
        return lambda module, arguments: found.update({name: arguments[0].detach()})

    def shared(prefix: str) -> Callable[..., None]:
        """The state that an attention hands on."""

        def hook(module: Any, arguments: Any, output: Any) -> None:
            state = output.state
            if module.compressor is not None:
                found[f"{prefix}attn.compressor.entries"] = state.compressed_kv
                found[f"{prefix}attn.indexer.keys"] = state.index_keys
            if module.indexer is not None:
                found[f"{prefix}attn.indexer.chosen"] = ascending(state.topk_indices)
                if module.indexer.is_candidate_source:
                    found[f"{prefix}attn.indexer.candidates"] = blocks_of(
                        state.candidates, block, module.indexer.candidate_topk_blocks
                    )

        return hook

    def engram(prefix: str) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            found[f"{prefix}engram.ids"] = arguments[1].int()

        return hook

    for number, layer in model.model.layers.items():
        prefix = f"layers.{number}."
        parts = dict(layer.named_modules())
        handles.append(parts["attn"].register_forward_hook(shared(prefix)))
        if parts.get("engram") is not None:
            handles.append(parts["engram"].register_forward_hook(engram(prefix)))
        for path, name in INPUTS.items():
            if path in parts:
                handles.append(parts[path].register_forward_pre_hook(inputs(prefix + name)))
        for path, names in OUTPUTS.items():
            if path in parts:
                handles.append(parts[path].register_forward_hook(outputs(tuple(prefix + name for name in names))))
    for path, name in MODEL.items():
        handles.append(getattr(model.model, path).register_forward_hook(outputs((name,))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ascending(chosen: torch.Tensor) -> torch.Tensor:
    """Choices in ascending order, -1 (none) last."""
    last = torch.iinfo(torch.int64).max
    ordered = torch.where(chosen < 0, last, chosen).sort(dim=-1).values
    return torch.where(ordered == last, -1, ordered).int()


def blocks_of(candidates: torch.Tensor, size: int, most: int) -> torch.Tensor:
    """The blocks of a mask over entries, ascending, -1 last."""
    padded = torch.nn.functional.pad(candidates, (0, -candidates.shape[-1] % size))
    inside = padded.unflatten(-1, (-1, size)).any(dim=-1)
    blocks = torch.where(inside, torch.arange(inside.shape[-1]), -1)
    return ascending(blocks)[..., : min(most, blocks.shape[-1])]


def main() -> None:
    """Record logits and some taps of every config."""
    arrays = {}
    for name, raw in RECORDED.items():
        with TemporaryDirectory() as work:
            write_checkpoint(Path(work) / "hf", raw, seed=0)
            theirs = AutomodelV41(Path(work) / "hf")
        ids = np.random.default_rng(0).integers(0, raw["text_config"]["vocab_size"], (1, TOKENS)).astype(np.int32)
        taps = theirs.taps(ids)
        kept = {tap: value for tap, value in taps.items() if tap == "logits" or tap.split(".", 2)[-1] in KEPT}
        arrays |= {f"{name}/{tap}": np.ascontiguousarray(value) for tap, value in kept.items()}
        arrays[f"{name}/tokens"] = ids
    DATA.parent.mkdir(exist_ok=True)
    save_file(arrays, DATA, metadata={name: json.dumps(raw) for name, raw in RECORDED.items()})


if __name__ == "__main__":
    torch.compiler.set_stance("force_eager")
    main()

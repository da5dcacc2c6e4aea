"""NeMo Automodel's draft stages of DeepSeek-V4.1 on a CPU: a published checkpoint through its own adapter, and taps.

Its model is one for training: it knows the tokens after every anchor, and has no cache. Here its blocks run behind one
anchor, and its heads choose the tokens one after the other. Nothing of it is changed, except that the rounding of keys
is switched off. Its confidence head is left out, which reads normed streams there and streams before the norm in the
release.

``python -m tests.witnesses.automodel_v41_drafts`` records what tests/model/test_dspark_v41.py compares with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.deepseek_v41 import dspark as modules
from nemo_automodel.components.models.deepseek_v41.config import DeepseekV41Config
from safetensors.numpy import save_file

from dsv4_convert.golden.synthetic import write_checkpoint

from ..model.drafting_v41 import CONFIG, LENGTHS, RECORDED, SEED, inputs
from .automodel import Tensors, published
from .automodel_v41 import OUTPUTS

#: Modules of a stage besides those of a layer, and the tap that their output is.
ENDS = {"main_proj": "main_proj", "main_norm": "main_norm", "norm": "norm"}
#: Modules of a layer that stages have not; and the attention's, which also run on the known tokens.
_ELSEWHERE = frozenset({"attn.compressor", "engram", ""})
_TWICE = ("attn.wkv", "attn.kv_norm")


class DrafterV41:
    """The stages in float32 and evaluation mode, filled by their own adapter.

    Attributes:
        keys: what ``load_state_dict`` said: missing and unexpected keys.
    """

    def __init__(self, folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        raw |= {"dtype": "float32", "text_config": raw["text_config"] | {"dtype": "float32"}}
        self._config = DeepseekV41Config(**raw).text_config
        backend = BackendConfig(
            attn="eager", linear="torch", experts="torch", dispatcher="torch", rms_norm="torch_fp32"
        )
        model = modules.DeepseekV41DSparkModel(self._config, backend, num_anchors=1, enable_confidence_head=True)
        self.model = model.eval()
        self.keys = self.model.load_state_dict(self.model.state_dict_adapter.from_hf(published(folder)), strict=False)

    @torch.no_grad()
    def run(self, streams: np.ndarray, following: np.ndarray) -> dict[str, np.ndarray]:
        """Taps of a draft behind all tokens, which ``following`` ``[B, S]`` follow, by full name.

        ``streams`` ``[B, S, L, N, D]``: those of the target layers.
        """
        model, config = self.model, self._config
        found: Tensors = {}
        known, anchor = streams.shape[1], torch.tensor(following[:, -1]).long()
        ids = torch.full((len(anchor), config.dspark_block_size), config.dspark_noise_token_id)
        ids[:, 0] = anchor
        found["mtp.0.embed"] = noise = model.embed_tokens(ids)
        features = torch.tensor(streams).mean(dim=3).flatten(2)
        behind = torch.full((len(anchor), 1), known)
        positions = model.build_position_ids(behind, known)
        mask = model.build_attention_mask(behind, torch.ones_like(behind, dtype=torch.bool), known, noise.dtype)
        handles = [handle for number, stage in enumerate(model.mtp) for handle in _hooks(stage, number, found)]
        with patch.object(modules, "quantize_cache", lambda values, **_: values):
            output = modules.DeepseekV41DSparkBackbone.forward(
                model, noise, features, position_ids=positions, attention_mask=mask
            )
        for handle in handles:
            handle.remove()
        last, logits = f"mtp.{len(model.mtp) - 1}.", model.compute_logits(output.normalized_hidden_states)
        found[f"{last}logits"] = logits
        steps, token = [], anchor
        for at in range(logits.shape[1]):
            bias, row = model.mtp[-1].markov_head(token)
            scores = logits[:, at] + bias
            token = scores.argmax(dim=-1)
            steps.append((row, bias, scores, token[:, None].int()))
        for name, parts in zip(
            ("markov_head.embed", "markov_head", "draft_logits", "tokens"), zip(*steps, strict=True), strict=True
        ):
            found[last + name] = torch.stack(parts, dim=1)
        return {name: np.ascontiguousarray(value.numpy()) for name, value in found.items()}


def _hooks(stage: torch.nn.Module, number: int, found: Tensors) -> list[Any]:
    """Put the results of a stage's modules into ``found``, by full tap name."""
    prefix, parts = f"mtp.{number}.", dict(stage.named_modules())
    seen: set[str] = set()

    def keep(path: str, names: tuple[str, ...]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            own = names
            if path in _TWICE and path not in seen:
                seen.add(path)
                own = (names[0].replace("attn.", "attn.main."),)
            values = output if isinstance(output, tuple) else (output,)
            found.update({prefix + name: value.detach() for name, value in zip(own, values, strict=False)})

        return hook

    outputs = {path: names for path, names in OUTPUTS.items() if path in parts and path not in _ELSEWHERE}
    outputs |= {path: (name,) for path, name in ENDS.items() if path in parts}
    handles = [parts[path].register_forward_hook(keep(path, names)) for path, names in outputs.items()]

    def whole(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        found[f"{prefix}hc_ffn.streams"] = output.streams.detach()

    return [*handles, stage.register_forward_hook(whole)]


def main() -> None:
    """Record the taps of every length."""
    with TemporaryDirectory() as work:
        write_checkpoint(Path(work) / "hf", CONFIG, seed=SEED)
        drafter = DrafterV41(Path(work) / "hf")
    arrays = {f"{known}/{name}": value for known in LENGTHS for name, value in drafter.run(*inputs(known)).items()}
    save_file(arrays, RECORDED, metadata={"nemo-automodel": version("nemo-automodel")})


if __name__ == "__main__":
    torch.compiler.set_stance("force_eager")
    main()

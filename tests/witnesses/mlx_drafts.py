"""mlx-vlm's drafter for the DSpark stages of DeepSeek-V4, on a CPU: a published checkpoint, and activations by tap.

Its modules are replaced by ones that also keep what they return; nothing of it is changed. It drafts after every token,
with one more token in the cache each time, and drops the confidence head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.speculative.drafters.deepseek_v4_dspark import Model, ModelConfig

Array = np.ndarray[Any, Any]

#: Modules of a stage, and the taps that their output is; several where they return a tuple.
STAGE = {
    "main_proj": ("main_proj",),
    "main_norm": ("main_norm",),
    "attn_hc": ("hc_attn.collapsed", "hc_attn.post", "hc_attn.comb"),
    "attn_norm": ("attn_norm",),
    "attn": ("attn.wo_b",),
    "ffn_hc": ("hc_ffn.collapsed", "hc_ffn.post", "hc_ffn.comb"),
    "ffn_norm": ("ffn_norm",),
    "ffn": ("ffn",),
    "hc_head": ("hc_head",),
    "norm": ("norm",),
}
#: Modules of a stage's attention. Keys of known tokens are made before those of the block.
ATTENTION = {"wq_a": "wq_a", "q_norm": "q_norm", "wq_b": "wq_b", "wkv": "wkv", "kv_norm": "kv_norm", "wo_a": "wo_a"}


class _Kept:
    """A module whose results are kept, one after the other."""

    def __init__(self, module: Callable[..., Any], results: list[Any]) -> None:
        self._module, self._results = module, results

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        result = self._module(*arguments, **options)
        self._results.append(result)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Drafter:
    """The drafter in float32, filled with the checkpoint's tensors under their published names.

    Attributes:
        unlike: names that its module has and the checkpoint has not, or the reverse.
    """

    def __init__(self, folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.model = Model(
            ModelConfig(
                text_config=raw,
                n_mtp_layers=3,
                target_layer_ids=raw["dspark_target_layer_ids"],
                mask_token_id=raw["dspark_noise_token_id"],
                markov_rank=raw["dspark_markov_rank"],
                block_size=raw["dspark_block_size"] + 1,
            )
        )
        tensors: dict[str, mx.array] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            tensors |= mx.load(str(shard))
        tensors = {name: tensor.astype(mx.float32) for name, tensor in tensors.items() if "tid2eid" not in name}
        own = self.model.sanitize({name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")})
        self.unlike = own.keys() ^ {name for name, _ in _leaves(self.model.parameters())}
        self.model.load_weights(list(own.items()), strict=True)
        embed, head = tensors["embed.weight"], tensors["head.weight"]
        self.model._input_embed = lambda ids: embed[ids]
        self.model._lm_head_fn = lambda x: x @ head.T
        self._results: dict[tuple[int, str], list[Any]] = {}
        self._keep()

    def _keep(self) -> None:
        def kept(stage: int, name: str, module: Any) -> Any:
            return _Kept(module, self._results.setdefault((stage, name), []))

        for number, stage in enumerate(self.model.stages):
            for name in ATTENTION:
                setattr(stage.attn, name, kept(number, f"attn.{name}", getattr(stage.attn, name)))
            for name in STAGE:
                if hasattr(stage, name):
                    setattr(stage, name, kept(number, name, getattr(stage, name)))
        stages = list(self.model.stages)
        self.model.stages = [kept(number, "", stage) for number, stage in enumerate(stages)]
        markov = self.model.markov_head
        for name in ("markov_w1", "markov_w2"):
            setattr(markov, name, kept(2, name, getattr(markov, name)))
        self.model._lm_head_fn = kept(2, "logits", self.model._lm_head_fn)

    def run(self, features: Array, following: Array) -> dict[str, Array]:
        """Activations of the draft after the last token, by full tap name.

        Args:
            features: ``[B, S, T * D]``, the streams' means of the target layers.
            following: ``[B, S]``, the token that follows each.
        """
        cache = self.model.make_cache()
        tokens: Any = None
        known: dict[str, list[Any]] = {}
        for at in range(features.shape[1]):
            for results in self._results.values():
                results.clear()
            tokens = self.model.draft_block(
                mx.array(following[:, at]),
                mx.array(features[:, at : at + 1]),
                cache,
                self.model.config.block_size,
                lambda logits: mx.argmax(logits, axis=-1).astype(mx.int32),
            )
            for name, value in self._of_known():
                known.setdefault(name, []).append(value)
            mx.eval(tokens, known)
        joined = {name: mx.concatenate(parts, axis=1) for name, parts in known.items()}
        return {name: np.asarray(value) for name, value in (joined | dict(self._of_block(tokens))).items()}

    def _of_known(self) -> Iterator[tuple[str, Any]]:
        """Activations of the known token, of which the cache keeps the last of each stage."""
        for (stage, name), results in self._results.items():
            if name in ("main_proj", "main_norm"):
                yield f"mtp.{stage}.{name}", results[0]
            elif name in ("attn.wkv", "attn.kv_norm"):
                yield f"mtp.{stage}.attn.main.{name.removeprefix('attn.')}", results[0]

    def _of_block(self, tokens: Any) -> Iterator[tuple[str, Any]]:
        for (stage, name), results in self._results.items():
            prefix = f"mtp.{stage}."
            if name in ("main_proj", "main_norm"):
                continue
            if name in STAGE:
                values = results[0] if isinstance(results[0], tuple) else results
                yield from ((prefix + tap, value) for tap, value in zip(STAGE[name], values, strict=True))
            elif name == "":
                yield prefix + "hc_ffn.streams", results[0]
            elif name == "attn.wo_a":  # [B, G, Q, O]
                yield prefix + name, results[0].transpose(0, 2, 1, 3)
            elif name in ("attn.wkv", "attn.kv_norm"):
                yield prefix + name, results[1]
            elif name == "attn.wq_b":
                config = self.model.config.text_config
                yield prefix + name, results[0].reshape(*results[0].shape[:2], config.num_attention_heads, -1)
            elif name.startswith("attn."):
                yield prefix + name, results[0]
        last = "mtp.2."
        base = self._results[2, "logits"][0]
        bias = mx.stack(self._results[2, "markov_w2"], axis=1)
        yield last + "logits", base
        yield last + "markov_head.embed", mx.stack(self._results[2, "markov_w1"], axis=1)
        yield last + "markov_head", bias
        yield last + "draft_logits", base + bias
        yield last + "tokens", tokens[..., None]


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(tree))

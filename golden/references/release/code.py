"""Loading the user's copy of the published ``inference/`` folder, unmodified, with kernels that run on a CPU.

The code is executed because the user named its folder; nothing else ever is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dsv4_convert.errors import BadInput, Dsv4Error, UsageError
from dsv4_convert.golden.references.release import kernels
from dsv4_convert.spec.v4.config import V4Config

_MODEL, _KERNEL = "model.py", "kernel.py"
#: GPU functions that the code imports; it gets the CPU stand-ins of :mod:`kernels` instead.
_KERNELS = ("act_quant", "fp4_act_quant", "fp8_gemm", "fp4_gemm", "sparse_attn", "hc_split_sinkhorn")
_HADAMARD = ("hadamard_transform",)
#: Its classes of draft stages: of multi-token prediction, and since V4-Flash-0731 of DSpark.
MTP, DSPARK = STAGES = ("MTPBlock", "DSparkBlock")
#: SHA-256 of a published file that computes otherwise than today's -> the entry of the manifest, and the difference.
#: Parity gives a "revision" as the reason of a failure. The stand-ins of kernels are never those of the folder.
_REVISIONS = {
    "6380e70f3690227155ae17fa40b99c8e6900623d00925fd8a8ccc9588e02e818": (
        "revision",
        "model.py is the first, of 2026-04-24: it does not clamp the shared expert, which later ones, and dsv4, do",
    ),
    "c4dc859a2208f9182ae00f6267cf8655deba51dcd92dfd14d0e65401658593e4": (
        "kernel revision",
        "kernel.py is the first, of 2026-04-24: on a GPU it leaves keys and compressed entries unrounded, which later "
        "ones, and dsv4, round to FP8; this golden has them rounded",
    ),
}


@dataclasses.dataclass(frozen=True)
class Code:
    """The published model code. ``files``: SHA-256 by name of the files that the folder has."""

    module: ModuleType
    path: Path
    files: Mapping[str, str]

    @property
    def versions(self) -> dict[str, str]:
        """The code's identity in a manifest."""
        known = dict(_REVISIONS[sha256] for sha256 in self.files.values() if sha256 in _REVISIONS)
        return {name: f"sha256:{sha256}" for name, sha256 in self.files.items()} | known

    @contextmanager
    def active(self) -> Iterator[None]:
        """The surroundings that it expects: bfloat16 as the default dtype, and its kernels."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with _modules(), torch.no_grad(), _RootsInFloat32():
                yield
        finally:
            torch.set_default_dtype(before)

    def begin(
        self,
        config: V4Config,
        *,
        batch: int,
        tokens: int,
        expert_dtype: str | None,
        float_scales: bool,
        drafts: bool = False,
    ) -> Any:
        """Its arguments for this architecture; the module is set up for them.

        Args:
            config: the architecture.
            batch, tokens: how much its caches have to hold.
            expert_dtype: ``fp4`` where routed experts are stored so, else None.
            float_scales: whether scales are stored in float32.
            drafts: whether DSpark's stages run too.

        Raises:
            BadInput: the code has no such arguments, so it is of another model.
        """
        yarn = config.yarn
        stages = config.num_mtp_stages
        values = {
            "max_batch_size": batch,
            "max_seq_len": tokens,
            "dtype": "bf16" if config.weight_block_size is None else "fp8",
            "expert_dtype": expert_dtype,
            "scale_dtype": "fp32" if float_scales else "fp8",
            "vocab_size": config.vocab_size,
            "dim": config.hidden_size,
            "moe_inter_dim": config.moe_intermediate_size,
            "n_layers": config.num_hidden_layers,
            "n_hash_layers": sum(config.hash_routed),
            "n_heads": config.num_attention_heads,
            "n_routed_experts": config.n_routed_experts,
            "n_activated_experts": config.num_experts_per_tok,
            "route_scale": config.routed_scaling_factor,
            "swiglu_limit": config.swiglu_limit,
            "q_lora_rank": config.q_lora_rank,
            "head_dim": config.head_dim,
            "rope_head_dim": config.qk_rope_head_dim,
            "norm_eps": config.rms_norm_eps,
            "o_groups": config.o_groups,
            "o_lora_rank": config.o_lora_rank,
            "window_size": config.sliding_window,
            "compress_ratios": tuple(config.ratio(kind) for kind in config.attention) + (0,) * stages,
            "compress_rope_theta": config.compress_rope_theta,
            "original_seq_len": 0 if yarn is None else yarn.original_max_position_embeddings,
            "rope_theta": config.rope_theta,
            "rope_factor": 1 if yarn is None else yarn.factor,
            "beta_fast": 32 if yarn is None else yarn.beta_fast,
            "beta_slow": 1 if yarn is None else yarn.beta_slow,
            "index_n_heads": config.index_n_heads,
            "index_head_dim": config.index_head_dim,
            "index_topk": config.index_topk,
            "hc_mult": config.hc_mult,
            "hc_sinkhorn_iters": config.hc_sinkhorn_iters,
            "hc_eps": config.hc_eps,
        }
        if drafts:
            assert config.dspark is not None
            values |= {f"dspark_{name}": value for name, value in dataclasses.asdict(config.dspark).items()}
            values |= {"n_mtp_layers": stages, "max_seq_len": tokens + config.dspark.block_size, "temperature": 0.0}
        known = {field.name for field in dataclasses.fields(self.module.ModelArgs)}
        if missing := sorted(set(values) - known):
            raise BadInput(f"{self.path}: ModelArgs has no {', '.join(missing)}; expected DeepSeek-V4's inference code")
        args = self.module.ModelArgs(**values)
        # A model without layers sets what the code keeps in global variables, such as the dtype of matrices.
        self.module.Transformer(dataclasses.replace(args, n_layers=0, n_mtp_layers=0))
        return args

    def collapse(self, args: Any) -> Callable[..., Tensor]:
        """``(streams, fn, scale, base)`` to one stream: a method of the head, and since V4-Flash-0731 of a block."""
        module = self.module
        if hasattr(module.ParallelHead, "hc_head"):
            method: Callable[..., Tensor] = module.ParallelHead(1, args.dim, args.norm_eps, args.hc_eps).hc_head
        else:
            method = module.Block(0, args).hc_head
        return method

    def logits(self, normed: Tensor, weight: Tensor) -> Tensor:
        """Logits ``[B, S, words]`` of some rows of the output matrix. The code evaluates the last position it gets."""
        head = self.module.ParallelHead(*weight.shape)
        head.weight = nn.Parameter(weight, requires_grad=False)
        # Since V4-Flash-0731 the head's forward is that method.
        of_last = head.get_logits if hasattr(head, "get_logits") else head
        return torch.stack([of_last(normed[:, at : at + 1]) for at in range(normed.shape[1])], dim=1)


def load(folder: Path, *, stages: bool = False) -> Code:
    """Import ``model.py`` of a folder, or of its ``inference`` folder; with ``stages`` it has to have their blocks.

    Raises:
        UsageError: there is none.
        BadInput: it cannot be imported, or defines another model.
    """
    path = next((place / _MODEL for place in (folder, folder / "inference") if (place / _MODEL).is_file()), None)
    if path is None:
        raise UsageError(
            f"--release-code {folder}: no {_MODEL} there; expected the `inference` folder that every DeepSeek-V4 "
            "repository has beside its weights"
        )
    spec = importlib.util.spec_from_file_location("dsv4_release_code", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _modules({spec.name: module}):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise BadInput(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    parts = (
        "ModelArgs", "Transformer", "Block", "Block.hc_pre", "Block.hc_post", "ParallelHead", "RMSNorm",
        "apply_rotary_emb", *_KERNELS,
    )  # fmt: skip
    missing = [name for name in parts if not _has(module, name)]
    if stages and not any(_has(module, name) for name in STAGES):
        missing.append(" or ".join(STAGES))
    if missing:
        raise BadInput(f"{path}: has no {', '.join(missing)}; expected DeepSeek-V4's inference code")
    files = [path, *(other for other in (path.with_name(_KERNEL),) if other.is_file())]
    return Code(module, path, {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})


def _has(owner: object, path: str) -> bool:
    """Whether ``owner`` has an attribute, or an attribute of one (``Block.hc_pre``)."""
    first, _, rest = path.partition(".")
    return hasattr(owner, first) and (not rest or _has(getattr(owner, first), rest))


@contextmanager
def _modules(besides: Mapping[str, ModuleType] | None = None) -> Iterator[None]:
    """The two modules of kernels, and more, under the names that the code imports."""
    stand_ins = dict(besides or {})
    for name, functions in (("kernel", _KERNELS), ("fast_hadamard_transform", _HADAMARD)):
        stand_in = ModuleType(name)
        for function in functions:
            setattr(stand_in, function, getattr(kernels, function))
        stand_ins[name] = stand_in
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:  # these names only: what else was imported meanwhile stays
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


class _RootsInFloat32(TorchFunctionMode):
    """Reciprocal roots as a GPU computes them: in float32, rounded once. On a CPU, torch takes the last few elements of
    a bfloat16 tensor, those that do not fill a vector register, in bfloat16 throughout."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.rsqrt, Tensor.rsqrt) and args[0].dtype == torch.bfloat16:
            return args[0].float().rsqrt().bfloat16()
        return func(*args, **(kwargs or {}))


def complaint(code: Code, what: str) -> Dsv4Error:
    """The code computes in another way than is known here."""
    return Dsv4Error(
        f"{code.path}: computes DeepSeek-V4 in another way than the recorder knows (it was written for the revisions "
        f"published from April to August 2026): {what}"
    )

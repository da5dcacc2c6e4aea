"""Loading the user's copy of a published ``inference/`` folder, unmodified, with kernels that run on a CPU.

The code is executed because the user named its folder; nothing else ever is. Its image encoder and its kernels for
GPUs are never imported: stand-ins have their names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dsv4_convert.errors import BadInput, Dsv4Error, UsageError
from dsv4_convert.golden.references.release import kernels

_MODEL, _KERNEL = "model.py", "kernel.py"
#: Modules that the code imports beside its own files -> what it takes of them. GPU functions are those of
#: :mod:`kernels`; of images nothing is computed.
_STAND_INS: Mapping[str, tuple[str, ...]] = {
    "kernel": ("act_quant", "fp4_act_quant", "fp8_gemm", "fp4_gemm", "sparse_attn", "hc_split_sinkhorn"),
    "fast_hadamard_transform": ("hadamard_transform",),
    "image_processor": ("IMAGE", "IMAGE_END", "IMAGE_NEW_LINE", "IMAGE_START"),
    "vision": ("Aligner", "ViT"),
}
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
    """The published model code.

    Attributes:
        title: the model that it is taken for.
        module: its ``model.py``.
        path: the file.
        files: SHA-256 by name of the files that the folder has.
    """

    title: str
    module: ModuleType
    path: Path
    files: Mapping[str, str]

    @property
    def versions(self) -> dict[str, str]:
        """The code's identity in a manifest."""
        known = dict(_REVISIONS[sha256] for sha256 in self.files.values() if sha256 in _REVISIONS)
        return {name: f"sha256:{sha256}" for name, sha256 in self.files.items()} | known

    @contextmanager
    def active(
        self, dtype: torch.dtype = torch.bfloat16, functions: Mapping[str, Callable[..., Any]] = kernels.RELEASE
    ) -> Iterator[None]:
        """The surroundings that it expects: the default dtype, and its kernels, which are ``functions``."""
        before = torch.get_default_dtype()
        imported: dict[str, Any] = {name: each for name, each in functions.items() if hasattr(self.module, name)}
        torch.set_default_dtype(dtype)
        try:
            with ExitStack() as stack:
                stack.enter_context(_modules(_stand_ins(functions)))
                stack.enter_context(patch.multiple(self.module, **imported))
                stack.enter_context(torch.no_grad())
                stack.enter_context(_RootsInFloat32())
                yield
        finally:
            torch.set_default_dtype(before)

    def arguments(self, values: Mapping[str, Any]) -> Any:
        """Its ``ModelArgs`` of these values. Raises :class:`BadInput` if it has no such ones, as another model's."""
        known = {field.name for field in dataclasses.fields(self.module.ModelArgs)}
        if missing := sorted(set(values) - known):
            raise BadInput(
                f"{self.path}: ModelArgs has no {', '.join(missing)}; expected the inference code of {self.title}"
            )
        return self.module.ModelArgs(**values)

    def logits(self, normed: Tensor, weight: Tensor, *, at_once: bool = False) -> Tensor:
        """Logits ``[B, S, words]`` of some rows of the output matrix.

        The code evaluates the last position it gets; ``at_once``, as for drafts, all of them.
        """
        head = self.module.ParallelHead(*weight.shape)
        head.weight = nn.Parameter(weight, requires_grad=False)
        if at_once:
            logits: Tensor = head(normed, full_logits=True)
            return logits
        # Since V4-Flash-0731 the head's forward is that method.
        of_last = head.get_logits if hasattr(head, "get_logits") else head
        return torch.stack([of_last(normed[:, at : at + 1]) for at in range(normed.shape[1])], dim=1)


@dataclasses.dataclass(frozen=True)
class Required:
    """The files and names that code of one model has.

    Attributes:
        title: the model.
        names: what its ``model.py`` defines, as far as it is asked for.
        files: what it imports from its own folder.
    """

    title: str
    names: tuple[str, ...]
    files: tuple[str, ...] = ()


def load(folder: Path, required: Required, *, besides: Sequence[str] = ()) -> Code:
    """Import ``model.py`` of a folder, or of its ``inference`` folder. It has to have the names ``besides``, too.

    Raises:
        UsageError: there is none.
        BadInput: it cannot be imported, or lacks what is ``required``, so that it defines another model.
    """
    path = next((place / _MODEL for place in (folder, folder / "inference") if (place / _MODEL).is_file()), None)
    if path is None:
        raise UsageError(
            f"--release-code {folder}: no {_MODEL} there; expected the `inference` folder that every DeepSeek-V4 "
            "repository has beside its weights"
        )
    found = {file: path.with_name(file) for file in required.files}
    with _modules(_stand_ins(kernels.RELEASE)), ExitStack() as stack:
        for file in found.values():
            stack.enter_context(_modules({file.stem: _executed(file, file.stem)}))
        module = _executed(path, "dsv4_release_code")
    names = (*required.names, *besides, *_STAND_INS["kernel"])
    if missing := [name for name in names if not _has(module, name)]:
        raise BadInput(f"{path}: has no {', '.join(missing)}; expected the inference code of {required.title}")
    files = [path, *found.values(), *(file for file in (path.with_name(_KERNEL),) if file.is_file())]
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return Code(required.title, module, path, digests)


def _executed(path: Path, name: str) -> ModuleType:
    """The module of a file, under a name. Raises :class:`BadInput`."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _modules({name: module}):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise BadInput(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _has(owner: object, path: str) -> bool:
    """Whether ``owner`` has an attribute, or an attribute of one (``Block.hc_pre``)."""
    first, _, rest = path.partition(".")
    return hasattr(owner, first) and (not rest or _has(getattr(owner, first), rest))


def _stand_ins(functions: Mapping[str, Callable[..., Any]]) -> dict[str, ModuleType]:
    """The modules that the code does not get from its folder, by name."""
    modules = {name: ModuleType(name) for name in _STAND_INS}
    for name, module in modules.items():
        for attribute in _STAND_INS[name]:
            setattr(module, attribute, functions.get(attribute))
    return modules


@contextmanager
def _modules(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """Modules under the names that the code imports."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
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
        f"{code.path}: computes {code.title} in another way than the recorder knows (it was written for the revisions "
        f"published from April to September 2026): {what}"
    )

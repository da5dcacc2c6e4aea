"""Published weights in modules of DeepSeek's code, as they are stored or decoded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.checkpoint.weights import read_table, read_weight
from dsv4_convert.errors import listed
from dsv4_convert.golden.references.release.code import Code, complaint
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Resolution, Source

Array = np.ndarray[Any, Any]

_FLOAT32 = np.dtype(np.float32)
#: Bytes as torch reads them.
_CODES = {torch.float8_e4m3fn: "F8_E4M3", torch.float4_e2m1fn_x2: "I8", torch.float8_e8m0fnu: "F8_E8M0"}


class CodeWeights:
    """Fills modules of the code from a checkpoint."""

    def __init__(self, code: Code, checkpoint: Checkpoint, config: Config, resolution: Resolution) -> None:
        self._code = code
        self._checkpoint = checkpoint
        self._config = config
        self._sources = {source.weight: source for leaf in resolution.leaves for source in leaf.sources}
        (self._embedding,) = (leaf.sources[0].weight for leaf in resolution.leaves if leaf.path == "embed")

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype | None, *, besides: Iterable[nn.Module]) -> None:
        """Give every parameter of ``module`` its tensor, those of the modules ``besides`` excepted.

        With ``dtype`` all numbers are decoded to it; without, they are what the code asks for.

        Raises:
            Dsv4Error: the code has a parameter that the checkpoint has not.
        """
        left_out = {part for other in besides for part in other.modules()}
        absent = []
        for path, part in module.named_modules():
            if part in left_out:
                continue
            own = prefix + (f"{path}." if path else "")
            for key, parameter in list(part.named_parameters(recurse=False)):
                if own + key not in self._checkpoint.tensors:
                    absent.append(own + key)
                elif key != "scale":
                    setattr(part, key, self._parameter(own + key, parameter.dtype, dtype))
            if isinstance(getattr(part, "scale", None), nn.Parameter) and not absent:
                part.scale = nn.Parameter(self._scale(f"{own}scale"), requires_grad=False)
                part.weight.scale = part.scale
        if absent:
            raise complaint(self._code, f"it has parameters that the checkpoint has not:\n{listed(absent)}")

    def stream(self, expert: nn.Module, prefix: str, dtype: torch.dtype | None) -> None:
        """Fill an expert when it is about to run, and drop its weights when it has run."""
        empty = dict(expert.named_parameters())

        def fill(module: nn.Module, _: Any) -> None:
            self.fill(module, prefix, dtype, besides=())

        def drop(module: nn.Module, *others: Any) -> None:
            for path, parameter in empty.items():
                owner, _, key = path.rpartition(".")
                setattr(module.get_submodule(owner), key, parameter)

        expert.register_forward_pre_hook(fill)
        expert.register_forward_hook(drop)

    def _parameter(self, name: str, wanted: torch.dtype, dtype: torch.dtype | None) -> nn.Parameter:
        """A tensor as the code holds it: published codes as they are, everything else decoded."""
        info = self._checkpoint.tensors[name]
        if wanted in _CODES:
            if info.dtype != _CODES[wanted]:
                raise complaint(self._code, f"it wants {name} as {_CODES[wanted]}, the checkpoint has {info.dtype}")
            value = self._bytes(name).view(wanted)
        elif not wanted.is_floating_point:
            table = read_table(self._checkpoint, name, self._config.n_routed_experts)
            value = torch.from_numpy(table.astype(np.int64)).to(wanted)
        else:
            value = self.floats(name, dtype or wanted)
        return nn.Parameter(value, requires_grad=False)

    def _scale(self, name: str) -> Tensor:
        """Scales in the dtype that they were published in."""
        if self._checkpoint.tensors[name].dtype == "F32":
            return self.floats(name, torch.float32)
        return self._bytes(name).view(torch.float8_e8m0fnu)

    def _bytes(self, name: str) -> Tensor:
        info = self._checkpoint.tensors[name]
        stored = np.frombuffer(self._checkpoint.read_bytes(name), np.uint8).reshape(info.shape)
        copied = torch.from_numpy(stored.copy())
        self._checkpoint.release(name)
        return copied

    def floats(self, name: str, dtype: torch.dtype, *, rows: slice = slice(None)) -> Tensor:
        """A weight, or rows of it, decoded."""
        source = self._sources.get(name, Source(name))  # scales have none themselves
        value = torch.from_numpy(np.array(read_weight(self._checkpoint, source, dtype=_FLOAT32, rows=rows)))
        self._checkpoint.release(name)
        return value.to(dtype)

    def embedded(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The embeddings of token ids. Only their rows of the table are read."""
        used, places = np.unique(ids.numpy(), return_inverse=True)
        rows = torch.from_numpy(self._checkpoint.read(self._embedding)[used].astype(np.float32)).to(dtype)
        self._checkpoint.release(self._embedding)
        return rows[torch.from_numpy(places.reshape(ids.shape))]

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor."""
        return name in self._checkpoint.tensors

    def rows(self, name: str, rows: Array) -> Tensor:
        """Some rows of a table as they are stored; only their pages are read."""
        picked = np.array(self._checkpoint.read(name)[rows])
        self._checkpoint.release(name)
        kind = {label: dtype for dtype, label in _CODES.items()}.get(self._checkpoint.tensors[name].dtype)
        if kind is None:
            return torch.from_numpy(picked.astype(np.float32)).bfloat16()
        return torch.from_numpy(picked.view(np.uint8)).view(kind)

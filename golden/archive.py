"""A golden on disk: ``manifest.json`` beside one safetensors file per layer and one for the model level.

::

    GOLDEN/
      manifest.json               reference, source, config, tokens, and a digest for every tap (golden.manifest)
      layer-00012.safetensors     the taps of layer 12 under their full names
      model.safetensors           embedding, head, logits

Nothing read from here is trusted: each array's bytes are compared with the manifest's digest when they are read.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_convert.checkpoint.dtypes import DTYPES
from dsv4_convert.checkpoint.header import TensorInfo, read_header
from dsv4_convert.config import Config
from dsv4_convert.errors import BadInput, UsageError, listed
from golden.manifest import MANIFEST_NAME, Manifest, StoredTap
from golden.noise import MODES, Mode, is_noise, noise_name

Array = np.ndarray[Any, Any]

#: Added to the name of a golden while it is being recorded.
PARTIAL_SUFFIX = ".dsv4-partial"
_AGAIN = "take the golden again from where it was recorded, or record it again"


class Golden:
    """An open golden. Made by :func:`open_golden`.

    Attributes:
        path: its folder.
        manifest: everything that ``manifest.json`` says.
        config: the architecture of the recorded model.
        tokens: int32 ``[B, S]``.
        layers: the recorded layers, ascending.
        names: full names of all recorded taps, in order of execution.
    """

    def __init__(self, path: Path, manifest: Manifest, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.manifest = manifest
        self.config: Config = manifest.request.config
        self.tokens = manifest.request.token_array
        self.layers = manifest.request.layers
        arrays = manifest.request.arrays()
        self._layer_of = {name: array.layer for name, array in arrays.items() if not is_noise(name)}
        self.names: tuple[str, ...] = tuple(self._layer_of)
        self._tensors = tensors

    def taps(self, layer: int | None) -> tuple[str, ...]:
        """Full names of the taps of one layer, or of the model level (None), in order of execution.

        Raises:
            UsageError: the layer was not recorded.
        """
        if layer is not None and layer not in self.layers:
            raise UsageError(f"{self.path}: layer {layer} was not recorded; recorded are {list(self.layers)}")
        return tuple(name for name in self.names if self._layer_of[name] == layer)

    def read(self, name: str) -> Array:
        """One tap by its full name: float32, or int32 for a choice. NaN and infinity come as they were recorded.

        Raises:
            UsageError: no such tap was recorded.
            BadInput: the bytes are not those that were recorded.
        """
        if name not in self._layer_of:
            raise UsageError(f"{self.path}: no tap {name}; the golden has {len(self.names)} others, see its manifest")
        return self._stored(self.manifest.aliases.get(name, name))

    def sha256(self, name: str) -> str:
        """Digest of a recorded tap's bytes, as the manifest has it."""
        return self.manifest.taps[self.manifest.aliases.get(name, name)].sha256

    def noise(self, name: str, dtype: str, mode: Mode) -> Array:
        """The noise floor of a tap of real numbers: float32 ``[2, B, S]``, rms and peak per row (:mod:`golden.noise`).

        Raises:
            UsageError: the noise of this dtype was not measured, or the tap is none of real numbers.
            BadInput: the bytes are not those that were recorded.
        """
        measured = self.manifest.request.noise
        if dtype not in measured:
            raise UsageError(
                f"{self.path}: carries no noise floor of {dtype}, only of {list(measured)}; record it with "
                f"`dsv4 golden record --noise {dtype}`"
            )
        stored = noise_name(name)
        if stored not in self.manifest.taps:
            raise UsageError(f"{self.path}: {name} has no noise: it was not recorded, or is a choice")
        return self._stored(stored)[measured.index(dtype), MODES.index(mode)]

    def _stored(self, name: str) -> Array:
        array = read_array(self._tensors[name])
        if digest(array) != self.manifest.taps[name].sha256:
            raise BadInput(
                f"{self._tensors[name].file}: {name}: the bytes are not those that were recorded "
                f"(SHA-256 differs); {_AGAIN}"
            )
        return array

    def verify(self) -> list[str]:
        """Read every stored array; the problems found, none if the golden is what was recorded."""
        problems = []
        for name in self.manifest.taps:
            try:
                self._stored(name)
            except BadInput as error:
                problems.append(str(error))
        return problems


def open_golden(path: Path | str) -> Golden:
    """Open a golden: manifest and headers are read and checked, no array is.

    Raises:
        BadInput: not a golden, unfinished, damaged, of another schema version, or files that differ from the manifest.
    """
    root = Path(path)
    file = root / MANIFEST_NAME
    if not file.is_file():
        partial = root.with_name(root.name + PARTIAL_SUFFIX)
        if partial.is_dir():
            raise BadInput(
                f"{root}: its recording has not finished ({partial}); run the same `dsv4 golden record` again"
            )
        raise BadInput(f"{root}: no {MANIFEST_NAME}; expected a golden as `dsv4 golden record` writes it")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    manifest = Manifest.from_bytes(data, where=str(file))
    names_of: dict[str, list[str]] = defaultdict(list)
    for name, tap in manifest.taps.items():
        names_of[tap.file].append(name)
    tensors: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for file_name, names in names_of.items():
        try:
            found = read_header(root / file_name).tensors
        except BadInput as error:
            problems.append(str(error))
            continue
        problems += differences(root / file_name, {name: manifest.taps[name] for name in names}, found)
        tensors |= found
    if problems:
        raise BadInput(f"{root}: {len(problems)} problem(s); {_AGAIN}:\n{listed(problems)}")
    return Golden(root, manifest, tensors)


def read_array(info: TensorInfo) -> Array:
    """The array of one tensor, copied into memory.

    Raises:
        BadInput: the file cannot be read, or is shorter than it was when its header was read.
    """
    try:
        raw = np.fromfile(info.file, np.uint8, count=info.nbytes, offset=info.start)
    except OSError as error:
        raise BadInput(f"{info.file}: cannot be read ({error.strerror}); check its permissions and the disk") from None
    if len(raw) != info.nbytes:
        raise BadInput(f"{info.file}: {info.name}: {info.nbytes} bytes expected, found {len(raw)}; {_AGAIN}")
    return raw.view(DTYPES[info.dtype].array).reshape(info.shape)


def digest(array: Array) -> str:
    """SHA-256 of an array's bytes in C order, 64 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def differences(file: Path, wanted: Mapping[str, StoredTap], found: Mapping[str, TensorInfo]) -> list[str]:
    """Where a file's header is not what the manifest says of it."""
    problems = [f"{file}: {name}: not in the manifest" for name in found.keys() - wanted.keys()]
    for name, tap in wanted.items():
        info = found.get(name)
        if info is None:
            problems.append(f"{file}: {name}: missing")
        elif (dtype := DTYPES[info.dtype].array.name) != tap.dtype or info.shape != tap.shape:
            problems.append(f"{file}: {name}: expected {tap.dtype} {list(tap.shape)}, found {dtype} {list(info.shape)}")
    return problems

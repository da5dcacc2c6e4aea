"""A golden, in a folder or behind a URL: ``manifest.json`` and a safetensors file per layer and for the model level.

::

    GOLDEN/
      manifest.json               reference, source, config, tokens, and a digest for every array (golden.manifest)
      layer-00012.safetensors     the taps of layer 12 under their full names
      model.safetensors           embedding, head, logits

A compact golden holds sketches and some rows in place of most taps (:mod:`dsv4_convert.golden.compact`).

Nothing read from here is trusted: each array's bytes are compared with the manifest's digest when they are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_convert.checkpoint.dtypes import DTYPES
from dsv4_convert.checkpoint.header import TensorInfo
from dsv4_convert.errors import BadInput, UsageError, listed
from dsv4_convert.files.workspace import stage_of
from dsv4_convert.folders import no_golden
from dsv4_convert.golden.compact import Compact, exact_name, sketch_name
from dsv4_convert.golden.files import AGAIN, Files, LocalFiles, RemoteFiles
from dsv4_convert.golden.layout import exact_rows, expected_taps, tap_shape
from dsv4_convert.golden.manifest import MANIFEST_NAME, GoldenManifest, StoredTap
from dsv4_convert.golden.noise import MODES, Mode, noise_name, row_sizes
from dsv4_convert.golden.rounding import excessive_noise, malformed_noise, unit_of
from dsv4_convert.show.notebook import table
from dsv4_convert.show.units import number_of, ranges, size
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import TapKey

Array = np.ndarray[Any, Any]


class TapForm(StrEnum):
    """The form in which a golden keeps a tap."""

    WHOLE = "whole"
    #: Some rows, exactly.
    ROWS = "rows"
    #: The rms and a random projection of every row.
    SKETCH = "sketch"


@dataclasses.dataclass(frozen=True)
class View:
    """The stored values of a tap in one form: all of it, some of its rows, or a sketch of all rows.

    ``values`` is the golden's part; :meth:`of` brings another array of the tap's shape into the same form. ``rows`` are
    the rows of axis 1 that are kept, None for all.
    """

    values: Array
    rows: tuple[int, ...] | None = None
    sketched: Compact | None = None

    @property
    def form(self) -> TapForm:
        """The form of the values."""
        return TapForm.SKETCH if self.sketched is not None else TapForm.WHOLE if self.rows is None else TapForm.ROWS

    def of(self, whole: Array) -> Array:
        """The same part of ``whole`` ``[B, S, ...]``."""
        if self.sketched is not None:
            return self.sketched.sketch(whole)
        return whole if self.rows is None else whole[:, self.rows]


class Golden:
    """An open golden. Made by :func:`open_golden`.

    Attributes:
        path: its folder, or its URL without secrets.
        manifest: the contents of ``manifest.json``.
        config: the architecture of the recorded model.
        tokens: int32 ``[B, S]``.
        layers: the recorded layers, ascending.
        keys: all recorded taps, in order of execution.
        names: their full names.
        compact: the kept part of each tap; None if every tap is kept whole.
        decode: number of last tokens that were decoded one by one.
        numerics: ``plain``, or ``release`` where activations were quantised on the way.

    Examples:
        >>> golden = open_golden("golden/data/tiny")
        >>> golden.layers
        (0, 1, 2, 3)
        >>> golden.read("layers.0.attn.wq_a").shape  # [B, S, R]
        (1, 300, 16)
    """

    def __init__(self, path: Path | str, files: Files, manifest: GoldenManifest) -> None:
        self.path = path
        self.manifest = manifest
        self.config: Config = manifest.request.config
        self.tokens = manifest.request.token_array
        self.layers = manifest.request.layers
        self.compact = manifest.request.compact
        self.decode = manifest.request.decode
        self.numerics = manifest.request.reference.numerics
        self._keys = {str(key): key for key in expected_taps(self.config, self.layers, decode=self.decode)}
        self.keys: tuple[TapKey, ...] = tuple(self._keys.values())
        self.names: tuple[str, ...] = tuple(self._keys)
        self._files = files
        self._tensors: dict[str, Mapping[str, TensorInfo]] = {}

    def _repr_html_(self) -> str:
        """What it is, for a notebook."""
        request = self.manifest.request
        facts = {
            "reference": " ".join([request.reference.name, *map(" ".join, request.reference.versions.items())]),
            "source": request.source.name,
            "tokens": " x ".join(map(str, self.tokens.shape)),
            "layers": ranges(self.layers),
            "taps": f"{len(self.names):,}, {'whole' if self.compact is None else 'compact'}, {size(self.nbytes)}",
            "noise": ", ".join(request.noise) or "none",
        }
        return table(f"Golden {self.path}", facts.items())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays."""
        return sum(entry.nbytes for entry in self.manifest.taps.values())

    def taps(self, layer: int | None) -> tuple[TapKey, ...]:
        """The taps of one layer, or of the model level (None), in order of execution.

        Raises:
            UsageError: the layer was not recorded.
        """
        if layer is not None and layer not in self.layers:
            raise UsageError(f"{self.path}: layer {layer} was not recorded; recorded are {list(self.layers)}")
        return tuple(key for key in self.keys if key.layer == layer)

    def shape(self, tap: TapKey | str) -> tuple[int, ...]:
        """The full shape of a tap, also in a compact golden. Raises :class:`UsageError`: no such tap was recorded."""
        batch, tokens = self.tokens.shape
        return tap_shape(self._key(tap), self.config, batch=batch, tokens=tokens, decode=self.decode)

    def whole(self, tap: TapKey | str) -> bool:
        """Whether the golden holds all of a tap. Raises :class:`UsageError`: no such tap was recorded."""
        return self._entry(str(self._key(tap))) is not None

    def read(self, tap: TapKey | str) -> Array:
        """One tap, by key or full name: float32, or int32 for a choice. NaN and infinity come as they were recorded.

        Raises:
            UsageError: no such tap was recorded, or the golden is compact and does not hold all of it.
            BadInput: the bytes are not those that were recorded.
            ResourceError: the golden is remote and cannot be reached.
        """
        if not self.whole(tap):
            raise UsageError(f"{self.path}: a compact golden, which holds a sketch of {tap} and not all of it")
        return self._stored(str(tap))

    def views(self, tap: TapKey | str) -> tuple[View, ...]:
        """Everything that is kept of a tap: all of it, or a sketch and some rows. Raises as :meth:`read`."""
        key, name = self._key(tap), str(tap)
        if self.compact is None or self.whole(key):
            return (View(self._stored(name)),)
        views = [View(self._stored(sketch_name(name)), sketched=self.compact)]
        if rows := exact_rows(key, self.config, self.compact, self.shape(key)[1]):
            views.append(View(self._stored(exact_name(name)), rows=rows))
        return tuple(views)

    def sha256(self, tap: TapKey | str) -> tuple[str, ...]:
        """Digests of the bytes that are kept of a tap, as the manifest has them."""
        entries = (self._entry(spell(str(tap))) for spell in (str, sketch_name, exact_name))
        return tuple(entry.sha256 for entry in entries if entry is not None)

    def noise(self, tap: TapKey | str, dtype: str, mode: Mode) -> Array:
        """The noise floor of a tap of real numbers: float32 ``[2, B, S]``, rms and peak per row.

        :mod:`dsv4_convert.golden.noise` says how it is measured.

        Raises:
            UsageError: the noise of this dtype was not measured, or the tap is none of real numbers.
            BadInput: the bytes are not those that were recorded.
            ResourceError: the golden is remote and cannot be reached.
        """
        measured = self.manifest.request.noise
        if dtype not in measured:
            raise UsageError(
                f"{self.path}: carries no noise floor of {dtype}, only of {list(measured)}; record it with "
                f"`dsv4 golden record --noise {dtype}`"
            )
        stored = noise_name(str(tap))
        if stored not in self.manifest.taps:
            raise UsageError(f"{self.path}: {tap} has no noise: it was not recorded, or is a choice")
        return self._stored(stored)[measured.index(dtype), MODES.index(mode)]

    def noise_problem(self, key: TapKey, dtype: str, mode: Mode, noise: Array, sizes: Array) -> str | None:
        """Why rounding does not explain a noise floor ``[2, B, S]``; None if it does. ``sizes``: rms of the rows."""
        elements = math.prod(self.shape(key)[2:])
        unit = unit_of(self.config, key, dtype, mode, self.numerics)
        problem = malformed_noise(noise, elements) or excessive_noise(noise, sizes, elements, unit)
        if problem is None:
            return None
        entry = self._entry(noise_name(str(key)))
        assert entry is not None
        return f"{self.path}/{entry.file}: {key}, {dtype}, {mode}: {problem}; {AGAIN}"

    def malformed_noise(self, layer: int | None) -> list[str]:
        """The noise floors of a layer, or of the model level (None), that are no sizes of a difference.

        Reads the floors and not the taps, so it does not say whether rounding explains them: see :meth:`verify`.
        """
        problems = []
        for key in self.taps(layer):
            name, shape = noise_name(str(key)), self.shape(key)
            if name not in self.manifest.taps or not math.prod(shape):
                continue
            if problem := malformed_noise(self._stored(name), math.prod(shape[2:])):
                problems.append(f"{key}: {problem}")
        return problems

    def everything(self, layer: int | None) -> dict[str, Array]:
        """All taps of one layer, or of the model level (None), by full name, each followed by its noise as stored.

        Raises as :meth:`read`.
        """
        arrays = {}
        for name in map(str, self.taps(layer)):
            arrays[name] = self.read(name)
            if noise_name(name) in self.manifest.taps:
                arrays[noise_name(name)] = self._stored(noise_name(name))
        return arrays

    def verify(self, progress: Callable[[int, int, str], None] = lambda *_: None) -> list[str]:
        """Read every stored array; returns the problems, none if the golden is intact and rounding explains its noise.

        ``progress`` is called after every array with (bytes read, bytes in all, its name).
        """
        problems: dict[str, None] = {}
        done, total = 0, self.nbytes
        for key in self.keys:
            arrays = {}
            for spell in (str, sketch_name, exact_name, noise_name):
                if (entry := self._entry(name := spell(str(key)))) is None:
                    continue
                try:
                    arrays[spell] = self._stored(name)
                except BadInput as error:
                    problems[str(error)] = None
                if name in self.manifest.taps:
                    done += entry.nbytes
                    progress(done, total, name)
            values = arrays.get(str, arrays.get(sketch_name))
            if values is not None and values.size and noise_name in arrays:
                # The first number of a sketched row is its rms.
                sizes = row_sizes(values if str in arrays else values[..., :1])
                problems |= dict.fromkeys(self._noise_problems(key, arrays[noise_name], sizes))
        return list(problems)

    def _noise_problems(self, key: TapKey, noise: Array, sizes: Array) -> Iterator[str]:
        for dtype, of_dtype in zip(self.manifest.request.noise, noise, strict=True):
            for mode, of_mode in zip(MODES, of_dtype, strict=True):
                if problem := self.noise_problem(key, dtype, mode, of_mode, sizes):
                    yield problem

    def check_files(self) -> None:
        """Compare the headers of all files with the manifest. Without this each is checked when it is first needed.

        Raises:
            BadInput: a file is absent or damaged, or holds other arrays than the manifest says; all problems together.
        """
        problems: list[str] = []
        for file in dict.fromkeys(tap.file for tap in self.manifest.taps.values()):
            try:
                self._tensors[file], found = self._header(file)
                problems += found
            except BadInput as error:
                problems.append(str(error))
        self._refuse(problems)

    def _key(self, tap: TapKey | str) -> TapKey:
        key = self._keys.get(str(tap))
        if key is None:
            raise UsageError(f"{self.path}: no tap {tap}; the golden has {len(self.names)} others, see its manifest")
        return key

    def _entry(self, stored: str) -> StoredTap | None:
        """The manifest's entry of an array, under its own name or that of the array that it is the same as."""
        return self.manifest.taps.get(self.manifest.aliases.get(stored, stored))

    def _stored(self, stored: str) -> Array:
        name = self.manifest.aliases.get(stored, stored)
        entry = self.manifest.taps[name]
        array = self._files.array(entry.file, self._infos(entry.file)[name])
        prompt = self.manifest.request.prompt_digest if self.manifest.ties_prompt else b""
        if digest(array, prompt) != entry.sha256:
            raise BadInput(
                f"{self.path}/{entry.file}: {name}: the bytes are not those that were recorded of this prompt "
                f"(SHA-256 differs); {AGAIN}"
            )
        return array

    def _infos(self, file: str) -> Mapping[str, TensorInfo]:
        if file not in self._tensors:
            infos, problems = self._header(file)
            self._refuse(problems)
            self._tensors[file] = infos
        return self._tensors[file]

    def _header(self, file: str) -> tuple[Mapping[str, TensorInfo], list[str]]:
        """The tensors of a file, and where they are not what the manifest says of it."""
        tensors = self._files.header(file).tensors
        wanted = {name: tap for name, tap in self.manifest.taps.items() if tap.file == file}
        return tensors, differences(f"{self.path}/{file}", wanted, tensors)

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise BadInput(f"{self.path}: {number_of(len(problems), 'problem')}; {AGAIN}:\n{listed(problems)}")


def open_golden(path: Path | str) -> Golden:
    """Open a golden: its manifest is read and checked, no array is.

    For a folder, the headers of all files are checked as well. ``path`` may be a URL that fsspec knows (``gs://``,
    ``https://``, ``hf://``): then header and arrays of a layer are fetched, and checked, when they are first needed.

    Raises:
        BadInput: not a golden, unfinished, damaged, of another schema version, or files that differ from the manifest.
        ResourceError: a URL that cannot be reached.
        UsageError: a URL of a kind that is not supported, or whose package is not installed.

    Examples:
        >>> open_golden("golden/data/tiny").tokens.shape
        (1, 300)
    """
    remote = isinstance(path, str) and "://" in path
    files: Files = RemoteFiles(str(path)) if remote else LocalFiles(Path(path))
    where = files.url if isinstance(files, RemoteFiles) else Path(path)
    data = files.content(MANIFEST_NAME)
    if data is None:
        partial = None if remote else stage_of(Path(path))
        if partial is not None and partial.is_dir():
            raise BadInput(
                f"{where}: its recording has not finished ({partial}); run the same `dsv4 golden record` again"
            )
        raise BadInput(no_golden(str(where)))
    golden = Golden(where, files, GoldenManifest.from_bytes(data, where=f"{where}/{MANIFEST_NAME}"))
    if not remote:
        golden.check_files()
    return golden


def digest(array: Array, prompt: bytes) -> str:
    """SHA-256 of the digest of a prompt and of an array's bytes in C order, 64 hex digits."""
    both = hashlib.sha256(prompt)
    both.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return both.hexdigest()


def differences(file: Path | str, wanted: Mapping[str, StoredTap], found: Mapping[str, TensorInfo]) -> list[str]:
    """The differences between a file's header and the manifest."""
    problems = [f"{file}: {name}: not in the manifest" for name in found.keys() - wanted.keys()]
    for name, tap in wanted.items():
        info = found.get(name)
        if info is None:
            problems.append(f"{file}: {name}: missing")
        elif (dtype := DTYPES[info.dtype].array.name) != tap.dtype or info.shape != tap.shape:
            problems.append(f"{file}: {name}: expected {tap.dtype} {list(tap.shape)}, found {dtype} {list(info.shape)}")
    return problems

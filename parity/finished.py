"""The findings of a long run so far, layer by layer, in a folder from which the same run goes on.

::

    DIR.dsv4-lock                    locked while a run uses the folder
    DIR/
      request.json                   the settings of the run, and what it compares
      PROGRAM-00012.safetensors      the findings of a finished step: a JSON text in the header, and their arrays
      PROGRAM-last.safetensors       the number of the last finished step, and what leaves it for the next

A step is the embedding, a layer or the head. It counts once its number is in the last file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dsv4_convert.checkpoint.header import read_header
from dsv4_convert.checkpoint.writer import write_safetensors
from dsv4_convert.errors import BadInput
from dsv4_convert.files.strict_json import parse_object, read_object
from dsv4_convert.files.workspace import Workspace, refuse_other_settings
from dsv4_convert.files.writing import write_atomically
from dsv4_convert.folders import PathLike
from dsv4_convert.golden.files import read_array
from dsv4_convert.parity.detail import DetailPart
from dsv4_convert.parity.logits import LogitsComparison
from dsv4_convert.parity.report.data import ErrorSplit, Localization, TapResult
from dsv4_convert.spec.taps import TapKey

Array = np.ndarray[Any, Any]

_REQUEST = "request.json"
_OWN = re.compile(r"request\.json|(streamed|model)-(\d{5}|last)\.safetensors")
_SPELLING = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
}
#: Names of texts in the files.
_STEP, _FOUND, _DIGEST = "step", "found", "sha256"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """The findings of one step of a run."""

    taps: tuple[TapResult, ...]
    localizations: tuple[Localization, ...]
    error_splits: tuple[ErrorSplit, ...]
    logits: LogitsComparison | None
    detail: DetailPart | None


class FinishedSteps:
    """The finished steps of one run. A context manager; one run at a time uses the folder.

    Examples:
        >>> with FinishedSteps("state") as steps:
        ...     report = run_parity("orbax", "golden/data/tiny", ParityOptions(state=steps))
        ...     steps.clear()
    """

    def __init__(self, folder: PathLike) -> None:
        """``folder``: made if needed, and removed by :meth:`clear`."""
        self._workspace = Workspace(Path(folder), _OWN, in_place=True)
        self._held = ExitStack()

    def __enter__(self) -> Self:
        """Lock the folder. Raises as :class:`~dsv4_convert.files.workspace.Workspace` does."""
        self._held.enter_context(self._workspace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Take up what an earlier run with the same settings has finished. ``settings`` are JSON.

        Raises:
            UsageError: the earlier run had other settings.
            BadInput: the settings are damaged.
            ResourceError: the folder cannot be written to.
        """
        folder, now = self._workspace.stage, json.loads(json.dumps(settings))
        if (folder / _REQUEST).exists():
            then = read_object(folder / _REQUEST)
            refuse_other_settings(folder, "parity run", then=then, now=now, discard="remove that folder")
        else:
            self._workspace.clear()  # of a run that was killed while it removed its own
            write_atomically(folder / _REQUEST, json.dumps(now, sort_keys=True).encode())

    def last(self, program: str) -> tuple[int, dict[str, Array]]:
        """How many steps of a program are finished, and what they left for the next one, by name.

        Raises :class:`BadInput` if the file is damaged.
        """
        file = self._file(program, "last")
        if not file.exists():
            return 0, {}
        header = read_header(file)
        arrays = {name: read_array(info) for name, info in header.tensors.items()}
        _check(file, header.metadata, arrays)
        return int(header.metadata[_STEP]) + 1, arrays

    def read(self, program: str, step: int) -> Findings:
        """The findings of a finished step. Raises :class:`BadInput` if the file is damaged."""
        file = self._file(program, f"{step:05d}")
        header = read_header(file)
        arrays = {name: read_array(info) for name, info in header.tensors.items()}
        _check(file, header.metadata, arrays)
        found = _unpacked(Findings, parse_object(header.metadata[_FOUND].encode(), where=str(file)), arrays)
        assert isinstance(found, Findings)
        return found

    def write(self, program: str, step: int, findings: Findings, leaving: Mapping[str, Any]) -> None:
        """Keep the findings of a step, and what the next one starts from. Raises :class:`ResourceError`."""
        arrays: dict[str, Array] = {}
        text = json.dumps(_packed(findings, arrays))
        _write(self._file(program, f"{step:05d}"), arrays, {_FOUND: text})
        left = {name: _stored(value) for name, value in leaving.items()}
        _write(self._file(program, "last"), left, {_STEP: str(step)})

    def clear(self) -> None:
        """Remove the folder's content: the report is complete. The folder goes when the block is left."""
        self._workspace.clear()

    def _file(self, program: str, step: str) -> Path:
        return self._workspace.stage / f"{program}-{step}.safetensors"


def _stored(value: Any) -> Array:
    """Numbers of a model in float32, indices as they are."""
    array = np.asarray(value)
    return array if array.dtype.kind == "i" else array.astype(np.float32)


def _write(file: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    entries = [
        (name, _SPELLING[array.dtype], array.shape, np.ascontiguousarray(array)) for name, array in arrays.items()
    ]
    write_safetensors(file, entries, metadata={**metadata, _DIGEST: _digest(metadata, arrays)})


def _digest(metadata: Mapping[str, str], arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()


def _check(file: Path, metadata: Mapping[str, str], arrays: Mapping[str, Array]) -> None:
    content = {key: value for key, value in metadata.items() if key != _DIGEST}
    if metadata.get(_DIGEST) != _digest(content, arrays):
        raise BadInput(f"{file}: changed or damaged; remove {file.parent} to begin again")


def _packed(value: Any, arrays: dict[str, Array]) -> Any:
    """A value as JSON, its arrays in ``arrays`` and their names in their places."""
    if isinstance(value, TapKey):
        return [value.layer, str(value)]
    if isinstance(value, np.ndarray):
        name = f"array-{len(arrays)}"
        arrays[name] = value
        return name
    if dataclasses.is_dataclass(value):
        return {field.name: _packed(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_packed(item, arrays) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _unpacked(kind: Any, value: Any, arrays: Mapping[str, Array]) -> Any:
    """The inverse of :func:`_packed` for a value of the annotated type ``kind``."""
    if value is None:
        return None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (kind,) = (each for each in arguments if each is not type(None))
        return _unpacked(kind, value, arrays)
    if origin is tuple:
        each = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return tuple(_unpacked(kind, item, arrays) for kind, item in zip(each, value, strict=True))
    if origin is np.ndarray:
        return arrays[value]
    if kind is TapKey:
        layer, name = value
        return dataclasses.replace(TapKey.parse(name), layer=layer)
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        hints = typing.get_type_hints(kind)
        return kind(**{name: _unpacked(hints[name], item, arrays) for name, item in value.items()})
    if kind is float or issubclass(kind, Enum):
        return kind(value)
    return value

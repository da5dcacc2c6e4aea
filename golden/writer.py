"""Writing a golden: layer by layer into a folder beside the destination, which appears only when it is complete.

::

    OUT.dsv4-partial/
      request.json              the settings of the recording
      layer-00000.safetensors   finished layers; the digest of every array is in the header's metadata
      model.safetensors         the model level, between the layers and the stages
      state-00000.safetensors   streams that leave the last finished one of these, in every dtype that runs

The same command resumes an interrupted run after its last finished layer. A command with other settings refuses and
names the difference, since a recording may be the work of hours.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.checkpoint.header import read_header
from dsv4_convert.checkpoint.writer import write_safetensors
from dsv4_convert.errors import BadInput, UsageError, listed
from dsv4_convert.files.strict_json import read_object
from dsv4_convert.files.workspace import Workspace, refuse_other_settings
from dsv4_convert.files.writing import write_atomically, writing
from dsv4_convert.golden.archive import Array, Golden, differences, digest, open_golden
from dsv4_convert.golden.files import read_array
from dsv4_convert.golden.layout import expected_aliases, parts
from dsv4_convert.golden.manifest import MANIFEST_NAME, GoldenManifest, RecordingRequest, StoredTap, layer_file

REQUEST_NAME = "request.json"
#: Every name that a recording uses in its folder.
_OWN = re.compile(
    r"request\.json|manifest\.json|model\.safetensors|(layer|state)-\d+\.safetensors|state-model\.safetensors"
)
#: safetensors spelling of the dtypes that are stored.
_SPELLING = {
    np.dtype(np.float32): "F32",
    np.dtype(np.int32): "I32",
    np.dtype(np.float64): "F64",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


class GoldenWriter:
    """The unfinished golden of one request. Made by :func:`golden_writer`.

    Attributes:
        parts: layers, the model level (None) and stages, in the order in which they are written.
        finished: those whose taps are on disk: the first ones of ``parts``.
        complete: whether only :meth:`publish` is left to do, as an earlier run ended within it.
    """

    def __init__(self, workspace: Workspace, request: RecordingRequest) -> None:
        self._workspace = workspace
        self._folder = workspace.stage
        self._request = request
        self._arrays = request.arrays()
        self._aliases = expected_aliases(request.config, request.layers, self._arrays)
        self._taps: dict[str, StoredTap] = {}
        self.parts = parts(request.config, request.layers)
        self.finished: tuple[int | None, ...] = ()
        self.complete = _is_complete(self._folder, request)
        if not self.complete:
            self._take_up()

    @property
    def bytes_written(self) -> int:
        """Bytes of the arrays that are on disk."""
        return sum(self._arrays[name].nbytes for name in (self._arrays if self.complete else self._taps))

    def last_state(self) -> dict[str, Array] | None:
        """The streams that leave the last finished part, by the name they were written under; None if none is."""
        if not self.finished:
            return None
        tensors = read_header(self._state_file(self.finished[-1])).tensors
        return {name: read_array(info) for name, info in tensors.items()}

    def write(self, layer: int | None, taps: Mapping[str, Array], state: Mapping[str, Array] | None = None) -> None:
        """Write all arrays of one of the parts under their stored names.

        They come in their order. ``state`` is what the next one needs, kept until that is finished.

        Raises:
            ValueError: not exactly the taps that the request implies, or one of another dtype or shape.
            ResourceError: the disk is full or the folder cannot be written to.
        """
        wanted = {name: (dtype, shape) for name, (owner, dtype, shape) in self._arrays.items() if owner == layer}
        found = {name: (array.dtype, array.shape) for name, array in taps.items()}
        if found != wanted:
            names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
            raise ValueError(
                "recorded taps are not the expected ones:\n"
                + listed([f"{name}: expected {wanted.get(name)}, recorded {found.get(name)}" for name in names])
            )
        digests = {name: digest(taps[name], self._request.prompt_digest) for name in wanted}
        for name in wanted.keys() & self._aliases.keys():
            if digests.pop(name) != self._taps[self._aliases[name]].sha256:
                raise ValueError(f"{name} is not the same array as {self._aliases[name]}")
        self._write(self._state_file(layer), state or {}, {})
        self._write(self._folder / layer_file(layer), {name: taps[name] for name in digests}, digests)
        self._taps |= self._stored(layer, digests)
        with writing(self._folder):
            for earlier in self.finished[-1:]:
                self._state_file(earlier).unlink(missing_ok=True)
        self.finished += (layer,)

    def _write(self, file: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
        entries = [(name, _SPELLING[array.dtype], array.shape, array) for name, array in arrays.items()]
        write_safetensors(file, entries, metadata=metadata)

    def _state_file(self, layer: int | None) -> Path:
        return self._folder / f"state-{'model' if layer is None else f'{layer:05d}'}.safetensors"

    def publish(self) -> Golden:
        """Write the manifest and let the golden appear at its destination."""
        if not self.complete:
            manifest = GoldenManifest(request=self._request, taps=self._taps, aliases=self._aliases)
            data = manifest.to_bytes()
            file = self._folder / MANIFEST_NAME
            GoldenManifest.from_bytes(data, where=str(file))  # never publish what cannot be opened
            write_atomically(file, data)
        with writing(self._folder):
            (self._folder / REQUEST_NAME).unlink(missing_ok=True)  # complete from here on
            for part in self.parts:
                self._state_file(part).unlink(missing_ok=True)
        self._workspace.publish()
        return open_golden(self._workspace.destination)

    def _stored(self, layer: int | None, digests: Mapping[str, str]) -> dict[str, StoredTap]:
        """The manifest's entries of one file, in order of execution."""
        return {
            name: StoredTap(file=layer_file(layer), dtype=dtype.name, shape=shape, sha256=digests.get(name, ""))
            for name, (owner, dtype, shape) in self._arrays.items()
            if owner == layer and name not in self._aliases
        }

    def _take_up(self) -> None:
        """Keep the finished parts of an earlier run of the same request, up to the first damaged one."""
        for part in self.parts:
            stored = self._intact(part)
            if stored is None:
                break
            self._taps |= stored
            self.finished += (part,)
        if self.finished and not self._state_file(self.finished[-1]).exists():  # a part before the last was damaged
            self._taps, self.finished = {}, ()

    def _intact(self, layer: int | None) -> dict[str, StoredTap] | None:
        """The entries of a part that an earlier run stored; None unless it is complete and intact."""
        try:
            file = self._folder / layer_file(layer)
            header = read_header(file)
            stored = self._stored(layer, header.metadata)
            if differences(file, stored, header.tensors):
                return None
            prompt = self._request.prompt_digest
            if any(digest(read_array(header.tensors[name]), prompt) != tap.sha256 for name, tap in stored.items()):
                return None
        except BadInput:  # absent, or cut off by a crash of the machine
            return None
        return stored


def check_destination(out: Path) -> None:
    """Raise :class:`UsageError` unless ``out`` is absent or an empty folder."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: exists already; choose another destination, or remove it first")


@contextmanager
def golden_writer(out: Path, request: RecordingRequest) -> Iterator[GoldenWriter]:
    """Lock the folder in which the golden of ``request`` grows, taking up what an earlier run of it finished.

    The destination has to be absent or an empty folder.

    Raises:
        UsageError: something else is at the destination, or what another command began is in the folder, or an earlier
            run recorded with other settings.
        BadInput: what an earlier run left is damaged.
        ResourceError: another process writes the same destination, or the folder cannot be written to.
    """
    check_destination(out)
    with Workspace(out, _OWN) as workspace:
        check_destination(out)  # again, for a run that finished while the lock was awaited
        stage, now = workspace.stage, json.loads(json.dumps(request.to_json()))
        if (begun := _begun(stage)) is not None:
            refuse_other_settings(stage, "recording", then=begun, now=now, discard="remove that folder")
        else:
            write_atomically(stage / REQUEST_NAME, json.dumps(now, sort_keys=True).encode())
        yield GoldenWriter(workspace, request)


def _begun(stage: Path) -> dict[str, Any] | None:
    """The request of an earlier run; None if there is none.

    Raises:
        BadInput: the stage does not say what was recorded.
    """
    try:
        if (stage / REQUEST_NAME).exists():
            return read_object(stage / REQUEST_NAME)
        if (stage / MANIFEST_NAME).exists():  # all but renamed
            return dict(json.loads(json.dumps(open_golden(stage).manifest.request.to_json())))
    except BadInput as error:
        raise BadInput(f"{error}. Remove {stage} to record again from the beginning.") from None
    if left := sorted(entry.name for entry in stage.iterdir()):
        raise BadInput(
            f"{stage}: no {REQUEST_NAME} says what was recorded here ({left[0]} and others); remove the folder to "
            "record again"
        )
    return None


def _is_complete(folder: Path, request: RecordingRequest) -> bool:
    """Whether all of a golden of this request is in ``folder``, as a run leaves it that ends just before its rename."""
    if (folder / REQUEST_NAME).exists() or not (folder / MANIFEST_NAME).exists():
        return False
    try:
        golden = open_golden(folder)
        return golden.manifest.request == request and not golden.verify()
    except BadInput:
        return False

"""Writing a golden: layer by layer into a folder beside the destination, which appears only when all is there.

::

    OUT.dsv4-partial/           locked while a process writes it
      request.json              what is being recorded; other contents belong to it
      layer-00000.safetensors   finished layers; the digest of every array is in the header's metadata
      state-00000.safetensors   the streams that leave the last finished layer, in every dtype that runs

A run that was cut off goes on after its last finished layer if it is asked for the same again; otherwise what is there
is discarded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np

from dsv4_convert.checkpoint.header import read_header
from dsv4_convert.checkpoint.writer import write_safetensors
from dsv4_convert.errors import BadInput, ResourceError, UsageError, listed
from dsv4_convert.golden.archive import Array, Golden, differences, digest, open_golden
from dsv4_convert.golden.files import read_array
from dsv4_convert.golden.layout import expected_aliases
from dsv4_convert.golden.manifest import MANIFEST_NAME, Manifest, Request, StoredTap, layer_file
from dsv4_convert.unfinished import folder_of, held

REQUEST_NAME = "request.json"
#: Every name that a recording uses in its folder.
_OWN = re.compile(r"request\.json|manifest\.json|model\.safetensors|(layer|state)-\d+\.safetensors")
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
        finished: the layers whose taps are on disk: the first ones of ``request.layers``.
        complete: whether only :meth:`publish` is left to do, as an earlier run ended within it.
    """

    def __init__(self, folder: Path, out: Path, request: Request) -> None:
        self._folder = folder
        self._out = out
        self._request = request
        self._arrays = request.arrays()
        self._aliases = expected_aliases(request.layers, self._arrays)
        self._taps: dict[str, StoredTap] = {}
        self.finished: tuple[int, ...] = ()
        self.complete = _is_complete(folder, request)
        if not self.complete:
            self._take_up()

    @property
    def bytes_written(self) -> int:
        """Bytes of the arrays that are on disk."""
        return sum(self._arrays[name].nbytes for name in (self._arrays if self.complete else self._taps))

    def last_state(self) -> dict[str, Array] | None:
        """The streams that leave the last finished layer, by the name they were written under; None if none is."""
        if not self.finished:
            return None
        tensors = read_header(self._state_file(self.finished[-1])).tensors
        return {name: read_array(info) for name, info in tensors.items()}

    def write(self, layer: int | None, taps: Mapping[str, Array], state: Mapping[str, Array] | None = None) -> None:
        """Write all arrays of one layer, or of the model level (None, last), under their stored names.

        Layers come in the order of the request. ``state`` is what the next layer needs, kept until that is finished.

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
        digests = {name: digest(taps[name]) for name in wanted}
        for name in wanted.keys() & self._aliases.keys():
            if digests.pop(name) != self._taps[self._aliases[name]].sha256:
                raise ValueError(f"{name} is not the same array as {self._aliases[name]}")
        if layer is not None:
            self._write(self._state_file(layer), state or {}, {})
        self._write(self._folder / layer_file(layer), {name: taps[name] for name in digests}, digests)
        self._taps |= self._stored(layer, digests)
        if layer is not None:
            try:
                for earlier in self.finished[-1:]:
                    self._state_file(earlier).unlink(missing_ok=True)
            except OSError as error:
                raise _cannot_write(self._folder, error) from error
            self.finished += (layer,)

    def _write(self, file: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
        entries = [(name, _SPELLING[array.dtype], array.shape, array) for name, array in arrays.items()]
        write_safetensors(file, entries, metadata=metadata)

    def _state_file(self, layer: int) -> Path:
        return self._folder / f"state-{layer:05d}.safetensors"

    def publish(self) -> Golden:
        """Write the manifest and let the golden appear at its destination."""
        try:
            if not self.complete:
                manifest = Manifest(request=self._request, taps=self._taps, aliases=self._aliases)
                data = manifest.to_bytes()
                file = self._folder / MANIFEST_NAME
                Manifest.from_bytes(data, where=str(file))  # never publish what cannot be opened
                write_durably(file, data)
                (self._folder / REQUEST_NAME).unlink()  # complete from here on
            for layer in self._request.layers:
                self._state_file(layer).unlink(missing_ok=True)
            _sync(self._folder)
            self._folder.rename(self._out)
            _sync(self._out.parent)
        except OSError as error:
            raise _cannot_write(self._out, error) from error
        return open_golden(self._out)

    def _stored(self, layer: int | None, digests: Mapping[str, str]) -> dict[str, StoredTap]:
        """The manifest's entries of one file, in order of execution."""
        return {
            name: StoredTap(file=layer_file(layer), dtype=dtype.name, shape=shape, sha256=digests.get(name, ""))
            for name, (owner, dtype, shape) in self._arrays.items()
            if owner == layer and name not in self._aliases
        }

    def _take_up(self) -> None:
        """Keep the finished layers of an earlier run of the same request, up to the first that is not intact."""
        for layer in self._request.layers:
            stored = self._intact(layer)
            if stored is None:
                break
            self._taps |= stored
            self.finished += (layer,)
        if self.finished and not self._state_file(self.finished[-1]).exists():  # a layer before the last was damaged
            self._taps, self.finished = {}, ()

    def _intact(self, layer: int) -> dict[str, StoredTap] | None:
        """What an earlier run stored of a layer; None unless all of it is there as it was written."""
        try:
            file = self._folder / layer_file(layer)
            header = read_header(file)
            stored = self._stored(layer, header.metadata)
            if differences(file, stored, header.tensors):
                return None
            if any(digest(read_array(header.tensors[name])) != tap.sha256 for name, tap in stored.items()):
                return None
        except BadInput:  # absent, or cut off by a crash of the machine
            return None
        return stored


def check_destination(out: Path) -> None:
    """Raise :class:`UsageError` unless ``out`` is absent or an empty folder."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: exists already; choose another destination, or remove it first")


@contextmanager
def golden_writer(out: Path, request: Request) -> Iterator[GoldenWriter]:
    """Lock the folder in which the golden of ``request`` grows, taking up what an earlier run of it finished.

    The destination has to be absent or an empty folder.

    Raises:
        UsageError: something else is at the destination, or what another command began is in the folder.
        ResourceError: another process writes the same destination, or the folder cannot be written to.
    """
    out = Path(os.path.abspath(out))
    folder = folder_of(out)
    check_destination(out)
    with held(folder, _OWN):
        check_destination(out)  # again, for a run that finished while the lock was awaited
        text = json.dumps(request.to_json(), sort_keys=True).encode()
        stored = folder / REQUEST_NAME
        try:
            begun = stored.read_bytes() == text if stored.exists() else _is_complete(folder, request)
            if not begun:
                for entry in folder.iterdir():
                    entry.unlink()
                write_durably(stored, text)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        yield GoldenWriter(folder, out, request)


def _is_complete(folder: Path, request: Request) -> bool:
    """Whether all of a golden of this request is in ``folder``, as a run leaves it that ends just before its rename."""
    if (folder / REQUEST_NAME).exists() or not (folder / MANIFEST_NAME).exists():
        return False
    try:
        golden = open_golden(folder)
        return golden.manifest.request == request and not golden.verify()
    except BadInput:
        return False


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk. Raises ``OSError``."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"{path}: cannot write ({error.strerror or error}). Finished layers are kept; make room (or fix the cause) and "
        "run the same command again."
    )

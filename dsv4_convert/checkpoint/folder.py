"""A checkpoint in a local folder: opened by reading headers, read by mapping files.

Opening costs about a second for a hundred thousand tensors; tensor bytes are touched only when they are read. A read is
a view on the mapped file, so its memory is the page cache's, and :meth:`Checkpoint.release` gives it back.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np

from dsv4_convert.checkpoint.dtypes import DTYPES, array_shape
from dsv4_convert.checkpoint.header import Header, TensorInfo, read_header
from dsv4_convert.checkpoint.index import CONFIG_NAME, INDEX_NAME, SHARD_SUFFIX, is_shard_name, read_weight_map
from dsv4_convert.checkpoint.provenance import recorded, snapshot_commit
from dsv4_convert.errors import BadInput, UsageError, listed
from dsv4_convert.files.reading import file_digest, stamp_of, stat_regular
from dsv4_convert.files.strict_json import read_object, shown
from dsv4_convert.folders import is_converted
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.unsupported import refuse_unsupported


class Checkpoint:
    """An open checkpoint. Made by :func:`open_checkpoint`; a context manager; safe to read from several threads.

    Attributes:
        root: the folder.
        config: ``config.json`` as it is, not interpreted.
        tensors: every tensor that can be read, by name.
        absent: names of tensors whose shard was not downloaded (only with ``partial``).
        shards: the safetensors files, sorted by name.
        sizes: their bytes, by name.
        revision: commit of the Hub repository that the files were downloaded from; None if that is not known.
        repository: name of that repository, where the checkpoint was opened by it.
    """

    repository: str | None = None

    def __init__(
        self,
        *,
        root: Path,
        config: Mapping[str, Any],
        headers: Sequence[Header],
        absent: frozenset[str],
        revision: str | None,
    ) -> None:
        self.root = root
        self.config = config
        self.absent = absent
        self.revision = revision
        self.shards: tuple[Path, ...] = tuple(header.file for header in headers)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: info for header in headers for name, info in header.tensors.items()}
        )
        self.sizes: Mapping[str, int] = MappingProxyType({header.file.name: header.size for header in headers})
        self._stamps = {header.file: header.stamp for header in headers if header.stamp is not None}
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = Lock()
        self._closed = False

    def read(self, name: str) -> np.ndarray:
        """One tensor as a read-only array, without a copy (with one only where the file does not align it).

        The dtype is that of :data:`~dsv4_convert.checkpoint.dtypes.DTYPES`: integers stay what they are, packed FP4
        stored as ``I8`` stays ``int8``, and ``F4`` becomes ``uint8`` with half the last axis.

        Raises:
            BadInput: no such tensor, its shard was not downloaded, or the file changed since the checkpoint was opened.
        """
        info = self._info(name)
        shape = array_shape(info.dtype, info.shape)
        raw = np.frombuffer(self._mapped(info.file), np.uint8, count=info.nbytes, offset=info.start)
        array = raw.view(DTYPES[info.dtype].array).reshape(shape)
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return array

    def read_bytes(self, name: str) -> memoryview:
        """The stored bytes of one tensor, read-only, without a copy. Raises as :meth:`read` does."""
        info = self._info(name)
        return memoryview(self._mapped(info.file))[info.start : info.end]

    def read_into(self, name: str, out: np.ndarray, *, start: int = 0) -> None:
        """Fill a C-contiguous array with stored bytes of one tensor from byte ``start`` on.

        Nothing is mapped: the bytes are in memory once, in ``out``.

        Raises:
            BadInput: as :meth:`read`, or the file cannot be read.
        """
        info = self._info(name)
        left = out.reshape(-1).view(np.uint8).data
        if start + len(left) > info.nbytes:
            raise UsageError(f"{name}: {len(left):,} bytes from {start:,} on do not lie inside its {info.nbytes:,}")
        self._arrive(info.file)
        self._check_unchanged(info.file)
        try:
            with info.file.open("rb", buffering=0) as stream:
                stream.seek(info.start + start)
                while left:
                    if not (count := stream.readinto(left)):
                        raise BadInput(f"{info.file}: became shorter while it was read; start again")
                    left = left[count:]
        except OSError as error:
            raise BadInput(f"{info.file}: cannot be read ({error.strerror}); check the disk") from None

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start:stop`` along the first axis, as :meth:`read` gives them; other rows are not touched.

        Raises:
            UsageError: the tensor has no axis, or the range does not lie inside it.
        """
        shape = self._info(name).shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise UsageError(f"{name}: rows {start}:{stop} do not lie inside shape {list(shape)}")
        return self.read(name)[start:stop]

    def release(self, name: str) -> None:
        """Give the memory of a tensor's pages back. Arrays of it stay valid: their pages are read again if used."""
        info = self._info(name)
        mapped = self._maps.get(info.file)
        if mapped is not None and info.nbytes:
            start = info.start - info.start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, start, info.end - start)

    def architecture(self) -> Config:
        """``config.json`` interpreted.

        Raises:
            BadInput: a model that dsv4 does not support, by its config or by the names of its tensors.
        """
        refuse_unsupported(self.config, {*self.tensors, *self.absent}, where=str(self.root))
        return Config.from_hf(self.config, where=str(self.root / CONFIG_NAME))

    @property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of the shards, by name, as far as somebody states them."""
        return {}

    def fetch_small_files(self) -> None:
        """Bring what belongs to the checkpoint beside the shards to the disk; nothing to do in a folder."""

    def prefetch(self) -> None:
        """Bring all files to the disk, the shards in the background; nothing to do in a folder.

        Raises:
            ResourceError: they have no room there, or a file cannot be fetched.
        """

    def changed(self) -> Mapping[str, float | str]:
        """Modification time of each shard, by file name: a shard that was written again has another one."""
        return {file.name: file.stat().st_mtime_ns for file in self.shards}

    def file_sha256(self, file: Path) -> str:
        """SHA-256 of one of the checkpoint's files as 64 hex digits, in bounded memory.

        Raises:
            BadInput: the file cannot be read, or changed since the checkpoint was opened.
        """
        self._arrive(file)
        self._check_unchanged(file)
        digest = file_digest(file)
        self._check_unchanged(file)
        return digest

    def forget(self, file: Path) -> None:
        """Unmap one file, so that it can be deleted."""
        with self._lock:
            mapped = self._maps.pop(file, None)
            if mapped is not None:
                with suppress(BufferError):  # arrays on it live on; the map ends with the last of them
                    mapped.close()

    def close(self) -> None:
        """Unmap the files. An array that is still referenced keeps its own file mapped until it goes away."""
        with self._lock:
            self._closed = True
        for file in list(self._maps):
            self.forget(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is not None:
            return info
        if name in self.absent:
            raise BadInput(f"{self.root}: the shard of {name} was not downloaded; fetch it with `dsv4 download`")
        raise BadInput(f"{self.root}: no tensor {shown(name)}; the checkpoint has {len(self.tensors)} others")

    def _mapped(self, file: Path) -> mmap.mmap:
        """The whole file, mapped read-only on first use.

        The status is compared every time: reading a map past the end of a file that shrank kills the process.
        """
        self._arrive(file)
        self._check_unchanged(file)
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.root}: the checkpoint is closed")
            mapped = self._maps.get(file)
            if mapped is None:
                with file.open("rb") as stream:
                    mapped = self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            return mapped

    def _arrive(self, file: Path) -> None:
        """Return when the file is here: at once, in a folder."""

    def _check_unchanged(self, file: Path) -> None:
        expected = self._stamps.get(file)
        if expected is not None and stamp_of(stat_regular(file)) != expected:
            raise BadInput(f"{file}: changed since the checkpoint was opened; open it again when nobody writes to it")


def open_checkpoint(path: Path | str, *, partial: bool = False) -> Checkpoint:
    """Open a checkpoint folder: ``config.json`` and safetensors files, with an index if there are several.

    With ``partial``, shards that the index names may be missing; their tensors are then ``absent``.

    Raises:
        BadInput: anything missing, ambiguous, contradictory, damaged or unsafe. Problems are listed together.
    """
    root = Path(path)
    _check_folder(root)
    config = read_object(root / CONFIG_NAME)
    found = sorted(entry.name for entry in root.iterdir() if entry.name.endswith(SHARD_SUFFIX))
    weight_map: dict[str, str] | None = None
    if (root / INDEX_NAME).exists() or (root / INDEX_NAME).is_symlink():
        weight_map = read_weight_map(root / INDEX_NAME)
    _check_shards(root, found, weight_map, partial=partial)
    headers = _read_headers(root, found)
    absent = absent_tensors(root, headers, weight_map)
    return Checkpoint(root=root, config=config, headers=headers, absent=absent, revision=_revision(root, found))


def absent_tensors(root: Path, headers: Sequence[Header], weight_map: Mapping[str, str] | None) -> frozenset[str]:
    """The tensors of an index whose shards are not among these. Raises :class:`BadInput` where the two disagree."""
    if weight_map is None:
        return frozenset()
    present = {header.file.name for header in headers}
    _check_index(root, headers, {name: shard for name, shard in weight_map.items() if shard in present})
    return frozenset(name for name, shard in weight_map.items() if shard not in present)


def _check_folder(root: Path) -> None:
    """Say early, and in its own words, when the path is not a checkpoint folder at all."""
    if not root.exists():
        raise BadInput(f"{root}: no such folder; give one that holds {CONFIG_NAME} and the safetensors files")
    if not root.is_dir():
        raise BadInput(f"{root}: a file; give the folder that holds {CONFIG_NAME} and the safetensors files")
    if is_converted(root):
        raise BadInput(
            f"{root}: already converted, and not a published checkpoint; `dsv4 inspect {root}` shows it, and `dsv4 "
            f"convert orbax-to-hf {root} DEST` restores the published form"
        )
    if not (root / CONFIG_NAME).exists() and not (root / CONFIG_NAME).is_symlink():
        if (root / "snapshots").is_dir():
            raise BadInput(f"{root}: a repository in the Hub cache; give one of the folders in {root / 'snapshots'}")
        raise BadInput(f"{root}: no {CONFIG_NAME}; copy it from where the weights came from, of the same revision")


def _check_shards(root: Path, found: Sequence[str], weight_map: Mapping[str, str] | None, *, partial: bool) -> None:
    """The files of the folder are the shards of the index, no more and (unless partial) no less."""
    if not found:
        raise BadInput(f"{root}: no {SHARD_SUFFIX} file; expected a checkpoint in the safetensors format")
    if weight_map is None:
        if len(found) > 1:
            raise BadInput(
                f"{root}: {len(found)} {SHARD_SUFFIX} files but no {INDEX_NAME} that says which belong together; "
                f"download the index too:\n{listed(found)}"
            )
        return
    named = set(weight_map.values())
    missing, extra = sorted(named - set(found)), sorted(set(found) - named)
    if extra:
        raise BadInput(
            f"{root}: {INDEX_NAME} does not name these files, so it is unclear whether they belong to the model; "
            f"move them away, or download the index again:\n{listed([shown(name) for name in extra])}"
        )
    if missing and not partial:
        unfinished = any((root / ".cache" / "huggingface" / "download").glob("*.incomplete"))
        raise BadInput(
            f"{root}: {len(missing)} of {len(named)} shards are missing"
            f"{' (a download was cut off)' if unfinished else ''}; download again, or open only what is there "
            f"(some layers):\n{listed(missing)}"
        )


def _read_headers(root: Path, shards: Sequence[str]) -> list[Header]:
    headers, problems = [], []
    for name in shards:
        try:
            _check_link(root, root / name)
            headers.append(read_header(root / name))
        except BadInput as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise BadInput(problems[0])
    if problems:
        raise BadInput(f"{root}: {len(problems)} of {len(shards)} shards cannot be used\n{listed(problems)}")
    return headers


def _check_link(root: Path, file: Path) -> None:
    """A shard lies in the checkpoint's folder; in a snapshot of the Hub cache it may be a link inside that cache."""
    if not is_shard_name(file.name):
        raise BadInput(f"{root}: {shown(file.name)} is not a name for a shard; rename it to model{SHARD_SUFFIX}")
    if not file.is_symlink():
        return
    stat_regular(file)  # says so if the link is dangling or circular
    # <cache>/models--ORG--NAME/snapshots/<commit>: blobs lie in the repository, or in a store that the cache shares.
    allowed = root.resolve() if snapshot_commit(root) is None else root.resolve().parents[2]
    if not file.resolve().is_relative_to(allowed):
        raise BadInput(f"{file}: a link out of the checkpoint, to {file.resolve()}; put the file itself in its place")


def _check_index(root: Path, headers: Sequence[Header], weight_map: Mapping[str, str]) -> None:
    """Index and headers state the same tensors in the same shards, each exactly once."""
    shard_of: dict[str, str] = {}
    problems = []
    for header in headers:
        for name in header.tensors:
            first = shard_of.setdefault(name, header.file.name)
            if first != header.file.name:
                problems.append(f"{shown(name)}: in several shards: {first}, {header.file.name}")
            elif name not in weight_map:
                problems.append(f"{shown(name)}: in {first}, but not in the index")
    for name, shard in weight_map.items():
        if (found := shard_of.get(name)) != shard:
            problems.append(f"{shown(name)}: the index says {shard}, but it is in {found or 'no shard'}")
    if problems:
        raise BadInput(
            f"{root}: {INDEX_NAME} and the shards contradict each other, as files of different revisions do; "
            f"download all of them again at one revision:\n{listed(problems)}"
        )


def _revision(root: Path, shards: Sequence[str]) -> str | None:
    """The one commit that all files come from, if the Hub client recorded it for each of them."""
    if (commit := snapshot_commit(root)) is not None:
        return commit
    index = [INDEX_NAME] if (root / INDEX_NAME).exists() else []
    files_of: dict[str | None, list[str]] = defaultdict(list)
    for name in (CONFIG_NAME, *index, *shards):
        record = recorded(root, name)
        files_of[record.commit if record else None].append(name)
    unknown = files_of.pop(None, [])
    if len(files_of) > 1:
        commits = [f"{commit}: {', '.join(names[:3])} ({len(names)} files)" for commit, names in files_of.items()]
        raise BadInput(
            f"{root}: files of {len(files_of)} revisions of the repository are mixed; "
            f"download all of them at one revision, into an empty folder:\n{listed(commits)}"
        )
    return next(iter(files_of), None) if not unknown else None

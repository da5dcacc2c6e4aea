"""``dsv4 convert orbax-to-hf``: a converted checkpoint becomes a Hugging Face folder again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv4_convert.checkpoint import TensorEntry, write_index, write_safetensors
from dsv4_convert.convert.emit import Emitted, Emitter
from dsv4_convert.convert.run import COMPANIONS
from dsv4_convert.convert.sources import Sources, read_sources
from dsv4_convert.errors import CheckFailed, UsageError
from dsv4_convert.files.workspace import refuse_other_settings, require_writable
from dsv4_convert.files.writing import write_atomically, writing
from dsv4_convert.folders import PathLike
from dsv4_convert.spec.conversion import Layout, Storage
from dsv4_convert.store import Store, open_store
from dsv4_convert.store.arrays import Array
from dsv4_convert.store.digests import Hasher
from dsv4_convert.store.export_state import EXPORT_STATE, Written, read_export_state, write_export_state
from dsv4_convert.store.folder import Folder
from dsv4_convert.store.layout import raw_bytes

#: Bytes of one shard, where the source's own sharding does not fit.
_SHARD_BYTES = 5_000_000_000

#: Called with (bytes written, bytes in total, name of the shard).
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """The result of an export.

    Attributes:
        tensors: number of tensors written.
        nbytes: bytes written.
        shards: file names, in order.
        left_out: number of source tensors that the converted checkpoint does not hold, by reason.
        identical: number of tensors whose bytes equal the source's, among the compared ones.
        quantized: number of weights that were quantised again.
        changed: number of values that decoding does not reproduce, by weight quantised again.
    """

    tensors: int
    nbytes: int
    shards: tuple[str, ...]
    left_out: Mapping[str, int]
    identical: int
    quantized: int
    changed: Mapping[str, int]


def orbax_to_hf(
    checkpoint: PathLike,
    destination: PathLike,
    *,
    requantize: bool = False,
    restart: bool = False,
    progress: Progress = lambda done, total, shard: None,
) -> ExportSummary:
    """Write a Hugging Face folder; memory holds one chunk of one tensor, or one expert.

    From ``source`` storage, it restores the published tensors byte for byte in their shards and compares each with the
    SHA-256 that the conversion recorded. From bfloat16 or float32, it writes a folder in full precision under the
    published names, or with ``requantize`` the published FP8 and FP4 form.

    Args:
        checkpoint: what :func:`dsv4_convert.convert.hf_to_orbax` made.
        destination: folder to create; an interrupted run leaves it absent, and keeps its finished shards.
        requantize: quantise decoded weights to the form that they were published in.
        restart: discard an interrupted run.
        progress: called after every tensor.

    Raises:
        BadInput: not a converted checkpoint.
        CheckFailed: a stored tensor is not the one that was converted.
        UsageError: the destination exists, or there is nothing to quantise again.
        ResourceError: the disk is full, or another process writes the same destination.

    Examples:
        >>> summary = orbax_to_hf("orbax", "published", requantize=True)
    """
    store = open_store(checkpoint)
    layout = store.conversion.layout
    if layout is not Layout.DSV4:
        raise UsageError(
            f"{checkpoint}: has the layout of {layout}, from which there is no way back; convert the "
            "source again with the default layout"
        )
    sources = read_sources(store)
    emitter = Emitter(store, sources)
    _check_request(store, sources, emitter.storage, requantize=requantize)
    place = Folder(Path(destination).absolute())
    _check_destination(place.target)
    groups = _shards(emitter, sources, requantize=requantize)
    total = sum(tensor.nbytes for group in groups.values() for tensor in group)
    done = 0
    identity = {"manifest": hashlib.sha256(store.manifest.to_bytes()).hexdigest(), "requantize": requantize}
    with place.workspace as workspace:
        _check_destination(place.target)
        if restart:
            workspace.clear()
        state, content = workspace.stage / EXPORT_STATE, workspace.content
        kept = _begin(state, content, identity)
        for shard, group in groups.items():
            if shard not in kept or not (content / shard).is_file():
                checked = [_Checked(tensor, sources) for tensor in group]
                write_safetensors(content / shard, [one.entry() for one in checked], metadata={"format": "pt"})
                identical = sum(one.identical for one in checked)
                kept[shard] = Written(identical, dict(emitter.fidelity.changed))
                emitter.fidelity.changed.clear()
                write_export_state(state, identity, kept)
            done += sum(tensor.nbytes for tensor in group)
            progress(done, total, shard)
        if set(groups) != {"model.safetensors"}:
            weight_map = {tensor.name: shard for shard, group in groups.items() for tensor in group}
            write_index(content, weight_map, total)
        for name, companion in _companions(store, plain=emitter.storage is not Storage.SOURCE and not requantize):
            write_atomically(content / name, companion)
        workspace.publish()
    dropped: dict[str, int] = {}
    for tensor in sources.tensors.values():
        if tensor.dropped is not None:
            dropped[tensor.dropped] = dropped.get(tensor.dropped, 0) + 1
    # A weight whose scale is in another shard is quantised for each of the two, with the same result.
    quantized = {name: count for shard in groups for name, count in kept[shard].quantized.items()}
    return ExportSummary(
        tensors=sum(map(len, groups.values())),
        nbytes=total,
        shards=tuple(groups),
        left_out=dropped,
        identical=sum(kept[shard].identical for shard in groups),
        quantized=len(quantized),
        changed={name: count for name, count in quantized.items() if count},
    )


def _check_destination(target: Path) -> None:
    if os.path.lexists(target):
        raise UsageError(f"{target}: exists already; choose another destination, or remove it first")
    require_writable(target)


def _check_request(store: Store, sources: Sources, storage: Storage, *, requantize: bool) -> None:
    if not requantize:
        return
    if storage is Storage.SOURCE:
        raise UsageError(f"{store.folder}: holds the published bytes already; leave --requantize out")
    if not any(tensor.dtype == "F8_E4M3" for tensor in sources.tensors.values()):
        raise UsageError(f"{store.folder}: its source was not quantised, so there is no form to quantise to")


def _shards(emitter: Emitter, sources: Sources, *, requantize: bool) -> dict[str, list[Emitted]]:
    """The tensors by the shard that they go to: the source's own, or new ones for a copy in full precision."""
    if emitter.storage is Storage.SOURCE or requantize:
        tensors = emitter.quantized() if requantize else emitter.published()
        groups: dict[str, list[Emitted]] = {}
        for tensor in tensors:
            groups.setdefault(sources.tensors[tensor.name].shard, []).append(tensor)
        return groups
    runs: list[list[Emitted]] = [[]]
    for tensor in emitter.plain():
        if runs[-1] and sum(one.nbytes for one in runs[-1]) + tensor.nbytes > _SHARD_BYTES:
            runs.append([])
        runs[-1].append(tensor)
    if len(runs) == 1:
        return {"model.safetensors": runs[0]}
    return {f"model-{number:05}-of-{len(runs):05}.safetensors": run for number, run in enumerate(runs, 1)}


class _Checked:
    """A tensor whose bytes are hashed while they are written, and compared with those of the source."""

    def __init__(self, tensor: Emitted, sources: Sources) -> None:
        self._tensor = tensor
        known = sources.tensors.get(tensor.name)
        self._known = None if known is None else known.digest
        self.identical = False

    def entry(self) -> TensorEntry:
        return TensorEntry(self._tensor.name, self._tensor.dtype, self._tensor.shape, self._chunks)

    def _chunks(self) -> Iterator[Array]:
        hasher = Hasher(self._known)
        for chunk in self._tensor.chunks():
            hasher.update(raw_bytes(chunk))
            yield chunk
        found, expected = hasher.digest(), self._tensor.digest
        if expected is not None and found != expected:
            raise CheckFailed(
                f"{self._tensor.name}: the stored bytes have digest {found}, the tensor that was converted had "
                f"{expected}. `dsv4 verify` says which chunk is damaged; convert the model again."
            )
        self.identical = found == self._known


def _begin(state: Path, folder: Path, identity: Mapping[str, Any]) -> dict[str, Written]:
    """The shards that an interrupted run has finished."""
    if any(state.parent.glob("journal*.jsonl")):
        raise UsageError(f"{state.parent}: an unfinished conversion is here; finish it, or --restart to discard it")
    with writing(folder):
        folder.mkdir(exist_ok=True)
    if not state.exists():
        return {}
    of, shards = read_export_state(state)
    refuse_other_settings(state.parent, "export", then=of, now=identity)
    return shards


def _companions(store: Store, *, plain: bool) -> Iterator[tuple[str, bytes]]:
    """Config and tokenizer as the source had them; a copy in full precision no longer declares a quantisation."""
    for name in COMPANIONS:
        if name not in store.manifest.files:
            continue
        content = store.read_file(name)
        if name == "config.json" and plain:
            config = json.loads(content)
            config = {key: value for key, value in config.items() if key not in _QUANTIZED_KEYS}
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = store.conversion.storage.value
            content = f"{json.dumps(config, indent=2)}\n".encode()
        yield name, content


_QUANTIZED_KEYS: Sequence[str] = ("quantization_config", "expert_dtype")

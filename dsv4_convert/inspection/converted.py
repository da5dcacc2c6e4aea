"""Inspects an Orbax checkpoint of dsv4 by its manifest and file sizes, or an unfinished run by its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsv4_convert.errors import BadInput
from dsv4_convert.files.strict_json import enumerated
from dsv4_convert.files.workspace import destination_of, stage_of
from dsv4_convert.inspection.parts import Census, ModelPart, PartRow, elements, not_run, part_of
from dsv4_convert.inspection.report import Inspection, What
from dsv4_convert.show.units import ranges, size
from dsv4_convert.spec.conversion import Layout, Storage
from dsv4_convert.spec.names import Dialect
from dsv4_convert.store import Store, unaccounted
from dsv4_convert.store.arrays import StoredArray, is_local
from dsv4_convert.store.export_state import read_export_state
from dsv4_convert.store.folder import leaves_of, staged_bytes
from dsv4_convert.store.journal import Journal
from dsv4_convert.store.layout import MANIFEST_FILE
from dsv4_convert.store.tables import repeated_experts


def inspect_converted(store: Store, *, place: str, known_by: str, say: Callable[[str], None]) -> Inspection:
    """A complete checkpoint. Contents are not hashed: that is what ``dsv4 verify`` does.

    Raises:
        BadInput: the manifest is not that of a conversion.
    """
    made, metadata = store.conversion, store.metadata
    facts = {
        "source": str(made.source.get("name")),
        "revision": str(made.source.get("revision") or "not recorded"),
        "converted": f"by dsv4 {metadata.get('dsv4_version')}, --dtype {made.storage}, --layout {made.layout}",
        "stored": f"{len(store.paths):,} leaves, complete, of layers {ranges(made.layers)}",
    }
    left_out = [f"{count:,} tensors were left out: {why}" for why, count in made.dropped.items()]
    return Inspection(
        what=What.CONVERTED,
        place=place,
        known_by=known_by,
        facts=facts | _rounded(metadata) | not_run(made.config),
        config=made.config,
        layers=None if len(made.layers) == made.config.num_hidden_layers else made.layers,
        rows=_rows(store, made.dialect),
        odd=(*left_out, *_tables(store), *_disagreeing(store, say)),
    )


def inspect_conversion(folder: Path, *, place: str, known_by: str) -> Inspection:
    """The stage of an interrupted conversion.

    Raises:
        BadInput: the journal is damaged, or not that of a conversion.
    """
    journal = Journal.found(folder)
    plan = journal.plan
    arrays = [StoredArray.open(leaf) for leaf in leaves_of(folder)]
    done, chunks = sum(map(len, journal.chunks.values())), sum(array.layout.chunk_count for array in arrays)
    source = plan.get("fingerprint.source") or {}
    if not isinstance(source, dict):
        raise BadInput(f"{place}: the journal is not that of a conversion; remove it, or convert with --restart")
    try:
        storage = enumerated(plan.get("fingerprint.storage"), Storage, field="storage")
        layout = enumerated(plan.get("fingerprint.layout"), Layout, field="layout")
    except ValueError as error:
        raise BadInput(f"{place}: {known_by}: {error}; remove it, or convert with --restart") from None
    destination = destination_of(folder)
    facts = {
        "source": str(source.get("name")),
        "revision": str(source.get("revision") or "not recorded"),
        "converted": f"--dtype {storage}, --layout {layout}",
        "stored": f"{done:,} of {chunks:,} chunks of {len(arrays):,} leaves, {size(staged_bytes(destination))}",
        "resumable": "yes: the same command goes on; --restart discards this",
    }
    return _unfinished(What.CONVERTING, destination, place, known_by, facts)


def inspect_export(folder: Path, *, place: str, known_by: str) -> Inspection:
    """The stage of an interrupted export to a Hugging Face folder.

    Raises:
        BadInput: its state is damaged.
    """
    of, shards = read_export_state(folder / known_by)
    finished = [folder / "commit" / shard for shard in shards if (folder / "commit" / shard).is_file()]
    destination = destination_of(folder)
    facts = {
        "source": f"the converted checkpoint whose {MANIFEST_FILE} has the SHA-256 {of.get('manifest')}",
        "form": "quantised again" if of.get("requantize") else "as it is stored",
        "stored": f"finished shards: {len(finished):,}, {size(sum(file.stat().st_size for file in finished))}",
        "resumable": "yes: the same command goes on; --restart discards this",
    }
    return _unfinished(What.EXPORTING, destination, place, known_by, facts)


def _unfinished(what: What, destination: Path, place: str, known_by: str, facts: dict[str, str]) -> Inspection:
    """The stage of a run that has not come to its end."""
    odd = f"{destination} is not complete: a run was interrupted, or is under way"
    return Inspection(what=what, place=place, known_by=known_by, facts=facts, odd=(odd,))


def _tables(store: Store) -> list[str]:
    try:
        return repeated_experts(store)
    except BadInput:
        return []  # what is missing or damaged is said by _disagreeing


def _rounded(metadata: Mapping[str, Any]) -> dict[str, str]:
    match metadata.get("rounding"):
        case {"rounded": int(rounded), "values": int(values)} if rounded:
            return {"rounded": f"{rounded:,} of {values:,} converted values"}
    return {}


def _rows(store: Store, dialect: Dialect) -> tuple[PartRow, ...]:
    """Count leaves by their source tensors, since layouts differ in their paths."""
    census, names = Census(), store.conversion.config.names
    for path in store.paths:
        record = store.manifest.leaves[path]
        uses = names.lookup(record.sources[0], dialect) if record.sources else ()
        shape, dtype = record.layout.shape, record.layout.dtype
        if uses:
            rule = uses[0].rule
            number = elements(rule, shape, packed=rule.per_expert and dtype.name == "int8", scale=uses[0].is_scale)
            census.add(part_of(rule), dtype.name, parameters=number, nbytes=record.layout.nbytes)
        else:  # what MaxText's tree has and the source has not: scales of norms that are all ones
            census.add(ModelPart.UNKNOWN, dtype.name, parameters=0, nbytes=record.layout.nbytes)
    return census.rows


def _disagreeing(store: Store, say: Callable[[str], None]) -> list[str]:
    """Files whose size differs from the manifest, missing files, and what the manifest does not account for."""
    if not is_local(store.folder):
        return []
    expected = {*store.paths, *store.manifest.files, MANIFEST_FILE}
    found = {entry.name for entry in store.folder.iterdir()}
    odd = unaccounted(store)
    odd += [f"{name}: in the manifest, but not in the folder" for name in sorted(expected - found)]
    for number, path in enumerate(store.paths):
        if not number % 100:
            say(f"{number:,} of {len(store.paths):,} leaves")
        if path not in found:
            continue
        try:
            missing = store.open_leaf(path).missing_chunks()
        except BadInput as error:
            odd.append(str(error))
            continue
        if missing:
            odd.append(f"{path}: {len(missing)} chunks are missing or of another size, such as {missing[0]}")
    beside = stage_of(store.folder)
    if beside.is_dir():
        odd.append(f"{beside}: an unfinished conversion that is to replace this one")
    return odd

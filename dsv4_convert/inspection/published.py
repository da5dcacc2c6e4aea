"""A Hugging Face checkpoint: a folder, a repository or a prefix of a bucket, by its config and its headers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4_convert.checkpoint import Checkpoint, TensorInfo, open_checkpoint, read_header
from dsv4_convert.checkpoint.header import stored_forms
from dsv4_convert.checkpoint.index import CONFIG_NAME, SHARD_SUFFIX
from dsv4_convert.errors import BadInput
from dsv4_convert.files.strict_json import read_object
from dsv4_convert.inspection.parts import count_published, not_run
from dsv4_convert.inspection.report import Inspection, What
from dsv4_convert.show.units import ranges, size
from dsv4_convert.spec.architectures import BY_MODEL_TYPE
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Resolution, compare
from dsv4_convert.spec.names import layer_of
from dsv4_convert.spec.unsupported import of_family, refuse_unsupported
from dsv4_convert.spec.v4.config import V4Config


def inspect_folder(path: Path, *, place: str, known_by: str) -> Inspection:
    """A local folder. Problems that keep the other commands from opening it are reported; the rest is shown.

    Raises:
        BadInput: ``config.json`` is no JSON object, or no header can be read.
    """
    problems: list[str] = []
    try:
        with open_checkpoint(path, partial=True) as checkpoint:
            return inspect_opened(checkpoint, What.CHECKPOINT, place=place, known_by=known_by)
    except BadInput as error:
        problems.append(str(error))
    config = read_object(path / CONFIG_NAME)
    tensors: dict[str, TensorInfo] = {}
    shards = sorted(file for file in path.iterdir() if file.name.endswith(SHARD_SUFFIX))
    unreadable = 0
    for shard in shards:
        try:
            tensors |= read_header(shard).tensors
        except BadInput:  # one of the problems above
            unreadable += 1
    if not tensors:
        raise BadInput(problems[0])
    facts = {"stored": f"{len(shards)} shards" + (f", {unreadable} of them unreadable" if unreadable else "")}
    return _inspection(
        config, tensors, frozenset(), facts, What.CHECKPOINT, place=place, known_by=known_by, problems=problems
    )


def inspect_opened(checkpoint: Checkpoint, what: What, *, place: str, known_by: str) -> Inspection:
    """An open checkpoint.

    Raises:
        BadInput: its config is of another architecture, or none of its tensors is of DeepSeek-V4.
    """
    facts = {}
    if checkpoint.repository is not None:
        facts["repository"] = checkpoint.repository
    facts["revision"] = checkpoint.revision or "not recorded"
    facts["stored"] = f"{len(checkpoint.shards)} shards, {size(sum(checkpoint.sizes.values()))}"
    return _inspection(
        checkpoint.config,
        checkpoint.tensors,
        checkpoint.absent,
        facts,
        what,
        place=place,
        known_by=known_by,
        problems=[],
    )


def _inspection(
    raw: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    absent: frozenset[str],
    facts: dict[str, str],
    what: What,
    *,
    place: str,
    known_by: str,
    problems: list[str],
) -> Inspection:
    config, odd = None, list(problems)
    try:
        refuse_unsupported(raw, {*tensors, *absent}, where=place)
        config = Config.from_hf(raw, where=CONFIG_NAME)
    except BadInput as error:
        if not of_family(raw):
            raise
        odd.append(str(error))
    names = BY_MODEL_TYPE.get(str(raw.get("model_type")), V4Config).names
    try:
        dialect = names.detect_dialect(tensors)
        facts["names"] = f"{dialect}, {len(tensors):,} tensors"
    except BadInput as error:
        if config is None:
            raise BadInput("\n".join(odd)) from None
        dialect = None
        odd.append(str(error))
    stored = stored_forms(tensors)
    whole = None
    if absent:
        cut = {layer_of(name) for name in absent}
        whole = tuple(layer for layer in range(config.num_hidden_layers if config else 0) if layer not in cut)
        odd.append(
            f"partly downloaded: {len(absent):,} of {len(absent) + len(tensors):,} tensors are in shards that are not "
            f"here; layers that are: {ranges(whole)}"
        )
    if config is not None and dialect is not None and whole != ():
        resolution, uncovered = compare(stored, config, layers=whole, dialect=dialect)
        # Tensors of the model level may be absent too.
        odd += [problem for problem in uncovered if problem.partition(": ")[0] not in absent]
        odd += _without_stages(config, resolution, absent)
    nbytes = {name: info.nbytes for name, info in tensors.items()}
    return Inspection(
        what=what,
        place=place,
        known_by=known_by,
        facts=facts | ({} if config is None else not_run(config)),
        config=config,
        layers=whole,
        rows=count_published(stored, nbytes, names, dialect),
        odd=tuple(odd),
    )


def _without_stages(config: Config, resolution: Resolution, absent: frozenset[str]) -> list[str]:
    """Stages that the config counts and that are not there."""
    if config.num_mtp_stages and not resolution.config.num_mtp_stages and not absent:
        return [f"config.json counts {config.num_mtp_stages} draft stages, and no tensor of one is there"]
    return []

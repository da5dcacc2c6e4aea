"""Destinations that cannot or must not be written, and converted checkpoints that are no longer what was written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_convert.store.folder import Folder

from .case import (
    AGAINST,
    CONVERT,
    EXPORT,
    PARITY,
    PLAN,
    RECORD,
    VERIFY,
    Case,
    Place,
    Step,
    Words,
    accepted,
    as_nobody,
    invoke,
    refused,
)
from .checks import equals_healthy
from .edit import chunk, flip, in_array, manifest_again, rewrite

_LEAF = "layers.0.attn.wq_b"
_MANIFEST = "dsv4_manifest.json"
#: Everything that opens a converted checkpoint.
_OPENERS = (
    VERIFY,
    EXPORT,
    PARITY,
    ("generate", "{orbax}", "--tokens", "1,2"),
)


def _at_dest(make: Callable[[Path], object]) -> Callable[[Place], object]:
    return lambda place: make(place.dest)


def _folder_with_notes(dest: Path) -> None:
    dest.mkdir()
    (dest / "notes.txt").write_text("mine")


def _finished(place: Place) -> None:
    shutil.copytree(place.orbax, place.dest)


def _junk(place: Place) -> None:
    """Leave the files of an interrupted save by Orbax alone."""
    junk = place.root / "dest.orbax-checkpoint-tmp-17"
    junk.mkdir()
    (junk / "_METADATA").write_text("{}")


def _unfinished(*names: str) -> Callable[[Place], None]:
    """Leave the stage of another command that was interrupted."""

    def edit(place: Place) -> None:
        folder = place.root / "dest.dsv4-partial"
        folder.mkdir()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")

    return edit


def _is_there(place: Place) -> None:
    files = [file for file in (place.root / "dest.dsv4-partial").rglob("*") if file.is_file() and file.name != "lock"]
    assert {file.read_bytes() for file in files} == {b"x"}


def _damaged_journal(place: Place) -> None:
    """A run that ended early, and a line in its journal that no run writes."""
    in_array("mtp.0.norm.weight", np.uint16, lambda array: array.fill(0x7FFF))(place)
    assert invoke(place.words(CONVERT)).code == 3
    journal = place.root / "dest.dsv4-partial" / "journal.jsonl"
    first, _, rest = journal.read_bytes().partition(b"\n")
    assert rest
    journal.write_bytes(first + b"\noops\n" + rest)


@contextmanager
def _read_only(place: Place) -> Iterator[None]:
    for path in (place.source, *place.source.iterdir()):
        path.chmod(0o755)
    with as_nobody(place):
        yield


@contextmanager
def _in_empty(place: Place) -> Iterator[None]:
    with chdir(place.root / "empty"):
        yield


@contextmanager
def _held(place: Place) -> Iterator[None]:
    """Another process is writing the same destination."""
    with Folder(place.dest).workspace:
        yield


def _in_orbax(change: Callable[[Path], object]) -> Callable[[Place], object]:
    return lambda place: change(place.orbax)


def _flip_in(file: str) -> Callable[[Path], object]:
    return lambda orbax: flip(orbax / file, 30)


def _zarray(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], None]:
    """Edits the stored description of an array, which is all that Orbax goes by."""

    def edit(place: Place) -> None:
        file = place.orbax / _LEAF / ".zarray"
        document = json.loads(file.read_bytes())
        change(document)
        rewrite(file, json.dumps(document).encode())

    return edit


def _in_sources(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Edits the account of the source tensors and states the digest that belongs to it."""

    def edit(orbax: Path) -> None:
        document = json.loads((orbax / "dsv4_sources.json").read_bytes())
        change(document)
        content = json.dumps(document).encode()
        rewrite(orbax / "dsv4_sources.json", content)
        digest = hashlib.sha256(content).hexdigest()
        manifest_again(orbax, lambda manifest: manifest["files"].update({"dsv4_sources.json": digest}))

    return edit


def _in_metadata(**changes: Any) -> Callable[[Place], object]:
    return _in_orbax(lambda orbax: manifest_again(orbax, lambda document: document["metadata"].update(changes)))


def _interrupted(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], None]:
    """The stage of a conversion whose first line, its settings, was edited."""

    def edit(place: Place) -> None:
        in_array("mtp.0.norm.weight", np.uint16, lambda array: array.fill(0x7FFF))(place)
        assert invoke(place.words(CONVERT)).code == 3
        journal = place.root / "dest.dsv4-partial" / "journal.jsonl"
        first, _, rest = journal.read_bytes().partition(b"\n")
        document = json.loads(first)
        change(document)
        journal.write_bytes(json.dumps(document, sort_keys=True).encode() + b"\n" + rest)

    return edit


def _link_out(place: Place) -> None:
    """The bytes of a chunk somewhere else, and a link to them in its place."""
    file = chunk(place.orbax, _LEAF)
    shutil.copy(file, place.root / "elsewhere")
    file.unlink()
    file.symlink_to(place.root / "elsewhere")


def _to(dest: str) -> Words:
    return ("convert", "hf-to-orbax", "{source}", dest)


def _verifies(name: str) -> tuple[Step, ...]:
    """A destination of that name is written, verified and compared."""
    return (Step(_to(name), 0), Step(("verify", name, "--against", "{source}"), 0))


def _times(seconds: float) -> Callable[[Place], None]:
    """All files of the source are of another time."""

    def edit(place: Place) -> None:
        for file in place.source.iterdir():
            os.utime(file, (seconds, seconds))

    return edit


MAKE: Words = ("golden", "make-checkpoint", "{dest}")
COMPACT: Words = ("golden", "compact", "{golden}", "--out", "{dest}")

OUTPUTS: tuple[Case, ...] = (
    *(
        refused(
            "O01",
            f"a {what} is at the destination",
            "{dest}: exists already, and is not a checkpoint that dsv4 converted",
            edit=_at_dest(make),
            code=2,
            by=(CONVERT,),
        )
        for what, make in (
            ("file", lambda dest: dest.write_text("mine")),
            ("folder", _folder_with_notes),
            ("link to nothing", lambda dest: dest.symlink_to("gone")),
        )
    ),
    refused(
        "O01",
        "a folder that no conversion made, with --overwrite",
        "so it is never overwritten. Choose another destination, or remove it",
        edit=_at_dest(_folder_with_notes),
        code=2,
        by=((*CONVERT, "--overwrite"),),
    ),
    refused(
        "O01",
        "a folder is where a golden or an export should go",
        "{dest}: exists already",
        edit=_at_dest(_folder_with_notes),
        code=2,
        by=(RECORD, EXPORT),
    ),
    refused("O02", "a finished conversion is at the destination", "{dest}: exists already", edit=_finished, code=2),
    accepted(
        "O02",
        "a finished conversion, with --overwrite",
        edit=_finished,
        by=((*CONVERT, "--overwrite"),),
        after=equals_healthy,
    ),
    accepted("O03", "left over: an interrupted save of Orbax", edit=_junk, after=equals_healthy),
    *(
        refused(
            "O03",
            f"left over: {what}",
            "{root}/dest.dsv4-partial: holds files that this command did not write",
            name,
            "Choose another destination, finish it with the command that began it, or remove the folder",
            code=2,
            edit=_unfinished(name),
            by=by,
            after=_is_there,
            resumed=True,
        )
        for what, name, by in (
            ("a file of somebody else's", "notes.txt", (CONVERT, EXPORT, MAKE, COMPACT)),
            ("a recording", "layer-00000.safetensors", (MAKE, CONVERT, EXPORT)),
            ("a random checkpoint", "model-00001-of-00002.safetensors", (COMPACT, CONVERT, EXPORT)),
            ("a conversion", "journal.jsonl", (MAKE, COMPACT)),
            ("an export", "export.json", (MAKE, COMPACT)),
        )
    ),
    refused(
        "O03",
        "left over: an export, where a conversion goes",
        "{root}/dest.dsv4-partial: an unfinished export is here",
        "--restart to discard it",
        code=2,
        edit=_unfinished("export.json", "commit/model.safetensors"),
        after=_is_there,
        resumed=True,
    ),
    refused(
        "O03",
        "left over: a journal that is damaged",
        "{root}/dest.dsv4-partial/journal.jsonl: the journal is damaged",
        "Start again with --restart",
        edit=_damaged_journal,
        resumed=True,
    ),
    refused(
        "O05",
        "a folder that may not be written",
        "Permission denied",
        code=4,
        edit=lambda place: place.source,
        during=_read_only,
        by=(("convert", "hf-to-orbax", "source", "dest"), ("convert", "hf-to-orbax", "source", "dest", "--dry-run")),
    ),
    refused(
        "O05",
        "a file system in which nothing can be made",
        "/proc takes no new files",
        "Nothing was written; choose another destination",
        code=4,
        by=(
            ("convert", "hf-to-orbax", "{source}", "/proc/dest"),
            ("convert", "hf-to-orbax", "{source}", "/proc/dest", "--dry-run"),
            ("convert", "orbax-to-hf", "{orbax}", "/proc/dest"),
            ("golden", "compact", "{golden}", "--out", "/proc/dest"),
            ("golden", "make-checkpoint", "/proc/dest"),
        ),
    ),
    refused(
        "O08",
        "another process writes the same destination",
        "{dest}: another process (pid",
        "Wait for it, or end it and run the same command again",
        code=4,
        during=_held,
        resumed=True,
    ),
    refused(
        "O11",
        "less memory than a chunk takes",
        "GiB beside the interpreter, allowed are 0.02 GiB",
        "Raise --max-memory",
        code=4,
        by=((*CONVERT, "--max-memory", "20MB"), (*PLAN, "--max-memory", "20MB")),
    ),
    accepted("O12", "a source from the next century", edit=_times(4_200_000_000), after=equals_healthy),
    accepted("O12", "a source from 1970", edit=_times(0), after=equals_healthy),
    Case(
        id="O13",
        what="a path with spaces, Unicode and 200 characters",
        steps=_verifies("{root}/a b/ünï\u0301 – 日本語/" + "x" * 200),
    ),
    refused(
        "O13", "a name longer than a file system allows", "File name too long", code=4, by=(_to("{root}/" + "x" * 300),)
    ),
    refused(
        "O13",
        "a folder that is called nothing but a dot",
        "no manifest.json",
        edit=lambda place: (place.root / "empty").mkdir(),
        during=_in_empty,
        by=(("golden", "show", "."), ("parity", "--source", "{healthy}", "--golden", ".")),
    ),
    refused(
        "O13",
        "a source with a name longer than a file system allows",
        "File name too long; check the path",
        code=4,
        by=(("convert", "hf-to-orbax", "{root}/" + "x" * 300, "{dest}"), ("verify", "{root}/" + "x" * 300)),
    ),
    Case(
        id="O14",
        what="a flipped bit in stored numbers",
        edit=_in_orbax(lambda orbax: flip(chunk(orbax, _LEAF), 100)),
        steps=(
            Step(VERIFY, 1, ("{orbax}/" + _LEAF, "changed or damaged", "expected", "Convert the model again")),
            Step(AGAINST, 1, (f"{_LEAF}, chunk", "the stored bytes have changed since")),
        ),
    ),
    *(
        refused(
            "O14",
            f"a flipped bit in {file}",
            "{orbax}/" + file,
            "changed or damaged",
            edit=_in_orbax(_flip_in(file)),
            code=1,
            by=(VERIFY,),
        )
        for file in ("_METADATA", "dsv4_sources.json", "config.json")
    ),
    refused(
        "O14",
        "a flipped bit in the description of an array",
        "{orbax}/" + _LEAF,
        edit=_in_orbax(lambda orbax: flip(orbax / _LEAF / ".zarray", 30)),
        code=1,
        by=(VERIFY,),
    ),
    refused(
        "O14",
        "a flipped bit in the manifest",
        "{orbax}/" + _MANIFEST,
        edit=_in_orbax(lambda orbax: flip(orbax / _MANIFEST, 500, 0x01)),
        by=_OPENERS,
    ),
    refused(
        "O14",
        "no manifest",
        "{orbax}: not a checkpoint written by dsv4: no " + _MANIFEST,
        edit=_in_orbax(lambda orbax: (orbax / _MANIFEST).unlink()),
        by=_OPENERS,
    ),
    refused(
        "O14",
        "a manifest of a later version",
        "{orbax}/" + _MANIFEST,
        "schema_version is 99, this version of dsv4 reads 1",
        edit=_in_orbax(lambda orbax: manifest_again(orbax, lambda document: document.update(schema_version=99))),
        by=_OPENERS,
    ),
    refused(
        "O14",
        "a manifest that leads out of its folder",
        "{orbax}/" + _MANIFEST,
        "the manifest is damaged or was edited",
        "'../evil' is not a plain file name",
        edit=_in_orbax(
            lambda orbax: manifest_again(orbax, lambda document: document["files"].update({"../evil": "0" * 64}))
        ),
        by=_OPENERS,
    ),
    refused(
        "O14",
        "a chunk is gone",
        "{orbax}/" + _LEAF,
        edit=_in_orbax(lambda orbax: chunk(orbax, _LEAF).unlink()),
        code=1,
        by=(VERIFY,),
    ),
    refused(
        "O14",
        "a chunk is a byte short",
        "{orbax}/" + _LEAF,
        edit=_in_orbax(lambda orbax: rewrite(chunk(orbax, _LEAF), chunk(orbax, _LEAF).read_bytes()[:-1])),
        code=1,
        by=(VERIFY,),
    ),
    Case(
        id="O15",
        what="an array of another shape, which Orbax restores in silence",
        edit=_zarray(lambda document: document.update(shape=document["shape"][::-1], chunks=document["chunks"][::-1])),
        steps=(
            Step(
                VERIFY,
                1,
                ("{orbax}/" + _LEAF + ": stored as bfloat16 (32, 16)", "but the manifest says bfloat16 (16, 32)"),
            ),
            Step(
                EXPORT,
                3,
                ("{orbax}/" + _LEAF + ": stored as bfloat16 (32, 16)", "but the manifest says bfloat16 (16, 32)"),
            ),
        ),
    ),
    Case(
        id="O15",
        what="an array of another dtype, which Orbax casts in silence",
        edit=_zarray(lambda document: document.update(dtype="<f2")),
        steps=(
            Step(VERIFY, 1, ("{orbax}/" + _LEAF, "but the manifest says bfloat16 (16, 32)")),
            Step(EXPORT, 3, ("{orbax}/" + _LEAF, "but the manifest says bfloat16 (16, 32)")),
        ),
    ),
    *(
        refused(
            "O16",
            f"another {field} than any: {found}",
            "{orbax}/" + f"{_MANIFEST}: {field} is {found!r}, expected one of {allowed}",
            edit=_in_metadata(**{field: found}),
            by=(("inspect", "{orbax}"), AGAINST, *_OPENERS[1:]),
        )
        for field, found, allowed in (
            ("storage", "Source", "bfloat16, float32, source"),
            ("layout", "dsv4 ", "dsv4, maxtext, maxtext-unscanned"),
            ("dialect", "hf", "published, transformers, module"),
        )
    ),
    refused(
        "O16",
        "metadata without the source",
        "{orbax}/" + f"{_MANIFEST}: source is 'None', expected an object",
        edit=_in_metadata(source=None),
        by=(("inspect", "{orbax}"), *_OPENERS[1:]),
    ),
    *(
        Case(
            id="O17",
            what=what,
            edit=edit,
            steps=(
                Step(VERIFY, 0, (f"warning: {says}",)),
                Step((*VERIFY, "--strict"), 1, (says, "Remove what is not part of it")),
                Step(("inspect", "{orbax}"), 0, (f"odd: {says}",)),
            ),
        )
        for what, edit, says in (
            (
                "a leaf that no tensor gave",
                _in_orbax(lambda orbax: shutil.copytree(orbax / _LEAF, orbax / "layers.0.attn.wq_c")),
                "layers.0.attn.wq_c: in the folder, but not in the manifest",
            ),
            (
                "attributes of an array",
                _in_orbax(lambda orbax: (orbax / _LEAF / ".zattrs").write_text("{}")),
                f"{_LEAF}/.zattrs: in the folder, but no chunk",
            ),
            (
                "a chunk too many",
                _in_orbax(lambda orbax: (orbax / _LEAF / "7.7").write_text("")),
                f"{_LEAF}/7.7: in the folder, but no chunk",
            ),
            (
                "an entry of a description that means nothing",
                _zarray(lambda document: document.update(evil=1)),
                f"{_LEAF}/.zarray: entries that mean nothing here: evil",
            ),
            ("a chunk that is a link out of the folder", _link_out, "{orbax}/" + f"{_LEAF}/0.0: a link to"),
            (
                "a hidden file",
                _in_orbax(lambda orbax: (orbax / ".hidden").write_text("")),
                ".hidden: in the folder, but not in the manifest",
            ),
        )
    ),
    refused(
        "O16",
        "a source tensor of a dtype that nobody stores",
        "{orbax}/dsv4_sources.json",
        "'embed.weight': dtype is 'BF17', expected one of BOOL",
        edit=_in_orbax(_in_sources(lambda document: document["tensors"]["embed.weight"].update(dtype="BF17"))),
        by=(AGAINST, EXPORT),
    ),
    refused(
        "O16",
        "an interrupted conversion of a storage that dsv4 does not know",
        "journal.jsonl: storage is 'int4', expected one of bfloat16, float32, source",
        edit=_interrupted(lambda plan: plan.update({"fingerprint.storage": "int4"})),
        by=(("inspect", "{root}/dest.dsv4-partial"),),
        resumed=True,
        slow=True,
    ),
)

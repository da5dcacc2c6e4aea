"""Goldens that are not whole, not those of the model, or that would let a comparison pass that compares nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.checkpoint.safetensors_files import raw_file

from .case import PARITY, RECORD, Case, Place, Step, Words, invoke, refused
from .edit import Array, split

_TAP = "layers.0.attn.wq_a"
#: The file of the golden that holds it, as a message names it.
_FILE_0 = "{golden}/layer-00000.safetensors"
_ON_0: Words = (*PARITY, "--layer", "0")
_LOOKED_AT: tuple[Words, ...] = (("golden", "show"), ("inspect",))
_VERIFY: Words = ("golden", "verify", "{golden}")


def _of_the_reference(field: str, found: object) -> Callable[[dict[str, Any]], None]:
    """Changes what the manifest says of the reference."""

    def change(document: dict[str, Any]) -> None:
        document["reference"][field] = found

    return change


def golden_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], None]:
    """Edits the manifest and states the digest that belongs to it, as a forger would."""

    def edit(place: Place) -> None:
        file = place.golden / "manifest.json"
        document = json.loads(file.read_bytes())
        document.pop("manifest_digest")
        change(document)
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        document["manifest_digest"] = hashlib.sha256(text.encode()).hexdigest()
        file.write_text(json.dumps(document))

    return edit


def _sha256(document: dict[str, Any], array: Array) -> str:
    """The digest of an array in the manifest: of its prompt's digest and its bytes."""
    prompt = {key: document[key] for key in ("tokens", "first_position", "decode")}
    text = json.dumps(prompt, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(hashlib.sha256(text.encode()).digest() + array.tobytes()).hexdigest()


def _values(change: Callable[[Array], object], *, tap: str = _TAP, forged: bool = True) -> Callable[[Place], None]:
    """Changes the recorded numbers of a tap, and the digests that belong to them."""

    def edit(place: Place) -> None:
        file = place.golden / "layer-00000.safetensors"
        header, data = split(file)
        begin, end = header[tap]["data_offsets"]
        array = np.frombuffer(data[begin:end], np.float32).reshape(header[tap]["shape"]).copy()
        change(array)
        file.write_bytes(raw_file(header, data[:begin] + array.tobytes() + data[end:]))
        if forged:
            golden_manifest(lambda document: document["taps"][tap].update(sha256=_sha256(document, array)))(place)

    return edit


def _noise(change: Callable[[Array], object], *, tap: str = _TAP) -> Callable[[Place], None]:
    """Changes a noise floor ``[dtypes, modes, rms and peak, B, S]``, and the digests that belong to it."""
    return _values(change, tap=f"{tap}:noise")


def _inflated(array: Array) -> None:
    """A hundredth of the values, in float32: twelve times that would let almost anything pass."""
    array[0] = np.sqrt(np.mean(np.square(array[1]))) * 10


def _one_small_row(array: Array) -> None:
    array[0, :, :, 0, 5] *= 1e4


def _short_prompt(place: Place) -> None:
    """A golden of three tokens, none of which closes a block of four."""
    outcome = invoke(
        place.words((*RECORD[:3], "--out", "{root}/short", "--random", "3", "--layers", "0", "--noise", "float32"))
    )
    assert outcome.code == 0, outcome.text


def _bad(id: str, what: str, edit: Callable[[Place], object], words: Words, code: int, *says: str) -> Case:
    return Case(id=id, what=what, model="tiny", slow=True, edit=edit, steps=(Step(words, code, says),))


GOLDENS: tuple[Case, ...] = (
    Case(
        id="P01",
        what="a golden of another architecture",
        slow=True,
        steps=(Step(PARITY, 3, ("{golden}", "another architecture")),),
    ),
    _bad(
        "P01",
        "tokens that the vocabulary does not have",
        golden_manifest(lambda document: document["tokens"][0].__setitem__(0, 96)),
        _ON_0,
        3,
        "{golden}/manifest.json",
        "tokens: expected rows of equal length with ids below 96",
    ),
    _bad(
        "P01",
        "other tokens than those of the arrays, in a layer that does not read tokens",
        golden_manifest(lambda document: document["tokens"][0].__setitem__(slice(7, 9), [1, 2])),
        (*PARITY, "--layer", "2"),
        3,
        "layer-00002.safetensors",
        "the bytes are not those that were recorded of this prompt",
    ),
    _bad(
        "P01",
        "a golden whose manifest was edited",
        lambda place: (place.golden / "manifest.json").write_text(
            (place.golden / "manifest.json").read_text().replace('"transformers"', '"somebody"', 1)
        ),
        _ON_0,
        3,
        "{golden}/manifest.json",
        "manifest_digest says",
        "the manifest is damaged or was edited",
    ),
    _bad(
        "P02",
        "a tap is missing in the manifest",
        golden_manifest(lambda document: document["taps"].pop(_TAP)),
        _ON_0,
        3,
        "{golden}/manifest.json",
        f"{_TAP}: missing",
    ),
    _bad(
        "P02",
        "a file of the golden is missing",
        lambda place: (place.golden / "layer-00000.safetensors").unlink(),
        _ON_0,
        3,
        "{golden}",
        "layer-00000.safetensors: no such file",
    ),
    _bad(
        "P02",
        "a recorded number was changed",
        _values(lambda array: array.__setitem__((0, 0, 0), 7.0), forged=False),
        _VERIFY,
        1,
        "layer-00000.safetensors",
        f"{_TAP}: the bytes are not those that were recorded",
    ),
    _bad(
        "P03",
        "NaN in the golden",
        _values(lambda array: array.__setitem__((0, 5, 1), np.nan)),
        _ON_0,
        1,
        f"FAIL: {_TAP} is the first tap that diverges",
    ),
    _bad(
        "P04",
        "infinity in the golden",
        _values(lambda array: array.__setitem__((0, 5, 1), np.inf)),
        _ON_0,
        1,
        f"FAIL: {_TAP} is the first tap that diverges",
    ),
    _bad(
        "P05",
        "a tap of a shape that would broadcast",
        golden_manifest(lambda document: document["taps"][_TAP].update(shape=[1, 1, 16])),
        _ON_0,
        3,
        "{golden}/manifest.json",
        f"{_TAP}: expected",
        "(1, 300, 16)",
        "(1, 1, 16)",
    ),
    Case(
        id="P06",
        what="nothing but empty taps is compared",
        slow=True,
        edit=_short_prompt,
        steps=(
            Step(
                ("parity", "{orbax}", "--golden", "{root}/short", "--layer", "0", "--taps", "*.compressor.entries"),
                2,
                ("nothing would be compared of attn.compressor.entries, attn.indexer.compressor.entries",),
            ),
        ),
    ),
    _bad(
        "P07",
        "no tap is compared",
        lambda place: None,
        (*_ON_0, "--taps", "nothing.*"),
        2,
        "matches no tap of this run",
    ),
    Case(
        id="P07",
        what="nothing is compared but what the golden itself gives",
        model="tiny",
        slow=True,
        steps=(
            Step((*PARITY, "--taps", "input"), 2, ("nothing would be compared of input", "--mode cumulative")),
            Step((*PARITY, "--taps", "input", "--mode", "cumulative"), 0, ("PASS: all 4 taps agree",)),
            Step((*PARITY, "--taps", "input", "--mode", "both"), 0, ("PASS: all 4 taps agree",)),
        ),
    ),
    _bad("P07", "a layer that was not recorded", lambda place: None, (*PARITY, "--layer", "9"), 2, "layers 0 to 3"),
    _bad(
        "P09",
        "a golden of zeros",
        _values(lambda array: array.fill(0)),
        _ON_0,
        3,
        f"{_TAP}, float32, isolated: a noise floor of",
        "where rounding explains at most 0",
    ),
    _bad(
        "P11",
        "prompts of unequal lengths, which would need padding",
        golden_manifest(lambda document: document.update(tokens=[[1, 2, 3], [1, 2]])),
        _ON_0,
        3,
        "{golden}/manifest.json",
        "tokens: expected rows of equal length",
    ),
    *(
        Case(
            id="P14",
            what=f"a noise floor {what}",
            model="tiny",
            slow=True,
            edit=_noise(change),
            steps=(
                Step(
                    (*_ON_0, "--taps", "attn.wq_a"), 3, (f"{_FILE_0}: {_TAP}, float32, isolated: a noise floor", says)
                ),
                Step(_VERIFY, 1, (f"{_FILE_0}: {_TAP}, float32, isolated: a noise floor", says)),
                *(Step((*words, "{golden}"), 0, (says,)) for words in looked_at),
            ),
        )
        for what, change, says, looked_at in (
            ("of infinity", lambda array: array.fill(np.inf), "of inf", _LOOKED_AT),
            ("of NaN", lambda array: array.fill(np.nan), "of nan", _LOOKED_AT),
            ("below zero", lambda array: np.negative(array, out=array), "which is negative", _LOOKED_AT),
            (
                "with a small peak",
                lambda array: array[:, :, 1].__imul__(1e-3),
                "do not belong to the same 16 elements",
                _LOOKED_AT,
            ),
            ("of a billion", lambda array: array.fill(1e9), "over the whole tap, where rounding explains at most", ()),
            ("of float32 as large as bfloat16's", _inflated, "over the whole tap, where rounding explains", ()),
            ("that is large in one row", _one_small_row, "where rounding explains at most", ()),
        )
    ),
    *(
        refused(
            "P13",
            f"{field} that dsv4 does not know: {found}",
            "{golden}/manifest.json: " + says,
            model="tiny",
            edit=golden_manifest(_of_the_reference(field, found)),
            by=(("golden", "show", "{golden}"), _VERIFY, ("inspect", "{golden}"), _ON_0),
        )
        for field, found, says in (
            ("numerics", "Plain", "reference.numerics is 'Plain', expected one of plain, release"),
            ("dtype", "bfloat16", "reference.dtype, in plain numerics, is 'bfloat16', expected one of float32"),
        )
    ),
    refused(
        "P13",
        "a kind of attention that dsv4 does not know",
        "{golden}/manifest.json: config:",
        "attention is 'Sliding', expected one of",
        model="tiny",
        edit=golden_manifest(lambda document: document["config"]["attention"].__setitem__(0, "Sliding")),
        by=(("golden", "show", "{golden}"), _ON_0),
    ),
)

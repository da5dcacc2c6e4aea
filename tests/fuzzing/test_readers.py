"""The readers under damaged files: some of each here, a million in ``nox -s fuzz``; and the bytes that it has found."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_convert.errors import BadInput
from dsv4_convert.files.strict_json import parse_object
from dsv4_convert.golden.manifest import GoldenManifest

from .mutation import mutate
from .readers import GOLDEN, READERS, Disagreement, accepts

SEEDS = {name: reader.seeds() for name, reader in READERS.items()}
DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("name", READERS)
def test_seeds_are_accepted(name: str, tmp_path: Path) -> None:
    """All of them but configs of inference code, so that what is one step from a seed reaches the reader's end."""
    refused = sum(not accepts(READERS[name], seed, tmp_path) for seed in SEEDS[name])
    assert refused == (2 if name == "config" else 0)


def test_the_committed_golden_is_accepted() -> None:
    data = (GOLDEN / "manifest.json").read_bytes()
    assert GoldenManifest.from_bytes(data, where="manifest.json").to_bytes() == data


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    reader, folder = READERS[name], tmp_path_factory.mktemp("damaged")
    outcomes = []

    @settings(max_examples=max(10, 80 // reader.cost), database=None)
    @given(st.sampled_from(SEEDS[name]), st.integers(0, 2**64 - 1))
    def attempt(seed: bytes, number: int) -> None:
        outcomes.append(accepts(reader, mutate(seed, Random(number)), folder))

    attempt()
    assert not all(outcomes)


def _changed(reader: str, old: bytes, new: bytes) -> bytes:
    seed = next(seed for seed in SEEDS[reader] if old in seed)
    return seed.replace(old, new, 1)


#: Inputs on which readers once failed: (reader, bytes). Each one raised an exception other than dsv4's, printed control
#: characters, or was accepted.
FOUND: dict[str, tuple[str, Callable[[], bytes]]] = {
    "config nested deeply": ("config", lambda: _changed("config", b"96", DEEP)),
    "config with a key twice": ("config", lambda: _changed("config", b'"hc_mult": 4', b'"hc_mult": 4, "hc_mult": 8')),
    "config with NaN": ("config", lambda: _changed("config", b"0.002", b"NaN")),
    "config whose field would ring": ("config", lambda: _changed("config", b"hc_mult", b"hc_mult\\u0007")),
    "config with half a character": ("config", lambda: _changed("config", b"hc_mult", b"\\ud800")),
    "config with an integer beyond float64": ("config", lambda: _changed("config", b"0.002", b"1" + b"0" * 400)),
    "config with a number beyond float64": ("config", lambda: _changed("config", b"0.002", b"1e400")),
    "config with more layers than memory": (
        "config",
        lambda: _changed("config", b'"num_hidden_layers": 4', b'"num_hidden_layers": %d' % 2**40),
    ),
    "stored config of another kind": (
        "stored config",
        lambda: _changed("stored config", b"sliding_att", b"sliding-att"),
    ),
    "stored config without a number": ("stored config", lambda: _changed("stored config", b": 96", b': "96"')),
    "stored config with half a layer": ("stored config", lambda: _changed("stored config", b"[true, true", b"[true")),
    "stored config that is none": ("stored config", lambda: b"3"),
    "manifest nested deeply": ("manifest", lambda: _changed("manifest", b"null", DEEP)),
    "manifest with Infinity": ("manifest", lambda: _changed("manifest", b"null", b"Infinity")),
    "manifest with half a character": ("manifest", lambda: _changed("manifest", b"null", b'"\\ud800"')),
    "manifest with a list as dtype": ("manifest", lambda: _changed("manifest", b'"float32"', b"[1]")),
    "manifest of a leaf beyond any file": (
        "manifest, sealed",
        lambda: _changed("manifest", b'"chunk_shape":[1,4]', b'"chunk_shape":[1,%d]' % 2**63).replace(
            b'"shape":[3,4]', b'"shape":[3,%d]' % 2**63
        ),
    ),
    "manifest whose key would ring": ("manifest", lambda: _changed("manifest", b'"rule"', b'"\\u0007"')),
    "sources with a number as text": ("sources", lambda: _changed("sources", b'"BF16"', b"16")),
    "sources with half a number": ("sources", lambda: _changed("sources", b"[2,3]", b"[2,1.5]")),
    "sources with a letter per target": ("sources", lambda: _changed("sources", b'["a","b"]', b'"ab"')),
    "sources nested deeply": ("sources", lambda: _changed("sources", b"99", DEEP)),
    "sources with NaN": ("sources", lambda: _changed("sources", b"99", b"NaN")),
    "array with a text as shape": ("array", lambda: _changed("array", b"[3,4]", b'"34"')),
    "array with a float in its shape": ("array", lambda: _changed("array", b"[3,4]", b"[3,4.5]")),
    "array with Infinity in its shape": ("array", lambda: _changed("array", b"[3,4]", b"[3,Infinity]")),
    "array with a key twice": ("array", lambda: _changed("array", b'"order":"C"', b'"order":"F","order":"C"')),
    "array nested deeply": ("array", lambda: _changed("array", b"[3,4]", DEEP)),
    "journal with no digest": ("journal", lambda: _changed("journal", b'"digest": "6e', b'"digest": "6E')),
    "journal with a chunk of no number": ("journal", lambda: _changed("journal", b"[1, 0]", b"[1, 0.5]")),
    "journal with a note of no name": ("journal", lambda: _changed("journal", b'"a.weight", "value"', b'1, "value"')),
    "journal nested deeply": ("journal", lambda: _changed("journal", b"[1, 0]", DEEP)),
    "journal, looked at, of another kind": ("journal, looked at", lambda: b'{"fingerprint.source": 3}\n'),
    "journal, looked at, that is a list": ("journal, looked at", lambda: b"[3]\n"),
    "journal, looked at, nested deeply": ("journal, looked at", lambda: b'{"a": ' + DEEP + b"}\n"),
    "journal, looked at, whose plan is torn": ("journal, looked at", lambda: b'{"fingerp'),
    "request nested deeply": ("request", lambda: _changed("request", b"null", DEEP)),
    "export that is a list": ("export", lambda: b"[]"),
    "export without counts": ("export", lambda: _changed("export", b'"identical": 3', b'"identical": null')),
    "golden with Infinity": (
        "golden manifest",
        lambda: _changed("golden manifest", b'"decode": 0', b'"decode": Infinity'),
    ),
    "golden whose config is a number": ("golden manifest, sealed", lambda: _with("config", 3)),
    "golden whose config has no numbers": ("golden manifest, sealed", lambda: _with("config", None, "vocab_size")),
    "golden whose tap would ring": ("golden manifest, sealed", lambda: _with("taps", {}, "\x07")),
}


def test_what_is_read_can_be_written_again() -> None:
    """Between what Python parses and what it writes lie some levels, and which they are depends on who calls."""
    for levels in range(150, 1000):
        for inner in (b"", b'"\\ud83d\\ude00"'):
            with suppress(BadInput):
                json.dumps(parse_object(b'{"a":' + b"[" * levels + inner + b"]" * levels + b"}", where="x"))
    with pytest.raises(BadInput, match="x: JSON nested too deeply"):
        parse_object(b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", where="x")


def _with(key: str, value: object, inner: str | None = None) -> bytes:
    document = json.loads(SEEDS["golden manifest"][0])
    if inner is None:
        document[key] = value
    else:
        document[key][inner] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize("case", FOUND)
def test_what_fuzzing_has_found_is_refused(case: str, tmp_path: Path) -> None:
    name, make = FOUND[case]
    assert not accepts(READERS[name], make(), tmp_path)


@pytest.mark.parametrize("fault", ["takes anything", "fails", "rings", "repeats"])
def test_the_harness_notices(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness reports a reader that accepts too much, breaks, or lets a file write to the terminal."""

    def faulty(path: Path) -> dict[str, str]:
        match fault:
            case "takes anything":
                return {"a": "../../etc/passwd"}
            case "fails":
                raise KeyError("weight_map")
            case "rings":
                raise _Unescaped("x\x07")
            case _:
                raise BadInput("\n".join(["x" * 1999] * 99))

    class _Unescaped(BadInput):
        def __str__(self) -> str:
            return "x\x07"

    monkeypatch.setattr(f"{accepts.__module__}.read_weight_map", faulty, raising=True)
    with pytest.raises((Disagreement, KeyError)):
        accepts(READERS["index"], SEEDS["index"][0], tmp_path)

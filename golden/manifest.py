"""``manifest.json`` of a golden: its reference, weights, tokens and settings, and the digest of every array.

Reading is strict: the taps, their shapes, dtypes and files must be exactly those that config, tokens and layers imply,
so a golden with a hole, or one of another architecture, is refused before anything is compared with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dsv4_convert.errors import BadInput, listed
from dsv4_convert.files.strict_json import enumerated, parse_object
from dsv4_convert.folders import GOLDEN_FILE
from dsv4_convert.golden.compact import MAX_NUMBERS, Compact, exact_name, sketch_name
from dsv4_convert.golden.layout import StoredShape, exact_rows, expected_aliases, kept_whole, stored_arrays
from dsv4_convert.golden.noise import RUN_DTYPES, is_noise
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import TapKey

Array = np.ndarray[Any, Any]

SCHEMA_VERSION = 5
#: The versions that are read. Digests of version 4 cover an array alone, and not the prompt that it belongs to.
READ_VERSIONS = (4, 5)
MANIFEST_NAME = GOLDEN_FILE
MODEL_FILE = "model.safetensors"

#: Numerics of a reference -> the dtype in which it computed. Plain: the mathematics without simulated quantisation of
#: activations. Release: the published inference code.
NUMERICS = {"plain": "float32", "release": "bfloat16"}

_DIGEST_KEY = "manifest_digest"
_REQUEST_KEYS = (
    "reference",
    "source",
    "config",
    "tokens",
    "text",
    "first_position",
    "decode",
    "layers",
    "noise",
    "compact",
)
_KEYS = {"schema_version", *_REQUEST_KEYS, "taps", "aliases", _DIGEST_KEY}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def layer_file(layer: int | None) -> str:
    """Name of the file that holds the taps of one layer, or of the model level (None)."""
    return MODEL_FILE if layer is None else f"layer-{layer:05d}.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """The implementation that computed a golden."""

    name: str
    #: Version by package.
    versions: Mapping[str, str]
    #: One of :data:`NUMERICS`, which says its dtype.
    numerics: str
    dtype: str
    attention_implementation: str
    experts_implementation: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedSource:
    """The checkpoint that a golden was computed from."""

    #: ``ORG/NAME`` of a Hub repository, or the name of a folder.
    name: str
    #: Commit on the Hub, where known.
    revision: str | None
    #: SHA-256 of every shard that the recording read, by file name.
    files: Mapping[str, str]
    #: Digest of the values of every parameter of the recorded layers and the model level, by path
    #: (:mod:`dsv4_convert.weights.values`); empty in goldens that were recorded without.
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. Goldens without values have no entry for them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "values" or value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTap:
    """File, shape and dtype of one tap's array.

    ``sha256`` is the digest of :attr:`RecordingRequest.prompt_digest` and of the array's bytes in C order,
    little-endian.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the constructor's arguments."""
        return {"file": self.file, "dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordingRequest:
    """Everything that determines a golden. Two equal requests give the same arrays.

    ``tokens`` is ``[B][S]``; ``text`` has one prompt per row where the tokens come from text; ``noise`` names the
    dtypes whose noise floor was measured. ``compact`` says what is kept of a tap; None: all of it. ``first_position``
    is that of the first token in the rotary tables. The last ``decode`` tokens were given one by one, from the cache.
    ``layers`` may have those of stages, which come after the model level.
    """

    reference: Reference
    source: RecordedSource
    config: Config
    tokens: tuple[tuple[int, ...], ...]
    text: tuple[str, ...] | None
    layers: tuple[int, ...]
    noise: tuple[str, ...]
    compact: Compact | None = None
    first_position: int = 0
    decode: int = 0

    @property
    def token_array(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The tokens as int32 ``[B, S]``."""
        return np.array(self.tokens, np.int32)

    @cached_property
    def prompt_digest(self) -> bytes:
        """SHA-256 of the tokens and their places, with which the digest of every array begins.

        So an array is tied to its prompt, and a manifest with other tokens does not fit the recorded arrays.
        """
        prompt = {"tokens": self.tokens, "first_position": self.first_position, "decode": self.decode}
        return hashlib.sha256(_compact(prompt).encode()).digest()

    def arrays(self) -> dict[str, StoredShape]:
        """Every array that this request makes: taps by full name in order of execution, each followed by its noise."""
        batch, tokens = len(self.tokens), len(self.tokens[0])
        return stored_arrays(
            self.config, self.layers, self.noise, self.compact, batch=batch, tokens=tokens, decode=self.decode
        )

    def keep(self, taken: Mapping[str, Array]) -> dict[str, Array]:
        """What is stored of taps and noises, by stored name. ``taken`` has them whole, by full name."""
        kept = {}
        for name, array in taken.items():
            key = None if is_noise(name) else TapKey.parse(name, self.config)
            if key is None or self.compact is None or kept_whole(key.tap, array.shape, self.compact):
                kept[name] = array
                continue
            kept[sketch_name(name)] = self.compact.sketch(array)
            if rows := exact_rows(key, self.config, self.compact, array.shape[1]):
                kept[exact_name(name)] = np.ascontiguousarray(array[:, rows])
        return kept

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_json` is the inverse."""
        return {
            "reference": dataclasses.asdict(self.reference),
            "source": self.source.to_json(),
            "config": self.config.to_json(),
            "tokens": [list(row) for row in self.tokens],
            "text": None if self.text is None else list(self.text),
            "first_position": self.first_position,
            "decode": self.decode,
            "layers": list(self.layers),
            "noise": list(self.noise),
            "compact": None if self.compact is None else self.compact.to_json(),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RecordingRequest:
        """Strict inverse of :meth:`to_json`.

        Raises:
            ValueError: a part is missing, unknown, of the wrong type or out of range.
        """
        try:
            config = Config.from_json(document["config"])
        except BadInput as error:
            raise ValueError(f"config: {error}") from None
        text, compact = document["text"], document["compact"]
        tokens = _tokens(document["tokens"], config.vocab_size)
        return cls(
            reference=_reference(document),
            source=_source(document),
            config=config,
            tokens=tokens,
            text=None if text is None else _strings(text, len(document["tokens"])),
            first_position=_count(document, "first_position", config.max_position_embeddings - len(tokens[0])),
            decode=_count(document, "decode", len(tokens[0]) - 1),
            layers=_layers(document["layers"], config.num_hidden_layers + config.num_mtp_stages),
            noise=_noise(document["noise"]),
            compact=None if compact is None else _compact_form(compact, len(tokens[0])),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenManifest:
    """The whole manifest. ``aliases`` name taps that are the same array as another one and are stored once."""

    request: RecordingRequest
    taps: Mapping[str, StoredTap]
    aliases: Mapping[str, str]
    schema_version: int = SCHEMA_VERSION

    @property
    def ties_prompt(self) -> bool:
        """Whether the digests of the arrays cover the prompt."""
        return self.schema_version > 4

    @property
    def digest(self) -> str:
        """SHA-256 of everything that it says, and so of the golden: equal for every copy of it."""
        return _digest(self._document())

    def _document(self) -> dict[str, Any]:
        """Everything but the digest, as plain JSON values."""
        return {
            "schema_version": self.schema_version,
            **self.request.to_json(),
            "taps": {name: tap.to_json() for name, tap in self.taps.items()},
            "aliases": dict(self.aliases),
        }

    def to_bytes(self) -> bytes:
        """The manifest as a file, one line per tap; equal manifests give equal bytes."""
        document = self._document()
        long = ("taps", "aliases")
        lines = [f"{json.dumps(key)}: {_compact(value)}" for key, value in document.items() if key not in long]
        for key in long:
            rows = ",\n".join(f"  {json.dumps(name)}: {_compact(value)}" for name, value in document[key].items())
            lines.append(f"{json.dumps(key)}: {{\n{rows}\n}}")
        lines.append(f'"{_DIGEST_KEY}": "{_digest(document)}"')
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> GoldenManifest:
        """Strict inverse of :meth:`to_bytes`; ``where`` names the file in messages.

        Raises:
            BadInput: another schema version, damage, or taps that differ from what the request implies.
        """
        document = parse_object(data, where=where)
        version = document.get("schema_version")
        if type(version) is not int or version not in READ_VERSIONS:
            raise BadInput(
                f"{where}: schema_version is {version!r}, this version of dsv4 reads "
                f"{' and '.join(map(str, READ_VERSIONS))}; "
                "read it with the version of dsv4 that recorded it, or record again"
            )
        if set(document) != _KEYS:
            raise BadInput(f"{where}: expected the entries {sorted(_KEYS)}, found {sorted(document)}")
        stated = document.pop(_DIGEST_KEY)
        if stated != (found := _digest(document)):
            raise BadInput(
                f"{where}: {_DIGEST_KEY} says {stated!r}, the content gives {found}; the manifest is damaged or was "
                "edited, take it from where it was recorded, or record again"
            )
        try:
            request = RecordingRequest.from_json(document)
            taps = {name: stored_tap(entry) for name, entry in _mapping(document["taps"]).items()}
            aliases = _mapping(document["aliases"])
        except ValueError as error:
            raise BadInput(f"{where}: {error}") from None
        problems = _tap_problems(request, taps, aliases)
        if problems:
            raise BadInput(f"{where}: not the taps that its config, tokens and layers imply:\n{listed(problems)}")
        return cls(request=request, taps=taps, aliases=aliases, schema_version=version)


def stored_tap(entry: object) -> StoredTap:
    """Strict inverse of :meth:`StoredTap.to_json`. Raises :class:`ValueError`."""
    if not isinstance(entry, dict) or set(entry) != {"file", "dtype", "shape", "sha256"}:
        raise ValueError(f"tap entry: expected file, dtype, shape and sha256, found {_shown(entry)}")
    file, dtype, shape, sha256 = entry["file"], entry["dtype"], entry["shape"], entry["sha256"]
    if not isinstance(file, str) or not isinstance(dtype, str) or not _is_digest(sha256):
        raise ValueError(f"tap entry: file, dtype or sha256 is not what it should be: {_shown(entry)}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"tap entry: expected sizes as shape, found {_shown(shape)}")
    return StoredTap(file=file, dtype=dtype, shape=tuple(shape), sha256=sha256)


def _tap_problems(request: RecordingRequest, taps: Mapping[str, StoredTap], aliases: Mapping[str, str]) -> list[str]:
    wanted = request.arrays()
    wanted_aliases = expected_aliases(request.config, request.layers, wanted)
    problems = []
    if aliases != wanted_aliases:
        differing = {name for name in {*aliases, *wanted_aliases} if aliases.get(name) != wanted_aliases.get(name)}
        problems += [
            f"{name}: alias expected {wanted_aliases.get(name)}, found {aliases.get(name)}" for name in differing
        ]
    for name in taps.keys() - (wanted.keys() - wanted_aliases.keys()):
        problems.append(f"{name}: not expected")
    for name, (layer, dtype, shape) in wanted.items():
        if name in wanted_aliases:
            continue
        tap = taps.get(name)
        if tap is None:
            problems.append(f"{name}: missing")
            continue
        expected = (layer_file(layer), dtype.name, shape)
        if (tap.file, tap.dtype, tap.shape) != expected:
            problems.append(f"{name}: expected {expected}, found {(tap.file, tap.dtype, tap.shape)}")
    return sorted(problems)


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of the document without its digest, as compact JSON with sorted keys."""
    return hashlib.sha256(_compact(document).encode()).hexdigest()


def _shown(value: object, *, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {_shown(value)}")
    return value


def _record(
    document: Mapping[str, Any], key: str, kind: type, *, mappings: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """The fields of a flat dataclass: strings, string-to-string ``mappings``, and strings that may be null."""
    entry = document[key]
    names = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(entry, dict) or set(entry) != names:
        raise ValueError(f"{key}: expected the fields {sorted(names)}, found {_shown(entry)}")
    for name, value in entry.items():
        if name in mappings:
            good = isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
        else:
            good = isinstance(value, str) or (value is None and name in optional)
        if not good:
            raise ValueError(f"{key}.{name}: not what it should be: {_shown(value)}")
    if kind is RecordedSource and not all(map(_is_digest, (*entry["files"].values(), *entry["values"].values()))):
        raise ValueError("source.files, source.values: expected SHA-256 digests")
    return entry


def _source(document: Mapping[str, Any]) -> RecordedSource:
    entry = document["source"]
    whole = {**document, "source": {"values": {}, **entry}} if isinstance(entry, dict) else document
    mappings = ("files", "values")
    return RecordedSource(**_record(whole, "source", RecordedSource, mappings=mappings, optional=("revision",)))


def _reference(document: Mapping[str, Any]) -> Reference:
    reference = Reference(**_record(document, "reference", Reference, mappings=("versions",)))
    dtype = NUMERICS[enumerated(reference.numerics, NUMERICS, field="reference.numerics")]
    enumerated(reference.dtype, [dtype], field=f"reference.dtype, in {reference.numerics} numerics,")
    return reference


def _tokens(value: object, vocabulary: int) -> tuple[tuple[int, ...], ...]:
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(row, list) and row and len(row) == len(value[0]) for row in value)
        or not all(type(token) is int and 0 <= token < vocabulary for row in value for token in row)
    ):
        raise ValueError(f"tokens: expected rows of equal length with ids below {vocabulary}, found {_shown(value)}")
    return tuple(tuple(row) for row in value)


def _strings(value: object, count: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) != count or not all(isinstance(item, str) for item in value):
        raise ValueError(f"text: expected one string per prompt, found {_shown(value)}")
    return tuple(value)


def _count(document: Mapping[str, Any], key: str, most: int) -> int:
    value = document[key]
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{key}: expected a number from 0 to {most}, found {_shown(value)}")
    return value


def _layers(value: object, count: int) -> tuple[int, ...]:
    good = isinstance(value, list) and all(type(layer) is int and 0 <= layer < count for layer in value)
    if not good or not isinstance(value, list) or not value or value != sorted(set(value)):
        raise ValueError(f"layers: expected ascending numbers below {count}, found {_shown(value)}")
    return tuple(value)


def _noise(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or value != [dtype for dtype in RUN_DTYPES if dtype in value]:
        raise ValueError(f"noise: expected some of {list(RUN_DTYPES)} in this order, found {_shown(value)}")
    return tuple(value)


def _compact_form(value: object, tokens: int) -> Compact:
    fields = {field.name for field in dataclasses.fields(Compact)}
    if not isinstance(value, dict) or set(value) != fields:
        raise ValueError(f"compact: expected the fields {sorted(fields)}, found {_shown(value)}")
    positions, numbers, seed = value["positions"], value["numbers"], value["seed"]
    good = isinstance(positions, list) and all(type(at) is int and 0 <= at < tokens for at in positions)
    if not good or not isinstance(positions, list) or positions != sorted(set(positions)):
        raise ValueError(f"compact.positions: expected ascending numbers below {tokens}, found {_shown(positions)}")
    if type(numbers) is not int or not 1 <= numbers <= MAX_NUMBERS or type(seed) is not int or seed < 0:
        raise ValueError(f"compact: expected 1 to {MAX_NUMBERS} numbers and a seed of 0 or more, found {_shown(value)}")
    return Compact(positions=tuple(positions), numbers=numbers, seed=seed)

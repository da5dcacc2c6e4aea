"""Tensors that are missing, of another form, or of the right form with a content that no model has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.store import open_store

from .case import (
    AGAINST,
    CONVERT,
    PARITY,
    PARITY_SOURCE,
    READERS,
    RECORD,
    VERIFY,
    Case,
    Place,
    Step,
    Words,
    accepted,
    refused,
)
from .edit import Array, Tensor, chunk, in_array, in_tensors, load, manifest_again, rewrite

_A = "layers.0.attn.wq_a"
_WEIGHT, _SCALE = f"{_A}.weight", f"{_A}.scale"
_EXPERT = "layers.0.ffn.experts.1.w1"
_TABLE = "layers.0.ffn.gate.tid2eid"
_RETRY = "no release of DeepSeek-V4 has that, so the file is damaged or was quantised wrongly: download it again"
_FRESH = "Compare with the repository's file list; a fresh `dsv4 download` fetches what is missing."
_SOURCE_FORM: Words = (*CONVERT, "--dtype", "source")
_FLOAT32_FORM: Words = (*CONVERT, "--dtype", "float32")
#: The three ways to store, each of which looks at the content.
_FORMS = (CONVERT, _SOURCE_FORM)


def _pop(*names: str) -> Callable[[Place], None]:
    return in_tensors(lambda tensors: [tensors.pop(name) for name in names])


def _put(name: str, dtype: str, array: Array) -> Callable[[Place], None]:
    return in_tensors(lambda tensors: tensors.update({name: Tensor(dtype, list(array.shape), array.tobytes())}))


def _at(name: str, dtype: Any, index: tuple[int | slice, ...], value: Any) -> Callable[[Place], None]:
    return in_array(name, dtype, lambda array: array.__setitem__(index, value))


def _several(*edits: Callable[[Place], object]) -> Callable[[Place], None]:
    def edit(place: Place) -> None:
        for one in edits:
            one(place)

    return edit


def _swapped(first: str, second: str) -> Callable[[dict[str, Tensor]], None]:
    """Two weights of one form trade places, with their scales."""

    def change(tensors: dict[str, Tensor]) -> None:
        for part in ("weight", "scale"):
            one, other = tensors[f"{first}.{part}"], tensors[f"{second}.{part}"]
            tensors[f"{first}.{part}"], tensors[f"{second}.{part}"] = other, one

    return change


def _transposed(name: str) -> Callable[[dict[str, Tensor]], None]:
    """A square weight of one tile, stored the other way round."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[f"{name}.weight"]
        assert tensor.shape[0] == tensor.shape[1]
        tensor.data = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape).T.tobytes()

    return change


def _nibbles_exchanged(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        codes = np.frombuffer(tensors[f"{name}.weight"].data, np.uint8)
        tensors[f"{name}.weight"].data = (codes << 4 | codes >> 4).astype(np.uint8).tobytes()

    return change


# --- what its shape does not show ------------------------------------------------------------------------------------

_PARITY_SOURCE_0 = (*PARITY_SOURCE, "--layer", "0")
_PARITY_0 = (*PARITY, "--layer", "0")
_HEALTHY_SOURCE: Words = ("verify", "{dest}", "--against", "{healthy}")


def _hidden(id: str, what: str, change: Callable[[dict[str, Tensor]], None], weight: str) -> Case:
    """A corruption of the source that no check of its form sees.

    Conversion and verification are content: the bytes are those of the source. The source that it should have been,
    and parity, are not.
    """
    return Case(
        id=id,
        what=f"{what}, in the source",
        model="tiny",
        slow=True,
        edit=in_tensors(change),
        steps=(
            Step((*CONVERT, "--layers", "0"), 0),
            Step(("verify", "{dest}"), 0),
            Step(("verify", "{dest}", "--against", "{source}"), 0),
            Step(_HEALTHY_SOURCE, 1, (weight, "is not the tensor that was converted")),
            Step(
                ("parity", "{dest}", "--golden", "{golden}", "--layer", "0"),
                1,
                ("is the first tap that diverges", weight),
            ),
            Step(_PARITY_SOURCE_0, 1, ("is the first tap that diverges", weight)),
        ),
    )


def _exchange_chunks(first: str, second: str, *, at: tuple[str, str] | None = None) -> Callable[[Place], None]:
    """Two stored chunks of one shape trade places."""

    def edit(place: Place) -> None:
        one = chunk(place.orbax, first) if at is None else place.orbax / first / at[0]
        other = chunk(place.orbax, second) if at is None else place.orbax / second / at[1]
        contents = one.read_bytes(), other.read_bytes()
        rewrite(one, contents[1])
        rewrite(other, contents[0])

    return edit


def _transpose_chunk(leaf: str, width: int) -> Callable[[Place], None]:
    def edit(place: Place) -> None:
        file = chunk(place.orbax, leaf)
        rewrite(file, np.frombuffer(file.read_bytes(), np.uint16).reshape(width, width).T.tobytes())

    return edit


def _forged(place: Place) -> None:
    """The manifest says that the bytes have to be what they are."""
    import hashlib

    def change(document: dict[str, Any]) -> None:
        for path, entry in document["leaves"].items():
            files = [place.orbax / path / name for name in _chunk_names(entry)]
            entry["chunk_digests"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
            raw = b"".join(bytes.fromhex(digest) for digest in entry["chunk_digests"])
            entry["digest"] = hashlib.sha256(raw).hexdigest()

    manifest_again(place.orbax, change)


def _chunk_names(entry: dict[str, Any]) -> Iterator[str]:
    grid = [-(-size // chunk) for size, chunk in zip(entry["shape"], entry["chunk_shape"], strict=True)]
    for index in np.ndindex(*grid):
        yield ".".join(map(str, index)) or "0"


def _after(id: str, what: str, edit: Callable[[Place], None], leaf: str) -> tuple[Case, Case]:
    """The same corruption of what was converted: as it happens, and by somebody who rewrites the manifest as well."""
    happened = Case(
        id=id,
        what=f"{what}, in the converted checkpoint",
        model="tiny",
        slow=True,
        edit=edit,
        steps=(
            Step(VERIFY, 1, (f"{{orbax}}/{leaf}", "changed or damaged", "Convert the model again")),
            Step(AGAINST, 1, (leaf, "the stored bytes have changed since")),
            Step(_PARITY_0, 1, ("is the first tap that diverges", leaf)),
        ),
    )
    forged = Case(
        id=id,
        what=f"{what}, in the converted checkpoint and its manifest",
        model="tiny",
        slow=True,
        edit=_several(edit, _forged),
        steps=(
            Step(VERIFY, 0),
            Step(AGAINST, 1, (leaf, "neither side has changed since")),
            Step(_PARITY_0, 1, ("is the first tap that diverges", leaf)),
        ),
    )
    return happened, forged


_HIDDEN: tuple[Case, ...] = (
    _hidden(
        "T11",
        "a transposed square matrix",
        _transposed("layers.0.ffn.shared_experts.w1"),
        "layers.0.ffn.shared_experts.w1",
    ),
    *_after(
        "T11",
        "a transposed square matrix",
        _transpose_chunk("layers.0.ffn.shared_experts.w1", 32),
        "layers.0.ffn.shared_experts.w1",
    ),
    _hidden(
        "T12",
        "gate and up exchanged",
        _swapped("layers.0.ffn.shared_experts.w1", "layers.0.ffn.shared_experts.w3"),
        "layers.0.ffn.shared_experts.w1",
    ),
    *_after(
        "T12",
        "gate and up exchanged",
        _exchange_chunks("layers.0.ffn.shared_experts.w1", "layers.0.ffn.shared_experts.w3"),
        "layers.0.ffn.shared_experts.w1",
    ),
    _hidden(
        "T13",
        "two experts exchanged",
        _swapped("layers.0.ffn.experts.0.w2", "layers.0.ffn.experts.1.w2"),
        "layers.0.ffn.experts",
    ),
    *_after(
        "T13",
        "two experts exchanged",
        _exchange_chunks("layers.0.ffn.experts.w2", "layers.0.ffn.experts.w2", at=("0.0.0", "1.0.0")),
        "layers.0.ffn.experts.w2",
    ),
    _hidden("T13", "two layers exchanged", _swapped("layers.0.attn.wq_a", "layers.1.attn.wq_a"), "layers.0.attn.wq_a"),
    *_after(
        "T13",
        "two layers exchanged",
        _exchange_chunks("layers.0.attn.wq_a", "layers.1.attn.wq_a"),
        "layers.0.attn.wq_a",
    ),
    _hidden(
        "T15", "FP4 nibbles in the other order", _nibbles_exchanged("layers.0.ffn.experts.2.w1"), "layers.0.ffn.experts"
    ),
)


# --- odd, and right --------------------------------------------------------------------------------------------------


def _widened(place: Place, name: str) -> Array:
    """A weight of the source decoded by ml_dtypes, one scale for each 128 by 128 tile: float32 ``[out, in]``."""
    tensors = {key: one for file in place.source.glob("*.safetensors") for key, one in load(file).items()}
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
    kinds = {"F8_E8M0": ml_dtypes.float8_e8m0fnu, "F32": np.float32}
    codes = np.frombuffer(weight.data, ml_dtypes.float8_e4m3fn).reshape(weight.shape).astype(np.float64)
    factors = np.frombuffer(scale.data, kinds[scale.dtype]).reshape(scale.shape).astype(np.float64)
    tiles = np.repeat(np.repeat(factors, 128, axis=0), 128, axis=1)[: codes.shape[0], : codes.shape[1]]
    return (codes * tiles).astype(np.float32)


def _decoded(name: str, *, dtype: Any = ml_dtypes.bfloat16) -> Callable[[Place], None]:
    """The stored values equal those that ml_dtypes decodes, bit for bit."""

    def check(place: Place) -> None:
        found = open_store(place.dest).read(name)
        assert found.dtype == dtype
        assert found.tobytes() == np.ascontiguousarray(_widened(place, name).T.astype(dtype)).tobytes(), name

    return check


def _read(leaf: str, expected: Callable[[Array], object]) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        array = open_store(place.dest).read(leaf)
        assert expected(array), f"{leaf}: {array}"

    return check


def _wide(place: Place) -> None:
    """A model whose widths are no multiples of 128, and more than one tile."""
    import shutil

    from dsv4_convert.golden.synthetic import write_checkpoint

    from .case import SMALL

    shutil.rmtree(place.source)
    write_checkpoint(place.source, {**SMALL, "hidden_size": 160, "q_lora_rank": 136}, seed=3)


def _as_int32(tensors: dict[str, Tensor]) -> None:
    table = np.frombuffer(tensors[_TABLE].data, np.int64).astype(np.int32)
    tensors[_TABLE] = Tensor("I32", tensors[_TABLE].shape, table.tobytes())


def _name_twice(table: Array) -> None:
    table[5] = table[5, 0]


_twice = in_array(_TABLE, np.int64, _name_twice)


def _as_dtype(name: str, spelling: str, dtype: Any) -> Callable[[Place], None]:
    """A tensor with as many numbers of another dtype."""

    def change(tensors: dict[str, Tensor]) -> None:
        shape = tensors[name].shape
        tensors[name] = Tensor(spelling, shape, np.ones(shape, dtype).tobytes())

    return in_tensors(change)


_TINIEST = np.array([1, 0x8001, 0x8000, 0x007F, 0, 0x0080], np.uint16)


def _tiny_numbers(array: Array) -> None:
    array.reshape(-1)[: _TINIEST.size] = _TINIEST


TENSORS: tuple[Case, ...] = (
    refused(
        "T01", "a tensor is missing", f"{_WEIGHT}: missing (fills {_A})", _FRESH, edit=_pop(_WEIGHT, _SCALE), by=READERS
    ),
    refused(
        "T02",
        "a tensor that no model has",
        "layers.0.attn.wq_c.weight: unknown tensor U8 [4]",
        edit=_put("layers.0.attn.wq_c.weight", "U8", np.ones(4, np.uint8)),
        by=READERS,
    ),
    refused(
        "T02",
        "a tensor of another kind of layer",
        "layers.1.attn.indexer.wq_b.weight: exists in CSA layers only, layer 1 is sliding_attention, learned routing",
        edit=_put("layers.1.attn.indexer.wq_b.weight", "BF16", np.ones((64, 16), np.uint16)),
    ),
    refused(
        "T03",
        "an expert is missing",
        f"{_EXPERT}.weight: missing (fills layers.0.ffn.experts.w1)",
        edit=_pop(f"{_EXPERT}.weight", f"{_EXPERT}.scale"),
        by=READERS,
    ),
    refused(
        "T03",
        "an expert has another form than its neighbours",
        "layers.0.ffn.experts.w1: its experts are stored in different forms",
        edit=_several(_pop(f"{_EXPERT}.scale"), _put(f"{_EXPERT}.weight", "BF16", np.ones((32, 32), np.uint16))),
    ),
    refused(
        "T04",
        "a scale is missing",
        f"{_WEIGHT}: F8_E4M3 codes without their scale tensor",
        edit=_pop(_SCALE),
        by=READERS,
    ),
    refused(
        "T04",
        "an expert's scale is missing",
        f"{_EXPERT}.weight: I8 codes without their scale tensor",
        edit=_pop(f"{_EXPERT}.scale"),
    ),
    refused("T05", "a scale without its weight", f"{_WEIGHT}: missing", edit=_pop(_WEIGHT)),
    refused(
        "T05",
        "a scale of a weight that has none",
        "layers.0.attn.compressor.wkv.scale: unknown tensor",
        edit=_put("layers.0.attn.compressor.wkv.scale", "F32", np.ones((1, 1), np.float32)),
    ),
    refused(
        "T06",
        "a scale too many",
        f"{_SCALE}: expected F8_E8M0 or F32 [1, 1], found F8_E8M0 [2, 1]",
        edit=_put(_SCALE, "F8_E8M0", np.full((2, 1), 120, np.uint8)),
        by=READERS,
    ),
    refused(
        "T06",
        "scales of FP4 groups the other way round",
        f"{_EXPERT}.scale: expected F8_E8M0 or F32 [32, 1], found F8_E8M0 [1, 32]",
        edit=_put(f"{_EXPERT}.scale", "F8_E8M0", np.full((1, 32), 120, np.uint8)),
    ),
    refused(
        "T07",
        "a scale of bytes that say no format",
        f"{_SCALE}: expected F8_E8M0 or F32 [1, 1], found U8 [1, 1]",
        edit=_put(_SCALE, "U8", np.full((1, 1), 120, np.uint8)),
    ),
    refused(
        "T07",
        "a scale of bfloat16",
        f"{_SCALE}: expected F8_E8M0 or F32 [1, 1], found BF16 [1, 1]",
        edit=_put(_SCALE, "BF16", np.full((1, 1), 0x3F80, np.uint16)),
    ),
    accepted(
        "T07",
        "one scale of float32 among E8M0",
        "rounded:",
        edit=_put(_SCALE, "F32", np.full((1, 1), 0.013, np.float32)),
        after=_decoded(_A),
    ),
    refused(
        "T08",
        "an E8M0 scale that is NaN",
        "{shard}: ",
        _WEIGHT,
        "the scale at [0, 0] is NaN (byte 0xFF), expected a finite number",
        _RETRY,
        edit=_at(_SCALE, np.uint8, (0, 0), 0xFF),
    ),
    refused(
        "T08",
        "an E8M0 scale that is NaN, kept as published",
        "{shard}: ",
        _SCALE,
        "the scale at [0, 0] is NaN (byte 0xFF)",
        edit=_at(_SCALE, np.uint8, (0, 0), 0xFF),
        by=(_SOURCE_FORM,),
    ),
    refused(
        "T08",
        "an FP4 scale that is NaN",
        "{shard}: ",
        _EXPERT,
        "the scale at [7, 0] is NaN (byte 0xFF)",
        slow=True,
        edit=_at(f"{_EXPERT}.scale", np.uint8, (7, 0), 0xFF),
        by=_FORMS,
    ),
    *(
        refused(
            "T08",
            f"a float32 scale that is {value}",
            "{shard}: ",
            f"the scale at [0, 0] is {value}, expected a finite number that is not negative",
            _RETRY,
            slow=True,
            edit=_put(_SCALE, "F32", np.full((1, 1), value, np.float32)),
            by=_FORMS,
        )
        for value in (np.nan, np.inf, -0.5)
    ),
    refused(
        "T08",
        "an E8M0 scale under which codes become infinite",
        "{shard}: ",
        _WEIGHT,
        "code times scale at [",
        "is beyond the largest bfloat16, expected a number",
        _RETRY,
        slow=True,
        edit=_at(_SCALE, np.uint8, (0, 0), 0xFE),
    ),
    refused(
        "T08",
        "a float32 scale under which codes become infinite",
        "code times scale at [",
        "is beyond the largest float32",
        slow=True,
        edit=_put(_SCALE, "F32", np.full((1, 1), 3e38, np.float32)),
        by=(_FLOAT32_FORM,),
    ),
    accepted(
        "T08",
        "a scale of zero, as a block of zeros gets",
        edit=_put(_SCALE, "F32", np.zeros((1, 1), np.float32)),
        after=_decoded(_A),
    ),
    accepted(
        "T08",
        "the smallest scale of all, 2^-127",
        edit=_at(_SCALE, np.uint8, (0, 0), 0),
        by=(_FLOAT32_FORM,),
        after=_decoded(_A, dtype=np.float32),
    ),
    accepted(
        "T08",
        "a huge scale under which nothing overflows",
        edit=_several(_at(_SCALE, np.uint8, (0, 0), 0xFE), _at(_WEIGHT, np.uint8, (slice(None), slice(None)), 0x01)),
        after=_decoded(_A),
    ),
    *(
        refused(
            "T09",
            f"an FP8 code 0x{code:02X}, NaN",
            "{shard}: ",
            _WEIGHT,
            f"the code at [3, 5] is NaN (byte 0x{code:02X}), expected a number",
            _RETRY,
            edit=_at(_WEIGHT, np.uint8, (3, 5), code),
            by=_FORMS,
        )
        for code in (0x7F, 0xFF)
    ),
    refused(
        "T09",
        "NaN in a norm",
        "{shard}: layers.0.attn_norm.weight: the value at [2] is NaN",
        _RETRY,
        slow=True,
        edit=_at("layers.0.attn_norm.weight", np.uint16, (2,), 0x7FC1),
        by=_FORMS,
    ),
    refused(
        "T09",
        "NaN in a tensor of float32",
        "{shard}: layers.0.attn.attn_sink: the value at [1] is NaN",
        slow=True,
        edit=_at("layers.0.attn.attn_sink", np.float32, (1,), np.nan),
    ),
    refused(
        "T09",
        "NaN in the embedding",
        "embed.weight: the value at [4, 1] is NaN",
        slow=True,
        edit=_at("embed.weight", np.uint16, (4, 1), 0xFFFF),
        by=_FORMS,
    ),
    accepted(
        "T09",
        "a router bias of minus infinity: an expert that must not be chosen",
        edit=_at("layers.1.ffn.gate.bias", np.float32, (1,), -np.inf),
        after=_read("layers.1.ffn.gate.bias", lambda array: np.isneginf(array).tolist() == [False, True, False]),
    ),
    Case(
        id="T09",
        what="NaN in the source after the conversion",
        edit=lambda place: (place.orbax, _at(_WEIGHT, np.uint8, (3, 5), 0x7F)(place)),
        steps=(Step(AGAINST, 1, (_WEIGHT, "the code at [3, 5] is NaN")),),
    ),
    accepted(
        "T10",
        "a weight of zeros",
        edit=in_array(_WEIGHT, np.uint8, lambda array: array.fill(0)),
        after=_read(_A, lambda array: not array.astype(np.float32).any()),
    ),
    *_HIDDEN,
    refused(
        "T14",
        "bfloat16 with a scale",
        f"{_WEIGHT}: expected F8_E4M3 with a scale, found BF16",
        edit=_as_dtype(_WEIGHT, "BF16", np.uint16),
    ),
    refused(
        "T14",
        "float16 where bfloat16 is expected",
        "layers.0.attn_norm.weight: expected BF16 or F32 without a scale, found F16",
        edit=_as_dtype("layers.0.attn_norm.weight", "F16", np.float16),
    ),
    refused(
        "T14",
        "bfloat16 where float32 is expected",
        "layers.0.attn.attn_sink: expected F32 without a scale, found BF16",
        edit=_as_dtype("layers.0.attn.attn_sink", "BF16", np.uint16),
    ),
    refused(
        "T14",
        "e5m2 where e4m3 is expected",
        f"{_WEIGHT}: expected F8_E4M3 with a scale, found F8_E5M2",
        edit=_as_dtype(_WEIGHT, "F8_E5M2", np.uint8),
    ),
    accepted("T16", "widths that are no multiples of a block", edit=_wide, after=_decoded(_A)),
    refused(
        "T17",
        "an expert that the model does not have",
        f"{{shard}}: {_TABLE}: the expert at [5, 1] is 3, expected one from 0 to 2, as config.json has 3 experts",
        "download it again",
        edit=_at(_TABLE, np.int64, (5, 1), 3),
        by=_FORMS,
    ),
    refused(
        "T17",
        "an expert beyond 32 bits",
        f"{{shard}}: {_TABLE}: the expert at [0, 0] is 4294967296, expected one from 0 to 2",
        slow=True,
        edit=_at(_TABLE, np.int64, (0, 0), 2**32),
        by=(CONVERT, RECORD),
    ),
    refused(
        "T17",
        "a negative expert",
        f"{{shard}}: {_TABLE}: the expert at [31, 0] is -1, expected one from 0 to 2",
        slow=True,
        edit=_at(_TABLE, np.int64, (31, 0), -1),
        by=_FORMS,
    ),
    refused(
        "T17",
        "a table of floats",
        f"{_TABLE}: expected I32 or I64 without a scale, found F32",
        edit=_as_dtype(_TABLE, "F32", np.float32),
        by=READERS,
    ),
    refused(
        "T17",
        "a table of bytes",
        f"{_TABLE}: expected I32 or I64 without a scale, found U8",
        edit=_as_dtype(_TABLE, "U8", np.uint8),
    ),
    Case(
        id="T17",
        what="an expert that a row names twice, which the published code adds once",
        edit=_twice,
        slow=True,
        steps=(
            Step(CONVERT, 0),
            Step(("verify", "{dest}", "--strict"), 0, ("warning: layers.0.ffn.gate.tid2eid: 1 of 32 rows name",)),
            Step(("inspect", "{dest}"), 0, ("odd: layers.0.ffn.gate.tid2eid: 1 of 32 rows name an expert twice",)),
        ),
    ),
    accepted(
        "T17",
        "a table of 32 bits",
        edit=in_tensors(_as_int32),
        after=_read(_TABLE.removesuffix(".weight"), lambda array: array.dtype == np.int32),
    ),
    Case(
        id="T17",
        what="an expert that the model does not have, before the conversion",
        model="tiny",
        slow=True,
        edit=_at(_TABLE, np.int64, (5, 1), 6),
        steps=(Step(_PARITY_SOURCE_0, 3, (f"{_TABLE}: the expert at [5, 1] is 6, expected one from 0 to 5",)),),
    ),
    refused(
        "T18",
        "a router bias is missing",
        "layers.1.ffn.gate.bias: missing (fills layers.1.ffn.gate.bias)",
        edit=_pop("layers.1.ffn.gate.bias"),
        by=READERS,
    ),
    refused(
        "T18",
        "a router bias in a hash layer",
        "layers.0.ffn.gate.bias: exists in score-routed layers only",
        edit=_put("layers.0.ffn.gate.bias", "F32", np.ones(3, np.float32)),
    ),
    refused(
        "T19",
        "a float32 weight that bfloat16 cannot hold",
        "layers.0.ffn.gate.weight: the value at [1, 2] is 3.3999999521443642e+38, beyond the "
        "largest bfloat16, 3.39e38; keep it with --dtype float32 or source",
        edit=_several(
            _as_dtype("layers.0.ffn.gate.weight", "F32", np.float32),
            _at("layers.0.ffn.gate.weight", np.float32, (1, 2), 3.4e38),
        ),
    ),
    accepted(
        "T19",
        "the same weight in float32",
        edit=_several(
            _as_dtype("layers.0.ffn.gate.weight", "F32", np.float32),
            _at("layers.0.ffn.gate.weight", np.float32, (1, 2), 3.4e38),
        ),
        by=(_FLOAT32_FORM,),
        after=_read("layers.0.ffn.gate.weight", lambda array: array[2, 1] == np.float32(3.4e38)),
    ),
    accepted(
        "T20",
        "denormal numbers and zeros of both signs",
        edit=in_array("embed.weight", np.uint16, _tiny_numbers),
        after=_read(
            "embed", lambda array: array.view(np.uint16).reshape(-1)[: _TINIEST.size].tolist() == _TINIEST.tolist()
        ),
    ),
    accepted(
        "T20",
        "denormal FP8 codes and zeros of both signs",
        edit=in_array(
            _WEIGHT, np.uint8, lambda array: array.reshape(-1).__setitem__(slice(0, 4), [0x80, 0x01, 0x87, 0x00])
        ),
        after=_decoded(_A),
    ),
    accepted(
        "T20",
        "numbers that float32 has only as denormals",
        edit=_several(
            _at(_SCALE, np.uint8, (0, 0), 2),
            in_array(_WEIGHT, np.uint8, lambda array: array.reshape(-1).__setitem__(slice(0, 2), [0x81, 0x01])),
        ),
        by=(_FLOAT32_FORM,),
        after=_decoded(_A, dtype=np.float32),
    ),
)

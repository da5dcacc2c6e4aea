"""The archive alone, without a reference: what is written is read back, and everything else is refused."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dsv4_convert.errors import BadInput, ResourceError, UsageError
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.manifest import (
    GoldenManifest,
    RecordedSource,
    RecordingRequest,
    Reference,
    StoredTap,
    layer_file,
)
from dsv4_convert.golden.noise import MODES, noise_name
from dsv4_convert.golden.synthetic import random_architecture, tiny_config, tiny_v41_config
from dsv4_convert.golden.writer import golden_writer
from dsv4_convert.spec.config import Config

_RUN = ("float32", "float64", "bfloat16")
_REFERENCE = Reference(
    name="transformers",
    versions={"torch": "2", "transformers": "5"},
    numerics="plain",
    dtype="float32",
    attention_implementation="eager",
    experts_implementation="eager",
)


def _request(
    config: dict[str, Any] | None = None, layers: tuple[int, ...] = (0, 1, 2, 3), length: int = 9
) -> RecordingRequest:
    parsed = Config.from_hf(config or tiny_config())
    tokens = np.random.default_rng(length).integers(0, parsed.vocab_size, (2, length))
    return RecordingRequest(
        reference=_REFERENCE,
        source=RecordedSource(name="org/model", revision=None, files={"model.safetensors": "ab" * 32}),
        config=parsed,
        tokens=tuple(tuple(map(int, row)) for row in tokens),
        text=None,
        layers=layers,
        noise=("float32",),
    )


def _arrays(request: RecordingRequest) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(7)
    arrays = {name: random.standard_normal(array.shape).astype(array.dtype) for name, array in request.arrays().items()}
    for name, array in arrays.items():
        if name.endswith(noise_name("")):
            array[:] = 1e-6 * abs(array[:, :, :1])  # a row's rms and its largest value
    for name, source in _sources(request.layers).items():
        if name in arrays:
            arrays[name] = arrays[source]
    return arrays


#: The layer that every layer of the small V4.1 reads from, by what it reads: as its config says, written by hand.
_READ_IN_V41 = {
    "input.entries": ("attn.compressor.entries", {3: 2, 5: 4, 6: 4}),
    "input.keys": ("attn.indexer.keys", {3: 2, 6: 4}),
    "input.chosen": ("attn.indexer.chosen", {3: 2, 5: 4}),
    "input.candidates": ("attn.indexer.candidates", {6: 4}),
}


def _sources(layers: tuple[int, ...]) -> dict[str, str]:
    """The stored tap that has the values of an input: of the layer before or of an earlier one, else of the first layer
    with the same input."""
    found, first = {}, {}
    before = {layer: layer - 1 for layer in layers}
    tables = {"input": ("hc_ffn.streams", before), "input.pre": ("hc_ffn.pre", before), **_READ_IN_V41}
    for name, (tap, sources) in tables.items():
        for layer in layers:
            mine, source = f"layers.{layer}.{name}", sources.get(layer, -1)
            holder = f"layers.{source}.{tap}" if source in layers else first.setdefault((tap, source), mine)
            if source >= 0 and holder != mine:
                found[mine] = holder
    return found


def _written(out: Path, request: RecordingRequest, arrays: dict[str, np.ndarray[Any, Any]]) -> Golden:
    with golden_writer(out, request) as writer:
        for layer in (*request.layers, None):
            if layer not in writer.finished:
                writer.write(layer, _of(request, arrays, layer))
        return writer.publish()


def _of(request: RecordingRequest, arrays: dict[str, np.ndarray[Any, Any]], layer: int | None) -> dict[str, Any]:
    return {name: arrays[name] for name, array in request.arrays().items() if array.layer == layer}


def test_every_array_comes_back_and_other_readers_see_the_same(tmp_path: Path) -> None:
    request = _request()
    arrays = _arrays(request)
    arrays["layers.1.attn.q"][0, 0, 0, :2] = np.nan, -np.inf
    golden = _written(tmp_path / "golden", request, arrays)
    assert golden.manifest.request == request
    for name in golden.names:
        found = golden.read(name)
        assert found.dtype == arrays[name].dtype
        assert found.tobytes() == arrays[name].tobytes(), name
        if arrays[name].dtype == np.float32:
            for index, mode in enumerate(MODES):
                noise = golden.noise(name, "float32", mode)
                assert noise.tobytes() == arrays[noise_name(name)][0, index].tobytes()
    for layer in (*request.layers, None):
        for name, array in load_file(golden.path / layer_file(layer)).items():
            assert array.tobytes() == arrays[name].tobytes(), name
            prompt_of = {"decode": 0, "first_position": 0, "tokens": golden.tokens.tolist()}
            text = json.dumps(prompt_of, separators=(",", ":"))
            prompt = hashlib.sha256(text.encode()).digest()
            assert hashlib.sha256(prompt + array.tobytes()).hexdigest() == golden.manifest.taps[name].sha256
    assert [entry.name for entry in tmp_path.iterdir()] == ["golden"]
    assert golden.verify() == []


@pytest.mark.parametrize("layers", [(0, 1, 2, 3, 4, 5, 6), (0, 3, 5, 6)])
def test_inputs_of_layers_are_stored_once(layers: tuple[int, ...], tmp_path: Path) -> None:
    request = _request(tiny_v41_config(), layers=layers, length=23)
    arrays = _arrays(request)
    golden = _written(tmp_path / "golden", request, arrays)
    named = {str(key) for layer in layers for key in golden.taps(layer) if key.tap.name.startswith("input")}
    assert named == {name for name in arrays if ".input" in name and not name.endswith(noise_name(""))}
    assert dict(golden.manifest.aliases) == {name: its for name, its in _sources(layers).items() if name in arrays}
    for name in golden.names:
        assert golden.read(name).tobytes() == arrays[name].tobytes(), name
    assert golden.verify() == []


@pytest.mark.parametrize("name", ["layers.3.input.entries", "layers.5.input.chosen", "layers.1.input.pre"])
def test_an_input_that_is_not_what_an_earlier_layer_made_is_refused(name: str, tmp_path: Path) -> None:
    request = _request(tiny_v41_config(), layers=tuple(range(7)), length=23)
    arrays = _arrays(request)
    arrays[name] = arrays[name] + 1
    with pytest.raises(ValueError, match=f"{name} is not the same array as layers"):
        _written(tmp_path / "golden", request, arrays)


@given(st.integers(0, 2**32), st.data())
def test_a_manifest_survives_its_file(seed: int, data: st.DataObject) -> None:
    config = random_architecture(seed)
    count = config["num_hidden_layers"]
    layers = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    request = _request(config, tuple(sorted(layers)), data.draw(st.integers(1, 300)))
    taps = {
        name: StoredTap(file=layer_file(array.layer), dtype=array.dtype.name, shape=array.shape, sha256="0f" * 32)
        for name, array in request.arrays().items()
        if not (name.endswith(".input") and array.layer is not None and array.layer - 1 in layers)
    }
    aliases = {f"layers.{i}.input": f"layers.{i - 1}.hc_ffn.streams" for i in sorted(layers) if i - 1 in layers}
    manifest = GoldenManifest(request=request, taps=taps, aliases=aliases)
    assert GoldenManifest.from_bytes(manifest.to_bytes(), where="here") == manifest


def _redigested(document: dict[str, Any]) -> bytes:
    """A manifest whose own digest is right, so that only the change in it can be what is noticed."""
    document.pop("manifest_digest")
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return json.dumps({**document, "manifest_digest": hashlib.sha256(text.encode()).hexdigest()}).encode()


_TAP = "layers.1.attn.wq_a"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.update(schema_version=1), "schema_version is 1, this version of dsv4 reads 4 and 5"),
        (lambda m: m.update(schema_version=True), "schema_version is True"),
        (lambda m: m.update(extra=1), "expected the entries"),
        (lambda m: m.pop("layers"), "expected the entries"),
        (lambda m: m["taps"].pop(_TAP), f"{_TAP}: missing"),
        (lambda m: m["taps"].update({"layers.1.attn.wq": m["taps"][_TAP]}), "layers.1.attn.wq: not expected"),
        (lambda m: m["taps"][_TAP].update(shape=[1, 9, 16]), f"{_TAP}: expected"),
        (lambda m: m["taps"][_TAP].update(dtype="float64"), f"{_TAP}: expected"),
        (lambda m: m["taps"][_TAP].update(file="../../etc/passwd"), f"{_TAP}: expected"),
        (lambda m: m["taps"][_TAP].update(sha256="0"), "sha256 is not what it should be"),
        (lambda m: m["taps"][_TAP].update(shape=[2.0]), "expected sizes as shape"),
        (lambda m: m["taps"][_TAP].pop("dtype"), "expected file, dtype, shape and sha256"),
        (lambda m: m["aliases"].pop("layers.1.input"), "layers.1.input: alias expected"),
        (lambda m: m["aliases"].update({"layers.1.input": "layers.1.attn.q"}), "layers.1.input: alias expected"),
        (lambda m: m["layers"].pop(), "not expected"),
        (lambda m: m.update(layers=[0, 0, 1, 2, 3]), "expected ascending numbers below 5"),
        (lambda m: m.update(layers=[0, 5]), "expected ascending numbers below 5"),
        (lambda m: m.update(layers=[]), "expected ascending numbers"),
        (lambda m: m["tokens"][0].append(1), "rows of equal length"),
        (lambda m: m["tokens"][0].__setitem__(0, 96), "ids below 96"),
        (lambda m: m["tokens"][0].__setitem__(0, True), "ids below 96"),
        (lambda m: m["tokens"].pop(), "expected"),
        (lambda m: m.update(first_position=-1), "first_position: expected a number from 0 to 10"),
        (lambda m: m.update(first_position=1024), "first_position: expected a number from 0 to 10"),
        (lambda m: m.update(decode=True), "decode: expected a number from 0 to"),
        (lambda m: m.update(decode=len(m["tokens"][0])), "decode: expected a number from 0 to"),
        (lambda m: m.update(decode=1), "cache.window: missing"),
        (lambda m: m.update(text=["one"]), "one string per prompt"),
        (lambda m: m["config"].pop("hc_eps"), "config: .*hc_eps"),
        (lambda m: m["config"].update(q_lora_rank=8), f"{_TAP}: expected"),
        (lambda m: m["reference"].pop("numerics"), "reference: expected the fields"),
        (lambda m: m["reference"].update(versions={"torch": 2}), "reference.versions"),
        (lambda m: m["source"].update(files={"a": "b"}), "SHA-256 digests"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], problem: str
) -> None:
    request = _request()
    _written(tmp_path / "golden", request, _arrays(request))
    file = tmp_path / "golden" / "manifest.json"
    document = json.loads(file.read_bytes())
    change(document)
    file.write_bytes(_redigested(document))
    with pytest.raises(BadInput, match=problem) as caught:
        open_golden(tmp_path / "golden")
    assert str(file) in str(caught.value)


def test_an_edited_manifest_is_noticed_by_its_digest(tmp_path: Path) -> None:
    request = _request()
    _written(tmp_path / "golden", request, _arrays(request))
    file = tmp_path / "golden" / "manifest.json"
    first = request.tokens[0][0]
    file.write_text(file.read_text().replace(f'"tokens": [[{first},', f'"tokens": [[{(first + 1) % 96},', 1))
    with pytest.raises(BadInput, match=r"manifest\.json: manifest_digest says"):
        open_golden(tmp_path / "golden")


def test_arrays_belong_to_their_prompt(tmp_path: Path) -> None:
    """Edited tokens, under a manifest with the digest that belongs to it, do not fit the arrays."""
    request = _request()
    _written(tmp_path / "golden", request, _arrays(request))
    file = tmp_path / "golden" / "manifest.json"
    document = json.loads(file.read_bytes())
    document["tokens"][0][0] ^= 1
    file.write_bytes(_redigested(document))
    golden = open_golden(tmp_path / "golden")
    assert len(golden.verify()) == len(golden.manifest.taps)
    with pytest.raises(BadInput, match="not those that were recorded of this prompt"):
        golden.read("layers.2.attn.wq_a")


def test_a_golden_of_version_4_is_read(tmp_path: Path) -> None:
    """Its digests are those of arrays alone, and the manifest's digest stays the one that baselines have."""
    request = _request()
    _written(tmp_path / "golden", request, _arrays(request))
    file = tmp_path / "golden" / "manifest.json"
    document = json.loads(file.read_bytes())
    new = open_golden(tmp_path / "golden")
    for name, entry in document["taps"].items():
        entry["sha256"] = hashlib.sha256(new._stored(name).tobytes()).hexdigest()
    document["schema_version"] = 4
    file.write_bytes(_redigested(document))
    old = open_golden(tmp_path / "golden")
    assert old.verify() == []
    assert old.manifest.digest == json.loads(file.read_bytes())["manifest_digest"]
    assert not old.manifest.ties_prompt
    assert new.manifest.ties_prompt
    file.write_bytes(_redigested({**document, "schema_version": 5, "manifest_digest": ""}))
    assert len(open_golden(tmp_path / "golden").verify()) == len(document["taps"])


def test_files_of_another_golden_are_noticed(tmp_path: Path) -> None:
    for name, length in (("a", 9), ("b", 10)):
        request = _request(length=length)
        _written(tmp_path / name, request, _arrays(request))
    (tmp_path / "a" / "layer-00002.safetensors").replace(tmp_path / "b" / "layer-00002.safetensors")
    with pytest.raises(BadInput, match=r"layer-00002.*expected float32 \[2, 10, .* found float32 \[2, 9,"):
        open_golden(tmp_path / "b")


def test_verify_names_every_damaged_array(tmp_path: Path) -> None:
    request = _request()
    golden = _written(tmp_path / "golden", request, _arrays(request))
    for layer in (0, 3):
        file = golden.path / layer_file(layer)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    problems = golden.verify()
    assert len(problems) == 2
    assert "layers.0." in problems[0]
    assert "layers.3." in problems[1]


def test_nothing_at_that_place(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no manifest\.json"):
        open_golden(tmp_path)
    request = _request()
    with golden_writer(tmp_path / "golden", request):
        pass
    with pytest.raises(BadInput, match="has not finished"):
        open_golden(tmp_path / "golden")


def test_the_writer_takes_exactly_the_expected_arrays(tmp_path: Path) -> None:
    request = _request()
    arrays = _arrays(request)
    with golden_writer(tmp_path / "golden", request) as writer:
        good = _of(request, arrays, 0)
        for wrong in (
            {name: array for name, array in good.items() if name != "layers.0.attn.q"},
            {**good, "layers.0.attn.q": good["layers.0.attn.q"].astype(np.float64)},
            {**good, "layers.0.attn.q": good["layers.0.attn.q"][:, :, :1]},
        ):
            with pytest.raises(ValueError, match=r"layers\.0\.attn\.q: expected"):
                writer.write(0, wrong)
        with pytest.raises(ValueError, match="nonsense: expected None"):
            writer.write(0, {**good, "nonsense": good["layers.0.attn.q"]})
        writer.write(0, good)
        other = {**_of(request, arrays, 1), "layers.1.input": arrays["layers.1.input"] + 1}
        with pytest.raises(ValueError, match=r"layers\.1\.input is not the same array as layers\.0\.hc_ffn\.streams"):
            writer.write(1, other)


def _state(layer: int) -> dict[str, np.ndarray[Any, Any]]:
    """Streams that leave a layer, in every dtype that runs."""
    streams = np.random.default_rng(layer).standard_normal((2, 9, 4, 32))
    return {dtype: streams.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for dtype in _RUN}


def test_an_interrupted_run_is_taken_up_after_its_last_layer(tmp_path: Path) -> None:
    request = _request(layers=(0, 2, 3))
    arrays = _arrays(request)
    with golden_writer(tmp_path / "golden", request) as writer:
        for layer in (0, 2):
            writer.write(layer, _of(request, arrays, layer), _state(layer))
    with golden_writer(tmp_path / "golden", request) as writer:
        assert writer.finished == (0, 2)
        state = writer.last_state()
        assert state is not None
        assert {name: (array.dtype, array.tobytes()) for name, array in state.items()} == {
            name: (array.dtype, array.tobytes()) for name, array in _state(2).items()
        }
    file = tmp_path / "golden.dsv4-partial" / layer_file(2)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with golden_writer(tmp_path / "golden", request) as writer:
        assert writer.finished == (), "the streams that left layer 0 are kept only until layer 2 is finished"
    golden = _written(tmp_path / "golden", request, arrays)
    assert golden.verify() == []


def test_another_request_is_refused_with_the_reason_and_deletes_nothing(tmp_path: Path) -> None:
    request = _request(layers=(0, 2))
    arrays = _arrays(request)
    with golden_writer(tmp_path / "golden", request) as writer:
        writer.write(0, _of(request, arrays, 0), _state(0))
    stage = tmp_path / "golden.dsv4-partial"
    before = {file.name: file.read_bytes() for file in stage.iterdir()}
    for other, reason in (
        (dataclasses.replace(request, text=("a", "b")), r"text: None then, \['a', 'b'\] now"),
        (_request(layers=(0, 2, 3)), r"layers: \[0, 2\] then, \[0, 2, 3\] now"),
    ):
        refused = pytest.raises(UsageError, match=rf"(?s)an unfinished recording with other settings.*{reason}.*remove")
        with refused, golden_writer(tmp_path / "golden", other):
            pass
    (stage / "request.json").write_bytes(b"{")
    with pytest.raises(BadInput, match=r"request\.json: not JSON.*Remove .* to record again"):  # noqa: SIM117
        with golden_writer(tmp_path / "golden", request):
            pass
    (stage / "request.json").unlink()
    with pytest.raises(BadInput, match=r"no request\.json says what was recorded here"):  # noqa: SIM117
        with golden_writer(tmp_path / "golden", request):
            pass
    (stage / "request.json").write_bytes(before["request.json"])
    assert {file.name: file.read_bytes() for file in stage.iterdir()} == before
    with golden_writer(tmp_path / "golden", request) as writer:
        assert writer.finished == (0,)


def test_a_golden_that_lacks_only_its_rename_is_not_recorded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, out = _request(layers=(0, 2)), tmp_path / "golden"
    arrays = _arrays(request)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", _refuse)
        with pytest.raises(ResourceError, match=r"golden: cannot write: Input/output error"):
            _written(out, request, arrays)
    with golden_writer(out, request) as writer:
        assert writer.complete
        golden = writer.publish()
    assert golden.verify() == []
    assert {path.name for path in out.iterdir()} == {path.name for path in _written_anew(tmp_path, request, arrays)}
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", _refuse)
        with pytest.raises(ResourceError):
            _written(tmp_path / "other", request, arrays)
    another = golden_writer(tmp_path / "other", dataclasses.replace(request, text=("a", "b")))
    with pytest.raises(UsageError, match=r"(?s)an unfinished recording with other settings.*text: "), another:
        pass


def _refuse(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


def _written_anew(folder: Path, request: RecordingRequest, arrays: dict[str, np.ndarray[Any, Any]]) -> list[Path]:
    return list(Path(_written(folder / "anew", request, arrays).path).iterdir())


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    request = _request()
    with golden_writer(tmp_path / "golden", request):
        second = golden_writer(tmp_path / "golden", request)
        with pytest.raises(ResourceError, match=r"another process .* is writing it"), second:
            pass
    with golden_writer(tmp_path / "golden", request):
        pass


def test_what_is_at_the_destination_stays(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    request = _request()
    _written(tmp_path / "empty", request, _arrays(request))  # an empty folder is taken
    (tmp_path / "file").write_text("mine")
    for taken in ("empty", "file"):
        with pytest.raises(UsageError, match="exists already"), golden_writer(tmp_path / taken, request):
            pass
    assert (tmp_path / "file").read_text() == "mine"
    assert not list(tmp_path.glob("*.dsv4-partial"))


def test_where_one_is_can_be_recorded_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    request = _request()
    golden = _written(Path(), request, _arrays(request))
    assert golden.path == tmp_path / "empty"
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]

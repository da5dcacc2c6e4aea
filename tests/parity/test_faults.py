"""Negative controls: a planted fault is found, and named at its own layer and operation."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.store import open_store
from parity.metrics import Verdict
from parity.run import run
from parity.tolerances import Mode

#: What is done to one stored array, and the tap that it must be found at.
FAULTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "transposed indexer projection": (
        "layers.1.attn.indexer.compressor.wkv",
        lambda a: a.T.reshape(a.shape),
        "layers.1.attn.indexer.compressor.wkv",
    ),
    "gate and value projections of a compressor alike": (
        "layers.2.attn.compressor.wgate",
        lambda a: a[:, ::-1],
        "layers.2.attn.compressor.wgate",
    ),
    "position bias rolled": (
        "layers.3.attn.compressor.ape",
        lambda a: np.roll(a, 1, 0),
        "layers.3.attn.compressor.pooled",
    ),
    "sinks dropped": ("layers.0.attn.attn_sink", lambda a: a * 0 - 100, "layers.0.attn.context"),
    "two experts swapped": (
        "layers.2.ffn.experts.w2",
        lambda a: a[[1, 0, *range(2, len(a))]],
        "layers.2.ffn.experts",
    ),
    "router bias dropped": ("layers.3.ffn.gate.bias", np.zeros_like, "layers.3.ffn.gate.scores"),
    "hash table off by one": ("layers.1.ffn.gate.tid2eid", lambda a: np.roll(a, 1, 0), "layers.1.ffn.gate.experts"),
    "output groups swapped": ("layers.1.attn.wo_a", lambda a: a[::-1], "layers.1.attn.wo_a"),
    "norm weight all ones": ("layers.0.ffn_norm", np.ones_like, "layers.0.ffn_norm"),
    "mixing scale of another stream": ("layers.3.hc_ffn_scale", lambda a: a[[0, 2, 1]], "layers.3.hc_ffn.post"),
    "embedding rows rolled": ("embed", lambda a: np.roll(a, 1, 0), "embed"),
    "head scale missing": ("hc_head_scale", np.ones_like, "hc_head.pre"),
}


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint in float32, every leaf one plain array on disk."""
    out = tmp_path_factory.mktemp("plain") / "orbax"
    hf_to_orbax(tiny, out, storage=Storage.FLOAT32)
    return out


def _planted(plain: Path, where: Path, path: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """A copy of the store with one array changed on disk, as a faulty converter would have left it."""
    shutil.copytree(plain, where)
    store = open_store(where)
    array = store.read(path)
    changed = np.ascontiguousarray(change(array)).astype(array.dtype)
    assert changed.shape == array.shape
    assert not np.array_equal(changed, array), "the fault changes nothing"
    layout = store.leaf(path)
    for index in layout.chunk_indices():
        chunk = np.ascontiguousarray(changed[layout.chunk_region(index)])
        (where / path / (".".join(map(str, index)) or "0")).write_bytes(chunk.tobytes())
    return where


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, plain: Path, golden: Path, tmp_path: Path) -> None:
    path, change, tap = FAULTS[fault]
    report = run(_planted(plain, tmp_path / "orbax", path, change), golden)
    assert not report.passed
    assert report.first_diverging is not None
    assert report.first_diverging.name == tap
    assert tap in report.sentence
    layer = report.first_diverging.layer
    others = [other for other in report.taps if other.layer != layer]
    assert all(other.verdict is not Verdict.FAIL for other in others), "isolated: other layers are clean"


def test_in_cumulative_mode_the_fault_is_inherited(plain: Path, golden: Path, tmp_path: Path) -> None:
    path, change, tap = FAULTS["output groups swapped"]
    report = run(_planted(plain, tmp_path / "orbax", path, change), golden, mode=Mode.CUMULATIVE)
    assert report.first_diverging is not None
    assert report.first_diverging.name == tap
    verdicts = {other.name: other.verdict for other in report.taps}
    assert verdicts["layers.0.hc_ffn.streams"] is Verdict.PASS
    assert verdicts["layers.3.hc_ffn.streams"] is Verdict.FAIL
    assert verdicts["logits"] is Verdict.FAIL


def test_layers_and_taps_can_be_chosen(plain: Path, golden: Path) -> None:
    one = run(plain, golden, layers=[2])
    assert {tap.layer for tap in one.taps} == {2}
    some = run(plain, golden, taps=["attn.q*", "logits"])
    assert {tap.name.split(".", 2)[-1] for tap in some.taps} == {"attn.q_norm", "attn.q", "attn.q_rope", "logits"}
    assert some.passed


def test_unknown_layers_and_taps_are_refused(plain: Path, golden: Path) -> None:
    with pytest.raises(UsageError, match="layers \\[9\\]"):
        run(plain, golden, layers=[9])
    with pytest.raises(UsageError, match=r"attn\.wq_c: matches no tap"):
        run(plain, golden, taps=["attn.wq_c"])


def test_a_golden_of_another_architecture_is_refused(plain: Path, golden: Path, tmp_path: Path) -> None:
    from dsv4_convert.convert import hf_to_orbax as convert
    from golden.synthetic import tiny_config, write_checkpoint

    write_checkpoint(tmp_path / "hf", tiny_config(sliding_window=17), seed=0)
    convert(tmp_path / "hf", tmp_path / "orbax")
    with pytest.raises(BadInput, match="sliding_window: checkpoint 17, golden 16"):
        run(tmp_path / "orbax", golden)


def test_a_partial_conversion_serves_its_layers(tiny: Path, golden: Path, tmp_path: Path) -> None:
    hf_to_orbax(tiny, tmp_path / "orbax", layers=[1, 2])
    assert run(tmp_path / "orbax", golden, layers=[2]).passed
    with pytest.raises(UsageError, match="holds the layers 1-2, not 0, 3"):
        run(tmp_path / "orbax", golden)


def test_the_report_as_json_is_complete(plain: Path, golden: Path) -> None:
    document = json.loads(json.dumps(run(plain, golden).to_json(), allow_nan=False))
    assert document["schema_version"] == 1
    assert document["verdict"] == "pass"
    assert document["first_diverging"] is None
    assert {"name", "verdict", "reason", "shape", "distance", "flips"} == set(document["taps"][0])
    assert document["golden"]["reference"]["name"] == "transformers"
    assert sum(document["counts"].values()) == len(document["taps"])


def _golden_with_equal_scores(golden: Path, where: Path) -> tuple[Path, str, int]:
    """A copy of the golden in which one query of layer 3 has chosen the runner-up, whose score is the same.

    As if the reference broke the tie the other way. Returns the golden, the tap and the query.
    """
    from safetensors.numpy import load_file, save_file

    from golden.archive import open_golden
    from golden.manifest import Manifest, StoredTap

    shutil.copytree(golden, where)
    name = "layers.3.attn.indexer.chosen"
    recorded = open_golden(golden)
    chosen, scores = recorded.read(name).copy(), recorded.read("layers.3.attn.indexer.scores").copy()
    query = 200
    left = np.setdiff1d(np.arange((query + 1) // 4), chosen[0, query])
    out = chosen[0, query][np.argmin(scores[0, query][chosen[0, query]])]
    runner_up = left[np.argmax(scores[0, query][left])]
    scores[0, query, runner_up] = scores[0, query, out]
    chosen[0, query] = np.sort(np.where(chosen[0, query] == out, runner_up, chosen[0, query]))
    file = where / "layer-00003.safetensors"
    arrays = {**load_file(file), name: chosen, "layers.3.attn.indexer.scores": scores}
    save_file(arrays, file)
    manifest = recorded.manifest
    from golden.archive import digest

    entries: dict[str, StoredTap] = {
        tap: dataclasses.replace(entry, sha256=digest(arrays[tap])) if tap in arrays else entry
        for tap, entry in manifest.taps.items()
    }
    changed = Manifest(request=manifest.request, taps=entries, aliases=manifest.aliases)
    (where / "manifest.json").write_bytes(changed.to_bytes())
    return where, name, query


def test_a_tie_is_reported_and_followed(plain: Path, golden: Path, tmp_path: Path) -> None:
    """Our choice differs where the golden's scores are equal: a tie; what comes after it uses the golden's choice."""
    tied, name, query = _golden_with_equal_scores(golden, tmp_path / "golden")
    report = run(plain, tied, taps=[name, "layers.3.attn.context"])
    verdicts = {tap.name: tap for tap in report.taps}
    assert verdicts[name].verdict is Verdict.TIE
    assert verdicts[name].flips is not None
    assert verdicts[name].flips.worst == (0, query)
    # The golden's context is still that of the old choice, so following the new one has to show in that query alone.
    context = verdicts["layers.3.attn.context"]
    assert context.verdict is Verdict.FAIL
    assert context.distance is not None
    assert context.distance.worst[:2] == (0, query)
    assert run(plain, golden, taps=["layers.3.attn.context"]).passed

"""Parity runs over converted checkpoints on disk: what is compared, what is refused, what is reported."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_convert import restore_model
from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.archive import digest, open_golden
from dsv4_convert.golden.manifest import GoldenManifest, StoredTap
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.model import Taps
from dsv4_convert.parity.comparison import Comparison
from dsv4_convert.parity.gate import BaselineRequest
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.words import verdict, why
from dsv4_convert.parity.run import ParityOptions, ParityRun, run_parity
from dsv4_convert.spec.names import parameters
from dsv4_convert.spec.tap import Values
from dsv4_convert.spec.taps import TapKey
from dsv4_convert.store import open_store
from dsv4_convert.weights.converted import Weights

from .faults.fault import Held


def planted(plain: Path, where: Path, path: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
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


def test_a_fault_on_disk_is_found_and_its_part_is_named(plain: Path, tiny: Path, golden: Path, tmp_path: Path) -> None:
    """As a faulty converter would have left it: the whole way from the stored bytes to the sentence."""
    faulty = planted(plain, tmp_path / "orbax", "layers.1.attn.wo_a", lambda a: a[::-1])
    report = run_parity(faulty, golden, ParityOptions(layers=[1]), against=tiny)
    assert "The stored bytes of layers.1.attn.wo_a are not those that were converted" in verdict(report)
    assert report.first_diverging is not None
    assert report.first_diverging.name == "layers.1.attn.wo_a"
    assert "layers.1.attn.wo_a is not layers.1.attn.wo_a.weight of the source: it is the source's rows" in verdict(
        report
    )


def test_in_cumulative_mode_the_fault_is_inherited(plain: Path, golden: Path, tmp_path: Path) -> None:
    faulty = planted(plain, tmp_path / "orbax", "layers.1.attn.wo_a", lambda a: a[::-1])
    report = run_parity(faulty, golden, ParityOptions(modes=[Mode.CUMULATIVE]))
    assert report.first_diverging is not None
    assert report.first_diverging.name == "layers.1.attn.wo_a"
    verdicts = {other.name: other.verdict for other in report.taps}
    assert verdicts["layers.0.hc_ffn.streams"] is Verdict.PASS
    assert verdicts["layers.3.hc_ffn.streams"] is Verdict.FAIL
    assert verdicts["logits"] is Verdict.FAIL
    assert report.logits is not None
    assert report.logits.top1 < 0.9


def test_a_wrong_choice_has_its_consequences_in_cumulative_mode_only(plain: Path, golden: Path, tmp_path: Path) -> None:
    """Isolated, the golden's choice is followed, so that nothing but the choice is wrong."""
    faulty = planted(plain, tmp_path / "orbax", "layers.0.ffn.gate.tid2eid", lambda a: np.roll(a, 1, 0))
    report = run_parity(faulty, golden, ParityOptions(modes=MODES))
    failing = {(tap.mode, tap.name) for tap in report.taps if tap.verdict is Verdict.FAIL}
    assert {name for mode, name in failing if mode is Mode.ISOLATED} == {"layers.0.ffn.gate.experts"}
    assert (Mode.CUMULATIVE, "layers.0.ffn.experts") in failing
    assert (Mode.CUMULATIVE, "logits") in failing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_modes_agree_in_every_dtype(plain: Path, golden: Path, dtype: str) -> None:
    committed = BaselineRequest(path=golden.with_name("tiny.baseline.json"))
    report = run_parity(plain, golden, ParityOptions(modes=MODES, dtype=dtype), baseline=committed)
    assert report.passed, verdict(report)
    assert report.gate is not None
    assert report.gate.compared == 324
    assert {tap.mode for tap in report.taps} == set(MODES)
    assert [layer.layer for layer in report.error_splits] == [0, 1, 2, 3]
    assert "PASS: all 324 taps agree" in verdict(report)


def test_layers_and_taps_can_be_chosen(plain: Path, golden: Path) -> None:
    one = run_parity(plain, golden, ParityOptions(layers=[2]))
    assert {tap.layer for tap in one.taps} == {2}
    some = run_parity(plain, golden, ParityOptions(taps=["attn.q*", "logits"]))
    assert {tap.name.split(".", 2)[-1] for tap in some.taps} == {"attn.q_norm", "attn.q", "attn.q_rope", "logits"}
    assert some.passed


def test_unknown_layers_and_taps_are_refused(plain: Path, golden: Path) -> None:
    with pytest.raises(UsageError, match="layer 9: this model has the layers 0 to 3"):
        run_parity(plain, golden, ParityOptions(layers=[9]))
    with pytest.raises(UsageError, match=r"attn\.wq_c: matches no tap"):
        run_parity(plain, golden, ParityOptions(taps=["attn.wq_c"]))


def test_a_golden_of_another_architecture_is_refused(plain: Path, golden: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config(sliding_window=17), seed=0)
    hf_to_orbax(tmp_path / "hf", tmp_path / "orbax")
    with pytest.raises(BadInput, match="sliding_window: checkpoint 17, golden 16"):
        run_parity(tmp_path / "orbax", golden)


def test_a_partial_conversion_serves_its_layers(tiny: Path, golden: Path, tmp_path: Path) -> None:
    hf_to_orbax(tiny, tmp_path / "orbax", layers=[1, 2])
    assert run_parity(tmp_path / "orbax", golden, ParityOptions(layers=[2])).passed
    with pytest.raises(UsageError, match="holds the layers 1-2, not 0, 3"):
        run_parity(tmp_path / "orbax", golden, ParityOptions(layers=range(4)))


def test_the_layers_that_both_hold_are_compared(tiny: Path, golden: Path, tmp_path: Path) -> None:
    hf_to_orbax(tiny, tmp_path / "orbax", layers=[2, 3])
    report = run_parity(tmp_path / "orbax", golden)
    assert report.passed
    assert report.layers == (2, 3)
    assert {tap.layer for tap in report.taps} == {2, 3, None}
    note = "Layers: Compared are layers 2-3, which golden and checkpoint both hold; not 0-1."
    assert note in verdict(report)
    assert note not in verdict(run_parity(tmp_path / "orbax", golden, ParityOptions(layers=[2, 3])))
    # A golden of some layers, and a checkpoint that holds them all or others.
    ids = np.arange(12, dtype=np.int32)
    record(tiny, tmp_path / "golden", RecordingOptions(tokens=ids, layers=[1, 2], noise=["float32"]))
    common = run_parity(tmp_path / "orbax", tmp_path / "golden")
    assert common.passed
    assert common.layers == (2,)
    assert run_parity(None, tmp_path / "golden", source=tiny).layers == (1, 2)
    hf_to_orbax(tiny, tmp_path / "last", layers=[3])
    with pytest.raises(UsageError, match="recorded the layers 1-2, and the checkpoint holds 3: none is in both"):
        run_parity(tmp_path / "last", tmp_path / "golden")


def test_the_report_as_json_is_complete(plain: Path, golden: Path) -> None:
    report = run_parity(plain, golden, ParityOptions(modes=MODES))
    document = json.loads(json.dumps(report.to_json(verdict(report)), allow_nan=False))
    assert document["schema_version"] == 3
    assert document["verdict"] == "pass"
    assert document["first_diverging"] is document["first_wrong_operation"] is None
    assert set(document["taps"][0]) == {
        "name",
        "mode",
        "verdict",
        "reason",
        "shape",
        "form",
        "distance",
        "flips",
        "systematic",
    }
    assert set(document["taps"][0]["distance"]["noise"]) == {"tap", "row", "element"}
    assert document["baseline"] is None
    assert document["golden"]["reference"]["name"] == "transformers"
    assert sum(document["counts"].values()) == len(document["taps"])
    assert [layer["experts"] for layer in document["reach"]] == [6, 6, 6, 6]
    assert document["logits"]["top1"] == 1


def test_every_tap_is_explained(plain: Path, golden: Path, tmp_path: Path) -> None:
    healthy = run_parity(plain, golden, ParityOptions(layers=[3]))
    for tap in healthy.taps:
        assert tap.name in why(tap, healthy)
        assert "the noise floor over the whole tap (12 allowed)" in why(tap, healthy) or "what the golden chose" in why(
            tap, healthy
        )
    faulty = run_parity(
        planted(plain, tmp_path / "orbax", "layers.3.ffn.gate.bias", np.zeros_like), golden, ParityOptions(layers=[3])
    )
    words = {tap.short: why(tap, faulty) for tap in faulty.taps if tap.verdict is Verdict.FAIL}
    assert "300 of 300 rows are beyond a limit; rounding does not explain that." in words["ffn.gate.scores"]
    assert "tokens choose otherwise, beyond any tie" in words["ffn.gate.experts"]
    assert "6 times may be a tie" in words["ffn.gate.experts"]


@pytest.mark.parametrize("modes", [(Mode.ISOLATED,), MODES])
def test_from_the_published_shards_it_is_the_same(
    plain: Path, tiny: Path, golden: Path, modes: tuple[Mode, ...]
) -> None:
    """Before it is converted: the same results to the last digit, and only the layers that run have to be there."""
    converted, published = (
        run_parity(plain, golden, ParityOptions(modes=modes)),
        run_parity(None, golden, ParityOptions(modes=modes), source=tiny),
    )
    assert published.taps == converted.taps
    assert published.error_splits == converted.error_splits
    assert published.logits == converted.logits
    assert published.checkpoint["storage"] == "published"
    one = run_parity(None, golden, ParityOptions(layers=[2], modes=modes), source=tiny)
    assert one.passed
    with pytest.raises(UsageError, match="expected a converted CHECKPOINT, or --source"):
        run_parity(None, golden)
    with pytest.raises(UsageError, match="expected a converted CHECKPOINT, or --source"):
        run_parity(plain, golden, source=tiny)


def test_streamed_it_is_the_same_as_with_everything_in_memory(plain: Path, golden: Path) -> None:
    """To the last digit: layer by layer and expert by expert from the disk, or all weights at hand."""
    weights = Weights.open(plain)
    held = Held(weights.config, {path: weights.read(path) for path, _, _ in parameters(weights.config)})
    streamed, resident = (
        run_parity(plain, golden, ParityOptions(modes=MODES)),
        ParityRun(held, open_golden(golden), ParityOptions(modes=MODES)).run(),
    )
    assert streamed.taps == resident.taps
    assert streamed.error_splits == resident.error_splits
    assert streamed.logits == resident.logits


def test_the_whole_model_as_one_program_agrees_as_well(plain: Path, golden: Path) -> None:
    """Compiled in one piece with stacked experts, which sums in another order: every tap within the noise."""
    recorded = open_golden(golden)
    comparison = Comparison(recorded, "float32")
    model = restore_model(Weights.open(plain))
    choices = {str(key): jnp.asarray(recorded.read(key)) for key in recorded.keys if key.tap.values is Values.CHOICE}

    @jax.jit
    def run_whole(tokens: jax.Array) -> dict[str, jax.Array]:
        taps = Taps(lambda _: True, choices)
        model(tokens, taps=taps)
        return taps.values

    values = run_whole(jnp.asarray(recorded.tokens))
    activations = {TapKey.parse(name): np.asarray(value) for name, value in values.items()}
    results = comparison.judge(activations, Mode.CUMULATIVE, recorded.keys)
    assert [result.key for result in results] == list(recorded.keys)
    assert {result.verdict for result in results} == {Verdict.PASS}


def test_a_head_in_pieces_gives_the_same_logits(plain: Path, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4_convert.parity import forward

    whole = run_parity(plain, golden, ParityOptions(taps=["logits", "hc_head*", "norm"]))
    monkeypatch.setattr(forward, "HEAD_WORDS", 40)  # of 96: two whole pieces and a shorter one
    pieces = run_parity(plain, golden, ParityOptions(taps=["logits", "hc_head*", "norm"]))
    assert pieces.passed
    assert [tap.name for tap in pieces.taps] == [tap.name for tap in whole.taps]
    assert pieces.logits is not None
    assert pieces.logits.top1 == 1


def test_a_dtype_that_the_golden_has_no_noise_of_is_refused(plain: Path, golden: Path) -> None:
    with pytest.raises(UsageError, match="--dtype float16: expected one of float32, bfloat16"):
        run_parity(plain, golden, ParityOptions(dtype="float16"))
    with pytest.raises(UsageError, match="no mode"):
        run_parity(plain, golden, ParityOptions(modes=()))


def _golden_with_equal_scores(golden: Path, where: Path) -> tuple[Path, str, int]:
    """A copy of the golden in which one query of layer 3 has chosen the runner-up, whose score is the same.

    As if the reference broke the tie the other way. Returns the golden, the tap and the query.
    """
    from safetensors.numpy import load_file, save_file

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
    prompt = manifest.request.prompt_digest
    entries: dict[str, StoredTap] = {
        tap: dataclasses.replace(entry, sha256=digest(arrays[tap], prompt)) if tap in arrays else entry
        for tap, entry in manifest.taps.items()
    }
    changed = GoldenManifest(request=manifest.request, taps=entries, aliases=manifest.aliases)
    (where / "manifest.json").write_bytes(changed.to_bytes())
    return where, name, query


def test_a_tie_is_reported_and_followed(plain: Path, golden: Path, tmp_path: Path) -> None:
    """Our choice differs where the golden's scores are equal: a tie; what comes after it uses the golden's choice."""
    tied, name, query = _golden_with_equal_scores(golden, tmp_path / "golden")
    report = run_parity(plain, tied, ParityOptions(taps=[name, "layers.3.attn.context"]))
    verdicts = {tap.name: tap for tap in report.taps}
    assert verdicts[name].verdict is Verdict.TIE
    assert verdicts[name].flips is not None
    assert verdicts[name].flips.worst == (0, query)
    # The golden's context is still that of the old choice, so following the new one has to show in that query alone.
    context = verdicts["layers.3.attn.context"]
    assert context.verdict is Verdict.FAIL
    assert context.distance is not None
    assert context.distance.worst[:2] == (0, query)
    assert context.distance.rows_outside == 1
    assert run_parity(plain, golden, ParityOptions(taps=["layers.3.attn.context"])).passed

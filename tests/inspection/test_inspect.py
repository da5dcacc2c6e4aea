"""The output of inspect for releases, folders, repositories, conversions and goldens, whole and damaged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from dsv4_convert.checkpoint.header import stored_nbytes
from dsv4_convert.convert import Advance, ConversionOptions, Storage, hf_to_orbax
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.archive import open_golden
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.inspection import Inspection, ModelPart, Totals, What, inspect
from dsv4_convert.inspection.parts import PARTS, count_published, part_of
from dsv4_convert.inspection.recorded import inspect_golden
from dsv4_convert.inspection.strip import legend, strip
from dsv4_convert.spec.architectures import ARCHITECTURES
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Stored
from dsv4_convert.spec.names import Dialect, Section
from dsv4_convert.spec.v4.names import NAMES
from dsv4_convert.store.export_state import Written, write_export_state

from ..checkpoint.hub_server import LoopbackHub

DATA = Path(__file__).parents[1] / "data"
GOLDEN = Path(__file__).parents[2] / "golden" / "data" / "tiny"
SHARD = "model-{:05d}-of-00007.safetensors"
#: The model cards: parameters in all and for one token, in billions.
PUBLISHED = {"DeepSeek-V4-Flash": (284, 13), "DeepSeek-V4-Flash-0731": (284, 13), "DeepSeek-V4-Pro": (1573, 49)}


def listing(release: str) -> dict[str, Any]:
    return dict(json.loads((DATA / "inventory" / f"{release}.json").read_text()))


def inventory(release: str) -> tuple[dict[str, Stored], dict[str, Any]]:
    document = listing(release)
    stored = {
        name.replace("{e}", str(expert)): Stored(dtype, tuple(shape))
        for name, (dtype, shape) in document["tensors"].items()
        for expert in range(document["n_experts"] if "{e}" in name else 1)
    }
    return stored, document["summary"]


def config_of(release: str) -> Config:
    return Config.from_file(DATA / "configs" / f"{release}.json")


def test_every_parameter_has_one_part() -> None:
    paths = [path for part in PARTS.values() for path in part]
    assert len(paths) == len(set(paths))
    rules = [rule for known in ARCHITECTURES for rule in known.names.rules]
    own = {rule.path.removeprefix("layers.{}.") for rule in rules if rule.section in (Section.MODEL, Section.LAYERS)}
    assert set(paths) == own
    assert set(map(part_of, rules)) == set(ModelPart) - {ModelPart.UNKNOWN}


@pytest.mark.parametrize("release", PUBLISHED)
def test_totals_are_those_of_the_model_card(release: str) -> None:
    totals = Totals.of(config_of(release))
    assert (round(totals.total / 1e9), round(totals.active / 1e9)) == PUBLISHED[release]
    # The total of the repository's own listing, which does not count the router's bias.
    config = config_of(release)
    routers = sum(not hashed for hashed in config.hash_routed) + config.num_mtp_stages
    assert (
        totals.total + totals.mtp == listing(release)["summary"]["logical_params"] + routers * config.n_routed_experts
    )


@pytest.mark.parametrize("release", ["DeepSeek-V4-Flash-Base", "DeepSeek-V4-Flash-0731"])
def test_a_release_is_counted_to_the_last_byte(release: str) -> None:
    stored, summary = inventory(release)
    nbytes = {name: stored_nbytes(tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    rows = count_published(stored, nbytes, NAMES, Dialect.PUBLISHED)
    assert sum(row.nbytes for row in rows) == summary["bytes"]
    tensors: Counter[str] = Counter()
    for row in rows:
        tensors[row.dtype] += row.tensors
    assert tensors == summary["dtypes"]
    parts = {row.part for row in rows}
    assert ModelPart.UNKNOWN not in parts
    assert ModelPart.DRAFTS in parts
    totals = Totals.of(config_of(release))
    assert sum(row.parameters for row in rows) == totals.total + totals.mtp
    scales = [row for row in rows if row.dtype == "F8_E8M0"]
    assert not any(row.parameters for row in scales)


@pytest.mark.parametrize(
    ("release", "width"), [("DeepSeek-V4-Flash", 80), ("DeepSeek-V4-Pro", 50), ("DeepSeek-V4-Flash-0731", 80)]
)
def test_the_strip_is_the_published_schedule(release: str, width: int) -> None:
    raw = json.loads((DATA / "configs" / f"{release}.json").read_text())
    config = config_of(release)
    lines = [line.plain for line in strip(config, layers=None, width=width)]
    assert max(map(len, lines)) <= width
    rows = {
        title: "".join(line.removeprefix(title).replace(" ", "") for line in lines if line.startswith(title))
        for title in ("attention", "routing")
    }
    layers = raw["num_hidden_layers"]
    letters = "".join({0: "S", 4: "C", 128: "H"}[ratio] for ratio in raw["compress_ratios"][:layers])
    stages = "DDD" if "dspark_block_size" in raw else "M"
    assert rows["attention"] == letters + stages
    assert rows["routing"] == "#" * raw["num_hash_layers"] + "-" * (layers - raw["num_hash_layers"] + len(stages))
    assert [line.split()[1] for line in legend(config, layers=None)][-3:] == [
        str(raw["num_hash_layers"]),
        str(layers - raw["num_hash_layers"]),
        str(len(stages)),
    ]


def test_the_strip_of_v41_shows_who_makes_what_for_whom() -> None:
    raw = json.loads((DATA / "configs" / "DeepSeek-V4.1-Flash.from_third_party_test.json").read_text())["text_config"]
    config = config_of("DeepSeek-V4.1-Flash.from_third_party_test")
    lines = [line.plain.split() for line in strip(config, layers=None, width=80)]
    rows = {title: "".join(groups) for title, *groups in lines}
    assert (
        rows["attention"] == "".join({0: "S", 2: "P", 1: "T"}[ratio] for ratio in raw["compress_ratios"][:40]) + "DDD"
    )
    marks = dict.fromkeys(raw["index_source_layer_ids"], "I") | dict.fromkeys(raw["kv_source_layer_ids"], "K")
    assert rows["makes"] == "".join(marks.get(layer, "-") for layer in range(43))
    assert rows["engram"] == "".join("E" if layer in raw["engram_layer_ids"] else "-" for layer in range(43))
    counts = [line.split()[:2] for line in legend(config, layers=None)]
    assert counts[:3] == [["S", "2"], ["P", "18"], ["T", "20"]]
    assert counts[-1] == ["D", "3"]


def test_layers_that_are_not_there_are_in_lower_case() -> None:
    (layers, attention, _) = strip(Config.from_hf(tiny_config()), layers=(1, 2), width=80)
    assert attention.plain.split()[1] == "sCHc"
    assert layers.plain.split() == ["layer", "0", "mtp"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "hf"
    write_checkpoint(folder, tiny_config(), seed=0)
    return folder


@pytest.fixture
def hf(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "hf"))


def _edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def _unknown_field(folder: Path) -> None:
    _edit(folder / "config.json", lambda config: config.update(rope_interleaved=True))


def _another_expert_dtype(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["expert_dtype"] = "fp8"
        config["quantization_config"].pop("expert_dtype", None)

    _edit(folder / "config.json", change)


def _fewer_layers(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["num_hidden_layers"] = 3
        config["compress_ratios"] = config["compress_ratios"][:3]
        config["num_nextn_predict_layers"] = 1

    _edit(folder / "config.json", change)


def _cut_off(folder: Path) -> None:
    shard = folder / SHARD.format(3)
    shard.write_bytes(shard.read_bytes()[:-8])


def _extra(folder: Path) -> None:
    shutil.copy(folder / SHARD.format(3), folder / "model-again.safetensors")


FAULTS: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "unknown field": (_unknown_field, "rope_interleaved: unknown field"),
    "dtype of experts": (_another_expert_dtype, "config.json declares fp8 experts, found I8"),
    "fewer layers": (_fewer_layers, "layers.3.attn.attn_sink: the config has only 3 layers"),
    "cut off": (_cut_off, f"{SHARD.format(3)}: truncated"),
    "beside the index": (_extra, "model-again.safetensors"),
    "partly downloaded": (lambda folder: (folder / SHARD.format(4)).unlink(), "layers that are: 0-1, 3"),
}


def test_a_healthy_folder_has_nothing_odd(whole: Path) -> None:
    found = inspect(str(whole))
    assert (found.what, found.odd, found.layers) == (What.CHECKPOINT, (), None)
    assert found.facts["stored"].startswith("7 shards")
    assert sum(row.tensors for row in found.rows) == 367


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_odd_in_a_folder_is_named(hf: Path, name: str) -> None:
    damage, said = FAULTS[name]
    damage(hf)
    found = inspect(str(hf))
    assert found.what is What.CHECKPOINT
    assert any(said in problem for problem in found.odd), found.odd
    assert found.rows


def test_a_config_alone_and_what_is_none_of_these(hf: Path, tmp_path: Path) -> None:
    found = inspect(str(hf / "config.json"))
    assert (found.what, found.rows) == (What.CONFIG, ())
    for shard in hf.glob("*.safetensors*"):
        shard.unlink()
    assert inspect(str(hf)).what is What.CONFIG
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"Looked for, and not found: dsv4_manifest\.json"):
        inspect(str(tmp_path / "empty"))
    with pytest.raises(BadInput, match="no such folder, and not a repository"):
        inspect(str(tmp_path / "absent" / "from" / "here"))
    (tmp_path / "empty" / "_CHECKPOINT_METADATA").touch()
    with pytest.raises(BadInput, match=r"an Orbax checkpoint .* not one that dsv4 wrote"):
        inspect(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="--revision main means nothing"):
        inspect(str(hf), revision="main")


def test_a_repository_is_known_by_its_headers(hub: LoopbackHub, whole: Path, tmp_path: Path) -> None:
    hub.add("org/tiny", "3" * 40, {file.name: file.read_bytes() for file in whole.iterdir()})
    found, local = inspect("org/tiny"), inspect(str(whole))
    assert found.what is What.REPOSITORY
    assert (found.rows, found.odd) == (local.rows, ())
    assert (found.facts["repository"], found.facts["revision"]) == ("org/tiny", "3" * 40)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert all(request.range for request in hub.requests if "/cdn/" in request.path)


@pytest.fixture(scope="module")
def converted(whole: Path) -> Path:
    hf_to_orbax(whole, whole.parent / "orbax", storage=Storage.SOURCE, layers=[1, 2])
    return whole.parent / "orbax"


def test_a_conversion_has_the_parts_of_its_source(whole: Path, converted: Path) -> None:
    found = inspect(str(converted))
    assert (found.what, found.layers) == (What.CONVERTED, (1, 2))
    assert [problem for problem in found.odd if "layer that was not asked for" not in problem] == []

    def sizes(rows: Inspection) -> dict[ModelPart, tuple[int, int]]:
        parts: dict[ModelPart, tuple[int, int]] = {}
        for row in rows.rows:
            parameters, nbytes = parts.get(row.part, (0, 0))
            parts[row.part] = (parameters + row.parameters, nbytes + row.nbytes)
        return parts

    source = inspect(str(whole))
    ours, theirs = sizes(found), sizes(source)
    # Two of four layers are there, everything outside the layers, and no stage.
    assert ours[ModelPart.ROUTED] == tuple(number // 2 for number in theirs[ModelPart.ROUTED])
    assert ours[ModelPart.HEAD] == theirs[ModelPart.HEAD]
    assert ModelPart.DRAFTS not in ours


@pytest.mark.usefixtures("bucket")
def test_things_in_a_bucket(whole: Path, converted: Path) -> None:
    files = fsspec.filesystem("gcs")
    for name, folder in (("hf", whole), ("orbax", converted), ("golden", GOLDEN)):
        for file in folder.rglob("*"):
            if file.is_file():
                files.pipe(f"/bucket/{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    for name, folder, what in (
        ("hf", whole, What.CHECKPOINT),
        ("orbax", converted, What.CONVERTED),
        ("golden", GOLDEN, What.GOLDEN),
    ):
        found, local = inspect(f"gs://bucket/{name}"), inspect(str(folder))
        assert found.what is what
        assert (found.rows, found.config, found.arrays) == (local.rows, local.config, local.arrays)


def test_what_is_odd_in_a_conversion_is_named(converted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "orbax"))
    chunk = folder / "layers.2.attn.wq_b.weight" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (folder / "notes.txt").touch()
    shutil.rmtree(folder / "norm")
    odd = "\n".join(inspect(str(folder)).odd)
    assert "layers.2.attn.wq_b.weight: 1 chunks are missing or of another size, such as 0.0" in odd
    assert "notes.txt: in the folder, but not in the manifest" in odd
    assert "norm: in the manifest, but not in the folder" in odd


def test_an_interrupted_conversion_says_how_far_it_is(whole: Path, tmp_path: Path) -> None:
    def stop(now: Advance) -> None:
        if now.written > now.to_write // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_to_orbax(
            whole, tmp_path / "orbax", storage=Storage.SOURCE, options=ConversionOptions(workers=1), progress=stop
        )
    # By the name of the destination, which is not there, and by that of the folder that is.
    found = inspect(str(tmp_path / "orbax"))
    assert found.what is What.CONVERTING
    assert found == dataclasses.replace(inspect(str(tmp_path / "orbax.dsv4-partial")), place=found.place)
    done, _, chunks, *_ = found.facts["stored"].split()
    assert 0 < int(done) < int(chunks)
    assert found.facts["source"] == "hf"


def test_a_golden_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = inspect(str(GOLDEN))
    assert (found.what, found.odd, found.layers) == (What.GOLDEN, (), None)
    assert found.facts["tokens"] == "300"
    golden = open_golden(GOLDEN)
    assert sum(found.arrays.values()) == golden.nbytes
    golden.manifest = dataclasses.replace(
        golden.manifest, request=dataclasses.replace(golden.manifest.request, noise=("bfloat16",))
    )
    golden.tokens, golden.layers = np.repeat(golden.tokens[:, :3], 2, axis=0), (0, 1)
    monkeypatch.setattr(golden, "read", lambda name: np.zeros((2, 3, 2), np.int32))
    found = inspect_golden(golden, place="golden", known_by="", say=lambda _: None)
    odd = "\n".join(found.odd)
    assert (found.layers, found.facts["tokens"]) == ((0, 1), "2 x 3")
    assert "no noise floor of float32" in odd
    assert "layer 0: the window of 16 tokens never drops one" in odd
    assert "layer 1: no block of 4 tokens is complete" in odd
    assert "layer 1: 5 of 6 experts are reached by no token" in odd


def test_an_unfinished_recording_is_known(tmp_path: Path) -> None:
    partial = tmp_path / "golden.dsv4-partial"
    partial.mkdir()
    request = open_golden(GOLDEN).manifest.request.to_json()
    (partial / "request.json").write_text(json.dumps(request))
    shutil.copy(GOLDEN / "layer-00000.safetensors", partial)
    found = inspect(str(tmp_path / "golden"))
    assert (found.what, found.layers, found.facts["stored"]) == (What.RECORDING, (0,), "1 of 4 layers")


def test_an_unfinished_export_is_known(tmp_path: Path) -> None:
    partial = tmp_path / "again.dsv4-partial"
    (partial / "commit").mkdir(parents=True)
    (partial / "commit" / "a.safetensors").write_bytes(b"xyz")
    written = {name: Written(1, {}) for name in ("a.safetensors", "b.safetensors")}
    write_export_state(partial / "export.json", {"manifest": "0" * 64, "requantize": True}, written)
    found = inspect(str(tmp_path / "again"))
    assert (found.what, found.known_by) == (What.EXPORTING, "export.json")
    assert found.facts["stored"] == "finished shards: 1, 3 B"


def test_where_one_is_can_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``.`` is a folder like any other, although it has no name."""
    partial = tmp_path / "x.dsv4-partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text('{"fingerprint.layout": "dsv4", "fingerprint.storage": "bfloat16"}\n')
    monkeypatch.chdir(partial)
    assert f"{tmp_path / 'x'} is not complete" in inspect(".").odd[0]
    with pytest.raises(BadInput, match=r"no manifest\.json"):
        open_golden(Path())

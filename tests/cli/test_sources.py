"""A published checkpoint by a folder, a repository or a bucket, in every command that takes one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

import dsv4_convert.golden as golden_package
from dsv4_convert.checkpoint import open_checkpoint
from dsv4_convert.checkpoint.locate import open_source
from dsv4_convert.cli import app
from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import open_golden
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

from ..checkpoint.hub_server import LoopbackHub

REPO, COMMIT = "org/tiny", "3" * 40
GOLDEN = Path(golden_package.__file__).parent / "data" / "tiny"
TENSOR = "layers.1.attn.wq_a.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the committed golden was recorded from."""
    folder = tmp_path_factory.mktemp("sources") / "hf"
    write_checkpoint(folder, tiny_config(), seed=0)
    return folder


@pytest.fixture(scope="module")
def converted(tiny: Path) -> Path:
    hf_to_orbax(tiny, tiny.parent / "orbax")
    return tiny.parent / "orbax"


@pytest.fixture(scope="module")
def wrong(tiny: Path) -> Path:
    """A conversion of the same checkpoint with one tensor changed."""
    folder = tiny.parent / "wrong"
    write_checkpoint(folder, tiny_config(), seed=0)
    with open_checkpoint(folder) as checkpoint:
        info = checkpoint.tensors[TENSOR]
    content = bytearray(info.file.read_bytes())
    content[info.start : info.end] = bytes(info.nbytes)
    info.file.write_bytes(content)
    hf_to_orbax(folder, tiny.parent / "wrong-orbax")
    return tiny.parent / "wrong-orbax"


@pytest.fixture
def served(hub: LoopbackHub, tiny: Path, bucket: dict[str, object]) -> Iterator[LoopbackHub]:
    """The checkpoint on the Hub, and in a bucket."""
    files = fsspec.filesystem("gcs")
    for file in tiny.iterdir():
        files.pipe(f"/bucket/hf/{file.name}", file.read_bytes())
    hub.add(REPO, COMMIT, {file.name: file.read_bytes() for file in tiny.iterdir()})
    hub.branches[REPO]["v1"] = COMMIT
    return hub


SOURCES = (REPO, f"{REPO}@v1", "gs://bucket/hf")


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("source", SOURCES)
def test_parity_of_a_source_that_is_not_here(served: LoopbackHub, source: str, tiny: Path) -> None:
    words = ("--golden", GOLDEN, "--layer", "1", "--json", "-")
    assert '"verdict": "pass"' in run("parity", "--source", source, *words)
    fetched = {name for name in served.fetched() if name.endswith(".safetensors")}
    assert len(fetched) < len(list(tiny.glob("*.safetensors")))  # those of other layers stay where they are
    assert bool(fetched) == (not source.startswith("gs://"))


@pytest.mark.parametrize("source", SOURCES)
def test_parity_against_a_source_that_is_not_here_names_the_tensor(
    served: LoopbackHub, source: str, wrong: Path
) -> None:
    out = run("parity", wrong, "--golden", GOLDEN, "--layer", "1", "--against", source, "-v", code=1)
    assert TENSOR in out


@pytest.mark.parametrize("source", SOURCES)
def test_verify_against_a_source_that_is_not_here(
    served: LoopbackHub, source: str, converted: Path, wrong: Path
) -> None:
    assert f"as {source} gives it" in " ".join(run("verify", converted, "--against", source).split())
    assert f"not what {TENSOR}" in " ".join(run("verify", wrong, "--against", source, code=1).split())


@pytest.mark.parametrize("source", SOURCES)
def test_diff_with_a_source_that_is_not_here(
    served: LoopbackHub, source: str, tiny: Path, converted: Path, wrong: Path
) -> None:
    run("diff", source, converted, "--layers", "1")
    assert "layers.1.attn.wq_a" in run("diff", wrong, source, "--layers", "1", code=1)


def test_verify_of_some_layers_fetches_their_shards_only(served: LoopbackHub, tiny: Path, tmp_path: Path) -> None:
    hf_to_orbax(tiny, tmp_path / "orbax", layers=[1])
    run("verify", tmp_path / "orbax", "--against", REPO)
    assert 0 < len({name for name in served.fetched() if name.endswith(".safetensors")}) < 7


@pytest.mark.parametrize("source", SOURCES)
def test_recording_reads_a_source_that_is_not_here(
    served: LoopbackHub, source: str, tiny: Path, tmp_path: Path
) -> None:
    words = ("--tokens", "1,2,3", "--layers", "0", "--noise", "float32")
    run("golden", "record", source, "--out", tmp_path / "there", *words)
    run("golden", "record", tiny, "--out", tmp_path / "here", *words)
    there, here = open_golden(tmp_path / "there"), open_golden(tmp_path / "here")
    assert there.manifest.taps == here.manifest.taps
    recorded = there.manifest.request.source
    assert recorded.name == source.removesuffix("@v1")
    assert recorded.revision == (None if source.startswith("gs://") else COMMIT)
    assert recorded.files == here.manifest.request.source.files


def test_inspection_and_conversion_take_a_revision_with_the_name(served: LoopbackHub, tmp_path: Path) -> None:
    assert COMMIT in run("inspect", f"{REPO}@v1")
    run("convert", "hf-to-orbax", f"{REPO}@v1", tmp_path / "orbax", "--layers", "0")
    assert "no revision 'v9'" in run("inspect", f"{REPO}@v9", code=3)
    assert "names its revision already" in run("inspect", f"{REPO}@v1", "--revision", "main", code=2)


def test_what_has_no_revision(tiny: Path) -> None:
    for source in (tiny, "gs://bucket/hf"):
        with pytest.raises(UsageError, match=r"is (a local folder|not a repository).*leave it out"):
            open_source(source, revision="main")


def test_nothing_stays_of_a_bucket(
    served: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: Path
) -> None:
    import tempfile

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    run("parity", "--source", "gs://bucket/hf", "--golden", GOLDEN, "--layer", "1")
    run("verify", converted, "--against", "gs://bucket/hf")
    assert not list((tmp_path / "scratch").iterdir())


def test_a_converted_checkpoint_in_a_bucket(tiny: Path, tmp_path: Path, bucket: dict[str, object]) -> None:
    url = "gs://bucket/converted"
    hf_to_orbax(tiny, url)
    run("parity", url, "--golden", GOLDEN, "--layer", "0", "--program", "streamed")
    run("convert", "orbax-to-hf", url, tmp_path / "back")
    assert open_checkpoint(tmp_path / "back").tensors
    run("diff", tiny, url, "--layers", "0")
    assert run("generate", url, "--tokens", "1,2,3", "-n", "2").strip()

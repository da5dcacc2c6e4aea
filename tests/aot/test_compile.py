"""Programs for slices that are not there: their shardings without libtpu, and the whole command with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from dsv4_convert.aot.program import Job, argument_bytes, first_layers, lowered, prompts_of
from dsv4_convert.aot.search import usual_mesh
from dsv4_convert.cli import app
from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.golden.synthetic import tiny_config, tiny_v41_config, write_checkpoint
from dsv4_convert.model.mesh import make_mesh
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import parameters

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
FLASH = CONFIGS / "DeepSeek-V4-Flash.json"
V41 = CONFIGS / "DeepSeek-V4.1-Flash.from_third_party_test.json"


@pytest.fixture
def flash() -> Config:
    return Config.from_file(FLASH)


def one_device(**sizes: int) -> jax.sharding.Mesh:
    return make_mesh(dict.fromkeys(sizes, 1), jax.devices()[:1])


def test_without_its_compiler_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental import topologies

    def absent(*args: object, **options: object) -> None:
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    done = CliRunner().invoke(app, ["compile", "--config", str(FLASH), "--topology", "v5p-8"])
    assert done.exit_code == ResourceError.exit_code
    assert "pip install 'dsv4-convert[tpu]'" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--topology v5p-512, or --find-mesh"),
        (["--topology", "v5p-8", "--find-mesh", "v5p"], "a slice is needed"),
        (["--find-mesh", "v5p", "--layers", "2"], "leave --mesh and --layers out"),
        (["--topology", "v5p-8", "--mesh", "fdsp=4"], "no axis 'fdsp'"),
        (["--topology", "h100-8"], "expected a name such as v5p-512"),
    ],
)
def test_wrong_options_are_named(given: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["compile", "--config", str(FLASH), *given])
    assert done.exit_code == UsageError.exit_code
    assert message in " ".join(done.output.split())


def test_the_usual_mesh_divides_the_releases(flash: Config) -> None:
    pro = Config.from_file(CONFIGS / "DeepSeek-V4-Pro.json")
    assert usual_mesh(flash, 256) == {"fsdp": 8, "expert": 32}
    assert usual_mesh(pro, 64) == {"fsdp": 2, "expert": 32}
    assert usual_mesh(flash, 4) == {"fsdp": 1, "expert": 4}
    assert prompts_of(usual_mesh(flash, 256)) == 256
    with pytest.raises(UsageError, match="devices: no mesh suits them"):
        usual_mesh(flash, 7 * 32)


def test_layers_are_the_first_ones(flash: Config) -> None:
    short = first_layers(flash, 4)
    assert short.attention == flash.attention[:4]
    assert short.num_mtp_stages == 0
    with pytest.raises(UsageError, match="the model has 43"):
        first_layers(flash, 44)


def test_arguments_are_weights_and_cache(flash: Config) -> None:
    """All of V4-Flash's published parameters in bfloat16 but for those that stay in float32: 284 B, 569 GB."""
    whole = first_layers(flash, 43)
    job = Job(tokens=4096, batch=2)
    expected = argument_bytes(whole, one_device(data=1), job)
    assert 568e9 < expected < 570e9
    step = Job(tokens=4096, batch=2, decode=True)
    entries = 20 * (4096 // 128) * 512 + 21 * (4096 // 4) * (512 + 128)
    window = 43 * 127 * 512
    pending = 20 * 2 * 127 * 512 + 21 * 2 * 7 * 2 * (512 + 128)
    assert argument_bytes(whole, one_device(data=1), step) - expected == 2 * (2 * (entries + window + pending) + 8)


def test_arguments_of_v41_are_its_parameters_and_token_maps() -> None:
    """The names table counts them, but for the router's bias for images, which is not computed."""
    config = first_layers(Config.from_file(V41), 40)
    shapes = {path: rule.target_shape(config, layer) for path, rule, layer in parameters(config, range(40))}
    wide = {path for path in shapes if not config.names.rule_of(path).kind.follows_dtype}
    expected = sum(
        math.prod(shape) * (4 if path in wide else 2) for path, shape in shapes.items() if not path.endswith("bias_vl")
    )
    maps = 2 * 4 * config.vocab_size
    found = argument_bytes(config, one_device(data=1), Job(tokens=4096, batch=2))
    assert found == expected + maps
    assert 1.49e12 < found < 1.5e12


@pytest.mark.parametrize("decode", [False, True])
def test_a_program_does_not_grow_with_its_layers(flash: Config, decode: bool) -> None:
    """The program before the compiler: that of 4 layers and of 43 are nearly of a length."""
    job = Job(tokens=256, batch=1, decode=decode)
    lengths = [len(lowered(first_layers(flash, count), one_device(data=1), job).as_text()) for count in (7, 43)]
    assert lengths[1] < 1.02 * lengths[0], lengths


def test_tokens_beyond_the_model_and_sequence_in_decoding_are_refused(flash: Config) -> None:
    with pytest.raises(UsageError, match="max_position_embeddings"):
        lowered(flash, one_device(data=1), Job(tokens=2**21, batch=1))
    apart = SimpleNamespace(shape={"sequence": 2})
    with pytest.raises(UsageError, match="the axis sequence splits the tokens of a prompt"):
        lowered(flash, apart, Job(tokens=16, batch=1, decode=True))  # type: ignore[arg-type]


@pytest.mark.tpu
@pytest.mark.parametrize("options", [["--decode"], ["--weights", "source"]], ids=lambda given: given[-1])
def test_v41_compiles_for_a_slice(tmp_path: Path, options: list[str]) -> None:
    """Two of its layers look up n-grams in tables whose rows four chips share."""
    folder = tmp_path / "hf"
    raw = tiny_v41_config(hidden_size=256, head_dim=128, q_lora_rank=128, moe_intermediate_size=128)
    write_checkpoint(folder, raw, layers=[0], mtp=False)
    given = ["compile", "--config", str(folder), "--topology", "v5e-4", "--mesh", "fsdp=2,expert=2", *options]
    done = CliRunner().invoke(app, [*given, "--tokens", "64", "--json", str(tmp_path / "report.json")])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fits"]
    assert {found["kind"] for found in report["collectives"]} >= {"all-gather", "all-reduce"}


@pytest.mark.tpu
def test_compiled_for_a_slice(tmp_path: Path) -> None:
    """A small model for four chips of v5e, by the command: bytes of arguments are what the shardings say."""
    from dsv4_convert.aot import Slice

    raw = tiny_config(hidden_size=256, head_dim=128, moe_intermediate_size=128, n_routed_experts=8)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw))
    where = Slice.parse("v5e-4")
    given = ["compile", "--config", str(tmp_path), "--topology", "v5e-4", "--mesh", "fsdp=2,expert=2", "--layers", "2"]
    done = CliRunner().invoke(app, [*given, "--tokens", "64", "--json", str(tmp_path / "report.json")])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fits"]
    assert report["slice"] == {"name": "v5e-4", "layout": "v5e:2x2", "chips": 4, "devices": 4}
    over = make_mesh({"fsdp": 2, "expert": 2}, where.devices())
    config = first_layers(Config.from_file(file), 2)
    least = argument_bytes(config, over, Job(tokens=64, batch=4))
    # On the device arrays are padded to whole tiles.
    assert least <= report["memory"]["arguments"] <= 2 * least
    assert {found["kind"] for found in report["collectives"]} >= {"all-gather", "reduce-scatter"}
    assert report["memory"]["temporaries"] > 0
    assert np.isclose(report["hbm"] / 2**30, 15.75)

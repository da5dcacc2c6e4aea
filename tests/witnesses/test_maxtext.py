"""MaxText 0.2.5 as a witness: its config, its tree, what its loaders read, and its logits.

Run by ``nox -s witnesses``, in an environment with MaxText and without torch; ``-s`` shows the figures that
docs/limits.md quotes.
"""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from dsv4_convert import Weights, restore_model
from dsv4_convert.convert import Layout, Storage, hf_to_orbax
from dsv4_convert.model.rope import frequencies
from dsv4_convert.spec import maxtext, maxtext_config
from dsv4_convert.spec.config import Config
from dsv4_convert.store import open_store

from . import small_models

pytestmark = [pytest.mark.witness, pytest.mark.filterwarnings("ignore")]

DATA = Path(__file__).parents[1] / "data" / "configs"
FLASH, PRO = (Config.from_file(DATA / f"DeepSeek-V4-{name}.json") for name in ("Flash", "Pro"))
SMALL = Config.from_hf(small_models.CONFIGS["release"])

#: Float32 rounding over six layers: largest difference of logits, and largest divergence at a token in nats.
#: Measured: 1.1e-5, and 7e-12.
ROUNDING, SAME = 3e-5, 1e-10

#: Which layout each of the two models is converted to.
LAYOUTS = {"plain": Layout.MAXTEXT, "release": Layout.MAXTEXT_UNSCANNED}


@pytest.fixture(scope="module")
def run() -> Any:
    """MaxText, which is imported only where a test needs it."""
    return importlib.import_module(".maxtext_run", __package__)


def fields(run: Any, *arguments: str) -> dict[str, Any]:
    """MaxText's whole config of a command line, but for how it was told, and for one field of what ran before."""
    found = dict(run.pyconfig.initialize(["", *arguments, *run.ON_A_CPU]).get_keys())
    return {name: found[name] for name in found.keys() - {"override_model_config", "base_config", "dump_hlo_xla_flags"}}


def test_the_printed_line_gives_flash_the_config_that_maxtext_ships(run: Any) -> None:
    line = shlex.split(maxtext_config.command(FLASH, "/somewhere", scanned=True))
    shipped = ("model_name=deepseek4-284b", "attention=dot_product", "load_parameters_path=/somewhere")
    assert fields(run, *line[3:]) == fields(run, *shipped)


@pytest.mark.parametrize("config", [FLASH, PRO], ids=["Flash", "Pro"])
def test_the_file_says_what_the_line_says(run: Any, config: Config, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "deepseek4-284b.yml").write_bytes(maxtext_config.model_file(config, scanned=False))
    (tmp_path / "run.yml").write_text("base_config: base.yml\n")
    settings = ("model_name=deepseek4-284b", "scan_layers=False", "attention=dot_product")
    found = fields(run, str(tmp_path / "run.yml"), *settings)
    assert found == fields(run, *maxtext_config.flags(config, scanned=False))
    assert (found["emb_dim"], found["num_decoder_layers"]) == (config.hidden_size, config.num_hidden_layers)
    assert found["num_experts"] == {FLASH: 256, PRO: 384}[config]


@pytest.mark.parametrize(("config", "scanned"), [(FLASH, True), (PRO, True), (SMALL, True), (SMALL, False)])
def test_the_tree_is_the_one_that_maxtext_makes(run: Any, config: Config, scanned: bool) -> None:
    found = {
        name: (type(leaf).__name__, leaf.shape)
        for name, leaf in run.variables(run.tree(config, scanned=scanned)).items()
    }
    assert found == {
        target.path.removeprefix("params.params."): (target.row.variable or "Param", target.shape)
        for target in maxtext.targets(config, scanned=scanned)
        if target.path.startswith("params.params.")
    }


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Layout], Path]:
    """Each model in dsv4's layout and in one of MaxText's, in float32."""
    work, found = tmp_path_factory.mktemp("witness"), {}
    for name, layout in LAYOUTS.items():
        small_models.write(name, work / name)
        for wanted in (Layout.DSV4, layout):
            found[name, wanted] = work / f"{name}-{wanted}"
            hf_to_orbax(work / name, found[name, wanted], storage=Storage.FLOAT32, layout=wanted)
    return found


@pytest.fixture(scope="module")
def models(run: Any, converted: dict[tuple[str, Layout], Path]) -> dict[str, nnx.Module]:
    """MaxText's, from its ``from_pretrained``; no flag says how the checkpoint is stored."""
    length = small_models.tokens().shape[1]
    return {
        name: run.load(converted[name, layout], scanned=layout is Layout.MAXTEXT, tokens=length)
        for name, layout in LAYOUTS.items()
    }


def assert_filled(found: dict[str, Any], folder: Path) -> None:
    """Every variable is there, with every number of the checkpoint, and none is left at zero."""
    store = open_store(folder)
    inside = {path.removeprefix("params.params.") for path in store.paths if path.startswith("params.params.")}
    assert found.keys() == inside
    for name, leaf in found.items():
        stored = store.read(f"params.params.{name}")
        assert stored.any(), name
        assert np.array_equal(np.asarray(leaf.get_value()), stored), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_from_pretrained_fills_every_variable(
    name: str, run: Any, models: dict[str, nnx.Module], converted: dict[tuple[str, Layout], Path]
) -> None:
    assert_filled(run.variables(nnx.state(models[name])), converted[name, LAYOUTS[name]])


@pytest.mark.parametrize("flag", ["load_parameters_path", "load_full_state_path"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_training_fills_every_variable(
    name: str, flag: str, run: Any, converted: dict[tuple[str, Layout], Path]
) -> None:
    folder = converted[name, LAYOUTS[name]]
    state = run.load_for_training(folder, flag, scanned=LAYOUTS[name] is Layout.MAXTEXT)
    assert_filled(run.variables(state), folder)


@pytest.fixture(scope="module")
def ours(converted: dict[tuple[str, Layout], Path]) -> dict[str, np.ndarray]:
    """Logits of dsv4's model."""
    compute = nnx.jit(lambda model, tokens: model(tokens))
    tokens = small_models.tokens()
    return {
        name: np.asarray(compute(restore_model(Weights.open(converted[name, Layout.DSV4])), tokens)) for name in LAYOUTS
    }


def compared(what: str, found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Largest difference, and the largest divergence of what comes next at a token, in nats; both are printed."""
    p, q = (log_softmax(logits.astype(np.float64), axis=-1) for logits in (expected, found))
    divergence = (np.exp(p) * (p - q)).sum(-1)
    largest = float(np.abs(found - expected).max())
    print(f"\n{what}: max abs {largest:.1e}, KL max {divergence.max():.1e} mean {divergence.mean():.1e}", end="")
    return largest, float(divergence.max())


def test_maxtext_as_it_is_agrees_where_there_is_neither_yarn_nor_a_limit(
    run: Any, models: dict[str, nnx.Module], ours: dict[str, np.ndarray]
) -> None:
    found = run.logits(models["plain"], small_models.tokens())
    for who, expected in (("dsv4", ours["plain"]), ("transformers", small_models.transformers_logits("plain"))):
        largest, divergence = compared(f"MaxText against {who}, plain", found, expected)
        assert largest < ROUNDING
        assert divergence < SAME


def test_maxtext_corrected_agrees_on_what_the_releases_have(
    run: Any, models: dict[str, nnx.Module], ours: dict[str, np.ndarray]
) -> None:
    with run.corrected(SMALL):
        found = run.logits(models["release"], small_models.tokens())
    for who, expected in (("dsv4", ours["release"]), ("transformers", small_models.transformers_logits("release"))):
        largest, divergence = compared(f"MaxText corrected against {who}, release", found, expected)
        assert largest < ROUNDING
        assert divergence < SAME


@pytest.mark.parametrize("lacking", [("yarn",), ("clamp",), ("yarn", "clamp")], ids=" and ".join)
def test_what_the_warning_says_is_true(
    run: Any, models: dict[str, nnx.Module], ours: dict[str, np.ndarray], lacking: tuple[str, ...]
) -> None:
    """A MaxText that passes this no more has been mended: then the warning is wrong."""
    with run.corrected(SMALL, **dict.fromkeys(lacking, False)):
        found = run.logits(models["release"], small_models.tokens())
    _, divergence = compared(f"MaxText that lacks {' and '.join(lacking)}, release", found, ours["release"])
    assert divergence > 1e-2
    assert all(what in maxtext_config.warning(SMALL).lower() for what in lacking)


def test_maxtexts_rotary_frequencies_of_flash_are_those_without_yarn(run: Any) -> None:
    found, released = run.frequencies(FLASH), frequencies(FLASH, compressed=True)
    ratio = found / released
    differing = int((np.abs(ratio - 1) > 1e-3).sum())
    print(f"\n{differing} of {len(ratio)} frequencies of V4-Flash differ, by up to {ratio.max():.1f} times", end="")
    assert differing == 16
    assert ratio.max() == pytest.approx(16, rel=1e-5)

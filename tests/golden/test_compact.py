"""Compact goldens: the sketch against its definition, the size at full width, the same either way."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import Golden, TapForm, open_golden
from dsv4_convert.golden.compact import NUMBERS, Compact
from dsv4_convert.golden.layout import expected_aliases, stored_arrays
from dsv4_convert.golden.noise import RUN_DTYPES, Mode
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.shrink import shrink
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.tap import Values
from dsv4_convert.spec.taps import TapKey

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
TOKENS = np.random.default_rng(2).integers(0, 96, (2, 140)).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    write_checkpoint(folder, tiny_config(), seed=3)
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return record(checkpoint, tmp_path_factory.mktemp("whole") / "golden", RecordingOptions(tokens=TOKENS))


@pytest.fixture(scope="module")
def compact(whole: Golden, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return shrink(whole, tmp_path_factory.mktemp("small") / "golden", Compact.of([0, 129, -1], 140))


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_a_sketch_is_what_it_says(size: int, numbers: int, seed: int, values: int) -> None:
    """Against the definition: the bits of SHAKE-256, most significant first, one sign per element and number."""
    rows = np.random.default_rng(values).standard_normal((1, 3, size)).astype(np.float32)
    found = Compact(positions=(), numbers=numbers, seed=seed).sketch(rows)
    stream = hashlib.shake_256(f"dsv4 compact golden, seed {seed}, rows of {size}".encode())
    bits = "".join(f"{byte:08b}" for byte in stream.digest(size * numbers // 8 + 1))
    for at, row in enumerate(rows[0].tolist()):
        projected = [
            sum(value * (-1 if bits[i * numbers + j] == "1" else 1) for i, value in enumerate(row)) / size**0.5
            for j in range(numbers)
        ]
        rms = (sum(value * value for value in row) / size) ** 0.5
        np.testing.assert_allclose(found[0, at], [rms, *projected], rtol=1e-6, atol=1e-6)


def test_an_error_shows_in_a_sketch_as_large_as_it_is() -> None:
    """Whatever its direction: in one element, in all alike, in one sign pattern."""
    size = 500
    errors = np.zeros((3, size), np.float32)
    errors[0, 17], errors[1], errors[2, ::2] = size**0.5, 1, 2**0.5  # each of rms 1
    base = 100 * np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
    seeds = [Compact(positions=(), seed=seed) for seed in range(200)]
    differences = np.array([form.sketch((base + errors)[None]) - form.sketch(base[None]) for form in seeds])[:, 0]
    np.testing.assert_allclose(np.sqrt(np.mean(differences[..., 1:] ** 2, axis=(0, 2))), 1, rtol=0.05)
    assert (np.abs(differences[..., 0]) <= 1).all(), "the rms errs by no more than the row"


def test_a_nan_stays_one() -> None:
    rows = np.ones((1, 2, 40), np.float32)
    rows[0, 1, 3] = np.nan
    found = Compact(positions=()).sketch(rows)
    assert np.isfinite(found[0, 0]).all()
    assert np.isnan(found[0, 1]).all()


@pytest.mark.parametrize("name", ["DeepSeek-V4-Flash", "DeepSeek-V4-Pro"])
@pytest.mark.parametrize(("tokens", "exact"), [(64, []), (160, [-1]), (256, [-1]), (2048, [0, 1024, -1]), (8192, [-1])])
def test_at_full_width_it_is_one_percent_at_most(name: str, tokens: int, exact: list[int]) -> None:
    config = Config.from_file(CONFIGS / f"{name}.json")
    layers = range(config.num_hidden_layers)

    def nbytes(form: Compact | None) -> int:
        arrays = stored_arrays(config, layers, tuple(RUN_DTYPES), form, batch=1, tokens=tokens)
        aliases = expected_aliases(config, layers, arrays)
        return sum(array.nbytes for stored, array in arrays.items() if stored not in aliases)

    assert nbytes(Compact.of(exact, tokens)) <= 0.01 * nbytes(None)


def test_every_tap_is_there_in_a_smaller_form(whole: Golden, compact: Golden) -> None:
    assert compact.names == whole.names
    assert compact.nbytes < whole.nbytes
    forms = set()
    for name in whole.names:
        array, views = whole.read(name), compact.views(name)
        key = TapKey.parse(name)
        tap, layer = key.tap, key.layer
        forms |= {view.form for view in views}
        assert compact.shape(name) == array.shape
        if tap.values is Values.CHOICE or array[0, 0].size <= 1 + NUMBERS:
            np.testing.assert_array_equal(compact.read(name), array)
        else:
            sketch, *exact = views
            np.testing.assert_array_equal(sketch.values[..., 0], np.float32(_rms(array)))
            block = 1 if tap.shape.split()[1] == "S" else compact.config.ratio(compact.config.attention[layer or 0])
            rows = [at for at in range(array.shape[1]) if any((p + 1) // block - 1 == at for p in (0, 129, 139))]
            assert [view.rows for view in exact] == ([tuple(rows)] if rows else [])
            for view in exact:
                np.testing.assert_array_equal(view.values, array[:, rows])
            with pytest.raises(UsageError, match=f"holds a sketch of {name} and not all of it"):
                compact.read(name)
        for view in views:
            np.testing.assert_array_equal(view.of(array), view.values)
        if tap.values is Values.REAL:
            for dtype in RUN_DTYPES:
                noise = compact.noise(name, dtype, Mode.CUMULATIVE)
                np.testing.assert_array_equal(noise, whole.noise(name, dtype, Mode.CUMULATIVE))
    assert forms == set(TapForm)


def _rms(array: np.ndarray) -> np.ndarray:
    return np.linalg.norm(array.reshape(*array.shape[:2], -1).astype(np.float64), axis=-1) / array[0, 0].size ** 0.5


def test_recorded_and_made_of_a_whole_one_are_the_same(checkpoint: Path, compact: Golden, tmp_path: Path) -> None:
    recorded = record(
        checkpoint, tmp_path / "golden", RecordingOptions(tokens=TOKENS, compact=Compact.of([0, 129, -1], 140))
    )
    assert isinstance(recorded.path, Path)
    assert isinstance(compact.path, Path)
    files = sorted(file.name for file in recorded.path.iterdir())
    assert files == sorted(file.name for file in compact.path.iterdir())
    for file in files:
        assert (recorded.path / file).read_bytes() == (compact.path / file).read_bytes(), file


def test_the_form_is_part_of_the_manifest(compact: Golden, tmp_path: Path) -> None:
    opened = open_golden(compact.path)
    assert opened.compact == Compact(positions=(0, 129, 139))
    assert opened.verify() == []
    with pytest.raises(UsageError, match="compact already"):
        shrink(opened, tmp_path / "again", Compact.of([], 140))


@pytest.mark.parametrize("positions", [[140], [-141], [0, 500]])
def test_positions_are_inside_the_prompt(positions: list[int]) -> None:
    with pytest.raises(UsageError, match="the prompt has 140 tokens, so -140 to 139"):
        Compact.of(positions, 140)


@pytest.mark.parametrize("numbers", [0, 1025])
def test_numbers_are_of_a_sensible_size(numbers: int) -> None:
    with pytest.raises(UsageError, match="expected 1 to 1024"):
        Compact.of([], 140, numbers=numbers)


def test_a_damaged_sketch_is_noticed(whole: Golden, tmp_path: Path) -> None:
    small = shrink(whole, tmp_path / "golden", Compact.of([], 140))
    file = tmp_path / "golden" / "layer-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    (problem,) = small.verify()
    assert "the bytes are not those that were recorded" in problem

"""Parity on many devices and in many processes says what it says on one device."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.errors import UsageError
from dsv4_convert.model.ops import einsum_f32
from dsv4_convert.parity.run import run_parity
from dsv4_convert.platforms import check_platform, select_platform

from ..processes import end, start, together
from .many import OPTIONS, found

#: Expert whose second matrix is another's in the faulty checkpoint.
WRONG = 4


@pytest.fixture(scope="module")
def checkpoints(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo converted, and the same with one expert of layer 3 in the place of another."""
    folder = tmp_path_factory.mktemp("many")
    hf_to_orbax(tiny, folder / "healthy")
    shutil.copytree(folder / "healthy", folder / "faulty")
    stack = folder / "faulty" / "layers.3.ffn.experts.w2"
    shutil.copyfile(stack / "1.0.0", stack / f"{WRONG}.0.0")
    return folder / "healthy", folder / "faulty"


def test_one_process_or_many_say_the_same(checkpoints: tuple[Path, Path], golden: Path, tmp_path: Path) -> None:
    healthy, faulty = (
        json.loads(json.dumps(found(run_parity(checkpoint, golden, OPTIONS)))) for checkpoint in checkpoints
    )
    assert healthy["verdict"] == "pass"
    assert {verdict for *_, verdict in healthy["taps"]} == {"pass"}
    assert faulty["first"] == ["layers.3.ffn.experts"] * 2
    assert faulty["localizations"][0][3] == [WRONG]

    arguments = ["-m", "tests.parity.many", str(tmp_path / "out"), str(golden), *map(str, checkpoints)]
    for processes, devices in ((1, 8), (4, 1)):
        alone = processes == 1
        ended = [end(start([*arguments, "--taps"], devices=devices))] if alone else together(arguments, processes)
        assert [process.code for process in ended] == [0] * processes, ended
        results = [json.loads((tmp_path / f"out.{index}").read_text()) for index in range(processes)]
        for result in results:
            for expected, got in zip((healthy, faulty), result, strict=True):
                assert {key: got[key] for key in expected} == expected, (processes, devices)
                assert got["platform"]["processes"] == processes
                assert got["platform"]["devices"] == math.prod(got["platform"]["mesh"].values()) == processes * devices
        # Six experts, three matrices each; a failing layer runs twice.
        for part, passes in ((0, 1), (1, 2)):
            read = [result[part]["read"] for result in results]
            first = 6 * 3
            assert first <= sum(read) <= passes * first  # a process may still have an expert of the first run
            assert max(read) <= passes * math.ceil(6 / processes) * 3


def _command(golden: Path, *more: str) -> list[str]:
    return ["-m", "dsv4_convert", "parity", "--golden", str(golden), "--layer", "3", *more]


def test_one_process_speaks_and_all_exit_alike(checkpoints: tuple[Path, Path], golden: Path, tmp_path: Path) -> None:
    ended = together(_command(golden, str(checkpoints[1]), "--json", "-", "--mesh", "fsdp=2"), 2)
    assert [process.code for process in ended] == [1, 1], ended
    document: dict[str, Any] = json.loads(ended[0].out)
    assert document["first_wrong_operation"] == "layers.3.ffn.experts"
    named = {program["program"]: program["first_diverging"] for program in document["programs"]}
    assert named == dict.fromkeys(("streamed", "model"), "layers.3.ffn.experts"), "all before it agrees in both"
    assert document["platform"]["mesh"] == {"fsdp": 2}
    assert "FAIL" in ended[0].err
    assert not ended[1].out
    assert "FAIL" not in ended[1].err


def test_a_process_that_fails_ends_all(checkpoints: tuple[Path, Path], golden: Path, tmp_path: Path) -> None:
    """An expert that one process alone reads is gone, in the middle of the run."""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints[0], broken)
    for expert in range(6):
        (broken / "layers.3.ffn.experts.w2" / f"{expert}.0.0").unlink()
    ended = together(_command(golden), 2, own=[[str(checkpoints[0])], [str(broken)]])
    assert [process.code for process in ended] == [3, 3], ended
    assert "process 1 of 2 failed in step 'read layer 3': " in ended[0].err
    assert all("the chunk cannot be read" in process.err for process in ended)
    assert all("Traceback" not in process.err for process in ended)


def test_the_precision_of_products_is_that_asked_for() -> None:
    """It is part of what a compiled program is looked up by: the same function is traced for each."""
    program = jax.jit(lambda a, b: einsum_f32("ij,jk->ik", a, b))
    operands = (jnp.ones((2, 3)), jnp.ones((3, 2)))

    def asked() -> str:
        return str(program.trace(*operands).jaxpr).split("precision=")[1].split("\n")[0].strip("([ ")

    assert asked().lower().startswith("precision.highest") or asked().upper().startswith("HIGHEST")
    with jax.default_matmul_precision("default"):
        assert "HIGH" not in asked().upper()
    with jax.default_matmul_precision("high"):
        assert "HIGHEST" not in asked().upper()
        assert "HIGH" in asked().upper()
    assert "HIGHEST" in asked().upper()


def test_a_platform_that_is_not_there_says_what_it_takes() -> None:
    select_platform(None)
    check_platform(None)
    with pytest.raises(UsageError, match="--platform npu: expected one of cpu, gpu, tpu"):
        select_platform("npu")
    for platform, package in (("tpu", r"jax\[tpu\]"), ("gpu", r"jax\[cuda13\]")):
        ended = end(start(["-m", "dsv4_convert", "generate", "nowhere", "--tokens", "1", "--platform", platform]))
        assert ended.code == 2
        assert f"--platform {platform}: JAX finds no such device" in ended.err.replace("\n", " ")
        assert package.replace("\\", "") in ended.err.replace("\n", " ")

"""Several real processes under ``jax.distributed`` convert one model; the result is that of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.convert.against import compare_with_source
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.store import open_store, verify

from ..processes import Ended, together


def run(source: Path, destination: Path, count: int) -> list[Ended]:
    """``dsv4 convert hf-to-orbax`` in ``count`` processes."""
    return together(["-m", "dsv4_convert", "convert", "hf-to-orbax", str(source), str(destination)], count)


@pytest.mark.parametrize("count", [2, 3])
def test_the_result_of_many_is_that_of_one(tmp_path: Path, count: int) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config())
    hf_to_orbax(tmp_path / "hf", tmp_path / "alone")
    results = run(tmp_path / "hf", tmp_path / "shared", count)
    assert [process.code for process in results] == [0] * count, results
    assert "reads " in results[0].err
    assert "reads " not in results[1].err
    shared, alone = (
        {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (tmp_path / "shared", tmp_path / "alone")
    )
    assert shared == alone
    store = open_store(tmp_path / "shared")
    assert verify(store) == []
    assert compare_with_source(store, tmp_path / "hf") == []


def test_all_refuse_what_one_refuses(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config())
    (tmp_path / "out").mkdir()
    results = run(tmp_path / "hf", tmp_path / "out", 2)
    assert [process.code for process in results] == [2, 2], results
    assert all("exists already" in process.err for process in results)

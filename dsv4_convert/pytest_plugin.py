"""A pytest plugin for implementations of DeepSeek-V4 that are not ours: their activations against our goldens.

::

    def test_layer(dsv4_golden):
        found = my_layer(dsv4_golden.input(3), dsv4_golden.positions)  # arrays by tap name
        dsv4_golden.check(found, layer=3)

with ``pytest --dsv4-golden PATH_OR_URL``. Loaded in every run of pytest where dsv4 is installed, so nothing but pytest
is imported until the fixture is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dsv4_convert.parity.activations import Expected


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("dsv4", "DeepSeek-V4 against a recorded golden")
    group.addoption(
        "--dsv4-golden",
        metavar="PATH_OR_URL",
        help="Golden that the fixture dsv4_golden compares with; without it the tests that use it are skipped.",
    )
    group.addoption(
        "--dsv4-dtype",
        metavar="DTYPE",
        choices=("float32", "bfloat16"),
        help="Dtype of the computation, whose noise floor is the measure; that of the arrays, if not given.",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Show the golden in pytest's header."""
    golden = config.getoption("--dsv4-golden")
    return f"dsv4 golden: {golden}" if golden else None


@pytest.fixture(scope="session")
def dsv4_golden(request: pytest.FixtureRequest) -> Expected:
    """A golden, for testing an implementation: tokens, config, inputs of layers, and ``check(activations)``."""
    where = request.config.getoption("--dsv4-golden")
    if not where:
        pytest.skip("no golden to compare with: run pytest with --dsv4-golden PATH_OR_URL")
    from dsv4_convert.errors import Dsv4Error
    from dsv4_convert.parity.activations import Expected

    try:
        return Expected(where, dtype=request.config.getoption("--dsv4-dtype"))
    except Dsv4Error as error:
        pytest.fail(f"--dsv4-golden: {error}", pytrace=False)

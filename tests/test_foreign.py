"""The pytest plugin, as another project uses it: the worked example of docs/foreign.md, healthy and with a bug."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "golden" / "data" / "tiny"
EXAMPLE = ROOT / "docs" / "examples" / "foreign"
PAGE = ROOT / "docs" / "foreign.md"

#: The bug of the page: the first half of the channels with the second, instead of neighbours.
HALF_SPLIT = (
    ("a, b = turned[..., 0::2], turned[..., 1::2]", "a, b = jnp.split(turned, 2, -1)"),
    ("jnp.stack([a, b], -1).reshape(turned.shape)", "jnp.concatenate([a, b], -1)"),
)


def _pytest(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """pytest in a project that has nothing of ours but the plugin."""
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": str(ROOT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whether dsv4 is installed or not
        "NO_COLOR": "1",
        "COLUMNS": "80",
    }
    command = [sys.executable, "-m", "pytest", "-p", "dsv4_convert.pytest_plugin", "-c", os.devnull, "--rootdir=."]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "-W", "error", *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_example_passes_and_its_bug_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config(), seed=0)
    hf_to_orbax(tmp_path / "hf", tmp_path / "orbax")
    for name in ("healthy", "buggy"):
        shutil.copytree(EXAMPLE, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    page = PAGE.read_text(encoding="utf-8")
    code = (tmp_path / "buggy" / "layer.py").read_text(encoding="utf-8")
    for right, wrong in HALF_SPLIT:
        assert right in code
        assert wrong in page
        code = code.replace(right, wrong)
    (tmp_path / "buggy" / "layer.py").write_text(code, encoding="utf-8")

    ran = _pytest(tmp_path, "healthy", "buggy", "--dsv4-golden", str(GOLDEN), "--junit-xml=out.xml", CHECKPOINT="orbax")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 failed, 1 passed" in ran.stdout
    assert f"dsv4 golden: {GOLDEN}" in ran.stdout
    failures = {case.get("classname"): case.find("failure") for case in ET.parse(tmp_path / "out.xml").iter("testcase")}
    assert failures["healthy.test_layer"] is None
    failure = failures["buggy.test_layer"]
    assert failure is not None
    lines = failure.get("message", "").splitlines()
    assert lines[0].startswith("AssertionError: FAIL: layers.0.attn.q_rope is the first tap that diverges")
    assert lines[0].endswith("; 13 of 19 taps fail")
    assert "parity/activations.py" not in ran.stdout  # the failure is shown where the project calls
    # The page shows the printed output.
    shown = page.split("```console\n$ CHECKPOINT=./orbax pytest", 1)[1].split("```", 1)[0]
    printed = {" ".join(line.split()) for line in ran.stdout.splitlines()}
    quoted = [line for line in shown.splitlines() if line.startswith("E  ")]
    assert len(quoted) > 5
    for line in quoted:
        assert " ".join(line.split()) in printed, line


def test_without_a_golden_tests_are_skipped_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(dsv4_golden):\n    dsv4_golden.check({})\n", encoding="utf-8")
    skipped = _pytest(tmp_path, "-rs")
    assert skipped.returncode == 0
    assert "1 skipped" in skipped.stdout
    assert "run pytest with --dsv4-golden PATH_OR_URL" in " ".join(skipped.stdout.split())
    wrong = _pytest(tmp_path, "--dsv4-golden", "nowhere")
    assert wrong.returncode == 1
    assert "--dsv4-golden: nowhere" in wrong.stdout
    assert "Traceback" not in wrong.stdout
    assert "parity/" not in wrong.stdout

"""What dsv4 stands on: the licence of every package that installing it brings, and their known vulnerabilities.

The licences are those that the installed packages state. pip-audit asks PyPI for the vulnerabilities of every version
in ``constraints.txt``; where PyPI's service cannot be reached, or answers for none of them, that is said, with the way
out, and is no failure.

Run: nox -s audit, or python -m benchmarks.audit
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

#: Licences that ask for no more than a notice, by SPDX name; MPL-2.0 asks for the source of its own files, if changed.
ALLOWED = frozenset(
    {
        "0BSD",
        "Apache-2.0",
        "BSD",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC0-1.0",
        "ISC",
        "MIT",
        "MIT-CMU",
        "MPL-2.0",
        "PSF-2.0",
        "Zlib",
    }
)
#: How packages spelled their licence before SPDX expressions.
_SPELLED = {
    "Apache License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


def licences() -> dict[str, tuple[str, str]]:
    """(version, licence) of every package that dsv4 needs where it is installed here, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [(wanted, extra) for text in project["dependencies"] for wanted, extra in _parts(text)]
    seen: set[tuple[str, str]] = set()
    found: dict[str, tuple[str, str]] = {}
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        package = importlib.metadata.distribution(name)
        found[name] = (package.version, stated_licence(package))
        for text in package.requires or ():
            marker = Requirement(text).marker
            if marker is None or marker.evaluate({"extra": extra}):
                waiting += _parts(text)
    return dict(sorted(found.items()))


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """Name and extra of a requirement; "" is the package without extras."""
    wanted = Requirement(text)
    name = re.sub(r"[-_.]+", "-", wanted.name).lower()
    yield from ((name, extra) for extra in ("", *wanted.extras))


def stated_licence(package: importlib.metadata.Distribution) -> str:
    """SPDX expression where the package has one, otherwise what it says, as SPDX spells it; "" if it says nothing."""

    def lines(field: str) -> list[str]:
        return [line.strip().partition("\n")[0].strip() for line in package.metadata.get_all(field) or ()]

    if expression := lines("License-Expression"):
        return expression[0]
    classifiers = [line.split(" :: ")[-1] for line in lines("Classifier") if line.startswith("License ::")]
    said = classifiers or lines("License")
    return " OR ".join(_SPELLED.get(one, one) for one in said)


def is_allowed(expression: str) -> bool:
    """Whether a licence is a permissive one: of alternatives any, of parts all."""
    return any(
        all(_SPELLED.get(part.strip("() "), part.strip("() ")) in ALLOWED for part in choice.split(" AND "))
        for choice in expression.split(" OR ")
    )


def vulnerabilities() -> tuple[list[str], str | None]:
    """Known vulnerabilities of the pinned versions, one line each; and why they could not be looked up, or None."""
    if find_spec("pip_audit") is None:
        return [], "pip-audit is not installed: run nox -s audit, which installs it"
    command = [sys.executable, "-m", "pip_audit", "-r", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip"]
    done = subprocess.run([*command, "-f", "json"], capture_output=True, text=True, check=False)
    out = "run it where https://pypi.org/pypi/NAME/VERSION/json can be reached"
    if not done.stdout.startswith("{"):
        return [], f"pip-audit gave no answer ({' '.join(done.stderr.split())[-200:]}); {out}"
    packages = json.loads(done.stdout)["dependencies"]
    asked = [package for package in packages if "skip_reason" not in package]
    if not asked:
        return [], f"PyPI's service answered for none of {len(packages)} packages, so this machine has none; {out}"
    print(f"{len(asked)} of {len(packages)} packages looked up")
    lines = [f"{one['name']} {one['version']}: {bad['id']}" for one in asked for bad in one["vulns"]]
    return lines, None


def main() -> None:
    """Print both; exit code 1 for a licence that is not on the list, or a known vulnerability."""
    failures = 0
    for name, (version, licence) in licences().items():
        good = is_allowed(licence)
        failures += not good
        print(f"{name:24} {version:12} {licence}{'' if good else '  <- not on the list'}")
    found, why_not = vulnerabilities()
    for line in found:
        print(f"vulnerable: {line}")
    print(f"vulnerabilities: {len(found) if why_not is None else f'not known: {why_not}'}")
    raise SystemExit(bool(failures or found))


if __name__ == "__main__":
    main()

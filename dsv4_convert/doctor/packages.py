"""Packages: what ``pyproject.toml`` asks for beside what is installed."""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dsv4_convert.doctor.finding import Finding, State

#: The name under which an installer knows dsv4.
DISTRIBUTION = "dsv4-convert"

#: The commands that need each extra of ``pyproject.toml``. The core serves all of them.
EXTRAS: Mapping[str, str] = {
    "frame": "parity --parquet",
    "reference": "golden record",
    "tpu": "compile, --platform tpu",
    "gs": "gs:// URLs",
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What dsv4 asks for: versions of Python, packages of the core and of each extra."""

    python: str
    core: tuple[str, ...]
    extras: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls) -> Asked:
        """Read ``pyproject.toml`` beside the sources, or else the metadata of the installed distribution.

        Raises:
            PackageNotFoundError: there is neither.
        """
        file = Path(__file__).parents[2] / "pyproject.toml"
        if file.is_file():
            project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
            if project["name"] == DISTRIBUTION:
                extras = {name: tuple(lines) for name, lines in project["optional-dependencies"].items()}
                return cls(python=project["requires-python"], core=tuple(project["dependencies"]), extras=extras)
        metadata = importlib.metadata.metadata(DISTRIBUTION)
        lines = tuple(metadata.get_all("Requires-Dist") or ())
        return cls(
            python=metadata["Requires-Python"],
            core=tuple(line for line in lines if _wanted(Requirement(line), "")),
            extras={
                name: tuple(line for line in lines if "extra" in line and _wanted(Requirement(line), name))
                for name in metadata.get_all("Provides-Extra") or ()
            },
        )


def check_packages(asked: Asked, python: str) -> Iterator[Finding]:
    """Findings about Python, the core packages and the extras; each faulty core package has a finding of its own.

    ``python`` is the version that runs.
    """
    fits = SpecifierSet(asked.python).contains(python, prereleases=True)
    yield Finding(
        check="python",
        state=State.OK if fits else State.MISSING,
        found=f"{python}, asked for is {asked.python}",
        way_out=None if fits else f"make an environment with another Python ({asked.python}) and install dsv4 there",
        core=True,
    )
    problems = list(_problems(asked.core))
    if not problems:
        yield Finding(check="packages", state=State.OK, found=f"all {len(asked.core)} in range", core=True)
    for requirement, found in problems:
        yield Finding(
            check=requirement.name,
            state=State.MISSING,
            found=found,
            way_out=f"python -m pip install '{_spelled(requirement)}'",
            core=True,
        )
    for extra, lines in asked.extras.items():
        problems = list(_problems(lines))
        there = ", ".join(
            f"{name} {_version(name)}" for name in dict.fromkeys(Requirement(line).name for line in lines)
        )
        yield Finding(
            check=f"[{extra}]",
            state=State.MISSING if problems else State.OK,
            found="; ".join(f"{requirement.name} {found}" for requirement, found in problems) or there,
            commands=EXTRAS.get(extra, "an extra"),
            way_out=f"python -m pip install '{DISTRIBUTION}[{extra}]'" if problems else None,
        )


def _problems(lines: Iterable[str]) -> Iterator[tuple[Requirement, str]]:
    """The requested packages that are absent or have another version, those of the requested extras included."""
    for line in lines:
        requirement = Requirement(line)
        version = _version(requirement.name)
        if version is None:
            yield requirement, "not installed"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield requirement, f"{version}, asked for is {requirement.specifier}"
        else:
            for extra in requirement.extras:
                needed = map(Requirement, importlib.metadata.requires(requirement.name) or ())
                of_extra = [str(one) for one in needed if _wanted(one, extra) and not _wanted(one, "")]
                yield from _problems(line.partition(";")[0] for line in of_extra)


def _wanted(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _spelled(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"

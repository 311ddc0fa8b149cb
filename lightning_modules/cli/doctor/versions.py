"""Python and the packages, against what the project asks for."""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from lightning_modules.cli.doctor.findings import Finding

_PROJECT = "quintet"
_PYPROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"
_TESTING = "dev"
# Released as one: each torchvision is built for one torch, whose minor version is 15 less.
_VISION_OFFSET = 15


class ProjectNeeds(NamedTuple):
    """What the project asks for.

    Attributes:
        python: Versions of Python.
        packages: Packages that every run needs.
        extras: Those of each optional part, by its name.
    """

    python: SpecifierSet
    packages: list[Requirement]
    extras: dict[str, list[Requirement]]


def read_needs(pyproject: Path = _PYPROJECT) -> ProjectNeeds | None:
    """Read them from pyproject.toml, or from the installed package; None if neither is there.

    An editable installation records the needs of the day on which it was made.
    """
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {})
        return ProjectNeeds(
            SpecifierSet(project["requires-python"]),
            [Requirement(line) for line in project["dependencies"]],
            {name: [Requirement(line) for line in lines] for name, lines in extras.items()},
        )
    try:
        metadata = importlib.metadata.metadata(_PROJECT)
    except importlib.metadata.PackageNotFoundError:
        return None
    listed = [Requirement(line) for line in importlib.metadata.requires(_PROJECT) or []]
    optional = metadata.get_all("Provides-Extra") or []
    return ProjectNeeds(
        SpecifierSet(metadata["Requires-Python"] or ""),
        [requirement for requirement in listed if requirement.marker is None],
        {
            name: [r for r in listed if r.marker is not None and r.marker.evaluate({"extra": name})]
            for name in optional
        },
    )


def examine_versions(needs: ProjectNeeds | None) -> Iterator[Finding]:
    """Findings on Python, on the packages and on the optional parts."""
    if needs is None:
        problem = "Quintet is not installed and its pyproject.toml is not beside train.py"
        yield Finding("warn", "packages", f"{problem}; versions are not checked: pip install -e .")
        return
    yield _examine_python(needs.python)
    wrong = [line for line in map(_mismatch, needs.packages) if line]
    for line in wrong:
        yield Finding("fail", "packages", f"{line}; pip install -e .")
    if not wrong:
        shown = ("torch", "torchvision", "lightning", "jsonargparse")
        versions = ", ".join(f"{name} {_installed(name)}" for name in shown)
        yield Finding("ok", "packages", f"{len(needs.packages)} as required: {versions}, ...")
    yield from _examine_pair(_installed("torch"), _installed("torchvision"))
    yield from _examine_extras(needs.extras)


def _examine_python(wanted: SpecifierSet) -> Finding:
    version = platform.python_version()
    if wanted.contains(version, prereleases=True):
        return Finding("ok", "Python", version)
    return Finding("fail", "Python", f"{version}, expected {wanted}: make PYTHON=python3.12")


def _examine_pair(torch: str | None, vision: str | None) -> Iterator[Finding]:
    if torch is None or vision is None:
        return
    one, other = Version(torch), Version(vision)
    built_for = f"{one.major}.{other.minor - _VISION_OFFSET}"
    builds = {one.local or "", other.local or ""}
    if one.major == 2 and other.major == 0 and one.minor != other.minor - _VISION_OFFSET:
        detail = f"torchvision {vision} is built for torch {built_for}, here is {torch}"
        yield Finding("warn", "torch", f"{detail}; install both from one index in one command")
    elif len(builds) > 1:
        detail = f"torch {torch} and torchvision {vision} are builds for different devices"
        yield Finding("warn", "torch", f"{detail}; install both from one index in one command")


def _examine_extras(extras: dict[str, list[Requirement]]) -> Iterator[Finding]:
    for name, packages in extras.items():
        wrong = [line for line in map(_mismatch, packages) if line]
        if not wrong or name == _TESTING:
            continue
        absent = [package.name for package in packages if _installed(package.name) is None]
        old = [line for line in wrong if "not installed" not in line]
        problem = "; ".join([*old, f"{', '.join(absent)} not installed"] if absent else old)
        remedy = f"if it is needed: pip install -e '.[{name}]'"
        yield Finding("warn" if old else "ok", "optional", f"{name}: {problem}; {remedy}")


def _mismatch(requirement: Requirement) -> str | None:
    """What is wrong with an installed package, or None."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return _mismatch(Requirement(str(requirement).partition(";")[0]))
    version = _installed(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed (expected {requirement.specifier})"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version}, expected {requirement.specifier}"
    return None


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

"""Which packages are here, and whether they are as new as Tuneloom's own requirements ask."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

DISTRIBUTION = "tuneloom"
ALSO_SHOWN = ("tokenizers", "huggingface-hub", "bitsandbytes", "datasets", "pyarrow", "modelscope", "tensorboard", "wandb")
"""Packages whose versions matter though they are not required, or come along with one that is."""


@dataclass(frozen=True)
class Package:
    """A package, here or not.

    Attributes:
        name: on PyPI; `python` is the interpreter.
        version: None where it is not installed.
        wanted: the bounds that Tuneloom asks for, "" for none.
        required: whether Tuneloom cannot do without it.
        fault: why it is not good enough, None where it is.
    """

    name: str
    version: str | None
    wanted: str
    required: bool
    fault: str | None


def examine_packages(distribution: str = DISTRIBUTION) -> list[Package]:
    """Return Python, the packages that a distribution requires, those of its extras, and some more, in that order.

    What of `ALSO_SHOWN` the required packages require is required too. A distribution that is not installed requires
    nothing that could be known.
    """
    required, optional = _requirements(distribution)
    required |= _needed_by(required)
    others = {name: SpecifierSet() for name in ALSO_SHOWN} | optional
    found = [_python(distribution), *(_package(name, wanted, required=True) for name, wanted in required.items())]
    return found + [
        _package(name, others[name], required=False) for name in dict.fromkeys((*optional, *ALSO_SHOWN)) if name not in required
    ]


def how_to_install(name: str, distribution: str = DISTRIBUTION) -> str:
    """Return the command that installs a package: by the extra that has it, or by its name."""
    for line in _requires(distribution):
        requirement = _parsed(line)
        if requirement is None or canonicalize_name(requirement.name) != name or requirement.marker is None:
            continue
        for extra in metadata.metadata(distribution).get_all("Provides-Extra") or ():
            if requirement.marker.evaluate({"extra": extra}):
                return f"pip install '{distribution}[{extra}]'"
    return f"pip install {name}"


def installed_version(name: str) -> str | None:
    """Return a package's version, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(distribution: str) -> tuple[dict[str, SpecifierSet], dict[str, SpecifierSet]]:
    """Return what is required here, and what the extras add: name -> bounds."""
    required: dict[str, SpecifierSet] = {}
    optional: dict[str, SpecifierSet] = {}
    for line in _requires(distribution):
        requirement = _parsed(line)
        if requirement is None:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            required[canonicalize_name(requirement.name)] = requirement.specifier
        elif "extra" in str(requirement.marker):
            optional[canonicalize_name(requirement.name)] = requirement.specifier
    return required, {name: wanted for name, wanted in optional.items() if name not in required}


def _needed_by(required: Iterable[str]) -> dict[str, SpecifierSet]:
    """Return those of `ALSO_SHOWN` that required packages cannot do without: name -> bounds."""
    needed: dict[str, SpecifierSet] = {}
    names = set(required)
    for package in sorted(names):
        for name, wanted in _requirements(package)[0].items():
            if name in ALSO_SHOWN and name not in names:
                needed[name] = needed.get(name, SpecifierSet()) & wanted
    return needed


def _requires(distribution: str) -> list[str]:
    try:
        return metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []


def _parsed(line: str) -> Requirement | None:
    try:
        return Requirement(line)
    except InvalidRequirement:
        return None


def _python(distribution: str) -> Package:
    try:
        wanted = SpecifierSet((metadata.metadata(distribution).get_all("Requires-Python") or [""])[0])
    except metadata.PackageNotFoundError:
        wanted = SpecifierSet()
    version = platform.python_version()
    return Package("python", version, str(wanted), True, _fault(version, wanted))


def _package(name: str, wanted: SpecifierSet, *, required: bool) -> Package:
    version = installed_version(name)
    fault = _fault(version, wanted) if version is not None else ("not installed" if required else None)
    return Package(name, version, str(wanted), required, fault)


def _fault(version: str, wanted: SpecifierSet) -> str | None:
    try:
        fits = wanted.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return f"{version} is no version that could be compared with {wanted}" if str(wanted) else None
    return None if fits else f"{version} is not {wanted}"

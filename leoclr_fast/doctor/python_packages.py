"""Python and the packages that this one names: the versions, and whether they can be imported."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata

from leoclr_fast.doctor.finding import Finding, Trouble, judged, not_applicable, warning

_PROJECT = "leoclr-fast"
_INSTALL = "Install this package: `pip install -e .` in its folder."
_MODULES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "nvidia-ml-py": "pynvml",
}
"""Where a package is imported by another name."""
_USED_BY = {
    "parquet": "Parquet files",
    "imagenet": "ImageNet's devkit",
    "export": "leoclr-fast export",
    "detect": "leoclr-fast detect",
    "monitor": "energy, TensorBoard and W&B",
}


@dataclass(frozen=True, slots=True)
class Requirement:
    """`torch>=2.11`, of an extra or of everybody."""

    package: str
    at_least: tuple[int, ...]
    extra: str | None

    @classmethod
    def parse(cls, text: str) -> Requirement | None:
        """None for one that we do not understand, or that only holds for some Python."""
        match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)(?:\s*;\s*extra == [\"']([\w-]+)[\"'])?", text)
        return None if match is None else cls(match[1], version_numbers(match[2]), match[3])


def version_numbers(text: str) -> tuple[int, ...]:
    """`2.15.0+cu132` → (2, 15, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def python() -> Finding:
    """The interpreter, against what pyproject supports."""
    found = f"Python {platform.python_version()} ({platform.python_implementation()})"
    try:
        about = metadata.metadata(_PROJECT)
    except metadata.PackageNotFoundError:
        return warning(f"{found}; leoclr-fast is not installed as a package", _INSTALL)
    here = sys.version_info[:2]
    lowest = version_numbers("".join(about.get_all("Requires-Python") or []).lstrip(">= "))
    named = re.findall(r"Python :: (\d+\.\d+)$", "\n".join(about.get_all("Classifier") or []), re.MULTILINE)
    tried = sorted(version_numbers(version) for version in named)
    troubles = []
    if lowest and here < lowest:
        needed = ".".join(map(str, lowest))
        troubles.append(
            Trouble("failed", f"{needed} or newer is needed", f"Set up again: `make setup PYTHON=python{needed}`.")
        )
    elif tried and here > tried[-1]:
        newest = ".".join(map(str, tried[-1]))
        what = f"newer than {newest}, the newest that is supported"
        troubles.append(Trouble("warning", what, f"Set up again: `make setup PYTHON=python{newest}`."))
    return judged(found, troubles)


def required_packages() -> Finding:
    """Those without which nothing trains, torch among them."""
    try:
        requirements = _requirements(None)
    except metadata.PackageNotFoundError:
        return warning("leoclr-fast is not installed as a package, so its requirements are not known", _INSTALL)
    found, troubles = import_all(requirements, install="pip install -e .")
    return judged(found, troubles)


def extra(name: str) -> Finding:
    """The packages of an extra: none need be there, but those that are must work."""
    try:
        requirements = _requirements(name)
    except metadata.PackageNotFoundError:
        return not_applicable("leoclr-fast is not installed as a package, so its extras are not known")
    install = f"pip install 'leoclr-fast[{name}]'"
    there = [each for each in requirements if _installed_version(each.package) is not None]
    missing = [each.package for each in requirements if each not in there]
    if not there:
        return not_applicable(f"not installed; {_USED_BY[name]} would need it: {install}")
    found, troubles = import_all(there, install=install)
    return judged(found + (f"; not installed: {', '.join(missing)} ({install})" if missing else ""), troubles)


def import_all(
    requirements: Sequence[Requirement], *, install: str, import_it: Callable[[str], object] = import_module
) -> tuple[str, list[Trouble]]:
    """Versions, and what is missing, too old or broken."""
    versions, troubles = [], []
    for each in requirements:
        version = _installed_version(each.package)
        needed = ".".join(map(str, each.at_least))
        remedy = f"Install it: `{install}`."
        if version is None:
            troubles.append(Trouble("failed", f"{each.package} is missing", remedy))
            continue
        versions.append(f"{each.package} {version}")
        if version_numbers(version) < each.at_least:
            troubles.append(Trouble("failed", f"{each.package} {version} is older than {needed}", remedy))
        print(f"importing {each.package}", file=sys.stderr, flush=True)  # the last words, where that ends the process
        try:
            import_it(_MODULES.get(each.package, each.package.replace("-", "_")))
        except BaseException as error:  # also the SystemExit of a strange package
            why = " ".join(str(error).split())[:200]
            again = f"Install it again: `pip install --force-reinstall {each.package}`."
            troubles.append(
                Trouble("failed", f"{each.package} cannot be imported ({type(error).__name__}: {why})", again)
            )
    return ", ".join(versions), troubles


def _requirements(extra_name: str | None) -> list[Requirement]:
    parsed = (Requirement.parse(text) for text in metadata.requires(_PROJECT) or [])
    return [each for each in parsed if each is not None and each.extra == extra_name]


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

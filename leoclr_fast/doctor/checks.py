"""The list of all checks, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dataset_tools.limits import unknown
from leoclr_fast.doctor.result import Result

_TRY_AGAIN = "Look at the machine's load with `uptime`, then try again."
_DEAD_MOUNT = "A file system that does not answer is often a dead network mount: look with `mount` and `dmesg`."
_MANY_FILES = "Many small files are slow to list: convert them once, `leoclr-fast convert DATA DEST --format ffcv`."
_DEAD_DRIVER = "The driver may hang: look with `nvidia-smi` and `dmesg`, and restart the machine if they hang too."


@dataclass(frozen=True, slots=True)
class Check:
    """A function that returns a `Result`, and how long it may take."""

    name: str
    function: str
    """`module.function` in this package, imported by the process that runs it."""
    arguments: tuple[str, ...] = ()
    """Its arguments; `{data}` and `{out}` are what the user gave, or the empty string."""
    when_late: str = _TRY_AGAIN
    """The remedy where it does not answer in time."""
    limit_s: float = 120.0

    def run(self, given: dict[str, str]) -> Result:
        """In this process. given: what `{data}` and `{out}` stand for."""
        module, _, name = self.function.partition(".")
        function: Any = getattr(import_module(f"leoclr_fast.doctor.{module}"), name)
        result: Result = function(*(argument.format(**given) for argument in self.arguments))
        return result


CHECKS: tuple[Check, ...] = (
    Check("cores", "processors.cores"),  # before the others put load on the machine
    Check("memory", "processors.memory"),
    Check("shared memory", "processors.shared_memory"),
    Check("limits", "processors.limits"),
    Check("required packages", "packages.required_packages"),
    Check("gpus", "gpus.gpus", when_late=_DEAD_DRIVER),
    Check("gloo", "ranks.gloo"),
    Check("compiling", "packages.compiling"),
    *(Check(f"loader {name}", "image_loaders.loader", (name,)) for name in ("torchvision", "dali", "ffcv", "nvjpeg")),
    Check("temporary folder", "disks.temporary_folder", when_late=_DEAD_MOUNT, limit_s=20.0),
    Check("out folder", "disks.out_folder", ("{out}",), when_late=_DEAD_MOUNT, limit_s=20.0),
    Check("data", "disks.data", ("{data}",), when_late=f"{_MANY_FILES} {_DEAD_MOUNT}", limit_s=180.0),
)


def chosen_checks(names: Sequence[str]) -> list[Check]:
    """The checks of these names, or all. Raises ValueError for a name that does not exist."""
    known = [check.name for check in CHECKS]
    for name in names:
        if name not in known:
            raise ValueError(unknown("check", name, known))
    return [check for check in CHECKS if not names or check.name in names]

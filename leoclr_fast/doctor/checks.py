"""The list of all checks, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dataset_tools.limits import unknown
from leoclr_fast.doctor.result import Result

_TRY_AGAIN = "Look at the machine's load with `uptime`, then try again."
_MANY_FILES = "Many small files are slow to list: convert them once, `leoclr-fast convert DATA DEST --format ffcv`."
_DEAD_MOUNT = "A file system that does not answer is often a dead network mount: look with `mount` and `dmesg`."
_DEAD_DRIVER = "The driver may hang: look with `nvidia-smi` and `dmesg`, and restart the machine if they hang too."


@dataclass(frozen=True, slots=True)
class Check:
    """A function that returns a `Result`, and how long it may take."""

    name: str
    function: str
    """`module.function` in this package, imported by the process that runs it."""
    arguments: tuple[str, ...] = ()
    """Its arguments; `{data}` and `{out}` are what the user gave, or the empty string."""
    limit_s: float = 20.0
    when_late: str = _TRY_AGAIN
    """The remedy where it does not answer in time."""
    alone: bool = False
    """Nothing else runs beside it."""

    def run(self, given: dict[str, str]) -> Result:
        """In this process. given: what `{data}` and `{out}` stand for."""
        module, _, name = self.function.partition(".")
        function: Any = getattr(import_module(f"leoclr_fast.doctor.{module}"), name)
        result: Result = function(*(argument.format(**given) for argument in self.arguments))
        return result


def _heavy(name: str, function: str, *arguments: str) -> Check:
    """A check that imports torch."""
    return Check(name, function, arguments, limit_s=120.0)


def _gpu(name: str, function: str) -> Check:
    return Check(name, function, limit_s=90.0, when_late=_DEAD_DRIVER)


CHECKS: tuple[Check, ...] = (
    _heavy("required packages", "packages.required_packages"),
    _gpu("gpus", "gpus.gpus"),
    _gpu("driver", "gpus.driver"),
    _gpu("nccl", "ranks.nccl"),
    _heavy("gloo", "ranks.gloo"),
    Check("c compiler", "packages.c_compiler", limit_s=60.0),
    _heavy("triton", "packages.triton"),
    *(_heavy(f"loader {name}", "image_loaders.loader", name) for name in ("torchvision", "dali", "ffcv", "nvjpeg")),
    Check("cores", "processors.cores", alone=True),
    Check("memory", "processors.memory"),
    Check("shared memory", "processors.shared_memory"),
    Check("limits", "processors.limits"),
    Check("temporary folder", "disks.temporary_folder", when_late=_DEAD_MOUNT),
    Check("out folder", "disks.out_folder", ("{out}",), when_late=_DEAD_MOUNT),
    Check("out speed", "disks.out_speed", ("{out}",), limit_s=60.0, when_late=_DEAD_MOUNT, alone=True),
    Check("data folder", "disks.data_folder", ("{data}",), when_late=_DEAD_MOUNT),
    Check("data set", "disks.data_set", ("{data}",), limit_s=180.0, when_late=_MANY_FILES),
)


def chosen_checks(names: Sequence[str]) -> list[Check]:
    """The checks of these names, or all. Raises ValueError for a name that does not exist."""
    known = [check.name for check in CHECKS]
    for name in names:
        if name not in known:
            raise ValueError(unknown("check", name, known))
    return [check for check in CHECKS if not names or check.name in names]

"""The list of all checks, in the order in which they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from leoclr_fast.doctor.finding import Finding

_HERE = "leoclr_fast.doctor"
_MANY_FILES = "Many small files are slow to list: convert them once, `leoclr-fast convert DATA DEST --format ffcv`."
_DEAD_MOUNT = "A file system that does not answer is often a dead network mount: look with `mount` and `dmesg`."


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A function that returns a `Finding`, and how long it may take."""

    name: str
    function: str
    """`module.function` in this package, imported by the process that runs it."""
    arguments: tuple[str, ...] = ()
    """Its arguments; `{data}` and `{out}` are what the user gave, or the empty string."""
    limit_s: float = 20.0
    when_late: str = "Look at the machine's load with `uptime`, then try again."
    """The remedy where it does not answer in time."""
    alone: bool = False
    """Nothing else runs beside it."""

    def run(self, given: dict[str, str]) -> Finding:
        """In this process. given: what `{data}` and `{out}` stand for."""
        module, _, name = self.function.partition(".")
        function: Any = getattr(import_module(f"{_HERE}.{module}"), name)
        finding: Finding = function(*(argument.format(**given) for argument in self.arguments))
        return finding


def _heavy(name: str, function: str, *arguments: str) -> Check:
    """A check that imports torch."""
    return Check(name=name, function=function, arguments=arguments, limit_s=120.0)


def _gpu(name: str, function: str) -> Check:
    remedy = "The driver may hang: look with `nvidia-smi` and `dmesg`, and restart the machine if they hang too."
    return Check(name=name, function=function, limit_s=90.0, when_late=remedy)


CHECKS: tuple[Check, ...] = (
    Check(name="system", function="system.system"),
    Check(name="python", function="python_packages.python"),
    _heavy("required packages", "python_packages.required_packages"),
    _gpu("gpus", "gpus.gpus"),
    _gpu("gpu health", "gpus.gpu_health"),
    _gpu("driver", "gpus.driver"),
    _gpu("bf16", "gpus.bf16"),
    _gpu("nccl", "collectives.nccl"),
    _heavy("gloo", "collectives.gloo"),
    Check(name="torchrun", function="launchers.torchrun", limit_s=120.0),
    Check(name="rendezvous", function="launchers.rendezvous"),
    Check(name="communication settings", function="launchers.communication_settings"),
    Check(name="network", function="launchers.network"),
    Check(name="c compiler", function="compilers.c_compiler", limit_s=60.0),
    _heavy("triton", "compilers.triton"),
    Check(name="pillow", function="image_loaders.pillow"),
    _heavy("loader torchvision", "image_loaders.loader", "torchvision"),
    _heavy("loader dali", "image_loaders.loader", "dali"),
    _heavy("loader ffcv", "image_loaders.loader", "ffcv"),
    _heavy("loader nvjpeg", "image_loaders.loader", "nvjpeg"),
    *(
        _heavy(f"extra {name}", "python_packages.extra", name)
        for name in ("parquet", "imagenet", "export", "detect", "monitor")
    ),
    Check(name="cores", function="processors.cores", alone=True),
    _heavy("threads", "processors.threads"),
    _gpu("numa", "processors.numa"),
    Check(name="memory", function="memory.memory"),
    Check(name="shared memory", function="memory.shared_memory"),
    Check(name="limits", function="limits.limits"),
    Check(name="encoding", function="limits.encoding"),
    Check(name="clock", function="clock.clock"),
    Check(name="temporary folder", function="disks.temporary_folder", when_late=_DEAD_MOUNT),
    Check(name="out folder", function="disks.out_folder", arguments=("{out}",), when_late=_DEAD_MOUNT),
    Check(
        name="out speed",
        function="disks.out_speed",
        arguments=("{out}",),
        when_late=_DEAD_MOUNT,
        limit_s=60.0,
        alone=True,
    ),
    Check(name="data folder", function="disks.data_folder", arguments=("{data}",), when_late=_DEAD_MOUNT),
    Check(
        name="data set",
        function="disks.data_set",
        arguments=("{data}",),
        limit_s=180.0,
        when_late=_MANY_FILES,
    ),
)

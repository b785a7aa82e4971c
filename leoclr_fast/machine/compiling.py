"""What torch.compile needs of a machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import cache


@cache
def what_compiling_lacks(device_type: str) -> str | None:
    """What torch.compile would need for a device of this type (`cpu`, `cuda`) and does not find; None if nothing."""
    if device_type == "cpu":
        return None if _any_program("CXX", "g++", "clang++", "c++") else "a C++ compiler (g++ or clang++)"
    if not _any_program("CC", "gcc", "clang", "cc"):
        return "a C compiler (gcc or clang)"
    return None if importlib.util.find_spec("triton") else "the package triton"


def _any_program(variable: str, *names: str) -> bool:
    return any(shutil.which(name) for name in (os.environ.get(variable), *names) if name)

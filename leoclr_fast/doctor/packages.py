"""The packages that this one needs, and what compiles: the C compiler and Triton."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from dataset_tools.versions import installed_version
from leoclr_fast.doctor.result import Result, failed, not_applicable, warning

_PROJECT = "leoclr-fast"
_NOT_INSTALLED = f"{_PROJECT} is not installed as a package"
_INSTALL = "Install this package: `pip install -e .` in its folder."
_MODULES = {"pillow": "PIL", "pyyaml": "yaml", "nvidia-ml-py": "pynvml"}
"""Where a package is imported by another name."""
_SOURCE = "#include <Python.h>\nint answer(void) { return PY_MAJOR_VERSION; }\n"
_APT = "Install it: `apt-get install gcc g++ python3-dev`."


def required_packages() -> Result:
    """Those without which nothing trains, torch among them."""
    required = requirements()
    if not required:
        return warning(f"{_NOT_INSTALLED}, so its requirements are not known", _INSTALL)
    return import_all(required, install="pip install -e .")


def requirements() -> list[Requirement]:
    """What the installed package names for everybody; nothing where it is not installed."""
    try:
        everything = [Requirement(text) for text in metadata.requires(_PROJECT) or []]
    except metadata.PackageNotFoundError:
        return []
    return [each for each in everything if each.marker is None]


def import_all(wanted: Sequence[Requirement], *, install: str) -> Result:
    """Versions, and what is missing, too old or broken."""
    versions = {each.name: installed_version(each.name) for each in wanted}
    result = Result(", ".join(f"{name} {version}" for name, version in versions.items() if version is not None))
    for each in wanted:
        name, version, remedy = each.name, versions[each.name], f"Install it: `{install}`."
        if version is None:
            result.fail(f"{name} is missing", remedy)
            continue
        if not each.specifier.contains(version, prereleases=True):
            result.fail(f"{name} {version} is older than {str(each.specifier).lstrip('>=')}", remedy)
        print(f"importing {name}", file=sys.stderr, flush=True)  # the last line, where that ends the process
        try:
            import_module(_MODULES.get(name, name.replace("-", "_")))
        except BaseException as error:  # also the SystemExit of a strange package
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            again = f"Install it again: `pip install --force-reinstall {name}`."
            result.fail(f"{name} cannot be imported ({why})", again)
    return result


def c_compiler() -> Result:
    """Triton compiles a small C file with Python's headers before it launches a kernel; torch.compile needs it too."""
    named = [os.environ.get("CC"), "gcc", "clang", "cc"]
    compiler = next((found for name in named if name and (found := shutil.which(name))), None)
    without = "kernels are not compiled, and training on a GPU is slower"
    if compiler is None:
        return warning(f"no C compiler: {without}", _APT)
    include = sysconfig.get_path("include")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "answer.c"
        source.write_text(_SOURCE)
        command = [compiler, "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(source.with_suffix(".so"))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=45, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"code {done.returncode}"]
        return warning(f"{compiler} cannot compile with Python's headers ({lines[0][:200]}): {without}", _APT)
    return Result(f"{compiler} compiles with the headers in {include}")


def triton() -> Result:
    """On a GPU it runs our loss and compares it with the plain one."""
    import torch

    on_gpu = torch.cuda.is_available()
    if find_spec("triton") is None:
        found = "not installed: the loss and the augmentation run without fused kernels"
        return warning(found, "Install it: `pip install triton`.") if on_gpu else not_applicable(found)
    from triton import __version__ as version

    if not on_gpu:
        return not_applicable(f"{version}; there is no GPU to run our kernels on")
    from leoclr_fast.losses.info_nce import info_nce

    generator = torch.Generator().manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(size, 128, generator=generator)) for size in (32, 32, 32, 512)]
    query, first, second, queue = (row.cuda() for row in rows)
    fused, plain = (info_nce(query, (first, second), queue, 0.2, impl).item() for impl in ("triton", "eager"))
    if abs(fused - plain) > 1e-3 * abs(plain):
        found = f"{version}: the fused loss is {fused:.6f}, the plain one {plain:.6f}"
        return failed(found, "Give `--loss-impl eager`, and tell us the GPU and the versions.")
    return Result(f"{version} runs our loss on the GPU: {fused:.6f}, as the plain one")

"""The packages that this one needs, and whether kernels can be compiled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from packaging.requirements import Requirement

from dataset_tools.versions import installed_version
from leoclr_fast.doctor.result import Result, failed, in_short, not_applicable, warning

_PROJECT = "leoclr-fast"
_MODULES = {"pillow": "PIL", "pyyaml": "yaml", "nvidia-ml-py": "pynvml"}
"""Where a package is imported by another name."""
_INSTALL_COMPILER = "Install what is missing: `apt-get install gcc g++ python3-dev`, `pip install triton`."


def required_packages() -> Result:
    """Those without which nothing trains, torch among them."""
    try:
        everything = [Requirement(text) for text in metadata.requires(_PROJECT) or []]
    except metadata.PackageNotFoundError:
        found = f"{_PROJECT} is not installed as a package, so its requirements are not known"
        return warning(found, "Install this package: `pip install -e .` in its folder.")
    return import_all([each for each in everything if each.marker is None])


def import_all(wanted: Sequence[Requirement]) -> Result:
    """Versions, and what is missing, too old or broken."""
    versions = {each.name: installed_version(each.name) for each in wanted}
    result = Result(", ".join(f"{name} {version}" for name, version in versions.items() if version is not None))
    for each in wanted:
        name, version, remedy = each.name, versions[each.name], "Install it: `pip install -e .`."
        if version is None:
            result.fail(f"{name} is missing", remedy)
            continue
        if not each.specifier.contains(version, prereleases=True):
            result.fail(f"{name} {version} is older than {str(each.specifier).lstrip('>=')}", remedy)
        print(f"importing {name}", file=sys.stderr, flush=True)  # the last line, where that ends the process
        try:
            import_module(_MODULES.get(name, name.replace("-", "_")))
        except BaseException as error:  # also the SystemExit of a strange package
            again = f"Install it again: `pip install --force-reinstall {name}`."
            result.fail(f"{name} cannot be imported ({in_short(error)})", again)
    return result


def compiling() -> Result:
    """On a GPU Triton compiles our loss, with a C compiler and Python's headers; it is compared with the plain one."""
    import torch

    from leoclr_fast.machine.compiling import what_compiling_lacks

    if not torch.cuda.is_available():
        return not_applicable("no GPU to compile kernels for")
    if (lacking := what_compiling_lacks("cuda")) is not None:
        return warning(f"kernels are not compiled, and training is slower: it lacks {lacking}", _INSTALL_COMPILER)
    from leoclr_fast.losses.info_nce import info_nce

    generator = torch.Generator().manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(size, 128, generator=generator)) for size in (32, 32, 32, 512)]
    query, first, second, queue = (row.cuda() for row in rows)
    try:
        fused, plain = (info_nce(query, (first, second), queue, 0.2, impl).item() for impl in ("triton", "eager"))
    except Exception as error:
        return failed(
            f"Triton does not run our loss ({in_short(error)})", f"{_INSTALL_COMPILER} Or give `--loss-impl eager`."
        )
    if abs(fused - plain) > 1e-3 * abs(plain):
        found = f"the fused loss is {fused:.6f}, the plain one {plain:.6f}"
        return failed(found, "Give `--loss-impl eager`, and tell us the GPU and the versions.")
    return Result(f"triton {installed_version('triton')} runs our loss on the GPU: {fused:.6f}, as the plain one")

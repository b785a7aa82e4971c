"""What compiles: the C compiler, and Triton."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from leoclr_fast.doctor.finding import Finding, failed, not_applicable, ok, warning

_SOURCE = "#include <Python.h>\nint answer(void) { return PY_MAJOR_VERSION; }\n"
_APT = "Install it: `apt-get install gcc g++ python3-dev`."


def c_compiler() -> Finding:
    """Triton compiles a small C file with Python's headers before it launches a kernel; torch.compile needs it too."""
    named = [os.environ.get("CC"), "gcc", "clang", "cc"]
    compiler = next((found for name in named if name and (found := shutil.which(name))), None)
    without = "kernels are not compiled, and training on a GPU is slower"
    if compiler is None:
        return warning(f"no C compiler: {without}", _APT)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "answer.c"
        source.write_text(_SOURCE)
        include = sysconfig.get_path("include")
        command = [compiler, "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(source.with_suffix(".so"))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=45, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"code {done.returncode}"]
        return warning(f"{compiler} cannot compile with Python's headers ({lines[0][:200]}): {without}", _APT)
    return ok(f"{compiler} compiles with the headers in {include}")


def triton() -> Finding:
    """Compiles one of our kernels; on a GPU it runs the loss and compares it with the plain one."""
    import torch

    on_gpu = torch.cuda.is_available()
    if find_spec("triton") is None:
        found = "not installed: the loss and the augmentation run without fused kernels"
        return warning(found, "Install it: `pip install triton`.") if on_gpu else not_applicable(found)
    import triton as package

    if on_gpu:
        return _run_on_gpu(package.__version__)
    from leoclr_fast.losses import ahead_of_time

    _, launch = next(ahead_of_time.crop_resize())
    row = ahead_of_time.compile_launch(launch, 80)
    return ok(f"{package.__version__} compiles our {row['kernel']} for {row['target']}; there is no GPU to run it on")


def _run_on_gpu(version: str) -> Finding:
    import torch

    from leoclr_fast.losses.info_nce import info_nce

    generator = torch.Generator().manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(size, 128, generator=generator)) for size in (32, 32, 32, 512)]
    query, first, second, queue = (row.cuda() for row in rows)
    fused, plain = (info_nce(query, (first, second), queue, 0.2, impl).item() for impl in ("triton", "eager"))
    if abs(fused - plain) > 1e-3 * abs(plain):
        found = f"{version}: the fused loss is {fused:.6f}, the plain one {plain:.6f}"
        return failed(found, "Give `--loss-impl eager`, and tell us the GPU and the versions.")
    return ok(f"{version} runs our loss on the GPU: {fused:.6f}, as the plain one")

"""Builds the fake GPU for the torch and Triton that are installed, in seconds, and runs programs on it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("fake_gpu.h", "runtime.cpp", "libraries.cpp")
_CALLED = re.compile(r"^(cuda[A-Z]|__cuda|cublas|cudnn[A-Z]|nccl|cu[A-Z])")
_NOT_OURS = re.compile(r"^(cuFile|cusparse|cusolver|cufft|cupti|curand)")


def what_it_lacks() -> str | None:
    """What this machine would need to build it; None if nothing."""
    for program in ("g++", "nm"):
        if not shutil.which(program):
            return f"{program} is not installed"
    if _package("triton") is None:
        return "Triton, with CUDA's headers, is not installed"
    return None if list((_package("torch") / "lib").glob("libtorch_cuda.so")) else "this torch is built without CUDA"


def built() -> Path:
    """The folder with `libcuda.so.1`, built where it is not there yet for these sources and packages."""
    text = "".join((HERE / name).read_text() for name in SOURCES) + version("torch") + version("triton")
    folder = Path(tempfile.gettempdir()) / f"fake-gpu-{os.getuid()}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not (folder / "libcuda.so.1").exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            _build(Path(work))
            folder.mkdir(exist_ok=True)
            os.replace(Path(work) / "libcuda.so.1", folder / "libcuda.so.1")
    return folder


def environment(*, memory_bytes: int | None = None, devices: int = 1) -> dict[str, str]:
    """What a program's environment must say for it to run on the fake GPU."""
    folder = str(built())
    settings = {"FAKE_GPU_DEVICES": str(devices)}
    if memory_bytes is not None:
        settings["FAKE_GPU_MEMORY"] = str(memory_bytes)
    places = {"LD_PRELOAD": f"{folder}/libcuda.so.1", "TRITON_LIBCUDA_PATH": folder}
    libraries = os.pathsep.join(filter(None, (folder, os.environ.get("LD_LIBRARY_PATH"))))
    caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    return {**os.environ, **settings, **places, **caches, "LD_LIBRARY_PATH": libraries}


def _build(work: Path) -> None:
    of_torch = sorted((_package("torch").parent / "nvidia").glob("*/include"))  # of its version, and not complete
    headers = [f"-I{folder}" for folder in (*of_torch, _package("triton") / "backends/nvidia/include")]
    compiler = ["g++", "-O1", "-fPIC", "-std=c++17", "-w", *headers, "-c"]
    for name in SOURCES[1:]:
        subprocess.run([*compiler, HERE / name, "-o", work / f"{name}.o"], check=True)
    objects = [work / f"{name}.o" for name in SOURCES[1:]]
    missing = sorted(_called() - _symbols(["-g", "--defined-only"], objects))
    stubs = "\n".join(f"int {name}() {{ return 0; }}" for name in missing)
    (work / "stubs.cpp").write_text(f'extern "C" {{\n{stubs}\n}}\n')
    link = ["-shared", "-Wl,-soname,libcuda.so.1", "-o", work / "libcuda.so.1", *objects, work / "stubs.cpp"]
    subprocess.run(["g++", "-O1", "-fPIC", "-w", *link, "-ldl", "-lpthread"], check=True)


def _called() -> set[str]:
    """The functions of CUDA and its libraries that torch and Triton call."""
    libraries = [*(_package("torch") / "lib").glob("lib*.so")]
    driver = (_package("triton") / "backends/nvidia/driver.c").read_text()
    names = _symbols(["-D", "--undefined-only"], libraries) | set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", driver))
    return {name for name in names if _CALLED.match(name) and not _NOT_OURS.match(name)}


def _symbols(flags: list[str], files: list[Path]) -> set[str]:
    listed = subprocess.run(["nm", *flags, *files], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listed.splitlines() if len(line.split()) in (2, 3)}


def _package(name: str) -> Path | None:
    found = find_spec(name)
    return Path(found.origin).parent if found and found.origin else None

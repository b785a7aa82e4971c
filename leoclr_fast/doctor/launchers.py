"""torchrun, and the variables and networks by which ranks find each other."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from leoclr_fast.doctor.finding import Finding, Trouble, failed, judged, not_applicable, ok, warning

_NEEDED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
_OF_TORCHRUN = (*_NEEDED, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_RENAMED = {
    "NCCL_ASYNC_ERROR_HANDLING": "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "NCCL_BLOCKING_WAIT": "TORCH_NCCL_BLOCKING_WAIT",
    "NCCL_DESYNC_DEBUG": "TORCH_NCCL_DESYNC_DEBUG",
    "NCCL_ENABLE_TIMING": "TORCH_NCCL_ENABLE_TIMING",
    "NCCL_ENABLE_MONITORING": "TORCH_NCCL_ENABLE_MONITORING",
}
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_P2P_DISABLE": "GPUs do not copy to each other directly",
    "NCCL_SHM_DISABLE": "GPUs of one machine talk over the network",
    "NCCL_IB_DISABLE": "InfiniBand is not used",
    "TORCH_DISTRIBUTED_DEBUG": "every collective is checked",
}
_OFF = ("", "0", "OFF", "off")


def torchrun() -> Finding:
    """The program that starts ranks, of this Python and not of another."""
    from torch.distributed.run import get_args_parser

    forwards = any("--signals-to-handle" in action.option_strings for action in get_args_parser()._actions)
    signals = "forwards SIGUSR1 by --signals-to-handle" if forwards else "forwards SIGTERM, but not SIGUSR1"
    where = shutil.which("torchrun")
    instead = "`python -m torch.distributed.run` does the same."
    if where is None:
        return warning(f"not on PATH; this torch {signals}", f"Activate the environment, or: {instead}")
    if (python := _python_of(Path(where))) and not _same_environment(python):
        return warning(f"{where} belongs to another Python ({python})", f"Activate the environment, or: {instead}")
    return ok(f"{where}, {signals}")


def rendezvous(environ: Mapping[str, str] = os.environ) -> Finding:
    """The variables that torchrun sets: all or none."""
    there = [name for name in _OF_TORCHRUN if environ.get(name)]
    if not there:
        return ok("no variable of torchrun is set: what is started here runs alone, as it should")
    unset_all = f"`unset {' '.join(there)}`, and start ranks by torchrun, which sets them."
    missing = [name for name in _NEEDED if name not in there]
    if missing:
        return failed(f"{', '.join(there)} set, but not {', '.join(missing)}: left over from something", unset_all)
    found = " ".join(f"{name}={environ[name]}" for name in there)
    numbers = {name: environ[name] for name in there if name != "MASTER_ADDR"}
    for name, value in numbers.items():
        if not value.isdecimal():
            return failed(f"{found}: {name} is no number", unset_all)
    if int(environ["RANK"]) >= int(environ["WORLD_SIZE"]):
        return failed(f"{found}: there is no such rank", unset_all)
    try:
        socket.getaddrinfo(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))
    except OSError as error:
        remedy = "Give an address instead, or the master's name as `getent hosts NAME` knows it."
        return failed(f"{found}: MASTER_ADDR has no address ({error.strerror})", remedy)
    return ok(found)


def communication_settings(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Finding:
    """Variables of NCCL, gloo and CUDA that are left over from other machines or from a search for errors."""
    prefixes = ("NCCL_", "TORCH_NCCL_", "GLOO_", "CUDA_LAUNCH_BLOCKING", "TORCH_DISTRIBUTED_DEBUG")
    settings = {name: value for name, value in environ.items() if name.startswith(prefixes)}
    if not settings:
        return ok("none set")
    interfaces = _interfaces(root)
    troubles = []
    for name, value in settings.items():
        unset = f"`unset {name}`."
        if name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") and not _names_one(value, interfaces):
            what = f"{name}={value} names no interface of this machine ({', '.join(interfaces) or 'none'})"
            troubles.append(Trouble("failed", what, unset))
        elif name in _RENAMED:
            troubles.append(Trouble("warning", f"{name} has no effect any more", f"Set {_RENAMED[name]} instead."))
        elif name == "NCCL_IB_DISABLE" and not (root / "sys/class/infiniband").is_dir():
            continue
        elif name in _SLOW and value not in _OFF:
            troubles.append(Trouble("warning", f"{name}={value}: {_SLOW[name]}, which is slow", unset))
        elif name == "NCCL_DEBUG" and value.upper() in ("INFO", "TRACE"):
            troubles.append(Trouble("warning", f"{name}={value} prints a lot", unset))
    return judged(" ".join(f"{name}={value}" for name, value in sorted(settings.items())), troubles)


def network(root: Path = Path("/")) -> Finding:
    """Interfaces that are up, besides the loopback, and InfiniBand."""
    up = []
    for name in _interfaces(root):
        folder = root / "sys/class/net" / name
        if name != "lo" and _read(folder / "operstate") != "down":
            speed = _read(folder / "speed")
            up.append(f"{name} ({speed} Mbit/s)" if speed.isdecimal() else name)
    if not up:
        return not_applicable("only the loopback: ranks on several machines could not find each other")
    cards = root / "sys/class/infiniband"
    infiniband = sorted(card.name for card in cards.iterdir()) if cards.is_dir() else []
    return ok(
        f"{socket.gethostname()}: {', '.join(up)}"
        + (f"; InfiniBand: {', '.join(infiniband)}" if infiniband else "; no InfiniBand")
    )


def _interfaces(root: Path) -> list[str]:
    try:
        return sorted(os.listdir(root / "sys/class/net"))
    except OSError:
        return []


def _names_one(setting: str, interfaces: list[str]) -> bool:
    """As NCCL and gloo read it: prefixes, `=` for exact names, `^` for all but these."""
    if setting.startswith("^"):
        return True
    exact, names = setting.startswith("="), [name.strip() for name in setting.lstrip("=").split(",")]
    return any(interface == name if exact else interface.startswith(name) for name in names for interface in interfaces)


def _python_of(script: Path) -> str | None:
    """The interpreter in the first line of a script."""
    try:
        with open(script, "rb") as file:
            first = file.readline(4096)
    except OSError:
        return None
    words = first.removeprefix(b"#!").split() if first.startswith(b"#!") else []
    return words[0].decode(errors="replace") if words and b"python" in words[0] else None


def _same_environment(python: str) -> bool:
    return Path(python).parent.resolve() == Path(sys.executable).parent.resolve()


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""

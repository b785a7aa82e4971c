"""What a process and its children use: CPU time, memory, bytes read. From Linux's /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUse:
    """Of a process and all that descend from it, up to now."""

    cpu_s: float
    """User and system time, of ended children too."""
    memory_bytes: int
    """The largest resident set that the process had, and the share in memory (PSS) that its children have now."""
    read_bytes: int
    """By system calls, from the disk or from the page cache; what is mapped into memory is not in it."""


def process_use(pid: int) -> ProcessUse:
    """Raises ProcessLookupError if there is no such process."""
    tree = _descendants(pid)
    cpu_s = memory_bytes = read_bytes = 0.0
    for member in tree:
        try:
            # The command may hold anything, even brackets: what follows the last one is fixed.
            fields = _proc(member, "stat").rpartition(")")[2].split()
            cpu_s += sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")
            read_bytes += _number(_proc(member, "io"), "rchar:")
            if member == pid:
                memory_bytes += 1024 * _number(_proc(member, "status"), "VmHWM:")
            else:
                memory_bytes += 1024 * _number(_proc(member, "smaps_rollup"), "Pss:")
        except (FileNotFoundError, ProcessLookupError) as error:
            if member == pid:
                raise ProcessLookupError(f"there is no process {pid}") from error
    return ProcessUse(cpu_s=cpu_s, memory_bytes=int(memory_bytes), read_bytes=int(read_bytes))


def _descendants(pid: int) -> list[int]:
    """The process and its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                parent = int(_proc(int(entry), "stat").rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents.setdefault(parent, []).append(int(entry))
    tree = [pid]
    for member in tree:
        tree += parents.get(member, [])
    return tree


def _proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text(errors="replace")


def _number(text: str, label: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(label)), 0)

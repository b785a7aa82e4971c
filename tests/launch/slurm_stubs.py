"""Stands in for SLURM's programs on one machine: installs `srun`, `scancel` and `scontrol` that act here, for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

STEP_PID, REQUEUED = "step.pid", "requeued"


def install(folder: Path) -> None:
    """Put the programs into `folder`, which is to come first on PATH."""
    folder.mkdir()
    for name in ("srun", "scancel", "scontrol"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {name} "$@"\n')
        program.chmod(0o755)


def descendants(pid: int) -> list[int]:
    """All processes that come from a process, itself left out."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    front = [pid]
    while front:
        front = [child for parent in front for child in parents.get(parent, [])]
        found += front
    return found


def srun(words: list[str]) -> int:
    """Run the command once for each machine, all of them here; the worst exit code."""
    command = words[next(index for index, word in enumerate(words) if not word.startswith("--")) :]
    (_state() / STEP_PID).write_text(str(os.getpid()))
    num_nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    tasks = [
        subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)}, start_new_session=True)
        for node in range(num_nodes)
    ]
    return max(abs(task.wait()) for task in tasks)


def scancel(words: list[str]) -> int:
    """Send the signal to every process of the step, and not to srun, as SLURM does."""
    name = next(word.partition("=")[2] for word in words if word.startswith("--signal="))
    for pid in descendants(int((_state() / STEP_PID).read_text())):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, signal.Signals[f"SIG{name}"])
    return 0


def scontrol(words: list[str]) -> int:
    """`show hostnames` and `requeue`."""
    if words[:2] == ["show", "hostnames"]:
        print("localhost")
        return 0
    assert words[0] == "requeue"
    with open(_state() / REQUEUED, "a") as file:
        file.write(f"{words[1]}\n")
    return 0


def _state() -> Path:
    return Path(os.environ["SLURM_STUB_STATE"])


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    sys.exit({"srun": srun, "scancel": scancel, "scontrol": scontrol}[name](rest))

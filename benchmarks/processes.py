"""What is measured in a process of its own, which does something only when asked; and what that process uses."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class OwnProcess:
    """Runs a generator function in a process of its own; each `next` takes the next of what it yields.

    The function stands at the top of a module, and what it takes and yields can be pickled. The processes are forked by
    a server that has imported torch and nothing else, so that they start in no time and have no threads of others.
    """

    def __init__(self, name: str, function: Callable[..., Iterator[Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(function, arguments, theirs))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the process, while it lives."""
        pid = self._process.pid
        assert pid is not None
        return pid

    def next(self) -> Any:
        """What the function yields next. Raises RuntimeError, with its traceback, if it fails or dies."""
        self.ask()
        return self.answer()

    def ask(self) -> None:
        """Let the function go on to its next yield; `answer` waits for it."""
        self._connection.send("go")

    def answer(self, patience_s: float = 1800.0) -> Any:
        """What was asked for. Raises as `next`."""
        if not self._connection.poll(patience_s):
            self.kill()
            raise RuntimeError(f"{self.name} has not answered for {patience_s:g} s")
        try:
            succeeded, answer = self._connection.recv()
        except EOFError as error:
            raise RuntimeError(f"{self.name} died") from error
        if not succeeded:
            raise RuntimeError(f"{self.name} failed: {answer}")
        return answer

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def close(self) -> None:
        """End the process; closing twice is harmless."""
        self._connection.close()
        self._process.join(30)
        self._process.kill()


def _serve(function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], connection: Connection) -> None:
    multiprocessing.set_start_method("fork", force=True)  # workers start as in a program of its user's
    try:
        answers = function(*arguments)
        while connection.recv():
            try:
                connection.send((True, next(answers)))
            except (Exception, StopIteration):
                connection.send((False, traceback.format_exc()))
        answers.close()  # type: ignore[attr-defined]
    except EOFError:
        pass


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

"""What is measured in a process of its own, which does something only when asked; and what that process uses."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
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
    import psutil

    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError(f"there is no process {pid}") from error
    peak_kib = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]
    cpu_s, memory_bytes, read_bytes = 0.0, 1024 * int(peak_kib), 0
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # a worker that has just ended
            cpu_s += sum(member.cpu_times()[:4])
            read_bytes += member.io_counters().read_chars
            memory_bytes += member.memory_full_info().pss if member.pid != pid else 0
    return ProcessUse(cpu_s=cpu_s, memory_bytes=memory_bytes, read_bytes=read_bytes)

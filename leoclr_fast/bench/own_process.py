"""A contestant in a process of its own, which does something only when it is its turn."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PATIENCE_S = 1800.0


class OwnProcess:
    """Runs a generator function in a fresh process; each turn takes the next of what it yields.

    The function stands at the top of a module, and what it takes and yields can be pickled.
    """

    def __init__(self, name: str, function: Callable[..., Iterator[Any]], arguments: Sequence[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(function, tuple(arguments), theirs))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the process, while it lives."""
        pid = self._process.pid
        assert pid is not None
        return pid

    def turn(self) -> Any:
        """What the contestant yields next. Raises RuntimeError, with its traceback, if it fails or dies."""
        self._ours.send("go")
        if not self._ours.poll(PATIENCE_S):
            self._process.kill()
            raise RuntimeError(f"{self.name} has not answered for {PATIENCE_S:.0f} s")
        try:
            succeeded, answer = self._ours.recv()
        except EOFError as error:
            raise RuntimeError(f"{self.name} died") from error
        if not succeeded:
            raise RuntimeError(f"{self.name} failed: {answer}")
        return answer

    def close(self) -> None:
        """End the process; closing twice is harmless."""
        self._ours.close()
        self._process.join(30)
        self._process.kill()


def _serve(function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], connection: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)  # workers start as in a program of its user's
    try:
        turns = function(*arguments)
        while connection.recv():
            try:
                connection.send((True, next(turns)))
            except (Exception, StopIteration):
                connection.send((False, traceback.format_exc()))
        turns.close()  # type: ignore[attr-defined]
    except EOFError:
        pass

"""What leaves the program for a reader: text to a terminal, and streams that may be gone.

A name (of a file, a class, a recipe) may hold anything. On a terminal it can neither move the cursor nor style.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from rich.console import Console
from rich.segment import Segment

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""All but tab and line feed; what reverses the direction of text; and bytes of names that are no UTF-8."""
_CONTROL_BUT_COLOURS = re.compile(rf"(?!\x1b\[[\d;]*m){_CONTROL.pattern}")


def printable(text: str, *, colours: bool = False) -> str:
    """The text with control characters as escapes: `\\x1b`. colours: but for the sequences that set them."""
    pattern = _CONTROL_BUT_COLOURS if colours else _CONTROL
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PlainConsole(Console):
    """A console that takes text as text: no markup, no highlighting, and control characters are shown as escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(soft_wrap=True, markup=False, highlight=False, emoji=False, **options)

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer(
            segment if segment.control else Segment(printable(segment.text), segment.style) for segment in buffer
        )


class _Forgiving:
    """A stream whose reader may be gone or whose disk may be full: what cannot be written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self.error = error
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def forgiving_streams() -> Iterator[Callable[[], OSError | None]]:
    """Within, output never raises OSError: a training outlives its terminal, `| head` and a full disk under its log.

    Yields a function that returns the newest error of stdout. What is closed, as by `>&-`, is /dev/null before.
    """
    before = sys.stdout, sys.stderr
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    out, err = _Forgiving(sys.stdout), _Forgiving(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield lambda: out.error
    finally:
        for stream in (out, err):
            stream.flush()
            if stream.error is not None:  # what is left in its buffer must not fail at the exit
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.stdout, sys.stderr = before

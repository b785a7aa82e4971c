"""What a command line is made of: commands as dataclasses, parsed by tyro; one error line; one JSON document.

Each command's fields are its flags, and its `run` returns one JSON document. What a command does lives elsewhere.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler

from dataset_tools.limits import require_allowed
from dataset_tools.starting import started_program
from dataset_tools.stop_signals import StoppedAtOnce, StoppedBySignalError
from dataset_tools.terminal import PlainConsole, forgiving_streams, printable

PACKAGES = ("leoclr_fast", "pipelines", "dataset_tools")
MAX_ERROR_CHARACTERS = 4000


@dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """What every command has."""

    json: bool = False
    """Print one JSON document as the last line of stdout."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self, console: Console) -> dict[str, Any]:
        """Do it; the result is what `--json` prints. A result with `ok` false ends the program with code 1."""
        raise NotImplementedError


Parse = Callable[[list[str]], CommonFlags | None]
"""Arguments → a command, or None where help was printed instead."""


def run_command_line(parse: Parse, arguments: Sequence[str] | None = None) -> int:
    """Run a command line (`sys.argv` by default).

    Returns the exit code: 0 done, 1 failed, 2 misused, 130 stopped by a signal, or the `exit_code` of an error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with forgiving_streams() as output_error:
        console = PlainConsole()
        _set_up_logging(console)
        try:
            command = parse(given)
            started_program()
            if command is None:
                return 0
            document = command.run(console)
            if command.json and document:
                print(as_json(document), flush=True)
                if error := output_error():
                    raise OSError(error.errno, f"the result cannot be written to stdout: {error.strerror}")
            return 1 if document and document.get("ok") is False else 0
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 2
        except BaseException as error:
            if _is_interrupt(error):
                print(f"error: {error}" if isinstance(error, StoppedAtOnce) else "interrupted", file=sys.stderr)
                return 130
            if "--debug" in given or not isinstance(error, Exception):
                raise
            print(f"error: {printable(_describe(error))}", file=sys.stderr, flush=True)
            return 130 if isinstance(error, StoppedBySignalError) else int(getattr(error, "exit_code", 1))


def as_json(document: Any) -> str:
    """One line of JSON, which knows neither NaN nor infinities: null stands for them."""
    return json.dumps(json.loads(json.dumps(document), parse_constant=lambda _: None))


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is at the bottom of it: a package that it meets in an import may call it an ImportError."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, ImportError) and _is_interrupt(error.__cause__ or error.__context__)
    )


Parsed = TypeVar("Parsed")


def parse_flags(kind: type[Parsed], arguments: list[str], prog: str, **options: Any) -> Parsed:
    """A command out of its flags. Exits with code 2 for a wrong flag; raises ValueError for a number out of limits."""
    import tyro  # here, so that training needs none

    for value in (argument.rpartition("=")[2] for argument in arguments):
        if not value.isascii() and value.isdecimal():  # Python would take it
            raise ValueError(f"{value} is no number here: write it in the digits 0 to 9")
    said = io.StringIO()  # it repeats what was typed
    try:
        with redirect_stderr(said):
            command = tyro.cli(kind, args=_with_their_values(arguments), prog=prog, **options)
    finally:
        sys.stderr.write(printable(said.getvalue(), colours=True))
    require_allowed(command)
    return command


def _with_their_values(arguments: list[str]) -> list[str]:
    """`--flags "--epochs 3"` as `--flags=--epochs 3`: a word with a blank is a value, though it begins with --."""
    joined: list[str] = []
    for argument in arguments:
        is_value = argument.startswith("--") and " " in argument.partition("=")[0]
        if is_value and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def print_commands(lines: Mapping[str, str]) -> None:
    """Each command with the line that says what it does."""
    for name, line in lines.items():
        print(f"  {name:16} {line}")


def first_line(docstring: str | None) -> str:
    """The first line of a docstring."""
    return (docstring or "").strip().splitlines()[0]


def say(console: Console, text: str) -> None:
    """One plain line for the user, at any width of the terminal."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _set_up_logging(console: Console) -> None:
    """Notes and warnings as plain lines, above the live display on a terminal; other ranks than the first only warn."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    else:
        handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Plain("%(message)s"))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _describe(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None and not error.filename:
        text = error.strerror
    if len(text) > MAX_ERROR_CHARACTERS:
        text = f"{text[:MAX_ERROR_CHARACTERS]}… (and {len(text) - MAX_ERROR_CHARACTERS:,} characters more)"
    if isinstance(error, ValueError | RuntimeError | OSError) and not isinstance(error, RecursionError):
        return text
    if isinstance(error, MemoryError):
        return f"the memory does not suffice: {text or 'no more could be had'}"
    return f"{type(error).__name__}: {text} (a fault of ours; --debug shows where)"

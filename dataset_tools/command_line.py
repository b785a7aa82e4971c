"""What a command line is made of: commands as dataclasses, parsed by tyro; one error line; one JSON document.

Each command's fields are its flags, and its `run` returns one JSON document. What a command does lives elsewhere.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.logging import RichHandler

from dataset_tools.stop_signals import StoppedBySignalError

PACKAGES = ("leoclr_fast", "pipelines", "dataset_tools")


class Command(Protocol):
    """A parsed command line."""

    @property
    def json(self) -> bool:
        """Whether to print the result as JSON."""

    def run(self, console: Console) -> dict[str, Any]:
        """Do it; the result is what `--json` prints. A result with `ok` false ends the program with code 1."""


@dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """What every command has."""

    json: bool = False
    """Print one JSON document as the last line of stdout."""
    debug: bool = False
    """Show the traceback of an error."""


Parse = Callable[[list[str]], Command | None]
"""Arguments → a command, or None where help was printed instead."""


def run_command_line(parse: Parse, arguments: Sequence[str] | None = None) -> int:
    """Run a command line (`sys.argv` by default).

    Returns the exit code: 0 done, 1 failed, 2 misused, 130 stopped by a signal, or the `exit_code` of an error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
    console = Console(soft_wrap=True)
    debug = "--debug" in given
    _set_up_logging(console)
    try:
        command = parse(given)
        if command is None:
            return 0
        document = command.run(console)
        if command.json and document:
            print(json.dumps(document), flush=True)
        return 1 if document and document.get("ok") is False else 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"error: {_describe(error)}", file=sys.stderr, flush=True)
        return 130 if isinstance(error, StoppedBySignalError) else int(getattr(error, "exit_code", 1))


Parsed = TypeVar("Parsed")


def parse_flags(kind: type[Parsed], arguments: list[str], prog: str, **options: Any) -> Parsed:
    """A command out of its flags. Exits with code 2 for a wrong flag."""
    import tyro  # here, so that training needs none

    return tyro.cli(kind, args=arguments, prog=prog, **options)


def unknown(kind: str, name: str, known: Mapping[str, Any]) -> str:
    """What to say of a name that does not exist: the nearest ones, and all."""
    nearest = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    return f"there is no {kind} {name!r}.{hint} Allowed: {', '.join(known)}."


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
    logging.raiseExceptions = False  # a reader that went away (`| head`) is no news
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    else:
        handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _describe(error: Exception) -> str:
    if isinstance(error, ValueError | RuntimeError):
        return str(error)
    if isinstance(error, OSError):
        return str(error) if error.strerror is None or error.filename else error.strerror
    return f"{type(error).__name__}: {error} (a fault of ours; --debug shows where)"

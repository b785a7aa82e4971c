"""Text to terminals, and programs whose output goes nowhere."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table

from dataset_tools.cli import run_command
from dataset_tools.command_line import as_json, run_command_line, say
from dataset_tools.terminal import PlainConsole, forgiving_streams, printable

EVIL = "\x1b]0;OWNED\x07\x1b[2J\x9b2J\r\u202e[/][red]"


def test_printable_keeps_words_and_shows_controls() -> None:
    assert printable("Füße 猫\t[red]\nline") == "Füße 猫\t[red]\nline"
    assert printable(EVIL) == "\\x1b]0;OWNED\\x07\\x1b[2J\\x9b2J\\r\\u202e[/][red]"


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_on_a_console_moves_the_cursor(terminal: bool) -> None:
    """Lines, tables and progress bars: what rich itself writes to a terminal is all that it gets."""
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=terminal, width=200)
    say(console, EVIL)
    table = Table(EVIL)
    table.add_row(EVIL)
    console.print(table)
    console.print(EVIL)
    with Progress(TextColumn("{task.description}", markup=False), console=console, auto_refresh=False) as progress:
        progress.add_task(EVIL)
        progress.refresh()
    text = file.getvalue()
    assert text.count("[/][red]") >= 5
    for bad in ("\x1b]0;", "\x1b[2J", "\x9b", "\u202e"):
        assert bad not in text


def test_the_error_line_and_the_log_are_printable_and_short(capsys: pytest.CaptureFixture[str]) -> None:
    def parse(_: list[str]) -> None:
        logging.getLogger("dataset_tools").warning(EVIL)
        raise ValueError(EVIL + "x" * 50_000_000)

    assert run_command_line(parse, []) == 1
    out, err = capsys.readouterr()
    assert out == printable(EVIL) + "\n"
    assert err.startswith(f"error: {printable(EVIL)}xxx")
    assert len(err) < 4200


def test_an_import_that_was_interrupted_is_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    def parse(_: list[str]) -> None:
        raise ImportError("numpy failed to import") from KeyboardInterrupt()

    assert run_command_line(parse, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_json_knows_no_nan() -> None:
    assert (
        as_json({"a": [float("nan"), -float("inf"), 1.5], "b": "NaN\x1b"})
        == '{"a": [null, null, 1.5], "b": "NaN\\u001b"}'
    )


def test_output_that_cannot_be_written_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with forgiving_streams() as error:
            print("much" * 10_000)
            PlainConsole().print("more")
            found = error()
            assert found is not None
            assert found.strerror == "No space left on device"
        assert sys.stdout is full


@pytest.mark.parametrize(
    ("redirections", "code", "said"),
    [
        (">&-", 1, "error: nowhere is no converted data set: it has no manifest.json.\n"),
        (">&- 2>&-", 1, ""),
        ("2>/dev/full", 1, ""),
        ("| head -0", 1, "error: nowhere is no converted data set: it has no manifest.json.\n"),
    ],
)
def test_closed_streams(redirections: str, code: int, said: str) -> None:
    """A closed stdout or stderr, a full disk and a reader that is gone: no traceback, and the exit code as ever."""
    line = f"{sys.executable} -m dataset_tools inspect nowhere {redirections}"
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (code, said)


def test_names_do_not_depend_on_the_locale(tmp_path: Path) -> None:
    """Under a locale of ASCII, without Python's UTF-8 mode, a name is printed as it is."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "dataset_tools", "inspect", str(tmp_path / "Füße")]
    done = subprocess.run(command, env=os.environ | ascii_only, capture_output=True, check=False)
    assert f"error: {tmp_path / 'Füße'} is no converted data set".encode() in done.stderr


def test_digits_are_those_of_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["subset", "x", "--percent=٣", "--out", "y"]) == 1
    assert capsys.readouterr().err == "error: ٣ is no number here: write it in the digits 0 to 9\n"


def test_a_wrong_flag_is_repeated_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["subset", "x", "--out", "y", f"--wrong{EVIL}"]) == 2
    assert "\x1b[2J" not in (said := capsys.readouterr().err)
    assert "\\x1b[2J" in said
    assert printable("\x1b[1;31mred\x1b[0m\x1b[2J", colours=True) == "\x1b[1;31mred\x1b[0m\\x1b[2J"

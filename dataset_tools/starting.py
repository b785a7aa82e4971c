"""The first moments of a program, before its imports. Nothing here imports more than the interpreter has."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from contextlib import suppress


def start_program() -> None:
    """Before the imports of a program: Ctrl-C ends it without a traceback, and names of files are UTF-8 everywhere.

    Under a locale of ASCII alone the program starts itself anew in Python's UTF-8 mode.
    """
    if sys.stderr is not None:
        faulthandler.enable()  # a crash in native code says where
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    if sys.getfilesystemencoding() != "utf-8" and sys.executable and not sys.flags.ignore_environment:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def started_program() -> None:
    """After them: Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: object) -> None:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)

"""`python -m leoclr_fast`, as torchrun starts it, and the program `leoclr-fast`."""

from __future__ import annotations

import faulthandler
import sys


def main() -> None:
    """The command line. `doctor` starts without the packages that it examines: they may be what is broken."""
    faulthandler.enable()  # a crash in native code says where
    if sys.argv[1:2] == ["doctor"]:
        from dataset_tools.command_line import parse_flags, run_command_line
        from leoclr_fast.commands.doctor import Doctor

        sys.exit(run_command_line(lambda words: parse_flags(Doctor, words[1:], "leoclr-fast doctor")))
    from leoclr_fast.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()

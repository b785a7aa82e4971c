"""`python -m leoclr_fast`, as torchrun starts it, and the program `leoclr-fast`."""

from __future__ import annotations

import faulthandler

from leoclr_fast.cli import main as command_line


def main() -> None:
    """The command line."""
    faulthandler.enable()  # a crash in native code says where
    command_line()


if __name__ == "__main__":
    main()

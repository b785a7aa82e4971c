"""`python -m leoclr_fast`, as torchrun starts it, and the program `leoclr-fast`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """The command line."""
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if sys.path[0] in ("", os.getcwd()) and os.getcwd() != ours:  # a user's own pipelines/ is not our package
        del sys.path[0]
        os.environ["PYTHONSAFEPATH"] = "1"
    from dataset_tools.starting import start_program

    start_program()
    from leoclr_fast.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()

"""`python -m leoclr_fast`, as torchrun starts it, and the program `leoclr-fast`."""

from __future__ import annotations


def main() -> None:
    """The command line."""
    from dataset_tools.starting import start_program

    start_program()
    from leoclr_fast.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()

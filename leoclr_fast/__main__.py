"""`python -m leoclr_fast`, as torchrun starts it."""

from leoclr_fast.cli import main

main()

"""One command of the command line per file: its flags, and what it prints. What it does lives elsewhere."""

"""The commands of the command line: their flags, and what they print. What they do lives elsewhere."""

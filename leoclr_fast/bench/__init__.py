"""What measures: one subject per file. Nothing in training depends on it."""

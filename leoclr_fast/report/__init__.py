"""What a run looks like: one self-contained page out of run folders, and the same in the terminal."""

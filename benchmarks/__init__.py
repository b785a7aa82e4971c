"""What was measured, and the programs that measured it. Results, each with its command and log, are in `results/`."""

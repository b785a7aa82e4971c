"""Everything that wants a GPU, in one command of at most ten minutes: `python -m benchmarks.gpu_suite --help`."""

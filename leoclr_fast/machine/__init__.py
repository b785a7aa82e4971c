"""What this machine is and can do: precision, compilers, GPU state, energy."""

"""What this machine is and can do: precision, compilers, GPU state, memory nodes, control groups, energy."""

"""A run and what it leaves: folder, checkpoints, metrics, environment."""

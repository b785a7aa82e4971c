"""What this machine has and lacks for training. Nothing here needs torch or numpy before a check asks for it."""

"""What this machine has and lacks: one check a question, each in a process of its own."""

"""What others wrote, run beside ours on the same images."""

"""Many processes as one run: how they find each other, what they say to each other, and what if one is lost."""

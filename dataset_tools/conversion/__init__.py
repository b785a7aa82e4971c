"""From any image source to a verified data set on disk, and what can be asked of that data set."""
